"""What became of a COMMIT or a statement whose answer was lost: CommitUnknown, settle, RETRY_READS.

The connections are lost for real: the server ends the session, or a proxy forwards what is sent to
the server and swallows the answer.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from itertools import count
from typing import Any

import pytest
from django.db import DatabaseError, IntegrityError, OperationalError, connections, transaction
from django.db.models import F, Func, IntegerField, Max
from django.db.models.functions import Length, Now, Random

import asyncorm
from asyncorm import fate
from asyncorm.demo.postgres import Server, postgres_server
from tests.pool.test_standby import ask, reach, replicated
from tests.project.myapp.models import Item
from tests.support import database, eventually, free_port

ids = count(1)
ALIAS = "lossy"
TABLE = (
    "CREATE TABLE myapp_item (id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,"
    " remote_id integer UNIQUE DEFERRABLE INITIALLY DEFERRED, name varchar(50))"
)
LINGER = """
    CREATE OR REPLACE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS
        $$BEGIN IF NEW.name <> 'fast' THEN PERFORM pg_sleep(30); END IF; RETURN NULL; END$$;
    CREATE CONSTRAINT TRIGGER linger AFTER INSERT ON myapp_item
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION linger();
"""
SLEEPING = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep'"


class Proxy:
    """Forwards to a server; once what is sent has a certain text, answers go nowhere any more.

    Attributes:
        lose: the text; None once it was seen.
        old: None, or on which connections it is looked for again and again.
        early: also the answers that were under way when the text came.
        sent: what was forwarded, in the pieces in which it came.
        hold: seconds between the text and the end of the connection.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.port = free_port()
        self.lose: bytes | None = None
        self.old: set[Any] | None = None
        self.early = False
        self.hold = 0.0
        self.sent: list[bytes] = []
        self.lost = 0
        self._serving: set[Any] = set()

    def lose_each(self, text: bytes) -> None:
        """Each connection that is open now ends with such a text; later ones do not."""
        self.lose, self.old = text, set(self._serving)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._serving.add(asyncio.current_task())
        try:
            await self._forward(reader, writer)
        finally:
            writer.close()

    def _is_meant(self) -> bool:
        if self.old is not None:
            return asyncio.current_task() in self.old
        self.lose = None
        return True

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self.server.settings["HOST"], int(self.server.settings["PORT"])
        behind, before = await asyncio.open_connection(host, port)
        losing = asyncio.Event()
        tail = b""

        async def back() -> None:
            with suppress(ConnectionError):  # to a session that has ended something was sent
                while data := await behind.read(65536):
                    if losing.is_set():
                        if tail:  # what was answered before it comes through
                            writer.write(data.partition(tail)[0])
                            await writer.drain()
                        return
                    writer.write(data)
            writer.close()  # the server has ended the session

        answers = asyncio.create_task(back())
        try:
            while data := await reader.read(65536):
                self.sent.append(data)
                if self.lose is not None and self.lose in data and self._is_meant():
                    self.lost += 1
                    if b"COMMIT" in data and not self.early:
                        tail = b"C\x00\x00\x00\x0bCOMMIT"
                    losing.set()
                    before.write(data)
                    await answers  # it was carried out
                    await asyncio.sleep(self.hold)
                    return
                before.write(data)
        finally:
            answers.cancel()
            before.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Proxy"]:
        """Listen, and be the server of the alias."""
        async with await asyncio.start_server(self._serve, "127.0.0.1", self.port):
            yield self
            await asyncorm.close_pools(ALIAS)
            await asyncio.sleep(0.01)  # who has just been accepted is served
            for task in self._serving:
                task.cancel()
            await asyncio.gather(*self._serving, return_exceptions=True)
            await asyncio.sleep(0.01)  # their transports end in the loop's next turns


@pytest.fixture(scope="module")
def server(django_db_setup: Any) -> Iterator[Server]:
    with postgres_server(own=True, tcp=True) as server:
        ask(server, TABLE, password=server.settings["PASSWORD"])
        yield server


