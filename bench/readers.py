"""What analysts notice of a refresh: latency, errors and wrong rows of reads, while swaps or merges run.

--rows orders (200 thousand) in stg.orders_latest, --times refreshes (50) of each kind, --only some kinds. Before each
refresh a hundredth of the orders, spread over the table, is loaded in a newer version. `idle` is the same time without
loads and refreshes: the noise of the machine and the base of added latency. `..., long reader` is a refresh while an
analyst keeps a transaction open on the table for a second or two at a time: a swap then asks again and again, each
time for 100 ms, for the lock that it needs.

Latencies are seconds from sending a query to having its rows, in processes that are connected and warm. They shall come
from locks and not from a want of cores, so readers are few and slow: one process looks up single orders, one reads the
whole table, each one query at a time with a pause in between (PAUSES), without parallel workers. What is left of other
causes shows in `no table`, a SELECT 1 among the lookups: it waits for a core but for no lock of ours. A read of the
whole table makes others wait as well: the swap's lock waits for it, and new readers queue behind the swap.

No row is trusted. The load that a row came from (load_id, and with it updated_at) tells its version, so that a reader
knows more than that versions never go back: whatever begins after a refresh has returned must see its rows, and the sum
of all load_ids must be that of a table as some refresh made it, neither of a half-refreshed nor of an empty one.
"""

import gc
import itertools
import random
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_int64
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from math import ceil
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
from psycopg import errors

from bench.harness import PIPELINE, ROOT, STATE, new_warehouse, open_server, refresh_of_orders, version_of
from local.postgres import Server

ANALYST = "-c role=de_dw_reader -c max_parallel_workers_per_gather=0"
REFRESHES = {kind: refresh_of_orders(kind) for kind in ("swap", "union", "merge")}
# The kinds of readers of each process, and its pause in seconds after every read.
PAUSES = {
    ("point lookup", "prepared", "no table"): 0.001,
    ("count", "view", "repeatable read"): 0.05,
}
WARM_UP = 0.5  # seconds
KEEP_SNAPSHOT = 0.4  # seconds between the two reads of a REPEATABLE READ transaction, so that some have a refresh there
SHARES = 100  # a batch has every 100th order
HOLDS, GAP = (1.0, 2.0), 1.0  # seconds that the long reader keeps its transaction open, and is away
# Seconds that a refresh may add to the worst latency; with a long reader also the lock_timeout of stg.swap, 100 ms.
BOUND, BOUND_LONG_READER = 0.05, 0.15

LOOKUP = "SELECT load_id, updated_at FROM stg.orders_latest WHERE order_id = %s"
TOTALS = "SELECT count(*), sum(order_id), sum(load_id) FROM {}"
# As its caller, or its owner's rights would decide whether snapshots are checked.
VIEW = """
CREATE VIEW public.orders WITH (security_invoker = true) AS SELECT order_id, load_id FROM stg.orders_latest;
GRANT SELECT ON public.orders TO de_dw_reader;
"""
DIFFERENCES = """
WITH newest AS (
    SELECT DISTINCT ON (order_id) * FROM raw.orders ORDER BY order_id ASC, updated_at DESC, row_id DESC
)
SELECT count(*) FROM newest FULL JOIN stg.orders_latest AS published USING (order_id)
WHERE to_jsonb(newest) IS DISTINCT FROM to_jsonb(published)
"""


@dataclass
class Tally:
    """Reads of one kind. `retryable`: 40001, which REPEATABLE READ allows. `complaints`: the first few, in words."""

    seconds: list[float] = field(default_factory=list)
    errors: int = 0
    retryable: int = 0
    wrong: int = 0
    complaints: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        self.seconds += other.seconds
        self.errors += other.errors
        self.retryable += other.retryable
        self.wrong += other.wrong
        self.complaints += other.complaints

    def complain(self, text: str) -> None:
        if len(self.complaints) < 5:
            self.complaints.append(text)

    def quantile(self, share: float) -> float:
        """The latency, in seconds, that this share of all reads did not exceed."""
        return sorted(self.seconds)[ceil(share * len(self.seconds)) - 1] if self.seconds else 0.0


