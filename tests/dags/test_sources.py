"""Runs of a DAG on files that are delivered: which are loaded, which refused, what is said; backfills and schedules."""

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from batch_load import load_batch
from psycopg import OperationalError

from generator.customers import write_customers
from tests.dags.newest import server
from tests.dags.test_orders import RUN, dags, parsed, refresh_states, states, summaries
from tests.s3 import S3
from tests.warehouse import PIPELINE, Warehouse

__all__ = ["dags", "parsed", "server"]  # fixtures

HEADER = "customer_id,name,email,country,updated_at\n"
ONLY: dict[str, Any] = {"source": "landing/*.csv"}


@pytest.fixture
def landing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder to deliver to, before the DAG's file is read."""
    monkeypatch.setenv("WAREHOUSE_DATA", str(tmp_path))
    (tmp_path / "landing").mkdir()
    return tmp_path / "landing"


@pytest.fixture
def customers(landing: Path, dags: Any, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch) -> Any:
    from local.settings import airflow_connection

    monkeypatch.setenv("AIRFLOW_CONN_DE_DW", airflow_connection(warehouse.url))
    for task in dags["customers"].tasks:
        monkeypatch.setattr(task, "retries", 0)
    return dags["customers"]


def deliver(landing: Path, number: int, updated_at: str = "2026-01-01", rows: int = 3) -> None:
    """A file of customers of its own, number * 100 and on, and of customer 1."""
    lines = [f"{number * 100 + n},Name {number},,DE,{updated_at}\n" for n in range(rows - 1)]
    (landing / f"{number}.csv").write_text(HEADER + f"1,From {number},,DE,{updated_at}\n" + "".join(lines))


def mapped(run: Any) -> dict[int, str]:
    """State of each instance of load_raw."""
    return {task.map_index: task.state for task in run.get_task_instances() if task.task_id == "load_raw"}


def published(warehouse: Warehouse) -> tuple[Any, ...]:
    ((rows, name),) = warehouse.rows(
        "SELECT count(*), max(name) FILTER (WHERE customer_id = 1) FROM stg.customers_latest"
    )
    return rows, name


@contextmanager
def cleared(run: Any) -> Iterator[None]:
    """Have the next dag.test go on with a run, all of whose tasks were cleared, as the UI does it."""
    from airflow.models.dagrun import DagRun
    from airflow.models.taskinstance import TaskInstance, clear_task_instances
    from airflow.serialization.definitions.dag import SerializedDAG
    from airflow.utils.state import DagRunState
    from sqlalchemy import select

    def cleared_run(*, session: Any, dag: Any, **_: Any) -> Any:
        tasks = [*session.scalars(select(TaskInstance).where(TaskInstance.run_id == run.run_id))]
        clear_task_instances(tasks, session)
        for task in tasks:
            task.max_tries = task.try_number
        again = session.scalar(select(DagRun).where(DagRun.run_id == run.run_id))
        again.dag, again.state = dag, DagRunState.RUNNING
        session.commit()
        return again

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("airflow.models.dagrun.get_or_create_dagrun", cleared_run)
        patch.setattr(SerializedDAG, "clear_dags", lambda *_, **__: 0)
        yield


def run_of(dag: Any, hours: int = 0, **conf: Any) -> Any:
    moment = RUN + timedelta(hours=hours)
    return dag.test(logical_date=moment, run_after=moment, run_conf=conf)


