"""Transactions under structured concurrency: one scenario for each promise."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import anyio
import psycopg
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.db import (
    DatabaseError,
    IntegrityError,
    InterfaceError,
    InternalError,
    NotSupportedError,
    OperationalError,
    connection,
    transaction,
)
from django.db.models.signals import post_save
from django.db.transaction import TransactionManagementError
from django.dispatch import Signal
from django.test import override_settings
from django.test.utils import CaptureQueriesContext
from psycopg import IsolationLevel
from psycopg.errors import DeadlockDetected, SerializationFailure

import asyncorm
from tests.project.myapp.models import Item
from tests.support import all_given_back, database, eventually, value

ids = count(1)


@pytest.fixture(autouse=True)
def clean(django_db_setup: Any, django_db_blocker: Any) -> Iterator[None]:
    with django_db_blocker.unblock():
        yield
        with connection.cursor() as cursor:
            cursor.execute("TRUNCATE myapp_item")
        connection.close()


def setting() -> str:
    return str(value("SELECT current_setting('app.tenant', true)"))


async def add(name: str, remote_id: int | None = None) -> Item:
    return await Item.objects.native_create(remote_id=remote_id or next(ids), name=name)


async def names() -> list[str]:
    return sorted(await Item.objects.values_list("name", flat=True).anative())


async def committed() -> list[str]:
    """What other connections see."""
    async with asyncorm.detached():
        return await names()


async def backend() -> int:
    async with asyncorm.cursor() as cursor:
        await cursor.execute("SELECT pg_backend_pid()")
        return (await cursor.fetchone())[0]  # type: ignore[index,no-any-return]


async def sleep_on_server(seconds: float) -> None:
    async with asyncorm.cursor() as cursor:
        await cursor.execute("SELECT pg_sleep(%s)", [seconds])


def here() -> str:
    """Where messages say that a block begins, if it begins on the next line."""
    import sys

    frame = sys._getframe(1)
    return f"{frame.f_code.co_filename}:{frame.f_lineno + 1}"


# Starting tasks in a block


async def with_gather(jobs: list[Awaitable[None]]) -> None:
    await asyncio.gather(*jobs)


async def with_task_group(jobs: list[Any]) -> None:
    async with asyncio.TaskGroup() as group:
        for job in jobs:
            group.create_task(job)


async def with_anyio(jobs: list[Any]) -> None:
    async def run(job: Awaitable[None]) -> None:
        await job

    async with anyio.create_task_group() as group:
        for job in jobs:
            group.start_soon(run, job)


async def with_create_task(jobs: list[Any]) -> None:
    for task in [asyncio.create_task(job) for job in jobs]:
        await task


async def with_wait_for(jobs: list[Any]) -> None:
    await asyncio.gather(*(asyncio.wait_for(job, 30) for job in jobs))


STARTERS = [with_gather, with_task_group, with_anyio, with_create_task, with_wait_for]
starters = pytest.mark.parametrize("start", STARTERS, ids=lambda start: start.__name__)


@starters
async def test_tasks_started_in_a_block_belong_to_it(start: Any) -> None:
    pids = set()

    async def job(name: str) -> None:
        pids.add(await backend())
        await add(name)
        pids.add(await backend())

    async with asyncorm.atomic():
        pids.add(await backend())
        await start([job(f"a{n}") for n in range(8)])
        assert len(await names()) == 8
        assert await committed() == []
    assert len(pids) == 1
    assert await committed() == [f"a{n}" for n in range(8)]


@starters
async def test_a_rollback_takes_all_tasks_writes_with_it(start: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        async with asyncorm.atomic():
            await start([add(f"a{n}") for n in range(8)])
            raise ZeroDivisionError
    assert await committed() == []


async def test_tasks_of_tasks_belong_to_the_block_too() -> None:
    async def grandchild() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(add("b"))

    with pytest.raises(ZeroDivisionError):
        async with asyncorm.atomic():
            await asyncio.gather(asyncio.gather(add("a"), grandchild()), grandchild())
            assert await names() == ["a", "b", "b"]
            raise ZeroDivisionError
    assert await committed() == []


async def test_blocks_of_tasks_that_are_in_none_are_parallel() -> None:
    async def block(n: int) -> int:
        async with asyncorm.atomic():
            await add(f"a{n}")
            await barrier.wait()  # reached by all five only if they are in their blocks at once
            return await backend()

    barrier = asyncio.Barrier(5)
    async with asyncio.timeout(30):
        pids = await asyncio.gather(*(block(n) for n in range(5)))
    assert len(set(pids)) == 5


async def test_atomic_decorates_a_coroutine_function() -> None:
    @asyncorm.atomic
    async def bare(name: str) -> str:
        await add(name)
        raise ZeroDivisionError

    @asyncorm.atomic(durable=True)
    async def called(name: str) -> str:
        await asyncio.gather(add(name), add(name))
        return name

    with pytest.raises(ZeroDivisionError):
        await bare("lost")
    assert await asyncio.gather(called("a"), called("b")) == ["a", "b"]
    assert await committed() == ["a", "a", "b", "b"]
    with pytest.raises(TypeError, match="coroutine functions"):
        asyncorm.atomic(lambda: None)  # type: ignore[arg-type,return-value]


# Savepoints


async def test_a_savepoint_contains_exactly_its_own_tasks_statements() -> None:
    inside, outside = asyncio.Event(), asyncio.Event()

    async def fails() -> None:
        async with asyncorm.atomic():
            await add("lost")
            inside.set()
            await outside.wait()  # the others' statements are under way
            await asyncio.gather(add("lost"), add("lost"))
            raise ZeroDivisionError

    async def plain(n: int) -> None:
        await inside.wait()
        if n == 4:
            asyncio.get_running_loop().call_later(0.05, outside.set)
        await add(f"plain{n}")

    async with asyncorm.atomic():
        results = await asyncio.gather(
            fails(), *(plain(n) for n in range(5)), return_exceptions=True
        )
        assert [type(r) for r in results if r] == [ZeroDivisionError]
    assert await committed() == [f"plain{n}" for n in range(5)]


@pytest.mark.parametrize("seed", range(5))
async def test_savepoints_nest_properly_whatever_the_interleaving(seed: int) -> None:
    choose = random.Random(seed)
    expected: list[str] = []

    async def worker(path: str, depth: int, kept: bool) -> None:
        pause = asyncio.sleep(choose.random() / 200)
        await pause
        fails = choose.random() < 0.4
        try:
            async with asyncorm.atomic():
                survives = kept and not fails
                for n in range(2):
                    await add(f"{path}/{n}")
                    if survives:
                        expected.append(f"{path}/{n}")
                    await asyncio.sleep(choose.random() / 200)
                if depth:
                    await asyncio.gather(
                        *(worker(f"{path}.{n}", depth - 1, survives) for n in range(3))
                    )
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass

    async with asyncorm.atomic():
        await asyncio.gather(*(worker(str(n), 2, True) for n in range(3)))
    assert await committed() == sorted(expected)


async def test_sibling_blocks_take_turns_in_order_of_arrival() -> None:
    order = []

    async def block(n: int) -> None:
        async with asyncorm.atomic():
            order.append(n)
            await asyncio.sleep(0.01)
            await add(f"a{n}")
            order.append(n)

    async with asyncorm.atomic():
        await asyncio.gather(*(block(n) for n in range(5)))
    assert order == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


async def test_django_blocks_inside_operations_are_of_the_same_tree() -> None:
    def work(name: str, fail: bool) -> None:
        with transaction.atomic():
            Item.objects.create(remote_id=next(ids), name=name)
            asyncorm.await_(asyncio.sleep(0.01))  # others get a chance to slip in
            Item.objects.create(remote_id=next(ids), name=name)
            if fail:
                raise ZeroDivisionError

    async with asyncorm.atomic():
        results = await asyncio.gather(
            *(asyncorm.native(work)(f"a{n}", n % 2 == 1) for n in range(6)),
            add("plain"),
            return_exceptions=True,
        )
    assert sum(isinstance(r, ZeroDivisionError) for r in results) == 3
    assert await committed() == ["a0", "a0", "a2", "a2", "a4", "a4", "plain"]


async def test_a_block_without_savepoint_is_rolled_back_with_the_block_outside() -> None:
    async with asyncorm.atomic():
        await add("a")
        with pytest.raises(ZeroDivisionError):
            async with asyncorm.atomic(savepoint=False):
                await add("b")
                raise ZeroDivisionError
        with pytest.raises(TransactionManagementError):
            await add("c")
    assert await committed() == []


async def test_manual_savepoints_in_native_code() -> None:
    def work() -> None:
        Item.objects.create(remote_id=next(ids), name="kept")
        sid = transaction.savepoint()
        Item.objects.create(remote_id=next(ids), name="lost")
        transaction.savepoint_rollback(sid)
        transaction.savepoint_commit(sid)
        assert transaction.get_connection().in_atomic_block
        assert not transaction.get_autocommit()

    async with asyncorm.atomic():
        await asyncorm.native(work)()
    assert await committed() == ["kept"]
    assert await asyncorm.native(transaction.get_autocommit)()


# Failing tasks


async def test_a_failing_child_rolls_back_its_own_nested_block_alone() -> None:
    await add("first", 1_000_001)

    async def child(n: int) -> None:
        async with asyncorm.atomic():
            await add(f"a{n}")
            if n == 2:
                await add("twice", 1_000_001)

    async with asyncorm.atomic():
        results = await asyncio.gather(*(child(n) for n in range(4)), return_exceptions=True)
        assert [type(r) for r in results if r] == [IntegrityError]
        await add("after")
    assert await committed() == ["a0", "a1", "a3", "after", "first"]


async def test_a_childs_error_that_escapes_rolls_back_the_whole_block() -> None:
    async def child(n: int) -> None:
        async with asyncorm.atomic():
            await add(f"a{n}")
            if n == 2:
                raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncorm.atomic():
            async with asyncio.TaskGroup() as group:
                for n in range(4):
                    group.create_task(child(n))
    assert caught.group_contains(ZeroDivisionError)
    assert await committed() == []


async def test_an_error_outside_a_nested_block_poisons_the_block_for_all_tasks() -> None:
    await add("first", 1_000_001)
    failed = asyncio.Event()

    async def fails() -> None:
        try:
            await add("twice", 1_000_001)
        finally:
            failed.set()

    async def later(statement: Callable[[], Awaitable[Any]]) -> None:
        await failed.wait()
        await statement()

    async def nested() -> None:
        async with asyncorm.atomic():
            await add("nested")

    async with asyncorm.atomic():
        await add("a")
        results = await asyncio.gather(
            fails(),
            later(lambda: add("b")),
            later(names),
            later(nested),
            later(backend),
            return_exceptions=True,
        )
        assert isinstance(results[0], IntegrityError)
        assert [type(r) for r in results[1:]] == [TransactionManagementError] * 4
        assert isinstance(results[1].__cause__, IntegrityError)  # type: ignore[union-attr]
        with pytest.raises(TransactionManagementError):
            await add("c")
    assert await committed() == ["first"]


async def test_statements_that_wait_for_a_failing_one_get_the_same_error() -> None:
    await add("first", 1_000_001)
    async with asyncorm.atomic():
        results = await asyncio.gather(
            add("twice", 1_000_001), *(add(f"a{n}") for n in range(5)), return_exceptions=True
        )
    assert [type(r) for r in results] == [IntegrityError] + [TransactionManagementError] * 5
    assert await committed() == ["first"]


async def test_a_poisoned_nested_block_leaves_the_outer_one_alone() -> None:
    await add("first", 1_000_001)

    async def nested() -> None:
        async with asyncorm.atomic():
            results = await asyncio.gather(
                add("twice", 1_000_001), add("lost"), return_exceptions=True
            )
            assert [type(r) for r in results] == [IntegrityError, TransactionManagementError]

    async with asyncorm.atomic():
        await asyncio.gather(add("a"), nested(), add("b"))
    assert await committed() == ["a", "b", "first"]


async def test_an_aborted_transaction_is_not_taken_for_committed() -> None:
    """The server answers COMMIT with ROLLBACK then: no callback may run."""
    called: list[int] = []
    origin = ""
    with pytest.raises(TransactionManagementError) as caught:
        origin = here()
        async with asyncorm.atomic():
            await add("a")
            asyncorm.on_commit(lambda: called.append(1))
            with pytest.raises(DatabaseError):
                async with asyncorm.cursor() as cursor:
                    await cursor.execute("SELECT 1 / 0")
    assert origin in str(caught.value)
    assert await committed() == []
    assert called == []


async def test_gather_that_raises_while_its_other_tasks_go_on() -> None:
    async def fails() -> None:
        raise ZeroDivisionError

    for n in range(10):
        tasks = [asyncio.ensure_future(add("lost")) for _ in range(3)]
        with pytest.raises(ZeroDivisionError):
            async with asyncorm.atomic():
                tasks += [
                    asyncio.ensure_future(job)
                    for job in (sleep_on_server(0.03), add("lost"), nothing(n), add("lost"))
                ]
                await asyncio.gather(fails(), *tasks)
        await asyncio.wait(tasks)
        for task in tasks[3:]:
            assert task.exception() is None or isinstance(
                task.exception(), TransactionManagementError
            )
    await all_given_back()
    assert await committed() == ["lost"] * 30  # those that began before the blocks


async def nothing(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


# The end of a block


async def test_a_block_ends_only_when_its_statements_have_ended() -> None:
    async def slow() -> None:
        async with asyncorm.cursor() as cursor:
            await cursor.execute(
                "INSERT INTO myapp_item (remote_id, name)"
                " SELECT %s, 'slow' FROM (SELECT pg_sleep(0.3)) AS wait",
                [next(ids)],
            )

    async with asyncorm.atomic():
        task = asyncio.create_task(slow())
        await asyncio.sleep(0.1)
    assert await committed() == ["slow"]
    await task


async def test_a_task_that_outlives_its_block_gets_an_error_that_names_it() -> None:
    ended = asyncio.Event()

    async def outlives() -> None:
        await add("a")
        await ended.wait()
        await add("b")

    origin = here()
    async with asyncorm.atomic():
        task = asyncio.create_task(outlives())
        await asyncio.sleep(0)
        await names()  # waits for the task's statement
    ended.set()
    with pytest.raises(TransactionManagementError) as caught:
        await task
    assert origin in str(caught.value)
    assert "detached" in str(caught.value)
    assert await committed() == ["a"]


@pytest.mark.parametrize("what", ["atomic", "iterate", "native", "nested"])
async def test_an_outliving_task_is_refused_whatever_it_does(what: str) -> None:
    ended = asyncio.Event()

    async def outlives() -> None:
        await ended.wait()
        if what == "atomic":
            async with asyncorm.atomic():
                pass
        elif what == "iterate":
            async for _ in Item.objects.native_iterator():
                pass
        elif what == "native":
            await asyncorm.native(Item.objects.count)()
        else:
            await asyncio.create_task(add("a"))

    origin = here()
    async with asyncorm.atomic():
        task = asyncio.create_task(outlives())
        await asyncio.sleep(0)
    ended.set()
    with pytest.raises(TransactionManagementError) as caught:
        await task
    assert origin in str(caught.value)


async def test_an_outliving_task_of_a_nested_block_is_refused_inside_the_outer_one() -> None:
    ended = asyncio.Event()

    async def outlives() -> None:
        await ended.wait()
        await add("late")

    async with asyncorm.atomic():
        origin = here()
        async with asyncorm.atomic():
            task = asyncio.create_task(outlives())
        ended.set()
        with pytest.raises(TransactionManagementError) as caught:
            await task
        assert origin in str(caught.value)
        await add("a")
    assert await committed() == ["a"]


async def test_a_task_waiting_for_the_lock_when_the_block_ends_is_refused() -> None:
    async with asyncorm.atomic():
        slow = asyncio.create_task(sleep_on_server(0.2))
        await asyncio.sleep(0.05)
        leaving = asyncio.Event()

        async def late() -> None:
            await leaving.wait()
            await add("late")

        task = asyncio.create_task(late())
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(leaving.set)  # the exit is in the queue by then
    await slow
    with pytest.raises(TransactionManagementError):
        await task
    assert await committed() == []


async def test_detached_works_outside_the_block() -> None:
    with pytest.raises(ZeroDivisionError):
        async with asyncorm.atomic():
            inside = await backend()
            await add("lost")
            async with asyncorm.detached():
                assert await backend() != inside
                await asyncio.gather(add("a"), add("b"))
                async with asyncorm.atomic():
                    await add("c")
            assert await backend() == inside
            raise ZeroDivisionError
    assert await committed() == ["a", "b", "c"]


async def test_a_detached_task_may_outlive_the_block() -> None:
    ended = asyncio.Event()

    async def outlives() -> str:
        await add("a")
        await ended.wait()
        async with asyncorm.atomic():
            await asyncio.gather(add("b"), add("c"))
        return "done"

    with pytest.raises(ZeroDivisionError):
        async with asyncorm.atomic():
            await add("lost")
            task = asyncorm.detached_task(outlives())
            raise ZeroDivisionError
    ended.set()
    assert await task == "done"
    assert await committed() == ["a", "b", "c"]


async def test_a_detached_task_has_the_context_variables_of_its_starter() -> None:
    from contextvars import ContextVar

    variable: ContextVar[str] = ContextVar("variable", default="")

    async def read() -> str:
        return variable.get()

    async with asyncorm.atomic():
        variable.set("value")
        assert await asyncorm.detached_task(read()) == "value"


# Waits that cannot end


async def test_a_wait_that_cannot_end_ends_with_an_error_that_names_both_places() -> None:
    began = asyncio.Event()

    async def sibling() -> None:
        await began.wait()
        await add("sibling")  # waits for the nested block, which waits for this task

    async def both() -> None:
        nonlocal outer, nested
        outer = here()
        async with asyncorm.atomic():
            task = asyncio.create_task(sibling())
            nested = here()
            async with asyncorm.atomic():
                began.set()
                await task

    outer = nested = ""
    with override_settings(ASYNCORM={"LOCK_TIMEOUT": 0.3}):
        async with asyncio.timeout(30):
            with pytest.raises(TransactionManagementError) as caught:
                await both()
    assert outer in str(caught.value)
    assert nested in str(caught.value)
    assert "LOCK_TIMEOUT" in str(caught.value)
    assert await committed() == []


async def test_a_long_wait_that_can_end_is_waited_for() -> None:
    async def busy() -> None:
        async with asyncorm.atomic():
            for _ in range(4):
                await sleep_on_server(0.3)
                await asyncio.sleep(0.01)

    with override_settings(ASYNCORM={"LOCK_TIMEOUT": 0.5}):
        async with asyncorm.atomic():
            task = asyncio.create_task(busy())
            await asyncio.sleep(0.05)
            await add("a")
            assert task.done()
    assert await committed() == ["a"]


async def test_a_statement_longer_than_the_time_is_waited_for() -> None:
    with override_settings(ASYNCORM={"LOCK_TIMEOUT": 0.2}):
        async with asyncorm.atomic():
            await asyncio.gather(sleep_on_server(0.8), add("a"))
    assert await committed() == ["a"]


# on_commit


async def test_callbacks_run_in_order_after_the_outermost_commit() -> None:
    seen: list[Any] = []

    async def look(name: str) -> None:
        seen.append((name, await committed()))

    async def child(n: int) -> None:
        async with asyncorm.atomic():
            await add(f"a{n}")
            asyncorm.on_commit(lambda: look(f"child {n}"))

    async with asyncorm.atomic():
        asyncorm.on_commit(lambda: look("first"))
        await asyncio.gather(child(0), child(1))
        async with asyncorm.atomic():
            asyncorm.on_commit(lambda: seen.append(("plain", None)))
        asyncorm.on_commit(lambda: look("last"))
        assert seen == []
    both = ["a0", "a1"]
    assert seen == [
        ("first", both),
        ("child 0", both),
        ("child 1", both),
        ("plain", None),
        ("last", both),
    ]


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("by", [asyncorm.on_commit, transaction.on_commit])
async def test_on_commit_where_a_session_is_shared_without_a_transaction(
    by: Any, threaded: bool
) -> None:
    """Synchronous code has set something and awaits: its connection serves what it awaits."""
    called: list[str] = []

    def inside() -> None:
        assert setting() == "acme"
        by(lambda: called.append("native"))

    async def awaited() -> None:
        by(lambda: called.append("coroutine"))
        await asyncorm.native(inside)()

    def outside() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET app.tenant = 'acme'")
        try:
            async_to_sync(awaited)()
        finally:
            connection.close()

    await (sync_to_async if threaded else asyncorm.native)(outside)()
    assert called == ["coroutine", "native"]


async def test_callbacks_do_not_run_after_a_rollback() -> None:
    called: list[str] = []
    with pytest.raises(ZeroDivisionError):
        async with asyncorm.atomic():
            asyncorm.on_commit(lambda: called.append("a"))
            raise ZeroDivisionError
    async with asyncorm.atomic():  # nor with the next commit on the same connection
        await add("b")
    assert called == []


async def test_a_rolled_back_savepoint_drops_its_tasks_callbacks_alone() -> None:
    called: list[str] = []
    inside = asyncio.Event()

    async def fails() -> None:
        async with asyncorm.atomic():
            asyncorm.on_commit(lambda: called.append("lost"))
            async with asyncorm.atomic():
                asyncorm.on_commit(lambda: called.append("lost too"))
            inside.set()
            await asyncio.sleep(0.02)
            raise ZeroDivisionError

    async def sibling() -> None:
        await inside.wait()
        asyncorm.on_commit(lambda: called.append("sibling"))  # while the other's savepoint is open

    async with asyncorm.atomic():
        asyncorm.on_commit(lambda: called.append("before"))
        await asyncio.gather(fails(), sibling(), return_exceptions=True)
        asyncorm.on_commit(lambda: called.append("after"))
    assert called == ["before", "sibling", "after"]


async def test_a_callback_registered_while_its_block_is_rolled_back_is_never_called() -> None:
    called: list[int] = []

    async def register() -> None:
        while True:
            asyncorm.on_commit(lambda: called.append(1))
            await asyncio.sleep(0)

    async with asyncorm.atomic():
        with contextlib.suppress(ZeroDivisionError):
            async with asyncorm.atomic():
                task = asyncio.create_task(register())
                await add("lost")
                raise ZeroDivisionError
        with pytest.raises(TransactionManagementError):
            await task
    assert called == []


async def test_native_code_registers_callbacks_with_its_own_block() -> None:
    called: list[str] = []

    def work(fail: bool) -> None:
        with transaction.atomic():
            transaction.on_commit(lambda: called.append(f"fail={fail}"))
            asyncorm.await_(asyncio.sleep(0.01))
            if fail:
                raise ZeroDivisionError

    async with asyncorm.atomic():
        run = asyncorm.native(work)
        await asyncio.gather(run(True), run(False), run(True), return_exceptions=True)
    assert called == ["fail=False"]


async def test_robust_callbacks_are_logged_and_others_raise(
    caplog: pytest.LogCaptureFixture,
) -> None:
    called: list[str] = []

    async def fails() -> None:
        raise ZeroDivisionError("from a callback")

    async with asyncorm.atomic():
        await add("a")
        asyncorm.on_commit(fails, robust=True)
        asyncorm.on_commit(lambda: called.append("after the robust one"))
    assert called == ["after the robust one"]
    assert "from a callback" in caplog.text

    with pytest.raises(ZeroDivisionError):
        async with asyncorm.atomic():
            await add("b")
            asyncorm.on_commit(fails)
            asyncorm.on_commit(lambda: called.append("not reached"))
    assert await committed() == ["a", "b"]
    async with asyncorm.atomic():
        await add("c")
    assert called == ["after the robust one"]


async def test_each_callback_is_free_to_open_its_own_transaction() -> None:
    async def more(name: str) -> None:
        async with asyncorm.atomic(durable=True):
            await asyncio.gather(add(name), add(name))
            asyncorm.on_commit(lambda: add(f"{name}+"))

    def synchronous() -> None:
        with transaction.atomic(durable=True):
            Item.objects.create(remote_id=next(ids), name="c")

    async with asyncorm.atomic():
        asyncorm.on_commit(lambda: more("a"))
        asyncorm.on_commit(lambda: more("b"))
        asyncorm.on_commit(synchronous)
    assert await committed() == ["a", "a", "a+", "b", "b", "b+", "c"]


async def test_outside_a_block_a_callback_is_called_at_once() -> None:
    called = []
    done = asyncio.Event()

    async def later() -> None:
        await add("a")
        done.set()

    asyncorm.on_commit(lambda: called.append(1))
    assert called == [1]
    asyncorm.on_commit(later)
    async with asyncio.timeout(30):
        await done.wait()
    assert await committed() == ["a"]
    with pytest.raises(TypeError):
        asyncorm.on_commit("not callable")  # type: ignore[arg-type]


# Receivers, await_, native calls


async def test_what_an_operation_awaits_runs_in_its_innermost_block() -> None:
    pids = set()

    async def coroutine(name: str) -> None:
        pids.add(await backend())
        await asyncio.gather(add(name), add(name))
        async with asyncorm.atomic():
            await add(name)

    def work() -> None:
        with transaction.atomic():
            asyncorm.await_(coroutine("a"))
            asyncorm.await_(asyncorm.native(Item.objects.create)(remote_id=next(ids), name="b"))
            assert Item.objects.count() == 4
        with contextlib.suppress(ZeroDivisionError), transaction.atomic():
            asyncorm.await_(coroutine("lost"))
            raise ZeroDivisionError

    async with asyncio.timeout(30), asyncorm.atomic():
        pids.add(await backend())
        await asyncorm.native(work)()
        assert await committed() == []
    assert await committed() == ["a", "a", "a", "b"]
    assert len(pids) == 1
    async with asyncio.timeout(30):
        await Item.objects.all().native_delete()
        await asyncorm.native(work)()
    assert await committed() == ["a", "a", "a", "b"]


@pytest.mark.parametrize("inside", [True, False])
async def test_async_receivers_run_in_the_innermost_block(inside: bool) -> None:
    """Two receivers: Django 6.1 runs them as tasks that share one Context."""

    async def receiver(name: str, instance: Item) -> None:
        if not instance.name.startswith("saved"):
            return
        await asyncio.sleep(0)
        await add(f"{name}: plain")
        async with asyncorm.atomic():
            await add(f"{name}: nested")
            await asyncio.sleep(0.01)
            async with asyncorm.atomic():
                await add(f"{name}: nested twice")
        try:
            async with asyncorm.atomic():
                await add(f"{name}: lost")
                await asyncio.sleep(0.01)
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        await add(f"{name}: after")

    async def one(instance: Item, **kwargs: Any) -> None:
        await receiver("one", instance)

    async def two(instance: Item, **kwargs: Any) -> None:
        await receiver("two", instance)

    def work() -> None:
        with transaction.atomic():
            Item.objects.create(remote_id=next(ids), name="saved")
            raise ZeroDivisionError

    steps = ("plain", "nested", "nested twice", "after")
    expected = sorted([f"{name}: {step}" for name in ("one", "two") for step in steps] + ["saved"])
    post_save.connect(one, sender=Item)
    post_save.connect(two, sender=Item)
    try:
        async with asyncio.timeout(30):
            if inside:
                async with asyncorm.atomic():
                    await add("saved")
                    assert await committed() == []
                assert await committed() == expected
            else:
                with pytest.raises(ZeroDivisionError):
                    await asyncorm.native(work)()
                assert await committed() == []
                await add("saved")
                assert await committed() == expected
    finally:
        post_save.disconnect(one, sender=Item)
        post_save.disconnect(two, sender=Item)


@pytest.mark.parametrize("robust", [True, False])
async def test_receivers_that_share_a_context_have_blocks_of_their_own(robust: bool) -> None:
    signal = Signal()
    pids = []

    async def receive(name: str) -> None:
        async with asyncorm.atomic():
            await add(name)
            await asyncio.sleep(0.01)
            async with asyncorm.atomic():
                await add(name)
                await asyncio.sleep(0.01)
                pids.append(await backend())

    async def one(**kwargs: Any) -> None:
        await receive("one")

    async def two(**kwargs: Any) -> None:
        await receive("two")

    signal.connect(one)
    signal.connect(two)
    send = signal.asend_robust if robust else signal.asend
    async with asyncio.timeout(30):
        await send(sender=None)
    assert len(set(pids)) == 2  # outside any block: two transactions
    async with asyncio.timeout(30), asyncorm.atomic():
        await send(sender=None)
        assert pids[2:] == [await backend()] * 2
        # What the receivers entered they have left, also in the Context that Django copies back.
        await add("after")
    assert await committed() == ["after"] + ["one"] * 4 + ["two"] * 4


async def test_sync_to_async_inside_a_block_is_refused() -> None:
    origin = here()
    async with asyncorm.atomic():
        await add("a")
        with pytest.raises(TransactionManagementError) as caught:
            await sync_to_async(Item.objects.create)(remote_id=next(ids), name="slipped")
        assert "asyncorm.native" in str(caught.value)
        assert origin in str(caught.value)
        async with asyncorm.detached():
            await sync_to_async(Item.objects.create)(remote_id=next(ids), name="detached")
    await sync_to_async(Item.objects.create)(remote_id=next(ids), name="after")
    await sync_to_async(lambda: connection.close())()
    assert await committed() == ["a", "after", "detached"]


async def test_native_code_sees_the_blocks_connection() -> None:
    def look() -> tuple[bool, int]:
        conn = transaction.get_connection()
        assert conn is transaction.get_connection("default")
        with conn.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            return conn.in_atomic_block, cursor.fetchone()[0]

    assert not (await asyncorm.native(look)())[0]
    async with asyncorm.atomic():
        assert await asyncorm.native(look)() == (True, await backend())


async def test_a_receivers_task_is_not_in_another_receivers_block() -> None:
    """The receivers may share a Context (Django 6.1), which a task that one starts copies."""
    signal = Signal()
    entered, looked = asyncio.Event(), asyncio.Event()
    pids = {}

    async def one(**kwargs: Any) -> None:
        async with asyncorm.atomic():
            pids["block"] = await backend()
            pids["its task"] = await asyncio.create_task(backend())
            entered.set()
            await looked.wait()

    async def two(**kwargs: Any) -> None:
        await entered.wait()
        pids["another's task"] = await asyncio.create_task(backend())
        looked.set()

    signal.connect(one)
    signal.connect(two)
    async with asyncio.timeout(30):
        await signal.asend(sender=None)
    assert pids["block"] == pids["its task"] != pids["another's task"]


async def test_another_loop_inside_a_block_is_refused() -> None:
    """asyncio.to_thread() copies the Context, with the block in it."""

    async def slip() -> None:
        await add("slipped")

    async def work_outside() -> None:
        async with asyncorm.detached():
            await add("detached")

    origin = here()
    async with asyncorm.atomic():
        await add("a")
        with pytest.raises(TransactionManagementError, match="event loop") as caught:
            await asyncio.to_thread(asyncio.run, slip())
        assert origin in str(caught.value)
        await asyncio.to_thread(asyncio.run, work_outside())
    assert await committed() == ["a", "detached"]


async def test_a_kept_connection_with_blocks_and_tasks() -> None:
    ended = asyncio.Event()

    async def late() -> int:
        await ended.wait()
        return await backend()

    async def fails() -> None:
        async with asyncorm.atomic():
            await asyncio.gather(add("lost"), add("lost"))
            raise ZeroDivisionError

    async with asyncorm.connection():
        mine = await backend()
        assert mine not in await asyncio.gather(backend(), backend())
        async with asyncorm.atomic():
            assert await asyncio.gather(backend(), backend()) == [mine, mine]
            await asyncio.gather(fails(), add("a"), fails(), return_exceptions=True)
            outlives = asyncio.create_task(late())
        ended.set()
        with pytest.raises(TransactionManagementError):
            await outlives
        assert await backend() == mine
        assert mine not in await asyncio.gather(backend(), backend())
    assert await committed() == ["a"]
    await all_given_back()


async def test_wait_for_in_a_kept_connection() -> None:
    """Before Python 3.12 it runs what it is given in a task of its own."""

    async def in_time() -> int:
        return await asyncio.wait_for(asyncio.wait_for(backend(), 30), 30)

    async def in_block() -> int:
        async with asyncorm.atomic():
            await add("a")
            pids = {await backend(), await in_time(), *await asyncio.gather(backend(), in_time())}
        assert len(pids) == 1
        return pids.pop()

    async def gathered() -> list[int]:
        return await asyncio.gather(backend(), in_time(), backend(), in_time())

    async with asyncorm.connection():
        mine = await backend()
        assert await in_time() == mine
        assert await asyncio.wait_for(in_block(), 30) == mine
        assert mine not in await gathered()
        assert mine not in await asyncio.wait_for(gathered(), 30)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(in_time()) for _ in range(3)]
        assert mine not in [task.result() for task in tasks]
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(sleep_on_server(60), 0.05)
        assert await in_time() == await backend() == mine
    assert await committed() == ["a"]
    await all_given_back()


async def test_wait_for_a_second_connection_is_a_deadlock() -> None:
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 1, "timeout": 60}}) as alias:
        async with asyncorm.connection(alias):
            await Item.objects.using(alias).native_count()
            async with asyncorm.detached():
                with pytest.raises(OperationalError, match="Deadlock"):
                    await asyncio.wait_for(Item.objects.using(alias).native_count(), 30)
        await asyncorm.close_pools(alias)


# Django's own functions in a coroutine


async def test_djangos_functions_in_a_coroutine_are_about_the_block() -> None:
    """Celery's delay_on_commit() calls transaction.on_commit(), for instance."""
    called: list[str] = []

    async def awaited() -> None:
        await asyncio.sleep(0)
        called.append("awaited")

    async with asyncorm.atomic():
        assert connection.in_atomic_block
        assert not transaction.get_autocommit()
        assert not transaction.get_rollback()
        transaction.on_commit(lambda: called.append("called"))
        transaction.on_commit(awaited)  # type: ignore[arg-type]
        async with asyncorm.atomic():
            transaction.on_commit(lambda: called.append("lost"))
            transaction.set_rollback(True)
            assert transaction.get_rollback()
        assert not transaction.get_rollback()
        await asyncio.gather(add("a"), add("b"))
        with CaptureQueriesContext(connection) as queries:
            await add("c")
        with pytest.raises(SynchronousOnlyOperation):
            connection.cursor()
        assert called == []
    assert len(queries) == 1
    assert called == ["called", "awaited"]
    with contextlib.suppress(ZeroDivisionError):
        async with asyncorm.atomic():
            transaction.on_commit(lambda: called.append("lost"))
            raise ZeroDivisionError
    async with asyncorm.atomic():
        await add("lost")
        transaction.set_rollback(True)
    assert not connection.in_atomic_block
    transaction.on_commit(lambda: called.append("at once"))
    assert called == ["called", "awaited", "at once"]
    assert await committed() == ["a", "b", "c"]


