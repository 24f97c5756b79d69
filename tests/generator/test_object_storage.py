"""Batches written to an object store: whole or not at all, on a real S3 API server."""

import re
import signal
import subprocess
import sys
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import pytest

from generator.orders import generate_orders, write_orders
from tests.s3 import S3
from tests.warehouse import ROOT, wait_until

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)
EARLIER = b"an earlier batch\n"
# More than any test waits for, so that it never comes to its end by itself.
ENDLESS = "1000000000"

PEAK = """
import re, sys
from datetime import UTC, datetime
from pathlib import Path
from generator.orders import generate_orders
from upath import UPath

generate_orders(UPath(sys.argv[1]), rows=int(sys.argv[2]), updated_at=datetime(2026, 11, 25, 12, tzinfo=UTC))
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def expected(rows: int) -> bytes:
    out = BytesIO()
    write_orders(out, rows=rows, updated_at=NOON)
    return out.getvalue()


def start(out: object, *arguments: str) -> subprocess.Popen[str]:
    # Ctrl-C is a default that a shell takes away from what it runs in the background.
    return subprocess.Popen(
        [sys.executable, "-m", "generator", "--out", str(out), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def run(out: object, *arguments: str) -> tuple[int, str, str]:
    with start(out, *arguments) as process:
        stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


@pytest.mark.parametrize("rows", [0, 10, 250_000])  # 250,000 take three parts
def test_object_has_the_bytes_of_the_file(s3: S3, rows: int) -> None:
    path = s3.path("whole/orders.csv")

    size = generate_orders(path, rows=rows, updated_at=NOON)

    assert s3.get("whole/orders.csv") == expected(rows)
    assert size == len(expected(rows))
    assert s3.uploads("whole/") == []


@pytest.mark.parametrize("url", ["file://{}/orders.csv", "local://{}/orders.csv"])
def test_url_of_a_file_is_that_file(tmp_path: Path, url: str) -> None:
    from upath import UPath

    generate_orders(UPath(url.format(tmp_path / "a folder")), rows=10, updated_at=NOON)

    assert [path.name for path in (tmp_path / "a folder").iterdir()] == ["orders.csv"]
    assert (tmp_path / "a folder" / "orders.csv").read_bytes() == expected(10)


def test_error_leaves_the_earlier_object_and_no_upload(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    path = s3.put("error/orders.csv", EARLIER)

    def fail(rows: int) -> None:
        if rows > 200_000:
            assert s3.uploads("error/")
            raise RuntimeError("in mid-write")

    with pytest.raises(RuntimeError, match="in mid-write"):
        generate_orders(path, rows=250_000, updated_at=NOON, progress=fail)

    assert s3.get("error/orders.csv") == EARLIER
    assert s3.uploads("error/") == []


def test_object_is_seen_only_when_it_is_whole(s3: S3) -> None:
    seen = set()

    generate_orders(
        s3.path("new/orders.csv"), rows=250_000, updated_at=NOON, progress=lambda _: seen.update(s3.keys("new/"))
    )

    assert seen == set()
    assert s3.keys("new/") == ["new/orders.csv"]


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGINT])
def test_generator_that_is_stopped_leaves_the_earlier_object(s3: S3, signal_: int) -> None:
    prefix = f"stopped-{signal_:d}/"
    s3.put(prefix + "old.csv", EARLIER)
    for name in ("old.csv", "new.csv"):
        with start(s3.path(prefix + name), "--rows", ENDLESS) as process:
            wait_until(lambda: parts(s3, prefix) > 0)
            process.send_signal(signal_)
            stderr = process.communicate(timeout=60)[1]
        assert process.returncode == (-signal.SIGKILL if signal_ == signal.SIGKILL else 130), stderr
        # A kill leaves the parts for the bucket's lifecycle rule, and now and then Ctrl-C one that was on its way.
        assert s3.uploads(prefix) or signal_ == signal.SIGINT
        abort(s3, prefix)

    assert s3.keys(prefix) == [prefix + "old.csv"]
    assert s3.get(prefix + "old.csv") == EARLIER


def parts(s3: S3, prefix: str) -> int:
    """How many parts of unfinished uploads the server has."""
    return sum(
        len(s3.client().list_parts(Bucket=s3.bucket, Key=upload["Key"], UploadId=upload["UploadId"]).get("Parts", []))
        for upload in s3.uploads(prefix)
    )


def abort(s3: S3, prefix: str) -> None:
    for upload in s3.uploads(prefix):
        s3.client().abort_multipart_upload(Bucket=s3.bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def test_server_that_goes_away_is_an_error_and_no_object(own_s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("generator.files.PART_BYTES", 5 * 1024 * 1024)

    def stop(rows: int) -> None:
        if own_s3.process.poll() is None and rows > 50_000:
            own_s3.stop()

    with pytest.raises(Exception, match="connect"):
        generate_orders(own_s3.path("orders.csv"), rows=100_000, updated_at=NOON, progress=stop)

    own_s3.start()
    assert generate_orders(own_s3.path("orders.csv"), rows=10, updated_at=NOON) == len(own_s3.get("orders.csv"))


def test_memory_does_not_grow_with_the_object(s3: S3) -> None:
    peaks = []
    for rows in ("100", "1000000"):  # 16 kB, 165 MB
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(s3.path(f"memory/{rows}.csv")), rows],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        peaks.append(int(done.stdout) // 1024)

    assert peaks[1] - peaks[0] < 100, peaks  # MB: a few parts of 16, and what 1,000,000 rows in a file take


@pytest.mark.parametrize(
    ("out", "environment", "status", "message"),
    [
        ("s3://elsewhere/orders.csv", {}, 1, r"s3://elsewhere/orders\.csv: The specified bucket does not exist"),
        ("s3://warehouse", {}, 2, "non key-like path: warehouse"),
        ("s3://warehouse/x.csv", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, 1, "Could not connect"),
        ("s3://warehouse/x.csv", {"AWS_ACCESS_KEY_ID": ""}, 1, "credentials"),
        ("gs://warehouse/x.csv", {}, 1, "install gcsfs"),
        ("nothing://warehouse/x.csv", {}, 2, "nothing://warehouse/x.csv"),
    ],
)
def test_command_says_in_one_line_what_is_wrong(
    s3: S3, monkeypatch: pytest.MonkeyPatch, out: str, environment: dict[str, str], status: int, message: str
) -> None:
    for name, value in ({"AWS_EC2_METADATA_DISABLED": "true"} | environment).items():
        monkeypatch.setenv(name, value)

    returncode, stdout, stderr = run(out)

    assert (returncode, stdout) == (status, "")
    *usage, line = stderr.splitlines()
    assert re.search(rf"^python -m generator: .*{message}", line)
    assert all(text.startswith(("usage:", " ")) for text in usage)


def test_command_writes_to_a_url(s3: S3) -> None:
    returncode, stdout, stderr = run("s3://warehouse/command.csv", "--rows", "10", "--updated-at", NOON.isoformat())

    assert (returncode, stderr) == (0, "")
    assert stdout.endswith("s3://warehouse/command.csv\n")
    assert s3.get("command.csv") == expected(10)


def test_any_file_system_of_fsspec_will_do() -> None:
    from upath import UPath

    path = UPath("memory://folder/orders.csv")

    generate_orders(path, rows=10, updated_at=NOON)

    assert path.read_bytes() == expected(10)
