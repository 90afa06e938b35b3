"""Fetch or create one item for each argument, all at once: the race of a get-or-create."""

import asyncio
from argparse import ArgumentParser
from collections.abc import Awaitable, Callable
from typing import Any

from django.core.management.base import BaseCommand
from django.db import IntegrityError

import asyncorm
from tests.project.myapp.models import Item


class Command(BaseCommand):
    help = __doc__ or ""

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("remote_ids", nargs="+", type=int)
        parser.add_argument(
            "--mode", choices=["aget_or_create", "naive", "atomic"], default="aget_or_create"
        )
        parser.add_argument(
            "--prefix",
            choices=["native_", "a"],
            default="native_",
            help="which methods to call; a* needs SWAP_MANAGERS to be native",
        )
        parser.add_argument(
            "--together",
            action="store_true",
            help="every task looks before any task creates, so that the race is certain",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        results = asyncio.run(self.sync_all(**options))
        for result in results:
            self.stdout.write(
                type(result).__name__ if isinstance(result, Exception) else str(result)
            )
        errors = [result for result in results if isinstance(result, Exception)]
        if errors:
            raise errors[0]

    async def sync_all(
        self, remote_ids: list[int], mode: str, prefix: str, together: bool, **options: Any
    ) -> list[bool | BaseException]:
        self.prefix = prefix
        self.barrier = asyncio.Barrier(len(remote_ids)) if together else None
        sync_one: Callable[[int], Awaitable[bool]] = getattr(self, f"sync_{mode}")
        return await asyncio.gather(*map(sync_one, remote_ids), return_exceptions=True)

    async def call(self, name: str, **fields: Any) -> Any:
        return await getattr(Item.objects, self.prefix + name)(**fields)

    async def meet(self) -> None:
        if self.barrier:
            await self.barrier.wait()

    async def sync_aget_or_create(self, remote_id: int) -> bool:
        await self.meet()
        _, created = await self.call("get_or_create", remote_id=remote_id)
        return created

    async def sync_naive(self, remote_id: int) -> bool:
        try:
            await self.call("get", remote_id=remote_id)
        except Item.DoesNotExist:
            await self.meet()
            await self.call("create", remote_id=remote_id)
            return True
        await self.meet()
        return False

    async def sync_atomic(self, remote_id: int) -> bool:
        try:
            await self.call("get", remote_id=remote_id)
        except Item.DoesNotExist:
            await self.meet()
            try:
                async with asyncorm.atomic():
                    await self.call("create", remote_id=remote_id)
                return True
            except IntegrityError:
                await self.call("get", remote_id=remote_id)
                return False
        await self.meet()
        return False
