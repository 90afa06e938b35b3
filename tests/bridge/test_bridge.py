"""The bridge: synchronous code on the event loop's own thread, suspended only where it waits."""

import asyncio
import contextvars
import gc
import inspect
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
from asgiref.sync import async_to_sync
from django.core.exceptions import ImproperlyConfigured
from django.db import connection, transaction
from django.dispatch import Signal

import asyncorm
from asyncorm import await_, bridge, native
from tests.project.shop.models import Tag
from tests.support import administrator, backend_pid, eventually, sleep, watched_threads

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


# Calling


async def test_returns_what_the_function_returns() -> None:
    def function(*args: Any, **kwargs: Any) -> Any:
        return threading.get_ident(), args, kwargs

    found = await native(function)(1, 2, a=3)

    assert found == (threading.get_ident(), (1, 2), {"a": 3})


async def test_positional_arguments_may_be_called_func() -> None:
    assert await native(lambda func: func)(func=1) == 1


async def test_nothing_runs_before_it_is_awaited() -> None:
    ran: list[int] = []
    coroutine = native(lambda: ran.append(1))()
    assert ran == []
    await coroutine
    assert ran == [1]


async def test_other_tasks_run_while_it_waits(shop_data: None) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    task = asyncio.create_task(tick())
    await native(sleep)(0.3)
    task.cancel()
    assert ticks >= 5


def test_needs_a_loop() -> None:
    coroutine = native(lambda: 1)()
    with pytest.raises(RuntimeError, match=r"asyncio\.run\(\)"):
        coroutine.send(None)


@pytest.mark.parametrize("wrong", [asyncio.sleep, native(len), 3, None])
def test_takes_synchronous_callables_only(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"native\(\) takes a synchronous callable"):
        native(wrong)


def test_keeps_name_and_documentation() -> None:
    @native
    def function(a: int) -> int:
        """What it does."""
        return a

    assert function.__name__ == "function"
    assert function.__doc__ == "What it does."
    assert list(inspect.signature(function).parameters) == ["a"]
    assert "function" in repr(function)


async def test_decorates_functions_and_methods() -> None:
    class Thing:
        factor = 2

        @native
        def method(self, n: int) -> int:
            return n * self.factor

        @classmethod
        @native
        def of_class(cls, n: int) -> int:
            return n * cls.factor

        @staticmethod
        @native
        def of_nothing(n: int) -> int:
            return n

    assert await Thing().method(3) == 6
    assert await Thing.method(Thing(), 3) == 6
    assert await Thing.of_class(4) == await Thing().of_class(4) == 8
    assert await Thing.of_nothing(5) == await Thing().of_nothing(5) == 5


async def test_is_known_as_a_coroutine_function() -> None:
    from asgiref.sync import iscoroutinefunction

    assert iscoroutinefunction(native(len))


async def test_a_receiver_decorated_with_native_is_awaited() -> None:
    signal = Signal()

    @native
    def receiver(**kwargs: Any) -> int:
        return threading.get_ident()

    signal.connect(receiver)
    assert await signal.asend(None) == [(receiver, threading.get_ident())]


# Context variables


async def test_context_variables_are_shared_both_ways(shop_data: None) -> None:
    def function() -> str:
        seen = variable.get()
        variable.set("inside")
        backend_pid()  # switches to the loop and back
        assert variable.get() == "inside"
        return seen

    variable.set("outside")
    assert await native(function)() == "outside"
    assert variable.get() == "inside"


async def test_context_variables_of_tasks_do_not_mix(shop_data: None) -> None:
    def function(name: str) -> str:
        variable.set(name)
        sleep(0.05)
        return variable.get()

    names = [f"task {n}" for n in range(5)]
    assert await asyncio.gather(*map(native(function), names)) == names
    assert variable.get() == "unset"


async def test_what_await_sets_is_seen_inside() -> None:
    async def set_it() -> None:
        variable.set("awaited")

    def function() -> str:
        await_(set_it())
        return variable.get()

    assert await native(function)() == "awaited"


async def test_a_token_is_reset_on_the_other_side() -> None:
    token = await native(variable.set)("inside")
    assert variable.get() == "inside"
    variable.reset(token)
    assert variable.get() == "unset"


