"""sql/checks/: what each finds, how a check is named, and that what they found is kept."""

import json
from pathlib import Path
from typing import Any

import psycopg
import pytest
from batch_check import EXAMPLES, Check, Result, check_pending, find_checks

from tests.conftest import SWAP, by_every_refresh
from tests.warehouse import ROOT, Warehouse, script_of

FOLDER = ROOT / "sql" / "checks"
TABLE = "orders_latest"
NOW = "order_id | updated_at\n1 | now"


def check(warehouse: Warehouse, checks: list[Check] | None = None, **more: Any) -> dict[str, Result]:
    """Make the checks as the pipeline does; what came out, by name."""
    with warehouse.connect() as conn:
        found = find_checks(FOLDER, TABLE) if checks is None else checks
        _, results = check_pending(conn, table=TABLE, checks=found, **more)
    return {result.name: result for result in results}


def offending(warehouse: Warehouse) -> dict[str, int]:
    """The checks that found something, with the number of rows."""
    return {name: result.offending for name, result in check(warehouse).items() if result.offending}


def ledger(warehouse: Warehouse, *loads: tuple[int, int]) -> None:
    """Loads of so many rows and rejects, none of which is in raw."""
    with warehouse.connect() as conn:
        for rows, rejects in loads:
            conn.execute(
                "INSERT INTO raw.loads (table_name, batch_id, source, sha256, bytes, rows, rejects)"
                " SELECT 'raw.orders', id, 'test', encode(sha256(id::bytea), 'hex'), 9, %s, %s"
                " FROM (SELECT gen_random_uuid()::text) AS new (id)",
                (rows, rejects),
            )


@pytest.fixture
def applied(warehouse: Warehouse) -> Warehouse:
    """One order is published, nothing is pending."""
    warehouse.given("raw.orders", NOW)
    warehouse.run(SWAP)
    return warehouse


def test_the_checks_that_are_shipped_find_nothing_in_a_good_batch(applied: Warehouse) -> None:
    applied.given("raw.orders", NOW)

    assert {name: result.outcome for name, result in check(applied).items()} == {
        "freshness": "passed",
        "no_future_updated_at": "passed",
        "not_empty": "passed",
        "rejected_share": "passed",
        "row_count": "passed",
    }


def test_nothing_is_asked_when_nothing_is_pending(applied: Warehouse) -> None:
    assert check(applied) == {}
    assert applied.rows("SELECT count(*) FROM ops.check_results") == [(0,)]


@pytest.mark.parametrize(
    ("loads", "found"),
    [([(0, 0)], 1), ([(0, 0), (0, 0)], 2), ([(0, 0), (1, 0)], 0), ([(0, 3)], 1)],
)
def test_not_empty_finds_loads_without_a_row_between_them(
    applied: Warehouse, loads: list[tuple[int, int]], found: int
) -> None:
    ledger(applied, *loads)

    assert check(applied)["not_empty"].offending == found


@pytest.mark.parametrize(("rows", "rejects", "found"), [(99, 1, 0), (98, 2, 1), (0, 1, 1), (1000, 10, 0), (0, 0, 0)])
def test_rejected_share_finds_more_than_one_percent(applied: Warehouse, rows: int, rejects: int, found: int) -> None:
    ledger(applied, (rows, rejects))

    assert check(applied)["rejected_share"].offending == found


@pytest.mark.parametrize(
    ("before", "rows", "found"),
    [
        ([100, 100, 100], 100, 0),
        ([100, 100, 100], 50, 0),
        ([100, 100, 100], 49, 1),
        ([100, 100, 100], 200, 0),
        ([100, 100, 100], 201, 1),
        ([100, 100, 100], 0, 1),
        ([100, 1, 1000], 60, 0),
        ([100], 1, 0),
        ([1] * 20 + [100] * 20, 100, 0),
    ],
    ids=str,
)
def test_row_count_finds_what_is_far_from_the_median_before(
    warehouse: Warehouse, before: list[int], rows: int, found: int
) -> None:
    ledger(warehouse, *((count, 0) for count in before))
    warehouse.alter(
        "INSERT INTO stg.applied_loads (table_name, load_id, finished_at)"
        " SELECT 'orders_latest', load_id, finished_at FROM raw.loads;"
        " INSERT INTO stg.orders_latest_live (order_id, updated_at, row_id, load_id) VALUES (1, now(), 1, 1)"
    )
    ledger(warehouse, (rows, 0))

    assert check(warehouse)["row_count"].offending == found


