"""What happens to a file that COPY refused: its good records go to the table, its bad ones to the table's quarantine.

Which is which PostgreSQL decides, record by record: its own input functions, NOT NULL and CHECK constraints sort out
the bad ones first, thousands in one query, and then COPY takes the rest or names who is in the way. Before that
batch_file finds what is no record of CSV in UTF-8, and what COPY would take by changing or losing what was received,
such as stray quotes.
"""

import logging
import re
import struct
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, chain
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from batch_file import BatchFile, Records, fields
from batch_format import Dialect
from batch_landing import LOST, Conversion, Landing, Table, copy_statement
from batch_store import BatchError
from psycopg import Cursor, Error, ProgrammingError, sql
from psycopg.abc import Buffer
from psycopg.adapt import Dumper
from psycopg.pq import Format

log = logging.getLogger(__name__)

# How many rejects the error names when there are more than allowed.
LISTED = 10
# Records sent at once after the first of them was refused; then twice as many, and so on.
SHORT = 64
# Longest value in a message: the quarantine and the file have all of it.
VALUE_CHARACTERS = 80
# Errors that are about a value: wrong in itself or against a constraint; and some that a type, a CHECK or a trigger may
# raise for a value (a tsquery's syntax, something too deep or too long, RAISE EXCEPTION).
DATA_CLASSES = ("22", "23")
OTHER_DATA_ERRORS = ("42601", "54", "P0001")
# The same in PL/pgSQL's words.
DATA_CONDITIONS = sql.SQL(
    "data_exception OR integrity_constraint_violation OR syntax_error OR program_limit_exceeded OR raise_exception"
)

# A CSV record between parentheses is the text form of a row: the same quotes, the same NULL, but that \ and ) are
# escaped. So the input function of a row type calls those of its columns, with length and scale, as COPY does. The
# domain adds the table's rules. {own} is a name that nobody else has.
CREATE_GOOD_ROW = "CREATE DOMAIN {own_good} AS {own} CHECK ({rules})"
CREATE_RULE = "CREATE FUNCTION {name} ({columns}) RETURNS boolean LANGUAGE sql STABLE AS {body}"
CREATE_BROKEN_RULE = "CREATE FUNCTION {name} (record text) RETURNS integer LANGUAGE sql STABLE AS {body}"
# What 15 has instead of pg_input_error_info. PERFORM, because an assignment that failed once makes all later ones of
# the transaction slower.
CREATE_INPUT_ERROR_15 = """
CREATE FUNCTION {name} (record text, type_name text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE 'SELECT $1::' || type_name USING record;
    RETURN NULL;
EXCEPTION
    WHEN {data_errors} THEN RETURN sqlerrm;
END
$$
"""
CREATE_IS_GOOD_15 = """
CREATE FUNCTION {name} (record text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM record::{own_good};
    RETURN true;
EXCEPTION
    WHEN {data_errors} THEN RETURN false;
END
$$
"""
# What a column is that has to be converted, for the rules that look at it.
CREATE_CONVERTED = "CREATE FUNCTION {name} (received text) RETURNS {type} LANGUAGE plpgsql STABLE AS {body}"
CONVERTED = """
BEGIN
    RETURN CASE WHEN {is_whole} THEN {value} END;
EXCEPTION
    WHEN {data_errors} THEN RETURN NULL;
END
"""
FIND_BAD = "SELECT n::integer - 1 FROM unnest(%s) WITH ORDINALITY AS received (record, n) WHERE NOT {is_good}"
# Which rule is broken, by its number; -1 when it is not even a row.
FIND_RULE = """
SELECT CASE WHEN {error} IS NOT NULL THEN -1 ELSE {broken_rule}(record) END
FROM unnest(%s) WITH ORDINALITY AS received (record, n)
ORDER BY n ASC
"""
# Which field of a record is it that PostgreSQL does not take? Each as a row of its own, of the type of its column.
FIND_COLUMN = """
SELECT DISTINCT ON (n) n, column_number, error
FROM (
    SELECT n, column_number, {error} AS error
    FROM unnest(%s, %s::integer[], %s::integer[]) AS received (record, n, column_number)
) AS received
WHERE error IS NOT NULL
ORDER BY n ASC, column_number ASC
"""
# NOT NULL before CHECK, and these by name, as PostgreSQL does. Not enforced constraints came with 18. COPY alone can
# judge a CHECK whose columns differ in collation, and all of them where a trigger may change the row before.
RULES = """
SELECT NULL, format('null value in column "%%s"', attname), ARRAY[attname], ARRAY[]::text[]
FROM (SELECT attname::text FROM pg_attribute
    WHERE attrelid = %(table)s::regclass AND attnum > 0 AND attnotnull AND attname = ANY (%(columns)s)
    ORDER BY attnum) AS required
WHERE {no_trigger}
UNION ALL
SELECT expression, reason, names, types
FROM (SELECT pg_get_expr(conbin, conrelid) AS expression, format('violates check constraint "%%s"', conname) AS reason,
        array_agg(attname::text) AS names, array_agg(format_type(atttypid, NULL)) AS types
    FROM pg_constraint AS c INNER JOIN pg_attribute ON attrelid = conrelid AND attnum = ANY (conkey)
    WHERE conrelid = %(table)s::regclass AND contype = 'c' AND coalesce(to_jsonb(c) ->> 'conenforced', 'true') = 'true'
    GROUP BY c.oid, conbin, conrelid, conname
    HAVING array_agg(attname::text) <@ %(columns)s::text[] AND count(DISTINCT nullif(attcollation, 0)) < 2
    ORDER BY conname) AS checks
WHERE {no_trigger}
""".replace(
    "{no_trigger}",
    """NOT EXISTS (
    SELECT 1 FROM pg_trigger
    WHERE tgtype & 7 = 7 AND tgenabled <> 'D' -- FOR EACH ROW, BEFORE, INSERT
        AND (tgrelid = %(table)s::regclass OR tgrelid IN (SELECT relid FROM pg_partition_tree(%(table)s::regclass)))
)""",
)
# Where a COPY error happened. Only the value of the column at fault is kept: the rest of the line is not for logs.
# It is the last of the lines: a type or a trigger may have put its own before.
COPY_CONTEXT = re.compile(
    r'(?:\A|\n)COPY .+?, line (\d+)(?:, column (.+?)(?:: "(.*)"|: null input)?)?(?:: ".*")?$', re.DOTALL
)


