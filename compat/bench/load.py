"""The client of the HTTP measurement, a process for itself: prints the requests per second."""

from __future__ import annotations

import asyncio
import sys
import time

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Client(asyncio.Protocol):
    """Asks again as soon as it has an answer, on one connection."""

    def __init__(self, failed: asyncio.Future[None]) -> None:
        self.count = 0
        self.failed = failed
        self.data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.transport.write(REQUEST)

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, separator, body = self.data.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().split(b"content-length: ", 1)[1].split(b"\r\n", 1)[0])
        if len(body) < length:
            return
        if not head.startswith(b"HTTP/1.1 200") and not self.failed.done():
            self.failed.set_exception(RuntimeError(self.data.decode(errors="replace")))
        self.data = b""
        self.count += 1
        self.transport.write(REQUEST)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.failed.done():
            self.failed.set_exception(exc or RuntimeError("The server closed the connection."))


async def main(port: int, clients: int, seconds: float) -> float:
    """Requests answered per second, after a warm-up of a quarter of the time."""
    loop = asyncio.get_running_loop()
    failed = loop.create_future()
    protocols = [
        (await loop.create_connection(lambda: Client(failed), "127.0.0.1", port))[1]
        for _ in range(clients)
    ]
    await asyncio.wait([failed], timeout=seconds / 4)
    before, began = sum(each.count for each in protocols), time.perf_counter()
    await asyncio.wait([failed], timeout=seconds)
    count, took = sum(each.count for each in protocols) - before, time.perf_counter() - began
    if failed.done():
        failed.result()
    failed.cancel()
    return count / took


if __name__ == "__main__":
    print(asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))))
