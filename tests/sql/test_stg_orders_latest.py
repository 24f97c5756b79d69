"""sql/transforms/stg.orders_latest.sql and the swap behind it: which rows are published, and what readers notice."""

import threading
from collections.abc import Callable

import psycopg
import pytest
from psycopg import errors

from tests.conftest import Warehouse, wait_until

SHAPE = """
SELECT 'column', a.attnum::text, a.attname, format_type(a.atttypid, a.atttypmod) || a.attnotnull,
    col_description(a.attrelid, a.attnum)
FROM pg_attribute AS a WHERE a.attrelid = %(table)s::regclass AND a.attnum > 0
UNION ALL
SELECT 'constraint', c.contype::text, replace(c.conname, %(suffix)s, ''), pg_get_constraintdef(c.oid), NULL
FROM pg_constraint AS c WHERE c.conrelid = %(table)s::regclass
UNION ALL
SELECT 'index', '', replace(i.indexrelid::regclass::text, %(suffix)s, ''),
    replace(pg_get_indexdef(i.indexrelid), %(suffix)s, ''), NULL
FROM pg_index AS i WHERE i.indrelid = %(table)s::regclass
UNION ALL
SELECT 'owner', '', c.relowner::regrole::text, obj_description(c.oid), NULL
FROM pg_class AS c WHERE c.oid = %(table)s::regclass
ORDER BY 1, 2, 3
"""


def test_newest_version_wins_in_any_order_of_arrival(warehouse: Warehouse) -> None:
    warehouse.given(
        "raw.orders",
        """
        order_id | status  | updated_at
        1        | created | 2026-01-01
        1        | paid    | 2026-01-02
        2        | shipped | 2026-01-03
        2        | paid    | 2026-01-02
        3        | created | 2026-01-01
        """,
    )

    assert warehouse.run("stg.orders_latest") == 3

    assert warehouse.rows("SELECT order_id, status FROM stg.orders_latest ORDER BY order_id") == [
        (1, "paid"),
        (2, "shipped"),
        (3, "created"),
    ]


def test_row_that_arrived_last_wins_a_tie(warehouse: Warehouse) -> None:
    warehouse.given(
        "raw.orders",
        """
        order_id | status    | updated_at
        1        | paid      | 2026-01-01 12:00+00
        1        | cancelled | 2026-01-01 13:00+01
        """,
    )

    warehouse.run("stg.orders_latest")

    assert warehouse.rows("SELECT status FROM stg.orders_latest") == [("cancelled",)]


def test_every_column_is_published_as_it_was_received(warehouse: Warehouse) -> None:
    warehouse.given(
        "raw.orders",
        """
        order_id | customer_name | customer_email | product      | quantity | unit_price | updated_at
        7        | 佐々木 香織    | NULL           | Desk, 27" oak | 3        | 9.990      | 2026-01-02
        """,
    )

    warehouse.run("stg.orders_latest")

    received = warehouse.rows("SELECT to_jsonb(r) FROM raw.orders AS r")
    assert warehouse.rows("SELECT to_jsonb(l) FROM stg.orders_latest AS l") == received
    assert warehouse.rows("SELECT unit_price::text FROM stg.orders_latest") == [("9.990",)]


def test_empty_raw_publishes_nothing(warehouse: Warehouse) -> None:
    assert warehouse.run("stg.orders_latest") == 0


def test_view_grant_and_identity_survive_twenty_refreshes(warehouse: Warehouse) -> None:
    identity = "SELECT 'stg.orders_latest'::regclass::oid, 'stg.orders_latest_pkey'::regclass::oid"
    with warehouse.connect("") as conn:
        conn.execute("CREATE VIEW public.paid AS SELECT order_id FROM stg.orders_latest WHERE status = 'paid'")
        conn.execute("GRANT SELECT ON public.paid TO de_dw_reader")
    before = warehouse.rows(identity)
    names = "SELECT indexname, tablename FROM pg_indexes WHERE schemaname = 'stg' ORDER BY indexname"
    index_names = warehouse.rows(names)

    for number in range(1, 21):
        warehouse.given("raw.orders", f"order_id | status | updated_at\n{number} | paid | 2026-01-01")
        assert warehouse.run("stg.orders_latest") == number

        assert warehouse.rows("SELECT count(*) FROM public.paid") == [(number,)]
        assert warehouse.rows("SELECT count(*) FROM stg.orders_latest") == [(number,)]
    assert warehouse.rows(identity) == before
    assert warehouse.rows(names) == index_names


@pytest.mark.parametrize("swaps", [0, 1, 2])
def test_live_and_spare_have_one_shape(warehouse: Warehouse, swaps: int) -> None:
    for _ in range(swaps):
        warehouse.run("stg.orders_latest")

    with warehouse.connect("") as conn:
        live, spare = (
            conn.execute(SHAPE, {"table": f"stg.orders_latest{suffix}", "suffix": suffix}).fetchall()
            for suffix in ("_live", "_spare")
        )

    assert live == spare
    assert {kind for kind, *_ in live} == {"column", "constraint", "index", "owner"}