async def test_finished_operations_keep_no_context_alive() -> None:
    class Big: ...

    big: contextvars.ContextVar[Any] = contextvars.ContextVar("big")

    async def use() -> None:
        big.set(Big())
        await native(lambda: await_(asyncio.sleep(0)))()

    await asyncio.create_task(use())
    await asyncio.sleep(0)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is Big]


# Exceptions


class Custom(Exception): ...


def failing() -> None:
    raise Custom("the reason")


async def test_exceptions_keep_type_and_traceback(shop_data: None) -> None:
    def outer() -> None:
        backend_pid()
        failing()

    with pytest.raises(Custom, match="the reason") as caught:
        await native(outer)()
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[-2:] == ["outer", "failing"]
    assert names[0] == "test_exceptions_keep_type_and_traceback"
    # Little machinery between the caller and the function called.
    assert len(names) <= 6
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


async def test_database_errors_show_where_the_statement_was(shop_data: None) -> None:
    from django.db import ProgrammingError

    def statement() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT nonsense")

    with pytest.raises(ProgrammingError, match="nonsense") as caught:
        await native(statement)()
    assert "statement" in [f.name for f in traceback.extract_tb(caught.value.__traceback__)]


async def test_an_awaited_exception_is_raised_at_the_await() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        failing()

    def function() -> str:
        try:
            await_(fail())
        except Custom as exc:
            return str(exc)
        return "nothing"

    assert await native(function)() == "the reason"


async def test_exceptions_pass_through_nested_levels() -> None:
    seen: list[str] = []

    def level(n: int) -> None:
        try:
            if n:
                await_(native(level)(n - 1))
            else:
                failing()
        finally:
            seen.append(f"left {n}")

    with pytest.raises(Custom, match="the reason") as caught:
        await native(level)(3)
    assert seen == ["left 0", "left 1", "left 2", "left 3"]
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names.count("level") == 4


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration, GeneratorExit])
async def test_exceptions_with_a_meaning_for_coroutines_end_nothing_silently(kind: Any) -> None:
    def function() -> None:
        raise kind

    with pytest.raises((kind, RuntimeError)):
        await native(function)()
    assert await native(lambda: 1)() == 1


async def test_base_exceptions_pass() -> None:
    class Stop(BaseException): ...

    def function() -> None:
        raise Stop

    with pytest.raises(Stop):
        await native(function)()


async def test_an_exception_being_handled_is_not_everybodys() -> None:
    """sys.exception() of a suspended operation is not seen by another task."""
    import sys

    def function() -> None:
        try:
            failing()
        except Custom:
            await_(asyncio.sleep(0.02))
            assert isinstance(sys.exc_info()[1], Custom)

    task = asyncio.create_task(native(function)())
    await asyncio.sleep(0.01)
    assert sys.exc_info()[1] is None
    await task


async def test_failures_leave_no_exception_behind() -> None:
    """An idle greenlet keeps neither the function's result nor its exception."""

    class Big: ...

    def succeed() -> Any:
        return Big()

    def fail() -> None:
        big = Big()  # noqa: F841
        raise Custom

    await native(succeed)()
    with pytest.raises(Custom):
        await native(fail)()
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is Big]


# Cancellation