@pytest.fixture
def query(server: Server) -> Callable[..., Any]:
    """Asks the server, beside the proxy."""
    options = {"password": server.settings["PASSWORD"], "options": "-c lock_timeout=20s"}
    return lambda sql, *params: ask(server, sql, *params, **options)


@pytest.fixture
async def proxy(server: Server, query: Any, django_db_blocker: Any) -> AsyncIterator[Proxy]:
    """The alias, behind a proxy; no items."""
    proxy = Proxy(server)
    query("TRUNCATE myapp_item")
    options = {
        "options": None,
        "pool": {"min_size": 0, "max_size": 1},
        "sslmode": "disable",
        "gssencmode": "disable",
    }
    where = {**server.settings, "PORT": str(proxy.port), "OPTIONS": options}
    with django_db_blocker.unblock(), database(ALIAS, **where):
        async with proxy.running():
            yield proxy


def items() -> Any:
    return Item.objects.using(ALIAS)


async def add(**values: Any) -> Item:
    return await items().native_create(remote_id=next(ids), **values)


def rows(query: Any) -> int:
    return int(query("SELECT count(*) FROM myapp_item"))


@asynccontextmanager
async def killed(query: Any) -> AsyncIterator[None]:
    """COMMIT lasts inside until the server ends the session."""
    query(LINGER)

    async def kill() -> None:
        pid = None
        while pid is None:
            await asyncio.sleep(0.01)
            pid = query(SLEEPING)
        query("SELECT pg_terminate_backend(%s)", pid)

    killing = asyncio.create_task(kill())
    try:
        yield
        await killing
    finally:
        killing.cancel()
        query("DROP TRIGGER linger ON myapp_item")


# CommitUnknown


async def test_a_lost_commit_is_not_repeated(proxy: Proxy, query: Any) -> None:
    """`retrying(on=OperationalError)` would write it twice; whoever names the class may."""
    runs: list[int] = []

    async def pay() -> None:
        async with asyncorm.atomic(ALIAS):
            runs.append(1)
            await add()

    def natively() -> None:
        with transaction.atomic(using=ALIAS):
            runs.append(1)
            items().create(remote_id=next(ids))

    async def grouped() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(pay())

    async def chained() -> None:
        try:
            await pay()
        except OperationalError:
            raise LookupError  # noqa: B904

    everything = (OperationalError, LookupError, ExceptionGroup, DatabaseError)
    for work, error in (
        (pay, asyncorm.CommitUnknown),
        (asyncorm.native(natively), asyncorm.CommitUnknown),
        (grouped, ExceptionGroup),
        (chained, LookupError),
    ):
        runs.clear()
        query("TRUNCATE myapp_item")
        proxy.lose = b"COMMIT"

        async def call(work: Any = work) -> None:
            await work()

        with pytest.raises(error):
            await asyncorm.retrying(4, everything, backoff=0)(call)()
        assert (len(runs), rows(query)) == (1, 1)

    runs.clear()
    query("TRUNCATE myapp_item")
    proxy.lose = b"COMMIT"
    await asyncorm.retrying(on=asyncorm.CommitUnknown, backoff=0, using=ALIAS)(pay)()
    assert (len(runs), rows(query)) == (2, 2), "it was named"
    with pytest.raises(OperationalError, match="may or may not have been committed"):
        proxy.lose = b"COMMIT"
        await pay()


async def test_one_that_is_being_handled_is_of_no_concern(proxy: Proxy, query: Any) -> None:
    runs: list[int] = []

    @asyncorm.retrying(on=LookupError, backoff=0)
    async def other() -> None:
        runs.append(1)
        if len(runs) < 3:
            raise LookupError

    proxy.lose = b"COMMIT"
    try:
        async with asyncorm.atomic(ALIAS):
            await add()
    except asyncorm.CommitUnknown:
        await other()
    assert len(runs) == 3


