"""dags/batch_format.py and batch_landing.py: files of strangers, declared once, by both ways into the table."""

import codecs
import csv
import encodings.aliases
import gzip
import hashlib
import io
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import batch_file
import pytest
from batch_file import BatchFile, fields
from batch_format import ENCODINGS, Format
from batch_load import BatchError, Load, load_batch
from batch_rejects import _text
from hypothesis import given
from hypothesis import strategies as st

from tests.warehouse import Warehouse

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
THINGS = """
    CREATE TABLE raw.things (
        thing_id bigint NOT NULL,
        name text,
        price numeric CONSTRAINT price_is_positive CHECK (price > 0),
        seen_at timestamptz,
        extra jsonb,
        updated_at timestamptz NOT NULL DEFAULT nullif(current_setting('de_dw.updated_at', true), '')::timestamptz
    );
    SELECT raw.create_dataset('things');
"""
ROWS = "SELECT thing_id, name, price::text, seen_at, extra, updated_at FROM raw.things ORDER BY row_id"
MINIMUM: dict[str, Any] = {"optional": ("name", "price", "seen_at", "updated_at")}
# By COPY alone, and by the way of a file that has bad records.
by_both_ways = pytest.mark.parametrize("bad", [0, 1], ids=["copy", "sorted"])


@pytest.fixture
def load(warehouse: Warehouse, tmp_path: Path) -> Callable[..., Load]:
    """Load a file of things: with `bad`, after a record that is no row of them."""
    warehouse.alter(THINGS)

    def load_(
        content: str,
        *,
        bad: int = 0,
        written_in: str = "utf-8",
        pack: Any = None,
        batch_id: str = "a",
        updated_at: datetime = NOW,
        max_rejects: int = 0,
        **declared: Any,
    ) -> Load:
        bad_record = "xxxxx\n" if bad else ""
        header, end, records = content.partition("\n") if not declared.get("header") else ("", "", content)
        data = f"{header}{end}{bad_record}{records}".encode(written_in)
        path = tmp_path / "things.csv"
        path.write_bytes(pack(data) if pack else data)
        with warehouse.connect() as conn:
            return load_batch(
                conn,
                table="raw.things",
                batch_id=batch_id,
                path=path,
                updated_at=updated_at,
                max_rejects=max_rejects or bad,
                file_format=Format(**MINIMUM | declared),
            )

    return load_


@by_both_ways
@pytest.mark.parametrize(
    ("delimiter", "quote", "content"),
    [
        (";", '"', 'thing_id;name;price\n1;"a;""b"", c";1.50\n2;a,b;\n3;"";2\n'),
        ("|", "'", "thing_id|name|price\n1|'a;\"b\", c'|1.50\n2|a,b|\n3|''|2\n"),
        ("\t", '"', 'thing_id\tname\tprice\n1\t"a;""b"", c"\t1.50\n2\ta,b\t\n3\t""\t2\n'),
        (",", "'", "thing_id,name,price\n1,'a;\"b\", c',1.50\n2,'a,b',\n3,'',2\n"),
        ("~", "\x01", 'thing_id~name~price\n1~a;"b", c~1.50\n2~a,b~\n3~\x01\x01~2\n'),
    ],
)
def test_delimiter_and_quote_are_those_that_are_declared(
    warehouse: Warehouse, load: Callable[..., Load], bad: int, delimiter: str, quote: str, content: str
) -> None:
    loaded = load(content, bad=bad, delimiter=delimiter, quote=quote)

    assert (loaded.rows, loaded.rejects) == (3, bad)
    assert [row[:3] for row in warehouse.rows(ROWS)] == [(1, 'a;"b", c', "1.50"), (2, "a,b", None), (3, "", "2")]