async def cancelled(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancellation_arrives_at_the_statement(shop_data: None) -> None:
    seen: list[Any] = []

    def function() -> None:
        try:
            sleep(60)
            seen.append("after the statement")
        except asyncio.CancelledError:
            seen.append("except")
            raise
        finally:
            seen.append("finally")

    task = asyncio.create_task(native(function)())
    await asyncio.sleep(0.1)
    began = time.monotonic()
    await cancelled(task)
    assert seen == ["except", "finally"]
    assert time.monotonic() - began < 30


async def test_cancellation_stops_the_statement_on_the_server(shop_data: None) -> None:
    with administrator() as ask:
        running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(77%%'"
        task = asyncio.create_task(native(sleep)(77))
        await eventually(lambda: ask(running + " AND state = 'active'") == 1)
        await cancelled(task)
        await eventually(lambda: ask(running + " AND state = 'active'") == 0, 3)


async def test_clean_up_after_a_cancellation_can_use_the_database(shop_data: None) -> None:
    found: list[int] = []

    def function() -> None:
        try:
            sleep(60)
        finally:
            found.append(Tag.objects.count())

    task = asyncio.create_task(native(function)())
    await asyncio.sleep(0.1)
    await cancelled(task)
    assert found == [6]


async def test_cancellation_may_be_swallowed(shop_data: None) -> None:
    def function() -> str:
        try:
            sleep(60)
        except asyncio.CancelledError:
            return "swallowed"
        return "not cancelled"

    task = asyncio.create_task(native(function)())
    await asyncio.sleep(0.1)
    task.cancel()
    assert await task == "swallowed"


async def test_cancellation_arrives_at_an_await() -> None:
    seen: list[str] = []

    def function() -> None:
        try:
            await_(asyncio.sleep(60))
        finally:
            seen.append("finally")

    task = asyncio.create_task(native(function)())
    await asyncio.sleep(0.01)
    await cancelled(task)
    assert seen == ["finally"]


async def test_cancellation_rolls_a_transaction_back(fresh_shop: Callable[[], None]) -> None:
    def function() -> None:
        with transaction.atomic():
            Tag.objects.create(name="half done")
            sleep(60)

    task = asyncio.create_task(native(function)())
    await asyncio.sleep(0.2)
    await cancelled(task)
    assert not await Tag.objects.filter(name="half done").native_exists()


async def test_timeouts_of_asyncio_and_anyio(shop_data: None) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await native(sleep)(60)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(native(sleep)(60), 0.1)
    with anyio.move_on_after(0.1) as scope:
        await native(sleep)(60)
    assert scope.cancelled_caught
    assert await native(lambda: Tag.objects.count())() == 6


# Nesting


async def test_nested_calls_run_inline() -> None:
    tasks: list[Any] = []

    def inner() -> None:
        tasks.append(asyncio.current_task())

    def outer() -> None:
        inner()
        await_(native(inner)())

    await native(outer)()
    assert tasks == [asyncio.current_task()] * 2


async def test_a_nested_call_sees_the_transaction_around_it(
    fresh_shop: Callable[[], None],
) -> None:
    def inner() -> tuple[int, bool]:
        return backend_pid(), Tag.objects.filter(name="new").exists()

    def outer() -> Any:
        with transaction.atomic():
            Tag.objects.create(name="new")
            return await_(native(inner)()), (backend_pid(), True)

    found, expected = await native(outer)()
    assert found == expected


async def test_nesting_is_deep() -> None:
    def level(n: int) -> int:
        return 1 + await_(native(level)(n - 1)) if n else 0

    assert await native(level)(50) == 50


async def test_awaiting_gathered_operations_inside(shop_data: None) -> None:
    async def both() -> Any:
        return await asyncio.gather(native(sleep)(1), native(sleep)(1))

    def function() -> Any:
        began = time.monotonic()
        return await_(both()), time.monotonic() - began

    pids, seconds = await native(function)()
    assert len(set(pids)) == 2
    assert seconds < 1.9


async def test_nothing_is_held_while_awaiting_something_else(shop_data: None) -> None:
    def function() -> tuple[int, int]:
        Tag.objects.count()
        before = asyncorm.pool_stats()["pool_available"]
        await_(asyncio.sleep(0))
        return before, asyncorm.pool_stats()["pool_available"]

    async def look() -> int:
        return asyncorm.pool_stats()["pool_available"]

    def look_inside() -> int:
        Tag.objects.count()
        return await_(look())

    assert await native(look_inside)() == asyncorm.pool_stats()["pool_size"]


# await_ in the wrong place


async def test_await_outside_native_code_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"asyncorm\.native\(function\)"):
        await_(asyncio.sleep(0))  # and no warning about a coroutine never awaited
    gc.collect()


def test_await_without_a_loop_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"In a coroutine use 'await'"):
        await_(asyncio.sleep(0))