def instant(load: int) -> datetime:
    """The updated_at of all rows of a load."""
    return datetime(2026, 1, 2, tzinfo=UTC) + timedelta(minutes=load)


def newest(order_id: int, load: int) -> int:
    """The load that an order's version came with, once `load` is published: load 1 had all, every other its share."""
    return max(load - (load - order_id) % SHARES, 1)


def sums_of_loads(orders: int, loads: int) -> dict[int, int]:
    """The sum of load_id in the whole table -> the load that was published last."""
    total = orders
    sums = {total: 1}
    for load in range(2, loads + 1):
        total += orders // SHARES * (load - newest(load, load - 1))
        sums[total] = load
    return sums


@dataclass
class Facts:
    """What the readers of one process know. Sent to it, but for `published`, which is shared memory."""

    url: str
    orders: int
    sums: dict[int, int]
    published: c_int64  # the load of the last refresh that has returned
    seen: int = 1  # the newest load that any reader of this process has seen

    def at_least(self) -> int:
        """The load that whoever begins to read now must see, or a newer one."""
        return max(self.seen, self.published.value)


class Reader:
    """An analyst with a connection of their own, who reads in one way again and again."""

    def __init__(self, kind: str, facts: Facts) -> None:
        self.kind, self.facts, self.tally = kind, facts, Tally()
        self.prepare = kind == "prepared"
        # ClientCursor puts the values into the query, so that it goes as a simple one.
        self.conn = psycopg.connect(
            facts.url,
            autocommit=kind != "repeatable read",
            cursor_factory=psycopg.Cursor if self.prepare else psycopg.ClientCursor,
            options=ANALYST,
        )
        self.conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ if kind == "repeatable read" else None
        self.snapshot: tuple[float, int, int] | None = None  # when it was taken, the oldest and newest load it may see

    def turn(self) -> None:
        """One read; of a REPEATABLE READ transaction its beginning, a look at the clock, or its end."""
        try:
            if self.kind in ("point lookup", "prepared"):
                self.look_up()
            elif self.kind == "no table":
                self.rows("SELECT 1")
            elif self.kind == "repeatable read":
                self.keep_snapshot()
            else:
                at_least = self.facts.at_least()
                self.judge_totals("public.orders" if self.kind == "view" else "stg.orders_latest", at_least, None)
        except psycopg.Error as error:
            if self.snapshot is not None and isinstance(error, errors.SerializationFailure):
                self.tally.retryable += 1
            else:
                self.tally.errors += 1
                self.tally.complain(f"{error.sqlstate}: {error}".strip())
            self.snapshot = None
            self.conn.rollback()

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        started = time.perf_counter()
        rows = self.conn.execute(query.encode(), values or None, prepare=self.prepare).fetchall()
        self.tally.seconds.append(time.perf_counter() - started)
        return rows

    def look_up(self) -> None:
        """Any order, or one of the next batch, where a refresh is seen first."""
        at_least = self.facts.at_least()
        number = random.randrange(self.facts.orders)  # noqa: S311
        order_id = number + 1 if number % 2 else number // SHARES * SHARES + at_least % SHARES + 1
        rows = self.rows(LOOKUP, order_id)
        load = rows[0][0] if len(rows) == 1 else 0
        own = load == 1 or load % SHARES == order_id % SHARES
        if load < newest(order_id, at_least) or not own or rows != [(load, instant(load))]:
            self.wrong(f"order {order_id} is {rows}, at least load {at_least} was published")
        elif load > 1:
            self.facts.seen = max(self.facts.seen, load)

    def judge_totals(self, table: str, at_least: int, at_most: int | None) -> None:
        ((count, order_ids, load_ids),) = self.rows(TOTALS.format(table))
        load = self.facts.sums.get(load_ids or 0, 0)
        orders = self.facts.orders
        if count != orders or order_ids != orders * (orders + 1) // 2 or load < at_least or load > (at_most or load):
            self.wrong(f"{table}: {count} rows, sums {order_ids} and {load_ids}, load {load}, not {at_least}-{at_most}")
        else:
            self.facts.seen = max(self.facts.seen, load)

    def keep_snapshot(self) -> None:
        """Take a snapshot with a read of raw; later, after a refresh or not, read the table for the first time."""
        if self.snapshot is None:
            at_least = self.facts.at_least()
            self.conn.execute("SELECT order_id FROM raw.orders LIMIT 1")
            ((newest_load,),) = self.conn.execute("SELECT max(load_id) FROM raw.loads").fetchall()
            self.snapshot = time.perf_counter(), at_least, newest_load
        elif time.perf_counter() - self.snapshot[0] >= KEEP_SNAPSHOT:
            self.judge_totals("stg.orders_latest", *self.snapshot[1:])
            self.snapshot = None
            self.conn.commit()

    def wrong(self, text: str) -> None:
        self.tally.wrong += 1
        self.tally.complain(f"wrong: {text}")


