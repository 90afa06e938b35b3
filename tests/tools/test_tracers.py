"""Tracers see native statements as they see Django's, each once, and no cursor for it.

Sentry, Datadog, Elastic APM: the same work on Django's engine and on ours, each in a process of
its own; the spans are compared.
"""

import json
from typing import Any

import pytest

from tests.support import DATADOG_KEPT, SENTRY_KEPT, run_script

pytestmark = pytest.mark.slow

WORK = """
import asyncio, json, os, sys
STOCK = bool(os.environ.get("STOCK"))
%(before)s
from django.conf import settings
import tests.project.settings as base
names = {name: getattr(base, name) for name in dir(base) if name.isupper()}
default = {**base.DATABASES["default"]}
if STOCK:
    default.update(ENGINE="django.db.backends.postgresql", OPTIONS={})
    names["INSTALLED_APPS"] = [app for app in names["INSTALLED_APPS"] if app != "asyncorm"]
else:
    names["ASYNCORM"] = {"SWAP_MANAGERS": True}
names.update(DATABASES={"default": default}, DATABASE_ROUTERS=[])
names.update(globals().get("CHANGES", {}))
settings.configure(**names)
import django
django.setup()
from django.contrib.contenttypes.models import ContentType
from django.db import DatabaseError, connection, connections
%(after)s

async def work():
    await ContentType.objects.acount()
    await asyncio.gather(*(ContentType.objects.order_by("pk").afirst() for _ in range(3)))
    await ContentType.objects.filter(pk=-1).aupdate(model="x")
    [each async for each in ContentType.objects.order_by("pk").values_list("pk")[:3]]
    try:
        await ContentType.objects.filter(pk=-1).aupdate(app_label="x" * 200)
        await ContentType.objects.extra(where=["nothing"]).aexists()
    except DatabaseError:
        pass

async def main():
    await work()
    await work()  # planned
    if not STOCK:
        from asyncorm import _events
        class Cursors(_events.Listener):
            count = 0
            def statement_ended(self, statement):
                self.count += statement.by_cursor
        cursors = Cursors()
        _events.listen(cursors)
    found = await traced(work)
    if not STOCK:
        import asyncorm
        found.append(cursors.count)
        await asyncorm.close_pools()
    return found
found = asyncio.run(main())
print(json.dumps(found))
"""

SENTRY = (
    SENTRY_KEPT
    + """
sentry_sdk.init(dsn="http://x@127.0.0.1:1/1", traces_sample_rate=1.0, transport=Kept,
    integrations=[DjangoIntegration()], default_integrations=False,
    db_query_source_threshold_ms=0)
async def traced(work):
    with sentry_sdk.start_transaction(name="page", op="http"):
        await work()
        sentry_sdk.capture_message("said")
    sentry_sdk.flush()
    [page] = [event for event in sent if event.get("type") == "transaction"]
    [said] = [event for event in sent if event.get("message") == "said"]
    root = page["contexts"]["trace"]["span_id"]
    found = [
        [span["op"], span["description"], span["origin"], span.get("status"),
         span["parent_span_id"] == root, span["timestamp"] >= span["start_timestamp"],
         sorted(name for name in span["data"] if not name.startswith(("thread.", "code."))),
         span["data"].get("db.name"), span["data"].get("server.port")]
        for span in page["spans"] if span["op"] == "db" and span["description"] != "connect"]
    said = [crumb["message"] for crumb in said["breadcrumbs"]["values"]]
    return [sorted(found), sorted(crumb for crumb in said if crumb != "connect")]
"""
)

DATADOG = (
    DATADOG_KEPT
    + """ddtrace.patch(django=True, psycopg=bool(os.environ["PSYCOPG"]))
async def traced(work):
    spans.clear()
    with tracer.trace("page") as page:
        await work()
    return [sorted(
        [span.name, span.resource, span.service, span.span_type, span.error,
         span.parent_id == page.span_id, span.duration >= 0, span.get_tag("db.name"),
         span.get_tag("db.user"), span.get_tag("out.host"), span.get_tag("component"),
         span.get_tag("span.kind"), span.get_tag("error.type") is not None]
        for span in spans if span is not page)]
"""
)


ELASTIC = (
    """
import tests.project.settings as base
base.INSTALLED_APPS = [*base.INSTALLED_APPS, "elasticapm.contrib.django"]
base.ELASTIC_APM = {"DISABLE_SEND": True, "CENTRAL_CONFIG": False, "CLOUD_PROVIDER": "none",
    "SERVICE_NAME": "shop", "SPAN_COMPRESSION_ENABLED": False}
""",
    """
import elasticapm
client, kept = elasticapm.get_client(), []
client.tracer.queue_func = lambda kind, data, **options: kept.append((kind, data))
async def traced(work):
    kept.clear()
    client.begin_transaction("request")
    await work()
    client.end_transaction("page", "ok")
    return [sorted((
        [span["name"], span["type"], span["subtype"], span["action"], span["outcome"],
         span["context"]["db"], span["context"]["destination"],
         span["parent_id"] == span["transaction_id"], span["duration"] >= 0]
        for kind, span in kept if kind == "span" and span["action"] != "connect"
        and "TimeZone" not in span["context"]["db"]["statement"]), key=str)]
""",
)


