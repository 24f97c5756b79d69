"""dags/batch_rejects.py: bad records are kept and explained, good ones loaded, and PostgreSQL says which is which."""

import csv
import gzip
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import batch_file
import psycopg
import pytest
from batch_file import BatchFile, Records
from batch_format import Format
from batch_load import BatchError, Load, load_batch
from batch_rejects import Limit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from tests.conftest import HISTORIES
from tests.dags.test_batch_load import HEADER, STATES, row
from tests.warehouse import ROOT, DatabaseServer, Warehouse

COLUMNS = HEADER.strip().split(",")
REJECTS = "SELECT line_number, column_name, reason FROM raw.orders_rejects ORDER BY load_id, line_number"


@pytest.fixture
def load(warehouse: Warehouse, tmp_path: Path) -> Callable[..., Load]:
    """Write a file and load it, with any number of rejects."""

    def load_(content: str | bytes, batch_id: str = "a", **options: Any) -> Load:
        path = tmp_path / "orders.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        with warehouse.connect() as conn:
            return load_batch(
                conn, table="raw.orders", batch_id=batch_id, path=path, **({"max_rejects": "100%"} | options)
            )

    return load_


def ids(warehouse: Warehouse) -> list[int]:
    return [order_id for (order_id,) in warehouse.rows("SELECT order_id FROM raw.orders ORDER BY row_id")]


