"""A base for context managers that are used with `with` and with `async with` alike."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import TypeVar

T = TypeVar("T")


class EitherWay(AbstractContextManager[T, None], AbstractAsyncContextManager[T, None]):
    """Entering and leaving await nothing: subclasses define `__enter__` and `__exit__`."""

    @abstractmethod
    def __exit__(self, *exc: object) -> None: ...

    async def __aenter__(self) -> T:
        return self.__enter__()

    async def __aexit__(self, *exc: object) -> None:
        self.__exit__(*exc)
