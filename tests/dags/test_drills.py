"""Failure drills: what may die under a load or a refresh dies, on real servers, and then the books are checked.

Each drill is done DRILLS times, twice by default, with new batches in the same database:

    DRILLS=20 .venv/bin/python -m pytest -m drill
"""

import hashlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import batch_load
import psycopg
import pytest
from batch_load import Load, load_batch
from psycopg import errors, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from local.postgres import Server
from tests.conftest import SCRIPTS, VERIFY, before_commit
from tests.warehouse import FAST, ROOT, DatabaseServer, Warehouse, folder_for_a_server, script_of, wait_until

pytestmark = pytest.mark.drill

DRILLS = int(os.environ.get("DRILLS", "2"))
ROWS = 1000  # 130 KB: enough for COPY to have written some of it before its end
BLOCK_BYTES = 4096
CHUNK_BYTES = 16 * 1024
SECONDS = 60.0  # longest wait for a loader's word

COLUMNS = (
    "order_id, customer_name, customer_email, product, quantity, unit_price, currency, status, ordered_at, updated_at"
)
HEADER = COLUMNS.replace(" ", "") + "\n"
# The digits of a price count, not only its value.
AS_RECEIVED = COLUMNS.replace("unit_price", "unit_price::text")
BAD_RECORDS = [
    'x,Ann,,"not a number",1,1.00,EUR,paid,,2025-01-01',
    '1,Ann,,"breaks a CHECK",-1,1.00,EUR,paid,,2025-01-01',
    "1,Ann,too few fields",
    '1,Ann,,24" wide,1,1.00,EUR,paid,,2025-01-01',
]
WOODS = ["oak", "Eiche geölt", "オーク", "on two\nlines"]

# For each line of its input a loader in a process of its own, forked: to import what it needs takes longer than a load.
# It says its pid when it has come to a point for the nth time, and waits there for another line.
LOADER = """
import json
import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import batch_file, batch_load, batch_rejects, psycopg

reached = Counter()

def pause(point):
    reached[point] += 1
    if point == task["point"] and reached[point] == task["times"]:
        print(os.getpid(), flush=True)
        sys.stdin.readline() or os._exit(1)

def pausing(function, before, after):
    def paused(*arguments):
        pause(before)
        result = function(*arguments)
        pause(after)
        return result
    return paused

def pausing_blocks(file, blocks=batch_load.BatchFile.blocks):
    for block in blocks(file):
        yield block
        pause("in COPY")

def load():
    try:
        with psycopg.connect(task["url"]) as conn:
            loaded = batch_load.load_batch(
                conn,
                table="raw.orders",
                batch_id=task["batch_id"],
                path=Path(task["path"]),
                max_rejects=task["max_rejects"],
            )
            pause("before COMMIT")
            conn.commit()
            pause("after COMMIT")
    except psycopg.OperationalError:
        return "OperationalError"
    except Exception as error:
        return repr(error)
    return "loaded" if loaded.is_new else "nothing to do"

batch_load.BatchFile.blocks = pausing_blocks
batch_load._copy = pausing(batch_load._copy, "before COPY", "after COPY")
batch_rejects._keep = pausing(batch_rejects._keep, "", "among rejects")
while line := sys.stdin.readline():
    child = os.fork()
    if child == 0:
        task = json.loads(line)
        batch_file.BLOCK_BYTES, batch_file.CHUNK_BYTES = task["block_bytes"], task["chunk_bytes"]
        print(load(), flush=True)
        break
    os.waitpid(child, 0)
"""

Row = tuple[Any, ...]


@dataclass(frozen=True)
class Batch:
    """A file, and what must be in the warehouse once it is loaded.

    :param rows: its good records, in its order.
    :param rejects: its bad ones, as line number and text.
    """

    batch_id: str
    path: Path
    rows: list[Row]
    rejects: list[tuple[int, str]]

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @classmethod
    def write(cls, folder: Path, number: int, *, bad: bool = False, rows: int = ROWS) -> "Batch":
        """Versions of some orders. Few enough ids and days that many tie with those of other batches, or of this."""
        chance = seeded(number)
        batch = cls(f"batch {number}", folder / f"batch {number}.csv", [], [])
        lines = 1
        with batch.path.open("w", encoding="utf-8", newline="") as file:
            file.write(HEADER)
            for place in range(rows):
                if bad and place % 100 == 50:
                    batch.rejects.append((lines + 1, chance.choice(BAD_RECORDS)))
                    file.write(batch.rejects[-1][1] + "\n")
                    lines += 1
                order_id, day, quantity = chance.randint(1, ROWS), chance.randint(1, 5), chance.randint(1, 9)
                product = f'Desk {number}.{place}, 27" {chance.choice(WOODS)}'
                price = f"{chance.randint(1, 999)}.{chance.choice(['5', '50', '500'])}"
                times = (datetime(2025, 1, 1, tzinfo=UTC), datetime(2025, 1, day, 12, 30, tzinfo=UTC))
                who = (f"Ann {order_id}", f"ann.{order_id}@example.com")
                batch.rows.append((order_id, *who, product, quantity, price, "EUR", "paid", *times))
                text = product.replace('"', '""')
                file.write(f'{order_id},{",".join(who)},"{text}",{quantity},{price},EUR,paid,{times[0]},{times[1]}\n')
                lines += 1 + product.count("\n")
        return batch


