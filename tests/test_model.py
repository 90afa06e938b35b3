"""Random trees of tasks and blocks on the real server, compared with a sequential model.

Hypothesis draws programs: concurrent transactions, each a tree of statements, failures, nested
blocks, child tasks, tasks that outlive their block, and cancellations. A program runs natively and
writes down each step when it is done. A statement holds its block's lock, so their order is that on
the server: the model goes through the list one by one and says what each step should have given.
"""

import asyncio
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
from django.db import IntegrityError, connection
from django.db.transaction import TransactionManagementError
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st

import asyncorm
from tests.project.myapp.models import Item
from tests.support import all_given_back

settings.register_profile(
    "model",
    max_examples=300,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
settings.register_profile("soak", settings.get_profile("model"), max_examples=10_000)
# `make soak` sets both; another seed is as good as this one.
PROFILE = os.environ.get("ASYNCORM_MODEL_PROFILE", "model")
SEED = int(os.environ.get("ASYNCORM_MODEL_SEED", "4"))

PATIENCE = 30.0  # seconds; reached only when a program hangs
TAKEN = 0  # the remote_id of a row that is always there
ids = count(1)


class Boom(Exception):
    """An error of the program's own."""


# Programs


@dataclass
class Do:
    """A step: add, look (count rows), violate (a constraint), boom, hook (on_commit)."""

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


@dataclass
class Children:
    """Child tasks; `escapes` says whether an error of one of them is raised again."""

    tasks: list["Child"]
    escapes: bool


@dataclass
class Child:
    body: list[Any]
    # Passes of the loop after which the task is cancelled. It then has a block of its own around
    # all it does, so that what a cancelled statement did is rolled back.
    cancel_after: int | None
    # It is awaited only after the end of the block that it was started in.
    outlives: bool = False


pauses = st.integers(0, 3)
leaf = st.builds(
    Do, st.sampled_from(["add", "add", "add", "look", "violate", "boom", "hook", "hook"]), pauses
)
cancels = st.none() | st.integers(0, 40)


def compound(inner: Any) -> Any:
    body = st.lists(inner, min_size=1, max_size=4)
    child = st.builds(Child, body, cancels, st.sampled_from([False, False, False, True]))
    return st.builds(
        Nested, body, st.booleans(), st.sampled_from([True, True, True, False])
    ) | st.builds(Children, st.lists(child, min_size=1, max_size=4), st.booleans())


step = st.recursive(leaf, lambda inner: leaf | compound(inner), max_leaves=12)
root = st.builds(Child, st.lists(step, min_size=1, max_size=5), cancels)
programs = st.lists(root, min_size=1, max_size=3)


# Running them


@dataclass
class Block:
    """What both the run and the model know of a block."""

    number: int
    parent: "Block | None"
    savepoint: bool = True
    # The model's part.
    rows: list[int] = field(default_factory=list)
    hooks: list[int] = field(default_factory=list)
    poisoned: bool = False
    real: bool = True  # has a savepoint of its own, or is the transaction
    leaving: bool = False
    ended: bool = False
    late: list[asyncio.Task[None]] = field(default_factory=list)  # tasks that outlive it

    @property
    def root(self) -> "Block":
        return self if self.parent is None else self.parent.root


class Run:
    """Runs one program and keeps the list of what happened."""

    def __init__(self) -> None:
        self.log: list[tuple[str, Block, Any, str]] = []
        self.called: list[tuple[int, int]] = []
        self.numbers = count(1)

    async def program(self, roots: list[Child]) -> None:
        await self.all(roots, None)

    async def all(self, children: list[Child], block: Block | None) -> list[Any]:
        tasks = [self.start(child, block) for child in children]
        return await asyncio.gather(*tasks, return_exceptions=True)

    def start(self, child: Child, block: Block | None) -> asyncio.Task[None]:
        task = asyncio.create_task(self.child(child, block))
        if child.cancel_after is not None:
            task_cancelling = asyncio.create_task(self.cancel(task, child.cancel_after))
            task.add_done_callback(lambda _: task_cancelling.cancel())
        return task

    async def cancel(self, task: asyncio.Task[None], after: int) -> None:
        for _ in range(after):
            await asyncio.sleep(0)
        task.cancel()

    async def child(self, child: Child, block: Block | None) -> None:
        if block is None or child.cancel_after is not None:
            await self.block(Nested(child.body, caught=False, savepoint=True), block)
        else:
            await self.steps(child.body, block)

    async def block(self, nested: Nested, parent: Block | None) -> None:
        block = Block(next(self.numbers), parent, nested.savepoint)
        atomic = asyncorm.atomic(savepoint=nested.savepoint)
        try:
            await atomic.__aenter__()
        except BaseException as exc:
            if not isinstance(exc, asyncio.CancelledError):
                self.log.append(("enter", block, None, self.name(exc)))
            raise
        self.log.append(("enter", block, None, "ok"))
        error: BaseException | None = None
        try:
            await self.steps(nested.body, block)
        except BaseException as exc:
            error = exc
        self.log.append(("leaving", block, None, "ok"))
        try:
            await atomic.__aexit__(type(error) if error else None, error, None)
        except asyncio.CancelledError as exc:
            # It came while the block was being left. A savepoint is left first. A transaction gives
            # up if it still waits for its tasks' statements, or commits first.
            self.log.append(("exit", block, error is None, "cancelled"))
            error = exc
        except BaseException as exc:
            self.log.append(("exit", block, error is None, self.name(exc)))
            raise
        else:
            self.log.append(("exit", block, error is None, "ok"))
        finally:
            while block.late:
                await asyncio.gather(block.late.pop(), return_exceptions=True)
        if error is not None and (not nested.caught or isinstance(error, asyncio.CancelledError)):
            raise error

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
                results = await self.all(now, block)
                errors = [r for r in results if isinstance(r, Exception)]
                if errors and step.escapes:
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
        value: Any = number
        try:
            if what == "look":
                value = await Item.objects.filter(name=f"{root}").native_count()
            else:
                remote_id = number if what == "add" else TAKEN
                await Item.objects.native_create(remote_id=remote_id, name=f"{root}")
        except Exception as exc:
            self.log.append((what, block, value, self.name(exc)))
        else:
            self.log.append((what, block, value, "ok"))

    @staticmethod
    def name(exc: BaseException) -> str:
        if isinstance(exc, IntegrityError):
            return "integrity"
        if isinstance(exc, TransactionManagementError):
            return "ended" if "has ended" in str(exc) else "broken"
        return repr(exc)


# The model


class Model:
    """What one task alone on the server would have seen, step by step."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.called: dict[int, list[int]] = defaultdict(list)
        self.either: list[Block] = []  # transactions that were committed as a whole, or not at all
        self.open: dict[int, list[Block]] = defaultdict(list)  # by transaction, innermost last

    def step(self, what: str, block: Block, value: Any, outcome: str) -> None:
        getattr(self, what)(block, value, outcome)

    def usable(self, block: Block, outcome: str) -> bool:
        """Whether the step took place; its outcome is checked if not."""
        if block.ended:
            assert outcome == "ended"
        elif outcome == "ended":
            assert block.leaving
        elif block.poisoned:
            assert outcome == "broken"
        else:
            assert self.open[block.root.number][-1] is block, "slipped into another block"
            return True
        return False

    def enter(self, block: Block, value: Any, outcome: str) -> None:
        parent = block.parent
        if parent is not None and (parent.ended or outcome == "ended"):
            assert outcome == "ended"
            assert parent.leaving
            block.ended = True
            return
        assert outcome == "ok"
        stack = self.open[block.root.number]
        assert (stack[-1] if stack else None) is parent
        if parent is not None:
            block.poisoned = parent.poisoned
            block.real = block.savepoint and not parent.poisoned
        stack.append(block)

    def add(self, block: Block, value: Any, outcome: str) -> None:
        if self.usable(block, outcome):
            assert outcome == "ok"
            block.rows.append(value)

    def look(self, block: Block, value: Any, outcome: str) -> None:
        if self.usable(block, outcome):
            assert outcome == "ok"
            assert value == sum(len(each.rows) for each in self.open[block.root.number])

    def violate(self, block: Block, value: Any, outcome: str) -> None:
        if self.usable(block, outcome):
            assert outcome == "integrity"
            block.poisoned = True

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
        assert outcome in ("ok", "cancelled")
        assert self.open[block.root.number].pop() is block
        block.ended = True
        parent = block.parent
        kept = well and not block.poisoned
        if kept or not block.real:
            if parent is None and outcome == "cancelled":
                self.either.append(block)
            elif parent is None:
                self.rows += block.rows
                self.called[block.number] += block.hooks
            else:
                parent.rows += block.rows
                parent.hooks += block.hooks
        if not kept and not block.real:
            assert parent is not None
            parent.poisoned = True


# The comparison


@pytest.fixture(scope="module")
def runner(django_db_setup: Any, django_db_blocker: Any) -> Iterator[asyncio.Runner]:
    with django_db_blocker.unblock(), asyncio.Runner() as runner:
        yield runner
    with django_db_blocker.unblock(), connection.cursor() as cursor:
        cursor.execute("TRUNCATE myapp_item")
    connection.close()


@pytest.fixture(autouse=True)
def unblocked(django_db_blocker: Any) -> Iterator[None]:
    with django_db_blocker.unblock():
        yield


async def compare(roots: list[Child]) -> None:
    async with asyncorm.cursor() as cursor:
        await cursor.execute("TRUNCATE myapp_item")
    await Item.objects.native_create(remote_id=TAKEN, name="taken")
    run, model = Run(), Model()
    async with asyncio.timeout(PATIENCE):
        await run.program(roots)
    for number, step in enumerate(run.log):
        note(f"{number}: {step[0]} {step[2]} in block {step[1].number}: {step[3]}")
        model.step(*step)
    rows = await Item.objects.exclude(remote_id=TAKEN).values_list("remote_id", flat=True).anative()
    called: dict[int, list[int]] = defaultdict(list)
    for root, number in run.called:
        called[root].append(number)
    for block in model.either:
        if set(block.rows) & set(rows) or called[block.number]:
            model.rows += block.rows
            model.called[block.number] += block.hooks
    assert sorted(rows) == sorted(model.rows)
    called = {root: numbers for root, numbers in called.items() if numbers}
    # In the order in which they were registered, whichever of the blocks ended first.
    registered = [step[2] for step in run.log if step[0] == "hook"]
    for numbers in model.called.values():
        numbers.sort(key=registered.index)
    assert called == {root: numbers for root, numbers in model.called.items() if numbers}
    await all_given_back()


def test_random_programs_do_what_the_model_says(runner: asyncio.Runner) -> None:
    tally: dict[str, int] = defaultdict(int)

    @seed(SEED)
    @settings(settings.get_profile(PROFILE))
    @given(programs)
    def examples(roots: list[Child]) -> None:
        tally["programs"] += 1
        runner.run(compare(roots))

    print(f"profile {PROFILE}, seed {SEED}")
    examples()
    print(f"{tally['programs']} programs did what the model says")
