"""### Land one batch of orders, publish the latest row of each

`generate_batch` ──> data/raw/orders-RUN.csv (or s3://...) ──> `load_raw` (COPY FROM STDIN) ──> **raw.orders** ──>
`check_batch` ──> `choose_refresh` ──> one of three refreshes (DISTINCT ON) ──> **stg.orders_latest**

| task | does | may run again, because |
|---|---|---|
| `generate_batch` | writes the run's CSV file | a run's timestamp and seed make the same bytes |
| `load_raw` | brings it to `raw.orders`, with a row in `raw.loads` | what the ledger has is not loaded again |
| `check_batch` | asks `sql/checks/` of what is pending; one that fails stops it | it adds to `ops.check_results` only |
| `choose_refresh` | looks how much is pending (param `refresh`: auto) | it changes nothing |
| `swap_latest` | all of raw, swapped in: the first time, or to mend stg | readers see the old rows or the new |
| `union_latest` | previous rows and pending loads, swapped in: for large batches | the same |
| `merge_latest` | pending loads only, in place: for small batches | what was applied is recorded with it |

**What it did:** each task says so in one sentence, in its log and in XCom under `summary`; *Assets* has it of
`raw.orders` and `stg.orders_latest`, and the page *Warehouse* shows all loads.

**If it fails:** the task's log names the cause: file, line, column and value of the bad records, the pid behind a
lock, the rows that a check found. Nothing is half-done. Mend the cause and clear the task; a lost connection or a lock
is tried again by itself. *Warehouse* shows what has been loaded, what was not though its file was (param
`max_rejects`), and what no refresh has applied yet; the DAG `verify_orders` proves that stg is right.
docs/operations.md has every message and what to do.
"""

import os
import sys
import time
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from airflow.providers.common.sql.operators.sql import SQLExecuteQueryOperator
from airflow.providers.postgres.hooks.postgres import PostgresHook
from airflow.sdk import (  # type: ignore[attr-defined] # its stub lacks those of deadlines
    Asset,
    DeadlineAlert,
    DeadlineReference,
    ExceptionRetryPolicy,
    Label,
    ObjectStoragePath,
    Param,
    RetryAction,
    RetryRule,
    SyncCallback,
    dag,
    task,
)
from batch_check import check_pending, find_checks
from batch_load import BatchError, load_batch
from run_report import (
    first_comment,
    help_at,
    no_fresh_batch,
    report_checks,
    report_refresh,
    say,
    ui_url,
    without_deadline_in_tests,
)
from stg_refresh import cheapest_refresh, refresh_counts

ROOT = Path(__file__).resolve().parents[1]
DATA = os.environ.get("WAREHOUSE_DATA") or str(ROOT / "data")  # a folder, or a URL such as s3://aws_default@bucket
sys.path.append(str(ROOT))  # generator/ is beside dags/

RAW = Asset("raw.orders", group="warehouse")
LATEST = Asset("stg.orders_latest", group="warehouse")
CHECKS = find_checks(ROOT / "sql" / "checks", "orders_latest")
SCRIPTS = ROOT / "sql" / "transforms"
REFRESHES = {  # kind: its script, and when it is chosen, for the graph
    "swap": ("stg.orders_latest.sql", "none applied yet"),
    "union": ("stg.orders_latest.union.sql", "many rows pending"),
    "merge": ("stg.orders_latest.merge.sql", "few rows pending"),
}


def batch_time(dag_run: Any) -> datetime:
    """The instant that a run stands for, however often it is repeated; a run may have no logical date."""
    return dag_run.logical_date or dag_run.run_after  # type: ignore[no-any-return]


def stored(url: str) -> Any:
    """The path of a batch file. Only tasks may ask: of a URL it looks the connection up."""
    return ObjectStoragePath(url) if "://" in url else Path(url)


