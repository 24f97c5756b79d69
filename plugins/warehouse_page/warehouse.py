"""What the page asks the warehouse, and how: read-only, as de_dw_reader, with an end to its patience.

Everything here is asynchronous. A warehouse that hangs may cost its visitors a few seconds, but never holds one of the
threads in which the API server answers everybody else.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from airflow.models.connection import Connection
from airflow.sdk.exceptions import AirflowNotFoundException
from psycopg import AsyncConnection, Error, IsolationLevel, OperationalError, errors, pq, sql
from psycopg.rows import DictRow, dict_row

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")
Warehouse = AsyncConnection[DictRow]

CONNECTION = "de_dw_reader"
CONNECTIONS = 4  # at a time; more visitors wait for each other
CONNECT_SECONDS = 3
STATEMENT_SECONDS = 3
PATIENCE_SECONDS = 5.0  # for the whole of an answer
# Not JIT: compiling takes longer than any of these queries runs.
OPTIONS = (
    f"-c statement_timeout={STATEMENT_SECONDS}s -c lock_timeout=1s -c default_transaction_read_only=on"
    " -c jit=off -c timezone=UTC -c search_path=pg_catalog"
)
KNOWN_TO_LIBPQ = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}

LOADS_A_PAGE = 50
REJECTS_A_PAGE = 100
PENDING_SHOWN = 10
CHECKS_SHOWN = 100
EXAMPLES_SHOWN = 20
EXAMPLE_CHARACTERS = 500
CHARACTERS = 1000  # of a rejected record; it may have a gigabyte
COUNT_VERSIONS_UP_TO = 2_000_000  # rows: more than that takes longer than anybody waits for a page

TABLES = """
SELECT
    table_name,
    source_table,
    (SELECT max(l.load_id) FROM raw.loads AS l WHERE l.table_name = v.source_table) AS last_load
FROM stg.table_versions AS v
ORDER BY table_name ASC
"""
TABLE = "SELECT *, now() AS now FROM ops.tables WHERE table_name = %(table)s"
KEY = """
SELECT string_agg(a.attname, ', ' ORDER BY a.attnum ASC) AS columns
FROM pg_index AS i
INNER JOIN pg_attribute AS a ON i.indrelid = a.attrelid AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1])
WHERE i.indisprimary AND i.indrelid = to_regclass(format('stg.%%I', %(table)s::text))
"""
# One more than a page tells whether there is a next one.
LOADS = "SELECT * FROM ops.loads WHERE table_name = %(source)s ORDER BY load_id DESC LIMIT %(loads)s"
OLDER_LOADS = """
SELECT * FROM ops.loads WHERE table_name = %(source)s AND load_id < %(before)s ORDER BY load_id DESC LIMIT %(loads)s
"""
NEWER_LOADS = """
SELECT * FROM ops.loads WHERE table_name = %(source)s AND load_id > %(after)s ORDER BY load_id ASC LIMIT %(loads)s
"""
# Examples as text, cut where they are: what a check finds may be of any size and shape.
CHECKS = """
SELECT
    check_name,
    severity,
    outcome,
    offending,
    batch_id,
    batch_id AS run_id,
    checked_at,
    ARRAY(
        SELECT left(e::text, %(characters)s) FROM json_array_elements(examples) WITH ORDINALITY AS a (e, n)
        ORDER BY n ASC LIMIT %(examples)s
    ) AS examples
