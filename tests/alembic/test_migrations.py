"""alembic upgrade, downgrade, revision and --sql, as users run them."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import psycopg
import pytest

from tests.warehouse import ROOT, DatabaseServer, Warehouse, alembic

# What the transform was up to 0006, in short.
OLD_SWAP = """
    TRUNCATE stg.orders_latest_spare;
    INSERT INTO stg.orders_latest_spare (order_id, updated_at, row_id, load_id)
    SELECT DISTINCT ON (order_id) order_id, updated_at, row_id, load_id FROM raw.orders
    ORDER BY order_id ASC, updated_at DESC, row_id DESC;
    SELECT stg.swap('orders_latest');
"""
ROW = "SET de_dw.load_id = 1; INSERT INTO raw.orders (order_id, updated_at) VALUES (1, now())"


def dump(server: DatabaseServer, url: str) -> list[str]:
    """The whole schema as SQL, without the lines that differ each time."""
    done = subprocess.run(
        [server.binaries / "pg_dump", "--schema-only", f"--dbname={url}"], capture_output=True, text=True, check=True
    )
    return [line for line in done.stdout.splitlines() if not line.startswith(("--", "\\restrict", "\\unrestrict"))]


def psql(server: DatabaseServer, url: str) -> list[str]:
    return [str(server.binaries / "psql"), "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", f"--dbname={url}"]


def test_up_down_and_up_again_give_the_same_schema(server: DatabaseServer, database: str) -> None:
    alembic(database, "upgrade", "head")
    schema = dump(server, database)

    alembic(database, "downgrade", "base")
    empty = dump(server, database)
    alembic(database, "upgrade", "head")

    assert dump(server, database) == schema
    assert not [line for line in empty if "raw." in line or "stg." in line or "ops." in line]
    assert "CREATE TABLE raw.orders (" in schema


def test_downgrade_of_the_refreshes_gives_the_schema_before_them(server: DatabaseServer, database: str) -> None:
    alembic(database, "upgrade", "0006")
    schema = dump(server, database)

    alembic(database, "upgrade", "head")
    alembic(database, "downgrade", "0006")

    assert dump(server, database) == schema
    assert [line for line in schema if "CREATE TABLE stg." in line]


def test_downgrade_after_swaps_gives_the_spare_its_indexes_back(server: DatabaseServer, database: str) -> None:
    index = "CREATE INDEX by_status ON stg.orders_latest (status); CREATE INDEX ON stg.orders_latest (lower(product))"
    alembic(database, "upgrade", "0006")
    warehouse = Warehouse(database, server)
    warehouse.alter(index)
    for _ in range(3):
        warehouse.alter(OLD_SWAP, "de_dw_pipeline")
    schema = dump(server, database)
    other = Warehouse(server.make(), server)
    alembic(other.url, "upgrade", "head")
    for refresh in ("", ".union", "", ".merge"):
        other.run(f"stg.orders_latest{refresh}")
    other.alter(index)

    alembic(other.url, "downgrade", "0006")

    assert sorted(dump(server, other.url)) == sorted(schema)
    other.alter(OLD_SWAP, "de_dw_pipeline")
    server.drop(other.url)


@pytest.mark.parametrize("refresh", ["", ".union", ".merge"])
def test_upgrade_of_a_warehouse_with_rows_goes_on_where_it_was(
    server: DatabaseServer, database: str, refresh: str
) -> None:
    alembic(database, "upgrade", "0006")
    warehouse = Warehouse(database, server)
    for day in (2, 1, 3):
        orders = "\n".join(f"{number} | 2026-01-0{day}" for number in range(1, 101))
        warehouse.given("raw.orders", f"order_id | updated_at\n{orders}")
    for _ in range(2):
        warehouse.alter(OLD_SWAP, "de_dw_pipeline")
    published = warehouse.rows("SELECT * FROM stg.orders_latest ORDER BY order_id")

    alembic(database, "upgrade", "head")

    status = "SELECT has_applied_loads, pending_loads, pending_rows FROM stg.refresh_status"
    assert warehouse.rows(f"{status} WHERE table_name = 'orders_latest'") == [(False, 3, 300)]
    assert warehouse.rows("SELECT * FROM stg.orders_latest ORDER BY order_id") == published
    warehouse.run(f"stg.orders_latest{refresh}")
    assert warehouse.rows("SELECT * FROM stg.orders_latest ORDER BY order_id") == published
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01\n2 | 2026-01-04\n101 | 2026-01-01")
    warehouse.run(f"stg.orders_latest{refresh}")
    changed = "SELECT order_id, updated_at::date::text FROM stg.orders_latest WHERE load_id = 4 ORDER BY order_id"
    assert warehouse.rows(changed) == [(2, "2026-01-04"), (101, "2026-01-01")]
    assert warehouse.verification() == (0, 0, 0, 101)
    assert warehouse.rows("SELECT load_id FROM stg.applied_loads ORDER BY load_id") == [(1,), (2,), (3,), (4,)]


def test_what_was_applied_is_forgotten_by_a_downgrade_and_applied_again(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")
    warehouse.run("stg.orders_latest.merge")

    alembic(warehouse.url, "downgrade", "0006")
    warehouse.alter(OLD_SWAP, "de_dw_pipeline")
    alembic(warehouse.url, "upgrade", "head")

    assert warehouse.rows("SELECT load_id FROM stg.pending_loads") == [(1,)]
    warehouse.run("stg.orders_latest.merge")
    assert warehouse.verification() == (0, 0, 0, 1)


@pytest.mark.parametrize("refresh", ["", ".union"])
def test_downgrade_works_after_swaps(warehouse: Warehouse, refresh: str) -> None:
    for _ in range(3):
        warehouse.run(f"stg.orders_latest{refresh}")

    alembic(warehouse.url, "downgrade", "base")
    alembic(warehouse.url, "upgrade", "head")

    assert warehouse.run("stg.orders_latest") == 0


def test_two_upgrades_at_once_both_succeed(database: str) -> None:
    results: list[subprocess.CompletedProcess[str]] = []
    threads = [
        threading.Thread(target=lambda: results.append(alembic(database, "upgrade", "head", check=False)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [result.returncode for result in results] == [0, 0, 0], [result.stderr for result in results]
    assert sum("create raw.orders" in result.stderr for result in results) == 1


def test_offline_sql_is_what_psql_takes_and_makes_the_same_schema(server: DatabaseServer, database: str) -> None:
    script = alembic("", "upgrade", "head", "--sql").stdout

    subprocess.run(psql(server, database), input=script, text=True, check=True, capture_output=True)

    online = server.make()
    alembic(online, "upgrade", "head")
    assert dump(server, database) == dump(server, online)
    assert alembic(database, "current").stdout.split()[1] == "(head)"
    server.drop(online)


def test_offline_downgrade_carries_the_refusal(server: DatabaseServer, database: str) -> None:
    alembic(database, "upgrade", "head")
    with psycopg.connect(database) as conn:
        conn.execute(ROW)

    for options, returncode in (([], 3), (["-x", "allow-data-loss=yes"], 0)):
        script = alembic("", *options, "downgrade", "head:base", "--sql").stdout
        done = subprocess.run(psql(server, database), input=script, text=True, check=False, capture_output=True)

        assert done.returncode == returncode, done.stderr


def test_downgrade_with_rows_is_refused_unless_told(database: str) -> None:
    alembic(database, "upgrade", "head")
    with psycopg.connect(database) as conn:
        conn.execute(ROW)

    refused = alembic(database, "downgrade", "base", check=False)

    assert refused.returncode != 0
    assert "refusing to drop raw.orders: it has rows" in refused.stderr
    assert "allow-data-loss=yes" in refused.stderr
    assert alembic(database, "current").stdout.split()[1] == "(head)", "nothing is undone, not even stg"
    with psycopg.connect(database) as conn:
        assert conn.execute("SELECT count(*) FROM raw.orders").fetchall() == [(1,)]
    alembic(database, "-x", "allow-data-loss=yes", "downgrade", "base")


def test_downgrade_that_is_told_to_lose_data_loses_repeated_loads_too(database: str) -> None:
    alembic(database, "upgrade", "head")
    with psycopg.connect(database) as conn:
        for batch_id, repeat_of in (("a", None), ("b", 1)):
            conn.execute(
                "INSERT INTO raw.loads (table_name, batch_id, source, sha256, bytes, rows, repeat_of)"
                " VALUES ('raw.orders', %s, 'a.csv', repeat('a', 64), 1, 1, %s)",
                (batch_id, repeat_of),
            )

    refused = alembic(database, "downgrade", "0003", check=False)
    assert "refusing to drop columns of raw.loads: it has rows" in refused.stderr

    said = alembic(database, "-x", "allow-data-loss=yes", "downgrade", "0003").stderr
    assert (
        "WARNING: raw.loads has files that were loaded again on purpose: index file_is_loaded_once is not made" in said
    )

    alembic(database, "-x", "allow-data-loss=yes", "downgrade", "base")
    alembic(database, "upgrade", "head")


def test_unknown_option_is_refused_naming_the_known_ones(database: str) -> None:
    refused = alembic(database, "-x", "allow-dataloss=yes", "upgrade", "head", check=False)

    assert refused.returncode != 0
    assert "unknown -x allow-dataloss: known are allow-data-loss=yes" in refused.stderr + refused.stdout


def test_missing_url_says_what_to_set() -> None:
    refused = alembic("", "upgrade", "head", check=False)

    assert refused.returncode != 0
    assert "WAREHOUSE_URL is not set" in refused.stderr + refused.stdout


def test_migration_does_not_wait_long_for_a_lock(database: str) -> None:
    alembic(database, "upgrade", "head")
    with psycopg.connect(database) as reader:
        reader.execute("SELECT * FROM raw.orders")

        refused = alembic(database, "-x", "lock-timeout=200ms", "downgrade", "base", check=False)

        assert refused.returncode != 0
        assert "LockNotAvailable" in refused.stderr
        assert alembic(database, "current").stdout.split()[1] == "(head)"


def test_owner_needs_no_superuser(server: DatabaseServer) -> None:
    with psycopg.connect(server.admin, autocommit=True) as conn:
        conn.execute(
            "DO $$ BEGIN CREATE ROLE test_owner LOGIN CREATEROLE; EXCEPTION WHEN duplicate_object THEN NULL; END $$"
        )
        conn.execute("DO $$ BEGIN CREATE ROLE de_dw_pipeline; EXCEPTION WHEN duplicate_object THEN NULL; END $$")
        conn.execute("REVOKE de_dw_pipeline FROM test_owner")
        version = conn.info.server_version
    url = server.make(owner="test_owner")
    if version >= 160000:  # where CREATEROLE alone does not make a member of a role that another made
        refused = alembic(url, "upgrade", "head", check=False)
        assert "GRANT de_dw_pipeline TO test_owner" in refused.stderr
        with psycopg.connect(server.admin, autocommit=True) as conn:
            conn.execute("GRANT de_dw_pipeline TO test_owner")

    alembic(url, "upgrade", "head")
    alembic(url, "downgrade", "base")
    server.drop(url)
    with psycopg.connect(server.admin, autocommit=True) as conn:
        conn.execute("DROP ROLE test_owner")


def test_every_table_column_and_function_has_a_comment(warehouse: Warehouse) -> None:
    without = """
        SELECT c.oid::regclass::text, a.attname::text
        FROM pg_class AS c
        LEFT JOIN pg_attribute AS a ON c.oid = a.attrelid AND a.attnum > 0 AND NOT a.attisdropped
        WHERE c.relnamespace IN ('raw'::regnamespace, 'stg'::regnamespace, 'ops'::regnamespace)
            AND c.relkind IN ('r', 'p', 'v')
            AND (obj_description(c.oid, 'pg_class') IS NULL OR col_description(c.oid, a.attnum) IS NULL)
        UNION ALL
        SELECT p.oid::regprocedure::text, '()' FROM pg_proc AS p
        WHERE p.pronamespace IN ('raw'::regnamespace, 'stg'::regnamespace, 'ops'::regnamespace)
            AND obj_description(p.oid) IS NULL
    """

    assert warehouse.rows(without) == []


def test_new_revision_is_numbered_and_has_both_sql_files(tmp_path: Path) -> None:
    for part in ("alembic", "sql"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "alembic.ini", tmp_path)
    before = set(tmp_path.rglob("*"))
    number = max(int(path.name[:4]) for path in (ROOT / "alembic" / "versions").glob("*.py")) + 1
    env = {name: value for name, value in os.environ.items() if name != "WAREHOUSE_URL"}

    subprocess.run(
        [sys.executable, "-m", "alembic", "revision", "-m", "try a revision"],
        cwd=tmp_path,
        env=env | {"PYTHONDONTWRITEBYTECODE": "1"},
        check=True,
        capture_output=True,
    )

    made = {path.relative_to(tmp_path).as_posix(): path for path in set(tmp_path.rglob("*")) - before}
    stem = f"{number:04}_try_a_revision"
    assert set(made) == {f"alembic/versions/{stem}.py", f"sql/ddl/{stem}.up.sql", f"sql/ddl/{stem}.down.sql"}
    assert (
        f'revision = "{number:04}"\ndown_revision = "{number - 1:04}"\n'
        in made[f"alembic/versions/{stem}.py"].read_text()
    )
    assert all(line.startswith("--") for line in made[f"sql/ddl/{stem}.up.sql"].read_text().splitlines())


def test_every_revision_has_its_pair_and_every_file_its_revision() -> None:
    revisions = {path.stem for path in (ROOT / "alembic" / "versions").glob("*.py")}
    files = {path.name for path in (ROOT / "sql" / "ddl").iterdir()}

    assert files == {f"{stem}.{direction}.sql" for stem in revisions for direction in ("up", "down")}
