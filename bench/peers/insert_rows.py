"""Airflow's PostgresHook.insert_rows with the rows of csv.reader, 10,000 to a transaction.

With psycopg 3 it is executemany in pipeline mode, its fast path: fast_executemany is for psycopg2 only.
"""

import csv
import json
import logging
import os
import time

from airflow.providers.postgres.hooks.postgres import PostgresHook

logging.disable()

started = time.perf_counter()
hook = PostgresHook(postgres_conn_id="bench")
with open(os.environ["BENCH_FILE"], encoding="utf-8", newline="") as file:  # noqa: PTH123
    rows = csv.reader(file)
    columns = next(rows)
    hook.insert_rows("raw.orders", rows, target_fields=columns, commit_every=10_000, executemany=True)
print(json.dumps({"seconds": time.perf_counter() - started}))
