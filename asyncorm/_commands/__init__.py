"""The subcommands of `manage.py asyncorm`, a module each.

A module has `add_arguments(parser)` and `run(options, write)`, whose `write` prints a line.
"""

# Name: what it does, in the words of --help.
SUBCOMMANDS = {
    "status": "settings in force, versions, connections to expect, what is off and why, "
    "what of Django is replaced",
    "hops": "what hops to a thread in the project's code, and what to write instead",
    "sizing": "connections that the settings open in all, against what the servers allow",
    "docs": "the documentation of this version, at the place that an error names",
    "live": "what happens now in a running service: pools, who holds what, the last requests",
    "bench": "a get, a list and a hundred gets at once, Django's against native ones; reads only",
}
