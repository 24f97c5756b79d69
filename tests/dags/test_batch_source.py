"""dags/batch_source.py: which files a source names, on a disk and in a store, and that none is reached by a trick."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from batch_load import load_batch
from batch_source import Found, find_files, new_files, open_file
from batch_store import BatchError, open_source
from psycopg.rows import dict_row

from tests.dags.newest import server
from tests.s3 import S3
from tests.warehouse import ROOT, Warehouse, folder_for_a_server

__all__ = ["server"]  # a fixture

HEADER = b"customer_id,name,email,country,updated_at\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder to load from, with files; and beside it one that is none."""
    for name in (
        *("landing/2.csv", "landing/10.csv", "landing/1.csv.gz", "landing/notes.txt", "landing/.hidden.csv"),
        *("landing/3.csv.part", "landing/4.csv~", "landing/deep/er/5.csv", "landing/a [b]*.csv", "single.csv"),
        *("../outside/secret.csv", "../outside/deep/er/6.csv"),
    ):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(HEADER)
    return tmp_path / "data"


def found(source: str, *roots: object) -> list[str]:
    """Names of the files that a source names."""
    return [file.name for file in find_files(source, roots=[str(root) for root in roots], open_path=Path)]


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("single.csv", ["single.csv"]),
        ("./landing//2.csv", ["landing/2.csv"]),
        ("landing/*.csv", ["landing/2.csv", "landing/10.csv", "landing/a [b]*.csv"]),
        ("landing", ["landing/1.csv.gz", "landing/2.csv", "landing/10.csv", "landing/a [b]*.csv"]),
        ("landing/", ["landing/1.csv.gz", "landing/2.csv", "landing/10.csv", "landing/a [b]*.csv"]),
        ("landing/[12]*.csv*", ["landing/1.csv.gz", "landing/2.csv", "landing/10.csv"]),
        ("**/*.csv", ["landing/2.csv", "landing/10.csv", "landing/a [b]*.csv", "landing/deep/er/5.csv", "single.csv"]),
        ("landing/**/5.csv", ["landing/deep/er/5.csv"]),
        ("**/**/5.csv", ["landing/deep/er/5.csv"]),
        ("**/er/**/*.csv", ["landing/deep/er/5.csv"]),
        ("landing/deep/**", ["landing/deep/er/5.csv"]),
        ("*/deep/?r/*", ["landing/deep/er/5.csv"]),
        ("landing/a [b]*.csv", ["landing/a [b]*.csv"]),
        ("landing/.hidden.csv", ["landing/.hidden.csv"]),
        ("landing/3.csv.part", ["landing/3.csv.part"]),
        ("nothing/*.csv", []),
        ("landing/*.json", []),
    ],
)
def test_source_names_files_in_the_natural_order_of_their_names(root: Path, source: str, names: list[str]) -> None:
    assert found(source, root) == names
    assert found(f"{root}/{source}", root) == names
    assert found(f"file://{root}/{source}", f"file://{root}") == names


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("../outside/secret.csv", r"it has \.\. in it"),
        ("landing/../../outside/*.csv", r"it has \.\. in it"),
        ("/etc/passwd", "is below none of"),
        ("s3://bucket/a.csv", "is below none of"),
        ("landing/nothing.csv", "No such file or directory below /.*/data\\. Has"),
        (f"landing/{'long' * 100}.csv", "File name too long"),
        ("landing/a\0.csv", "a name that is no text"),
        ("landing/\ud8ff.csv", "a name that is no text"),
        ("single.csv/2.csv", "Not a directory"),
    ],
)
def test_source_that_is_below_no_root_or_not_there_is_refused(root: Path, source: str, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        found(source, root)


def test_folder_whose_name_begins_like_a_root_is_not_below_it(root: Path) -> None:
    (root.parent / "data2").mkdir()

    with pytest.raises(BatchError, match=r"is below none of .*: name its folder in WAREHOUSE_SOURCES"):
        found(f"{root}2", root)


def test_files_of_another_root_have_their_whole_path_for_a_name(root: Path) -> None:
    other = root.parent / "outside"

    assert found(f"{other}/*.csv", root, other) == [f"{other}/secret.csv"]
    assert found(f"{root}/landing/2.csv", root, root / "landing") == ["landing/2.csv"], "as by any other way"


def test_folder_that_is_not_there_to_load_from_is_refused_whatever_the_pattern(root: Path) -> None:
    with pytest.raises(BatchError, match=r"there is no folder /.*/mnt to load from\. Is it mounted\?"):
        found("*.csv", root / "mnt")


def test_folder_stands_for_its_csv_files_in_any_case(root: Path) -> None:
    (root / "landing" / "ORDERS.CSV").write_bytes(HEADER)

    assert found("landing", root)[-1] == "landing/a [b]*.csv"
    assert found("landing", root)[0] == "landing/1.csv.gz"
    assert "landing/ORDERS.CSV" in found("landing", root)


def test_folder_that_is_called_like_a_pattern_is_taken_by_its_name(root: Path) -> None:
    for name in ("feed [1]", "feed 1"):
        (root / name).mkdir()
        (root / name / "a.csv").write_bytes(HEADER)

    assert found("feed [1]/*.csv", root) == ["feed [1]/a.csv"]
    assert found("feed [12]/*.csv", root) == ["feed 1/a.csv"]


def test_way_through_a_root_that_is_a_link_leads_to_its_files(root: Path) -> None:
    """For itself it would be a link below the first root."""
    (root / "feeds").symlink_to(root.parent / "outside")
    names = [f"{root.parent}/outside/secret.csv"]

    assert found("feeds/*.csv", root, root / "feeds") == names
    assert found(f"{root}/feeds/*.csv", root, root / "feeds") == names
    with pytest.raises(BatchError, match="No symbolic link is followed"):
        found("feeds/*.csv", root)


@pytest.mark.parametrize("target", ["secret.csv", "deep"])
def test_link_is_not_followed_when_it_is_named(root: Path, target: str) -> None:
    (root / "link").symlink_to(root.parent / "outside" / target)

    with pytest.raises(BatchError, match="No symbolic link is followed"):
        found("link", root)
    for source in ("link/er/6.csv", "link/*/6.csv"):
        with pytest.raises(BatchError, match="Not a directory"):
            found(source, root)


@pytest.mark.parametrize("source", ["li*/*/6.csv", "**/6.csv"])
def test_link_to_a_folder_that_a_pattern_would_go_into_is_refused_by_its_name(root: Path, source: str) -> None:
    (root / "link").symlink_to(root.parent / "outside" / "deep")
    (root / "lines.txt").symlink_to(root.parent / "outside" / "secret.csv")  # as a file it would not be meant

    (file,) = find_files(source, roots=[str(root)], open_path=Path)

    assert file.name == "link"
    with pytest.raises(BatchError, match="a symbolic link"):
        open_source(open_file(file.url, roots=[str(root)], open_path=Path))


def test_file_that_was_found_is_not_opened_by_a_way_that_leads_upwards(root: Path) -> None:
    with pytest.raises(BatchError, match=r"it has \.\. in it"):
        open_file(f"{root}/landing/../../outside/secret.csv", roots=[str(root)], open_path=Path)


def test_space_at_the_end_of_a_name_is_of_the_name(root: Path) -> None:
    (root / "landing" / "2.csv ").write_bytes(b"another")

    (file,) = find_files("landing/2.csv?", roots=[str(root)], open_path=Path)

    with open_source(open_file(file.url, roots=[str(root)], open_path=Path)) as opened:  # type: ignore[attr-defined]
        assert opened.read() == b"another"


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_folder_that_may_not_be_read_is_not_left_out_in_silence(mode: int) -> None:
    """By a process of an ordinary user: root may read everything."""
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from batch_source import find_files\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setresuid(65534, 65534, 65534)\n"
        "find_files('**/*.csv', roots=[sys.argv[2]], open_path=None)"
    )
    with folder_for_a_server() as root:
        for path in (root, root / "closed", root / "open"):
            path.mkdir(exist_ok=True)
            path.chmod(0o755)
        (root / "closed" / "a.csv").write_bytes(HEADER)
        (root / "closed").chmod(mode)
        command = [sys.executable, "-c", program, str(ROOT / "dags"), str(root)]
        ended = subprocess.run(command, check=False, capture_output=True, text=True)
        (root / "closed").chmod(0o755)

    assert f"PermissionError: {root}/closed: Permission denied. Let Airflow's user read" in ended.stderr


