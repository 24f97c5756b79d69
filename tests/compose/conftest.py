"""One stack for all tests of this folder; at the end, what it ran on, and what each attempt to break in has got."""

from collections.abc import Callable, Iterator

import pytest

from tests.compose.stack import Stack, running

# Each goes on with the stack as the one before left it.
ORDER = ("test_stack", "test_security", "test_workers", "test_versions")
ATTEMPTS: list[tuple[str, str, str]] = []
IMAGES: dict[str, str] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.stem) if item.path.stem in ORDER else -1)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    for parent in (folder.parent, folder.parent.parent):
        parent.chmod(0o755)
    # Only what would take long: a killed task is noticed after 20 s instead of 60.
    (folder / "compose.test.yaml").write_text(
        """
services:
  scheduler: {environment: {AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT: "20"}}
"""
    )
    with running(Stack(folder, "compose.test.yaml")) as made:
        made.up("--build")
        for container in made.containers().values():
            IMAGES[container["Config"]["Image"]] = made.run(
                "docker", "image", "inspect", "-f", '{{index .Config.Labels "standin.of"}}', container["Image"]
            )
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
        say("")
    for image, stands_in in IMAGES.items():
        say(f"{image}: {f'a local stand-in of {stands_in}' if stands_in else 'the official image'}")
