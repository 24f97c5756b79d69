"""ADBC: PyArrow's CSV reader, block by block, into adbc_ingest: COPY in the binary format, in one transaction."""

import json
import os
import time

import adbc_driver_postgresql.dbapi as adbc
import pyarrow as pa
import pyarrow.csv as pa_csv

# The table's types: the binary format has no casts.
instant = pa.timestamp("us", "UTC")
types = {
    "order_id": pa.int64(),
    "quantity": pa.int32(),
    "unit_price": pa.decimal128(38, 2),
    "ordered_at": instant,
    "updated_at": instant,
}
text = ("customer_name", "customer_email", "product", "currency", "status")

started = time.perf_counter()
convert = pa_csv.ConvertOptions(column_types=types | dict.fromkeys(text, pa.string()))
with (
    pa_csv.open_csv(os.environ["BENCH_FILE"], convert_options=convert) as reader,
    adbc.connect(os.environ["BENCH_URL"]) as connection,
    connection.cursor() as cursor,
):
    cursor.adbc_ingest("orders", reader, mode="append", db_schema_name="raw")
    connection.commit()
print(json.dumps({"seconds": time.perf_counter() - started}))
