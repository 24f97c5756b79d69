"""The server for tests of what hangs on none of its versions: what Airflow does, or a store.

The tests of SQL and of files on disk ask every server, and make demo runs on the other one.
"""

from collections.abc import Callable

import pytest

from tests.warehouse import DatabaseServer, servers


@pytest.fixture(scope="session", params=servers()[-1:])
def server(request: pytest.FixtureRequest, start: Callable[[str], DatabaseServer]) -> DatabaseServer:
    return start(request.param)
