"""A table that a migration makes a dataset: every refresh, verification, replay, tombstones; it is like raw.orders."""

import pytest
from psycopg import Error, errors

from bench.feeds import FEEDS, create_latest, create_raw, transform
from tests.warehouse import OWNER, PIPELINE, Warehouse

THINGS = """
    CREATE TABLE raw.things (
        shop text NOT NULL,
        thing_id integer NOT NULL,
        price numeric,
        is_deleted boolean,
        updated_at timestamptz NOT NULL
    );
    COMMENT ON COLUMN raw.things.shop IS 'The shop.';
    SELECT raw.create_dataset('things');
    SELECT stg.create_latest('things', '{shop,thing_id}', 'is_deleted', 'true');
"""
SWAP = """
    BEGIN;
    SELECT stg.begin_swap('things_latest');
    INSERT INTO stg.things_latest_spare
    SELECT DISTINCT ON (shop, thing_id) * FROM raw.things WHERE (SELECT stg.takes_in('things_latest'))
    ORDER BY shop, thing_id, updated_at DESC, row_id DESC;
    SELECT stg.swap('things_latest');
    COMMIT
"""
REFRESHES = {
    "swap": SWAP,
    "union": "SELECT stg.union_pending('things_latest')",
    "merge": "SELECT stg.merge_pending('things_latest')",
}
BRING_BACK = """
    INSERT INTO stg.things_latest_live SELECT * FROM stg.things_latest_deleted;
    DELETE FROM stg.things_latest_deleted
"""
by_every_refresh = pytest.mark.parametrize("refresh", REFRESHES)
DELETED = "SELECT shop, thing_id FROM stg.things_latest_deleted ORDER BY shop, thing_id"
PUBLISHED = "SELECT shop, thing_id, price::text FROM stg.things_latest ORDER BY shop, thing_id"


@pytest.fixture
def things(warehouse: Warehouse) -> Warehouse:
    warehouse.alter(THINGS)
    return warehouse


def refresh_by(warehouse: Warehouse, kind: str) -> None:
    with warehouse.connect(PIPELINE, autocommit=True) as conn:
        conn.execute(REFRESHES[kind].encode())


def verified(warehouse: Warehouse) -> tuple[int, ...]:
    (found,) = warehouse.rows("SELECT missing, extra, different, compared FROM stg.verify('things_latest')")
    return found


@by_every_refresh
def test_newest_version_of_a_key_of_two_columns_is_published(things: Warehouse, refresh: str) -> None:
    things.given("raw.things", "shop | thing_id | price | updated_at\na | 1 | 1.0 | 2026-01-02\na | 2 | 2 | 2026-01-01")
    refresh_by(things, refresh)
    things.given(
        "raw.things", "shop | thing_id | price | updated_at\na | 1 | 9 | 2026-01-01\nb | 1 | 3.00 | 2026-01-01"
    )

    refresh_by(things, refresh)

    assert things.rows(PUBLISHED) == [("a", 1, "1.0"), ("a", 2, "2"), ("b", 1, "3.00")]
    assert verified(things) == (0, 0, 0, 3)


@by_every_refresh
def test_tombstone_removes_its_key_and_an_older_version_does_not_bring_it_back(things: Warehouse, refresh: str) -> None:
    things.given("raw.things", "shop | thing_id | price | updated_at\na | 1 | 1 | 2026-01-01\na | 2 | 2 | 2026-01-01")
    refresh_by(things, refresh)
    things.given("raw.things", "shop | thing_id | is_deleted | updated_at\na | 1 | true | 2026-01-03")
    refresh_by(things, refresh)
    assert things.rows(PUBLISHED) == [("a", 2, "2")]
    assert things.rows(DELETED) == [("a", 1)]

    things.given("raw.things", "shop | thing_id | price | updated_at\na | 1 | 7 | 2026-01-02")
    refresh_by(things, refresh)

    assert things.rows(PUBLISHED) == [("a", 2, "2")]
    assert verified(things) == (0, 0, 0, 2)
    assert things.rows("SELECT count(*) FROM stg.things_history WHERE thing_id = 1") == [(3,)]