class Rule(NamedTuple):
    """A NOT NULL or CHECK of the table: its expression if it is a CHECK, what is wrong with a row that breaks it, and
    the columns that it looks at, with their types; or that a column as received can be converted."""

    expression: str | None
    reason: str
    columns: list[str]
    types: list[str]
    is_as_received: bool = False


class Problem(NamedTuple):
    """What COPY said about a file: the line at whose end it stopped, the column and value if it named them."""

    line: int | None
    column: str | None
    value: str | None
    reason: str

    @classmethod
    def of(cls, error: Error) -> Self:
        match = COPY_CONTEXT.search(error.diag.context or "")
        line, column, value = match.groups() if match else (None, None, None)
        reason = error.diag.message_primary or str(error)
        return cls(int(line) if line else None, column or error.diag.column_name, value, reason)

    def __str__(self) -> str:
        where = f"line {self.line}" if self.line else "a line that it does not name"
        where += f", column {self.column}" if self.column else ""
        return f"{where}, value {self.value!r}: {self.reason}" if self.value else f"{where}: {self.reason}"


def is_about_data(error: Error) -> bool:
    """Whether the server refused a value, and not us, the table or the disk."""
    sqlstate = error.sqlstate or ""
    return sqlstate.startswith(DATA_CLASSES) or sqlstate.startswith(OTHER_DATA_ERRORS)


# What is wrong with a record: a text; what COPY said; None when PostgreSQL has to be asked again for the reason.
Verdict = str | Problem | None


