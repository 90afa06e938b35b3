"""Tools see native queries: django-debug-toolbar, OpenTelemetry, Sentry, exporters of metrics."""

import asyncio
import json
from typing import Any

import psycopg
import pytest
from django.db.backends import utils
from django.db.backends.postgresql.base import DatabaseWrapper
from django.db.backends.utils import CursorWrapper

import asyncorm
from tests.project.shop.models import Tag
from tests.support import SENTRY_KEPT, run_script

PROJECT = """
import asyncio, json, django
from django.conf import settings
import tests.project.settings as base
names = {name: getattr(base, name) for name in dir(base) if name.isupper()}
names["INSTALLED_APPS"] = [*names["INSTALLED_APPS"], "django.contrib.staticfiles", *EXTRA_APPS]
names["MIDDLEWARE"] = [*EXTRA_MIDDLEWARE, *names["MIDDLEWARE"]]
names.update(DEBUG=True, ROOT_URLCONF="__main__", ASYNCORM={"SWAP_MANAGERS": True}, **EXTRA)
settings.configure(**names)
django.setup()
from django.db import connection
from django.http import HttpResponse
from django.test import AsyncClient
from django.urls import include, path
import asyncorm
from tests.project.shop.models import Book, Tag

async def view(request):
    await asyncio.gather(Tag.objects.acount(), Book.objects.acount())
    async with asyncorm.atomic():
        await Tag.objects.filter(name="%s' x").afirst()
    return HttpResponse("<html><body>done</body></html>")

async def quiet(request):
    return HttpResponse("<html><body>done</body></html>")

urlpatterns = [path("", view), path("quiet", quiet), *EXTRA_URLS()]
"""


