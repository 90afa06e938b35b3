"""Registers the names of Django, psycopg and psycopg_pool that asyncorm uses although they are not
documented, and verifies them before anything is replaced.

Each entry says where the names are, why they are used and what is lost without them. A name that
only an optional part needs switches that part off, with a warning of `manage.py check`; without any
other asyncorm refuses to start, naming the versions that it was tested with. Whoever uses another
private name puts it here; tests/bridge/test_internals.py takes each of them away in turn.
"""

from __future__ import annotations

import dis
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from types import CodeType
from typing import Any

from django.core.exceptions import ImproperlyConfigured

from .pages import see

# Optional parts: the key of the ASYNCORM setting that switches each of them off.
CACHE = "STATEMENT_CACHE"
PREFETCH = "PARALLEL_PREFETCH"
RECORDING = "RECORD_QUERYSETS"

# What each release was tested with; the same bounds stand in pyproject.toml.
TESTED = {"Django": ">=5.2,<6.2", "psycopg": ">=3.3.6,<3.4", "psycopg-pool": ">=3.3.2,<3.4"}


@dataclass(frozen=True)
class Names:
    """Names of one module or class.

    Attributes:
        owner: "module" or "module:Class". A class has a name if it or a base defines it, or if a
            method of theirs assigns it to an attribute.
        names: separated by spaces.
        why: what they are used for.
        part: the optional part that needs them; None: nothing works without.
    """

    owner: str
    names: str
    why: str
    part: str | None = None

    def full(self, name: str) -> str:
        """One of the names with its owner; the owner for an empty one."""
        owner = self.owner.replace(":", ".")
        return f"{owner}.{name}" if name else owner


PSYCOPG = (
    Names("psycopg:Connection", "wait lock", "every statement goes through these; replaced"),
    Names(
        "psycopg:Connection",
        "_exec_command",
        "sends BEGIN, COMMIT, ROLLBACK, FETCH and CLOSE; replaced while somebody listens",
    ),
    Names(
        "psycopg._connection_base:BaseConnection",
        "_adapters _autocommit _cancel_gen _closed _isolation_level _read_only _deferrable"
        " _begin_statement _pipeline _notice_handlers _notify_handlers",
        "what is set on a connection: ours is made around an open one, and given back as it was",
    ),
    Names(
        "psycopg._connection_base:BaseConnection",
        "_start_query _get_tx_start_command _commit_gen _prepared",
        "BEGIN where one is due, COMMIT, and psycopg's own book of prepared statements",
    ),
    Names("psycopg:Connection", "_try_cancel", "the end of a stream() that was left; replaced"),
    Names(
        "psycopg._connection_base:BaseConnection",
        "_check_intrans_gen",
        "a block that begins on a lost connection: an OperationalError that says so; replaced",
    ),
    Names(
        "psycopg._preparing:PrepareManager",
        "get key maybe_add_to_cache validate maintain_gen _names _to_flush",
        "that book: a statement without a cursor obeys prepare_threshold and prepared_max",
    ),
    Names("psycopg._preparing", "Prepare", "what it answers when a statement is due"),
    Names(
        "psycopg.generators",
        "execute send copy_from copy_to copy_end fetch_many",
        "send what libpq holds and read results, without blocking",
    ),
    Names(
        "psycopg._cursor_base:BaseCursor",
        "_conn _pgconn _adapters _tx _pos _query _query_cls _reset _set_results",
        "what Cursor.execute() does around sending, for statements that are sent with others",
    ),
    Names(
        "psycopg.adapt:AdaptersMap",
        "_own_loaders _own_dumpers _own_dumpers_by_oid",
        "whether a cursor has adapters of its own, or those of the connection that it gets",
    ),
    Names("psycopg.types:TypesRegistry", "_own_state", "the same of its types"),
    Names(
        "psycopg._cursor_base:BaseCursor",
        "_start_copy_gen",
        "psycopg's own Copy waits for each row and ends a failed COPY by a blocking request",
    ),
    Names("psycopg:ServerCursor", "_closed", "a stream that ended with its transaction"),
    Names("psycopg.errors", "_NO_TRACEBACK _WaitTimeout", "what psycopg's wait() raises"),
    Names("psycopg.waiting", "wait_conn_async WAIT_R WAIT_W READY_R READY_W", "drive generators"),
    Names("psycopg.adapt", "Transformer", "dumpers and loaders of a connection, without a cursor"),
)

