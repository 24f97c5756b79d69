"""stg.begin_refresh and what it records, the verify script, and what a merge reads."""

import re
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import errors

from tests.conftest import MERGE, SWAP, UNION, before_commit, by_every_refresh, by_every_swap
from tests.warehouse import Warehouse, script_of, wait_until

APPLIED = "SELECT table_name, load_id FROM stg.applied_loads ORDER BY load_id"
ANALYZE = "SELECT stg.analyze_if_stale('orders_latest')"
FUNCTIONS = [
    "stg.begin_refresh('orders_latest')",
    "stg.swap('orders_latest')",
    "stg.empty_spare('orders_latest')",
    "stg.index_spare('orders_latest')",
    "stg.loads_to_apply('orders_latest')",
    "stg.analyze_if_stale('orders_latest')",
    "raw.summarize_new_pages('raw.orders')",
]


@by_every_refresh
def test_refresh_records_the_loads_that_it_applied(warehouse: Warehouse, refresh: str) -> None:
    for day in (1, 2):
        warehouse.given("raw.orders", f"order_id | updated_at\n1 | 2026-01-0{day}")
    assert warehouse.rows("SELECT table_name, load_id, rows FROM stg.pending_loads ORDER BY load_id") == [
        ("orders_latest", 1, 1),
        ("orders_latest", 2, 1),
    ]

    warehouse.run(refresh)

    assert warehouse.rows(APPLIED) == [("orders_latest", 1), ("orders_latest", 2)]
    assert warehouse.rows("SELECT * FROM stg.pending_loads") == []


