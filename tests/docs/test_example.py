"""The worked example of docs/testing.md, done as it is written: in a copy of the tree."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.documents import Block, blocks
from tests.docs.test_commands import bash, tree
from tests.warehouse import ROOT, DatabaseServer, servers

__all__ = ["tree"]  # a fixture


def of_the_example(kind: str) -> list[Block]:
    return [block for block in blocks() if block.document.name == "testing.md" and block.kind == kind]


def apply(diff: str, tree: Path, *options: str) -> None:
    subprocess.run(["git", "apply", *options], cwd=tree, input=diff, check=True, text=True, capture_output=True)


@pytest.mark.skipif("embedded" not in servers(), reason="the example is of the embedded server")
def test_example_of_the_docs_fails_and_passes_as_it_says(tree: Path) -> None:
    (diff,), (command,) = of_the_example("diff"), of_the_example("bash")
    failing, passing = of_the_example("text")

    apply(diff.text, tree)
    failed = bash(command.text, tree)
    apply(diff.text, tree, "-R")
    passed = bash(command.text, tree)

    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert [line for line in failing.text.splitlines() if line not in failed.stdout] == []
    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert passing.text.strip() in passed.stdout


@pytest.mark.parametrize("server", ["embedded"], indirect=True)
def test_first_test_of_the_docs_passes(tree: Path, server: object) -> None:
    (test,) = (block for block in of_the_example("python") if "def test_" in block.text)
    (tree / "tests" / "sql" / "test_of_the_docs.py").write_text(test.text)

    done = bash(".venv/bin/python -m pytest -q tests/sql/test_of_the_docs.py", tree)

    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b[12] passed", done.stdout)


def test_the_file_to_copy_needs_nothing_else_of_this_repository(server: DatabaseServer, tmp_path: Path) -> None:
    """But a schema, Alembic's here, and scripts."""
    for name in ("alembic.ini", "alembic", "sql", "tests/warehouse.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["tests.warehouse"]\n')
    (test,) = (block for block in of_the_example("python") if "def test_" in block.text)
    (tmp_path / "test_mine.py").write_text(test.text)

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "WAREHOUSE_URL": server.admin},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b[12] passed", done.stdout)
