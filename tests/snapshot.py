"""Snapshots of a whole test database: what changed since, and everything back as it was."""

from typing import Any, LiteralString

import psycopg
from psycopg import sql

TABLES: LiteralString = """
    SELECT c.relname, array_agg(a.attname ORDER BY a.attnum)
    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
    WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace
      AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
      AND c.relname <> 'django_migrations'
    GROUP BY c.relname ORDER BY c.relname
"""
SEQUENCES: LiteralString = """
    SELECT sequencename, last_value FROM pg_sequences WHERE schemaname = 'public' ORDER BY 1
"""


class Snapshot:
    """The rows of every table, and every sequence, of one database at the time of its making.

    It uses a connection of its own: a test's transaction, or its lack of one, is not its concern.
    """

    def __init__(self, connection: psycopg.Connection) -> None:
        self.connection = connection
        with connection.transaction():
            tables = dict(connection.execute(TABLES).fetchall())
            self.columns = {
                name: sql.SQL("{} ({})").format(
                    sql.Identifier(name), sql.SQL(", ").join(map(sql.Identifier, columns))
                )
                for name, columns in tables.items()
            }
            # Whole tables as text, so that one statement says which of them changed.
            self.digests = sql.SQL(" UNION ALL ").join(
                sql.SQL("SELECT {}, sum(hashtextextended(t::text, 0)) FROM {} t").format(
                    sql.Literal(name), sql.Identifier(name)
                )
                for name in tables
            )
            self.rows = {name: self.copy(name) for name in tables}
            self.digest = dict(connection.execute(self.digests).fetchall())
            self.sequences = connection.execute(SEQUENCES).fetchall()

    def copy(self, name: str) -> bytes:
        with self.connection.cursor().copy(
            sql.SQL("COPY {} TO STDOUT").format(self.columns[name])
        ) as copy:
            return b"".join(copy)

    def changed(self) -> list[str]:
        # In the order of the snapshot: a plan with parallel workers has none.
        now = dict(self.connection.execute(self.digests).fetchall())
        return [name for name in self.rows if now[name] != self.digest[name]]

    def changes(self) -> dict[str, Any]:
        """The rows of the tables that are not as they were, and the sequences."""
        with self.connection.transaction():
            tables = {
                name: sorted(self.copy(name).decode().splitlines()) for name in self.changed()
            }
            return tables | {"sequences": self.connection.execute(SEQUENCES).fetchall()}

    def restore(self, alone: bool = False) -> list[str]:
        """Put the changed tables' rows back in one transaction; say which tables those were.

        Args:
            alone: as a TRUNCATE does, have it fail where another transaction has used them.
        """
        with self.connection.transaction():
            if alone:
                tables = sql.SQL(", ").join(map(sql.Identifier, self.rows))
                self.connection.execute(sql.SQL("LOCK TABLE {}").format(tables))
            changed = self.changed()
            for name in changed:
                self.connection.execute(sql.SQL("DELETE FROM {}").format(sql.Identifier(name)))
            for name in changed:
                command = sql.SQL("COPY {} FROM STDIN").format(self.columns[name])
                with self.connection.cursor().copy(command) as copy:
                    copy.write(self.rows[name])
            self.connection.execute(
                "SELECT setval(quote_ident(name)::regclass, coalesce(value, 1), value IS NOT NULL)"
                " FROM unnest(%s::text[], %s::bigint[]) AS s (name, value)",
                [[name for name, _ in self.sequences], [value for _, value in self.sequences]],
            )
        return changed
