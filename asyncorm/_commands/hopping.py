"""Finds in source code what hops to a thread, by its syntax alone: nothing is imported.

A view is what a URLconf of the same sources names, or what is decorated as one; a middleware is
what takes `get_response`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

from django.db.models import Model, QuerySet

from ..drawing import shortened

# What calls a function in a thread: which of its arguments that is.
_CALLS_AT_ONCE = {
    "asyncio.to_thread": 0,
    "anyio.to_thread.run_sync": 0,
    "starlette.concurrency.run_in_threadpool": 0,
}
# What makes a coroutine function of a function.
_WRAPS = ("asgiref.sync.sync_to_async", "channels.db.database_sync_to_async")
_EXECUTOR = "run_in_executor"

_OF_URLS = ("path", "re_path", "url", "register")  # the second argument is the view
_OF_VIEWS = ("api_view", "get", "post", "put", "patch", "delete", "api_operation")
_MIXIN = "MiddlewareMixin"
_BOTH_WAYS = ("sync_and_async_middleware", "async_only_middleware")
_RELATED = ("add", "clear", "remove", "set")
# By these an expression is known to be of the ORM; what else has a get() or a save() may not be.
_OF_QUERYSETS = ("objects", "_set", ".filter(", ".all(", ".exclude(", "queryset")
_OF_ORM_ALONE = (
    "aggregate", "bulk_create", "bulk_update", "get_or_create", "in_bulk", "refresh_from_db",
    "update_or_create",
)  # fmt: skip

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Hop:
    """One place.

    Attributes:
        line: its number.
        what: what is written there, or is there.
        instead: what to write, or to do.
    """

    line: int
    what: str
    instead: str


@dataclass(frozen=True)
class Module:
    """A file of the project, read.

    Attributes:
        name: the dotted one.
        tree: its syntax.
        is_package: whether it is an `__init__`.
    """

    name: str
    tree: ast.Module
    is_package: bool = False


class Project:
    """The sources together: what URLconfs name, and what is native already.

    Args:
        swap: whether a* methods are native.
        is_native: whether a middleware or view, by its dotted name, runs natively.
    """

    def __init__(self, *, swap: bool, is_native: Callable[[str], bool]) -> None:
        self.prefix = "a" if swap else "native_"
        self.is_native = is_native
        self.views: set[str] = set()

    def learn(self, module: Module) -> None:
        """Note which views the URLconfs of a module name."""
        names = _Names(module)
        for node in ast.walk(module.tree):
            if (
                isinstance(node, ast.Call)
                and _last(node.func) in _OF_URLS
                and len(node.args) > 1
                and not isinstance(node.args[0], ast.Name | ast.Attribute)  # of admin.register()
                and (view := _view_in(node.args[1])) is not None
            ):
                self.views.update(names.candidates(view))

    def hops(self, module: Module) -> list[Hop]:
        """What hops in a module, by line."""
        found = [*_Calls(self, module).found, *self._handlers(module)]
        return sorted(found, key=lambda hop: hop.line)

    def _handlers(self, module: Module) -> Iterator[Hop]:
        for node in module.tree.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                continue
            full = f"{module.name}.{node.name}"
            decorators = [_last(each) for each in node.decorator_list]
            if self.is_native(full) or "native_view" in decorators:
                continue
            if _is_synchronous_middleware(node, decorators):
                yield Hop(
                    node.lineno,
                    f"synchronous middleware {node.name}",
                    f"with asyncorm's handler, ASYNCORM['NATIVE_MIDDLEWARE'] = [{full!r}], if it "
                    "does not block but by the ORM; or make it asynchronous",
                )
            elif self._is_synchronous_view(node, decorators, full):
                yield Hop(
                    node.lineno,
                    f"synchronous view {node.name}",
                    "with asyncorm's handler, @asyncorm.asgi.native_view, or "
                    f"ASYNCORM['NATIVE_VIEWS'] = [{full!r}], if it does not block but by the ORM; "
                    "or make it async def",
                )

    def _is_synchronous_view(
        self, node: ast.ClassDef | ast.FunctionDef, decorators: list[str], full: str
    ) -> bool:
        # A URLconf may name it by a shorter name than the folders here make of it.
        parts = full.split(".")
        named = any(".".join(parts[start:]) in self.views for start in range(len(parts) - 1))
        if isinstance(node, ast.FunctionDef):
            decorated = any(name in _OF_VIEWS for name in decorators)
            return named or (decorated and _arguments(node)[:1] == ["request"])
        methods = [each for each in node.body if isinstance(each, Function)]
        handlers = [each for each in methods if _takes_request(each)]
        # Without handlers of its own it has those of a generic view, which are synchronous.
        return named and not any(isinstance(each, ast.AsyncFunctionDef) for each in handlers)


def _last(node: ast.expr) -> str:
    """The last name of an expression: of `a.b(...)`, "b"."""
    if isinstance(node, ast.Call):
        return _last(node.func)
    name: str = getattr(node, "attr", "") or getattr(node, "id", "")
    return name


def _view_in(node: ast.expr) -> ast.expr | None:
    """What names the view in a URLconf's entry: `views.book`, `Book.as_view()`, `wrap(book)`."""
    while isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr == "as_view":
            node = node.func.value
        elif node.args and _last(node.func) != "include":
            node = node.args[0]
        else:
            return None
    return node


