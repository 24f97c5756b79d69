"""python -m bench.feeds [--scale 1]: feeds that nobody here wrote, through the DAG, counted against their source.

TPC-H's orders and lineitem, as tpchgen-cli makes them (1.5 and 6 million rows at scale 1), and the airports of the
package airportsdata. Each becomes a dataset of a copy of this tree, as docs/adding-a-dataset.md says, on an embedded
server of its own. The figures go to the terminal. Exit code 1 when counts, sums or the verification say that something
is wrong.
"""

import argparse
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pyarrow as pa
from pyarrow import csv

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / ".run" / "bench-feeds"


class Feed(NamedTuple):
    """:param columns: names and types, but for updated_at, which the run gives.
    :param key: columns of the key.
    :param amount: a column to add up, and its type.
    """

    columns: dict[str, str]
    key: tuple[str, ...]
    amount: str
    delimiter: str


FEEDS = {
    "tpch_orders": Feed(
        {
            "o_orderkey": "bigint",
            "o_custkey": "bigint",
            "o_orderstatus": "text",
            "o_totalprice": "numeric",
            "o_orderdate": "date",
            "o_orderpriority": "text",
            "o_clerk": "text",
            "o_shippriority": "integer",
            "o_comment": "text",
        },
        ("o_orderkey",),
        "o_totalprice",
        "|",
    ),
    "tpch_lineitem": Feed(
        {
            "l_orderkey": "bigint",
            "l_partkey": "bigint",
            "l_suppkey": "bigint",
            "l_linenumber": "integer",
            "l_quantity": "numeric",
            "l_extendedprice": "numeric",
            "l_discount": "numeric",
            "l_tax": "numeric",
            "l_returnflag": "text",
            "l_linestatus": "text",
            "l_shipdate": "date",
            "l_commitdate": "date",
            "l_receiptdate": "date",
            "l_shipinstruct": "text",
            "l_shipmode": "text",
            "l_comment": "text",
        },
        ("l_orderkey", "l_linenumber"),
        "l_extendedprice",
        "|",
    ),
    "airports": Feed(
        {
            "icao": "text",
            "iata": "text",
            "name": "text",
            "city": "text",
            "subd": "text",
            "country": "text",
            "elevation": "numeric",
            "lat": "numeric",
            "lon": "numeric",
            "tz": "text",
            "lid": "text",
        },
        ("icao",),
        "elevation",
        ",",
    ),
}
UPDATED_AT = "timestamptz NOT NULL DEFAULT nullif(current_setting('de_dw.updated_at', true), '')::timestamptz"
CREATE = "SELECT raw.create_dataset('{}');\n"
DAG = '''"""### {name}"""

from batch_dag import Dataset, batch_dag  # the flow, as an Airflow DAG
from batch_format import Format

FORMAT = Format(delimiter="{delimiter}", optional=("updated_at",))
batch_dag(Dataset("{name}", source="feeds/{name}", format=FORMAT), __doc__)
'''


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.feeds", description=__doc__)
    parser.add_argument("--scale", default="1", help="TPC-H's scale factor (default: %(default)s)")
    parser.add_argument("--state", type=Path, default=STATE, help="folder for all of it, which is removed")
    parser.add_argument("--in-copy", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_copy:
        return run_feeds(arguments.state)

    state = arguments.state.resolve()
    shutil.rmtree(state, ignore_errors=True)
    try:
        tree = copy_tree(state / "tree")
        make_feeds(state / "data" / "feeds", arguments.scale)
        interferes = ("WAREHOUSE_", "AIRFLOW")  # raw rows can't be taken back, so never into somebody's warehouse
        env = {name: value for name, value in os.environ.items() if not name.startswith(interferes)}
        env |= {"LOCAL_STATE": str(state / "state"), "WAREHOUSE_DATA": str(state / "data")}
        command = [sys.executable, "-m", "bench.feeds", "--in-copy", "--state", str(state)]
        return subprocess.run(command, cwd=tree, env=env, check=False).returncode
    finally:
        shutil.rmtree(state, ignore_errors=True)


def copy_tree(tree: Path) -> Path:
    """A copy of what git knows, with the files of the datasets."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    for name, feed in FEEDS.items():
        revise(tree, f"create raw {name}", create_raw(name, feed), f"SELECT raw.drop_dataset('{name}');\n")
        revise(tree, f"create stg {name} latest", create_latest(name, feed), f"SELECT stg.drop_latest('{name}');\n")
        (tree / "sql" / "transforms" / f"stg.{name}_latest.sql").write_text(transform(name, feed))
        (tree / "dags" / f"{name}.py").write_text(DAG.format(name=name, delimiter=feed.delimiter))
    return tree


def revise(tree: Path, message: str, up: str, down: str) -> None:
    command = [sys.executable, "-m", "alembic", "revision", "-m", message]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    stem = message.replace(" ", "_")
    for direction, script in (("up", up), ("down", down)):
        (path,) = (tree / "sql" / "ddl").glob(f"*_{stem}.{direction}.sql")
        path.write_text(script)


def create_raw(name: str, feed: Feed) -> str:
    columns = ",\n".join(
        f"    {column} {type_}{' NOT NULL' if column in feed.key else ''}" for column, type_ in feed.columns.items()
    )
    return f"CREATE TABLE raw.{name} (\n{columns},\n    updated_at {UPDATED_AT}\n);\n{CREATE.format(name)}"


def create_latest(name: str, feed: Feed) -> str:
    return f"SELECT stg.create_latest('{name}', '{{{','.join(feed.key)}}}');\n"


def transform(name: str, feed: Feed) -> str:
    columns = ", ".join([*feed.columns, "updated_at", "row_id", "load_id"])
    key = ", ".join(feed.key)
    return f"""-- stg.{name}_latest: one row per {key}, its newest version in raw.{name}.
BEGIN;
SET LOCAL transaction_isolation = 'read committed';
SELECT stg.begin_swap('{name}_latest') AS loads_to_apply;
INSERT INTO stg.{name}_latest_spare ({columns})
SELECT DISTINCT ON ({key}) {columns} FROM raw.{name} WHERE (SELECT stg.takes_in('{name}_latest'))
ORDER BY {key}, updated_at DESC, row_id DESC;
SELECT stg.swap('{name}_latest') AS row_count;
COMMIT;
SELECT stg.analyze_if_stale('{name}_latest') AS is_analyzed;
"""


def make_feeds(folder: Path, scale: str) -> None:
    """A folder with files for each feed; lineitem's are four."""
    folder.mkdir(parents=True)
    program = Path(sys.executable).with_name("tpchgen-cli")
    for table, parts in (("orders", []), ("lineitem", ["--parts", "4"])):
        command = [str(program), "csv", "-s", scale, "--delimiter", "|", "--tables", table, *parts]
        subprocess.run([*command, "-o", str(folder / "made")], check=True, capture_output=True)
        target = folder / f"tpch_{table}"
        target.mkdir()
        for path in sorted((folder / "made").rglob(f"{table}*.csv")):
            path.rename(target / path.name)
    (folder / "airports").mkdir()
    with resources.as_file(resources.files("airportsdata") / "airports.csv") as path:
        shutil.copy(path, folder / "airports")


def run_feeds(state: Path) -> int:
    from local.console import Console

    console = Console(state / "feeds.log")
    try:
        wrong = wrong_feeds(console, state)
    except Exception as error:  # the log goes with the state
        wrong = [f"{type(error).__name__}: {error}"]
    if wrong:
        console.say(f"wrong: {', '.join(wrong)}")
    return 1 if wrong else 0


def wrong_feeds(console: Any, state: Path) -> list[str]:
    """Load, count and verify each feed: those whose figures are not their source's."""
    from local.__main__ import DEFAULT_PORT, migrate_warehouse, open_databases
    from local.demo import load_dag, run_dag

    wrong: list[str] = []
    with ExitStack() as stack:
        env = open_databases(console, stack, DEFAULT_PORT)
        migrate_warehouse(console, env)
        for name, feed in FEEDS.items():
            expected = in_source(state / "data" / "feeds" / name, feed)
            run = run_dag(console, load_dag(console, env, name), f"{name}: {expected[0]:,} rows", {})
            for task_id, rate in rates(run, expected[0]).items():
                console.say(f"    {task_id:<20}{rate}")
            found = in_warehouse(env["WAREHOUSE_URL"], name, feed)
            console.say(f"    rows, keys, sum of {feed.amount}: source {expected}, warehouse {found}")
            if found != expected:
                wrong.append(name)
            run_dag(console, load_dag(console, env, f"verify_{name}"), f"verify_{name}", {}, say=True)
            again = run_dag(console, load_dag(console, env, name), f"{name} again", {}, say=True)
            if [task for task in again.get_task_instances() if task.task_id == "load_raw" and task.state != "skipped"]:
                wrong.append(f"{name}, again")
    return wrong


def rates(run: Any, rows: int) -> dict[str, str]:
    """Seconds and rows per second of the load and the refresh, all files together."""
    done = [task for task in run.get_task_instances() if task.state == "success"]
    seconds: dict[str, float] = {}
    for task in sorted(done, key=lambda task: task.start_date):
        if task.task_id == "load_raw" or task.task_id.endswith("_latest"):
            seconds[task.task_id] = seconds.get(task.task_id, 0) + task.duration
    return {task_id: f"{took:8.1f} s{rows / took:14,.0f} rows/s" for task_id, took in seconds.items()}


def in_source(folder: Path, feed: Feed) -> tuple[int, int, Decimal]:
    """Rows, different keys and the sum of an amount in the files, by another reader than ours."""
    wanted = [*feed.key, feed.amount]
    options = csv.ConvertOptions(
        include_columns=wanted,
        column_types={feed.amount: pa.decimal128(20, 4)} | dict.fromkeys(feed.key, pa.string()),
    )
    parse = csv.ParseOptions(delimiter=feed.delimiter)
    table = pa.concat_tables(
        csv.read_csv(path, parse_options=parse, convert_options=options) for path in sorted(folder.glob("*.csv"))
    )
    total = sum(filter(None, table[feed.amount].to_pylist()), Decimal(0))
    return table.num_rows, table.select(feed.key).group_by(list(feed.key)).aggregate([]).num_rows, total.normalize()


def in_warehouse(url: str, name: str, feed: Feed) -> tuple[int, int, Decimal]:
    """Rows of raw, rows of stg and the sum there."""
    with psycopg.connect(url) as conn:
        (found,) = conn.execute(
            f"SELECT (SELECT count(*) FROM raw.{name}), count(*), sum({feed.amount}) FROM stg.{name}_latest".encode()
        ).fetchall()
    rows, keys, total = found
    return rows, keys, Decimal(total).normalize()


if __name__ == "__main__":
    sys.exit(main())