PSYCOPG_POOL = (
    Names(
        "psycopg_pool.pool:ConnectionPool",
        "_check _configure",
        "callables that Django does not pass on to its synchronous pool",
    ),
    Names(
        "psycopg_pool.pool_async:AsyncConnectionPool",
        "_pool _nconns _nconns_min _min_size _waiting _check _reset _drained_at _stats _closed"
        " _REQUESTS_NUM _created_at _expire_at",
        "what getconn() and putconn() work on: a check-out without a task switch",
    ),
    Names(
        "psycopg_pool.pool_async:AsyncConnectionPool",
        "_connect",
        "sees each new connection, and why there is none",
    ),
    Names(
        "psycopg_pool.pool_async:AsyncConnectionPool",
        "_add_connection _add_to_pool _maybe_grow_pool _growing _lock",
        "growth that backs off while tasks wait; replaced",
    ),
    Names(
        "psycopg_pool.pool_async:AsyncConnectionPool",
        "_open _ensure_lock _start_workers _start_initial_tasks _signal_stop_worker _workers _tasks"
        " run_task schedule_task",
        "its maintenance, in tasks that live while there is some; replaced",
    ),
    Names(
        "psycopg_pool.pool_async:WaitingClient",
        "set fail error",
        "hand a connection to who waits; who has given up",
    ),
    Names(
        "psycopg_pool.pool_async",
        "AddConnection ReturnConnection ShrinkPool",
        "the pool's maintenance tasks",
    ),
)

_QUERYSET = "django.db.models.query"
DJANGO = (
    Names("django.db:connections", "_connections", "which wrapper an alias has in native code"),
    Names("django.utils.asyncio", "get_running_loop", "what async_unsafe asks; replaced"),
    Names("django.db.transaction:Atomic", "_from_testcase", "which block is a test's transaction"),
    Names(
        "django.core.handlers.base:BaseHandler",
        "get_response_async load_middleware",
        "the log of a request; the middleware of an AsyncClient",
    ),
    Names("django.core.handlers.base", "sync_to_async", "the log of a response; replaced"),
    Names(
        "django.db.backends.base.base:BaseDatabaseWrapper",
        "connect ensure_connection _commit on_commit run_and_clear_commit_hooks _prepare_cursor"
        " _cursor make_cursor needs_rollback rollback_exc run_on_commit execute_wrappers"
        " queries_log force_debug_cursor _thread_ident",
        "the native wrapper overrides these or shares them otherwise",
    ),
    Names(
        "django.db.backends.utils:CursorWrapper",
        "execute executemany _execute _execute_with_wrappers",
        "compared with Django's own: a tool that replaced one is to see each query",
    ),
    Names(
        "django.db.backends.postgresql.base:DatabaseWrapper",
        "pool _configure_connection _connection_pools ensure_timezone close_pool",
        "Django's pooled mode, in which native code works",
    ),
    Names(
        f"{_QUERYSET}:QuerySet",
        "_iterable_class _fields _known_related_objects _query _result_cache _fetch_all _for_write"
        " _prefetch_related_lookups _prefetch_related_objects _prefetch_done _sticky_filter"
        " _deferred_filter _defer_next_filter _hints _db _for_write _add_hints _update _insert"
        " _clone _chain",
        "what iteration, get() and prefetching depend on",
    ),
    Names(
        f"{_QUERYSET}:QuerySet",
        "_batched_insert _prepare_for_bulk_create",
        "bulk_create() by columns, or by COPY",
        CACHE,
    ),
    Names(
        f"{_QUERYSET}:QuerySet",
        "_extract_model_params",
        "get_or_create() outside a block, without a transaction",
        CACHE,
    ),
    Names("django.db.models.manager:Manager", "_queryset_class", "a manager's methods"),
    Names(
        _QUERYSET,
        "prefetch_one_level get_prefetcher",
        "queries of independent lookups at once; replaced",
        PREFETCH,
    ),
    Names(
        _QUERYSET,
        "ModelIterable ValuesIterable ValuesListIterable NamedValuesListIterable"
        " FlatValuesListIterable RawModelIterable",
        "rows from a plan; their __iter__ is replaced",
    ),
    Names(
        "django.db.models.base:Model",
        "_do_update _do_insert _get_pk_val _set_pk_val _is_pk_set _prepare_related_fields_for_save",
        "save() without a query, after the first time",
        CACHE,
    ),
    Names(
        "django.db.models.sql.subqueries:DeleteQuery",
        "delete_batch",
        "DELETE of one row, after the first time",
        CACHE,
    ),
    Names(
        "django.db.models.sql.query:Query",
        "has_results get_count get_aggregation get_external_cols unref_alias get_initial_alias",
        "exists(), count() and aggregate() from a plan",
        CACHE,
    ),
    Names(
        "django.db.models.sql.query:Query",
        "build_lookup add_distinct_fields extra_order_by values_select _filtered_relations",
        "what is done to querysets is recorded, and answered from there",
        RECORDING,
    ),
    Names(
        "django.db.models.sql.compiler:SQLCompiler",
        "execute_sql as_sql compile get_converters select klass_info annotation_col_map"
        " has_composite_fields",
        "what plans are made of",
        CACHE,
    ),
    Names(
        "django.db.backends.base.operations:BaseDatabaseOperations",
        "compiler",
        "the compilers see which node each parameter is of",
        CACHE,
    ),
    Names(
        "django.db.models.fields.related:ForeignObject",
        "get_extra_restriction get_joining_fields",
        "overridden, a join has conditions of its own",
        CACHE,
    ),
    Names(
        "django.db.models.sql.compiler",
        "SQLUpdateCompiler SQLDeleteCompiler SQLInsertCompiler",
        "writes from a plan",
    ),
    Names(
        "django.db.models.sql.where:WhereNode",
        "split_having_qualify",
        "which conditions belong to HAVING",
        CACHE,
    ),
    Names(
        "django.db.models.expressions:Expression",
        "_constructor_args get_source_expressions",
        "what an expression was made with",
    ),
    Names("django.db.models.options:Options", "all_parents", "what tables a plan rests on", CACHE),
    Names("django.db.models.expressions:Col", "possibly_multivalued", "what is grouped by", CACHE),
)