async def test_a_deadline_during_commit(proxy: Proxy, query: Any) -> None:
    """It is told after COMMIT, and what was committed is not done again."""
    runs: list[int] = []

    def natively() -> None:
        with transaction.atomic(using=ALIAS):
            items().create(remote_id=next(ids))

    async def pay(settle: bool) -> None:
        async with asyncorm.atomic(ALIAS, settle=settle):
            await add()

    class Sent(list[bytes]):
        def append(self, data: bytes) -> None:
            if b"COMMIT" in data:
                deadline.reschedule(0)

    proxy.sent = Sent()
    for work in (lambda: pay(False), lambda: pay(True), asyncorm.native(natively)):
        runs.clear()
        query("TRUNCATE myapp_item")

        @asyncorm.retrying(on=(TimeoutError, OperationalError), backoff=0)
        async def call(work: Any = work) -> None:
            nonlocal deadline
            runs.append(1)
            async with asyncio.timeout(None) as deadline:
                await work()

        deadline = asyncio.timeout(None)
        with pytest.raises(TimeoutError):
            await call()
        assert (len(runs), rows(query)) == (1, 1)


async def test_contexts_that_go_round(django_db_setup: Any) -> None:
    """What is raised again while what it led to is handled is in its own context."""
    runs: list[int] = []

    @asyncorm.retrying(on=LookupError, backoff=0)
    async def failing() -> None:
        runs.append(1)
        one, other = LookupError(), ValueError()
        one.__context__, other.__context__ = other, one
        raise one

    with pytest.raises(LookupError):
        await failing()
    assert len(runs) == 3


async def test_a_transaction_that_was_not_committed_for_certain(proxy: Proxy, query: Any) -> None:
    """The connection was lost before COMMIT, or the server has said no."""
    with pytest.raises(OperationalError) as lost:
        async with asyncorm.atomic(ALIAS):
            await add()
            pid = await value("SELECT pg_backend_pid()")
            query("SELECT pg_terminate_backend(%s)", pid)
            await add()
    assert not isinstance(lost.value, asyncorm.CommitUnknown)
    with pytest.raises(IntegrityError):  # the constraint is deferred
        async with asyncorm.atomic(ALIAS, settle=True):
            await items().native_create(remote_id=0)
            await items().native_create(remote_id=0)
    assert rows(query) == 0


async def value(sql: str, *params: Any) -> Any:
    async with asyncorm.cursor(ALIAS) as cursor:
        await cursor.execute(sql, params or None)
        row = await cursor.fetchone()
        return None if row is None else row[0]


async def test_writes_outside_a_block(proxy: Proxy, query: Any) -> None:
    """What may write is in doubt, and not repeated; what only reads is no matter of doubt."""
    item = await add()

    async def many() -> None:
        async with asyncorm.cursor(ALIAS) as cursor:
            await cursor.executemany("INSERT INTO myapp_item (name) VALUES (%s)", [("a",), ("b",)])

    writes: list[tuple[bytes, Callable[[], Any]]] = [
        (b"INSERT", add),
        (b"UPDATE", item.native_save),
        (b"UPDATE", lambda: items().native_update(name="x")),
        (b"INSERT", lambda: value("INSERT INTO myapp_item (name) VALUES ('raw') RETURNING id")),
        (b"INSERT", many),
        (b"nextval", lambda: value("SELECT nextval('myapp_item_id_seq')")),
        (b"unheard", lambda: value("SELECT upper('unheard of'), query_to_xml('', true, true, '')")),
        (b"INSERT", lambda: asyncorm.batch(add, lambda: value("SELECT 1"), using=ALIAS)),
    ]
    for text, write in writes:
        proxy.lose, seen = text, len(proxy.sent)
        with pytest.raises(asyncorm.CommitUnknown):
            await write()
        assert proxy.lose is None
        assert sum(text in data for data in proxy.sent[seen:]) == 1, "once"
    proxy.lose, seen = b"set_config", len(proxy.sent)  # a new connection is set up: another one is
    await add()
    assert proxy.lose is None
    assert sum(b"INSERT" in data for data in proxy.sent[seen:]) == 1, "once"
    proxy.lose = b"myapp_item"
    with pytest.raises(OperationalError) as lost:
        await value("SELECT name FROM myapp_item")  # raw
    assert not isinstance(lost.value, asyncorm.CommitUnknown)


# Settling


