"""Where COPY brings a file's records: to its table; or, where their columns are not the table's, to one of ours first.

Such a table has the file's columns in its order, with the types, NOT NULL and CHECK constraints of the table that the
file is for, so that a bad record is found in it with line, column and value, as it would be there. From it one INSERT
brings the rows to the table, in the order of the file.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from batch_file import BatchFile
from batch_format import EPOCH
from batch_rejects import LOST, Table
from batch_store import BatchError
from psycopg import Cursor, sql

# The column that keeps those of a file that the table does not have.
EXTRA_COLUMN = "extra"
NAME_BYTES = 63  # PostgreSQL would cut a longer one
AS_RECEIVED = " as received"
OWN = "order of the file"

COLUMNS = """
SELECT attname::text, format_type(atttypid, atttypmod), attnotnull FROM pg_attribute
WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped
"""
CHECKS = """
SELECT c.conname, pg_get_constraintdef(c.oid), array_agg(a.attname::text)
FROM pg_constraint AS c INNER JOIN pg_attribute AS a ON a.attrelid = c.conrelid AND a.attnum = ANY (c.conkey)
WHERE c.conrelid = %s::regclass AND c.contype = 'c'
GROUP BY c.oid
ORDER BY c.conname ASC
"""
# IMMUTABLE, as a generated column wants it: which it is while a load lasts, whose time zone is pinned.
CONVERSION = """
CREATE FUNCTION {name} (received text) RETURNS {type} LANGUAGE sql IMMUTABLE STRICT AS {body}
"""


@dataclass
class Landing:
    """The table that COPY writes to.

    :param table: the file's own, or one that goes with the transaction.
    :param sources: of each column of the file's table, what it is filled from there; empty when it is the table itself.
    """

    table: Table
    sources: dict[str, sql.Composable] = field(default_factory=dict)
    _functions: list[sql.Composable] = field(default_factory=list)

    @classmethod
    def of(cls, cur: Cursor[Any], table: Table, file: BatchFile, extra: list[str], load_id: int) -> "Landing":
        """Where a file has to go. Gives `file.columns` the names that they have there.

        :param extra: columns of it that the table does not have.
        """
        converted = {column: how for column, how in file.format.timestamps.items() if column in file.columns}
        if not extra and not converted:
            return cls(table)
        landing = cls(Table("pg_temp", f"de_dw_load_{load_id}_file"))
        cur.execute(COLUMNS, (table.quoted,))
        shape = {name: (type_, not_null) for name, type_, not_null in cur.fetchall()}
        cur.execute(CHECKS, (table.quoted,))
        checks = [check for check in cur.fetchall() if set(check[2]) <= set(file.columns)]

        columns: list[sql.Composable] = []
        names: list[str] = []
        kept: list[tuple[str, sql.Composable]] = []
        for number, (name, column) in enumerate(zip(file.names, file.columns, strict=True)):
            if column in extra:
                # Its own name, in messages, where it is one.
                is_name = 0 < len(column.encode()) <= NAME_BYTES - len(AS_RECEIVED)
                as_column = (column if is_name else f"column {number + 1}") + AS_RECEIVED
                columns.append(sql.SQL("{} text").format(sql.Identifier(as_column)))
                kept.append((name, sql.Identifier(as_column)))
            elif column in converted:
                type_, not_null = shape[column]
                as_column = column[: NAME_BYTES - len(AS_RECEIVED)] + AS_RECEIVED
                columns += landing._convert(cur, load_id, number, column, as_column, type_, not_null, converted[column])
                landing.sources[column] = sql.Identifier(column)
            else:
                type_, not_null = shape[column]
                as_column = column
                columns.append(
                    sql.SQL("{} {}{}").format(
                        sql.Identifier(column), sql.SQL(type_), sql.SQL(" NOT NULL" if not_null else "")
                    )
                )
                landing.sources[column] = sql.Identifier(column)
            names.append(as_column)
        if kept and file.format.extra == "keep":
            landing.sources[EXTRA_COLUMN] = sql.SQL("jsonb_object({}::text[], ARRAY[{}]::text[])").format(
                [name for name, _ in kept], sql.SQL(", ").join(value for _, value in kept)
            )
        columns.append(sql.SQL("{} bigint GENERATED ALWAYS AS IDENTITY (CACHE 1000)").format(sql.Identifier(OWN)))
        columns += [
            sql.SQL("CONSTRAINT {} {}").format(
                sql.Identifier(name), sql.SQL(re.sub(r" (NOT VALID|NOT ENFORCED)$", "", definition))
            )
            for name, definition, _ in checks
            if not definition.endswith("NOT ENFORCED")
        ]
        cur.execute(
            sql.SQL("CREATE TEMPORARY TABLE {} ({}) ON COMMIT DROP").format(
                sql.Identifier(landing.table.name), sql.SQL(", ").join(columns)
            )
        )
        file.columns = names
        return landing

    def _convert(
        self,
        cur: Cursor[Any],
        load_id: int,
        number: int,
        column: str,
        as_column: str,
        type_: str,
        not_null: bool,
        pattern: str,
    ) -> list[sql.Composable]:
        """A column as received, and what becomes of it."""
        function = sql.Identifier("pg_temp", f"de_dw_load_{load_id}_conversion_{number}")
        if pattern == EPOCH:
            body = f"SELECT to_timestamp(received::double precision)::{type_}"
            same: sql.Composable = sql.SQL("true")
        else:
            quoted = sql.Literal(pattern).as_string(cur)
            body = f"SELECT to_timestamp(received, {quoted})::{type_}"
            # to_timestamp takes what is almost right, and leaves out what follows.
            same = sql.SQL("to_char({}::timestamptz, {}) = {}").format(
                sql.Identifier(column), pattern, sql.Identifier(as_column)
            )
        cur.execute(sql.SQL(CONVERSION).format(name=function, type=sql.SQL(type_), body=sql.Literal(body)))
        self._functions.append(function)
        return [
            sql.SQL("{} text").format(sql.Identifier(as_column)),
            sql.SQL("{} {} GENERATED ALWAYS AS ({}({})) STORED{}").format(
                sql.Identifier(column),
                sql.SQL(type_),
                function,
                sql.Identifier(as_column),
                sql.SQL(" NOT NULL" if not_null else ""),
            ),
            sql.SQL("CONSTRAINT {} CHECK ({})").format(sql.Identifier(f"{column} is {pattern}"[:NAME_BYTES]), same),
        ]

    def move(self, cur: Cursor[Any], table: Table, file: BatchFile, rows: int) -> None:
        """Bring the rows that were copied to the table, in their order.

        :raises BatchError: not all of them came there.
        """
        if not self.sources:
            return
        cur.execute(
            sql.SQL("INSERT INTO {} ({}) SELECT {} FROM {} ORDER BY {} ASC").format(
                table.identifier,
                sql.SQL(", ").join(map(sql.Identifier, self.sources)),
                sql.SQL(", ").join(self.sources.values()),
                self.table.identifier,
                sql.Identifier(OWN),
            )
        )
        if cur.rowcount != rows:
            raise BatchError(
                f"{file.path}: {cur.rowcount:,} of {rows:,} rows came to {table}. Nothing was loaded. {LOST}"
            )
        cur.execute(sql.SQL("DROP TABLE {}").format(self.table.identifier))
        for function in self._functions:
            cur.execute(sql.SQL("DROP FUNCTION {}").format(function))
