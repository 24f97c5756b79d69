"""The DAG `orders`: its structure, and real runs of it on a real warehouse."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from local.postgres import Server
from local.settings import airflow_connection, environment, metadata_url
from tests.conftest import FAST, ROOT, Warehouse

RUN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture(scope="session")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Airflow with a metadata database of its own, in this process."""
    home = tmp_path_factory.mktemp("airflow")
    with pytest.MonkeyPatch.context() as patch, Server(home / "postgres", settings=FAST) as server:
        with psycopg.connect(server.url("postgres"), autocommit=True) as conn:
            conn.execute("CREATE DATABASE airflow")
        with pytest.MonkeyPatch.context() as state:
            state.setattr("local.settings.RUN", home)
            variables = environment("postgresql://", metadata_url(server.socket_dir), 8080)
        for name, value in variables.items():
            if name != "WAREHOUSE_URL":
                patch.setenv(name, value)
        patch.setenv("WAREHOUSE_DATA", str(home / "data"))
        from airflow.settings import dispose_orm
        from airflow.utils.db import initdb

        initdb()
        yield
        dispose_orm()


@pytest.fixture
def parsed(airflow: None) -> Any:
    """The DAG, read from its file for each test: a run in this process changes the defaults of its params."""
    from airflow.dag_processing.dagbag import BundleDagBag

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bag = BundleDagBag(ROOT / "dags", bundle_path=ROOT / "dags", bundle_name="dags-folder")
    assert bag.import_errors == {}
    assert [warning for warning in caught if Path(warning.filename).parent == ROOT / "dags"] == []
    assert list(bag.dags) == ["orders"]
    return bag.dags["orders"]


