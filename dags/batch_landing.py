"""Where COPY brings a file's records: to its table; or, where their columns are not the table's, to one of ours first.

Such a table has the file's columns in its order: with the types that they have in the table that the file is for, or as
text, if that has no such column or PostgreSQL would not read it. From it an INSERT brings the rows to the table, in the
order of the file, and there its rules are looked at.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from batch_file import BatchFile
from batch_format import EPOCHS
from psycopg import Cursor, sql

# The column that keeps those of a file that the table does not have.
EXTRA_COLUMN = "extra"
NAME_BYTES = 63  # PostgreSQL would cut a longer one
# The column of ours that counts the records.
ORDER = "order of the file"
SYSTEM_COLUMNS = ("tableoid", "ctid", "xmin", "cmin", "xmax", "cmax")
# Why numbers of rows may differ.
LOST = "Does a trigger of the table leave rows out? If not, this is a mistake in the loader: please report it."

CREATE = "CREATE TEMPORARY TABLE {name} ON COMMIT DROP AS SELECT {columns} FROM {target} WITH NO DATA"
# CACHE: as in sql/ddl/0002. The numbers are of one session, so they are in the order of the file.
ADD_ORDER = "ALTER TABLE {name} ADD {order} bigint GENERATED ALWAYS AS IDENTITY (CACHE 1000)"
ADD_CHECK = "ALTER TABLE {name} ADD CONSTRAINT {constraint} CHECK ({check})"
MOVE = "INSERT INTO {target} ({columns}) SELECT {sources} FROM {name} ORDER BY {order} ASC"
# Numbers that may have a fraction, domains over any among them.
COLUMNS = """
SELECT
    attname::text,
    format_type(atttypid, atttypmod),
    typcategory = 'N' AND (typtype = 'd' OR typname !~ '^(int[248]|oid|reg.*)$')