FROM ops.last_checks
WHERE table_name = %(table)s
ORDER BY array_position(ARRAY['failed', 'accepted', 'warned', 'passed'], outcome) ASC, check_name ASC
LIMIT %(checks)s
"""
CONSTRAINTS = """
SELECT conname AS name, pg_get_constraintdef(oid, true) AS rule
FROM pg_constraint
WHERE conrelid = %(oid)s AND contype = 'c'
ORDER BY conname ASC
"""
PENDING = """
SELECT p.load_id, p.rows, p.finished_at, p.batch_id, l.run_id
FROM stg.pending_loads AS p
INNER JOIN raw.loads AS l ON p.load_id = l.load_id
WHERE p.table_name = %(table)s
ORDER BY p.load_id ASC
LIMIT %(pending)s
"""
VERSIONS = "SELECT versions, keys FROM ops.versions_per_key(%(table)s)"
# A source is named without quotes, as the ledger has it, so schema and name may have dots: the catalog knows.
RELATION = """
SELECT n.nspname AS schema, c.relname AS name, c.oid
FROM pg_namespace AS n
INNER JOIN pg_class AS c ON n.oid = c.relnamespace
WHERE starts_with(%(source)s, n.nspname || '.')
    AND c.relname = substr(%(source)s, length(n.nspname) + 2)
    AND c.relkind IN ('r', 'p')
"""
REJECTS = """
SELECT
    load_id,
    line_number,
    column_name,
    left(reason, %(characters)s) AS reason,
    left(line, %(characters)s) AS line,
    octet_length(line) AS bytes
FROM {table}
WHERE {after}
ORDER BY {order}
LIMIT %(rejects)s
"""


class Unavailable(Exception):
    """The warehouse can't answer: what is wrong, and what helps. Both are shown, so neither names host or login."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


class UnknownTable(Exception):
    """There is no such staging table."""


class Page(NamedTuple):
    """Rows of a list, and the keys that the pages beside it begin after; None when there is none."""

    rows: list[DictRow]
    older: Any = None
    newer: Any = None


@dataclass
class Overview:
    """One staging table; `table` is None when stg.table_versions is empty."""

    names: list[str]
    table: DictRow | None = None
    key: str = ""
    loads: Page = field(default_factory=lambda: Page([]))
    checks: list[DictRow] = field(default_factory=list)
    constraints: list[DictRow] = field(default_factory=list)
    pending: list[DictRow] = field(default_factory=list)


@dataclass
class Rejects:
    """Records that the loads of a table left out. `exist` is False when it has no table for them."""

    names: list[str]
    table: str
    source: str
    page: Page
    exist: bool


