"""sql/scale/citus.sql, as far as it can be tried without Citus: it refuses by name, and forgets no table of orders."""

import re
import subprocess

from tests.warehouse import ROOT, Warehouse

SCRIPT = ROOT / "sql" / "scale" / "citus.sql"


def distributed() -> list[str]:
    """The names in the list that the script begins with."""
    (names,) = re.findall(r"distributed text\[\] := ARRAY\[(.*?)\];", SCRIPT.read_text(), re.DOTALL)
    return re.findall(r"'(\w+\.\w+)'", names)


def test_every_table_with_an_order_id_is_distributed(warehouse: Warehouse) -> None:
    tables = warehouse.rows(
        "SELECT attrelid::regclass::text FROM pg_attribute INNER JOIN pg_class ON attrelid = pg_class.oid"
        " WHERE attname = 'order_id' AND relkind IN ('r', 'p')"
        " AND relnamespace IN ('raw'::regnamespace, 'stg'::regnamespace, 'ops'::regnamespace)"
    )

    assert sorted(distributed()) == sorted(name for (name,) in tables)


def test_what_is_distributed_has_the_column_in_every_key(warehouse: Warehouse) -> None:
    """A worker can keep a key unique only among its own rows."""
    without = """
        SELECT i.indexrelid::regclass::text FROM pg_index AS i
        WHERE i.indrelid = %s::regclass AND i.indisunique AND NOT EXISTS (
            SELECT FROM pg_attribute AS a
            WHERE a.attrelid = i.indrelid AND a.attname = 'order_id' AND a.attnum = ANY (i.indkey)
        )
    """

    with warehouse.connect() as conn:
        for table in distributed():
            assert conn.execute(without, (table,)).fetchall() == []


def test_without_citus_it_says_so_and_changes_nothing(warehouse: Warehouse) -> None:
    def schema() -> str:
        dumped = subprocess.run(
            [warehouse.server.binaries / "pg_dump", "--schema-only", warehouse.url],
            capture_output=True,
            text=True,
            check=True,
        )
        return re.sub(r"\\(un)?restrict .*", "", dumped.stdout)  # another word in every dump

    before = schema()
    done = subprocess.run(
        [warehouse.server.binaries / "psql", "-X", "-v", "ON_ERROR_STOP=1", "-f", SCRIPT, warehouse.url],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 3
    assert "the extension citus is not in database" in done.stderr
    assert "docs/scaling.md" in done.stderr
    assert schema() == before


def test_what_it_changes_stands_there(warehouse: Warehouse) -> None:
    """It changes a view and two functions as they are: a migration that words them otherwise has to look there."""
    changes = re.findall(r"'(stg\.\w+\(text\))',\s+\$old\$(.*?)\$old\$", SCRIPT.read_text(), re.DOTALL)

    assert len(changes) == 3
    for function, words in changes:
        ((body,),) = warehouse.rows(f"SELECT prosrc FROM pg_proc WHERE oid = '{function}'::regprocedure", "")
        assert body.count(words) == 1
    ((view,),) = warehouse.rows("SELECT pg_get_viewdef('stg.refresh_status'::regclass)", "")
    assert view.count("c.reltuples") == 1
