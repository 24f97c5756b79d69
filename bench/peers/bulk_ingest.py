"""pg-bulk-ingest: the rows of csv.reader, all in one batch, into a table that it makes."""

import csv
import json
import os
import time

import psycopg  # noqa: F401  # SQLAlchemy would import it while the clock runs
import sqlalchemy as sa
from pg_bulk_ingest import ingest

TYPES = {
    "order_id": sa.BigInteger,
    "customer_name": sa.Text,
    "customer_email": sa.Text,
    "product": sa.Text,
    "quantity": sa.Integer,
    "unit_price": sa.Numeric,
    "currency": sa.Text,
    "status": sa.Text,
    "ordered_at": sa.DateTime(timezone=True),
    "updated_at": sa.DateTime(timezone=True),
}
metadata = sa.MetaData()
orders = sa.Table("orders", metadata, *(sa.Column(name, kind) for name, kind in TYPES.items()), schema="bulk_ingest")


def batches(high_watermark):
    with open(os.environ["BENCH_FILE"], encoding="utf-8", newline="") as file:  # noqa: PTH123
        reader = csv.reader(file)
        next(reader)
        # The strings as they are: it would only make strings of numbers and times again.
        yield None, None, ((orders, row) for row in reader)


url = os.environ["BENCH_URL"].replace("postgresql:", "postgresql+psycopg:", 1)

started = time.perf_counter()
with sa.create_engine(url).connect() as connection:
    ingest(connection, metadata, batches)
print(json.dumps({"seconds": time.perf_counter() - started}))
