"""python -m bench load: load_batch beside psql's \\copy and other tools, with bad rows, and its memory.

Each tool loads the same file into a new database, one run of each in turn, and nothing is left to be written of the run
before. Those that can do so as de_dw_pipeline into raw.orders, with all its constraints and its identity. What every
run brought is checked: a tool that brought something else is WRONG, and when that is ours the exit code is 1.

Seconds are from opening the file and the connection to the commit. The tools that would take many minutes get a
smaller file and are compared by their rates.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from bench.harness import (
    STATE,
    NotRun,
    Series,
    environment,
    in_new_process,
    new_warehouse,
    open_server,
    print_table,
    run_peer,
    run_process,
    say,
    version_of,
    versions,
)
from local.postgres import Server

WORK = STATE / "load"
FLOOR, OURS, BAD = "psql \\copy", "load_batch", "load_batch, 1% bad rows"
SLOW_ROWS, SLOWEST_ROWS = 500_000, 100_000  # at most, for tools that would take minutes
BAD_ROWS = 1_000_000  # at most, in a file with bad rows
MEMORY_ROWS = (100_000, 1_000_000)
BAD_EVERY = 100  # 1% of the rows
# No tool calls home or keeps its state elsewhere (but for an unused id that dlt writes, as root to /var/dlt).
QUIET = {"RUNTIME__DLTHUB_TELEMETRY": "false", "DLT_DATA_DIR": str(WORK / "dlt"), "DLT_PROJECT_DIR": str(WORK / "dlt")}
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


def make_files(clean: Sequence[int], bad: Sequence[int]) -> None:
    from generator.orders import generate_orders

    for rows in {*clean, *bad}:
        generate_orders(WORK / f"clean-{rows}.csv", rows=rows, updated_at=datetime(2026, 1, 2, tzinfo=UTC))
    for rows in set(bad):
        flawed = flaws(rows)
        with (WORK / f"clean-{rows}.csv").open("rb") as source, (WORK / f"bad-{rows}.csv").open("xb") as target:
            target.writelines(
                spoil(text, flawed[line]) if line in flawed else text for line, text in enumerate(source, 1)
            )
    for path in WORK.glob("*.csv"):
        path.chmod(0o444)  # no tool has any business writing to it


def spoil(text: bytes, flaw: Flaw) -> bytes:
    first, *last = text.removesuffix(b"\n").rsplit(b",", len(LAST_COLUMNS))
    values = [flaw.becomes if name == flaw.column else value for name, value in zip(LAST_COLUMNS, last, strict=True)]
    return b",".join([first, *(value for value in values if value is not None)]) + b"\n"


# The tools


class Figures(NamedTuple):
    """Of one run."""

    seconds: float
    startup: float
    peak_mib: int
    before_mib: int = 0  # ours only: with all imports, before the call


class Tool(NamedTuple):
    """How to load a file, and where its rows are then."""

    name: str
    load: Callable[[Server, str, Path], Figures]
    table: str = "raw.orders"  # another is one that the tool made, with its own types and without constraints
    env: str = ""
    at_most: int | None = None  # rows: more would take minutes
    note: str = ""


def peer(
    script: str, *arguments: str, env: str = "", more: Callable[[Server], dict[str, str]] | None = None
) -> Callable[[Server, str, Path], Figures]:
    """A script of bench/peers/ in the environment `env`, or in ours, as a tool's load()."""

    def load(server: Server, url: str, path: Path) -> Figures:
        python = environment(env) if env else Path(sys.executable)
        state = WORK / "state"  # what a tool keeps from one run for the next
        shutil.rmtree(state, ignore_errors=True)
        state.mkdir()
        variables = {"BENCH_URL": url, "BENCH_FILE": str(path), "BENCH_WORK": str(state)} | QUIET
        seconds, startup, report = run_peer(python, script, variables | (more(server) if more else {}), *arguments)
        shutil.rmtree(state, ignore_errors=True)
        return Figures(seconds, startup, report["peak_mib"], report.get("before_mib", 0))

    return load


def airflow(server: Server) -> dict[str, str]:
    """An Airflow connection to the run's database, without Airflow's own database."""
    connection = {"conn_type": "postgres", "host": str(server.socket_dir), "login": "postgres", "schema": "run"}
    return {"AIRFLOW_HOME": str(WORK / "airflow"), "AIRFLOW_CONN_BENCH": json.dumps(connection)}


