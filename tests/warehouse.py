"""A fresh warehouse for every test, on real servers: the one file to copy for tests of your own SQL (docs/testing.md).

`warehouse` is a database with all migrations, cloned from a template in milliseconds, on PostgreSQL 15 (Debian's, where
it is installed) and on the embedded one. Set WAREHOUSE_URL to a superuser's URL to use that server instead.

    def test_newest_version_wins(warehouse):
        warehouse.given("raw.orders", '''
            order_id | status  | updated_at
            1        | created | 2026-01-01
            1        | paid    | 2026-01-02
        ''')
        warehouse.run("stg.orders_latest")
        assert warehouse.rows("SELECT order_id, status FROM stg.orders_latest") == [(1, "paid")]
"""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

Met = TypeVar("Met")
ROOT = Path(__file__).resolve().parents[1]
TRANSFORMS = ROOT / "sql" / "transforms"
PIPELINE, READER, OWNER = "de_dw_pipeline", "de_dw_reader", ""
# Nothing here outlives the run, so nothing needs to be on disk. A small cache: each backend maps what it touches of it,
# and DROP DATABASE looks through all of it.
FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "100"}
FAST |= {"shared_buffers": "32MB", "shared_preload_libraries": "plpgsql", "log_checkpoints": "off"}
FAST |= {"max_wal_size": "256MB"}  # of the memory that the servers are in
MEMORY = Path("/dev/shm")  # noqa: S108
MEMORY_BYTES = 2 * 1024**3
NUMBERS = itertools.count(1)
# Makes a session what it was when it began, but for its role.
AS_NEW = """
RESET SESSION AUTHORIZATION; RESET ALL; DISCARD SEQUENCES; DISCARD TEMP; UNLISTEN *; SELECT pg_advisory_unlock_all();
"""


class DatabaseServer:
    """A server to make databases on, in a session that is kept: to begin one takes half as long as a clone.

    :param admin: a superuser's conninfo.
    :param binaries: folder that has psql and pg_dump.
    """

    def __init__(self, admin: str, binaries: Path) -> None:
        self.admin, self.binaries = admin, binaries
        self._worker = ThreadPoolExecutor(1, "databases")
        self._session: psycopg.Connection[Any] | None = None
        self._ahead: Future[str] | None = None

    def make(self, *, template: str = "template1", owner: str = "") -> str:
        """A new database: its conninfo, as the superuser or as its owner."""
        return self._worker.submit(self._make, template, owner).result()

    def clone(self) -> str:
        """A new database with all migrations: the one that was made meanwhile, and the next is begun."""
        made, self._ahead = self._ahead, None
        url = made.result() if made else self.make(template=self.template)
        self._ahead = self._worker.submit(self._make, self.template, "")
        return url

    @cached_property
    def template(self) -> str:
        """The name of a database with all migrations, to clone."""
        url = self.make()
        alembic(url, "upgrade", "head")
        return str(conninfo_to_dict(url)["dbname"])

    def drop(self, conninfo: str) -> None:
        """Drop a database, and end who is in it."""
        self.drop_soon(conninfo).result()

    def drop_soon(self, conninfo: str) -> Future[None]:
        """The same, while the next test runs."""
        return self._worker.submit(self._drop, conninfo)

    def close(self) -> None:
        """Drop what was made for us."""
        if self._ahead:
            self.drop(self._ahead.result())
        if "template" in vars(self):
            self.drop(make_conninfo(self.admin, dbname=self.template))

    def __del__(self) -> None:
        self._worker.shutdown(wait=False)  # it may be the worker itself who lets go of us last
        if self._session:
            self._session.close()

    def _make(self, template: str, owner: str) -> str:
        name = f"test_{os.getpid()}_{next(NUMBERS)}"
        # FILE_COPY: a third of the time of the default, which writes all pages to the WAL
        query = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy").format(
            sql.Identifier(name), sql.Identifier(template)
        )
        self._execute(query + sql.SQL(" OWNER {}").format(sql.Identifier(owner)) if owner else query)
        return make_conninfo(self.admin, dbname=name, **({"user": owner} if owner else {}))

    def _drop(self, conninfo: str) -> None:
        name = str(conninfo_to_dict(conninfo)["dbname"])
        self._execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def _execute(self, query: sql.Composed) -> None:
        if self._session is None or self._session.closed:  # by a server that was started anew
            self._session = psycopg.connect(self.admin, autocommit=True)
        self._session.execute(query)


