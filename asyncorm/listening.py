"""LISTEN and NOTIFY: `listen()` and `notify()`, with one connection for all who listen.

Each event loop and alias has at most one such connection, beside the pool: whoever listens has an
inbox, and a task reads what arrives into the inboxes. When the connection is lost the task makes
another one, and puts a note with `gap` into each inbox: what was sent meanwhile is not known.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from asyncio import AbstractEventLoop, Task
from collections import deque
from contextvars import Context
from typing import Any, NamedTuple

import psycopg
from django.db import DEFAULT_DB_ALIAS, NotSupportedError, connections
from django.db.utils import DatabaseErrorWrapper
from psycopg import sql

from ._pool.connection import connect_beside
from .cursors import cursor
from .pages import see

logger = logging.getLogger("asyncorm")

_LONGEST = 63  # bytes of an identifier; LISTEN cuts a longer one, pg_notify() refuses it
_PROBE = 30.0  # seconds of silence, after which the connection is tried
_ANSWER = 10.0  # seconds that the server has for it
_BACK_OFF = 0.1, 30.0  # seconds between attempts to connect, at first and at most


class Note(NamedTuple):
    """What arrived on a channel.

    Attributes:
        channel: the channel's name.
        payload: the text that was sent with it; "" with `gap`.
        pid: the process id of the sender's server session; 0 with `gap`.
        gap: not a notification: notifications of this channel may have been lost here, since the
            connection was, or since the listener did not take them in time. Whoever keeps something
            up to date reads it anew.
    """

    channel: str
    payload: str
    pid: int = 0
    gap: bool = False


class Inbox:
    """The notes that one listener has not taken yet."""

    def __init__(self, channels: frozenset[str], size: int) -> None:
        self.channels = channels
        self.size = size
        self.notes: deque[Note] = deque()
        self.waiting: asyncio.Future[None] | None = None

    def put(self, note: Note) -> None:
        if len(self.notes) >= self.size:
            self.note_gap()
        self.notes.append(note)
        self._wake()

    def note_gap(self) -> None:
        self.notes.clear()
        self.notes.extend(Note(channel, "", gap=True) for channel in sorted(self.channels))
        self._wake()

    def _wake(self) -> None:
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_result(None)


class _Hub:
    """The connection that listens for one alias on one event loop, as long as anybody does."""

    def __init__(self, alias: str, loop: AbstractEventLoop) -> None:
        self.alias = alias
        self.loop = loop
        self.inboxes: set[Inbox] = set()
        self._starting: dict[Inbox, asyncio.Future[None]] = {}
        self._failures = 0  # since it was connected
        self._held: list[psycopg.Notify] = []  # came before who listens was told of the gap
        self._wake = loop.create_future()
        # In a context of its own: in a block of nobody's, with nobody's variables. Not by the
        # loop's factory: an eager one would begin it now, when nobody listens, and it would end.
        self.task = Task(self._serve(), loop=loop, context=Context())

    async def join(self, inbox: Inbox) -> None:
        """Have an inbox filled; return when the server listens.

        Raises:
            psycopg.Error: it cannot.
            RuntimeError: another task does the same.
        """
        if inbox in self._starting:
            raise _busy()
        self.inboxes.add(inbox)
        started = self._starting[inbox] = self.loop.create_future()
        self._changed()
        try:
            await started
        except BaseException:
            self.leave(inbox)
            raise
        finally:
            del self._starting[inbox]

    def leave(self, inbox: Inbox) -> None:
        """Fill an inbox no more; close the connection after the last one."""
        self.inboxes.discard(inbox)
        if not self.inboxes:
            if _hubs.get((self.loop, self.alias)) is self:
                del _hubs[self.loop, self.alias]
            self.task.cancel()
        self._changed()

    def _changed(self) -> None:
        if not self._wake.done():
            self._wake.set_result(None)

    async def _serve(self) -> None:
        while self.inboxes:
            try:
                conn = await connect_beside(self.alias)
                try:
                    await self._listen(conn)
                finally:
                    await conn.close()
            except Exception as exc:  # a password that cannot be had, say
                why = str(exc).strip() or "no answer"
                self._refuse(exc)
                if not self.inboxes:
                    return
                self._failures += 1
                logger.warning(
                    "The connection that listens to %s of database %r was lost: %s. Trying again.",
                    ", ".join(sorted(self._channels())), self.alias, why,
                )  # fmt: skip
                least, most = _BACK_OFF
                delay = min(least * 2 ** min(self._failures - 1, 16), most)
                await asyncio.sleep(delay * random.uniform(0.75, 1.25))

    def _refuse(self, exc: BaseException) -> None:
        """Tell those who begin to listen why they cannot; they do not wait for a better time."""
        for inbox, started in self._starting.items():
            if not started.done():
                self.inboxes.discard(inbox)
                started.set_exception(exc)

    async def _listen(self, conn: psycopg.AsyncConnection[Any]) -> None:
        conn.add_notify_handler(self._arrived)
        self._held.clear()
        listening: set[str] = set()
        while True:
            self._wake = self.loop.create_future()
            await self._follow(conn, listening)
            if self._failures:
                self._failures = 0
                for inbox in self.inboxes - self._starting.keys():
                    inbox.note_gap()
                for notify in self._held:
                    self._arrived(notify)
                self._held.clear()
            self._confirm(listening)
            if await self._silence(conn):
                async with asyncio.timeout(_ANSWER):
                    await conn.execute("SELECT 1")

    def _channels(self) -> set[str]:
        return {channel for inbox in self.inboxes for channel in inbox.channels}

    async def _follow(self, conn: psycopg.AsyncConnection[Any], listening: set[str]) -> None:
        """LISTEN and UNLISTEN until the server listens to what is asked for."""
        while listening != (wanted := self._channels()):
            for command, names in (
                ("LISTEN", wanted - listening),
                ("UNLISTEN", listening - wanted),
            ):
                for name in names:
                    await conn.execute(sql.SQL(command + " {}").format(sql.Identifier(name)))
                    (listening.add if command == "LISTEN" else listening.discard)(name)

    def _confirm(self, listening: set[str]) -> None:
        for inbox, started in self._starting.items():
            if not started.done() and inbox.channels <= listening:
                started.set_result(None)

    async def _silence(self, conn: psycopg.AsyncConnection[Any]) -> bool:
        """Take what arrives until other channels are wanted; whether nothing came for long."""
        pgconn = conn.pgconn
        self.loop.add_reader(pgconn.socket, self._changed)
        try:
            done, _ = await asyncio.wait([self._wake], timeout=_PROBE)
        finally:
            self.loop.remove_reader(pgconn.socket)
        pgconn.consume_input()
        while (notify := pgconn.notifies()) is not None:
            if pgconn.notify_handler is not None:
                pgconn.notify_handler(notify)  # psycopg's, which calls `_arrived()`
        return not done

    def _arrived(self, notify: psycopg.Notify) -> None:
        if self._failures:
            self._held.append(notify)
            return
        note = Note(notify.channel, notify.payload, notify.pid)
        for inbox in self.inboxes:
            if note.channel in inbox.channels:
                inbox.put(note)


_hubs: dict[tuple[AbstractEventLoop, str], _Hub] = {}
os.register_at_fork(after_in_child=_hubs.clear)  # the connections are the parent's


def _hub(alias: str) -> _Hub:
    for key in list(_hubs):  # other threads have theirs
        if key[0].is_closed():
            _hubs.pop(key, None)
    key = asyncio.get_running_loop(), alias
    hub = _hubs.get(key)
    if hub is None or hub.task.done():
        hub = _hubs[key] = _Hub(alias, key[0])
    return hub


def _busy() -> RuntimeError:
    return RuntimeError(
        "Another task waits for the next note of this listener: give each task one of its own, "
        "asyncorm.listen() costs no connection." + see("listen#listen-and-notify")
    )


class Listener:
    """What `listen()` gives: an asynchronous iterator of notes, and a context manager."""

    _hub: _Hub | None = None

    def __init__(self, inbox: Inbox, alias: str) -> None:
        self._inbox = inbox
        self._alias = alias
        self._closed = False

    async def __aenter__(self) -> Listener:
        if self._hub is None and not self._closed:
            hub = _hub(self._alias)
            with DatabaseErrorWrapper(connections.create_connection(self._alias)):
                await hub.join(self._inbox)
            self._hub = hub
        if self._closed:  # meanwhile
            await self.aclose()
        return self

    async def __aexit__(self, *args: object) -> None:
        await self.aclose()

    def __aiter__(self) -> Listener:
        return self

    async def __anext__(self) -> Note:
        await self.__aenter__()
        inbox = self._inbox
        if inbox.waiting is not None:
            raise _busy()
        while not inbox.notes:
            if self._closed:
                raise StopAsyncIteration
            inbox.waiting = asyncio.get_running_loop().create_future()
            try:
                await inbox.waiting
            finally:
                inbox.waiting = None
        return inbox.notes.popleft()

    async def aclose(self) -> None:
        """Stop listening: whoever waits for a note gets the end of the iteration."""
        self._closed = True
        hub, self._hub = self._hub, None
        if hub is not None:
            hub.leave(self._inbox)
            self._inbox.notes.clear()
            if (waiting := self._inbox.waiting) is not None and not waiting.done():
                waiting.set_result(None)
            if not hub.inboxes:
                await asyncio.wait([hub.task])

    def __del__(self) -> None:  # a loop over it was left
        if self._hub is not None and not self._hub.loop.is_closed():
            self._hub.loop.call_soon_threadsafe(self._hub.leave, self._inbox)


def listen(*channels: str, using: str | None = None, buffer: int = 10_000) -> Listener:
    """Listen to channels: `async for note in asyncorm.listen("orders"): ...`.

    All who listen on an event loop share one connection for each alias, beside the pool. It is
    made anew when it was lost; a note whose `gap` is true says that others may be missing.
    `async with asyncorm.listen("orders") as notes:` has the server listen before its body begins;
    otherwise it does from the first step of the iteration on. Leaving the loop or the block stops
    listening. Behind PgBouncer `using` names an alias that connects to the server itself.

    Args:
        channels: names, at most 63 bytes each; case matters.
        using: a database alias; the default one by default.
        buffer: how many notes are kept for this listener; if more arrive before it takes them,
            they are dropped, and a note with `gap` is in their place.

    Raises:
        ValueError: no channel, or a name that PostgreSQL cannot have.
        django.db.NotSupportedError: the alias has another engine.
        django.db.OperationalError: at the first step: the server cannot be reached, or does not
            listen (a standby). Later it is tried again.
    """
    if not channels:
        raise ValueError(
            "listen() takes the names of one or more channels." + see("listen#listen-and-notify")
        )
    for channel in channels:
        _verify(channel)
    if buffer < 1:
        raise ValueError("buffer must be 1 or more." + see("listen#listen-and-notify"))
    alias = using or DEFAULT_DB_ALIAS
    if connections.create_connection(alias).vendor != "postgresql":
        raise NotSupportedError(
            f"Database {alias!r} cannot listen: LISTEN is PostgreSQL's. Name an alias with "
            "another ENGINE in using=." + see("listen#listen-and-notify")
        )
    return Listener(Inbox(frozenset(channels), buffer), alias)


async def notify(channel: str, payload: str = "", using: str | None = None) -> None:
    """Send a notification to all who listen to a channel; inside a block, when it commits.

    Within one transaction equal notifications are delivered once. See "NOTIFY" in PostgreSQL's
    documentation.

    Args:
        channel: its name, at most 63 bytes.
        payload: a text of less than 8,000 bytes.
        using: a database alias; the default one by default.

    Raises:
        ValueError: a name that PostgreSQL cannot have.
        django.db.DataError: the payload is too long.
        django.db.Error: as a query does.
    """
    _verify(channel)
    async with cursor(using) as cur:
        await cur.execute("SELECT pg_notify(%s, %s)", [channel, payload])


def _verify(channel: str) -> None:
    if not channel or "\0" in channel or len(channel.encode()) > _LONGEST:
        raise ValueError(
            f"A channel's name has 1 to {_LONGEST} bytes and no NUL: {channel!r} is none."
            + see("listen#listen-and-notify")
        )