async def test_await_in_a_coroutine_inside_native_code_is_refused() -> None:
    """Code that await_() runs is a coroutine again: it awaits, and its task is not a greenlet."""

    async def coroutine() -> None:
        await_(asyncio.sleep(0))

    with pytest.raises(RuntimeError, match=r"In a coroutine use 'await'"):
        await native(lambda: await_(coroutine()))()


async def test_await_in_a_thread_started_by_native_code_is_refused() -> None:
    failures: list[BaseException] = []

    def in_thread() -> None:
        try:
            await_(asyncio.sleep(0))
        except RuntimeError as exc:
            failures.append(exc)

    def function() -> None:
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()

    await native(function)()
    assert len(failures) == 1


async def test_await_takes_any_awaitable() -> None:
    loop = asyncio.get_running_loop()

    def function() -> list[int]:
        future = loop.create_future()
        loop.call_later(0.01, future.set_result, 1)
        task = loop.create_task(asyncio.sleep(0.01, 2))
        return [await_(future), await_(task), await_(asyncio.sleep(0, 3))]

    assert await native(function)() == [1, 2, 3]


async def test_await_of_something_else_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="await"):
        await native(lambda: await_(3))()
    assert await native(lambda: 1)() == 1


def test_an_app_that_is_not_installed_is_named() -> None:
    """The guard that apps.py takes away (test_failures.py has the whole way round)."""

    async def call() -> None:
        await native(len)([])

    guard = bridge._guard
    bridge.set_guard(asyncorm._not_installed)
    try:
        with pytest.raises(ImproperlyConfigured, match="INSTALLED_APPS"):
            asyncio.run(call())
    finally:
        bridge.set_guard(guard)


# Loops


