"""What happens to a file that COPY refused: its good records go to the table, its bad ones to the table's quarantine.

Which is which PostgreSQL decides, record by record: its own input functions, NOT NULL and CHECK constraints sort out
the bad ones first, thousands in one query, and then COPY takes the rest or names who is in the way. The one exception
are records that COPY would take by changing or losing what was received, such as stray quotes: see batch_file.
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
from typing import Any, NamedTuple, Self

import numpy as np
from batch_file import BatchError, BatchFile, Records, fields
from psycopg import Cursor, DataError, Error, IntegrityError, ProgrammingError, sql
from psycopg.abc import Buffer
from psycopg.adapt import Dumper
from psycopg.pq import Format

log = logging.getLogger(__name__)

# How many rejects the error names when there are more than allowed.
LISTED = 10
# Longest value in a message: the quarantine and the file have all of it.
VALUE_CHARACTERS = 80
# Errors that are about the data, not about the server, the connection or our rights.
DATA_ERRORS = (DataError, IntegrityError)

# A CSV record between parentheses is the text form of a row: the same quotes, the same NULL, but that \ and ) are
# escaped. So the input function of a row type calls those of its columns, with length and scale, as COPY does. The
# domain adds the table's rules. Both go with the transaction.
CREATE_INCOMING = "CREATE TEMPORARY TABLE incoming ON COMMIT DROP AS SELECT {columns} FROM {table} WITH NO DATA"
CREATE_GOOD_ROW = "CREATE DOMAIN pg_temp.good_row AS pg_temp.incoming CHECK ({rules})"
CREATE_RULE = "CREATE OR REPLACE FUNCTION {name} ({columns}) RETURNS boolean LANGUAGE sql STABLE AS {body}"
# The message of the row's input function, or NULL when it takes the record.
INPUT_ERROR = "(pg_input_error_info(record, 'pg_temp.incoming')).message"
IS_GOOD = "pg_input_is_valid(record, 'pg_temp.good_row')"
# What 15 has instead. PERFORM, because an assignment that failed once makes all later ones of the transaction slower.
INPUT_ERROR_15 = "pg_temp.error_of_incoming(record)"
IS_GOOD_15 = "pg_temp.error_of_good_row(record) IS NULL"
CREATE_INPUT_ERROR_15 = """
CREATE OR REPLACE FUNCTION pg_temp.error_of_{type} (record text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    PERFORM record::pg_temp.{type};
    RETURN NULL;
EXCEPTION WHEN data_exception OR integrity_constraint_violation THEN
    RETURN sqlerrm;
END
$$
"""
FIND_BAD = "SELECT n::integer - 1 FROM unnest(%s) WITH ORDINALITY AS received (record, n) WHERE NOT {is_good}"
# Which rule is broken, by its number; -1 when it is not even a row.
FIND_RULE = """
SELECT CASE WHEN {input_error} IS NOT NULL THEN -1 ELSE {rule} END
FROM unnest(%s) WITH ORDINALITY AS received (record, n)
ORDER BY n ASC
"""
# The record with all fields but one left out, for each field: which of them is it that PostgreSQL does not take?
FIND_COLUMN = """
SELECT DISTINCT ON (n) n, column_number, error
FROM (
    SELECT n, column_number, {input_error} AS error
    FROM unnest(%s, %s::integer[], %s::integer[]) AS received (record, n, column_number)
) AS received
WHERE error IS NOT NULL
ORDER BY n ASC, column_number ASC
"""
# NOT NULL before CHECK, and these by name, as PostgreSQL does. Not enforced constraints came with 18.
RULES = """
SELECT NULL, format('null value in column "%%s"', attname), ARRAY[attname], ARRAY[]::text[]
FROM (SELECT attname::text FROM pg_attribute
    WHERE attrelid = %(table)s::regclass AND attnum > 0 AND attnotnull AND attname = ANY (%(columns)s)
    ORDER BY attnum) AS required
UNION ALL
SELECT expression, reason, names, types
FROM (SELECT pg_get_expr(conbin, conrelid) AS expression, format('violates check constraint "%%s"', conname) AS reason,
        array_agg(attname::text) AS names, array_agg(format_type(atttypid, NULL)) AS types
    FROM pg_constraint AS c INNER JOIN pg_attribute ON attrelid = conrelid AND attnum = ANY (conkey)
    WHERE conrelid = %(table)s::regclass AND contype = 'c' AND coalesce(to_jsonb(c) ->> 'conenforced', 'true') = 'true'
    GROUP BY c.oid, conbin, conrelid, conname
    HAVING array_agg(attname::text) <@ %(columns)s::text[]
    ORDER BY conname) AS checks
"""
# Where a COPY error happened. Only the value of the column at fault is kept: the rest of the line is not for logs.
COPY_CONTEXT = re.compile(r'^COPY .+?, line (\d+)(?:, column (.+?)(?:: "(.*)"|: null input)?)?(?:: ".*")?$', re.DOTALL)


class Rule(NamedTuple):
    """A NOT NULL or CHECK of the table: its expression if it is a CHECK, what is wrong with a row that breaks it, and
    the columns that it looks at, with their types."""

    expression: str | None
    reason: str
    columns: list[str]
    types: list[str]


class Problem(NamedTuple):
    """What COPY said about a file: the line at whose end it stopped, the column and value if it named them."""

    line: int | None
    column: str | None
    value: str | None
    reason: str

    @classmethod
    def of(cls, error: Error) -> Self:
        match = COPY_CONTEXT.match(error.diag.context or "")
        line, column, value = match.groups() if match else (None, None, None)
        reason = error.diag.message_primary or str(error)
        return cls(int(line) if line else None, column or error.diag.column_name, value, reason)

    def __str__(self) -> str:
        where = f"line {self.line}" if self.line else "a line that it does not name"
        where += f", column {self.column}" if self.column else ""
        return f"{where}, value {self.value!r}: {self.reason}" if self.value else f"{where}: {self.reason}"


# What is wrong with a record: a text; what COPY said; None when PostgreSQL has to be asked again for the reason.
Verdict = str | Problem | None


@dataclass(frozen=True)
class Reject:
    """A record that is not loaded.

    :param line: of the file, on which it begins.
    :param data: as received, without the line end.
    :param column: at fault, if it is one.
    :param value: of this column as received.
    """

    line: int
    data: bytes
    column: str | None
    value: str | None
    reason: str

    def __str__(self) -> str:
        where = f"line {self.line}" + (f", column {self.column}" if self.column else "")
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


def copy_statement(table: str, columns: Sequence[str], options: str = "") -> sql.Composed:
    """COPY FROM STDIN of CSV in UTF-8, into these columns of a table."""
    return sql.SQL("COPY {} ({}) FROM STDIN WITH (FORMAT csv, ENCODING 'UTF8'{})").format(
        sql.Identifier(*table.split(".")), sql.SQL(", ").join(map(sql.Identifier, columns)), sql.SQL(options)
    )


def load_good_records(
    cur: Cursor[Any], table: str, file: BatchFile, limit: Limit, first_problem: str
) -> tuple[int, int]:
    """COPY the records that PostgreSQL takes, and keep the others in the table's quarantine.

    In the caller's transaction, which has the setting de_dw.load_id.

    :param table: the full name; its quarantine is called the same with _rejects behind it.
    :param first_problem: what COPY said about the file.
    :returns: rows loaded, records rejected.
    :raises BatchError: more are bad than the limit allows: undo what was written, none of it may stay.
    """
    sorter = _Sorter(cur, table, file)
    quarantine = f"{table}_rejects"
    if limit.number > 0:
        _check_quarantine(cur, quarantine)
    listed: list[Reject] = []
    rows = rejects = records = lines = 0
    for chunk in _ahead(file.records()):
        # Once there are too many they are only counted; and without a limit one is too many.
        over = limit.number == 0 or not (limit.is_share or limit.allows(rejects, 0))
        bad = sorter.sort(chunk, load=not over)
        explained = sorter.explain(chunk, bad if not over else dict(list(bad.items())[: LISTED - len(listed)]))
        if not over:
            _keep(cur, quarantine, explained)
        listed += explained[: LISTED - len(listed)]
        rejects += len(bad)
        rows += len(chunk.data) - len(bad)
        records += len(chunk.data)
        lines += b"".join(chunk.data).count(file.newline[-1:]) + len(chunk.data)
    if limit.number == 0 or not limit.allows(rejects, records):
        raise BatchError(_refusal(file, limit, listed, first_problem, rejects, records))

    cur.execute(
        sql.SQL("SELECT count(*) FROM {} WHERE load_id = current_setting('de_dw.load_id')::bigint").format(
            sql.Identifier(*quarantine.split("."))
        )
    )
    ((kept,),) = cur.fetchall()
    if sorter.copied + kept != records or file.header_lines + lines != file.lines:
        raise BatchError(
            f"{file.path}: {sorter.copied:,} rows loaded and {kept:,} rejected are not the {records:,} records on "
            f"{file.lines:,} lines of the file. Nothing was loaded. This is a mistake in the loader: please report it."
        )
    return rows, rejects


def _ahead(chunks: Iterator[Records]) -> Iterator[Records]:
    """The same, the next one being cut while the server works on this one."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, chunks, None)
        while (chunk := following.result()) is not None:
            following = thread.submit(next, chunks, None)
            yield chunk


class _Sorter:
    """Says of the records of one file which of them its table takes."""

    def __init__(self, cur: Cursor[Any], table: str, file: BatchFile) -> None:
        self.cur = cur
        self.file = file
        self.copied = 0
        self._copy_statement = copy_statement(table, file.columns, ", HEADER true")
        cur.adapters.register_dumper(_TextArray, _TextArrayDumper)
        cur.execute("DROP TABLE IF EXISTS pg_temp.incoming CASCADE")
        columns = sql.SQL(", ").join(map(sql.Identifier, file.columns))
        cur.execute(sql.SQL(CREATE_INCOMING).format(columns=columns, table=sql.Identifier(*table.split("."))))
        cur.execute(RULES, {"table": table, "columns": file.columns})
        self.rules: list[Rule] = []
        for rule in [Rule(*row) for row in cur.fetchall()]:
            if rule.expression is None or self._create(rule, len(self.rules)):
                self.rules.append(rule)
        rules = [self._holds(number, "value") for number in range(len(self.rules))]
        cur.execute(sql.SQL(CREATE_GOOD_ROW).format(rules=sql.SQL(" AND ").join([sql.SQL("true"), *rules])))

        is_good, input_error = IS_GOOD, INPUT_ERROR
        if cur.connection.info.server_version < 160000:
            is_good, input_error = IS_GOOD_15, INPUT_ERROR_15
            for type_ in ("incoming", "good_row"):
                cur.execute(sql.SQL(CREATE_INPUT_ERROR_15).format(type=sql.SQL(type_)))
        self._find_bad = sql.SQL(FIND_BAD).format(is_good=sql.SQL(is_good))
        self._find_column = sql.SQL(FIND_COLUMN).format(input_error=sql.SQL(input_error))
        cases = [
            sql.SQL("WHEN NOT {} THEN {}").format(self._holds(number, "record::pg_temp.incoming"), number)
            for number in range(len(self.rules))
        ]
        broken = sql.SQL("CASE {} END").format(sql.SQL(" ").join(cases)) if cases else sql.SQL("NULL")
        self._find_rule = sql.SQL(FIND_RULE).format(input_error=sql.SQL(input_error), rule=broken)

    def _create(self, rule: Rule, number: int) -> bool:
        """Make the function that a CHECK is asked by. What can't be asked outside of the table is left to COPY."""
        arguments = [
            sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(type_))
            for name, type_ in zip(rule.columns, rule.types, strict=True)
        ]
        try:
            with self.cur.connection.transaction():
                self.cur.execute(
                    sql.SQL(CREATE_RULE).format(
                        name=sql.Identifier("pg_temp", f"rule_{number}"),
                        columns=sql.SQL(", ").join(arguments),
                        body=sql.Literal(f"SELECT {rule.expression}"),
                    )
                )
        except ProgrammingError as error:
            log.info("%s: %s: left to COPY: %s", self.file.path, rule.reason, error.diag.message_primary)
            return False
        return True

    def _holds(self, number: int, row: str) -> sql.Composable:
        """The condition that a row keeps a rule."""
        columns = [
            sql.SQL("({}).{}").format(sql.SQL(row), sql.Identifier(column)) for column in self.rules[number].columns
        ]
        if self.rules[number].expression is None:
            return sql.SQL("{} IS NOT NULL").format(*columns)
        function = sql.Identifier("pg_temp", f"rule_{number}")
        return sql.SQL("coalesce({}({}), true)").format(function, sql.SQL(", ").join(columns))

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
                self.cur.execute(self._find_bad, (_as_rows([chunk.data[place] for place in places]),))
                return {places[number]: None for (number,) in self.cur.fetchall()}
        except DATA_ERRORS as error:
            # A type that can't be asked beforehand, a rule that fails instead of being false: COPY will tell.
            log.info("%s: the records are left to COPY: %s", self.file.path, error.diag.message_primary)
            return {}

    def _copy(self, chunk: Records, places: list[int]) -> dict[int, Verdict]:
        """Load them, but for those of which PostgreSQL says only now that it does not take them."""
        refused: dict[int, Verdict] = {}
        end = self.file.newline
        while places:
            records = [chunk.data[place] for place in places]
            try:
                with self.cur.connection.transaction():
                    with self.cur.copy(self._copy_statement) as copy:
                        # An empty header: without it COPY does not count the line ends within the first record.
                        copy.write(end + end.join(records) + end)
                    self.copied += self.cur.rowcount
                    return refused
            except DATA_ERRORS as error:
                problem = Problem.of(error)
                if problem.line is None:
                    raise
                last_lines = accumulate((record.count(end[-1:]) + 1 for record in records), initial=1)
                number = bisect_left(list(last_lines), problem.line) - 1
                refused[places[number]] = problem
                refused |= self._copy(chunk, places[:number])
                places = places[number + 1 :]
        return refused

    def explain(self, chunk: Records, bad: dict[int, Verdict]) -> list[Reject]:
        """What is wrong with each of them, in the order of the file."""
        problems = {place: verdict for place, verdict in bad.items() if verdict is not None}
        asked = [place for place in bad if place not in problems]
        no_rows = []
        for place, verdict in zip(asked, self._broken_rules([chunk.data[place] for place in asked]), strict=True):
            values = fields(chunk.data[place])
            if isinstance(verdict, str):
                problems[place] = verdict
            elif verdict is not None and verdict >= 0:
                rule = self.rules[verdict]
                problems[place] = Problem(None, ", ".join(rule.columns), None, rule.reason)
            elif len(values) < len(self.file.columns):
                reason = f'missing data for column "{self.file.columns[len(values)]}"'
                problems[place] = Problem(None, None, None, reason)
            elif len(values) > len(self.file.columns):
                problems[place] = Problem(None, None, None, "extra data after last expected column")
            else:
                problems[place] = Problem(None, None, None, "no row of the table")
                no_rows.append(place)
        if no_rows:
            self.cur.execute(self._find_column, _alone([chunk.data[place] for place in no_rows]))
            for number, column_number, reason in self.cur.fetchall():
                problems[no_rows[number]] = Problem(None, self.file.columns[column_number], None, reason)
        return [self._reject(chunk, place, problems[place]) for place in sorted(problems)]

    def _broken_rules(self, records: list[bytes]) -> list[int | str | None]:
        """Of each the number of the rule that it breaks, or -1 when it is no row, or what evaluating the rules says."""
        if not records:
            return []
        try:
            with self.cur.connection.transaction():
                self.cur.execute(self._find_rule, (_as_rows(records),))
                return [number for (number,) in self.cur.fetchall()]
        except DATA_ERRORS as error:
            if len(records) == 1:
                return [error.diag.message_primary or str(error)]
            half = len(records) // 2
            return [*self._broken_rules(records[:half]), *self._broken_rules(records[half:])]

    def _reject(self, chunk: Records, place: int, problem: "Problem | str") -> Reject:
        """With the value of the column at fault as it stands in the file, not as COPY quotes it."""
        data = chunk.data[place]
        if isinstance(problem, str):
            return Reject(chunk.lines[place], data, None, None, problem)
        value = None
        if problem.column in self.file.columns:
            value = _text(fields(data)[self.file.columns.index(problem.column)])
        return Reject(chunk.lines[place], data, problem.column, value, problem.reason)