@by_every_refresh
def test_table_whose_keys_are_all_deleted_is_not_taken_for_one_that_was_lost(things: Warehouse, refresh: str) -> None:
    to_apply = "SELECT array_agg(load_id ORDER BY load_id) FROM stg.loads_to_apply('things_latest') AS l (load_id)"
    things.given("raw.things", "shop | thing_id | price | updated_at\na | 1 | 1 | 2026-01-01")
    refresh_by(things, refresh)
    things.given("raw.things", "shop | thing_id | is_deleted | updated_at\na | 1 | true | 2026-01-02")
    refresh_by(things, refresh)
    assert things.rows(PUBLISHED) == []
    assert things.rows(to_apply, PIPELINE) == [(None,)]
    things.given("raw.things", "shop | thing_id | price | updated_at\na | 2 | 1 | 2026-01-01")
    assert things.rows(to_apply, PIPELINE) == [([3],)]
    refresh_by(things, refresh)

    things.alter("TRUNCATE stg.things_latest_live")

    assert things.rows(to_apply, PIPELINE) == [([1, 2, 3],)]
    refresh_by(things, refresh)
    assert things.rows(PUBLISHED) == [("a", 2, "1")]
    assert things.rows(DELETED) == [("a", 1)]


def test_load_that_comes_between_two_statements_that_fill_the_spare_is_not_lost(things: Warehouse) -> None:
    things.given("raw.things", "shop | thing_id | price | updated_at\na | 1 | 1 | 2026-01-01\nz | 1 | 1 | 2026-01-01")
    fill = SWAP.split(";")[2].replace("ORDER BY", "AND shop {} 'm' ORDER BY")
    with things.connect(PIPELINE) as conn:
        conn.execute("SELECT stg.begin_swap('things_latest')")
        conn.execute(fill.format("<").encode())
        things.given("raw.things", "shop | thing_id | price | updated_at\na | 1 | 2 | 2026-01-02")
        conn.execute(fill.format(">=").encode())
        conn.execute("SELECT stg.swap('things_latest')")
    assert things.rows("SELECT load_id FROM stg.pending_loads WHERE table_name = 'things_latest'") == [(2,)]

    refresh_by(things, "merge")

    assert things.rows(PUBLISHED) == [("a", 1, "2"), ("z", 1, "1")]


def test_spare_that_was_filled_before_a_merge_is_not_published_after_it(things: Warehouse) -> None:
    things.given("raw.things", "shop | thing_id | price | updated_at\na | 1 | 1 | 2026-01-01")
    refresh_by(things, "swap")
    with things.connect(PIPELINE) as conn:
        for statement in SWAP.split(";")[1:3]:
            conn.execute(statement.encode())
        things.given("raw.things", "shop | thing_id | price | updated_at\na | 1 | 2 | 2026-01-02")
        conn.execute("SELECT stg.merge_pending('things_latest')")

        with pytest.raises(errors.ObjectNotInPrerequisiteState, match="does not say which loads it took in"):
            conn.execute("SELECT stg.swap('things_latest')")


@by_every_refresh
def test_newer_version_than_the_tombstone_brings_the_key_back(things: Warehouse, refresh: str) -> None:
    things.given("raw.things", "shop | thing_id | is_deleted | updated_at\na | 1 | true | 2026-01-03")
    refresh_by(things, refresh)
    things.given(
        "raw.things",
        """
        shop | thing_id | is_deleted | price | updated_at
        a    | 1        | false      | 5     | 2026-01-04
        a    | 1        | NULL       | 6     | 2026-01-05
        """,
    )

    refresh_by(things, refresh)

    assert things.rows(PUBLISHED) == [("a", 1, "6")]
    assert things.rows(DELETED) == []
    assert verified(things) == (0, 0, 0, 1)