@by_both_ways
@pytest.mark.parametrize("pack", [None, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    ("written_in", "encoding"),
    [
        ("latin-1", "latin-1"),
        ("cp1252", "windows-1252"),
        ("utf-16", "utf-16"),
        ("utf-16-le", "utf-16-le"),
        ("utf-16-be", "UTF-16BE"),
        ("utf-8-sig", "utf-8"),
    ],
)
def test_text_in_another_encoding_is_the_same_text(
    warehouse: Warehouse, load: Callable[..., Load], bad: int, written_in: str, encoding: str, pack: Any
) -> None:
    content = 'thing_id,name\n1,Jürgen\n2,"é, ñ\nß"\n'

    loaded = load(content, bad=bad, written_in=written_in, pack=pack, encoding=encoding)

    assert (loaded.rows, loaded.rejects) == (2, bad)
    assert [row[1] for row in warehouse.rows(ROWS)] == ["Jürgen", "é, ñ\nß"]


def test_sha256_is_that_of_the_bytes_and_not_of_the_text(load: Callable[..., Load], tmp_path: Path) -> None:
    loaded = load("thing_id,name\n1,Jürgen\n", written_in="utf-16", encoding="utf-16")

    assert loaded.sha256 == hashlib.sha256((tmp_path / "things.csv").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        ("thing_id,name\n1,a\n2,b\x81\n".encode("latin-1"), "cp1252", "line 3: not cp1252"),
        ("thing_id,name\n1,a\n".encode("utf-16")[:-1], "utf-16", "ends amid a character of utf-16"),
        ("thing_id,name\n1,a".encode("utf-16"), "utf-16", "the last line has no line end"),
        ("thing_id,name\n1,a\n".encode("utf-16-le"), "utf-16", "Declare utf-16-le or utf-16-be"),
        ("thing_id,name\n1,a\n".encode("utf-16-le") + b"\x00\xd8\n\x00", "utf-16-le", "line 3: not utf-16-le"),
        ("thing_id,name\n1,a\n".encode("utf-16"), "utf-8", "UTF-16 text: declare the dataset's encoding"),
        ("thing_id,name\n1,ü\n".encode("latin-1"), "utf-8", "invalid byte sequence|not UTF-8"),
        (b"thing_id,name\r1,a\r2,b\x81\r", "cp1252", "line 3: not cp1252: 0x81 is no character of it"),
        ("thing_id,name\n1,香\n".encode("gb18030") + b"2,\x80\n", "gb18030", "line 3: not gb18030: 0x80"),
        ("thing_id,größe\n1,a\n".encode("latin-1"), "utf-8", "line 1: .* not UTF-8: byte 0xf6 .* Declare the"),
        ("thing_id,name\n1,a\n".encode("utf-16-le"), "utf-8", "UTF-16 text without its mark"),
        (b"thing_id,na\0me\n1,a\n", "utf-8", "line 1: the header can't be read: it has a NUL byte"),
        ("thing_id,name\n1,a\n".encode("utf-16"), "latin-1", "UTF-16 text: declare the dataset's encoding"),
        ("\ufeffthing_id\n1\n".encode("utf-16-le"), "utf-16-be", "begins with the mark of utf-16-le, but"),
        ("\ufeffname,thing_id\na,1\n".encode(), "cp1252", "begins with the mark of utf-8, but .* declared as cp1252"),
        (gzip.compress(gzip.compress(b"thing_id\n1\n", mtime=0), mtime=0), "latin-1", "gzip within gzip"),
        ("thing_id,name\n1,a".encode("latin-1"), "latin-1", "the last line has no line end"),
    ],
)
def test_bytes_that_are_no_text_of_the_encoding_are_refused(
    warehouse: Warehouse, tmp_path: Path, content: bytes, encoding: str, message: str
) -> None:
    warehouse.alter(THINGS)
    path = tmp_path / "things.csv"
    path.write_bytes(content)

    with warehouse.connect() as conn, pytest.raises(BatchError, match=message):
        load_batch(
            conn,
            table="raw.things",
            batch_id="a",
            path=path,
            file_format=Format(**MINIMUM, encoding=encoding, extra="ignore"),
        )

    assert warehouse.rows("SELECT count(*) FROM raw.things") == [(0,)]


@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60),
    encoding=st.sampled_from(["utf-16", "utf-16-be", "gb18030", "euc_jp", "cp932", "big5"]),
    block=st.integers(1, 7),
)
def test_characters_may_lie_across_blocks(
    tmp_path_factory: pytest.TempPathFactory, text: str, encoding: str, block: int
) -> None:
    text = f"a\n{text}\n".encode(encoding, errors="ignore").decode(encoding)
    path = tmp_path_factory.getbasetemp() / "across.csv"
    path.write_bytes(text.encode(encoding))

    with pytest.MonkeyPatch.context() as patch, BatchFile(path, Format(encoding=encoding)) as file:
        patch.setattr(batch_file, "BLOCK_BYTES", block)
        assert b"".join(file.blocks()).decode() == text


def test_encodings_of_single_bytes_have_ascii_and_no_character_twice() -> None:
    names = set(encodings.aliases.aliases.values()) - {"mbcs", "oem"}  # of Windows
    tables = {
        name: [bytes([byte]).decode(name, errors="ignore") for byte in range(256)]
        for name in names
        if ENCODINGS.fullmatch(codecs.lookup(name).name) and not name.startswith("utf")
    }

    assert {"latin_1", "cp1252", "cp850", "koi8_r", "mac_roman", "shift_jis"} <= set(tables)
    assert not {"cp037", "cp500", "cp864"} & set(tables)  # their commas, line ends or percent signs are other bytes
    for name, characters in tables.items():
        assert characters[:128] == [chr(byte) for byte in range(128)], name
        found = [character for character in characters if character]
        assert len(set(found)) == len(found), name