def _as_rows(records: list[bytes]) -> _TextArray:
    """Records as the text form of a row. All at once, for speed: no record that comes here has a NUL."""
    if not records:
        return _TextArray()
    text = b"\0".join(records).replace(b"\\", b"\\\\").replace(b")", b"\\)").replace(b"\0", b")\0(")
    return _TextArray((b"(" + text + b")").split(b"\0"))


def _alone(records: list[bytes]) -> tuple[_TextArray, list[int], list[int]]:
    """Each field of each record alone in its row; with it the number of the record, and that of the column."""
    rows: list[bytes] = []
    numbers, columns = [], []
    for number, record in enumerate(records):
        values = fields(record)
        for column, value in enumerate(values):
            rows.append(b"," * column + value + b"," * (len(values) - 1 - column))
            numbers.append(number)
            columns.append(column)
    return _as_rows(rows), numbers, columns


def _text(field: bytes | None) -> str | None:
    """The value of a field as it stands in a record."""
    if field is None or not field.startswith(b'"'):
        return field.decode() if field else None
    return field[1:-1].replace(b'""', b'"').decode()


def _check_quarantine(cur: Cursor[Any], quarantine: str) -> None:
    cur.execute("SELECT to_regclass(%s) IS NULL", (quarantine,))
    if cur.fetchone() == (True,):
        raise BatchError(
            f"there is no table {quarantine} to keep rejects in: load without max_rejects, or make it with a migration "
            f"like sql/ddl/0005_create_raw_orders_rejects.up.sql"
        )


def _keep(cur: Cursor[Any], quarantine: str, rejects: list[Reject]) -> None:
    """Write them to the quarantine."""
    if not rejects:
        return
    columns = ("line_number", "line", "line_bytes", "column_name", "reason")
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
        sql.Identifier(*quarantine.split(".")), sql.SQL(", ").join(map(sql.Identifier, columns))
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