@by_every_refresh
def test_tombstone_that_comes_late_changes_nothing(things: Warehouse, refresh: str) -> None:
    things.given("raw.things", "shop | thing_id | price | updated_at\na | 1 | 1 | 2026-01-05")
    refresh_by(things, refresh)
    things.given("raw.things", "shop | thing_id | is_deleted | updated_at\na | 1 | true | 2026-01-03")

    refresh_by(things, refresh)

    assert things.rows(PUBLISHED) == [("a", 1, "1")]
    assert things.rows(DELETED) == []


@by_every_refresh
def test_on_a_tie_with_a_tombstone_what_arrived_last_wins(things: Warehouse, refresh: str) -> None:
    rows = "shop | thing_id | is_deleted | updated_at\n{}"
    things.given("raw.things", rows.format("a | 1 | true | 2026-01-01\nb | 1 | false | 2026-01-01"))
    refresh_by(things, refresh)
    things.given("raw.things", rows.format("a | 1 | false | 2026-01-01\nb | 1 | true | 2026-01-01"))

    refresh_by(things, refresh)

    assert [row[:2] for row in things.rows(PUBLISHED)] == [("a", 1)]
    assert things.rows(DELETED) == [("b", 1)]


@pytest.mark.parametrize("kinds", [("merge", "swap"), ("swap", "merge"), ("merge", "union"), ("union", "merge")])
def test_tombstones_are_remembered_from_one_kind_of_refresh_to_the_next(
    things: Warehouse, kinds: tuple[str, str]
) -> None:
    things.given("raw.things", "shop | thing_id | is_deleted | updated_at\na | 1 | true | 2026-01-03")
    refresh_by(things, kinds[0])
    things.given("raw.things", "shop | thing_id | price | updated_at\na | 1 | 1 | 2026-01-02\na | 2 | 2 | 2026-01-02")

    refresh_by(things, kinds[1])

    assert things.rows(PUBLISHED) == [("a", 2, "2")]
    assert things.rows(DELETED) == [("a", 1)]


def test_every_kind_makes_the_same_rows_of_a_long_history(things: Warehouse) -> None:
    for load in range(12):
        rows = "\n".join(
            f"a | {(load * 7 + n * 5) % 23} | {load} | {(load + n) % 4 == 0} | 2026-01-{(load * 5 + n) % 9 + 1:02}"
            for n in range(10)
        )
        things.given("raw.things", f"shop | thing_id | price | is_deleted | updated_at\n{rows}")
        refresh_by(things, list(REFRESHES)[load % 3])
        merged = things.rows("SELECT * FROM stg.things_latest ORDER BY thing_id")
        assert verified(things)[:3] == (0, 0, 0)
        refresh_by(things, "swap")
        assert things.rows("SELECT * FROM stg.things_latest ORDER BY thing_id") == merged


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("DELETE FROM stg.things_latest_live WHERE thing_id = 2", (1, 0, 0, 1)),
        ("DELETE FROM stg.things_latest_deleted", (1, 0, 0, 1)),
        ("UPDATE stg.things_latest_live SET price = 2.0", (0, 0, 1, 2)),
        (BRING_BACK, (0, 0, 1, 2)),
    ],
)
def test_verification_finds_what_somebody_else_changed(things: Warehouse, change: str, found: tuple[int, ...]) -> None:
    things.given(
        "raw.things",
        """
        shop | thing_id | price | is_deleted | updated_at
        a    | 1        | 1     | true       | 2026-01-01
        a    | 2        | 2     | NULL       | 2026-01-01
        """,
    )
    refresh_by(things, "merge")
    things.alter(change)

    assert verified(things) == found


def test_table_as_of_a_load_has_what_was_there_then(things: Warehouse) -> None:
    things.given("raw.things", "shop | thing_id | price | updated_at\na | 1 | 1 | 2026-01-01\na | 2 | 2 | 2026-01-01")
    things.given("raw.things", "shop | thing_id | is_deleted | updated_at\na | 1 | true | 2026-01-02")
    things.given("raw.things", "shop | thing_id | price | updated_at\na | 3 | 3 | 2026-01-03")
    as_of = "SELECT thing_id FROM stg.as_of_load(NULL::stg.things_latest, {}) ORDER BY thing_id"

    found = {load: [key for (key,) in things.rows(as_of.format(load))] for load in (1, 2, 3)}

    assert found == {1: [1, 2], 2: [2], 3: [2, 3]}