def traced(before: str, after: str = "", **environment: str) -> list[Any]:
    found = []
    for stock in "1", "":
        source = WORK % {"before": before, "after": after}
        result = run_script(source, "-W", "ignore", timeout=120, STOCK=stock, **environment)
        assert result.returncode == 0, result.stderr
        found.append(json.loads(result.stdout.splitlines()[-1]))
    return found


def test_sentrys_spans_and_breadcrumbs(shop_data: Any) -> None:
    pytest.importorskip("sentry_sdk")
    (theirs, said), (ours, heard, cursors) = traced(SENTRY)
    assert len(ours) >= 7
    assert ours == theirs
    assert said == heard
    assert cursors <= 1  # of what extra() adds


def test_elastics_spans(shop_data: Any) -> None:
    """Its app is found; its agent looks at the cursors of psycopg.connect()."""
    pytest.importorskip("elasticapm")
    (theirs,), (ours, cursors) = traced(*ELASTIC)
    assert len(ours) >= 7
    assert ours == theirs
    assert cursors <= 1  # of what extra() adds


def test_who_has_replaced_the_same_as_sentry_is_told_too(shop_data: Any) -> None:
    pytest.importorskip("sentry_sdk")
    after = """
from django.db.backends.utils import CursorWrapper
execute = CursorWrapper.execute
seen = []
def recorded(self, sql, params=None):
    seen.append(sql)
    return execute(self, sql, params)
CursorWrapper.execute = recorded
"""
    (theirs, _), (ours, _, cursors) = traced(SENTRY, after)
    assert [span[1] for span in ours] == [span[1] for span in theirs]
    assert cursors == len(ours)


@pytest.mark.parametrize(
    ("of_django", "psycopg"), [("false", "yes"), ("true", "yes"), ("true", "")]
)
def test_datadogs_spans(shop_data: Any, of_django: str, psycopg: str) -> None:
    pytest.importorskip("ddtrace")
    environment = {"DD_DJANGO_INSTRUMENT_DATABASES": of_django, "PSYCOPG": psycopg}
    (theirs,), (ours, cursors) = traced(DATADOG, **environment)
    assert len(ours) >= 7
    assert ours == theirs
    assert cursors <= 1


SILK = """
CHANGES = {
    "ROOT_URLCONF": "__main__", "SILKY_PYTHON_PROFILER": False, "ALLOWED_HOSTS": ["*"],
    "INSTALLED_APPS": ["django.contrib.contenttypes", "silk", *([] if STOCK else ["asyncorm"])],
    "MIDDLEWARE": ["silk.middleware.SilkyMiddleware" if STOCK else
                   "asyncorm.observe.silk.SilkyMiddleware"]}
urlpatterns = []
async def traced(work):
    from django.core.management import call_command
    from django.db.models import Model
    from django.http import HttpResponse
    from django.test import AsyncClient
    from django.urls import path
    from asgiref.sync import sync_to_async
    from silk.models import Request
    async def worked(request):
        await asyncio.gather(work(), ContentType.objects.aget(pk=1))
        return HttpResponse("done")
    def synchronous(request):
        return HttpResponse(str(ContentType.objects.count()))
    urlpatterns[:] = [path("worked", worked), path("synchronous", synchronous)]
    def kept():
        return [[request.path, sorted(query.query for query in request.queries.all()),
                 all(query.end_time >= query.start_time for query in request.queries.all())]
                for request in Request.objects.order_by("start_time")]
    await sync_to_async(call_command)("migrate", "silk", verbosity=0)
    try:
        client = AsyncClient()
        for url in "/worked", "/synchronous", "/worked":
            assert (await client.get(url)).status_code == 200
        return [await sync_to_async(kept)()]
    finally:
        await sync_to_async(call_command)("migrate", "silk", "zero", verbosity=0)
"""


def test_silks_queries(shop_data: Any) -> None:
    pytest.importorskip("silk")
    (theirs,), (ours, _) = traced(SILK)
    assert [request[0] for request in ours] == ["/worked", "/synchronous", "/worked"]
    for their, our in zip(theirs, ours, strict=True):
        # What fails is kept by both; silk does not see the UPDATEs, which have compilers of their
        # own.
        assert [q for q in our[1] if not q.startswith("UPDATE")] == [
            q for q in their[1] if not q.startswith("UPDATE")
        ]
        assert our[2]


def test_silks_own_middleware_is_warned_of(settings: Any) -> None:
    from asyncorm.checks import check_tools

    settings.MIDDLEWARE = ["silk.middleware.SilkyMiddleware"]
    assert [found.id for found in check_tools()] == ["asyncorm.W032"]
    settings.MIDDLEWARE = ["asyncorm.observe.silk.SilkyMiddleware"]
    assert not check_tools()
