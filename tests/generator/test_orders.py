"""Rules of the generated orders, of the file they are written to, and of the command line."""

import csv
import io
import os
import re
import signal
import stat
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from generator import orders
from generator.files import BLOCK_ROWS
from generator.orders import generate_orders, write_orders

REPOSITORY = Path(__file__).parents[2]
NOON = datetime(2026, 11, 25, 12, 0, 0, 123456, tzinfo=UTC)
IDENTITY = ["order_id", "customer_name", "customer_email", "product", "quantity", "unit_price", "currency"]
COLUMNS = [*IDENTITY, "status", "ordered_at", "updated_at"]
LATER = {  # what each status may be later, while ordered_at is the same
    "created": {"created", "paid", "shipped", "delivered", "returned", "cancelled"},
    "paid": {"paid", "shipped", "delivered", "returned"},
    "shipped": {"shipped", "delivered", "returned"},
    "delivered": {"delivered", "returned"},
    "returned": {"returned"},
    "cancelled": {"cancelled"},
}

few_rows = st.integers(0, 300)
rows_around_blocks = st.builds(lambda blocks, more: blocks * BLOCK_ROWS + more, st.integers(1, 2), st.integers(-1, 1))
offsets = st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(timezone)
instants = st.datetimes(datetime.fromisoformat("1970-01-01"), datetime.fromisoformat("9998-12-31"), timezones=offsets)
# Faker needs 0.1 s for a new seed, so only the properties about seeds draw one, and few times.
seeds = st.integers(0, 2**70)


def make(rows: int, updated_at: datetime = NOON, seed: int = 0) -> bytes:
    out = io.BytesIO()
    size = write_orders(out, rows=rows, updated_at=updated_at, seed=seed)
    assert size == len(out.getvalue())
    return out.getvalue()