@dataclass
class Books:
    """What must be in a warehouse, and the check that it is: called after each repetition of each drill.

    :param loaded: the batches that count as loaded, in the order they came; those in one list came at the same time.
    :param published: what the last refresh must have published.
    """

    warehouse: Warehouse
    folder: Path
    delivered: int = 0
    loaded: list[list[Batch]] = field(default_factory=list)
    published: dict[int, Row] = field(default_factory=dict)

    def deliver(self, *, bad: bool = False, rows: int = ROWS) -> Batch:
        """A new file, not loaded yet."""
        self.delivered += 1
        return Batch.write(self.folder, self.delivered, bad=bad, rows=rows)

    def load(self, batch: Batch) -> Load:
        """Load it here and now, as the DAG does."""
        with self.warehouse.connect() as conn:
            return load_batch(
                conn, table="raw.orders", batch_id=batch.batch_id, path=batch.path, max_rejects=len(batch.rejects)
            )

    def load_and_count(self, batch: Batch) -> None:
        assert self.load(batch).is_new
        self.loaded.append([batch])

    def check(self, *, refresh: str = "swap", is_published: bool = False) -> None:
        """Raw, ledger and quarantine hold what was loaded, once; stg what was published; and a refresh brings it on.

        :param refresh: which; "" to stop before that.
        :param is_published: what is loaded now has been published already.
        """
        with self.warehouse.connect("de_dw_reader", autocommit=True) as conn:
            latest = newest(self._check_raw(conn))
            if is_published:
                self.published = latest
            self._check_stg(conn, "before the refresh")
            if refresh:
                written = self.warehouse.run(SCRIPTS[refresh])
                different = sum(self.published.get(order_id) != row for order_id, row in latest.items())
                assert written == (different if refresh == "merge" else len(latest))
                self.published = latest
                self._check_stg(conn, "after the refresh")
                assert fetch(conn, "SELECT load_id FROM stg.applied_loads ORDER BY load_id") == fetch(
                    conn, "SELECT load_id FROM raw.loads ORDER BY load_id"
                )

    def count_as_published(self) -> None:
        """What is loaded now is what a refresh is about to publish."""
        with self.warehouse.connect("de_dw_reader", autocommit=True) as conn:
            self.published = newest(self._check_raw(conn))

    def settle(self, batch: Batch, *, committed: bool, refresh: str = "swap") -> None:
        """Check after an interrupted load, load the batch again, and check again."""
        if committed:
            self.loaded.append([batch])
        self.check(refresh="")
        if not committed:
            self.load_and_count(batch)
        again = self.load(batch)
        assert (again.is_new, again.batch_id, again.rows) == (False, batch.batch_id, len(batch.rows))
        self.check(refresh=refresh)

    def _check_raw(self, conn: psycopg.Connection[Any]) -> list[Row]:
        """Returns the rows of raw.orders in the order they arrived."""
        batches = [batch for together in self.loaded for batch in together]
        ledger = fetch(conn, "SELECT batch_id, rows, rejects, bytes, sha256, table_name FROM raw.loads")
        assert sorted(ledger) == sorted(
            (batch.batch_id, len(batch.rows), len(batch.rejects), batch.size, sha256(batch.path), "raw.orders")
            for batch in batches
        )
        rejects = fetch(
            conn, "SELECT batch_id, line_number, line FROM raw.orders_rejects LEFT JOIN raw.loads USING (load_id)"
        )
        sent = [(batch.batch_id, *reject) for batch in batches for reject in batch.rejects]
        assert sorted(rejects, key=str) == sorted(sent, key=str)

        raw = fetch(
            conn,
            f"SELECT batch_id, {AS_RECEIVED}, row_id, r.load_id"
            " FROM raw.orders AS r LEFT JOIN raw.loads AS l ON r.load_id = l.load_id ORDER BY row_id",
        )
        found: dict[str | None, list[Row]] = defaultdict(list)
        for batch_id, *values, _, _ in raw:
            found[batch_id].append(tuple(values))
        assert sorted(found, key=str) == sorted(batch.batch_id for batch in batches)
        for batch in batches:
            pairs = zip_longest(found[batch.batch_id], batch.rows)
            different = [pair for pair in pairs if pair[0] != pair[1]]
            assert different[:2] == [], f"{len(different)} rows of {batch.batch_id} are not as sent"
        place = {batch.batch_id: number for number, together in enumerate(self.loaded) for batch in together}
        arrived = [place[batch_id] for batch_id, *_ in raw]
        assert all(before <= after for before, after in pairwise(arrived)), "row_id is not the order of arrival"
        return [row[1:] for row in raw]

    def _check_stg(self, conn: psycopg.Connection[Any], when: str) -> None:
        stg = fetch(conn, f"SELECT {AS_RECEIVED}, row_id, load_id FROM stg.orders_latest ORDER BY order_id")
        different = [
            pair for pair in zip_longest(stg, [row for _, row in sorted(self.published.items())]) if pair[0] != pair[1]
        ]
        assert different[:2] == [], f"{len(different)} rows of stg.orders_latest are wrong {when}"
        ((*wrong, _),) = fetch(conn, VERIFY)
        assert wrong == [0, 0, 0], f"missing, extra, different {when}, says the proof in SQL"


