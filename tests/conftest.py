"""A fresh warehouse for every test, on real servers: copy this file to test your own SQL.

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
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

import psutil
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from stg_refresh import rows_written

from local.postgres import DEBIAN_15, Server, embedded_binaries
from local.settings import environment, metadata_url

Met = TypeVar("Met")
ROOT = Path(__file__).resolve().parents[1]
# Nothing here outlives the run, so nothing needs to be on disk.
FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "100"}
FAST |= {"max_wal_size": "256MB"}  # of the memory that the servers are in
MEMORY = Path("/dev/shm")  # noqa: S108
MEMORY_BYTES = 2 * 1024**3
NUMBERS = itertools.count(1)
# How many files and deliveries Hypothesis makes up for a property of the whole: enough for faults that are not rare.
HISTORIES = int(os.environ.get("HISTORIES", "80"))
# The three ways to refresh.
SWAP, UNION, MERGE = "stg.orders_latest", "stg.orders_latest.union", "stg.orders_latest.merge"
SCRIPTS = {"swap": SWAP, "union": UNION, "merge": MERGE}
by_every_refresh = pytest.mark.parametrize("refresh", [SWAP, UNION, MERGE])
by_every_swap = pytest.mark.parametrize("refresh", [SWAP, UNION])


def script_of(transform: str) -> str:
    """What is in sql/transforms/<transform>.sql."""
    return (ROOT / "sql" / "transforms" / f"{transform}.sql").read_text()


def before_commit(transform: str) -> str:
    return script_of(transform).partition("\nCOMMIT;")[0]


VERIFY = script_of("stg.orders_latest.verify")


@dataclass(frozen=True)
class DatabaseServer:
    """A server that databases may be made on. `admin` is a superuser's conninfo, `binaries` has psql and pg_dump."""

    admin: str
    binaries: Path

    def make(self, *, template: str = "template1", owner: str = "") -> str:
        """A new database: its conninfo, as the superuser or as its owner."""
        name = f"test_{os.getpid()}_{next(NUMBERS)}"
        with psycopg.connect(self.admin, autocommit=True) as conn:
            # FILE_COPY: a third of the time of the default, which writes all pages to the WAL
            query = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy").format(
                sql.Identifier(name), sql.Identifier(template)
            )
            conn.execute(query + sql.SQL(" OWNER {}").format(sql.Identifier(owner)) if owner else query)
        return make_conninfo(self.admin, dbname=name, **({"user": owner} if owner else {}))

    @cached_property
    def template(self) -> str:
        """The name of a database with all migrations, to clone."""
        url = self.make()
        alembic(url, "upgrade", "head")
        return str(psycopg.conninfo.conninfo_to_dict(url)["dbname"])

    def drop(self, conninfo: str) -> None:
        name = psycopg.conninfo.conninfo_to_dict(conninfo)["dbname"]
        with psycopg.connect(self.admin, autocommit=True) as conn:
            conn.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(str(name))))


@dataclass(frozen=True)
class Warehouse:
    """A migrated database, and the words to write a test with: given, run, rows, alter, verification."""

    url: str
    server: DatabaseServer

    def connect(self, role: str = "de_dw_pipeline", **options: Any) -> psycopg.Connection[Any]:
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
        with self.connect() as conn:
            conn.execute(
                "INSERT INTO raw.loads (table_name, batch_id, source, sha256, bytes, rows)"
                " SELECT %s, id, 'test', encode(sha256(id::bytea), 'hex'), 0, %s"
                " FROM (SELECT gen_random_uuid()::text) AS new (id)"
                " RETURNING set_config('de_dw.load_id', load_id::text, true)",
                (table, len(lines) - 1),
            )
            for line in lines[1:]:
                conn.execute(query, [None if cell == "NULL" else cell for cell in line])

    def run(self, transform: str, *, notices: list[str] | None = None, settings: str = "") -> int:
        """Run sql/transforms/<transform>.sql as Airflow does, and return the number of rows it wrote."""
        with self.connect(autocommit=True) as conn:
            if notices is not None:
                conn.add_notice_handler(lambda diag: notices.append(diag.message_primary or ""))
            conn.execute(settings)
            return int(rows_written(conn.execute(script_of(transform).encode())))

    def rows(self, query: str, role: str = "de_dw_reader") -> list[tuple[Any, ...]]:
        """The result of a query, by default with an analyst's rights."""
        with self.connect(role) as conn:
            return conn.execute(query.encode()).fetchall()

    def alter(self, statements: str, role: str = "") -> None:
        """Do what a test is about, by default with the owner's rights."""
        with self.connect(role) as conn:
            conn.execute(statements.encode())

    def verification(self) -> tuple[int, ...]:
        """Rows of stg that are missing, extra and different, and how many were compared."""
        (found,) = self.rows(VERIFY, "de_dw_pipeline")
        return found


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


