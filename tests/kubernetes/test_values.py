"""kubernetes/: no secret in a file, nobody is root, and what the two files and the requirements say is one thing.

Whether the chart takes the values only Helm can say: docs/scaling.md has the command.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.warehouse import ROOT

VALUES = yaml.safe_load((ROOT / "kubernetes" / "values.yaml").read_text())
JOB = yaml.safe_load((ROOT / "kubernetes" / "migrate.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]


def mappings(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping of a file, with the way to it."""
    if isinstance(node, dict):
        yield path, node
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from mappings(value, f"{path}.{key}")


def test_secrets_are_named_and_never_written() -> None:
    for path, mapping in [*mappings(VALUES), *mappings(JOB)]:
        for key, value in mapping.items():
            if re.search("pass|secret|token|key", key, re.IGNORECASE) and isinstance(value, str):
                assert key.endswith(("SecretName", "credentialsSecret")) or path.endswith("secretKeyRef"), (
                    f"{path}.{key}"
                )
        if re.search("CONN|URL|PASSWORD|KEY|SECRET", str(mapping.get("name"))):
            assert "value" not in mapping, f"{path}: {mapping['name']}"


def test_each_login_is_with_who_needs_it() -> None:
    assert [path for path, mapping in mappings(JOB) if mapping.get("name") == "warehouse-owner"]
    assert not [path for path, mapping in mappings(VALUES) if mapping.get("name") == "warehouse-owner"]
    for name, holder in {"AIRFLOW_CONN_DE_DW": "workers", "AIRFLOW_CONN_DE_DW_READER": "apiServer"}.items():
        holders = {path.split(".")[1] for path, mapping in mappings(VALUES) if mapping.get("name") == name}
        assert holders == {holder}


@pytest.mark.parametrize(
    ("pod", "containers"),
    [
        (VALUES["securityContexts"]["pod"], [VALUES["securityContexts"]["containers"]]),
        ({"runAsNonRoot": True}, [VALUES["dags"]["gitSync"]["securityContexts"]["container"]]),
        (VALUES["securityContexts"]["pod"], [c["securityContext"] for c in VALUES["apiServer"]["extraInitContainers"]]),
        (POD["securityContext"], [c["securityContext"] for c in POD["initContainers"] + POD["containers"]]),
    ],
    ids=["chart", "git-sync", "plugins", "migration"],
)
def test_nobody_is_root_or_becomes_it(pod: dict[str, Any], containers: list[dict[str, Any]]) -> None:
    assert pod["runAsNonRoot"] is True
    for container in containers:
        assert container["allowPrivilegeEscalation"] is False
        assert container["capabilities"] == {"drop": ["ALL"]}


def test_migration_and_plugins_come_from_the_image_and_the_commit_that_airflow_runs() -> None:
    assert POD["containers"][0]["image"] == f"{VALUES['defaultAirflowRepository']}:{VALUES['defaultAirflowTag']}"
    for container in (*POD["initContainers"], *VALUES["apiServer"]["extraInitContainers"]):
        git_sync = {item["name"]: item.get("value") for item in container["env"]}
        assert git_sync["GITSYNC_REPO"] == VALUES["dags"]["gitSync"]["repo"]
        assert git_sync["GITSYNC_REF"] == VALUES["dags"]["gitSync"]["ref"]


def test_page_of_the_api_server_is_where_git_sync_puts_it() -> None:
    server = VALUES["apiServer"]
    (git_sync,) = server["extraInitContainers"]
    settings = {item["name"]: item.get("value") for item in [*server["env"], *git_sync["env"]]}
    (mount,) = server["extraVolumeMounts"]

    assert mount == {"name": server["extraVolumes"][0]["name"], "mountPath": settings["GITSYNC_ROOT"], "readOnly": True}
    assert git_sync["volumeMounts"] == [{"name": mount["name"], "mountPath": mount["mountPath"]}]
    folder = f"{settings['GITSYNC_ROOT']}/{settings['GITSYNC_LINK']}/plugins"
    assert settings["AIRFLOW__CORE__PLUGINS_FOLDER"] == folder
    assert (ROOT / "plugins" / "warehouse_plugin.py").exists()


def test_chart_is_told_the_airflow_that_the_image_has() -> None:
    (version,) = re.findall(r"^apache-airflow==(\S+)", (ROOT / "requirements-image.txt").read_text(), re.MULTILINE)

    assert VALUES["airflowVersion"] == version
    assert f"apache/airflow:{version}-python" in (ROOT / "Dockerfile").read_text()
