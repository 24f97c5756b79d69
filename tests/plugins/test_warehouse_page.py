"""The Warehouse page, in Airflow's own API application: who gets it, and that it says what the ledger says."""

import asyncio
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

import pytest

from local.settings import airflow_connection
from tests.conftest import SWAP
from tests.warehouse import ROOT, Warehouse, alembic

HOSTILE = """<script>alert('1')</script>"&'"""
HTML = {"Accept": "text/html"}
# A schema is named in the ledger without quotes, like these: only the catalog knows which dot ends it.
ODD = """
CREATE TABLE raw."cust.""omers" ("the id" bigint PRIMARY KEY, load_id bigint, note text);
ALTER TABLE raw."cust.""omers" ADD CONSTRAINT "it's short" CHECK (length(note) < 99);
CREATE TABLE raw."cust.""omers_rejects" (LIKE raw.orders_rejects INCLUDING ALL);
CREATE TABLE stg."cust'omers & co" ("the id" bigint PRIMARY KEY);
CREATE TABLE stg."cust'omers & co_live" (LIKE stg."cust'omers & co" INCLUDING ALL);
GRANT SELECT ON raw."cust.""omers", raw."cust.""omers_rejects", stg."cust'omers & co" TO de_dw_reader;
INSERT INTO stg.table_versions (table_name, source_table) VALUES ('cust''omers & co', 'raw.cust."omers');
INSERT INTO raw.loads (load_id, table_name, batch_id, source, sha256, bytes, rows, rejects)
VALUES (77, 'raw.cust."omers', 'odd batch', 'odd.csv', repeat('0', 64), 1000, 3, 1);
INSERT INTO raw."cust.""omers" SELECT id, 77, 'x' FROM generate_series(1, 3) AS id;
INSERT INTO raw."cust.""omers_rejects" (load_id, line_number, line, reason) VALUES (77, 4, 'an odd record', 'odd');
"""


class Text(HTMLParser):
    """What a page says: all of its text, its tables' rows by id or in order, and where its links lead."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[str] = []
        self.links: list[str] = []
        self.cell = False
        self.rows: list[tuple[str, list[str]]] = []
        self.feed(html)
        self.text = " ".join(self.text.split())
        self.rows = [(name, [" ".join(cell.split()) for cell in cells]) for name, cells in self.rows]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if tag == "a":
            self.links.append(given.get("href") or "")
        elif tag == "tr":
            self.rows.append((given.get("id") or "", []))
        elif tag in ("td", "th") and self.rows:
            self.rows[-1][1].append("")
            self.cell = True

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cell:
            self.rows[-1][1][-1] += data

    @property
    def loads(self) -> dict[int, list[str]]:
        return {int(name.removeprefix("load-")): cells for name, cells in self.rows if name.startswith("load-")}


class Page:
    """The page, as somebody sees it."""

    def __init__(self, client: Any, role: str | None) -> None:
        self.client, self.role = client, role

    def get(self, path: str, role: str | None = "viewer", **headers: str) -> Any:
        from airflow.api_fastapi.app import get_auth_manager
        from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser

        token = get_auth_manager().generate_jwt(SimpleAuthManagerUser(username="anna", role=role))
        return self.client.get(path, headers={"Authorization": f"Bearer {token}"} | HTML | headers)

    def text(self, path: str = "/warehouse/") -> Text:
        answer = self.get(path)
        assert answer.status_code == 200, answer.text
        return Text(answer.text)


@pytest.fixture(scope="session")
def api(airflow: None) -> Iterator[Any]:
    """Airflow's API application with its plugins, as the API server has it."""
    from airflow.api_fastapi.app import create_app
    from starlette.testclient import TestClient

    with TestClient(create_app(apps="core"), base_url="http://127.0.0.1:8080", follow_redirects=False) as client:
        yield client


@pytest.fixture
def page(api: Any, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch) -> Page:
    monkeypatch.setenv("AIRFLOW_CONN_DE_DW_READER", airflow_connection(warehouse.url, "de_dw_reader"))
    return Page(api, "viewer")