def test_of_twenty_files_three_known_one_broken_and_one_half_written_the_good_ones_are_loaded_and_published(
    customers: Any,
    warehouse: Warehouse,
    landing: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The order is for the next test: dag.test would ask each file at each turn.
    monkeypatch.setattr("batch_dag.wait_for_turn", lambda ti: None)
    for number in range(1, 4):
        deliver(landing, number)
    assert run_of(customers, **ONLY).state == "success"
    for number in range(4, 21):
        deliver(landing, number)
    (landing / "7.csv").write_text(HEADER + "700,Ann,,DE,2026-01-01\n701,Ann,,DE,yesterday evening\n")
    (landing / "12.csv").write_text((landing / "12.csv").read_text()[:-8])

    run = run_of(customers, 1, **ONLY)

    assert run.state == "failed", "somebody has to look at the two"
    assert sorted(mapped(run).values()) == ["failed"] * 2 + ["success"] * 15
    assert states(run)["report_files"] == ("failed", 1)
    assert sorted(refresh_states(run).values()) == ["skipped", "skipped", "success"]
    said = summaries(run)
    assert said["find_files"] == "landing/*.csv: 17 files to load, 3 loaded before"
    expected = "raw.customers: 20 files: 15 loaded (45 rows), 3 loaded before, 2 refused"
    assert said["report_files"] == expected
    assert "refused: landing/7.csv: 1 of 2 records are bad" in caplog.text
    assert "line 3, column updated_at, value 'yesterday evening'" in caplog.text
    assert "refused: landing/12.csv: the last line has no line end" in caplog.text
    assert published(warehouse)[0] == 18 * 2 + 1
    assert warehouse.verification("customers_latest") == (0, 0, 0, 37)
    loaded = warehouse.rows("SELECT batch_id, rows FROM raw.loads")
    assert warehouse.rows(f"SELECT count(*) FROM ops.loads WHERE run_id = '{run.run_id}'") == [(15,)]
    assert {*loaded} == {(f"landing/{number}.csv", 3) for number in range(1, 21) if number not in (7, 12)}
    assert len(loaded) == 18

    deliver(landing, 7)
    deliver(landing, 12)
    mended = run_of(customers, 2, **ONLY)

    assert mended.state == "success"
    assert summaries(mended)["report_files"] == "raw.customers: 20 files: 2 loaded (6 rows), 18 loaded before"
    assert warehouse.verification("customers_latest") == (0, 0, 0, 41)
    assert warehouse.rows("SELECT count(*), count(DISTINCT sha256) FROM raw.loads") == [(20, 20)]


def test_of_two_files_with_one_instant_the_later_name_wins_whatever_came_first(
    customers: Any, warehouse: Warehouse, landing: Path
) -> None:
    for number in (10, 9, 2):
        deliver(landing, number)

    run = run_of(customers, **ONLY)

    assert run.state == "success"
    assert published(warehouse) == (7, "From 10")


def test_run_without_new_files_is_green_and_loads_and_publishes_nothing(
    customers: Any, warehouse: Warehouse, landing: Path
) -> None:
    deliver(landing, 1)
    assert run_of(customers, **ONLY).state == "success"

    run = run_of(customers, 1, **ONLY)

    assert run.state == "success"
    assert states(run)["check_batch"][0] == "skipped"
    assert summaries(run)["report_files"] == "raw.customers: 1 file: 0 loaded (0 rows), 1 loaded before"
    nothing = run_of(customers, 2, source="nothing/*.csv")
    assert nothing.state == "success"
    assert (
        summaries(nothing)["find_files"] == "nothing/*.csv: no file is there, new or loaded before. Is the path right?"
    )
    assert warehouse.rows("SELECT count(*) FROM raw.loads") == [(1,)]


@pytest.mark.parametrize(("error", "tries"), [(ValueError("names columns that it has not"), 1), (OSError("gone"), 2)])
def test_format_that_does_not_fit_is_not_tried_again(
    customers: Any, landing: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, tries: int
) -> None:
    deliver(landing, 1)
    monkeypatch.setattr(customers.task_dict["load_raw"], "retries", 1)
    monkeypatch.setattr(customers.task_dict["load_raw"], "retry_delay", timedelta(0))
    asked = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append(options["batch_id"])
        raise error

    monkeypatch.setattr("batch_dag.load_batch", load)

    assert run_of(customers, **ONLY).state == "failed"
    assert asked == ["landing/1.csv"] * tries


def test_run_that_is_cleared_says_what_is_true_now(
    customers: Any, warehouse: Warehouse, landing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what instances have left behind that are no longer there, or did not begin anew."""
    deliver(landing, 1)
    deliver(landing, 2)
    is_away = True

    def load(*args: Any, **options: Any) -> Any:
        if is_away and options["batch_id"] == "landing/1.csv":
            raise OperationalError("the connection broke")
        return load_batch(*args, **options)

    monkeypatch.setattr("batch_dag.load_batch", load)
    run = run_of(customers, **ONLY)
    assert run.state == "failed"
    said = []
    for is_away in (True, False, False):  # noqa: B007 # load reads it
        with cleared(run):
            again = run_of(customers)
        said.append((again.state, summaries(again)["report_files"].partition(": ")[2]))

    assert said == [
        ("failed", "2 files: 0 loaded (0 rows), 1 loaded before, 1 not loaded, see load_raw"),
        ("success", "2 files: 1 loaded (3 rows), 1 loaded before"),
        ("success", "2 files: 0 loaded (0 rows), 2 loaded before"),
    ]
    (landing / "1.csv").rename(landing / "gone.csv.part")
    with cleared(run):
        monkeypatch.setattr("batch_dag.find_files", lambda *_, **__: 1 / 0)
        assert run_of(customers).state == "failed"


def test_run_without_new_files_publishes_what_an_earlier_one_could_not(
    customers: Any, warehouse: Warehouse, landing: Path
) -> None:
    deliver(landing, 1)
    warehouse.alter("REVOKE EXECUTE ON FUNCTION stg.swap FROM de_dw_pipeline")
    assert run_of(customers, **ONLY).state == "failed"
    assert warehouse.rows("SELECT count(*) FROM stg.pending_loads WHERE table_name = 'customers_latest'") == [(1,)]
    warehouse.alter("GRANT EXECUTE ON FUNCTION stg.swap TO de_dw_pipeline")

    run = run_of(customers, 1, **ONLY)

    assert run.state == "success"
    assert summaries(run)["find_files"] == "landing/*.csv: 0 files to load, 1 loaded before"
    assert published(warehouse) == (3, "From 1")


def test_file_that_is_refused_keeps_nothing_from_being_published_that_waits(
    customers: Any, warehouse: Warehouse, landing: Path
) -> None:
    with warehouse.connect() as conn:
        deliver(landing, 1)
        load_batch(conn, table="raw.customers", batch_id="by hand", path=landing / "1.csv")
    (landing / "2.csv").write_text(HEADER + "2,Ann,,DE,yesterday evening\n")

    run = run_of(customers, source="landing/2.csv")

    assert run.state == "failed"
    assert states(run)["report_files"] == ("failed", 1)
    assert published(warehouse) == (3, "From 1")


def test_file_that_was_delivered_twice_under_two_names_is_loaded_once(
    customers: Any, warehouse: Warehouse, landing: Path
) -> None:
    deliver(landing, 1)
    (landing / "2.csv").write_bytes((landing / "1.csv").read_bytes())

    run = run_of(customers, **ONLY)

    assert run.state == "success"
    assert summaries(run)["report_files"] == "raw.customers: 2 files: 1 loaded (3 rows), 1 loaded before"
    assert warehouse.rows("SELECT rows FROM raw.loads") == [(3,)]


def test_file_that_was_replaced_is_refused_by_both_hashes(
    customers: Any, warehouse: Warehouse, landing: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deliver(landing, 1)
    assert run_of(customers, **ONLY).state == "success"
    deliver(landing, 1, "2026-01-02")

    run = run_of(customers, 1, **ONLY)

    assert run.state == "failed"
    assert "was loaded into raw.customers as load 1 with other bytes: sha256 was" in caplog.text
    assert published(warehouse) == (3, "From 1")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("../landing/1.csv", r"it has .. in it"),
        ("/etc/passwd", "is below none of"),
        ("landing/9.csv", "No such file or directory below "),
        ("landing/link.csv", "not a regular file. No symbolic link is followed"),
    ],
)
def test_source_that_may_not_be_loaded_is_refused_at_once(
    customers: Any, warehouse: Warehouse, landing: Path, capfd: pytest.CaptureFixture[str], source: str, message: str
) -> None:
    (landing / "link.csv").symlink_to("/etc/passwd")

    run = run_of(customers, source=source)

    assert run.state == "failed"
    assert states(run)["find_files"] == ("failed", 1)
    assert [states(run)[task][0] for task in ("report_files", "check_batch")] == ["failed", "skipped"]
    said = capfd.readouterr().out
    assert message in said
    assert "root:" not in said
    assert warehouse.rows("SELECT count(*) FROM raw.loads") == [(0,)]


def test_date_in_a_source_is_that_of_the_run(customers: Any, warehouse: Warehouse, landing: Path) -> None:
    for day in (1, 2, 3):
        (landing / f"2026-01-0{day}").mkdir()
        deliver(landing / f"2026-01-0{day}", day, f"2026-01-0{day}")

    run = run_of(customers, source="landing/{date}")

    assert run.state == "success"
    assert warehouse.rows("SELECT batch_id FROM raw.loads") == [("landing/2026-01-02/2.csv",)]


def test_objects_of_a_store_are_loaded_from_another_root(
    s3: S3, landing: Path, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    prefix = f"feeds_of_{request.node.originalname}"
    for number in (1, 2):
        deliver(landing, number)
        s3.put(f"{prefix}/{number}.csv", (landing / f"{number}.csv").read_bytes())
    monkeypatch.setenv("WAREHOUSE_SOURCES", f"/nowhere,s3://aws_default@{s3.bucket}/{prefix}")
    dag = request.getfixturevalue("customers")

    for hours in (0, 1):
        run = run_of(dag, hours, source=f"s3://aws_default@{s3.bucket}/{prefix}/*.csv")
        assert run.state == "success"

    assert summaries(run)["find_files"].endswith("/*.csv: 0 files to load, 2 loaded before")
    assert warehouse.rows("SELECT batch_id, rows FROM raw.loads ORDER BY load_id") == [
        (f"s3://aws_default@{s3.bucket}/{prefix}/{number}.csv", 3) for number in (1, 2)
    ]


def test_customers_are_made_loaded_published_and_verified_by_the_same_flow(
    customers: Any, dags: Any, warehouse: Warehouse
) -> None:
    for day in range(3):
        assert run_of(customers, day * 24, rows=50).state == "success"

    assert dags["verify_customers"].test(logical_date=RUN, run_after=RUN).state == "success"
    assert warehouse.rows("SELECT count(*), count(DISTINCT updated_at) FROM raw.customers") == [(150, 3)]
    out = io.BytesIO()
    write_customers(out, rows=50, updated_at=RUN + timedelta(days=2))
    latest = list(csv.DictReader(io.StringIO(out.getvalue().decode(), newline="")))
    columns = "customer_id::text, name, email, country"
    assert warehouse.rows(f"SELECT {columns} FROM stg.customers_latest AS c ORDER BY c.customer_id") == [
        (row["customer_id"], row["name"], row["email"], row["country"]) for row in latest
    ]
    checks = warehouse.rows("SELECT check_name FROM ops.last_checks WHERE table_name = 'customers_latest'")
    assert sorted(name for (name,) in checks) == [
        *("freshness", "no_future_updated_at", "not_empty", "rejected_share", "row_count")
    ]


def test_loads_of_two_datasets_do_not_mix(customers: Any, dags: Any, warehouse: Warehouse) -> None:
    assert run_of(customers, rows=5).state == "success"
    assert run_of(dags["orders"], rows=7).state == "success"

    assert warehouse.rows("SELECT table_name, rows FROM raw.loads ORDER BY load_id") == [
        ("raw.customers", 5),
        ("raw.orders", 7),
    ]
    pending = "SELECT table_name, pending_loads FROM stg.refresh_status ORDER BY table_name"
    assert warehouse.rows(pending) == [("customers_latest", 0), ("orders_latest", 0)]
    assert warehouse.rows("SELECT * FROM stg.verify('customers_latest')", PIPELINE) == [(0, 0, 0, 5)]


def test_runs_of_past_dates_in_any_order_publish_the_same(customers: Any, warehouse: Warehouse) -> None:
    """As a backfill makes them: the batch is of the date, whenever the run comes."""
    found: list[Any] = []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        for day in order:
            assert run_of(customers, 24 * 80 * day, rows=20).state == "success"
        rows = "SELECT customer_id, name, email, country, updated_at FROM stg.customers_latest ORDER BY customer_id"
        found.append(warehouse.rows(rows))
        warehouse.alter("SET session_replication_role = replica; TRUNCATE stg.customers_latest_live, stg.applied_loads")
        warehouse.alter(
            "ALTER TABLE raw.customers DISABLE TRIGGER append_only; ALTER TABLE raw.loads DISABLE TRIGGER append_only;"
            "TRUNCATE raw.customers, raw.loads"
        )

    assert found[0] == found[1] != []
    assert {row[-1] for row in found[0]} == {RUN + timedelta(days=240)}


def test_dataset_without_a_generator_needs_a_source(dags: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow.sdk.exceptions import ParamValidationError
    from batch_dag import Dataset, run_params

    params = run_params(Dataset("customers"), [])

    assert "rows" not in params
    with pytest.raises(ParamValidationError):
        params["source"].resolve(None)
    assert run_params(Dataset("customers", source="landing"), [])["source"].resolve() == "landing"


@pytest.mark.parametrize("name", ["Orders", "or ders", "o'rders", "", "1st", "x" * 41])
def test_name_that_would_need_quotes_is_refused(airflow: None, name: str) -> None:
    from batch_dag import Dataset

    with pytest.raises(ValueError, match="is no name of a dataset"):
        Dataset(name)


def test_schedule_of_all_datasets_is_one_variable(monkeypatch: pytest.MonkeyPatch, airflow: None) -> None:
    monkeypatch.setenv("WAREHOUSE_SCHEDULE", "@daily")
    from batch_dag import Dataset, schedule_of

    assert schedule_of(Dataset("orders")) == "@daily"
    assert schedule_of(Dataset("orders", schedule="@hourly")) == "@hourly"
