"""LISTEN and NOTIFY: one connection for all who listen, which comes back when it is lost."""

import asyncio
import gc
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import psycopg
import pytest
from django.db import DataError, NotSupportedError, OperationalError, connections
from psycopg import sql

import asyncorm
from asyncorm import listening
from asyncorm.listening import Note
from tests.support import address, database, eventually

pytestmark = pytest.mark.usefixtures("shop_data")

CHANNELS = "orders", "Grüße", 'with "quotes"; --'


@pytest.fixture
async def ask() -> AsyncIterator[Callable[..., Any]]:
    """SQL over a connection of its own."""
    async with await psycopg.AsyncConnection.connect(**address(), autocommit=True) as conn:

        async def ask(text: str, *params: Any) -> list[Any]:
            cursor = await conn.execute(text.encode(), params or None)
            return await cursor.fetchall() if cursor.description else []

        yield ask


LISTENING = (
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query ~ 'LISTEN' "
    "AND pid <> pg_backend_pid()"
)


async def take(notes: Any, number: int = 1) -> list[Note]:
    async with asyncio.timeout(20):
        return [await anext(notes) for _ in range(number)]


@pytest.mark.parametrize("channel", CHANNELS)
async def test_round_trip(channel: str) -> None:
    async with asyncorm.listen(channel) as notes:
        await asyncorm.notify(channel, "first")
        await asyncorm.notify(channel)
        first, second = await take(notes, 2)
    assert (first.channel, first.payload, first.gap) == (channel, "first", False)
    assert (second.payload, second.pid > 0) == ("", True)


@pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="since Python 3.12")
async def test_where_tasks_begin_at_once() -> None:
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
    async with asyncio.timeout(20), asyncorm.listen("orders") as notes:
        await asyncorm.notify("orders", "first")
        assert [note.payload for note in await take(notes)] == ["first"]


async def test_in_a_block_at_commit() -> None:
    async with asyncorm.listen("orders") as notes:
        with pytest.raises(ZeroDivisionError):
            async with asyncorm.atomic():
                await asyncorm.notify("orders", "rolled back")
                raise ZeroDivisionError
        async with asyncorm.atomic():
            await asyncorm.notify("orders", "committed")
            await asyncorm.notify("orders", "committed")  # PostgreSQL: equal ones once
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await anext(notes)
        await asyncorm.notify("orders", "last")
        assert [note.payload for note in await take(notes, 2)] == ["committed", "last"]


async def test_one_connection_for_all(ask: Callable[..., Any]) -> None:
    listeners = [asyncorm.listen(f"channel{n % 7}", "all") for n in range(50)]
    await asyncio.gather(*(each.__aenter__() for each in listeners))
    assert len(await ask(LISTENING)) == 1
    await asyncorm.notify("all", "everybody")
    await asyncorm.notify("channel3", "some")
    got = await asyncio.gather(*(take(each) for each in listeners))
    assert {notes[0].payload for notes in got} == {"everybody"}
    some = await asyncio.gather(*(take(each) for each in listeners[3::7]))
    assert {notes[0].payload for notes in some} == {"some"}
    for each in listeners[:-1]:
        await each.aclose()
    assert len(await ask(LISTENING)) == 1
    await listeners[-1].aclose()
    assert await eventually_none(ask)


async def eventually_none(ask: Callable[..., Any]) -> bool:
    for _ in range(200):
        if not await ask(LISTENING):
            return True
        await asyncio.sleep(0.05)
    return False


async def test_leaving_the_loop_releases(ask: Callable[..., Any]) -> None:
    async def first() -> str:
        async for note in asyncorm.listen("orders"):
            return note.payload
        raise AssertionError

    task = asyncio.create_task(first())
    async with asyncio.timeout(20):
        while not await ask(LISTENING):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    await asyncorm.notify("orders", "x")
    assert await task == "x"
    gc.collect()
    assert await eventually_none(ask)