@pytest.fixture
def run(api: Any) -> Iterator[Callable[[str, str], None]]:
    """Make a run of a DAG that updates an asset, in Airflow's own database, for the test alone."""
    from airflow.models.asset import AssetModel, TaskOutletAssetReference
    from airflow.models.dag import DagModel
    from airflow.models.dagbundle import DagBundleModel
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session
    from airflow.utils.types import DagRunType
    from sqlalchemy import delete

    def make(run_id: str, asset: str) -> None:
        with create_session() as session:
            session.merge(DagBundleModel(name="page"))
            session.flush()
            session.add(DagModel(dag_id="a dag/of ours", bundle_name="page"))  # type: ignore[no-untyped-call]
            table = AssetModel(name=asset, uri=f"page://{asset}", group="page")
            session.add(table)
            session.flush()
            session.add(TaskOutletAssetReference(dag_id="a dag/of ours", asset_id=table.id, task_id="load"))
            session.add(DagRun(dag_id="a dag/of ours", run_id=run_id, run_type=DagRunType.MANUAL, run_after=moment()))

    yield make
    with create_session() as session:
        session.execute(delete(DagRun).where(DagRun.dag_id == "a dag/of ours"))
        session.execute(delete(AssetModel).where(AssetModel.group == "page"))
        session.execute(delete(DagModel).where(DagModel.dag_id == "a dag/of ours"))
        session.execute(delete(DagBundleModel).where(DagBundleModel.name == "page"))


def moment() -> datetime:
    return datetime.now(UTC)


def ledger(warehouse: Warehouse, *loads: str, rows: int = 100, run_id: str | None = None) -> None:
    """Loads of raw.orders in the ledger, by their batch ids; all are applied."""
    with warehouse.connect("") as conn:
        for load in loads:
            conn.execute(
                "WITH load AS (INSERT INTO raw.loads (table_name, batch_id, run_id, source, sha256, bytes, rows)"
                " VALUES ('raw.orders', %s, %s, 'test.csv', encode(sha256(%s), 'hex'), 1000000, %s) RETURNING *)"
                " INSERT INTO stg.applied_loads (table_name, load_id, finished_at)"
                " SELECT 'orders_latest', load_id, finished_at FROM load",
                (load, run_id, load.encode(), rows),
            )


def result(warehouse: Warehouse, name: str, severity: str, offending: int, examples: str = "[]") -> None:
    warehouse.alter(
        "INSERT INTO ops.check_results (table_name, check_name, severity, batch_id, load_ids, offending, examples)"
        f" VALUES ('orders_latest', '{name}', '{severity}', 'monday', '{{1}}', {offending}, '{examples}')",
        "de_dw_pipeline",
    )


def paths() -> list[str]:
    """Every route of the page, with a value for each parameter that would be answered."""
    from warehouse_page.app import app

    values = {"/static/{name}": "warehouse.css", "/docs/{name}": "security.md", "/docs/img/{name}": "load.svg"}
    return [f"/warehouse{route.path}".replace("{name}", values.get(route.path, "")) for route in app().routes]  # type: ignore[attr-defined]


def test_who_is_not_logged_in_gets_nothing_of_any_route(page: Page, warehouse: Warehouse) -> None:
    ledger(warehouse, "monday")
    assert len(paths()) == 6

    for path in paths():
        assert page.get(path).status_code == 200, path
        for headers in ({}, HTML, {"Cookie": "_token="}):
            answer = page.client.get(path, headers=headers)
            assert answer.status_code == 401, path
            assert not re.search("monday|orders|security|stylesheet", answer.text), path
        assert page.client.get(path, headers={"Authorization": "Bearer made.up.token"}).status_code in (401, 403), path
        assert page.client.get(path, headers={"Cookie": "_token=made.up.token"}).status_code in (401, 403), path


NOWHERE = (
    "/warehouse/x",
    "/warehouse/docs",
    "/warehouse/docs/",
    "/warehouse/static/",
    "/warehouse//",
    "/warehouse/rejects/",
)


def test_who_may_not_see_the_page_sees_no_file_of_it_anywhere(page: Page) -> None:
    for path in [*paths(), *NOWHERE]:
        for method in ("GET", "HEAD", "POST", "PUT", "OPTIONS"):
            for answer in (page.client.request(method, path, headers=HTML), page.get(path, role=None)):
                assert answer.status_code in (401, 403, 404, 405, 307), path
                assert not re.search(r"security|stylesheet|\.js|schema", answer.text), path


