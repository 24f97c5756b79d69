"""Land one CSV file in one append-only table, exactly once. Imports no Airflow: any program may use it.

    with psycopg.connect(...) as conn:  # commits at the end, rolls back on an error
        load = load_batch(conn, table="raw.orders", batch_id="2026-11-25", path=Path("orders.csv"))

The caller's transaction is the unit: the batch's rows and its row in the load ledger raw.loads commit together or
not at all. Whoever comes again with the batch finds the ledger row and loads nothing, or finds nothing and loads all.
"""

import logging
import os
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from batch_file import END_OF_DATA, STRAY_QUOTE, BatchFile, scan
from batch_format import DEFAULT, Format
from batch_landing import EXTRA_COLUMN, LOST, Landing, Table, copy_statement
from batch_rejects import Limit, Problem, is_about_data, load_good_records, printable
from batch_store import BatchError, Below, StoredPath
from psycopg import Connection, Cursor, Error, Rollback, errors, sql
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row
from psycopg.types.json import Jsonb

__all__ = ["BatchError", "Load", "load_batch"]

log = logging.getLogger(__name__)

# Longest wait for another loader of the same batch, which will usually leave nothing to do.
LOCK_TIMEOUT = "5min"
# What would change the meaning of a file, pinned. Under YMD 03/04/2026 is an error, not a guess at its month.
SETTINGS = {
    "client_encoding": "UTF8",
    "TimeZone": "UTC",
    "timezone_abbreviations": "Default",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "array_nulls": "on",
    "xmloption": "content",
    "check_function_bodies": "on",  # batch_rejects: what can't be asked is noticed when the question is made
    "lock_timeout": LOCK_TIMEOUT,
}
# Columns of every raw table that the database fills.
OWN_COLUMNS = ("row_id", "load_id")
NEWLINE = b"\n"
# A line of just \. ends the data for PostgreSQL 17 and older, which then drop the rest of the file in silence.
END_OF_DATA_LINE = re.compile(rb"[\r\n]\\\.(?=[\r\n])")


class _NotAsReceived(Exception):
    """COPY would take the file, but by losing or changing some of it."""


class _LedgerRow(NamedTuple):
    load_id: int
    batch_id: str
    rows: int
    rejects: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Load:
    """What stands in the ledger for a batch, and whether this call put it there.

    :param load_id: the load that brought the rows.
    :param batch_id: the batch they are recorded under: an earlier one, when the same bytes had come before.
    :param rows: rows that the load brought.
    :param rejects: records of the file that it left out, and kept in the table's quarantine.
    :param bytes: size of the file in bytes.
    :param sha256: of the file, 64 hexadecimal digits.
    :param is_new: False when the batch, or its bytes, had been loaded before and this call wrote nothing.
    :param seconds: what this call took.
    """

    load_id: int
    batch_id: str
    rows: int
    rejects: int
    bytes: int
    sha256: str
    is_new: bool
    seconds: float

    @property
    def mb_per_second(self) -> float:
        """Bytes of the file by the seconds, in millions."""
        return self.bytes / 1e6 / max(self.seconds, 1e-3)

    def __str__(self) -> str:
        if not self.is_new:
            return f"already loaded as load {self.load_id}, batch {self.batch_id}: 0 new rows"
        rejects = f"{self.rejects:,} rejected, " if self.rejects else ""
        rows = f"{self.rows:,} row{'' if self.rows == 1 else 's'}"
        return (
            f"load {self.load_id}: {rows}, {rejects}{self.bytes / 1e6:,.1f} MB in {self.seconds:.1f} s, "
            f"{self.mb_per_second:,.1f} MB/s"
        )

    def report(self, table: str) -> dict[str, Any]:
        """All of it by name, with mb_per_second, and a sentence on it as summary: for logs, XCom and events.

        What had been loaded before is not counted again: rows and rejects are those that this call brought.
        """
        brought = {"rows": self.rows, "rejects": self.rejects, "mb_per_second": round(self.mb_per_second, 1)}
        if not self.is_new:
            brought = dict.fromkeys(brought, 0)
        took = {"seconds": round(self.seconds, 3), "bytes": self.bytes}
        return {"summary": f"{table}: {self}"} | brought | took | asdict(self) | brought | took


