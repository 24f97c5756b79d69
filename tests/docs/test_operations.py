"""docs/operations.md: the messages of ours in its tables stand in the code, and so do its checks and anchors."""

import json
import re
from pathlib import Path

import pytest
from batch_check import check_pending, find_checks

from tests.warehouse import ROOT, Warehouse

TEXT = (ROOT / "docs" / "operations.md").read_text()
SOURCES = "".join(
    re.sub(r'"\s*\n\s*f?"', "", path.read_text())  # a message may be put together from several lines
    for folder in ("dags", "sql/ddl", "alembic", "generator")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".sql"}
)
# What PostgreSQL, libpq or Airflow say, not we.
THEIRS = {
    "server closed the connection unexpectedly",
    "terminating connection due to administrator command",
    "the database system is starting up",
    "in recovery mode",
    "Connection refused",
    "Could not connect to the endpoint URL",
    "password authentication failed",
    "could not extend file",
    "No space left on device",
    "Permission denied",
    "canceling statement due to lock timeout",
    'relation "raw.orders" does not exist',
    'relation "stg.refresh_status" does not exist',
    "child table is missing constraint",
    'column "header" of relation "loads" does not exist',
    "permission denied to create temporary tables",
    "Timeout, PID:",
    "required variable ... is missing a value: make .env writes it",
    "Bind for 127.0.0.1:8080 failed",
}
CHECKS = {path.name.split(".")[-3]: path.name.split(".")[-2] for path in (ROOT / "sql" / "checks").iterdir()}
MESSAGES = [
    message
    for row in re.findall(r"^\| (`.*?) \| ", TEXT, re.MULTILINE)
    for message in re.findall(r"`(.*?)`", row)
    if message not in THEIRS | CHECKS.keys()
]


@pytest.mark.parametrize("message", MESSAGES)
def test_message_stands_in_the_code(message: str) -> None:
    for value, name in {"raw.orders": "{table}", "5min": "{LOCK_TIMEOUT}", "0xfc": "0x"}.items():
        message = message.replace(value, name)

    assert message in SOURCES.replace("\\\\", "\\")


def test_every_check_stands_there_with_its_severity() -> None:
    assert dict(re.findall(r"^\| `(\w+)` \| (fail|warn) \| ", TEXT, re.MULTILINE)) == CHECKS


def test_example_of_a_check_finds_what_it_says(warehouse: Warehouse, tmp_path: Path) -> None:
    (query,) = re.findall(r"```sql\n(-- paid .*?)```", TEXT, re.DOTALL)
    (tmp_path / "paid.fail.sql").write_text(query)
    warehouse.given(
        "raw.orders",
        """
        order_id | unit_price | status  | updated_at
        1        | 0          | paid    | 2026-01-01
        2        | 0          | created | 2026-01-01
        3        | 0.01       | paid    | 2026-01-01
        """,
    )

    with warehouse.connect() as conn:
        _, (result,) = check_pending(conn, table="orders_latest", checks=find_checks(tmp_path, "orders_latest"))

    assert [json.loads(example)["order_id"] for example in result.examples] == [1]
