"""Transactions that begin and end without an operation: what they leave and raise is Django's."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from django.db import DatabaseError, connection, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.test.utils import CaptureQueriesContext

import asyncorm
from asyncorm import _events, bridge, written
from asyncorm._transactions import at_once
from tests.support import administrator

_KEPT = (
    "in_atomic_block", "needs_rollback", "rollback_exc", "closed_in_transaction", "autocommit",
    "errors_occurred", "run_commit_hooks_on_set_autocommit_on",
)  # fmt: skip


@pytest.fixture(autouse=True)
def tables(django_db_setup: Any, django_db_blocker: Any) -> Iterator[None]:
    with administrator() as ask, django_db_blocker.unblock():
        ask("CREATE TABLE late (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        # Other tests' errors: Django keeps the last one for good.
        connection.rollback_exc, connection.errors_occurred = None, False  # type: ignore[attr-defined]
        yield
        connection.close()
        ask("DROP TABLE late")


def state() -> dict[str, Any]:
    """What Django keeps of a transaction, and psycopg."""
    wrapper: Any = transaction.get_connection()
    wrapper.ensure_connection()
    kept = {name: getattr(wrapper, name) for name in _KEPT}
    kept["commit_on_exit"] = wrapper.commit_on_exit or not wrapper.in_atomic_block
    kept["savepoints"] = [sid is not None for sid in wrapper.savepoint_ids]
    kept["callbacks"] = len(wrapper.run_on_commit)
    kept["blocks"] = [
        (type(b), b.savepoint, b.durable, b._from_testcase) for b in wrapper.atomic_blocks
    ]
    conn = wrapper.connection
    kept["psycopg"] = conn.autocommit, conn.pgconn.transaction_status
    return kept


def insert(*numbers: int) -> None:
    with connection.cursor() as cursor:
        for number in numbers:
            cursor.execute("INSERT INTO late VALUES (%s)", [number])


Does = Callable[..., Coroutine[Any, Any, Any]]  # calls a function where the ORM may be used


async def well(atomic: Any, do: Does) -> None:
    async with atomic():
        await do(insert, 1)


async def nothing(atomic: Any, do: Does) -> None:
    async with atomic():
        pass


async def twice(atomic: Any, do: Does) -> None:
    for number in range(2):
        async with atomic(durable=True):
            await do(insert, number)


async def raising(atomic: Any, do: Does) -> None:
    async with atomic():
        await do(insert, 1)
        raise ZeroDivisionError("inside")


async def raising_before(atomic: Any, do: Does) -> None:
    async with atomic():
        raise ZeroDivisionError("inside")


async def failing_at_commit(atomic: Any, do: Does) -> None:
    async with atomic():
        await do(insert, 1, 1)


async def savepoints(atomic: Any, do: Does) -> None:
    async with atomic():
        await do(insert, 1)
        async with atomic():
            await do(insert, 2)
        with contextlib.suppress(ZeroDivisionError):
            async with atomic():
                await do(insert, 3)
                raise ZeroDivisionError
        async with atomic(savepoint=False):
            await do(insert, 4)


async def without_savepoint(atomic: Any, do: Does) -> None:
    async with atomic():
        await do(insert, 1)
        with contextlib.suppress(ZeroDivisionError):
            async with atomic(savepoint=False):
                raise ZeroDivisionError
        await do(insert, 2)


async def durable_inside(atomic: Any, do: Does) -> None:
    async with atomic():
        await do(insert, 1)
        async with atomic(durable=True):
            await do(insert, 2)


async def set_rollback(atomic: Any, do: Does) -> None:
    async with atomic():
        await do(insert, 1)
        await do(transaction.set_rollback, True)


async def callbacks(atomic: Any, do: Does) -> None:
    async with atomic():
        await do(transaction.on_commit, lambda: insert(5))
        await do(insert, 1)
        with contextlib.suppress(ZeroDivisionError):
            async with atomic():
                await do(transaction.on_commit, lambda: insert(6))
                raise ZeroDivisionError


async def forbidden(atomic: Any, do: Does) -> None:
    async with atomic():
        await do(insert, 1)
        await do(transaction.commit)


PROGRAMS = [
    well, nothing, twice, raising, raising_before, failing_at_commit, savepoints,
    without_savepoint, durable_inside, set_rollback, callbacks, forbidden,
]  # fmt: skip


class Blocks:
    """Blocks that note the state when they are entered, and when they are left."""

    def __init__(self, atomic: Any, do: Does) -> None:
        self.seen: list[Any] = []
        self._atomic, self._do = atomic, do

    @contextlib.asynccontextmanager
    async def __call__(self, **options: Any) -> Any:
        try:
            async with self._atomic(**options):
                self.seen.append(await self._do(state))
                try:
                    yield
                finally:
                    self.seen.append(await self._do(state))
        except Exception as exc:
            self.seen += [type(exc), str(exc), type(exc.__cause__)]
            raise
        finally:
            self.seen.append(await self._do(state))

    async def of(self, program: Any) -> list[Any]:
        """What is seen of a program, and the rows that it leaves."""
        with contextlib.suppress(ZeroDivisionError, RuntimeError, DatabaseError):
            await program(self, self._do)
        self.seen.append(await self._do(rows))
        return self.seen


def rows() -> list[Any]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT n FROM late ORDER BY n")
        found = cursor.fetchall()
        cursor.execute("DELETE FROM late")
        return list(found)


class _Djangos:
    def __init__(self, **options: Any) -> None:
        self._atomic = transaction.atomic(**options)

    async def __aenter__(self) -> None:
        self._atomic.__enter__()

    async def __aexit__(self, *exc: Any) -> None:
        self._atomic.__exit__(*exc)


async def _now(function: Any, *args: Any) -> Any:
    return function(*args)


async def _natively(function: Any, *args: Any) -> Any:
    return await asyncorm.native(function)(*args)


def as_django(program: Any) -> list[Any]:
    """What is seen of a program in synchronous code, which never suspends."""
    try:
        Blocks(_Djangos, _now).of(program).send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    raise AssertionError("it waits")


def native(program: Any) -> list[Any]:
    async def run() -> list[Any]:
        await _natively(rows)  # there is a connection then
        return await Blocks(asyncorm.atomic, _natively).of(program)

    return asyncio.run(run())


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each function of a block was run as an operation."""
    counted: Counter[str] = Counter()
    run = bridge.run

    def counting(func: Any, *args: Any, **kwargs: Any) -> Any:
        counted[func.__name__] += func.__name__ in ("_enter", "lead")
        return run(func, *args, **kwargs)

    monkeypatch.setattr(bridge, "run", counting)
    return counted


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_what_is_seen_is_what_django_has(
    program: Any, monkeypatch: pytest.MonkeyPatch, operations: Counter[str]
) -> None:
    expected = as_django(program)
    assert native(program) == expected
    fewest = operations.total()
    monkeypatch.setattr(at_once, "_is_plain", lambda wrapper: False)
    operations.clear()
    assert native(program) == expected
    assert operations.total() > fewest