def copy(server: Server, url: str, path: Path) -> Figures:
    r"""psql with \copy, less psql with --version."""
    psql = server.binaries / "psql"
    command = rf"\copy raw.orders ({header(path)}) FROM '{path.name}' WITH (FORMAT csv, HEADER true)"
    startup = run_process([psql, "--version"]).seconds
    options = ["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1"]
    process = run_process([psql, *options, url, "--command", command], cwd=path.parent)
    return Figures(process.seconds - startup, startup, process.peak_mib)


def pgloader(server: Server, url: str, path: Path) -> Figures:
    """Debian's pgloader, less pgloader with --version."""
    program = shutil.which("pgloader")
    if program is None:
        raise NotRun("pgloader is not installed (Debian's package pgloader)")
    columns = header(path)
    (WORK / "orders.load").write_text(f"""
        LOAD CSV FROM '{path}' ({columns})
        INTO postgresql://postgres@unix:{server.socket_dir}:5432/run
        TARGET TABLE raw.orders ({columns})
        WITH skip header = 1, fields optionally enclosed by '"', fields escaped by double-quote,
            fields terminated by ','
        SET client_encoding to 'utf8';
    """)
    startup = run_process([program, "--version"]).seconds
    process = run_process([program, "--root-dir", WORK / "pgloader", WORK / "orders.load"])
    return Figures(process.seconds - startup, startup, process.peak_mib)


def header(path: Path) -> str:
    with path.open() as file:
        return file.readline().strip()


load_clean, load_bad = peer("load_batch.py", "0"), peer("load_batch.py", "1%")
DLT = "dlt.orders"
TOOLS = (
    Tool(FLOOR, copy),
    Tool(OURS, load_clean),
    Tool("PostgresHook.copy_expert", peer("copy_expert.py", more=airflow)),
    Tool("ADBC ingest", peer("adbc_ingest.py", env="adbc"), env="adbc"),
    Tool("dlt, CSV file as it is", peer("dlt_run.py", "import", env="dlt"), DLT, env="dlt", note="own table"),
    Tool("dlt, Arrow tables", peer("dlt_run.py", "arrow", env="dlt"), DLT, env="dlt", note="own table"),
    Tool("pgloader", pgloader, at_most=SLOW_ROWS, note="commits as it goes"),
    Tool(
        "pg-bulk-ingest",
        peer("bulk_ingest.py", env="bulk_ingest"),
        "bulk_ingest.orders",
        env="bulk_ingest",
        at_most=SLOW_ROWS,
        note="own table",
    ),
    Tool("pandas to_sql, COPY", peer("pandas_to_sql.py", "copy", env="pandas"), env="pandas", at_most=SLOW_ROWS),
    Tool("pandas to_sql, plain", peer("pandas_to_sql.py", "plain", env="pandas"), env="pandas", at_most=SLOW_ROWS),
    Tool("pandas to_sql, multi", peer("pandas_to_sql.py", "multi", env="pandas"), env="pandas", at_most=SLOWEST_ROWS),
    Tool(
        "PostgresHook.insert_rows", peer("insert_rows.py", more=airflow), at_most=SLOW_ROWS, note="commits as it goes"
    ),
)


# The runs


def measure(server: Server, tools: Sequence[Tool], rows: int, times: int) -> tuple[list[Series], list[Series]]:
    """Series of the tools, and of load_batch with a clean and with a bad file of the same size."""
    bad_rows = min(rows, BAD_ROWS)
    contents = {size: checksum_of_floor(server, size) for size in sizes_of(tools, rows)}
    runs: dict[str, tuple[Series, Callable[[], Figures]]] = {}
    for tool in tools:
        size = min(rows, tool.at_most or rows)
        note = f"{tool.note}{', ' * bool(tool.note)}{size:,} rows only" if size < rows else tool.note
        runs[tool.name] = (Series(tool.name, size, note), partial(run_tool, server, tool, size, contents[size]))
    if OURS in runs:
        ours = next(tool for tool in tools if tool.name == OURS)
        clean = Series(f"{OURS}, {bad_rows:,} clean rows" if bad_rows < rows else OURS, bad_rows)
        if bad_rows < rows:
            runs[clean.name] = (clean, partial(run_tool, server, ours, bad_rows, None))
        else:
            clean = runs[OURS][0]
        runs[BAD] = (Series(BAD, bad_rows), partial(run_bad, server, bad_rows))
    for turn in range(times + 1):
        names = list(runs)[turn % len(runs) :] + list(runs)[: turn % len(runs)]
        for name in names[:: -1 if turn % 2 else 1]:
            series, run = runs[name]
            if series.error:
                continue
            say(f"round {turn} of {times}: {name}")
            try:
                figures = run()
            except NotRun as reason:
                series.error = str(reason)
                continue
            # The first turn only warms up: the page cache, .pyc files, and WAL files that are then used again.
            if turn:
                series.add(figures.seconds, figures.startup, figures.peak_mib)
    say("")
    with_bad = [clean, runs[BAD][0]] if OURS in runs else []
    return [runs[tool.name][0] for tool in tools], with_bad


