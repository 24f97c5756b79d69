"""The three refreshes of stg.orders_latest: which rows are published, and what readers notice."""

import threading
from collections.abc import Callable

import psycopg
import pytest
from psycopg import errors

from tests.conftest import MERGE, SWAP, UNION, before_commit, by_every_refresh, by_every_swap
from tests.warehouse import Warehouse, wait_until

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


@by_every_refresh
def test_newest_version_wins_in_any_order_of_arrival(warehouse: Warehouse, refresh: str) -> None:
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

    assert warehouse.run(refresh) == 3

    assert warehouse.rows("SELECT order_id, status FROM stg.orders_latest ORDER BY order_id") == [
        (1, "paid"),
        (2, "shipped"),
        (3, "created"),
    ]


@by_every_refresh
def test_row_that_arrived_last_wins_a_tie(warehouse: Warehouse, refresh: str) -> None:
    warehouse.given(
        "raw.orders",
        """
        order_id | status    | updated_at
        1        | paid      | 2026-01-01 12:00+00
        1        | cancelled | 2026-01-01 13:00+01
        """,
    )

    warehouse.run(refresh)

    assert warehouse.rows("SELECT status FROM stg.orders_latest") == [("cancelled",)]


@by_every_refresh
def test_every_column_is_published_as_it_was_received(warehouse: Warehouse, refresh: str) -> None:
    warehouse.given(
        "raw.orders",
        """
        order_id|customer_name|customer_email|product|quantity|unit_price|currency|status|ordered_at|updated_at
        7       |佐々木 香織   |k@example.com |Desk 27"|3      |9.990     |EUR     |paid  |2026-01-01|2026-01-02
        """,
    )

    warehouse.run(refresh)

    received = warehouse.rows("SELECT to_jsonb(r) FROM raw.orders AS r")
    assert None not in received[0][0].values(), "or a column that was forgotten would not be missed: give it a value"
    assert warehouse.rows("SELECT to_jsonb(l) FROM stg.orders_latest AS l") == received
    assert warehouse.rows("SELECT unit_price::text FROM stg.orders_latest") == [("9.990",)]


@by_every_refresh
def test_newer_version_replaces_what_was_published_and_an_older_one_does_not(
    warehouse: Warehouse, refresh: str
) -> None:
    warehouse.given(
        "raw.orders",
        """
        order_id | status | updated_at | unit_price
        1        | paid   | 2026-01-02 | 1.0
        2        | paid   | 2026-01-02 | 1.0
        3        | paid   | 2026-01-02 | 1.0
        4        | paid   | 2026-01-02 | 1.0
        """,
    )
    warehouse.run(refresh)
    warehouse.given(
        "raw.orders",
        """
        order_id | status  | updated_at | unit_price
        1        | shipped | 2026-01-03 | NULL
        2        | created | 2026-01-01 | 2.00
        3        | amended | 2026-01-02 | 1.00
        5        | created | 2026-01-01 | 1
        """,
    )

    warehouse.run(refresh)

    assert warehouse.rows(
        "SELECT order_id, status, unit_price::text, load_id FROM stg.orders_latest ORDER BY order_id"
    ) == [
        (1, "shipped", None, 2),
        (2, "paid", "1.0", 1),
        (3, "amended", "1.00", 2),
        (4, "paid", "1.0", 1),
        (5, "created", "1", 2),
    ]


@by_every_refresh
def test_load_that_commits_after_younger_ones_is_published(warehouse: Warehouse, refresh: str) -> None:
    with warehouse.connect() as late:
        late.execute(
            "INSERT INTO raw.loads (table_name, batch_id, source, sha256, bytes, rows)"
            " VALUES ('raw.orders', 'late', 'test', repeat('a', 64), 0, 1)"
            " RETURNING set_config('de_dw.load_id', load_id::text, true)"
        )
        late.execute("INSERT INTO raw.orders (order_id, status, updated_at) VALUES (1, 'late', '2026-01-03')")
        for day in (1, 2):
            warehouse.given("raw.orders", f"order_id | status | updated_at\n1 | early | 2026-01-0{day}")
            warehouse.run(refresh)
            assert warehouse.rows("SELECT status, load_id FROM stg.orders_latest") == [("early", day + 1)]

    warehouse.run(refresh)

    assert warehouse.rows("SELECT status, load_id FROM stg.orders_latest") == [("late", 1)]
    assert warehouse.rows("SELECT load_id FROM stg.applied_loads ORDER BY applied_at") == [(2,), (3,), (1,)]


