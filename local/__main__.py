"""python -m local demo | run | up | down: what the Makefile's targets of these names run."""

import argparse
import fcntl
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata as packages
from pathlib import Path

import psutil
import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from local.console import Console, Failure
from local.postgres import Server, ServerError, embedded_binaries
from local.settings import ADMIN, ROOT, RUN, admin_password, environment, metadata_url

HOLDER = RUN / "holder.json"
LOGS = RUN / "logs"
DEFAULT_PORT = 8080
# Airflow's first start compiles its modules, which takes a slow machine a while.
HEALTHY_SECONDS = 180.0
# How long Airflow's processes have to stop by themselves. The scheduler waits for running tasks, which may take hours;
# told a second time it does not, and a load that is ended is rolled back.
CHILD_STOP_SECONDS = 5.0


@contextmanager
def only_one(command: str) -> Iterator[None]:
    """Hold the state folder. The lock is on the folder itself and ends with the process: no file stays behind.

    :raises Failure: another process holds it.
    """
    RUN.mkdir(parents=True, exist_ok=True)
    fd = os.open(RUN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(
                f"make {holder().get('command', 'up')} is running here (pid {holder().get('pid', '?')}): "
                f"use its UI, or stop it with make down"
            ) from None
        HOLDER.write_text(json.dumps({"pid": os.getpid(), "command": command}))
        try:
            yield
        finally:
            HOLDER.unlink(missing_ok=True)
    finally:
        os.close(fd)


def holder() -> dict[str, object]:
    try:
        content: dict[str, object] = json.loads(HOLDER.read_text())
    except (OSError, ValueError):
        content = {}
    return content


def check_data() -> None:
    """Look whether there is what Airflow needs to write to WAREHOUSE_DATA, before anything is started.

    :raises Failure: packages are missing for an s3:// URL. What other stores need Airflow says.
    """
    if os.environ.get("WAREHOUSE_DATA", "").startswith("s3://"):
        installed = {package.metadata["Name"] for package in packages.distributions()}
        if missing := {"apache-airflow-providers-amazon", "s3fs"} - installed:
            raise Failure(
                f"WAREHOUSE_DATA is on s3://, for which {' and '.join(sorted(missing))} must be installed: "
                f"local/venv.sh requirements-image.txt"
            )


def open_databases(console: Console, stack: ExitStack, port: int) -> dict[str, str]:
    """Start the embedded server where it is needed, and return the environment for Alembic and Airflow.

    WAREHOUSE_URL, when set, is where the warehouse is; Airflow keeps its own database on the embedded server even
    then, unless AIRFLOW__DATABASE__SQL_ALCHEMY_CONN says where it should be.
    """
    warehouse = os.environ.get("WAREHOUSE_URL", "")
    metadata = os.environ.get("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "")
    if not (warehouse and metadata):
        server = Server(RUN / "postgres")
        with console.step("PostgreSQL started" + (" (for Airflow's own database)" if warehouse else "")):
            stack.callback(server.stop)
            server.start()
            with psycopg.connect(server.url("postgres"), autocommit=True) as conn:
                for database in ("airflow", "de_dw"):
                    if not conn.execute("SELECT 1 FROM pg_database WHERE datname = %s", (database,)).fetchone():
                        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
        warehouse = warehouse or server.url("de_dw")
        metadata = metadata or metadata_url(server.socket_dir)
    return environment(warehouse, metadata, port)


def migrate_warehouse(console: Console, env: dict[str, str]) -> None:
    with console.step("alembic upgrade head"):
        run([sys.executable, "-m", "alembic", "upgrade", "head"], env)


def grant_reader(warehouse_url: str) -> None:
    """Let the owner, as whom we log in, be de_dw_reader: the Warehouse page of the UI reads with its rights only.

    From PostgreSQL 16 on an owner with CREATEROLE has made the role and may still not SET ROLE to it.
    """
    with psycopg.connect(warehouse_url) as conn:
        option = "SET" if conn.info.server_version >= 160000 else "MEMBER"
        (may,) = conn.execute("SELECT pg_has_role('de_dw_reader', %s)", (option,)).fetchone() or (False,)
        if not may:
            # Where the owner may not grant it the page says what is missing; all else works.
            with suppress(psycopg.errors.InsufficientPrivilege):
                conn.execute("GRANT de_dw_reader TO CURRENT_USER")


def run(command: list[str], env: dict[str, str]) -> None:
    """Run a program to its end, its output in the log.

    :raises Failure: it failed; with its last words.
    """
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    os.write(1, done.stdout)
    if done.returncode != 0:
        raise Failure(done.stdout.decode(errors="replace").strip()[-1500:])


def demo(console: Console, stack: ExitStack) -> None:
    """Three runs of the DAG in this process, then the counts.

    :raises Failure: a run failed, or the counts are not what they must be.
    """
    check_data()
    env = open_databases(console, stack, DEFAULT_PORT)
    migrate_warehouse(console, env)
    from local.demo import run_demo  # imports nothing of Airflow before its environment is set

    run_demo(console, env)


def run_one(console: Console, stack: ExitStack, name: str, conf: str) -> None:
    """One run of a DAG in this process, and what its tasks say.

    :param conf: its params as JSON, or nothing.
    :raises Failure: they are no JSON object, there is no such DAG, or a task failed.
    """
    try:
        params = json.loads(conf or "{}")
    except ValueError as error:
        raise Failure(f"CONF is no JSON: {error}: {conf}") from None
    if not isinstance(params, dict):
        raise Failure(f'CONF is {conf}, and must be like {{"rows": 10}}')
    check_data()
    env = open_databases(console, stack, DEFAULT_PORT)
    migrate_warehouse(console, env)
    from local.demo import run_once  # imports nothing of Airflow before its environment is set

    run_once(console, env, name, params)


def up(console: Console, stack: ExitStack, port: int | None) -> None:
    """Airflow's three processes on the databases, until SIGINT or SIGTERM.

    :raises Failure: one of them could not be started, or ended by itself.
    """
    check_data()
    port = free_port(port)
    env = open_databases(console, stack, port)
    migrate_warehouse(console, env)
    grant_reader(env["WAREHOUSE_URL"])
    with console.step("airflow db migrate"):
        run([sys.executable, "-m", "airflow", "db", "migrate"], env)
    password = admin_password()
    children: dict[str, subprocess.Popen[bytes]] = {}
    guarded = stack.enter_context(start_guard(env))
    stack.callback(
        lambda: stop_processes([psutil.Process(child.pid) for child in children.values() if child.poll() is None])
    )
    with console.step("Airflow started"):
        for name, *arguments in (["api-server"], ["scheduler", "--skip-serve-logs"], ["dag-processor"]):
            children[name] = start_child([sys.executable, "-m", "airflow", name, *arguments], env, LOGS / f"{name}.log")
            guarded(children[name])
        wait_until_healthy(children, port)
    console.say()
    console.say(f"  UI        http://127.0.0.1:{port}   user {ADMIN}, password {password}")
    console.say(f"  psql      {psql_line(env)}")
    console.say(f"  Alembic   WAREHOUSE_URL={mask(env['WAREHOUSE_URL'])} .venv/bin/alembic current")
    console.say(f"  logs      {LOGS}")
    console.say()
    console.say("Ctrl-C stops it; nothing is lost.")
    while True:
        for name, child in children.items():
            if child.poll() is not None:
                raise Failure(f"airflow {name} ended by itself, exit code {child.returncode}: see {LOGS / name}.log")
        time.sleep(0.5)


def psql_line(env: dict[str, str]) -> str:
    psql = shutil.which("psql") or str(embedded_binaries() / "psql")
    return f"{shlex.quote(psql)} {mask(env['WAREHOUSE_URL'])}"


def mask(url: str) -> str:
    """The URL or connection string, for a shell, without its password: psql asks for it."""
    parts = conninfo_to_dict(url)
    secret = [name for name in ("password", "sslpassword") if parts.pop(name, None)]
    return shlex.quote(make_conninfo(**parts) if secret else url)  # type: ignore[arg-type]


def free_port(wanted: int | None) -> int:
    """The port asked for, or 8080, or any free one if 8080 is taken.

    :raises Failure: the port that was asked for is taken.
    """
    for port in (wanted,) if wanted else (DEFAULT_PORT, 0):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port or 0))
            return int(probe.getsockname()[1])
    raise Failure(f"port {wanted} is taken: choose another, as in make up PORT=8081")