def test_rebuild_as_of_a_load_publishes_it_and_the_next_refresh_goes_on_from_there(things: Warehouse) -> None:
    for day in (1, 2, 3):
        things.given("raw.things", f"shop | thing_id | price | updated_at\na | {day} | {day} | 2026-01-0{day}")
        refresh_by(things, "merge")

    things.rows("SELECT stg.rebuild_as_of('things_latest', 2)", PIPELINE)

    assert things.rows(PUBLISHED) == [("a", 1, "1"), ("a", 2, "2")]
    assert things.rows("SELECT load_id FROM stg.pending_loads WHERE table_name = 'things_latest'") == [(3,)]
    assert verified(things) == (0, 0, 0, 2)
    refresh_by(things, "merge")
    assert things.rows(PUBLISHED) == [("a", 1, "1"), ("a", 2, "2"), ("a", 3, "3")]


def test_rebuild_as_of_a_load_of_another_table_is_refused(things: Warehouse) -> None:
    things.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")

    with pytest.raises(errors.RaiseException, match=r"load 1 is none of what stg\.things_latest is made from"):
        things.rows("SELECT stg.rebuild_as_of('things_latest', 1)", PIPELINE)


@pytest.mark.parametrize("kind", ["c", "i", "t", "g", "d"])
def test_dataset_is_made_like_orders(warehouse: Warehouse, kind: str) -> None:
    """Constraints, indexes, triggers, grants and what is behind the staging table, but for columns and own rules."""
    what = {
        "c": "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid IN ({})"
        " AND conname ~ 'pkey$|updated_at_is' AND contype IN ('c', 'p')",
        "i": "SELECT c.relname, pg_get_indexdef(c.oid), c.reloptions FROM pg_index AS i"
        " INNER JOIN pg_class AS c ON i.indexrelid = c.oid WHERE indrelid IN ({})",
        "t": "SELECT tgname, tgrelid::regclass::text, tgtype, tgenabled FROM pg_trigger WHERE tgrelid IN ({})",
        "g": "SELECT relname, relacl::text, relrowsecurity, relforcerowsecurity, reloptions, relowner::regrole::text"
        " FROM pg_class WHERE oid IN ({})",
        "d": "SELECT polname, pg_get_expr(polqual, polrelid) FROM pg_policy WHERE polrelid IN ({})",
    }[kind]
    names = [
        "raw.{}", "raw.{}_rejects", "stg.{}_latest", "stg.{}_latest_live", "stg.{}_latest_spare", "stg.{}_history"
    ]  # fmt: skip
    found = {}
    for dataset in ("orders", "customers"):
        tables = ", ".join(f"'{name.format(dataset)}'::regclass" for name in names)
        rows = warehouse.rows(what.format(tables), OWNER)
        found[dataset] = sorted(
            str(row).replace(" NOT VALID", "").replace(dataset, "X").replace(dataset[:-1] + "_id", "X_id")
            for row in rows
        )

    assert found["customers"] == found["orders"] != []


def test_dataset_without_updated_at_is_refused(warehouse: Warehouse) -> None:
    with pytest.raises(errors.RaiseException, match=r"raw\.things has no column updated_at timestamptz NOT NULL"):
        warehouse.alter("CREATE TABLE raw.things (id bigint); SELECT raw.create_dataset('things')")


def test_dataset_can_be_dropped_and_made_again(things: Warehouse) -> None:
    things.given("raw.things", "shop | thing_id | updated_at\na | 1 | 2026-01-01")
    refresh_by(things, "swap")
    with pytest.raises(errors.RaiseException, match=r"refusing to drop raw\.things: it has rows"):
        things.alter("SELECT stg.drop_latest('things'); SELECT raw.drop_dataset('things')")

    things.alter("SET de_dw.allow_data_loss = yes; SELECT stg.drop_latest('things'); SELECT raw.drop_dataset('things')")

    things.alter(THINGS)