@dag(
    schedule=None,
    max_active_runs=1,
    catchup=False,
    tags=["warehouse", "orders"],
    owner_links={"warehouse": ui_url("plugin/warehouse")},
    doc_md=__doc__,
    template_searchpath=[str(SCRIPTS)],
    deadline=DeadlineAlert(
        name="no fresh batch",
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=timedelta(hours=1),
        callback=SyncCallback(no_fresh_batch, {"table": LATEST.name}),
    ),
    params={
        "rows": Param(
            100,
            type="integer",
            minimum=1,
            maximum=50_000_000,
            title="Rows",
            description="Orders in the batch: order_id 1 to this number, 1 to 50 million",
        ),
        "seed": Param(
            0,
            type="integer",
            minimum=0,
            maximum=2**32 - 1,
            title="Seed",
            description="Which orders: the same seed makes new versions of the same orders",
        ),
        "max_rejects": Param(
            "0",
            anyOf=[  # with a list of types the form would have a box of many lines
                {"type": "string", "pattern": r"^\s*([0-9]+|(100|[0-9]{1,2}(\.[0-9]+)?)\s*%)\s*$"},
                {"type": "integer", "minimum": 0},
            ],
            title="Bad records allowed",
            description="A number, or a percentage such as 1%. More fail the batch; so many go to raw.orders_rejects",
        ),
        "load_again": Param(
            False,
            type="boolean",
            title="Load again",
            description="Load the file though another batch has brought the same bytes before",
        ),
        "accept": Param(
            None,
            type=["array", "null"],
            items={"type": "string", "enum": [check.name for check in CHECKS if check.severity == "fail"]},
            examples=[check.name for check in CHECKS if check.severity == "fail"],
            title="Checks to accept",
            description="Publish what is pending though these checks fail, once you have looked at the rows they found",
        ),
        "refresh": Param(
            "auto",
            enum=["auto", *REFRESHES],
            title="Refresh",
            description="auto: the fastest that is right. merge: pending loads, in place. union: previous rows and "
            "pending loads, swapped in. swap: all of raw, swapped in",
        ),
    },
    default_args={
        "owner": "warehouse",
        "retries": 3,
        "retry_delay": timedelta(seconds=10),
        "retry_exponential_backoff": True,
        "max_retry_delay": timedelta(minutes=5),
        "execution_timeout": timedelta(hours=2),
        "on_failure_callback": help_at("a-refresh-is-red"),
    },
)
def orders() -> None:
    @task(on_failure_callback=help_at("a-batch-can-not-be-made"))
    def generate_batch(params: Any = None, dag_run: Any = None, ti: Any = None) -> str:
        """Write the run's CSV file. The same run makes the same bytes."""
        from generator.orders import generate_orders  # NumPy and Faker: not for every parse of this file

        started = time.monotonic()
        url = f"{DATA.rstrip('/')}/raw/orders-{quote(dag_run.run_id, safe=':+')}.csv"
        size = generate_orders(stored(url), rows=params["rows"], seed=params["seed"], updated_at=batch_time(dag_run))
        say(ti, f"{url}: {params['rows']:,} orders, {size / 1e6:,.1f} MB in {time.monotonic() - started:.1f} s")
        return url

    # A bad file stays bad: only what may pass by itself is tried again.
    @task(
        outlets=[RAW],
        retry_policy=ExceptionRetryPolicy([RetryRule(BatchError, RetryAction.FAIL)]),
        on_failure_callback=help_at("a-load-is-red-the-file"),
    )
    def load_raw(
        url: Any, params: Any = None, dag_run: Any = None, ti: Any = None, outlet_events: Any = None
    ) -> dict[str, Any]:
        """COPY the file into raw.orders, exactly once: its rows and its row in raw.loads commit together."""
        with PostgresHook("de_dw").get_conn() as conn:
            load = load_batch(
                conn,
                table=RAW.name,
                batch_id=dag_run.run_id,
                path=stored(url),
                updated_at=batch_time(dag_run),
                max_rejects=params["max_rejects"],
                load_again=params["load_again"],
            )
        report = load.report(RAW.name)
        outlet_events[RAW].extra = report
        ti.xcom_push("summary", report["summary"])  # the loader has said it in the log
        return report

    @task(on_failure_callback=help_at("a-check-is-red"))
    def check_batch(params: Any = None, dag_run: Any = None, ti: Any = None) -> dict[str, Any]:
        """Ask each of sql/checks/ of the pending loads: `fail` stops here, stg stays as it is; `warn` is shown."""
        with PostgresHook("de_dw").get_conn() as conn:
            loads, results = check_pending(
                conn, table="orders_latest", checks=CHECKS, batch_id=dag_run.run_id, accept=params["accept"] or ()
            )
        return report_checks(ti, "orders_latest", loads, results)

    @task.branch
    def choose_refresh(params: Any = None, ti: Any = None) -> str:
        """Look how much is pending, and choose the cheapest refresh that is right."""
        refresh = cheapest_refresh(PostgresHook("de_dw"), "orders_latest", params["refresh"])
        ti.xcom_push("refresh", list(refresh))
        say(ti, f"{LATEST.name}: {refresh.kind}, because: {refresh.why}")
        return f"{refresh.kind}_latest"

    chosen = choose_refresh()
    for kind, (script, when) in REFRESHES.items():
        (
            chosen
            >> Label(when)
            >> SQLExecuteQueryOperator(
                task_id=f"{kind}_latest",
                doc_md=first_comment(SCRIPTS / script),
                conn_id="de_dw",
                # A part of the script, so that psql runs it without: refuse what check_batch has not looked at.
                sql=("SET de_dw.refresh_only = 'checked';\n" if CHECKS else "") + f"{{% include '{script}' %}}",
                autocommit=True,  # the script has its own BEGIN and COMMIT, and an ANALYZE after it
                handler=refresh_counts,
                hook_params={"log_sql": False, "enable_log_db_messages": True},
                post_execute=partial(report_refresh, table=LATEST, chooser="choose_refresh", checker="check_batch"),
                outlets=[LATEST],
            )
        )

    load_raw(generate_batch()) >> check_batch() >> chosen


without_deadline_in_tests(orders())
