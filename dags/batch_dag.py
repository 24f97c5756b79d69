"""
`generate_batch` writes a CSV file, or `source` names some ──> `find_files` ──> `load_raw` (COPY FROM STDIN, for each
file) ──> **raw.{name}** ──> `check_batch` ──> `choose_refresh` ──> one of three refreshes (DISTINCT ON) ──>
**stg.{name}_latest**

| task | does | may run again, because |
|---|---|---|
| `generate_batch` | writes the run's CSV file, if it has no `source` | a run's timestamp and seed make the same bytes |
| `find_files` | lists what `source` names, without the files that the ledger knows | it changes nothing |
| `load_raw` | brings a file to `raw.{name}`, with a row in `raw.loads` | what the ledger has is not loaded again |
| `report_files` | is red when a file was refused, and says which and why | it changes nothing |
| `check_batch` | asks `sql/checks/` of all that is pending; a failed one stops | it adds to `ops.check_results` only |
| `choose_refresh` | looks how much is pending (param `refresh`: auto) | it changes nothing |
| `swap_latest` | all of raw, swapped in: the first time, or to mend stg | readers see the old rows or the new |
| `union_latest` | previous rows and pending loads, swapped in: for large batches | the same |
| `merge_latest` | pending loads only, in place: for small batches | what was applied is recorded with it |

**What it did:** each task says so in one sentence, in its log and in XCom under `summary`; *Assets* has it of
`raw.{name}` and `stg.{name}_latest`, and the page *Warehouse* shows all loads.

**If it fails:** the task's log names the cause: file, line, column and value of the bad records, the pid behind a
lock, the rows that a check found. Nothing is half-done; of several files those that are good are loaded and published.
Mend the cause and clear the task; a lost connection or a lock is tried again by itself. *Warehouse* shows what has been
loaded, what was not though its file was (param `max_rejects`), and what no refresh has applied yet; the DAG
`verify_{name}` proves that stg is right. docs/operations.md has every message and what to do.
"""

import os
import re
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
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
    get_current_context,
    task,
)
from airflow.sdk.exceptions import AirflowRescheduleException, AirflowSkipException
from batch_check import check_pending, find_checks
from batch_format import Format
from batch_load import BatchError, load_batch
from batch_source import find_files, new_files, open_file
from run_report import (
    differences,
    first_comment,
    help_at,
    no_fresh_batch,
    report_checks,
    report_found,
    report_landed,
    report_refresh,
    report_verification,
    say,
    task_states,
    ui_url,
    without_deadline_in_tests,
)
from stg_refresh import MERGE, REFRESHES, UNION, cheapest_refresh, refresh_counts, refresh_script

ROOT = Path(__file__).resolve().parents[1]
# Files that one run loads; those after them are the next run's. Airflow's core.max_map_length is 1024.
FILES = 1_000
# A file that is done with; and how long to wait for one that is not.
DONE = ("success", "failed", "upstream_failed", "skipped", "removed")
RECONSIDER = timedelta(seconds=2)
CHECKS = ROOT / "sql" / "checks"
SCRIPTS = ROOT / "sql" / "transforms"
sys.path.append(str(ROOT))  # generator/ is beside dags/

DEFAULTS = {
    "owner": "warehouse",
    "retries": 3,
    "retry_delay": timedelta(seconds=10),
    "retry_exponential_backoff": True,
    "max_retry_delay": timedelta(minutes=5),
    "execution_timeout": timedelta(hours=2),
    "on_failure_callback": help_at("a-refresh-is-red"),
}
SHARED: dict[str, Any] = {"max_active_runs": 1, "catchup": False, "default_args": DEFAULTS}


@dataclass(frozen=True)
class Dataset:
    """What one dataset has of its own, besides its SQL: raw.NAME, stg.NAME_latest and the transform of that name.

    :param name: of the DAG, and in the names of the tables.
    :param generated: generator/NAME.py makes a batch for each run that has no source. False: each run needs one.
    :param source: the files of a run that names none: a path, a glob or a URL, below WAREHOUSE_DATA or a folder of
        WAREHOUSE_SOURCES; {date} is the run's.
    :param format: of these files.
    :param schedule: when it runs by itself, as Airflow has it: "*/5 * * * *", "@daily". None: as WAREHOUSE_SCHEDULE
        says; without that when it is triggered.
    :param fresh_within: how long a run may take until it is reported as late.
    :raises ValueError: the name is none that needs no quotes in SQL.
    """

    name: str
    generated: bool = False
    source: str | None = None
    format: Format = field(default_factory=Format)
    schedule: Any = None
    fresh_within: timedelta = timedelta(hours=1)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z_][a-z0-9_]{0,39}", self.name):
            raise ValueError(f"{self.name!r} is no name of a dataset: small letters, digits and _, up to 40 of them")


