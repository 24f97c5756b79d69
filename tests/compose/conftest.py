"""One stack for all tests of this folder; at the end, what it ran on, and what each attempt to break in has got."""

import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.compose.stack import Stack, running

ATTEMPTS: list[tuple[str, str, str]] = []


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    for parent in (folder.parent, folder.parent.parent):
        parent.chmod(0o755)
    # Only what would take long: a killed task is noticed after 20 s instead of 60.
    (folder / "compose.test.yaml").write_text(
        "".join(
            f'  {service}: {{environment: {{AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT: "20"}}}}\n'
            for service in ("api-server", "scheduler")
        ).join(["services:\n", ""])
    )
    with running(Stack(folder, "compose.test.yaml")) as made:
        made.up("--build")
        yield made


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Note an attempt: the command, and what it got."""
    rule = request.node.name.removeprefix("test_").partition("[")[0].replace("_", " ")
    return lambda command, got: ATTEMPTS.append((rule, " ".join(command.split()), " ".join(got.split())))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    say = terminalreporter.write_line
    if ATTEMPTS:
        terminalreporter.section("security: what was tried, and what it got")
        last = ""
        for rule, command, got in ATTEMPTS:
            if rule != last:
                say(rule)
            last = rule
            say(f"    {command[:100]}\n        -> {got[:140]}")
    images = ("postgres:15", "apache/airflow:3.3.2-python3.12", "redis:7.2")
    query = ["docker", "image", "inspect", "-f", '{{index .Config.Labels "standin.of"}}', *images]
    labels = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[: len(images)]
    say("")
    for image, label in zip(images, labels, strict=False):
        say(f"{image}: {'a local stand-in' if label else 'the official image'}")