@pytest.mark.parametrize("what", ["save", "create", "update"])
async def test_what_is_refused_in_a_coroutine_does_not_end_the_block(what: str) -> None:
    """A handler of logging may catch the error, a finaliser nobody sees."""
    calls: dict[str, Callable[[], Any]] = {
        "save": lambda: Item(name="refused").save(),
        "create": lambda: Item.objects.create(name="refused"),
        "update": lambda: Item.objects.update(name="refused"),
    }
    for rolled_back in (False, True):
        async with asyncorm.atomic():
            await add("a")
            try:
                calls[what]()
            except SynchronousOnlyOperation:
                if rolled_back:  # that is the caller's will
                    transaction.set_rollback(True)
    assert await committed() == ["a"]


async def test_djangos_atomic_in_a_coroutine_is_refused() -> None:
    called: list[str] = []
    for inside in (False, True):
        async with asyncorm.atomic() if inside else contextlib.nullcontext():
            with pytest.raises(SynchronousOnlyOperation, match=r"asyncorm\.atomic"):
                with transaction.atomic():
                    await add("lost")
            assert connection.in_atomic_block is inside
            transaction.on_commit(lambda: called.append("django"))
            asyncorm.on_commit(lambda: called.append("ours"))
            await add("a")
    assert called == ["django", "ours"] * 2
    assert await committed() == ["a", "a"]


