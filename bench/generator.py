"""python -m bench generator: rows per second of generate_orders, of Faker row by row, and of the load that takes them.

Each run in a process of its own, in turn, the file on the same disk. Only generate_orders waits until its file is there
(fsync). Seconds are from the first line of work, Faker's vocabulary included, to the closed file.
"""

import argparse
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.harness import STATE, NotRun, Series, print_table, read_results, results_of, run_peer, say

WORK = STATE / "generator"
OURS, NAIVE, LOAD = "generate_orders", "Faker, row by row", "load_batch, of the load bench"
NAIVE_ROWS = 20_000  # of these the naive way makes some thousand a second


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The generator bench; see the module."""
    rows = arguments.rows or (100_000 if arguments.quick else 5_000_000)
    times = arguments.times or (1 if arguments.quick else 5)
    naive_rows = min(rows, 1_000 if arguments.quick else NAIVE_ROWS)
    ours = Series(OURS, rows)
    naive = Series(NAIVE, naive_rows, f"{naive_rows:,} rows only")
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    try:
        for turn in range(times + 1):
            pair = [(ours, "generate_orders.py"), (naive, "faker_orders.py")]
            for series, script in pair[:: -1 if turn % 2 else 1]:
                say(f"round {turn} of {times}: {series.name}")
                measure(series, script, warm_up=turn == 0)
    finally:
        shutil.rmtree(WORK)
    say("")
    both = [naive, ours]
    loaded = next(
        (
            one
            for one in read_results(results_of(arguments)).get("load", {}).get("series", [])
            if one["name"] == "load_batch"
        ),
        None,
    )
    if loaded and loaded["seconds"]:
        both.append(Series(LOAD, loaded["rows"], seconds=loaded["seconds"], startup=loaded["startup"]))
    print_table(f"Generator: {rows:,} rows, {times} times each in turn", both, OURS)
    result: dict[str, Any] = {
        "versions": {"faker": version("faker"), "numpy": version("numpy"), "pyarrow": version("pyarrow")},
        "rows": rows,
        "base": OURS,
        "series": [one.as_json() for one in both],
    }
    return result | {"failures": [f"{ours.name}: {ours.error}"] if ours.error else []}


def measure(series: Series, script: str, *, warm_up: bool) -> None:
    """One run, checked: as many lines as there should be, and the header."""
    if series.error:
        return
    path = WORK / "orders.csv"
    os.sync()  # what the run before left unwritten is not this one's
    try:
        seconds, startup, report = run_peer(
            Path(sys.executable), script, {"BENCH_FILE": str(path), "BENCH_ROWS": str(series.rows)}
        )
        check(path, series.rows or 0)
    except NotRun as reason:
        series.error = str(reason)
        return
    finally:
        path.unlink(missing_ok=True)
    if not warm_up:
        series.add(seconds, startup, report["peak_mib"])


def check(path: Path, rows: int) -> None:
    """:raises NotRun: the file is not what it should be."""
    with path.open("rb") as file:
        header = file.readline()
        lines = sum(1 for _ in file)
    if not header.startswith(b"order_id,") or header.count(b",") != 9 or lines != rows:
        raise NotRun(f"WRONG: {lines:,} rows, header {header.decode(errors='replace').strip()}")
