"""The load and the refresh together: whatever comes in whatever order, stg has what a few lines of Python say.

A history is made up by Hypothesis: files, and the steps in which they are delivered, again, under other names, by two
sessions that overlap, and refreshed in between, in any of the three ways or as the DAG chooses. All else is real:
files, loader, transforms, roles, servers. After a change of any of them, some more:

    HISTORIES=1000 .venv/bin/python -m pytest tests/dags/test_histories.py
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import batch_load
import psycopg
import pytest
from batch_load import BatchError, load_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from stg_refresh import cheapest_refresh

from tests.conftest import HISTORIES, SCRIPTS, VERIFY
from tests.warehouse import DatabaseServer, Warehouse

ORDERS = 3
FILES = 4
# The second is the first in another zone, so they tie. The third is the smallest step that PostgreSQL knows later.
INSTANTS = (
    "2026-01-05T00:00:00+00:00",
    "2026-01-05T01:00:00+01:00",
    "2026-01-05T00:00:00.000001+00:00",
    "2026-01-06T00:00:00+00:00",
)
MOMENTS = [f"2026-01-05T{hour:02}:00:00+00:00" for hour in range(12)]  # no two alike
Kind = Literal["swap", "union", "merge", "auto"]
KINDS: list[Kind] = ["merge", "union", "swap", "auto"]
TEXTS = [None, "", "a", "NULL", "\\N", " a ", "a,b", 'a"b', "a\nb", "a\r\n", "\n\\.\n", "é"]


class Row(NamedTuple):
    """A version of an order as a file has it. Histories share a database: order_id is counted within the history."""

    order_id: int
    customer_name: str | None
    customer_email: str | None
    product: str | None
    quantity: int | None
    unit_price: str | None
    currency: str | None
    status: str | None
    ordered_at: str | None
    updated_at: str


UPDATED_AT = Row._fields.index("updated_at")


@dataclass(frozen=True)
class File:
    rows: list[Row]
    has_bad_record: bool = False  # then it is not loaded by one COPY but record by record


@dataclass(frozen=True)
class Deliver:
    file: int
    batch_id: str = "its own"  # or a name that any file may come under
    session: Literal["one", "other"] = "one"
    load_again: bool = False
    end: Literal["commit", "rollback", "leave open"] = "commit"


@dataclass(frozen=True)
class Refresh:
    """:param kind: "auto" is what the DAG chooses."""

    kind: Kind = "swap"


def rows(updated_at: st.SearchStrategy[str]) -> st.SearchStrategy[Row]:
    texts = st.sampled_from(TEXTS)
    return st.builds(
        Row,
        order_id=st.integers(0, ORDERS - 1),
        customer_name=texts,
        customer_email=texts,
        product=texts,
        quantity=st.sampled_from([None, 1, 2]),
        unit_price=st.sampled_from([None, "9.9", "9.90"]),
        currency=st.sampled_from([None, "", "EUR"]),
        status=st.sampled_from([None, "", "paid"]),
        ordered_at=st.sampled_from([None, *INSTANTS]),
        updated_at=updated_at,
    )


FILE = st.builds(
    File,
    rows=st.lists(rows(st.sampled_from(INSTANTS)), max_size=4),
    has_bad_record=st.sampled_from([False] * 5 + [True]),
)
FILE_NUMBER = st.integers(0, FILES - 1)
SESSION = st.sampled_from(["one", "other"])
BATCH_ID = st.sampled_from(["its own", "x", "y"])
END = st.sampled_from(["commit", "rollback", "leave open"])
DELIVERY = st.one_of(
    st.builds(Deliver, file=FILE_NUMBER, session=SESSION),
    st.builds(Deliver, file=FILE_NUMBER, session=SESSION, batch_id=BATCH_ID, load_again=st.booleans()),
    st.builds(Deliver, file=FILE_NUMBER, session=SESSION, batch_id=BATCH_ID, load_again=st.booleans(), end=END),
)


def steps(kinds: list[Kind]) -> st.SearchStrategy[list[Deliver | Refresh]]:
    step = st.one_of(DELIVERY, DELIVERY, st.builds(Refresh, st.sampled_from(kinds)))
    return st.lists(step, min_size=1, max_size=12)


# Any mixture, and one kind from end to end: by chance alone that would be rare.
STEPS = st.one_of(steps(KINDS), *(steps([kind]) for kind in KINDS))


class Hook(NamedTuple):
    """What dags/stg_refresh.py needs of Airflow's."""

    conn: psycopg.Connection[Any]

    def get_first(self, query: str, parameters: tuple[Any, ...]) -> Any:
        return self.conn.execute(query.encode(), parameters).fetchone()