async def test_a_commit_outside_a_block_does_not_end_the_next_one() -> None:
    """Django remembers that it has committed: not for the nested block of somebody else."""
    await asyncorm.native(transaction.commit)()
    async with asyncorm.atomic():
        async with asyncorm.atomic():
            await add("a")

    def together() -> None:
        transaction.commit()
        with transaction.atomic(), transaction.atomic():
            Item.objects.create(remote_id=next(ids), name="b")

    await asyncorm.native(together)()
    assert await names() == ["a", "b"]


async def test_on_commit_without_autocommit() -> None:
    called: list[int] = []
    async with asyncorm.connection():
        await asyncorm.native(transaction.set_autocommit)(False)
        for on_commit in (asyncorm.on_commit, asyncorm.native(transaction.on_commit)):
            with pytest.raises(TransactionManagementError, match="manual transaction"):
                await (on_commit(lambda: called.append(1)) or asyncio.sleep(0))
        async with asyncorm.atomic():
            asyncorm.on_commit(lambda: called.append(2))
        assert called == []
        await asyncorm.native(transaction.commit)()
        await asyncorm.native(transaction.set_autocommit)(True)
        asyncorm.on_commit(lambda: called.append(3))
    assert called == [2, 3]


async def test_a_failed_block_without_a_savepoint_breaks_a_manual_transaction() -> None:
    def work() -> None:
        transaction.set_autocommit(False)
        with contextlib.suppress(KeyError), transaction.atomic(savepoint=False):
            Item.objects.create(remote_id=next(ids), name="half")
            raise KeyError
        with pytest.raises(TransactionManagementError, match="current transaction"):
            Item.objects.create(remote_id=next(ids), name="after")
        transaction.rollback()
        Item.objects.create(remote_id=next(ids), name="later")
        transaction.commit()
        transaction.set_autocommit(True)

    await asyncorm.native(work)()
    assert await names() == ["later"]
    await sync_to_async(work)()
    assert await names() == ["later", "later"]