ASGIREF = (
    Names(
        "asgiref.sync:AsyncToSync", "awaitable", "native code awaits it instead of running a loop"
    ),
    Names(
        "asgiref.sync:SyncToAsync",
        "threadlocal single_thread_executor",
        "whether a thread works for a coroutine of a test",
    ),
)

# Names with an underscore that are documented all the same: Django's "Model _meta API", "Model
# instance reference" and "Managers", Python's namedtuple, sys and asyncio.
DOCUMENTED = frozenset(
    "_meta _state _base_manager _replace _getframe _current_frames _get_running_loop".split()
)
# Names that no class of the installed versions has to have: set on instances, or used if there.
UNVERIFIED = {
    "_prefetched_objects_cache": "Django: what prefetching keeps on an instance",
    "_non_atomic_requests": "Django: the mark of a view",
    "_registry": "Django: the ModelAdmins of an AdminSite, which `check` looks through",
    "_iterator": "Django: what a response streams, closed when it is not sent to its end",
    "_run_parallel": "Django 6.1: asynchronous receivers of a signal get scopes of their own",
    "_log_destroy_pending": "asyncio: a task that ends with its loop is no mistake",
    "_get_storage": "asgiref: what a Local has in this thread and context, without an error",
    "_storage": "the same",
    "_data": "the same, looked up once where it is a context variable",
    "_record": "django-debug-toolbar: what its SQL panel does with a query",
}

REGISTRY = {"Django": DJANGO, "psycopg": PSYCOPG, "psycopg-pool": PSYCOPG_POOL, "asgiref": ASGIREF}

# What asyncorm.asgi.get_asgi_application() needs besides; verified when it is called.
REQUESTS = {
    "Django": (
        Names(
            "django.core.handlers.base:BaseHandler",
            "adapt_method_mode make_view_atomic _get_response _middleware_chain"
            " _template_response_middleware",
            "the handler calls Django's synchronous chain of middleware and views natively",
        ),
        Names(
            "django.core.handlers.base",
            "import_string convert_exception_to_response",
            "where each middleware runs, and its errors are converted, once; replaced",
        ),
        Names(
            "django.core.handlers.asgi:ASGIHandler",
            "handle read_body create_request run_get_response send_response chunk_bytes"
            " listen_for_disconnect",
            "a request from the server to the response; handle() is replaced",
        ),
        Names("django.core.handlers.asgi", "get_script_prefix", "the same"),
        Names("django.core.asgi", "ASGIHandler", "Django's function makes our handler; replaced"),
        Names(
            "django.http.response:HttpResponseBase",
            "_resource_closers _handler_class",
            "what closing runs, and who is told to have served the request",
        ),
        Names("django.utils.deprecation:MiddlewareMixin", "__acall__", "only hops to a thread"),
        Names("django.dispatch:Signal", "_live_receivers", "sends a request's signals on the loop"),
        Names("django.core.cache.backends.base", "sync_to_async", "asynchronous caches; replaced"),
        Names("django.contrib.sessions.backends.base", "sync_to_async", "and sessions; replaced"),
        Names("django.middleware.csrf", "_get_failure_view", "a view of the project's; replaced"),
        Names("django.middleware.gzip", "compress_string", "waits for a thread; replaced"),
        Names("django.urls:URLResolver", "resolve_error_handler", "views of the project; replaced"),
    ),
    "asgiref": (
        Names(
            "asgiref.sync:SyncToAsync",
            "thread_sensitive_context context_to_thread_executor",
            "whether anything of a request ran in its thread",
        ),
    ),
}


