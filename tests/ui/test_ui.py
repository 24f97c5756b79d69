"""The UI as its users have it, in a browser, from the login to a warehouse that is down.

The tests follow each other on one warehouse: at first it has no loads.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from playwright.sync_api import expect
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.local.up import Up
from tests.ui.conftest import Window
from tests.warehouse import wait_until

# 500 loads, one a day; some with rejects, the last two not applied. What they brought is not there: the page asks the
# ledger. Sizes rise and fall like a shop's weeks.
MANY_LOADS = """
WITH loaded AS (
    INSERT INTO raw.loads (
        table_name, batch_id, source, sha256, bytes, rows, rejects, batch_updated_at, started_at, finished_at
    )
    SELECT
        'raw.orders',
        'daily-' || day::date,
        '/deliveries/orders-' || day::date || '.csv.gz',
        encode(sha256(day::text::bytea), 'hex'),
        rows * 163,
        rows,
        CASE WHEN n % 7 = 3 THEN n % 9 ELSE 0 END,
        day,
        day + interval '3 hours',
        day + interval '3 hours' + rows * interval '2.5 microseconds' + interval '20 milliseconds' * (1 + n % 3)
    FROM (
        SELECT
            n,
            now() - interval '1 day' * (500 - n) - interval '4 hours' AS day,
            (1500 + 800 * sin(n / 3.5) + n)::bigint AS rows
        FROM generate_series(1, 500) AS n
    ) AS days
    RETURNING load_id, finished_at, batch_id
)

INSERT INTO stg.applied_loads (table_name, load_id, finished_at, applied_at)
SELECT 'orders_latest', load_id, finished_at, finished_at + interval '1 second'
FROM loaded
ORDER BY load_id
LIMIT 498
"""


NO_ORDER_7 = """\
-- no_order_7: one row per order that is about to be taken in and has the number 7.
SELECT
    order_id,
    quantity,
    load_id
