"""### Land one batch of orders, publish the latest row of each

`generate_batch` ──> data/raw/orders-RUN.csv (or s3://...) ──> `load_raw` (COPY FROM STDIN) ──> **raw.orders** ──>
`choose_refresh` ──> one of three refreshes (DISTINCT ON) ──> **stg.orders_latest**

| task | does | may run again, because |
|---|---|---|
| `generate_batch` | writes the run's CSV file | a run's timestamp and seed make the same bytes |
| `load_raw` | brings it to `raw.orders`, with a row in `raw.loads` | what the ledger has is not loaded again |
| `choose_refresh` | looks how much is pending (param `refresh`: auto) | it changes nothing |
| `swap_latest` | all of raw, swapped in: the first time, or to mend stg | readers see the old rows or the new |
| `union_latest` | previous rows and pending loads, swapped in: for large batches | the same |
| `merge_latest` | pending loads only, in place: for small batches | what was applied is recorded with it |

**If it fails:** the task's log names the cause: file, line, column and value of the bad records, the pid behind a lock.
Nothing is half-done. Mend the cause and clear the task; a lost connection or a lock is tried again by itself.
`SELECT * FROM raw.loads ORDER BY load_id DESC` in psql shows what has been loaded, `raw.orders_rejects` what was not
though its file was (param `max_rejects`), `stg.pending_loads` what no refresh has applied yet. The DAG `verify_orders`
proves that stg is right. docs/operations.md has every message and what to do.
"""

import os
import sys
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from airflow.providers.common.sql.operators.sql import SQLExecuteQueryOperator
from airflow.providers.postgres.hooks.postgres import PostgresHook
from airflow.sdk import Asset, ExceptionRetryPolicy, Label, ObjectStoragePath, Param, RetryAction, RetryRule, dag, task
from batch_load import BatchError, load_batch
from stg_refresh import cheapest_refresh, report_refresh, rows_written

ROOT = Path(__file__).resolve().parents[1]
DATA = os.environ.get("WAREHOUSE_DATA") or str(ROOT / "data")  # a folder, or a URL such as s3://aws_default@bucket
sys.path.append(str(ROOT))  # generator/ is beside dags/

RAW = Asset("raw.orders", group="warehouse")
LATEST = Asset("stg.orders_latest", group="warehouse")
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
    tags=["warehouse"],
    doc_md=__doc__,
    template_searchpath=[str(ROOT / "sql" / "transforms")],
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
            description="A number, or a percentage such as 1%. They are kept in raw.orders_rejects, the others loaded",
        ),
        "load_again": Param(
            False,
            type="boolean",
            title="Load again",
            description="Load the file though another batch has brought the same bytes before",
        ),
        "refresh": Param(
            "auto",
            enum=["auto", *REFRESHES],
            title="Refresh",
            description="swap: all of raw, swapped in. union: previous rows and pending loads, swapped in. "
            "merge: pending loads, in place. auto: the fastest that is right",
        ),
    },
    default_args={
        "retries": 3,
        "retry_delay": timedelta(seconds=10),
        "retry_exponential_backoff": True,
        "max_retry_delay": timedelta(minutes=5),
        "execution_timeout": timedelta(hours=2),
    },
)
def orders() -> None:
    @task
    def generate_batch(params: Any = None, dag_run: Any = None) -> str:
        from generator.orders import generate_orders  # NumPy and Faker: not for every parse of this file

        url = f"{DATA.rstrip('/')}/raw/orders-{quote(dag_run.run_id, safe=':+')}.csv"
        generate_orders(stored(url), rows=params["rows"], seed=params["seed"], updated_at=batch_time(dag_run))
        return url

    # A bad file stays bad: only what may pass by itself is tried again.
    @task(outlets=[RAW], retry_policy=ExceptionRetryPolicy([RetryRule(BatchError, RetryAction.FAIL)]))
    def load_raw(url: Any, params: Any = None, dag_run: Any = None, outlet_events: Any = None) -> dict[str, Any]:
        with PostgresHook("de_dw").get_conn() as conn:
            load = load_batch(
                conn,
                table="raw.orders",
                batch_id=dag_run.run_id,
                path=stored(url),
                updated_at=batch_time(dag_run),
                max_rejects=params["max_rejects"],
                load_again=params["load_again"],
            )
        outlet_events[RAW].extra = asdict(load)
        return asdict(load)

    @task.branch
    def choose_refresh(params: Any = None, ti: Any = None) -> str:
        refresh = cheapest_refresh(PostgresHook("de_dw"), "orders_latest", params["refresh"])
        ti.xcom_push("refresh", list(refresh))
        return f"{refresh.kind}_latest"

    chosen = choose_refresh()
    for kind, (script, when) in REFRESHES.items():
        (
            chosen
            >> Label(when)
            >> SQLExecuteQueryOperator(
                task_id=f"{kind}_latest",
                conn_id="de_dw",
                sql=script,
                autocommit=True,  # the script has its own BEGIN and COMMIT, and an ANALYZE after it
                handler=rows_written,
                hook_params={"log_sql": False, "enable_log_db_messages": True},
                post_execute=report_refresh,
                outlets=[LATEST],
            )
        )

    load_raw(generate_batch()) >> chosen


orders()
