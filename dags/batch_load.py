"""Land one CSV file in one append-only table, exactly once. Imports no Airflow: any program may use it.

    with psycopg.connect(...) as conn:  # commits at the end, rolls back on an error
        load = load_batch(conn, table="raw.orders", batch_id="2026-11-25", path=Path("orders.csv"))

The caller's transaction is the unit: the batch's rows and its row in the load ledger raw.loads commit together or
not at all. Whoever comes again with the batch finds the ledger row and loads nothing, or finds nothing and loads all.
"""

import csv
import hashlib
import io
import logging
import os
import re
import stat
import time
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from psycopg import Connection, Cursor, DataError, IntegrityError, Rollback, errors, sql
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

log = logging.getLogger(__name__)

# One read, hash and send at a time: 64 KiB was slower, 1 MiB no faster, and memory stays the same for any file.
BLOCK_BYTES = 256 * 1024
# A header is one line of names: what is longer is not one.
HEADER_BYTES = 64 * 1024
# How often a long load says how far it is.
PROGRESS_SECONDS = 5.0
# Longest wait for another loader of the same batch, which will usually leave nothing to do.
LOCK_TIMEOUT = "5min"
# What would change the meaning of a file, pinned. Under YMD 03/04/2026 is an error, not a guess at its month.
SETTINGS = {"TimeZone": "UTC", "DateStyle": "ISO, YMD", "lock_timeout": LOCK_TIMEOUT}
# Columns of every raw table that the database fills.
OWN_COLUMNS = ("row_id", "load_id")

NEWLINE = b"\n"
QUOTE = ord('"')
# By byte: may it stand before the quote that begins a field and after the one that ends it? A doubled quote may.
BESIDE_A_QUOTE = np.isin(np.arange(256), list(b',\r\n"'))
BOM = b"\xef\xbb\xbf"
# How files begin that get delivered under the name .csv without being one.
NOT_CSV = {
    b"\x1f\x8b": "gzip: unpack it",
    b"PK\x03\x04": "a zip archive or an Excel workbook: unpack it, or export it as CSV",
    b"%PDF": "PDF",
    b"\xff\xfe": "UTF-16 text: convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text: convert it to UTF-8",
    b"<": "HTML or XML, perhaps the error page of a download",
    b"{": "JSON",
    b"[": "JSON",
}
# A line of just \. ends the data for PostgreSQL 17 and older, which then drop the rest of the file in silence.
END_OF_DATA = re.compile(rb"[\r\n]\\\.(?=[\r\n])")
# Where a COPY error happened. Only the value of the column at fault is kept: the rest of the line is not for logs.
COPY_CONTEXT = re.compile(r'^COPY .+?, line (\d+)(?:, column (.+?)(?:: "(.*)"|: null input)?)?(?:: ".*")?$', re.DOTALL)


class BatchError(Exception):
    """The batch can't be loaded as it is, now or later; nothing was written.

    The message names the file, the line, column and value where there are any, and the remedy.
    """


@dataclass(frozen=True)
class Load:
    """What stands in the ledger for a batch, and whether this call put it there.

    :param load_id: the load that brought the rows.
    :param batch_id: the batch they are recorded under: an earlier one, when the same bytes had come before.
    :param rows: rows that the load brought.
    :param bytes: size of the file in bytes.
    :param sha256: of the file, 64 hexadecimal digits.
    :param is_new: False when the batch had been loaded before and this call wrote nothing.
    :param seconds: what this call took.
    """

    load_id: int
    batch_id: str
    rows: int
    bytes: int
    sha256: str
    is_new: bool
    seconds: float

    def __str__(self) -> str:
        if not self.is_new:
            return f"already loaded as load {self.load_id}, batch {self.batch_id}: 0 new rows"
        megabytes = self.bytes / 1e6
        return (
            f"load {self.load_id}: {self.rows:,} rows, {megabytes:,.1f} MB in {self.seconds:.1f} s, "
            f"{megabytes / max(self.seconds, 1e-3):,.1f} MB/s"
        )


