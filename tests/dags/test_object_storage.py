"""Batch files in an object store: the loader's rules on a real S3 API server."""

import gzip
import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import batch_store
import pytest
from batch_file import BatchFile
from batch_load import BatchError, Load, load_batch
from batch_rejects import load_good_records
from batch_store import shown
from psycopg.conninfo import make_conninfo

from generator.orders import generate_orders
from tests.dags.newest import server
from tests.s3 import S3
from tests.warehouse import ROOT, Warehouse

__all__ = ["server"]  # a fixture

HEADER = "order_id,customer_name,customer_email,product,quantity,unit_price,currency,status,ordered_at,updated_at\n"
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
MEMORY_MB = 60  # what 160 MB may take more than 100 rows: a few blocks of 8 MB

# Loads one object; says so, and waits, after the given number of blocks; then says what came of it and what it took.
LOADER = """
import re, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import batch_load, psycopg
from upath import UPath

url, path, batch_id, pause_at = sys.argv[3:]
read_blocks = batch_load.BatchFile.blocks

def blocks(file):
    for number, block in enumerate(read_blocks(file)):
        if number == int(pause_at):
            print("reading", flush=True)
            sys.stdin.readline()
        yield block

batch_load.BatchFile.blocks = blocks
with psycopg.connect(url) as conn:
    print(batch_load.load_batch(conn, table="raw.orders", batch_id=batch_id, path=UPath(path)))
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def row(order_id: object = 1, quantity: object = 2, product: str = "Desk") -> str:
    return f'{order_id},Ann,a@example.com,"{product}",{quantity},9.99,EUR,paid,2025-12-31,2026-01-01\n'


MANY = (HEADER + "".join(row(number) for number in range(20_000))).encode()  # 1.5 MB


@pytest.fixture
def load(warehouse: Warehouse, s3: S3) -> Callable[..., Load]:
    """Put an object into the store and load it."""

    def load_(content: bytes | str | None, batch_id: str = "a", key: str = "orders.csv", **options: Any) -> Load:
        path = s3.path(key)
        if content is not None:
            s3.put(key, content.encode() if isinstance(content, str) else content)
        with warehouse.connect() as conn:
            return load_batch(conn, table="raw.orders", batch_id=batch_id, path=path, **options)

    return load_


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that MANY takes more than 20 ranged GETs."""
    monkeypatch.setattr(batch_store, "OBJECT_BLOCK_BYTES", 64 * 1024)


def at_block(monkeypatch: pytest.MonkeyPatch, wanted: int, do: Callable[[], object]) -> None:
    """Do it when so many blocks have been read."""
    read_blocks = BatchFile.blocks

    def blocks(file: BatchFile) -> Iterator[bytes]:
        for number, block in enumerate(read_blocks(file)):
            if number == wanted:
                do()
            yield block

    monkeypatch.setattr(BatchFile, "blocks", blocks)


def counts(warehouse: Warehouse) -> tuple[Any, ...]:
    """Rows in raw.orders, rows in the ledger."""
    ((rows, loads),) = warehouse.rows("SELECT (SELECT count(*) FROM raw.orders), (SELECT count(*) FROM raw.loads)")
    return rows, loads


@pytest.mark.parametrize("packed", [False, True])
def test_rows_and_ledger_are_those_of_the_same_file_on_disk(
    warehouse: Warehouse, load: Callable[..., Load], tmp_path: Path, packed: bool
) -> None:
    path = tmp_path / "orders.csv"
    generate_orders(path, rows=30_000, updated_at=NOON)
    content = b"\xef\xbb\xbf" + path.read_bytes()
    content = gzip.compress(content) if packed else content
    path.write_bytes(content)
    with warehouse.connect() as conn:
        on_disk = load_batch(conn, table="raw.orders", batch_id="disk", path=path)

    in_store = load(content, "store", load_again=True)

    assert in_store.sha256 == on_disk.sha256 == hashlib.sha256(content).hexdigest()
    assert (in_store.rows, in_store.bytes, in_store.is_new) == (30_000, len(content), True)
    columns = HEADER.strip().replace("unit_price", "unit_price::text")
    of_load = f"SELECT {columns} FROM raw.orders WHERE load_id = {{}} ORDER BY row_id"
    assert warehouse.rows(of_load.format(on_disk.load_id)) == warehouse.rows(of_load.format(in_store.load_id))
    assert warehouse.rows("SELECT source FROM raw.loads ORDER BY load_id") == [
        (str(path),),
        ("s3://warehouse/orders.csv",),
    ]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("packed", [False, True])