@pytest.mark.parametrize("swaps", [1, 2, 3])
def test_old_snapshot_gets_a_retryable_error_and_never_an_empty_table(warehouse: Warehouse, swaps: int) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")
    warehouse.run("stg.orders_latest")
    reader = warehouse.connect("de_dw_reader")
    reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    reader.execute("SELECT count(*) FROM raw.orders").fetchall()  # the snapshot is taken, stg not yet touched

    for _ in range(swaps):
        warehouse.run("stg.orders_latest")

    with pytest.raises(errors.SerializationFailure, match="was replaced after this transaction took its snapshot"):
        reader.execute("SELECT count(*) FROM stg.orders_latest")
    reader.rollback()
    assert reader.execute("SELECT count(*) FROM stg.orders_latest").fetchall() == [(1,)]
    reader.close()


def test_readers_see_every_row_while_refreshes_run(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01\n2 | 2026-01-01")
    warehouse.run("stg.orders_latest")
    stop = threading.Event()

    def read(seen: list[int]) -> None:
        with warehouse.connect("de_dw_reader", autocommit=True) as conn:
            while not stop.is_set():
                seen += [int(count) for (count,) in conn.execute("SELECT count(*) FROM stg.orders_latest")]

    seen, join_all = in_threads(read, 3)
    for _ in range(15):
        warehouse.run("stg.orders_latest")
    stop.set()
    join_all()

    assert all(counts and set(counts) == {2} for counts in seen)


def test_refresh_waits_for_a_long_reader_without_making_others_wait(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")
    notices: list[str] = []
    with warehouse.connect("de_dw_reader") as long_reader:
        long_reader.execute("SELECT * FROM stg.orders_latest")
        pid = long_reader.info.backend_pid
        refresh = threading.Thread(target=warehouse.run, args=("stg.orders_latest",), kwargs={"notices": notices})
        refresh.start()
        wait_until(lambda: len(notices) >= 2)
        # the refresh is between two tries, or in one of 100 ms: either way this reader gets through
        assert warehouse.rows("SELECT count(*) FROM stg.orders_latest") == [(0,)]
    refresh.join(timeout=60)

    assert warehouse.rows("SELECT count(*) FROM stg.orders_latest") == [(1,)]
    assert f"pid {pid}" in notices[0]


def test_refresh_that_gives_up_names_who_is_in_the_way_and_changes_nothing(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")
    with warehouse.connect("de_dw_reader") as long_reader:
        long_reader.execute("SELECT * FROM stg.orders_latest")
        pid = long_reader.info.backend_pid

        with pytest.raises(errors.LockNotAvailable, match=rf"in use for 00:00:01, by pid {pid} "):
            warehouse.run("stg.orders_latest", settings="SET de_dw.swap_patience = '1s'")

    assert warehouse.rows("SELECT count(*) FROM stg.orders_latest") == [(0,)]
    assert warehouse.run("stg.orders_latest") == 1


def test_second_refresh_waits_and_sees_what_the_first_could_not(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")
    with warehouse.connect("de_dw_reader") as long_reader:
        long_reader.execute("SELECT * FROM stg.orders_latest")  # keeps the first refresh from its end
        refreshes = [threading.Thread(target=warehouse.run, args=("stg.orders_latest",)) for _ in range(2)]
        refreshes[0].start()
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted"
        wait_until(lambda: warehouse.rows(waiting) != [(0,)])
        refreshes[1].start()
        wait_until(lambda: warehouse.rows(waiting.replace("granted", "NOT granted")) != [(0,)])
        warehouse.given("raw.orders", "order_id | updated_at\n2 | 2026-01-01")
    for refresh in refreshes:
        refresh.join(timeout=60)

    assert warehouse.rows("SELECT count(*) FROM stg.orders_latest") == [(2,)]


def test_refresh_with_fewer_rows_than_before_is_refused(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01\n2 | 2026-01-01")
    warehouse.run("stg.orders_latest")

    with warehouse.connect() as conn:
        conn.execute("TRUNCATE stg.orders_latest_spare")
        with pytest.raises(errors.RaiseException, match="refusing to publish 0 rows in place of the 2 rows"):
            conn.execute("SELECT stg.swap('orders_latest')")

    assert warehouse.rows("SELECT count(*) FROM stg.orders_latest") == [(2,)]


def test_error_in_a_refresh_leaves_the_published_rows(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")
    warehouse.run("stg.orders_latest")
    with warehouse.connect("") as conn:  # a rule that the new rows break
        for table in ("live", "spare"):
            conn.execute(f"ALTER TABLE stg.orders_latest_{table} ADD CHECK (order_id < 2)".encode())
    warehouse.given("raw.orders", "order_id | updated_at\n2 | 2026-01-01")

    with pytest.raises(errors.CheckViolation):
        warehouse.run("stg.orders_latest")

    assert warehouse.rows("SELECT order_id FROM stg.orders_latest") == [(1,)]


def test_statistics_are_there_after_a_refresh(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")

    warehouse.run("stg.orders_latest")

    statistics = (
        "SELECT relname FROM pg_class WHERE relname LIKE 'orders_latest%' AND relkind IN ('r', 'p') AND reltuples = 1"
    )
    assert sorted(warehouse.rows(statistics)) == [("orders_latest",), ("orders_latest_live",)]


def in_threads(work: Callable[[list[int]], None], times: int) -> tuple[list[list[int]], Callable[[], None]]:
    """Start the work in threads, each with a list of its own; returns the lists and what waits for all."""
    results: list[list[int]] = [[] for _ in range(times)]
    threads = [threading.Thread(target=work, args=(result,)) for result in results]
    for thread in threads:
        thread.start()

    def join_all() -> None:
        for thread in threads:
            thread.join(timeout=60)

    return results, join_all