@pytest.mark.parametrize("program", [well, savepoints, failing_at_commit], ids=str)
def test_what_is_logged_is_what_django_logs(program: Any) -> None:
    """With DEBUG, BEGIN and COMMIT are queries."""

    def said(captured: CaptureQueriesContext) -> list[str]:
        return [query["sql"].split()[0] for query in captured.captured_queries]

    with CaptureQueriesContext(connection) as expected:
        as_django(program)

    async def captured() -> list[str]:
        with CaptureQueriesContext(connection) as found:
            await Blocks(asyncorm.atomic, _natively).of(program)
        return said(found)

    assert asyncio.run(captured()) == said(expected)


def _patched(monkeypatch: pytest.MonkeyPatch, name: str, called: list[str]) -> None:
    method = getattr(BaseDatabaseWrapper, name)

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return method(self, *args, **kwargs)

    monkeypatch.setattr(BaseDatabaseWrapper, name, patched)


@pytest.mark.parametrize("name", ["set_autocommit", "commit", "_commit", "ensure_connection"])
def test_who_replaces_a_method_of_djangos_is_called(
    name: str, monkeypatch: pytest.MonkeyPatch, operations: Counter[str]
) -> None:
    called: list[str] = []
    monkeypatch.setattr(written, "listeners", [])  # ReplicaRouter's, of the tests before

    async def program() -> None:
        for patched in False, True, False:
            await well(asyncorm.atomic, _natively)
            await _natively(rows)
            operations.clear()
            with monkeypatch.context() as patching:
                if patched:
                    _patched(patching, name, called)
                await nothing(asyncorm.atomic, _natively)
            assert (bool(called), bool(operations.total())) == (patched, patched)
            called.clear()

    asyncio.run(program())


@pytest.mark.parametrize("program", [well, raising, failing_at_commit, savepoints, callbacks])
def test_listeners_are_told_the_same(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def told() -> list[Any]:
        listener = _Told()
        _events.listen(listener)
        try:
            native(program)
        finally:
            _events.unlisten(listener)
        return listener.told

    expected = told()
    assert "COMMIT" in str(expected) or program is raising
    monkeypatch.setattr(at_once, "_is_plain", lambda wrapper: False)
    assert told() == expected


class _Told(_events.Listener):
    def __init__(self) -> None:
        self.told: list[Any] = []

    def command_begun(self, command: _events.Command) -> None:
        self.told.append((command.text, command.in_block))

    def command_ended(self, command: _events.Command) -> None:
        self.told.append(command.text)

    def checked_out(self, checkout: _events.CheckOut) -> None:
        self.told.append(str(checkout.holder))

    def checked_in(self, checkout: _events.CheckOut) -> None:
        self.told.append("given back")

    def block_begun(self, block: _events.Block) -> None:
        self.told.append((block.origin, block.outermost))

    def block_ended(self, block: _events.Block) -> None:
        self.told.append(block.rolled_back)