@dataclass(frozen=True)
class Missing:
    """A registered name that the installed version has not."""

    project: str
    name: str
    why: str
    part: str | None

    def __str__(self) -> str:
        tested = f" (tested with {TESTED[self.project]})" if self.project in TESTED else ""
        return f"{self.project} {installed(self.project)}{tested} has no {self.name}: {self.why}"


UNKNOWN = "of an unknown version"


def installed(project: str) -> str:
    """The installed version of a project."""
    try:
        return version(project)
    except PackageNotFoundError:
        return UNKNOWN


@cache
def missing() -> tuple[Missing, ...]:
    """Each registered name that is not there."""
    return _missing_of(REGISTRY)


def _missing_of(registry: Mapping[str, tuple[Names, ...]]) -> tuple[Missing, ...]:
    return tuple(
        Missing(project, entry.full(name), entry.why, entry.part)
        for project, entries in registry.items()
        for entry in entries
        for name in _absent(entry)
    )


def lost() -> dict[str, list[Missing]]:
    """The optional parts that are switched off, and for want of what."""
    found: dict[str, list[Missing]] = {}
    for each in missing():
        if each.part is not None:
            found.setdefault(each.part, []).append(each)
    return found


def require() -> None:
    """Verify what cannot be done without.

    Raises:
        django.core.exceptions.ImproperlyConfigured: something is missing, or libpq is.
    """
    try:
        importlib.import_module("psycopg")
    except ImportError as exc:
        raise ImproperlyConfigured(
            f"asyncorm cannot load psycopg: {exc}. Install it with a libpq of its own, "
            'pip install "psycopg[binary,pool]", or see "Installation" in psycopg\'s documentation.'
            + see("start#start")
        ) from exc
    _require_none_of([each for each in missing() if each.part is None])


def require_for_requests() -> None:
    """Verify what a native handler needs.

    Raises:
        django.core.exceptions.ImproperlyConfigured: something is missing.
    """
    _require_none_of(_missing_of(REQUESTS))


def _require_none_of(needed: Sequence[Missing]) -> None:
    if needed:
        raise ImproperlyConfigured(
            "asyncorm cannot work with what is installed. "
            + "; ".join(map(str, needed))
            + ". Install versions within: "
            + ", ".join(f'"{project}{bounds}"' for project, bounds in TESTED.items())
            + "."
            + see("operations#upgrading")
        )


def _absent(entry: Names) -> Iterator[str]:
    module, _, path = entry.owner.partition(":")
    try:
        owner: Any = importlib.import_module(module)
        for step in path.split(".") if path else ():
            owner = getattr(owner, step)
    except (ImportError, AttributeError):
        yield ""
        return
    for name in entry.names.split():
        if not hasattr(owner, name) and not _assigns(owner, name):
            yield name


def _assigns(owner: object, name: str) -> bool:
    if inspect.ismodule(owner):
        return False
    cls = owner if inspect.isclass(owner) else type(owner)
    members = [member for base in cls.__mro__ for member in vars(base).values()]
    inits = [vars(base).get("__init__") for base in cls.__mro__]  # most do it: the first to look at
    return any(_stores(member, name) for member in chain(inits, members))


def _stores(member: Any, name: str) -> bool:
    """Whether a function assigns to an attribute of a name."""
    function = inspect.unwrap(getattr(member, "__func__", member))
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType) or name not in code.co_names:
        return False
    return name in _stored(code)


@cache
def _stored(code: CodeType) -> set[str]:
    steps = dis.get_instructions(code)
    return {step.argval for step in steps if step.opname == "STORE_ATTR"}
