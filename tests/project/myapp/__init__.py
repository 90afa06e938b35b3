"""The app of the race: a table with a unique key and the command `sync_myapp`."""