@pytest.mark.parametrize("early", [False, True])
async def test_a_committed_one_is_settled(proxy: Proxy, query: Any, early: bool) -> None:
    """The block ends well, its callbacks run, and nothing is done twice."""
    called: list[str] = []
    runs: list[int] = []

    @asyncorm.retrying(attempts=4, on=OperationalError, backoff=0)
    @asyncorm.atomic(ALIAS, settle=True)
    async def pay() -> str:
        runs.append(1)
        asyncorm.on_commit(lambda: called.append("called"), ALIAS)
        await add(name="paid")
        return "paid"

    def natively() -> str:
        runs.append(1)
        with transaction.atomic(using=ALIAS):
            transaction.on_commit(lambda: called.append("called"), using=ALIAS)
            items().create(remote_id=next(ids), name="paid")
        return "paid"

    async def call() -> str:
        return await asyncorm.native(natively)()

    retried = asyncorm.retrying(on=OperationalError, settle=5, backoff=0)(call)
    proxy.early = early
    for work in (pay, retried):
        for n in range(3):
            runs.clear()
            called.clear()
            query("TRUNCATE myapp_item")
            proxy.lose = b"COMMIT"
            assert await work() == "paid", n
            assert proxy.lose is None
            assert (runs, called, rows(query)) == ([1], ["called"], 1)


async def test_each_way_of_writing_tells_the_id(proxy: Proxy, query: Any) -> None:
    """Together with the first statement that may write, or with COMMIT."""

    async def children() -> None:
        await asyncio.gather(*(add() for _ in range(3)))

    async def raw() -> None:
        async with asyncorm.cursor(ALIAS) as cursor:
            await cursor.execute("INSERT INTO myapp_item (name) VALUES (%s) RETURNING id", ["raw"])
            assert cursor.description is not None
            assert len(await cursor.fetchall()) == 1

    async def nested() -> None:
        async with asyncorm.atomic(ALIAS):
            await add()

    async def failing() -> None:
        with pytest.raises(DatabaseError):
            async with asyncorm.atomic(ALIAS):
                await value("INSERT INTO myapp_item (id) VALUES (1)")
        await add()

    async def reading() -> None:
        assert await items().native_count() == 0
        async with asyncorm.cursor(ALIAS) as cursor:
            await cursor.executemany("INSERT INTO myapp_item (name) VALUES (%s)", [("a",), ("b",)])

    writes = (
        add, children, raw, nested, failing, reading,
        lambda: items().native_bulk_create([Item(remote_id=next(ids)) for _ in range(5000)]),
        lambda: items().native_bulk_create([Item(remote_id=next(ids))], method="copy"),
    )  # fmt: skip
    for write in writes:
        query("TRUNCATE myapp_item")
        proxy.lose = b"COMMIT"
        async with asyncorm.atomic(ALIAS, settle=True):
            await write()
        assert proxy.lose is None
        assert rows(query) > 0


async def test_it_costs_no_round_trip(proxy: Proxy) -> None:
    async def pay(settle: bool) -> list[bytes]:
        async with asyncorm.atomic(ALIAS, settle=settle):
            await items().filter(name="").native_count()
            await add()
            await add()
        return proxy.sent

    for settle in (False, True):
        await pay(settle)  # prepared once
    counts = []
    for settle in (False, True):
        proxy.sent.clear()
        counts.append(len(await pay(settle)))
    assert counts[0] == counts[1]


async def test_an_aborted_one_is_settled(proxy: Proxy, query: Any) -> None:
    """The session ends in the middle of COMMIT: it is run again, and is there once."""
    runs: list[int] = []

    @asyncorm.retrying(on=OperationalError, settle=True, backoff=0)
    @asyncorm.atomic(ALIAS)
    async def pay() -> None:
        runs.append(1)
        await add(name="slow" if len(runs) == 1 else "fast")

    query(LINGER)
    try:
        paying = asyncio.create_task(pay())
        pid = await eventually(lambda: query(SLEEPING))
        query("SELECT pg_terminate_backend(%s)", pid)
        await paying
        assert (len(runs), rows(query)) == (2, 1)
    finally:
        query("DROP TRIGGER IF EXISTS linger ON myapp_item")
    async with killed(query):
        with pytest.raises(OperationalError, match="was rolled back, as the server says") as error:
            async with asyncorm.atomic(ALIAS, settle=True):
                await add()
    assert not isinstance(error.value, asyncorm.CommitUnknown)
    async with killed(query):
        with pytest.raises(asyncorm.CommitUnknown):
            async with asyncorm.atomic(ALIAS):
                await add()


