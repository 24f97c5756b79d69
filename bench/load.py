"""python -m bench.load --rows 1000000 --times 5: load_batch beside psql's \\copy, with bad rows, and its memory.

On servers of its own, durable as local.postgres makes them: the newest PostgreSQL and, where it is installed, 15.
What every load brought is checked: exit code 1 unless each good row is there, and each bad one rejected for its flaw.
"""

import argparse
import logging
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psycopg

from local.postgres import DEBIAN_15, Server, embedded_binaries

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / ".run" / "bench-load"
BAD_EVERY = 100  # 1% of the rows
LAST_COLUMNS = ("quantity", "unit_price", "currency", "status", "ordered_at", "updated_at")  # the generator quotes none


class Flaw(NamedTuple):
    """What a field becomes (None: it is left out), and the reject that must come of it."""

    name: str
    column: str
    becomes: bytes | None
    column_name: str | None
    reason: str  # or some of it


FLAWS = (
    Flaw("wrong type", "quantity", b"two", "quantity", "invalid input syntax for type integer"),
    Flaw("out of range", "quantity", b"2147483648", "quantity", "is out of range for type integer"),
    Flaw("missing field", "status", None, None, 'missing data for column "updated_at"'),
    Flaw("extra field", "status", b"paid,paid", None, "extra data after last expected column"),
    Flaw("empty required column", "updated_at", b"", "updated_at", 'null value in column "updated_at"'),
    Flaw("constraint broken", "quantity", b"0", "quantity", '"quantity_is_positive"'),
    Flaw("NUL byte", "status", b"pa\0id", None, "a NUL byte"),
    Flaw("invalid UTF-8", "status", b"pa\xffid", None, "not UTF-8: byte 0xff"),
    Flaw("unclosed quote", "status", b'"paid', None, "a quote"),  # stray, or of a field that never ends
    Flaw("infinity", "ordered_at", b"infinity", "ordered_at", '"ordered_at_is_finite"'),
    Flaw("NaN", "unit_price", b"NaN", "unit_price", '"unit_price_is_finite"'),
    Flaw("impossible timestamp", "ordered_at", b"2026-02-30 00:00:00+00:00", "ordered_at", "value out of range"),
)


