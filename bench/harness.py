"""What every bench needs: servers of its own, peers in environments of their own, series of seconds, results as JSON.

A bench is a module with `run(arguments) -> dict`. `arguments` has rows and times (None: the bench's own default), quick
(small enough for a smoke test), postgresql ("newest" or "15") and only (series to run; none: all of them). Its
dict may have `failures`: what of ours was wrong, for exit code 1 at the end.

    with open_server("load") as server:
        url = new_warehouse(server)
        series = Series("ours", rows=1000)
        series.add(seconds, startup)
    print_table("Load", [series], base="ours")
"""

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from threading import Timer
from typing import Any, NamedTuple

import psycopg

from local.postgres import DEBIAN_15, Server, embedded_binaries

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / ".run" / "bench"
PEERS = ROOT / "bench" / "peers"
PIPELINE = "-c role=de_dw_pipeline"  # a libpq `options`: the rights that the pipeline has
PEER_SECONDS = 1800  # a peer that takes longer is not run, with that reason
# What would send a peer to somebody's server, into our packages, or to compile itself anew in every run.
NOT_FOR_PEERS = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")


def refresh_of_orders(kind: str) -> str:
    """The SQL that Airflow runs: of a swap, union or merge."""
    if kind == "swap":
        return (ROOT / "sql" / "transforms" / "stg.orders_latest.sql").read_text()
    sys.path.append(str(ROOT / "dags"))
    from stg_refresh import refresh_script

    return refresh_script(kind, "orders_latest")


class NotRun(Exception):  # a result, not an error of ours
    """A peer could not be installed, failed, or brought something else than it should. The message is the reason."""


class Process(NamedTuple):
    """A command that ended well."""

    stdout: str
    seconds: float  # from its start to its end
    peak_mib: int  # at most in memory; Linux counts from what its parent had


@dataclass
class Series:
    """One tool's runs. `seconds` is the work on the database, `startup` what else the process took."""

    name: str
    rows: int | None = None  # of each run: tools that had fewer rows than others are compared by their rates
    note: str = ""
    seconds: list[float] = field(default_factory=list)
    startup: list[float] = field(default_factory=list)
    peak_mib: list[int] = field(default_factory=list)
    error: str | None = None  # why it was not run, or "WRONG: " and what was wrong

    def add(self, seconds: float, startup: float | None = None, peak_mib: int | None = None) -> None:
        """One run."""
        self.seconds.append(seconds)
        if startup is not None:
            self.startup.append(startup)
        if peak_mib is not None:
            self.peak_mib.append(peak_mib)

    def ratios(self, base: "Series") -> tuple[float, float]:
        """How many times the base's time this took, per row where both know their rows: of medians, of minima."""
        share = base.rows / self.rows if base.rows and self.rows else 1.0
        return share * median(self.seconds) / median(base.seconds), share * min(self.seconds) / min(base.seconds)

    def rate(self) -> float | None:
        """Rows per second of the median run."""
        return self.rows / median(self.seconds) if self.rows and self.seconds else None

    def as_json(self, **more: object) -> dict[str, Any]:
        """For results.json, with what a bench knows besides."""
        return {
            "name": self.name,
            "rows": self.rows,
            "note": self.note,
            "seconds": [round(value, 4) for value in self.seconds],
            "startup": [round(value, 4) for value in self.startup],
            "peak_mib": self.peak_mib,
            "error": self.error,
            **more,
        }


def print_table(title: str, series: Sequence[Series], base: str | None = None) -> None:
    """Seconds of each series, and how many times the base's they are."""
    floor = next((one for one in series if one.name == base and one.seconds), None)
    width = max([len(one.name) for one in series] + [12]) + 2
    print(f"\n{title}")
    print(
        f"  {'seconds':<{width}}{'min':>8}{'median':>9}{'max':>9}{'start-up':>10}{'rows/s':>11}{'peak MiB':>10}"
        + (f"  times {base}: of medians, of minima" if floor else "")
    )
    for one in series:
        if one.error or not one.seconds:
            error = one.error or "left out"
            print(f"  {one.name:<{width}}{error if error.startswith('WRONG') else f'not run: {error}'}", flush=True)
            continue
        cells = f"{min(one.seconds):>8.3f}{median(one.seconds):>9.3f}{max(one.seconds):>9.3f}"
        cells += f"{median(one.startup):>10.3f}" if one.startup else f"{'':>10}"
        rate = one.rate()
        cells += f"{rate:>11,.0f}" if rate else f"{'':>11}"
        cells += f"{max(one.peak_mib):>10,}" if one.peak_mib else f"{'':>10}"
        if floor:
            of_medians, of_minima = one.ratios(floor)
            cells += f"{of_medians:>9.2f}{of_minima:>8.2f}"
        print(f"  {one.name:<{width}}{cells}{f'  {one.note}' if one.note else ''}", flush=True)


