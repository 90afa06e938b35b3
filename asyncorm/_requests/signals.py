"""`request_started`, `request_finished` and `got_request_exception` of requests that we serve.

Django's own receivers run on the loop. If there are synchronous ones of other people, or if
anything of the request ran in its thread, all run in that thread, in their order, as on Django's
handler: only there `close_old_connections()` sees what was opened there. Where the request is made
inside a transaction block, those of other people take part in it.

The `send` of two signals is replaced by an attribute of the instance.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Callable
from typing import Any

from asgiref.sync import SyncToAsync, sync_to_async
from django.core.cache import caches, close_caches
from django.core.signals import got_request_exception, request_finished, request_started
from django.dispatch import Signal, dispatcher

from .. import bridge, patches
from .._sessions import scopes
from . import flow

Receiver = Callable[..., Any]


async def send(signal: Signal, sender: object, **named: Any) -> None:
    """Send a request's signal from a coroutine of the request."""
    receivers, asynchronous = signal._live_receivers(sender)
    named = {"signal": signal, "sender": sender, **named}
    others = [receiver for receiver in receivers if not _is_harmless(receiver)]
    if others and scopes.in_block():  # a thread could not take part in it
        await bridge.run(_call_all, others, named)
        receivers, others = [each for each in receivers if each not in others], []
    if others or has_thread():
        await sync_to_async(_call_all)(receivers, named)
    else:
        for receiver in receivers:
            if receiver is close_caches:
                if caches.all(initialized_only=True):  # one of them may block
                    await bridge.run(receiver, **named)
            else:
                receiver(**named)
    if asynchronous:
        run: Any = getattr(dispatcher, "_run_parallel", asyncio.gather)
        await run(*[receiver(**named) for receiver in asynchronous])


def has_thread() -> bool:
    """Whether anything of this request ran in its thread."""
    context = SyncToAsync.thread_sensitive_context.get(None)
    return context is not None and context in SyncToAsync.context_to_thread_executor


# Whose receivers do not block; Sentry's puts its event into a queue.
_HARMLESS = ("django.", "sentry_sdk.")


def _is_harmless(receiver: Receiver) -> bool:
    return (getattr(receiver, "__module__", None) or "").startswith(_HARMLESS)


def _call_all(receivers: list[Receiver], named: dict[str, Any]) -> None:
    for receiver in receivers:
        receiver(**named)


def _of_requests(signal: Signal, original: Callable[..., Any]) -> Callable[..., Any]:
    """In place of a signal's `send()`: what native code and the handler send goes by `send()`."""

    @functools.wraps(original)
    def replacement(sender: object, **named: Any) -> Any:
        running = flow.current()
        if running is None or scopes.current_task_or_none() is None:  # in a thread
            return original(sender, **named)
        if signal is request_finished and running.finished is not None:  # of response.close()
            running.finished.append(sender)
        elif bridge.in_native_code() and not scopes.in_block():
            bridge.await_(flow.while_handling(sys.exception(), send, signal, sender, **named))
        else:
            return original(sender, **named)
        return []

    return replacement


def install() -> None:
    """Replace `send()` of the two signals that Django sends from synchronous code, once."""
    for name, signal in (
        ("request_finished", request_finished),
        ("got_request_exception", got_request_exception),
    ):
        if "send" not in vars(signal):
            patches.replace(
                signal, "send", _of_requests(signal, signal.send),
                "Django's receivers of a request need no thread",
                label=f"django.core.signals.{name}",
            )  # fmt: skip


__all__ = ["has_thread", "install", "request_finished", "request_started", "send"]