def test_file_of_many_blocks_is_read_in_all_passes(
    warehouse: Warehouse, load: Callable[..., Load], packed: bool
) -> None:
    content = MANY + b"x,Ann,,Desk,1,1.00,EUR,paid,,2026-01-01\n"
    content = gzip.compress(content) if packed else content

    with pytest.raises(BatchError, match=r"s3://warehouse/orders\.csv: 1 of 20,001 records are bad"):
        load(content)
    first = load(content, max_rejects=1)
    again = load(None, max_rejects=1)  # reads it for its digest

    assert (first.rows, first.rejects, first.is_new, again.is_new) == (20_000, 1, True, False)
    assert first.sha256 == hashlib.sha256(content).hexdigest()
    assert counts(warehouse) == (20_000, 1)


def test_batch_is_loaded_once_and_never_changes(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    first = load(HEADER + row(1))

    for again in (load(None), load(None, "b"), load(HEADER + row(1), "c", key="copy.csv")):
        assert (again.load_id, again.batch_id, again.is_new) == (first.load_id, "a", False)
    with pytest.raises(BatchError, match=r"s3://warehouse/orders\.csv: batch a was loaded .* with other bytes"):
        load(HEADER + row(2))
    assert counts(warehouse) == (1, 1)


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        (None, "missing.csv", r"no such object .*\. Has the file been moved, or not been delivered yet\?"),
        (None, "folder", "not a regular file"),
        (None, "", "not a regular file"),
        (b"", "empty.csv", "the file is empty"),
        ((HEADER + row(1)).encode()[:-1], "cut.csv", "the last line has no line end"),
        (gzip.compress(MANY)[:-100], "cut.csv.gz", "the gzip file is damaged or cut off"),
        (b"PK\x03\x04 and so on\n", "orders.xlsx", "not a CSV file but a zip archive"),
    ],
)
def test_object_that_is_no_whole_batch_is_refused_by_its_url(
    warehouse: Warehouse, s3: S3, load: Callable[..., Load], content: bytes | None, key: str, message: str
) -> None:
    s3.put("folder/orders.csv", b"")

    with pytest.raises(BatchError, match=rf"^s3://warehouse/{key}.*: {message}"):
        load(content, key=key)

    assert counts(warehouse) == (0, 0)


def test_missing_bucket_is_named(warehouse: Warehouse, s3: S3) -> None:
    path = s3.path("orders.csv", bucket="elsewhere")

    with warehouse.connect() as conn, pytest.raises(BatchError, match=r"^s3://elsewhere/orders\.csv: no such object"):
        load_batch(conn, table="raw.orders", batch_id="a", path=path)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("other", [MANY.replace(b"Desk", b"Lamp"), MANY + row().encode(), None])
def test_object_that_is_replaced_or_removed_while_it_is_read_is_refused(
    warehouse: Warehouse,
    s3: S3,
    load: Callable[..., Load],
    monkeypatch: pytest.MonkeyPatch,
    packed: bool,
    other: bytes | None,
) -> None:
    pack = gzip.compress if packed else bytes
    replace = lambda: (  # noqa: E731
        s3.put("orders.csv", pack(other)) if other else s3.client().delete_object(Bucket=s3.bucket, Key="orders.csv")
    )
    at_block(monkeypatch, 5, replace)

    with pytest.raises(BatchError, match=r"changed while it was read|no such object"):
        load(pack(MANY))

    assert counts(warehouse) == (0, 0)