def load_batch(
    conn: Connection[Any],
    *,
    table: str,
    batch_id: str,
    path: Path | StoredPath | Below,
    updated_at: datetime | None = None,
    run_id: str | None = None,
    max_rejects: int | str = 0,
    load_again: bool = False,
    file_format: Format = DEFAULT,
) -> Load:
    """COPY a CSV file into a table and record it in raw.loads, in the caller's transaction.

    The transaction has the session settings of SETTINGS until its end.

    :param conn: in a READ COMMITTED transaction, or about to begin one. The caller commits.
    :param table: such as "raw.orders". Its columns, but for row_id and load_id, are those that the
        file's header must name, in any order.
    :param batch_id: the batch's name. The same name with the same bytes is a success that loads nothing.
    :param path: a CSV file, as it is or packed with gzip. Only read, in blocks of 64 KiB. An
        object of a store too, by a path such as airflow.sdk.ObjectStoragePath("s3://aws_default@bucket/orders.csv").
    :param updated_at: the moment that all rows of the batch share, for the ledger, and for columns whose DEFAULT is the
        setting de_dw.updated_at. Without an offset it is in UTC.
    :param run_id: who loads it, for the ledger: a run of Airflow.
    :param max_rejects: how many records may be bad, as a number or a percentage such as "1%". They are kept in the
        table's quarantine (of raw.orders: raw.orders_rejects), and the others are loaded.
    :param load_again: load the bytes though another batch has brought them before.
    :param file_format: how the file is written, if not in UTF-8 with commas, or with other names of columns.
    :raises BatchError: the file is missing, empty, unfinished or no CSV; the header does not fit the table; more
        records are bad than max_rejects; the batch was loaded before with other bytes; there is no quarantine, though
        max_rejects is above 0; a trigger leaves rows out.
    :raises psycopg.errors.LockNotAvailable: another backend, named by its pid, has been loading the batch for
        LOCK_TIMEOUT.
    :raises psycopg.errors.SerializationFailure: another loader brought the same bytes, or took the load_id, meanwhile.
        Roll back and call again.
    :raises psycopg.OperationalError: the connection broke. Call again: the ledger knows whether the rows are in.
    :raises PermissionError: the store does not let us read the object.
    :raises Exception: of the store's client, such as botocore's ConnectionError: it is away or busy. Call again.
    :raises ValueError: the connection is in autocommit mode, outside of a transaction; max_rejects is no limit; the
        database is not in UTF8; file_format names a column that the table has not, or a time zone that the server has
        not, or decimal commas for a column of type money.
    """
    if conn.autocommit and conn.info.transaction_status == TransactionStatus.IDLE:
        raise ValueError("load_batch needs a transaction, but the connection is in autocommit mode")
    limit = Limit(max_rejects)
    if updated_at and updated_at.tzinfo is None:  # the session may have the time zone of the file
        updated_at = updated_at.replace(tzinfo=UTC)
    started = time.monotonic()
    if conn.info.parameter_status("server_encoding") != "UTF8":
        raise ValueError(f"the database's encoding is {conn.info.parameter_status('server_encoding')}, not UTF8")
    # Not conn.cursor(): it would make whatever class of cursor the caller uses.
    with BatchFile(path, file_format) as file, Cursor(conn, row_factory=tuple_row) as cur:
        settings = SETTINGS | {"TimeZone": file_format.time_zone, "DateStyle": f"ISO, {file_format.date_order}"}
        try:
            for name, value in settings.items():
                cur.execute("SELECT set_config(%s, %s, true)", (name, value))
        except errors.InvalidParameterValue as error:
            raise ValueError(f"the server has no time zone {file_format.time_zone!r}: {error}") from None
        to = _full_name(cur, table)
        _take_turn(cur, to, batch_id)
        extra = _check_header(cur, to, file)

        found = _find(cur, to, batch_id=batch_id)
        first = None
        # As long as no file of this size has come before it need not be read twice.
        if found or _find(cur, to, bytes=file.size):
            digest = file.digest()
            if found and found.sha256 != digest:
                raise BatchError(
                    f"{file.path}: batch {batch_id} was loaded into {to} as load {found.load_id} with other bytes: "
                    f"sha256 was {found.sha256}, is {digest}. A batch never changes: deliver corrections as a new "
                    f"batch, with a newer updated_at."
                )
            first = _find(cur, to, sha256=digest)
        found = found or (first if not load_again else None)
        is_new = False
        if not found:
            found, is_new = _load(
                cur, to, batch_id, file, updated_at, run_id, limit, first.load_id if first else None, extra
            )
            if load_again and not is_new:
                raise errors.SerializationFailure(
                    f"another loader has just brought the same bytes as batch {found.batch_id}: call again"
                )
    load = Load(**found._asdict(), is_new=is_new, seconds=time.monotonic() - started)
    log.info("%s: %s", to, load)
    return load


