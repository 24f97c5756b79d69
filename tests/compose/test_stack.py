"""compose.yaml as a running stack: counts, a second up, kills in mid-load, data kept, new versions."""

from urllib.parse import quote

import pytest

from tests.compose.stack import KILL_TASKS, ROWS, Refused, Stack

pytestmark = pytest.mark.compose


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


def test_warehouse_page_shows_the_runs(stack: Stack) -> None:
    status, page = stack.http("GET", "/warehouse/", token=stack.login())

    assert status == 200
    for batch in stack.rows_by_load():
        assert f'href="/dags/orders/runs/{quote(batch, safe="")}"' in page


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
            " (SELECT sum(version) FROM stg.table_versions), (SELECT max(oid) FROM pg_class)"
        )
        return started, tables

    before = state()
    stack.up()

    assert state() == before


def test_load_whose_process_is_killed_recovers_and_is_there_once(stack: Stack) -> None:
    run = stack.trigger(rows=ROWS)
    stack.wait_for_copy()

    killed = stack.inside("scheduler", KILL_TASKS)

    stack.wait_for(run)
    assert len(killed.split()) >= 2  # the worker and the task's own process, and perhaps a worker that is just done
    assert stack.tasks(run)["load_raw"]["try_number"] > 1
    stack.assert_nothing_lost_nothing_doubled(run, ROWS)


def test_load_during_a_restart_of_the_scheduler_recovers_and_is_there_once(stack: Stack) -> None:
    run = stack.trigger(rows=ROWS)
    stack.wait_for_copy()

    stack.compose("restart", "--timeout", "0", "scheduler")

    stack.wait_for(run)
    assert stack.tasks(run)["load_raw"]["try_number"] > 1
    stack.assert_nothing_lost_nothing_doubled(run, ROWS)


def test_database_killed_in_mid_load_recovers_and_the_load_is_there_once(stack: Stack) -> None:
    run = stack.trigger(rows=ROWS)
    stack.wait_for_copy()

    stack.compose("kill", "--signal", "KILL", "postgres")
    stack.compose("up", "-d", "--no-deps", "--wait", "postgres")

    stack.wait_for(run)
    assert stack.tasks(run)["load_raw"]["try_number"] > 1
    stack.assert_nothing_lost_nothing_doubled(run, ROWS)


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
    stack.assert_nothing_lost_nothing_doubled(run, 100)
