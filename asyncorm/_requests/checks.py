"""System checks of requests: names that do not exist, state of threads, what still hops.

They also tell, with the swap and Django's own handler, that there is another one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Error, Info, Warning
from django.core.handlers.asgi import ASGIHandler
from django.urls import URLPattern, get_resolver
from django.utils.deprecation import MiddlewareMixin
from django.utils.module_loading import import_string

from .. import conf
from . import middleware, names, views
from .thread_locals import thread_local_of

logger = logging.getLogger("asyncorm")

HINT = (
    "Use get_asgi_application() of asyncorm.asgi in asgi.py: Django's middleware runs on the event "
    "loop then, without threads."
)
_TOOLBAR = "debug_toolbar.panels.sql.SQLPanel"
DJANGOS, OURS = "django.core", "asyncorm"
_IMPORTS = re.compile(r"^from (django\.core|asyncorm)\.asgi import .*get_asgi_application", re.M)
# Where applications around others keep them.
_INNER = ("app", "application", "inner", "application_mapping")


def check_names() -> list[CheckMessage]:
    """asyncorm.E005: NATIVE_MIDDLEWARE and NATIVE_VIEWS, and MIDDLEWARE, which is looked into."""
    return [Error(text, id="asyncorm.E005") for text in (*names.problems(), *names.missing())]


def check_thread_locals() -> list[CheckMessage]:
    """asyncorm.W004 and I002: state of threads in modules of native code."""
    found: list[CheckMessage] = []
    for what, module, native in _entries():
        if (maker := thread_local_of(module)) is None:
            continue
        its = "its module" if maker == module else f"its module {module} imports from"
        if native:
            found.append(
                Warning(
                    f"{what} runs natively, and {its} {maker}, which makes a threading.local: all "
                    "requests would share it.",
                    hint="Use a contextvars.ContextVar in its place, or asgiref.local.Local.",
                    id="asyncorm.W004",
                )
            )
        else:
            found.append(
                Info(
                    f"{what} stays in threads: {its} {maker}, which makes a threading.local.",
                    id="asyncorm.I002",
                )
            )
    return found


def check_admin() -> list[CheckMessage]:
    """asyncorm.I003: the ModelAdmins that run natively because their AdminSite does."""
    if not apps.is_installed("django.contrib.admin"):
        return []
    from django.contrib.admin.sites import all_sites

    found: list[CheckMessage] = []
    for site in all_sites:
        if not views.is_native(site.index):
            continue
        admins = {type(each) for each in site._registry.values()}
        others = sorted(
            f"{each.__module__}.{each.__qualname__}"
            for each in admins
            if not each.__module__.startswith("django.")
        )
        if others:
            found.append(
                Info(
                    f"The admin {site.name!r} runs natively, and with it {', '.join(others)}.",
                    hint="What blocks in them, other than the ORM, blocks the event loop.",
                    id="asyncorm.I003",
                )
            )
    return found


def check_handler() -> list[CheckMessage]:
    """asyncorm.I001: the swap is on, and requests are served by Django's own handler."""
    if not conf.get("SWAP_MANAGERS"):
        return []
    what, whose = served_by()
    if whose != DJANGOS:
        return []
    return [Info(f"{what} is served by Django's own handler.", hint=HINT, id="asyncorm.I001")]


def _urls() -> Any:
    """The root URLconf; a program that serves no requests may have none."""
    return getattr(settings, "ROOT_URLCONF", None)


def served_by() -> tuple[str, str]:
    """The project's ASGI application, and whose handler serves it: DJANGOS, OURS, or "" for one
    that is not known.

    Without ASGI_APPLICATION it is what startproject makes, which is read and not imported.
    """
    if what := getattr(settings, "ASGI_APPLICATION", None):
        handler = projects_handler()
        if handler is not None and _is_ours(handler):
            return what, OURS
        return what, DJANGOS if type(handler) is ASGIHandler else ""
    module = f"{str(_urls()).rpartition('.')[0]}.asgi"
    try:
        spec = find_spec(module)
        source = Path(spec.origin or "").read_text() if spec is not None else ""
    except (ImportError, ValueError, OSError):
        source = ""
    imported = set(_IMPORTS.findall(source))
    return module, imported.pop() if len(imported) == 1 else ""


