"""The worked example of docs/testing.md, done as it is written: in a copy of the tree."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.docs.documents import Block, blocks
from tests.docs.test_commands import bash, tree
from tests.warehouse import servers

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