def test_merge_writes_what_is_pending_and_a_second_one_nothing(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-02\n2 | 2026-01-02")
    assert warehouse.run(MERGE) == 2
    versions = "SELECT order_id, xmin::text, ctid::text FROM stg.orders_latest_live ORDER BY order_id"
    before = warehouse.rows(versions, "")

    assert warehouse.run(MERGE) == 0
    assert warehouse.rows(versions, "") == before

    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01\n2 | 2026-01-03\n3 | 2026-01-01")
    assert warehouse.run(MERGE) == 2, "the older version of order 1 is not written"
    assert warehouse.rows(versions, "")[0] == before[0]
    assert warehouse.run(MERGE) == 0


def test_merge_and_union_do_not_look_at_applied_loads(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | status | updated_at\n1 | paid | 2026-01-02")
    warehouse.run(SWAP)
    warehouse.alter("UPDATE stg.orders_latest_live SET status = 'tampered'")

    for refresh, status in ((MERGE, "tampered"), (UNION, "tampered"), (SWAP, "paid")):
        warehouse.run(refresh)
        assert warehouse.rows("SELECT status FROM stg.orders_latest") == [(status,)]


@by_every_refresh
def test_load_without_rows_is_applied_like_any_other(warehouse: Warehouse, refresh: str) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-02")
    warehouse.run(SWAP)
    warehouse.given("raw.orders", "order_id | updated_at")
    warehouse.given("raw.orders", "order_id | updated_at")
    assert status(warehouse) == (True, 2, 0, 1)

    assert warehouse.run(refresh) == (0 if refresh == MERGE else 1)

    assert warehouse.rows(APPLIED) == [("orders_latest", load_id) for load_id in (1, 2, 3)]
    assert status(warehouse) == (True, 0, 0, 1)


def test_loads_of_another_table_are_not_pending(warehouse: Warehouse) -> None:
    warehouse.alter(
        """
        INSERT INTO raw.loads (table_name, batch_id, source, sha256, bytes, rows)
        VALUES ('raw.of_a_test', 'a', 'test', repeat('a', 64), 0, 5)
        """,
    )

    assert warehouse.rows("SELECT * FROM stg.pending_loads") == []
    assert warehouse.run(MERGE) == 0
    assert warehouse.rows(APPLIED) == []


def test_each_table_made_from_raw_has_its_own_applied_loads(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-02")
    warehouse.alter("INSERT INTO stg.table_versions (table_name, source_table) VALUES ('orders_daily', 'raw.orders')")

    warehouse.run(SWAP)

    assert warehouse.rows("SELECT table_name, load_id FROM stg.pending_loads") == [("orders_daily", 1)]


def test_status_says_what_the_next_refresh_has_to_do(warehouse: Warehouse) -> None:
    assert status(warehouse) == (False, 0, 0, 0)
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-02\n2 | 2026-01-02\n2 | 2026-01-03")
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-04")
    assert status(warehouse) == (False, 2, 4, 0)

    warehouse.run(SWAP)

    assert status(warehouse) == (True, 0, 0, 2)


@by_every_refresh
@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_refresh_sees_what_was_loaded_while_it_waited_whatever_the_default_isolation(
    warehouse: Warehouse, refresh: str, isolation: str
) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")
    first, rest = script_of(refresh).split("SELECT", 1)
    with warehouse.connect(autocommit=True) as conn:
        conn.execute(f"SET default_transaction_isolation = '{isolation}'".encode())
        conn.execute(f"{first} SELECT stg.begin_refresh('orders_latest')".encode())
        warehouse.given("raw.orders", "order_id | updated_at\n2 | 2026-01-01")
        conn.execute(f"SELECT{rest}".encode())

    assert warehouse.rows("SELECT order_id FROM stg.orders_latest ORDER BY order_id") == [(1,), (2,)]
    assert warehouse.rows(APPLIED) == [("orders_latest", 1), ("orders_latest", 2)]
    warehouse.run(refresh, settings=f"SET default_transaction_isolation = '{isolation}'")
    assert warehouse.rows(APPLIED) == [("orders_latest", 1), ("orders_latest", 2)]
    assert warehouse.verification() == (0, 0, 0, 2)


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
def test_refresh_under_an_older_snapshot_is_refused(warehouse: Warehouse, isolation: str) -> None:
    with warehouse.connect() as conn:
        conn.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}".encode())
        with pytest.raises(errors.RaiseException, match=f"a refresh needs READ COMMITTED, not {isolation}"):
            conn.execute("SELECT stg.begin_refresh('orders_latest')")


@pytest.mark.parametrize(
    "given",
    [
        "",
        "INSERT INTO stg.table_versions (table_name) VALUES ('of_a_test_latest')",
        "INSERT INTO stg.table_versions (table_name, source_table) VALUES ('of_a_test_latest', 'raw.of_a_tset')",
    ],
)
def test_table_whose_source_is_unknown_is_refused(warehouse: Warehouse, given: str) -> None:
    warehouse.alter(given)

    with (
        warehouse.connect() as conn,
        pytest.raises(errors.RaiseException, match=r"does not say what stg\.of_a_test_latest is made from") as refusal,
    ):
        conn.execute("SELECT stg.begin_refresh('of_a_test_latest')")

    assert "(table_name, source_table)" in (refusal.value.diag.message_hint or "")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_only_the_pipeline_may_refresh(warehouse: Warehouse, function: str) -> None:
    with warehouse.connect("de_dw_reader") as conn, pytest.raises(errors.InsufficientPrivilege, match="function"):
        conn.execute(f"SELECT {function}".encode())

    signature = re.sub(r"\(.*", "(text)", function)
    assert warehouse.rows(f"SELECT has_function_privilege('public', '{signature}', 'EXECUTE')") == [(False,)]
    assert warehouse.rows(f"SELECT has_function_privilege('de_dw_pipeline', '{signature}', 'EXECUTE')") == [(True,)]


def test_column_privileges_of_the_applied_loads(warehouse: Warehouse) -> None:
    privileges = """
        SELECT grantee::text, privilege_type::text, string_agg(column_name::text, ', ' ORDER BY column_name)
        FROM information_schema.column_privileges
        WHERE table_schema = 'stg' AND table_name = 'applied_loads'
            AND grantee IN ('de_dw_pipeline', 'de_dw_reader', 'PUBLIC')
        GROUP BY 1, 2 ORDER BY 1, 2
    """

    assert warehouse.rows(privileges, "") == [
        ("de_dw_pipeline", "INSERT", "finished_at, load_id, table_name"),
        ("de_dw_pipeline", "SELECT", "applied_at, finished_at, load_id, table_name"),
        ("de_dw_reader", "SELECT", "applied_at, finished_at, load_id, table_name"),
    ]


@pytest.mark.parametrize("relation", ["pending_loads", "refresh_status", "orders_history"])
def test_views_are_for_reading_only(warehouse: Warehouse, relation: str) -> None:
    privileges = f"""
        SELECT grantee::text, privilege_type::text FROM information_schema.table_privileges
        WHERE table_schema = 'stg' AND table_name = '{relation}'
            AND grantee IN ('de_dw_pipeline', 'de_dw_reader', 'PUBLIC')
        ORDER BY 1
    """

    assert warehouse.rows(privileges, "") == [("de_dw_pipeline", "SELECT"), ("de_dw_reader", "SELECT")]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE stg.applied_loads SET load_id = 9",
        "DELETE FROM stg.applied_loads",
        "TRUNCATE stg.applied_loads",
        "INSERT INTO stg.applied_loads (table_name, load_id, applied_at) VALUES ('orders_latest', 9, now())",
    ],
)
def test_pipeline_may_not_forge_what_was_applied(warehouse: Warehouse, statement: str) -> None:
    with warehouse.connect() as conn, pytest.raises(errors.InsufficientPrivilege):
        conn.execute(statement.encode())


