"""What all tests share: the fixtures of tests/warehouse.py and tests/s3.py, the names of the refreshes, the order."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from local.postgres import Server
from local.settings import environment, metadata_url

pytest.register_assert_rewrite("tests.s3", "tests.warehouse")  # before they are imported

from tests.warehouse import (  # noqa: E402
    FAST,
    folder_for_a_server,
    script_of,
    servers,
)

pytest_plugins = ["tests.warehouse", "tests.s3"]

# How many files and deliveries Hypothesis makes up for a property of the whole: enough for faults that are not rare.
HISTORIES = int(os.environ.get("HISTORIES", "50"))
# The three ways to refresh.
SWAP, UNION, MERGE = "stg.orders_latest", "stg.orders_latest.union", "stg.orders_latest.merge"
SCRIPTS = {"swap": SWAP, "union": UNION, "merge": MERGE}
by_every_refresh = pytest.mark.parametrize("refresh", [SWAP, UNION, MERGE])
by_every_swap = pytest.mark.parametrize("refresh", [SWAP, UNION])
VERIFY = "SELECT missing, extra, different, compared FROM stg.verify('orders_latest')"


def before_commit(transform: str) -> str:
    return script_of(transform).partition("\nCOMMIT;")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, so that the processes of pytest -n end at about the same time."""
    slow = ["local", "ui", "dags", "alembic"]
    items.sort(key=lambda item: [*slow, item.path.parent.name].index(item.path.parent.name))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With pytest -n the tests of one file on one server follow each other in one process, for they share fixtures."""
    from xdist.scheduler import LoadScopeScheduling

    class KeepToItsServer(LoadScopeScheduling):  # type: ignore[misc]
        """A process goes on with the server that it has started, as long as there is work for it."""

        def _assign_work_unit(self, node: Any) -> None:
            used = {scope.partition(" ")[2] for scope in self.assigned_work[node]} - {""}
            mine = [scope for scope in self.workqueue if not used or scope.partition(" ")[2] in used]
            others = {scope.partition(" ")[2] for work in self.assigned_work.values() for scope in work}
            free = [scope for scope in mine if used or scope.partition(" ")[2] not in others]
            for scope in (free or mine)[:1]:
                self.workqueue.move_to_end(scope, last=False)
            super()._assign_work_unit(node)

    def file_and_server(nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        # those of make demo share a clone with an installation in it
        server = "" if "/local/" in file else next((name for name in servers() if name in test), "")
        return f"{file} {server}"

    config.option.loadscopereorder = False  # by number of tests
    scheduler = KeepToItsServer(config, log)
    scheduler._split_scope = file_and_server
    return scheduler


@pytest.fixture(scope="session")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Airflow with a metadata database of its own, in this process: one, for it reads its settings once."""
    assert "airflow" not in sys.modules, "it has read its settings already, and would use ~/airflow"
    home = tmp_path_factory.mktemp("airflow")
    with (
        pytest.MonkeyPatch.context() as patch,
        folder_for_a_server() as folder,
        Server(folder, settings=FAST) as server,
    ):
        with psycopg.connect(server.url("postgres"), autocommit=True) as conn:
            conn.execute("CREATE DATABASE airflow")
        with pytest.MonkeyPatch.context() as state:
            state.setattr("local.settings.RUN", home)
            variables = environment("postgresql://", metadata_url(server.socket_dir), 8080)
        for name, value in variables.items():
            if name != "WAREHOUSE_URL":
                patch.setenv(name, value)
        patch.setenv("WAREHOUSE_DATA", str(home / "data"))
        from airflow.settings import dispose_orm
        from airflow.utils.db import initdb

        initdb()
        yield
        dispose_orm()