FROM raw.orders
WHERE load_id IN (SELECT unnest(current_setting('de_dw.loads_to_apply')::bigint[])) AND order_id = 7
"""


FORM = {  # title of each field, and words of its description
    "Rows": "1 to 50 million",
    "Seed": "new versions of the same keys",
    "Source": "What the ledger knows is left out",
    "Bad records allowed": "such as 1%",
    "Load again": "the same bytes before",
    "Checks to accept": "though these checks fail",
    "Refresh": "the fastest that is right",
}
FILES = int(os.environ.get("UI_FILES", "4"))  # that are delivered
SUCCESS = re.compile("^Success$")


def run(up: Up, dag: str = "orders", **conf: Any) -> tuple[str, str]:
    """A run of a DAG by the API: its run_id, and how it ended."""
    run_id: str = up.call("POST", f"/api/v2/dags/{dag}/dagRuns", {"logical_date": None, "conf": conf})["dag_run_id"]
    return run_id, up.finish(quote(run_id), dag)


@pytest.fixture
def run_id(up: Up) -> str:
    """A run of 250 rows that is through."""
    runs = up.call("GET", "/api/v2/dags/orders/dagRuns?state=success&order_by=-start_date")["dag_runs"]
    found = [run["dag_run_id"] for run in runs if run["conf"].get("rows") == 250]
    return found[0] if found else run(up, rows=250)[0]


def test_nobody_sees_anything_without_a_login(stranger: Window) -> None:
    stranger.open("/dags/orders")

    expect(stranger.page.get_by_role("heading", name="Sign into Airflow")).to_be_visible()
    expect(stranger.page.get_by_text("load_raw")).not_to_be_visible()
    for path in ("/api/v2/dags", "/ui/dags", "/warehouse/", "/warehouse/rejects", "/warehouse/static/warehouse.css"):
        assert stranger.page.request.get(stranger.up.base + path).status == 401, path
    stranger.expected.append("/warehouse/")
    stranger.open("/warehouse/")
    expect(stranger.page.get_by_role("heading", name="You are not logged in")).to_be_visible()
    stranger.page.get_by_role("link", name="Log in").click()
    stranger.log_in(stranger.up.password)
    expect(
        stranger.page.frame_locator("iframe").get_by_role("heading", name=re.compile(r"stg\.\w+_latest"))
    ).to_be_visible()


def test_the_password_that_make_up_prints_logs_in_and_no_other(stranger: Window) -> None:
    stranger.expected.append("/auth/token")
    stranger.open("/")
    stranger.log_in(stranger.up.password[::-1])
    expect(stranger.page.get_by_text("Invalid credentials")).to_be_visible()

    stranger.log_in(stranger.up.password)

    expect(stranger.page.get_by_role("heading", name="Welcome")).to_be_visible()


def test_warehouse_page_says_what_to_do_when_nothing_is_loaded(window: Window) -> None:
    window.open("/")
    page = window.warehouse_page()

    expect(page.get_by_role("heading", name="Nothing has been loaded yet")).to_be_visible()
    window.picture("warehouse-empty")
    page.get_by_role("link", name="The DAGs").click()
    expect(window.page).to_have_url(re.compile("/dags$"))


def test_run_that_is_triggered_by_the_form_turns_green(window: Window) -> None:
    window.open("/dags/orders")
    window.page.get_by_role("button", name="Trigger Dag").click()
    form = window.page.get_by_role("dialog")
    for title, description in FORM.items():
        field = form.get_by_role("group").filter(has_text=re.compile(f"^{title}"))
        expect(field).to_contain_text(description)
    form.get_by_label("Rows").fill("250")
    form.get_by_role("group").filter(has_text="Bad records allowed").get_by_role("textbox").fill("1%")
    window.resize(1200)
    window.picture("trigger")
    window.resize()

    form.get_by_role("button", name="Trigger", exact=True).click()

    expect(window.page).to_have_url(re.compile("/runs/manual__"))
    expect(window.page.get_by_text(SUCCESS).first).to_be_visible()
    window.page.get_by_role("button", name="Show Graph").click()
    graph = window.page.get_by_role("application")
    for task, state in {"load_raw": "success", "swap_latest": "success", "merge_latest": "skipped"}.items():
        node = graph.locator(".react-flow__node").filter(has_text=task)
        expect(node).to_contain_text(state)
    window.page.get_by_role("button", name="Collapse Details Panel").click()
    window.resize(720)
    window.page.get_by_role("button", name="Fit View").click()
    window.picture("graph")


def test_log_of_a_load_says_what_came(window: Window, run_id: str) -> None:
    window.open(f"/dags/orders/runs/{quote(run_id)}")
    window.page.get_by_role("row").get_by_role("link", name="load_raw").click()
    window.page.get_by_role("link", name=run_id).last.click()  # of its files, the one that the run has made

    expect(window.page.get_by_text(re.compile(r"raw\.orders: load \d+: 250 rows, .* MB in .* s")).first).to_be_visible()


@pytest.mark.parametrize(
    ("asset", "facts"),
    [
        ("raw.orders", ["rows: 250", "rejects: 0", "summary: raw.orders: load "]),
        ("stg.orders_latest", ["rows: 250", "refresh: swap", "why: no load has been applied yet"]),
    ],
    ids=["raw", "stg"],
)
def test_asset_tells_what_its_last_event_was(window: Window, run_id: str, asset: str, facts: list[str]) -> None:
    window.open("/")
    window.navigate("Assets")
    expect(window.page.get_by_role("heading", name="Assets")).to_be_visible()  # Home has links of these names, too
    window.page.get_by_role("link", name=asset, exact=True).click()
    expect(window.page.get_by_role("heading", name=asset)).to_be_visible()
    window.page.locator(".codicon-folding-collapsed").first.click()  # the newest event's extra, which is folded

    extra = window.page.locator(".view-lines").first

    def shown() -> str:  # which is drawn line by line
        return re.sub(r"\s+", " ", extra.inner_text()).replace('"', "")

    wait_until(lambda: all(fact in shown() for fact in facts), 30, f"{facts} is not shown")
    window.picture(f"asset-{asset}")


def test_dag_that_is_scheduled_on_the_staging_table_runs_by_itself(window: Window, run_id: str) -> None:
    window.open("/dags/downstream/runs")
    window.page.locator("a[href*='/runs/asset_triggered']").first.click()
    expect(window.page.get_by_text(SUCCESS).first).to_be_visible()

    window.page.get_by_role("row").get_by_role("link", name="report").click()

    expect(window.page.get_by_text(re.compile("stg.orders_latest: swap of 1 load, 250 rows")).first).to_be_visible()


def test_warehouse_page_shows_a_run_s_load_and_leads_to_the_run(window: Window, run_id: str) -> None:
    window.open("/")
    page = window.warehouse_page()

    row = page.locator("#loads").get_by_role("row").filter(has_text=run_id)
    expect(row).to_contain_text("250")
    expect(row.locator(f"[title$='data/raw/orders-{run_id}.csv']")).to_be_visible()
    expect(page.locator("#versions")).to_contain_text("250")
    row.get_by_role("link", name=run_id).click()

    expect(window.page).to_have_url(
        re.compile(f"/dags/orders/runs/{re.escape(quote(run_id, safe=''))}|{re.escape(run_id)}")
    )
    expect(window.page.get_by_role("heading", name=run_id)).to_be_visible()


@pytest.fixture
def check(up: Up) -> Iterator[Any]:
    """Write a file of sql/checks/; it is gone again after the test."""
    written: list[Path] = []

    def write(name: str, query: str) -> None:
        written.append(up.clone / "sql" / "checks" / f"{name}.sql")
        written[-1].write_text(query)

    yield write
    for path in written:
        path.unlink()


def test_check_that_fails_stops_the_run_and_shows_the_rows(
    window: Window, run_id: str, check: Any, warehouse: psycopg.Connection[Any]
) -> None:
    published = "SELECT count(*), max(load_id), sum(quantity) FROM stg.orders_latest"
    before = warehouse.execute(published).fetchone()
    check("no_order_7.fail", NO_ORDER_7)

    failed, state = run(window.up, rows=10)

    assert state == "failed"
    assert warehouse.execute(published).fetchone() == before
    window.open(f"/dags/orders/runs/{quote(failed)}/tasks/check_batch")
    expect(window.page.get_by_text(re.compile('"order_id":7,')).first).to_be_visible()
    window.picture("check-failed-log")
    page = window.warehouse_page()
    row = page.locator("#checks").get_by_role("row").filter(has_text="no_order_7")
    expect(row).to_contain_text("failed")
    expect(page.locator("#waiting")).to_contain_text(failed)
    window.picture("check-failed")


def test_check_that_warns_lets_the_run_go_on_and_is_seen(window: Window, run_id: str, check: Any) -> None:
    check("no_order_7.warn", NO_ORDER_7)

    _, state = run(window.up, rows=60_000)  # as many as make the figures of the next test's pictures plausible

    assert state == "success"
    window.open("/")
    page = window.warehouse_page()
    row = page.locator("#checks").get_by_role("row").filter(has_text="no_order_7")
    expect(row).to_contain_text("warned")
    row.get_by_role("group").locator("summary").click()
    expect(row).to_contain_text('"order_id":7')
    window.picture("check-warned")


def test_warehouse_page_with_500_loads_is_paged_and_follows_light_and_dark(
    window: Window, run_id: str, warehouse: psycopg.Connection[Any]
) -> None:
    warehouse.execute(MANY_LOADS)
    window.open("/")
    page = window.warehouse_page()

    rows = page.locator("#loads tbody tr")
    expect(rows).to_have_count(50)
    expect(page.locator("#waiting")).to_contain_text("daily-")
    expect(page.locator("h1")).to_have_css("color", "rgb(27, 29, 34)")
    window.resize(3000)
    window.picture("warehouse-500")
    window.resize(680)
    window.picture("warehouse")
    window.page.get_by_role("button", name="User").click()
    window.page.get_by_role("menuitem", name="Appearance").hover()
    window.page.get_by_text("Dark Mode").click()
    expect(page.locator("h1")).to_have_css("color", "rgb(237, 237, 240)")
    window.page.mouse.move(640, 670)
    window.picture("warehouse-dark")

    page.get_by_role("link", name="Older").last.click()
    expect(rows.first).to_contain_text("daily-")


def test_warehouse_that_is_down_is_said_and_comes_back_by_itself(
    window: Window, run_id: str, warehouse: psycopg.Connection[Any]
) -> None:
    window.expected.append("503")
    window.open("/")
    page = window.warehouse_page()
    expect(page.locator("#loads")).to_be_visible()
    name = sql.Identifier(warehouse.info.dbname)
    with psycopg.connect(make_conninfo(window.up.warehouse, dbname="postgres"), autocommit=True) as server:
        server.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(name))
        try:
            server.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [warehouse.info.dbname]
            )
            expect(page.locator("#loads")).to_have_count(0)  # within its 10 s, by itself
            expect(page.locator("main")).to_contain_text("Airflow itself works")
            window.picture("warehouse-down")
            window.navigate("Dags")
            expect(window.page.locator("a[href='/dags/orders']")).to_be_visible()
            page = window.warehouse_page()
            expect(page.locator("main")).to_contain_text("Airflow itself works")
        finally:
            server.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(name))

    expect(page.locator("#loads")).to_be_visible()


def test_run_of_several_files_says_which_were_refused_and_why(window: Window) -> None:
    landing = window.up.clone / "data" / "landing"
    landing.mkdir(parents=True)
    header = "customer_id,name,email,country,updated_at\n"
    for number in range(1, FILES + 1):
        (landing / f"{number}.csv").write_text(f"{header}{number},Ann,,DE,2026-01-01\n")
        if number == 1:
            assert run(window.up, "customers", source="landing/*.csv")[1] == "success"
    (landing / "2.csv").write_text(f"{header}2,Ann,,DE,yesterday evening\n")
    (landing / "3.csv").write_text(f"{header}3,Ann,,DE,2026-01")

    run_id, state = run(window.up, "customers", source="landing/*.csv")

    assert state == "failed"
    window.open(f"/dags/customers/runs/{quote(run_id)}")
    expect(window.page.get_by_role("row").get_by_role("link", name="landing/").first).to_be_visible()
    window.picture("files-run")
    window.page.get_by_role("button", name="Show Graph").click()
    expect(window.page.get_by_role("application").get_by_text("report_files")).to_be_visible()
    window.picture("files-graph")
    window.page.evaluate("localStorage.clear()")  # without the graph
    window.open(f"/dags/customers/runs/{quote(run_id)}/tasks/report_files")
    said = re.compile(rf"{FILES} files: {FILES - 3} loaded \({FILES - 3} rows?\), 1 loaded before, 2 refused")
    expect(window.page.get_by_text(said).first).to_be_visible()
    expect(window.page.get_by_text("yesterday evening").first).to_be_visible()
    window.picture("files-refused")
