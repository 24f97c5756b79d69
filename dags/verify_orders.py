"""### Prove that stg.orders_latest is right

`verify_latest` compares every row of `stg.orders_latest` with a DISTINCT ON over all of `raw.orders`, byte by byte: it
is green with 0 missing, 0 extra and 0 different rows, and red with their numbers otherwise. It changes nothing, and may
run at any time: a merge does not notice, but a swap that meets it for more than a minute gives up, as with any long
reader, and is tried again. It costs about what a full refresh costs. By hand:
`psql -f sql/transforms/stg.orders_latest.verify.sql`.
"""

from datetime import timedelta
from functools import partial
from pathlib import Path

from airflow.providers.common.sql.operators.sql import SQLExecuteQueryOperator
from airflow.sdk import dag
from run_report import differences, help_at, report_verification, ui_url

ROOT = Path(__file__).resolve().parents[1]


@dag(
    schedule=None,
    max_active_runs=1,
    catchup=False,
    tags=["warehouse", "orders"],
    owner_links={"warehouse": ui_url("plugin/warehouse")},
    doc_md=__doc__,
    template_searchpath=[str(ROOT / "sql" / "transforms")],
    default_args={
        "owner": "warehouse",
        "retries": 3,
        "retry_delay": timedelta(seconds=10),
        "execution_timeout": timedelta(hours=2),
        "on_failure_callback": help_at("a-refresh-is-red"),
    },
)
def verify_orders() -> None:
    SQLExecuteQueryOperator(
        task_id="verify_latest",
        conn_id="de_dw",
        sql="stg.orders_latest.verify.sql",
        handler=partial(differences, "stg.orders_latest"),
        hook_params={"log_sql": False},
        post_execute=partial(report_verification, table="stg.orders_latest"),
    )


verify_orders()