def _full_name(cur: Cursor[Any], table: str) -> Table:
    """The one name of a table that the ledger knows, however the caller spelled it."""
    cur.execute(
        "SELECT n.nspname, c.relname FROM pg_class AS c INNER JOIN pg_namespace AS n ON c.relnamespace = n.oid"
        " WHERE c.oid = %s::text::regclass",
        (table,),
    )
    ((schema, name),) = cur.fetchall()
    return Table(schema, name)


def _take_turn(cur: Cursor[Any], table: Table, batch_id: str) -> None:
    """Be the only loader of the batch until the transaction ends."""
    key = f"load {table} {batch_id}"
    try:
        with cur.connection.transaction():
            cur.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (key,))
    except errors.LockNotAvailable:
        cur.execute(
            """
            SELECT string_agg(pid::text, ', ')
            FROM pg_locks CROSS JOIN hashtextextended(%s, 0) AS key
            WHERE locktype = 'advisory' AND granted AND objsubid = 1 AND (classid::bigint << 32 | objid::bigint) = key
                AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
            """,
            (key,),
        )
        (pids,) = cur.fetchone() or (None,)
        raise errors.LockNotAvailable(
            f"batch {batch_id} of {table} has been in the hands of another loader for {LOCK_TIMEOUT}: backend pid "
            f"{pids or 'just gone'}. If it is frozen, only SELECT pg_terminate_backend(pid) ends it."
        ) from None


