"""Refresh of the latest row per order as the history grows: swap and merge beside dbt-postgres and SQLMesh.

One server and one database for each history: raw.orders with every order once, 4 and 16 times, and in it the tables of
all tools, each with a unique index on order_id. Every round loads one new batch, 1% of the orders and from all over
the table, and then each tool refreshes, in an order that rotates, from the same raw rows. Incremental refreshes (merge,
dbt incremental, SQLMesh), full ones (swap, dbt table) and our union have rounds of their own: ours write one table, so
after a swap a merge would have nothing to do.

`seconds` is work on the database: the durations of all statements of the tool's sessions, COMMIT included, as the
server logs them (log_min_duration_statement = 0; application_name tells whose they are). So it is one clock for all, it
needs nothing in the tool, and metadata queries count as they should. `startup` is the rest of the process's wall time:
the interpreter, imports, parsing of the project, connecting; for ours a new Python that imports psycopg.

What favours whom: raw.orders has a BRIN index on load_id, for dbt's filter, and one on updated_at, for SQLMesh's; dbt's
incremental tables have an index on load_id besides, or each run would read all of the table for its max(load_id). The
filters of both would miss a load that commits late, which ours must not. SQLMesh runs without its janitor, and keeps
its state in the measured database, as is its default. Where dbt has two ways, the one with the smaller median stands
for it; both are in the results. Against us: ours compares versions where dbt and SQLMesh take what comes last, and a
swap's seconds include ANALYZE, which dbt leaves to autovacuum.
"""

import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psycopg
from psycopg import sql

from bench.harness import (
    PEERS,
    PIPELINE,
    ROOT,
    STATE,
    NotRun,
    Series,
    environment,
    in_new_process,
    new_warehouse,
    open_server,
    print_table,
    refresh_of_orders,
    run_process,
    version_of,
    versions,
)
from local.postgres import Server

WORK = STATE / "refresh"
SIZES = (1, 4, 16)  # versions of each order in raw before the rounds
FIRST_DAY = datetime(2025, 1, 1, 12, tzinfo=UTC)  # one batch a day, long ago: SQLMesh takes no days that are to come
BATCH_EVERY = 100  # one order in so many is in a batch
HUNDRED_VERSIONS = 10
OUR_TABLE = "stg.orders_latest"
DATABASE = "refresh"
WHO = "bench-refresh"
# On top of local.postgres, for every tool. Our files ask for this work_mem themselves: the others get it as well.
SETTINGS = {"work_mem": "64MB", "log_min_duration_statement": "0", "log_line_prefix": "@%a@ "}
DURATION = re.compile(rf"^@{WHO}@ LOG:  duration: ([0-9.]+) ms  ", re.MULTILINE)
COLUMNS = (
    "order_id, customer_name, customer_email, product, quantity, unit_price, currency, status, ordered_at, updated_at,"
    " row_id, load_id"
)
RUN_FILE = """
import pathlib, psycopg, sys
with psycopg.connect(sys.argv[1], options=sys.argv[2], autocommit=True) as conn:
    conn.execute(pathlib.Path(sys.argv[3]).read_bytes())
"""


@dataclass
class Warehouse:
    """A database with a history of orders, and which day comes next."""

    server: Server
    url: str
    orders: int
    days: int = 0  # that raw has: day 0, 1, 2 ...
    truth: tuple[int, int] = (0, 0)

    def load(self, days: int, every: int = 1) -> None:
        """Load the batches of so many more days: all orders, or one in `every`, others each day."""
        in_new_process(load_days, self.url, self.orders, self.days, days, every)
        self.days += days

    def remember_truth(self) -> None:
        """What must be in each tool's table. It reads all of raw, so no tool meets rows that nobody has read before."""
        narrow = f"SELECT DISTINCT ON (order_id) hash_record_extended(ROW({COLUMNS}), 0) AS hash FROM raw.orders"  # noqa: S608
        self.truth = self._fingerprint(f"{narrow} ORDER BY order_id ASC, updated_at DESC, row_id DESC")

    def is_right(self, table: str) -> bool:
        """Whether a tool's table has the newest version of each order, every column, and nothing else."""
        return self.truth == self._fingerprint(f"SELECT hash_record_extended(ROW({COLUMNS}), 0) AS hash FROM {table}")  # noqa: S608

    def _fingerprint(self, hashes: str) -> tuple[int, int]:
        with psycopg.connect(self.url) as conn:
            row = conn.execute(f"SELECT count(*), sum(hash) FROM ({hashes}) AS hashes".encode()).fetchone()  # noqa: S608
        assert row is not None
        return int(row[0]), int(row[1] or 0)


