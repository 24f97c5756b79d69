"""The load and the refresh together: whatever comes in whatever order, stg has what a few lines of Python say.

A history is made up by Hypothesis: files, and the steps in which they are delivered, again, under other names, by two
sessions that overlap, and refreshed in between. Everything else is real: files, loader, transform, roles, servers.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import batch_load
import pytest
from batch_load import BatchError, load_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import DatabaseServer, Warehouse

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
    pass


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
STEP = st.one_of(
    st.builds(Deliver, file=FILE_NUMBER, session=SESSION),
    st.builds(Deliver, file=FILE_NUMBER, session=SESSION, batch_id=BATCH_ID, load_again=st.booleans()),
    st.builds(Deliver, file=FILE_NUMBER, session=SESSION, batch_id=BATCH_ID, load_again=st.booleans(), end=END),
    st.just(Refresh()),
)


class Database:
    """A clone of the template, and two sessions that load into it for as long as it lives."""

    def __init__(self, server: DatabaseServer, template: str, folder: Path) -> None:
        self.warehouse = Warehouse(server.make(template=template), server)
        self.sessions = {name: self.warehouse.connect() for name in ("one", "other")}
        self.reader = self.warehouse.connect("de_dw_reader", autocommit=True)
        self.path = folder / "orders.csv"
        self.numbers = itertools.count()  # of histories

    def close(self) -> None:
        for conn in (self.reader, *self.sessions.values()):
            conn.close()
        self.warehouse.server.drop(self.warehouse.url)


class Databases:
    """A new one every now and then: raw can't be emptied, and a refresh costs what all rows so far cost."""

    def __init__(self, server: DatabaseServer, template: str, folder: Path) -> None:
        self.arguments = server, template, folder
        self.current = Database(*self.arguments)
        self.uses = 0

    def get(self) -> Database:
        self.uses += 1
        if self.uses % 50 == 0:
            self.current.close()
            self.current = Database(*self.arguments)
        return self.current


@pytest.fixture(scope="module")
def databases(server: DatabaseServer, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    made = Databases(server, template, tmp_path_factory.mktemp("histories"))
    with pytest.MonkeyPatch.context() as patch:
        # Its warnings of bad records, by the hundred, would bury the one history that fails.
        patch.setattr(batch_load.log, "disabled", True)
        yield made
    made.current.close()


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

    def refresh(self) -> None:
        """Run the transform, and compare all that was committed so far with what is in raw and in stg."""
        self.database.warehouse.run("stg.orders_latest")

        committed = [load for load in self.loads if load.open_in is None]
        arrived = self.read("raw.orders", "row_id")
        assert [row[:-1] for row in arrived] == [
            (*as_stored(row), load.load_id) for load in committed for row in load.rows
        ]
        assert self.read("stg.orders_latest", "order_id") == latest(arrived)

    def read(self, table: str, order_by: str) -> list[tuple[Any, ...]]:
        """The history's rows, with load_id and row_id at their ends."""
        first = self.number * ORDERS
        # As text, because to Python 9.9 and 9.90 are the same.
        columns = ", ".join(Row._fields[1:]).replace("unit_price", "unit_price::text")
        query = (
            f"SELECT order_id - {first}, {columns}, load_id, row_id FROM {table}"
            f" WHERE order_id BETWEEN {first} AND {first + ORDERS - 1} ORDER BY {table}.{order_by}"
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


@settings(max_examples=500, deadline=None, database=None)
@given(files=st.lists(FILE, min_size=FILES, max_size=FILES), steps=st.lists(STEP, min_size=1, max_size=12))
def test_newest_version_that_arrived_last_is_published_after_any_history(
    databases: Databases, files: list[File], steps: list[Deliver | Refresh]
) -> None:
    history = History(databases.get(), files)
    try:
        for step in steps:
            if isinstance(step, Deliver):
                history.deliver(step)
            else:
                history.refresh()
    finally:  # the sessions are the next history's too
        for session in history.held:
            history.end(session, "commit")
    history.refresh()


@settings(max_examples=250, deadline=None, database=None)
@given(
    versions=st.lists(
        st.tuples(FILE_NUMBER, rows(st.sampled_from(MOMENTS))),
        max_size=FILES * 4,
        unique_by=lambda version: (version[1].order_id, version[1].updated_at),
    ),
    orders=st.tuples(st.permutations(range(FILES)), st.permutations(range(FILES))),
)
def test_order_of_batches_changes_nothing_when_no_two_versions_are_of_one_moment(
    databases: Databases, versions: list[tuple[int, Row]], orders: tuple[list[int], list[int]]
) -> None:
    files = [File([row for number, row in versions if number == file]) for file in range(FILES)]
    database = databases.get()
    histories = [History(database, files) for _ in orders]
    for history, order in zip(histories, orders, strict=True):
        for file in order:
            history.deliver(Deliver(file))

    database.warehouse.run("stg.orders_latest")

    one, other = ([row[:-2] for row in history.read("stg.orders_latest", "order_id")] for history in histories)
    assert one == other
    assert [row[0] for row in one] == sorted({row.order_id for _, row in versions})