def test_on_commit_in_synchronous_code() -> None:
    called: list[int] = []
    with transaction.atomic():
        asyncorm.on_commit(lambda: called.append(1))
        assert called == []
    asyncorm.on_commit(lambda: called.append(2))
    assert called == [1, 2]


async def test_errors_of_awaited_callbacks_outside_a_block(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fails() -> None:
        raise ZeroDivisionError

    for robust in (True, False):
        caplog.clear()
        asyncorm.on_commit(fails, robust=robust)
        await eventually(lambda: bool(caplog.records))
        record = caplog.records[0]
        assert record.name == ("asyncorm" if robust else "asyncio")
        assert "fails" in record.getMessage()
        assert record.exc_info is not None and record.exc_info[0] is ZeroDivisionError


# Fixtures: entered and left in different tasks


async def test_a_block_is_entered_left_and_used_in_different_tasks() -> None:
    """As pytest's asynchronous fixtures do, in one Context."""
    from contextvars import copy_context

    context = copy_context()
    loop = asyncio.get_running_loop()

    async def in_task(step: Any) -> Any:
        return await loop.create_task(step, context=context)

    async def lose() -> None:
        await asyncio.gather(add("lost"), add("lost"))

    outer, inner = asyncorm.atomic(), asyncorm.atomic()
    await in_task(outer.__aenter__())
    await in_task(add("a"))
    await in_task(inner.__aenter__())
    await in_task(lose())
    error = ZeroDivisionError()
    await in_task(inner.__aexit__(type(error), error, None))
    assert await in_task(names()) == ["a"]
    assert await committed() == []
    await in_task(add("b"))
    await in_task(outer.__aexit__(None, None, None))
    assert await committed() == ["a", "b"]
    await in_task(add("c"))
    assert await in_task(committed()) == ["a", "b", "c"]


async def test_a_generator_fixture_left_in_another_task() -> None:
    async def fixture() -> AsyncIterator[None]:
        async with asyncorm.atomic():
            await add("a")
            yield
            asyncorm.set_rollback(True)

    from contextvars import copy_context

    context = copy_context()
    loop = asyncio.get_running_loop()
    generator = fixture()

    async def advance() -> None:
        await anext(generator, None)

    async def test() -> None:
        await asyncio.gather(add("b"), add("c"))
        async with asyncorm.atomic():
            await add("d")
        assert await names() == ["a", "b", "c", "d"]

    await loop.create_task(advance(), context=context)
    await loop.create_task(test(), context=context)
    await loop.create_task(advance(), context=context)
    assert await committed() == []


# Options


async def test_durable_blocks_refuse_to_nest() -> None:
    async with asyncorm.atomic():
        with pytest.raises(RuntimeError, match="durable"):
            async with asyncorm.atomic(durable=True):
                pass
        await add("a")
    assert await committed() == ["a"]


async def shown(name: str) -> str:
    async with asyncorm.cursor() as cursor:
        await cursor.execute(f"SHOW {name}")
        return (await cursor.fetchone())[0]  # type: ignore[index,no-any-return]


@pytest.mark.parametrize("level", list(IsolationLevel))
async def test_isolation_level_of_one_block(level: IsolationLevel) -> None:
    async with asyncorm.connection():  # the same connection before and after
        before = await shown("transaction_isolation")
        async with asyncorm.atomic(isolation_level=level):
            assert await shown("transaction_isolation") == level.name.lower().replace("_", " ")
        async with asyncorm.atomic():
            assert await shown("transaction_isolation") == before


async def test_read_only_and_deferrable_of_one_block() -> None:
    async with asyncorm.connection():
        async with asyncorm.atomic(
            isolation_level=IsolationLevel.SERIALIZABLE, read_only=True, deferrable=True
        ):
            assert await shown("transaction_read_only") == "on"
            assert await shown("transaction_deferrable") == "on"
            assert await names() == []
        with pytest.raises(InternalError, match="read-only"):
            async with asyncorm.atomic(read_only=True):
                await add("refused")
        async with asyncorm.atomic():
            assert await shown("transaction_read_only") == "off"
            assert await shown("transaction_deferrable") == "off"
            assert await shown("transaction_isolation") == "read committed"
            await add("a")
    assert await committed() == ["a"]


async def test_characteristics_are_for_the_outermost_block() -> None:
    origin = here()
    async with asyncorm.atomic():
        for option in ({"isolation_level": IsolationLevel.SERIALIZABLE}, {"read_only": True}):
            with pytest.raises(TransactionManagementError) as caught:
                async with asyncorm.atomic(**option):  # type: ignore[arg-type]
                    pass
            assert origin in str(caught.value)
        await add("a")
    assert await committed() == ["a"]


async def test_statement_timeout_of_one_block() -> None:
    async with asyncorm.connection():
        with pytest.raises(OperationalError) as caught:
            async with asyncorm.atomic(statement_timeout=0.2):
                await add("lost")
                await sleep_on_server(30)
        assert isinstance(caught.value.__cause__, psycopg.errors.QueryCanceled)
        assert await shown("statement_timeout") == "0"
        async with asyncorm.atomic(statement_timeout=20):
            with pytest.raises(OperationalError):
                async with asyncorm.atomic(statement_timeout=0.2):
                    await add("lost")
                    await sleep_on_server(30)
            assert await shown("statement_timeout") == "20s"
            async with asyncorm.atomic(statement_timeout=10):
                assert await shown("statement_timeout") == "10s"
            assert await shown("statement_timeout") == "20s"
            await add("a")
        assert await shown("statement_timeout") == "0"
    assert await committed() == ["a"]
    with pytest.raises(ValueError, match="positive"):
        asyncorm.atomic(statement_timeout=0)


async def test_set_rollback() -> None:
    async with asyncorm.atomic():
        await add("a")
        async with asyncorm.atomic():
            await asyncio.gather(add("lost"), add("lost"))
            asyncorm.set_rollback(True)
        await add("b")
    assert await committed() == ["a", "b"]
    async with asyncorm.atomic():
        await add("lost")
        asyncorm.set_rollback(True)
    assert await committed() == ["a", "b"]
    with pytest.raises(TransactionManagementError):
        asyncorm.set_rollback(True)


async def test_set_rollback_of_a_task_concerns_its_own_block() -> None:
    async def child(name: str, rollback: bool) -> None:
        async with asyncorm.atomic():
            await add(name)
            await asyncio.sleep(0.01)
            asyncorm.set_rollback(rollback)

    async with asyncorm.atomic():
        await asyncio.gather(child("a", False), child("lost", True), child("b", False), add("c"))
    assert await committed() == ["a", "b", "c"]


async def test_set_rollback_while_another_tasks_savepoint_is_open() -> None:
    inside, marked = asyncio.Event(), asyncio.Event()

    async def nested() -> None:
        async with asyncorm.atomic():
            await add("lost")
            inside.set()
            await marked.wait()

    async with asyncorm.atomic():
        task = asyncio.create_task(nested())
        await inside.wait()
        asyncorm.set_rollback(True)
        marked.set()
        await task
        with pytest.raises(TransactionManagementError):
            await add("lost")
    assert await committed() == []


@pytest.mark.parametrize(
    "options",
    [
        {"statement_timeout": value}
        for value in (0, -1, float("nan"), float("inf"), 1e12, "1; DROP TABLE myapp_item")
    ]
    + [
        {"isolation_level": value}
        for value in ("SERIALIZABLE", "serializable; DROP TABLE myapp_item", 2, 99)
    ],
    ids=str,
)
def test_bad_options_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        asyncorm.atomic(**options)


async def test_native_code_works_with_djangos_functions_for_transactions() -> None:
    def work() -> None:
        with transaction.atomic():
            assert not transaction.get_rollback()
            with transaction.atomic():
                Item.objects.create(remote_id=next(ids), name="lost")
                transaction.set_rollback(True)
                assert transaction.get_rollback()
            assert not transaction.get_rollback()
            sid = transaction.savepoint()
            Item.objects.create(remote_id=next(ids), name="a")
            transaction.savepoint_commit(sid)
            with contextlib.suppress(ZeroDivisionError):
                with transaction.mark_for_rollback_on_error():
                    raise ZeroDivisionError
            assert transaction.get_rollback()
            transaction.set_rollback(False)
            transaction.clean_savepoints()

    await asyncorm.native(work)()
    assert await committed() == ["a"]
    with pytest.raises(TransactionManagementError):
        await asyncorm.native(transaction.get_rollback)()


async def test_an_engine_of_another_kind_is_refused() -> None:
    with pytest.raises(NotSupportedError):
        async with asyncorm.atomic("legacy"):
            pass


async def test_aliases_have_blocks_of_their_own() -> None:
    async with asyncorm.atomic():
        async with asyncorm.atomic("other"):
            async with asyncorm.cursor("other") as cursor:
                await cursor.execute("SELECT current_database()")
                assert "other" in (await cursor.fetchone())[0]  # type: ignore[index]
        await add("a")
        assert await committed() == []
    assert await committed() == ["a"]


# select_for_update


async def test_select_for_update_and_its_variants() -> None:
    first, second = await add("a"), await add("b")

    async def elsewhere(**options: Any) -> list[str]:
        """What another transaction can lock meanwhile."""
        async with asyncorm.detached(), asyncorm.atomic():
            rows = Item.objects.order_by("name").select_for_update(**options)
            return [row.name for row in await rows.anative()]

    async with asyncorm.atomic():
        locked = await Item.objects.select_for_update(of=("self",)).native_get(pk=first.pk)
        assert locked.name == "a"
        with pytest.raises(OperationalError) as caught:
            await elsewhere(nowait=True)
        assert isinstance(caught.value.__cause__, psycopg.errors.LockNotAvailable)
        assert await elsewhere(skip_locked=True) == ["b"]
    async with asyncorm.atomic():
        await Item.objects.select_for_update(no_key=True).native_get(pk=second.pk)
        async with asyncorm.detached(), asyncorm.cursor() as cursor:
            await cursor.execute(
                "SELECT name FROM myapp_item FOR KEY SHARE NOWAIT"
            )  # in conflict with FOR UPDATE, not with FOR NO KEY UPDATE
            assert len(await cursor.fetchall()) == 2
        assert await elsewhere(skip_locked=True, no_key=True) == ["a"]
    assert await elsewhere(nowait=True) == ["a", "b"]
    with pytest.raises(TransactionManagementError):
        await Item.objects.select_for_update().anative()


async def test_select_for_update_keeps_counters_right() -> None:
    counter = await add("0")

    async def count_up() -> None:
        async with asyncorm.atomic():
            item = await Item.objects.select_for_update().native_get(pk=counter.pk)
            item.name = str(int(item.name) + 1)
            await item.native_save()

    await asyncio.gather(*(count_up() for _ in range(30)))
    assert await committed() == ["30"]


# Streams


async def fill(rows: int) -> None:
    await Item.objects.native_bulk_create(
        [Item(remote_id=next(ids), name=f"{n:03}") for n in range(rows)]
    )


@pytest.mark.parametrize("inside", [True, False])
async def test_a_stream_with_other_statements_between_its_chunks(inside: bool) -> None:
    await fill(100)
    async with contextlib.AsyncExitStack() as stack:
        if inside:
            await stack.enter_async_context(asyncorm.atomic())
        seen = []
        async for item in Item.objects.order_by("name").native_iterator(chunk_size=7):
            seen.append(item.name)
            if len(seen) % 10 == 0:
                item.name += "x"
                await asyncio.gather(item.native_save(), add(f"more {len(seen)}"))
                async with asyncorm.atomic():
                    await add("nested")
        assert seen == [f"{n:03}" for n in range(100)]
    assert len(await committed()) == 120


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("how", ["break", "error", "aclose"])
async def test_a_stream_that_is_left_early(inside: bool, how: str) -> None:
    await fill(50)
    async with contextlib.AsyncExitStack() as stack:
        if inside:
            await stack.enter_async_context(asyncorm.atomic())
        rows = Item.objects.native_iterator(chunk_size=5)
        with contextlib.suppress(ZeroDivisionError):
            async with contextlib.aclosing(rows):  # type: ignore[type-var]
                async for _ in rows:
                    if how == "error":
                        raise ZeroDivisionError
                    if how == "aclose":
                        await rows.aclose()  # type: ignore[attr-defined]
                    break
        await add("after")
        async with asyncorm.cursor() as cursor:
            await cursor.execute("SELECT count(*) FROM pg_cursors WHERE name <> ''")
            assert await cursor.fetchone() == (0,)
    assert len(await committed()) == 51
    await all_given_back()


async def test_nested_blocks_rolled_back_between_the_chunks_of_a_stream() -> None:
    await fill(50)
    async with asyncorm.atomic():
        seen = []
        async for item in Item.objects.order_by("name").native_iterator(chunk_size=7):
            seen.append(item.name)
            with contextlib.suppress(ZeroDivisionError):
                async with asyncorm.atomic():
                    await item.native_delete()
                    await asyncio.gather(add("lost"), add("lost"))
                    raise ZeroDivisionError
    assert seen == await committed() == [f"{n:03}" for n in range(50)]


async def test_a_stream_whose_block_is_over() -> None:
    await fill(20)
    async with asyncorm.atomic():
        with contextlib.suppress(ZeroDivisionError):
            async with asyncorm.atomic():
                rolled_back = Item.objects.native_iterator(chunk_size=5)
                await anext(rolled_back)
                raise ZeroDivisionError
        with pytest.raises(OperationalError, match="rolled back or has ended"):
            async with asyncorm.atomic():
                async for _ in rolled_back:
                    pass
        await add("a")
        ended = Item.objects.native_iterator(chunk_size=5)
        await anext(ended)
    with pytest.raises(InterfaceError, match="has ended"):
        async for _ in ended:
            pass
    await all_given_back()
    assert "a" in await committed()


async def test_a_task_that_begins_a_stream_while_its_block_ends() -> None:
    async def read() -> list[Any]:
        return [row async for row in Item.objects.native_iterator()]

    for turns in range(8):
        async with asyncorm.atomic():
            await add("a")
            late = asyncio.create_task(read())
            await nothing(turns)
        with contextlib.suppress(TransactionManagementError):
            assert len(await late) == turns + 1
        await all_given_back()


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", ["stream", "iterator"])
async def test_a_stream_finalised_by_another_thread(inside: bool, kind: str) -> None:
    await fill(20)
    held: list[Any] = []

    def begin() -> None:
        held.append(Item.objects.iterator(chunk_size=5))
        next(held[0])

    async with contextlib.AsyncExitStack() as stack:
        if inside:
            await stack.enter_async_context(asyncorm.atomic())
        if kind == "stream":
            held.append(Item.objects.native_iterator(chunk_size=5))
            await anext(held[0])
        else:
            await asyncorm.native(begin)()
        await asyncio.to_thread(held.clear)
        await add("a")
    await all_given_back()
    assert "a" in await committed()


def test_a_loop_that_ends_with_open_blocks_and_streams() -> None:
    async def nest(depth: int) -> None:
        async with asyncorm.atomic():
            await add("lost")
            await (nest(depth - 1) if depth else sleep_on_server(60))

    async def main() -> None:
        tasks = [asyncio.create_task(nest(2)) for _ in range(3)]
        await asyncorm.atomic().__aenter__()
        await add("lost")
        await anext(Item.objects.native_iterator())
        await asyncio.wait(tasks, timeout=0.2)

    for _ in range(2):
        asyncio.run(main())
    asyncio.run(asyncio.wait_for(no_statement_runs(), 10))


async def no_statement_runs() -> None:
    while True:
        async with asyncorm.cursor() as cursor:
            await cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' OR"
                " state LIKE 'idle in%' AND datname = current_database()"
            )
            if await cursor.fetchone() == (0,):
                assert await names() == []
                return
        await asyncio.sleep(0.02)