def test_session_that_ended_shows_the_way_to_log_in(page: Page) -> None:
    answer = page.client.get("/warehouse/", headers=HTML)

    assert "You are not logged in" in Text(answer.text).text
    (login,) = [link for link in Text(answer.text).links if "login" in link]
    redirect = page.client.get(login)
    assert (redirect.status_code, redirect.headers["location"]) == (
        307,
        "/auth/login?next=%2Fplugin%2Fwarehouse",
    )


def test_browsers_cookie_is_a_login_too(page: Page) -> None:
    from airflow.api_fastapi.app import get_auth_manager
    from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser

    token = get_auth_manager().generate_jwt(SimpleAuthManagerUser(username="anna", role="viewer"))

    assert page.client.get("/warehouse/", headers={"Cookie": f"_token={token}"}).status_code == 200


def test_user_without_a_role_may_see_nothing(page: Page) -> None:
    for path in paths():
        assert page.get(path, role=None).status_code == 403, path


def test_nothing_but_get_is_answered(page: Page) -> None:
    for path in paths():
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            assert page.client.request(method, path).status_code == 405, path


def test_descriptions_of_the_api_are_off(page: Page) -> None:
    for path in ("/warehouse/docs", "/warehouse/openapi.json", "/warehouse/redoc"):
        assert page.get(path).status_code == 404, path


