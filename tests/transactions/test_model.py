"""Random trees of tasks and blocks on the real server, compared with a sequential model.

Hypothesis draws programs: concurrent transactions, each a tree of statements, failures, nested
blocks, child tasks, tasks that outlive their block, and cancellations. A program runs natively and
writes down each step when it is done. A statement holds its block's lock, so their order is that on
the server: the model goes through the list one by one and says what each step should have given.
"""

import asyncio
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest
from django.contrib.auth.models import Group, Permission, User
from django.db import (
    IntegrityError,
    InterfaceError,
    OperationalError,
    connection,
    transaction,
)
from django.db.models import Func, IntegerField, Prefetch, Value
from django.db.transaction import TransactionManagementError
from django.test import override_settings
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from psycopg.errors import QueryCanceled

import asyncorm
from asyncorm import conf
from tests.project.myapp.models import Item
from tests.support import all_given_back

settings.register_profile(
    "model",
    max_examples=300,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
settings.register_profile(
    "soak",
    settings.get_profile("model"),
    max_examples=10_000,
    phases=[Phase.generate],  # what fails once in thousands may not fail again: look at the list
)
# `make soak` sets both; another seed is as good as this one.
PROFILE = os.environ.get("ASYNCORM_MODEL_PROFILE", "model")
SEED = int(os.environ.get("ASYNCORM_MODEL_SEED", "4"))

PATIENCE = 30.0  # seconds; reached only when a program hangs
TAKEN = 0  # the remote_id of a row that is always there
ids = count(1)
MOMENT = datetime(2024, 7, 1, 12, tzinfo=UTC)
LARGE = 1 << 20
# Of the session, for the rest of a transaction.
SETTINGS = (
    "TIME ZONE 'Pacific/Kiritimati'", "TIME ZONE INTERVAL '-05:30' HOUR TO MINUTE",
    "DateStyle = 'SQL, DMY'", "IntervalStyle = 'iso_8601'", "search_path = pg_catalog, public",
    "statement_timeout = '25s'", "standard_conforming_strings = off", "extra_float_digits = 0",
    "bytea_output = 'escape'", "work_mem = '1MB'", "ROLE asyncorm_model", "ROLE asyncorm_model",
)  # fmt: skip
KILL = "SELECT asyncorm_model_kill()"  # whatever the role


class Boom(Exception):
    """An error of the program's own."""


# Programs


@dataclass
class Do:
    """A step: add, look (count rows), stream (the same, from a server-side cursor), violate (a
    constraint), boom, hook (on_commit), rollback (set_rollback), detached (add outside the block),
    alter (SET LOCAL), apart (outside the block, which must see nothing of that), large (a value),
    leave (a generator that adds in a nested block, and is left before that ends), apart_left (the
    same outside the block), prefetch (two relations, on the block's connection), apart_prefetch
    (where they may have others), kill (the block's server process), apart_killed (that of a block
    of its own, outside).
    """

    what: str
    pauses: int

    def __repr__(self) -> str:
        return f"{self.what}+{self.pauses}"


@dataclass
class Nested:
    """A nested block; `caught` says whether an error that leaves it is handled there."""

    body: list[Any]
    caught: bool
    savepoint: bool
    native: bool = False  # Django's own atomic(), in native code


@dataclass
class Children:
    """Child tasks.

    `escapes` says whether an error of one of them is raised again: never, when all are done, or at
    once, while the others go on. `batch` says that they are the operations of a batch().
    """

    tasks: list["Child"]
    escapes: str
    batch: bool = False


@dataclass
class Child:
    body: list[Any]
    # Passes of the loop after which the task is cancelled, once or more often. It then has a block
    # of its own around all it does, so that what a cancelled statement did is rolled back.
    cancels: tuple[int, ...]
    # It is awaited only after the end of the block that it was started in.
    outlives: bool = False
    # It keeps a connection(), in which its transaction runs.
    keeps: bool = False


pauses = st.integers(0, 3)
STEPS = (
    "add add add add look look stream violate boom hook hook rollback detached alter apart large "
    "leave apart_left prefetch apart_prefetch"
)
if PROFILE == "soak":
    STEPS += " kill apart_killed"
leaf = st.builds(Do, st.sampled_from(STEPS.split()), pauses)
cancels = (
    st.just(()) | st.tuples(st.integers(0, 40)) | st.tuples(st.integers(0, 40), st.integers(0, 2))
)
seldom = st.sampled_from([False, False, False, True])


def compound(inner: Any) -> Any:
    body = st.lists(inner, min_size=1, max_size=4)
    child = st.builds(Child, body, cancels, seldom)
    return st.builds(
        Nested, body, st.booleans(), seldom.map(lambda seldom: not seldom), seldom
    ) | st.builds(
        Children,
        st.lists(child, min_size=1, max_size=4),
        st.sampled_from(["never", "when all are done", "at once"]),
        st.booleans(),
    )


step = st.recursive(leaf, lambda inner: leaf | compound(inner), max_leaves=12)
root = st.builds(Child, st.lists(step, min_size=1, max_size=5), cancels, st.just(False), seldom)
programs = st.lists(root, min_size=1, max_size=3)


# Running them


@dataclass
class Block:
    """What both the run and the model know of a block."""

    number: int
    parent: "Block | None"
    savepoint: bool = True
    over: bool = False
    # The model's part.
    killing: int = 0  # of a whole transaction: kills that may have reached the server, or will
    lost: bool = False  # of a whole transaction: its connection is, with all it did
    rows: list[int] = field(default_factory=list)
    hooks: list[int] = field(default_factory=list)
    poisoned: bool = False
    real: bool = True  # has a savepoint of its own, or is the transaction
    # By set_rollback(), or since a block around it is to be rolled back: that waits for nobody. A
    # statement that runs at that time is well done, and a block that is being entered has its
    # savepoint.
    marked: bool = False
    leaving: bool = False
    rolled_back: bool = False  # cancelled while it was being left
    ended: bool = False
    late: list[asyncio.Task[None]] = field(default_factory=list)  # tasks that outlive it

    @property
    def root(self) -> "Block":
        return self if self.parent is None else self.parent.root


class Lost(str):
    """The outcome "lost", which knows of what error: a program that fails may not do so again."""

    def __new__(cls, exc: BaseException) -> "Lost":
        lost = super().__new__(cls, "lost")
        lost.exc = exc
        return lost

    exc: BaseException


class Run:
    """Runs one program and keeps the list of what happened."""

    def __init__(self) -> None:
        self.log: list[tuple[str, Block, Any, str]] = []
        self.called: list[tuple[int, int]] = []
        self.numbers = count(1)
        self.tasks: set[asyncio.Task[None]] = set()

    async def program(self, roots: list[Child]) -> None:
        await self.all(roots, None)
        while self.tasks:  # cancelled ones do not wait for those that outlive them
            await asyncio.wait(self.tasks)

    async def all(self, children: list[Child], block: Block | None) -> list[Any]:
        tasks = [self.start(child, block) for child in children]
        return await asyncio.gather(*tasks, return_exceptions=True)

    async def batch(self, children: list[Child], block: Block) -> list[Any]:
        calls = [lambda child=child: self.start(child, block) for child in children]
        return await asyncorm.batch(*calls, return_exceptions=True)

    def start(self, child: Child, block: Block | None) -> asyncio.Task[None]:
        task = asyncio.create_task(self.child(child, block))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        if child.cancels:
            cancelling = asyncio.create_task(self.cancel(task, child.cancels))
            task.add_done_callback(lambda _: cancelling.cancel())
        return task

    async def cancel(self, task: asyncio.Task[None], cancels: tuple[int, ...]) -> None:
        for after in cancels:
            for _ in range(after):
                await asyncio.sleep(0)
            task.cancel()

    async def child(self, child: Child, block: Block | None) -> None:
        if child.keeps:
            async with asyncorm.connection():
                await self.block(Nested(child.body, caught=False, savepoint=True), block)
        elif block is None or child.cancels:
            await self.block(Nested(child.body, caught=False, savepoint=True), block)
        else:
            await self.steps(child.body, block)

    async def block(self, nested: Nested, parent: Block | None) -> None:
        block = Block(next(self.numbers), parent, nested.savepoint)
        try:
            if nested.native:
                await asyncorm.native(self.native_block)(nested, block)
            else:
                await self.asyncorm_block(nested, block)
        except asyncio.CancelledError:
            raise
        except Exception:
            if not nested.caught or not block.over:  # or it was not even entered
                raise
        finally:
            while block.late:
                await asyncio.gather(block.late.pop(), return_exceptions=True)

    async def asyncorm_block(self, nested: Nested, block: Block) -> None:
        atomic = asyncorm.atomic(savepoint=nested.savepoint)
        try:
            await atomic.__aenter__()
        except BaseException as exc:
            self.not_entered(block, exc)
            raise
        self.log.append(("enter", block, None, "ok"))
        real = atomic._entered[-1][0]
        error: BaseException | None = None
        try:
            await self.steps(nested.body, block)
        except BaseException as exc:
            error = exc
        self.log.append(("leaving", block, None, "ok"))
        try:
            await atomic.__aexit__(type(error) if error else None, error, None)
        except BaseException as exc:
            self.left(block, real, error, exc)
            raise
        self.left(block, real, error, None)
        if error is not None:
            raise error

    def native_block(self, nested: Nested, block: Block) -> None:
        atomic = transaction.atomic(savepoint=nested.savepoint)
        try:
            atomic.__enter__()
        except BaseException as exc:
            self.not_entered(block, exc)
            raise
        self.log.append(("enter", block, None, "ok"))
        real = transaction.get_connection().session.innermost()  # type: ignore[attr-defined]
        error: BaseException | None = None
        try:
            asyncorm.await_(self.steps(nested.body, block))
        except BaseException as exc:
            error = exc
        self.log.append(("leaving", block, None, "ok"))
        try:
            atomic.__exit__(type(error) if error else None, error, None)
        except BaseException as exc:
            self.left(block, real, error, exc)
            raise
        self.left(block, real, error, None)
        if error is not None:
            raise error

    def not_entered(self, block: Block, exc: BaseException) -> None:
        if not isinstance(exc, asyncio.CancelledError):
            self.log.append(("enter", block, None, self.name(exc)))

    def left(self, block: Block, real: Any, error: Any, exc: BaseException | None) -> None:
        """A cancellation that comes while a block is being left is raised after its end.

        If the block still waited for statements of its tasks, it was rolled back.
        """
        outcome = "ok" if exc is None else self.name(exc)
        if outcome == "cancelled" and real.cancelled is not None:
            outcome = "rolled back"
        block.over = True
        self.log.append(("exit", block, error is None, outcome))

    async def steps(self, body: list[Any], block: Block) -> None:
        for step in body:
            if isinstance(step, Do):
                for _ in range(step.pauses):
                    await asyncio.sleep(0)
                await self.do(step.what, block)
            elif isinstance(step, Nested):
                await self.block(step, block)
            else:
                now = [child for child in step.tasks if not child.outlives]
                late = [child for child in step.tasks if child.outlives]
                block.late += [self.start(child, block) for child in late]
                if step.escapes == "at once":
                    tasks = [self.start(child, block) for child in now]
                    block.late += tasks
                    await asyncio.gather(*tasks)
                    continue
                results = await (self.batch if step.batch else self.all)(now, block)
                errors = [r for r in results if isinstance(r, Exception)]
                if errors and step.escapes == "when all are done":
                    raise errors[0]

    async def do(self, what: str, block: Block) -> None:
        number = next(ids)
        root = block.root.number
        if what == "boom":
            raise Boom
        if what == "hook":
            try:
                asyncorm.on_commit(lambda: self.called.append((root, number)))
            except Exception as exc:
                self.log.append(("hook", block, number, self.name(exc)))
            else:
                self.log.append(("hook", block, number, "ok"))
            return
        if what == "rollback":
            try:
                asyncorm.set_rollback(True)
            except Exception as exc:
                self.log.append(("rollback", block, None, self.name(exc)))
            else:
                self.log.append(("rollback", block, None, "ok"))
            return
        value: Any = number
        rows = Item.objects.filter(name=f"{root}")
        try:
            if what == "look":
                value = await rows.native_count()
            elif what == "stream":
                began = len(self.log)
                value = len([row async for row in rows.native_iterator(chunk_size=2)])
                if len(self.log) > began:  # others may have added rows in the meantime
                    return
            elif what == "alter":
                await asyncorm.native(executed)(f"SET LOCAL {SETTINGS[number % len(SETTINGS)]}")
            elif what == "large":
                value = await asyncorm.native(executed)("SELECT length(%s)", "é" * LARGE)
            elif what == "apart":
                async with asyncorm.detached():
                    taken = Item.objects.filter(remote_id=TAKEN).annotate(at=Value(MOMENT))
                    value = await taken.values_list("at", flat=True).native_get()
                    value = (
                        value,
                        await asyncorm.native(executed)("SELECT interval '1 month 2 h'"),
                        await asyncorm.native(executed)("SELECT current_user <> 'asyncorm_model'"),
                    )
            elif what == "leave":
                async for _ in unfinished(number):
                    break
                value = await Item.objects.filter(remote_id=number).native_count()
            elif what == "apart_left":
                async with asyncorm.detached():
                    async for _ in unfinished(number):
                        break
                    value = await Item.objects.filter(remote_id=number).native_count()
            elif what == "prefetch":
                self.log.append(("asking", block, number, "ok"))
                value = number, await asyncorm.native(prefetched)()
            elif what == "apart_prefetch":
                async with asyncorm.detached():
                    value = (await asyncorm.native(prefetched)())[:2]
            elif what == "kill":
                self.log.append(("killing", block, None, "ok"))
                await asyncorm.native(executed)(KILL)
            elif what == "apart_killed":
                async with asyncorm.detached():
                    value = await killed(number)
            elif what == "detached":
                async with asyncorm.detached():
                    await Item.objects.native_create(remote_id=number, name="detached")
            else:
                remote_id = number if what == "add" else TAKEN
                await Item.objects.native_create(remote_id=remote_id, name=f"{root}")
        except asyncio.CancelledError:
            if what == "detached":
                self.log.append((what, block, value, "cancelled"))
            raise
        except Exception as exc:
            self.log.append((what, block, value, self.name(exc)))
        else:
            self.log.append((what, block, value, "ok"))

    @staticmethod
    def name(exc: BaseException) -> str:
        if isinstance(exc, asyncio.CancelledError):
            return "cancelled"
        if isinstance(exc, IntegrityError):
            return "integrity"
        if isinstance(exc.__cause__, QueryCanceled):
            return "stopped"
        if isinstance(exc, OperationalError | InterfaceError) and (
            "connection was closed" in str(exc) or "given its server connection back" in str(exc)
        ):
            return "stopped"  # on a machine so slow that the server did not answer in time
        if isinstance(exc, OperationalError | InterfaceError):
            return Lost(exc)
        if isinstance(exc, TransactionManagementError):
            return "ended" if "has ended" in str(exc) else "broken"
        return repr(exc)


async def unfinished(remote_id: int) -> AsyncIterator[None]:
    async with asyncorm.atomic():
        await Item.objects.native_create(remote_id=remote_id, name="left")
        yield


async def killed(remote_id: int) -> tuple[str, int]:
    """Lose a block's connection; the error, and how many of its rows there are."""
    error = ""
    try:
        async with asyncorm.atomic():
            await Item.objects.native_create(remote_id=remote_id, name="killed")
            with suppress(OperationalError):
                await asyncorm.native(executed)(KILL)
    except Exception as exc:
        error = Run.name(exc)
    return error, await Item.objects.filter(remote_id=remote_id).native_count()


def prefetched() -> tuple[int, int, bool]:
    """The sizes of two relations, and whether one connection has read all."""
    process = Func(function="pg_backend_pid", output_field=IntegerField())
    # psycopg does not read times in the session's style.
    without_times = User.objects.only("username").annotate(process=process)
    group = Group.objects.annotate(process=process).prefetch_related(
        Prefetch("user_set", without_times),
        Prefetch("permissions", Permission.objects.order_by().annotate(process=process)),
    )
    found: Any = group.get(name="model")
    users, permissions = list(found.user_set.all()), list(found.permissions.all())
    by = {each.process for each in [found, *users, *permissions]}
    return len(users), len(permissions), len(by) == 1


def executed(sql: str, *params: Any) -> Any:
    """Execute a statement; its value, if it has one."""
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchone()[0] if cursor.description else None


# The model


class Model:
    """What one task alone on the server would have seen, step by step."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.called: dict[int, list[int]] = defaultdict(list)
        self.either: list[Block] = []  # transactions that were committed as a whole, or not at all
        self.committed: list[Block] = []
        # Prefetches that began before their block's end: whether statements were possible then.
        self.asked: dict[int, bool] = {}
        self.perhaps: set[int] = set()  # rows that were committed or not
        self.stopped: list[Block] = []  # their statements were refused, to roll a block back
        self.open: dict[int, list[Block]] = defaultdict(list)  # by transaction, innermost last

    def step(self, what: str, block: Block, value: Any, outcome: str) -> None:
        getattr(self, what)(block, value, outcome)

    def usable(self, block: Block, outcome: str) -> bool:
        """Whether the step took place; its outcome is checked if not."""
        if self.is_lost(block, outcome):
            assert outcome in ("lost", "stopped", "broken", "ended")
            block.poisoned = block.marked = True
        elif outcome == "stopped":
            block.poisoned = block.marked = True
            self.stopped.append(block)
        elif block.ended:
            # One that was refused while it waited to travel with others hears so a moment later,
            # when its block may have been rolled back.
            refused = (block.rolled_back or block.poisoned) and conf.get("MULTIPLEXING")
            assert outcome == "ended" or (refused and outcome == "broken")
        elif outcome == "ended":
            self.is_ended(block)
        elif block.poisoned and not (block.marked and outcome != "broken"):
            assert outcome == "broken"
        elif outcome == "broken":
            block.poisoned = block.marked = True
            self.stopped.append(block)
        else:
            # Statements that travel together have their answers a moment after the lock is free,
            # when a nested block may have begun: the rows will tell whether one is part of that.
            together = conf.get("MULTIPLEXING")
            stack = self.open[block.root.number]
            assert block in stack[0 if together else -1 :], "slipped into another block"
            return True
        return False

    def is_lost(self, block: Block, outcome: str) -> bool:
        """Whether the connection of a block is lost; who is told so shows it."""
        root = block.root
        if outcome == "lost":
            assert root.killing or root.lost
            root.lost = True
        return root.lost

    def is_ended(self, block: Block) -> None:
        """A block whose end is told before it is left has lost its connection."""
        if not block.leaving:
            assert block.root.killing
            self.stopped.append(block)

    def enter(self, block: Block, value: Any, outcome: str) -> None:
        parent = block.parent
        if self.is_lost(block, outcome) and outcome != "ok":
            assert outcome in ("lost", "stopped", "broken", "ended")
            block.ended = True
            return
        if outcome == "stopped":
            assert parent is not None
            self.stopped.append(parent)
            block.ended = True
            return
        if parent is not None and (parent.ended or outcome == "ended"):
            assert outcome == "ended"
            self.is_ended(parent)
            block.ended = True
            return
        assert outcome == "ok"
        stack = self.open[block.root.number]
        assert (stack[-1] if stack else None) is parent
        if parent is not None:
            block.poisoned = parent.poisoned
            block.real = block.savepoint and not parent.poisoned
            block.marked = parent.marked
        stack.append(block)

    def add(self, block: Block, value: Any, outcome: str) -> None:
        if self.usable(block, outcome):
            assert outcome == "ok"
            block.rows.append(value)

    def look(self, block: Block, value: Any, outcome: str) -> None:
        if self.usable(block, outcome):
            assert outcome == "ok"
            stack = self.open[block.root.number]
            expected = sum(len(each.rows) for each in stack)
            if stack[-1] is block and value > expected:
                # The server has executed a statement whose task was cancelled before its answer.
                assert block.leaving
                self.stopped.append(block)
            else:
                assert stack[-1] is not block or value == expected

    def alter(self, block: Block, value: Any, outcome: str) -> None:
        if self.usable(block, outcome):
            assert outcome == "ok"

    def large(self, block: Block, value: Any, outcome: str) -> None:
        if self.usable(block, outcome):
            assert (value, outcome) == (LARGE, "ok")

    def apart(self, block: Block, value: Any, outcome: str) -> None:
        assert (value, outcome) == ((MOMENT, timedelta(days=30, hours=2), True), "ok")

    def leave(self, block: Block, value: Any, outcome: str) -> None:
        if self.usable(block, outcome):
            assert (value, outcome) == (0, "ok")

    def apart_left(self, block: Block, value: Any, outcome: str) -> None:
        assert (value, outcome) == (0, "ok")

    def asking(self, block: Block, value: Any, outcome: str) -> None:
        if not block.ended:
            usable = block.marked or not block.poisoned
            self.asked[value] = usable and not block.root.lost

    def prefetch(self, block: Block, value: Any, outcome: str) -> None:
        # Several statements of several tasks, written down when all are done. Its block, in which
        # it began, may have been left since one of them was refused.
        if outcome == "ok":
            number, found = value
            assert self.asked[number]
            assert found == (2, 3, True)
        elif outcome == "broken" and block.ended:
            assert value in self.asked
            assert block.poisoned or block.root.lost
        else:
            assert not self.usable(block, outcome)

    def apart_prefetch(self, block: Block, value: Any, outcome: str) -> None:
        assert (value, outcome) == ((2, 3), "ok")

    def killing(self, block: Block, value: Any, outcome: str) -> None:
        block.root.killing += 1

    def kill(self, block: Block, value: Any, outcome: str) -> None:
        assert not self.usable(block, outcome)
        if outcome in ("broken", "ended"):  # it was not even sent
            block.root.killing -= 1

    def apart_killed(self, block: Block, value: Any, outcome: str) -> None:
        assert (value, outcome) == (("lost", 0), "ok")

    def violate(self, block: Block, value: Any, outcome: str) -> None:
        if self.usable(block, outcome):
            assert outcome == "integrity"
            block.poisoned = True

    def stream(self, block: Block, value: Any, outcome: str) -> None:
        # Written down when it has been closed, which may be after the end of its block.
        if not (block.ended and block.poisoned and outcome in ("broken", "stopped")):
            self.look(block, value, outcome)

    def detached(self, block: Block, value: Any, outcome: str) -> None:
        if outcome == "cancelled":
            self.perhaps.add(value)
        else:
            assert outcome == "ok"
            self.rows.append(value)

    def rollback(self, block: Block, value: Any, outcome: str) -> None:
        if block.ended or outcome == "ended":
            assert outcome == "ended"
            assert block.leaving
        else:
            assert outcome == "ok"
            block.poisoned = block.marked = True

    def hook(self, block: Block, value: Any, outcome: str) -> None:
        if block.ended or outcome == "ended":
            assert outcome == "ended"
            assert block.leaving
        else:
            assert outcome == "ok"
            block.hooks.append(value)

    def leaving(self, block: Block, value: Any, outcome: str) -> None:
        block.leaving = True

    def exit(self, block: Block, well: bool, outcome: str) -> None:
        root = block.root
        if self.is_lost(block, outcome) or (root.killing and outcome == "stopped"):
            # Who caught the error inside is told now, at the latest.
            assert not (well and block is root and outcome == "ok")
            if outcome in ("lost", "stopped"):
                self.stopped.append(block)
                outcome, well = "rolled back", False
        assert outcome in ("ok", "cancelled", "rolled back", "broken")
        assert self.open[block.root.number].pop() is block
        block.ended = True
        parent = block.parent
        if outcome == "rolled back" or not well:
            block.rolled_back = block.poisoned = True
        if outcome == "broken":
            assert well
            # After an error of another task's statement Django is silent, unless that statement was
            # sent with others and the server's state is known before the task has its answer.
            if not (block.poisoned and conf.get("MULTIPLEXING")):
                self.stopped.append(block)
            block.poisoned = True
        kept = well and not block.poisoned and not (root.lost and block is root)
        if kept or not block.real:
            if parent is None and outcome == "cancelled":
                self.either.append(block)
            elif parent is None:
                self.committed.append(block)
                self.rows += block.rows
                self.called[block.number] += block.hooks
            else:
                parent.rows += block.rows
                parent.hooks += block.hooks
        if not kept and not block.real:
            assert parent is not None
            parent.poisoned = True
            parent.rolled_back |= block.rolled_back

    def end(self) -> None:
        """Statements are stopped only when a block around them is rolled back, or lost."""
        assert not any(block.lost for block in self.committed)
        for block in self.stopped:
            if block.root.lost or block.root.killing:
                continue
            around: Block | None = block
            while around is not None and not around.rolled_back:
                around = around.parent
            assert around is not None


# The comparison


@pytest.fixture(scope="module")
def runner(django_db_setup: Any, django_db_blocker: Any) -> Iterator[asyncio.Runner]:
    # As few connections as the transactions at once and one more: detached statements share it.
    pool = connection.settings_dict["OPTIONS"]["pool"]
    before = dict(pool)
    pool |= {"max_size": 4, "max_lifetime": 0.3}
    with django_db_blocker.unblock(), asyncio.Runner() as runner:
        executed("CREATE ROLE asyncorm_model")
        executed("GRANT ALL ON ALL TABLES IN SCHEMA public TO asyncorm_model")
        executed("GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO asyncorm_model")
        executed(
            "CREATE FUNCTION asyncorm_model_kill() RETURNS boolean SECURITY DEFINER"
            " RETURN pg_terminate_backend(pg_backend_pid())"
        )
        yield runner
    pool.clear()
    pool.update(before)
    with django_db_blocker.unblock(), connection.cursor() as cursor:
        cursor.execute("TRUNCATE myapp_item")
        cursor.execute("DROP FUNCTION asyncorm_model_kill")
        cursor.execute("DROP OWNED BY asyncorm_model")
        cursor.execute("DROP ROLE asyncorm_model")
    connection.close()


@pytest.fixture(autouse=True)
def unblocked(django_db_blocker: Any) -> Iterator[None]:
    with django_db_blocker.unblock():
        yield


@pytest.fixture
def group(unblocked: None) -> Iterator[None]:
    """What the programs prefetch."""
    group = Group.objects.create(name="model")
    users = [User.objects.create(username=f"model {n}") for n in range(2)]
    group.user_set.set(users)
    group.permissions.set(Permission.objects.order_by("pk")[:3])
    yield
    for each in (group, *users):
        each.delete()


async def compare(roots: list[Child]) -> None:
    async with asyncorm.cursor() as cursor:
        await cursor.execute("TRUNCATE myapp_item")
    await Item.objects.native_create(remote_id=TAKEN, name="taken")
    run, model = Run(), Model()
    async with asyncio.timeout(PATIENCE):
        await run.program(roots)
    try:
        await check(run, model)
    except AssertionError as exc:
        for what, block, value, outcome in run.log:
            why = f"{outcome.exc!r} {outcome.exc.__cause__!r}" if isinstance(outcome, Lost) else ""
            exc.add_note(f"{what} {value} in block {block.number}: {outcome} {why}")
        raise
    await all_given_back()


async def check(run: Run, model: Model) -> None:
    for step in run.log:
        model.step(*step)
    model.end()
    rows = await Item.objects.exclude(remote_id=TAKEN).values_list("remote_id", flat=True).anative()
    called: dict[int, list[int]] = defaultdict(list)
    for root, number in run.called:
        called[root].append(number)
    for block in model.either:
        if not block.lost and (set(block.rows) & set(rows) or called[block.number]):
            model.rows += block.rows
            model.called[block.number] += block.hooks
    assert sorted(set(rows) - model.perhaps) == sorted(model.rows)
    called = {root: numbers for root, numbers in called.items() if numbers}
    # In the order in which they were registered, whichever of the blocks ended first.
    registered = [step[2] for step in run.log if step[0] == "hook"]
    for numbers in model.called.values():
        numbers.sort(key=registered.index)
    assert called == {root: numbers for root, numbers in model.called.items() if numbers}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("multiplexing", [True, False])
def test_random_programs_do_what_the_model_says(runner: asyncio.Runner, multiplexing: bool) -> None:
    tally: dict[str, int] = defaultdict(int)
    profile = settings.get_profile(PROFILE)

    @seed(SEED)
    @settings(profile, max_examples=profile.max_examples // (1 if multiplexing else 3))
    @given(programs)
    def examples(roots: list[Child]) -> None:
        tally["programs"] += 1
        if tally["programs"] % 500 == 0:
            print(f"{tally['programs']} programs", flush=True)
        runner.run(compare(roots))

    print(f"profile {PROFILE}, seed {SEED}, MULTIPLEXING {multiplexing}")
    with override_settings(ASYNCORM={"MULTIPLEXING": multiplexing}):
        examples()
    print(f"{tally['programs']} programs did what the model says")
