"""Where the local warehouse keeps its state, and the environment that Airflow needs for it."""

import base64
import json
import os
import secrets
from pathlib import Path
from urllib.parse import quote

from psycopg.conninfo import conninfo_to_dict

ROOT = Path(__file__).resolve().parents[1]
# All state but the batch files; ignored by git. `make clean` removes it.
RUN = Path(os.environ.get("LOCAL_STATE", ROOT / ".run")).absolute()
ADMIN = "admin"


def airflow_connection(
    warehouse_url: str, role: str = "de_dw_pipeline", application_name: str = "airflow tasks"
) -> str:
    """A connection for AIRFLOW_CONN_...: the warehouse with the rights of a role, without the owner's.

    :param warehouse_url: any libpq URL or connection string of a login that is a member of the role.
    """
    parts = {name: str(value) for name, value in conninfo_to_dict(warehouse_url).items() if value is not None}
    parts["options"] = f"{parts.get('options', '')} -c role={role}".strip()
    parts.setdefault("application_name", application_name)
    named = {"host": "host", "login": "user", "password": "password", "schema": "dbname"}
    connection: dict[str, object] = {key: parts.pop(part) for key, part in named.items() if part in parts}
    if "port" in parts:
        connection["port"] = int(parts.pop("port"))
    return json.dumps({"conn_type": "postgres", **connection, "extra": parts})


def metadata_url(socket_dir: Path) -> str:
    """The database airflow of the embedded server, for SQLAlchemy."""
    return f"postgresql+psycopg2://postgres@/airflow?host={quote(str(socket_dir), safe='')}"


def environment(warehouse_url: str, metadata: str, port: int) -> dict[str, str]:
    """What Airflow is told by environment variables; one that is set already is left as it is, but for the connections.

    :param warehouse_url: for Alembic, as the owner, and for the connections de_dw (tasks) and de_dw_reader (the page).
    :param metadata: SQLAlchemy URL of Airflow's own database.
    :param port: of the UI and the API, on 127.0.0.1.
    """
    home = RUN / "airflow"
    keys = _keys()
    ours = {
        "WAREHOUSE_URL": warehouse_url,
        "AIRFLOW_CONN_DE_DW": airflow_connection(warehouse_url),
        "AIRFLOW_CONN_DE_DW_READER": airflow_connection(warehouse_url, "de_dw_reader", "airflow warehouse page"),
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": metadata,
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__FERNET_KEY": keys["fernet"],
        "AIRFLOW__API_AUTH__JWT_SECRET": keys["jwt"],
        "AIRFLOW__API__SECRET_KEY": keys["session"],
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{ADMIN}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(home / "passwords.json"),
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": f"http://127.0.0.1:{port}",
        # A laptop's worth of workers, each 25-55 MB when idle.
        "AIRFLOW__CORE__PARALLELISM": "4",
        # The defaults suit a busy scheduler; these save about a second per task on an idle one.
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.1",
        "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
        # An edited DAG shows within seconds instead of minutes.
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "5",
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "5",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
    }
    theirs = {name: os.environ.get(name) or value for name, value in ours.items()}
    # One warehouse for Alembic and Airflow, whatever else is set.
    return theirs | {name: ours[name] for name in ("WAREHOUSE_URL", "AIRFLOW_CONN_DE_DW", "AIRFLOW_CONN_DE_DW_READER")}


def admin_password() -> str:
    """The UI's password: made at random once, kept in a file that only its owner can read."""
    path = RUN / "airflow" / "passwords.json"
    if not path.exists():
        _write_private(path, {ADMIN: secrets.token_urlsafe(12)})
    return str(json.loads(path.read_text())[ADMIN])


def _keys() -> dict[str, str]:
    path = RUN / "airflow" / "keys.json"
    if not path.exists():
        _write_private(
            path,
            {
                "fernet": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
                # HS512 asks for 64 bytes
                "jwt": secrets.token_urlsafe(64),
                "session": secrets.token_urlsafe(32),
            },
        )
    keys: dict[str, str] = json.loads(path.read_text())
    return keys


def _write_private(path: Path, content: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(content, file)
    new.replace(path)