async def test_cancelled_while_waiting_loses_nothing() -> None:
    got: list[str] = []
    async with asyncorm.listen("orders") as notes:
        for n in range(20):
            waiting = asyncio.create_task(take(notes))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
            if not waiting.cancelled():
                got += [note.payload for note in waiting.result()]
            await asyncorm.notify("orders", str(n))
        got += [note.payload for note in await take(notes, 20 - len(got))]
    assert got == [str(n) for n in range(20)]


async def test_cancelled_while_connecting(ask: Callable[..., Any]) -> None:
    for turns in range(12):
        task = asyncio.create_task(take(asyncorm.listen("orders")))
        for _ in range(turns):
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])
    del task
    gc.collect()
    assert await eventually_none(ask)


async def test_lost_connection(ask: Callable[..., Any], caplog: Any) -> None:
    async with asyncorm.listen("b", "a") as notes, asyncorm.listen("a") as others:
        for _ in range(2):
            for (pid,) in await ask(LISTENING):
                await ask("SELECT pg_terminate_backend(%s)", pid)
            assert await take(notes, 2) == [Note("a", "", gap=True), Note("b", "", gap=True)]
            assert await take(others) == [Note("a", "", gap=True)]
            await asyncorm.notify("a", "after")
            assert [(await take(each))[0].payload for each in (notes, others)] == ["after"] * 2
        assert len(await ask(LISTENING)) == 1
    assert "was lost" in caplog.text
    assert await eventually_none(ask)