def load_batch(
    conn: Connection[Any],
    *,
    table: str,
    batch_id: str,
    path: Path,
    updated_at: datetime | None = None,
) -> Load:
    """COPY a CSV file into a table and record it in raw.loads, in the caller's transaction.

    :param conn: in a READ COMMITTED transaction, or about to begin one. The caller commits.
    :param table: such as "raw.orders". Its columns, but for row_id and load_id, are those that the
        file's header must name, in any order.
    :param batch_id: the batch's name. The same name with the same bytes is a success that loads nothing.
    :param path: a UTF-8 CSV file with a header line. Only read, in blocks of 256 KiB.
    :param updated_at: the moment that all rows of the batch share, for the ledger.
    :raises BatchError: the file is missing, empty, unfinished or no CSV; the header or a row does not fit the table;
        the batch was loaded before with other bytes.
    :raises psycopg.errors.LockNotAvailable: another backend, named by its pid, has been loading the batch for
        LOCK_TIMEOUT.
    :raises psycopg.OperationalError: the connection broke. Call again: the ledger knows whether the rows are in.
    :raises ValueError: the connection is in autocommit mode, outside of a transaction.
    """
    if conn.autocommit and conn.info.transaction_status == TransactionStatus.IDLE:
        raise ValueError("load_batch needs a transaction, but the connection is in autocommit mode")
    started = time.monotonic()
    with _open(path) as file, conn.cursor(row_factory=tuple_row) as cur:
        before = os.fstat(file.fileno())
        header = _read_header(file, path)
        for name, value in SETTINGS.items():
            cur.execute("SELECT set_config(%s, %s, true)", (name, value))
        table = _full_name(cur, table)
        _take_turn(cur, table, batch_id)
        _check_header(cur, table, header, path)

        found = _find(cur, table, batch_id=batch_id)
        if not found and not _find(cur, table, bytes=before.st_size):
            digest = None  # no file of this size came before, so no need to read it twice
        else:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            _check_unchanged(file, path, before)
            if found and found[4] != digest:
                raise BatchError(
                    f"{path}: batch {batch_id} was loaded into {table} as load {found[0]} with other bytes: sha256 was "
                    f"{found[4]}, is {digest}. A batch never changes: deliver corrections as a new batch, with a newer "
                    f"updated_at."
                )
            found = found or _find(cur, table, sha256=digest)
        is_new = not found
        if not found:
            found = _copy(cur, table, batch_id, file, path, before, header, updated_at)
            is_new = found[1] == batch_id
    load = Load(*found, is_new=is_new, seconds=time.monotonic() - started)
    log.info("%s: %s", table, load)
    return load


def _open(path: Path) -> FileIO:
    try:
        # O_NONBLOCK: opening a FIFO would wait for its writer, for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BatchError(
            f"{path!s}: {getattr(error, 'strerror', error)}. Has the file been moved, or not been delivered yet?"
        ) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise BatchError(f"{path}: not a regular file")
    return FileIO(fd, "rb")