def test_blocks_on_several_loops_in_several_threads() -> None:
    async def block(name: str) -> None:
        async with asyncorm.atomic():
            await asyncio.gather(*(add(name) for _ in range(3)))
            with contextlib.suppress(ZeroDivisionError):
                async with asyncorm.atomic():
                    await add("lost")
                    raise ZeroDivisionError

    async def main(name: str) -> None:
        await asyncio.gather(*(block(name) for _ in range(4)))

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda name: asyncio.run(main(name)), "abc"))
    assert asyncio.run(names()) == sorted("abc" * 12)


@pytest.mark.parametrize("inside", [True, False])
async def test_parallel_streams(inside: bool) -> None:
    await fill(60)

    async def read() -> list[str]:
        rows = Item.objects.order_by("name").native_iterator(chunk_size=4)
        return [item.name async for item in rows]

    async with contextlib.AsyncExitStack() as stack:
        if inside:
            await stack.enter_async_context(asyncorm.atomic())
        expected = [f"{n:03}" for n in range(60)]
        assert await asyncio.gather(*(read() for _ in range(5))) == [expected] * 5


async def test_a_stream_cancelled_in_the_middle() -> None:
    await fill(50)

    async def read(started: asyncio.Event) -> None:
        async for _ in Item.objects.native_iterator(chunk_size=5):
            started.set()
            await asyncio.sleep(0)

    for n in range(10):
        started = asyncio.Event()
        task = asyncio.create_task(read(started))
        await started.wait()
        for _ in range(n):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await add("after")
    async with asyncio.timeout(30):
        while True:  # the loop closes a generator that was left alone a moment later
            stats = asyncorm.pool_stats()
            if stats["pool_available"] == stats["pool_size"]:
                break
            await asyncio.sleep(0.01)