def start_child(
    command: list[str], env: dict[str, str], log: Path, stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        # A session of its own: Ctrl-C goes to the whole terminal, and we stop them in order.
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | env,
            stdin=stdin,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def wait_until_healthy(children: dict[str, subprocess.Popen[bytes]], port: int) -> None:
    """Wait for the scheduler's and the DAG processor's first heartbeat, then warm the API up."""
    base = f"http://127.0.0.1:{port}"
    give_up = time.monotonic() + HEALTHY_SECONDS
    while True:
        for name, child in children.items():
            if child.poll() is not None:
                tail = (LOGS / f"{name}.log").read_text(errors="replace")[-1500:]
                raise Failure(f"airflow {name} ended, exit code {child.returncode}:\n{tail}")
        with suppress(OSError, ValueError):
            health = json.load(urllib.request.urlopen(f"{base}/api/v2/monitor/health", timeout=5))  # noqa: S310
            if all(health[part]["status"] == "healthy" for part in ("metadatabase", "scheduler", "dag_processor")):
                break
        if time.monotonic() > give_up:
            raise Failure(f"Airflow was not healthy after {HEALTHY_SECONDS:.0f} s: see {LOGS}")
        time.sleep(0.3)
    # The part of the API that tasks use is built at its first request: longer than a task waits for an answer.
    try:
        urllib.request.urlopen(f"{base}/execution/health", timeout=60).read()  # noqa: S310
    except OSError as error:
        print(f"the API that tasks use was not warmed up: {error}")  # to the log


def stop_processes(processes: list[psutil.Process]) -> None:
    """Stop Airflow's processes and what they started: asked twice, then not asked."""
    family = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            family += process.children(recursive=True)
    for _ in range(2):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, processes = psutil.wait_procs(processes, timeout=CHILD_STOP_SECONDS)
    left = [*processes, *psutil.wait_procs(family, timeout=0)[1]]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=CHILD_STOP_SECONDS)  # one that its parent has not asked for stays a zombie