async def test_the_gap_comes_before_what_the_next_connection_brings(
    ask: Callable[..., Any],
) -> None:
    """It listens to one channel after the other: the first ones' notes do not go ahead."""
    channels = [f"channel{n}" for n in range(100)]
    got: list[Note] = []

    async def read() -> None:
        async with asyncorm.listen(*channels) as notes:
            async for note in notes:
                got.append(note)

    async with asyncio.timeout(20):
        reading = asyncio.create_task(read())
        while not (pids := await ask(LISTENING)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        while not got:
            await ask("SELECT pg_notify(unnest(%s::text[]), 'before')", channels)
        await ask("SELECT pg_terminate_backend(%s, 10000)", pids[0][0])
        while got[-1].payload != "after":
            await ask("SELECT pg_notify(unnest(%s::text[]), 'after')", channels)
        reading.cancel()
        await asyncio.wait([reading])
    told = [note.channel for note in got if note.gap]
    assert sorted(told) == sorted(channels)
    first = next(n for n, note in enumerate(got) if note.gap)
    assert "after" not in {note.payload for note in got[: first + len(channels)]}


async def test_server_that_does_not_answer(
    ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some silence the connection is tried, and another one made if nobody answers."""
    monkeypatch.setattr(listening, "_PROBE", 0.1)
    monkeypatch.setattr(listening, "_ANSWER", 0.5)
    async with asyncorm.listen("orders") as notes:
        ((pid,),) = await ask(LISTENING.replace("LISTEN", "LISTEN|^SELECT 1$"))
        os.kill(pid, signal.SIGSTOP)
        try:
            assert await take(notes) == [Note("orders", "", gap=True)]
        finally:
            os.kill(pid, signal.SIGCONT)
        await asyncorm.notify("orders", "x")
        assert [note.payload for note in await take(notes)] == ["x"]


async def test_who_is_slow_is_told() -> None:
    async with asyncorm.listen("orders", buffer=10) as notes, asyncorm.listen("orders") as others:
        async with asyncorm.atomic():
            for n in range(25):
                await asyncorm.notify("orders", str(n))
        assert [note.payload for note in await take(others, 25)] == [str(n) for n in range(25)]
        got = await take(notes, 7)
    assert got[0].gap
    assert [note.payload for note in got[1:]] == [str(n) for n in range(19, 25)]


async def test_closed_from_outside() -> None:
    notes = asyncorm.listen("orders")
    await notes.__aenter__()
    waiting = asyncio.create_task(take(notes))
    await asyncio.sleep(0.05)
    await notes.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(notes)
    await asyncio.wait([waiting])
    assert isinstance(waiting.exception(), RuntimeError | StopAsyncIteration)


async def test_two_tasks_on_one_listener() -> None:
    async with asyncorm.listen("orders") as notes:
        waiting = asyncio.create_task(take(notes))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="Another task"):
            await anext(notes)
        await asyncorm.notify("orders")
        await waiting


async def test_bad_input() -> None:
    with pytest.raises(ValueError, match="one or more"):
        asyncorm.listen()
    for name in ("", "x" * 64, "ü" * 32, "a\0b"):
        with pytest.raises(ValueError, match="1 to 63 bytes"):
            asyncorm.listen(name)
        with pytest.raises(ValueError, match="1 to 63 bytes"):
            await asyncorm.notify(name)
    with pytest.raises(ValueError, match="1 or more"):
        asyncorm.listen("x", buffer=0)
    with pytest.raises(DataError, match="too long"):
        await asyncorm.notify("orders", "x" * 8000)
    with (
        database(ENGINE="django.db.backends.sqlite3", NAME=":memory:", OPTIONS={}) as alias,
        pytest.raises(NotSupportedError, match="PostgreSQL's"),
    ):
        asyncorm.listen("orders", using=alias)


async def test_server_out_of_reach() -> None:
    with database(HOST="127.0.0.1", PORT="1") as alias:
        with pytest.raises(OperationalError):
            await take(asyncorm.listen("orders", using=alias))
        with pytest.raises(OperationalError):
            await take(asyncorm.listen("orders", using=alias))


async def test_a_password_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Whatever it is that keeps from connecting: who begins is told, who listens waits for it."""
    with database() as alias:
        cls: Any = type(connections[alias])
        original = cls.get_connection_params
        failing = True

        def params(self: Any) -> Any:
            if failing and self.alias == alias:
                raise LookupError("no token")
            return original(self)

        monkeypatch.setattr(cls, "get_connection_params", params)
        with pytest.raises(LookupError, match="no token"):
            await take(asyncorm.listen("orders", using=alias))
        failing = False
        async with asyncorm.listen("orders", using=alias) as notes:
            failing = True
            async with asyncorm.cursor() as cursor:
                await cursor.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = %s",
                    [alias],
                )
            await eventually(lambda: "no token" in caplog.text)
            failing = False
            assert [note.gap for note in await take(notes)] == [True]


async def test_two_tasks_begin_with_one_listener(ask: Callable[..., Any]) -> None:
    notes = asyncorm.listen("orders")
    waiting = asyncio.create_task(take(notes))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="Another task"):
        await take(notes)
    while not await ask(LISTENING):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await asyncorm.notify("orders")
    await waiting
    await notes.aclose()


async def test_closed_as_it_begins() -> None:
    for turns in range(4):
        notes = asyncorm.listen("orders")
        waiting = asyncio.create_task(notes.__aenter__())
        for _ in range(turns):
            await asyncio.sleep(0)
        await notes.aclose()
        await waiting
        await eventually(lambda: not listening._hubs)
        with pytest.raises(StopAsyncIteration):
            await anext(notes)


async def test_in_the_tasks_of_a_block_of_another() -> None:
    """Whoever listens inside a block does not listen on its connection."""
    async with asyncorm.atomic():
        async with asyncorm.listen("orders") as notes:
            await asyncorm.notify("orders", "x")
            async with asyncorm.detached():
                await asyncorm.notify("orders", "y")
            assert [note.payload for note in await take(notes)] == ["y"]


def test_end_of_the_loop(stock: Any) -> None:
    """What still listens when asyncio.run() ends leaves no connection."""

    async def main() -> None:
        task = asyncio.create_task(take(asyncorm.listen("orders")))
        await asyncio.sleep(0.3)
        assert not task.done()

    asyncio.run(main())
    gc.collect()
    with psycopg.connect(**address(), autocommit=True) as conn:

        def none() -> bool:
            return not conn.execute(sql.SQL(LISTENING)).fetchall()

        asyncio.run(eventually(none))
