"""make lint's audit of the locked packages, against a vulnerability database of the test's own."""

import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.warehouse import ROOT

VULNERABLE = "numpy"  # pinned more than once: for older and newer versions of Python


class Database(BaseHTTPRequestHandler):
    """Answers as OSV does."""

    knows = True

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer: dict[str, object] = {}
        if self.knows and question["package"]["name"] == VULNERABLE:
            answer = {
                "vulns": [{"id": "TEST-1", "summary": "of a test", "modified": "2026-01-01T00:00:00Z", "affected": []}]
            }
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


class EmptyDatabase(Database):
    knows = False


@contextmanager
def serving(database: type[Database]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), database) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
        server.shutdown()


def audit(url: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OSV_URL": url, "NO_PROXY": "*"}
    return subprocess.run(["local/audit.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_known_vulnerability_of_a_locked_package_fails_and_is_named() -> None:
    with serving(Database) as url:
        done = audit(url)

    assert done.returncode == 1, done.stderr
    versions = set(re.findall(rf"^{VULNERABLE}==(\S+)", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE))
    assert len(versions) > 1
    assert set(re.findall(rf"^{VULNERABLE} +(\S+) +TEST-1", done.stdout, re.MULTILINE)) == versions


def test_without_one_it_passes() -> None:
    with serving(EmptyDatabase) as url:
        done = audit(url)

    assert done.returncode == 0, done.stderr
    assert "No known vulnerabilities" in done.stdout + done.stderr


def test_database_that_is_not_reached_is_no_failure_and_is_said() -> None:
    done = audit("http://127.0.0.1:9/v1/query")

    assert done.returncode == 0
    assert "skipped: http://127.0.0.1:9/v1/query is not reached" in done.stderr