@dataclass(frozen=True)
class Reject:
    """A record that is not loaded.

    :param line: of the file, on which it begins.
    :param data: as received, without the line end.
    :param column: at fault, if it is one.
    :param value: of this column as received.
    :param name: of this column in the file, if it is another.
    """

    line: int
    data: bytes
    column: str | None
    value: str | None
    reason: str
    name: str | None = None

    def __str__(self) -> str:
        where = f"line {self.line}" + (f", column {self.column}" if self.column else "")
        where += f" ({self.name!r} in the file)" if self.name is not None else ""
        if self.value:
            cut = self.value[:VALUE_CHARACTERS] + ("..." if len(self.value) > VALUE_CHARACTERS else "")
            where += f", value {cut!r}"
        return f"{where}: {self.reason}"


class Limit:
    """How many records of a file may be bad: a number, or a share of its records.

    :param max_rejects: 0 or more, or a percentage such as "1%" or "0.5%".
    :raises ValueError: it is neither.
    """

    def __init__(self, max_rejects: int | str) -> None:
        self.text = str(max_rejects).strip()
        number = self.text.removesuffix("%").strip()
        self.is_share = self.text.endswith("%")
        is_number = number.isascii() and number.replace(".", "", 1 if self.is_share else 0).isdigit()
        self.number = Fraction(number) if is_number else Fraction(-1)
        if not is_number or (self.is_share and self.number > 100):
            raise ValueError(f"max_rejects is a number of records or a percentage such as 1%, not {max_rejects!r}")

    def allows(self, rejects: int, records: int) -> bool:
        """Whether so many rejects are few enough among so many records, rejects included."""
        return rejects <= (self.number * records / 100 if self.is_share else self.number)


class _TextArray(list[bytes]):
    """Records to be sent as a text[]."""


class _TextArrayDumper(Dumper):
    """In the binary format and without a look at each record: psycopg's own way takes longer than COPY."""

    format = Format.BINARY
    oid = 1009

    def dump(self, obj: list[bytes]) -> Buffer:
        lengths = np.fromiter(map(len, obj), ">i4", len(obj)).tobytes()
        header = struct.pack(">5i", 1, 0, 25, len(obj), 1) if obj else struct.pack(">3i", 0, 0, 25)
        return header + b"".join(
            chain.from_iterable((lengths[4 * n : 4 * n + 4], record) for n, record in enumerate(obj))
        )


def printable(text: str) -> str:
    """A value may hold line ends or terminal codes: they must not write log lines of their own."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def load_good_records(
    cur: Cursor[Any], landing: Landing, file: BatchFile, limit: Limit, first_problem: str
) -> tuple[int, int]:
    """COPY the records that PostgreSQL takes, and keep the others in the table's quarantine.

    In the caller's transaction, which has the setting de_dw.load_id.

    :param first_problem: what COPY said about the file.
    :returns: rows loaded, records rejected.
    :raises BatchError: more are bad than the limit allows, there is no quarantine, or a record is not accounted for:
        undo what was written, none of it may stay.
    """
    quarantine = landing.target.quarantine
    if limit.number > 0:
        _check_quarantine(cur, quarantine)
    listed: list[Reject] = []
    rejects = records = lines = 0
    with _Sorter(cur, landing, file) as sorter:
        for chunk in _ahead(file.records()):
            # Once there are too many they are only counted; with max_rejects 0 one is too many.
            over = limit.number == 0 or not (limit.is_share or limit.allows(rejects, 0))
            # PostgreSQL names no line of what came by a table of ours: what the target refuses is still to be found.
            bad = sorter.sort(chunk, load=not over or (landing.table != landing.target and not rejects))
            explained = sorter.explain(chunk, bad if not over else dict(list(bad.items())[: LISTED - len(listed)]))
            if not over:
                _keep(cur, quarantine, explained)
            listed += explained[: LISTED - len(listed)]
            rejects += len(bad)
            records += len(chunk.data)
            lines += b"".join(chunk.data).count(file.newline[-1:]) + len(chunk.data)
        if limit.number == 0 or not limit.allows(rejects, records):
            raise BatchError(_refusal(file, limit, listed, first_problem, rejects, records))

    count = "SELECT count(*) FROM {} WHERE load_id = current_setting('de_dw.load_id')::bigint"
    cur.execute(sql.SQL(count).format(quarantine.identifier))
    ((kept,),) = cur.fetchall()
    if sorter.copied + kept != records or file.header_lines + lines != file.lines:
        raise BatchError(
            f"{file.path}: {sorter.copied:,} rows loaded and {kept:,} rejected are not the {records:,} records on "
            f"{file.lines:,} lines of the file. Nothing was loaded. {LOST}"
        )
    return sorter.copied, kept


def _ahead(chunks: Iterator[Records]) -> Iterator[Records]:
    """The same, the next one being cut while the server works on this one."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, chunks, None)
        while (chunk := following.result()) is not None:
            following = thread.submit(next, chunks, None)
            yield chunk