def _check_header(cur: Cursor[Any], table: Table, file: BatchFile) -> list[str]:
    """Refuse a header that does not name each of the table's columns once, but for those that may lack.

    :return: the names of columns that the table does not have, and the file may.
    """
    cur.execute(
        """
        SELECT
            attname::text,
            attnotnull AND NOT atthasdef AND attidentity = '',
            attname = %s AND atttypid = 'jsonb'::regtype,
            attidentity = 'd',
            typcategory = 'D' AND typname NOT IN ('time', 'timetz')
        FROM pg_attribute INNER JOIN pg_type ON pg_type.oid = atttypid
        WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped
            AND attgenerated = '' AND attidentity <> 'a' AND attname <> ALL (%s)
        ORDER BY attnum ASC
        """,
        (EXTRA_COLUMN, table.quoted, list(OWN_COLUMNS)),
    )
    found = cur.fetchall()
    has_extra = any(is_extra for _, _, is_extra, _, _ in found)
    required = {name: is_required for name, is_required, is_extra, _, _ in found if not is_extra}
    declared = file.format
    where = f"{file.path}, line 1" if file.has_header else f"{file.path}, as declared"
    optional = {*declared.optional, *(name for name, _, _, is_counted, _ in found if is_counted)}
    instants = [name for name, _, _, _, is_instant in found if is_instant]
    named = [*declared.optional, *declared.columns.values(), *declared.timestamps]
    if strange := [name for name in dict.fromkeys(named) if name not in required]:
        raise ValueError(f"the format of {table} names columns that it has not: {', '.join(strange)}")
    if strange := [name for name in declared.timestamps if name not in instants]:
        raise ValueError(f"the format of {table} has patterns of times for what is none there: {', '.join(strange)}")
    if needed := [name for name in declared.optional if required[name] and name not in file.columns]:
        raise BatchError(
            f"{where}: the header lacks {', '.join(map(repr, needed))} of {table}, which is optional, but "
            f"NOT NULL and without a DEFAULT. Give it one with a migration, or deliver the column."
        )
    if declared.extra == "keep" and not has_extra:
        raise ValueError(f"{table} has no column {EXTRA_COLUMN} jsonb to keep extra columns in: add one by a migration")
    unknown = [name for name in dict.fromkeys(file.columns) if name not in required]
    problems = {
        "missing": [name for name in required if name not in file.columns and name not in optional],
        "unknown": unknown if declared.extra == "refuse" else [],
        "more than once": [
            name
            for name, times in Counter(file.columns).items()
            if times > 1 and not (declared.extra == "ignore" and name in unknown)
        ],
    }
    if any(problems.values()):
        given = {column: name for name, column in zip(file.names, file.columns, strict=True) if name != column}
        shown = {
            what: ", ".join(f"{name!r} (column {given[name]!r})" if name in given else repr(name) for name in names)
            for what, names in problems.items()
        }
        lacking = {column: name for name, column in declared.columns.items()}
        shown["missing"] = ", ".join(
            f"{name!r} (in the file {lacking[name]!r})" if name in lacking else repr(name)
            for name in problems["missing"]
        )
        if problems["missing"] and unknown and declared.extra != "refuse":  # one of them may be what is missing
            shown["of the file, not of the table"] = ", ".join(map(repr, unknown))
        listed = "; ".join(f"{what}: {names}" for what, names in shown.items() if names)
        separated = "commas" if declared.delimiter == "," else repr(declared.delimiter)
        raise BatchError(
            f"{where}: the header does not fit {table}. {listed}. "
            f"It must name these columns, separated by {separated}, in any order: {', '.join(required)}"
        )
    return unknown


def _find(cur: Cursor[Any], table: Table, **condition: object) -> _LedgerRow | None:
    """The first load of the table with this batch_id, sha256 or bytes."""
    ((column, value),) = condition.items()
    query = sql.SQL(
        "SELECT {} FROM raw.loads WHERE table_name = %s AND {} = %s AND (rows + rejects > 0 OR {})"
        " ORDER BY load_id LIMIT 1"
    )  # files without records are all alike: only the batch_id tells them apart
    names = sql.SQL(", ").join(map(sql.Identifier, _LedgerRow._fields))
    cur.execute(query.format(names, sql.Identifier(column), column == "batch_id"), (str(table), value))
    row = cur.fetchone()
    return _LedgerRow(*row) if row else None


