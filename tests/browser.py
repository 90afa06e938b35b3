"""A headless Chromium that looks at pages, driven over its pipe (DevTools protocol): no package."""

import asyncio
import json
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import count
from typing import Any

TIMEOUT = 60  # seconds: reached only when something is broken
WIDTHS = (1280, 390)  # pixels: a laptop's window, a phone
NAMES = ("chromium-headless-shell", "chrome-headless-shell", "chromium", "google-chrome")
# It reads commands from its file 3 and answers on 4.
LAUNCH = 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'
# Elements that make the page wider than its window; those that scroll by themselves don't.
OVERFLOW = """(width => document.documentElement.scrollWidth <= width ? [] :
    [...document.querySelectorAll("body *")]
        .filter(each => each.getBoundingClientRect().right > width + 1)
        .map(each => each.outerHTML.slice(0, 80)).slice(0, 5).concat("wider than " + width))"""


def program() -> str | None:
    """Where the browser is: ASYNCORM_TEST_BROWSER, or one of its names on PATH."""
    found = (os.environ.get("ASYNCORM_TEST_BROWSER"), *map(shutil.which, NAMES))
    return next(filter(None, found), None)


class Navigated(Exception):
    """The page that was asked is another one by now."""


class Page:
    """The one page of a browser of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = count(1)
        self._session: dict[str, str] = {}
        self._answers: dict[int, asyncio.Future[Any]] = {}

    async def listen(self) -> None:
        """Take what the browser says, until it ends."""
        assert self._process.stdout is not None
        with suppress(asyncio.IncompleteReadError):
            while True:
                message = json.loads((await self._process.stdout.readuntil(b"\0"))[:-1])
                if answer := self._answers.pop(message.get("id"), None):
                    answer.set_result(message)

    async def start(self) -> None:
        """Open an empty tab."""
        target = await self.command("Target.createTarget", url="about:blank")
        self._session = await self.command("Target.attachToTarget", flatten=True, **target)

    async def command(self, method: str, **params: Any) -> Any:
        """Send a command of the DevTools protocol; its result."""
        assert self._process.stdin is not None
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": params, **self._session}
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        async with asyncio.timeout(TIMEOUT):
            found = await answer
        if "error" in found:
            raise Navigated(found["error"]["message"])
        return found["result"]

    async def open(self, url: str) -> None:
        """Go there from another page, and wait until everything is loaded."""
        found = await self.command("Page.navigate", url=url)
        assert not found.get("errorText"), f"{url}: {found['errorText']}"
        # Asked again and again: the event that says so is not sent for each page (seen).
        await self.until(f"location.href == {json.dumps(url)} && document.readyState == 'complete'")

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON has it."""
        found = await self.command("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Wait until the expression is true, also of a page that renews itself; its value."""
        async with asyncio.timeout(TIMEOUT):
            while True:
                with suppress(Navigated):
                    if found := await self.evaluate(expression):
                        return found
                await asyncio.sleep(0.05)

    async def overflows(self, width: int) -> list[str]:
        """What reaches over the right edge of a window of that many pixels."""
        await self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        return await self.evaluate(f"{OVERFLOW}({width})")  # type: ignore[no-any-return]


@asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    """A page of a browser that ends with the block; program() says whether there is one."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            *("sh", "-c", LAUNCH, str(program()), "--headless", "--remote-debugging-pipe"),
            *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            f"--user-data-dir={profile}",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=2**24,
            start_new_session=True,
        )
        page = Page(process)
        listening = asyncio.create_task(page.listen())
        try:
            await page.start()
            yield page
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # with its helpers
            await process.wait()
            await listening