def run(before: str, after: str) -> Any:
    result = run_script(f"{before}\n{PROJECT}\n{after}", "-W", "ignore", timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_debug_toolbars_sql_panel(shop_data: Any) -> None:
    pytest.importorskip("debug_toolbar")
    before = """
EXTRA_APPS = ["debug_toolbar"]
EXTRA_MIDDLEWARE = ["debug_toolbar.middleware.DebugToolbarMiddleware"]
EXTRA = {"INTERNAL_IPS": ["127.0.0.1"], "DEBUG_TOOLBAR_PANELS": ["asyncorm.debug_toolbar.SQLPanel"],
         "DEBUG_TOOLBAR_CONFIG": {"SHOW_TOOLBAR_CALLBACK": lambda request: True}}
def EXTRA_URLS():
    return [path("__debug__/", include("debug_toolbar.urls"))]
"""
    after = """
from debug_toolbar.store import get_store
async def main():
    client = AsyncClient()
    first, *_ = await asyncio.gather(*(client.get(url) for url in ("/", "/quiet", "/")))
    assert b"djDebug" in first.content
    found = []
    for number in get_store().request_ids():
        queries = get_store().panel(number, "SQLPanel")["queries"]
        # Django looks up types whenever a connection is new.
        queries = [q for q in queries if "pg_type" not in q["sql"]]
        found.append([[q["sql"], q["duration"], q["trans_id"] is not None] for q in queries])
    print(json.dumps(found))
asyncio.run(main())
"""
    requests = run(before, after)
    assert sorted(map(len, requests)) == [0, 3, 3]
    for queries in requests:
        if queries:
            texts = [sql for sql, _, _ in queries]
            assert sum("COUNT(*)" in sql for sql in texts) == 2
            assert any("'%s'' x'" in sql for sql in texts)
            assert all(duration > 0 for _, duration, _ in queries)
            assert [in_transaction for *_, in_transaction in queries].count(True) == 1


@pytest.mark.slow
def test_opentelemetrys_spans_of_requests(shop_data: Any) -> None:
    before = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
import os
os.environ["DJANGO_SETTINGS_MODULE"] = "tests.project.settings"
from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor
PsycopgInstrumentor().instrument()  # it must at least do no harm
EXTRA_APPS, EXTRA_MIDDLEWARE, EXTRA = [], [], {}
EXTRA_URLS = list
"""
    after = """
from opentelemetry.instrumentation.django import DjangoInstrumentor
DjangoInstrumentor().instrument()
from asyncorm.opentelemetry import instrument
instrument()
async def main():
    client = AsyncClient()
    await asyncio.gather(client.get("/"), client.get("/quiet"), client.get("/"))
    spans = exporter.get_finished_spans()
    print(json.dumps([[s.context.span_id, s.parent and s.parent.span_id, s.name, s.kind.name,
                       dict(s.attributes)] for s in spans]))
asyncio.run(main())
"""
    spans = run(before, after)
    requests = {number for number, _, _, kind, _ in spans if kind == "SERVER"}
    queries = [span for span in spans if span[3] == "CLIENT" and "db.query.text" in span[4]]
    assert len(requests) >= 3
    texts = [span[4]["db.query.text"] for span in queries]
    assert sum("COUNT(*)" in text for text in texts) == 4
    assert {span[1] for span in queries} <= requests
    assert len({span[1] for span in queries}) == 2


async def test_a_span_for_each_query(shop_data: Any) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from asyncorm.opentelemetry import instrument, uninstrument

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    instrument(provider)
    try:
        with trace.get_tracer("test", tracer_provider=provider).start_as_current_span("outer"):
            await asyncio.gather(*(Tag.objects.native_count() for _ in range(3)))
            with pytest.raises(Exception, match="nothing"):
                async with asyncorm.cursor() as cursor:
                    await cursor.execute("SELECT nothing")
    finally:
        uninstrument()
    await Tag.objects.native_count()
    *queries, outer = [s for s in exporter.get_finished_spans() if "pg_type" not in s.name]
    counts = [s for s in queries if "COUNT(*)" in s.attributes["db.query.text"]]
    assert len(counts) == 3
    assert {s.parent.span_id for s in queries} == {outer.context.span_id}
    assert {s.attributes["db.operation.name"] for s in counts} == {"SELECT"}
    (failed,) = [s for s in queries if s.attributes["db.query.text"] == "SELECT nothing"]
    assert failed.status.status_code is trace.StatusCode.ERROR


def replace_execute(patch: Any, seen: list[str], cls: Any = CursorWrapper) -> None:
    execute = cls.execute

    def record(self: Any, sql: Any, params: Any = None, **kwargs: Any) -> Any:
        seen.append(sql)
        return execute(self, sql, params, **kwargs)

    patch.setattr(cls, "execute", record)


def replace_psycopgs_execute(patch: Any, seen: list[str]) -> None:
    replace_execute(patch, seen, psycopg.Cursor)


def replace_the_class(patch: Any, seen: list[str]) -> None:
    class Recording(CursorWrapper):
        pass

    replace_execute(patch, seen, Recording)
    patch.setattr(utils, "CursorWrapper", Recording)


def replace_make_cursor(patch: Any, seen: list[str]) -> None:
    class Recording(CursorWrapper):
        pass

    replace_execute(patch, seen, Recording)
    patch.setattr(
        DatabaseWrapper, "make_cursor", lambda self, cursor: Recording(cursor, self), raising=False
    )


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    "replace", [replace_execute, replace_psycopgs_execute, replace_the_class, replace_make_cursor]
)
async def test_whoever_replaces_the_cursors_execute_sees_each_statement(replace: Any) -> None:
    tags = await Tag.objects.native_bulk_create([Tag(name="a"), Tag(name="b")])
    await asyncio.gather(*(Tag.objects.native_get(pk=tags[0].pk) for _ in range(30)))  # planned
    seen: list[str] = []

    async def work() -> None:
        await Tag.objects.native_get(pk=tags[0].pk)
        await asyncio.gather(*(Tag.objects.native_get(pk=tags[0].pk) for _ in range(30)))
        await Tag.objects.filter(name="a").native_count()
        await Tag.objects.filter(name="b").native_update(name="c")
        await tags[0].native_save()
        async with asyncorm.cursor() as cursor:
            await cursor.execute("SELECT 1")

    with pytest.MonkeyPatch.context() as patch:
        replace(patch, seen)
        await work()
    # Django looks up types whenever a connection is new.
    assert sum("shop_tag" in str(sql) or sql == "SELECT 1" for sql in seen) == 35, seen
    seen.clear()
    await work()  # as before, and unseen
    assert not seen


@pytest.mark.slow
def test_sentrys_spans(shop_data: Any) -> None:
    pytest.importorskip("sentry_sdk")
    before = (
        SENTRY_KEPT
        + """
sentry_sdk.init(dsn="http://x@127.0.0.1:1/1", traces_sample_rate=1.0, transport=Kept,
    integrations=[DjangoIntegration()], default_integrations=False)
EXTRA_APPS, EXTRA_MIDDLEWARE, EXTRA = [], [], {}
EXTRA_URLS = list
"""
    )
    after = """
async def main():
    with sentry_sdk.start_transaction(name="page", op="http"):
        await asyncio.gather(Tag.objects.acount(), Book.objects.afirst())
settings.DEBUG = False
asyncio.run(main())
sentry_sdk.flush()
print(json.dumps([s["description"] for e in sent for s in e.get("spans", []) if s["op"] == "db"]))
"""
    queries = [text for text in run(before, after) if "shop_" in text]
    assert len(queries) == 2, queries


async def test_statistics_from_another_thread(shop_data: Any) -> None:
    await Tag.objects.native_count()
    here = asyncorm.pool_stats()
    elsewhere = await asyncio.to_thread(asyncorm.pool_stats)  # an exporter of metrics
    assert here.keys() == elsewhere.keys() and elsewhere["pool_size"] >= here["pool_size"] == 1
    assert await asyncio.to_thread(asyncorm.pool_stats, "no alias") == {}


# Requests on our handler

TRACED = """
EXTRA_APPS = []
EXTRA_MIDDLEWARE = ["django.middleware.security.SecurityMiddleware"]
EXTRA = {}
spans = []
%(tool)s
def EXTRA_URLS():
    from asyncorm.asgi import native_view
    return [path("synchronous", native_view(synchronous))]
def synchronous(request):
    return HttpResponse(f"<html><body>{Tag.objects.count()}</body></html>")
"""
SENTRY = """
import sentry_sdk
from sentry_sdk.integrations.django import DjangoIntegration
from sentry_sdk.transport import Transport
class Kept(Transport):
    def capture_envelope(self, envelope):
        for item in envelope.items:
            event = item.payload.json or {}
            if event.get("type") == "transaction":
                spans.append([event["transaction"], sorted(
                    f"{span['op']} {span.get('description')}" for span in event["spans"])])
sentry_sdk.init(dsn="http://x@127.0.0.1:1/1", traces_sample_rate=1.0, transport=Kept,
    default_integrations=False, integrations=[DjangoIntegration(middleware_spans=True)])
"""
DDTRACE = """
import os
os.environ.update(DD_TRACE_ENABLED="true", DD_INSTRUMENTATION_TELEMETRY_ENABLED="false",
    DD_REMOTE_CONFIGURATION_ENABLED="false", DD_TRACE_STARTUP_LOGS="false")
import ddtrace
from ddtrace.trace import TraceFilter, tracer
class Kept(TraceFilter):
    def process_trace(self, trace):
        spans.append(sorted(f"{span.name} {span.resource}" for span in trace))
        return None
tracer.configure(trace_processors=[Kept()])
ddtrace.patch(django=True)
"""
ASK = """
from django.core.asgi import get_asgi_application as djangos
from asyncorm.asgi import get_asgi_application as ours
from tests.asgi_client import ask
from tests.support import watched_threads
settings.DEBUG = False
async def main():
    found = {}
    for name, make in (("django", djangos), ("asyncorm", ours)):
        app = make()
        for url in ("/", "/quiet", "/synchronous", "/nothing"):
            await ask(app, url)
            spans.clear()
            with watched_threads() as threads:
                answer = await ask(app, url)
            found[f"{name} {url}"] = [answer.status, list(spans), len(threads)]
    print(json.dumps(found))
asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("package", "tool"), [("sentry_sdk", SENTRY), ("ddtrace", DDTRACE)])
def test_spans_of_requests_are_those_of_djangos_handler(
    shop_data: Any, package: str, tool: str
) -> None:
    pytest.importorskip(package)
    found = run(TRACED % {"tool": tool}, ASK)
    # Natively middleware is called in its synchronous form, and connections are open already.
    renamed = {"__acall__": "__call__"}
    other = "db connect", "event.django django.contrib.postgres.signals"
    for url in ("/", "/quiet", "/synchronous", "/nothing"):
        answers = []
        for handler in "django", "asyncorm":
            status, spans, threads = found[f"{handler} {url}"]
            text = json.dumps(spans)
            for old, new in renamed.items():
                text = text.replace(old, new)
            [trace] = json.loads(text)
            name, names = trace if isinstance(trace[1], list) else ("", trace)
            answers.append((status, name, [each for each in names if not each.startswith(other)]))
        assert answers[0] == answers[1]
        assert threads == 0