def newest(rows: Iterable[Row]) -> dict[int, Row]:
    """By order_id the row that must be published, of all rows in the order they arrived."""
    latest: dict[int, Row] = {}
    for row in rows:
        order_id, updated_at = row[0], row[9]
        if order_id not in latest or updated_at >= latest[order_id][9]:
            latest[order_id] = row
    return latest


def seeded(seed: object) -> random.Random:
    """The same chances in every run."""
    return random.Random(str(seed))  # noqa: S311


def fetch(conn: psycopg.Connection[Any], query: str) -> list[Row]:
    return conn.cursor(binary=True).execute(query.encode()).fetchall()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def books(warehouse: Warehouse, tmp_path: Path) -> Books:
    return Books(warehouse, tmp_path)


@contextmanager
def repetition(number: int, what: str = "") -> Iterator[None]:
    """Say with whatever fails which repetition it was, and what was random in it."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"in repetition {number} of {DRILLS} {what}")
        raise


class Loader:
    """Loads in another process, one batch at a time, stops at a point, and may be killed there."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = 0

    def start(self, warehouse: Warehouse, batch: Batch, point: str, times: int = 1) -> None:
        """Begin to load, and come back when the loader is at the point for the nth time."""
        task = {
            "url": make_conninfo(warehouse.url, options="-c role=de_dw_pipeline", application_name=batch.batch_id),
            "batch_id": batch.batch_id,
            "path": str(batch.path),
            "max_rejects": len(batch.rejects),
            "point": point,
            "times": times,
            "block_bytes": BLOCK_BYTES,
            "chunk_bytes": CHUNK_BYTES,
        }
        said = self._ask(json.dumps(task))
        assert said.isdigit(), said
        self.pid = int(said)
        if point == "in COPY":  # libpq may hold the last 8 KB back until more follow
            wait_until(lambda: bytes_copied(warehouse) >= min(times * BLOCK_BYTES, batch.size) - 8192)

    def kill(self, warehouse: Warehouse, batch: Batch) -> None:
        """kill -9, and wait until the server has noticed."""
        os.kill(self.pid, signal.SIGKILL)
        wait_until(lambda: not backends(warehouse, batch))

    def go_on(self) -> str:
        """Leave the point; returns how the load ended."""
        return self._ask("")

    def _ask(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        assert select.select([self.process.stdout], [], [], SECONDS)[0], "not a word from the loader"
        return self.process.stdout.readline().strip()


@pytest.fixture
def loader() -> Iterator[Loader]:
    command = [sys.executable, "-c", LOADER, str(Path(batch_load.__file__).parent)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield Loader(process)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # and who still waits at a point


def backends(warehouse: Warehouse, batch: Batch) -> list[int]:
    """The pids of those that load it."""
    name = f"application_name = '{batch.batch_id}'"
    query = f"SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND {name}"
    return [pid for (pid,) in warehouse.rows(query, "")]


def bytes_copied(warehouse: Warehouse) -> int:
    """What the server has taken of the file that is being loaded; -1 when none is."""
    query = "SELECT bytes_processed FROM pg_stat_progress_copy WHERE datname = current_database()"
    return max((int(bytes_) for (bytes_,) in warehouse.rows(query, "")), default=-1)


def terminate(warehouse: Warehouse, pid: int) -> None:
    """What an operator does, up to the moment when the backend is gone."""
    assert warehouse.rows(f"SELECT pg_terminate_backend({pid})", "") == [(True,)]
    wait_until(partial(is_gone, warehouse, pid))


def a_block(chance: random.Random, batch: Batch) -> int:
    """After how many blocks to pause: from the first to the last, when all is sent but for the end of COPY."""
    return chance.randint(1, -(-batch.size // BLOCK_BYTES))


# An index that makes whoever writes to it wait, halfway through the table, while a drill holds a lock: a merge amid its
# INSERT, a swap while it makes the spare's index. It has row_id so that no update of a row can do without it.
PAUSE = f"""
CREATE OR REPLACE FUNCTION stg.pause(order_id bigint, row_id bigint) RETURNS bigint LANGUAGE plpgsql IMMUTABLE
SET lock_timeout = 0 -- stg.swap has a short one
AS $$
BEGIN
    IF order_id > {ROWS // 2} THEN
        PERFORM pg_advisory_xact_lock_shared(7);
    END IF;
    RETURN row_id;
END
$$;
CREATE INDEX IF NOT EXISTS pause ON stg.orders_latest_live (stg.pause(order_id, row_id));
"""
# objsubid 1 is for the locks with one key, such as that of a refresh; its key is a hash.
WAITING = """
SELECT pid FROM pg_locks
WHERE locktype = 'advisory' AND NOT granted AND (classid, objid) {is_it} (0, 7)
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
PAUSED, IN_TURN = WAITING.format(is_it="="), WAITING.format(is_it="!=")


@contextmanager
def pause(warehouse: Warehouse) -> Iterator[None]:
    """Any refresh that begins meanwhile comes to a halt halfway, and goes on afterwards."""
    with warehouse.connect(autocommit=True) as conn:
        conn.execute(PAUSE)
    with closing(warehouse.connect("", autocommit=True)) as conn:
        conn.execute("SELECT pg_advisory_lock(7)")
        yield


@contextmanager
def refresh_that_fails(warehouse: Warehouse, moment: str) -> Iterator[int]:
    """The backend pid of a refresh that has come to this moment, and that must not live to see its COMMIT."""
    notices: list[str] = []
    is_done, is_over = threading.Event(), threading.Event()
    kind, _, when = moment.partition(" ")

    def is_there() -> bool:
        if when == "is done":
            return is_done.is_set()
        if when == "waits for a reader":
            return any("is in use by" in notice for notice in notices)
        return warehouse.rows(PAUSED, "") == [(conn.info.backend_pid,)]

    def refresh() -> None:
        conn.execute(before_commit(SCRIPTS[kind]).encode())
        is_done.set()
        is_over.wait(SECONDS)
        conn.execute("COMMIT")

    with closing(warehouse.connect(autocommit=True)) as conn, ThreadPoolExecutor(1) as thread, ExitStack() as stack:
        conn.add_notice_handler(lambda diag: notices.append(diag.message_primary or ""))
        if when == "waits for a reader":
            reader = stack.enter_context(closing(warehouse.connect("de_dw_reader")))
            reader.execute("SELECT count(*) FROM stg.orders_latest")
        elif when != "is done":
            stack.enter_context(pause(warehouse))
        running = thread.submit(refresh)
        try:
            wait_until(lambda: is_there() or running.done())
            assert not running.done(), running.exception()
            yield conn.info.backend_pid
        finally:
            is_over.set()
        with pytest.raises(psycopg.OperationalError):
            running.result(SECONDS)


POINTS = ["before COPY", "in COPY", "after COPY", "among rejects", "before COMMIT", "after COMMIT"]
MOMENTS = [
    "swap is done",
    "swap waits for a reader",
    "union is done",
    "union makes the spare's index",
    "merge is halfway",
    "merge is done",
]


@pytest.mark.parametrize("point", POINTS)
def test_loader_killed_at_any_point_leaves_all_or_nothing_and_its_retry_loads_once(
    books: Books, loader: Loader, point: str
) -> None:
    chance = seeded(point)
    for number in range(1, DRILLS + 1):
        batch = books.deliver(bad=point == "among rejects" or (number % 2 == 0 and "COMMIT" in point))
        times = 1
        if point == "in COPY":
            times = a_block(chance, batch)
        elif point == "among rejects":
            times = chance.randint(1, batch.size // (CHUNK_BYTES + BLOCK_BYTES))
        with repetition(number, f"killed {point}, at block or chunk {times}"):
            loader.start(books.warehouse, batch, point, times)
            assert len(backends(books.warehouse, batch)) == 1

            loader.kill(books.warehouse, batch)

            books.settle(batch, committed=point == "after COMMIT")


class OwnServer(NamedTuple):
    """A server that a drill may stop, and a database on it with all migrations to clone."""

    server: Server
    template: str

    def databases(self) -> DatabaseServer:
        return DatabaseServer(self.server.url("postgres"), self.server.binaries)

    def warehouse(self, name: str) -> Warehouse:
        """As it is reached now: after a restart the way may be another."""
        return Warehouse(make_conninfo(self.server.url("postgres"), dbname=name), self.databases())

    def crash(self) -> None:
        """Immediate shutdown: every process of the server quits at once, nothing is written that has not been yet."""
        pid = int((self.server.data / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGQUIT)
        self.server.stop()


@pytest.fixture(scope="module")
def own_server(server: DatabaseServer) -> Iterator[OwnServer]:
    # What was committed has been given to the operating system, so that it outlives the server.
    settings = FAST | {"synchronous_commit": "on"}
    with folder_for_a_server() as folder, Server(folder, server.binaries, settings) as running:
        yield OwnServer(running, DatabaseServer(running.url("postgres"), server.binaries).template)


@pytest.mark.parametrize("moment", MOMENTS)
def test_server_that_dies_amid_load_and_refresh_has_what_was_committed_and_no_more(
    own_server: OwnServer, loader: Loader, tmp_path: Path, moment: str
) -> None:
    name = str(conninfo_to_dict(own_server.databases().make(template=own_server.template))["dbname"])
    books = Books(own_server.warehouse(name), tmp_path)
    chance = seeded(moment)
    for number in range(1, DRILLS + 1):
        batch, committed = books.deliver(), books.deliver()
        times = a_block(chance, batch)
        with repetition(number, f"stopped after block {times}, {moment}"):
            loader.start(books.warehouse, batch, "in COPY", times)
            books.load_and_count(committed)
            with refresh_that_fails(books.warehouse, moment):
                own_server.crash()

            own_server.server.start()

            books.warehouse = own_server.warehouse(name)
            assert loader.go_on() == "OperationalError"
            books.settle(batch, committed=False, refresh=moment.split()[0])
    own_server.databases().drop(books.warehouse.url)


def test_terminated_load_leaves_nothing_and_its_retry_loads_once(books: Books, loader: Loader) -> None:
    chance = seeded("terminate")
    for number in range(1, DRILLS + 1):
        batch = books.deliver()
        times = a_block(chance, batch)
        with repetition(number, f"terminated after block {times}"):
            loader.start(books.warehouse, batch, "in COPY", times)
            (pid,) = backends(books.warehouse, batch)

            terminate(books.warehouse, pid)

            assert loader.go_on() == "OperationalError"
            books.settle(batch, committed=False)


@pytest.mark.parametrize("moment", MOMENTS)
def test_terminated_refresh_publishes_nothing_and_the_next_one_all(books: Books, moment: str) -> None:
    for number in range(1, DRILLS + 1):
        with repetition(number, moment):
            books.load_and_count(books.deliver())
            with refresh_that_fails(books.warehouse, moment) as pid:
                terminate(books.warehouse, pid)

            books.check(refresh=moment.split()[0])


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("sent", ["statement by statement", "as one message"])
def test_refresh_whose_client_is_killed_has_published_all_or_nothing(books: Books, kind: str, sent: str) -> None:
    warehouse = books.warehouse
    psql = [str(warehouse.server.binaries / "psql"), "-Xq", "-v", "ON_ERROR_STOP=1"]
    psql.append(make_conninfo(warehouse.url, options="-c role=de_dw_pipeline"))
    for number in range(1, DRILLS + 1):
        with repetition(number, f"{kind} {sent}"):
            books.load_and_count(books.deliver())
            with ExitStack() as stack:
                with pause(warehouse):
                    how = ["-f", "-"] if sent == "statement by statement" else ["-c", script_of(SCRIPTS[kind])]
                    client = stack.enter_context(
                        subprocess.Popen([*psql, *how], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
                    )
                    assert client.stdin is not None
                    client.stdin.write(script_of(SCRIPTS[kind]))
                    client.stdin.close()
                    wait_until(lambda: len(warehouse.rows(PAUSED, "")) == 1)
                    ((pid,),) = warehouse.rows(PAUSED, "")

                    client.kill()

                # The server is told by its next word to the client, and goes on until then.
                wait_until(partial(is_gone, warehouse, pid))
            # Airflow sends it so: what comes after the statement, COMMIT too, was with the server already.
            books.check(refresh="", is_published=sent == "as one message")

            books.check(refresh="merge")


def is_gone(warehouse: Warehouse, pid: int) -> bool:
    return warehouse.rows(f"SELECT 1 FROM pg_stat_activity WHERE pid = {pid}", "") == []


PLENTY = 64 * 1024


class SmallDisk(NamedTuple):
    """A file system in memory that a table is on: raw.orders, or what a test asks for."""

    path: Path

    def leave(self, kilobytes: int) -> None:
        """Have so much space left, whatever is used."""
        now = os.statvfs(self.path)
        used = (now.f_blocks - now.f_bfree) * now.f_frsize // 1024
        subprocess.run(["mount", "-o", f"remount,size={used + kilobytes}k", str(self.path)], check=True)


@pytest.fixture
def small_disk(warehouse: Warehouse, request: pytest.FixtureRequest) -> Iterator[SmallDisk]:
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    ((data,),) = warehouse.rows("SHOW data_directory", "")
    if not Path(data).exists():
        pytest.skip("the server is on another machine")
    owner = Path(data).stat()
    tablespace = sql.Identifier(f"small_{os.getpid()}")
    move = sql.SQL("ALTER TABLE {} SET TABLESPACE {}")
    table = sql.Identifier(*getattr(request, "param", "raw.orders").split("."))
    with folder_for_a_server() as path, ExitStack() as stack:
        options = f"size={PLENTY}k,mode=0700,uid={owner.st_uid},gid={owner.st_gid}"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True
        )
        if mounted.returncode != 0:
            pytest.skip(f"mount is not permitted: {mounted.stderr.strip()}")
        # Lazily: a server that a failed test has left with a file open there must not keep it for ever.
        stack.callback(subprocess.run, ["umount", "--lazy", str(path)], check=True)
        conn = stack.enter_context(closing(warehouse.connect("", autocommit=True)))
        try:
            conn.execute(sql.SQL("CREATE TABLESPACE {} LOCATION {}").format(tablespace, str(path)))
        except errors.InsufficientPrivilege as error:
            pytest.skip(f"the server can't get to the file system: {error.diag.message_primary}")
        stack.callback(conn.execute, sql.SQL("DROP TABLESPACE {}").format(tablespace))
        stack.callback(conn.execute, move.format(table, sql.Identifier("pg_default")))
        conn.execute(move.format(table, tablespace))
        yield SmallDisk(path)


def test_full_disk_fails_the_load_in_the_servers_words_and_space_is_all_it_takes(
    books: Books, small_disk: SmallDisk
) -> None:
    with closing(books.warehouse.connect("", autocommit=True)) as bystander:
        bystander.execute("ALTER TABLE raw.orders SET (autovacuum_enabled = off)")
        for number in range(1, DRILLS + 1):
            batch = books.deliver(bad=number % 2 == 0)
            kilobytes = seeded(number).randint(16, 64)
            with repetition(number, f"with {kilobytes} KB left"):
                bystander.execute("VACUUM FULL raw.orders")  # no room left inside the table
                small_disk.leave(kilobytes)

                with pytest.raises(errors.DiskFull, match="could not extend file"):
                    books.load(batch)

                assert bystander.execute("SELECT 1").fetchall() == [(1,)], "the server has lived through it"
                books.check()
                small_disk.leave(PLENTY)
                books.settle(batch, committed=False)


@pytest.mark.parametrize("small_disk", ["stg.orders_latest_live"], indirect=True)
def test_full_disk_fails_the_merge_in_the_servers_words_and_space_is_all_it_takes(
    books: Books, small_disk: SmallDisk
) -> None:
    with closing(books.warehouse.connect("", autocommit=True)) as bystander:
        bystander.execute("ALTER TABLE stg.orders_latest_live SET (autovacuum_enabled = off)")
        for number in range(1, DRILLS + 1):
            kilobytes = seeded(number).randint(8, 24)
            with repetition(number, f"with {kilobytes} KB left"):
                books.load_and_count(books.deliver())
                bystander.execute("VACUUM FULL stg.orders_latest_live")  # no room left inside the table
                small_disk.leave(kilobytes)

                with pytest.raises(errors.DiskFull, match="could not extend file"):
                    books.warehouse.run(SCRIPTS["merge"])

                books.check(refresh="")
                small_disk.leave(PLENTY)
                books.check(refresh="merge")


def load_at_once(books: Books, batches: Sequence[Batch]) -> list[Load]:
    """Load each of them in a thread of its own, all beginning at the same moment."""
    barrier = threading.Barrier(len(batches))

    def load(batch: Batch) -> Load:
        with books.warehouse.connect() as conn:
            barrier.wait(SECONDS)
            return load_batch(conn, table="raw.orders", batch_id=batch.batch_id, path=batch.path)

    with ThreadPoolExecutor(len(batches)) as threads:
        return list(threads.map(load, batches))


def test_eight_loaders_of_one_batch_load_it_once_and_all_succeed(books: Books) -> None:
    for number in range(1, DRILLS + 1):
        batch = books.deliver()
        with repetition(number):
            loads = load_at_once(books, [batch] * 8)

            assert sorted(load.is_new for load in loads) == [False] * 7 + [True]
            assert len({(load.load_id, load.batch_id, load.rows) for load in loads}) == 1
            books.settle(batch, committed=True)


def test_eight_batches_of_the_same_bytes_are_loaded_once_and_all_succeed(books: Books) -> None:
    for number in range(1, DRILLS + 1):
        delivered = books.deliver()
        batches = [replace(delivered, batch_id=f"{delivered.batch_id}, copy {copy}") for copy in range(8)]
        with repetition(number):
            loads = load_at_once(books, batches)

            (first,) = [batch for batch, load in zip(batches, loads, strict=True) if load.is_new]
            assert {load.batch_id for load in loads} == {first.batch_id}
            assert {books.load(batch).load_id for batch in batches} == {loads[0].load_id}
            books.settle(first, committed=True)


def test_eight_batches_at_once_are_all_loaded(books: Books) -> None:
    for number in range(1, DRILLS + 1):
        batches = [books.deliver(rows=ROWS // 8) for _ in range(8)]
        with repetition(number):
            loads = load_at_once(books, batches)

            assert all(load.is_new for load in loads)
            assert not any(load.is_new for load in load_at_once(books, batches))
            books.loaded.append(batches)
            books.check()


def test_two_refreshes_at_once_publish_what_was_loaded_between_them(books: Books) -> None:
    warehouse = books.warehouse
    for number in range(1, DRILLS + 1):
        notices: list[str] = []
        with repetition(number), ThreadPoolExecutor(3) as threads:
            books.load_and_count(books.deliver(rows=ROWS // 4))
            with closing(warehouse.connect("de_dw_reader")) as reader:
                reader.execute("SELECT count(*) FROM stg.orders_latest")  # keeps the first refresh from its end
                refreshes = [threads.submit(warehouse.run, "stg.orders_latest", notices=notices)]
                wait_until(partial(bool, notices))
                refreshes.append(threads.submit(warehouse.run, "stg.orders_latest"))
                wait_until(lambda: warehouse.rows(IN_TURN, "") != [])
                books.load_and_count(books.deliver(rows=ROWS // 4))
            assert refreshes[0].result(SECONDS) <= refreshes[1].result(SECONDS)
            books.check(is_published=True)

            batch = books.deliver(rows=ROWS // 4)
            with warehouse.connect() as conn:
                load_batch(conn, table="raw.orders", batch_id=batch.batch_id, path=batch.path)
                refreshes = [threads.submit(warehouse.run, "stg.orders_latest")]  # looks at raw now, or in a moment
                conn.commit()
                refreshes.append(threads.submit(warehouse.run, "stg.orders_latest"))
            assert all(refresh.result(SECONDS) for refresh in refreshes)
            books.loaded.append([batch])
            books.check(is_published=True)


PAIRS = [("merge", "merge"), ("merge", "swap"), ("merge", "union"), ("swap", "merge"), ("union", "merge")]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_refresh_waits_for_one_of_another_kind_and_publishes_what_was_loaded_between_them(
    books: Books, first: str, second: str
) -> None:
    warehouse = books.warehouse
    for number in range(1, DRILLS + 1):
        with repetition(number, f"{first}, {second}"), ThreadPoolExecutor(2) as threads:
            books.load_and_count(books.deliver())
            with pause(warehouse):
                refreshes = [threads.submit(warehouse.run, SCRIPTS[first])]
                wait_until(lambda: warehouse.rows(PAUSED, "") != [])
                refreshes.append(threads.submit(warehouse.run, SCRIPTS[second]))
                wait_until(lambda: warehouse.rows(IN_TURN, "") != [])
                books.load_and_count(books.deliver(rows=ROWS // 4))
                books.check(refresh="")

            assert all(refresh.result(SECONDS) for refresh in refreshes)
            books.check(refresh="merge", is_published=True)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_load_that_commits_after_a_refresh_has_begun_is_published_by_it_or_by_the_next(books: Books, kind: str) -> None:
    begin, *parts = before_commit(SCRIPTS[kind]).partition("\nINSERT INTO" if kind == "swap" else "\nSELECT")
    if kind != "swap":  # it begins within the one function
        begin += " SELECT stg.begin_refresh('orders_latest')"
    for number in range(1, DRILLS + 1):
        batches = [books.deliver() for _ in range(3)]
        with repetition(number, kind), books.warehouse.connect() as late, books.warehouse.connect() as conn:
            load_batch(late, table="raw.orders", batch_id=batches[0].batch_id, path=batches[0].path)
            assert books.load(batches[1]).is_new  # whose load_id and row_id are greater

            conn.autocommit = True
            conn.execute(begin.encode())
            late.commit()
            books.loaded += [[batches[0]], [batches[1]]]
            books.load_and_count(batches[2])
            conn.execute("".join(parts).encode())
            conn.execute("COMMIT")

            books.count_as_published()
            books.check(refresh="")
            books.check(refresh="merge")


def test_merges_beside_loaders_publish_each_load_once_and_are_right_at_any_time(books: Books) -> None:
    warehouse, size = books.warehouse, ROWS // 5
    for number in range(1, DRILLS + 1):
        batches = [[books.deliver(rows=size) for _ in range(5)] for _ in range(3)]
        with repetition(number), ThreadPoolExecutor(3) as threads:
            loaders = [threads.submit(lambda own: [books.load(batch) for batch in own], own) for own in batches]
            while not all(loader.done() for loader in loaders):
                warehouse.run(SCRIPTS["merge"])
                ((*wrong, _),) = warehouse.rows(VERIFY)
                assert wrong == [0, 0, 0], "missing, extra, different"
            assert all(load.is_new for loader in loaders for load in loader.result())

            books.loaded.append([batch for own in batches for batch in own])
            warehouse.run(SCRIPTS["merge"])
            books.check(refresh="merge", is_published=True)


def schema(warehouse: Warehouse) -> list[Row]:
    return warehouse.rows(
        """
        SELECT attname::text, NULL FROM pg_attribute
        WHERE attrelid = 'raw.orders'::regclass AND attnum > 0 AND NOT attisdropped
        UNION ALL
        SELECT NULL, version_num FROM alembic_version
        """,
        "",
    )


def test_migration_gives_way_to_a_running_load_and_succeeds_after_it(
    books: Books, loader: Loader, tmp_path: Path
) -> None:
    folder = tmp_path / "migrations"
    for part in ("alembic", "sql"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "alembic.ini", folder)

    def alembic_here(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "alembic", *arguments],
            cwd=folder,
            env=os.environ | {"WAREHOUSE_URL": books.warehouse.url},
            capture_output=True,
            text=True,
            timeout=20,
        )

    assert alembic_here("revision", "-m", "add orders note").returncode == 0
    for direction, action in (("up", "ADD COLUMN note text"), ("down", "DROP COLUMN note")):
        (file,) = (folder / "sql" / "ddl").glob(f"*_add_orders_note.{direction}.sql")
        file.write_text(f"ALTER TABLE raw.orders {action};\n")
    before = schema(books.warehouse)
    chance = seeded("migration")
    for number in range(1, DRILLS + 1):
        batch = books.deliver(bad=number % 2 == 0)
        point, times = ("in COPY", a_block(chance, batch)) if not batch.rejects else ("among rejects", 2)
        # The first time with the wait that users have.
        options = ["-x", "lock-timeout=200ms"] if number > 1 else []
        with repetition(number, f"{point}, block {times}"):
            loader.start(books.warehouse, batch, point, times)

            refused = alembic_here(*options, "upgrade", "head")

            assert refused.returncode != 0
            assert "LockNotAvailable" in refused.stderr
            assert schema(books.warehouse) == before
            assert loader.go_on() == "loaded"
            for command in (["upgrade", "head"], ["downgrade", "-1"]):
                done = alembic_here(*command)
                assert done.returncode == 0, done.stderr
                assert (schema(books.warehouse) == before) == (command[0] == "downgrade")
            books.settle(batch, committed=True)
