"""A stack of compose.yaml, brought up for a test from a copy of the tree, and what a user does with it from outside."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.warehouse import ROOT, wait_until

TREE = ("alembic", "alembic.ini", "dags", "docs", "generator", "plugins", "sql", "local", "Dockerfile", ".dockerignore")
# Anything of these in the environment would be another stack than the one that a new user gets.
OURS = ("AIRFLOW", "AWS_", "COMPOSE_", "PG", "POSTGRES_IMAGE", "UI_PORT", "WAREHOUSE_", "PARALLELISM")
SECONDS_UP = 300
SECONDS_RUN = 240
ROWS = 1_500_000  # a COPY of some seconds: time to be killed in
# A worker that has a task, and the process of the task itself: Airflow names them so.
KILL_TASKS = """
pids=
for process in /proc/[0-9]*; do
    name=$(tr '\\0' ' ' <"$process/cmdline") || continue
    case "$name" in
    *"<idle>"*) ;;
    "airflow worker -- "*) pids="$pids ${process#/proc/}" ;;
    esac
done
kill -9 $pids && echo $pids
"""


class Refused(Exception):
    """A command ended with another exit status than 0; its words are the message."""


class Stack:
    """One project of Docker Compose.

    :param folder: where the copy of the tree is; .env is written there.
    :param overrides: files beside compose.yaml.
    """

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder = folder
        self.project = f"de_dw_test_{secrets.token_hex(4)}"
        self.files = ["compose.yaml", *overrides]
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.environment["UI_PORT"] = str(self.port)
        folder.chmod(0o755)
        for name in (*TREE, *(path.name for path in ROOT.glob("compose*.yaml")), "requirements-image.txt"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder / name)
        self.make_env()

    def make_env(self) -> None:
        """What `make .env` runs."""
        subprocess.run(["local/dotenv.sh"], cwd=self.folder, check=True, stdout=subprocess.DEVNULL)

    @property
    def secrets(self) -> dict[str, str]:
        lines = (self.folder / ".env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))

    def change_secrets(self, **new: str) -> None:
        text = "".join(f"{name}={value}\n" for name, value in (self.secrets | new).items())
        (self.folder / ".env").write_text(text)

    def run(self, *command: str, stdin: str = "", timeout: float = SECONDS_UP) -> str:
        """Standard output of a command in the folder.

        :raises Refused: it failed.
        """
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, input=stdin, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode != 0:
            raise Refused((done.stdout + done.stderr).strip())
        return done.stdout.strip()

    def gateway(self) -> str:
        """This machine's address in the network that has a way out."""
        form = "{{(index .IPAM.Config 0).Gateway}}"
        return self.run("docker", "network", "inspect", f"{self.project}_default", "-f", form)

    def compose(self, *arguments: str, stdin: str = "", timeout: float = SECONDS_UP) -> str:
        files = [part for name in self.files for part in ("-f", name)]
        return self.run("docker", "compose", "-p", self.project, *files, *arguments, stdin=stdin, timeout=timeout)

    def up(self, *arguments: str) -> None:
        """:raises Refused: not healthy; with the last lines of every service's log."""
        try:
            self.compose("up", "-d", "--quiet-pull", "--wait", *arguments, timeout=2 * SECONDS_UP)
        except Refused as refused:
            state = self.compose("ps", "-a")
            logs = self.compose("logs", "--tail", "25")
            raise Refused(f"{refused}\n{state}\n{logs}") from None

    def down(self) -> None:
        """With all data."""
        self.compose("down", "-v", "--remove-orphans", "--rmi", "local", "--timeout", "20")

    def containers(self) -> dict[str, dict[str, Any]]:
        """What Docker says of each container, by its service's name and number."""
        found = json.loads(self.run("docker", "inspect", *self.compose("ps", "-aq").split()))
        return {each["Name"].removeprefix(f"/{self.project}-"): each for each in found}

    def secrets_by_container(self) -> dict[str, set[str]]:
        """By name, which of the values in .env its environment and command have."""
        found = {}
        for name, container in self.containers().items():
            text = "\n".join([*container["Config"]["Env"], *(container["Config"]["Cmd"] or [])])
            found[name] = {secret for secret, value in self.secrets.items() if value in text}
        return found

    def inside(self, service: str, script: str) -> str:
        """Run a script of bash in a service's container."""
        return self.compose("exec", "-T", service, "bash", "-s", stdin=script)

    def sql(self, query: str, login: str = "postgres", database: str = "de_dw", password: str | None = None) -> str:
        """What psql prints, over TCP from within the database's container.

        :raises Refused: with PostgreSQL's words.
        """
        names = {"postgres": "POSTGRES_PASSWORD", "airflow": "AIRFLOW_DB_PASSWORD"}
        if password is None:
            password = self.secrets[names.get(login, f"{login.upper()}_PASSWORD")]
        target = f"host=127.0.0.1 user={login} dbname={database}"
        command = ["psql", "-X", "-w", "-Atq", "-v", "ON_ERROR_STOP=1", target]
        return self.compose("exec", "-T", "-e", f"PGPASSWORD={password}", "postgres", *command, stdin=query)

    def http(self, method: str, path: str, body: object = None, token: str = "") -> tuple[int, Any]:
        """Status and JSON (or text) of the answer of the published port."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode(errors="replace")
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def login(self, password: str | None = None, user: str = "admin") -> str:
        """A token for the API.

        :raises Refused: with the status.
        """
        credentials = {"username": user, "password": self.secrets["UI_PASSWORD"] if password is None else password}
        status, answer = self.http("POST", "/auth/token", credentials)
        if status != 201:
            raise Refused(f"{status} {answer}")
        return str(answer["access_token"])

    def api(self, method: str, path: str, body: object = None) -> Any:
        """:raises Refused: another status than 200."""
        status, answer = self.http(method, f"/api/v2/{path}", body, self.login())
        if status != 200:
            raise Refused(f"{method} {path}: {status} {answer}")
        return answer

    def eventually(self, condition: Callable[[], Any], problem: str) -> Any:
        return wait_until(condition, SECONDS_RUN, problem, pause=0.3)

    def trigger(self, **conf: object) -> str:
        """Ask for a run of the DAG, once Airflow has found it, and return its id."""

        def ask() -> str | None:
            try:
                run = self.api("POST", "dags/orders/dagRuns", {"logical_date": None, "conf": conf})
            except Refused as refused:
                if ": 404 " not in str(refused):
                    raise
                return None
            return str(run["dag_run_id"])

        return str(self.eventually(ask, "there is no DAG orders"))

    def wait_for(self, *runs: str) -> None:
        """Until all have succeeded.

        :raises AssertionError: one failed, or takes too long.
        """

        def have_succeeded() -> bool:
            found = self.api("GET", "dags/orders/dagRuns?limit=100&order_by=-run_after")["dag_runs"]
            states = [run["state"] for run in found if run["dag_run_id"] in runs]
            assert "failed" not in states, states
            return states == ["success"] * len(runs)

        self.eventually(have_succeeded, "the runs have not ended")

    def tasks(self, run: str) -> dict[str, dict[str, Any]]:
        path = f"dags/orders/dagRuns/{urllib.parse.quote(run, safe='')}/taskInstances"
        return {task["task_id"]: task for task in self.api("GET", path)["task_instances"]}

    def wait_for_copy(self) -> None:
        """Until a load is in its COPY, with rows already in the table's file."""
        progress = "SELECT tuples_processed FROM pg_stat_progress_copy WHERE relid = 'raw.orders'::regclass"
        self.eventually(lambda: int(self.sql(progress) or 0) > 0, "no COPY has begun")

    def rows_by_load(self) -> dict[str, tuple[int, int]]:
        """By batch: rows as the ledger says, and as they are in raw."""
        found = self.sql(
            "SELECT l.batch_id, l.rows, count(o.load_id) FROM raw.loads AS l"
            " FULL JOIN raw.orders AS o ON l.load_id = o.load_id GROUP BY 1, 2 ORDER BY 1"
        )
        parts = [line.split("|") for line in found.splitlines()]
        return {batch: (int(told or -1), int(rows)) for batch, told, rows in parts}

    def assert_nothing_lost_nothing_doubled(self, run: str, rows: int) -> None:
        """Each load has the rows of its ledger row, this one those it was asked for, and stg is what raw says."""
        loads = self.rows_by_load()
        assert {batch: told for batch, (told, found) in loads.items() if told != found} == {}
        assert loads[run] == (rows, rows)
        wrong = self.sql(
            "SELECT count(*) FROM stg.orders_latest AS l FULL JOIN"
            " (SELECT DISTINCT ON (order_id) order_id, row_id, true AS is_latest FROM raw.orders"
            " ORDER BY order_id, updated_at DESC, row_id DESC) AS expected USING (order_id, row_id)"
            " WHERE l.updated_at IS NULL OR expected.is_latest IS NULL"
        )
        assert wrong == "0"