@by_every_refresh
def test_load_that_was_rolled_back_is_neither_published_nor_applied(warehouse: Warehouse, refresh: str) -> None:
    with warehouse.connect() as conn:
        conn.execute("SELECT nextval('raw.loads_load_id_seq'), set_config('de_dw.load_id', '1', true)")
        conn.execute("INSERT INTO raw.orders (order_id, updated_at) VALUES (1, '2026-01-03')")
        conn.rollback()
    warehouse.given("raw.orders", "order_id | updated_at\n2 | 2026-01-01")

    warehouse.run(refresh)

    assert warehouse.rows("SELECT order_id FROM stg.orders_latest") == [(2,)]
    assert warehouse.rows("SELECT load_id FROM stg.applied_loads") == [(2,)]


def test_refreshes_of_all_kinds_may_follow_each_other(warehouse: Warehouse) -> None:
    for day, refresh in enumerate([MERGE, UNION, SWAP, MERGE, SWAP, UNION, MERGE], 1):
        warehouse.given("raw.orders", f"order_id | updated_at\n{day} | 2026-01-01\n0 | 2026-01-0{day}")
        warehouse.run(refresh)

        assert warehouse.rows("SELECT order_id, load_id FROM stg.orders_latest ORDER BY order_id") == [
            (0, day),
            *((order, order) for order in range(1, day + 1)),
        ]


@by_every_refresh
def test_empty_raw_publishes_nothing(warehouse: Warehouse, refresh: str) -> None:
    assert warehouse.run(refresh) == 0


@by_every_refresh
def test_view_grant_and_identity_survive_twenty_refreshes(warehouse: Warehouse, refresh: str) -> None:
    identity = "SELECT 'stg.orders_latest'::regclass::oid, 'stg.orders_latest_pkey'::regclass::oid"
    with warehouse.connect("") as conn:
        conn.execute("CREATE VIEW public.paid AS SELECT order_id FROM stg.orders_latest WHERE status = 'paid'")
        conn.execute("GRANT SELECT ON public.paid TO de_dw_reader")
    before = warehouse.rows(identity)
    names = "SELECT indexname, tablename FROM pg_indexes WHERE schemaname = 'stg' ORDER BY indexname"
    index_names = warehouse.rows(names)

    for number in range(1, 21):
        warehouse.given("raw.orders", f"order_id | status | updated_at\n{number} | paid | 2026-01-01")
        assert warehouse.run(refresh) == (1 if refresh == MERGE else number)

        assert warehouse.rows("SELECT count(*) FROM public.paid") == [(number,)]
        assert warehouse.rows("SELECT count(*) FROM stg.orders_latest") == [(number,)]
    assert warehouse.rows(identity) == before
    assert warehouse.rows(names) == index_names


@pytest.mark.parametrize("refreshes", [[], [SWAP], [SWAP, UNION], [MERGE, UNION, MERGE, SWAP]])
def test_live_and_spare_have_one_shape(warehouse: Warehouse, refreshes: list[str]) -> None:
    for refresh in refreshes:
        warehouse.run(refresh)

    live, spare = shapes(warehouse)

    assert live == spare
    assert {kind for kind, *_ in live} == {"column", "constraint", "index", "owner"}


@by_every_swap
@pytest.mark.parametrize("swaps", [1, 2, 3])
def test_old_snapshot_gets_a_retryable_error_and_never_an_empty_table(
    warehouse: Warehouse, swaps: int, refresh: str
) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")
    warehouse.run("stg.orders_latest")
    reader = warehouse.connect("de_dw_reader")
    reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    reader.execute("SELECT count(*) FROM raw.orders").fetchall()  # the snapshot is taken, stg not yet touched

    for _ in range(swaps):
        warehouse.run(refresh)

    with pytest.raises(errors.SerializationFailure, match="was replaced after this transaction took its snapshot"):
        reader.execute("SELECT count(*) FROM stg.orders_latest")
    reader.rollback()
    assert reader.execute("SELECT count(*) FROM stg.orders_latest").fetchall() == [(1,)]
    reader.close()