def test_what_a_pattern_meets_that_is_no_file_is_refused_by_itself_and_keeps_no_other_back(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "landing" / "5.csv").symlink_to(root.parent / "outside" / "secret.csv")
    (root / "landing" / "6.csv").symlink_to("nowhere")
    os.mkfifo(root / "landing" / "7.csv")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(root / "landing")  # its path must be short
        listening.bind("8.csv")

    files = {file.name: file for file in find_files("landing/*.csv", roots=[str(root)], open_path=Path)}

    assert set(files) >= {"landing/2.csv", "landing/5.csv", "landing/6.csv", "landing/7.csv"}
    refused = {"5": "symbolic link", "6": "symbolic link", "7": "not a regular file", "8": "not a regular file"}
    for name, message in refused.items():
        with pytest.raises(BatchError, match=message):
            open_source(open_file(files[f"landing/{name}.csv"].url, roots=[str(root)], open_path=Path))


@pytest.mark.parametrize("exchanged", ["landing/deep/er/5.csv", "landing/deep", "landing"])
def test_link_that_takes_a_files_or_folders_place_after_it_was_found_is_refused(root: Path, exchanged: str) -> None:
    (file,) = find_files("landing/deep/er/5.csv", roots=[str(root)], open_path=Path)
    (root / exchanged).rename(root / "away")
    (root / exchanged).symlink_to(root / "away")

    with pytest.raises(BatchError, match="a symbolic link, or below one"):
        open_source(open_file(file.url, roots=[str(root)], open_path=Path))