class Database:
    """A clone of the template, and two sessions that load into it for as long as it lives."""

    def __init__(self, server: DatabaseServer, folder: Path) -> None:
        self.warehouse = Warehouse(server.make(template=server.template), server)
        self.sessions = {name: self.warehouse.connect() for name in ("one", "other")}
        self.reader = self.warehouse.connect("de_dw_reader", autocommit=True)
        self.path = folder / "orders.csv"
        self.numbers = itertools.count()  # of histories

    def refresh(self, kind: Kind) -> None:
        if kind == "auto":
            kind = cheapest_refresh(Hook(self.reader), "orders_latest", "auto").kind  # type: ignore[assignment]
        self.warehouse.run(SCRIPTS[kind])

    def published(self) -> list[tuple[Any, ...]]:
        """Every row of stg as text, row_id and load_id included."""
        return self.reader.execute("SELECT t::text FROM stg.orders_latest AS t ORDER BY order_id").fetchall()

    def close(self) -> None:
        for conn in (self.reader, *self.sessions.values()):
            conn.close()
        self.warehouse.server.drop(self.warehouse.url)


class Databases:
    """A new one every now and then: raw can't be emptied, and a refresh costs what all rows so far cost."""

    def __init__(self, server: DatabaseServer, folder: Path) -> None:
        self.arguments = server, folder
        self.current = Database(*self.arguments)
        self.uses = 0

    def get(self) -> Database:
        self.uses += 1
        if self.uses % 50 == 0:
            self.current.close()
            self.current = Database(*self.arguments)
        return self.current


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # Its warnings of bad records, by the hundred, would bury the one history that fails.
        patch.setattr(batch_load.log, "disabled", True)
        yield


@pytest.fixture(scope="module")
def databases(server: DatabaseServer, tmp_path_factory: pytest.TempPathFactory, quiet: None) -> Iterator[Databases]:
    made = Databases(server, tmp_path_factory.mktemp("histories"))
    yield made
    made.current.close()


@pytest.fixture(scope="module")
def database_per_kind(
    server: DatabaseServer, tmp_path_factory: pytest.TempPathFactory, quiet: None
) -> Iterator[dict[Kind, Databases]]:
    """For the same history in each of them: they count loads and rows alike."""
    with ExitStack() as stack:
        made: dict[Kind, Databases] = {}
        for kind in KINDS:
            made[kind] = Databases(server, tmp_path_factory.mktemp(kind))
            stack.callback(lambda databases: databases.current.close(), made[kind])
        yield made


@dataclass(frozen=True)
class Loaded:
    """A load that the rules allow: what must stand in the ledger, and its rows in raw."""

    batch_id: str
    content: bytes
    rows: list[Row]
    has_records: bool  # files without any are all alike
    load_id: int
    is_repeat: bool
    open_in: str | None  # the session that has not committed it yet