def _read_header(file: FileIO, path: Path) -> list[str]:
    """The names in the first line. Refuses what is visibly not a whole CSV file; leaves the file at its start."""
    start = file.read(HEADER_BYTES)
    if not start.removeprefix(BOM).strip():
        raise BatchError(f"{path}: the file is empty. A batch without rows has a header all the same.")
    for magic, what in NOT_CSV.items():
        if start.removeprefix(BOM).lstrip().startswith(magic):
            raise BatchError(f"{path}: not a CSV file but {what}")
    file.seek(-1, os.SEEK_END)
    if file.read(1) not in (b"\n", b"\r"):
        raise BatchError(
            f"{path}: the last line has no line end, so the file is cut off or still being written. "
            f"If it is whole, add the line end."
        )
    file.seek(0)
    text = start.removeprefix(BOM).decode("utf-8", errors="replace")
    try:
        return next(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise BatchError(f"{path}, line 1: the header can't be read: {error}") from None


def _full_name(cur: Cursor[Any], table: str) -> str:
    """The one name of a table that the ledger knows, however the caller spelled it."""
    cur.execute(
        "SELECT n.nspname || '.' || c.relname FROM pg_class AS c INNER JOIN pg_namespace AS n ON c.relnamespace = n.oid"
        " WHERE c.oid = %s::text::regclass",
        (table,),
    )
    ((name,),) = cur.fetchall()
    return str(name)


def _take_turn(cur: Cursor[Any], table: str, batch_id: str) -> None:
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


def _check_header(cur: Cursor[Any], table: str, header: list[str], path: Path) -> None:
    """Refuse a header that does not name each of the table's columns once."""
    cur.execute(
        "SELECT attname::text FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped"
        " AND attname <> ALL (%s) ORDER BY attnum",
        (table, list(OWN_COLUMNS)),
    )
    columns = [name for (name,) in cur.fetchall()]
    problems = {
        "missing": [name for name in columns if name not in header],
        "unknown": [name for name in dict.fromkeys(header) if name not in columns],
        "more than once": [name for name, times in Counter(header).items() if times > 1],
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {', '.join(map(repr, names))}" for what, names in problems.items() if names)
        raise BatchError(
            f"{path}, line 1: the header does not fit {table}. {found}. "
            f"It must name these columns, separated by commas, in any order: {', '.join(columns)}"
        )


def _find(cur: Cursor[Any], table: str, **condition: object) -> tuple[int, str, int, int, str] | None:
    """The first load of the table with this batch_id, sha256 or bytes: (load_id, batch_id, rows, bytes, sha256)."""
    ((column, value),) = condition.items()
    query = sql.SQL(
        "SELECT load_id, batch_id, rows, bytes, sha256 FROM raw.loads"
        " WHERE table_name = %s AND {} = %s AND (rows > 0 OR {}) ORDER BY load_id LIMIT 1"
    )  # batches without rows are all alike: only their batch_id tells them apart
    cur.execute(query.format(sql.Identifier(column), column == "batch_id"), (table, value))
    return cur.fetchone()


def _check_unchanged(file: FileIO, path: Path, before: os.stat_result) -> None:
    now = os.fstat(file.fileno())
    if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise BatchError(
            f"{path}: the file changed while it was read ({before.st_size:,} bytes, then {now.st_size:,}): it is still "
            f"being written. Write it beside and rename it when it is whole."
        )
    file.seek(0)


def _copy(
    cur: Cursor[Any],
    table: str,
    batch_id: str,
    file: FileIO,
    path: Path,
    before: os.stat_result,
    header: list[str],
    updated_at: datetime | None,
) -> tuple[int, str, int, int, str]:
    """Bring the rows and the ledger row, or find that another loader has just brought the same bytes."""
    # Numbers that this session kept in its cache are older than those another session has used since: without this,
    # row_id would not be the order of arrival.
    cur.execute("DISCARD SEQUENCES")
    cur.execute("SELECT id, set_config('de_dw.load_id', id::text, true) FROM nextval('raw.loads_load_id_seq') AS id")
    (load_id, _) = cur.fetchone() or (0, "")
    statement = sql.SQL("COPY {} ({}) FROM STDIN WITH (FORMAT csv, HEADER true, ENCODING 'UTF8')").format(
        sql.Identifier(*table.split(".")), sql.SQL(", ").join(map(sql.Identifier, header))
    )
    found: tuple[int, str, int, int, str] | None = None
    with cur.connection.transaction():
        try:
            digest = _stream(cur, statement, file, path, before.st_size, table)
        except (DataError, IntegrityError) as error:
            raise BatchError(_explain(error, path)) from None
        rows = cur.rowcount
        cur.execute("SELECT set_config('de_dw.load_id', '', true)")  # what the caller inserts is not of this load
        _check_unchanged(file, path, before)
        cur.execute(
            "INSERT INTO raw.loads (load_id, table_name, batch_id, source, sha256, bytes, rows, batch_updated_at)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
            (
                load_id,
                table,
                batch_id,
                os.fsencode(path).decode(errors="backslashreplace"),
                digest,
                before.st_size,
                rows,
                updated_at,
            ),
        )
        if cur.rowcount == 0:
            raise Rollback  # another loader has committed the same bytes meanwhile: take our rows out again
        found = (load_id, batch_id, rows, before.st_size, digest)
    found = found or _find(cur, table, sha256=digest)
    if not found:  # a caller under REPEATABLE READ can't see it; nor is it there if somebody took our load_id by hand
        raise errors.SerializationFailure(f"raw.loads has got a row of batch {batch_id}, or load {load_id}: call again")
    return found


def _stream(cur: Cursor[Any], statement: sql.Composed, file: FileIO, path: Path, size: int, table: str) -> str:
    """Send the file, and return the SHA-256 of what was sent. The cursor's rowcount is then the number of rows."""
    digest = hashlib.sha256()
    started = reported = time.monotonic()
    sent = lines = quotes = 0
    tail = NEWLINE  # the end of the block before: a line may begin in one block and end in the next
    with cur.copy(statement) as copy:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            skip = len(BOM) if sent == 0 and block.startswith(BOM) else 0
            stray = _find_stray_quote((NEWLINE if skip else tail[-1:]) + block[skip:], quotes)
            if stray is not None:
                raise BatchError(
                    f"{path}, line {lines + block.count(NEWLINE, 0, stray + skip) + 1}: a quote inside a field, where "
                    f"PostgreSQL would drop it or read on to the next one. Nothing was loaded. A field with a quote is "
                    f'quoted, and the quote doubled: "24"" screen".'
                )
            window = tail + block
            for match in END_OF_DATA.finditer(window) if b"\\." in window else ():
                position = max(match.start() + 1 - len(tail), 0)
                if (quotes + block.count(b'"', 0, position)) % 2 == 1:
                    continue  # within a quoted field, so it is data
                raise BatchError(
                    f"{path}, line {lines + block.count(NEWLINE, 0, position) + 1}: a line of just \\. is the end "
                    f"of the data for PostgreSQL 17 and older, which would drop what follows. Nothing was loaded. "
                    f"Remove the line, or quote it if it is data."
                )
            copy.write(block)
            tail = window[-3:]
            quotes += block.count(b'"')
            lines += block.count(NEWLINE)
            sent += len(block)
            now = time.monotonic()
            if now - reported >= PROGRESS_SECONDS:
                reported = now
                log.info(
                    "%s: %s of %s MB (%d%%), %s lines, %.1f MB/s",
                    table,
                    f"{sent / 1e6:,.0f}",
                    f"{size / 1e6:,.0f}",
                    100 * sent / max(size, 1),
                    f"{lines:,}",
                    sent / 1e6 / (now - started),
                )
    return digest.hexdigest()


def _find_stray_quote(window: bytes, quotes: int) -> int | None:
    """Where a quote stands that neither begins nor ends a field nor is doubled: its offset in the block, or None.

    PostgreSQL begins and ends quoting anywhere in a field: a stray pair vanishes, and what is between two strays, line
    ends included, becomes one field.

    :param window: the last byte of the block before, then the block.
    :param quotes: number of quotes before the block; after an even number the next one begins a field.
    """
    text = np.frombuffer(window, np.uint8)
    places = np.flatnonzero(text[1:] == QUOTE) + 1
    begins = (quotes + np.arange(len(places))) % 2 == 0
    # The first byte of this block is after the last of the one before: a quote that ended there is looked at now.
    ended_before = window[:1] == b'"' and quotes % 2 == 0
    if ended_before and not BESIDE_A_QUOTE[text[1]]:
        return 0
    after = text[np.minimum(places + 1, len(text) - 1)]
    fits = np.where(begins, BESIDE_A_QUOTE[text[places - 1]], BESIDE_A_QUOTE[after] | (places + 1 == len(text)))
    strays = places[~fits]
    return int(strays[0]) - 1 if len(strays) else None


def _explain(error: DataError | IntegrityError, path: Path) -> str:
    """PostgreSQL's message with the place it names, but without the other values of the row: they may be personal."""
    where = str(path)
    what = error.diag.message_primary or str(error)
    match = COPY_CONTEXT.match(error.diag.context or "")
    if match:
        line, column, value = match.groups()
        column = column or error.diag.column_name
        where += f", line {line}" + (f", column {column}" if column else "") + (f", value {value!r}" if value else "")
    message = f"{where}: {what}. Nothing was loaded. Correct the file at its source and load it again."
    # A value may hold line ends or terminal codes: they must not write log lines of their own.
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in message)