def test_root_itself_may_be_a_link(root: Path) -> None:
    (root.parent / "link").symlink_to(root)

    (file,) = find_files("single.csv", roots=[str(root.parent / "link")], open_path=Path)

    assert file.name == "single.csv"
    with open_source(open_file(file.url, roots=[str(root.parent / "link")], open_path=Path)) as opened:  # type: ignore[attr-defined]
        assert opened.read() == HEADER


@pytest.mark.parametrize("name", ["a\nb.csv", os.fsdecode(b"\xff.csv"), "\x1b[31m.csv"])
def test_name_that_is_no_text_is_refused(root: Path, name: str) -> None:
    (root / "odd").mkdir()
    (root / "odd" / name).write_bytes(HEADER)

    with pytest.raises(BatchError, match="a name that is no text, or has line ends in it") as raised:
        found("odd/*.csv", root)
    assert str(raised.value).isprintable()


def test_names_that_are_no_text_are_said_but_not_all_of_many(root: Path) -> None:
    for number in range(1200):
        (root / f"{number:04}\n.csv").write_bytes(HEADER)

    with pytest.raises(BatchError, match=r"^('\d{4}\\n\.csv'(, )?){3} and 1,197 more: a name that") as raised:
        found("*.csv", root)
    assert str(raised.value).isprintable()


def test_spaces_and_letters_of_any_script_are_text(root: Path) -> None:
    name = "Bestellungen\u00a0März　注文.csv"
    (root / name).write_bytes(HEADER)

    assert found("Best*", root) == found(name, root) == [name]


def test_ledger_knows_a_file_until_it_is_touched_or_replaced(warehouse: Warehouse, root: Path) -> None:
    def look() -> tuple[list[str], list[str]]:
        files = find_files("landing/*.csv", roots=[str(root)], open_path=Path)
        with warehouse.connect() as conn:
            new, known = new_files(conn, "raw.customers", files)
        return [file.name for file in new], [file.name for file in known]

    def load(name: str) -> None:
        path = open_file(f"{root}/{name}", roots=[str(root)], open_path=Path)
        with warehouse.connect() as conn:
            load_batch(conn, table="raw.customers", batch_id=name, path=path)

    odd = "landing/a [b]*.csv"
    assert look() == (["landing/2.csv", "landing/10.csv", odd], [])
    load("landing/2.csv")
    assert look() == (["landing/10.csv", odd], ["landing/2.csv"])
    assert warehouse.rows("SELECT batch_id, source FROM raw.loads") == [("landing/2.csv", f"{root}/landing/2.csv")]

    os.utime(root / "landing" / "2.csv", (1, 1))
    assert look() == (["landing/2.csv", "landing/10.csv", odd], [])
    (root / "landing" / "2.csv").write_bytes(HEADER + b"1,a,,,2026-01-01\n")
    with pytest.raises(BatchError, match=r"was loaded into raw\.customers as load 1 with other bytes"):
        load("landing/2.csv")


