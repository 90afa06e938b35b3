"""A server that is farther away: a proxy, in a process of its own, that delays what passes.

`python -m demo.far HOST PORT SECONDS` prints the port that it listens on and serves until
its standard input is closed.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def proxy(host: str, port: int, delay: float) -> Iterator[int]:
    """The port on 127.0.0.1 of a proxy to a PostgreSQL server.

    Args:
        host: a name, an address, or the folder of the server's socket.
        delay: seconds, each way.
    """
    command = [sys.executable, "-m", __name__, host, str(port), str(delay)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # the terminal's Ctrl-C is for us, not for it
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.stdin.close()


async def _serve(host: str, port: int, delay: float) -> None:
    loop = asyncio.get_running_loop()

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                loop.call_later(delay, sink.write, data)
        except OSError:
            pass
        loop.call_later(delay, sink.close)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if host.startswith("/"):
            back, there = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        else:
            back, there = await asyncio.open_connection(host, port)
        await asyncio.gather(pump(reader, there), pump(back, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    ended = asyncio.Event()
    loop.add_reader(0, ended.set)  # nothing comes but the end
    await ended.wait()
    os._exit(0)  # whatever is still open


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
