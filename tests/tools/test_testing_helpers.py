"""asyncorm.testing and its pytest fixtures: what they see, what they let pass, what they show."""

import asyncio
import functools
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import connection, transaction
from django.test import override_settings

import asyncorm
from asyncorm import observers
from asyncorm._requests import blocking
from asyncorm.testing import (
    count_queries,
    native_only,
    on_commit_callbacks,
    timeline_on_failure,
)
from tests.project.myapp.models import Item

pytest_plugins = ["pytester"]
rolled_back = pytest.mark.django_db
committed = pytest.mark.django_db(transaction=True)


async def everything() -> None:
    """Natively."""
    item = await Item.objects.native_create(remote_id=1)
    async with asyncorm.atomic():
        await asyncio.gather(item.native_save(), Item.objects.native_count())
    assert [row async for row in Item.objects.all().native_iterator()]
    async with asyncorm.cursor() as cursor:
        await cursor.execute("SELECT 1")
    await asyncorm.native(lambda: [*Item.objects.all()])()


@rolled_back
async def test_native_code_passes_in_a_rolled_back_test(native_only: None) -> None:
    await everything()


@committed
async def test_native_code_passes(native_only: None) -> None:
    await everything()


@rolled_back
@pytest.mark.parametrize("call", ["acount", "sync_to_async", "to_thread", "executor"])
async def test_a_thread_hop_fails(call: str) -> None:
    async def hop() -> None:
        if call == "acount":
            await Item.objects.acount()
        elif call == "sync_to_async":
            await sync_to_async(Item.objects.count)()
        elif call == "to_thread":
            await asyncio.to_thread(len, "a")
        else:
            await asyncio.get_running_loop().run_in_executor(None, len, "a")

    with pytest.raises(AssertionError, match=r"left the event loop|used a thread") as raised:
        with native_only():
            await hop()
    assert any(entry.name == "hop" for entry in raised.traceback)
    with override_settings(ASYNCORM={"SWAP_MANAGERS": True}):
        if call == "acount":
            with native_only():
                await hop()
    await hop()  # nothing stays in place


@rolled_back
async def test_a_hop_that_somebody_catches_fails_at_the_end() -> None:
    with pytest.raises(AssertionError, match="count"):
        with native_only():
            await asyncio.gather(sync_to_async(Item.objects.count)(), return_exceptions=True)


@rolled_back
async def test_what_is_allowed() -> None:
    with native_only(allow=["tests."]):
        await sync_to_async(functools.partial(helper, 1))()
        await sync_to_async(functools.partial(functools.partial(helper, 1)))()
    with pytest.raises(AssertionError, match=r"builtins\.len"):
        with native_only(allow=["tests."]):
            await sync_to_async(len)("a")


async def test_what_a_thread_is_to_call_for_native_code_has_its_name() -> None:
    """Password hashers are called in a thread by what stands around them (_requests/)."""
    call = blocking._Call(helper, (1,), {})
    with native_only(allow=["tests."]):
        assert await sync_to_async(observers.with_entered(call))() == 1
    with pytest.raises(AssertionError, match=r"helper"), native_only():
        await sync_to_async(call)()


def helper(number: int) -> int:
    return number


@rolled_back
async def test_a_synchronous_query_on_the_loop_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")
    assert Item.objects.count() == 0
    with pytest.raises(AssertionError, match="synchronous query"), native_only():
        Item.objects.count()


@rolled_back
def test_synchronous_code_off_the_loop_passes(native_only: None) -> None:
    assert Item.objects.count() == 0


async def two_tasks() -> None:
    async def several(number: int) -> None:
        for _ in range(number):
            await Item.objects.native_count()

    async with asyncio.TaskGroup() as tasks:
        for number in (1, 3):
            tasks.create_task(several(number), name=f"task {number}")


@committed
async def test_queries_by_task() -> None:
    with count_queries() as counts:
        await two_tasks()
    assert counts == {"task 1": 1, "task 3": 3}
    await Item.objects.native_count()
    assert counts.total() == 4


@rolled_back
async def test_queries_by_task_and_thread_of_a_rolled_back_test() -> None:
    with count_queries() as counts:
        await two_tasks()
        await sync_to_async(Item.objects.count)()
    assert counts.pop("task 1") == 1 and counts.pop("task 3") == 3
    assert list(counts.values()) == [1]


@rolled_back
async def test_counted_also_when_it_fails() -> None:
    with pytest.raises(ZeroDivisionError), count_queries() as counts:
        await two_tasks()
        raise ZeroDivisionError
    assert counts.total() == 4


async def test_the_fixture_may_come_before_the_transaction(
    asyncorm_timeline: Any, db: None
) -> None:
    await two_tasks()
    assert len(asyncorm_timeline.queries) == 4
    assert len({query.connection for query in asyncorm_timeline.queries}) == 1


@rolled_back
async def test_on_commit_callbacks_are_awaited() -> None:
    called: list[str] = []

    async def callback() -> None:
        await asyncio.sleep(0.01)
        called.append(f"{await Item.objects.native_count()} items")
        asyncorm.on_commit(lambda: called.append("of the callback"))

    async def add() -> None:
        async with asyncorm.atomic():
            await Item.objects.native_create(remote_id=len(called) + 1)
            asyncorm.on_commit(callback)
            await asyncorm.native(transaction.on_commit)(lambda: called.append("Django's"))

    async with on_commit_callbacks() as callbacks:
        await add()
    assert (len(callbacks), called) == (2, [])
    async with on_commit_callbacks(execute=True) as callbacks:
        async with asyncorm.atomic():
            asyncorm.on_commit(callback)
    assert len(callbacks) == 1
    assert called == ["1 items", "of the callback"]


@rolled_back
async def test_errors_of_callbacks(caplog: Any) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    async with on_commit_callbacks(execute=True):
        async with asyncorm.atomic():
            asyncorm.on_commit(fail, robust=True)
    assert "Error calling" in caplog.text
    with pytest.raises(ZeroDivisionError):
        async with on_commit_callbacks(execute=True):
            async with asyncorm.atomic():
                asyncorm.on_commit(fail)


@committed
async def test_an_exception_gets_the_timeline() -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        with timeline_on_failure():
            await two_tasks()
            raise ZeroDivisionError
    assert raised.value.__notes__[0].count("SELECT COUNT") == 4
    assert not connection.execute_wrappers


def test_the_option_of_pytest(pytester: pytest.Pytester, django_db_setup: None) -> None:
    pytester.makeconftest("")
    pytester.makepyfile(
        """
        import pytest
        from tests.project.myapp.models import Item

        @pytest.mark.django_db
        @pytest.mark.asyncio
        async def test_fails():
            assert await Item.objects.native_count() == 1

        @pytest.mark.django_db
        @pytest.mark.asyncio
        async def test_passes():
            assert await Item.objects.native_count() == 0
        """
    )
    # In the databases of this very run.
    result = pytester.runpytest_subprocess("--asyncorm-timeline", "--reuse-db")
    result.assert_outcomes(passed=1, failed=1)
    assert result.stdout.str().count("E       asyncorm:") == 1
