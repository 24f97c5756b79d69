"""docs/architecture.md: its DAG is one, and what it says of tables and assets is so."""

import re
import subprocess
import sys
from pathlib import Path

from tests.docs.documents import blocks
from tests.warehouse import ROOT, Warehouse

TEXT = (ROOT / "docs" / "architecture.md").read_text()


def test_downstream_example_is_a_dag_that_waits_for_the_asset(tmp_path: Path) -> None:
    (example,) = (block for block in blocks() if block.document.name == "architecture.md" and block.kind == "python")
    (tmp_path / "downstream.py").write_text(example.text)
    # In a process of its own: Airflow reads its settings once, and tests/dags has others.
    script = """
import sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(sys.argv[1], bundle_name="example")
assert not bag.import_errors, bag.import_errors
(dag,) = bag.dags.values()
print(dag.dag_id, [asset.name for asset in dag.timetable.asset_condition.objects], *dag.task_ids)
"""

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)],
        env={
            "AIRFLOW_HOME": str(tmp_path / "airflow"),
            "PATH": "/usr/bin:/bin",
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        },
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "downstream ['stg.orders_latest'] report"


def test_every_table_view_and_function_for_people_is_named(warehouse: Warehouse) -> None:
    relations = warehouse.rows(
        "SELECT oid::regclass::text FROM pg_class WHERE relkind IN ('r', 'p', 'v') AND NOT relispartition"
        " AND relnamespace IN ('raw'::regnamespace, 'stg'::regnamespace, 'ops'::regnamespace)"
    )

    sources = [source for (source,) in warehouse.rows("SELECT source_table FROM stg.table_versions")]
    added = [source.removeprefix("raw.") for source in sources if source not in ("raw.customers", "raw.orders")]
    unnamed = [
        name
        for (name,) in relations
        if f"`{name}`" not in TEXT and not name.startswith(tuple(f"{s}.{d}" for s in ("raw", "stg") for d in added))
    ]
    assert sorted(unnamed) == ["stg.customers_latest_spare", "stg.orders_latest_spare"], "they are of a swap's inside"


def test_every_relation_and_function_that_is_named_is_there(warehouse: Warehouse) -> None:
    named = set(re.findall(r"`((?:raw|stg|ops)\.\w+)`", TEXT))

    missing = [
        name
        for name in named
        if warehouse.rows(f"SELECT coalesce(to_regclass('{name}')::oid, to_regproc('{name}'))") == [(None,)]
    ]
    assert missing == []
