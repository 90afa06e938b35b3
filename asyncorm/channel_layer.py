"""A channel layer for Channels on LISTEN and NOTIFY: no broker beside PostgreSQL.

    CHANNEL_LAYERS = {"default": {"BACKEND": "asyncorm.channel_layer.PostgresChannelLayer"}}

What is for a consumer or a group is one notification, which carries the message; who listens for
the group has its members in memory. What is too long for a notification, and what is for a channel
that any process may read (a worker's), waits in a table, which is made when it is first needed.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import json
import logging
import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from copy import deepcopy
from time import monotonic, time
from typing import Any
from weakref import WeakKeyDictionary

from channels.exceptions import ChannelFull
from channels.layers import BaseChannelLayer
from django.db import DEFAULT_DB_ALIAS, DatabaseError

from . import listening
from .cursors import cursor
from .pages import see
from .pinning import detached

logger = logging.getLogger("asyncorm")

_TABLE = "asyncorm_channel_messages"
CREATE = f"""CREATE UNLOGGED TABLE IF NOT EXISTS {_TABLE} (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    channel text NOT NULL, id text NOT NULL, body text NOT NULL, expires timestamptz NOT NULL,
    UNIQUE (channel, id))"""
_PUT = f"""WITH put AS (
    INSERT INTO {_TABLE} (channel, id, body, expires)
    SELECT %(channel)s, %(id)s, %(body)s, clock_timestamp() + make_interval(secs => %(seconds)s)
    WHERE (SELECT count(*) FROM {_TABLE}
           WHERE channel = %(channel)s AND expires > clock_timestamp()) < %(capacity)s
    ON CONFLICT DO NOTHING RETURNING 1)