def read(
    facts: Facts, kinds: Sequence[str], pause: float, ready: Barrier, stop: Event, results: "Connection[Any, Any]"
) -> None:
    """A process of readers that take turns: warm up, wait for the others, read until told to stop, report."""
    readers = [Reader(kind, facts) for kind in kinds]
    gc.disable()  # its pauses would be taken for the server's
    turns = itertools.cycle(readers)
    warm = time.perf_counter() + WARM_UP
    while time.perf_counter() < warm:
        next(turns).turn()
        time.sleep(pause)
    for reader in readers:
        reader.tally = Tally(errors=reader.tally.errors, wrong=reader.tally.wrong, complaints=reader.tally.complaints)
    ready.wait(60)
    while not stop.is_set():
        next(turns).turn()
        time.sleep(pause)
    results.send({reader.kind: reader.tally for reader in readers})
    for reader in readers:
        reader.conn.close()


@contextmanager
def reading(warehouse: "Warehouse", tallies: dict[str, Tally]) -> Iterator[None]:
    """Readers read as long as this is open; it adds to what they found until now."""
    spawn = get_context("spawn")  # processes, because threads would wait for each other's interpreter lock
    ready, stop = spawn.Barrier(len(PAUSES) + 1), spawn.Event()
    warehouse.published = spawn.RawValue(c_int64, warehouse.refreshed)
    facts = Facts(warehouse.url, warehouse.orders, warehouse.sums, warehouse.published)
    processes, pipes = [], []
    for kinds, pause in PAUSES.items():
        receiver, sender = spawn.Pipe(duplex=False)
        process = spawn.Process(target=read, args=(facts, kinds, pause, ready, stop, sender), daemon=True)
        process.start()
        sender.close()  # ours: the receiver then notices when the process is gone
        processes.append(process)
        pipes.append(receiver)
    try:
        ready.wait(60)
        yield
        stop.set()
        for pipe in pipes:
            for kind, tally in pipe.recv().items():
                tallies[kind].add(tally)
    finally:
        stop.set()
        for process in processes:
            process.join(10)