def test_ledger_forgets_a_dataset_that_is_dropped_and_only_that(things: Warehouse) -> None:
    things.given("raw.things", "shop | thing_id | updated_at\na | 1 | 2026-01-01")
    things.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")

    things.alter("SET de_dw.allow_data_loss = yes; SELECT stg.drop_latest('things'); SELECT raw.drop_dataset('things')")

    assert things.rows("SELECT table_name FROM raw.loads") == [("raw.orders",)]
    with pytest.raises(errors.RestrictViolation):
        things.alter("DELETE FROM raw.loads")


@pytest.mark.parametrize("refresh", ["union", "merge"])
@pytest.mark.parametrize("key", ["key", "k", "version", "a"])
def test_columns_may_be_called_as_a_function_calls_its_own(warehouse: Warehouse, refresh: str, key: str) -> None:
    names = [name for name in ("a", "b", "k", "version", "expected", "published", "newest", "newer") if name != key]
    columns = ", ".join(f"{name} text" for name in [*names, "is_tombstone", "loads", "source"])
    warehouse.alter(f"""
        CREATE TABLE raw.odd ({key} text NOT NULL, deleted boolean, {columns}, updated_at timestamptz NOT NULL);
        SELECT raw.create_dataset('odd');
        SELECT stg.create_latest('odd', '{{{key}}}', 'deleted', 'true');
    """)
    warehouse.given("raw.odd", f"{key} | deleted | updated_at\n1 | NULL | 2026-01-01\n2 | true | 2026-01-01")

    warehouse.rows(f"SELECT * FROM stg.{refresh}_pending('odd_latest')", PIPELINE)

    assert warehouse.rows(f"SELECT {key} FROM stg.odd_latest") == [("1",)]
    assert warehouse.verification("odd_latest") == (0, 0, 0, 2)
    pending = "SELECT key ->> '%s' FROM ops.pending_versions('-infinity', 9) ORDER BY 1"
    with warehouse.connect(PIPELINE) as conn:
        conn.execute(
            "SELECT set_config('de_dw.table', 'odd_latest', true), set_config('de_dw.loads_to_apply', '{1}', true)"
        )
        assert conn.execute((pending % key).encode()).fetchall() == [("1",), ("2",)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("'{id}'", "the key of stg.odd_latest has no column NOT NULL of the name id"),
        ("'{code,nothing}'", "no column NOT NULL of the name nothing"),
        ("'{code}', 'is_deleted', 'J'", 'invalid input syntax for type boolean: "J"'),
        ("'{code}', 'nothing', 'J'", 'column "nothing" does not exist'),
    ],
)
def test_key_that_may_be_null_and_tombstone_that_is_none_are_refused_when_the_table_is_made(
    warehouse: Warehouse, arguments: str, message: str
) -> None:
    warehouse.alter("""
        CREATE TABLE raw.odd (id text, code text NOT NULL, is_deleted boolean, updated_at timestamptz NOT NULL);
        SELECT raw.create_dataset('odd');
    """)

    with pytest.raises(Error, match=message):
        warehouse.alter(f"SELECT stg.create_latest('odd', {arguments})")


@pytest.mark.parametrize("name", FEEDS)
def test_feeds_of_the_bench_are_datasets(warehouse: Warehouse, name: str) -> None:
    warehouse.alter(create_raw(name, FEEDS[name]) + create_latest(name, FEEDS[name]))

    with warehouse.connect(PIPELINE, autocommit=True) as conn:
        conn.execute(transform(name, FEEDS[name]).encode())

    assert warehouse.rows(f"SELECT count(*) FROM stg.{name}_latest") == [(0,)]


def test_pipeline_can_not_make_or_drop_a_dataset(things: Warehouse) -> None:
    for statement in (
        "SELECT raw.create_dataset('orders')",
        "SELECT raw.drop_dataset('things')",
        "SELECT stg.create_latest('orders', '{order_id}')",
        "SELECT stg.drop_latest('things')",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            things.alter(statement, PIPELINE)