class _Sorter:
    """Says of the records of one file which of them its table takes. What it makes in the database goes at its end."""

    def __init__(self, cur: Cursor[Any], landing: Landing, file: BatchFile) -> None:
        self.cur = cur
        self.landing = landing
        self.columns = landing.columns
        self.file = file
        self.copied = 0
        self._functions: list[sql.Identifier] = []
        self._copy_statement = copy_statement(landing, file, has_header=True)
        cur.adapters.register_dumper(_TextArray, _TextArrayDumper)
        cur.execute("SELECT current_setting('de_dw.load_id')")
        ((load_id,),) = cur.fetchall()
        self._own = f"de_dw_load_{load_id}"
        self._row = self._name("row")
        self._tables = [self._row]
        good_row = self._name("good_row")
        cur.execute(landing.like(self._row, self.columns))
        self._converted = {
            column: self._create_converted(number, conversion)
            for number, (column, conversion) in enumerate(landing.conversions.items())
        }
        cur.execute(RULES, {"table": landing.target.quoted, "columns": self.columns})
        self.rules: list[Rule] = []
        for rule in [*self._conversion_rules(), *(Rule(*row) for row in cur.fetchall())]:
            if rule.expression is None or self._create_rule(rule):
                self.rules.append(rule)
        rules = [self._holds(number, sql.SQL("value")) for number in range(len(self.rules))]
        every = sql.SQL(" AND ").join([sql.SQL("true"), *rules])
        cur.execute(sql.SQL(CREATE_GOOD_ROW).format(own_good=good_row, own=self._row, rules=every))
        row = sql.SQL("record::{}").format(self._row)
        cases = [
            sql.SQL("WHEN NOT {} THEN {}").format(self._holds(number, row), number) for number in range(len(self.rules))
        ]
        broken = sql.SQL("SELECT CASE {} ELSE NULL END").format(sql.SQL(" ").join(cases))
        broken_rule = self._create(
            "broken_rule", CREATE_BROKEN_RULE, body=broken if cases else sql.SQL("SELECT NULL::integer")
        )

        # Names of ours have nothing in them that would have to be quoted.
        is_good: sql.Composable = sql.SQL(f"pg_input_is_valid(record, '{good_row.as_string(None)}')")
        self._error = "(pg_input_error_info(record, {type})).message"
        if cur.connection.info.server_version < 160000:
            is_good = sql.SQL("{}(record)").format(
                self._create("is_good", CREATE_IS_GOOD_15, own_good=good_row, data_errors=DATA_CONDITIONS)
            )
            function = self._create("input_error", CREATE_INPUT_ERROR_15, data_errors=DATA_CONDITIONS)
            self._error = f"{function.as_string(None)}(record, {{type}})"
        self._find_bad = sql.SQL(FIND_BAD).format(is_good=is_good)
        error = sql.SQL(self._error.format(type=f"'{self._row.as_string(None)}'"))
        self._find_rule = sql.SQL(FIND_RULE).format(error=error, broken_rule=broken_rule)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # else the rollback takes them away
            for what, names in (("TABLE", self._tables), ("FUNCTION", self._functions)):
                drop = sql.SQL("DROP {} {} CASCADE").format(sql.SQL(what), sql.SQL(", ").join(names))
                self.cur.execute(drop)

    def _name(self, suffix: str) -> sql.Identifier:
        return sql.Identifier("pg_temp", f"{self._own}_{suffix}")

    def _create(
        self, suffix: str, statement: str, *, body: sql.Composable | None = None, **names: Any
    ) -> sql.Identifier:
        name = self._name(suffix)
        literal = sql.Literal(body.as_string(self.cur)) if body else sql.SQL("")
        self.cur.execute(sql.SQL(statement).format(name=name, body=literal, **names))
        self._functions.append(name)
        return name

    def _create_converted(self, number: int, conversion: Conversion) -> sql.Identifier:
        """Make the function of what becomes of a text; NULL, if it is not all of it."""
        received = sql.SQL("received")
        body = sql.SQL(CONVERTED).format(
            is_whole=conversion.is_whole(received), value=conversion.value(received), data_errors=DATA_CONDITIONS
        )
        return self._create(f"converted_{number}", CREATE_CONVERTED, body=body, type=sql.SQL(conversion.type))

    def _conversion_rules(self) -> list[Rule]:
        """First that it can be converted: other rules would find NULL in its place."""
        return [
            Rule(
                sql.SQL("{0} IS NULL OR {1}({0}) IS NOT NULL").format(sql.Identifier(column), function).as_string(None),
                self.landing.conversions[column].reason,
                [column],
                ["text"],
                is_as_received=True,
            )
            for column, function in self._converted.items()
        ]

    def _create_rule(self, rule: Rule) -> bool:
        """Make the function that a CHECK is asked by. What can't be asked outside of the table is left to COPY."""
        columns = [
            sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(type_))
            for name, type_ in zip(rule.columns, rule.types, strict=True)
        ]
        try:
            with self.cur.connection.transaction():
                body = sql.SQL(f"SELECT {rule.expression}")
                self._create(f"rule_{len(self.rules)}", CREATE_RULE, body=body, columns=sql.SQL(", ").join(columns))
        except Error as error:
            # 54: a CHECK of more columns than a function may have. A cancelled statement or a full disk is not for us.
            if not (isinstance(error, ProgrammingError) or (error.sqlstate or "").startswith("54")):
                raise
            log.info("%s: %s: left to COPY: %s", self.file.path, rule.reason, error.diag.message_primary)
            return False
        return True

    def _holds(self, number: int, row: sql.Composable) -> sql.Composable:
        """The condition that a row keeps a rule."""
        rule = self.rules[number]
        columns = [sql.SQL("({}).{}").format(row, sql.Identifier(column)) for column in rule.columns]
        if rule.expression is not None and not rule.is_as_received:
            columns = [
                sql.SQL("{}({})").format(self._converted[name], column) if name in self._converted else column
                for name, column in zip(rule.columns, columns, strict=True)
            ]
        if rule.expression is None:
            return sql.SQL("{} IS NOT NULL").format(*columns)
        return sql.SQL("coalesce({}({}), true)").format(self._name(f"rule_{number}"), sql.SQL(", ").join(columns))

    def sort(self, chunk: Records, load: bool) -> dict[int, Verdict]:
        """The records that are bad, by their position, after the others were loaded where that is asked for."""
        bad: dict[int, Verdict] = dict(chunk.problems)
        places = [place for place in range(len(chunk.data)) if place not in bad] if bad else range(len(chunk.data))
        bad |= self._find(chunk, places)
        if load:
            bad |= self._copy(chunk, [place for place in places if place not in bad])
        return dict(sorted(bad.items()))

    def _find(self, chunk: Records, places: Sequence[int]) -> dict[int, Verdict]:
        """Those of them that are no row of the table, or one that breaks a rule of it."""
        try:
            with self.cur.connection.transaction():
                self.cur.execute(
                    self._find_bad, (_as_rows([chunk.data[place] for place in places], self.file.dialect),)
                )
                return {places[number]: None for (number,) in self.cur.fetchall()}
        except Error as error:
            if not is_about_data(error):
                raise
            # A type that can't be asked beforehand, a rule that fails instead of being false: COPY will tell.
            log.info("%s: the records are left to COPY: %s", self.file.path, error.diag.message_primary)
            return {}

    def _copy(self, chunk: Records, places: list[int]) -> dict[int, Verdict]:
        """Load them, but for those of which PostgreSQL says only now that it does not take them."""
        refused: dict[int, Verdict] = {}
        size = len(places)  # after a refusal short pieces, so that not all of the rest is sent again each time
        while places:
            refusal = self._try([chunk.data[place] for place in places[:size]])
            if refusal is None:
                places = places[size:]
                size *= 2
                continue
            problem, position = refusal
            if position is not None:
                refused[places.pop(position)] = problem
                size = position or SHORT
            elif min(size, len(places)) == 1:  # some constraints are looked at when all rows are there
                refused[places.pop(0)] = problem
            else:
                size = min(size, len(places)) // 2
        return refused

    def _try(self, records: list[bytes]) -> tuple[Problem, int | None] | None:
        """Load them, or say what is wrong with one of them, and its position if PostgreSQL named its line."""
        end = self.file.newline
        try:
            with self.cur.connection.transaction():
                with self.cur.copy(self._copy_statement) as copy:
                    # An empty header: without it COPY does not count the line ends within the first record.
                    copy.write(end + end.join(records) + end)
                self.copied += self.landing.move(self.cur, self.cur.rowcount)
                return None
        except Error as error:
            if not is_about_data(error):
                raise
            problem = Problem.of(error)
        if problem.line is None:
            return problem, None
        # COPY counts the first byte of a line end, within quotes too.
        last_lines = list(accumulate((record.count(end[:1]) + 1 for record in records), initial=1))
        position = bisect_left(last_lines, problem.line) - 1
        return problem, position if 0 <= position < len(records) else None

    def explain(self, chunk: Records, bad: dict[int, Verdict]) -> list[Reject]:
        """What is wrong with each of them, in the order of the file."""
        problems = {place: verdict for place, verdict in bad.items() if verdict is not None}
        asked = [place for place in bad if place not in problems]
        no_rows = []
        for place, verdict in zip(asked, self._broken_rules([chunk.data[place] for place in asked]), strict=True):
            values = fields(chunk.data[place], self.file.dialect)
            if isinstance(verdict, str):
                problems[place] = verdict
            elif verdict is not None and verdict >= 0:
                rule = self.rules[verdict]
                problems[place] = Problem(None, ", ".join(rule.columns), None, rule.reason)
            elif len(values) < len(self.columns):
                problems[place] = f'missing data for column "{self.columns[len(values)]}"'
            elif len(values) > len(self.columns):
                problems[place] = "extra data after last expected column"
            else:
                problems[place] = "no row of the table"
                no_rows.append(place)
        if no_rows:
            for number, column_number, reason in self._columns_at_fault([chunk.data[place] for place in no_rows]):
                problems[no_rows[number]] = Problem(None, self.columns[column_number], None, reason)
        return [self._reject(chunk, place, problems[place]) for place in sorted(problems)]

    def _broken_rules(self, records: list[bytes]) -> list[int | str | None]:
        """Of each the rule that it breaks, None if none, -1 when it is no row, or what evaluating the rules says."""
        if not records:
            return []
        try:
            with self.cur.connection.transaction():
                self.cur.execute(self._find_rule, (_as_rows(records, self.file.dialect),))
                return [number for (number,) in self.cur.fetchall()]
        except Error as error:
            if not is_about_data(error):
                raise
            if len(records) == 1:
                return [error.diag.message_primary or str(error)]
            half = len(records) // 2
            return [*self._broken_rules(records[:half]), *self._broken_rules(records[half:])]

    def _columns_at_fault(self, records: list[bytes]) -> list[tuple[int, int, str]]:
        """Number of the record, of the column, and what is wrong there."""
        names = [self._name(f"field_{number}") for number in range(len(self.columns))]
        if len(self._tables) == 1:
            for name, column in zip(names, self.columns, strict=True):
                self.cur.execute(self.landing.like(name, [column]))
            self._tables += names
        values = _TextArray()
        numbers: list[int] = []
        columns_: list[int] = []
        for number, record in enumerate(records):
            in_record = fields(record, self.file.dialect)
            values += in_record
            numbers += [number] * len(in_record)
            columns_ += range(len(in_record))
        type_ = f"'pg_temp.{self._own}_field_' || column_number"
        find = sql.SQL(FIND_COLUMN).format(error=sql.SQL(self._error.format(type=type_)))
        self.cur.execute(find, (_as_rows(values, self.file.dialect), numbers, columns_))
        return self.cur.fetchall()

    def _reject(self, chunk: Records, place: int, problem: "Problem | str") -> Reject:
        """With the value of the column at fault as it stands in the file, not as COPY quotes it."""
        data = chunk.data[place]
        if isinstance(problem, str):
            return Reject(chunk.lines[place], data, None, None, problem)
        if problem.column not in self.columns:
            return Reject(chunk.lines[place], data, problem.column, None, problem.reason)
        number = self.columns.index(problem.column)
        value = _text(fields(data, self.file.dialect)[number], self.file.dialect)
        name = self.file.names[number] if self.file.names[number] != problem.column else None
        return Reject(chunk.lines[place], data, problem.column, value, problem.reason, name)