@by_every_refresh
def test_readers_see_every_row_while_refreshes_run(warehouse: Warehouse, refresh: str) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01\n2 | 2026-01-01")
    warehouse.run(refresh)
    stop = threading.Event()

    def read(seen: list[int]) -> None:
        with warehouse.connect("de_dw_reader", autocommit=True) as conn:
            while not stop.is_set():
                seen += [int(count) for (count,) in conn.execute("SELECT count(*) FROM stg.orders_latest")]

    seen, join_all = in_threads(read, 3)
    wait_until(lambda: all(seen))
    for _ in range(15):
        warehouse.run(refresh)
    stop.set()
    join_all()

    assert all(set(counts) == {2} for counts in seen)


@by_every_swap
def test_refresh_waits_for_a_long_reader_without_making_others_wait(warehouse: Warehouse, refresh: str) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")
    notices: list[str] = []
    with warehouse.connect("de_dw_reader") as long_reader:
        long_reader.execute("SELECT * FROM stg.orders_latest")
        pid = long_reader.info.backend_pid
        thread = threading.Thread(target=warehouse.run, args=(refresh,), kwargs={"notices": notices})
        thread.start()
        wait_until(lambda: len(notices) >= 2)
        # the refresh is between two tries, or in one of 100 ms: either way this reader gets through
        assert warehouse.rows("SELECT count(*) FROM stg.orders_latest") == [(0,)]
    thread.join(timeout=60)

    assert warehouse.rows("SELECT count(*) FROM stg.orders_latest") == [(1,)]
    assert f"pid {pid}" in notices[0]


@by_every_swap
def test_refresh_that_gives_up_names_who_is_in_the_way_and_changes_nothing(warehouse: Warehouse, refresh: str) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")
    with warehouse.connect("de_dw_reader") as long_reader:
        long_reader.execute("SELECT * FROM stg.orders_latest")
        pid = long_reader.info.backend_pid

        with pytest.raises(errors.LockNotAvailable, match=rf"in use for 00:00:01, by pid {pid} "):
            warehouse.run(refresh, settings="SET de_dw.swap_patience = '1s'")

    assert warehouse.rows("SELECT count(*) FROM stg.orders_latest") == [(0,)]
    assert warehouse.run(refresh) == 1


@by_every_refresh
def test_second_refresh_waits_and_sees_what_the_first_could_not(warehouse: Warehouse, refresh: str) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")
    with warehouse.connect("de_dw_reader") as long_reader:
        long_reader.execute("SELECT * FROM stg.orders_latest")  # keeps the first refresh from its end
        refreshes = [threading.Thread(target=warehouse.run, args=(kind,)) for kind in (SWAP, refresh)]
        refreshes[0].start()
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted"
        wait_until(lambda: warehouse.rows(waiting) != [(0,)])
        refreshes[1].start()
        wait_until(lambda: warehouse.rows(waiting.replace("granted", "NOT granted")) != [(0,)])
        warehouse.given("raw.orders", "order_id | updated_at\n2 | 2026-01-01")
    for thread in refreshes:
        thread.join(timeout=60)

    assert warehouse.rows("SELECT count(*) FROM stg.orders_latest") == [(2,)]