@given(
    record=st.lists(st.text(st.sampled_from(";,|'\"\\ a\nü"), max_size=6), min_size=2, max_size=5),
    delimiter=st.sampled_from(",;|"),
    quote=st.sampled_from("\"'"),
)
def test_fields_are_those_that_python_reads(record: list[str], delimiter: str, quote: str) -> None:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, quotechar=quote, lineterminator="").writerow(record)
    dialect = Format(delimiter=delimiter, quote=quote).dialect

    found = fields(out.getvalue().encode(), dialect)

    assert [_text(field, dialect) or "" for field in found] == record


@by_both_ways
def test_header_names_are_mapped_to_columns(warehouse: Warehouse, load: Callable[..., Load], bad: int) -> None:
    loaded = load("Preis,Nr.,name\n1.5,7,Lampe\n", bad=bad, columns={"Nr.": "thing_id", "Preis": "price"})

    assert loaded.rows == 1
    assert [row[:3] for row in warehouse.rows(ROWS)] == [(7, "Lampe", "1.5")]
    assert warehouse.rows("SELECT header, format ->> 'columns' FROM raw.loads") == [
        ("Preis,Nr.,name", '{"Nr.": "thing_id", "Preis": "price"}')
    ]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("Preis,name", r"missing: 'thing_id' \(in the file 'Nr\.'\)"),
        ("Nr.,Preis,price", r"more than once: 'price' \(column 'Preis'\)"),
        ("Nr.,Menge", r"unknown: 'Menge'\. It must name these columns, separated by ',|commas"),
    ],
)
def test_header_that_does_not_fit_is_refused_by_both_names(
    load: Callable[..., Load], header: str, message: str
) -> None:
    with pytest.raises(BatchError, match=message):
        load(f"{header}\n", columns={"Nr.": "thing_id", "Preis": "price"})


@pytest.mark.parametrize("extra", ["ignore", "keep"])
def test_missing_column_is_told_beside_what_the_file_has_instead(load: Callable[..., Load], extra: str) -> None:
    message = r"missing: 'thing_id' \(in the file 'Nr\.'\); of the file, not of the table: 'Nr\. ', 'Menge'\. It"
    with pytest.raises(BatchError, match=message):
        load("Nr. ,Menge\n", columns={"Nr.": "thing_id"}, extra=extra)


def test_bad_value_is_named_by_both_names(load: Callable[..., Load]) -> None:
    with pytest.raises(BatchError, match=r"line 3, column price \('Preis' in the file\), value 'viel': invalid"):
        load("thing_id,Preis\n1,2\n2,viel\n", columns={"Preis": "price"})


@by_both_ways
def test_extra_columns_are_ignored_when_that_is_declared(
    warehouse: Warehouse, load: Callable[..., Load], bad: int
) -> None:
    loaded = load("a,thing_id,b,price\nx,1,y,2\n,2,,3\n", bad=bad, extra="ignore")

    assert (loaded.rows, loaded.rejects) == (2, bad)
    assert [(row[0], row[2], row[4]) for row in warehouse.rows(ROWS)] == [(1, "2", None), (2, "3", None)]


@by_both_ways
def test_extra_columns_are_kept_by_their_names_when_that_is_declared(
    warehouse: Warehouse, load: Callable[..., Load], bad: int
) -> None:
    long = "a column with a name that is longer than PostgreSQL lets a name be"

    loaded = load(f'thing_id,"Colour, main",{long},price\n1,red,"a ""b""",2\n2,,"",3\n', bad=bad, extra="keep")

    assert (loaded.rows, loaded.rejects) == (2, bad)
    assert [row[4] for row in warehouse.rows(ROWS)] == [
        {"Colour, main": "red", long: 'a "b"'},
        {"Colour, main": None, long: ""},
    ]
    assert warehouse.rows("SELECT count(DISTINCT load_id) FROM raw.things") == [(1,)]


def test_rows_with_extra_columns_arrive_in_the_order_of_the_file(
    warehouse: Warehouse, load: Callable[..., Load]
) -> None:
    lines = "\n".join(f"{number},x" for number in range(3000, 0, -1))

    load(f"thing_id,more\n{lines}\n", extra="keep")

    assert [row[0] for row in warehouse.rows(ROWS)] == list(range(3000, 0, -1))


def test_bad_record_of_a_file_with_extra_columns_is_named_as_in_one_without(
    warehouse: Warehouse, load: Callable[..., Load]
) -> None:
    content = "thing_id,more,price\n1,a,1\n2,b,-5\n3,c,much\n,d,1\n5,e,1,\n6,f,9\n"
    with pytest.raises(BatchError, match=r"line 4, column price, value 'much': invalid input syntax for type numeric"):
        load(content, extra="ignore")

    loaded = load(content, extra="ignore", max_rejects=4)

    assert (loaded.rows, loaded.rejects) == (2, 4)
    rejects = "SELECT line_number, column_name, reason FROM raw.things_rejects ORDER BY line_number"
    assert warehouse.rows(rejects) == [
        (3, "price", 'violates check constraint "price_is_positive"'),
        (4, "price", 'invalid input syntax for type numeric: "much"'),
        (5, "thing_id", 'null value in column "thing_id"'),
        (6, None, "extra data after last expected column"),
    ]