BAD = {
    "wrong type": (row("x"), "order_id", 'invalid input syntax for type bigint: "x"'),
    "wrong type in quotes": (row(quantity='"a ""b"""'), "quantity", 'invalid input syntax for type integer: "a "b""'),
    "out of range": (row(quantity="99999999999"), "quantity", 'value "99999999999" is out of range for type integer'),
    "no date": (row(updated_at="2026-02-30"), "updated_at", 'date/time field value out of range: "2026-02-30"'),
    "guess at a date": (row(updated_at="03/04/2026"), "updated_at", "date/time field value out of range"),
    "missing field": ("1,2\n", None, 'missing data for column "customer_email"'),
    "extra field": (row().replace("paid", "paid,paid"), None, "extra data after last expected column"),
    "empty line": ("\n", None, 'missing data for column "customer_name"'),
    "NULL": (row(updated_at=""), "updated_at", 'null value in column "updated_at"'),
    "constraint": (row(quantity=-1), "quantity", 'violates check constraint "quantity_is_positive"'),
    "infinity": (row(updated_at="infinity"), "updated_at", 'violates check constraint "updated_at_is_finite"'),
    "future": (row(updated_at="2999-01-01"), "updated_at", '"updated_at_is_not_in_the_future"'),
    "NaN": (row().replace("9.99", "NaN"), "unit_price", 'violates check constraint "unit_price_is_finite"'),
    "NUL": (row(product="a\0b"), None, "a NUL byte"),
    "unclosed quote": (row().replace('"Desk"', '"Desk'), None, "a quoted field that never ends"),
    "stray quote": (row().replace("Ann", 'A"nn'), None, "a quote inside a field"),
    "quote not doubled": (row(product='24" wide'), None, "a quote inside a field"),
    "end of data": ("\\.\n", None, r"a line of just \., the end of the data"),
    "carriage return": (row().replace("Ann", "An\rn"), None, "a line end unlike that of the header"),
    "parenthesis": (row("1)"), "order_id", 'invalid input syntax for type bigint: "1)"'),
    "backslash": (row("\\1"), "order_id", 'invalid input syntax for type bigint: "\\1"'),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_record_of_each_class_is_kept_and_the_others_are_loaded(
    warehouse: Warehouse, load: Callable[..., Load], name: str
) -> None:
    bad, column, reason = BAD[name]

    loaded = load(HEADER + row(1) + bad + row(3) + bad + row(5, product='24"" wide') + bad, max_rejects=3)

    assert (loaded.rows, loaded.rejects) == (3, 3)
    assert ids(warehouse) == [1, 3, 5]
    kept = warehouse.rows("SELECT load_id, line_number, line, line_bytes, column_name FROM raw.orders_rejects")
    assert sorted(kept) == [
        (loaded.load_id, line, bad[:-1].replace("\0", "\\x00"), bad[:-1].encode() if "\0" in bad else None, column)
        for line in (3, 5, 7)
    ]
    assert {text for (_, _, text) in warehouse.rows(REJECTS) if reason not in text} == set()
    assert warehouse.rows("SELECT rows, rejects FROM raw.loads") == [(3, 3)]


def test_all_classes_in_one_file_come_out_each_on_its_line(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    lines = [HEADER]
    for number, (bad, _, _) in enumerate(BAD.values()):
        lines += [row(number, product='a\nb, ""c""'), bad]

    loaded = load("".join(lines))

    assert loaded.rejects == len(BAD)
    assert ids(warehouse) == list(range(len(BAD)))
    found = warehouse.rows(REJECTS)
    assert [(line, column) for line, column, _ in found] == [
        (4 + 3 * number, column) for number, (_, column, _) in enumerate(BAD.values())
    ]
    assert all(reason in text for (_, _, text), (_, _, reason) in zip(found, BAD.values(), strict=True))


def test_bytes_that_are_no_utf8_are_kept_as_they_are(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    latin = row(2, product="Büro").encode("latin-1")

    load((HEADER + row(1)).encode() + latin + row(3, product="Büro").encode())

    assert ids(warehouse) == [1, 3]
    assert warehouse.rows("SELECT line_number, line, line_bytes, reason FROM raw.orders_rejects") == [
        (3, row(2, product="B\\xfcro")[:-1], latin[:-1], "not UTF-8: byte 0xfc at position 23 of the record")
    ]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("chunk", [1, 300, 4_000_000])
def test_line_ends_mark_and_chunks_change_nothing(
    warehouse: Warehouse,
    load: Callable[..., Load],
    monkeypatch: pytest.MonkeyPatch,
    newline: str,
    bom: str,
    chunk: int,
) -> None:
    monkeypatch.setattr(batch_file, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(batch_file, "BLOCK_BYTES", max(chunk // 2, 7))
    bad = row(2).replace('"Desk"', '"Desk')

    load(bom + (HEADER + row(1) + bad + row(3, product="a\nb") + row("x") + row(5)).replace("\n", newline))

    assert ids(warehouse) == [1, 3, 5]
    assert warehouse.rows("SELECT line_number, line FROM raw.orders_rejects ORDER BY 1") == [
        (3, bad[:-1]),
        (6, row("x")[:-1]),
    ]
    assert warehouse.rows("SELECT product FROM raw.orders WHERE order_id = 3") == [(f"a{newline}b",)]


@pytest.mark.parametrize(
    ("max_rejects", "fits"),
    [(0, False), (1, False), (2, True), ("2", True), ("1%", False), ("1.99%", False), ("2%", True), ("100%", True)],
)
def test_limit_is_a_number_or_a_share_of_the_records(
    warehouse: Warehouse, load: Callable[..., Load], max_rejects: int | str, fits: bool
) -> None:
    content = HEADER + row("x") + "".join(map(row, range(98))) + row("y")

    if fits:
        assert load(content, max_rejects=max_rejects).rejects == 2
    else:
        with pytest.raises(BatchError, match=rf"2 of 100 records are bad, max_rejects is {max_rejects}\."):
            load(content, max_rejects=max_rejects)

    assert len(ids(warehouse)) == (98 if fits else 0)
    assert len(warehouse.rows(REJECTS)) == (2 if fits else 0)
    assert len(warehouse.rows("SELECT * FROM raw.loads")) == fits


@pytest.mark.parametrize("max_rejects", [-1, "-1", "", "%", "101%", "1.5", "many", "1e3", "٣", True, None])
def test_what_is_no_limit_is_refused(max_rejects: Any) -> None:
    with pytest.raises(ValueError, match="max_rejects is a number of records or a percentage"):
        Limit(max_rejects)


def test_error_lists_the_first_ten_with_line_column_value_and_reason(
    warehouse: Warehouse, load: Callable[..., Load]
) -> None:
    bad = "".join(row(f"x{number}") for number in range(1500))

    with pytest.raises(BatchError) as refusal:
        load(HEADER + row(1) + bad + row(2), max_rejects=5)

    message = str(refusal.value).splitlines()
    assert "1,500 of 1,502 records are bad, max_rejects is 5. Nothing was loaded." in message[0]
    assert message[1:11] == [
        f"  line {number + 3}, column order_id, value 'x{number}': invalid input syntax for type bigint: \"x{number}\""
        for number in range(10)
    ]
    assert message[11] == "  and 1,490 more"
    assert ids(warehouse) == []


def test_clean_file_does_not_come_this_way(load: Callable[..., Load], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchFile, "records", None)

    assert load(HEADER + row(1), max_rejects="50%").rows == 1


@pytest.mark.parametrize("lost", ["good", "bad", "twice"])
def test_load_that_is_not_all_of_the_file_is_undone(
    warehouse: Warehouse, load: Callable[..., Load], monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    whole = BatchFile.records

    def some(file: BatchFile) -> Any:
        for chunk in whole(file):
            places = {"good": [0, 2, 3], "bad": [0, 2], "twice": [0, 0, 1, 2, 3]}[lost]
            data, lines = [chunk.data[place] for place in places], [chunk.lines[place] for place in places]
            yield Records(data, lines, {}, chunk.line_ends)

    monkeypatch.setattr(BatchFile, "records", some)

    with pytest.raises(BatchError, match=r"Nothing was loaded\..* this is a mistake in the loader"):
        load(HEADER + row(1) + row("x") + row(2) + row("y"))
    assert (ids(warehouse), warehouse.rows(REJECTS)) == ([], [])


def test_bare_carriage_return_at_the_end_of_the_file_is_a_bad_record(
    warehouse: Warehouse, load: Callable[..., Load]
) -> None:
    load(HEADER + row(1) + row(2)[:-1] + "\r", max_rejects=1)

    assert ids(warehouse) == [1]
    assert [(line, reason[:10]) for line, _, reason in warehouse.rows(REJECTS)] == [(3, "a line end")]


def test_batch_with_rejects_is_loaded_once_as_well(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    load(HEADER + row(1) + row("x"))

    assert not load(HEADER + row(1) + row("x")).is_new
    assert not load(HEADER + row(1) + row("x"), max_rejects=0).is_new
    assert not load(HEADER + row(1) + row("x"), "b").is_new

    assert (ids(warehouse), len(warehouse.rows(REJECTS))) == ([1], 1)


def test_file_of_bad_records_only_is_kept_once_as_well(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    assert load(HEADER + row("x"), "a").is_new
    assert not load(HEADER + row("x"), "b").is_new

    assert len(warehouse.rows(REJECTS)) == 1


def test_rejects_are_exported_as_csv_mended_and_loaded_as_a_batch(
    warehouse: Warehouse, load: Callable[..., Load], server: DatabaseServer
) -> None:
    header = ",".join(reversed(COLUMNS)) + "\n"
    record = ",".join(reversed(next(csv.reader(io.StringIO(row("?"))))))
    odd = record.replace("Desk", '"Desk, ""wide""\n\\ tab\t"')
    loaded = load(header + record.replace("?", "1") + "\n" + odd + "\n")
    operations = (Path(batch_file.__file__).parents[1] / "docs" / "operations.md").read_text()
    query = next(part for part in operations.split("\n\n") if "AS file (line_number, line)" in part)

    exported = subprocess.run(
        [server.binaries / "psql", "-XAt", "-c", query.replace("12345", str(loaded.load_id)), warehouse.url],
        capture_output=True,
        check=True,
    ).stdout.decode()

    assert exported == header + odd + "\n"
    load(exported.replace(",?\n", ",2\n"), "b", max_rejects=0)
    assert ids(warehouse) == [1, 2]
    assert warehouse.rows("SELECT product FROM raw.orders WHERE order_id = 2") == [('Desk, "wide"\n\\ tab\t',)]


def test_constraint_that_only_copy_can_judge_is_asked_of_copy(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    with warehouse.connect("") as conn:
        conn.execute("CREATE UNIQUE INDEX order_is_there_once ON raw.orders (order_id)")
        conn.execute("ALTER TABLE raw.orders ADD CONSTRAINT price_divides CHECK (1 / (quantity - 7) < 1000)")
        conn.execute("ALTER TABLE raw.orders ADD CONSTRAINT has_load CHECK (load_id > 0)")

    load(HEADER + row(1) + row(2) + row(1) + row(3, quantity=7) + row(4, product="a\nb") + row(2) + row("x") + row(5))

    assert ids(warehouse) == [1, 2, 4, 5]
    assert [(line, reason) for line, _, reason in warehouse.rows(REJECTS)] == [
        (4, 'duplicate key value violates unique constraint "order_is_there_once"'),
        (5, "division by zero"),
        (8, 'duplicate key value violates unique constraint "order_is_there_once"'),
        (9, 'invalid input syntax for type bigint: "x"'),
    ]


MANY = [f"c{number}" for number in range(120)]  # more than a function may have arguments
# Tables as others make them: their columns and what goes with them; a file; the rows that come of it, by their first
# column; and of each reject the line, the column and some of the reason.
TABLES: dict[str, tuple[str, str, list[str], list[tuple[int, str | None, str]]]] = {
    "line ends of both kinds within quotes": (
        "(a int, w text); CREATE UNIQUE INDEX ON raw.odd (a)",
        'a,w\r\n1,"x\ny"\r\n1,dup\r\n2,"x\ry\r\n"\r\n2,dup\r\n3,ok\r\n',
        ["1", "2", "3"],
        [(4, None, "duplicate key"), (7, None, "duplicate key")],
    ),
    "domain that is not null": (
        "(b int, a public.nn, c int)",
        "b,a,c\n1,x,z\n1,,2\n,x,z\n,x,5\n2,y,\n",
        ["None", "2"],
        [(2, "c", 'syntax for type integer: "z"'), (3, "a", "does not allow null"), (4, "c", '"z"')],
    ),
    "trigger that fills in": (
        (
            "(a int NOT NULL, b int CHECK (b > 0)); CREATE TRIGGER t BEFORE INSERT ON raw.odd FOR EACH ROW"
            " EXECUTE FUNCTION public.fill()"
        ),
        "a,b\n,3\nx,4\n5,-1\n6,6\n",
        ["0", "6"],
        [(3, "a", '"x"'), (4, None, 'constraint "odd_b_check"')],
    ),
    "trigger that raises": (
        "(a int, b text); CREATE TRIGGER t BEFORE INSERT ON raw.odd FOR EACH ROW EXECUTE FUNCTION public.refuse()",
        "a,b\n1,x\n13,y\n2,z\n",
        ["1", "2"],
        [(3, None, "no 13")],
    ),
    "JSON, whose errors have lines of their own": (
        "(j jsonb, b int CHECK (1 / (b - 7) < 1000))",
        'j,b\n1,1\n"{""a"": }",2\n"{\n",2\n3,7\n4,4\n',
        ["1", "4"],
        [
            (3, "j", "invalid input syntax for type json"),
            (4, "j", "syntax for type json"),
            (6, None, "division by zero"),
        ],
    ),
    "foreign key": (
        "(a int REFERENCES public.known)",
        "a\n1\n2\n3\n1\nx\n9\n3\n",
        ["1", "3", "1", "3"],
        [(3, None, "foreign key"), (6, "a", '"x"'), (7, None, "foreign key")],
    ),
    "generated column": (
        "(a int, twice int GENERATED ALWAYS AS (a * 2) STORED CHECK (twice < 10))",
        "a\n1\nx\n5\n",
        ["1"],
        [(3, "a", '"x"'), (4, None, "odd_twice_check")],
    ),
    "names": (
        '("a%s" int CHECK ("a%s" < 5), "select" text NOT NULL, "Ünï ""q""" varchar(2))',
        'Ünï ""q"",select,a%s\n'.replace('Ünï ""q""', '"Ünï ""q"""') + "ab,x,1\nabc,x,2\nab,,3\nab,x,5\n",
        ["1"],
        [(3, 'Ünï "q"', "too long"), (4, "select", "null value"), (5, "a%s", "violates check constraint")],
    ),
    "search syntax": (
        "(q tsquery)",
        "q\na & b\na &\n'\n",
        ["'a' & 'b'"],
        [(3, "q", "in tsquery"), (4, "q", "in tsquery")],
    ),
    "two collations": (
        """(a text COLLATE "C", b text COLLATE "POSIX", CHECK (a <> 'z' AND b < 'c'))""",
        "a,b\nx,a\nz,a\nx,d\n",
        ["x"],
        [(3, None, "odd_check"), (4, None, "odd_check")],
    ),
    "one column": (
        "(a text CHECK (a <> 'no'))",
        'a\n\n""\nno\n\\.\n"\\."\n',
        ["None", "", "\\."],
        [
            (4, "a", "check"),
            (5, None, "end of the data"),
        ],
    ),
    "many columns": (
        f"({', '.join(f'{name} int NOT NULL' for name in MANY)}, CHECK ({' + '.join(MANY)} < 9))",
        ",".join(MANY)
        + "\n"
        + "".join(f"{ends[0]},{'0,' * 118}{ends[1:]}\n" for ends in ["11", "1x", "x1", "99", "1", "22"]),
        ["1", "2"],
        [(3, "c119", '"x"'), (4, "c0", '"x"'), (5, None, "odd_check"), (6, "c119", "null value")],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_records_are_sorted_for_tables_of_every_kind(warehouse: Warehouse, tmp_path: Path, name: str) -> None:
    columns, content, good, bad = TABLES[name]
    with warehouse.connect("") as conn:
        conn.execute("""
            CREATE DOMAIN public.nn AS text NOT NULL;
            CREATE TABLE public.known AS SELECT n AS id FROM generate_series(1, 3, 2) AS n;
            ALTER TABLE public.known ADD PRIMARY KEY (id);
            CREATE FUNCTION public.fill() RETURNS trigger LANGUAGE plpgsql AS
                'BEGIN NEW.a := coalesce(NEW.a, 0); RETURN NEW; END';
            CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS
                'BEGIN IF NEW.a = 13 THEN RAISE EXCEPTION $m$no 13$m$; END IF; RETURN NEW; END';
        """)
        conn.execute(f"CREATE TABLE raw.odd {columns}; SET de_dw.load_id = 0".encode())
        conn.execute("""
            ALTER TABLE raw.odd ADD row_id bigint GENERATED ALWAYS AS IDENTITY,
                ADD load_id bigint DEFAULT current_setting('de_dw.load_id')::bigint;
            CREATE TABLE raw.odd_rejects (LIKE raw.orders_rejects INCLUDING DEFAULTS);
            GRANT INSERT, SELECT ON raw.odd, raw.odd_rejects TO de_dw_pipeline;
        """)
        first = conn.execute("SELECT attname FROM pg_attribute WHERE attrelid = 'raw.odd'::regclass AND attnum = 1")
        ((column,),) = first.fetchall()
    path = tmp_path / "odd.csv"
    path.write_bytes(content.encode())

    with warehouse.connect() as conn:
        loaded = load_batch(conn, table="raw.odd", batch_id="a", path=path, max_rejects="100%")

    column = sql.Identifier(column).as_string(None)
    assert [
        str(value) for (value,) in warehouse.rows(f"SELECT {column}::text FROM raw.odd ORDER BY row_id", "")
    ] == good
    found = warehouse.rows("SELECT line_number, column_name, reason FROM raw.odd_rejects ORDER BY 1", "")
    assert [(line, name) for line, name, _ in found] == [(line, name) for line, name, _ in bad]
    assert all(reason in text for (_, _, text), (_, _, reason) in zip(found, bad, strict=True)), found
    assert (loaded.rows, loaded.rejects) == (len(good), len(bad))


@pytest.mark.parametrize("bad", ["", row("x")])
def test_trigger_that_leaves_rows_out_is_noticed(warehouse: Warehouse, load: Callable[..., Load], bad: str) -> None:
    with warehouse.connect("") as conn:
        conn.execute("""
            CREATE FUNCTION public.drop_it() RETURNS trigger LANGUAGE plpgsql AS
                'BEGIN IF NEW.order_id = 2 THEN RETURN NULL; END IF; RETURN NEW; END';
            CREATE TRIGGER t BEFORE INSERT ON raw.orders FOR EACH ROW EXECUTE FUNCTION public.drop_it()
        """)

    with pytest.raises(BatchError, match="Does a trigger of the table leave rows out"):
        load(HEADER + row(1) + row(2, product="a\nb") + bad + row(3))

    assert ids(warehouse) == []


def test_no_log_has_the_other_values_of_a_bad_row(
    load: Callable[..., Load], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(batch_file, "BLOCK_BYTES", 20)  # so that the server has seen one before we see the other
    stray = row(2).replace("paid", 'pa"id')
    for number, content in enumerate([row(1, quantity=-1) + stray, stray + row(1, quantity=-1), row("x") + "\\.\n"]):
        load(HEADER + content + row(3), str(number))

    assert "Now looking at each record" in caplog.text
    assert "a@example.com" not in caplog.text


def test_table_is_the_one_that_was_named(warehouse: Warehouse, tmp_path: Path) -> None:
    path = tmp_path / "twin.csv"
    path.write_text("b\nx\n1\n")
    with warehouse.connect("") as conn:
        conn.execute("""
            CREATE TABLE raw.twin (a int, load_id bigint);
            CREATE TABLE raw."Twin" (b int, load_id bigint DEFAULT current_setting('de_dw.load_id')::bigint);
            CREATE TABLE raw."Twin_rejects" (LIKE raw.orders_rejects INCLUDING DEFAULTS);
            GRANT INSERT, SELECT ON raw.twin, raw."Twin", raw."Twin_rejects" TO de_dw_pipeline;
        """)
    with warehouse.connect() as conn:
        assert load_batch(conn, table='raw."Twin"', batch_id="a", path=path, max_rejects=1).rejects == 1

    assert warehouse.rows("SELECT table_name FROM raw.loads") == [("raw.Twin",)]


def test_session_of_any_kind_will_do(warehouse: Warehouse, tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text(HEADER + row(1) + row("x"))
    with warehouse.connect(row_factory=psycopg.rows.dict_row, cursor_factory=psycopg.ClientCursor) as conn:
        conn.execute("CREATE TEMPORARY TABLE incoming (mine int)")
        conn.execute("SET check_function_bodies = off; SET client_encoding = 'LATIN1'")
        with pytest.raises(BatchError), conn.transaction():
            load_batch(conn, table="raw.orders", batch_id="a", path=path)
        with pytest.raises(BatchError):
            load_batch(conn, table="raw.orders", batch_id="a", path=path)
        with pytest.raises(psycopg.errors.InvalidTextRepresentation), conn.transaction():
            conn.execute("INSERT INTO raw.orders (order_id, updated_at) VALUES (2, now())")  # it is of no load
        assert load_batch(conn, table="raw.orders", batch_id="a", path=path, max_rejects=1).rows == 1
        conn.execute("SELECT mine FROM incoming")
        ours = conn.execute(
            "SELECT count(*) AS n FROM pg_class WHERE relname LIKE 'de_dw_load%' UNION ALL"
            " SELECT count(*) FROM pg_proc WHERE proname LIKE 'de_dw_load%' UNION ALL"
            " SELECT count(*) FROM pg_type WHERE typname LIKE 'de_dw_load_%row'"
        ).fetchall()
    assert [counted["n"] for counted in ours] == [0, 0, 0]


def test_table_without_a_quarantine_is_told_how_to_get_one(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    with warehouse.connect("") as conn:
        conn.execute("DROP TABLE raw.orders_rejects")

    with pytest.raises(BatchError, match=r"there is no table raw\.orders_rejects"):
        load(HEADER + row("x"))
    with pytest.raises(BatchError, match="line 2, column order_id, value 'x'"):
        load(HEADER + row("x"), max_rejects=0)
    assert load(HEADER + row(1)).rows == 1


def test_two_files_in_one_transaction_and_a_session_that_goes_on(warehouse: Warehouse, tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    with warehouse.connect() as conn:
        for number in range(12):  # psycopg prepares what is run often: the plans must not outlive their tables
            path.write_text(HEADER + row(number) + row("x") + row(number, quantity=-1))
            load_batch(conn, table="raw.orders", batch_id=str(number), path=path, max_rejects=2)
            if number % 3 == 0:
                conn.commit()

    assert ids(warehouse) == list(range(12))


def cut(text: str) -> list[tuple[str, int, bool]]:
    """Records, the line each begins on, and whether its quotes are right: byte by byte, as slowly as can be."""
    records, start = [], 0
    while start < len(text):
        state: str | None = "start"
        place = start
        while place < len(text) and state and not (state != "quoted" and text[place] == "\n"):
            state = STATES[state][text[place]]
            place += 1
        is_right = place < len(text) and state is not None
        stop = place if is_right else text.index("\n", start)
        records.append((text[start:stop], 2 + text.count("\n", 0, start), is_right))
        start = stop + 1
    return records


@settings(max_examples=500, deadline=None, database=None)
@given(
    text=st.text(alphabet='"",\na', max_size=60),
    block_bytes=st.integers(1, 21),
    chunk_bytes=st.integers(1, 21),
    chunk_records=st.integers(1, 5),
)
def test_records_are_cut_where_quotes_say_and_a_wrong_one_ends_with_its_line(
    tmp_path_factory: pytest.TempPathFactory, text: str, block_bytes: int, chunk_bytes: int, chunk_records: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "file.csv"
    path.write_text(f"x\n{text}\n")

    with pytest.MonkeyPatch.context() as patch, BatchFile(path) as file:
        patch.setattr(batch_file, "BLOCK_BYTES", block_bytes)
        patch.setattr(batch_file, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(batch_file, "CHUNK_RECORDS", chunk_records)
        chunks = list(file.records())

    assert [
        (data.decode(), line, place not in chunk.problems)
        for chunk in chunks
        for place, (data, line) in enumerate(zip(chunk.data, chunk.lines, strict=True))
    ] == cut(f"{text}\n")
    assert file.lines == file.header_lines + sum(chunk.line_ends for chunk in chunks)


def test_a_few_bytes_that_unpack_to_millions_of_records_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.csv.gz"
    path.write_bytes(gzip.compress(b'a,b\n1,"' + b"\n" * 5_000_000))
    script = (
        "import sys; from pathlib import Path; from batch_file import BatchFile\n"
        "with BatchFile(Path(sys.argv[1])) as file: print(sum(len(records.data) for records in file.records()))\n"
        "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "dags")}
    done = subprocess.run([sys.executable, "-c", script, path], env=environment, capture_output=True, text=True)

    records, kilobytes = map(int, done.stdout.split())
    assert records == 5_000_000
    assert kilobytes < 400_000  # each record as an object would take more than a gigabyte


def test_quoted_field_may_be_large_and_one_without_end_is_given_up(
    warehouse: Warehouse, load: Callable[..., Load], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_file, "CHUNK_BYTES", 1000)
    large = "x\n" * 1_000_000
    load(HEADER + row("x") + row(1, product=large) + row(2), max_rejects=1)

    assert ids(warehouse) == [1, 2]
    assert warehouse.rows("SELECT length(product) FROM raw.orders WHERE order_id = 1") == [(2_000_000,)]

    monkeypatch.setattr(batch_file, "RECORD_BYTES", 10_000)
    open_ = row(3).replace('"Desk"', '"Desk')
    plain = "".join(row(number).replace('"', "") for number in range(4, 1000))
    load(HEADER + open_ + plain, "b", max_rejects=1)

    assert ids(warehouse) == [1, 2, *range(4, 1000)]


# The files of the next test: what may stand in a field, in three columns of three types and rules of each kind.
ODD = """
CREATE DOMAIN public.percent AS integer CHECK (value BETWEEN 0 AND 100);
CREATE TYPE public.mood AS ENUM ('sad', 'ok');
CREATE TABLE raw.odd (
    number public.percent, word varchar(3), amount numeric(4, 2), mood public.mood, day date NOT NULL,
    row_id bigint GENERATED ALWAYS AS IDENTITY, load_id bigint DEFAULT current_setting('de_dw.load_id')::bigint,
    CONSTRAINT word_is_no_number CHECK (word <> '12'), CONSTRAINT day_or_amount CHECK (day > '2020-01-01' OR amount > 0)
);
CREATE TABLE raw.odd_rejects (LIKE raw.orders_rejects INCLUDING DEFAULTS);
GRANT INSERT, SELECT ON raw.odd, raw.odd_rejects TO de_dw_pipeline;
"""
NAMES = ["number", "word", "amount", "mood", "day"]
FIELD = st.one_of(
    st.sampled_from(
        ["1", "100", "101", " 7 ", "abc", "abc  ", "abcd", "12", "9.999", "99.995", "-1", "1e1", "ok", "OK"]
    ),
    st.sampled_from(
        ["2026-01-01", "2019-01-01", "infinity", "NaN", "now", "Jan 5 2021", "1/2/2021", "0x10", "1_0", ""]
    ),
    st.text(alphabet="\",;'\n\r\\.()a1 ", max_size=4),
)


def written(field: str, quoting: int, delimiter: str = ",", quote: str = '"') -> str:
    """As a CSV writer would, always, or not at all."""
    doubled = quote + field.replace(quote, quote * 2) + quote
    needed = any(char in field for char in f"{quote}{delimiter}\r\n")
    return doubled if quoting == 2 or (quoting == 1 and needed) else field


RECORD = st.one_of(
    st.tuples(
        *[st.sampled_from(values) for values in (["1", "7"], ["a", ""], ["1.5", ""], ["ok", ""], ["2021-05-05"])]
    ),
    st.lists(FIELD, min_size=1, max_size=6),
    st.tuples(FIELD, FIELD, FIELD, FIELD, FIELD),
)
FILE = st.lists(st.tuples(RECORD, st.lists(st.sampled_from([1, 1, 2]), min_size=6, max_size=6)), max_size=8)


@pytest.fixture(scope="module")
def odd(server: DatabaseServer) -> Any:
    url = server.make(template=server.template)
    with psycopg.connect(url) as conn:
        conn.execute(ODD.encode())
    yield Warehouse(url, server)
    server.drop(url)


@settings(max_examples=HISTORIES, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(file=FILE, newline=st.sampled_from(["\n", "\r\n"]))
def test_a_record_is_good_exactly_when_copy_alone_would_take_it(
    odd: Warehouse, tmp_path_factory: pytest.TempPathFactory, file: Any, newline: str
) -> None:
    records = [
        ",".join(written(field, how) for field, how in zip(fields, quoting, strict=False)).encode()
        for fields, quoting in file
    ]
    end = newline.encode()
    path = tmp_path_factory.mktemp("odd") / "odd.csv"
    path.write_bytes(",".join(NAMES).encode() + end + b"".join(record + end for record in records))
    statement = sql.SQL("COPY raw.odd ({}) FROM STDIN (FORMAT csv)").format(
        sql.SQL(", ").join(map(sql.Identifier, NAMES))
    )
    # What COPY says of each record alone, under the loader's settings; a line of \. it would not even see.
    expected = []
    content = "SELECT number, word, amount::text, mood::text, day::text FROM raw.odd WHERE load_id = %s ORDER BY row_id"
    with odd.connect() as conn:
        conn.execute("SET TimeZone = 'UTC'; SET DateStyle = 'ISO, YMD'; SET de_dw.load_id = -1")
        for record in records:
            try:
                with conn.transaction(), conn.cursor().copy(statement) as copy:
                    copy.write(record + end)
                expected.append(record == rb"\.")
            except (psycopg.DataError, psycopg.IntegrityError):
                expected.append(True)
        rows = conn.execute(content, (-1,)).fetchall()
        conn.rollback()

        loaded = load_batch(conn, table="raw.odd", batch_id=str(path), path=path, max_rejects="100%", load_again=True)

        rejected = [
            bytes_ or line.encode()
            for line, bytes_ in conn.execute(
                "SELECT line, line_bytes FROM raw.odd_rejects WHERE load_id = %s ORDER BY line_number",
                (loaded.load_id,),
            )
        ]
        assert rejected == [record for record, is_bad in zip(records, expected, strict=True) if is_bad]
        assert conn.execute(content, (loaded.load_id,)).fetchall() == rows


@settings(max_examples=HISTORIES, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    file=st.lists(st.tuples(RECORD, st.lists(st.sampled_from([1, 1, 2]), min_size=6, max_size=6)), max_size=8),
    dialect=st.sampled_from([",'", ';"', "|'", '\t"', "~\x01"]),
    encoding=st.sampled_from(["utf-8", "utf-16", "cp1252"]),
    extra=st.sampled_from([[], ["more"], ["a", "a"]]),
)
def test_same_rows_and_rejects_come_of_a_file_however_it_is_written(
    odd: Warehouse, tmp_path_factory: pytest.TempPathFactory, file: Any, dialect: str, encoding: str, extra: list[str]
) -> None:
    def outcome(delimiter: str, quote: str, encoding: str, extra: list[str]) -> list[Any]:
        lines = [[*extra, *NAMES]]
        for fields, quoting in file:
            lines.append([*extra, *(written(*both, delimiter, quote) for both in zip(fields, quoting, strict=False))])
        path = tmp_path_factory.mktemp("odd") / "odd.csv"
        path.write_bytes("".join(f"{delimiter.join(line)}\n" for line in lines).encode(encoding))
        with odd.connect() as conn:
            loaded = load_batch(
                conn,
                table="raw.odd",
                batch_id=str(path),
                path=path,
                max_rejects="100%",
                load_again=True,
                file_format=Format(delimiter=delimiter, quote=quote, encoding=encoding, extra="ignore"),
            )
            rows = "SELECT number, word, amount::text, mood::text, day::text FROM raw.odd WHERE load_id = %s"
            rejects = "SELECT line_number, column_name FROM raw.odd_rejects WHERE load_id = %s"
            return [
                conn.execute(f"{query} ORDER BY {order}".encode(), (loaded.load_id,)).fetchall()
                for query, order in ((rows, "row_id"), (rejects, "line_number"))
            ]

    assert outcome(dialect[0], dialect[1], encoding, extra) == outcome(",", '"', "utf-8", [])