@pytest.mark.slow
def test_opentelemetrys_spans_of_requests_on_our_handler(shop_data: Any) -> None:
    tool = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
"""
    after = """
from opentelemetry.instrumentation.django import DjangoInstrumentor
DjangoInstrumentor().instrument()
from asyncorm.opentelemetry import instrument
instrument()
from django.core.asgi import get_asgi_application as djangos
from django.test import override_settings
from asyncorm.asgi import get_asgi_application as ours
from tests.asgi_client import ask
from tests.support import watched_threads
settings.DEBUG = False
[name] = [each for each in settings.MIDDLEWARE if each.startswith("opentelemetry.")]
async def main():
    found = []
    for make in djangos, ours:
        app = make()
        for url in "/", "/synchronous":
            await ask(app, url)
            exporter.clear()
            with watched_threads() as threads:
                await ask(app, url)
            spans = exporter.get_finished_spans()
            names = {each.context.span_id: each.name for each in spans}
            found.append([sorted(
                [each.name, each.parent and names[each.parent.span_id] or "", each.kind.name]
                for each in spans), len(threads)])
    print(json.dumps(found))
with override_settings(ASYNCORM={"SWAP_MANAGERS": True, "NATIVE_MIDDLEWARE": [name]}):
    asyncio.run(main())
"""
    theirs, _, ours, synchronous = run(TRACED % {"tool": tool}, after)
    assert ours[0] == theirs[0] and len(ours[0]) == 4
    assert {"GET synchronous", "SERVER"} <= {part for span in synchronous[0] for part in span}
    assert ours[1] == synchronous[1] == 0 < theirs[1]
