"""The UI as its users have it, in a browser, from the login to a warehouse that is down.

The tests follow each other on one warehouse: at first it has no loads.
"""

import re
from typing import Any
from urllib.parse import quote

import pytest
from playwright.sync_api import expect

from tests.local.up import Up
from tests.ui.conftest import Window

SUCCESS = re.compile("^Success$")


def run(up: Up, **conf: Any) -> tuple[str, str]:
    """A run of the DAG by the API: its run_id, and how it ended."""
    run_id: str = up.call("POST", "/api/v2/dags/orders/dagRuns", {"logical_date": None, "conf": conf})["dag_run_id"]
    return run_id, up.finish(quote(run_id))


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
    for path in ("/api/v2/dags", "/api/v2/assets/events", "/ui/dags"):
        assert stranger.page.request.get(stranger.up.base + path).status == 401


def test_the_password_that_make_up_prints_logs_in_and_no_other(stranger: Window) -> None:
    stranger.expected.append("/auth/token")
    stranger.open("/")
    stranger.log_in(stranger.up.password[::-1])
    expect(stranger.page.get_by_text("Invalid credentials")).to_be_visible()

    stranger.log_in(stranger.up.password)

    expect(stranger.page.get_by_role("heading", name="Welcome")).to_be_visible()


def test_run_that_is_triggered_by_the_form_turns_green(window: Window) -> None:
    window.open("/dags/orders")
    window.page.get_by_role("button", name="Trigger Dag").click()
    form = window.page.get_by_role("dialog")
    for title, description in {
        "Rows": "1 to 50 million",
        "Seed": "new versions of the same orders",
        "Bad records allowed": "such as 1%",
        "Load again": "the same bytes before",
        "Refresh": "the fastest that is right",
    }.items():
        field = form.get_by_role("group").filter(has_text=re.compile(f"^{title}"))
        expect(field).to_contain_text(description)
    form.get_by_label("Rows").fill("250")
    form.get_by_role("group").filter(has_text="Bad records allowed").get_by_role("textbox").fill("1%")
    window.picture("trigger")

    form.get_by_role("button", name="Trigger", exact=True).click()

    expect(window.page).to_have_url(re.compile("/runs/manual__"))
    expect(window.page.get_by_text(SUCCESS).first).to_be_visible()
    window.page.get_by_role("button", name="Show Graph").click()
    graph = window.page.get_by_role("application")
    for task, state in {"load_raw": "success", "swap_latest": "success", "merge_latest": "skipped"}.items():
        node = graph.locator(".react-flow__node").filter(has_text=task)
        expect(node).to_contain_text(state)
    window.picture("graph")


def test_log_of_a_load_says_what_came(window: Window, run_id: str) -> None:
    window.open(f"/dags/orders/runs/{quote(run_id)}")
    window.page.get_by_role("row").get_by_role("link", name="load_raw").click()

    expect(window.page.get_by_text(re.compile(r"raw\.orders: load \d+: 250 rows, .* MB in .* s")).first).to_be_visible()
    window.picture("log")


@pytest.mark.parametrize(
    ("asset", "facts"),
    [
        ("raw.orders", ["rows: 250", "rejects: 0", "sha256: "]),
        ("stg.orders_latest", ["rows: 250", "refresh: swap", "why: no load has been applied yet"]),
    ],
)
def test_asset_tells_what_its_last_event_was(window: Window, run_id: str, asset: str, facts: list[str]) -> None:
    window.open("/")
    window.navigate("Assets")
    expect(window.page.get_by_role("heading", name="Assets")).to_be_visible()  # Home has links of these names, too
    window.page.get_by_role("link", name=asset, exact=True).click()
    expect(window.page.get_by_role("heading", name=asset)).to_be_visible()
    window.page.locator(".codicon-folding-collapsed").first.click()  # the newest event's extra, which is folded

    extra = window.page.locator(".view-lines").first
    expect(extra).to_contain_text("}")
    shown = re.sub(r"\s+", " ", extra.inner_text()).replace('"', "")
    for fact in facts:
        assert fact in shown
    window.picture(f"asset-{asset}")


def test_dag_that_is_scheduled_on_the_staging_table_runs_by_itself(window: Window, run_id: str) -> None:
    window.open("/dags/downstream/runs")