@pytest.mark.parametrize("content", [HEADER + row("x"), HEADER + row("x") + row(1) * 20_000])
def test_object_that_is_replaced_between_the_passes_is_refused(
    warehouse: Warehouse, s3: S3, load: Callable[..., Load], monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    def replaced(*arguments: Any) -> Any:
        s3.put("orders.csv", (HEADER + row(2)).encode())
        return load_good_records(*arguments)

    monkeypatch.setattr("batch_load.load_good_records", replaced)

    with pytest.raises(BatchError, match="changed while it was read"):
        load(content, max_rejects=1)

    assert counts(warehouse) == (0, 0)


def test_object_that_is_replaced_just_before_it_is_read_is_loaded_whole_or_not_at_all(
    warehouse: Warehouse, s3: S3, load: Callable[..., Load], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = batch_store._Object.state
    seen: list[batch_store.State] = []

    def replaced_after_the_first(self: batch_store._Object) -> batch_store.State:
        seen.append(state(self))
        if len(seen) == 1:
            s3.put("orders.csv", MANY + row().encode())
        return seen[-1]

    monkeypatch.setattr(batch_store._Object, "state", replaced_after_the_first)

    with pytest.raises(BatchError, match="changed while it was read"):
        load(MANY)

    assert counts(warehouse) == (0, 0)


@pytest.mark.usefixtures("small_blocks")
def test_same_bytes_written_again_while_they_are_read_are_loaded(
    warehouse: Warehouse, s3: S3, load: Callable[..., Load], monkeypatch: pytest.MonkeyPatch
) -> None:
    def again() -> None:
        time.sleep(1.1)  # an object's time is in seconds
        s3.put("orders.csv", MANY)

    at_block(monkeypatch, 5, again)

    load(MANY)

    assert counts(warehouse) == (20_000, 1)


def test_store_that_tells_no_version_is_refused(warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    from upath import UPath

    path = UPath("memory://folder/no_version.csv")
    path.write_bytes(MANY)
    info = path.fs.info
    monkeypatch.setattr(path.fs, "info", lambda name: {**info(name), "created": None})

    with warehouse.connect() as conn, pytest.raises(BatchError, match="does not tell one version"):
        load_batch(conn, table="raw.orders", batch_id="a", path=path)


def test_any_file_system_of_fsspec_will_do(warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    from upath import UPath

    path = UPath("memory://folder/orders.csv")
    path.write_bytes(MANY)

    with warehouse.connect() as conn:
        assert load_batch(conn, table="raw.orders", batch_id="a", path=path).rows == 20_000
    at_block(monkeypatch, 1, lambda: path.write_bytes(MANY))
    with warehouse.connect() as conn, pytest.raises(BatchError, match=r"^memory://folder/orders\.csv: .* changed"):
        load_batch(conn, table="raw.orders", batch_id="b", path=path, load_again=True)


def test_listing_made_before_does_not_hide_a_new_object(
    warehouse: Warehouse, s3: S3, load: Callable[..., Load]
) -> None:
    s3.client().delete_object(Bucket=s3.bucket, Key="late/orders.csv")
    s3.put("late/other.csv", b"x")
    path = s3.path("late/orders.csv")
    assert path.fs.ls("warehouse/late", detail=False) == ["warehouse/late/other.csv"]
    assert path.fs.ls("warehouse", detail=False)

    assert load(HEADER + row(1), key="late/orders.csv").rows == 1
    path.fs.ls("warehouse/late")
    assert load(HEADER + row(1) + row(2), "b", key="late/orders.csv").rows == 2


def test_server_that_is_away_is_not_the_batchs_fault(
    warehouse: Warehouse,
    own_s3: S3,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(batch_store, "OBJECT_BLOCK_BYTES", 64 * 1024)
    path = own_s3.put("orders.csv", MANY)
    with monkeypatch.context() as patch:
        at_block(patch, 5, own_s3.stop)
        with warehouse.connect() as conn, pytest.raises(Exception, match="connect") as in_mid_read:
            load_batch(conn, table="raw.orders", batch_id="a", path=path)
    with warehouse.connect() as conn, pytest.raises(Exception, match="connect") as at_open:
        load_batch(conn, table="raw.orders", batch_id="a", path=path)
    assert counts(warehouse) == (0, 0)
    own_s3.start()
    own_s3.put("orders.csv", MANY)
    with warehouse.connect() as conn:
        assert load_batch(conn, table="raw.orders", batch_id="a", path=path).rows == 20_000

    assert not isinstance(in_mid_read.value, BatchError)
    assert not isinstance(at_open.value, BatchError)
    assert "Desk" not in caplog.text  # psycopg logs what the server says to an aborted COPY
    assert "not-a-secret" not in caplog.text + str(in_mid_read.value) + str(at_open.value)


@pytest.mark.usefixtures("s3")  # its credentials
@pytest.mark.parametrize("status", [429, 500, 503])
def test_server_that_is_busy_is_not_the_batchs_fault(warehouse: Warehouse, status: int) -> None:
    from upath import UPath

    class Busy(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever).start()
        path = UPath("s3://warehouse/orders.csv", endpoint_url=f"http://127.0.0.1:{server.server_port}")
        with warehouse.connect() as conn, pytest.raises(OSError, match=r"HeadObject|Error|Unavailable|Many") as raised:
            load_batch(conn, table="raw.orders", batch_id="a", path=path)
        server.shutdown()

    assert not isinstance(raised.value, FileNotFoundError | PermissionError)


@pytest.mark.parametrize("own_s3", [{"checked_after": 2}], indirect=True)
def test_object_that_may_not_be_read_says_what_may_be_missing(warehouse: Warehouse, own_s3: S3) -> None:
    path = own_s3.put("orders.csv", MANY)

    with warehouse.connect() as conn, pytest.raises(PermissionError, match=r"^s3://warehouse/orders\.csv: .*s3:GetOb"):
        load_batch(conn, table="raw.orders", batch_id="a", path=path)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://aws_default@bucket/orders.csv", "s3://aws_default@bucket/orders.csv"),
        ("s3://AKIA:se/cret@bucket/orders.csv", "s3://AKIA@bucket/orders.csv"),
        ("s3://AKIA:1/cret@bucket/orders.csv", "s3://AKIA@bucket/orders.csv"),
        ("https://host/orders.csv?X-Amz-Signature=secret", "https://host/orders.csv"),
        ("s3://bucket/a?b.csv", "s3://bucket/a?b.csv"),
        ("s3://bucket/a:b@c.csv", "s3://bucket/a:b@c.csv"),
        ("http://host:8080/a@b.csv", "http://host:8080/a@b.csv"),
        ("/data/a:b@c.csv", "/data/a:b@c.csv"),
    ],
)
def test_password_in_a_url_is_not_shown(url: str, expected: str) -> None:
    assert shown(url) == expected


def loader(warehouse: Warehouse, path: Any, batch_id: str = "a", pause_at: int = -1) -> subprocess.Popen[str]:
    with warehouse.connect() as conn:
        url = make_conninfo(warehouse.url, options=conn.info.options)
    arguments = [str(ROOT), str(ROOT / "dags"), url, str(path), batch_id, str(pause_at)]
    return subprocess.Popen(
        [sys.executable, "-c", LOADER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_loader_that_is_killed_while_it_reads_loads_nothing_and_its_retry_once(warehouse: Warehouse, s3: S3) -> None:
    path = s3.put("killed.csv", MANY)
    with loader(warehouse, path, pause_at=10) as process:
        assert process.stdout
        assert process.stdout.readline() == "reading\n"
        process.kill()
    assert counts(warehouse) == (0, 0)

    with loader(warehouse, path) as process:
        assert "20,000 rows" in process.communicate()[0]
    with loader(warehouse, path) as process:
        assert "already loaded" in process.communicate()[0]

    assert counts(warehouse) == (20_000, 1)


def test_memory_of_the_loader_does_not_grow_with_the_object(warehouse: Warehouse, s3: S3) -> None:
    peaks = []
    for rows in (100, 1_000_000):  # 16 kB, 165 MB
        path = s3.path(f"{rows}.csv")
        generate_orders(path, rows=rows, updated_at=NOON)
        with loader(warehouse, path, str(rows)) as process:
            loaded, peak = process.communicate()[0].splitlines()
        assert f"{rows:,} rows" in loaded
        peaks.append(int(peak) // 1024)

    assert peaks[1] - peaks[0] < MEMORY_MB, peaks