def sizes_of(tools: Sequence[Tool], rows: int) -> set[int]:
    """Rows of the files that the tools load."""
    return {min(rows, tool.at_most or rows) for tool in tools}


def new_run(server: Server, table: str = "raw.orders") -> str:
    """The URL of a new database, where every session that fills raw.orders does it as the pipeline."""
    url = new_warehouse(server)
    if table == "raw.orders":
        with psycopg.connect(server.url("postgres"), autocommit=True) as conn:
            conn.execute("ALTER DATABASE run SET role = 'de_dw_pipeline'")
            conn.execute("ALTER DATABASE run SET de_dw.load_id = '1'")
    os.sync()  # what the tool before left unwritten is not this one's
    return url


def run_tool(server: Server, tool: Tool, rows: int, checksum: int | None) -> Figures:
    """One run, checked.

    :raises NotRun: the tool failed, or it is wrong.
    """
    url, path = new_run(server, tool.table), WORK / f"clean-{rows}.csv"
    written_at = path.stat().st_mtime_ns
    figures = tool.load(server, url, path)
    if path.stat().st_mtime_ns != written_at:
        raise NotRun("WRONG: it wrote to the file that it was to load")
    sums = f"SELECT count(*), min(order_id), max(order_id), sum(order_id)::bigint FROM {tool.table}"  # noqa: S608
    with psycopg.connect(url) as conn:
        found = conn.execute(sums.encode()).fetchone()
        expected = (rows, 1, rows, rows * (rows + 1) // 2)
        if found != expected:
            raise NotRun(f"WRONG: rows, least, greatest and sum of order_id are {found}, not {expected}")
        if checksum is not None and checksum_of(conn, tool.table) != checksum:
            raise NotRun("WRONG: the rows differ from those of the file")
    return figures


def checksum_of(conn: psycopg.Connection[Any], table: str) -> int:
    """Of every value that a file has, whatever the order of the rows and the types of the columns."""
    row = conn.execute(
        f"""
        SELECT sum(hashtextextended(concat_ws(
            '|', order_id, customer_name, customer_email, product, quantity, trim_scale(unit_price), currency, status,
            extract(epoch FROM ordered_at), extract(epoch FROM updated_at)
        ), 0)) FROM {table}
        """.encode()  # noqa: S608
    ).fetchone()
    return int(row[0]) if row else 0


def checksum_of_floor(server: Server, rows: int) -> int:
    """What a file's rows add up to."""
    url = new_run(server)
    copy(server, url, WORK / f"clean-{rows}.csv")
    with psycopg.connect(url) as conn:
        return checksum_of(conn, "raw.orders")


def run_bad(server: Server, rows: int) -> Figures:
    """load_batch with a bad file: each good row is there once, and each bad one in quarantine for its flaw.

    :raises NotRun: not so.
    """
    url = new_run(server)
    figures = load_bad(server, url, WORK / f"bad-{rows}.csv")
    missing = flaws(rows)
    good, rejects = rows - len(missing), len(missing)
    query = "SELECT count(*), count(DISTINCT order_id), count(*) FILTER (WHERE order_id %% %s = 0) FROM raw.orders"
    with psycopg.connect(url) as conn:
        found = conn.execute(query, (BAD_EVERY,)).fetchall()
        found += conn.execute("SELECT rows, rejects FROM raw.loads").fetchall()
        rejected = conn.execute("SELECT line_number, column_name, reason FROM raw.orders_rejects").fetchall()
    wrong = [] if found == [(good, good, 0), (good, rejects)] else [f"found {found}"]
    for line, column_name, reason in rejected:
        flaw = missing.pop(line, None)
        if flaw is None or column_name != flaw.column_name or flaw.reason not in reason:
            wrong.append(f"line {line}, {flaw}: rejected for column {column_name}, {reason}")
    wrong += [f"line {line}, {flaw}: not rejected" for line, flaw in missing.items()]
    if wrong:
        raise NotRun("\n    ".join([f"WRONG, {len(wrong):,} times:", *wrong[:20]]))
    return figures


def memory(server: Server, rows: int) -> list[dict[str, Any]]:
    """MiB at most in memory of the process that calls load_batch: before the call with all imports, and in all."""
    found = []
    for kind, load, sizes in (("clean", load_clean, {*MEMORY_ROWS, rows}), ("bad", load_bad, set(MEMORY_ROWS))):
        for size in sorted(size for size in sizes if size <= rows):
            figures = load(server, new_run(server), WORK / f"{kind}-{size}.csv")
            found.append({"file": kind, "rows": size, "before": figures.before_mib, "peak": figures.peak_mib})
    return found


def compare(postgresql: str, tools: Sequence[Tool], rows: int, times: int) -> tuple[dict[str, Any], list[str]]:
    """The results on one server, printed too, and what of ours was wrong."""
    with open_server("load", postgresql) as server:
        version = version_of(server)
        series, with_bad = measure(server, tools, rows, times)
        print_table(f"Load, PostgreSQL {version}: {rows:,} rows, {times} times each in turn", series, FLOOR)
        if with_bad:
            print_table(f"Load with bad rows, PostgreSQL {version}", with_bad, with_bad[0].name)
        wrong = {one.name: one.error for one in (*series, *with_bad) if one.name.startswith(OURS) and one.error}
        peaks = memory(server, rows) if with_bad and not wrong else []
    if peaks:
        print(f"\n  {'peak memory of load_batch, MiB':<34}{'before':>8}{'in all':>8}")
    for peak in peaks:
        print(f"  {peak['rows']:>12,} rows, {peak['file']:<15}{peak['before']:>8}{peak['peak']:>8}")
    result = {
        "postgresql": version,
        "rows": rows,
        "series": [one.as_json() for one in series],
        "bad": [one.as_json() for one in with_bad],
        "memory": peaks,
    }
    return result, [f"PostgreSQL {version}, {name}: {error}" for name, error in wrong.items()]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The load bench; see the module."""
    rows = arguments.rows or (50_000 if arguments.quick else 5_000_000)
    times = arguments.times or (1 if arguments.quick else 5)
    tools = [tool for tool in TOOLS if not arguments.only or any(part in tool.name for part in arguments.only)]
    bad_rows = min(rows, BAD_ROWS)
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    try:
        small = [size for size in MEMORY_ROWS if size <= rows]
        in_new_process(make_files, [rows, *sizes_of(tools, rows), *small], [bad_rows, *small])
        for name in dict.fromkeys(tool.env for tool in tools if tool.env):
            with suppress(NotRun):  # the tool will say so
                environment(name)
        result, failures = compare("newest", tools, rows, times)
        result |= {"base": FLOOR, "versions": tool_versions()}
        try:
            if oldest := [tool for tool in tools if tool.name in (FLOOR, OURS)]:
                result["oldest"], wrong = compare("15", oldest, bad_rows, times)
                failures += wrong
        except NotRun as reason:
            print(f"\n  not run on 15: {reason}")
    finally:
        shutil.rmtree(WORK)
    if result["bad"] and not failures:
        of_each = [flaw.name for flaw in flaws(bad_rows).values()]
        print("\n  Rejected as expected, every time:")
        print(f"  {'flaw':<24}{'rows':>6}  {'column_name':<12} in the reason")
        for flaw in FLAWS:
            print(f"  {flaw.name:<24}{of_each.count(flaw.name):>6,}  {flaw.column_name or '':<12} {flaw.reason}")
    return result | {"failures": failures}


def tool_versions() -> dict[str, str]:
    """Of what was compared."""
    found = {"apache-airflow-providers-postgres": metadata.version("apache-airflow-providers-postgres")}
    for name in dict.fromkeys(tool.env for tool in TOOLS if tool.env):
        found |= versions(name)
    with suppress(NotRun, IndexError):
        program = shutil.which("pgloader")
        found |= {"pgloader": run_process([program, "--version"]).stdout.split('"')[1]} if program else {}
    return found