def flaws(rows: int) -> dict[int, Flaw]:
    """Each flaw of a bad file, by its line: the header is line 1."""
    return {row + 1: FLAWS[(row // BAD_EVERY - 1) % len(FLAWS)] for row in range(BAD_EVERY, rows + 1, BAD_EVERY)}


def make_files(rows: int) -> None:
    from generator.orders import generate_orders

    for number in (rows // 10, rows, rows * 10):
        generate_orders(STATE / f"clean-{number}.csv", rows=number, updated_at=datetime(2026, 1, 2, tzinfo=UTC))
    for number in (rows // 10, rows):
        bad = flaws(number)
        with (STATE / f"clean-{number}.csv").open("rb") as source, (STATE / f"bad-{number}.csv").open("xb") as target:
            target.writelines(spoil(text, bad[line]) if line in bad else text for line, text in enumerate(source, 1))
    os.sync()  # else they are written out while the first loads run


def spoil(text: bytes, flaw: Flaw) -> bytes:
    first, *last = text.removesuffix(b"\n").rsplit(b",", len(LAST_COLUMNS))
    values = [flaw.becomes if name == flaw.column else value for name, value in zip(LAST_COLUMNS, last, strict=True)]
    return b",".join([first, *(value for value in values if value is not None)]) + b"\n"


def in_new_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Nothing is warm there. Its peak memory begins at ours, says Linux: so nothing large is imported here."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def new_warehouse(server: Server) -> str:
    """A migrated database without rows: no run meets the table, or has to write the pages, of the one before."""
    with psycopg.connect(server.url("postgres"), autocommit=True) as conn:
        conn.execute("DROP DATABASE IF EXISTS run WITH (FORCE)")
        conn.execute("CREATE DATABASE run TEMPLATE de_dw")
    # From within: the first connection to a database writes a cache file for those after it.
    with psycopg.connect(server.url("run"), autocommit=True) as conn:
        conn.execute("CHECKPOINT")
    return server.url("run")


def load_batch_in(url: str, path: Path, max_rejects: str) -> tuple[float, int, int]:
    """Seconds of the call and its commit; MiB at most in memory, before it with all imports and in all."""
    sys.path.append(str(ROOT / "dags"))
    from batch_load import load_batch

    logging.disable()  # that COPY refuses the file is no news here
    with psycopg.connect(url, options="-c role=de_dw_pipeline") as conn:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        started = time.perf_counter()
        load_batch(conn, table="raw.orders", batch_id="bench", path=path, max_rejects=max_rejects)
        conn.commit()
        seconds = time.perf_counter() - started
    return seconds, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def load(server: Server, rows: int, *, bad: bool = False) -> tuple[float, int, int]:
    """Load a file into a new warehouse and check what came of it; figures as load_batch_in."""
    url, path = new_warehouse(server), STATE / f"{'bad' if bad else 'clean'}-{rows}.csv"
    figures: tuple[float, int, int] = in_new_process(load_batch_in, url, path, "1%" if bad else "0")
    check(url, rows, flaws(rows) if bad else {}, "SELECT rows, rejects FROM raw.loads")
    return figures


def copy(server: Server, rows: int) -> tuple[float, float]:
    r"""Seconds of psql with SELECT 1, and with \copy."""
    url, path = new_warehouse(server), STATE / f"clean-{rows}.csv"
    with path.open() as file:
        columns = file.readline().strip()
    environment = os.environ | {"PGOPTIONS": "-c role=de_dw_pipeline -c de_dw.load_id=1"}
    psql = [str(server.binaries / "psql"), "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", url, "--command"]
    seconds = []
    for command in ("SELECT 1", rf"\copy raw.orders ({columns}) FROM '{path.name}' WITH (FORMAT csv, HEADER true)"):
        started = time.perf_counter()
        subprocess.run([*psql, command], cwd=STATE, env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    check(url, rows, {}, "SELECT count(*), 0 FROM raw.orders")
    return seconds[0], seconds[1]


def check(url: str, rows: int, bad: dict[int, Flaw], counted: str) -> None:
    """Exit with 1 unless the table has each good row once, and its quarantine each bad one for its flaw."""
    query = "SELECT count(*), count(DISTINCT order_id), count(*) FILTER (WHERE order_id %% %s = 0) FROM raw.orders"
    with psycopg.connect(url) as conn:
        found = conn.execute(query, (BAD_EVERY,)).fetchall() + conn.execute(counted.encode()).fetchall()
        rejects = conn.execute("SELECT line_number, column_name, reason FROM raw.orders_rejects").fetchall()
    good = rows - len(bad)
    expected = [(good, good, 0 if bad else rows // BAD_EVERY), (good, len(bad))]
    wrong = [] if found == expected else [f"found {found}, not {expected}"]
    missing = dict(bad)
    for line, column_name, reason in rejects:
        flaw = missing.pop(line, None)
        if flaw is None or column_name != flaw.column_name or flaw.reason not in reason:
            wrong.append(f"line {line}, {flaw}: rejected for column {column_name}, {reason}")
    wrong += [f"line {line}, {flaw}: not rejected" for line, flaw in missing.items()]
    if wrong:
        sys.exit("\n".join([f"WRONG, {len(wrong):,} times:", *wrong[:20]]))


def measure(server: Server, rows: int, times: int) -> None:
    """Print the tables of one server."""
    with psycopg.connect(server.url("postgres"), autocommit=True) as conn:
        conn.execute("CREATE DATABASE de_dw")
        version = conn.info.parameter_status("server_version")
    environment = os.environ | {"WAREHOUSE_URL": server.url("de_dw")}
    alembic = [sys.executable, "-m", "alembic", "upgrade", "head"]
    subprocess.run(alembic, cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)

    copies, clean, bad = [], [], []
    for turn in range(times + 1):
        if turn % 2:
            copies.append(copy(server, rows))
        clean.append(load(server, rows)[0])
        if not turn % 2:
            copies.append(copy(server, rows))
        bad.append(load(server, rows, bad=True)[0])
    # The first turn only warms up: the page cache, and WAL files that are then used again.
    start = median(seconds for seconds, _ in copies[1:])
    runs = {
        f"\\copy, less {start:.3f} to start psql": [seconds - start for _, seconds in copies[1:]],
        "load_batch": clean[1:],
        "load_batch, 1% bad rows": bad[1:],
    }
    print(f"\nPostgreSQL {version}: {rows:,} rows, {times} times each in turn, seconds")
    print(f"  {'':<32}{'min':>8}{'median':>8}{'max':>8}   ratio to the line above: of medians, of minima")
    base: list[float] = []
    for name, seconds in runs.items():
        ratios = f"{median(seconds) / median(base):>12.3f}{min(seconds) / min(base):>8.3f}" if base else ""
        print(f"  {name:<32}{min(seconds):>8.3f}{median(seconds):>8.3f}{max(seconds):>8.3f}{ratios}", flush=True)
        base = seconds
    print(f"  {'peak memory of load_batch, MiB':<32}{'before':>8}{'in all':>8}")
    for number, is_bad in ((rows // 10, False), (rows, False), (rows * 10, False), (rows // 10, True), (rows, True)):
        _, before, peak = load(server, number, bad=is_bad)
        print(f"  {f'{number:,} rows' + ', 1% bad' * is_bad:<32}{before:>8}{peak:>8}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="orders in the file")
    parser.add_argument("--times", type=int, default=5, help="runs of each kind that count")
    arguments = parser.parse_args()

    for name in [name for name in os.environ if name.startswith("PG") or name == "WAREHOUSE_URL"]:
        del os.environ[name]  # raw rows can't be taken back, so never into somebody's warehouse
    shutil.rmtree(STATE, ignore_errors=True)
    STATE.mkdir(parents=True)
    try:
        in_new_process(make_files, arguments.rows)
        for home, binaries in (("newest", embedded_binaries()), ("15", DEBIAN_15)):
            if binaries.exists():
                with Server(STATE / home, binaries) as server:
                    measure(server, arguments.rows, arguments.times)
        bad = list(flaws(arguments.rows).values())
        print(f"\nRejected as expected, every time:\n  {'flaw':<24}{'rows':>6}  {'column_name':<12} in the reason")
        for flaw in FLAWS:
            print(f"  {flaw.name:<24}{bad.count(flaw):>6,}  {flaw.column_name or '':<12} {flaw.reason}")
    finally:
        shutil.rmtree(STATE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
