"""local/postgres.py: a server of our own that leaves nothing behind and opens nothing to others."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from local.postgres import Server, ServerError
from local.settings import airflow_connection
from tests.warehouse import FAST, ROOT, wait_until


def answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("name", ["plain", "a path with spaces, and commas", "ünï'cødé", "long" * 30])
def test_server_works_in_any_folder_and_stops_whole(tmp_path: Path, name: str) -> None:
    home = tmp_path / name / "pg"

    with Server(home, settings=FAST) as server:
        with psycopg.connect(server.url("postgres")) as conn:
            assert conn.execute("SELECT 1").fetchall() == [(1,)]
        pid = int((server.data / "postmaster.pid").read_text().split()[0])
        socket_dir = server.socket_dir

    assert not is_alive(pid)
    assert not (server.data / "postmaster.pid").exists()
    assert not socket_dir.exists() or list(socket_dir.iterdir()) == []


def test_data_survive_a_restart(tmp_path: Path) -> None:
    for statement in ("CREATE TABLE kept AS SELECT 7 AS it", "SELECT 1"):
        with Server(tmp_path / "pg", settings=FAST) as server, psycopg.connect(server.url("postgres")) as conn:
            conn.execute(statement.encode())
    with Server(tmp_path / "pg", settings=FAST) as server, psycopg.connect(server.url("postgres")) as conn:
        assert conn.execute("SELECT it FROM kept").fetchall() == [(7,)]


def test_only_a_private_directory_leads_to_the_server(tmp_path: Path) -> None:
    with Server(tmp_path / "pg", settings=FAST) as server, psycopg.connect(server.url("postgres")) as conn:
        assert stat.S_IMODE(server.socket_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE(server.data.stat().st_mode) == 0o700
        assert conn.execute("SHOW listen_addresses").fetchall() == [("",)]


def test_no_permission_outside_our_folder_changes(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    parents = [private, *private.parents, Path(sys.prefix), *Path(sys.prefix).parents]
    before = {path: path.stat().st_mode for path in parents}

    with Server(private / "pg", settings=FAST) as server:
        assert answers(server.url("postgres"))

    assert {path: path.stat().st_mode for path in parents} == before


def test_server_ends_with_its_owner(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from local.postgres import Server\n"
        "server = Server(Path(sys.argv[1])); server.start(); print(server.url('postgres'), flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "pg")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    with owner.stdout as stdout:
        url = stdout.readline().strip()
    assert answers(url)

    owner.send_signal(signal.SIGKILL)
    owner.wait()

    wait_until(lambda: not (tmp_path / "pg" / "data" / "postmaster.pid").exists())
    with Server(tmp_path / "pg") as server:  # and the folder is as good as before
        assert answers(server.url("postgres"))


def test_server_that_is_left_behind_is_taken_over(tmp_path: Path) -> None:
    first = Server(tmp_path / "pg", settings=FAST)
    first.start()
    second = Server(tmp_path / "pg", settings=FAST)

    second.start()

    assert answers(second.url("postgres"))
    second.stop()
    assert not answers(first.url("postgres"))
    first.stop()


def test_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="no_such_setting"):
        Server(tmp_path / "pg", settings={"no_such_setting": "1"}).start()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "postgresql://owner:s%40cret@db.example:5433/de_dw?sslmode=require",
            {"host": "db.example", "login": "owner", "password": "s@cret", "schema": "de_dw", "port": 5433},
        ),
        (
            "host=/a/b user=u dbname=d options='-c work_mem=1GB'",
            {"host": "/a/b", "login": "u", "schema": "d"},
        ),
    ],
)
def test_airflow_connects_to_the_same_place_as_the_pipeline_role(url: str, expected: dict[str, object]) -> None:
    connection = json.loads(airflow_connection(url))

    extra = {"application_name": "airflow tasks", "options": "-c role=de_dw_pipeline"}
    assert connection == {"conn_type": "postgres"} | expected | {"extra": extra | connection["extra"]}
    assert connection["extra"]["options"].endswith("-c role=de_dw_pipeline")