def test_ten_thousand_files_are_asked_for_within_a_second(warehouse: Warehouse) -> None:
    warehouse.alter(
        "INSERT INTO raw.loads (table_name, batch_id, source, header, sha256, bytes, rows, rejects, source_version) "
        "SELECT 'raw.orders', n || '.csv', 'x', 'x', encode(sha256(n::text::bytea), 'hex'), n, 1, 0, n::text "
        "FROM generate_series(0, 9999) AS n"
    )
    known = [Found(f"/x/{number}.csv", f"{number}.csv", number, f"{number}") for number in range(0, 20_000, 2)]

    with warehouse.connect() as conn:
        conn.row_factory = dict_row  # the caller's own
        started = time.monotonic()
        answer = new_files(conn, "raw.orders", known)
        seconds = time.monotonic() - started

    assert answer == (known[5000:], known[:5000])
    assert seconds < 1


# In a store


@pytest.fixture
def bucket(s3: S3, request: pytest.FixtureRequest) -> Sequence[Any]:
    """A prefix with objects, as a root, and how a path is made of it."""
    prefix = f"feeds [1] of {request.node.name}"
    for key in ("2.csv", "10.csv", "1.csv.gz", "notes.txt", ".hidden.csv", "3.csv.part", "deep/5 %?#ü.csv", "folder/"):
        s3.put(f"{prefix}/{key}", HEADER if not key.endswith("/") else b"")
    s3.put(f"{prefix}2/6.csv", HEADER)
    return f"s3://{s3.bucket}/{prefix}", lambda url: s3.path(url.removeprefix(f"s3://{s3.bucket}/"))


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("2.csv", ["2.csv"]),
        ("*.csv", ["2.csv", "10.csv"]),
        ("", ["1.csv.gz", "2.csv", "10.csv"]),
        ("**/*.csv", ["2.csv", "10.csv", "deep/5 %?#ü.csv"]),
        ("deep", ["deep/5 %?#ü.csv"]),
        ("deep/5 %?#ü.csv", ["deep/5 %?#ü.csv"]),
        ("de*/*", ["deep/5 %?#ü.csv"]),
        ("**/**/5*", ["deep/5 %?#ü.csv"]),
        ("nothing/*", []),
        ("nothing/**", []),
        (".hid*", [".hidden.csv"]),
        ("3.csv.part", ["3.csv.part"]),
    ],
)
def test_objects_are_found_like_files(bucket: Sequence[Any], source: str, names: list[str]) -> None:
    root, open_path = bucket

    files = find_files(f"{root}/{source}", roots=["/nowhere", root], open_path=open_path)

    assert [file.name for file in files] == [f"{root}/{name}" for name in names]
    assert [file.name for file in find_files(source, roots=[root], open_path=open_path)] == names
    for file in files:
        with open_source(open_file(file.url, roots=[root], open_path=open_path)) as opened:  # type: ignore[attr-defined]
            assert opened.read() == HEADER
            assert (file.size, file.version) == (opened.opened.size, str(opened.opened.version))


@pytest.mark.parametrize(
    ("source", "message"),
    [("{root}2/6.csv", "is below none of"), ("{root}/../6.csv", r"\.\. in it"), ("{root}/7.csv", "no such object")],
)
def test_object_below_no_root_or_not_there_is_refused(bucket: Sequence[Any], source: str, message: str) -> None:
    root, open_path = bucket

    with pytest.raises(BatchError, match=message):
        find_files(source.format(root=root), roots=[root], open_path=open_path)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("feed [1]/*.csv", ["feed [1]/a.csv"]),
        ("feed [12]/*.csv", ["feed 1/a.csv"]),
        ("b*/*.csv", []),
        ("b.part/*.csv", ["b.part/a.csv"]),
        ("**/a.csv", ["feed 1/a.csv", "feed [1]/a.csv", "no name//a.csv"]),
        ("no name/*/*", []),
        ("n*/*.csv", []),
        ("upper", ["upper/A.CSV"]),
        ("upper/*.csv", []),
        ("*.csv", ["*.csv", "a*.csv"]),
    ],
)
def test_characters_of_keys_mean_nothing_but_what_they_are(s3: S3, source: str, names: list[str]) -> None:
    for key in ("feed [1]/a.csv", "feed 1/a.csv", "b.part/a.csv", "no name//a.csv", "upper/A.CSV", "*.csv", "a*.csv"):
        s3.put(f"odd/{key}", HEADER)
    root = f"s3://{s3.bucket}/odd"

    files = find_files(source, roots=[root], open_path=lambda url: s3.path("odd"))

    assert [file.name for file in files] == (names if source != "*.csv" else ["*.csv"]), "which is called so"
    for file in files:
        with open_source(open_file(file.url, roots=[root], open_path=lambda url: s3.path("odd"))) as opened:  # type: ignore[attr-defined]
            assert opened.read() == HEADER