def test_reader_may_look_at_what_is_pending_and_applied(warehouse: Warehouse) -> None:
    for relation in ("applied_loads", "pending_loads", "refresh_status", "orders_history", "table_versions"):
        warehouse.rows(f"SELECT * FROM stg.{relation}", "de_dw_reader")
    warehouse.rows("SELECT * FROM stg.orders_as_of(now())", "de_dw_reader")


@by_every_refresh
def test_table_that_somebody_emptied_is_filled_again(warehouse: Warehouse, refresh: str) -> None:
    for day in (1, 2):
        warehouse.given("raw.orders", f"order_id | updated_at\n1 | 2026-01-0{day}\n{day} | 2026-01-0{day}")
        warehouse.run(SWAP)
    warehouse.given("raw.orders", "order_id | updated_at\n3 | 2026-01-03")
    warehouse.alter("TRUNCATE stg.orders_latest_live")

    assert warehouse.run(refresh) == 3

    assert warehouse.verification() == (0, 0, 0, 3)
    assert warehouse.rows(APPLIED) == [("orders_latest", load_id) for load_id in (1, 2, 3)]


# The verify script


@by_every_refresh
def test_verification_finds_nothing_after_a_refresh_and_leaves_pending_loads_out(
    warehouse: Warehouse, refresh: str
) -> None:
    assert warehouse.verification() == (0, 0, 0, 0)
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01\n1 | 2026-01-02\n2 | 2026-01-01")
    assert warehouse.verification() == (0, 0, 0, 0)
    warehouse.run(refresh)
    assert warehouse.verification() == (0, 0, 0, 2)

    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-03\n3 | 2026-01-01")

    assert warehouse.verification() == (0, 0, 0, 2)


