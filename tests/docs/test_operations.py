"""docs/operations.md: its messages are those of the code, and its queries run."""

import re

import pytest

from tests.conftest import ROOT, Warehouse

TEXT = (ROOT / "docs" / "operations.md").read_text()
SOURCES = "".join(
    re.sub(r'"\s*\n\s*f?"', "", path.read_text())  # a message may be put together from several lines
    for folder in ("dags", "sql/ddl", "alembic")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".sql"}
)
# What PostgreSQL says, not we.
SERVER = TEXT[TEXT.index("## A load is red: the server") : TEXT.index("**A frozen loader**")]
MESSAGES = [
    message
    for row in re.findall(r"^\| (`.*?) \| ", TEXT.replace(SERVER, ""), re.MULTILINE)
    for message in re.findall(r"`(.*?)`", row)
]
QUERIES = [
    block
    for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", TEXT, re.MULTILINE)
    if re.match(r"\s*(SELECT|WITH)", block)
]


@pytest.mark.parametrize("message", MESSAGES)
def test_message_stands_in_the_code(message: str) -> None:
    placeholders = {"raw.orders": "{table}", "max_rejects is 0": "max_rejects is {limit.text}", "0xfc": "0x"}
    for value, name in placeholders.items():
        message = message.replace(value, name)
    plain = SOURCES.replace("\\\\", "\\")

    assert message in plain or message.split(" 0x")[0] in plain


@pytest.mark.parametrize("query", [query for block in QUERIES for query in block.split(";\n") if query.strip()])
def test_query_runs(warehouse: Warehouse, query: str) -> None:
    with warehouse.connect("") as conn:
        conn.execute(query.replace("pg_terminate_backend(12345)", "12345").encode())