@dataclass
class Tool:
    """One way to refresh: what makes its table the first time, and what brings it up to date."""

    name: str
    table: str
    build: Callable[[Warehouse], float]
    refresh: Callable[[Warehouse], float]  # both return the wall time of the process in seconds
    series: Series = field(init=False)

    def __post_init__(self) -> None:
        self.series = Series(self.name)

    def attempt(self, warehouse: Warehouse, action: Callable[[Warehouse], float]) -> tuple[float, float] | None:
        """Seconds on the database and of start-up; None when it failed or its table is wrong, which ends its part.

        :raises NotRun: our table is wrong.
        """
        if self.series.error:
            return None
        with psycopg.connect(warehouse.url, autocommit=True) as conn:
            conn.execute("CHECKPOINT")
        log, start = warehouse.server.log, warehouse.server.log.stat().st_size
        try:
            wall = action(warehouse)
        except NotRun as reason:
            self.series.error = str(reason)
            return None
        with log.open("rb") as file:
            file.seek(start)
            durations = DURATION.findall(file.read().decode(errors="replace"))
        if not durations:
            self.series.error = "the server's log has no statement of its sessions"
            return None
        if not warehouse.is_right(self.table):
            self.series.error = f"wrong: {self.table} is not the newest version of each order"
            if self.table == OUR_TABLE:
                raise NotRun(f"WRONG: {self.name}: {self.series.error}")
            return None
        seconds = sum(float(milliseconds) for milliseconds in durations) / 1000
        return seconds, wall - seconds


def day(number: int) -> datetime:
    return FIRST_DAY + timedelta(days=number)


def load_days(url: str, orders: int, first: int, days: int, every: int) -> None:
    """Generate and load one batch for each day. In a process of its own: it imports what generator and loader need."""
    sys.path.append(str(ROOT / "dags"))
    from batch_load import load_batch

    from generator.orders import generate_orders

    path, batch = WORK / "all.csv", WORK / "batch.csv"
    for number in range(first, first + days):
        generate_orders(path, rows=orders, updated_at=day(number))
        with path.open("rb") as source, batch.open("wb") as target:
            if every == 1:
                shutil.copyfileobj(source, target)
            else:
                target.write(source.readline())
                target.writelines(line for row, line in enumerate(source) if row % every == number % every)
        with psycopg.connect(url, options=PIPELINE) as conn:
            load_batch(conn, table="raw.orders", batch_id=f"day {number}", path=batch)
    path.unlink()
    batch.unlink()


def new_history(server: Server, orders: int, versions_of_each: int) -> Warehouse:
    """A new database whose raw.orders has each order so many times, with the indexes that incremental filters read."""
    warehouse = Warehouse(server, new_warehouse(server, DATABASE), orders)
    with psycopg.connect(warehouse.url) as conn:
        for column in ("load_id", "updated_at"):
            indexed = conn.execute(
                "SELECT 1 FROM pg_index AS i INNER JOIN pg_attribute AS a ON i.indrelid = a.attrelid"
                " AND i.indkey[0] = a.attnum WHERE i.indrelid = 'raw.orders'::regclass AND a.attname = %s",
                (column,),
            ).fetchone()
            if not indexed:
                conn.execute(sql.SQL("CREATE INDEX ON raw.orders USING brin ({})").format(sql.Identifier(column)))
    warehouse.load(versions_of_each)
    with psycopg.connect(warehouse.url, autocommit=True) as conn:
        conn.execute("VACUUM (ANALYZE) raw.orders")  # which also brings the BRIN indexes up to date
    warehouse.remember_truth()
    return warehouse


# The tools


def run_as_tool(warehouse: Warehouse, command: Sequence[str | Path], cwd: Path | None = None) -> float:
    """Run a process that finds the database, and calls itself what the log is read for; return its wall time."""
    settings = {
        "PGAPPNAME": WHO,
        "BENCH_HOST": str(warehouse.server.socket_dir),
        "BENCH_DATABASE": DATABASE,
        # Both tools report their use to their makers, and keep a user's id in the home directory.
        "DO_NOT_TRACK": "1",
        "DBT_SEND_ANONYMOUS_USAGE_STATS": "false",
        "SQLMESH__DISABLE_ANONYMIZED_ANALYTICS": "true",
        "HOME": str(WORK),
    }
    return run_process(command, settings, cwd).seconds