def _load(
    cur: Cursor[Any],
    table: Table,
    batch_id: str,
    file: BatchFile,
    updated_at: datetime | None,
    run_id: str | None,
    limit: Limit,
    repeat_of: int | None,
    extra: list[str],
) -> tuple[_LedgerRow, bool]:
    """Bring the rows and the ledger row (True), or find that another loader has just brought the same bytes (False)."""
    # Numbers that this session kept in its cache are older than those another session has used since: without this,
    # row_id would not be the order of arrival.
    cur.execute("DISCARD SEQUENCES")
    with cur.connection.transaction():  # which ends the setting too, when it is rolled back
        cur.execute(
            "SELECT id, set_config('de_dw.load_id', id::text, true), set_config('de_dw.updated_at', %s, true)"
            " FROM nextval('raw.loads_load_id_seq') AS id",
            (updated_at.isoformat() if updated_at else "",),
        )
        (load_id, *_) = cur.fetchone() or (0, "")
        landing = Landing.of(cur, table, file, extra, load_id)
        try:
            with cur.connection.transaction():
                rows, rejects = _copy(cur, landing, file), 0
        except (Error, _NotAsReceived) as error:
            if isinstance(error, Error) and not is_about_data(error):
                raise
            problem = str(Problem.of(error)) if isinstance(error, Error) else str(error)
            first_problem = printable(f"{file.path}, {problem}")
            log.warning("%s. Now looking at each record.", first_problem)
            rows, rejects = load_good_records(cur, landing, file, limit, first_problem)
        landing.drop(cur)
        # What the caller inserts is not of this load.
        cur.execute("SELECT set_config('de_dw.load_id', '', true), set_config('de_dw.updated_at', '', true)")
        row = _LedgerRow(load_id, batch_id, rows, rejects, file.size, file.sha256)
        cur.execute(
            "INSERT INTO raw.loads (load_id, batch_id, rows, rejects, bytes, sha256, table_name, source, header,"
            " batch_updated_at, run_id, repeat_of, format, source_version)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
            (
                *row,
                str(table),
                os.fsencode(file.path).decode(errors="backslashreplace"),
                file.header.decode(errors="backslashreplace"),
                updated_at,
                run_id,
                repeat_of,
                Jsonb(declared) if (declared := file.format.declared()) else None,
                file.version,
            ),
        )
        is_new = cur.rowcount == 1
        if not is_new:
            raise Rollback  # another loader has committed the same bytes meanwhile: take our rows out again
    found = row if is_new else _find(cur, table, sha256=file.sha256)
    if not found:  # a caller under REPEATABLE READ can't see it; nor is it there if somebody took our load_id by hand
        raise errors.SerializationFailure(f"raw.loads has got a row of batch {batch_id}, or load {load_id}: call again")
    return found, is_new


def _copy(cur: Cursor[Any], landing: Landing, file: BatchFile) -> int:
    """COPY the file as it is, and return the number of rows that came to its table."""
    quotes = 0
    records = -1 if file.has_header else 0
    tail = NEWLINE  # the end of the block before: a line may begin in one block and end in the next
    mark = file.mark
    stopped: Exception | None = None
    try:
        with cur.copy(copy_statement(landing, file, has_header=file.has_header)) as copy:
            # An exception here would make psycopg log what the server says to it, with all values of a row.
            try:
                for block in file.blocks():
                    if mark:  # in front of a header COPY would skip it, but not in front of a record
                        block, mark = block.removeprefix(mark), b""
                    found = scan(tail[-1:] + block, quotes, file.newline[-1], file.dialect)
                    if found.has_stray:
                        raise _NotAsReceived(STRAY_QUOTE)
                    window = tail + block
                    # One byte is found 200 times as fast as two.
                    for match in END_OF_DATA_LINE.finditer(window) if b"\\" in window and b"\\." in window else ():
                        position = max(match.start() + 1 - len(tail), 0)
                        if (
                            quotes + block.count(file.dialect.quote, 0, position)
                        ) % 2 == 0:  # else it is data, within quotes
                            raise _NotAsReceived(END_OF_DATA)
                    copy.write(block)
                    tail = window[-3:]
                    quotes += found.quotes
                    records += found.record_ends
            except Error:
                raise
            except Exception as error:  # ours, or what reading an object came to
                stopped = error
    except Error:
        if stopped is None:
            raise
    if stopped is not None:
        raise stopped
    rows = landing.move(cur, cur.rowcount)
    if rows != records:
        raise BatchError(f"{file.path}: {rows:,} rows came of {records:,} records. Nothing was loaded. {LOST}")
    return rows