@pytest.mark.parametrize("source", ["a.csv?versionId=1", "*", "**"])
def test_key_that_would_be_read_as_another_is_refused(s3: S3, source: str) -> None:
    s3.put("versions/a.csv", HEADER)
    s3.put("versions/a.csv?versionId=1", HEADER + b"1,a,,,2026-01-01\n")

    with pytest.raises(BatchError, match=r"^'a\.csv\?versionId=1': \?versionId= in a name means a version"):
        find_files(source, roots=[f"s3://{s3.bucket}/versions"], open_path=lambda url: s3.path("versions"))


@pytest.mark.parametrize("source", ["a.csv", "*.csv", "**/*.csv", ""])
def test_missing_bucket_is_no_empty_one(s3: S3, source: str) -> None:
    root = "s3://elsewhere/feeds"

    with pytest.raises(BatchError, match=r"^source '.*': no such (bucket|object)"):
        find_files(source, roots=[root], open_path=lambda url: s3.path("feeds", bucket="elsewhere"))


@pytest.mark.parametrize("source", ["feeds/a.csv", "feeds/*.csv", "feeds/**/*.csv", "feeds"])
@pytest.mark.parametrize("own_s3", [{"checked_after": 2}], indirect=True)
def test_bucket_that_may_not_be_listed_is_no_empty_one(own_s3: S3, source: str) -> None:
    own_s3.put("feeds/a.csv", HEADER)

    with pytest.raises(PermissionError, match=rf"^source '{re.escape(source)}': .*\(s3:ListBucket\)"):
        find_files(source, roots=[f"s3://{own_s3.bucket}"], open_path=lambda url: own_s3.path(""))


@pytest.mark.parametrize("requests", range(1, 4))
@pytest.mark.parametrize("own_s3", [{}], indirect=True)
def test_store_that_goes_away_while_it_is_listed_is_no_empty_one(
    own_s3: S3, monkeypatch: pytest.MonkeyPatch, requests: int
) -> None:
    for folder in range(3):
        own_s3.put(f"feeds/{folder}/a.csv", HEADER)
    at = own_s3.path("feeds")
    call, calls = type(at.fs)._call_s3, 0

    async def call_or_stop(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == requests + 1:
            own_s3.stop()
        return await call(*arguments, **options)

    monkeypatch.setattr(type(at.fs), "_call_s3", call_or_stop)

    with pytest.raises(Exception, match="onnect") as raised:
        find_files("*/*.csv", roots=[f"s3://{own_s3.bucket}/feeds"], open_path=lambda url: at)

    assert not isinstance(raised.value, BatchError)


def test_object_is_known_to_the_ledger_by_its_etag(warehouse: Warehouse, bucket: Sequence[Any], s3: S3) -> None:
    root, open_path = bucket
    (file,) = find_files("2.csv", roots=[root], open_path=open_path)
    with warehouse.connect() as conn:
        load_batch(
            conn, table="raw.customers", batch_id=file.name, path=open_file(file.url, roots=[root], open_path=open_path)
        )

    with warehouse.connect() as conn:
        assert new_files(conn, "raw.customers", [file]) == ([], [file])
        s3.put(file.url.removeprefix(f"s3://{s3.bucket}/"), HEADER.replace(b"name", b"eman"))
        files = find_files("2.csv", roots=[root], open_path=open_path)
        assert new_files(conn, "raw.customers", files) == (files, [])