def locations() -> list[str]:
    """Where files may be loaded from, and first where batches are made: folders, or URLs such as s3://aws_default@bucket."""
    made = os.environ.get("WAREHOUSE_DATA") or str(ROOT / "data")
    return [made.rstrip("/") or "/", *os.environ.get("WAREHOUSE_SOURCES", "").replace(",", " ").split()]


def schedule_of(dataset: Dataset) -> Any:
    """When it runs by itself."""
    return dataset.schedule or os.environ.get("WAREHOUSE_SCHEDULE") or None


def batch_time(dag_run: Any) -> datetime:
    """The instant that a run stands for, however often it is repeated; a run may have no logical date."""
    return dag_run.logical_date or dag_run.run_after  # type: ignore[no-any-return]


def stored(url: str) -> Any:
    """The path of a batch file. Only tasks may ask: of a URL it looks the connection up."""
    return ObjectStoragePath(url) if "://" in url else Path(url)


def wait_for_turn(ti: Any) -> None:
    """Let the files of a run that are before this one be loaded first, though one of them has to be tried again.

    Airflow's scheduler takes them in this order, but goes on while one waits for its retry; dag.test takes any order.

    :raises AirflowRescheduleException: one is not done. The task is asked again, and holds no worker meanwhile.
    """
    if ti.map_index < 1:
        return
    found = task_states(ti, ti.task_id)
    before = [found.get(f"{ti.task_id}_{index}") for index in range(ti.map_index)]
    if any(state not in DONE for state in before):
        raise AirflowRescheduleException(datetime.now(UTC) + RECONSIDER)  # type: ignore[no-untyped-call]