@dataclass(frozen=True)
class Warehouse:
    """A migrated database, and the words to write a test with: given, run, rows, alter, verification."""

    url: str
    server: DatabaseServer
    _idle: list[psycopg.Connection[Any]] = field(default_factory=list, compare=False, repr=False)

    def connect(self, role: str = PIPELINE, **options: Any) -> psycopg.Connection[Any]:
        """A connection with the rights of a role; role="" is the owner's, a superuser."""
        settings = f"-c role={role}" if role else ""
        return psycopg.connect(make_conninfo(self.url, options=settings), **options)

    def given(self, table: str, data: str) -> None:
        """Bring rows as a load, written as a table: names, then values, with | between; NULL is NULL."""
        lines = [[cell.strip() for cell in line.split("|")] for line in data.strip().splitlines()]
        query = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
            sql.Identifier(*table.split(".")),
            sql.SQL(", ").join(map(sql.Identifier, lines[0])),
            sql.SQL(", ").join([sql.Placeholder()] * len(lines[0])),
        )
        with self._session(PIPELINE, "BEGIN") as conn:
            conn.execute(
                "INSERT INTO raw.loads (table_name, batch_id, source, sha256, bytes, rows)"
                " SELECT %s, id, 'test', encode(sha256(id::bytea), 'hex'), 0, %s"
                " FROM (SELECT gen_random_uuid()::text) AS new (id)"
                " RETURNING set_config('de_dw.load_id', load_id::text, true)",
                (table, len(lines) - 1),
            )
            rows = [[None if cell == "NULL" else cell for cell in line] for line in lines[1:]]
            conn.cursor().executemany(query, rows)
            conn.execute("COMMIT")

    def run(self, transform: str, *, notices: list[str] | None = None, settings: str = "") -> int:
        """Run sql/transforms/<transform>.sql, or stg.<table>.merge or .union, as Airflow does: the rows it wrote."""

        def keep(said: psycopg.errors.Diagnostic) -> None:
            if notices is not None:
                notices.append(said.message_primary or "")

        with self._session(PIPELINE) as conn:
            conn.add_notice_handler(keep)
            conn.execute(settings)
            written = rows_written(conn.execute(script_of(transform).encode()))
            conn.remove_notice_handler(keep)
            return written

    def rows(self, query: str, role: str = READER) -> list[tuple[Any, ...]]:
        """The result of a query, by default with an analyst's rights."""
        with self._session(role, "BEGIN") as conn:
            found = conn.execute(query.encode()).fetchall()
            conn.execute("COMMIT")
            return found

    def alter(self, statements: str, role: str = OWNER) -> None:
        """Do what a test is about, by default with the owner's rights."""
        with self._session(role, "BEGIN") as conn:
            conn.execute(statements.encode())
            conn.execute("COMMIT")

    def verification(self, table: str = "stg.orders_latest") -> tuple[int, ...]:
        """Rows of stg that are missing, extra and different, and how many were compared."""
        query = f"SELECT missing, extra, different, compared FROM stg.verify('{table.removeprefix('stg.')}')"
        (found,) = self.rows(query, PIPELINE)
        return found

    def __del__(self) -> None:
        while self._idle:
            self._idle.pop().close()

    @contextmanager
    def _session(self, role: str, first: str = "") -> Iterator[psycopg.Connection[Any]]:
        """A session that an earlier call had, made like new, or a new one. After an error it is not used again.

        A backend spends more time on getting to know the database than on what a test asks of it.
        """
        begin = f"SET ROLE {role}; {first}" if role else f"RESET ROLE; {first}"
        try:
            conn = self._idle.pop()
            conn.execute((AS_NEW + begin).encode())
        except (IndexError, psycopg.OperationalError):  # none is free, or the server was started anew since
            conn = psycopg.connect(self.url, autocommit=True, prepare_threshold=None)
            conn.execute(begin.encode())
        try:
            yield conn
        except BaseException:
            conn.close()
            raise
        self._idle.append(conn)


