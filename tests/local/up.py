"""make up and its like, as a user has them: in a copy of this working tree, with nothing else of ours around them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.warehouse import ROOT, wait_until

INTERFERES = re.compile("WAREHOUSE_|AIRFLOW|VIRTUAL_ENV|PYTHON|LOCAL_STATE|MAKE|PORT$")


def copy_working_tree(target: Path) -> Path:
    """What is in this working tree, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.split("\0")[:-1]:
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def lend_environment(clone: Path) -> None:
    """Let a copy use the packages that these tests run with, so that make installs none."""
    (clone / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.suffix != ".ok":
            (clone / ".venv" / path.name).symlink_to(path)
    (clone / ".venv" / "local.ok").touch()  # newer than the requirements: for make they are installed


def environment(**more: str) -> dict[str, str]:
    """A user's environment, with nothing of ours in it, and the C locale."""
    return {name: value for name, value in os.environ.items() if not INTERFERES.match(name)} | {"LC_ALL": "C"} | more


def make(clone: Path, target: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", target], cwd=clone, env=environment(**env), capture_output=True, text=True)


def processes(clone: Path) -> list[str]:
    """What runs from the clone. Airflow's workers change their command lines, but not their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if str(clone) in command or process.environ().get("AIRFLOW_HOME", "").startswith(str(clone)):
                found.append(command)
    return found


class Up:
    """make up in a clone, and its API."""

    def __init__(self, clone: Path, port: int) -> None:
        self.clone = clone
        self.base = f"http://127.0.0.1:{port}"
        self.output = clone.parent / "up.txt"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                ["make", "up"],
                cwd=clone,
                # A scheduler that idles like the default does: on two cores the tests beside it want them too.
                env=environment(PORT=str(port), AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME="1"),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._wait_for_start()
        (self.password,) = re.findall(r"password (\S+)", self.output.read_text())
        # an absolute path in it has the copy's space, percent-encoded
        (self.warehouse,) = re.findall(r"WAREHOUSE_URL='?([^\s']+)", self.output.read_text())
        self.token = ""
        self.token = self.call("POST", "/auth/token", {"username": "admin", "password": self.password})["access_token"]

    def _wait_for_start(self) -> None:
        try:
            wait_until(lambda: "Ctrl-C stops it" in self.output.read_text() or self.process.poll() is not None, 240)
        except BaseException:
            self.stop(signal.SIGTERM)
            raise
        assert self.process.poll() is None, self.output.read_text()

    def call(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(  # noqa: S310
            self.base + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {self.token}"} if self.token else {}),
        )
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return json.load(answer)

    def finish(self, run_id: str, dag: str = "orders") -> str:
        path = f"/api/v2/dags/{dag}/dagRuns/{run_id}"
        wait_until(lambda: self.call("GET", path)["state"] in ("success", "failed"), 120)
        return str(self.call("GET", path)["state"])

    def stop(self, number: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)
        self.process.wait(timeout=90)


def a_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