def run_transform(warehouse: Warehouse, kind: str) -> float:
    """Run a refresh as Airflow does: as the pipeline's role, in one string."""
    path = WORK / f"{kind}.sql"
    path.write_text(refresh_of_orders(kind))
    return run_as_tool(warehouse, [sys.executable, "-c", RUN_FILE, warehouse.url, PIPELINE, path])


def program(peer: str) -> str:
    """The command of a peer's environment that has the peer's name.

    :raises NotRun: it could not be installed.
    """
    return str(environment(peer).with_name(peer))


def run_dbt(warehouse: Warehouse, model: str) -> float:
    command = [program("dbt"), "--quiet", "--no-use-colors", "run", "--select", model]
    return run_as_tool(warehouse, command, WORK / "dbt")


def plan_sqlmesh(warehouse: Warehouse) -> float:
    """Make the model's table from all days so far. The time of the plan is the midnight that ends the last of them."""
    midnight = f"{day(warehouse.days):%Y-%m-%d}"
    command = [program("sqlmesh"), "plan", "--auto-apply", "--no-prompts", "--execution-time", midnight]
    return run_as_tool(warehouse, command, WORK / "sqlmesh")


def run_sqlmesh(warehouse: Warehouse) -> float:
    """Evaluate the interval that is missing: the last day."""
    last = f"{day(warehouse.days - 1):%Y-%m-%d}"
    command = [program("sqlmesh"), "run", "--skip-janitor", "--ignore-cron", "--end", last]
    return run_as_tool(warehouse, command, WORK / "sqlmesh")


def of_ours(name: str) -> Tool:
    """swap, union or merge. The table that the last two find was made by a swap."""
    return Tool(name, OUR_TABLE, partial(run_transform, kind="swap"), partial(run_transform, kind=name))


def of_dbt(name: str, model: str) -> Tool:
    run = partial(run_dbt, model=model)  # which makes the table when there is none
    return Tool(name, f"dbt.{model}", run, run)


def incremental_tools() -> list[Tool]:
    return [
        of_ours("merge"),
        of_dbt("dbt incremental, merge", "incremental_merge"),
        of_dbt("dbt incremental, delete+insert", "incremental_delete_insert"),
        Tool("SQLMesh", "mesh.orders_latest", plan_sqlmesh, run_sqlmesh),
    ]


def full_tools() -> list[Tool]:
    return [
        of_ours("swap"),
        of_dbt("dbt table, contract", "table_contract"),
        of_dbt("dbt table, CTAS", "table_ctas"),
    ]


# The rounds


def measure(warehouse: Warehouse, tools: Sequence[Tool], times: int, every: int, warm_up: int) -> None:
    """Build each tool's table, then load a batch and refresh them all, so many times; the first rounds may not count.

    A full refresh is as warm after the build, which is one, as it will ever be: it needs no round for that.
    """
    for tool in tools:
        tool.attempt(warehouse, tool.build)
    with psycopg.connect(warehouse.url, autocommit=True) as conn:
        conn.execute("ANALYZE")  # as autovacuum will have done where a table is older than a minute
    for turn in range(-warm_up, times):
        warehouse.load(1, every)
        warehouse.remember_truth()
        first = turn % len(tools)
        for tool in [*tools[first:], *tools[:first]]:
            figures = tool.attempt(warehouse, tool.refresh)
            if figures and turn >= 0:
                tool.series.add(*figures)


def faster(name: str, tools: Sequence[Tool]) -> Series:
    """What stands for a peer that has several ways: the one with the smallest median, and which it was."""
    able = [tool.series for tool in tools if tool.series.seconds and not tool.series.error]
    if not able:
        return Series(name, error=tools[0].series.error)
    best = min(able, key=lambda series: median(series.seconds))
    return Series(name, note=best.name.rpartition(", ")[2], seconds=best.seconds, startup=best.startup)


def headlines(tools: Sequence[Tool]) -> list[Series]:
    """One series for each of ours and each peer."""
    groups: dict[str, list[Tool]] = {}
    for tool in tools:
        groups.setdefault(tool.name.partition(", ")[0], []).append(tool)
    return [found[0].series if found[0].name == name else faster(name, found) for name, found in groups.items()]


