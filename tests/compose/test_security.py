"""Each line of docs/security.md, by trying to break it. What was tried is shown at the end of the run."""

import re
import socket
import stat
import subprocess
from collections.abc import Callable

import pytest

from tests.compose.stack import Stack, look_for_secrets, refused, try_to_become_more
from tests.warehouse import ROOT

pytestmark = pytest.mark.compose
Tried = Callable[[str, str], None]

SERVICES = ("postgres", "api-server", "scheduler", "dag-processor")
# Which secret is in which service's environment: nothing else may be.
HOLDERS = {
    "postgres": {"POSTGRES_PASSWORD"},
    "airflow-init": {
        "POSTGRES_PASSWORD",
        "AIRFLOW_DB_PASSWORD",
        "OWNER_PASSWORD",
        "PIPELINE_PASSWORD",
        "READER_PASSWORD",
        "UI_PASSWORD",
        "FERNET_KEY",
    },
    "api-server": {"AIRFLOW_DB_PASSWORD", "FERNET_KEY", "JWT_SECRET", "API_SECRET_KEY", "READER_PASSWORD"},
    "scheduler": {"AIRFLOW_DB_PASSWORD", "FERNET_KEY", "JWT_SECRET", "API_SECRET_KEY", "PIPELINE_PASSWORD"},
    "dag-processor": {"AIRFLOW_DB_PASSWORD", "FERNET_KEY"},
}
# What the UI's server tells anybody: its version, whether it is healthy, and how to log in.
OPEN = {"/api/v2/version", "/api/v2/monitor/health", "/api/v2/auth/login", "/api/v2/auth/logout"}


def test_without_a_secret_nothing_starts(stack: Stack, tried: Tried) -> None:
    whole = stack.secrets
    files = ("-f", "compose.yaml", "-f", "compose.celery.yaml")
    celery = ("docker", "compose", "-p", stack.project, *files, "up", "-d")
    try:
        for name in whole:
            for without in ({key: value for key, value in whole.items() if key != name}, whole | {name: ""}):
                (stack.folder / ".env").write_text("".join(f"{key}={value}\n" for key, value in without.items()))
                said = refused(lambda: stack.run(*celery))
                assert f"required variable {name} is missing a value: make .env writes it" in said
            tried(f"docker compose up -d, without {name}", said)
    finally:
        stack.change_secrets(**whole)