@pytest.mark.parametrize(("age", "found"), [("23 hours", 0), ("25 hours", 1)])
def test_freshness_finds_a_batch_whose_newest_version_is_older_than_a_day(
    applied: Warehouse, age: str, found: int
) -> None:
    ((moment,),) = applied.rows(f"SELECT (now() - interval '{age}')::text")
    applied.given("raw.orders", f"order_id | updated_at\n2 | 2020-01-01\n3 | {moment}")

    assert check(applied)["freshness"].offending == found


def test_constraint_refuses_the_future_and_the_check_finds_what_came_before_it(applied: Warehouse) -> None:
    future = "order_id | updated_at\n7 | 2999-01-01"
    with pytest.raises(psycopg.errors.CheckViolation, match="updated_at_is_not_in_the_future"):
        applied.given("raw.orders", future)
    applied.alter("ALTER TABLE raw.orders DROP CONSTRAINT updated_at_is_not_in_the_future")
    applied.given("raw.orders", future)

    result = check(applied)["no_future_updated_at"]

    assert (result.outcome, result.offending) == ("failed", 1)
    assert json.loads(result.examples[0])["key"]["order_id"] == 7


def test_only_what_is_pending_is_checked(applied: Warehouse) -> None:
    applied.given("raw.orders", "order_id | updated_at\n2 | 2020-01-01")
    assert offending(applied) == {"freshness": 1}
    applied.run(f"{SWAP}.merge")
    applied.given("raw.orders", NOW)

    assert offending(applied) == {}


def test_every_result_is_kept_with_the_loads_and_the_run(applied: Warehouse) -> None:
    applied.given("raw.orders", "order_id | updated_at\n2 | 2020-01-01")

    check(applied, batch_id="manual__1")

    assert applied.rows(
        "SELECT check_name, severity, outcome, offending, batch_id, load_ids FROM ops.last_checks ORDER BY check_name"
    ) == [
        ("freshness", "warn", "warned", 1, "manual__1", [2]),
        ("no_future_updated_at", "fail", "passed", 0, "manual__1", [2]),
        ("not_empty", "warn", "passed", 0, "manual__1", [2]),
        ("rejected_share", "warn", "passed", 0, "manual__1", [2]),
        ("row_count", "warn", "passed", 0, "manual__1", [2]),
    ]
    ((examples,),) = applied.rows("SELECT examples FROM ops.last_checks WHERE offending > 0")
    assert examples[0]["newest_updated_at"] == "2020-01-01T00:00:00+00:00"


def test_of_many_offending_rows_all_are_counted_and_some_kept(applied: Warehouse, tmp_path: Path) -> None:
    applied.given("raw.orders", NOW)
    path = tmp_path / "many.warn.sql"
    path.write_text("SELECT n, CASE n WHEN 1 THEN repeat('\"', 9000) END AS t FROM generate_series(1, 1000) AS n -- %s")

    result = check(applied, [Check("many", "warn", path)])["many"]

    assert (result.offending, len(result.examples)) == (1000, EXAMPLES)
    assert len(result.examples[0]) < 9000
    ((examples,),) = applied.rows("SELECT examples FROM ops.check_results")
    assert len(examples) == EXAMPLES
    assert "cut off" in examples[0]
    assert examples[1] == {"n": 2, "t": None}


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 1 / 0",
        "SELECT 1; SELECT 2",
        "SELECT 1 AS one; -- said",
        "",
        "-- nothing",
        "DELETE FROM stg.orders_latest_live RETURNING order_id",
        (
            "INSERT INTO stg.applied_loads (table_name, load_id, finished_at)"
            " SELECT table_name, load_id, finished_at FROM stg.pending_loads RETURNING load_id"
        ),
        "SELECT 'M\xfcller' AS name",
    ],
)
def test_check_that_does_not_run_or_writes_is_an_error_that_names_it(
    applied: Warehouse, tmp_path: Path, text: str
) -> None:
    applied.given("raw.orders", NOW)
    path = tmp_path / "wrong.warn.sql"
    path.write_text(text, encoding="latin-1")

    with pytest.raises((psycopg.Error, UnicodeError)) as error:
        check(applied, [Check("wrong", "warn", path)])

    assert error.value.__notes__ == [f"in {path}, whose first line is line 3 of the statement"]
    assert applied.rows("SELECT count(*) FROM ops.check_results") == [(0,)]
    assert applied.rows("SELECT load_id FROM stg.pending_loads") == [(2,)]
    assert applied.rows("SELECT order_id FROM stg.orders_latest") == [(1,)]


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffSELECT 1 AS offending;\r\n",
        "WITH a AS (SELECT 1 AS b) SELECT b, b FROM a ORDER BY b DESC LIMIT 1",
        "SELECT",
        "VALUES ('100% {of} \\ it')",
        "SELECT set_config('de_dw.loads_to_apply', '{}', true)",
    ],
)
def test_check_may_be_any_query_and_changes_nothing_for_the_next(applied: Warehouse, tmp_path: Path, text: str) -> None:
    applied.given("raw.orders", "order_id | updated_at\n2 | 2020-01-01")
    path = tmp_path / "a.warn.sql"
    path.write_text(text, encoding="utf-8", newline="")

    results = check(applied, [Check("a", "warn", path), *find_checks(FOLDER, TABLE)])

    assert results["a"].offending == 1
    assert results["freshness"].offending == 1