SELECT pg_notify(%(name)s, %(payload)s) FROM put"""
_TAKE = f"""DELETE FROM {_TABLE} WHERE number = (
    SELECT number FROM {_TABLE} WHERE channel = %s AND expires > clock_timestamp()
    ORDER BY number LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING body"""
_CLEAN = f"""DELETE FROM {_TABLE} WHERE number IN (
    SELECT number FROM {_TABLE} WHERE expires < clock_timestamp()
    ORDER BY number LIMIT 1000 FOR UPDATE SKIP LOCKED)"""
_LONGEST_NAME = 63  # bytes of a channel's name in PostgreSQL
_LONGEST_NOTE = 7999  # bytes of a payload
_LOOK_AGAIN = 30.0  # seconds, for what is in the table; a note may have been lost
_CLEAN_EVERY = 60.0  # seconds


class PostgresChannelLayer(BaseChannelLayer):  # type: ignore[misc]
    """Channels' API, with groups and flush; each event loop has its own consumers.

    Messages are sent as JSON, bytes included: tuples arrive as lists, keys as text. In a
    transaction block they are sent when it commits.
    """

    extensions = ("groups", "flush")

    def __init__(
        self,
        using: str = DEFAULT_DB_ALIAS,
        listen_using: str | None = None,
        prefix: str = "asyncorm",
        expiry: float = 60,
        group_expiry: float = 86400,
        capacity: int = 100,
        channel_capacity: dict[Any, int] | None = None,
    ) -> None:
        """Configure it: CONFIG in CHANNEL_LAYERS.

        Args:
            using: the alias that messages are sent by.
            listen_using: that which listens, where `using` goes through PgBouncer.
            prefix: tells layers in one database apart; at most 20 characters.
            expiry: seconds after which a message that nobody took is dropped.
            group_expiry: seconds after which a channel is no member of a group any more.
            capacity: most messages that wait in a channel; more are refused or dropped.
            channel_capacity: other capacities, by glob patterns of channels.

        Raises:
            ValueError: the prefix is too long.
        """
        super().__init__(expiry=expiry, capacity=capacity)
        if len(prefix.encode()) > 20:
            raise ValueError(
                "The prefix of a channel layer has at most 20 characters."
                + see("channels#a-channel-layer-on-postgresql")
            )
        self.channel_capacity = self.compile_capacities(channel_capacity or {})
        self.using = using
        self.listen_using = listen_using or using
        self.prefix = prefix
        self.group_expiry = group_expiry
        self._has_table = False
        self._loops: WeakKeyDictionary[Any, _OfLoop] = WeakKeyDictionary()

    def _here(self) -> _OfLoop:
        loop = asyncio.get_running_loop()
        if (here := self._loops.get(loop)) is None:
            here = self._loops[loop] = _OfLoop(self)
        return here

    def name(self, kind: str, name: str) -> str:
        """The name in PostgreSQL of a consumer's process, a group or a queue."""
        full = f"{self.prefix}:{kind}:{name}"
        if len(full.encode()) <= _LONGEST_NAME:
            return full
        return f"{self.prefix}:{kind}#{hashlib.sha256(name.encode()).hexdigest()[:32]}"

    # Channels

    async def send(self, channel: str, message: dict[str, Any]) -> None:
        """Send a message to a channel.

        Raises:
            channels.exceptions.ChannelFull: as many wait there as its capacity allows. That of a
                consumer elsewhere is not known: it drops what is too much.
        """
        assert isinstance(message, dict), "message is not a dict"
        self.require_valid_channel_name(channel)
        here = self._here()
        if "!" not in channel:
            if not await self.put(channel, here.next_id(), _written(message)):
                raise ChannelFull(channel)
            return
        box = here.boxes.get(channel)
        if box is not None and box.queue.full():
            raise ChannelFull(channel)
        await self._notify("c", self.non_local_name(channel), ["send", channel], message)

    async def receive(self, channel: str) -> Any:
        """Wait for the next message of a channel."""
        self.require_valid_channel_name(channel)
        here = self._here()
        if "!" in channel:
            await here.listen("c", self.non_local_name(channel))
            return await here.next_of(channel)
        await here.listen("q", channel)
        return await here.next_in_table(channel)

    async def new_channel(self, prefix: str = "specific.") -> str:
        """The name of a new channel of this process, which listens for it from now on."""
        here = self._here()
        await here.listen("c", f"{prefix}.{here.client}!")
        return f"{prefix}.{here.client}!{secrets.token_hex(6)}"

    # Groups

    async def group_add(self, group: str, channel: str) -> None:
        """Make a channel a member of a group; from another process that happens a little later."""
        await self._change("add", group, channel)

    async def group_discard(self, group: str, channel: str) -> None:
        """Make it a member no more."""
        await self._change("discard", group, channel)

    async def group_send(self, group: str, message: dict[str, Any]) -> None:
        """Send a message to all members of a group, by one notification."""
        assert isinstance(message, dict), "message is not a dict"
        self.require_valid_group_name(group)
        await self._notify("g", group, ["group", group], message)

    async def _change(self, do: str, group: str, channel: str) -> None:
        self.require_valid_group_name(group)
        self.require_valid_channel_name(channel)
        here = self._here()
        if here.owns(channel):
            await here.change(do, group, channel)
        else:
            await self._notify("c", self.non_local_name(channel), [do, group, channel], None)

    # Flush

    async def flush(self) -> None:
        """Forget the messages in the table, and the members and messages of this event loop."""
        await self.close()
        await self._make_table()
        async with cursor(self.using) as cur:
            await cur.execute(
                f"DELETE FROM {_TABLE} WHERE starts_with(channel, %s)", [f"{self.prefix}:"]
            )

    async def close(self) -> None:
        """Stop listening on this event loop."""
        here = self._loops.pop(asyncio.get_running_loop(), None)
        if here is not None:
            await here.close()

    # The database

    async def _notify(self, kind: str, name: str, what: list[str], message: object) -> None:
        """Send a notification; a message that it cannot hold is stored beside."""
        number = self._here().next_id()  # equal ones of a transaction would arrive once
        note = [number, time() + self.expiry, what, message]
        if len(payload := _written(note)) > _LONGEST_NOTE:
            await self._execute(
                f"INSERT INTO {_TABLE} (channel, id, body, expires) VALUES"
                " (%s, %s, %s, clock_timestamp() + make_interval(secs => %s))",
                [self._stored(), number, _written(message), self.expiry],
            )
            payload = _written([*note[:3], None])
        await listening.notify(self.name(kind, name), payload, using=self.using)

    async def put(self, channel: str, number: str, body: str) -> bool:
        """Put a message into the queue of a channel; False if it is full."""
        values = {
            "channel": f"{self.prefix}:{channel}",
            "id": number,
            "body": body,
            "seconds": self.expiry,
            "capacity": self.get_capacity(channel),
            "name": self.name("q", channel),
            "payload": _written([number, time() + self.expiry, ["look", channel], None]),
        }
        return bool(await self._execute(_PUT, values))

    async def take(self, channel: str) -> dict[str, Any] | None:
        """Take the next message out of the queue of a channel."""
        rows = await self._execute(_TAKE, [f"{self.prefix}:{channel}"])
        return _read(rows[0][0]) if rows else None

    async def stored(self, number: str) -> Any:
        """The message of a notification that could not hold it; None if it has expired."""
        rows = await self._execute(
            f"SELECT body FROM {_TABLE} WHERE channel = %s AND id = %s", [self._stored(), number]
        )
        return _read(rows[0][0]) if rows else None

    async def clean(self) -> None:
        """Delete what has expired."""
        await self._execute(_CLEAN, None)

    def _stored(self) -> str:
        return f"{self.prefix}:!"  # no channel has this name

    async def _execute(self, sql: str, params: Sequence[Any] | dict[str, Any] | None) -> list[Any]:
        await self._make_table()
        async with cursor(self.using) as cur:
            await cur.execute(sql, params)
            return await cur.fetchall() if cur.description else []

    async def _make_table(self) -> None:
        """Make the table if it is not there, outside of any transaction of the caller's."""
        if self._has_table:
            return
        async with detached(), cursor(self.using) as cur:
            there = "SELECT to_regclass(%s) IS NOT NULL"
            await cur.execute(there, [_TABLE])
            if not (await cur.fetchone())[0]:  # type: ignore[index]
                try:
                    await cur.execute(CREATE)
                except DatabaseError:  # another process has, at the same time
                    await cur.execute(there, [_TABLE])
                    if not (await cur.fetchone())[0]:  # type: ignore[index]
                        raise
        self._has_table = True


class _Inbox(listening.Inbox):
    """Hands what arrives to the one reader of the layer."""

    def __init__(self, name: str, notes: asyncio.Queue[listening.Note]) -> None:
        super().__init__(frozenset([name]), 1)
        self._all = notes

    def put(self, note: listening.Note) -> None:
        self._all.put_nowait(note)

    def note_gap(self) -> None:
        self._all.put_nowait(listening.Note(next(iter(self.channels)), "", gap=True))


class _Box:
    """The messages of a channel that wait here, or for one of the table, signs to look there."""

    def __init__(self, capacity: int) -> None:
        self.queue: asyncio.Queue[tuple[float, Any]] = asyncio.Queue(capacity)
        self.waiting = 0
        self.returned: deque[Any] = deque()  # taken for somebody who was cancelled then

    def is_idle(self) -> bool:
        """Whether nobody needs it; what has expired is dropped."""
        now = time()
        for each in [self.queue.get_nowait() for _ in range(self.queue.qsize())]:
            if each[0] > now:
                self.queue.put_nowait(each)
        return self.queue.empty() and not self.waiting and not self.returned


class _OfLoop:
    """What a layer has on one event loop: channels, members of groups, a task that reads."""

    def __init__(self, layer: PostgresChannelLayer) -> None:
        self.layer = layer
        self.client = secrets.token_hex(6)
        self.boxes: dict[str, _Box] = {}
        self.groups: dict[str, dict[str, float]] = {}
        self._numbers = itertools.count()
        self._listening: dict[str, asyncio.Task[listening.Listener]] = {}
        self._notes: asyncio.Queue[listening.Note] = asyncio.Queue()
        self._clean_at = monotonic() + _CLEAN_EVERY
        self._reader: asyncio.Task[None] | None = None

    def next_id(self) -> str:
        """A number that no other message has."""
        return f"{self.client}-{next(self._numbers)}"

    def owns(self, channel: str) -> bool:
        """Whether members of that name are kept here."""
        return "!" not in channel or channel.partition("!")[0].endswith(f".{self.client}")

    # Listening

    async def listen(self, kind: str, name: str) -> None:
        """Have the server listen; return when it does."""
        if self._reader is None:
            self._reader = self._start(self._read())
        full = self.layer.name(kind, name)
        if (task := self._listening.get(full)) is None or _has_failed(task):
            listener = listening.Listener(_Inbox(full, self._notes), self.layer.listen_using)
            task = self._listening[full] = self._start(listener.__aenter__())
        await asyncio.shield(task)

    @staticmethod
    def _start(coroutine: Any) -> asyncio.Task[Any]:
        # In a context of its own: in a block of nobody's.
        return asyncio.get_running_loop().create_task(coroutine, context=Context())

    async def _leave(self, full: str) -> None:
        if (task := self._listening.pop(full, None)) is not None:
            await asyncio.wait([task])
            if not _has_failed(task):
                await task.result().aclose()

    async def close(self) -> None:
        """Stop listening."""
        if self._reader is not None:
            self._reader.cancel()
        for full in list(self._listening):
            await self._leave(full)

    # Members

    async def change(self, do: str, group: str, channel: str) -> None:
        """Make a channel a member ("add") or one no more ("discard"), as a notification says.

        Nothing is listened to for a group without members.
        """
        if do == "add":
            self.groups.setdefault(group, {})[channel] = time()
            await self.listen("g", group)
        elif (members := self.groups.get(group)) is not None:
            members.pop(channel, None)
            if not members:
                del self.groups[group]
                await self._leave(self.layer.name("g", group))

    # What arrives

    async def _read(self) -> None:
        while True:
            note = await self._notes.get()
            try:
                await self._handle(note)
                if monotonic() > self._clean_at:
                    self._clean_at = monotonic() + _CLEAN_EVERY
                    self.boxes = {k: box for k, box in self.boxes.items() if not box.is_idle()}
                    await self.layer.clean()
            except Exception:
                logger.exception("A message of the channel layer was lost.")

    async def _handle(self, note: listening.Note) -> None:
        if note.gap:
            for channel in [name for name in self.boxes if "!" not in name]:
                self._give(channel, time() + self.layer.expiry, None)
            logger.warning("The channel layer may have lost messages of %s.", note.channel)
            return
        number, expires, what, message = _read(note.payload)
        do, *names = what
        if do in ("add", "discard"):
            await self.change(do, *names)
            return
        if do != "look" and message is None:
            message = await self.layer.stored(number)
            if message is None:  # it has expired
                return
        if do != "group":
            self._give(names[0], expires, message)
            return
        oldest = time() - self.layer.group_expiry
        for channel, since in list(self.groups.get(names[0], {}).items()):
            if since < oldest:
                await self.change("discard", names[0], channel)
            elif "!" in channel:
                self._give(channel, expires, deepcopy(message))
            else:
                await self.layer.put(channel, number, _written(message))

    def _give(self, channel: str, expires: float, message: object) -> None:
        box = self._box(channel)
        if box.queue.full():
            box.is_idle()  # drops what has expired
        if not box.queue.full():
            box.queue.put_nowait((expires, message))
        elif message is not None:
            logger.warning("Channel %s is full: a message was dropped.", channel)

    def _box(self, channel: str) -> _Box:
        if (box := self.boxes.get(channel)) is None:
            box = self.boxes[channel] = _Box(self.layer.get_capacity(channel))
        return box

    # Who waits

    @contextmanager
    def _waiting(self, channel: str) -> Iterator[_Box]:
        box = self._box(channel)
        box.waiting += 1
        try:
            yield box
        finally:
            box.waiting -= 1
            if box.is_idle() and self.boxes.get(channel) is box:
                del self.boxes[channel]

    async def next_of(self, channel: str) -> Any:
        """The next message of a channel of this process."""
        with self._waiting(channel) as box:
            while True:
                expires, message = await box.queue.get()
                if expires > time():
                    return message

    async def next_in_table(self, channel: str) -> Any:
        """The next message of a channel that any process may read."""
        with self._waiting(channel) as box:
            while True:
                if box.returned:
                    return box.returned.popleft()
                taking = self._start(self.layer.take(channel))
                try:
                    message = await asyncio.shield(taking)
                except asyncio.CancelledError:
                    taking.add_done_callback(lambda task: self._return(channel, task))
                    raise
                if message is not None:
                    return message
                try:
                    async with asyncio.timeout(_LOOK_AGAIN):
                        await box.queue.get()
                except TimeoutError:
                    pass

    def _return(self, channel: str, task: asyncio.Task[Any]) -> None:
        """Keep what was taken for somebody who has been cancelled for the next one."""
        if not task.cancelled() and task.exception() is None and task.result() is not None:
            box = self._box(channel)
            box.returned.append(task.result())
            if not box.queue.full():
                box.queue.put_nowait((time() + self.layer.expiry, None))


def _has_failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _written(value: object) -> str:
    return json.dumps(value, default=_bytes, separators=(",", ":"))


def _bytes(value: object) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return {"\0bytes": base64.b64encode(value).decode()}
    raise TypeError(
        f"A message of a channel layer cannot hold {value!r}."
        + see("channels#a-channel-layer-on-postgresql")
    )


def _read(text: str) -> Any:
    return json.loads(text, object_hook=_object)


def _object(value: dict[str, Any]) -> Any:
    if len(value) == 1 and "\0bytes" in value:
        return base64.b64decode(value["\0bytes"])
    return value
