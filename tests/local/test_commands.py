"""make demo, make up and make down as a new user has them: in a clone, in a path with a space."""

import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.local.up import Up, a_free_port, copy_working_tree, environment, make, processes
from tests.s3 import S3
from tests.warehouse import ROOT, DatabaseServer, servers, wait_until

TABLE = """\
  raw.orders         rows                            300
                     distinct updated_at               3
                     distinct order_id               100
  stg.orders_latest  rows                            100
                     distinct order_id               100
                     rows from the latest batch      100
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_working_tree(tmp_path_factory.mktemp("clone") / "a warehouse")


def test_help_is_the_default(clone: Path) -> None:
    done = subprocess.run(["make"], cwd=clone, env=environment(), capture_output=True, text=True, check=True)

    assert "make demo" in done.stdout


def test_demo_prints_the_counts_each_time(clone: Path) -> None:
    first, second = make(clone, "demo"), make(clone, "demo")

    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.endswith("\n" + TABLE), first.stdout
    assert second.returncode == 0, second.stdout + second.stderr
    assert TABLE in second.stdout
    assert "600 rows in all" in second.stdout
    assert processes(clone) == []
    ignored = subprocess.run(["ls", "-A"], cwd=clone, capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in ignored if not (ROOT / name).exists()} <= {".run", ".venv", "data"}


def test_demo_that_fails_says_why_and_exits_with_an_error(clone: Path) -> None:
    broken = clone / "sql" / "checks" / "broken.fail.sql"
    broken.write_text("SELECT updated_up FROM raw.orders\n")

    done = make(clone, "demo")

    broken.unlink()
    assert done.returncode != 0
    assert 'column "updated_up" does not exist' in done.stdout
    assert "The full log: " in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert processes(clone) == []


@pytest.mark.parametrize("server", servers()[:1], indirect=True)
def test_demo_runs_on_another_server(clone: Path, server: DatabaseServer) -> None:
    url = server.make()

    done = make(clone, "demo", WAREHOUSE_URL=url)

    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("\n" + TABLE)
    with psycopg.connect(url) as conn:
        assert conn.execute("SELECT count(*) FROM raw.orders").fetchall() == [(300,)]
    server.drop(url)


@pytest.mark.parametrize("server", ["embedded"], indirect=True)
def test_demo_with_a_wrong_url_says_so(clone: Path, server: DatabaseServer) -> None:
    done = make(clone, "demo", WAREHOUSE_URL="postgresql://nobody:s3cret@127.0.0.1:1/de_dw")

    assert done.returncode != 0
    assert "connection" in done.stdout
    assert "127.0.0.1" in done.stdout
    assert "s3cret" not in done.stdout + done.stderr
    assert "s3cret" not in (clone / ".run" / "logs" / "demo.log").read_text()


def test_demo_with_its_files_on_s3(s3: S3, tmp_path: Path) -> None:
    more = s3.environment | {"LOCAL_STATE": str(tmp_path), "WAREHOUSE_DATA": f"s3://aws_default@{s3.bucket}/demo"}

    done = subprocess.run(
        [sys.executable, "-m", "local", "demo"], cwd=ROOT, env=environment(**more), capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("\n" + TABLE)
    assert len(s3.keys("demo/raw/orders-manual__")) == 3
    assert "not-a-secret" not in done.stdout + (tmp_path / "logs" / "demo.log").read_text()


def test_run_says_what_its_tasks_did(clone: Path) -> None:
    done = make(clone, "run", DAG="customers", CONF='{"rows": 1000}')

    assert done.returncode == 0, done.stdout + done.stderr
    assert "    report_files: raw.customers: 1 file: 1 loaded (1,000 rows)\n" in done.stdout
    refused = make(clone, "run", DAG="customers", CONF="{rows}")
    assert refused.returncode != 0
    assert "CONF is no JSON" in refused.stdout
    refused = make(clone, "run", DAG="customers", CONF='{"row": 1000}')
    assert refused.returncode != 0
    assert "customers has no params row, but rows, seed, source" in refused.stdout
    refused = make(clone, "run", DAG="nothing")
    assert refused.returncode != 0
    assert "there is no DAG nothing, but customers, orders, verify_customers, verify_orders" in refused.stdout


def test_run_says_which_file_was_refused_and_why(clone: Path) -> None:
    bad = clone / "data" / "landing" / "bad.csv"
    bad.parent.mkdir(parents=True)
    bad.write_text("customer_id,name,email,country\n")

    done = make(clone, "run", DAG="customers", CONF='{"source": "landing/bad.csv"}')

    bad.unlink()
    assert done.returncode != 0
    assert "    load_raw: refused: landing/bad.csv, line 1: the header does not fit raw.customers" in done.stdout
    assert "missing: 'updated_at'" in done.stdout
    done = make(clone, "run", DAG="customers", CONF='{"source": "landing/nothing"}')
    assert done.returncode != 0
    assert "source 'landing/nothing': No such file or directory below" in done.stdout


@pytest.mark.parametrize("target", ["demo", "up"])
def test_files_on_s3_without_its_packages_say_what_to_install(clone: Path, target: str) -> None:
    done = make(clone, target, WAREHOUSE_DATA="s3://aws_default@warehouse")

    assert done.returncode != 0
    assert (
        "apache-airflow-providers-amazon and s3fs must be installed: local/venv.sh requirements-image.txt"
        in done.stdout
    )
    assert "PostgreSQL" not in done.stdout


@pytest.fixture
def up(clone: Path) -> Iterator[Up]:
    running = Up(clone, a_free_port())
    yield running
    running.stop(signal.SIGTERM)


def test_up_serves_the_ui_runs_what_is_triggered_and_stops_whole(clone: Path, up: Up) -> None:
    token, up.token = up.token, ""
    with pytest.raises(urllib.error.HTTPError, match="401"):
        up.call("GET", "/api/v2/dags")
    up.token = token
    listening = subprocess.run(["ss", "-Hltn"], capture_output=True, text=True, check=True).stdout
    port = up.base.rpartition(":")[2]
    assert [line.split()[3] for line in listening.splitlines() if f":{port} " in line] == [f"127.0.0.1:{port}"]

    conf = {"rows": 50, "refresh": "merge"}
    up.call("POST", "/api/v2/dags/orders/dagRuns", {"logical_date": None, "dag_run_id": "one", "conf": conf})
    assert up.finish("one") == "success"
    tasks = up.call("GET", "/api/v2/dags/orders/dagRuns/one/taskInstances")["task_instances"]
    assert {task["task_id"]: (task["state"], task["try_number"]) for task in tasks} == {
        "generate_batch": ("success", 1),
        "find_files": ("success", 1),
        "load_raw": ("success", 1),
        "report_files": ("success", 1),
        "check_batch": ("success", 1),
        "choose_refresh": ("success", 1),
        "swap_latest": ("skipped", 0),
        "union_latest": ("skipped", 0),
        "merge_latest": ("success", 1),
    }

    # a run that is cleared makes the same bytes, and they are not loaded again
    up.call(
        "POST", "/api/v2/dags/orders/clearTaskInstances", {"dag_run_id": "one", "dry_run": False, "only_failed": False}
    )
    wait_until(lambda: up.call("GET", "/api/v2/dags/orders/dagRuns/one")["state"] in ("queued", "running"), 30)
    assert up.finish("one") == "success"
    returned = "/api/v2/dags/orders/dagRuns/one/taskInstances/load_raw/xcomEntries/return_value?map_index=0"
    loaded = up.call("GET", returned)["value"]
    assert "'is_new': False" in str(loaded) or '"is_new": false' in str(loaded)

    refused = make(clone, "demo")
    assert refused.returncode != 0
    assert "make up is running here" in refused.stdout + refused.stderr

    down = make(clone, "down")
    assert down.returncode == 0, down.stderr
    assert up.process.wait(timeout=30) == 0
    assert processes(clone) == []
    left = {path.name for path in (clone / ".run").rglob("*") if path.suffix in (".pid", ".lock") or path.is_socket()}
    assert left == set()


def test_up_that_is_killed_leaves_no_process(clone: Path, up: Up) -> None:
    up.stop(signal.SIGKILL)

    wait_until(lambda: processes(clone) == [], 60)
    assert not (clone / ".run" / "postgres" / "data" / "postmaster.pid").exists()


def test_process_that_does_not_listen_is_stopped_when_what_started_it_is_gone(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()

        subprocess.run([sys.executable, "-m", "local", "guard"], cwd=ROOT, input=b"%d\n" % process.pid, check=True)

        assert process.wait(10) == -signal.SIGKILL
