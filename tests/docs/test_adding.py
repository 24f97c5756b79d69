"""docs/adding-a-dataset.md, followed word by word in a copy of the tree, and then the tests that are there."""

import re
from pathlib import Path

import pytest

from tests.docs.test_commands import GUIDE, bash, tree
from tests.warehouse import ROOT, servers

__all__ = ["tree"]  # a fixture

SECTION = (ROOT / "docs" / GUIDE).read_text().partition("## A table\n")[2].partition("\n## ")[0]
# What is said, and then what is to be done: a file's content, commands, or what they print.
STEPS = re.findall(r"(.*?)^```(\w+)\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
FILE = re.compile(r"`((?:sql|dags|tests)/[\w/*.]+)`")
# Those that look at every table that there is.
TESTS = (
    "tests/alembic/test_migrations.py tests/sql/test_products.py tests/sql/test_raw.py tests/sql/test_citus.py"
    " tests/docs/test_architecture.py"
)
EVERY = "up_down or comment or revision or every or products or pipeline or goes_on or architecture"


@pytest.mark.skipif("embedded" not in servers(), reason="it is on the embedded server")
def test_guide_is_followed_word_by_word(tree: Path) -> None:
    written, printed, expected = [], "", ""
    for said, kind, text in STEPS:
        if kind == "bash":
            done = bash(text, tree)
            assert done.returncode == 0, done.stdout + done.stderr
            printed += done.stdout
        elif kind == "text":
            expected += text
        else:
            path = tree / FILE.findall(said)[-1]
            if "*" in path.name:
                (path,) = path.parent.glob(path.name)  # which alembic has made
            path.write_text(text)
            written.append(path)

    assert [line for line in expected.splitlines() if line not in printed] == []
    assert len(written) == 7
    tested = bash(f".venv/bin/python -m pytest -q {TESTS} -k 'not postgres15 and ({EVERY})'", tree)
    assert tested.returncode == 0, tested.stdout[-4000:]
    linted = bash(".venv/bin/sqlfluff lint sql/ddl/*products* sql/transforms && .venv/bin/ruff check dags tests", tree)
    assert linted.returncode == 0, linted.stdout


def test_guide_writes_about_as_many_lines_as_it_says() -> None:
    lines = [line for _, kind, text in STEPS if kind in ("sql", "python") for line in text.splitlines() if line.strip()]

    assert len(lines) < 100
