"""raw.orders grows to 100 million rows, load by load, each merged: what a batch costs then, and what the disk holds.

A run of the generator makes 10 million orders; it is loaded in ten batches, and again with a later updated_at until
there are --rows. Before that, what an index on load_id, or partitions, add to a COPY: --times runs each, in turn.
"""

import itertools
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import psycopg

from bench.harness import (
    PIPELINE,
    ROOT,
    Series,
    in_new_process,
    new_warehouse,
    open_server,
    print_table,
    refresh_of_orders,
    say,
    version_of,
)

ROWS, BATCH, BATCHES_A_RUN = 100_000_000, 1_000_000, 10
# What may find the rows of a load. Partitions of ten loads each need no index to find one load in ten.
LAYOUTS = {
    "no index": "DROP INDEX raw.orders_load_id_brin",
    "BRIN": "SELECT 1",
    "B-tree": "DROP INDEX raw.orders_load_id_brin; CREATE INDEX orders_load_id_btree ON raw.orders (load_id)",
    "partitions": """
        ALTER TABLE raw.orders RENAME TO orders_plain;
        CREATE TABLE raw.orders (LIKE raw.orders_plain INCLUDING DEFAULTS INCLUDING CONSTRAINTS)
        PARTITION BY RANGE (load_id);
        CREATE SEQUENCE raw.orders_row_id CACHE 1000;
        ALTER TABLE raw.orders ALTER COLUMN row_id SET DEFAULT nextval('raw.orders_row_id');
        CREATE TABLE raw.orders_0 PARTITION OF raw.orders FOR VALUES FROM (0) TO (10);
        CREATE TABLE raw.orders_1 PARTITION OF raw.orders FOR VALUES FROM (10) TO (20);
    """,
}
SIZES = {
    "raw.orders": "SELECT pg_table_size('raw.orders')",
    "raw.orders, BRIN": "SELECT pg_indexes_size('raw.orders')",
    "stg.orders_latest, live": "SELECT pg_table_size('stg.orders_latest_live')",
    "stg.orders_latest, live, primary key": "SELECT pg_indexes_size('stg.orders_latest_live')",
    "stg.orders_latest, spare": "SELECT pg_total_relation_size('stg.orders_latest_spare')",
}