def test_secrets_are_random_private_and_kept(stack: Stack, tried: Tried) -> None:
    before = stack.secrets
    stack.make_env()
    assert stack.secrets == before
    assert stat.S_IMODE((stack.folder / ".env").stat().st_mode) == 0o600
    assert len(set(before.values())) == len(before)
    assert min(len(value) for value in before.values()) >= 24
    ignored = subprocess.run(["git", "check-ignore", ".env"], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout.strip() == ".env"
    tried("stat -c %a .env; git check-ignore .env", "600 .env")


def test_only_the_ui_is_published_and_on_this_machine_only(stack: Stack, tried: Tried) -> None:
    published = {
        name: port
        for name, container in stack.containers().items()
        for port in (container["HostConfig"]["PortBindings"] or {}).items()
    }
    assert published == {"api-server-1": ("8080/tcp", [{"HostIp": "127.0.0.1", "HostPort": str(stack.port)}])}
    (address, *_) = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
    with pytest.raises(OSError, match="refused") as error:
        socket.create_connection((address, stack.port), timeout=5)
    tried("connect to the UI's port on this machine's other address", str(error.value))


def test_who_is_not_logged_in_sees_nothing(stack: Stack, tried: Tried) -> None:
    token = stack.login()
    _, schema = stack.http("GET", "/openapi.json", token=token)
    routes = [(method.upper(), path) for path, methods in schema["paths"].items() for method in methods]
    assert len(routes) > 100
    answers: dict[int, int] = {}
    for method, path in routes:
        if path in OPEN:
            continue
        status, answer = stack.http(method, re.sub(r"\{[^}]*\}", "1", path), {} if method != "GET" else None)
        assert status in (401, 403), f"{method} {path}: {status} {answer}"
        answers[status] = answers.get(status, 0) + 1
    tried(f"each of the API's {len(routes)} routes without a token", f"status: how often {answers}")
    for path in ("/ui/config", "/ui/dags", "/ui/auth/menus", "/ui/dashboard/dag_stats", "/ui/connections/hook_meta"):
        status, answer = stack.http("GET", path)
        assert status in (401, 403), f"{path}: {status} {answer}"
        tried(f"GET {path} without a token", f"{status} {answer}")
    for path in ("/warehouse/", "/warehouse/rejects", "/warehouse/docs/security.md", "/warehouse/static/warehouse.css"):
        status, answer = stack.http("GET", path)
        assert status == 401, f"{path}: {status} {answer}"
        assert stack.http("GET", path, token=token)[0] == 200
        tried(f"GET {path} without a token", f"{status} {answer}")
    for path in ("/execution/variables/x", "/execution/connections/de_dw"):
        status, answer = stack.http("GET", path)
        assert status in (401, 403), f"{path}: {status} {answer}"
        tried(f"GET {path} without a token", f"{status} {answer}")


def test_guessed_passwords_do_not_log_in(stack: Stack, tried: Tried) -> None:
    for user, password in (("admin", "admin"), ("airflow", "airflow"), ("admin", ""), ("admin", "password")):
        said = refused(lambda: stack.login(password, user))  # noqa: B023
        assert said.startswith(("401", "422", "400"))
        tried(f"POST /auth/token as {user}, password {password!r}", said)


@pytest.mark.parametrize("login", ["postgres", "airflow", "owner", "pipeline", "reader"])
def test_no_login_without_its_password(stack: Stack, tried: Tried, login: str) -> None:
    for password in ("", login, "postgres"):
        said = refused(lambda: stack.sql("SELECT", login, "postgres", password))  # noqa: B023
        assert "password authentication failed" in said or "no password supplied" in said
        tried(f"psql -U {login}, password {password!r}", said)
    socket_too = f"psql -X -w -U {login} de_dw -c 'SELECT 1'"
    said = refused(lambda: stack.inside("postgres", f"unset PGPASSWORD; {socket_too}"))
    assert "no password supplied" in said
    tried(f"in the container: {socket_too}", said)


def test_every_line_of_pg_hba_asks_for_scram(stack: Stack, tried: Tried) -> None:
    methods = stack.sql("SELECT DISTINCT auth_method FROM pg_hba_file_rules")
    assert methods == "scram-sha-256"
    hashes = stack.sql("SELECT DISTINCT left(rolpassword, 14) FROM pg_authid WHERE rolcanlogin")
    assert hashes == "SCRAM-SHA-256$"
    tried("SELECT DISTINCT auth_method FROM pg_hba_file_rules", methods)


@pytest.mark.parametrize(
    ("login", "database", "query", "words"),
    [
        ("airflow", "de_dw", "SELECT 1", 'permission denied for database "de_dw"'),
        ("reader", "airflow", "SELECT 1", 'permission denied for database "airflow"'),
        ("pipeline", "airflow", "SELECT 1", 'permission denied for database "airflow"'),
        ("owner", "airflow", "SELECT 1", 'permission denied for database "airflow"'),
        ("reader", "postgres", "SELECT 1", 'permission denied for database "postgres"'),
        ("reader", "de_dw", "INSERT INTO raw.orders (order_id) VALUES (1)", "permission denied for table orders"),
        ("reader", "de_dw", "DELETE FROM stg.orders_latest", "permission denied for table orders_latest"),
        ("reader", "de_dw", "UPDATE raw.loads SET rows = 0", "permission denied for table loads"),
        ("reader", "de_dw", "CREATE TABLE stg.mine ()", "permission denied for schema stg"),
        ("reader", "de_dw", "CREATE TABLE public.mine ()", "permission denied for schema public"),
        ("reader", "de_dw", "CREATE TEMPORARY TABLE mine ()", "permission denied to create temporary tables"),
        ("reader", "de_dw", "SELECT lo_from_bytea(0, 'x')", "permission denied for function lo_from_bytea"),
        ("reader", "de_dw", "SET ROLE de_dw_pipeline", 'permission denied to set role "de_dw_pipeline"'),
        ("reader", "de_dw", "SELECT stg.begin_refresh('orders_latest')", "permission denied"),
        ("reader", "de_dw", "SELECT stg.swap('orders_latest')", "permission denied"),
        ("reader", "de_dw", "SELECT rolpassword FROM pg_authid", "permission denied for table pg_authid"),
        ("pipeline", "de_dw", "DELETE FROM raw.orders", "permission denied for table orders"),
        ("pipeline", "de_dw", "UPDATE raw.orders SET quantity = 1", "permission denied for table orders"),
        ("pipeline", "de_dw", "TRUNCATE raw.orders", "permission denied for table orders"),
        ("pipeline", "de_dw", "DELETE FROM raw.loads", "permission denied for table loads"),
        (
            "pipeline",
            "de_dw",
            "UPDATE raw.orders_rejects SET reason = ''",
            "permission denied for table orders_rejects",
        ),
        ("pipeline", "de_dw", "ALTER TABLE raw.orders DISABLE TRIGGER ALL", "must be owner of table orders"),
        ("pipeline", "de_dw", "DROP TABLE raw.orders", "must be owner of table orders"),
        ("pipeline", "de_dw", "CREATE TABLE raw.mine ()", "permission denied for schema raw"),
        ("pipeline", "de_dw", "SET ROLE owner", 'permission denied to set role "owner"'),
        ("pipeline", "de_dw", "SET session_replication_role = replica", "permission denied to set parameter"),
        ("pipeline", "de_dw", "COPY raw.loads TO PROGRAM 'cat'", "COPY to or from an external program"),
        ("pipeline", "de_dw", "SELECT pg_read_file('/etc/passwd')", "permission denied for function pg_read_file"),
        ("owner", "de_dw", "DELETE FROM raw.orders", "raw.orders is append-only: DELETE refused"),
        ("owner", "de_dw", "TRUNCATE raw.loads", "raw.loads is append-only: TRUNCATE refused"),
        ("owner", "de_dw", "CREATE ROLE mine SUPERUSER LOGIN", "to create"),
        ("owner", "de_dw", "CREATE ROLE mine", "permission denied to create role"),
        ("owner", "de_dw", "CREATE DATABASE mine", "permission denied to create database"),
        ("owner", "de_dw", "COPY raw.loads TO PROGRAM 'cat'", "COPY to or from an external program"),
    ],
)
def test_a_login_can_do_its_work_and_no_more(
    stack: Stack, tried: Tried, login: str, database: str, query: str, words: str
) -> None:
    said = refused(lambda: stack.sql(query, login, database))
    assert words in said
    tried(f"{login}@{database}: {query}", said.partition("ERROR:")[2] or said)


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_can_not_become_more(stack: Stack, tried: Tried, service: str) -> None:
    try_to_become_more(stack, service, tried)


def test_code_is_mounted_to_be_read(stack: Stack, tried: Tried) -> None:
    mounted = {
        "scheduler": ("dags", "sql", "generator"),
        "dag-processor": ("dags", "sql"),
        "api-server": ("plugins", "docs"),
    }
    for service, folders in mounted.items():
        for folder in folders:
            said = refused(lambda: stack.inside(service, f"touch /opt/airflow/{folder}/mine"))  # noqa: B023
            assert "Read-only file system" in said
            tried(f"docker compose exec {service} touch {folder}/mine", said)


def test_database_has_no_way_out(stack: Stack, tried: Tried) -> None:
    said = refused(lambda: stack.inside("postgres", f"echo > /dev/tcp/{stack.gateway()}/{stack.port}"))
    assert "Network is unreachable" in said
    tried("in the database's container: connect to the host", said)


def test_a_secret_is_with_those_only_that_use_it(stack: Stack, tried: Tried) -> None:
    held = {name.rpartition("-")[0]: secrets for name, secrets in stack.secrets_by_container().items()}
    assert held == HOLDERS
    for service, names in held.items():
        tried(f"docker inspect {service}", ", ".join(sorted(names)))


def test_no_secret_is_in_an_image_a_log_or_a_process_list(stack: Stack, tried: Tried) -> None:
    look_for_secrets(stack, tried)


def test_compose_files_have_no_default_password() -> None:
    """Each value of a key that sounds secret, each password in a URL or JSON, is a variable that must be set."""
    required = re.compile(r"\$\{[A-Z_]+:\?make \.env writes it\}")
    found = 0
    for path in ROOT.glob("compose*.yaml"):
        for line in required.sub("REQUIRED", path.read_text()).splitlines():
            secrets = re.findall(r"(?:PASSWORD|SECRET|SECRET_KEY|FERNET_KEY)\"?: *(?!\*)([^#}]+)", line)
            secrets += re.findall(r"://[^:/@ ]*:([^@ ]*)@", line) + re.findall(r'"password": "([^"]*)"', line)
            for value in secrets:
                found += 1
                assert value.strip(' ",') in {"REQUIRED", "!reset null"}, f"{path.name}: {line}"
    assert found > 12
