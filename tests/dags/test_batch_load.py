"""dags/batch_load.py: each batch exactly once, or an error that says what to mend."""

import gzip
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import batch_file
import batch_load
import psycopg
import pytest
from batch_load import BatchError, Load, load_batch
from hypothesis import given
from hypothesis import strategies as st
from psycopg import errors

from generator.orders import generate_orders
from tests.warehouse import Warehouse, wait_until

HEADER = "order_id,customer_name,customer_email,product,quantity,unit_price,currency,status,ordered_at,updated_at\n"
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def row(order_id: object = 1, quantity: object = 2, product: str = "Desk", updated_at: str = "2026-01-01") -> str:
    return f'{order_id},Ann,a@example.com,"{product}",{quantity},9.99,EUR,paid,2025-12-31,{updated_at}\n'


@pytest.fixture
def load(warehouse: Warehouse, tmp_path: Path) -> Callable[..., Load]:
    """Write a file and load it, as the DAG does."""

    def load_(content: str | bytes, batch_id: str = "a", **options: Any) -> Load:
        path = tmp_path / "orders.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        with warehouse.connect() as conn:
            return load_batch(conn, table="raw.orders", batch_id=batch_id, path=path, updated_at=NOW, **options)

    return load_


def counts(warehouse: Warehouse) -> tuple[int, int]:
    """Rows in raw.orders, rows in the ledger."""
    ((rows, loads),) = warehouse.rows("SELECT (SELECT count(*) FROM raw.orders), (SELECT count(*) FROM raw.loads)")
    return rows, loads


