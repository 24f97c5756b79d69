"""compose.celery.yaml: three workers with their files on S3, one of them killed in mid-load, and what they may not."""

from collections.abc import Callable, Iterator

import pytest

from tests.compose.stack import ROWS, Stack, look_for_secrets, refused, try_to_become_more
from tests.s3 import S3

pytestmark = pytest.mark.compose
Tried = Callable[[str, str], None]
RUNS = 6  # one after the other, of six tasks each: enough for every worker to get some


@pytest.fixture(scope="module")
def workers(stack: Stack) -> Iterator[Stack]:
    """The stack, with three workers that find each other's batch files on S3."""
    s3 = S3(host=stack.gateway())
    try:
        stack.files.insert(1, "compose.celery.yaml")
        stack.environment["WAREHOUSE_DATA"] = f"s3://aws_default@{s3.bucket}/de_dw"
        stack.environment["AIRFLOW_CONN_AWS_DEFAULT"] = s3.environment["AIRFLOW_CONN_AWS_DEFAULT"]
        stack.up("--scale", "worker=3")
        yield stack
    finally:
        s3.stop()


def test_three_workers_share_the_runs_that_are_asked_for_at_once(workers: Stack) -> None:
    before = workers.rows_by_load()

    runs = [workers.trigger() for _ in range(RUNS)]
    workers.wait_for(*runs)

    hosts = {task["hostname"] for run in runs for task in workers.tasks(run).values() if task["state"] == "success"}
    assert len(hosts) == 3
    brought = {batch: rows for batch, rows in workers.rows_by_load().items() if batch not in before}
    assert brought == dict.fromkeys(runs, (100, 100))
    on_s3 = "SELECT count(*) FROM raw.loads WHERE source LIKE 's3://aws_default@warehouse/de_dw/%'"
    assert workers.sql(on_s3) == str(RUNS)
    workers.assert_nothing_lost_nothing_doubled(runs[-1], 100)


def test_load_of_a_worker_that_is_killed_goes_to_another_and_is_there_once(workers: Stack) -> None:
    run = workers.trigger(rows=ROWS)
    workers.wait_for_copy()
    host = workers.tasks(run)["load_raw"]["hostname"]

    workers.run("docker", "kill", host)

    workers.wait_for(run)
    again = workers.tasks(run)["load_raw"]
    assert again["try_number"] > 1
    assert again["hostname"] != host
    workers.assert_nothing_lost_nothing_doubled(run, ROWS)


def test_a_secret_is_with_those_only_that_use_it(workers: Stack, tried: Tried) -> None:
    held = {name.rpartition("-")[0]: secrets for name, secrets in workers.secrets_by_container().items()}
    metadata = {"AIRFLOW_DB_PASSWORD", "FERNET_KEY"}
    assert held["redis"] == {"REDIS_PASSWORD"}
    assert held["worker"] == {"REDIS_PASSWORD", "PIPELINE_PASSWORD"}
    assert held["scheduler"] == {"REDIS_PASSWORD", "JWT_SECRET", "API_SECRET_KEY"} | metadata
    assert held["dag-processor"] == metadata
    assert held["api-server"] == {"READER_PASSWORD", "JWT_SECRET", "API_SECRET_KEY"} | metadata
    for service, names in held.items():
        tried(f"docker inspect {service}", ", ".join(sorted(names)))


@pytest.mark.parametrize("service", ["redis", "worker", "scheduler"])
def test_a_container_can_not_become_more(workers: Stack, tried: Tried, service: str) -> None:
    try_to_become_more(workers, service, tried)


def test_queue_asks_for_its_password(workers: Stack, tried: Tried) -> None:
    for words in ("", "-a wrong --no-auth-warning "):
        command = f"redis-cli {words}keys '*' 2>&1"
        said = workers.inside("redis", command)
        assert "NOAUTH" in said
        tried(f"in the container: {command}", said)


def test_scheduler_has_neither_code_nor_warehouse(workers: Stack, tried: Tried) -> None:
    assert workers.inside("scheduler", "ls dags sql generator data 2>/dev/null || true").split() in (
        [],
        ["dags:", "data:"],
    )
    said = refused(lambda: workers.inside("scheduler", "airflow connections get de_dw"))
    assert "not found" in said.lower()
    tried("docker compose exec scheduler airflow connections get de_dw", said[-130:])


def test_no_secret_is_in_an_image_a_log_or_a_process_list(workers: Stack, tried: Tried) -> None:
    look_for_secrets(workers, tried)