FROM pg_attribute INNER JOIN pg_type ON pg_type.oid = atttypid
WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped
"""


class Table(NamedTuple):
    """A table by its one name, however it was spelled."""

    schema: str
    name: str

    def __str__(self) -> str:
        """As the ledger has it."""
        return f"{self.schema}.{self.name}"

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(self.schema, self.name)

    @property
    def quoted(self) -> str:
        """For a cast to regclass."""
        return self.identifier.as_string(None)

    @property
    def quarantine(self) -> "Table":
        return Table(self.schema, f"{self.name}_rejects")


class Conversion(ABC):
    """How a text becomes a value that PostgreSQL would not read.

    :param type: of the column, such as timestamptz.
    """

    type: str

    @property
    @abstractmethod
    def reason(self) -> str:
        """What is wrong with a text that it does not take."""

    @abstractmethod
    def value(self, received: sql.Composable) -> sql.Composable:
        """The expression of the value."""

    @abstractmethod
    def is_whole(self, received: sql.Composable) -> sql.Composable:
        """The condition that the value is all that was received, or that nothing was."""


@dataclass(frozen=True)
class DecimalComma(Conversion):
    """A number with a comma before its fraction."""

    type: str
    reason = "not a number with a decimal comma and no other sign in it"

    def value(self, received: sql.Composable) -> sql.Composable:
        return sql.SQL("translate({}, ',', '.')::{}").format(received, sql.SQL(self.type))

    def is_whole(self, received: sql.Composable) -> sql.Composable:
        return sql.SQL(
            "CASE WHEN {0} IS NULL THEN true"
            " WHEN {0} ~ '^ *[-+]?([0-9]+(,[0-9]*)?|,[0-9]+)([eE][-+]?[0-9]+)? *$' THEN ({1}) IS NOT NULL"
            " ELSE false END"
        ).format(received, self.value(received))


@dataclass(frozen=True)
class Instant(Conversion):
    """An instant that is written in a way of its own.

    :param pattern: of to_timestamp, or one of EPOCHS.
    """

    type: str
    pattern: str

    @property
    def reason(self) -> str:
        if self.pattern in EPOCHS:
            return f"not a number of {EPOCHS[self.pattern][1]} since 1970 that the column holds exactly"
        return f"not a time as the pattern {self.pattern} reads and writes it"

    def value(self, received: sql.Composable) -> sql.Composable:
        if self.pattern in EPOCHS:
            instant = sql.SQL("to_timestamp({}::double precision / {})").format(received, EPOCHS[self.pattern][0])
        else:
            instant = sql.SQL("to_timestamp({}, {})").format(received, self.pattern)
        return sql.SQL("{}::{}").format(instant, sql.SQL(self.type))

    def is_whole(self, received: sql.Composable) -> sql.Composable:
        # to_timestamp takes what is almost right, and leaves out what follows; a column may have no room for fractions.
        instant = sql.SQL("({})::timestamptz").format(self.value(received))
        if self.pattern in EPOCHS:
            same = sql.SQL("{0} ~ '^-?[0-9]+([.][0-9]+)?$' AND extract(epoch FROM {1}) * {2} = {0}::numeric").format(
                received, instant, EPOCHS[self.pattern][0]
            )
        else:
            same = sql.SQL("to_char({}, {}) = {}").format(instant, self.pattern, received)
        return sql.SQL("{} IS NULL OR ({}) IS TRUE").format(received, same)


@dataclass(frozen=True)
class Landing:
    """The table that COPY writes to.

    :param target: the table that the file is for.
    :param table: the same, or one that goes with the transaction.
    :param columns: of the table, in the order of the file.
    :param conversions: of the columns that are text there, and something else in the target.
    :param sources: of each column of the target what it is filled from; empty when it is the table itself.
    """

    target: Table
    table: Table
    columns: Sequence[str]
    conversions: Mapping[str, Conversion] = field(default_factory=dict)
    sources: Mapping[str, sql.Composable] = field(default_factory=dict)

    @classmethod
    def of(cls, cur: Cursor[Any], target: Table, file: BatchFile, extra: Sequence[str], load_id: int) -> "Landing":
        """Where a file has to go.

        :param extra: columns of it that the target does not have.
        :raises ValueError: what is declared does not fit a column's type.
        """
        declared = file.format
        has_conversions = declared.decimal != "." or not declared.timestamps.keys().isdisjoint(file.columns)
        if not extra and not has_conversions:
            return cls(target, target, file.columns)
        cur.execute(COLUMNS, (target.quoted,))
        found = cur.fetchall()
        types: dict[str, str] = {column: type_ for column, type_, _ in found}
        conversions: dict[str, Conversion] = {
            column: Instant(types[column], pattern)
            for column, pattern in declared.timestamps.items()
            if column in file.columns
        }
        if declared.decimal == ",":
            numbers = [column for column, _, may_have_fraction in found if may_have_fraction and column in file.columns]
            if money := [column for column in numbers if types[column] == "money"]:
                raise ValueError(
                    f"{target}: with decimal ',' {', '.join(money)} can't be of type money, which PostgreSQL reads as "
                    f"the server's locale has it: let it be numeric"
                )
            conversions |= {column: DecimalComma(types[column]) for column in numbers}
        if not extra and not conversions:
            return cls(target, target, file.columns)
        columns: list[str] = []
        sources: dict[str, sql.Composable] = {}
        kept: dict[str, sql.Composable] = {}
        for number, (name, column) in enumerate(zip(file.names, file.columns, strict=True), 1):
            if column in extra:
                columns.append(_free_name(name, number, {*columns, *types, *file.columns, *SYSTEM_COLUMNS, ORDER}))
                kept[name] = sql.Identifier(columns[-1])
            else:
                columns.append(column)
                received = sql.Identifier(column)
                sources[column] = conversions[column].value(received) if column in conversions else received
        if kept and declared.extra == "keep":
            sources[EXTRA_COLUMN] = sql.SQL("jsonb_object({}::text[], ARRAY[{}]::text[])").format(
                list(kept), sql.SQL(", ").join(kept.values())
            )
        landing = cls(target, Table("pg_temp", f"de_dw_load_{load_id}_file"), columns, conversions, sources)
        cur.execute(landing.like(landing.table.identifier, columns))
        names = {"name": landing.table.identifier, "order": sql.Identifier(ORDER)}
        cur.execute(sql.SQL(ADD_ORDER).format(**names))
        for number, (column, conversion) in enumerate(conversions.items()):
            check = conversion.is_whole(sql.Identifier(column))
            cur.execute(
                sql.SQL(ADD_CHECK).format(constraint=sql.Identifier(f"as_received_{number}"), check=check, **names)
            )
        return landing

    def like(self, name: sql.Identifier, columns: Sequence[str]) -> sql.Composed:
        """The statement that makes another temporary table with these of the columns."""
        shape = [
            sql.SQL("{}").format(sql.Identifier(column))
            if not self.sources or (column in self.sources and column not in self.conversions)
            else sql.SQL("NULL::text AS {}").format(sql.Identifier(column))
            for column in columns
        ]
        return sql.SQL(CREATE).format(name=name, columns=sql.SQL(", ").join(shape), target=self.target.identifier)

    def move(self, cur: Cursor[Any], rows: int) -> int:
        """Bring what was copied to the target, in its order, so that the next can come.

        :param rows: that COPY brought.
        :returns: how many came to the target.
        """
        if not self.sources:
            return rows
        statement = sql.SQL(MOVE).format(
            target=self.target.identifier,
            columns=sql.SQL(", ").join(map(sql.Identifier, self.sources)),
            sources=sql.SQL(", ").join(self.sources.values()),
            name=self.table.identifier,
            order=sql.Identifier(ORDER),
        )
        cur.execute(statement)
        moved = cur.rowcount
        cur.execute(sql.SQL("TRUNCATE {}").format(self.table.identifier))
        return moved

    def drop(self, cur: Cursor[Any]) -> None:
        """The transaction may go on."""
        if self.sources:
            cur.execute(sql.SQL("DROP TABLE {}").format(self.table.identifier))


def copy_statement(landing: Landing, file: BatchFile, *, has_header: bool) -> sql.Composed:
    """COPY FROM STDIN of a file's text, which is in UTF-8.

    :param has_header: the text that is sent begins with a header line.
    """
    options: sql.Composable = sql.SQL("")
    if not file.dialect.is_default:
        declared = file.format
        options = sql.SQL(", DELIMITER {}, QUOTE {}, NULL {}").format(declared.delimiter, declared.quote, declared.null)
    return sql.SQL("COPY {} ({}) FROM STDIN WITH (FORMAT csv, HEADER {}, ENCODING 'UTF8'{})").format(
        landing.table.identifier, sql.SQL(", ").join(map(sql.Identifier, landing.columns)), has_header, options
    )


def _free_name(name: str, number: int, taken: set[str]) -> str:
    """What a column is called that the target does not have: as in the file, for messages, if that can be a name.

    :param number: which column of the file it is, from 1.
    """
    free = name if 0 < len(name.encode()) <= NAME_BYTES else f"column {number}"
    while free in taken:
        free = f"column {number}" if free == name else f"{free}_"
    return free