class Reader:
    """Answers questions to the warehouse, a few at a time. One for a process, for its event loop is one."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(CONNECTIONS)
        self._asked: set[asyncio.Task[Any]] = set()

    async def ask(self, question: Callable[[Warehouse], Awaitable[Answer]]) -> Answer:
        """Put a question on a connection of its own, in a transaction that sees one state of everything.

        :raises Unavailable: there is no answer, or not in time.
        """
        task = asyncio.create_task(self._answer(question))
        self._asked.add(task)
        task.add_done_callback(self._forget)
        try:
            # A server that hangs is asked to cancel, for seconds more: nobody waits for that.
            done, _ = await asyncio.wait({task}, timeout=PATIENCE_SECONDS)
        finally:
            task.cancel()
        if not done:
            raise Unavailable(
                f"The warehouse did not answer within {PATIENCE_SECONDS:.0f} seconds",
                "It hangs, is out of reach, or has too much to do.",
            )
        return task.result()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._asked.discard(task)
        if not task.cancelled():
            task.exception()  # of one that nobody waited for, or asyncio would complain

    async def _answer(self, question: Callable[[Warehouse], Awaitable[Answer]]) -> Answer:
        async with self._free:
            # In a thread: a secrets backend may go to the network, Airflow's own database at least.
            parameters = await asyncio.to_thread(connection_parameters)
            try:
                conn: Warehouse = await AsyncConnection.connect(**parameters, row_factory=dict_row)
            except OperationalError as error:
                log.warning("connection %s: %s", CONNECTION, str(error).strip())  # libpq never says the password
                raise Unavailable(
                    f"The connection {CONNECTION} can't be opened",
                    "The warehouse is down, or it does not take this login. The API server's log has the reason.",
                ) from None
            async with conn:
                await conn.set_read_only(True)
                await conn.set_isolation_level(IsolationLevel.REPEATABLE_READ)
                try:
                    return await question(conn)
                except Error as error:
                    raise unavailable(error) from error


def connection_parameters() -> dict[str, Any]:
    """The connection de_dw_reader for libpq, wherever Airflow keeps it. What else its extra has is for Airflow's hook.

    :raises Unavailable: there is none.
    """
    try:
        connection = Connection.get_connection_from_secrets(CONNECTION)
    except AirflowNotFoundException:
        raise Unavailable(
            f"Airflow has no connection {CONNECTION}",
            "The API server needs it, with a login that has the role de_dw_reader: "
            f"as the environment variable AIRFLOW_CONN_{CONNECTION.upper()}, or in Admin, Connections.",
        ) from None
    named = {
        "host": connection.host,
        "port": connection.port,
        "user": connection.login,
        "password": connection.password,
        "dbname": connection.schema,
        "application_name": "airflow warehouse page",
        "connect_timeout": CONNECT_SECONDS,
    }
    extra = {name: value for name, value in connection.extra_dejson.items() if name in KNOWN_TO_LIBPQ}
    # Ours are last, so that they count.
    options = f"{extra.pop('options', '')} {OPTIONS}".strip()
    return {name: value for name, value in named.items() if value is not None} | extra | {"options": options}


def unavailable(error: Error) -> Unavailable:
    """Say for people why a query failed."""
    log.warning("connection %s: %s", CONNECTION, error)
    match error:
        case errors.QueryCanceled() | errors.LockNotAvailable():
            return Unavailable(
                f"A query took longer than {STATEMENT_SECONDS} seconds",
                "The warehouse has too much to do, or a migration holds what the page reads.",
            )
        case (
            errors.UndefinedTable() | errors.UndefinedColumn() | errors.UndefinedFunction() | errors.InvalidSchemaName()
        ):
            return Unavailable(
                "The warehouse's schema is older than this page",
                "Run: alembic upgrade head, with WAREHOUSE_URL of the schema's owner.",
            )
        case errors.InsufficientPrivilege():
            return Unavailable(
                f"The login of the connection {CONNECTION} may not read all of the warehouse",
                "Grant it the role de_dw_reader.",
            )
        case _:
            return Unavailable("The warehouse ended the query with an error", "The API server's log has it.")


async def overview(conn: Warehouse, table: str | None, before: int | None = None, after: int | None = None) -> Overview:
    """All of the page about a staging table, the first one if None, with a page of its loads.

    :param before: loads that are older than this one.
    :param after: loads that are newer than this one.
    :raises UnknownTable: there is no such table.
    """
    names, chosen = await _choose(conn, table)
    if chosen is None:
        return Overview(names)
    source = await _relation(conn, chosen["source_table"])
    asked = {
        "table": chosen["table_name"],
        "source": chosen["source_table"],
        "oid": source["oid"] if source else 0,
        "before": before,
        "after": after,
        "loads": LOADS_A_PAGE + 1,
        "pending": PENDING_SHOWN,
        "checks": CHECKS_SHOWN,
        "characters": EXAMPLE_CHARACTERS,
        "examples": EXAMPLES_SHOWN,
    }
    about = await _rows(conn, TABLE, asked)
    (key,) = await _rows(conn, KEY, asked)
    return Overview(
        names=names,
        table=about[0] if about else None,
        key=key["columns"] or "key",
        loads=await _loads(conn, asked),
        checks=await _rows(conn, CHECKS, asked),
        constraints=await _rows(conn, CONSTRAINTS, asked),
        pending=await _rows(conn, PENDING, asked) if about and about[0]["pending_loads"] else [],
    )


async def _loads(conn: Warehouse, asked: dict[str, Any]) -> Page:
    if asked["after"] is not None:
        found = await _rows(conn, NEWER_LOADS, asked)
        rows = found[:LOADS_A_PAGE][::-1]
        newer = rows[0]["load_id"] if len(found) > LOADS_A_PAGE else None
        return Page(rows, older=rows[-1]["load_id"] if rows else None, newer=newer)
    found = await _rows(conn, LOADS if asked["before"] is None else OLDER_LOADS, asked)
    rows = found[:LOADS_A_PAGE]
    newer = rows[0]["load_id"] if rows and asked["before"] is not None else None
    return Page(rows, older=rows[-1]["load_id"] if len(found) > LOADS_A_PAGE else None, newer=newer)


async def rejects(
    conn: Warehouse, table: str | None, load: int | None = None, after: tuple[int, int] | None = None
) -> Rejects:
    """A page of rejected records: of one load in the order of its file, or of all loads, the last one first.

    :param after: load and line of the record that the page before ended with.
    :raises UnknownTable: there is no such table.
    """
    names, chosen = await _choose(conn, table)
    if chosen is None:
        raise UnknownTable
    relation = await _relation(conn, f"{chosen['source_table']}_rejects")
    if relation is None:
        return Rejects(names, chosen["table_name"], str(chosen["source_table"]), Page([]), exist=False)
    if load is None:
        begin = "(load_id, line_number) < (%(load)s, %(line)s)" if after else "true"
        order = "load_id DESC, line_number DESC"
    else:
        begin = "load_id = %(load)s AND line_number > %(line)s"
        order = "line_number ASC"
    table_of_rejects = sql.Identifier(relation["schema"], relation["name"])
    query = sql.SQL(REJECTS).format(table=table_of_rejects, after=sql.SQL(begin), order=sql.SQL(order))
    last_load, last_line = after or (load, 0)
    asked = {
        "load": last_load if load is None else load,
        "line": last_line,
        "characters": CHARACTERS,
        "rejects": REJECTS_A_PAGE + 1,
    }
    found = await _rows(conn, query, asked)
    rows = found[:REJECTS_A_PAGE]
    older = (rows[-1]["load_id"], rows[-1]["line_number"]) if len(found) > REJECTS_A_PAGE else None
    return Rejects(names, chosen["table_name"], chosen["source_table"], Page(rows, older=older), exist=True)


async def versions(conn: Warehouse, table: str | None) -> tuple[str, str, list[DictRow] | None]:
    """A staging table's name, its key, and how many keys have how many versions: None where there are too many rows.

    :raises UnknownTable: there is no such table.
    """
    _, chosen = await _choose(conn, table)
    if chosen is None:
        raise UnknownTable
    asked = {"table": chosen["table_name"]}
    about = next(iter(await _rows(conn, TABLE, asked)), None)
    if about is None:
        raise UnknownTable  # the catalog does not have what stg.table_versions names
    (key,) = await _rows(conn, KEY, asked)
    counted = None if about["source_rows"] > COUNT_VERSIONS_UP_TO else await _rows(conn, VERSIONS, asked)
    return chosen["table_name"], key["columns"] or "key", counted


async def _choose(conn: Warehouse, table: str | None) -> tuple[list[str], DictRow | None]:
    tables = await _rows(conn, TABLES)
    if table is None:  # where something has happened last
        chosen = max(tables, key=lambda row: row["last_load"] or 0, default=None)
    else:
        chosen = next((row for row in tables if row["table_name"] == table), None)
        if chosen is None:
            raise UnknownTable
    return [row["table_name"] for row in tables], chosen


async def _relation(conn: Warehouse, name: str | None) -> DictRow | None:
    found = await _rows(conn, RELATION, {"source": name})
    return found[0] if found else None


async def _rows(conn: Warehouse, query: str | sql.Composed, parameters: dict[str, Any] | None = None) -> list[DictRow]:
    cursor = await conn.execute(query.encode() if isinstance(query, str) else query, parameters or {})
    return await cursor.fetchall()