def refused(command: Callable[[], object]) -> str:
    """The words with which a command is refused."""
    with pytest.raises(Refused) as error:
        command()
    return str(error.value)


def try_to_become_more(stack: Stack, service: str, tried: Callable[[str, str], None]) -> None:
    """From within a container, whose processes may do no more than they need."""
    status = stack.inside(service, "id -u; grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/1/status")
    user, *facts = status.split("\n")
    assert user != "0"
    assert [fact.split()[1] for fact in facts] == ["0" * 16, "0" * 16, "1"]
    tried(f"docker compose exec {service} id -u; grep CapBnd /proc/1/status", f"{user}, {facts[1]}")
    for target in ("/usr/mine", "/etc/mine"):
        said = refused(lambda: stack.inside(service, f"touch {target}"))  # noqa: B023
        assert "Read-only file system" in said
        tried(f"docker compose exec {service} touch {target}", said)


def look_for_secrets(stack: Stack, tried: Callable[[str, str], None]) -> None:
    """In images, logs and the processes of all services."""
    services = stack.compose("ps", "--services").split()
    places = {
        "docker compose logs": stack.compose("logs", "--no-color"),
        "the volume of Airflow's logs": stack.inside("scheduler", "grep -rh . /opt/airflow/logs"),
        "docker history": stack.run("docker", "history", "--no-trunc", f"{stack.project}-airflow"),
        "process lists": "".join(
            stack.inside(service, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '") for service in services
        ),
    }
    for place, text in places.items():
        assert len(text) > 100, place
        assert [name for name, value in stack.secrets.items() if value in text] == [], place
        tried(f"grep each secret in {place}", f"not in {len(text):,} characters")


@contextmanager
def running(stack: Stack) -> Iterator[Stack]:
    """The stack, and nothing of it left behind."""
    try:
        yield stack
    finally:
        stack.down()
