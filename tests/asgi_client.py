"""One request to an ASGI application in this process, as a server makes it."""

import asyncio
from typing import Any, NamedTuple


class Answer(NamedTuple):
    status: int
    headers: list[tuple[bytes, bytes]]
    parts: list[bytes]

    @property
    def body(self) -> str:
        return b"".join(self.parts).decode()

    @property
    def cookies(self) -> dict[str, str]:
        found = {}
        for name, value in self.headers:
            if name.lower() == b"set-cookie":
                key, _, rest = value.decode().partition("=")
                found[key] = rest.partition(";")[0]
        return found


def scope(path: str, method: str = "GET", **headers: str) -> dict[str, Any]:
    path, _, query = path.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [
            (name.replace("_", "-").encode(), value.encode())
            for name, value in {"host": "testserver", **headers}.items()
        ],
        "client": ("127.0.0.1", 1),
        "server": ("testserver", 80),
    }


async def ask(
    app: Any,
    path: str,
    *,
    method: str = "GET",
    body: bytes = b"",
    gone: asyncio.Event | None = None,
    **headers: str,
) -> Answer:
    """The answer to a request whose client stays until it is answered, or until `gone`."""
    asked = False
    gone = gone or asyncio.Event()
    messages: list[Any] = []

    async def receive() -> Any:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": body}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        messages.append(message)

    if body:
        headers["content_length"] = str(len(body))
    await app(scope(path, method, **headers), receive, send)
    if not messages:
        return Answer(0, [], [])
    start, *rest = messages
    return Answer(
        start["status"], list(start["headers"]), [m["body"] for m in rest if m.get("body")]
    )