class History:
    """Takes the steps, and keeps book of what must have come of them."""

    def __init__(self, database: Database, files: list[File]) -> None:
        self.database = database
        self.number = next(database.numbers)
        self.files = files
        self.contents = [as_csv(file, self.number * ORDERS) for file in files]
        self.loads: list[Loaded] = []  # in the order in which the loads began
        self.held: dict[str, set[str]] = {name: set() for name in database.sessions}  # batches, by open session
        for conn in database.sessions.values():
            # What an earlier history left there must not decide about this one: it would fail once and then not again.
            conn.execute("DISCARD SEQUENCES")
            conn.commit()

    def deliver(self, step: Deliver) -> None:
        batch_id = f"{self.number} {step.batch_id if step.batch_id != 'its own' else step.file}"
        content = self.contents[step.file]
        for session in self.held:
            # The load would wait for that session to end, and nobody else is here to end it.
            if session != step.session and self.is_in_the_way(session, batch_id, content):
                self.end(session, "commit")

        visible = [load for load in self.loads if load.open_in in (None, step.session)]
        same_batch = next((load for load in visible if load.batch_id == batch_id), None)
        same_bytes = next((load for load in visible if load.content == content and load.has_records), None)
        self.held[step.session].add(batch_id)
        if same_batch and same_batch.content != content:
            with pytest.raises(BatchError, match="with other bytes"):
                self.load(step, batch_id)
            self.end(step.session, "rollback")
            return

        load = self.load(step, batch_id)

        earlier = same_batch or (None if step.load_again else same_bytes)
        if earlier:
            assert (load.is_new, load.load_id, load.batch_id) == (False, earlier.load_id, earlier.batch_id)
        else:
            file = self.files[step.file]
            assert (load.is_new, load.rows, load.rejects) == (True, len(file.rows), int(file.has_bad_record))
            is_repeat = same_bytes is not None
            has_records = bool(file.rows) or file.has_bad_record
            self.loads.append(Loaded(batch_id, content, file.rows, has_records, load.load_id, is_repeat, step.session))
        self.end(step.session, step.end)

    def is_in_the_way(self, session: str, batch_id: str, content: bytes) -> bool:
        return batch_id in self.held[session] or any(
            load.open_in == session and load.content == content and load.has_records and not load.is_repeat
            for load in self.loads
        )

    def load(self, step: Deliver, batch_id: str) -> batch_load.Load:
        self.database.path.write_bytes(self.contents[step.file])
        return load_batch(
            self.database.sessions[step.session],
            table="raw.orders",
            batch_id=batch_id,
            path=self.database.path,
            max_rejects=1,
            load_again=step.load_again,
        )

    def end(self, session: str, how: Literal["commit", "rollback", "leave open"]) -> None:
        if how == "leave open":
            return
        conn = self.database.sessions[session]
        if how == "commit":
            conn.commit()
            self.loads = [replace(load, open_in=None) if load.open_in == session else load for load in self.loads]
        else:
            conn.rollback()
            self.loads = [load for load in self.loads if load.open_in != session]
        self.held[session].clear()

    def take(self, steps: list[Deliver | Refresh]) -> None:
        """Take all of them, and have every load committed then."""
        try:
            for step in steps:
                if isinstance(step, Deliver):
                    self.deliver(step)
                else:
                    self.refresh(step.kind)
        finally:  # the sessions are the next history's too
            for session in self.held:
                self.end(session, "commit")

    def refresh(self, kind: Kind) -> None:
        """Refresh, and compare all that was committed so far with what is in raw and in stg."""
        self.database.refresh(kind)

        committed = [load for load in self.loads if load.open_in is None]
        arrived = self.read("raw.orders")
        assert [row[:-1] for row in arrived] == [
            (*as_stored(row), load.load_id) for load in committed for row in load.rows
        ]
        assert self.read("stg.orders_latest", order_by="order_id") == latest(arrived)

    def check_books(self) -> None:
        """After the last refresh: the proof in SQL agrees, and what counts as applied is what the ledger has."""
        reader = self.database.reader
        assert (reader.execute(VERIFY).fetchone() or ())[:3] == (0, 0, 0)
        applied = reader.execute(
            "SELECT load_id FROM stg.applied_loads WHERE table_name = 'orders_latest' ORDER BY load_id"
        ).fetchall()
        ledger = reader.execute(
            "SELECT load_id, batch_id FROM raw.loads WHERE table_name = 'raw.orders' ORDER BY load_id"
        ).fetchall()
        assert applied == [(load_id,) for load_id, _ in ledger]
        ours = {load_id for load_id, batch_id in ledger if batch_id.split()[0] == str(self.number)}
        assert ours == {load.load_id for load in self.loads}

    def check_versions(self) -> None:
        """At each instant stg.orders_as_of and stg.orders_history tell what had become true until then."""
        arrived = self.read("raw.orders")
        instants = sorted({row[UPDATED_AT] for row in arrived})
        instants = [datetime(2026, 1, 1, tzinfo=UTC), *instants, *(at + timedelta(hours=1) for at in instants[-1:])]
        expected = {at: latest([row for row in arrived if row[UPDATED_AT] <= at]) for at in instants}
        for at in instants:
            assert self.read(f"stg.orders_as_of('{at}')", order_by="order_id") == expected[at], at
            valid = f"valid_from <= '{at}' AND (valid_to > '{at}' OR valid_to IS NULL)"
            assert self.read("stg.orders_history", valid, order_by="order_id") == expected[at], at

        intervals = defaultdict(list)
        for order_id, valid_from, valid_to in self.read(
            "stg.orders_history", columns="valid_from, valid_to", order_by="valid_from"
        ):
            intervals[order_id].append((valid_from, valid_to))
        assert dict(intervals) == {
            order_id: list(itertools.zip_longest(begins, begins[1:]))
            for order_id in {row[0] for row in arrived}
            for begins in [sorted({row[UPDATED_AT] for row in arrived if row[0] == order_id})]
        }

    def read(
        self, table: str, condition: str = "true", *, columns: str = "", order_by: str = "row_id"
    ) -> list[tuple[Any, ...]]:
        """The history's rows, with load_id and row_id at their ends, or with the columns that are asked for."""
        first = self.number * ORDERS
        # As text, because to Python 9.9 and 9.90 are the same.
        whole = ", ".join([*Row._fields[1:], "load_id", "row_id"]).replace("unit_price", "unit_price::text")
        query = (
            f"SELECT t.order_id - {first}, {columns or whole} FROM {table} AS t"
            f" WHERE t.order_id BETWEEN {first} AND {first + ORDERS - 1} AND {condition} ORDER BY t.{order_by}"
        )
        return self.database.reader.execute(query.encode()).fetchall()


