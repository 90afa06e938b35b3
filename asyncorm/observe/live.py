"""What happens now: pools, who holds what since when, statements under way, the last requests.

    path("asyncorm/", asyncorm.observe.live.view)                      # urls.py
    MIDDLEWARE = ["asyncorm.observe.live.requests_middleware", ...]    # for the last requests

The view answers with DEBUG only: as a page that renews itself, or as JSON with `?format=json`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from html import escape
from itertools import count
from threading import Lock
from time import monotonic, time
from typing import Any

from asgiref.sync import iscoroutinefunction
from django.conf import settings
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.utils.decorators import sync_and_async_middleware

from .. import _events, drawing, pools
from ..timeline import Timeline

_MOST = 50  # requests
_numbers = count()


class Request:
    """One request.

    Attributes:
        number: which one it is, of this process.
        title: method and path.
        at: when it began, in seconds since 1970.
        timeline: what it and its tasks ran.
        seconds: how long it took; None while it is being answered.
    """

    def __init__(self, title: str) -> None:
        self.number = next(_numbers)
        self.title = title
        self.at = time()
        self.timeline = Timeline()
        self.seconds: float | None = None


_current: ContextVar[Request | None] = ContextVar("asyncorm_live_request", default=None)
_requests: deque[Request] = deque(maxlen=_MOST)


class _Watching(_events.Listener):
    def __init__(self) -> None:
        self.lock = Lock()  # loops may run in several threads
        self.out: set[_events.CheckOut] = set()
        self.statements: set[_events.Statement] = set()

    def checked_out(self, checkout: _events.CheckOut) -> None:
        with self.lock:
            self.out.add(checkout)

    def checked_in(self, checkout: _events.CheckOut) -> None:
        with self.lock:
            self.out.discard(checkout)

    def statement_begun(self, statement: _events.Statement) -> None:
        with self.lock:
            self.statements.add(statement)

    def statement_ended(self, statement: _events.Statement) -> None:
        with self.lock:
            self.statements.discard(statement)
        if (request := _current.get()) is not None:
            request.timeline.statement_ended(statement)

    def command_begun(self, command: _events.Command) -> None:
        if (request := _current.get()) is not None:
            request.timeline.command_begun(command)

    def command_ended(self, command: _events.Command) -> None:
        if (request := _current.get()) is not None:
            request.timeline.command_ended(command)

    def waited(self, wait: _events.Wait) -> None:
        if (request := _current.get()) is not None:
            request.timeline.waited(wait)


_watching = _Watching()


def watch() -> None:
    """Keep what `snapshot()` tells from now on; once, however often it is called."""
    _events.listen(_watching)


def unwatch() -> None:
    """Keep it no more, and forget the requests."""
    _events.unlisten(_watching)
    _watching.out.clear()
    _watching.statements.clear()
    _requests.clear()


def snapshot() -> dict[str, Any]:
    """What happens now in this process, as plain values; from any thread.

    Returns:
        `pools`: for each alias its statistics. `holders`: who has which connection for how many
        seconds. `statements`: those under way. `requests`: the last ones, the newest first, with
        the number of queries, the seconds, and what their timelines found.
    """
    now = monotonic()
    with _watching.lock:
        out, statements = list(_watching.out), list(_watching.statements)
    return {
        "pools": pools.total_stats(),
        "holders": [
            {**_about(each, now), "holder": str(each.holder)}
            for each in sorted(out, key=lambda each: each.began)
        ],
        "statements": [
            {**_about(each, now), "sql": each.sql, "waits": not each.connection}
            for each in sorted(statements, key=lambda each: each.began)
        ],
        "requests": [
            {
                "number": each.number,
                "title": each.title,
                "at": each.at,
                "seconds": each.seconds,
                "queries": len(each.timeline.queries),
                "findings": each.timeline.findings(),
            }
            for each in reversed(_requests)
        ],
    }


def _about(event: _events.CheckOut | _events.Statement, now: float) -> dict[str, Any]:
    return {
        "alias": event.alias,
        "connection": event.connection,
        "task": "" if event.task is None else event.task.get_name(),
        "seconds": now - event.began,
    }


@contextmanager
def _kept(request: HttpRequest) -> Iterator[None]:
    """Keep the timeline of a request that is answered inside."""
    if not settings.DEBUG:
        yield
        return
    seen = Request(f"{request.method} {request.get_full_path()}")
    _requests.append(seen)
    _current.set(seen)
    try:
        yield
    finally:
        seen.seconds = seen.timeline.elapsed()
        _current.set(None)


@sync_and_async_middleware
def requests_middleware(get_response: Callable[[HttpRequest], Any]) -> Callable[..., Any]:
    """Middleware: keep the timelines of the last requests; with DEBUG only."""
    if settings.DEBUG:
        watch()

    if iscoroutinefunction(get_response):

        async def serve(request: HttpRequest) -> HttpResponseBase:
            with _kept(request):
                return await get_response(request)  # type: ignore[no-any-return]

        return serve

    def serve_synchronously(request: HttpRequest) -> HttpResponseBase:
        with _kept(request):
            return get_response(request)  # type: ignore[no-any-return]

    return serve_synchronously


async def view(request: HttpRequest) -> HttpResponse:
    """The page; `?format=json`: what `snapshot()` says; `?timeline=N`: that of request N.

    Raises:
        Http404: DEBUG is off.
    """
    if not settings.DEBUG:
        raise Http404
    watch()
    own = _current.get()
    if own is not None and own in _requests:
        _requests.remove(own)  # or the page's own would be all that is seen, before long
    if number := request.GET.get("timeline"):
        for each in _requests:
            if str(each.number) == number:
                return HttpResponse(drawing.as_html(each.timeline))
        raise Http404
    now = snapshot()
    if request.GET.get("format") == "json":
        return JsonResponse(now)
    return HttpResponse(_page(now))


_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:2em}table{border-collapse:collapse;width:100%}"
    "td,th{padding:.2em .6em;text-align:left;vertical-align:top;border-bottom:1px solid #dde3ea}"
    "code{white-space:pre-wrap;overflow-wrap:anywhere}"
)


def _page(now: dict[str, Any]) -> str:
    def table(title: str, heads: str, rows: list[list[Any]]) -> str:
        cells = "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows)
        head = "".join(f"<th>{name}" for name in heads.split())
        return f"<h2>{title}</h2><table><tr>{head}{cells or '<tr><td>nothing'}</table>"

    def ms(seconds: float | None) -> str:
        return "" if seconds is None else f"{seconds * 1000:.1f}"

    pool_rows = [
        [
            escape(alias), stats["pool_size"], stats["pool_max"],
            stats["pool_size"] - stats["pool_available"], stats.get("requests_waiting", 0),
        ]
        for alias, stats in now["pools"].items()
    ]  # fmt: skip
    holder_rows = [
        [escape(h["alias"]), h["connection"], escape(h["holder"]), escape(h["task"]),
         ms(h["seconds"])]
        for h in now["holders"]
    ]  # fmt: skip
    statement_rows = [
        [escape(s["alias"]), s["connection"] or "waits", f"<code>{escape(s['sql'])}</code>",
         escape(s["task"]), ms(s["seconds"])]
        for s in now["statements"]
    ]  # fmt: skip
    request_rows = [
        [f'<a href="?timeline={r["number"]}">{escape(r["title"])}</a>', r["queries"],
         ms(r["seconds"]), "<br>".join(map(escape, r["findings"]))]
        for r in now["requests"]
    ]  # fmt: skip
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width"><meta http-equiv="refresh" content="2">'
        f"<title>asyncorm: live</title><style>{_STYLE}</style>"
        + table("Pools", "alias open most in_use waiting", pool_rows)
        + table("Who has a connection", "alias pid who task ms", holder_rows)
        + table("Statements under way", "alias pid SQL task ms", statement_rows)
        + table("The last requests", "request queries ms found", request_rows)
        + "</html>\n"
    )
