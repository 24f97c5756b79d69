"""compose.yaml with the newest PostgreSQL, and compose.port.yaml."""

import socket

import psycopg
import pytest

from tests.compose.stack import Stack, running

pytestmark = pytest.mark.compose


def test_newest_postgresql_by_one_variable_and_its_port_if_asked_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("newest")
    with running(Stack(folder, "compose.port.yaml")) as stack:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        stack.environment |= {"POSTGRES_IMAGE": "postgres:18", "POSTGRES_PORT": str(port)}
        for _ in range(2):
            stack.compose("up", "-d", "--wait", "postgres")
            stack.compose("run", "--rm", "airflow-init")
            stack.compose("down")
        stack.compose("up", "-d", "--wait", "postgres")

        url = "postgresql://reader:{}@127.0.0.1:{}/de_dw"
        with psycopg.connect(url.format(stack.secrets["READER_PASSWORD"], port)) as conn:
            assert conn.info.server_version // 10000 == 18
            assert conn.execute("SELECT count(*) FROM stg.orders_latest").fetchall() == [(0,)]
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(url.format("reader", port))