class Warehouse:
    """A database with one load published, and the way it is refreshed. Load n is refreshed before n + 1 is loaded."""

    def __init__(self, url: str, transform: str, file: Path, sums: dict[int, int]) -> None:
        self.url, self.sums = url, sums
        self.header, *self.lines = file.read_bytes().splitlines(keepends=True)
        self.orders = len(self.lines)
        self.batch = file.with_name("batch.csv")
        self.loaded = self.refreshed = 1
        self.published = c_int64()  # the same for its readers
        self.query = transform.encode()
        self.conn = psycopg.connect(url, autocommit=True, options=PIPELINE)

    def load(self) -> None:
        """A batch: newer versions of a share of the orders."""
        from batch_load import load_batch

        load = self.loaded + 1
        updated_at = str(instant(load)).encode()
        with self.batch.open("wb") as file:
            file.write(self.header)
            for line in self.lines[(load - 1) % SHARES :: SHARES]:
                file.write(line[: line.rindex(b",") + 1] + updated_at + b"\n")
        with psycopg.connect(self.url, options=PIPELINE) as conn:
            done = load_batch(conn, table="raw.orders", batch_id=f"batch {load}", path=self.batch)
        if (done.load_id, done.rows) != (load, self.orders // SHARES):
            sys.exit(f"load {load} should have brought every {SHARES}th order, but: {done}")
        self.loaded = load

    def refresh(self) -> float | None:
        """Its seconds, or None when it gave up because of a long reader."""
        started = time.perf_counter()
        try:
            cursor = self.conn.execute(self.query)
            while cursor.nextset():
                pass
        except errors.LockNotAvailable:
            self.conn.rollback()
            return None
        seconds = time.perf_counter() - started
        self.refreshed = self.published.value = self.loaded
        return seconds

    def close(self) -> int:
        """How many published orders are not what raw says that they should be."""
        if self.refreshed < self.loaded:  # the last refresh gave up
            self.refresh()
        ((differences,),) = self.conn.execute(DIFFERENCES).fetchall()
        self.conn.close()
        return int(differences)


@dataclass
class Case:
    """One way to refresh, and what came of it."""

    name: str
    warehouse: Warehouse
    refreshes: bool = True
    long_reader: bool = False
    seconds: list[float] = field(default_factory=list)  # of each refresh
    gave_up: int = 0
    tallies: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))

    def run(self, times: int, slot: float) -> None:
        """`times` refreshes, one begun every `slot` seconds if none takes longer."""
        with psycopg.connect(self.warehouse.url, autocommit=True) as conn:
            conn.execute("CHECKPOINT")
        with reading(self.warehouse, self.tallies), holding(self.warehouse.url, self.long_reader):
            for _ in range(times):
                started = time.perf_counter()
                if self.refreshes:
                    self.warehouse.load()
                    seconds = self.warehouse.refresh()
                    if seconds is None:
                        self.gave_up += 1
                    else:
                        self.seconds.append(seconds)
                time.sleep(max(started + slot - time.perf_counter(), 0.05))


@contextmanager
def holding(url: str, really: bool) -> Iterator[None]:
    """An analyst who comes, looks at the table, and keeps the transaction open without doing anything."""
    stop = threading.Event()

    def hold() -> None:
        with psycopg.connect(url, autocommit=True, options=ANALYST) as conn:
            for seconds in itertools.cycle(HOLDS):
                with conn.transaction():
                    conn.execute("SELECT order_id FROM stg.orders_latest LIMIT 1")
                    stop.wait(seconds)
                if stop.wait(GAP):
                    return

    thread = threading.Thread(target=hold)
    if really:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if really:
            thread.join()


def make_template(server: Server, orders: int, transforms: Sequence[str], path: Path) -> None:
    """A database "readers" with the orders of a new file, loaded and published."""
    from batch_load import load_batch

    from generator.orders import generate_orders

    generate_orders(path, rows=orders, updated_at=instant(1))
    url = new_warehouse(server, "readers")
    with psycopg.connect(url, options=PIPELINE) as conn:
        load_batch(conn, table="raw.orders", batch_id="all", path=path)
    for transform in transforms:
        with psycopg.connect(url, autocommit=True, options=PIPELINE) as conn:
            conn.execute(transform.encode())
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(VIEW)
        conn.execute("VACUUM ANALYZE")


