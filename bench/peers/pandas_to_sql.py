"""pandas.read_csv and DataFrame.to_sql, chunk by chunk in one transaction.

plain: pandas' default, executemany. multi: many rows in each INSERT. copy: a callable that writes the rows as CSV and
hands them to COPY, which is the example in pandas' documentation of to_sql.
"""

import csv
import io
import json
import os
import sys
import time

import pandas as pd
import psycopg  # noqa: F401  # SQLAlchemy would import it while the clock runs
import sqlalchemy as sa


def copy_rows(table, connection, columns, rows):
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    text.seek(0)
    names = ", ".join(f'"{name}"' for name in columns)
    query = f'COPY "{table.schema}"."{table.name}" ({names}) FROM STDIN WITH CSV'
    with connection.connection.cursor() as cursor, cursor.copy(query) as copy:
        while block := text.read(65_536):
            copy.write(block)


# An INSERT takes 65,535 parameters at most, and a row has ten; 50 rows or 5,000 took the same time.
how = {"plain": {}, "multi": {"method": "multi", "chunksize": 1_000}, "copy": {"method": copy_rows}}[sys.argv[1]]
url = os.environ["BENCH_URL"].replace("postgresql:", "postgresql+psycopg:", 1)

started = time.perf_counter()
with sa.create_engine(url).begin() as connection:
    for frame in pd.read_csv(os.environ["BENCH_FILE"], parse_dates=["ordered_at", "updated_at"], chunksize=100_000):
        frame.to_sql("orders", connection, schema="raw", if_exists="append", index=False, **how)
print(json.dumps({"seconds": time.perf_counter() - started}))