def script_of(transform: str) -> str:
    """What is in sql/transforms/<transform>.sql; of stg.<table>.merge and .union what Airflow runs."""
    _, table, kind = f"{transform}.".split(".")[:3]
    if kind:
        from stg_refresh import refresh_script

        return refresh_script(kind, table)
    return (TRANSFORMS / f"{transform}.sql").read_text()


def alembic(url: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The command that users run."""
    done = subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=ROOT,
        env=os.environ | {"WAREHOUSE_URL": url},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 or not check, done.stderr
    return done


def rows_written(cursor: psycopg.Cursor[Any]) -> int:
    """The count of a script's last INSERT, or what the function of a refresh says."""
    rows = 0
    while True:
        if (cursor.statusmessage or "").startswith("INSERT"):
            rows = cursor.rowcount
        if cursor.description and [column.name for column in cursor.description] == ["loads_to_apply", "rows"]:
            (_, rows) = cursor.fetchone() or (0, 0)
        if not cursor.nextset():
            return rows


def wait_until(
    condition: Callable[[], Met], seconds: float = 30, problem: str = "it did not happen", pause: float = 0.01
) -> Met:
    """Wait for what another thread or process does: until the condition is true, which is returned."""
    give_up = time.monotonic() + seconds
    while not (met := condition()):
        assert time.monotonic() < give_up, f"{problem} after {seconds:.0f} s"
        time.sleep(pause)
    return met


def servers() -> list[str]:
    if os.environ.get("WAREHOUSE_URL"):
        return ["WAREHOUSE_URL"]
    from local.postgres import DEBIAN_15

    return [*(["postgres15"] if DEBIAN_15.exists() else []), "embedded"]


def clients() -> Path:
    """The folder of psql and pg_dump: the newest, for an older pg_dump refuses."""
    with suppress(ImportError):
        from local.postgres import embedded_binaries

        return embedded_binaries()
    return Path(shutil.which("psql") or "/usr/bin/psql").parent


@contextmanager
def folder_for_a_server() -> Iterator[Path]:
    """In memory, if there is plenty: on a slow disk it takes not 10 but 300 ms to clone a database."""
    for left in MEMORY.glob("de_dw-test-*"):  # by a run that was killed
        if not Path("/proc", left.name.split("-")[2]).exists():
            shutil.rmtree(left, ignore_errors=True)
    has_plenty = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > MEMORY_BYTES
    parent = MEMORY if has_plenty else None
    with tempfile.TemporaryDirectory(prefix=f"de_dw-test-{os.getpid()}-", dir=parent) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[[str], DatabaseServer]]:
    """Start a server, the first time that it is asked for. It is used until the end, whatever else is used between."""
    with ExitStack() as stack:

        @cache
        def start_(name: str) -> DatabaseServer:
            if name == "WAREHOUSE_URL":
                return stack.enter_context(closing(DatabaseServer(os.environ[name], clients())))
            from local.postgres import DEBIAN_15, Server, embedded_binaries

            binaries = DEBIAN_15 if name == "postgres15" else embedded_binaries()
            server = stack.enter_context(Server(stack.enter_context(folder_for_a_server()), binaries, FAST))
            return stack.enter_context(closing(DatabaseServer(server.url("postgres"), binaries)))

        yield start_


@pytest.fixture(scope="session", params=servers())
def server(request: pytest.FixtureRequest, start: Callable[[str], DatabaseServer]) -> DatabaseServer:
    return start(request.param)


@pytest.fixture
def warehouse(server: DatabaseServer) -> Iterator[Warehouse]:
    url = server.clone()
    yield Warehouse(url, server)
    server.drop_soon(url)


@pytest.fixture
def database(server: DatabaseServer) -> Iterator[str]:
    """An empty database, for the migrations themselves."""
    url = server.make()
    yield url
    server.drop_soon(url)