def ratio(series: Sequence[tuple[int, Series]], one: tuple[str, int], other: tuple[str, int]) -> str:
    """How many times the median of the other the median of the one is, both by name and size."""
    medians = {(found.name, size): median(found.seconds) for size, found in series if found.seconds and not found.error}
    return f"{medians[one] / medians[other]:.2f}" if one in medians and other in medians else "-"


def run(arguments: Any) -> dict[str, Any]:
    """All of it. `rows` is the number of orders, so of rows of a history of size 1; a batch is 1% of them."""
    orders = arguments.rows or (10_000 if arguments.quick else 1_000_000)
    times = arguments.times or (1 if arguments.quick else 5)
    sizes = SIZES[:2] if arguments.quick else SIZES

    def chosen(tools: list[Tool]) -> list[Tool]:
        return [tool for tool in tools if not arguments.only or any(name in tool.name for name in arguments.only)]

    shutil.rmtree(WORK, ignore_errors=True)
    for peer in ("dbt", "sqlmesh"):  # copied, because both write beside their project; their logs stay for a look
        shutil.copytree(PEERS / peer, WORK / peer)
    series: list[tuple[int, Series]] = []
    variants: list[tuple[int, Series]] = []
    with open_server("refresh", arguments.postgresql, SETTINGS) as server:
        postgresql = version_of(server)
        for size in sizes:
            warehouse = new_history(server, orders, size)
            rows = f"PostgreSQL {postgresql}, {orders:,} orders in {size} versions, batch of {orders // BATCH_EVERY:,}"
            for kind, tools, base, warm_up in (
                ("Incremental", chosen(incremental_tools()), "merge", 1),
                ("Full", chosen(full_tools()), "swap", 0),
                ("Full, from the previous rows", chosen([of_ours("union")]), "union", 0),
            ):
                if tools:
                    measure(warehouse, tools, times, BATCH_EVERY, warm_up)
                    print_table(f"{kind} refresh: {rows}", [tool.series for tool in tools], base)
                    variants += [(size, tool.series) for tool in tools]
                    series += [(size, one) for one in headlines(tools)]
        print_ratios(series, sizes)

        hundred = chosen([of_ours("merge"), of_ours("swap")])
        if hundred:
            warehouse = new_history(server, orders, HUNDRED_VERSIONS)
            for tool in hundred:  # one after the other, for they have one table
                measure(warehouse, [tool], times, max(orders // 100, 1), 1 if tool.name == "merge" else 0)
            title = f"A batch of 100 rows, {orders * HUNDRED_VERSIONS:,} rows in raw"
            print_table(title, [tool.series for tool in hundred], "merge")
    return {
        "postgresql": postgresql,
        "versions": versions("dbt") | versions("sqlmesh"),
        "rows_per_unit": orders,
        "batch": orders // BATCH_EVERY,
        "sizes": list(sizes),
        "series": [one.as_json(size=size) for size, one in series],
        "variants": [one.as_json(size=size) for size, one in variants],
        "hundred": {
            "raw_rows": orders * HUNDRED_VERSIONS,
            "orders": orders,
            "batch": 100,
            "series": [tool.series.as_json() for tool in hundred],
        },
    }


def print_ratios(series: Sequence[tuple[int, Series]], sizes: Sequence[int]) -> None:
    """What the medians say about growth, and about each other."""
    print(f"\nRatios of medians{'':<24}" + "".join(f"{f'{size}x':>10}" for size in sizes))
    for name in ("merge", "dbt incremental", "SQLMesh", "swap", "dbt table", "union"):
        cells = [ratio(series, (name, size), (name, sizes[0])) for size in sizes]
        print_cells(f"{name}, to its own at {sizes[0]}x", cells)
    for one, other in (
        ("dbt incremental", "merge"),
        ("SQLMesh", "merge"),
        ("dbt table", "swap"),
        ("dbt table", "union"),
    ):
        cells = [ratio(series, (one, size), (other, size)) for size in sizes]
        print_cells(f"{one} / {other}", cells)


def print_cells(name: str, cells: Sequence[str]) -> None:
    if any(cell != "-" for cell in cells):
        print(f"  {name:<39}" + "".join(f"{cell:>10}" for cell in cells), flush=True)
