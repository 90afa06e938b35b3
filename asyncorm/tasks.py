"""Which tasks do nothing but wait for the current one.

Before Python 3.12 `asyncio.wait_for()` runs what it is given in a task of its own. That one stands
for the task that waits; those of `gather()` and task groups stand for themselves.

Names of asyncio's that are not documented, and why: `Task._callbacks`, `Future._callbacks` and
`asyncio.tasks._release_waiter` tell such a task from others, and who waits. Without them it has the
connections that any child task has.
"""

from __future__ import annotations

import sys
from asyncio import Task, current_task, tasks
from collections.abc import Iterator
from typing import Any

_HAS_TASK = sys.version_info < (3, 12)
_release_waiter = getattr(tasks, "_release_waiter", None)


def represented(task: Task[Any] | None) -> Iterator[Task[Any]]:
    """The tasks that `task` stands for, nearest first."""
    while _HAS_TASK and task is not None and (task := _waiting_for(task)) is not None:
        yield task


def _waiting_for(task: Any) -> Task[Any] | None:
    callbacks = getattr(task, "_callbacks", None)
    if not callbacks or getattr(callbacks[0][0], "func", None) is not _release_waiter:
        return None
    waiter = callbacks[0][0].args[0]
    for wake_up, _ in getattr(waiter, "_callbacks", None) or ():
        if isinstance(owner := getattr(wake_up, "__self__", None), Task):
            return owner
    return None


def current_and_represented() -> list[Task[Any] | None]:
    """The current task, and those that it stands for."""
    task = current_task()
    return [task, *represented(task)] if _HAS_TASK and _waiting_for(task) is not None else [task]