def _arguments(function: Function) -> list[str]:
    return [each.arg for each in (*function.args.posonlyargs, *function.args.args)]


def _takes_request(function: Function) -> bool:
    return _arguments(function)[:2] == ["self", "request"]


def _is_synchronous_middleware(node: ast.ClassDef | ast.FunctionDef, decorators: list[str]) -> bool:
    if isinstance(node, ast.FunctionDef):
        return _arguments(node) == ["get_response"] and not set(decorators) & {*_BOTH_WAYS}
    methods = {each.name: each for each in node.body if isinstance(each, Function)}
    if any(_last(base) == _MIXIN for base in node.bases):
        return "__acall__" not in methods  # Django's hops for process_request() and its kin
    init, call = methods.get("__init__"), methods.get("__call__")
    if init is None or "get_response" not in _arguments(init):
        return False
    return not (isinstance(call, ast.AsyncFunctionDef) or _says_async_capable(node))


def _says_async_capable(node: ast.ClassDef) -> bool:
    return any(
        isinstance(each, ast.Assign)
        and any(_last(target) == "async_capable" for target in each.targets)
        and isinstance(each.value, ast.Constant)
        and each.value.value is True
        for each in node.body
    )


class _Names:
    """What the names of a module stand for, as far as imports tell, those in functions included."""

    def __init__(self, module: Module) -> None:
        self.module = module.name
        self.imported: dict[str, str] = {}
        self.wholly: list[str] = []  # by `from x import *`
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                for each in node.names:
                    root = each.name.partition(".")[0]
                    self.imported[each.asname or root] = each.name if each.asname else root
            elif isinstance(node, ast.ImportFrom):
                source = self._source(node, module.is_package)
                for each in node.names:
                    if each.name == "*":
                        self.wholly.append(source)
                    else:
                        full = f"{source}.{each.name}".lstrip(".")  # beside a file without package
                        self.imported[each.asname or each.name] = full

    def _source(self, node: ast.ImportFrom, is_package: bool) -> str:
        above = self.module.split(".")
        start = above[: len(above) - node.level + is_package] if node.level else []
        return ".".join([*start, *([node.module] if node.module else [])])

    def full(self, node: ast.expr) -> str:
        """The dotted name of what an expression names."""
        if isinstance(node, ast.Name):
            return self.imported.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            return f"{self.full(node.value)}.{node.attr}"
        return ""

    def root_is_imported(self, full: str) -> bool:
        """Whether a dotted name begins with what an import brought."""
        roots = {name.partition(".")[0] for name in self.imported.values()}
        return full.partition(".")[0] in roots

    def candidates(self, node: ast.expr) -> Iterator[str]:
        """The same; of what is not imported by its name, each that it may be."""
        full = self.full(node)
        if self.root_is_imported(full):
            yield full
        else:
            yield from (f"{module}.{full}" for module in (self.module, *self.wholly))


