"""A base for context managers that are used with `with` and with `async with` alike."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")


class EitherWay(AbstractContextManager[T, None], AbstractAsyncContextManager[T, None]):
    """Entering and leaving await nothing: subclasses define `__enter__` and `__exit__`."""

    async def __aenter__(self) -> T:
        return self.__enter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(exc_type, exc, traceback)
