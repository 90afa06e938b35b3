"""The Celery app of the tests' example project; its broker is a folder."""

import asyncio
import os
from pathlib import Path
from typing import Any

from asgiref.sync import async_to_sync
from celery import Celery
from celery.signals import worker_process_init, worker_process_shutdown
from django.db import connection, transaction

import asyncorm
from asyncorm import native

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.project.settings")
folder = Path(os.environ["CELERY_FOLDER"])
app = Celery("tests.project.tasks")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.conf.update(
    broker_url="filesystem://",
    broker_transport_options={
        name: str(folder / "queue")
        for name in ("data_folder_in", "data_folder_out", "processed_folder", "control_folder")
    },
    result_backend=f"file://{folder / 'results'}",
    worker_enable_remote_control=False,
)
runner: Any = None


def _pid() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return int(cursor.fetchone()[0])


@app.task
def count() -> int:
    """What synchronous and asynchronous code see, which have to be the same."""
    from tests.project.shop.models import Tag

    async def both() -> list[int]:
        return list(await asyncio.gather(Tag.objects.native_count(), Tag.objects.acount()))

    found = {Tag.objects.count(), *async_to_sync(both)()}
    (number,) = found
    return number


@app.task
def pids() -> list[int]:
    """The processes of the server that two loops used, and this process."""
    return [async_to_sync(native(_pid))() for _ in range(2)] + [os.getpid()]


@app.task
def kept_loop() -> list[int]:
    """The same with the process's own loop."""
    return [runner.run(native(_pid)()), os.getpid()]


@app.task
def add(name: str, fails: bool = False) -> None:
    """Write in a block of a coroutine; another task follows when that is committed."""
    from tests.project.shop.models import Tag

    async def write() -> None:
        async with asyncorm.atomic():
            await Tag.objects.native_create(name=name)
            await asyncio.to_thread(lambda: None)
            follow.delay_on_commit(f"{name} follows")
            if fails:
                raise ValueError(name)

    async_to_sync(write)()


@app.task
def follow(name: str) -> None:
    """Write as synchronous code does."""
    from tests.project.shop.models import Tag

    with transaction.atomic():
        Tag.objects.create(name=name)


@worker_process_init.connect
def _start(**kwargs: Any) -> None:
    global runner
    runner = asyncio.Runner()


@worker_process_shutdown.connect
def _stop(**kwargs: Any) -> None:
    runner.close()