# retrying


async def increment(level: IsolationLevel, barrier: asyncio.Barrier | None, pk: Any) -> None:
    async with asyncorm.atomic(isolation_level=level):
        item = await Item.objects.native_get(pk=pk)
        if barrier is not None:
            await barrier.wait()
        item.name = str(int(item.name) + 1)
        await item.native_save()


async def test_retrying_a_serializable_transaction() -> None:
    item = await add("0")
    barrier = asyncio.Barrier(8)  # all have read before the first writes
    runs = 0

    @asyncorm.retrying(attempts=50, backoff=0.01)
    async def once() -> None:
        nonlocal runs
        runs += 1
        await increment(IsolationLevel.SERIALIZABLE, barrier if runs <= 8 else None, item.pk)

    async with asyncio.timeout(60):
        await asyncio.gather(*(once() for _ in range(8)))
    assert await committed() == ["8"]
    assert runs > 8  # or nothing was tried again and this shows nothing


async def test_retrying_a_deadlock() -> None:
    pks = [(await add(name)).pk for name in ("a", "b")]
    barrier = asyncio.Barrier(2)
    runs = 0

    @asyncorm.retrying(backoff=0.01)
    @asyncorm.atomic
    async def both(order: list[Any]) -> None:
        nonlocal runs
        runs += 1
        first = runs <= 2
        await Item.objects.select_for_update().native_get(pk=order[0])
        if first:
            await barrier.wait()
        await Item.objects.select_for_update().native_get(pk=order[1])

    async with asyncio.timeout(60):
        await asyncio.gather(both(pks), both(pks[::-1]))
    assert runs == 3