def test_records_are_for_those_who_may_read_the_logs_of_the_dag(
    page: Page, warehouse: Warehouse, run: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow.api_fastapi.app import get_auth_manager
    from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity

    ledger(warehouse, "monday")
    run("monday", "raw.orders")
    result(warehouse, "prices", "warn", 1, '[{"order_id": 4711}]')
    asked = []

    def is_authorized_dag(*, method: str, access_entity: Any, details: Any, user: Any) -> bool:
        asked.append((method, access_entity, details.id))
        return False

    assert "4711" in page.get("/warehouse/").text
    monkeypatch.setattr(get_auth_manager(), "is_authorized_dag", is_authorized_dag)

    assert page.get("/warehouse/rejects?dag_id=another").status_code == 403
    assert "4711" not in page.get("/warehouse/").text
    # Those that load the table; tests of these run in the same Airflow.
    assert {(method, entity) for method, entity, _ in asked} == {("GET", DagAccessEntity.TASK_LOGS)}
    assert {dag_id for _, _, dag_id in asked} <= {"a dag/of ours", "orders"}


def test_airflow_may_be_under_a_path_of_its_host(page: Page, warehouse: Warehouse) -> None:
    from starlette.testclient import TestClient

    ledger(warehouse, "monday")
    page.client = TestClient(page.client.app, base_url="http://127.0.0.1:8080", root_path="/airflow")

    found = page.text("/airflow/warehouse/")

    assert found.links
    assert all(link.startswith(("/airflow/", "#")) for link in found.links)


def test_headers_keep_a_page_to_itself(page: Page, warehouse: Warehouse) -> None:
    ledger(warehouse, "monday")
    for path in [*paths(), "/warehouse/nothing", "/warehouse/docs/nothing.md", "/warehouse/?table=nothing"]:
        for answer in (page.get(path), page.client.get(path)):
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'self'" in policy
            assert "frame-ancestors 'self'" in policy
            assert "unsafe" not in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Cache-Control"] == "no-store"
            assert not re.search(r"\bstyle=|<style|\bon\w+=|<script>", answer.text if ".svg" not in path else ""), path


def test_figures_are_those_of_the_ledger(page: Page, warehouse: Warehouse) -> None:
    for moment_of_it in ("2026-01-01", "2026-01-02", "2026-01-03"):
        warehouse.given(
            "raw.orders",
            f"order_id | status | updated_at\n1 | paid | {moment_of_it}\n2 | paid | {moment_of_it}",
        )
    warehouse.run(SWAP)
    warehouse.alter("ANALYZE stg.orders_latest_live")
    warehouse.given("raw.orders", "order_id | status | updated_at\n3 | paid | 2026-01-04")

    found = page.text()

    (expected,) = warehouse.rows(
        "SELECT source_rows, table_rows, pending_rows, loads FROM ops.tables WHERE table_name = 'orders_latest'"
    )
    assert expected == (7, 2, 1, 4)
    assert "raw.orders 7 rows" in found.text
    assert "stg.orders_latest about 2 rows" in found.text
    assert "Versions per order_id 3.50 on average" in found.text
    assert "Waiting to be applied 1 rows of 1 load" in found.text
    rows = warehouse.rows(
        "SELECT load_id, batch_id, source, left(sha256, 8), rows FROM ops.loads ORDER BY load_id DESC"
    )
    assert [(load, cells[2], cells[3], cells[4], int(cells[5])) for load, cells in found.loads.items()] == rows
    assert [cells[9] for cells in found.loads.values()] == ["waits", "", "", ""]
    counted = page.text("/warehouse/versions?table=orders_latest")
    assert [cells[:2] for _, cells in counted.rows[1:]] == [["1", "1"], ["3", "2"]]


def test_loads_of_a_run_lead_to_it_and_no_others(
    page: Page, warehouse: Warehouse, run: Callable[[str, str], None]
) -> None:
    run_id = "manual__2036-01-02T03:04:05+00:00"
    ledger(warehouse, "landing/1.csv", "landing/2.csv", run_id=run_id)
    ledger(warehouse, "of a run that Airflow has forgotten", run_id="manual__2035")
    ledger(warehouse, "by hand")
    run(run_id, "raw.orders")

    leads = [link for link in page.text().links if "/dags/" in link]

    assert leads == ["/dags/a%20dag%2Fof%20ours/runs/manual__2036-01-02T03%3A04%3A05%2B00%3A00"] * 2


def test_checks_are_shown_as_they_came_out_the_last_time(page: Page, warehouse: Warehouse) -> None:
    ledger(warehouse, "monday")
    result(warehouse, "old", "fail", 9)
    time.sleep(0.002)
    with warehouse.connect("de_dw_pipeline") as conn:
        for name, severity, offending, examples, accepted in (
            ("freshness", "warn", 1, '[{"age": "27 days"}]', False),
            ("keys", "fail", 2, '[{"order_id": 7}, {"order_id": 8}]', False),
            ("known", "fail", 5, "[]", True),
            ("rows", "fail", 0, "[]", False),
        ):
            conn.execute(
                "INSERT INTO ops.check_results"
                " (table_name, check_name, severity, batch_id, load_ids, offending, examples, is_accepted)"
                " VALUES ('orders_latest', %s, %s, 'monday', '{1}', %s, %s, %s)",
                (name, severity, offending, examples, accepted),
            )

    found = page.text()

    assert [cells for _, cells in found.rows if len(cells) == 5][1:] == [
        ["keys", "fail", "failed", "2", '2 of 2 {"order_id": 7}{"order_id": 8}'],
        ["known", "fail", "accepted", "5", ""],
        ["freshness", "warn", "warned", "1", '1 of 1 {"age": "27 days"}'],
        ["rows", "fail", "passed", "0", ""],
    ]
    assert "quantity_is_positive : CHECK (quantity > 0)" in found.text.replace(": CHECK", " : CHECK").replace("  ", " ")


@pytest.mark.parametrize(
    "example",
    ['"\\ud800"', "9" * 5000, "[" * 990 + "]" * 990, '"' + "x" * 900_000 + '"'],
    ids=["surrogate", "long", "deep", "large"],
)
def test_examples_of_any_shape_are_shown(page: Page, warehouse: Warehouse, example: str) -> None:
    ledger(warehouse, "monday")
    result(warehouse, "odd", "warn", 1, f"[{example}]")

    answer = page.get("/warehouse/")

    assert answer.status_code == 200
    assert example[:100] in Text(answer.text).text
    assert len(answer.text) < 100_000


def test_what_a_file_brought_is_text_and_nothing_else(page: Page, warehouse: Warehouse) -> None:
    with warehouse.connect("") as conn:
        conn.execute(
            "INSERT INTO raw.loads (load_id, table_name, batch_id, source, sha256, bytes, rows, rejects)"
            " VALUES (5, 'raw.orders', %(it)s, %(it)s, repeat('0', 64), 0, 0, 1)",
            {"it": HOSTILE},
        )
        conn.execute(
            "INSERT INTO raw.orders_rejects (load_id, line_number, line, column_name, reason)"
            " VALUES (5, 2, %(long)s, %(it)s, %(it)s), (5, 3, %(it)s, %(it)s, %(it)s)",
            {"it": HOSTILE, "long": HOSTILE * 100},
        )
        conn.execute(
            "INSERT INTO ops.check_results (table_name, check_name, severity, batch_id, load_ids, offending, examples)"
            " VALUES ('orders_latest', %(it)s, 'warn', %(it)s, '{5}', 1,"
            " json_build_array(json_build_object(%(it)s::text, %(it)s::text)))",
            {"it": HOSTILE},
        )

    for path in ("/warehouse/", "/warehouse/rejects", "/warehouse/rejects?load=5"):
        answer = page.get(path)
        found = Text(answer.text)
        assert found.tags.count("script") == 1, "the one of the page itself"
        assert HOSTILE in found.text
        assert "<script>" not in answer.text


def test_each_load_is_shown_once_though_new_ones_arrive_meanwhile(page: Page, warehouse: Warehouse) -> None:
    ledger(warehouse, *(f"batch {number}" for number in range(120)))
    before = {load for (load,) in warehouse.rows("SELECT load_id FROM raw.loads")}
    seen: list[int] = []
    path = "/warehouse/"

    for number in range(3):
        found = page.text(path)
        seen += found.loads
        path = next((link for link in found.links if "before=" in link), "")
        ledger(warehouse, f"new {number}", f"newer {number}")

    assert path == ""
    assert seen == sorted(before, reverse=True)
    # and back, with what has arrived
    back = [link for link in found.links if "after=" in link]
    while back:
        found = page.text(back[0].partition("#")[0])
        seen = list(found.loads) + seen
        back = [link for link in found.links if "after=" in link]
    assert set(seen) == {load for (load,) in warehouse.rows("SELECT load_id FROM raw.loads")}


def test_rejects_are_paged_by_load_and_over_all(page: Page, warehouse: Warehouse) -> None:
    ledger(warehouse, "monday", "tuesday")
    warehouse.alter(
        "INSERT INTO raw.orders_rejects (load_id, line_number, line, reason)"
        " SELECT load_id, line, 'record ' || load_id || ' ' || line, 'bad'"
        " FROM raw.loads, generate_series(2, 151) AS line"
    )
    first, second = (load for (load,) in warehouse.rows("SELECT load_id FROM raw.loads ORDER BY load_id"))

    def records(path: str) -> list[str]:
        found = page.text(path)
        more = [link for link in found.links if "after_load=" in link]
        return [cells[4] for _, cells in found.rows[1:]] + (records(more[0]) if more else [])

    assert records(f"/warehouse/rejects?load={first}") == [f"record {first} {line}" for line in range(2, 152)]
    assert records("/warehouse/rejects") == [
        f"record {load} {line}" for load in (second, first) for line in range(151, 1, -1)
    ]


def test_long_record_is_cut_off_and_says_so(page: Page, warehouse: Warehouse) -> None:
    ledger(warehouse, "monday")
    warehouse.alter(
        "INSERT INTO raw.orders_rejects (load_id, line_number, line, reason)"
        " SELECT load_id, 2, repeat('x', 20000000), 'bad' FROM raw.loads"
    )

    answer = page.get("/warehouse/rejects")

    assert len(answer.text) < 20_000
    assert "The beginning of 20 MB." in Text(answer.text).text


def test_empty_warehouse_says_what_to_do(page: Page, warehouse: Warehouse) -> None:
    for name in ("orders", "customers"):
        found = page.text(f"/warehouse/?table={name}_latest").text
        assert f"Nothing has been loaded yet Trigger the DAG that loads raw.{name}." in found
    assert "Nothing has been loaded yet" in page.text().text

    warehouse.alter("DELETE FROM stg.table_versions")
    assert "No staging table yet" in page.text().text


@pytest.mark.parametrize("path", ["/warehouse/", "/warehouse/versions", "/warehouse/rejects"])
def test_table_that_is_not_there_is_not_found(page: Page, path: str) -> None:
    answer = page.get(f"{path}?table=none'--")

    assert answer.status_code == 404
    assert "There is no such table" in answer.text


@pytest.mark.parametrize(
    "path", ["/warehouse/?before=x", "/warehouse/?after=-1", "/warehouse/?before=9223372036854775808"]
)
def test_key_that_is_none_is_refused(page: Page, path: str) -> None:
    assert page.get(path).status_code == 422


def test_tables_with_odd_names_have_pages_of_their_own(page: Page, warehouse: Warehouse) -> None:
    ledger(warehouse, "monday")
    warehouse.alter(ODD)

    first = page.text("/warehouse/?table=orders_latest")
    (link,) = [link for link in first.links if "cust%27omers" in link]
    found = page.text(link)

    assert list(found.loads) == [77]
    assert re.search(r'raw\.cust\."omers 3 rows [1-9][\d.]* kB on disk, 1 load, 1 reject', found.text)
    assert "it's short: CHECK (length(note) < 99)" in found.text
    assert "Versions per the id" in found.text
    (rejects,) = [link for link in found.links if "load=77" in link]
    assert "an odd record" in page.text(rejects).text
    (versions,) = [link for link in found.links if "/versions" in link]
    assert [cells[:2] for _, cells in page.text(versions).rows[1:]] == [["1", "3"]]
    assert [load for load in first.loads if load == 77] == []


def test_many_rows_are_not_counted_while_somebody_waits(
    page: Page, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger(warehouse, "monday", rows=2_000_001)

    found = page.text("/warehouse/versions")

    assert "Too many rows" in found.text
    assert "SELECT * FROM ops.versions_per_key('orders_latest');" in found.text


def test_warehouse_that_is_down_is_said_and_no_secret_with_it(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "postgresql://somebody:s3cret@127.0.0.1:1/de_dw"
    monkeypatch.setenv("AIRFLOW_CONN_DE_DW_READER", airflow_connection(url, "de_dw_reader"))

    for path in ("/warehouse/", "/warehouse/versions", "/warehouse/rejects"):
        answer = page.get(path)
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "10"
        assert "The connection de_dw_reader can't be opened" in Text(answer.text).text
        assert "Airflow itself works" in answer.text
        assert not re.search("s3cret|somebody|127.0.0.1:1", answer.text)
    assert page.get("/warehouse/docs/security.md").status_code == 200


def test_connection_that_is_missing_is_named(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIRFLOW_CONN_DE_DW_READER")

    answer = page.get("/warehouse/")

    assert answer.status_code == 503
    assert "AIRFLOW_CONN_DE_DW_READER" in answer.text


@contextmanager
def silent_server() -> Iterator[int]:
    """A port where somebody takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        yield listener.getsockname()[1]


def test_warehouse_that_hangs_keeps_nobody_from_airflow(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    from warehouse_page import warehouse as queries

    monkeypatch.setattr(queries, "CONNECT_SECONDS", 6)
    monkeypatch.setattr(queries, "PATIENCE_SECONDS", 6.0)
    with silent_server() as port:
        url = f"postgresql://somebody@127.0.0.1:{port}/de_dw"
        monkeypatch.setenv("AIRFLOW_CONN_DE_DW_READER", airflow_connection(url, "de_dw_reader"))
        answers: list[int] = []
        # More than there are connections, and than there are threads for what is synchronous.
        visitors = [
            threading.Thread(target=lambda: answers.append(page.get("/warehouse/").status_code)) for _ in range(50)
        ]
        for visitor in visitors:
            visitor.start()
        time.sleep(0.5)
        assert page.get("/api/v2/dags").status_code == 200
        assert answers == []
        for visitor in visitors:
            visitor.join(timeout=30)

    assert answers == [503] * 50


def test_lock_of_a_migration_is_not_waited_for(page: Page, warehouse: Warehouse) -> None:
    with warehouse.connect("") as conn:
        conn.execute("LOCK TABLE raw.loads")

        answer = page.get("/warehouse/")

    assert answer.status_code == 503
    assert "A query took longer" in answer.text
    assert page.get("/warehouse/").status_code == 200


def test_query_that_takes_long_is_given_up(page: Page, warehouse: Warehouse) -> None:
    ledger(warehouse, "monday")
    warehouse.alter(
        "CREATE OR REPLACE FUNCTION ops.versions_per_key(table_name text) RETURNS TABLE (versions bigint, keys bigint)"
        " LANGUAGE sql AS 'SELECT 1::bigint, 1::bigint FROM pg_sleep(60)'"
    )

    answer = page.get("/warehouse/versions")

    assert answer.status_code == 503
    assert "A query took longer than 3 seconds" in answer.text


def test_older_schema_is_told_from_a_warehouse_that_is_down(page: Page, warehouse: Warehouse) -> None:
    alembic(warehouse.url, "downgrade", "0011")

    answer = page.get("/warehouse/")

    assert answer.status_code == 503
    assert "alembic upgrade head" in answer.text


def test_page_reads_as_reader_and_can_not_write(page: Page, warehouse: Warehouse) -> None:
    from warehouse_page.warehouse import Reader, Unavailable

    async def settings(conn: Any) -> Any:
        cursor = await conn.execute(
            "SELECT current_user AS role, current_setting('transaction_read_only') AS read_only,"
            " current_setting('statement_timeout') AS patience, current_setting('timezone') AS zone"
        )
        return await cursor.fetchone()

    async def write(conn: Any) -> None:
        await conn.execute("CREATE TEMPORARY TABLE mine ()")

    async def write_anyway(conn: Any) -> None:
        await conn.execute("ROLLBACK")
        await conn.execute("SET default_transaction_read_only = off")
        await conn.execute("BEGIN READ WRITE")
        await conn.execute("INSERT INTO raw.orders (order_id) VALUES (1)")

    async def all_of_it() -> Any:
        reader = Reader()
        found = await reader.ask(settings)
        for attempt in (write, write_anyway):
            with pytest.raises(Unavailable) as error:
                await reader.ask(attempt)
            found[attempt.__name__] = type(error.value.__cause__).__name__
        return found

    assert asyncio.run(all_of_it()) == {
        "role": "de_dw_reader",
        "read_only": "on",
        "patience": "3s",
        "zone": "UTC",
        "write": "ReadOnlySqlTransaction",
        "write_anyway": "InsufficientPrivilege",
    }


def test_extra_of_the_connection_reaches_libpq_and_what_it_does_not_know_does_not(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    from warehouse_page.warehouse import connection_parameters

    url = "postgresql://anna:s%40cret@db.example:5433/de_dw?sslmode=verify-full&connect_timeout=9"
    connection = airflow_connection(url, "de_dw_reader").replace('"extra": {', '"extra": {"cursor": "dictcursor", ')
    monkeypatch.setenv("AIRFLOW_CONN_DE_DW_READER", connection)

    found = connection_parameters()

    options = found.pop("options")
    assert found == {
        "host": "db.example",
        "port": 5433,
        "user": "anna",
        "password": "s@cret",
        "dbname": "de_dw",
        "application_name": "airflow tasks",
        "connect_timeout": "9",
        "sslmode": "verify-full",
    }
    assert options.startswith("-c role=de_dw_reader -c statement_timeout=3s")


def test_ten_thousand_loads_cost_what_a_page_of_them_costs(page: Page, warehouse: Warehouse) -> None:
    warehouse.alter("""
        INSERT INTO raw.loads (table_name, batch_id, source, sha256, bytes, rows, finished_at)
        SELECT 'raw.orders', i, 'test', lpad(i::text, 64, '0'), 1000000, 100, now() + make_interval(secs => i)
        FROM generate_series(1, 10000) AS i;
        INSERT INTO stg.applied_loads (table_name, load_id, finished_at)
        SELECT 'orders_latest', load_id, finished_at FROM raw.loads;
        INSERT INTO ops.check_results (table_name, check_name, severity, load_ids, offending, checked_at)
        SELECT 'orders_latest', 'check ' || i % 5, 'warn', '{1}', 0, now() - make_interval(hours => i / 5)
        FROM generate_series(0, 49999) AS i;
        ANALYZE;
    """)
    took = []
    for path in ["/warehouse/"] * 10 + ["/warehouse/?before=5000"] * 10:
        began = time.perf_counter()
        found = page.text(path)
        took.append(time.perf_counter() - began)
        assert len(found.loads) == 50
        assert len([cells for _, cells in found.rows if len(cells) == 5]) == 6
    print(f"10,000 loads, 50,000 results of checks: {min(took):.3f} to {max(took):.3f} s an answer")  # noqa: T201

    from warehouse_page import warehouse as queries

    with warehouse.connect("de_dw_reader") as conn:
        for query in (queries.LOADS, queries.OLDER_LOADS, queries.NEWER_LOADS, queries.CHECKS):
            asked = {"source": "raw.orders", "table": "orders_latest", "before": 5000, "after": 5000, "loads": 51}
            ((plan,),) = conn.execute(
                f"EXPLAIN (ANALYZE, BUFFERS, FORMAT json) {query}".encode(),
                asked | {"checks": 100, "characters": 500, "examples": 20},
            ).fetchall()
            pages = plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"]
            assert pages < 600, f"{pages} pages for {query}"


def test_documents_are_shown_and_nothing_beside_them(page: Page) -> None:
    for path in sorted((ROOT / "docs").glob("*.md")):
        answer = page.get(f"/warehouse/docs/{path.name}")
        assert answer.status_code == 200
        anchors = set(re.findall(r'<h\d id="([^"]+)"', answer.text))
        assert len(anchors) == len(
            re.findall(r"^#+ ", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.M)
        )
        for link in set(re.findall(r'<(?:a|img) [^>]*(?:href|src)="([\w./#-]+)"', answer.text)):
            if not link.startswith(("/", "#", "..")):
                name, _, anchor = link.partition("#")
                target = page.get(f"/warehouse/docs/{name}")
                assert target.status_code == 200, f"{path.name}: {link}"
                assert not anchor or f'id="{anchor}"' in target.text, f"{path.name}: {link}"

    for name in ("README.md", "..%2FREADME.md", "%2E%2E/README.md", "img/..%2Fsecurity.md", "load.svg", "."):
        assert page.get(f"/warehouse/docs/{name}").status_code == 404, name


def test_document_is_text_though_it_had_html(page: Page, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from warehouse_page import documents

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "x.md").write_text(
        "# A `b` & c\n\n## A b!\n\n## A b\n\n<script>1</script> [l](javascript:1)\n"
    )
    monkeypatch.setattr(documents, "DOCS", tmp_path / "docs")

    title, html = documents.render("x.md")

    assert title == "A `b` & c"
    assert re.findall('id="(.*?)"', html) == ["a-b--c", "a-b", "a-b-1"]
    assert "<script>" not in html
    assert 'href="javascript' not in html


def test_airflow_loads_the_plugin_and_none_of_its_parts(page: Page) -> None:
    from airflow import plugins_manager

    plugins, errors = plugins_manager._get_plugins()

    assert (errors, [plugin.name for plugin in plugins if str(plugin.source).startswith("$PLUGINS")]) == (
        {},
        ["warehouse"],
    )
    (view,) = [
        view
        for plugin in page.get("/api/v2/plugins", role="admin").json()["plugins"]
        for view in plugin["external_views"]
    ]
    assert (view["name"], view["href"], view["url_route"], view["nav_top_level"]) == (
        "Warehouse",
        "/warehouse/",
        "warehouse",
        True,
    )
    assert page.get(view["icon"]).headers["content-type"] == "image/svg+xml"


def test_importing_the_plugin_costs_nothing_where_nobody_asks_for_the_page(airflow: None) -> None:
    program = (
        "import sys, airflow.plugins_manager, airflow.configuration; before = set(sys.modules);"
        "import warehouse_plugin; print(*(set(sys.modules) - before))"
    )

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={"PYTHONPATH": str(ROOT / "plugins"), "AIRFLOW__API__BASE_URL": "https://example.com/airflow/"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.split() == ["warehouse_plugin"]


@pytest.mark.parametrize(
    ("function", "value", "said"),
    [
        ("count", 1234567, "1,234,567"),
        ("short", 1234567, "1.23 M"),
        ("short", 0.4, "0.4"),
        ("size", 999, "999 B"),
        ("size", 81920, "81.9 kB"),
        ("size", 1_500_000_000, "1.5 GB"),
        ("seconds", 0.0123, "0.01 s"),
        ("seconds", 75.4, "1 min 15 s"),
        ("seconds", 3 * 3600 + 125, "3 h 2 min"),
        ("span", timedelta(hours=24), "1 day"),
        ("span", timedelta(hours=47, minutes=59), "1 day"),
        ("span", timedelta(minutes=61), "1 h"),
        ("ceiling", 0, 1),
        ("ceiling", 150, 200),
        ("ceiling", 40, 40),
        ("ceiling", 0.32, 0.4),
    ],
)
def test_figures_are_written_for_people(function: str, value: Any, said: Any) -> None:
    from warehouse_page import words

    assert words.FILTERS[function](value) == (pytest.approx(said) if function == "ceiling" else said)


def test_what_a_failed_task_points_to_is_a_page(api: Any, caplog: pytest.LogCaptureFixture) -> None:
    from run_report import help_at

    sources = "".join(path.read_text() for path in sorted((ROOT / "dags").glob("*.py")))
    sections = set(re.findall(r'help_at\("(.+?)"\)', sources))
    assert len(sections) > 1
    for section in sections:
        caplog.clear()
        help_at(section)({})
        (address,) = re.findall(r"http://127.0.0.1:8080(/\S+)", caplog.text)

        answer = Page(api, "viewer").get(address)

        assert answer.status_code == 200
        assert f'id="{section}"' in answer.text