def say(progress: str) -> None:
    """On a line of its own in a terminal, until there is something else to say; nowhere else."""
    if sys.stdout.isatty():
        print(f"\r\033[K{f'  {progress}' if progress else ''}", end="", flush=True)


# Servers


def binaries_of(postgresql: str) -> Path:
    """The programs of "newest", the embedded server, or of "15", Debian's.

    :raises NotRun: 15 is not installed.
    """
    if postgresql == "newest":
        return embedded_binaries()
    if not DEBIAN_15.exists():
        raise NotRun("PostgreSQL 15 is not installed (Debian's package postgresql-15)")
    return DEBIAN_15


@contextmanager
def open_server(bench: str, postgresql: str = "newest", settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A new server with the migrated template database de_dw; it goes with all its data in the end.

    :param bench: names its folder, which benches that run at the same time must not share.
    :param settings: postgresql.conf settings on top of those of local.postgres.
    """
    isolate()
    home = STATE / "servers" / f"{bench}-{postgresql}"
    shutil.rmtree(home, ignore_errors=True)
    server = Server(home, binaries_of(postgresql), settings)
    try:
        with server:
            with psycopg.connect(server.url("postgres"), autocommit=True) as conn:
                conn.execute("CREATE DATABASE de_dw")
            environment = os.environ | {"WAREHOUSE_URL": server.url("de_dw")}
            alembic = [sys.executable, "-m", "alembic", "upgrade", "head"]
            subprocess.run(alembic, cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)
            yield server
    finally:
        shutil.rmtree(home, ignore_errors=True)


def new_warehouse(server: Server, name: str = "run", template: str = "de_dw") -> str:
    """The URL of a migrated database without rows: no run meets the table, or writes the pages, of the one before."""
    with psycopg.connect(server.url("postgres"), autocommit=True) as conn:
        conn.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'.encode())
        conn.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"'.encode())
    # From within: the first connection to a database writes a cache file for those after it.
    with psycopg.connect(server.url(name), autocommit=True) as conn:
        conn.execute("CHECKPOINT")
    return server.url(name)


def version_of(server: Server) -> str:
    """The server's version: 18.6."""
    with psycopg.connect(server.url("postgres")) as conn:
        return (conn.info.parameter_status("server_version") or "").split()[0]


def isolate() -> None:
    """Forget what would lead us to a server that is not ours: raw rows can't be taken back."""
    for name in [name for name in os.environ if name.startswith("PG") or name == "WAREHOUSE_URL"]:
        del os.environ[name]


# Processes


def in_new_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Nothing is warm there. Its peak memory begins at ours, says Linux: so nothing large is imported here."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run_process(
    command: Sequence[str | Path], env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Process:
    """Run a command with `env` on top of our environment, less what is not for peers.

    :raises NotRun: it failed or took too long; with the end of what it said.
    """
    environment = {name: value for name, value in os.environ.items() if name not in NOT_FOR_PEERS} | dict(env or {})
    logs = STATE / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    out, err = logs / f"{os.getpid()}.out", logs / f"{os.getpid()}.err"
    try:
        with out.open("wb") as stdout, err.open("wb") as stderr:
            started = time.perf_counter()
            process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=environment,
                cwd=cwd or STATE,
            )
            too_long = Timer(PEER_SECONDS, process.kill)
            too_long.start()
            try:
                _, status, usage = os.wait4(process.pid, 0)  # which tells its own memory, not all children's
                seconds = time.perf_counter() - started
                process.returncode = os.waitstatus_to_exitcode(status)  # else Popen would wait for it as well
            finally:
                too_long.cancel()
                if process.returncode is None:
                    process.kill()
                    process.wait()
        said = out.read_text(errors="replace")
        if process.returncode != 0:
            complaint = (err.read_text(errors="replace").strip() or said.strip()).splitlines() or ["it said nothing"]
            took = f" after {seconds:.0f} s" if seconds >= PEER_SECONDS else ""
            said = next((line for line in complaint if "ERROR" in line), complaint[-1]).strip()
            raise NotRun(f"exit code {process.returncode}{took}: {said.replace(str(ROOT), '.')[:200]}")
        return Process(said, seconds, usage.ru_maxrss // 1024)
    finally:
        out.unlink(missing_ok=True)
        err.unlink(missing_ok=True)


def run_peer(
    python: Path, script: str, env: Mapping[str, str] | None = None, *arguments: str
) -> tuple[float, float, dict[str, Any]]:
    """Run bench/peers/<script>; return seconds, start-up seconds, and all it reports.

    Its last line of output is JSON with `seconds`: from opening file and connection to the commit, imports done before.
    All else that the process took, from its start to its end, is start-up. `peak_mib` is added to what it reports.

    :raises NotRun: it failed.
    """
    process = run_process([python, PEERS / script, *arguments], env)
    lines = process.stdout.strip().splitlines()
    try:
        report: dict[str, Any] = json.loads(lines[-1])
        seconds = float(report["seconds"])
    except (IndexError, ValueError, KeyError, TypeError):
        raise NotRun(f"its last line is no report: {lines[-1:]}") from None
    return seconds, process.seconds - seconds, report | {"peak_mib": process.peak_mib}


# Peers


def environment(name: str) -> Path:
    """The Python of .run/bench/envs/<name>, which has what bench/peers/<name>.txt pins; made where missing or old.

    :raises NotRun: pip could not.
    """
    wanted = PEERS / f"{name}.txt"
    home = STATE / "envs" / name
    python, made_of = home / "bin" / "python", home / "made-of.txt"
    home.parent.mkdir(parents=True, exist_ok=True)
    with (home.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two benches may want it at once
        if made_of.exists() and made_of.read_text() == wanted.read_text():
            return python
        print(f"  installing bench/peers/{name}.txt ...", flush=True)
        shutil.rmtree(home, ignore_errors=True)
        uv = Path(sys.executable).with_name("uv")
        try:
            if uv.exists():
                run_process([uv, "venv", "--quiet", "--python", sys.executable, home])
                run_process([uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", python, "-r", wanted])
            else:
                run_process([sys.executable, "-m", "venv", home])
                run_process([python, "-m", "pip", "install", "--quiet", "-r", wanted])
        except NotRun as reason:
            raise NotRun(f"bench/peers/{name}.txt was not installed: {reason}") from None
        made_of.write_text(wanted.read_text())
    return python


def versions(name: str) -> dict[str, str]:
    """What bench/peers/<name>.txt pins: {"pandas": "3.0.0"}."""
    lines = (line.partition("#")[0].strip() for line in (PEERS / f"{name}.txt").read_text().splitlines())
    return {package: version for package, _, version in (line.partition("==") for line in lines if line)}


# Results


def machine() -> dict[str, Any]:
    """What the figures depend on; nothing that tells whose machine it is."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def results_of(arguments: Any) -> Path:
    """The file of the last results of each bench; those of a trial do not take the place of real ones."""
    is_trial = arguments.quick or arguments.only or arguments.rows or arguments.postgresql != "newest"
    return STATE / ("smoke.json" if is_trial else "results.json")


def read_results(path: Path) -> dict[str, Any]:
    """The last results of each bench."""
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return results


def run_bench(name: str, run: Callable[[Any], dict[str, Any]], arguments: Any) -> dict[str, Any]:
    """Run one bench and put its results, with when and on what, in the place of its last ones."""
    isolate()
    STATE.mkdir(parents=True, exist_ok=True)
    before = os.getloadavg()
    started = time.monotonic()
    result = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        **run(arguments),
        "load_average": {"start": before, "end": os.getloadavg()},
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    path = results_of(arguments)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(read_results(path) | {name: result}, indent=1) + "\n")
        new.replace(path)
    print(f"  load average {before[0]:.1f} at the start, {os.getloadavg()[0]:.1f} at the end", flush=True)
    return result
