"""dags/batch_source.py: which files a source names, on a disk and in a store, and that none is reached by a trick."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from batch_load import load_batch
from batch_source import Found, find_files, new_files, open_file
from batch_store import BatchError, open_source

from tests.s3 import S3
from tests.warehouse import Warehouse

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
        ("landing/nothing.csv", "No such file"),
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


@pytest.mark.parametrize("target", ["secret.csv", "deep"])
def test_link_is_not_followed_when_it_is_named(root: Path, target: str) -> None:
    (root / "link").symlink_to(root.parent / "outside" / target)

    with pytest.raises(BatchError, match="No symbolic link is followed"):
        found("link", root)
    for source in ("link/er/6.csv", "link/*/6.csv"):
        with pytest.raises(BatchError, match="Not a directory"):
            found(source, root)
    (shown,) = find_files("li*/*/6.csv", roots=[str(root)], open_path=Path)
    with pytest.raises(BatchError, match="a symbolic link"):
        open_source(open_file(shown.url, roots=[str(root)], open_path=Path))


def test_what_a_pattern_meets_that_is_no_file_is_refused_by_itself_and_keeps_no_other_back(root: Path) -> None:
    (root / "landing" / "5.csv").symlink_to(root.parent / "outside" / "secret.csv")
    (root / "landing" / "6.csv").symlink_to("nowhere")
    os.mkfifo(root / "landing" / "7.csv")

    files = {file.name: file for file in find_files("landing/*.csv", roots=[str(root)], open_path=Path)}

    assert set(files) >= {"landing/2.csv", "landing/5.csv", "landing/6.csv", "landing/7.csv"}
    for name, message in (("5", "symbolic link"), ("6", "symbolic link"), ("7", "not a regular file")):
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

    with pytest.raises(BatchError, match="a name that is no text, or has line ends in it"):
        found("odd/*.csv", root)


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


def test_ten_thousand_files_are_asked_for_in_one_query(warehouse: Warehouse) -> None:
    files = [Found(f"/x/{number}.csv", f"{number}.csv", 1, "1") for number in range(10_000)]

    with warehouse.connect() as conn:
        new, known = new_files(conn, "raw.orders", files)

    assert (len(new), known) == (10_000, [])


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
        ("nothing/*", []),
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