def _as_rows(records: list[bytes], dialect: Dialect) -> _TextArray:
    """Records as the text form of a row. All at once, for speed: no record that comes here has a NUL."""
    if not records:
        return _TextArray()
    if not dialect.is_default:
        records = [_with_commas(record, dialect) for record in records]
    text = b"\0".join(records).replace(b"\\", b"\\\\").replace(b")", b"\\)").replace(b"\0", b")\0(")
    return _TextArray((b"(" + text + b")").split(b"\0"))


def _with_commas(record: bytes, dialect: Dialect) -> bytes:
    """A record as it would stand in a file with commas, double quotes and nothing for NULL."""
    if not (dialect.null or b"," in record or b'"' in record or dialect.quote in record):
        return record.replace(dialect.delimiter, b",")
    values = [_text(found, dialect) for found in fields(record, dialect)]
    return b",".join(b"" if value is None else b'"' + value.replace('"', '""').encode() + b'"' for value in values)


def _text(field: bytes, dialect: Dialect) -> str | None:
    """The value of a field as it stands in a record; None where it is NULL."""
    if not field.startswith(dialect.quote):
        return None if field == dialect.null else field.decode()
    return field[1:-1].replace(dialect.quote * 2, dialect.quote).decode()


def _check_quarantine(cur: Cursor[Any], quarantine: Table) -> None:
    cur.execute("SELECT to_regclass(%s) IS NULL", (quarantine.quoted,))
    if cur.fetchone() == (True,):
        raise BatchError(
            f"there is no table {quarantine} to keep rejects in: load with max_rejects 0, or make it with a migration "
            f"like sql/ddl/0005_create_raw_orders_rejects.up.sql"
        )


