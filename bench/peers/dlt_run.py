"""dlt in the two ways of its documentation that were fastest here, into a table that it makes: `import` or `arrow`.

import: the CSV file itself is handed to COPY, with given column types. arrow: PyArrow reads it block by block, dlt
writes the tables to Parquet files and loads these by ADBC. (Files of its own in CSV took twice as long as Parquet.)
"""

import json
import os
import sys
import time

import adbc_driver_postgresql.dbapi  # noqa: F401  # dlt would import what it needs while the clock runs
import dlt
import psycopg2  # noqa: F401
import pyarrow as pa
import pyarrow.csv as pa_csv
from dlt.destinations import postgres

path = os.environ["BENCH_FILE"]
columns = {
    "order_id": {"data_type": "bigint", "nullable": False},
    "customer_name": {"data_type": "text"},
    "customer_email": {"data_type": "text"},
    "product": {"data_type": "text"},
    "quantity": {"data_type": "bigint"},
    "unit_price": {"data_type": "decimal", "precision": 38, "scale": 9},
    "currency": {"data_type": "text"},
    "status": {"data_type": "text"},
    "ordered_at": {"data_type": "timestamp"},
    "updated_at": {"data_type": "timestamp", "nullable": False},
}
to_arrow = {
    "bigint": pa.int64(),
    "text": pa.string(),
    "decimal": pa.decimal128(38, 9),
    "timestamp": pa.timestamp("us", "UTC"),
}
convert = pa_csv.ConvertOptions(column_types={name: to_arrow[it["data_type"]] for name, it in columns.items()})
# Few large pieces: by default a block has 1 MiB, and each piece goes through dlt by itself.
read = pa_csv.ReadOptions(block_size=64 << 20)


@dlt.resource(name="orders", columns=columns, write_disposition="append")
def arrow_orders():
    with pa_csv.open_csv(path, convert_options=convert, read_options=read) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch])


@dlt.resource(name="orders", columns=columns, write_disposition="append")
def file_orders():
    yield dlt.mark.with_file_import(path, "csv")


# dlt wants a host and a password; the host in the URL's query, the socket, is the one that counts.
url = os.environ["BENCH_URL"].replace("postgres@/", "postgres:none@localhost:5432/")

started = time.perf_counter()
pipeline = dlt.pipeline(
    "bench",
    pipelines_dir=os.environ["BENCH_WORK"],
    destination=postgres(credentials=url, csv_format={"include_header": True}),
    dataset_name="dlt",
)
if sys.argv[1] == "import":
    pipeline.run(file_orders())
else:
    pipeline.run(arrow_orders(), loader_file_format="parquet")
print(json.dumps({"seconds": time.perf_counter() - started}))