@pytest.mark.parametrize(
    ("tampering", "found"),
    [
        ("DELETE FROM stg.orders_latest_live WHERE order_id = 1", (1, 0, 0, 1)),
        ("TRUNCATE stg.orders_latest_live", (2, 0, 0, 0)),
        (
            "INSERT INTO stg.orders_latest_live (order_id, updated_at, row_id, load_id) VALUES (9, now(), 9, 1)",
            (0, 1, 0, 2),
        ),
        ("UPDATE stg.orders_latest_live SET order_id = 3 WHERE order_id = 1", (1, 1, 0, 1)),
        ("UPDATE stg.orders_latest_live SET status = 'lost' WHERE order_id = 1", (0, 0, 1, 2)),
        ("UPDATE stg.orders_latest_live SET status = NULL", (0, 0, 2, 2)),
        ("UPDATE stg.orders_latest_live SET product = '' WHERE product IS NULL", (0, 0, 2, 2)),
        ("UPDATE stg.orders_latest_live SET unit_price = 9.90 WHERE order_id = 1", (0, 0, 1, 2)),
        ("UPDATE stg.orders_latest_live SET ordered_at = now()", (0, 0, 2, 2)),
        ("UPDATE stg.orders_latest_live SET load_id = 9 WHERE order_id = 2", (0, 0, 1, 2)),
        ("UPDATE stg.orders_latest_live SET row_id = row_id - 1 WHERE order_id = 2", (0, 0, 1, 2)),
        ("UPDATE stg.orders_latest_live SET status = status", (0, 0, 0, 2)),
    ],
)
def test_verification_counts_rows_that_are_missing_extra_and_different(
    warehouse: Warehouse, tampering: str, found: tuple[int, ...]
) -> None:
    warehouse.given(
        "raw.orders",
        """
        order_id | status | updated_at | unit_price
        1        | paid   | 2026-01-01 | 9.9
        2        | paid   | 2026-01-01 | 9.9
        """,
    )
    warehouse.run(SWAP)

    warehouse.alter(tampering)

    assert warehouse.verification() == found