RULES_OF_THE_TABLE = {
    "index": ("CREATE UNIQUE INDEX thing_is_there_once ON raw.things (thing_id)", 1),
    "foreign key": (
        """
            CREATE TABLE public.known (id bigint PRIMARY KEY);
            INSERT INTO public.known VALUES (2), (3);
            ALTER TABLE raw.things ADD FOREIGN KEY (thing_id) REFERENCES public.known
        """,
        2,
    ),
    "trigger": (
        """
            CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS
                'BEGIN IF NEW.thing_id = 1 THEN RAISE EXCEPTION $m$no 1$m$; END IF; RETURN NEW; END';
            CREATE TRIGGER t BEFORE INSERT ON raw.things FOR EACH ROW EXECUTE FUNCTION public.refuse()
        """,
        2,
    ),
    "rule of extra columns": ("ALTER TABLE raw.things ADD CHECK (extra ->> 'more' <> 'a')", 2),
    "collation": ("ALTER TABLE raw.things ALTER name TYPE text COLLATE \"C\", ADD CHECK (name < 'a')", 1),
}


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("rule", RULES_OF_THE_TABLE)
def test_rules_that_only_the_table_itself_can_judge_hold_for_files_with_extra_columns(
    warehouse: Warehouse, load: Callable[..., Load], rule: str, bad: int
) -> None:
    statement, rejects = RULES_OF_THE_TABLE[rule]
    warehouse.alter(statement)
    content = "thing_id,name,more\n1,B,a\n1,b,a\n2,Z,c\n3,C,d\n"
    with pytest.raises(BatchError, match=rf"{rejects + bad} of {4 + bad} records are bad"):
        load(content, extra="keep", bad=bad, max_rejects=rejects + bad - 1)

    loaded = load(content, extra="keep", max_rejects=rejects + bad, bad=bad)

    assert (loaded.rows, loaded.rejects) == (4 - rejects, rejects + bad)
    assert [row[0] for row in warehouse.rows(ROWS)] == [1, 2, 3][rejects - 1 :]
    ours = "SELECT count(*) FROM pg_class WHERE relname LIKE 'de_dw_load%'"
    assert warehouse.rows(ours) == [(0,)]