def run(arguments: Any) -> dict[str, Any]:
    """Everything above on one server; `failures` when stg is not what raw says in the end."""
    total = arguments.rows or (2_000_000 if arguments.quick else ROWS)
    batch = min(BATCH, total // 20)
    times = arguments.times or (1 if arguments.quick else 5)
    result: dict[str, Any] = {"rows": total, "batch": batch}
    with open_server("scale", arguments.postgresql) as server:
        folder = server.home / "files"
        folder.mkdir()
        result["postgresql"] = version_of(server)
        print(f"\nPostgreSQL {result['postgresql']}: {total:,} rows in loads of {batch:,}")
        result["layouts"] = compare_layouts(server, folder, batch, times)
        result |= grow(new_warehouse(server), folder, total, batch)
    return result


def make_files(folder: Path, batch: int, version: int) -> list[Path]:
    """One run of the generator in BATCHES_A_RUN files of `batch` orders, all of them different orders."""
    whole = folder / "whole.csv"
    moment = datetime(2020, 1, 1, tzinfo=UTC) + timedelta(days=version)
    in_new_process(generate, whole, batch * BATCHES_A_RUN, moment, version)
    files = []
    with whole.open("rb") as source:
        header = source.readline()
        for number in range(BATCHES_A_RUN):
            files.append(folder / f"{version}-{number}.csv")
            with files[-1].open("wb") as target:
                target.write(header)
                target.writelines(itertools.islice(source, batch))
    whole.unlink()
    return files


def generate(path: Path, rows: int, updated_at: datetime, seed: int) -> None:
    """In a process of its own: see in_new_process."""
    from generator.orders import generate_orders

    path.unlink(missing_ok=True)
    generate_orders(path, rows=rows, updated_at=updated_at, seed=seed)


def compare_layouts(server: Any, folder: Path, batch: int, times: int) -> list[dict[str, Any]]:
    """COPY of one batch into raw.orders in each layout."""
    path = make_files(folder, batch, 0)[0]
    series = {name: Series(name, batch) for name in LAYOUTS}
    for turn in range(times + 1):
        names = list(LAYOUTS)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            say(f"COPY, {name}")
            with psycopg.connect(new_warehouse(server), autocommit=True) as conn:
                conn.execute(LAYOUTS[name].encode())
                conn.execute("SET de_dw.load_id = 1")
                conn.execute("CHECKPOINT")
                seconds = copy(conn, path)
            if turn:  # the first only warms up
                series[name].add(seconds)
    say("")
    print_table(f"COPY of {batch:,} rows, by what finds them again", list(series.values()), base="no index")
    for file in folder.iterdir():
        file.unlink()
    return [one.as_json() for one in series.values()]


def copy(conn: psycopg.Connection[Any], path: Path) -> float:
    """Seconds of a bare COPY of the file."""
    started = time.perf_counter()
    with path.open("rb") as file, conn.cursor() as cur:
        header = file.readline().decode().strip()
        with cur.copy(f"COPY raw.orders ({header}) FROM STDIN WITH (FORMAT csv)".encode()) as target:
            while block := file.read(1 << 16):
                target.write(block)
    return time.perf_counter() - started


def batches(folder: Path, total: int, batch: int) -> Iterator[Path]:
    for version in range(1, total // (batch * BATCHES_A_RUN) + 1):
        files = make_files(folder, batch, version)
        yield from files
        for file in files:
            file.unlink()


def grow(url: str, folder: Path, total: int, batch: int) -> dict[str, Any]:
    """Load and merge until there are `total` rows; then what a batch of each size and each refresh cost."""
    sys.path.append(str(ROOT / "dags"))
    from batch_load import load_batch

    loads, merges = [], []
    with (
        psycopg.connect(url, options=PIPELINE, autocommit=True) as conn,
        psycopg.connect(url, autocommit=True) as owner,
    ):
        for number, path in enumerate(batches(folder, total, batch), 1):
            owner.execute("CHECKPOINT")
            started = time.perf_counter()
            with conn.transaction():
                load_batch(conn, table="raw.orders", batch_id=str(number), path=path)
            loads.append(time.perf_counter() - started)
            merges.append(refresh(conn, "merge"))
            if number % BATCHES_A_RUN == 0:
                last = slice(number - BATCHES_A_RUN, number)
                print(
                    f"  {number * batch:>13,} rows: a load {spread(loads[last])}, its merge {spread(merges[last])}",
                    flush=True,
                )
        vacuum = timed(owner, "VACUUM (ANALYZE) raw.orders")
        sizes = {name: owner.execute(query.encode()).fetchall()[0][0] for name, query in SIZES.items()}
        small = {rows: one_more(conn, owner, batch * BATCHES_A_RUN, rows) for rows in (100, 10_000, batch // 10)}
        started = time.perf_counter()
        wrong = verify(conn, "the merges")
        whole = {"verify": time.perf_counter() - started, "union": refresh(conn, "union")}
        wrong += verify(conn, "the union")
        whole["swap"] = refresh(conn, "swap")
    print(f"  VACUUM (ANALYZE) raw.orders {vacuum:.1f} s")
    for name, size in sizes.items():
        print(f"  {name:<40}{size / 1e6:>12,.1f} MB")
    for rows, seconds in small.items():
        print(f"  merge of {rows:>9,} rows, random orders {median(seconds):>10.3f} s ({spread(seconds)})")
    for kind, took in whole.items():
        print(f"  {kind:<40}{took:>10.1f} s", flush=True)
    return {
        "loads": [round(value, 3) for value in loads],
        "merges": [round(value, 3) for value in merges],
        "vacuum": round(vacuum, 1),
        "bytes": sizes,
        "small_merges": {str(rows): [round(value, 4) for value in seconds] for rows, seconds in small.items()},
        "whole": {kind: round(took, 1) for kind, took in whole.items()},
        "failures": wrong,
    }


def one_more(conn: psycopg.Connection[Any], owner: psycopg.Connection[Any], orders: int, rows: int) -> list[float]:
    """Seconds of five merges of a new version of `rows` random orders each."""
    seconds = []
    for _ in range(5):
        with conn.transaction():
            conn.execute("SELECT set_config('de_dw.load_id', nextval('raw.loads_load_id_seq')::text, true)")
            conn.execute(
                "INSERT INTO raw.orders (order_id, product, updated_at)"
                " SELECT 1 + floor(random() * %s)::bigint, 'Desk, 27 inches', now() FROM generate_series(1, %s)",
                (orders, rows),
            )
            conn.execute(
                "INSERT INTO raw.loads (load_id, table_name, batch_id, source, sha256, bytes, rows) SELECT id,"
                " 'raw.orders', 'more ' || id, 'bench', encode(sha256(id::text::bytea), 'hex'), 0, %s"
                " FROM current_setting('de_dw.load_id') AS s (text), LATERAL (SELECT text::bigint AS id) AS n",
                (rows,),
            )
        owner.execute("CHECKPOINT")
        seconds.append(refresh(conn, "merge"))
    return seconds


def refresh(conn: psycopg.Connection[Any], kind: str) -> float:
    return timed(conn, refresh_of_orders(kind))


def timed(conn: psycopg.Connection[Any], script: str) -> float:
    started = time.perf_counter()
    conn.execute(script.encode())
    return time.perf_counter() - started


def verify(conn: psycopg.Connection[Any], after: str) -> list[str]:
    """What is wrong with stg.orders_latest, if anything."""
    ((*counts, _),) = conn.execute("SELECT * FROM stg.verify('orders_latest')").fetchall()
    return [f"scale: after {after} missing, extra, different: {counts}"] if any(counts) else []


def spread(seconds: list[float]) -> str:
    return f"{min(seconds):.2f} to {max(seconds):.2f} s"
