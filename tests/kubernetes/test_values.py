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


def test_only_the_migration_has_the_owners_login_and_only_workers_the_pipelines() -> None:
    assert [path for path, mapping in mappings(JOB) if mapping.get("name") == "warehouse-owner"]
    assert not [path for path, mapping in mappings(VALUES) if mapping.get("name") == "warehouse-owner"]
    holders = {path.split(".")[1] for path, mapping in mappings(VALUES) if mapping.get("name") == "AIRFLOW_CONN_DE_DW"}
    assert holders == {"workers"}


@pytest.mark.parametrize(
    ("pod", "containers"),
    [
        (VALUES["securityContexts"]["pod"], [VALUES["securityContexts"]["containers"]]),
        ({"runAsNonRoot": True}, [VALUES["dags"]["gitSync"]["securityContexts"]["container"]]),
        (POD["securityContext"], [c["securityContext"] for c in POD["initContainers"] + POD["containers"]]),
    ],
    ids=["chart", "git-sync", "migration"],
)
def test_nobody_is_root_or_becomes_it(pod: dict[str, Any], containers: list[dict[str, Any]]) -> None:
    assert pod["runAsNonRoot"] is True
    for container in containers:
        assert container["allowPrivilegeEscalation"] is False
        assert container["capabilities"] == {"drop": ["ALL"]}


def test_migration_comes_from_the_image_and_the_commit_that_airflow_runs() -> None:
    git_sync = {item["name"]: item.get("value") for item in POD["initContainers"][0]["env"]}

    assert POD["containers"][0]["image"] == f"{VALUES['defaultAirflowRepository']}:{VALUES['defaultAirflowTag']}"
    assert git_sync["GITSYNC_REPO"] == VALUES["dags"]["gitSync"]["repo"]
    assert git_sync["GITSYNC_REF"] == VALUES["dags"]["gitSync"]["ref"]


def test_chart_is_told_the_airflow_that_the_image_has() -> None:
    (version,) = re.findall(r"^apache-airflow==(\S+)", (ROOT / "requirements-image.txt").read_text(), re.MULTILINE)

    assert VALUES["airflowVersion"] == version
    assert f"apache/airflow:{version}-python" in (ROOT / "Dockerfile").read_text()