def wait_until(
    condition: Callable[[], Met], seconds: float = 30, problem: str = "it did not happen", pause: float = 0.01
) -> Met:
    """Wait for what another thread or process does: until the condition is true, which is returned."""
    give_up = time.monotonic() + seconds
    while not (met := condition()):
        assert time.monotonic() < give_up, f"{problem} after {seconds:.0f} s"
        time.sleep(pause)
    return met


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, so that the processes of pytest -n end at about the same time."""
    slow = ["local", "dags", "alembic"]
    items.sort(key=lambda item: [*slow, item.path.parent.name].index(item.path.parent.name))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With pytest -n the tests of one file on one server follow each other in one process, for they share fixtures."""
    from xdist.scheduler import LoadScopeScheduling

    def file_and_server(nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        # those of make demo share a clone with an installation in it
        server = "" if "/local/" in file else next((name for name in servers() if name in test), "")
        return f"{file} {server}"

    config.option.loadscopereorder = False  # by number of tests
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = file_and_server
    return scheduler


def servers() -> list[str]:
    if os.environ.get("WAREHOUSE_URL"):
        return ["WAREHOUSE_URL"]
    return [*(["postgres15"] if DEBIAN_15.exists() else []), "embedded"]


@contextmanager
def folder_for_a_server() -> Iterator[Path]:
    """In memory, if there is plenty: on a slow disk it takes not 10 but 300 ms to clone a database."""
    for left in MEMORY.glob("de_dw-test-*"):  # by a run that was killed
        if not psutil.pid_exists(int(left.name.split("-")[2])):
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
                running = DatabaseServer(os.environ[name], embedded_binaries())
                stack.callback(lambda: running.drop(make_conninfo(running.admin, dbname=running.template)))
                return running
            binaries = DEBIAN_15 if name == "postgres15" else embedded_binaries()
            server = stack.enter_context(Server(stack.enter_context(folder_for_a_server()), binaries, FAST))
            return DatabaseServer(server.url("postgres"), binaries)

        yield start_


@pytest.fixture(scope="session", params=servers())
def server(request: pytest.FixtureRequest, start: Callable[[str], DatabaseServer]) -> DatabaseServer:
    return start(request.param)


@pytest.fixture
def warehouse(server: DatabaseServer) -> Iterator[Warehouse]:
    url = server.make(template=server.template)
    yield Warehouse(url, server)
    server.drop(url)


@pytest.fixture
def database(server: DatabaseServer) -> Iterator[str]:
    """An empty database, for the migrations themselves."""
    url = server.make()
    yield url
    server.drop(url)


class S3:
    """moto's S3 API server as a process of its own, with one bucket; what it holds ends with it.

    :param checked_after: requests that need no valid credentials; all, if it is None.
    :param host: the address that it listens on.
    """

    bucket = "warehouse"

    def __init__(self, checked_after: int | None = None, host: str = "127.0.0.1") -> None:
        with socket.socket() as probe:
            probe.bind((host, 0))
            self.host, self.port = probe.getsockname()
        self.endpoint = f"http://{self.host}:{self.port}"
        self.more = {} if checked_after is None else {"INITIAL_NO_AUTH_ACTION_COUNT": str(checked_after)}
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", self.host, "-p", str(self.port)],
            env=os.environ | {"PYTHONWARNINGS": "ignore"} | self.more,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(self._listens)
        self.client().create_bucket(Bucket=self.bucket)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _listens(self) -> bool:
        with suppress(OSError), socket.create_connection((self.host, self.port), timeout=1):
            return True
        assert self.process.poll() is None, "moto's server ended by itself"
        return False

    @property
    def environment(self) -> dict[str, str]:
        """For boto, s3fs, and by the connection aws_default for Airflow."""
        extra = {"endpoint_url": self.endpoint, "region_name": "us-east-1"}
        connection = {"conn_type": "aws", "login": "testing", "password": "not-a-secret", "extra": extra}
        return {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "not-a-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_MAX_ATTEMPTS": "1",
            "AIRFLOW_CONN_AWS_DEFAULT": json.dumps(connection),
        }

    def client(self) -> Any:
        """boto's client: another program than the one under test, with no cache in common."""
        from botocore.session import Session

        return Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key="not-a-secret",  # noqa: S106
        )

    def path(self, key: str, bucket: str = bucket) -> Any:
        """For loader and generator, with the credentials of the environment."""
        from upath import UPath

        return UPath(f"s3://{bucket}/{key}", endpoint_url=self.endpoint)

    def put(self, key: str, content: bytes) -> Any:
        self.client().put_object(Bucket=self.bucket, Key=key, Body=content)
        return self.path(key)

    def get(self, key: str) -> bytes:
        content: bytes = self.client().get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return content

    def keys(self, prefix: str) -> list[str]:
        listed = self.client().list_objects_v2(Bucket=self.bucket, Prefix=prefix)
        return [found["Key"] for found in listed.get("Contents", [])]

    def uploads(self, prefix: str) -> list[dict[str, Any]]:
        """Those that are not finished."""
        listed = self.client().list_multipart_uploads(Bucket=self.bucket, Prefix=prefix)
        return [upload for upload in listed.get("Uploads", []) if upload["Key"].startswith(prefix)]


def s3_server(**options: Any) -> Iterator[S3]:
    with pytest.MonkeyPatch.context() as patch:
        server = S3(**options)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
        server.stop()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    yield from s3_server()


@pytest.fixture
def own_s3(request: pytest.FixtureRequest) -> Iterator[S3]:
    """One to stop and start, for the test alone."""
    yield from s3_server(**getattr(request, "param", {}))


@pytest.fixture(scope="session")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Airflow with a metadata database of its own, in this process: one, for it reads its settings once."""
    assert "airflow" not in sys.modules, "it has read its settings already, and would use ~/airflow"
    home = tmp_path_factory.mktemp("airflow")
    with (
        pytest.MonkeyPatch.context() as patch,
        folder_for_a_server() as folder,
        Server(folder, settings=FAST) as server,
    ):
        with psycopg.connect(server.url("postgres"), autocommit=True) as conn:
            conn.execute("CREATE DATABASE airflow")
        with pytest.MonkeyPatch.context() as state:
            state.setattr("local.settings.RUN", home)
            variables = environment("postgresql://", metadata_url(server.socket_dir), 8080)
        for name, value in variables.items():
            if name != "WAREHOUSE_URL":
                patch.setenv(name, value)
        patch.setenv("WAREHOUSE_DATA", str(home / "data"))
        from airflow.settings import dispose_orm
        from airflow.utils.db import initdb

        initdb()
        yield
        dispose_orm()
