"""make bench ROWS=10000000: runs of the DAG on an embedded server of their own, with each task's seconds and memory.

The figures go to the terminal. docs/performance.md says what they were on which machine.
"""

import argparse
import os
import resource
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

STATE = Path(__file__).resolve().parents[1] / ".run" / "bench-dag"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.dag_at_scale", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="orders in each batch")
    parser.add_argument("--runs", type=int, default=2, help="batches; the second meets a full table")
    arguments = parser.parse_args()

    shutil.rmtree(STATE, ignore_errors=True)
    for name in ("WAREHOUSE_URL", "AIRFLOW_CONN_DE_DW", "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"):
        os.environ.pop(name, None)  # raw rows can't be taken back, so never into somebody's warehouse
    os.environ |= {"LOCAL_STATE": str(STATE), "WAREHOUSE_DATA": str(STATE / "data")}
    from local.__main__ import DEFAULT_PORT, migrate_warehouse, open_databases
    from local.console import Console
    from local.demo import load_dag, run_dag

    STATE.mkdir(parents=True)
    console = Console(STATE / "bench.log")
    try:
        with ExitStack() as stack:
            env = open_databases(console, stack, DEFAULT_PORT)
            migrate_warehouse(console, env)
            dag = load_dag(console, env)
            for number in range(1, arguments.runs + 1):
                run = run_dag(console, dag, f"run {number}: {arguments.rows:,} rows", {"rows": arguments.rows})
                ran = [
                    instance for instance in run.get_task_instances() if instance.state == "success"
                ]  # others were skipped
                for task in sorted(ran, key=lambda instance: instance.start_date):
                    rate = arguments.rows / task.duration
                    console.say(f"    {task.task_id:<20}{task.duration:8.1f} s{rate:14,.0f} rows/s")
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
                console.say(f"    peak memory of the process that ran the tasks, Airflow included: {peak} MiB")
    finally:
        shutil.rmtree(STATE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