def latest(arrived: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The rule: per order the newest version, and of equally new ones that which arrived last."""
    newest: dict[int, tuple[Any, ...]] = {}
    for row in arrived:
        order_id = row[0]
        if order_id not in newest or row[UPDATED_AT] >= newest[order_id][UPDATED_AT]:
            newest[order_id] = row
    return [newest[order_id] for order_id in sorted(newest)]


def as_stored(row: Row) -> tuple[Any, ...]:
    ordered_at = datetime.fromisoformat(row.ordered_at) if row.ordered_at else None
    return (*row[:-2], ordered_at, datetime.fromisoformat(row.updated_at))


def as_csv(file: File, first_order_id: int) -> bytes:
    records = [[str(row.order_id + first_order_id), *map(as_field, row[1:])] for row in file.rows]
    if file.has_bad_record:
        records.insert(len(records) // 2, [f"no number {first_order_id}", *[""] * (len(Row._fields) - 1)])
    return "".join(f"{','.join(fields)}\n" for fields in [Row._fields, *records]).encode()


def as_field(value: str | int | None) -> str:
    """NULL is nothing, the empty string is a pair of quotes."""
    if value is None:
        return ""
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if not text or set(text) & set(',"\r\n') else text


FILE_LIST = st.lists(FILE, min_size=FILES, max_size=FILES)


@settings(max_examples=HISTORIES, deadline=None, database=None)
@given(files=FILE_LIST, steps=STEPS, last=st.sampled_from(KINDS))
def test_newest_version_that_arrived_last_is_published_after_any_history(
    databases: Databases, files: list[File], steps: list[Deliver | Refresh], last: Kind
) -> None:
    history = History(databases.get(), files)

    history.take(steps)

    history.refresh(last)
    history.check_books()
    history.check_versions()
    before = history.database.published()
    if last != "swap":
        history.refresh("swap")  # which looks at nothing but raw
    assert history.database.published() == before


@settings(max_examples=max(HISTORIES // 8, 1), deadline=None, database=None)
@given(files=FILE_LIST, steps=steps(["auto"]))
def test_a_history_ends_the_same_whether_swapped_united_or_merged_throughout(
    database_per_kind: dict[Kind, Databases], files: list[File], steps: list[Deliver | Refresh]
) -> None:
    ends = {}
    for kind, databases in database_per_kind.items():
        history = History(databases.get(), files)
        history.take([Refresh(kind) if isinstance(step, Refresh) else step for step in steps])
        history.refresh(kind)
        history.check_books()
        ends[kind] = history.database.published()

    assert all(end == ends["swap"] for end in ends.values())


LATE, EARLIER, LATER = "2026-01-05T03:00:00+00:00", "2026-01-05T02:00:00+00:00", "2026-01-05T04:00:00+00:00"


def version(order_id: int, updated_at: str, product: str) -> Row:
    return Row(order_id, None, None, product, None, "9.90", None, None, None, updated_at)


@pytest.mark.parametrize("last", KINDS)
@pytest.mark.parametrize("meanwhile", KINDS)
def test_load_that_commits_after_later_ones_were_applied_is_not_left_out(
    databases: Databases, meanwhile: Kind, last: Kind
) -> None:
    late = File([version(0, LATE, "late wins"), version(1, LATE, "late loses"), version(2, LATE, "late ties")])
    early = File([version(0, EARLIER, "early"), version(1, LATER, "early"), version(2, LATE, "early")])
    none = File([])
    history = History(databases.get(), [late, early, File([version(0, EARLIER, "early too")]), none])
    history.take(
        [
            Deliver(3, session="other"),
            Refresh(meanwhile),
            Deliver(0, end="leave open"),
            Deliver(1, session="other"),
            Refresh(meanwhile),
            Deliver(2, session="other"),
            Refresh(meanwhile),
        ]  # and now the one that was left open is committed
    )
    _, late_load, *later_loads = (load.load_id for load in history.loads)
    applied = [load_id for (load_id,) in history.database.reader.execute("SELECT load_id FROM stg.applied_loads")]
    assert late_load < min(later_loads)
    assert late_load not in applied
    assert set(later_loads) <= set(applied)

    history.refresh(last)

    products = [row[3] for row in history.read("stg.orders_latest", order_by="order_id")]
    # Both began to arrive in this order: what was numbered last wins a tie, not what was committed last.
    assert products == ["late wins", "early", "early"]
    history.check_books()
    history.check_versions()


@settings(max_examples=max(HISTORIES // 2, 1), deadline=None, database=None)
@given(
    versions=st.lists(
        st.tuples(FILE_NUMBER, rows(st.sampled_from(MOMENTS))),
        max_size=FILES * 4,
        unique_by=lambda version: (version[1].order_id, version[1].updated_at),
    ),
    orders=st.tuples(st.permutations(range(FILES)), st.permutations(range(FILES))),
    kinds=st.tuples(*[st.sampled_from([None, *KINDS])] * (FILES - 1)),
    last=st.sampled_from(KINDS),
)
def test_order_of_batches_changes_nothing_when_no_two_versions_are_of_one_moment(
    databases: Databases,
    versions: list[tuple[int, Row]],
    orders: tuple[list[int], list[int]],
    kinds: tuple[Kind | None, ...],
    last: Kind,
) -> None:
    files = [File([row for number, row in versions if number == file]) for file in range(FILES)]
    database = databases.get()
    histories = [History(database, files) for _ in orders]
    for place, kind in enumerate([*kinds, last]):
        for history, order in zip(histories, orders, strict=True):
            history.deliver(Deliver(order[place]))
        if kind:
            database.refresh(kind)

    one, other = ([row[:-2] for row in history.read("stg.orders_latest", order_by="order_id")] for history in histories)
    assert one == other
    assert [row[0] for row in one] == sorted({row.order_id for _, row in versions})