async def test_retrying_gives_up_after_its_attempts() -> None:
    item = await add("0")
    waits = []

    def backoff(attempt: int) -> float:
        waits.append(attempt)
        return 0.0

    @asyncorm.retrying(attempts=3, backoff=backoff)
    @asyncorm.atomic(isolation_level=IsolationLevel.REPEATABLE_READ)
    async def loses() -> None:
        loser = await Item.objects.native_get(pk=item.pk)
        async with asyncorm.detached():
            await Item.objects.filter(pk=item.pk).native_update(name="1")
        await loser.native_save()

    with pytest.raises(OperationalError) as caught:
        await loses()
    assert isinstance(caught.value.__cause__, SerializationFailure)
    assert waits == [1, 2]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda exc: exc,
        lambda exc: ExceptionGroup("tasks", [ValueError(), exc]),
    ],
    ids=["itself", "in a group"],
)
async def test_retrying_matches_the_exception_and_its_cause(wrap: Any) -> None:
    runs = 0

    @asyncorm.retrying(attempts=2, on=SerializationFailure, backoff=0)
    async def fails_once() -> int:
        nonlocal runs
        runs += 1
        if runs == 1:
            error = OperationalError()
            error.__cause__ = SerializationFailure()
            raise wrap(error)
        return runs

    assert await fails_once() == 2