def _is_ours(handler: ASGIHandler) -> bool:
    return any(cls.__module__.startswith("asyncorm.") for cls in type(handler).__mro__)


def check_middleware() -> list[CheckMessage]:
    """asyncorm.W041: middleware of other people that goes to a thread under the swap."""
    if not conf.get("SWAP_MANAGERS"):
        return []
    paths = [
        path
        for path in settings.MIDDLEWARE
        if not (middleware.is_own(path) or middleware.is_named(path)) and _hops(import_string(path))
    ]
    if not paths:
        return []
    return [
        Warning(
            f"Each request goes to a thread for {', '.join(paths)}.",
            hint="With the handler of asyncorm.asgi, name them in ASYNCORM['NATIVE_MIDDLEWARE'] "
            "if they block by nothing but the ORM, or use asynchronous ones.",
            id="asyncorm.W041",
        )
    ]


def check_toolbar() -> list[CheckMessage]:
    """asyncorm.W042: django-debug-toolbar's own panel, which sees no native queries."""
    if not (conf.get("SWAP_MANAGERS") and apps.is_installed("debug_toolbar")):
        return []
    panels = getattr(settings, "DEBUG_TOOLBAR_PANELS", [_TOOLBAR])
    if _TOOLBAR not in panels:
        return []
    return [
        Warning(
            f"{_TOOLBAR} does not see native queries.",
            hint="Put 'asyncorm.debug_toolbar.SQLPanel' in its place in DEBUG_TOOLBAR_PANELS.",
            id="asyncorm.W042",
        )
    ]


def projects_handler() -> ASGIHandler | None:
    """The handler of the application that ASGI_APPLICATION names, where it can be found."""
    path = getattr(settings, "ASGI_APPLICATION", None)
    if not path:
        return None
    try:
        return find_handler(import_string(path))
    except Exception:  # the server that is to serve it says so
        return None


def find_handler(app: Any) -> ASGIHandler | None:
    """Django's handler inside an ASGI application, as far as it can be found."""
    seen: list[Any] = []
    waiting = [app]
    while waiting and len(seen) < 100:
        each = waiting.pop()
        if isinstance(each, ASGIHandler) and not hasattr(each, "application"):  # for static files
            return each
        if each is None or any(each is other for other in seen):
            continue
        seen.append(each)
        if isinstance(each, dict):
            waiting += each.values()
        else:
            waiting += [getattr(each, name, None) for name in _INNER]
    return None


def hint_once() -> None:
    """Say at the first request that Django's own handler hops to threads, and for what."""
    hopping = [path for path in settings.MIDDLEWARE if _hops(import_string(path))]
    if hopping:
        logger.warning(
            "Requests are served by Django's own handler, which hops to a thread for %s. %s",
            ", ".join(hopping), HINT,
        )  # fmt: skip


def _hops(factory: Callable[..., Any]) -> bool:
    if not getattr(factory, "async_capable", False):
        return True
    return getattr(factory, "__acall__", None) is MiddlewareMixin.__acall__


def _entries() -> Iterator[tuple[str, str, bool]]:
    """Middleware and views that are named: what, its module, and whether it runs natively."""
    for path in settings.MIDDLEWARE:
        if not middleware.is_own(path):
            native = middleware.is_named(path)
            if native or conf.get("NATIVE_MIDDLEWARE") == middleware.ALL:
                yield path, import_string(path).__module__, native
    told = set()
    for view in _views(get_resolver().url_patterns if _urls() else ()):
        native = views.is_native(view)
        if native or conf.get("NATIVE_VIEWS") is True:
            for module in views.modules(view):
                if not module.startswith("django.") and (module, native) not in told:
                    told.add((module, native))
                    yield f"A view of {module}", module, native


def _views(patterns: Iterable[Any]) -> Iterator[Any]:
    for pattern in patterns:
        if isinstance(pattern, URLPattern):
            yield pattern.callback
        else:
            yield from _views(pattern.url_patterns)