async def test_one_in_progress_is_asked_for_again(proxy: Proxy, query: Any) -> None:
    """COMMIT goes on after its connection was lost, for a while or beyond the deadline."""
    query(LINGER.replace("30", "0.7"))
    try:
        proxy.early = True
        for seconds in (10, 0.2):
            query("TRUNCATE myapp_item")
            committing = asyncio.create_task(pay_slowly(seconds))
            await eventually(lambda: query(SLEEPING))
            connections_of(proxy).terminate()
            if seconds == 10:
                await committing
                assert rows(query) == 1
            else:
                with pytest.raises(asyncorm.CommitUnknown):
                    await committing
                await eventually(lambda: rows(query) == 1)
    finally:
        query("DROP TRIGGER IF EXISTS linger ON myapp_item")


def connections_of(proxy: Proxy) -> Any:
    from asyncorm import pools

    pool = pools.find(ALIAS)
    assert pool is not None and pool.connections is not None
    (conn,) = [conn for conn in pool.connections.live if not conn.closed]
    return conn.twin


async def pay_slowly(seconds: float) -> None:
    async with asyncorm.atomic(ALIAS, settle=seconds):
        await add()


async def test_a_cancellation_while_settling(proxy: Proxy, query: Any) -> None:
    """It stays one, of asyncio's kind, whatever has happened to the transaction."""
    query(LINGER.replace("30", "2"))
    try:
        committing = asyncio.create_task(pay_slowly(30))
        await eventually(lambda: query(SLEEPING))
        connections_of(proxy).terminate()
        await eventually(lambda: any(b"pg_xact_status" in data for data in proxy.sent))
        committing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await committing
        committing = asyncio.create_task(pay_slowly(30))
        await eventually(lambda: query(SLEEPING))
        connections_of(proxy).terminate()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await committing
        await eventually(lambda: rows(query) == 2)
    finally:
        query("DROP TRIGGER IF EXISTS linger ON myapp_item")
    assert await items().native_count() == 2, "the alias goes on"


async def test_an_option_that_means_nothing() -> None:
    for settle in (0, -1, "yes"):
        with pytest.raises(ValueError, match="settle"):
            asyncorm.atomic(settle=settle)  # type: ignore[call-overload]
        with pytest.raises(ValueError, match="settle"):
            asyncorm.retrying(settle=settle)  # type: ignore[arg-type]
    assert fate.seconds(True) == fate.SETTLE_TIMEOUT


@contextmanager
def reached() -> Iterator[Server]:
    """A server that a test may end, reached without a proxy."""
    options = {"options": None, "pool": {"min_size": 0, "max_size": 2}}
    with (
        postgres_server(own=True) as own,
        database(ALIAS, **own.settings, OPTIONS=options),
    ):
        ask(own, TABLE)
        yield own


async def test_a_restarted_server_does_not_know(
    django_db_setup: Any, django_db_blocker: Any
) -> None:
    """The end of its log may be lost with the crash, and the id given to somebody else."""
    with django_db_blocker.unblock(), reached() as own:
        ask(own, LINGER)
        committing = asyncio.create_task(pay_slowly(10))
        await eventually(lambda: ask(own, SLEEPING))
        before = ask(own, f"SELECT {fate._SERVER}")
        await asyncio.to_thread(own.stop, "immediate")
        await asyncio.to_thread(own.start)
        with pytest.raises(asyncorm.CommitUnknown):
            await committing
        assert ask(own, f"SELECT {fate._SERVER}") != before
        ask(own, "DROP TRIGGER linger ON myapp_item")
        async with asyncio.timeout(10):
            await add()
        await asyncorm.close_pools(ALIAS)