class _Calls(ast.NodeVisitor):
    """Collects the calls of what goes to a thread.

    Attributes:
        found: so far.
    """

    def __init__(self, project: Project, module: Module) -> None:
        self.found: list[Hop] = []
        self._prefix = project.prefix
        self._names = _Names(module)
        self._full = self._names.full
        self.visit(module.tree)

    def _visit_function(self, node: Function) -> None:
        for decorator in list(node.decorator_list):
            name = decorator.func if isinstance(decorator, ast.Call) else decorator
            if self._full(name) in _WRAPS:
                self._add(decorator, f"@{_last(name)} on {node.name}()", "@asyncorm.native")
                node.decorator_list.remove(decorator)
        self.generic_visit(node)

    visit_FunctionDef = visit_AsyncFunctionDef = _visit_function

    def visit_Call(self, node: ast.Call) -> None:
        """A call: of what calls at once, of what a wrapper returned, or of the wrapper."""
        inner = node.func
        if isinstance(inner, ast.Call) and self._full(inner.func) in _WRAPS and inner.args:
            self._add(node, ast.unparse(node), self._instead(inner.args[0], node))
            self._go_on(inner.args, node.args, node.keywords)
        elif self._full(inner) in _WRAPS and node.args:
            self._add(node, ast.unparse(node), self._instead(node.args[0], None))
            self._go_on(node.args, node.keywords)
        elif (place := self._place(inner)) is not None and len(node.args) > place:
            call = ast.Call(inner, node.args[place + 1 :], node.keywords)
            self._add(node, ast.unparse(node), self._instead(node.args[place], call))
            self._go_on(node.args, node.keywords)
        else:
            self.generic_visit(node)

    def _place(self, func: ast.expr) -> int | None:
        if isinstance(func, ast.Attribute) and func.attr == _EXECUTOR:
            return 1
        return _CALLS_AT_ONCE.get(self._full(func))

    def _go_on(self, *groups: list[Any]) -> None:
        for group in groups:
            for node in group:
                self.visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        """A name that is not called here, say as an argument of map()."""
        full = self._full(node)
        if full in _WRAPS or full in _CALLS_AT_ONCE:
            self._add(node, node.id, "asyncorm.native")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """The same of a dotted name."""
        full = self._full(node)
        if full in _WRAPS or full in _CALLS_AT_ONCE:
            self._add(node, ast.unparse(node), "asyncorm.native")
        else:
            self.generic_visit(node)

    def _instead(self, target: ast.expr, call: ast.Call | None) -> str:
        """What to write for a function that is called in a thread."""
        if self._is_of_others(target):
            return "nothing, if it is to block: the ORM is not in it"
        given = [ast.unparse(each) for each in (*call.args, *call.keywords)] if call else []
        arguments = f"({', '.join(given)})" if call else ""
        if isinstance(target, ast.Name) and target.id in ("list", "tuple") and len(given) == 1:
            return f"await {given[0]}.anative()"
        begin = "await " if call else ""
        native = f"{begin}asyncorm.native({ast.unparse(target)}){arguments}"
        if not isinstance(target, ast.Attribute) or target.attr not in _with_twins():
            return f"{native}, if it uses the ORM"
        owner = ast.unparse(target.value)
        twin = f"{begin}{owner}.{self._prefix}{target.attr}{arguments}"
        if target.attr in _OF_ORM_ALONE or any(part in owner for part in _OF_QUERYSETS):
            return twin
        return f"{twin} of a model or queryset, else {native}, if it uses the ORM"

    def _is_of_others(self, target: ast.expr) -> bool:
        full = self._full(target)
        standard = full.partition(".")[0] in sys.stdlib_module_names
        return full == "open" or (standard and self._names.root_is_imported(full))

    def _add(self, node: ast.expr, what: str, instead: str) -> None:
        self.found.append(Hop(node.lineno, shortened(what, 80), shortened(instead, 160)))


@cache
def _with_twins() -> frozenset[str]:
    """Methods of Django's that have an a* twin."""
    names = {name for cls in (QuerySet, Model) for name in dir(cls)}
    return frozenset({name for name in names if f"a{name}" in names} | {*_RELATED})