def run_params(dataset: Dataset, fail_checks: list[str]) -> dict[str, Param]:
    """What a run can be told, in the order of the form."""
    generated = {
        "rows": Param(
            100,
            type="integer",
            minimum=1,
            maximum=50_000_000,
            title="Rows",
            description="Keys in the batch that is made, 1 to this number, 1 to 50 million",
        ),
        "seed": Param(
            0,
            type="integer",
            minimum=0,
            maximum=2**32 - 1,
            title="Seed",
            description="Which: the same seed makes new versions of the same keys",
        ),
    }
    return (generated if dataset.generated else {}) | {
        "source": Param(
            dataset.source,
            type=["string", "null"] if dataset.generated or dataset.source else "string",
            title="Source",
            description="Load these files instead: a path below WAREHOUSE_DATA, a glob such as landing/*.csv, a URL; "
            "{date} is the run's. What the ledger knows is left out",
        ),
        "max_rejects": Param(
            "0",
            anyOf=[  # with a list of types the form would have a box of many lines
                {"type": "string", "pattern": r"^\s*([0-9]+|(100|[0-9]{1,2}(\.[0-9]+)?)\s*%)\s*$"},
                {"type": "integer", "minimum": 0},
            ],
            title="Bad records allowed",
            description="A number, or a percentage such as 1%. More fail the file; so many go to "
            f"raw.{dataset.name}_rejects",
        ),
        "load_again": Param(
            False,
            type="boolean",
            title="Load again",
            description="Load a file though another batch has brought the same bytes before",
        ),
        "accept": Param(
            None,
            type=["array", "null"],
            items={"type": "string", "enum": fail_checks},
            examples=fail_checks,
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
    }


def batch_dag(dataset: Dataset, doc: str | None = None) -> None:
    """Make the DAG of a dataset, and the DAG verify_NAME that proves its staging table right.

    :param doc: what is shown of it before the description of the flow.
    :raises ValueError: a check in sql/checks/ is not called like one.
    """
    name, latest_name = dataset.name, f"{dataset.name}_latest"
    raw, latest = Asset(f"raw.{name}", group="warehouse"), Asset(f"stg.{latest_name}", group="warehouse")
    checks = find_checks(CHECKS, latest_name)
    roots = locations()
    shown = SHARED | {"tags": ["warehouse", name], "owner_links": {"warehouse": ui_url("plugin/warehouse")}}

    @dag(
        dag_id=name,
        schedule=schedule_of(dataset),
        doc_md=f"{doc or f'### {name}'}\n{(__doc__ or '').replace('{name}', name)}",
        template_searchpath=[str(SCRIPTS)],
        deadline=DeadlineAlert(
            name="no fresh batch",
            reference=DeadlineReference.DAGRUN_QUEUED_AT,
            interval=dataset.fresh_within,
            callback=SyncCallback(no_fresh_batch, {"table": latest.name}),
        ),
        params=run_params(dataset, [check.name for check in checks if check.severity == "fail"]),
        **shown,
    )
    def flow() -> None:
        @task(on_failure_callback=help_at("a-batch-can-not-be-made"))
        def generate_batch(params: Any = None, dag_run: Any = None, ti: Any = None) -> str:
            """Write the run's CSV file. The same run makes the same bytes."""
            if params["source"]:
                raise AirflowSkipException(f"the run has a source: {params['source']}")
            from generator import generator_of  # NumPy and Faker: not for every parse of this file

            started = time.monotonic()
            url = f"{roots[0]}/raw/{name}-{quote(dag_run.run_id, safe=':+')}.csv"
            size = generator_of(name)(
                stored(url), rows=params["rows"], seed=params["seed"], updated_at=batch_time(dag_run)
            )
            say(ti, f"{url}: {params['rows']:,} {name}, {size / 1e6:,.1f} MB in {time.monotonic() - started:.1f} s")
            return url

        @task(
            task_id="find_files",
            trigger_rule="none_failed",
            retry_policy=ExceptionRetryPolicy([RetryRule(BatchError, RetryAction.FAIL)]),
            on_failure_callback=help_at("a-source-is-refused"),
        )
        def find(made: Any = None, params: Any = None, dag_run: Any = None, ti: Any = None) -> list[dict[str, Any]]:
            """List the files of `source` in the order of their names, without those that the ledger knows."""
            if not params["source"]:
                say(ti, f"{made}, made by this run")
                return [{"url": made, "name": dag_run.run_id}]
            source = params["source"].replace("{date}", f"{batch_time(dag_run):%Y-%m-%d}")
            files = find_files(source, roots=roots, open_path=stored)
            with PostgresHook("de_dw").get_conn() as conn:
                new, known = new_files(conn, raw.name, files)
            report_found(ti, source, new, known, FILES)
            return [{"url": file.url, "name": file.name} for file in new[:FILES]]

        # A bad file stays bad, so does a wrong Format (ValueError): only what may pass by itself is tried again.
        # One at a time, in the order of their names: of two versions with one updated_at that of the last is published.
        @task(
            outlets=[raw],
            map_index_template="{{ file_name }}",
            max_active_tis_per_dagrun=1,
            retry_policy=ExceptionRetryPolicy(
                [RetryRule(BatchError, RetryAction.FAIL), RetryRule(ValueError, RetryAction.FAIL)]
            ),
            on_failure_callback=help_at("a-load-is-red-the-file"),
        )
        def load_raw(
            file: Any, params: Any = None, dag_run: Any = None, ti: Any = None, outlet_events: Any = None
        ) -> dict[str, Any]:
            """COPY a file into the raw table, exactly once: its rows and its row in raw.loads commit together."""
            wait_for_turn(ti)
            get_current_context()["file_name"] = file["name"]  # type: ignore[typeddict-unknown-key]
            is_made = not params["source"]
            try:
                with PostgresHook("de_dw").get_conn() as conn:
                    load = load_batch(
                        conn,
                        table=raw.name,
                        batch_id=file["name"],
                        path=stored(file["url"]) if is_made else open_file(file["url"], roots=roots, open_path=stored),
                        updated_at=batch_time(dag_run) if is_made or "updated_at" in dataset.format.optional else None,
                        run_id=dag_run.run_id,
                        max_rejects=params["max_rejects"],
                        load_again=params["load_again"],
                        file_format=Format() if is_made else dataset.format,
                    )
            except BatchError as error:
                # The UI does not wrap lines: without the folders the reason is seen.
                rest = str(error).removeprefix(file["url"])
                ti.xcom_push("refused", file["name"] + (rest if rest != str(error) else f": {error}"))
                raise
            report = load.report(raw.name)
            outlet_events[raw].extra = report
            ti.xcom_push("summary", report["summary"])  # the loader has said it in the log
            return report | {"file": file["name"]}

        @task(trigger_rule="all_done", retries=0, on_failure_callback=help_at("a-load-is-red-the-file"))
        def report_files(files: Any = None, ti: Any = None) -> dict[str, Any]:
            """Say what became of each file; red when one was not loaded, though others were."""
            return report_landed(ti, raw.name, files, "find_files", "load_raw")

        # Also when nothing was loaded: what an earlier run could not publish does not have to wait for a new file.
        @task(trigger_rule="all_done", on_failure_callback=help_at("a-check-is-red"))
        def check_batch(params: Any = None, dag_run: Any = None, ti: Any = None) -> dict[str, Any]:
            """Ask each of sql/checks/ of the pending loads: `fail` stops here, stg stays as it is; `warn` is shown."""
            has_reason = params["refresh"] != "auto" or "success" in task_states(ti, "load_raw").values()
            with PostgresHook("de_dw").get_conn() as conn:
                loads, results = check_pending(
                    conn, table=latest_name, checks=checks, batch_id=dag_run.run_id, accept=params["accept"] or ()
                )
            if not loads and not has_reason:
                raise AirflowSkipException(f"{latest.name}: nothing was loaded, and nothing waits from earlier runs")
            return report_checks(ti, latest_name, loads, results)

        @task.branch
        def choose_refresh(params: Any = None, ti: Any = None) -> str:
            """Look how much is pending, and choose the cheapest refresh that is right."""
            refresh = cheapest_refresh(PostgresHook("de_dw"), latest_name, params["refresh"])
            ti.xcom_push("refresh", list(refresh))
            say(ti, f"{latest.name}: {refresh.kind}, because: {refresh.why}")
            return f"{refresh.kind}_latest"

        chosen = choose_refresh()
        docs = {"swap": first_comment(SCRIPTS / f"stg.{latest_name}.sql"), "union": UNION, "merge": MERGE}
        for kind, when in REFRESHES.items():
            script = refresh_script(kind, latest_name)
            (
                chosen
                >> Label(when)
                >> SQLExecuteQueryOperator(
                    task_id=f"{kind}_latest",
                    doc_md=docs[kind],
                    conn_id="de_dw",
                    # A part of the script, so that psql runs it without: refuse what check_batch has not looked at.
                    sql=("SET de_dw.refresh_only = 'checked';\n" if checks else "") + script,
                    autocommit=True,  # the script has its own BEGIN and COMMIT, and an ANALYZE after it
                    handler=refresh_counts,
                    hook_params={"log_sql": False, "enable_log_db_messages": True},
                    post_execute=partial(report_refresh, table=latest, chooser="choose_refresh", checker="check_batch"),
                    outlets=[latest],
                )
            )

        files = find(generate_batch()) if dataset.generated else find()
        loaded = load_raw.expand(file=files)
        loaded >> report_files(files)
        loaded >> check_batch() >> chosen

    without_deadline_in_tests(flow())

    @dag(dag_id=f"verify_{name}", schedule=None, doc_md=VERIFICATION.replace("{name}", name), **shown)
    def verification() -> None:
        SQLExecuteQueryOperator(
            task_id="verify_latest",
            conn_id="de_dw",
            sql=VERIFY.format(latest_name),
            handler=partial(differences, latest.name),
            hook_params={"log_sql": False},
            post_execute=partial(report_verification, table=latest.name),
        )

    verification()


VERIFY = "SELECT missing, extra, different, compared FROM stg.verify('{}')"
VERIFICATION = """### Prove that stg.{name}_latest is right

`verify_latest` compares every row of `stg.{name}_latest` with a DISTINCT ON over all of `raw.{name}`, byte by byte: it
is green with 0 missing, 0 extra and 0 different rows, and red with their numbers otherwise. It changes nothing, and may
run at any time: a merge does not notice, but a swap that meets it for more than a minute gives up, as with any long
reader, and is tried again. It costs about what a full refresh costs. By hand:
`SELECT * FROM stg.verify('{name}_latest')`.
"""
