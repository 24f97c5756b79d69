"""The DAGs `orders` and `verify_orders`: their structure, and real runs of them on a real warehouse."""

import hashlib
import importlib
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from batch_store import open_source

from local.settings import airflow_connection
from tests.conftest import SWAP, VERIFY
from tests.dags.newest import server
from tests.s3 import S3
from tests.warehouse import ROOT, Warehouse

__all__ = ["server"]  # a fixture

RUN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
KINDS = ("swap", "union", "merge")


@pytest.fixture
def dags(airflow: None) -> Any:
    """The DAGs, read from their files for each test: a run in this process changes the defaults of their params."""
    from airflow.dag_processing.dagbag import BundleDagBag

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bag = BundleDagBag(ROOT / "dags", bundle_path=ROOT / "dags", bundle_name="dags-folder")
    assert bag.import_errors == {}
    assert [warning for warning in caught if Path(warning.filename).parent == ROOT / "dags"] == []
    assert sorted(bag.dags) == ["customers", "orders", "verify_customers", "verify_orders"]
    return bag.dags


@pytest.fixture
def parsed(dags: Any) -> Any:
    return dags["orders"]


@pytest.fixture
def dag(parsed: Any, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("AIRFLOW_CONN_DE_DW", airflow_connection(warehouse.url))
    return parsed


@pytest.fixture
def verify(dags: Any, dag: Any) -> Callable[[], Any]:
    """Run the DAG verify_orders on the warehouse."""
    return lambda: dags["verify_orders"].test(logical_date=RUN, run_after=RUN)


def states(run: Any) -> dict[str, tuple[str, int]]:
    """State and number of tries of each task."""
    return {task.task_id: (task.state, task.try_number) for task in run.get_task_instances()}


def refresh_states(run: Any) -> dict[str, str]:
    """State of each of the three refreshes, by its kind."""
    return {kind: states(run)[f"{kind}_latest"][0] for kind in KINDS}


def only(kind: str) -> dict[str, str]:
    """What refresh_states are when one has run."""
    return {other: "success" if other == kind else "skipped" for other in KINDS}


def events(run: Any) -> dict[str, dict[str, Any]]:
    """What a run's asset events say, by asset."""
    from airflow.models.asset import AssetEvent
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        found = session.scalars(
            select(AssetEvent).where(AssetEvent.source_run_id == run.run_id).order_by(AssetEvent.id)
        ).all()
        return {event.asset.name: event.extra for event in found[-2:]}


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


def test_flow_is_generate_load_and_one_of_three_refreshes(parsed: Any) -> None:
    assert {task.task_id: sorted(task.downstream_task_ids) for task in parsed.tasks} == {
        "generate_batch": ["find_files"],
        "find_files": ["load_raw", "report_files"],
        "load_raw": ["check_batch", "report_files"],
        "report_files": [],
        "check_batch": ["choose_refresh"],
        "choose_refresh": ["merge_latest", "swap_latest", "union_latest"],
        "swap_latest": [],
        "union_latest": [],
        "merge_latest": [],
    }
    assert {task.task_id: [asset.name for asset in task.outlets] for task in parsed.tasks} == {
        "generate_batch": [],
        "find_files": [],
        "load_raw": ["raw.orders"],
        "report_files": [],
        "check_batch": [],
        "choose_refresh": [],
        "swap_latest": ["stg.orders_latest"],
        "union_latest": ["stg.orders_latest"],
        "merge_latest": ["stg.orders_latest"],
    }
    assert {kind: parsed.get_edge_info("choose_refresh", f"{kind}_latest")["label"] for kind in KINDS} == {
        "swap": "none applied yet",
        "union": "many rows pending",
        "merge": "few rows pending",
    }
    assert parsed.max_active_runs == 1
    assert not parsed.catchup
    for task in parsed.tasks:
        assert (task.retries, task.retry_exponential_backoff > 0) == (0 if task.task_id == "report_files" else 3, True)
    assert "If it fails" in parsed.doc_md


def test_verification_is_one_task_that_is_tried_again_and_updates_no_asset(dags: Any) -> None:
    (task,) = dags["verify_orders"].tasks

    assert (task.task_id, task.retries, task.outlets) == ("verify_latest", 3, [])
    assert dags["verify_orders"].max_active_runs == 1
    assert not dags["verify_orders"].catchup
    assert "It changes nothing" in dags["verify_orders"].doc_md


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
        ("refresh", "auto", True),
        ("refresh", "swap", True),
        ("refresh", "union", True),
        ("refresh", "merge", True),
        ("refresh", "full", False),
        ("refresh", None, False),
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


@pytest.fixture
def on_s3(s3: S3, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The prefix of the batch files, before the DAG's file is read."""
    prefix = f"data of {request.node.name}"
    monkeypatch.setenv("WAREHOUSE_DATA", f"s3://aws_default@{s3.bucket}/{prefix}/")
    return prefix


def test_three_runs_with_their_files_on_s3(on_s3: str, dag: Any, warehouse: Warehouse, s3: S3) -> None:
    for hour in range(3):
        moment = RUN + timedelta(hours=hour)
        assert dag.test(logical_date=moment, run_after=moment).state == "success"

    assert counts(warehouse) == (300, 3, 100, 100, 100)
    loads = warehouse.rows("SELECT source, sha256 FROM raw.loads ORDER BY load_id")
    assert [source for source, _ in loads] == [
        f"s3://aws_default@{s3.bucket}/{on_s3}/raw/orders-manual__2026-01-02T0{hour}:04:05+00:00.csv"
        for hour in (3, 4, 5)
    ]
    keys = s3.keys(on_s3)
    assert [hashlib.sha256(s3.get(key)).hexdigest() for key in keys] == [sha256 for _, sha256 in loads]


def test_run_that_is_repeated_on_s3_makes_the_same_bytes_and_loads_nothing_new(
    on_s3: str, dag: Any, warehouse: Warehouse, s3: S3
) -> None:
    found = set()
    for _ in range(2):
        assert dag.test(logical_date=RUN, run_after=RUN, run_conf={"rows": 10}).state == "success"
        (key,) = s3.keys(on_s3)
        found.add((key, s3.get(key)))

    assert len(found) == 1
    assert counts(warehouse) == (10, 1, 10, 10, 10)
    assert len(warehouse.rows("SELECT * FROM raw.loads")) == 1


@pytest.fixture
def by_file_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WAREHOUSE_DATA", f"file://{tmp_path}/a folder")
    return tmp_path / "a folder"


def test_url_of_a_folder_is_that_folder(by_file_url: Path, dag: Any, warehouse: Warehouse) -> None:
    assert dag.test(logical_date=RUN, run_after=RUN, run_conf={"rows": 10}).state == "success"

    (path,) = (by_file_url / "raw").iterdir()
    assert warehouse.rows("SELECT source, rows FROM raw.loads") == [(f"file://{path}", 10)]


@pytest.fixture
def on_own_s3(own_s3: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    # Airflow keeps the client of a connection, so this one has a connection of its own.
    monkeypatch.setenv("AIRFLOW_CONN_OTHER_S3", own_s3.environment["AIRFLOW_CONN_AWS_DEFAULT"])
    monkeypatch.setenv("WAREHOUSE_DATA", f"s3://other_s3@{own_s3.bucket}")
    return own_s3


def test_load_is_tried_again_when_the_store_was_away(
    on_own_s3: S3, dag: Any, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivered: dict[str, bytes] = {}

    def away_at_first(path: Any) -> Any:
        if not delivered:
            delivered.update({key: on_own_s3.get(key) for key in on_own_s3.keys("raw/")})
            on_own_s3.stop()
        elif on_own_s3.process.poll() is not None:
            on_own_s3.start()
            for key, content in delivered.items():
                on_own_s3.put(key, content)
        return open_source(path)

    monkeypatch.setattr("batch_file.open_source", away_at_first)
    for task in dag.tasks:
        monkeypatch.setattr(task, "retry_delay", timedelta(0))
        monkeypatch.setattr(task, "retry_exponential_backoff", 0)

    run = dag.test(logical_date=RUN, run_after=RUN)

    assert run.state == "success"
    assert states(run)["load_raw"] == ("success", 2)
    assert counts(warehouse) == (100, 1, 100, 100, 100)


def test_object_that_is_missing_fails_at_once(
    on_s3: str, dag: Any, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GENERATE, lambda *_, **__: 0)

    run = dag.test(logical_date=RUN, run_after=RUN)

    assert run.state == "failed"
    assert states(run)["load_raw"] == ("failed", 1)


def test_older_batch_that_comes_late_does_not_replace_newer_rows(dag: Any, warehouse: Warehouse) -> None:
    for day in (2, 1):
        moment = RUN + timedelta(days=day)
        assert dag.test(logical_date=moment, run_after=moment, run_conf={"rows": 10}).state == "success"

    assert counts(warehouse) == (20, 2, 10, 10, 10)


def test_assets_carry_the_row_counts_and_why_it_was_refreshed_so(dag: Any, warehouse: Warehouse) -> None:
    run = dag.test(logical_date=RUN, run_after=RUN, run_conf={"rows": 7})

    why = "no load has been applied yet; 7 rows of 1 load pending, the table has about 0"
    assert events(run)["raw.orders"]["rows"] == 7
    (refresh,) = [task for task in run.get_task_instances() if task.task_id == "swap_latest"]
    assert refresh.xcom_pull(task_ids="swap_latest") == {"loads": 1, "rows": 7}
    assert refresh.xcom_pull(task_ids="choose_refresh", key="refresh") == ["swap", why]


def test_first_refresh_is_a_swap_then_few_rows_are_merged_and_many_swapped_in(dag: Any, warehouse: Warehouse) -> None:
    for hour, (rows, kind, why) in enumerate(
        [
            (10, "swap", "no load has been applied yet; 10 rows of 1 load pending, the table has about 0"),
            (2, "merge", "few; 2 rows of 1 load pending, the table has about 10"),
            (5, "union", "many; 5 rows of 1 load pending, the table has about 10"),
            (9, "union", "many; 9 rows of 1 load pending, the table has about 10"),
            (1, "merge", "few; 1 row of 1 load pending, the table has about 10"),
        ]
    ):
        moment = RUN + timedelta(hours=hour)
        run = dag.test(logical_date=moment, run_after=moment, run_conf={"rows": rows, "seed": hour})

        assert run.state == "success"
        assert refresh_states(run) == only(kind)
        written = rows if kind == "merge" else 10
        event = events(run)["stg.orders_latest"]
        assert (event["loads"], event["rows"], event["refresh"], event["why"]) == (1, written, kind, why)

    assert warehouse.verification() == (0, 0, 0, 10)


@pytest.mark.parametrize("kind", KINDS)
def test_refresh_that_is_asked_for_is_the_one_that_runs(dag: Any, warehouse: Warehouse, kind: str) -> None:
    for hour, rows in enumerate((10, 3)):
        moment = RUN + timedelta(hours=hour)
        run = dag.test(logical_date=moment, run_after=moment, run_conf={"rows": rows, "refresh": kind})

        assert run.state == "success"
        assert refresh_states(run) == only(kind)
        assert events(run)["stg.orders_latest"]["refresh"] == kind
        assert events(run)["stg.orders_latest"]["why"].startswith("asked for; ")

    assert counts(warehouse) == (13, 2, 10, 10, 3)
    assert warehouse.verification() == (0, 0, 0, 10)


@pytest.mark.parametrize(
    ("has_applied_loads", "pending", "rows", "kind"),
    [
        (False, 1, 1_000_000, "swap"),
        (False, 0, 0, "swap"),
        (True, 0, 0, "merge"),
        (True, 0, 1_000, "merge"),
        (True, 249, 1_000, "merge"),
        (True, 250, 1_000, "union"),
        (True, 1, 0, "union"),
    ],
)
def test_union_is_chosen_from_a_share_of_the_table_on(
    monkeypatch: pytest.MonkeyPatch, has_applied_loads: bool, pending: int, rows: int, kind: str
) -> None:
    from stg_refresh import cheapest_refresh

    monkeypatch.setattr("stg_refresh.UNION_FROM", 0.25)
    hook = SimpleNamespace(get_first=lambda *_, **__: (has_applied_loads, 2, pending, rows))

    assert cheapest_refresh(hook, "orders_latest", "auto").kind == kind
    assert [cheapest_refresh(hook, "orders_latest", asked).kind for asked in KINDS] == [*KINDS]


def test_unknown_staging_table_is_named(dag: Any, warehouse: Warehouse) -> None:
    from airflow.providers.postgres.hooks.postgres import PostgresHook
    from stg_refresh import cheapest_refresh

    with pytest.raises(ValueError, match=r"stg\.table_versions has no row for invoices_latest"):
        cheapest_refresh(PostgresHook("de_dw"), "invoices_latest", "auto")


@pytest.mark.parametrize("kind", KINDS)
def test_refresh_that_is_cleared_runs_again_and_changes_nothing(dag: Any, warehouse: Warehouse, kind: str) -> None:
    moments = [RUN, RUN + timedelta(hours=1)]
    for moment in moments:
        run = dag.test(logical_date=moment, run_after=moment, run_conf={"rows": 10, "refresh": kind})
    published = warehouse.rows("SELECT * FROM stg.orders_latest ORDER BY order_id")

    again = run_again(dag, run, f"{kind}_latest")

    assert again == {"loads": 0, "rows": 0 if kind == "merge" else 10}
    assert warehouse.rows("SELECT * FROM stg.orders_latest ORDER BY order_id") == published
    assert warehouse.rows("SELECT count(*) FROM stg.applied_loads") == [(2,)]
    assert warehouse.verification() == (0, 0, 0, 10)


def test_loads_whose_refresh_failed_are_published_by_the_next(dag: Any, warehouse: Warehouse) -> None:
    assert dag.test(logical_date=RUN, run_after=RUN, run_conf={"rows": 20}).state == "success"
    warehouse.alter("REVOKE INSERT (table_name, load_id, finished_at) ON stg.applied_loads FROM de_dw_pipeline")
    for task in dag.tasks:
        task.retries = 0
    missed = RUN + timedelta(hours=1)
    assert dag.test(logical_date=missed, run_after=missed, run_conf={"rows": 3, "refresh": "merge"}).state == "failed"
    warehouse.alter("GRANT INSERT (table_name, load_id, finished_at) ON stg.applied_loads TO de_dw_pipeline")

    later = RUN + timedelta(hours=2)
    run = dag.test(logical_date=later, run_after=later, run_conf={"rows": 1, "refresh": "auto"})

    event = events(run)["stg.orders_latest"]
    assert (event["loads"], event["rows"], event["refresh"]) == (2, 3, "merge")
    assert event["why"] == "few; 4 rows of 2 loads pending, the table has about 20"
    assert warehouse.verification() == (0, 0, 0, 20)


@pytest.mark.parametrize(
    ("tampering", "found"),
    [
        ("UPDATE stg.orders_latest_live SET status = 'lost' WHERE order_id = 3", "0 missing, 0 extra, 1 different, 10"),
        ("DELETE FROM stg.orders_latest_live WHERE order_id < 3", "2 missing, 0 extra, 0 different, 8"),
        ("TRUNCATE stg.orders_latest_live", "10 missing, 0 extra, 0 different, 0"),
    ],
)
def test_verification_is_red_at_once_when_somebody_else_wrote_and_green_after_a_swap(
    dag: Any, warehouse: Warehouse, verify: Callable[[], Any], tampering: str, found: str
) -> None:
    from airflow.sdk.exceptions import AirflowFailException
    from run_report import differences

    assert dag.test(logical_date=RUN, run_after=RUN, run_conf={"rows": 10}).state == "success"
    assert verify().state == "success"
    warehouse.alter(tampering)

    red = verify()

    assert states(red) == {"verify_latest": ("failed", 1)}, "to look again would not help"
    with warehouse.connect() as conn, pytest.raises(AirflowFailException) as said:
        differences("stg.orders_latest", conn.execute(VERIFY.encode()))
    assert f"would make of raw: {found} compared. Trigger the DAG that refreshes it with refresh set to swap" in str(
        said.value
    )
    later = RUN + timedelta(hours=1)
    assert dag.test(logical_date=later, run_after=later, run_conf={"rows": 1, "refresh": "swap"}).state == "success"
    assert verify().state == "success"


def test_verification_leaves_pending_loads_out_and_applies_none(
    dag: Any, warehouse: Warehouse, verify: Callable[[], Any]
) -> None:
    assert dag.test(logical_date=RUN, run_after=RUN, run_conf={"rows": 10}).state == "success"
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-03\n11 | 2026-01-03")

    assert verify().state == "success"

    assert warehouse.rows("SELECT rows FROM stg.pending_loads") == [(2,)]


def test_verification_of_a_warehouse_that_is_away_is_red(
    dags: Any, verify: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_DE_DW", airflow_connection("postgresql://nobody@/nothing?host=/nonexistent"))
    monkeypatch.setattr(dags["verify_orders"].tasks[0], "retries", 0)

    assert verify().state == "failed"


def test_bad_batch_fails_at_once_and_changes_nothing(dag: Any, warehouse: Warehouse) -> None:
    assert dag.test(logical_date=RUN, run_after=RUN, run_conf={"rows": 5}).state == "success"
    warehouse.alter("ALTER TABLE raw.orders ADD CONSTRAINT order_id_is_small CHECK (order_id < 6)")
    later = RUN + timedelta(days=1)

    run = dag.test(logical_date=later, run_after=later, run_conf={"rows": 10, "max_rejects": "4"})

    assert run.state == "failed"
    assert states(run)["load_raw"] == ("failed", 1), "a file that is bad stays bad: no retry"
    assert states(run)["choose_refresh"][0] == "skipped"
    assert refresh_states(run) == dict.fromkeys(KINDS, "skipped")
    assert counts(warehouse) == (5, 1, 5, 5, 5)


def test_bad_records_within_the_limit_are_kept_and_counted(dag: Any, warehouse: Warehouse) -> None:
    warehouse.alter("ALTER TABLE raw.orders ADD CONSTRAINT order_id_is_small CHECK (order_id < 6)")

    run = dag.test(logical_date=RUN, run_after=RUN, run_conf={"rows": 10, "max_rejects": "50%"})

    assert run.state == "success"
    assert counts(warehouse) == (5, 1, 5, 5, 5)
    rejects = "SELECT line_number, column_name, reason FROM raw.orders_rejects ORDER BY line_number"
    assert warehouse.rows(rejects) == [
        (line, "order_id", 'violates check constraint "order_id_is_small"') for line in range(7, 12)
    ]
    (load,) = [task for task in run.get_task_instances() if task.task_id == "load_raw"]
    assert load.xcom_pull(task_ids="load_raw", map_indexes=0)["rejects"] == 5


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

    def write(path: Path, **_: Any) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.write_text(content)

    return write


def raise_(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def summaries(run: Any) -> dict[str, str]:
    """The sentence of each task that has run."""
    instances = [task for task in run.get_task_instances() if task.state in ("success", "failed")]
    return {
        task.task_id: task.xcom_pull(task_ids=task.task_id, key="summary", map_indexes=task.map_index)
        for task in instances
    }


def test_each_task_says_in_one_sentence_what_it_did(
    dag: Any, warehouse: Warehouse, verify: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    run = dag.test(logical_date=RUN, run_after=RUN, run_conf={"rows": 1000})

    ((path, size),) = warehouse.rows("SELECT source, bytes FROM raw.loads")
    said = summaries(run)
    seconds = r"\d+\.\d s"
    for task, sentence in {
        "generate_batch": rf"{re.escape(path)}: 1,000 orders, 0\.2 MB in {seconds}",
        "find_files": rf"{re.escape(path)}, made by this run",
        "report_files": r"raw\.orders: 1 file: 1 loaded \(1,000 rows\)",
        "load_raw": rf"raw\.orders: load 1: 1,000 rows, 0\.2 MB in {seconds}, [\d.]+ MB/s",
        "check_batch": r"stg\.orders_latest: 5 checks of 1 pending load: 4 passed; warned: freshness \(1 .*\)",
        "choose_refresh": r"stg\.orders_latest: swap, because: no load has been applied yet; 1,000 rows of 1 load .*",
        "swap_latest": rf"stg\.orders_latest: swap of 1 load, 1,000 rows written in {seconds}; no load has been .*",
    }.items():
        assert re.fullmatch(sentence, said[task].partition("; warned: ")[0] if task == "swap_latest" else said[task])
        assert said[task] in caplog.text, "the log has it too"
    assert said["swap_latest"].endswith("; warned: freshness (1 offending row)")
    raw, stg = events(run)["raw.orders"], events(run)["stg.orders_latest"]
    assert (raw["load_id"], raw["rows"], raw["rejects"], raw["bytes"], raw["is_new"]) == (1, 1000, 0, size, True)
    assert raw["batch_id"] == run.run_id
    assert raw["seconds"] > 0
    assert raw["mb_per_second"] > 0
    assert raw["summary"] == said["load_raw"]
    assert (stg["loads"], stg["rows"], stg["refresh"]) == (1, 1000, "swap")
    assert stg["warnings"] == ["freshness (1 offending row)"]
    assert stg["seconds"] > 0
    assert said["swap_latest"].startswith(stg["summary"])
    assert summaries(verify()) == {
        "verify_latest": "stg.orders_latest is what raw says: 0 missing, 0 extra, 0 different, 1,000 compared"
    }


def test_batch_that_comes_again_is_said_to_bring_nothing(dag: Any, warehouse: Warehouse) -> None:
    for _ in range(2):
        run = dag.test(logical_date=RUN, run_after=RUN, run_conf={"rows": 10})

    said = summaries(run)
    raw = events(run)["raw.orders"]
    assert (raw["load_id"], raw["rows"], raw["mb_per_second"], raw["is_new"]) == (1, 0, 0, False), (
        "nobody adds it twice"
    )
    assert said["load_raw"] == f"raw.orders: already loaded as load 1, batch {run.run_id}: 0 new rows"
    assert said["check_batch"] == "stg.orders_latest: no load is pending, so there is nothing to check"
    assert said["merge_latest"].startswith("stg.orders_latest: merge of 0 loads, 0 rows written in ")


def test_run_that_has_not_published_within_an_hour_is_said(parsed: Any, caplog: pytest.LogCaptureFixture) -> None:
    (alert,) = parsed.deadline
    module, _, function = alert.callback.path.rpartition(".")

    from airflow.api_fastapi.core_api.datamodels.dag_run import DAGRunResponse

    run = {"dag_id": "orders", "dag_run_id": "manual__1"}
    assert run.keys() <= DAGRunResponse.model_fields.keys(), "what Airflow calls it with"
    context = {"dag_run": run, "deadline": {"id": "1"}}
    getattr(importlib.import_module(module), function)(**alert.callback.kwargs, context=context)

    assert (alert.name, alert.interval) == ("no fresh batch", timedelta(hours=1))
    assert alert.reference.reference_name == "DagRunQueuedAtDeadline"
    assert "stg.orders_latest: run manual__1 of orders has not published its batch in time: http" in caplog.text


FUTURE = "order_id | updated_at\n1 | 2026-01-01\n2 | 2999-01-01\n3 | 3000-01-01"
NO_RULE = "ALTER TABLE raw.orders DROP CONSTRAINT updated_at_is_not_in_the_future"


def test_failed_check_leaves_stg_as_it_is_and_shows_the_rows(
    dag: Any, warehouse: Warehouse, caplog: pytest.LogCaptureFixture
) -> None:
    assert dag.test(logical_date=RUN, run_after=RUN, run_conf={"rows": 2}).state == "success"
    before = warehouse.rows("SELECT * FROM stg.orders_latest ORDER BY order_id")
    warehouse.alter(NO_RULE)
    warehouse.given("raw.orders", FUTURE)
    later = RUN + timedelta(hours=1)

    run = dag.test(logical_date=later, run_after=later, run_conf={"rows": 2})

    assert run.state == "failed"
    assert states(run)["check_batch"] == ("failed", 1), "to ask again would not help"
    assert refresh_states(run) == dict.fromkeys(KINDS, "upstream_failed")
    assert warehouse.rows("SELECT * FROM stg.orders_latest ORDER BY order_id") == before
    assert "check no_future_updated_at (fail) failed: 2 offending" in caplog.text
    assert '{"key":{"order_id":2},"updated_at":"2999-01-01T00:00:00+00:00","load_id":2,' in caplog.text
    assert "failed: no_future_updated_at (2 offending rows)" in summaries(run)["check_batch"]
    assert "docs/operations.md, http://127.0.0.1:8080/warehouse/docs/operations.md#a-check-is-red" in caplog.text
    outcomes = "SELECT outcome, offending FROM ops.last_checks WHERE check_name = 'no_future_updated_at'"
    assert warehouse.rows(outcomes) == [("failed", 2)]

    again = dag.test(logical_date=later, run_after=later, run_conf={"rows": 2})
    assert again.state == "failed", "what is pending is checked until it is applied"

    accepted = dag.test(logical_date=later, run_after=later, run_conf={"rows": 2, "accept": ["no_future_updated_at"]})
    assert accepted.state == "success"
    assert warehouse.rows(outcomes) == [("accepted", 2)]
    assert "no_future_updated_at (2 offending rows), accepted" in events(accepted)["stg.orders_latest"]["warnings"]
    assert warehouse.rows("SELECT order_id FROM stg.orders_latest WHERE updated_at > now() ORDER BY order_id") == [
        (2,),
        (3,),
    ]
    assert warehouse.verification() == (0, 0, 0, 3)


@pytest.mark.parametrize(
    ("name", "value", "fits"),
    [
        ("accept", None, True),
        ("accept", [], True),
        ("accept", ["no_future_updated_at"], True),
        ("accept", ["freshness"], False),
    ],
)
def test_only_checks_that_can_fail_are_accepted(parsed: Any, name: str, value: object, fits: bool) -> None:
    test_params_have_limits(parsed, name, value, fits)


def run_again(dag: Any, run: Any, task_id: str) -> Any:
    """Run one task of a run once more, as Clear does in the UI: what it returned."""
    from airflow.sdk.definitions.dag import _run_task

    (instance,) = [task for task in run.get_task_instances() if task.task_id == task_id]
    instance.set_state("scheduled")
    instance.try_number += 1
    done = _run_task(ti=instance, task=dag.get_task(task_id))
    assert done is not None
    assert done.state == "success"
    return instance.xcom_pull(task_ids=task_id)


GENERATE = "generator.orders.generate_orders"
RULE = "ALTER TABLE stg.orders_latest_{} ADD CONSTRAINT still_shipped CHECK (status = 'shipped')"
FOREIGN_KEY = (
    "CREATE TABLE public.notes (order_id bigint REFERENCES stg.orders_latest); INSERT INTO public.notes VALUES (1)"
)
VIEW = "CREATE VIEW public.paid AS SELECT order_id FROM stg.orders_latest_live"
NO_RECORD = "REVOKE INSERT (table_name, load_id, finished_at) ON stg.applied_loads FROM de_dw_pipeline"
# What goes wrong: an SQL statement or another generator; and the task that has to be red.
FAILURES: dict[str, tuple[str | Any, str]] = {
    "generator fails": (raise_(OSError(28, "No space left on device")), "generate_batch"),
    "no file": (lambda path, **_: path.unlink(missing_ok=True) or 0, "load_raw"),
    "empty file": (write_file(""), "load_raw"),
    "half a file": (write_file(FILE[:-10]), "load_raw"),
    "no CSV": (write_file("<html>502</html>\n"), "load_raw"),
    "unknown column": (write_file(FILE.replace("status", "state")), "load_raw"),
    "bad record": (write_file(FILE.replace("1,Ann", "x,Ann")), "load_raw"),
    "other bytes": (write_file(FILE.replace("Ann", "Bob")), "load_raw"),
    "no right": ("REVOKE INSERT ON raw.orders FROM de_dw_pipeline", "load_raw"),
    "no table": ("ALTER TABLE raw.orders RENAME TO moved", "load_raw"),
    "no ledger": ("ALTER TABLE raw.loads RENAME TO moved", "load_raw"),
    "no version": ("DELETE FROM stg.table_versions", "check_batch"),
    "no right to keep the checks": (
        "REVOKE INSERT (offending) ON ops.check_results FROM de_dw_pipeline",
        "check_batch",
    ),
    "no status": ("DROP VIEW stg.refresh_status CASCADE", "choose_refresh"),
    "rule of the spare": (RULE.format("spare"), "swap_latest"),
    "rule of the live table": (RULE.format("live"), "merge_latest"),
    "no swap": ("DROP FUNCTION stg.swap(text)", "swap_latest"),
    "foreign key in the way": (FOREIGN_KEY, "swap_latest"),
    "view in the way": (VIEW, "union_latest"),
    "no right to record": (NO_RECORD, "union_latest"),
    "no right to record, merge": (NO_RECORD, "merge_latest"),
    "no right to summarize": (
        "REVOKE EXECUTE ON FUNCTION raw.summarize_new_pages(text) FROM de_dw_pipeline",
        "check_batch",
    ),
    "no source": ("UPDATE stg.table_versions SET source_table = NULL", "check_batch"),
    "no right to write": ("REVOKE INSERT ON stg.orders_latest_live FROM de_dw_pipeline", "merge_latest"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failure_makes_its_task_red_and_stops_what_comes_after(
    dag: Any, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    failure, red = FAILURES[name]
    if name == "other bytes":  # than this run has brought before
        monkeypatch.setattr(GENERATE, write_file(FILE.replace("paid", "shipped")))
        assert dag.test(logical_date=RUN, run_after=RUN).state == "success"
    else:
        warehouse.given("raw.orders", "order_id | status | updated_at\n1 | shipped | 2025-12-31")
        warehouse.run(SWAP)
    for task in dag.tasks:
        monkeypatch.setattr(task, "retries", 0)
    monkeypatch.setattr(GENERATE, write_file(FILE))
    if isinstance(failure, str):
        warehouse.alter(failure)
    else:
        monkeypatch.setattr(GENERATE, failure)
    kind = red.removesuffix("_latest")

    run = dag.test(logical_date=RUN, run_after=RUN, run_conf={"refresh": kind if kind in KINDS else "auto"})

    assert run.state == "failed"
    flow = ["generate_batch", "find_files", "load_raw", "check_batch", "choose_refresh"]
    place = flow.index(red) if red in flow else len(flow)
    found = [states(run)[task][0] for task in flow]
    assert found[: place + 1] == (["success"] * place + ["failed"])[: len(flow)]
    # Without a load check_batch looks all the same whether anything waits, if it can.
    is_before = red in flow[: flow.index("check_batch")]
    after = {"skipped", "failed", "upstream_failed"} if is_before else {"upstream_failed"}
    assert {*found[place + 1 :]} <= after
    if red in flow:
        assert {*refresh_states(run).values()} <= after
    else:
        assert refresh_states(run) == {other: "failed" if other == kind else "skipped" for other in KINDS}
    assert warehouse.rows("SELECT order_id, status FROM stg.orders_latest", "") == [(1, "shipped")]
    assert warehouse.rows("SELECT count(*) FROM stg.applied_loads", "") == [(1,)]


def test_database_that_is_away_makes_the_load_red_and_stops_the_refresh(
    dag: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_DE_DW", airflow_connection("postgresql://nobody@/nothing?host=/nonexistent"))
    for task in dag.tasks:
        monkeypatch.setattr(task, "retries", 0)

    run = dag.test(logical_date=RUN, run_after=RUN)

    assert run.state == "failed"
    assert [states(run)[task][0] for task in ("load_raw", "choose_refresh")] == ["failed", "upstream_failed"]
    assert refresh_states(run) == dict.fromkeys(KINDS, "upstream_failed")


@pytest.mark.parametrize("data", ["data", "s3://aws_default@warehouse/data"])
@pytest.mark.parametrize("module", ["orders", "customers"])
def test_importing_the_dag_opens_no_connection_and_no_file_of_ours(tmp_path: Path, module: str, data: str) -> None:
    blocked = (
        "import socket, psycopg, psycopg2\n"
        "def refuse(*_, **__): raise AssertionError('no connection at import')\n"
        "socket.socket.connect = psycopg.connect = psycopg.Connection.connect = psycopg2.connect = refuse\n"
        "from airflow.models.connection import Connection\n"
        "Connection.get_connection_from_secrets = refuse\n"
        f"import {module}\n"
    )

    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", blocked],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "dags"), "AIRFLOW_HOME": str(tmp_path), "WAREHOUSE_DATA": data},
        check=True,
    )

    assert not (tmp_path / "data").exists()