async def test_retrying_lets_other_errors_through() -> None:
    runs = 0

    @asyncorm.retrying(attempts=5, on=DeadlockDetected)
    async def fails() -> None:
        nonlocal runs
        runs += 1
        raise OperationalError from SerializationFailure()

    with pytest.raises(OperationalError):
        await fails()
    assert runs == 1


async def test_retrying_refuses_inside_a_block() -> None:
    @asyncorm.retrying()
    async def work(name: str) -> None:
        await add(name)

    origin = here()
    async with asyncorm.atomic():
        with pytest.raises(TransactionManagementError) as caught:
            await work("refused")
        assert origin in str(caught.value)
        with pytest.raises(TransactionManagementError):
            await asyncio.gather(work("refused"))
        async with asyncorm.detached():
            await work("detached")
    await work("a")
    assert await committed() == ["a", "detached"]


def test_retrying_refuses_what_it_cannot_decorate() -> None:
    with pytest.raises(TypeError):
        asyncorm.retrying()(lambda: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="attempts"):
        asyncorm.retrying(attempts=0)


def _end_session() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")


@pytest.mark.parametrize("where", ["around a block", "in a block", "of the ORM's"])
async def test_a_connection_that_is_lost_is_told_of_although_the_exception_was_caught(
    where: str,
) -> None:
    caught = [OperationalError] if where == "in a block" else []
    with pytest.raises(OperationalError, match="connection was lost, and the exception was caught"):
        async with asyncorm.atomic():
            await add("lost")
            with contextlib.suppress(OperationalError):
                async with asyncorm.atomic():
                    with contextlib.suppress(*caught):
                        if where == "of the ORM's":
                            await Item.objects.extra(
                                where=["pg_terminate_backend(pg_backend_pid())"]
                            ).native_count()
                        else:
                            await asyncorm.native(_end_session)()
    assert await names() == []
    assert await all_given_back()


@pytest.mark.parametrize("together", [False, True])
async def test_a_stream_on_a_connection_that_was_lost_says_so(together: bool) -> None:
    with pytest.raises(OperationalError):
        async with asyncorm.atomic():
            with pytest.raises(OperationalError):
                if together:
                    await asyncorm.batch(asyncorm.native(_end_session)())
                else:
                    await asyncorm.native(_end_session)()
            with pytest.raises((OperationalError, InterfaceError), match=r"closed|lost"):
                async for _ in Item.objects.native_iterator(chunk_size=1):
                    pass
    assert await all_given_back()