def test_swap_mends_what_verification_finds(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01\n2 | 2026-01-01")
    warehouse.run(SWAP)
    warehouse.alter("UPDATE stg.orders_latest_live SET status = 'lost' WHERE order_id = 1")
    warehouse.alter("DELETE FROM stg.orders_latest_live WHERE order_id = 2")
    assert warehouse.verification() == (1, 0, 1, 1)

    warehouse.run(SWAP)

    assert warehouse.verification() == (0, 0, 0, 2)


def test_swap_mends_a_table_with_an_extra_row_when_it_is_told_to(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")
    warehouse.run(SWAP)
    warehouse.alter(
        "INSERT INTO stg.orders_latest_live (order_id, updated_at, row_id, load_id) VALUES (9, now(), 9, 1)",
    )
    assert warehouse.verification() == (0, 1, 0, 1)
    with pytest.raises(errors.RaiseException, match="refusing to publish 1 rows in place of the 2 rows"):
        warehouse.run(SWAP)

    warehouse.run(SWAP, settings="SET de_dw.allow_fewer_rows = 'yes'")

    assert warehouse.verification() == (0, 0, 0, 1)


def test_verification_finds_the_older_of_two_versions(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | status | updated_at\n1 | old | 2026-01-01\n1 | new | 2026-01-02")
    warehouse.run(SWAP)
    warehouse.alter(
        """
        UPDATE stg.orders_latest_live AS l
        SET status = r.status, updated_at = r.updated_at, row_id = r.row_id
        FROM raw.orders AS r WHERE r.status = 'old'
        """,
    )

    assert warehouse.verification() == (0, 0, 1, 1)


def test_swap_records_just_the_loads_that_it_read(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01\n2 | 2026-01-01")
    first, rest = re.split(r"(?=INSERT INTO)", script_of(SWAP))
    with warehouse.connect(autocommit=True) as conn:
        conn.execute(first.encode())
        warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-02\n3 | 2026-01-02")
        conn.execute(rest.encode())
    assert warehouse.rows("SELECT load_id FROM stg.pending_loads") == []
    assert warehouse.verification() == (0, 0, 0, 3)

    warehouse.alter("DELETE FROM stg.orders_latest_live WHERE order_id = 3")

    assert warehouse.verification() == (1, 0, 0, 2)


# What a merge reads, and the statistics


@pytest.fixture
def fifty_loads(warehouse: Warehouse) -> Warehouse:
    """50 loads of 2000 rows, of which the 7th and the last are pending."""
    with warehouse.connect(autocommit=True) as conn:
        conn.execute("BEGIN")
        for number in range(1, 51):
            conn.execute(
                "INSERT INTO raw.loads (table_name, batch_id, source, sha256, bytes, rows)"
                " VALUES ('raw.orders', %s, 'test', encode(sha256(%s), 'hex'), 0, 2000)",
                (str(number), str(number).encode()),
            )
            conn.execute("SELECT set_config('de_dw.load_id', %s, true)", (str(number),))
            conn.execute(
                "INSERT INTO raw.orders (order_id, customer_name, customer_email, product, quantity, updated_at)"
                " SELECT i, 'Somebody with a name', 'somebody@example.com', 'Desk, oak, 180 cm', 1, '2026-01-01'"
                " FROM generate_series(1, 2000) AS i"
            )
        conn.execute(
            "INSERT INTO stg.applied_loads (table_name, load_id, finished_at)"
            " SELECT 'orders_latest', load_id, finished_at FROM raw.loads WHERE load_id NOT IN (7, 50)"
        )
        conn.execute(
            "INSERT INTO stg.orders_latest_live (order_id, updated_at, row_id, load_id) VALUES (0, now(), 0, 1)"
        )
        conn.execute("COMMIT")
    return warehouse


def test_merge_reads_the_pages_of_the_pending_loads_only(fifty_loads: Warehouse) -> None:
    fifty_loads.alter("ANALYZE raw.orders")  # as autovacuum does within a minute of a load that makes a difference
    fetched = "SELECT pg_stat_get_xact_blocks_fetched('raw.orders'::regclass)"

    with fifty_loads.connect() as conn:
        conn.execute("SELECT stg.begin_refresh('orders_latest')")  # which summarizes the new pages
        ((before,),) = conn.execute(fetched).fetchall()
        assert conn.execute("SELECT loads_to_apply FROM stg.merge_pending('orders_latest')").fetchall() == [(2,)]
        ((after,),) = conn.execute(fetched).fetchall()
        ((blocks,),) = conn.execute("SELECT pg_relation_size('raw.orders') / 8192").fetchall()

    assert blocks > 1200
    # a load has 30 pages or less, the ranges that two of them lie in 128 each
    assert 0 < after - before <= 4 * 128 + 20


def test_new_pages_are_summarized_when_a_refresh_begins(fifty_loads: Warehouse) -> None:
    if not fifty_loads.rows("SELECT 1 FROM pg_available_extensions WHERE name = 'pageinspect'"):
        pytest.skip("no pageinspect on this server")
    fifty_loads.alter("CREATE EXTENSION pageinspect")
    summaries = """
        SELECT count(*) FROM generate_series(0, pg_relation_size('raw.orders_load_id_brin') / 8192 - 1) AS page,
            get_raw_page('raw.orders_load_id_brin', page::integer) AS content,
            LATERAL (SELECT brin_page_type(content) AS type) AS t,
            LATERAL brin_page_items(CASE WHEN type = 'regular' THEN content END, 'raw.orders_load_id_brin') AS item
        WHERE type = 'regular' AND NOT item.placeholder AND NOT item.allnulls
    """

    fifty_loads.run(MERGE)

    ((ranges,),) = fifty_loads.rows("SELECT ceil(pg_relation_size('raw.orders') / 8192 / 128.0)::integer")
    assert fifty_loads.rows(summaries, "") == [(ranges,)]


def test_refresh_does_not_wait_long_for_a_vacuum_of_raw(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")
    notices: list[str] = []
    with warehouse.connect("") as vacuum:
        vacuum.execute("LOCK TABLE raw.orders IN SHARE UPDATE EXCLUSIVE MODE")

        assert warehouse.run(MERGE, notices=notices) == 1

    assert notices == ["raw.orders is being vacuumed: its new pages are read whole"]


def test_only_tables_of_raw_are_summarized(warehouse: Warehouse) -> None:
    warehouse.alter(
        "CREATE TABLE public.elsewhere (i) AS SELECT generate_series(1, 9);"
        "CREATE INDEX ON public.elsewhere USING brin (i)",
    )
    notices: list[str] = []

    with warehouse.connect("") as conn, warehouse.connect() as pipeline:
        pipeline.add_notice_handler(lambda diag: notices.append(diag.message_primary or ""))
        conn.execute("LOCK TABLE public.elsewhere, raw.orders IN SHARE UPDATE EXCLUSIVE MODE")
        for name in ("public.elsewhere", "raw.loads", "raw.nothing", "nonsense", "raw.orders"):
            pipeline.execute("SELECT raw.summarize_new_pages(%s)", (name,))

    assert len(notices) == 1
    assert notices[0].startswith("raw.orders is being vacuumed")


@by_every_refresh
def test_table_in_front_is_analyzed_when_its_statistics_are_off(warehouse: Warehouse, refresh: str) -> None:
    statistics = "SELECT reltuples FROM pg_class WHERE oid = 'stg.orders_latest'::regclass"
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")

    warehouse.run(refresh)

    assert warehouse.rows(statistics) == [(1,)]
    assert not is_analyzed(warehouse), "nothing has changed"
    warehouse.given("raw.orders", "order_id | updated_at\n2 | 2026-01-01\n3 | 2026-01-01")
    warehouse.run(SWAP)
    assert warehouse.rows(statistics) == [(3,)]


def test_whether_it_was_analyzed_is_always_true_or_false(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")
    warehouse.run(SWAP)

    assert [warehouse.rows(ANALYZE, "de_dw_pipeline") for _ in range(2)] == [[(False,)], [(False,)]]
    warehouse.alter("ANALYZE stg.orders_latest_live")
    assert warehouse.rows(ANALYZE, "de_dw_pipeline") == [(False,)]


def test_table_in_front_is_analyzed_once_autovacuum_has_analyzed_the_one_behind(
    warehouse: Warehouse, autovacuum_soon: None
) -> None:
    orders = "\n".join(f"{number} | 2026-01-01" for number in range(1, 31))
    warehouse.given("raw.orders", f"order_id | updated_at\n{orders}")
    warehouse.run(SWAP)
    # every change is enough for it
    warehouse.alter(
        "ALTER TABLE stg.orders_latest_live"
        " SET (autovacuum_analyze_threshold = 0, autovacuum_analyze_scale_factor = 0)",
    )
    warehouse.given("raw.orders", "order_id | status | updated_at\n1 | paid | 2026-01-02")
    warehouse.run(MERGE)
    seen = (
        "SELECT last_autoanalyze IS NOT NULL FROM pg_stat_all_tables WHERE relid = 'stg.orders_latest_live'::regclass"
    )
    wait_until(lambda: warehouse.rows(seen) == [(True,)])

    assert is_analyzed(warehouse)
    assert not is_analyzed(warehouse)


@pytest.fixture
def autovacuum_soon(warehouse: Warehouse) -> Iterator[None]:
    """Autovacuum looks for work each second."""
    with psycopg.connect(warehouse.server.admin, autocommit=True) as conn:
        conn.execute("ALTER SYSTEM SET autovacuum_naptime = '1s'")
        conn.execute("SELECT pg_reload_conf()")
        yield
        conn.execute("ALTER SYSTEM RESET autovacuum_naptime")
        conn.execute("SELECT pg_reload_conf()")


def is_analyzed(warehouse: Warehouse) -> bool:
    return bool(warehouse.rows(ANALYZE, "de_dw_pipeline")[0][0])


def status(warehouse: Warehouse) -> tuple[object, ...]:
    (found,) = warehouse.rows(
        "SELECT has_applied_loads, pending_loads, pending_rows, table_rows FROM stg.refresh_status"
        " WHERE table_name = 'orders_latest'"
    )
    return found


@by_every_refresh
def test_failed_statement_records_nothing_though_the_transaction_goes_on(warehouse: Warehouse, refresh: str) -> None:
    """As psql does with ON_ERROR_ROLLBACK: a savepoint before each statement, and a COMMIT whatever happened."""
    warehouse.given("raw.orders", "order_id | status | updated_at\n1 | a | 2026-01-01")
    warehouse.run(SWAP)
    warehouse.given("raw.orders", "order_id | status | updated_at\n1 | b | 2026-01-02\n2 | b | 2026-01-02")
    warehouse.alter("CREATE UNIQUE INDEX one_of_each ON stg.orders_latest_live (status)")
    script = before_commit(refresh)
    statements = re.sub(r"--.*", "", script).split(";")[1:]  # without BEGIN

    failed = []
    with warehouse.connect() as conn, conn.transaction():
        for statement in filter(str.strip, statements):
            try:
                with conn.transaction():
                    conn.execute(statement.encode())
            except errors.UniqueViolation:
                failed.append(statement)
    warehouse.alter("DROP INDEX stg.one_of_each")

    assert failed
    assert warehouse.rows("SELECT load_id FROM stg.pending_loads") == [(2,)]
    warehouse.run(MERGE)
    assert warehouse.verification() == (0, 0, 0, 2)


def test_spare_of_an_earlier_transaction_is_not_published(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | status | updated_at\n1 | old | 2026-01-01")
    warehouse.run(SWAP)
    warehouse.run(SWAP)
    warehouse.given("raw.orders", "order_id | status | updated_at\n1 | new | 2026-01-02")
    warehouse.run(MERGE)

    with warehouse.connect() as conn, pytest.raises(errors.ObjectNotInPrerequisiteState):
        conn.execute("SELECT stg.swap('orders_latest')")

    assert warehouse.verification() == (0, 0, 0, 1)


def test_number_that_is_used_again_after_a_restore_is_another_load(warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | status | updated_at\n1 | one | 2026-01-01")
    warehouse.given("raw.orders", "order_id | status | updated_at\n1 | two | 2026-01-02")
    warehouse.run(MERGE)
    with warehouse.connect("") as conn:  # as if raw were restored from a backup that has the first load only
        for table in ("raw.orders", "raw.loads"):
            conn.execute(f"ALTER TABLE {table} DISABLE TRIGGER append_only".encode())
            conn.execute(f"DELETE FROM {table} WHERE load_id = 2".encode())
            conn.execute(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER append_only".encode())
        conn.execute("SELECT setval('raw.loads_load_id_seq', 1)")

    warehouse.given("raw.orders", "order_id | status | updated_at\n1 | three | 2026-01-03")

    assert warehouse.rows("SELECT load_id FROM stg.pending_loads") == [(2,)]
    warehouse.run(MERGE)
    assert warehouse.verification() == (0, 0, 0, 1)


@by_every_swap
def test_second_swap_of_one_spare_is_refused(warehouse: Warehouse, refresh: str) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")
    warehouse.run(SWAP)
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-02")

    with warehouse.connect(autocommit=True) as conn, pytest.raises(errors.ObjectNotInPrerequisiteState):
        conn.execute(script_of(refresh).replace("COMMIT;", "SELECT stg.swap('orders_latest'); COMMIT;").encode())

    assert warehouse.rows("SELECT load_id FROM stg.pending_loads") == [(2,)]
    assert warehouse.verification() == (0, 0, 0, 1)


def test_spare_is_not_emptied_while_another_refresh_is_at_work(warehouse: Warehouse) -> None:
    with warehouse.connect() as merge, warehouse.connect() as conn:
        merge.execute("SELECT stg.begin_refresh('orders_latest')")
        conn.execute("SET statement_timeout = '200ms'")

        with pytest.raises(errors.QueryCanceled):
            conn.execute("SELECT stg.empty_spare('orders_latest')")
