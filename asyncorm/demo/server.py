"""Runs a command with a temporary PostgreSQL server: `python -m asyncorm.demo.server COMMAND ...`.

The command finds the server by libpq's environment variables (PGHOST, PGUSER, ...), so that Django
needs nothing but `"NAME": "postgres"`. The server and its data are gone when the command ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from .postgres import ServerError, postgres_server

_VARIABLES = {
    "PGHOST": "HOST",
    "PGPORT": "PORT",
    "PGUSER": "USER",
    "PGPASSWORD": "PASSWORD",
    "PGDATABASE": "NAME",
}


def main(command: Sequence[str]) -> int | str:
    """Run the command; its exit code, or why there is none."""
    if not command:
        return "usage: python -m asyncorm.demo.server COMMAND ..."
    try:
        with postgres_server(own=True) as server:
            variables = {name: str(server.settings[key]) for name, key in _VARIABLES.items()}
            process = subprocess.Popen(command, env={**os.environ, **variables})
            # The terminal's Ctrl-C reaches the command, too: the server goes after it.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, lambda *_: process.terminate())
            return process.wait()
    except (ServerError, OSError) as error:
        return f"asyncorm.demo.server: {error}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