def test_ledger_says_what_was_loaded(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    loaded = load(HEADER + row(1) + row(2))

    ledger = "SELECT load_id, table_name, batch_id, rows, rejects, bytes, sha256, batch_updated_at FROM raw.loads"
    assert warehouse.rows(ledger) == [
        (loaded.load_id, "raw.orders", "a", 2, 0, len(HEADER + row(1) + row(2)), loaded.sha256, NOW)
    ]
    assert warehouse.rows("SELECT DISTINCT load_id FROM raw.orders") == [(loaded.load_id,)]
    assert loaded.is_new


def test_same_batch_again_is_a_success_that_loads_nothing(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    first = load(HEADER + row(1))

    again = load(HEADER + row(1))

    assert not again.is_new
    assert again.load_id == first.load_id
    assert str(again) == f"already loaded as load {first.load_id}, batch a: 0 new rows"
    assert counts(warehouse) == (1, 1)


def test_same_batch_id_with_other_bytes_is_refused_with_both_hashes(
    warehouse: Warehouse, load: Callable[..., Load]
) -> None:
    first = load(HEADER + row(1))

    with pytest.raises(BatchError, match=rf"sha256 was {first.sha256}, is [0-9a-f]{{64}}"):
        load(HEADER + row(2))

    assert counts(warehouse) == (1, 1)


def test_same_bytes_under_another_batch_id_are_skipped_naming_the_first(
    warehouse: Warehouse, load: Callable[..., Load]
) -> None:
    first = load(HEADER + row(1), "a")

    again = load(HEADER + row(1), "b")

    assert (again.is_new, again.load_id, again.batch_id) == (False, first.load_id, "a")
    assert counts(warehouse) == (1, 1)


def test_same_bytes_are_loaded_again_when_told_to_but_once_per_batch(
    warehouse: Warehouse, load: Callable[..., Load]
) -> None:
    first = load(HEADER + row(1), "a")

    for is_new in (True, False):  # a retry, a cleared task
        assert load(HEADER + row(1), "b", load_again=True).is_new is is_new
    assert load(HEADER + row(1), "c").batch_id == "a"
    assert not load(HEADER + row(1), "a", load_again=True).is_new

    assert counts(warehouse) == (2, 2)
    assert warehouse.rows("SELECT batch_id, repeat_of FROM raw.loads ORDER BY load_id") == [
        ("a", None),
        ("b", first.load_id),
    ]


def test_other_file_of_the_same_size_is_loaded(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    load(HEADER + row(1), "a")

    assert load(HEADER + row(2), "b").is_new

    assert counts(warehouse) == (2, 2)


def test_same_bytes_at_the_same_time_are_loaded_once(warehouse: Warehouse, tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text(HEADER + row(1))
    with warehouse.connect() as first:
        load_batch(first, table="raw.orders", batch_id="a", path=path)  # not committed yet
        results: list[Load] = []

        def second() -> None:
            with warehouse.connect() as conn:
                results.append(load_batch(conn, table="raw.orders", batch_id="b", path=path))

        thread = threading.Thread(target=second)
        thread.start()
        wait_until(lambda: warehouse.rows("SELECT 1 FROM pg_locks WHERE NOT granted") != [])
        first.commit()
    thread.join(timeout=30)

    assert [(load.is_new, load.batch_id) for load in results] == [(False, "a")]
    assert counts(warehouse) == (1, 1)


def test_batches_without_rows_are_recorded_each(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    assert load(HEADER, "monday").rows == 0
    assert load(HEADER, "tuesday").is_new
    assert not load(HEADER, "tuesday").is_new

    assert counts(warehouse) == (0, 2)


def test_columns_are_matched_by_name(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    names = HEADER.strip().split(",")
    values = ["1", "Ann", "a@example.com", '"Desk, 27"" oak"', "2", "9.990", "EUR", "paid", "2025-12-31", "2026-01-01"]

    load(",".join(reversed(names)) + "\n" + ",".join(reversed(values)) + "\n")

    assert warehouse.rows("SELECT order_id, product, unit_price::text, status FROM raw.orders") == [
        (1, 'Desk, 27" oak', "9.990", "paid")
    ]


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (HEADER.replace("status", "state"), "missing: 'status'; unknown: 'state'"),
        (HEADER.replace("status", "product"), "missing: 'status'; more than once: 'product'"),
        (HEADER.replace("order_id,", ""), "missing: 'order_id'"),
        (HEADER.replace("order_id", "order_id,load_id"), "unknown: 'load_id'"),
        (HEADER.replace(",", ";"), "missing: 'order_id', 'customer_name'"),
        (row(), "missing: 'order_id'"),
        (HEADER.replace("status", "Status"), "missing: 'status'; unknown: 'Status'"),
        (HEADER.replace("status", '"status""); DROP TABLE raw.orders; --"'), "unknown: 'status\"); DROP"),
    ],
)
def test_header_that_does_not_fit_is_refused_by_name(
    warehouse: Warehouse, load: Callable[..., Load], header: str, says: str
) -> None:
    with pytest.raises(BatchError) as refusal:
        load(header + row())

    assert "orders.csv, line 1: " in str(refusal.value)
    assert says in str(refusal.value)
    assert "in any order: order_id, customer_name" in str(refusal.value)
    assert counts(warehouse) == (0, 0)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (row("x"), "line 3, column order_id, value 'x': invalid input syntax for type bigint"),
        (row(quantity="99999999999"), "line 3, column quantity, value '99999999999'"),
        (row(updated_at=""), "line 3, column updated_at: null value"),
        (row(updated_at="03/04/2026"), "line 3, column updated_at, value '03/04/2026': date/time field value"),
        (
            row(updated_at="infinity"),
            "line 3, column updated_at, value 'infinity': violates check constraint \"updated_at_is",
        ),
        (row(updated_at="2999-01-01"), 'violates check constraint "updated_at_is_not_in_the_future"'),
        (row(quantity=-1), "line 3, column quantity, value '-1': violates check constraint \"quantity_is_positive\""),
        ("1,2\n", 'line 3: missing data for column "customer_email"'),
        (row().replace("paid", "paid,paid"), "line 3: extra data after last expected column"),
        (row(product='Desk" wide'), "line 3: a quote inside a field"),
        (row(product='24" wide').replace('"24" wide"', '24" wide'), "line 3: a quote inside a field"),
        (row().replace("Ann", 'An"n"'), "line 3: a quote inside a field"),
        (row().replace('"Desk"', '"Desk'), "line 3: a quoted field that never ends"),
        (row(product="a\0b"), "line 3: a NUL byte"),
        (row(product="Desk")[:-1] + ',"\n', "line 3: a quoted field that never ends"),
        (row(quantity='"1\n2026 INFO forged\x1b[2J"'), r"value '1\n2026 INFO forged\x1b[2J'"),
    ],
)
def test_bad_row_fails_the_batch_with_its_line_column_and_value(
    warehouse: Warehouse, load: Callable[..., Load], bad: str, says: str
) -> None:
    with pytest.raises(BatchError) as refusal:
        load(HEADER + row(1) + bad + row(3))

    message = str(refusal.value)
    assert says in message
    assert "orders.csv" in message
    assert "Nothing was loaded" in message
    assert "a@example.com" not in message, "other values of the row may be personal"
    assert "1 of 3 records are bad, max_rejects is 0" in message
    assert message.replace("\n  line 3", "", 1).replace("\nCorrect", "", 1).isprintable(), (
        "a value must not write log lines of its own"
    )
    assert counts(warehouse) == (0, 0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf\n", "the file is empty"),
        ((HEADER + row())[:-1].encode(), "the last line has no line end"),
        ((HEADER + row())[:-20].encode(), "the last line has no line end"),
        (gzip.compress(gzip.compress(HEADER.encode())), "not a CSV file but gzip within gzip"),
        (gzip.compress(b"", mtime=0), "the file is empty"),  # without the time: the bytes are part of the test's name
        (gzip.compress((HEADER + row()).encode())[:-20], "the gzip file is damaged or cut off"),
        (gzip.compress((HEADER + row()).encode())[:-8] + bytes(8), "the gzip file is damaged or cut off"),
        (gzip.compress((HEADER + row())[:-1].encode()), "the last line has no line end"),
        (b"PK\x03\x04 anything\n", "not a CSV file but a zip archive"),
        ((HEADER + row()).encode("utf-16"), "not a CSV file but UTF-16"),
        (b"<html><body>502 Bad Gateway</body></html>\n", "not a CSV file but HTML"),
        ((HEADER + row(product="Büro")).encode("latin-1"), "line 2: not UTF-8: byte 0xfc"),
    ],
)
def test_what_is_no_whole_csv_file_is_refused(
    warehouse: Warehouse, load: Callable[..., Load], content: bytes, says: str
) -> None:
    with pytest.raises(BatchError) as refusal:
        load(content)

    assert says in str(refusal.value)
    assert counts(warehouse) == (0, 0)


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo"])
def test_what_is_no_file_is_refused_at_once(warehouse: Warehouse, tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    if kind == "fifo":
        os.mkfifo(path)

    with warehouse.connect() as conn, pytest.raises(BatchError, match=str(path)):
        load_batch(conn, table="raw.orders", batch_id="a", path=path)

    assert (kind != "missing") == path.exists(), "a loader must not make the file it looks for"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_line_ends_and_byte_order_mark_change_nothing(
    warehouse: Warehouse, load: Callable[..., Load], newline: str, bom: str
) -> None:
    load(bom + (HEADER + row(1) + row(2)).replace("\n", newline))

    assert warehouse.rows("SELECT order_id, updated_at::date::text FROM raw.orders") == [
        (1, "2026-01-01"),
        (2, "2026-01-01"),
    ]


@pytest.mark.parametrize("name", ["orders.csv", "orders.csv.gz", "orders"])
def test_gzip_is_known_by_its_content(warehouse: Warehouse, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = "".join(row(number, product="Büro\n") for number in range(20_000))
    packed = gzip.compress(("\ufeff" + HEADER + content).encode()) + gzip.compress(row(20_000).encode())
    path.write_bytes(packed)

    with warehouse.connect() as conn:
        loaded = load_batch(conn, table="raw.orders", batch_id="a", path=path)

    assert (loaded.rows, loaded.bytes, loaded.sha256) == (20_001, len(packed), hashlib.sha256(packed).hexdigest())
    assert warehouse.rows("SELECT count(DISTINCT order_id), max(order_id) FROM raw.orders") == [(20_001, 20_000)]
    assert path.read_bytes() == packed


def test_fields_are_kept_as_they_came(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    odd = [
        "",
        " US ",
        "NULL",
        "\\N",
        "a\nb",
        "a\r\nb",
        '5"',
        "=1+1",
        "{{ 1 }}",
        "%s :x",
        "\\.",
        "Zoë 香織",
        "x" * 100_000,
    ]

    load(HEADER + "".join(row(number, product=value.replace('"', '""')) for number, value in enumerate(odd)))

    assert warehouse.rows("SELECT product FROM raw.orders ORDER BY order_id") == [(value,) for value in odd]


def test_empty_field_is_null_and_quoted_empty_field_is_text(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    load(HEADER + '1,,"",,,,,,,2026-01-01\n')

    assert warehouse.rows("SELECT customer_name, customer_email, quantity FROM raw.orders") == [(None, "", None)]


def test_time_without_offset_is_utc_whatever_the_session_says(warehouse: Warehouse, tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text(HEADER + row(updated_at="2026-03-29 02:30:00"))

    with warehouse.connect() as conn:
        conn.execute("SET TimeZone = 'Europe/Berlin'; SET DateStyle = 'SQL, DMY'; SET client_encoding = 'LATIN1'")
        load_batch(conn, table="raw.orders", batch_id="a", path=path)

    utc = "SELECT (updated_at AT TIME ZONE 'UTC')::text FROM raw.orders"
    assert warehouse.rows(utc) == [("2026-03-29 02:30:00",)]


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 64, 256 * 1024])
def test_end_of_data_mark_is_refused_wherever_blocks_end(
    warehouse: Warehouse, load: Callable[..., Load], monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(batch_file, "BLOCK_BYTES", block_bytes)

    for end in ("\n", "\r\n"):
        with pytest.raises(BatchError, match=r"line 3: a line of just \\\., the end of the data"):
            load((HEADER + row(1) + "\\.\n" + row(2)).replace("\n", end))
    assert counts(warehouse) == (0, 0)
    load(HEADER + row(1, product='a"" \n\\.\nb') + row(2, product="\\."))  # within quotes it is data

    assert warehouse.rows("SELECT product FROM raw.orders ORDER BY order_id") == [('a" \n\\.\nb',), ("\\.",)]


@pytest.mark.parametrize("block_bytes", [3, 5, 64, 256 * 1024])
def test_stray_quotes_that_would_swallow_lines_are_refused(
    warehouse: Warehouse, load: Callable[..., Load], monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(batch_file, "BLOCK_BYTES", block_bytes)
    inches = row(2, product="24 wide").replace('"24 wide"', '24" wide')

    with pytest.raises(BatchError, match="line 3: a quote inside a field"):
        load(HEADER + row(1) + inches + row(3) * 20 + inches)

    assert counts(warehouse) == (0, 0)


# What the bytes of a CSV file may be, one after the other, by RFC 4180; None is where a stray quote stands.
STATES: dict[str, dict[str, str | None]] = {
    "start": {'"': "quoted", ",": "start", "\n": "start", "a": "plain"},
    "plain": {'"': None, ",": "start", "\n": "start", "a": "plain"},
    "quoted": {'"': "ended", ",": "quoted", "\n": "quoted", "a": "quoted"},
    "ended": {'"': "quoted", ",": "start", "\n": "start", "a": None},
}


@given(text=st.text(alphabet='"",\na', max_size=20), block_bytes=st.integers(1, 21))
def test_stray_quote_is_found_exactly_when_there_is_one(text: str, block_bytes: int) -> None:
    state: str | None = "start"
    for char in text + "\n":
        state = STATES[state][char] if state else None

    data, quotes, records, tail, stray = f"{text}\n".encode(), 0, 0, b"\n", False
    for start in range(0, len(data), block_bytes):
        block = data[start : start + block_bytes]
        found = batch_file.scan(tail[-1:] + block, quotes, ord("\n"))
        stray = stray or found.has_stray
        assert found.quotes == block.count(b'"')
        quotes += found.quotes
        records += found.record_ends
        tail = block

    assert stray == (state is None)
    assert stray or records == len([part for part in data.decode().split('"')[::2] for char in part if char == "\n"])


def test_one_table_has_one_name_however_it_is_spelled(warehouse: Warehouse, tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text(HEADER + row(1))
    with warehouse.connect() as conn:
        conn.execute("SET search_path = raw")
        results = [
            load_batch(conn, table=table, batch_id="a", path=path).is_new
            for table in ("raw.orders", "orders", '"raw"."orders"', "RAW.ORDERS")
        ]

    assert results == [True, False, False, False]
    assert counts(warehouse) == (1, 1)


def test_what_a_caller_inserts_after_a_load_is_not_of_that_load(warehouse: Warehouse, tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text(HEADER + row(1))
    with warehouse.connect() as conn:
        load_batch(conn, table="raw.orders", batch_id="a", path=path)
        with pytest.raises(errors.InvalidTextRepresentation):
            conn.execute("INSERT INTO raw.orders (order_id, updated_at) VALUES (2, now())")


def test_file_name_may_be_any_bytes(warehouse: Warehouse, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.csv")
    path.write_text(HEADER + row(1))

    with warehouse.connect() as conn:
        load_batch(conn, table="raw.orders", batch_id="a", path=path)

    assert warehouse.rows("SELECT source LIKE '%caf\\\\xe9.csv' FROM raw.loads") == [(True,)]


def test_file_that_grows_while_it_is_read_is_refused(
    warehouse: Warehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "orders.csv"
    path.write_text(HEADER + row(1))
    copy = batch_load._copy

    def grow(*arguments: Any) -> int:
        with path.open("a") as file:
            file.write(row(2))
        return copy(*arguments)

    monkeypatch.setattr(batch_load, "_copy", grow)

    with warehouse.connect() as conn, pytest.raises(BatchError, match="the file changed while it was read"):
        load_batch(conn, table="raw.orders", batch_id="a", path=path)
    assert counts(warehouse) == (0, 0)


def test_arrival_order_holds_across_sessions_that_keep_numbers(warehouse: Warehouse, tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    with warehouse.connect() as one, warehouse.connect() as other:
        for number, conn in enumerate([one, other, one]):
            path.write_text(HEADER + row(1, product=f"version {number}"))
            load_batch(conn, table="raw.orders", batch_id=str(number), path=path)
            conn.commit()

    warehouse.run("stg.orders_latest")

    assert warehouse.rows("SELECT product FROM stg.orders_latest") == [("version 2",)]


def test_autocommit_is_refused(warehouse: Warehouse, tmp_path: Path) -> None:
    with warehouse.connect(autocommit=True) as conn, pytest.raises(ValueError, match="autocommit"):
        load_batch(conn, table="raw.orders", batch_id="a", path=tmp_path / "orders.csv")


def test_generated_file_arrives_whole(warehouse: Warehouse, tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    generate_orders(path, rows=5000, seed=7, updated_at=NOW)

    with warehouse.connect() as conn:
        loaded = load_batch(conn, table="raw.orders", batch_id="a", path=path)

    assert loaded.rows == 5000
    figures = "SELECT count(DISTINCT order_id), min(order_id), max(order_id), min(updated_at), max(updated_at)"
    assert warehouse.rows(f"{figures} FROM raw.orders") == [(5000, 1, 5000, NOW, NOW)]
    assert warehouse.rows("SELECT count(*) FROM raw.orders WHERE ordered_at > updated_at") == [(0,)]


LOADER = """
import sys, psycopg
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from batch_load import load_batch
with psycopg.connect(sys.argv[1]) as conn:
    print(load_batch(conn, table="raw.orders", batch_id=sys.argv[2], path=Path(sys.argv[3])))
"""


def start_loader(warehouse: Warehouse, path: Path, batch_id: str) -> subprocess.Popen[bytes]:
    """A loader in a process of its own, that may be killed."""
    url = psycopg.conninfo.make_conninfo(warehouse.url, options="-c role=de_dw_pipeline")
    dags = str(Path(batch_load.__file__).parent)
    return subprocess.Popen([sys.executable, "-c", LOADER, url, batch_id, str(path), dags], stdout=subprocess.PIPE)


def bytes_copied(warehouse: Warehouse) -> int:
    return sum(bytes_ for (bytes_,) in warehouse.rows("SELECT bytes_processed FROM pg_stat_progress_copy", ""))


def has_copied(warehouse: Warehouse, bytes_: int) -> bool:
    return bytes_copied(warehouse) > bytes_


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seconds of work for a loader."""
    path = tmp_path_factory.mktemp("large") / "orders.csv"
    generate_orders(path, rows=400_000, updated_at=NOW)
    return path


def test_killed_loader_leaves_nothing_and_its_retry_loads_once(warehouse: Warehouse, large_file: Path) -> None:
    for mark in (1, 8_000_000, 30_000_000):
        loader = start_loader(warehouse, large_file, "a")
        wait_until(partial(has_copied, warehouse, mark))
        loader.kill()
        loader.wait()
        loader.stdout and loader.stdout.close()
        wait_until(lambda: bytes_copied(warehouse) == 0)
        assert counts(warehouse) == (0, 0)

    for is_new in (True, False):
        with warehouse.connect() as conn:
            assert load_batch(conn, table="raw.orders", batch_id="a", path=large_file).is_new is is_new
    assert counts(warehouse) == (400_000, 1)


def test_frozen_loader_is_named_and_ended_by_terminate_only(
    warehouse: Warehouse, large_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = start_loader(warehouse, large_file, "a")
    wait_until(lambda: bytes_copied(warehouse) > 0)
    loader.send_signal(signal.SIGSTOP)
    ((pid,),) = warehouse.rows("SELECT pid FROM pg_stat_progress_copy", "")
    monkeypatch.setitem(batch_load.SETTINGS, "lock_timeout", "300ms")

    with warehouse.connect() as conn, pytest.raises(errors.LockNotAvailable, match=rf"pid {pid}\..*pg_terminate"):
        load_batch(conn, table="raw.orders", batch_id="a", path=large_file)

    warehouse.rows(f"SELECT pg_terminate_backend({pid})", "")
    wait_until(lambda: bytes_copied(warehouse) == 0)
    with warehouse.connect() as conn:
        assert load_batch(conn, table="raw.orders", batch_id="a", path=large_file).is_new
    loader.kill()
    loader.wait()
    loader.stdout and loader.stdout.close()
    assert counts(warehouse) == (400_000, 1)


def test_two_loaders_of_one_batch_load_it_once_and_both_succeed(warehouse: Warehouse, large_file: Path) -> None:
    loaders = [start_loader(warehouse, large_file, "a") for _ in range(2)]

    said = sorted(loader.communicate()[0].decode() for loader in loaders)

    assert [loader.returncode for loader in loaders] == [0, 0]
    assert "already loaded as load" in said[0]
    assert "400,000 rows" in said[1]
    assert counts(warehouse) == (400_000, 1)
