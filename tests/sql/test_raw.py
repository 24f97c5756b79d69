"""raw is append-only, for everybody; and the rules on its rows hold."""

import psycopg
import pytest
from psycopg import errors

from tests.warehouse import TRANSFORMS, Warehouse

DATASETS = sorted(path.name.split(".")[1].removesuffix("_latest") for path in TRANSFORMS.glob("stg.*_latest.sql"))
TABLES = ("raw.loads", *(f"raw.{name}{suffix}" for name in DATASETS for suffix in ("", "_rejects")))
LOAD = (
    "INSERT INTO raw.loads (table_name, batch_id, source, sha256, bytes, rows)"
    " VALUES ('raw.orders', %s, 'a.csv', repeat(%s, 64), 1, %s)"
)


@pytest.fixture
def filled(warehouse: Warehouse) -> Warehouse:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")
    with warehouse.connect() as conn:
        conn.execute(LOAD, ("a", "a", 1))
        conn.execute("SET de_dw.load_id = 1")
        conn.execute("INSERT INTO raw.orders_rejects (line_number, line, reason) VALUES (2, 'x', 'no order')")
    return warehouse


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("statement", ["UPDATE {} SET load_id = 9", "DELETE FROM {}", "TRUNCATE {}"])
@pytest.mark.parametrize("role", ["de_dw_pipeline", "de_dw_reader", "owner", "owner as replica"])
def test_nobody_changes_what_was_received(filled: Warehouse, table: str, statement: str, role: str) -> None:
    before = filled.rows(f"SELECT * FROM {table}")

    with filled.connect("" if role.startswith("owner") else role) as conn:
        if role == "owner as replica":
            conn.execute("SET session_replication_role = replica")
        # a role is stopped by its privileges, the owner by the trigger
        expected = errors.RestrictViolation if role.startswith("owner") else errors.InsufficientPrivilege
        with pytest.raises(expected) as refusal:
            conn.execute(statement.format(table).encode())

    if role.startswith("owner"):
        assert "append-only" in str(refusal.value)
        assert "load a batch" in (refusal.value.diag.message_hint or "")
    assert filled.rows(f"SELECT * FROM {table}") == before


def test_every_table_of_raw_has_the_guard(warehouse: Warehouse) -> None:
    guarded = """
        SELECT c.oid::regclass::text FROM pg_class AS c INNER JOIN pg_trigger AS t ON c.oid = t.tgrelid
        WHERE c.relnamespace = 'raw'::regnamespace AND t.tgname = 'append_only' AND t.tgenabled = 'A'
            AND tgfoid = 'raw.refuse_change'::regproc AND tgtype::integer & (8 | 16 | 32) = 8 | 16 | 32
    """

    tables = warehouse.rows(
        "SELECT oid::regclass::text FROM pg_class WHERE relnamespace = 'raw'::regnamespace AND relkind IN ('r', 'p')"
    )
    assert sorted(warehouse.rows(guarded)) == sorted(tables) == sorted((table,) for table in TABLES)


def test_pipeline_role_may_insert_and_select_and_nothing_else(warehouse: Warehouse) -> None:
    privileges = """
        SELECT DISTINCT privilege_type::text FROM information_schema.role_table_grants
        WHERE table_schema = 'raw' AND grantee IN ('de_dw_pipeline', 'PUBLIC')
        UNION SELECT DISTINCT privilege_type FROM information_schema.role_column_grants
        WHERE table_schema = 'raw' AND grantee IN ('de_dw_pipeline', 'PUBLIC')
    """

    assert sorted(warehouse.rows(privileges, "de_dw_pipeline")) == [("INSERT",), ("SELECT",)]


def test_pipeline_role_may_not_switch_the_guard_off(filled: Warehouse) -> None:
    for statement in ("ALTER TABLE raw.orders DISABLE TRIGGER append_only", "DROP TABLE raw.orders"):
        with filled.connect() as conn, pytest.raises(errors.InsufficientPrivilege):
            conn.execute(statement.encode())


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO raw.orders (order_id, updated_at, row_id) OVERRIDING SYSTEM VALUE VALUES (1, now(), 9)",
        "INSERT INTO raw.orders (order_id, updated_at, load_id) VALUES (1, now(), 9)",
        "INSERT INTO raw.orders_rejects (line_number, line, reason, load_id) VALUES (1, '', '', 9)",
        LOAD.replace("rows)", "rows, finished_at)").replace("%s)", "%s, now())") % ("'b'", "'b'", "1"),
    ],
)
def test_pipeline_role_may_not_forge_when_and_how_a_row_arrived(filled: Warehouse, statement: str) -> None:
    with filled.connect() as conn, pytest.raises(errors.InsufficientPrivilege):
        conn.execute(statement.encode())


def test_reader_may_not_write(filled: Warehouse) -> None:
    for table in ("raw.orders", "stg.orders_latest"):
        with filled.connect("de_dw_reader") as conn, pytest.raises(errors.InsufficientPrivilege):
            conn.execute(f"INSERT INTO {table} (order_id, updated_at) VALUES (1, now())".encode())


@pytest.mark.parametrize(
    ("column", "value", "constraint"),
    [
        ("quantity", "0", "quantity_is_positive"),
        ("quantity", "-1", "quantity_is_positive"),
        ("updated_at", "infinity", "updated_at_is_finite"),
        ("updated_at", "2999-01-01", "updated_at_is_not_in_the_future"),
        ("ordered_at", "-infinity", "ordered_at_is_finite"),
        ("unit_price", "NaN", "unit_price_is_finite"),
        ("unit_price", "Infinity", "unit_price_is_finite"),
        ("unit_price", "-Infinity", "unit_price_is_finite"),
    ],
)
def test_rule_is_a_named_constraint(warehouse: Warehouse, column: str, value: str, constraint: str) -> None:
    row = {"order_id": "1", "updated_at": "2026-01-01", column: value}

    with pytest.raises(errors.CheckViolation) as refusal:
        warehouse.given("raw.orders", f"{' | '.join(row)}\n{' | '.join(row.values())}")

    assert refusal.value.diag.constraint_name == constraint


def test_row_without_a_load_is_refused(warehouse: Warehouse) -> None:
    with warehouse.connect() as conn, pytest.raises(psycopg.Error, match=r"de_dw\.load_id"):
        conn.execute("INSERT INTO raw.orders (order_id, updated_at) VALUES (1, now())")


def test_ledger_takes_a_batch_once_and_a_file_once_but_any_number_of_empty_ones(warehouse: Warehouse) -> None:
    with warehouse.connect(autocommit=True) as conn:
        conn.execute(LOAD, ("a", "a", 1))
        with pytest.raises(errors.UniqueViolation, match="batch_is_loaded_once"):
            conn.execute(LOAD, ("a", "b", 1))
        with pytest.raises(errors.UniqueViolation, match="file_is_loaded_once"):
            conn.execute(LOAD, ("b", "a", 1))
        conn.execute(LOAD.replace("rows)", "rows, repeat_of)").replace("%s)", "%s, 1)"), ("b", "a", 1))
        conn.execute(LOAD, ("c", "c", 0))
        conn.execute(LOAD, ("d", "c", 0))
