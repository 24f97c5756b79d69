"""compose.yaml as a running stack: counts, a second up, kills in mid-load, data kept, new versions, several workers."""

import socket

import psycopg
import pytest

from tests.compose.stack import KILL_TASKS, Refused, Stack, running
from tests.conftest import S3

pytestmark = pytest.mark.compose
ROWS = 1_500_000  # a COPY of some seconds: time to be killed in


def test_three_runs_make_the_counts_of_the_design(stack: Stack) -> None:
    runs = [stack.trigger() for _ in range(3)]

    stack.wait_for(*runs)

    assert stack.sql(
        "SELECT count(*), count(DISTINCT updated_at), count(DISTINCT order_id) FROM raw.orders", login="reader"
    ) == ("300|3|100")
    assert stack.sql(
        "SELECT count(*), count(DISTINCT order_id), count(*) FILTER (WHERE updated_at = (SELECT max(updated_at)"
        " FROM raw.orders)) FROM stg.orders_latest",
        login="reader",
    ) == ("100|100|100")


def test_every_service_is_healthy_limited_and_rotates_its_log(stack: Stack) -> None:
    for name, container in stack.containers().items():
        host = container["HostConfig"]
        assert host["Memory"] > 0, name
        assert host["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "3"}, name
        if name.startswith("airflow-init"):
            assert container["State"]["ExitCode"] == 0
        else:
            assert container["State"]["Health"]["Status"] == "healthy", name
            assert host["RestartPolicy"]["Name"] == "unless-stopped", name


def test_second_up_changes_nothing(stack: Stack) -> None:
    def state() -> object:
        started = {
            name: (container["Id"], container["State"]["StartedAt"])
            for name, container in stack.containers().items()
            if not name.startswith("airflow-init")
        }
        tables = stack.sql(
            "SELECT (SELECT version_num FROM alembic_version), (SELECT max(row_id) FROM raw.orders),"
            " (SELECT version FROM stg.table_versions), (SELECT max(oid) FROM pg_class)"
        )
        return started, tables

    before = state()
    stack.up()

    assert state() == before


def test_load_whose_process_is_killed_recovers_and_is_there_once(stack: Stack) -> None:
    run = stack.trigger(rows=ROWS)
    stack.wait_for_copy()

    killed = stack.inside("scheduler", KILL_TASKS)

    assert len(killed.split()) == 2  # the worker, and the task's own process
    stack.wait_for(run)
    assert stack.tasks(run)["load_raw"]["try_number"] == 2
    assert_nothing_lost_nothing_doubled(stack, run)


def test_load_during_a_restart_of_the_scheduler_recovers_and_is_there_once(stack: Stack) -> None:
    run = stack.trigger(rows=ROWS)
    stack.wait_for_copy()

    stack.compose("restart", "--timeout", "5", "scheduler")

    stack.wait_for(run)
    assert_nothing_lost_nothing_doubled(stack, run)


def test_database_killed_in_mid_load_recovers_and_the_load_is_there_once(stack: Stack) -> None:
    run = stack.trigger(rows=ROWS)
    stack.wait_for_copy()

    stack.compose("kill", "--signal", "KILL", "postgres")
    stack.compose("up", "-d", "--no-deps", "--wait", "postgres")

    stack.wait_for(run)
    assert_nothing_lost_nothing_doubled(stack, run)


def test_new_containers_keep_the_data_and_run_new_migrations_with_new_passwords(stack: Stack) -> None:
    before, old = stack.rows_by_load(), stack.secrets
    stack.compose("down")
    for suffix, text in {"up": "CREATE TABLE stg.of_a_test ();", "down": "DROP TABLE stg.of_a_test;"}.items():
        (stack.folder / "sql" / "ddl" / f"9999_create_stg_of_a_test.{suffix}.sql").write_text(f"{text}\n")
    versions = stack.folder / "alembic" / "versions"
    newest = max(path.name[:4] for path in versions.glob("[0-9]*.py"))
    (versions / "9999_create_stg_of_a_test.py").write_text(
        "from sql_pair import run\n"
        f'revision = "9999"\ndown_revision = "{newest}"\n'
        'def upgrade() -> None:\n    run(__file__, "up")\n'
    )
    names = ("UI_PASSWORD", "READER_PASSWORD", "PIPELINE_PASSWORD", "OWNER_PASSWORD", "AIRFLOW_DB_PASSWORD")
    stack.change_secrets(**{name: f"new{old[name]}" for name in names})

    stack.up()

    assert stack.sql("SELECT version_num FROM alembic_version") == "9999"
    assert stack.rows_by_load() == before
    with pytest.raises(Refused, match="password authentication failed"):
        stack.sql("SELECT", login="reader", password=old["READER_PASSWORD"])
    with pytest.raises(Refused, match="401"):
        stack.login(old["UI_PASSWORD"])
    run = stack.trigger()
    stack.wait_for(run)
    assert_nothing_lost_nothing_doubled(stack, run)


def test_three_celery_workers_with_files_on_s3_share_ten_runs_and_one_is_killed_in_mid_load(stack: Stack) -> None:
    before = stack.rows_by_load()
    stack.files.insert(1, "compose.celery.yaml")
    s3 = S3(host=stack.gateway())
    try:
        stack.environment["WAREHOUSE_DATA"] = f"s3://aws_default@{s3.bucket}/de_dw"
        stack.environment["AIRFLOW_CONN_AWS_DEFAULT"] = s3.environment["AIRFLOW_CONN_AWS_DEFAULT"]
        stack.up("--scale", "worker=3")
        runs = [stack.trigger() for _ in range(10)]
        stack.wait_for(*runs)
        hosts = {task["hostname"] for run in runs for task in stack.tasks(run).values() if task["state"] == "success"}
        assert len(hosts) == 3
        brought = {batch: rows for batch, rows in stack.rows_by_load().items() if batch not in before}
        assert brought == dict.fromkeys(runs, (100, 100))
        assert (
            stack.sql("SELECT count(*) FROM raw.loads WHERE source LIKE 's3://aws_default@warehouse/de_dw/%'") == "10"
        )

        run = stack.trigger(rows=ROWS)
        stack.wait_for_copy()
        host = stack.tasks(run)["load_raw"]["hostname"]
        stack.run("docker", "kill", host)

        stack.wait_for(run)
        again = stack.tasks(run)["load_raw"]
        assert again["try_number"] == 2
        assert again["hostname"] != host
        assert_nothing_lost_nothing_doubled(stack, run)
        assert_worker_has_few_secrets(stack)
    finally:
        s3.stop()


def assert_worker_has_few_secrets(stack: Stack) -> None:
    held = {name.rpartition("-")[0]: secrets for name, secrets in stack.secrets_by_container().items()}
    assert held["worker"] == {"PIPELINE_PASSWORD", "REDIS_PASSWORD"}
    assert "PIPELINE_PASSWORD" not in held["scheduler"]


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


def assert_nothing_lost_nothing_doubled(stack: Stack, run: str) -> None:
    """Each load's rows are those of its ledger row, the run's are what was asked for, and stg is what raw says."""
    loads = stack.rows_by_load()
    assert {batch: told for batch, (told, rows) in loads.items() if told != rows} == {}
    assert loads[run][0] in (100, ROWS)
    assert (
        stack.sql(
            "SELECT count(*) FROM stg.orders_latest FULL JOIN (SELECT DISTINCT ON (order_id) order_id, row_id"
            " FROM raw.orders ORDER BY order_id, updated_at DESC, row_id DESC) AS expected USING (order_id, row_id)"
            " WHERE orders_latest.updated_at IS NULL OR expected.row_id IS NULL"
        )
        == "0"
    )
