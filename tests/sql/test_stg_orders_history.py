"""stg.orders_history and stg.orders_as_of: every version of an order, and what was true at an instant."""

import pytest

from tests.warehouse import Warehouse

VERSIONS = """
    order_id | status    | updated_at       | unit_price
    1        | created   | 2026-01-01 10:00 | 9.9
    1        | shipped   | 2026-01-03 10:00 | 9.9
    2        | created   | 2026-01-02 10:00 | 5
    1        | paid      | 2026-01-02 10:00 | 9.90
    2        | cancelled | 2026-01-02 10:00 | 5
"""


@pytest.fixture
def filled(warehouse: Warehouse) -> Warehouse:
    """Two orders: the versions of one arrive in another order than they became true, those of the other are a tie."""
    warehouse.given("raw.orders", VERSIONS)
    return warehouse


def test_history_has_one_row_per_version_with_when_it_began_and_ended(filled: Warehouse) -> None:
    assert shown(
        filled,
        "SELECT order_id, status, unit_price, valid_from, valid_to FROM stg.orders_history"
        " ORDER BY order_id, valid_from",
    ) == [
        "1 | created | 9.9 | 2026-01-01 10:00:00+00 | 2026-01-02 10:00:00+00",
        "1 | paid | 9.90 | 2026-01-02 10:00:00+00 | 2026-01-03 10:00:00+00",
        "1 | shipped | 9.9 | 2026-01-03 10:00:00+00 | NULL",
        "2 | cancelled | 5 | 2026-01-02 10:00:00+00 | NULL",
    ]


@pytest.mark.parametrize(
    ("instant", "expected"),
    [
        ("-infinity", []),
        ("2026-01-01 09:59:59.999999+00", []),
        ("2026-01-01 10:00+00", ["1 | created"]),
        ("2026-01-02 09:59:59.999999+00", ["1 | created"]),
        ("2026-01-02 10:00+00", ["1 | paid", "2 | cancelled"]),
        ("2026-01-02 12:00+02", ["1 | paid", "2 | cancelled"]),
        ("2026-01-03 10:00+00", ["1 | shipped", "2 | cancelled"]),
        ("infinity", ["1 | shipped", "2 | cancelled"]),
    ],
)
def test_what_was_true_at_an_instant(filled: Warehouse, instant: str, expected: list[str]) -> None:
    as_of = f"SELECT order_id, status FROM stg.orders_as_of('{instant}') ORDER BY order_id"
    history = f"""
        SELECT order_id, status FROM stg.orders_history
        WHERE valid_from <= '{instant}' AND (valid_to > '{instant}' OR valid_to IS NULL) ORDER BY order_id
    """

    assert shown(filled, as_of) == shown(filled, history) == expected


def test_nothing_is_known_of_no_instant(filled: Warehouse) -> None:
    assert filled.rows("SELECT * FROM stg.orders_as_of(NULL)") == []


def test_as_of_now_is_what_a_refresh_publishes(filled: Warehouse) -> None:
    filled.run("stg.orders_latest")

    published = filled.rows("SELECT l::text FROM stg.orders_latest AS l ORDER BY order_id")
    assert filled.rows("SELECT a::text FROM stg.orders_as_of(now()) AS a ORDER BY order_id") == published
    columns = "order_id, status, unit_price, updated_at, row_id, load_id"
    latest = filled.rows(f"SELECT {columns} FROM stg.orders_latest ORDER BY order_id")
    assert filled.rows(f"SELECT {columns} FROM stg.orders_history WHERE valid_to IS NULL ORDER BY order_id") == latest


def test_late_version_gets_its_place_in_history(filled: Warehouse) -> None:
    filled.given(
        "raw.orders",
        """
        order_id | status | updated_at
        1        | packed | 2026-01-02 20:00
        2        | paid   | 2026-01-02 10:00
        """,
    )

    assert shown(
        filled, "SELECT order_id, status, valid_to, load_id FROM stg.orders_history ORDER BY order_id, valid_from"
    ) == [
        "1 | created | 2026-01-02 10:00:00+00 | 1",
        "1 | paid | 2026-01-02 20:00:00+00 | 1",
        "1 | packed | 2026-01-03 10:00:00+00 | 2",
        "1 | shipped | NULL | 1",
        "2 | paid | NULL | 2",
    ]


def test_history_needs_no_refresh_and_no_view_keeps_a_swap_from_its_work(filled: Warehouse) -> None:
    assert filled.rows("SELECT count(*) FROM stg.orders_history") == [(4,)]
    assert filled.rows("SELECT count(*) FROM stg.orders_as_of(now())") == [(2,)]

    for _ in range(3):
        assert filled.run("stg.orders_latest") == 2

    assert filled.rows("SELECT count(*) FROM stg.orders_as_of(now())") == [(2,)]


def test_history_has_the_columns_of_the_table_and_from_when_to_when(warehouse: Warehouse) -> None:
    columns = """
        SELECT array_agg(attname::text || ' ' || format_type(atttypid, atttypmod) ORDER BY attnum)
        FROM pg_attribute WHERE attrelid = '{}'::regclass AND attnum > 0
    """
    ((table,),) = warehouse.rows(columns.format("stg.orders_latest"))

    assert warehouse.rows(columns.format("stg.orders_history")) == [
        ([*table, "valid_from timestamp with time zone", "valid_to timestamp with time zone"],)
    ]


def shown(warehouse: Warehouse, query: str) -> list[str]:
    """Rows as psql would show them, in UTC."""
    with warehouse.connect("de_dw_reader") as conn, conn.cursor() as cursor:
        cursor.execute("SET timezone = 'UTC'")
        cursor.execute(query.encode())
        assert cursor.pgresult is not None
        values = [
            [cursor.pgresult.get_value(row, column) for column in range(cursor.pgresult.nfields)]
            for row in range(cursor.pgresult.ntuples)
        ]
    return [" | ".join("NULL" if value is None else value.decode() for value in row) for row in values]