async def test_a_crash_that_the_postmaster_survives(
    django_db_setup: Any, django_db_blocker: Any
) -> None:
    with django_db_blocker.unblock(), reached() as own:
        server = f"SELECT {fate._SERVER}"
        before, pid = ask(own, server), await value("SELECT pg_backend_pid()")
        assert ask(own, server) == before == await value(server)
        await asyncio.to_thread(kill_process, pid)

        async def after() -> Any:
            with suppress(Exception):
                return await asyncio.to_thread(ask, own, server)

        async with asyncio.timeout(20):
            while (found := await after()) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert found != before
        assert found.split()[:3] == before.split()[:3], "the same postmaster"
        await asyncorm.close_pools(ALIAS)


def kill_process(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


async def test_a_promoted_standby_does_not_know(
    django_db_setup: Any, django_db_blocker: Any
) -> None:
    """There, the id may be that of another transaction: here it is, and that one was committed."""
    with ExitStack() as stack:
        primary, standby = stack.enter_context(replicated())
        stack.enter_context(django_db_blocker.unblock())
        options = {
            "options": None,
            "target_session_attrs": "read-write",
            "pool": {"min_size": 0, "max_size": 2},
        }
        stack.enter_context(database(ALIAS, **reach(primary, standby), OPTIONS=options))
        ask(standby, "ALTER SYSTEM SET synchronous_standby_names = ''")
        ask(primary, "ALTER SYSTEM SET synchronous_standby_names = ''")
        ask(primary, "SELECT pg_reload_conf()")
        ask(primary, LINGER)
        assert await value("SELECT pg_is_in_recovery()") is False
        committing = asyncio.create_task(pay_slowly(30))
        await eventually(lambda: ask(primary, SLEEPING))
        taken = ask(
            primary,
            "SELECT max(backend_xid::text::bigint) FROM pg_stat_activity WHERE query = 'COMMIT'",
        )
        ask(standby, "SELECT pg_promote()")
        # Replay may not have seen the id of what was not committed: somebody else gets it.
        while int(ask(standby, "SELECT pg_current_xact_id()::text")) < taken:
            pass
        assert ask(standby, "SELECT pg_xact_status(%s::text::xid8)", taken) is not None
        await asyncio.to_thread(primary.stop, "immediate")
        with pytest.raises(asyncorm.CommitUnknown):
            await committing
        assert ask(standby, "SELECT count(*) FROM myapp_item") == 0
        await asyncorm.close_pools(ALIAS)


# RETRY_READS


def reads() -> list[Callable[[], Any]]:
    def kept() -> Any:
        return items().filter(name="kept")

    return [
        lambda: kept().native_get(),
        lambda: items().native_get(name="kept"),
        lambda: kept().anative(),
        lambda: kept().native_count(),
        lambda: kept().native_exists(),
        lambda: kept().native_first(),
        lambda: kept().native_aggregate(n=Max("remote_id")),
        lambda: kept().values_list(Length("name"), Now()).anative(),
        lambda: kept().annotate(n=F("remote_id") + 1).order_by("n").anative(),
        lambda: asyncorm.batch(kept(), kept().count, using=ALIAS),
        lambda: asyncorm.native(lambda: items().get(name="kept"))(),
    ]


async def test_reads_are_repeated(proxy: Proxy) -> None:
    await add(name="kept")
    for read in reads():
        proxy.lose = b"myapp_item"
        assert await read()
        assert proxy.lose is None


async def test_reads_that_somebody_watches(proxy: Proxy, settings: Any) -> None:
    await add(name="kept")
    settings.DEBUG = True
    proxy.lose = b"myapp_item"
    assert await items().native_get(name="kept")
    assert proxy.lose is None


async def test_reads_of_a_crowd(proxy: Proxy) -> None:
    """They travel together, and each is repeated."""
    await add(name="kept")
    proxy.lose = b"myapp_item"
    found = await asyncio.gather(*(items().native_get(name="kept") for _ in range(20)))
    assert proxy.lose is None
    assert len(found) == 20


class Mine(Func):
    function = "upper"
    output_field = IntegerField()


async def test_what_is_not_known_to_only_read_is_not_repeated(proxy: Proxy, settings: Any) -> None:
    await add(name="kept")
    item = items().filter(name="kept")
    once: list[Callable[[], Any]] = [
        lambda: value("SELECT name FROM myapp_item"),
        lambda: asyncorm.native(lambda: list(items().raw("SELECT id, name FROM myapp_item")))(),
        lambda: item.annotate(mine=Mine("name")).anative(),
        lambda: item.extra(select={"mine": "upper(name)"}).anative(),
        lambda: item.order_by("?").anative(),
        lambda: item.annotate(n=Random()).anative(),
    ]

    async def in_a_block(read: Any) -> None:
        async with asyncorm.atomic(ALIAS):
            await items().native_count()
            proxy.lose = b"myapp_item"
            await read()

    async def in_a_connection(read: Any) -> None:
        async with asyncorm.connection(ALIAS):
            await items().native_count()
            proxy.lose = b"myapp_item"
            await read()

    once += [
        lambda: in_a_block(lambda: items().native_get(name="kept")),
        lambda: in_a_block(lambda: item.select_for_update().anative()),
        lambda: in_a_connection(lambda: items().native_get(name="kept")),
    ]
    for read in once:
        proxy.lose, seen = b"myapp_item", proxy.lost
        with pytest.raises(OperationalError):
            await read()
        assert (proxy.lose, proxy.lost) == (None, seen + 1)
    settings.ASYNCORM = {"RETRY_READS": False}
    proxy.lose = b"myapp_item"
    with pytest.raises(OperationalError, match="before the server had answered"):
        await items().native_get(name="kept")


async def test_a_session_that_has_something_of_its_own(proxy: Proxy) -> None:
    """What the operation has set would be missed on another connection."""
    await add(name="kept")

    def work() -> Any:
        with connections[ALIAS].cursor() as cursor:
            cursor.execute("SET my.own = '1'")
        proxy.lose = b"myapp_item"
        return items().get(name="kept")

    def begun() -> Any:
        with connections[ALIAS].cursor() as cursor:
            cursor.execute("BEGIN")
        proxy.lose = b"myapp_item"
        return items().get(name="kept")

    for function in (work, begun):
        with pytest.raises(OperationalError):
            await asyncorm.native(function)()
        assert proxy.lose is None


async def test_twice_is_enough(proxy: Proxy, query: Any) -> None:
    """The second connection is lost as well: the error is told."""
    await add(name="kept")
    proxy.lose = b"myapp_item"
    proxy.hold = 0.2
    reading = asyncio.create_task(items().native_get(name="kept"))
    await eventually(lambda: proxy.lose is None)
    proxy.lose = b"myapp_item"
    with pytest.raises(OperationalError):
        await reading
    assert proxy.lost == 2


async def test_the_pools_other_connections_are_lost_as_well(proxy: Proxy) -> None:
    """As those of a server that has ended, which is found out by one after the other."""
    await add(name="kept")
    await asyncorm.close_pools(ALIAS)
    connections.settings[ALIAS]["OPTIONS"]["pool"]["max_size"] = most = 4
    barrier = asyncio.Barrier(most)

    async def use_one() -> None:
        async with asyncorm.connection(ALIAS):
            await items().native_count()
            await barrier.wait()

    for read in (items().native_get, asyncorm.native(lambda **kept: items().get(**kept))):
        proxy.lose = None
        await asyncio.gather(*(use_one() for _ in range(most)))
        seen = proxy.lost
        proxy.lose_each(b"myapp_item")
        assert await read(name="kept")
        assert proxy.lost > seen + 1


async def test_not_beyond_the_callers_deadline(proxy: Proxy) -> None:
    await add(name="kept")
    proxy.lose = b"myapp_item"
    proxy.hold = 0.5
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await items().native_get(name="kept")
    seen = len(proxy.sent)
    await asyncio.sleep(0.6)
    assert not any(b"SELECT" in data and b"kept" in data for data in proxy.sent[seen:])
