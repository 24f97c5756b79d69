"""Three runs of the DAG `orders` in this process: no scheduler, no API server, the same tasks and the same database."""

import gc
import os
import re
import signal
from itertools import takewhile
from pathlib import Path
from typing import Any

import psycopg

from local.console import Console, Failure
from local.settings import ROOT

RUNS = 3
ORDERS = 100  # the DAG's default
# What the given batches brought to raw.orders and to stg.orders_latest, one row per figure.
COUNTS = """
WITH demo AS (
    SELECT load_id
    FROM raw.loads
    WHERE table_name = 'raw.orders' AND batch_id = any(%(batch_ids)s)
),

landed AS (
    SELECT
        count(*) AS row_count,
        count(DISTINCT updated_at) AS batches,
        count(DISTINCT order_id) AS orders
    FROM raw.orders
    WHERE load_id IN (SELECT load_id FROM demo)
),

published AS (
    SELECT
        count(*) AS row_count,
        count(DISTINCT order_id) AS orders,
        count(*) FILTER (WHERE load_id = (SELECT max(load_id) FROM demo)) AS from_latest
    FROM stg.orders_latest
    WHERE order_id IN (SELECT order_id FROM raw.orders WHERE load_id IN (SELECT load_id FROM demo))
)

SELECT
    figure.label,
    figure.value
FROM landed
CROSS JOIN published
CROSS JOIN LATERAL (
    VALUES
    (1, 'raw.orders         rows', landed.row_count),
    (2, '                   distinct updated_at', landed.batches),
    (3, '                   distinct order_id', landed.orders),
    (4, 'stg.orders_latest  rows', published.row_count),
    (5, '                   distinct order_id', published.orders),
    (6, '                   rows from the latest batch', published.from_latest)
) AS figure (place, label, value)
ORDER BY figure.place ASC;
"""
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT")
EXPECTED = [RUNS * ORDERS, RUNS, ORDERS, ORDERS, ORDERS, ORDERS]


def run_demo(console: Console, env: dict[str, str]) -> None:
    """Three runs, then the figures.

    :raises Failure: a run failed, or the figures are not what they must be.
    """
    dag = load_dag(console, env)
    from airflow.settings import dispose_orm

    batch_ids = [run_dag(console, dag, f"run {number} of DAG orders", {}).run_id for number in range(1, RUNS + 1)]
    dispose_orm()  # before its database stops
    with psycopg.connect(env["WAREHOUSE_URL"]) as conn:
        figures = conn.execute(COUNTS, {"batch_ids": batch_ids}).fetchall()
        (in_all,) = conn.execute("SELECT count(*) FROM raw.orders").fetchone() or (0,)
    console.say()
    for label, value in figures:
        console.say(f"  {label:<48}{value:>6}")
    if in_all != RUNS * ORDERS:
        console.say(f"\n  These {RUNS} runs only: raw.orders keeps the earlier ones too, {in_all:,} rows in all.")
    if [value for _, value in figures] != EXPECTED:
        raise Failure(f"these figures should be {EXPECTED}")
    # Python would spend seconds on taking Airflow's objects apart at exit.
    gc.freeze()


def run_once(console: Console, env: dict[str, str], name: str, conf: dict[str, Any]) -> None:
    """One run of a DAG, and what each task says of it.

    :param conf: its params.
    :raises Failure: a task failed, or there is no such DAG, or it has no such param.
    """
    dag = load_dag(console, env, name)
    if strange := sorted(conf.keys() - dag.params.keys()):
        raise Failure(f"{name} has no params {', '.join(strange)}, but {', '.join(dag.params) or 'none'}")
    from airflow.settings import dispose_orm

    try:
        run_dag(console, dag, f"run of DAG {name}", conf, say=True)
    finally:
        dispose_orm()
        gc.freeze()


def load_dag(console: Console, env: dict[str, str], name: str = "orders") -> Any:
    """Make Airflow's database, if there is none, and return a DAG.

    :raises Failure: there is no such DAG, or a file can't be imported.
    """
    os.environ.update(env)
    # Airflow makes millions of objects that stay. Looking for garbage among them took a third of the demo's time.
    gc.set_threshold(200_000, 50, 1000)
    with console.step("Airflow ready"):
        from airflow.dag_processing.dagbag import BundleDagBag
        from airflow.utils.db import initdb

        initdb()
        bag = BundleDagBag(ROOT / "dags", bundle_path=ROOT / "dags", bundle_name="dags-folder")
        if bag.import_errors:
            raise Failure("\n".join(bag.import_errors.values()))
        if name not in bag.dags:
            raise Failure(f"there is no DAG {name}, but {', '.join(sorted(bag.dags))}")
        dag = bag.dags[name]
        for task in dag.tasks:
            task.retries = 0  # somebody waits at the terminal: say at once what is wrong
    return dag


def run_dag(console: Console, dag: Any, step: str, conf: dict[str, Any], say: bool = False) -> Any:
    """Run the DAG in this process and return its run.

    :param say: what its tasks say of it, too.
    :raises Failure: a task failed; with its exception.
    """
    run: Any = None
    begin = console.log.stat().st_size
    try:
        with console.step(step):
            run = dag.test(logical_date=None, run_conf=conf)
            if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
                raise KeyboardInterrupt  # it came while a task ran, and Airflow took it for the task's failure
            if run.state != "success":
                failed = dict.fromkeys(task.task_id for task in run.get_task_instances() if task.state == "failed")
                raise Failure(f"task {', '.join(failed)} failed: {cause(console.log, begin)}")
    finally:
        for line in sentences(run) if say and run else []:
            console.say(f"    {line}")
    return run


def sentences(run: Any) -> list[str]:
    """What the tasks of a run say that they did, or which file they refused and why, in the order of their end."""
    done = [task for task in run.get_task_instances() if task.state in ("success", "failed")]
    said = [
        (task.end_date, f"{task.task_id}: {prefix}{text}")
        for task in done
        for key, prefix in {"summary": "", "refused": "refused: "}.items()
        if (text := task.xcom_pull(task_ids=task.task_id, key=key, map_indexes=task.map_index))
    ]
    return [sentence for _, sentence in sorted(said)]


def cause(log: Path, begin: int) -> str:
    """The exception of the first task that failed, from the log: Airflow keeps it nowhere else.

    :param begin: where the run's part of the log begins, in bytes.
    """
    after = log.read_bytes()[begin:].decode(errors="replace").partition("Task failed with exception")[2]
    trace = list(takewhile(lambda line: not TIMESTAMP.match(line), after.splitlines()[1:]))
    message = [line for line in trace if line and not line.startswith((" ", "Traceback"))]
    return "\n".join(message) or "see the log"