@contextmanager
def start_guard(env: dict[str, str]) -> Iterator[Callable[[subprocess.Popen[bytes]], None]]:
    """Have a process beside us that stops others if we are killed: those for which the function is called."""
    with start_child([sys.executable, "-m", "local", "guard"], env, LOGS / "guard.log", subprocess.PIPE) as process:
        pipe = process.stdin
        assert pipe is not None

        def add(child: subprocess.Popen[bytes]) -> None:
            pipe.write(b"%d\n" % child.pid)
            pipe.flush()

        yield add


def guard() -> None:
    """Stop Airflow's processes, whose numbers are read from stdin, once that is closed: the process that started them
    has stopped them, or was killed.

    A signal at its end (PR_SET_PDEATHSIG) would not do: Airflow's processes log when they are told to stop, and one
    that was just logging then waits for itself forever.
    """
    processes = []
    for line in sys.stdin:
        with suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(int(line)))
    stop_processes(processes)


def down() -> None:
    """Stop the process that holds the state folder, and a PostgreSQL that a killed one left behind."""
    if not RUN.exists():
        print("nothing is running")
        return
    give_up = time.monotonic() + 120  # seconds; up itself needs less
    told = 0
    while True:
        try:
            with only_one("down"):
                server = Server(RUN / "postgres")
                left_over = server.adopt()
                server.stop()
                print("stopped" if told or left_over else "nothing is running")
                return
        except Failure:
            pid = int(str(holder().get("pid", 0)))
            if pid and pid != told and holder().get("command") != "down":
                print(f"stopping make {holder().get('command')} (pid {pid}) ...", flush=True)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                told = pid
            if time.monotonic() > give_up:
                raise Failure(f"pid {pid} did not stop") from None
            time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m local", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="three runs of the DAG, then the counts")
    one = commands.add_parser("run", help="one run of a DAG, and what its tasks say")
    one.add_argument("dag", help="its name, such as orders or verify_orders")
    one.add_argument("conf", nargs="?", default="", help="its params as JSON")
    commands.add_parser("up", help="the Airflow UI until Ctrl-C").add_argument(
        "--port",
        type=int,
        default=int(os.environ.get("PORT") or 0) or None,
        help="of the UI; default 8080, or a free one",
    )
    commands.add_parser("down", help="stop what runs")
    commands.add_parser("guard", help="of up: stop what it started if it is killed")
    arguments = parser.parse_args()
    if arguments.command == "guard":
        guard()
        return 0
    if arguments.command == "down":
        try:
            down()
        except (Failure, ServerError, OSError) as failure:
            print(failure, file=sys.stderr)
            return 1
        return 0

    def stop(number: int, frame: object) -> None:
        # Once is enough: a second Ctrl-C must not break off the shutdown.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    console: Console | None = None
    try:
        with only_one(arguments.command):
            signal.signal(signal.SIGINT, stop)
            signal.signal(signal.SIGTERM, stop)
            console = Console(LOGS / f"{arguments.command}.log")
            with ExitStack() as stack:
                if arguments.command == "demo":
                    demo(console, stack)
                elif arguments.command == "run":
                    run_one(console, stack, arguments.dag, arguments.conf)
                else:
                    up(console, stack, arguments.port)
        return 0
    except KeyboardInterrupt:
        if console is not None:
            console.say("stopped")
        return 0 if arguments.command == "up" else 130
    except Exception as error:
        out = console.out if console is not None else sys.stderr
        expected = isinstance(error, (Failure, ServerError, psycopg.Error))
        if not expected:
            traceback.print_exc()  # to the log
        print(f"\n{'' if expected else type(error).__name__ + ': '}{error}", file=out)
        if console is not None:
            print(f"\nThe full log: {console.log}", file=out)
        return 1


if __name__ == "__main__":
    sys.exit(main())