def test_accepted_check_counts_as_such_and_only_it(applied: Warehouse, tmp_path: Path) -> None:
    applied.given("raw.orders", NOW)
    checks = []
    for name in ("a", "b", "c"):
        path = tmp_path / f"{name}.fail.sql"
        path.write_text("SELECT 1 AS one WHERE false" if name == "c" else "SELECT 1 AS one;\n")
        checks.append(Check(name, "fail", path))

    outcomes = {name: result.outcome for name, result in check(applied, checks, accept=["a", "c"]).items()}

    assert outcomes == {"a": "accepted", "b": "failed", "c": "passed"}
    kept = "SELECT check_name, is_accepted, outcome FROM ops.last_checks AS l INNER JOIN ops.check_results AS r"
    assert applied.rows(f"{kept} USING (check_name) ORDER BY check_name") == [
        ("a", True, "accepted"),
        ("b", False, "failed"),
        ("c", False, "passed"),
    ]
    with pytest.raises(ValueError, match="no check of severity fail is called d, e: there are a, b, c"):
        check(applied, checks, accept=["e", "a", "d"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of checks, beside the transforms of two tables."""
    for table in ("orders_latest", "customers_latest"):
        (tmp_path / "transforms").mkdir(exist_ok=True)
        (tmp_path / "transforms" / f"stg.{table}.sql").touch()
    (tmp_path / "checks").mkdir()
    return tmp_path / "checks"


def test_check_is_of_all_tables_or_of_one_by_its_name(folder: Path) -> None:
    for name in ("a.warn", "stg.orders_latest.b.fail", "stg.customers_latest.b.fail", "stg.customers_latest.c.warn"):
        (folder / f"{name}.sql").touch()
    (folder / "._a.warn.sql").touch()

    def found(table: str) -> list[tuple[str, str]]:
        return [(check.name, check.severity) for check in find_checks(folder, table)]

    assert found("orders_latest") == [("a", "warn"), ("b", "fail")]
    assert found("customers_latest") == [("a", "warn"), ("b", "fail"), ("c", "warn")]
    assert found("others") == [("a", "warn")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *(
            (name, "severities are fail, warn")
            for name in ("a.sql", "a.error.sql", "raw.a.warn.sql", "a.b.c.d.warn.sql")
        ),
        *((name, "severities are fail, warn") for name in ("warn.sql", "a.warn.SQL", "a.warn.sql.txt", "README")),
        ("stg.order_latest.a.warn.sql", r"sql/transforms/ makes no table stg\.order_latest"),
    ],
)
def test_file_that_would_not_be_asked_is_refused(folder: Path, name: str, message: str) -> None:
    (folder / name).touch()

    with pytest.raises(ValueError, match=message):
        find_checks(folder, TABLE)


def test_folder_that_is_away_is_no_pass(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such folder, so nothing would be checked"):
        find_checks(tmp_path / "checks", TABLE)


def test_two_checks_of_one_name_are_refused(folder: Path) -> None:
    for name in ("a.warn.sql", "stg.orders_latest.a.fail.sql"):
        (folder / name).touch()

    with pytest.raises(ValueError, match=r"there is a check of this name already, a\.warn\.sql"):
        find_checks(folder, TABLE)


ONLY_CHECKED = "SET de_dw.refresh_only = 'checked'"
LATE = "order_id | updated_at\n9 | now"


@by_every_refresh
def test_refresh_of_the_dag_takes_in_what_was_checked(applied: Warehouse, refresh: str) -> None:
    for settings in (ONLY_CHECKED, ""):
        applied.given("raw.orders", NOW)
        if settings:
            check(applied)
        applied.run(refresh, settings=settings)

        assert applied.rows("SELECT * FROM stg.pending_loads") == []


@by_every_refresh
def test_refresh_of_the_dag_refuses_a_load_that_came_after_the_checks(applied: Warehouse, refresh: str) -> None:
    applied.given("raw.orders", NOW)
    check(applied)
    applied.given("raw.orders", LATE)

    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="never checked: load 3"):
        applied.run(refresh, settings=ONLY_CHECKED)

    assert applied.rows("SELECT load_id FROM stg.pending_loads ORDER BY load_id") == [(2,), (3,)]
    check(applied)
    applied.run(refresh, settings=ONLY_CHECKED)
    assert applied.rows("SELECT count(*) FROM stg.pending_loads") == [(0,)]


def test_load_that_is_committed_while_a_swap_begins_is_not_swapped_in_unchecked(applied: Warehouse) -> None:
    begin, fill = script_of(SWAP).split("INSERT INTO")
    applied.given("raw.orders", NOW)
    check(applied)

    with applied.connect(autocommit=True) as conn:
        conn.execute(ONLY_CHECKED)
        conn.execute(begin.encode())
        applied.given("raw.orders", LATE)
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="never checked: load 3"):
            conn.execute(f"INSERT INTO{fill}".encode())

    assert applied.rows("SELECT order_id FROM stg.orders_latest") == [(1,)]


@by_every_refresh
def test_refresh_of_the_dag_refuses_what_failed_until_it_is_accepted(
    applied: Warehouse, tmp_path: Path, refresh: str
) -> None:
    applied.given("raw.orders", NOW)
    path = tmp_path / "a.fail.sql"
    path.write_text("SELECT 1 AS one")
    check(applied, [Check("a", "fail", path)])

    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="failed the last time: a"):
        applied.run(refresh, settings=ONLY_CHECKED)

    check(applied, [Check("a", "fail", path)], accept=["a"])
    applied.run(refresh, settings=ONLY_CHECKED)
    assert applied.rows("SELECT count(*) FROM stg.pending_loads") == [(0,)]


def test_the_last_checks_are_those_that_were_made_last(applied: Warehouse, tmp_path: Path) -> None:
    path = tmp_path / "a.fail.sql"
    path.write_text("SELECT order_id FROM raw.orders WHERE order_id = 9")
    applied.given("raw.orders", NOW)
    with applied.connect() as older:
        older.execute("SELECT now()")
        check(applied, [Check("a", "fail", path)])
        applied.given("raw.orders", LATE)
        check_pending(older, table=TABLE, checks=[Check("a", "fail", path)])

    assert applied.rows("SELECT outcome, load_ids FROM ops.last_checks") == [("failed", [2, 3])]


def test_nothing_of_the_pipeline_s_runs_as_whoever_looks_at_ops(applied: Warehouse) -> None:
    applied.alter(
        """
        CREATE FUNCTION stg.trojan() RETURNS bigint LANGUAGE plpgsql AS $$
            BEGIN RAISE EXCEPTION 'it runs as %', current_user; END $$;
        CREATE VIEW stg.bait AS SELECT stg.trojan() AS order_id;
        """,
        "de_dw_pipeline",
    )
    for change in (
        "UPDATE stg.table_versions SET source_table = 'stg.bait'",
        "ALTER TABLE stg.table_versions ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY p ON stg.table_versions USING (stg.trojan() > 0)",
        "CREATE TRIGGER t BEFORE UPDATE ON stg.table_versions EXECUTE FUNCTION raw.refuse_change()",
        "INSERT INTO stg.table_versions (table_name, source_table) VALUES ('bait', 'stg.bait')",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            applied.alter(change, "de_dw_pipeline")
    applied.alter("UPDATE stg.table_versions SET source_table = 'stg.bait'")
    with pytest.raises(psycopg.errors.RaiseException, match="does not say what"):
        applied.rows("SELECT * FROM ops.versions_per_key('orders_latest')", "")


@pytest.mark.parametrize("role", ["de_dw_pipeline", "de_dw_reader", ""])
@pytest.mark.parametrize("statement", ["UPDATE {} SET offending = 0", "DELETE FROM {}", "TRUNCATE {}"])
def test_nobody_changes_what_was_found(applied: Warehouse, role: str, statement: str) -> None:
    applied.given("raw.orders", NOW)
    check(applied)

    with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.RestrictViolation)):
        applied.alter(statement.format("ops.check_results"), role)