def test_several_loops_in_several_threads(shop_data: None) -> None:
    together = threading.Barrier(4, timeout=10)
    found: dict[int, tuple[set[int], float]] = {}

    async def work(n: int) -> None:
        await native(backend_pid)()
        together.wait()
        began = time.monotonic()
        pids = set(await asyncio.gather(*[native(sleep)(1) for _ in range(3)]))
        found[n] = pids, time.monotonic() - began

    threads = [threading.Thread(target=asyncio.run, args=(work(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 4
    assert len(set().union(*[pids for pids, _ in found.values()])) == 12
    assert max(seconds for _, seconds in found.values()) < 2.9


def test_one_loop_after_another_in_one_thread(shop_data: None) -> None:
    for _ in range(5):
        assert asyncio.run(native(Tag.objects.count)()) == 6


def test_a_loop_that_runs_with_breaks(shop_data: None) -> None:
    with asyncio.Runner() as runner:
        first = runner.run(native(backend_pid)())
        assert runner.run(native(backend_pid)()) == first


def test_a_loop_that_moves_to_another_thread(shop_data: None) -> None:
    loop = asyncio.new_event_loop()
    try:
        first = loop.run_until_complete(native(backend_pid)())
        found: list[int] = []
        thread = threading.Thread(
            target=lambda: found.append(loop.run_until_complete(native(backend_pid)()))
        )
        thread.start()
        thread.join()
        assert found == [first]
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


# Asynchronous receivers and async_to_sync


@contextmanager
def connected(*receivers: Any) -> Iterator[Signal]:
    signal = Signal()
    for receiver in receivers:
        signal.connect(receiver)
    yield signal


async def test_asynchronous_receivers_are_awaited(shop_data: None) -> None:
    async def receiver(**kwargs: Any) -> int:
        await asyncio.sleep(0.01)
        return await Tag.objects.native_count()

    with connected(receiver) as signal:
        assert await native(signal.send)(None) == [(receiver, 6)]
        assert await native(signal.send_robust)(None) == [(receiver, 6)]


async def test_receivers_gather_queries_of_their_own(shop_data: None) -> None:
    async def receiver(**kwargs: Any) -> set[int]:
        return set(await asyncio.gather(native(sleep)(1), native(sleep)(1)))

    async def second(**kwargs: Any) -> int:
        return await native(sleep)(1)

    with connected(receiver, second) as signal:
        began = time.monotonic()
        responses = dict(await native(signal.send)(None))
    assert time.monotonic() - began < 1.9  # the receivers and their queries ran side by side
    assert len(responses[receiver] | {responses[second]}) == 3


async def test_robust_receivers_return_their_errors(
    shop_data: None, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails(**kwargs: Any) -> None:
        failing()

    async def works(**kwargs: Any) -> int:
        return await Tag.objects.native_count()

    with connected(fails, works) as signal:
        responses = dict(await native(signal.send_robust)(None))
        with pytest.raises((Custom, ExceptionGroup)):
            await native(signal.send)(None)
    assert isinstance(responses[fails], Custom)
    assert responses[works] == 6
    assert "the reason" in caplog.text


async def test_receivers_inside_a_transaction_are_part_of_it(
    fresh_shop: Callable[[], None],
) -> None:
    async def receiver(**kwargs: Any) -> Any:
        await Tag.objects.native_create(name="from the receiver")
        return await native(backend_pid)(), await Tag.objects.filter(name="outer").native_exists()

    with connected(receiver) as signal:

        def function() -> Any:
            with transaction.atomic():
                Tag.objects.create(name="outer")
                pid = backend_pid()
                [(_, response)] = signal.send(None)
                transaction.set_rollback(True)
                return pid, response

        pid, (receivers_pid, saw) = await native(function)()
    assert receivers_pid == pid
    assert saw
    assert not await Tag.objects.filter(name="from the receiver").native_exists()


async def test_model_signals_reach_asynchronous_receivers(
    fresh_shop: Callable[[], None],
) -> None:
    from django.db.models.signals import post_save

    names: list[str] = []

    async def receiver(instance: Tag, **kwargs: Any) -> None:
        names.append((await Tag.objects.native_get(pk=instance.pk)).name)

    post_save.connect(receiver, sender=Tag)
    try:
        await Tag.objects.native_create(name="signalled")
    finally:
        post_save.disconnect(receiver, sender=Tag)
    assert names == ["signalled"]


async def test_async_to_sync_is_awaited_on_the_same_loop() -> None:
    loop = asyncio.get_running_loop()

    async def coroutine(n: int) -> Any:
        await asyncio.sleep(0)
        return n, asyncio.get_running_loop(), threading.get_ident()

    with watched_threads() as seen:
        found = await native(async_to_sync(coroutine))(5)
    assert found == (5, loop, threading.get_ident())
    assert seen == []


async def test_async_to_sync_outside_native_code_still_refuses() -> None:
    async def coroutine() -> None: ...

    with pytest.raises(RuntimeError, match="AsyncToSync"):
        async_to_sync(coroutine)()
    gc.collect()


def test_async_to_sync_in_a_thread_works_as_before() -> None:
    async def coroutine() -> int:
        return 1

    assert async_to_sync(coroutine)() == 1


async def test_async_to_sync_passes_exceptions() -> None:
    async def fails() -> None:
        failing()

    with pytest.raises(Custom):
        await native(async_to_sync(fails))()


# Generators


async def test_generators_are_consumed_inside() -> None:
    def numbers() -> Iterator[int]:
        for n in range(3):
            await_(asyncio.sleep(0))
            yield n

    assert await native(lambda: list(numbers()))() == [0, 1, 2]


async def test_a_generator_goes_on_in_another_call() -> None:
    def numbers() -> Iterator[int]:
        for n in range(3):
            yield await_(asyncio.sleep(0, n))

    generator = numbers()
    assert [await native(next)(generator, None) for _ in range(4)] == [0, 1, 2, None]


async def test_iterator_of_a_queryset_inside(shop_data: None) -> None:
    def function() -> list[str]:
        return [tag.name for tag in Tag.objects.order_by("pk").iterator(chunk_size=2)]

    names = await native(function)()
    assert names == await native(lambda: [t.name for t in Tag.objects.order_by("pk")])()
    assert len(names) == 6


async def test_iterator_of_a_queryset_left_early(shop_data: None) -> None:
    def function() -> str:
        for tag in Tag.objects.order_by("pk").iterator(chunk_size=2):
            return tag.name
        return ""

    for _ in range(30):
        assert await native(function)() == "classic"
    gc.collect()
    await eventually(
        lambda: asyncorm.pool_stats()["pool_available"] == asyncorm.pool_stats()["pool_size"]
    )


# Closing


async def test_a_coroutine_closed_while_it_waits_runs_the_clean_up(shop_data: None) -> None:
    seen: list[str] = []

    def function() -> None:
        try:
            await_(asyncio.sleep(60))
        except GeneratorExit:
            seen.append("GeneratorExit")
            raise
        finally:
            seen.append("finally")

    coroutine = native(function)()
    coroutine.send(None)
    coroutine.close()
    assert seen == ["GeneratorExit", "finally"]


async def test_a_closed_coroutine_cannot_await_any_more(shop_data: None) -> None:
    seen: list[str] = []

    def function() -> None:
        try:
            await_(asyncio.sleep(60))
        finally:
            try:
                Tag.objects.count()
            except Exception as exc:
                seen.append(str(exc))

    coroutine = native(function)()
    coroutine.send(None)
    coroutine.close()
    assert len(seen) == 1
    assert "closed" in seen[0]


async def test_a_coroutine_closed_at_a_statement_gives_its_connection_back(
    shop_data: None,
) -> None:
    await native(backend_pid)()
    coroutine = native(sleep)(1)  # nobody can wait for the server to cancel it
    coroutine.send(None)
    coroutine.close()
    assert await native(lambda: Tag.objects.count())() == 6
    await eventually(
        lambda: asyncorm.pool_stats()["pool_available"] == asyncorm.pool_stats()["pool_size"]
    )


async def test_a_coroutine_that_never_ran_is_closed_without_effect() -> None:
    ran: list[int] = []
    native(lambda: ran.append(1))().close()
    assert ran == []


# Greenlets


async def test_greenlets_are_reused() -> None:
    seen = [await native(bridge.current)() for _ in range(10)]
    assert len(set(map(id, seen))) == 1
    assert seen[0] is not None


async def test_a_reused_greenlet_is_clean() -> None:
    def fail() -> None:
        runner = bridge.current()
        assert runner is not None
        runner.shield_depth += 1
        failing()

    def state() -> Any:
        runner = bridge.current()
        assert runner is not None
        return (
            runner.shield_depth,
            runner.cancelled,
            runner.session_override,
            runner.resources,
            runner.failure,
        )

    with pytest.raises(Custom):
        await native(fail)()
    assert await native(state)() == (0, None, None, {}, None)


async def test_greenlets_kept_are_limited() -> None:
    await asyncio.gather(*[native(lambda: await_(asyncio.sleep(0.01)))() for _ in range(300)])
    assert len(bridge._idle.runners) <= bridge._MAX_IDLE


async def test_an_operation_may_go_on_in_another_task() -> None:
    """A coroutine begun by one task and finished by another, as fixtures of generators are."""
    coroutine = native(lambda: await_(asyncio.sleep(0, 1)))()
    assert coroutine.send(None) is None  # what asyncio.sleep(0) yields to the loop

    async def finish() -> Any:
        try:
            coroutine.send(None)
        except StopIteration as done:
            return done.value

    assert await asyncio.create_task(finish()) == 1


async def test_an_empty_call_is_cheap() -> None:
    """The aim is 5 us here; ten times a plain coroutine call is far above it, a hop far more."""
    empty = native(lambda: None)

    async def coroutine() -> None: ...

    async def measure(function: Any) -> float:
        best = 1e9
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(2000):
                await function()
            best = min(best, time.perf_counter() - began)
        return best / 2000

    plain, through = await measure(coroutine), await measure(empty)
    assert through < 40 * plain + 20e-6, f"{through * 1e6:.1f} us, a coroutine {plain * 1e6:.2f} us"


async def test_the_transaction_of_a_closed_coroutine_is_rolled_back(
    fresh_shop: Callable[[], None],
) -> None:
    def function() -> None:
        with transaction.atomic():
            Tag.objects.create(name="closed")
            await_(asyncio.sleep(60))

    async def drive() -> None:
        await native(function)()

    task = asyncio.create_task(drive())
    await asyncio.sleep(0.2)
    await cancelled(task)
    assert not await Tag.objects.filter(name="closed").native_exists()
