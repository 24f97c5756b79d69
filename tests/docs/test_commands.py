"""The README and docs/*.md: each command, query, piece of Python and link in them works, or it is said why not here."""

import ast
import gzip
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SWAP
from tests.docs.documents import DOCUMENTS, Block, anchors, blocks, links
from tests.local.up import copy_working_tree, lend_environment
from tests.warehouse import ROOT, Warehouse

COMMANDS = [block for block in blocks() if block.kind in ("bash", "line")]
# The pieces of the guide to a table of one's own make sense together only: tests/docs/test_adding.py follows it.
GUIDE = "adding-a-dataset.md"
QUERIES = [block for block in blocks() if block.kind == "sql" and block.document.name != GUIDE]
HEADER = "order_id,customer_name,customer_email,product,quantity,unit_price,currency,status,ordered_at,updated_at\n"
ROW = "1,Ann,,Lamp,1,9.90,EUR,paid,,2026-01-01\n"

# Run here as they stand, in a copy of the tree, on a warehouse with one order: the command, and what it needs before.
RUN = {
    r"(\.venv/bin/)?alembic upgrade head( --sql)?": "",
    r"\.venv/bin/alembic revision -m .*": "",
    r"\.venv/bin/alembic (-x allow-data-loss=yes )?downgrade base": "alembic -x allow-data-loss=yes downgrade base",
    r"\.venv/bin/alembic upgrade 0011:head --sql \| psql .*": "alembic -x allow-data-loss=yes downgrade base"
    " && alembic upgrade 0011",
    r'psql "\$WAREHOUSE_URL" -c "SELECT 1"': "",
    r"PYTHONPATH=dags \.venv/bin/python -c .*mended.*stg\.merge_pending.*": "",
    r"PGOPTIONS=.* psql .* (-f sql/transforms/stg\.orders_latest\.sql|-c .*stg\.verify.*)\s*": "",
    r"python -m generator --rows .*": "",
    r"iconv .*": r"printf 'J\374rgen\n' > in.csv",
    r"chmod -R .*": "",
    r"export .*": "",
    r"make (\.env|down|clean)": "",
}
# A test of its own runs these.
ELSEWHERE = {
    r"make demo": "local/test_commands.py::test_demo_prints_the_counts_each_time",
    r"WAREHOUSE_URL=\S+ make demo": "local/test_commands.py::test_demo_runs_on_another_server",
    r"make up( PORT=9000)?": "local/test_commands.py::test_up_serves_the_ui_runs_what_is_triggered_and_stops_whole",
    r'psql "\$WAREHOUSE_URL" -XAt -c "\.\.\." > .*': "dags/test_batch_rejects.py::"
    "test_rejects_are_exported_as_csv_mended_and_loaded_as_a_batch",
    r'psql "\$COORDINATOR.*': "sql/test_citus.py::test_without_citus_it_says_so_and_changes_nothing",
    r"\.venv/bin/python -m pytest -q .* -k \"tie and embedded\"\s*": "docs/test_example.py::"
    "test_example_of_the_docs_fails_and_passes_as_it_says",
    r"mkdir -p data/landing/products.*|make run DAG=products\n.*": "docs/test_adding.py::"
    "test_guide_is_followed_word_by_word",
    r"make run DAG=\w+ CONF=.*": "local/test_commands.py::test_run_says_what_its_tasks_did",
    r"\.venv/bin/alembic -x allow-data-loss=yes downgrade \.\.\.": "alembic/test_migrations.py::"
    "test_downgrade_with_rows_is_refused_unless_told",
}
# These pytest commands would test the tests: that they choose some is asked.
COLLECT = r"\.venv/bin/python -m pytest (?!-q ).*"
# Not run by any test of `make test`, and why. They are read by bash, and make knows its targets.
NOT_RUN = {
    r"(\w+=\S+ )?make test": "it is what runs this",
    r"make lint": "it is run beside make test",
    r"make (format|bench|screenshots)|\.venv/bin/python -m bench(\.feeds)? .*": "they write, or take many minutes",
    r"make lock|local/venv\.sh requirements-image\.txt": "they ask a package registry",
    r"make compose-test|docker .*": "they need a Docker engine; make compose-test runs most of them",
    r"kubectl .*|helm .*": "they need a cluster",
    r"airflow backfill .*": "it needs a scheduler; tests/dags/test_sources.py runs past dates in any order",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the working tree, with the same packages."""
    target = copy_working_tree(tmp_path / "a copy")
    lend_environment(target)
    return target


def kinds(command: str) -> list[str]:
    """The lines above that a command falls under."""
    patterns = [*RUN, *ELSEWHERE, COLLECT, *NOT_RUN]
    return [pattern for pattern in patterns if re.fullmatch(pattern, command, re.DOTALL)]


def chosen(*patterns: str) -> list[Block]:
    """Commands that one of the patterns is of, each once."""
    once = {block.text: block for block in COMMANDS if set(kinds(block.text)) & set(patterns)}
    return list(once.values())


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_command_is_run_or_it_is_said_why_not(block: Block) -> None:
    assert len(kinds(block.text)) == 1, f"{block.document}, line {block.number}: add it to a list above: {block.text}"


@pytest.mark.parametrize("pattern", [*RUN, *ELSEWHERE, COLLECT, *NOT_RUN])
def test_no_list_has_a_command_that_is_gone(pattern: str) -> None:
    assert chosen(pattern)


@pytest.mark.parametrize("server", ["embedded"], indirect=True)
@pytest.mark.parametrize("block", chosen(*RUN), ids=str)
def test_command_runs(block: Block, tree: Path, warehouse: Warehouse) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")
    warehouse.run(SWAP)
    (tree / "data").mkdir()
    (tree / "data" / "mended.csv").write_text(HEADER + ROW)
    (pattern,) = kinds(block.text)

    done = bash(f"{RUN[pattern] or 'true'} && {{\n{block.text}\n}}", tree, warehouse)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("where", sorted(set(ELSEWHERE.values())))
def test_test_that_runs_a_command_is_there(where: str) -> None:
    file, _, name = where.partition("::")

    assert name in {
        node.name
        for node in ast.walk(ast.parse((ROOT / "tests" / file).read_text()))
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("block", chosen(COLLECT), ids=str)
def test_pytest_command_chooses_tests(block: Block, tree: Path) -> None:
    done = bash(f"{block.text} --collect-only -q", tree)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_bash_can_read_it_and_make_knows_its_target(block: Block) -> None:
    subprocess.run(["bash", "-n", "-c", block.text], check=True, capture_output=True)
    for target in re.findall(r"\bmake ([\w.-]+)", block.text):
        assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


@pytest.mark.parametrize("block", [block for block in QUERIES if "citus" not in block.text], ids=str)
def test_query_runs(warehouse: Warehouse, block: Block) -> None:
    warehouse.given("raw.orders", "order_id | updated_at\n1 | 2026-01-01")
    query = block.text.replace("pg_terminate_backend(12345)", "12345").replace("(pid)", "(12345)")
    with warehouse.connect("") as conn:
        conn.execute("SET de_dw.loads_to_apply = '{}'")
        for statement in re.sub(r"--.*", "", query).split(";"):
            if statement.strip():
                conn.execute(statement.encode())
        conn.rollback()


@pytest.mark.parametrize("block", [block for block in blocks() if block.kind == "python"], ids=str)
def test_python_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize("server", ["embedded"], indirect=True)
def test_python_of_a_file_of_yours_loads_it(warehouse: Warehouse, tree: Path) -> None:
    (block,) = (b for b in blocks() if b.kind == "python" and "load_batch" in b.text)
    with gzip.open(tree / "orders.csv.gz", "wt") as file:
        file.write(HEADER + ROW)
    (tree / "load.py").write_text(block.text)

    done = bash("PYTHONPATH=dags .venv/bin/python load.py", tree, warehouse)

    assert done.returncode == 0, done.stderr
    assert warehouse.rows("SELECT batch_id, rows FROM raw.loads") == [("monday", 1)]


@pytest.mark.parametrize(("document", "target"), list(links()))
def test_link_leads_somewhere(document: Path, target: str) -> None:
    if re.match("https?://", target):
        return
    path, _, anchor = target.partition("#")
    file = (document.parent / path).resolve() if path else document

    assert file.is_file()
    assert not anchor or anchor in anchors(file)


def test_every_document_can_be_reached_from_the_readme() -> None:
    readme, *others = DOCUMENTS

    reached = {
        (readme.parent / target.partition("#")[0]).resolve() for document, target in links() if document == readme
    }
    assert set(others) <= reached


def test_every_module_has_its_line_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()

    modules = [
        f"dags/{path.name}"
        for path in (ROOT / "dags").glob("*.py")
        if path.stem in ("orders", "customers")
        or "batch_dag(Dataset(" not in path.read_text()  # a dataset that was added
    ]
    folders = [f"{path.name}/" for path in tracked_folders() if path.name not in ("dags", "docs", "sql")]
    assert [name for name in [*modules, *folders] if f"`{name}`" not in text] == []


def tracked_folders() -> Iterator[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in sorted({line.partition("/")[0] for line in listed.splitlines() if "/" in line}):
        if not name.startswith("."):
            yield ROOT / name


def bash(script: str, tree: Path, warehouse: Warehouse | None = None) -> subprocess.CompletedProcess[str]:
    """Run it in the copy, as a user who has activated its environment, with psql of the warehouse's server."""
    path = [str(tree / ".venv" / "bin"), *([str(warehouse.server.binaries)] if warehouse else []), os.environ["PATH"]]
    interferes = re.compile("WAREHOUSE_|AIRFLOW|PYTEST|PG|MAKE|LOCAL_STATE")
    env = {name: value for name, value in os.environ.items() if not interferes.match(name)}
    env |= {"PATH": ":".join(path)} | ({"WAREHOUSE_URL": warehouse.url} if warehouse else {})
    return subprocess.run(["bash", "-c", script], cwd=tree, env=env, capture_output=True, text=True, timeout=300)
