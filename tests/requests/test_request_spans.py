"""Tracers see requests of our handler as they see those of Django's.

The same requests to Django's handler on Django's engine and to ours, each in a process of its own:
the spans of requests, middleware, views and queries are the same, and ours start no thread.
"""

from typing import Any

import pytest

from tests.support import DATADOG_KEPT, SENTRY_KEPT
from tests.tools.test_tracers import traced

pytestmark = pytest.mark.slow

# A form of a middleware for the loop is named as the other; spans of connecting are left out.
REQUESTS = """
CHANGES = {"ROOT_URLCONF": "__main__", "ALLOWED_HOSTS": ["*"], "MIDDLEWARE": [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "__main__.passes",
    "django.middleware.clickjacking.XFrameOptionsMiddleware"]}
if not STOCK:
    CHANGES["ASYNCORM"] = {"SWAP_MANAGERS": True, "NATIVE_VIEWS": ["__main__"],
                           "NATIVE_MIDDLEWARE": ["__main__.passes"]}

class passes:
    def __init__(self, get_response):
        self.get_response = get_response
    def __call__(self, request):
        return self.get_response(request)
    def process_view(self, request, view, args, kwargs):
        return None

async def asynchronous(request):
    from django.http import HttpResponse
    return HttpResponse(str(await ContentType.objects.acount()))

def synchronous(request):
    from django.http import HttpResponse
    return HttpResponse(str(ContentType.objects.count()))

async def broken(request):
    raise ZeroDivisionError("broken")

urlpatterns = []

async def served():
    import logging
    from django.urls import path
    from tests.asgi_client import ask
    from tests.support import watched_threads
    if STOCK:
        from django.core.asgi import get_asgi_application
    else:
        from asyncorm.asgi import get_asgi_application
    logging.disable()
    views = [asynchronous, synchronous, broken]
    urlpatterns[:] = [path(f"{view.__name__}/", view) for view in views]
    urls = ["/asynchronous/", "/synchronous/", "/broken/", "/nothing/"]
    app = get_asgi_application()
    for url in urls:
        await ask(app, url)
    forget()
    with watched_threads() as threads:
        return [(await ask(app, url)).status for url in urls], threads

def plain(*names):
    return [str(name or "").replace("__acall__", "__call__") for name in names]
"""

SENTRY = """
sentry_sdk.init(dsn="http://x@127.0.0.1:1/1", traces_sample_rate=1.0, transport=Kept,
    integrations=[DjangoIntegration(middleware_spans=True, signals_spans=True)],
    default_integrations=False)

def forget():
    sentry_sdk.flush()
    sent.clear()

async def traced(work):
    answers, threads = await served()
    sentry_sdk.flush()
    found = []
    for event in sent:
        if event.get("type") == "transaction":
            names = {span["span_id"]: span["description"] for span in event["spans"]}
            context = event["contexts"]["trace"]
            found.append([event["transaction"], context["op"], context.get("status"), sorted(
                plain(span["op"], span["description"], names.get(span["parent_span_id"]))
                for span in event["spans"]
                if "connect" not in (span["description"], names.get(span["parent_span_id"])))])
        elif "exception" in event:
            found.append([event.get("transaction"), event["exception"]["values"][-1]["type"]])
    return [answers, threads, found]
"""

DATADOG = (
    DATADOG_KEPT
    + """ddtrace.patch(django=True, psycopg=True)
forget = spans.clear
TAGS = ["component", "error.type", "http.status_code", "http.route", "django.view"]

async def traced(work):
    answers, threads = await served()
    # Django's own middleware has spans in its synchronous form only: as under WSGI, so under ours.
    kept = {span.span_id: span for span in spans if "set_config" not in span.resource
            and not ("django.middleware." in span.resource and "call__" in span.resource)
            and not ("django.contrib." in span.resource and "call__" in span.resource)}
    def parent(span):
        while span.parent_id and span.parent_id not in kept:
            span = every[span.parent_id]
        return kept[span.parent_id].resource if span.parent_id else None
    every = {span.span_id: span for span in spans}
    return [answers, threads, sorted(
        plain(span.name, span.resource, parent(span), *map(span.get_tag, TAGS))
        for span in kept.values())]
"""
)

TELEMETRY = """
from opentelemetry import trace
from opentelemetry.instrumentation.django import DjangoInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
kept = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(kept))
trace.set_tracer_provider(provider)
forget = kept.clear
if not STOCK:
    CHANGES["ASYNCORM"]["NATIVE_MIDDLEWARE"] += [
        "opentelemetry.instrumentation.django.middleware.otel_middleware._DjangoMiddleware"]

async def traced(work):
    DjangoInstrumentor().instrument()
    if STOCK:
        from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor
        PsycopgInstrumentor().instrument()
    else:
        from asyncorm.opentelemetry import instrument
        instrument()
    answers, threads = await served()
    spans = kept.get_finished_spans()
    names = {span.context.span_id: span.name for span in spans}
    return [answers, threads, sorted({tuple(plain(
            span.name.partition(" postgres")[0].partition(" test_")[0], span.kind,
            span.status.status_code, names.get(span.parent and span.parent.span_id),
            *map(span.attributes.get, ["http.status_code", "http.route"])))
        for span in spans})]
"""

NEW_RELIC = """
import os
os.environ.update(NEW_RELIC_DEVELOPER_MODE="true", NEW_RELIC_LICENSE_KEY="0" * 40,
    NEW_RELIC_LOG_LEVEL="error")
import newrelic.agent
newrelic.agent.initialize()
from newrelic.core.application import Application
requests = []
Application.record_transaction = lambda self, data, *args: requests.append(data)
forget = requests.clear

def named(name):
    return "response" if name.endswith(("_get_response", "_get_response_async")) else name

def walk(node, parent=""):
    name = getattr(node, "name", None) or ""
    kind = type(node).__name__
    if "connect" in name or "operation/Postgres" in name:  # of a new connection
        return
    yield plain(kind, named(name), named(parent))
    for child in node.children:
        yield from walk(child, name)

async def traced(work):
    newrelic.agent.register_application(timeout=10)
    answers, threads = await served()
    return [answers, threads, [
        [named(request.name), [error.type for error in request.errors], sorted(walk(request.root))]
        for request in requests]]
"""


@pytest.mark.parametrize(
    ("package", "tool"),
    [
        ("sentry_sdk", SENTRY_KEPT + SENTRY),
        ("ddtrace", DATADOG),
        ("opentelemetry.instrumentation.django", TELEMETRY),
        ("newrelic", NEW_RELIC),
    ],
    ids=["sentry", "datadog", "opentelemetry", "new relic"],
)
def test_spans_are_those_of_djangos_handler(package: str, tool: str, shop_data: Any) -> None:
    pytest.importorskip(package)
    (statuses, hops, theirs), (answered, threads, ours, _) = traced(REQUESTS + tool)
    assert answered == statuses == [200, 200, 500, 404]
    assert len(ours) >= 4
    assert ours == theirs
    assert hops and not threads