def test_reader_with_a_snapshot_older_than_many_merges_reads_its_old_rows(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | status | updated_at\n1 | old | 2026-01-01")
    warehouse.run(SWAP)
    with warehouse.connect("de_dw_reader") as reader:
        reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        reader.execute("SELECT count(*) FROM raw.orders").fetchall()  # the snapshot is taken, stg not yet touched

        for day in range(2, 7):
            warehouse.given(
                "raw.orders", f"order_id | status | updated_at\n1 | new | 2026-01-0{day}\n{day} | new | 2026-01-01"
            )
            assert warehouse.run(MERGE) == 2
            assert reader.execute("SELECT order_id, status FROM stg.orders_latest").fetchall() == [(1, "old")]

    assert warehouse.rows("SELECT count(*) FROM stg.orders_latest WHERE status = 'new'") == [(6,)]


def test_merge_does_not_wait_for_a_reader(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")
    with warehouse.connect("de_dw_reader") as long_reader:
        long_reader.execute("SELECT * FROM stg.orders_latest")

        assert warehouse.run(MERGE, settings="SET lock_timeout = '1ms'") == 1


def test_reader_does_not_wait_for_a_merge(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | status | updated_at\n1 | old | 2026-01-01")
    warehouse.run(SWAP)
    warehouse.given("raw.orders", "order_id | status | updated_at\n1 | new | 2026-01-02\n2 | new | 2026-01-02")
    with warehouse.connect(autocommit=True) as merge, warehouse.connect("de_dw_reader", autocommit=True) as reader:
        reader.execute("SET lock_timeout = '1ms'")
        merge.execute(before_commit(MERGE))
        assert reader.execute("SELECT order_id, status FROM stg.orders_latest").fetchall() == [(1, "old")]
        reader.execute("BEGIN; LOCK TABLE stg.orders_latest IN ACCESS SHARE MODE; COMMIT")

        merge.execute("COMMIT")

        assert reader.execute("SELECT count(*) FROM stg.orders_latest WHERE status = 'new'").fetchall() == [(2,)]


@by_every_refresh
def test_refresh_that_ends_before_its_commit_leaves_its_loads_pending(warehouse: Warehouse, refresh: str) -> None:
    warehouse.given("raw.orders", "order_id | status | updated_at\n1 | old | 2026-01-01")
    warehouse.run(SWAP)
    warehouse.given("raw.orders", "order_id | status | updated_at\n1 | new | 2026-01-02")
    with warehouse.connect(autocommit=True) as conn:
        conn.execute(before_commit(refresh))
        conn.close()  # which the end of the block would do too, but after a COMMIT

    wait_until(lambda: warehouse.rows("SELECT 1 FROM pg_locks WHERE locktype = 'advisory'") == [])
    assert warehouse.rows("SELECT load_id FROM stg.pending_loads") == [(2,)]
    assert warehouse.rows("SELECT status FROM stg.orders_latest") == [("old",)]
    warehouse.run(refresh)
    assert warehouse.rows("SELECT load_id FROM stg.pending_loads") == []
    assert warehouse.rows("SELECT status FROM stg.orders_latest") == [("new",)]


def test_refresh_with_fewer_rows_than_before_is_refused(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01\n2 | 2026-01-01")
    warehouse.run("stg.orders_latest")

    with warehouse.connect() as conn:
        conn.execute("SELECT stg.begin_swap('orders_latest'), stg.takes_in('orders_latest')")
        with pytest.raises(errors.RaiseException, match="refusing to publish 0 rows in place of the 2 rows"):
            conn.execute("SELECT stg.swap('orders_latest')")

    assert warehouse.rows("SELECT count(*) FROM stg.orders_latest") == [(2,)]


@by_every_refresh
def test_error_in_a_refresh_leaves_the_published_rows(warehouse: Warehouse, refresh: str) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")
    warehouse.run(refresh)
    with warehouse.connect("") as conn:  # a rule that the new rows break
        for table in ("live", "spare"):
            conn.execute(f"ALTER TABLE stg.orders_latest_{table} ADD CHECK (order_id < 2)".encode())
    warehouse.given("raw.orders", "order_id | updated_at\n2 | 2026-01-01")

    with pytest.raises(errors.CheckViolation):
        warehouse.run(refresh)

    assert warehouse.rows("SELECT order_id FROM stg.orders_latest") == [(1,)]


@by_every_swap
def test_statistics_are_there_after_a_refresh(warehouse: Warehouse, refresh: str) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")

    warehouse.run(refresh)

    statistics = (
        "SELECT relname FROM pg_class WHERE relname LIKE 'orders_latest%' AND relkind IN ('r', 'p') AND reltuples = 1"
    )
    assert sorted(warehouse.rows(statistics)) == [("orders_latest",), ("orders_latest_live",)]


def shapes(warehouse: Warehouse) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Columns, constraints, indexes and owner of the live table and of the spare, their suffixes left out."""
    with warehouse.connect("") as conn:
        live, spare = (
            conn.execute(SHAPE, {"table": f"stg.orders_latest{suffix}", "suffix": suffix}).fetchall()
            for suffix in ("_live", "_spare")
        )
    return live, spare


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
