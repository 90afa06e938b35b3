"""Install the benchmark's environment: asyncorm and tools, then each peer for itself.

Run by the environment's own Python. A peer must not change the versions of what all share.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


def pip(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PIP, *args], capture_output=True, text=True, check=False)


def main() -> None:
    """Install, and write why a peer is missing into the file named on the command line."""
    root = HERE.parents[1]
    done = pip("install", "-q", "-e", f"{root}[demo]", "-r", str(HERE / "requirements.txt"))
    if done.returncode:
        raise SystemExit(done.stderr)
    missing: dict[str, str] = {}
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        frozen = pip("freeze", "--exclude-editable").stdout
        constraints.write(frozen)
        constraints.flush()
        for line in (HERE / "peers.txt").read_text().splitlines():
            requirement = line.split("#")[0].strip()
            if not requirement:
                continue
            done = pip("install", "-q", "-c", constraints.name, requirement)
            if done.returncode:
                lines = [text for text in done.stderr.splitlines() if "ERROR" in text]
                name = requirement.split("[")[0].split(">")[0].strip()
                missing[name] = (lines or done.stderr.splitlines() or ["unknown reason"])[-1]
                print(f"Left out: {requirement}: {missing[name]}")
    Path(sys.argv[1]).write_text(json.dumps(missing, indent=1) + "\n")


if __name__ == "__main__":
    main()