def _keep(cur: Cursor[Any], quarantine: Table, rejects: list[Reject]) -> None:
    """Write them to the quarantine."""
    if not rejects:
        return
    columns = ("line_number", "line", "line_bytes", "column_name", "reason")
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
        quarantine.identifier, sql.SQL(", ").join(map(sql.Identifier, columns))
    )
    with cur.copy(statement) as copy:
        for reject in rejects:
            line = reject.data.decode(errors="backslashreplace").replace("\0", "\\x00")
            inexact = reject.data if line.encode() != reject.data else None
            copy.write_row((reject.line, line, inexact, reject.column, reject.reason))


def _refusal(
    file: BatchFile, limit: Limit, listed: list[Reject], first_problem: str, rejects: int, records: int
) -> str:
    """What the person who has to mend the file needs to know."""
    if not listed:
        return f"{first_problem}. Nothing was loaded. Correct the file at its source and load it again."
    lines = "".join(f"\n  {printable(str(reject))}" for reject in listed)
    more = f"\n  and {rejects - len(listed):,} more" if rejects > len(listed) else ""
    return (
        f"{file.path}: {rejects:,} of {records:,} records are bad, max_rejects is {limit.text}. Nothing was loaded."
        f"{lines}{more}\nCorrect the file at its source and load it again; or let max_rejects be higher: then the good "
        f"ones are loaded and the bad ones kept in the quarantine."
    )
