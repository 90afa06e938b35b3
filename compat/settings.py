"""Settings of one worker's run of Django's test suite; Django's runner adds the rest itself."""

import json
import os

from test_sqlite import *  # noqa: F403  (what Django's own test settings have)

_run = json.loads(os.environ["ASYNCORM_COMPAT"])

# Names of their own, because workers share the server.
DATABASES = {
    alias: {**_run["database"], "ENGINE": _run["engine"], "NAME": f"{_run['prefix']}_{alias}"}
    for alias in ("default", "other")
}

if _run["mode"] != "baseline":
    ASYNCORM = {"SWAP_MANAGERS": True, "STATEMENT_CACHE": _run["cache"]}
if _run["mode"] == "requests":
    ASYNCORM |= {"NATIVE_HANDLER": True, "NATIVE_VIEWS": True, "NATIVE_MIDDLEWARE": "__all__"}
