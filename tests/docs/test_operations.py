"""docs/operations.md: the messages of ours in its tables stand in the code, and its queries run."""

import re

import pytest

from tests.warehouse import ROOT, Warehouse

TEXT = (ROOT / "docs" / "operations.md").read_text()
SOURCES = "".join(
    re.sub(r'"\s*\n\s*f?"', "", path.read_text())  # a message may be put together from several lines
    for folder in ("dags", "sql/ddl", "alembic")
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
MESSAGES = [
    message
    for row in re.findall(r"^\| (`.*?) \| ", TEXT, re.MULTILINE)
    for message in re.findall(r"`(.*?)`", row)
    if message not in THEIRS
]
QUERIES = [
    block
    for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", TEXT, re.MULTILINE)
    if re.match(r"\s*(SELECT|WITH)", block)
]


@pytest.mark.parametrize("message", MESSAGES)
def test_message_stands_in_the_code(message: str) -> None:
    for value, name in {"raw.orders": "{table}", "5min": "{LOCK_TIMEOUT}", "0xfc": "0x"}.items():
        message = message.replace(value, name)

    assert message in SOURCES.replace("\\\\", "\\")


@pytest.mark.parametrize("query", [query for block in QUERIES for query in block.split(";\n") if query.strip()])
def test_query_runs(warehouse: Warehouse, query: str) -> None:
    with warehouse.connect("") as conn:
        conn.execute(query.replace("pg_terminate_backend(12345)", "12345").encode())