def test_trigger_fills_in_what_a_file_with_extra_columns_lacks(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    warehouse.alter("""
        CREATE FUNCTION public.fill() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN NEW.thing_id := coalesce(NEW.thing_id, 0); RETURN NEW; END';
        CREATE TRIGGER t BEFORE INSERT ON raw.things FOR EACH ROW EXECUTE FUNCTION public.fill()
    """)

    assert load("thing_id,more\n,2\n", extra="ignore").rows == 1


@by_both_ways
def test_extra_columns_may_have_any_names(warehouse: Warehouse, load: Callable[..., Load], bad: int) -> None:
    names = [
        "",
        "column 2",
        "load_id",
        "ctid",
        "extra",
        "order of the file",
        "%s",
        "Ünï",
        "Ü" * 40,
        "x" * 200,
        "X" * 200,
    ]
    header = ",".join(["thing_id", *names])

    load(f"{header}\n1,{','.join(map(str, range(len(names))))}\n", extra="keep", bad=bad)

    assert [row[4] for row in warehouse.rows(ROWS)] == [{name: str(n) for n, name in enumerate(names)}]


def test_columns_that_are_ignored_may_have_one_name_or_none(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    load("thing_id,,a,,a\n1,2,3,4,5\n", extra="ignore")

    assert [row[0] for row in warehouse.rows(ROWS)] == [1]
    with pytest.raises(BatchError, match="more than once: '', 'a'"):
        load("thing_id,,a,,a\n1,2,3,4,5\n", extra="keep")


def test_column_that_the_database_may_count_itself_may_lack(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    warehouse.alter("""
        ALTER TABLE raw.things ADD place bigint GENERATED BY DEFAULT AS IDENTITY;
        GRANT INSERT (place) ON raw.things TO de_dw_pipeline;
    """)

    load("thing_id,place\n1,7\n", batch_id="a")
    load("thing_id\n2\n", batch_id="b")

    assert warehouse.rows("SELECT thing_id, place FROM raw.things ORDER BY row_id") == [(1, 7), (2, 1)]


def test_moment_of_a_batch_is_in_utc_whatever_the_time_zone_of_its_file(
    warehouse: Warehouse, load: Callable[..., Load]
) -> None:
    load("thing_id\n1\n", updated_at=NOW.replace(tzinfo=None), time_zone="Asia/Tokyo")

    assert warehouse.rows("SELECT batch_updated_at FROM raw.loads") == [(NOW,)]
    assert warehouse.rows("SELECT updated_at FROM raw.things") == [(NOW,)]


def test_extra_columns_are_refused_by_default(load: Callable[..., Load]) -> None:
    with pytest.raises(BatchError, match="unknown: 'more'"):
        load("thing_id,more\n1,2\n")


def test_optional_columns_get_their_default(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    load("thing_id\n1\n")

    assert warehouse.rows(ROWS) == [(1, None, None, None, None, NOW)]


@pytest.mark.parametrize(
    ("declared", "error", "message"),
    [
        ({"optional": ("thing_id", *MINIMUM["optional"])}, BatchError, "'thing_id' of raw.things, which is optional"),
        ({"optional": ("colour",)}, ValueError, "names columns that it has not: colour"),
        ({"columns": {"a": "colour"}}, ValueError, "names columns that it has not: colour"),
        ({"timestamps": {"name": "YYYY"}}, ValueError, "patterns of times for what is none there: name"),
        ({"time_zone": "Mars/Olympus"}, ValueError, "no time zone 'Mars/Olympus'"),
    ],
)
def test_declaration_that_does_not_fit_the_table_is_refused(
    load: Callable[..., Load], declared: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load("name\nLamp\n", **declared)


def test_keeping_extra_columns_needs_a_column_for_them(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    warehouse.alter("ALTER TABLE raw.things DROP COLUMN extra")

    with pytest.raises(ValueError, match=r"raw\.things has no column extra jsonb"):
        load("thing_id,more\n1,2\n", extra="keep")


@by_both_ways
@pytest.mark.parametrize(
    ("declared", "value", "instant"),
    [
        ({}, "2026-04-03 12:00", "2026-04-03 12:00+00"),
        ({"date_order": "DMY"}, "03/04/2026 12:00", "2026-04-03 12:00+00"),
        ({"date_order": "DMY"}, "3.4.2026 12:00", "2026-04-03 12:00+00"),
        ({"date_order": "MDY"}, "03/04/2026 12:00", "2026-03-04 12:00+00"),
        ({"date_order": "DMY"}, "2026-04-03T12:00:00Z", "2026-04-03 12:00+00"),
        ({"time_zone": "Europe/Berlin"}, "2026-07-01 12:00", "2026-07-01 10:00+00"),
        ({"time_zone": "Europe/Berlin"}, "2026-07-01 12:00+00", "2026-07-01 12:00+00"),
        ({"timestamps": {"seen_at": "YYYYMMDDHH24MISS"}}, "20260403120000", "2026-04-03 12:00+00"),
        ({"timestamps": {"seen_at": "DD-MM-YY"}, "time_zone": "Asia/Tokyo"}, "03-04-26", "2026-04-02 15:00+00"),
        ({"timestamps": {"seen_at": "epoch"}}, "1775217600.5", "2026-04-03 12:00:00.5+00"),
        ({"timestamps": {"seen_at": "epoch"}}, "-1.000001", "1969-12-31 23:59:58.999999+00"),
        ({"timestamps": {"seen_at": "epoch_ms"}}, "1775217600123", "2026-04-03 12:00:00.123+00"),
        ({"timestamps": {"seen_at": "epoch"}}, "", None),
    ],
)
def test_instants_are_read_as_it_is_declared(
    warehouse: Warehouse, load: Callable[..., Load], bad: int, declared: Any, value: str, instant: str | None
) -> None:
    loaded = load(f"thing_id,seen_at\n1,{value}\n", bad=bad, **declared)

    assert (loaded.rows, loaded.rejects) == (1, bad)
    (((found,), *_),) = [warehouse.rows("SELECT seen_at FROM raw.things")]
    assert found == (datetime.fromisoformat(instant) if instant else None)


@pytest.mark.parametrize(
    ("pattern", "value"),
    [
        ("YYYYMMDD", "20260403 and more"),
        ("YYYYMMDD", "2026-04-03"),
        ("YYYYMMDD", "20260230"),
        ("YYYYMMDD", "tomorrow"),
        ("DD/MM/YYYY", "3/4/2026"),
        *(
            ("epoch", value)
            for value in ("noon", "Infinity", "nan", "1e3", " 5 ", "0x1F", "1775217600.1234567", "9" * 30)
        ),
        ("epoch_ms", "1775217600123.1234"),
    ],
)
def test_value_that_does_not_come_out_of_the_pattern_as_it_went_in_is_bad(
    warehouse: Warehouse, load: Callable[..., Load], pattern: str, value: str
) -> None:
    content = f"thing_id,seen_at\n1,{value}\n2,\n"
    with pytest.raises(BatchError, match=f"line 2, column seen_at, value '{value}': not a "):
        load(content, timestamps={"seen_at": pattern})

    loaded = load(content, timestamps={"seen_at": pattern}, max_rejects=1)

    assert (loaded.rows, loaded.rejects) == (1, 1)
    assert warehouse.rows("SELECT line_number, column_name FROM raw.things_rejects") == [(2, "seen_at")]


@pytest.mark.parametrize(("type_", "kept"), [("date", "20260403000000"), ("timestamptz(0)", "20260403120001")])
def test_column_without_room_for_all_of_an_instant_takes_only_those_that_it_holds(
    warehouse: Warehouse, load: Callable[..., Load], type_: str, kept: str
) -> None:
    warehouse.alter(f"ALTER TABLE raw.things ALTER seen_at TYPE {type_}")

    loaded = load(
        f"thing_id,seen_at\n1,{kept}.000\n2,20260403120001.600\n",
        timestamps={"seen_at": "YYYYMMDDHH24MISS.MS"},
        max_rejects=1,
    )

    assert (loaded.rows, loaded.rejects) == (1, 1)
    assert warehouse.rows("SELECT line_number FROM raw.things_rejects") == [(3,)]


def test_rules_of_a_column_that_is_converted_hold(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    content = "thing_id,updated_at\n1,20260101\n2,29990101\n3,\n"
    with pytest.raises(BatchError, match="line 3"):
        load(content, timestamps={"updated_at": "YYYYMMDD"})

    loaded = load(content, timestamps={"updated_at": "YYYYMMDD"}, max_rejects=2)

    assert (loaded.rows, loaded.rejects) == (1, 2)
    reasons = [reason for (reason,) in warehouse.rows("SELECT reason FROM raw.things_rejects ORDER BY line_number")]
    assert "updated_at_is_not_in_the_future" in reasons[0]
    assert warehouse.rows("SELECT column_name FROM raw.things_rejects") == [("updated_at",)] * 2
    assert "null value" in reasons[1]


@by_both_ways
def test_text_that_stands_for_null_is_declared_and_counts_only_without_quotes(
    warehouse: Warehouse, load: Callable[..., Load], bad: int
) -> None:
    content = 'thing_id,name,price,seen_at\n1,NULL,NULL,NULL\n2,"NULL",1,2026-01-01\n3,,2,"2026-01-01"\n4,"","3",NULL\n'

    loaded = load(content, bad=bad, null="NULL")

    assert (loaded.rows, loaded.rejects) == (4, bad)
    assert [row[1:3] for row in warehouse.rows(ROWS)] == [(None, None), ("NULL", "1"), ("", "2"), ("", "3")]


@by_both_ways
def test_text_that_stands_for_null_goes_with_other_declarations(
    warehouse: Warehouse, load: Callable[..., Load], bad: int
) -> None:
    content = 'thing_id;name;price;more\n1;\\N;\\N;\\N\n2;a\\N;1,5;\n3;;2;"x;y"\n'

    loaded = load(content, bad=bad, null="\\N", delimiter=";", decimal=",", extra="keep")

    assert (loaded.rows, loaded.rejects) == (3, bad)
    assert [(*row[1:3], row[4]) for row in warehouse.rows(ROWS)] == [
        (None, None, {"more": None}),
        ("a\\N", "1.5", {"more": ""}),
        ("", "2", {"more": "x;y"}),
    ]


def test_field_with_nothing_in_it_is_no_number_where_another_text_stands_for_null(
    warehouse: Warehouse, load: Callable[..., Load]
) -> None:
    loaded = load("thing_id,price\n1,\n2,NA\n", null="NA", max_rejects=1)

    assert (loaded.rows, loaded.rejects) == (1, 1)
    assert warehouse.rows("SELECT line_number, line, column_name FROM raw.things_rejects") == [(2, "1,", "price")]


@by_both_ways
@pytest.mark.parametrize(("written_in", "encoding"), [("utf-8", "utf-8"), ("utf-8-sig", "utf-8"), ("utf-16", "utf-16")])
@pytest.mark.parametrize("content", ['1,"a\nb",2\n2,ü,\n', '1,"a\r\nb",2\r\n2,ü,\r\n'], ids=["lf", "crlf"])
def test_file_without_a_header_line_has_the_columns_that_are_declared(
    warehouse: Warehouse, load: Callable[..., Load], bad: int, content: str, written_in: str, encoding: str
) -> None:
    if bad and "\r" in content:
        content = content.replace("\r", "")

    loaded = load(content, bad=bad, header=("thing_id", "name", "price"), written_in=written_in, encoding=encoding)

    assert (loaded.rows, loaded.rejects) == (2, bad)
    assert [(row[0], row[1].replace("\r", ""), row[2]) for row in warehouse.rows(ROWS)] == [
        (1, "a\nb", "2"),
        (2, "ü", None),
    ]
    assert warehouse.rows("SELECT header, format ->> 'header' FROM raw.loads") == [
        ("", '["thing_id", "name", "price"]')
    ]


def test_bad_record_of_a_file_without_a_header_line_is_told_with_its_line(
    warehouse: Warehouse, load: Callable[..., Load]
) -> None:
    content = '1,"a\nb"\n2,x"y\n3,c\nfour,d\n5\n'
    with pytest.raises(BatchError, match=r"3 of 5 records are bad[^!]*line 3: a quote[^!]*line 5, column thing_id"):
        load(content, header=("thing_id", "name"))

    loaded = load(content, header=("thing_id", "name"), max_rejects=3)

    assert (loaded.rows, loaded.rejects) == (2, 3)
    assert warehouse.rows("SELECT line_number, line FROM raw.things_rejects ORDER BY line_number") == [
        (3, '2,x"y'),
        (5, "four,d"),
        (6, "5"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("four,a\n", "line 1, column thing_id, value 'four': invalid input syntax"),
        ('1,a"b\n2,c\n', "line 1: a quote inside a field"),
        ('1,"a\n', "line 1: a quoted field that never ends"),
        ("1\n", 'line 1: missing data for column "name"'),
        ("1,a,b\n", "line 1: extra data after last expected column"),
        ("<html>\n", "line 1: missing data"),
        ("", r"things\.csv: the file is empty\.$"),
        ("\n\n", r"things\.csv: the file is empty\.$"),
        ("1" * 70_000 + "\n", "line 1: the line can't be read: no line ends in its first 65,536 bytes"),
        ("1,a\n2,b", "the last line has no line end"),
        ("1,a\n2,b\r\n", "line 2: a line end unlike"),
        ("1,a\n\\.\n2,b\n", r"line 2: a line of just \\\."),
        ("\\.\n2,b\n", r"line 1: a line of just \\\."),
    ],
)
def test_file_without_a_header_line_is_refused_as_one_with_it(
    load: Callable[..., Load], content: str, message: str
) -> None:
    with pytest.raises(BatchError, match=message):
        load(content, header=("thing_id", "name"))


@by_both_ways
@pytest.mark.parametrize(("end", "bytes_"), [("\r\n", 65_533), ("\r\n", 65_532), ("\n", 65_533), ("\r", 65_533)])
def test_line_end_of_a_file_without_a_header_line_may_lie_across_what_is_looked_at_for_it(
    load: Callable[..., Load], tmp_path: Path, bad: int, end: str, bytes_: int
) -> None:
    bad_record = f"x,bad{end}" if bad else ""

    content = f"1,{'a' * bytes_}{end}2,ok{end}{bad_record}3,ok{end}"

    assert load(content, header=("thing_id", "name"), max_rejects=bad).rows == 3


@pytest.mark.parametrize("inside", ["a\r\n", "a\n", "a\r"])
def test_first_record_that_is_too_long_to_tell_the_line_end_is_refused_for_that(
    load: Callable[..., Load], inside: str
) -> None:
    for end in ("\n", "\r\n"):
        with pytest.raises(BatchError, match="line 1: the line can't be read: a quote in it is not closed"):
            load(f'1,"{inside * 40_000}"{end}2,ok{end}', header=("thing_id", "name"))


def test_declared_header_may_leave_a_column_out_and_maps_names(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    load("1|a|2|\n", delimiter="|", header=("id", "name", "price", ""), columns={"id": "thing_id"}, extra="ignore")

    assert [row[:3] for row in warehouse.rows(ROWS)] == [(1, "a", "2")]
    with pytest.raises(BatchError, match=r"as declared: the header does not fit raw\.things\. unknown: 'colour'"):
        load("1,red\n", header=("thing_id", "colour"), batch_id="b")


@by_both_ways
@pytest.mark.parametrize(
    ("received", "kept"),
    [("1,50", "1.50"), ("1234", "1234"), ('"0,5"', "0.5"), ("+,25", "0.25"), ("7,", "7"), (" 8,5 ", "8.5")],
)
def test_number_may_have_a_decimal_comma(
    warehouse: Warehouse, load: Callable[..., Load], bad: int, received: str, kept: str
) -> None:
    loaded = load(f"thing_id;price\n1;{received}\n2;\n", bad=bad, delimiter=";", decimal=",")

    assert (loaded.rows, loaded.rejects) == (2, bad)
    assert [row[2] for row in warehouse.rows(ROWS)] == [kept, None]


@pytest.mark.parametrize("value", ["1.50", "1.234,50", "1 234,5", "1,2,3", "NaN", "Infinity", "x", ",", "0x1F", "1_0"])
def test_number_with_another_sign_beside_the_decimal_comma_is_bad(
    warehouse: Warehouse, load: Callable[..., Load], value: str
) -> None:
    content = f"thing_id;price\n1;{value}\n2;1\n"
    with pytest.raises(BatchError, match=f"line 2, column price, value '{value}': not a number with a decimal comma"):
        load(content, delimiter=";", decimal=",")

    assert load(content, delimiter=";", decimal=",", max_rejects=1).rejects == 1


@pytest.mark.parametrize("type_", ["real", "double precision", "numeric(5,2)"])
def test_number_with_a_decimal_comma_is_looked_at_by_its_type_and_its_rules(
    warehouse: Warehouse, load: Callable[..., Load], type_: str
) -> None:
    warehouse.alter(f"ALTER TABLE raw.things ALTER price TYPE {type_}")
    too_large = "9" * 400

    loaded = load(f"thing_id;price\n1;2,5\n2;-2,5\n3;{too_large}\n", delimiter=";", decimal=",", max_rejects=2)

    assert (loaded.rows, loaded.rejects) == (1, 2)
    reasons = [reason for (reason,) in warehouse.rows("SELECT reason FROM raw.things_rejects ORDER BY line_number")]
    assert "price_is_positive" in reasons[0]


@by_both_ways
def test_domain_over_a_number_may_have_a_decimal_comma_and_money_may_not(
    warehouse: Warehouse, load: Callable[..., Load], bad: int
) -> None:
    warehouse.alter(
        "CREATE DOMAIN amount AS numeric CHECK (value < 10); ALTER TABLE raw.things ALTER price TYPE amount"
    )
    content = "thing_id;price\n1;1,50\n2;9,999\n3;10,0\n4;1.234\n"

    loaded = load(content, bad=bad, delimiter=";", decimal=",", max_rejects=bad + 2)

    assert (loaded.rows, loaded.rejects) == (2, bad + 2)
    assert [row[2] for row in warehouse.rows(ROWS)] == ["1.50", "9.999"]
    warehouse.alter("ALTER TABLE raw.things DROP CONSTRAINT price_is_positive, ALTER price TYPE money")
    with pytest.raises(ValueError, match="price can't be of type money"):
        load(f"{content}5;1\n", delimiter=";", decimal=",", batch_id="b")


@by_both_ways
def test_end_of_data_and_stray_quotes_are_found_with_another_delimiter(load: Callable[..., Load], bad: int) -> None:
    for record, message in (("\\.", r"a line of just \\\."), ("1;a'b'", "a quote inside a field")):
        with pytest.raises(BatchError, match=message):
            load(f"thing_id;name\n2;x\n{record}\n3;y\n", delimiter=";", quote="'", bad=bad)


def test_ledger_says_what_was_declared_and_which_version_of_the_file_it_was(
    warehouse: Warehouse, load: Callable[..., Load], tmp_path: Path
) -> None:
    load("thing_id;more\n1;2\n", delimiter=";", extra="ignore", encoding="latin-1")

    ((declared, version),) = warehouse.rows("SELECT format, source_version FROM raw.loads")
    assert declared == {
        "delimiter": ";",
        "encoding": "iso8859-1",
        "extra": "ignore",
        "optional": list(MINIMUM["optional"]),
    }
    assert version == str((tmp_path / "things.csv").stat().st_mtime_ns)


def test_file_with_extra_columns_is_loaded_once_too(warehouse: Warehouse, load: Callable[..., Load]) -> None:
    for is_new in (True, False):
        assert load("thing_id,more\n1,2\n", extra="keep").is_new is is_new

    assert warehouse.rows("SELECT count(*) FROM raw.things") == [(1,)]


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"delimiter": ""}, "delimiter '' is not one ASCII character"),
        ({"delimiter": ";;"}, "not one ASCII"),
        ({"delimiter": "a"}, "not one ASCII"),
        ({"delimiter": "\n"}, "not one ASCII"),
        ({"quote": "ü"}, "quote 'ü' is not one ASCII"),
        ({"delimiter": '"'}, "delimiter and quote are both"),
        ({"encoding": "utf-7"}, "encoding 'utf-7' is none that is read"),
        ({"encoding": "klingon"}, "is none that is read"),
        ({"encoding": "rot13"}, "is none that is read"),
        ({"encoding": "cp037"}, "is none that is read"),
        ({"time_zone": "UTC+2"}, "time_zone is 'UTC\\+2', and must be a name"),
        ({"time_zone": "EST5EDT,M3.2.0,M11.1.0"}, "must be a name"),
        ({"extra": "drop"}, "extra is 'drop', and must be one of refuse, ignore, keep"),
        ({"date_order": "YDM"}, "must be one of YMD, DMY, MDY"),
        ({"optional": "name"}, "must be a tuple"),
        ({"header": "name"}, "must be a tuple"),
        ({"decimal": ";"}, "decimal is ';', and must be one of"),
        *(({"null": null}, "null .* has delimiter, quote or a line end in it") for null in ("a,b", 'a"', "a\n", "\\.")),
        ({"timestamps": {"seen_at": ""}}, "pattern '' of seen_at must have something in it"),
        ({"timestamps": {"seen_at": "YYYYMMDDTZH"}}, "but not TZ, OF or TM"),
    ],
)
def test_format_that_is_none_is_refused_when_it_is_declared(declared: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Format(**declared)