def run(arguments: Any) -> dict[str, Any]:
    """Print the table; `failures` when any read failed or was wrong, never because of latencies."""
    sys.path.append(str(ROOT / "dags"))  # for batch_load
    orders = max((arguments.rows or (20_000 if arguments.quick else 200_000)) // SHARES, 1) * SHARES
    refreshes = arguments.times or (4 if arguments.quick else 50)
    rounds, slot = (2, 0.4) if arguments.quick else (5, 1.0)
    with_long_reader = min(refreshes, 2 if arguments.quick else 10)

    def wanted(name: str) -> bool:
        return not arguments.only or any(text in name for text in arguments.only)

    with open_server("readers", arguments.postgresql) as server, TemporaryDirectory(dir=STATE) as folder:
        file = Path(folder) / "orders.csv"
        make_template(server, orders, list(REFRESHES.values()), file)
        sums = sums_of_loads(orders, 1 + refreshes + with_long_reader)
        warehouses = {
            name: Warehouse(new_warehouse(server, name, "readers"), script, file, sums)
            for name, script in REFRESHES.items()
        }
        cases = [Case("idle", warehouses["swap"], refreshes=False)]
        cases += [Case(name, warehouse) for name, warehouse in warehouses.items() if wanted(name)]
        for number in range(rounds):
            times = refreshes * (number + 1) // rounds - refreshes * number // rounds
            # The order rotates, so that no kind is always the one after the other.
            for case in cases[number % len(cases) :] + cases[: number % len(cases)]:
                case.run(times, slot)
        for name, warehouse in warehouses.items():
            if wanted(f"{name}, long reader"):
                cases.append(Case(f"{name}, long reader", warehouse, long_reader=True))
                cases[-1].run(with_long_reader, slot)
        differences = {name: warehouse.close() for name, warehouse in warehouses.items()}
        version = version_of(server)
    print_cases(f"Readers of {orders:,} orders during {refreshes} refreshes, PostgreSQL {version}", cases)
    bad = sum(tally.errors + tally.wrong for case in cases for tally in case.tallies.values())
    return {
        "failures": [f"readers: {bad:,} reads failed or were wrong; orders that are not the newest: {differences}"]
        if bad or any(differences.values())
        else [],
        "orders": orders,
        "batch": orders // SHARES,
        "refreshes": refreshes,
        "postgresql": version,
        "series": [as_json(case.name, kind, tally) for case in cases for kind, tally in case.tallies.items()],
        "refresh_seconds": {case.name: [round(value, 4) for value in case.seconds] for case in cases if case.refreshes},
    }


def as_json(name: str, kind: str, tally: Tally) -> dict[str, Any]:
    """Latencies in seconds."""
    return {
        "name": name,
        "kind": kind,
        "reads": len(tally.seconds),
        "errors": tally.errors,
        "retryable": tally.retryable,
        "wrong": tally.wrong,
        "p50": round(tally.quantile(0.5), 6),
        "p99": round(tally.quantile(0.99), 6),
        "worst": round(tally.quantile(1), 6),
    }


def print_cases(title: str, cases: Sequence[Case]) -> None:
    """Latencies in milliseconds; `added` is the worst less idle's worst."""
    idle = {kind: tally.quantile(1) for kind, tally in cases[0].tallies.items()}
    print(f"\n{title}; milliseconds")
    heads = ("reads", "errors", "retry", "wrong", "p50", "p99", "worst", "added")
    print(f"  {'':<37}" + "".join(f"{head:>9}" for head in heads))
    for case in cases:
        for kind, tally in case.tallies.items():
            p50, p99, worst = (tally.quantile(share) for share in (0.5, 0.99, 1))
            counts = f"{len(tally.seconds):>9,}{tally.errors:>9,}{tally.retryable:>9,}{tally.wrong:>9,}"
            figures = "".join(f"{seconds * 1e3:>9.2f}" for seconds in (p50, p99, worst, worst - idle[kind]))
            print(
                f"  {case.name:<20}{kind:<17}{counts}{figures}  {verdict(case, kind, tally, worst - idle[kind])}",
                flush=True,
            )
            for complaint in tally.complaints[:5]:
                print(f"      {complaint}")
    print(
        f"  ok: no error, nothing wrong, and at most {BOUND * 1e3:.0f} ms added to idle's worst; with a long reader"
        f" {BOUND_LONG_READER * 1e3:.0f} ms"
    )
    for case in cases:
        if case.seconds:
            low, middle, high = min(case.seconds), median(case.seconds), max(case.seconds)
            took = f"{len(case.seconds)} refreshes of {low:.3f} / {middle:.3f} / {high:.3f} s (min / median / max)"
            print(
                f"  {case.name}: {took}{f', {case.gave_up} gave up after a minute' if case.gave_up else ''}", flush=True
            )


def verdict(case: Case, kind: str, tally: Tally, added: float) -> str:
    """What a reader would say. Latency never fails the bench: `added`, in seconds, may be other work on the machine."""
    if tally.errors or tally.wrong or (tally.retryable and case.name.partition(",")[0] in ("idle", "merge")):
        return "WRONG"
    if kind == "no table" or not case.refreshes:
        return ""  # to compare with
    return "slow" if added > (BOUND_LONG_READER if case.long_reader else BOUND) else "ok"