@pytest.fixture
def dag(parsed: Any, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("AIRFLOW_CONN_DE_DW", airflow_connection(warehouse.url))
    return parsed


def states(run: Any) -> dict[str, tuple[str, int]]:
    """State and number of tries of each task."""
    return {task.task_id: (task.state, task.try_number) for task in run.get_task_instances()}


def counts(warehouse: Warehouse) -> tuple[Any, ...]:
    ((*figures,),) = warehouse.rows("""
        SELECT
            (SELECT count(*) FROM raw.orders),
            (SELECT count(DISTINCT updated_at) FROM raw.orders),
            (SELECT count(DISTINCT order_id) FROM raw.orders),
            (SELECT count(*) FROM stg.orders_latest),
            (SELECT count(*) FROM stg.orders_latest WHERE updated_at = (SELECT max(updated_at) FROM raw.orders))
    """)
    return tuple(figures)


def test_flow_is_generate_load_refresh(parsed: Any) -> None:
    assert {task.task_id: sorted(task.downstream_task_ids) for task in parsed.tasks} == {
        "generate_batch": ["load_raw"],
        "load_raw": ["refresh_latest"],
        "refresh_latest": [],
    }
    assert {task.task_id: [asset.name for asset in task.outlets] for task in parsed.tasks} == {
        "generate_batch": [],
        "load_raw": ["raw.orders"],
        "refresh_latest": ["stg.orders_latest"],
    }
    assert parsed.max_active_runs == 1
    assert not parsed.catchup
    assert all(task.retries == 3 and task.retry_exponential_backoff for task in parsed.tasks)
    assert "If it fails" in parsed.doc_md


@pytest.mark.parametrize(
    ("name", "value", "fits"),
    [
        ("rows", 1, True),
        ("rows", 50_000_000, True),
        ("rows", 0, False),
        ("rows", 50_000_001, False),
        ("rows", "many", False),
        ("rows", None, False),
        ("seed", 0, True),
        ("seed", -1, False),
        ("max_rejects", "0", True),
        ("max_rejects", 5, True),
        ("max_rejects", "1%", True),
        ("max_rejects", "0.5 %", True),
        ("max_rejects", -1, False),
        ("max_rejects", "-1", False),
        ("max_rejects", "101%", False),
        ("max_rejects", "some", False),
        ("load_again", True, True),
        ("load_again", "yes", False),
    ],
)
def test_params_have_limits(parsed: Any, name: str, value: object, fits: bool) -> None:
    from airflow.sdk.exceptions import ParamValidationError

    param = parsed.params.get_param(name)

    if fits:
        assert param.resolve(value) == value
    else:
        with pytest.raises(ParamValidationError):
            param.resolve(value)
    assert param.description


def test_three_runs_give_300_rows_and_the_latest_100(dag: Any, warehouse: Warehouse) -> None:
    for hour in range(3):
        run = dag.test(logical_date=RUN + timedelta(hours=hour), run_after=RUN + timedelta(hours=hour))
        assert run.state == "success"

    assert counts(warehouse) == (300, 3, 100, 100, 100)
    assert warehouse.rows("SELECT rows, batch_updated_at FROM raw.loads ORDER BY load_id") == [
        (100, RUN + timedelta(hours=hour)) for hour in range(3)
    ]


def test_run_that_is_repeated_makes_the_same_bytes_and_loads_nothing_new(dag: Any, warehouse: Warehouse) -> None:
    for _ in range(2):
        run = dag.test(logical_date=RUN, run_after=RUN, run_conf={"rows": 10})
        assert run.state == "success"

    assert counts(warehouse) == (10, 1, 10, 10, 10)
    assert len(warehouse.rows("SELECT * FROM raw.loads")) == 1


def test_older_batch_that_comes_late_does_not_replace_newer_rows(dag: Any, warehouse: Warehouse) -> None:
    for day in (2, 1):
        moment = RUN + timedelta(days=day)
        assert dag.test(logical_date=moment, run_after=moment, run_conf={"rows": 10}).state == "success"

    assert counts(warehouse) == (20, 2, 10, 10, 10)


def test_assets_carry_the_row_counts(dag: Any, warehouse: Warehouse) -> None:
    from airflow.models.asset import AssetEvent
    from airflow.utils.session import create_session
    from sqlalchemy import select

    run = dag.test(logical_date=RUN, run_after=RUN, run_conf={"rows": 7})

    with create_session() as session:
        events = session.scalars(
            select(AssetEvent).where(AssetEvent.source_run_id == run.run_id).order_by(AssetEvent.id)
        ).all()
        extras = {event.asset.name: event.extra["rows"] for event in events[-2:]}
    assert extras == {"raw.orders": 7, "stg.orders_latest": 7}
    (refresh,) = [task for task in run.get_task_instances() if task.task_id == "refresh_latest"]
    assert refresh.xcom_pull(task_ids="refresh_latest") == 7


def test_bad_batch_fails_at_once_and_changes_nothing(dag: Any, warehouse: Warehouse) -> None:
    assert dag.test(logical_date=RUN, run_after=RUN, run_conf={"rows": 5}).state == "success"
    alter(warehouse, "ALTER TABLE raw.orders ADD CONSTRAINT order_id_is_small CHECK (order_id < 6)")
    later = RUN + timedelta(days=1)

    run = dag.test(logical_date=later, run_after=later, run_conf={"rows": 10, "max_rejects": "4"})

    assert run.state == "failed"
    assert states(run)["load_raw"] == ("failed", 1), "a file that is bad stays bad: no retry"
    assert states(run)["refresh_latest"][0] == "upstream_failed"
    assert counts(warehouse) == (5, 1, 5, 5, 5)


def test_bad_records_within_the_limit_are_kept_and_counted(dag: Any, warehouse: Warehouse) -> None:
    alter(warehouse, "ALTER TABLE raw.orders ADD CONSTRAINT order_id_is_small CHECK (order_id < 6)")

    run = dag.test(logical_date=RUN, run_after=RUN, run_conf={"rows": 10, "max_rejects": "50%"})

    assert run.state == "success"
    assert counts(warehouse) == (5, 1, 5, 5, 5)
    rejects = "SELECT line_number, column_name, reason FROM raw.orders_rejects ORDER BY line_number"
    assert warehouse.rows(rejects) == [
        (line, "order_id", 'violates check constraint "order_id_is_small"') for line in range(7, 12)
    ]
    (load,) = [task for task in run.get_task_instances() if task.task_id == "load_raw"]
    assert load.xcom_pull(task_ids="load_raw")["rejects"] == 5


def test_file_is_loaded_again_only_when_told_to(
    dag: Any, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GENERATE, write_file(FILE))
    for day, load_again in enumerate((False, False, True)):
        moment = RUN + timedelta(days=day)
        assert dag.test(logical_date=moment, run_after=moment, run_conf={"load_again": load_again}).state == "success"

    assert warehouse.rows("SELECT rows, repeat_of IS NOT NULL FROM raw.loads ORDER BY load_id") == [
        (1, False),
        (1, True),
    ]
    assert counts(warehouse)[0] == 2


FILE = """\
order_id,customer_name,customer_email,product,quantity,unit_price,currency,status,ordered_at,updated_at
1,Ann,a@example.com,Desk,1,9.99,EUR,paid,2025-12-31,2026-01-01
"""


def write_file(content: str) -> Any:
    """What stands in for the generator: a file as somebody might deliver it."""

    def write(path: Path, **_: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    return write


def raise_(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def alter(warehouse: Warehouse, statement: str) -> None:
    with warehouse.connect("") as conn:
        conn.execute(statement.encode())


GENERATE = "generator.orders.generate_orders"
# What goes wrong: an SQL statement or another generator; and the task that has to be red.
FAILURES: dict[str, tuple[str | Any, str]] = {
    "generator fails": (raise_(OSError(28, "No space left on device")), "generate_batch"),
    "no file": (lambda path, **_: path.unlink(missing_ok=True), "load_raw"),
    "empty file": (write_file(""), "load_raw"),
    "half a file": (write_file(FILE[:-10]), "load_raw"),
    "no CSV": (write_file("<html>502</html>\n"), "load_raw"),
    "unknown column": (write_file(FILE.replace("status", "state")), "load_raw"),
    "bad record": (write_file(FILE.replace("1,Ann", "x,Ann")), "load_raw"),
    "other bytes": (write_file(FILE.replace("Ann", "Bob")), "load_raw"),
    "no right": ("REVOKE INSERT ON raw.orders FROM de_dw_pipeline", "load_raw"),
    "no table": ("ALTER TABLE raw.orders RENAME TO moved", "load_raw"),
    "no ledger": ("ALTER TABLE raw.loads RENAME TO moved", "load_raw"),
    "no swap": ("DROP FUNCTION stg.swap(text)", "refresh_latest"),
    "rule of stg": (
        "ALTER TABLE stg.orders_latest_spare ADD CONSTRAINT none CHECK (order_id IS NULL)",
        "refresh_latest",
    ),
    "no version": ("DELETE FROM stg.table_versions", "refresh_latest"),
    "foreign key in the way": (
        "CREATE TABLE public.notes (order_id bigint REFERENCES stg.orders_latest); INSERT INTO public.notes VALUES (1)",
        "refresh_latest",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failure_makes_its_task_red_and_stops_what_comes_after(
    dag: Any, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    failure, red = FAILURES[name]
    first = RUN if name == "other bytes" else RUN - timedelta(days=1)
    monkeypatch.setattr(GENERATE, write_file(FILE.replace("paid", "shipped")))
    assert dag.test(logical_date=first, run_after=first).state == "success"
    for task in dag.tasks:
        monkeypatch.setattr(task, "retries", 0)
    monkeypatch.setattr(GENERATE, write_file(FILE))
    if isinstance(failure, str):
        alter(warehouse, failure)
    else:
        monkeypatch.setattr(GENERATE, failure)

    run = dag.test(logical_date=RUN, run_after=RUN)

    assert run.state == "failed"
    flow = ["generate_batch", "load_raw", "refresh_latest"]
    place = flow.index(red)
    expected = ["success"] * place + ["failed"] + ["upstream_failed"] * (2 - place)
    assert [states(run)[task][0] for task in flow] == expected
    assert warehouse.rows("SELECT order_id, status FROM stg.orders_latest", "") == [(1, "shipped")]


def test_database_that_is_away_makes_the_load_red_and_stops_the_refresh(
    dag: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_DE_DW", airflow_connection("postgresql://nobody@/nothing?host=/nonexistent"))
    for task in dag.tasks:
        monkeypatch.setattr(task, "retries", 0)

    run = dag.test(logical_date=RUN, run_after=RUN)

    assert run.state == "failed"
    assert [states(run)[task][0] for task in ("load_raw", "refresh_latest")] == ["failed", "upstream_failed"]


def test_importing_the_dag_opens_no_connection_and_no_file_of_ours(tmp_path: Path) -> None:
    blocked = (
        "import socket, psycopg, psycopg2\n"
        "def refuse(*_, **__): raise AssertionError('no connection at import')\n"
        "socket.socket.connect = psycopg.connect = psycopg.Connection.connect = psycopg2.connect = refuse\n"
        "import orders\n"
    )

    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", blocked],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": str(ROOT / "dags"), "AIRFLOW_HOME": str(tmp_path), "WAREHOUSE_DATA": str(tmp_path / "data")},
        check=True,
    )

    assert not (tmp_path / "data").exists()