def read(data: bytes) -> list[dict[str, str]]:
    lines = list(csv.reader(io.StringIO(data.decode("utf-8"), newline=""), strict=True))
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # As on a machine unlike this one: none of it may show in the bytes.
    unlike = {"LC_ALL": "C", "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "1"}
    environment = {**os.environ, **unlike, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-m", "generator", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


class TestOrders:
    @settings(max_examples=10, deadline=None)
    @given(few_rows, instants, seeds)
    def test_same_seed_and_timestamp_make_the_same_bytes(self, rows: int, updated_at: datetime, seed: int) -> None:
        first = make(rows, updated_at, seed)
        orders._pools.cache_clear()
        assert make(rows, updated_at, seed) == first

    def test_other_process_makes_the_same_bytes(self, tmp_path: Path) -> None:
        result = run("--rows", "500", "--seed", "7", "--updated-at", NOON.isoformat(), cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "data/raw/orders.csv").read_bytes() == make(500, seed=7)

    def test_same_instant_with_another_offset_makes_the_same_bytes(self) -> None:
        assert make(50, NOON.astimezone(timezone(timedelta(hours=5, minutes=30)))) == make(50, NOON)

    @settings(max_examples=5, deadline=None)
    @given(seeds, seeds)
    def test_another_seed_makes_other_orders(self, seed: int, other: int) -> None:
        assert (make(50, seed=seed) == make(50, seed=other)) == (seed == other)

    @settings(max_examples=50, deadline=None)
    @given(few_rows | rows_around_blocks, few_rows | rows_around_blocks, instants)
    def test_fewer_rows_are_the_first_of_more_rows(self, rows: int, other: int, updated_at: datetime) -> None:
        fewer, more = sorted([rows, other])
        assert make(more, updated_at).startswith(make(fewer, updated_at))

    @pytest.mark.parametrize("block_rows", [1, 7, 1_000, 100_000])
    def test_size_of_a_block_does_not_show(self, block_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = make(2_000)
        monkeypatch.setattr("generator.files.BLOCK_ROWS", block_rows)
        assert make(2_000) == expected

    @settings(max_examples=50, deadline=None)
    @given(few_rows, instants)
    @example(BLOCK_ROWS + 1, NOON)
    def test_every_row_has_the_columns_types_and_ranges_of_the_contract(self, rows: int, updated_at: datetime) -> None:
        data = make(rows, updated_at)
        assert data.startswith(",".join(COLUMNS).encode() + b"\n")
        table = read(data)
        assert [row["order_id"] for row in table] == [str(k) for k in range(1, rows + 1)]
        for row in table:
            assert list(row) == COLUMNS
            assert row["customer_name"].strip()
            assert re.fullmatch(r"[a-z.]+\.\d+@example\.(com|net|org)", row["customer_email"])
            assert row["product"].strip()
            assert 1 <= int(row["quantity"]) <= 10
            assert re.fullmatch(r"[1-9]\d*\.\d\d", row["unit_price"])
            assert Decimal("4.99") <= Decimal(row["unit_price"]) < 2_000 * 160
            assert row["currency"] in {"USD", "EUR", "PLN", "CZK", "JPY"}
            assert row["status"] in LATER
            ordered_at = datetime.fromisoformat(row["ordered_at"])
            assert timedelta(0) <= updated_at - ordered_at < timedelta(days=30, seconds=1)
        assert {row["updated_at"] for row in table} <= {
            updated_at.astimezone(UTC).isoformat(sep=" ", timespec="microseconds")
        }

    def test_microseconds_and_the_offset_survive(self) -> None:
        row = read(make(1, datetime.fromisoformat("2026-11-25T10:11:12.000001+02:00")))[0]
        assert row["updated_at"] == "2026-11-25 08:11:12.000001+00:00"
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\+00:00", row["ordered_at"])

    def test_only_fields_that_need_it_are_quoted(self) -> None:
        data = make(2_000)
        again = io.StringIO(newline="")
        writer = csv.writer(again, lineterminator="\n")  # QUOTE_MINIMAL
        writer.writerow(COLUMNS)
        writer.writerows(row.values() for row in read(data))
        assert data == again.getvalue().encode()
        assert b'"' in data

    def test_customers_and_products_are_worth_parsing(self) -> None:
        table = read(make(5_000))
        products = {row["product"] for row in table}
        assert any("," in product and '"' in product for product in products)
        names = "".join(row["customer_name"] for row in table)
        for script in ("[a-z]", "[À-ž]", "[α-ω]", "[一-龯]"):
            assert re.search(script, names)
        assert len(products) == 200
        assert len({row["customer_email"] for row in table}) > 900

    def test_currency_is_that_of_the_customer(self) -> None:
        currencies: dict[str, set[str]] = {}
        for row in read(make(5_000)):
            currencies.setdefault(row["customer_email"], set()).add(row["currency"])
        assert all(len(each) == 1 for each in currencies.values())

    def test_price_is_that_of_the_product_and_currency(self) -> None:
        prices: dict[tuple[str, str], set[str]] = {}
        for row in read(make(5_000)):
            prices.setdefault((row["product"], row["currency"]), set()).add(row["unit_price"])
        assert all(len(each) == 1 for each in prices.values())

    def test_most_orders_are_small_and_every_status_is_there(self) -> None:
        table = read(make(5_000))
        share = {status: sum(row["status"] == status for row in table) / len(table) for status in LATER}
        assert all(share.values())
        assert share["delivered"] > 0.5
        assert 0 < share["cancelled"] < 0.1
        assert 0 < share["returned"] < 0.05
        assert sum(int(row["quantity"]) <= 3 for row in table) > len(table) / 2

    def test_no_rows_make_a_header_only(self) -> None:
        assert make(0) == ",".join(COLUMNS).encode() + b"\n"


class TestLaterBatch:
    @settings(max_examples=50, deadline=None)
    @given(instants, st.timedeltas(timedelta(0), timedelta(days=365)))
    def test_later_batch_is_the_same_orders_further_on(self, updated_at: datetime, later: timedelta) -> None:
        after = min(updated_at, datetime(9997, 1, 1, tzinfo=UTC)) + later
        before = after - later
        for old, new in zip(read(make(200, before)), read(make(200, after)), strict=True):
            assert [old[column] for column in IDENTITY] == [new[column] for column in IDENTITY]
            assert old["ordered_at"] <= new["ordered_at"]
            if old["ordered_at"] == new["ordered_at"]:
                assert new["status"] in LATER[old["status"]]

    def test_order_comes_again_after_exactly_30_days(self) -> None:
        now, then = read(make(200, NOON)), read(make(200, NOON + timedelta(days=30)))
        for old, new in zip(now, then, strict=True):
            ordered_again = datetime.fromisoformat(new["ordered_at"])
            assert ordered_again - datetime.fromisoformat(old["ordered_at"]) == timedelta(days=30)
            assert old["status"] == new["status"]

    def test_every_order_is_created_first(self) -> None:
        # Given when each order was made, then in that very second it is new.
        for row in read(make(20)):
            ordered_at = datetime.fromisoformat(row["ordered_at"])
            order = read(make(20, ordered_at))[int(row["order_id"]) - 1]
            assert order["ordered_at"] == row["ordered_at"]
            assert order["status"] == "created"

    def test_order_ends_delivered_returned_or_cancelled(self) -> None:
        for row in read(make(20)):
            last_second = datetime.fromisoformat(row["ordered_at"]) + timedelta(days=30, seconds=-1)
            order = read(make(20, last_second))[int(row["order_id"]) - 1]
            assert order["status"] in {"delivered", "returned", "cancelled"}


class TestArguments:
    @pytest.mark.parametrize(
        ("rows", "updated_at", "seed", "message"),
        [
            (-1, NOON, 0, "rows is -1: give 0"),
            (1, NOON, -5, "seed is -5: give 0"),
            (1, NOON.replace(tzinfo=None), 0, "12:00:00.123456 has no offset: give"),
            (1, NOON.replace(year=1969), 0, "1969-11-25 .* give a year from 1970 to 9998"),
            (1, NOON.replace(year=9999), 0, "9999-11-25 .* give a year from 1970 to 9998"),
        ],
    )
    def test_bad_value_is_named_with_its_remedy_and_nothing_is_made(
        self, rows: int, updated_at: datetime, seed: int, message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=message):
            generate_orders(tmp_path / "new" / "orders.csv", rows=rows, updated_at=updated_at, seed=seed)
        with pytest.raises(ValueError, match=message):
            write_orders(io.BytesIO(), rows=rows, updated_at=updated_at, seed=seed)
        assert list(tmp_path.iterdir()) == []


class TestFile:
    def test_file_is_what_write_orders_writes_and_its_size_is_returned(self, tmp_path: Path) -> None:
        path = tmp_path / "not" / "yet" / "orders.csv"
        size = generate_orders(path, rows=BLOCK_ROWS + 1, updated_at=NOON)
        assert path.read_bytes() == make(BLOCK_ROWS + 1)
        assert size == path.stat().st_size
        assert list(path.parent.iterdir()) == [path]

    def test_progress_counts_the_rows_written_so_far(self, tmp_path: Path) -> None:
        seen: list[int] = []
        generate_orders(tmp_path / "o.csv", rows=2 * BLOCK_ROWS + 5, updated_at=NOON, progress=seen.append)
        assert seen == [BLOCK_ROWS, 2 * BLOCK_ROWS, 2 * BLOCK_ROWS + 5]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
    @pytest.mark.parametrize("earlier", [b"earlier", None])
    def test_error_midway_leaves_the_earlier_file_and_nothing_else(
        self, error: type[BaseException], earlier: bytes | None, tmp_path: Path
    ) -> None:
        path = tmp_path / "orders.csv"
        if earlier:
            path.write_bytes(earlier)
        before = list(tmp_path.iterdir())
        during: list[Path] = []

        def fail(_: int) -> None:
            during.extend(tmp_path.glob(".orders.csv.*.part"))
            raise error

        with pytest.raises(error):
            generate_orders(path, rows=10, updated_at=NOON, progress=fail)
        assert len(during) == 1
        assert list(tmp_path.iterdir()) == before
        assert not earlier or path.read_bytes() == earlier

    def test_earlier_file_is_whole_until_the_new_one_is(self, tmp_path: Path) -> None:
        path = tmp_path / "orders.csv"
        path.write_bytes(b"earlier")
        seen: list[bytes] = []
        generate_orders(path, rows=10, updated_at=NOON, progress=lambda _: seen.append(path.read_bytes()))
        assert seen == [b"earlier"]
        assert path.read_bytes() == make(10)

    @pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
    def test_mode_follows_the_umask(self, umask: int, mode: int, tmp_path: Path) -> None:
        path = tmp_path / "orders.csv"
        before = os.umask(umask)
        try:
            generate_orders(path, rows=1, updated_at=NOON)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == mode

    def test_symlink_stays_one(self, tmp_path: Path) -> None:
        target, link = tmp_path / "target" / "orders.csv", tmp_path / "orders.csv"
        link.symlink_to(target)
        generate_orders(link, rows=1, updated_at=NOON)
        assert link.is_symlink()
        assert target.read_bytes() == make(1)

    def test_only_a_regular_file_is_replaced(self, tmp_path: Path) -> None:
        folder, pipe = tmp_path / "folder", tmp_path / "pipe"
        folder.mkdir()
        os.mkfifo(pipe)
        for path in (folder, pipe, Path("/dev/null")):
            with pytest.raises(OSError, match=f"{path} is not a regular file, .*: give the name of a file"):
                generate_orders(path, rows=1, updated_at=NOON)
        assert sorted(tmp_path.iterdir()) == [folder, pipe]


class TestCommandLine:
    def test_defaults_make_100_orders_of_now_in_data_raw(self, tmp_path: Path) -> None:
        before = datetime.now(UTC)
        result = run(cwd=tmp_path)
        assert result.returncode == 0
        assert result.stderr == ""  # no bar where there is no terminal
        data = (tmp_path / "data/raw/orders.csv").read_bytes()
        updated_at = datetime.fromisoformat(read(data)[0]["updated_at"])
        assert data == make(100, updated_at)
        assert before <= updated_at <= datetime.now(UTC)
        line = rf"100 rows, {len(data):,} bytes in [\d.]+ s \([\d,]+ rows/s\): data/raw/orders\.csv\n"
        assert re.fullmatch(line, result.stdout)

    def test_absent_offset_is_read_as_utc(self, tmp_path: Path) -> None:
        result = run("--rows=3", "--updated-at=2026-11-25T12:00:00.123456", "--out=o.csv", cwd=tmp_path)
        assert result.returncode == 0
        assert (tmp_path / "o.csv").read_bytes() == make(3, NOON)
        assert "without an offset it is read as UTC" in " ".join(run("--help", cwd=tmp_path).stdout.split())

    @pytest.mark.parametrize(
        ("argument", "message"),
        [
            ("--rows=-1", "argument --rows: '-1' is not a whole number"),
            ("--rows=1e6", "argument --rows: '1e6' is not a whole number"),
            ("--seed=x", "argument --seed: 'x' is not a whole number"),
            ("--updated-at=yesterday", "argument --updated-at: 'yesterday' is not ISO 8601: give"),
            ("--updated-at=1815-06-18", "updated_at 1815-06-18 00:00:00+00:00 is too far off: give"),
            ("--row-count=5", "--row-count"),
        ],
    )
    def test_bad_argument_is_named_and_exits_2(self, argument: str, message: str, tmp_path: Path) -> None:
        result = run(argument, cwd=tmp_path)
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert list(tmp_path.iterdir()) == []

    def test_unwritable_file_exits_1_with_a_message(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        result = run("--out=file/orders.csv", cwd=tmp_path)
        assert result.returncode == 1
        assert "Not a directory" in result.stderr or "File exists" in result.stderr
        assert "file" in result.stderr
        assert "Traceback" not in result.stderr

    def test_ctrl_c_exits_130_and_leaves_the_earlier_file(self, tmp_path: Path) -> None:
        path = tmp_path / "orders.csv"
        path.write_bytes(b"earlier")
        command = [sys.executable, "-m", "generator", "--rows=10000000000", f"--out={path}"]
        with subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
            # A shell has its background jobs ignore it, and so would whatever they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            try:
                while not list(tmp_path.glob(".orders.csv.*.part")):
                    assert process.poll() is None
                    time.sleep(0.01)
                process.send_signal(signal.SIGINT)
                _, stderr = process.communicate(timeout=60)
            finally:
                process.kill()
        assert process.returncode == 130
        assert "Traceback" not in stderr
        assert f"Interrupted: nothing half-written is left at {path}" in stderr
        assert list(tmp_path.iterdir()) == [path]
        assert path.read_bytes() == b"earlier"

    def test_terminal_gets_a_bar(self, tmp_path: Path) -> None:
        pty = pytest.importorskip("pty")
        leader, follower = pty.openpty()
        command = [sys.executable, "-m", "generator", "--rows=300000", f"--out={tmp_path / 'orders.csv'}"]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
        result = subprocess.run(command, cwd=REPOSITORY, env=environment, stderr=follower, check=True, timeout=60)
        os.close(follower)
        screen = os.read(leader, 100_000).decode()
        os.close(leader)
        assert result.returncode == 0
        assert "of 300,000 rows" in screen
        assert "rows/s" in screen
