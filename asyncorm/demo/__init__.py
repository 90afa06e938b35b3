"""The demo, and the PostgreSQL server that demo and tests run on."""
