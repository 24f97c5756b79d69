"""Orders as CSV: one row per order_id, as the export of a shop's order system would have it.

Two batches with one seed are the same orders at two instants. Who ordered what, and at which price, depends
on (seed, order_id) only. Where an order stands depends on updated_at as well: every order has a phase between
0 and 30 days, its ordered_at is the latest instant <= updated_at that is congruent to the phase modulo 30
days, and its age, updated_at - ordered_at, drives its status:

    created -> paid -> shipped -> delivered (-> returned)
    created -> cancelled

So an order never goes backwards while its ordered_at stays the same. After 30 days its id stands for a new
purchase of the same things, which starts at created again.

The same rows, seed and updated_at make the same bytes on any machine (for one version of Faker, which owns
the names), and the first K rows are the same however many follow.
"""

import logging
import os
import re
import secrets
import time
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from faker import Faker

log = logging.getLogger(__name__)

Integers = npt.NDArray[np.int64]

# How often a long run says in the log how far it is.
PROGRESS_SECONDS = 5.0

COLUMNS = (
    "order_id",
    "customer_name",
    "customer_email",
    "product",
    "quantity",
    "unit_price",
    "currency",
    "status",
    "ordered_at",
    "updated_at",
)

# Locale, its currency, and roughly how many units of it are worth one euro or dollar. Latin letters with and
# without accents, Greek and Japanese: a loader that mangles an encoding shows it on the first page.
LOCALES = (
    ("en_US", "USD", 1),
    ("de_DE", "EUR", 1),
    ("fr_FR", "EUR", 1),
    ("es_ES", "EUR", 1),
    ("el_GR", "EUR", 1),
    ("pl_PL", "PLN", 4),
    ("cs_CZ", "CZK", 25),
    ("ja_JP", "JPY", 160),
)
CUSTOMERS_PER_LOCALE = 125  # 1,000 in all: plenty to GROUP BY, and Faker makes them in under 0.1 s
MAIL_DOMAINS = ("example.com", "example.net", "example.org")  # RFC 2606: mail to these reaches nobody

# What is sold and its price range in whole euros. Commas and double quotes are there to make CSV quote them.
PRODUCTS = (
    ("notebook", 5, 20),
    ("ballpoint pens, box of 12", 6, 30),
    ('poster, {colour}, 24" x 36"', 10, 50),
    ("backpack, {colour}", 30, 180),
    ('desk lamp, oak, {inches}" wide', 20, 150),
    ("keyboard", 25, 200),
    ("coffee grinder", 35, 400),
    ("{colour} armchair", 90, 700),
    ('{inches}" monitor', 120, 900),
    ("standing desk, {colour}", 250, 2_000),
)
BRANDS_PER_PRODUCT = 20  # 200 different things in all
GOODS = len(PRODUCTS) * BRANDS_PER_PRODUCT
MAX_QUANTITY = 10
# Drawn from evenly: 1 is in it 100 times, 2 is 81 times ... 10 once, so a quarter of the orders are for one.
QUANTITIES = np.repeat(np.arange(1, MAX_QUANTITY + 1), np.arange(MAX_QUANTITY, 0, -1) ** 2)

STATUSES = ("created", "paid", "shipped", "delivered", "returned", "cancelled")
CANCELLED = STATUSES.index("cancelled")
RETURNED_PERCENT = 3  # of each: some in every 100 rows, too few to distort a sum
CANCELLED_PERCENT = 5

MINUTE, HOUR, DAY = 60, 3_600, 86_400  # in seconds, the unit of everything below
PERIOD_DAYS = 30  # longer than the 26 days that the slowest order takes to be returned
PERIOD = PERIOD_DAYS * DAY
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
YEARS = range(1970, 9_999)  # a month earlier or an offset later is then still a date that Python can hold

BLOCK_ROWS = 8_192  # 1.3 MB of text: 4k to 32k rows ran equally fast, and more only takes memory
# One part of an upload. S3 takes 10,000 of them: 160 GB, a billion orders.
PART_BYTES = 16 * 1024 * 1024
WORDS_PER_ROW = 4  # of 64 random bits: eight draws of 32 bits for each order


class StoredPath(Protocol):
    """What airflow.sdk.ObjectStoragePath and upath.UPath have: a path in a file system of fsspec.

    As in dags/batch_store.py: the generator runs without that folder on its path.
    """

    @property
    def protocol(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def fs(self) -> Any: ...


def generate_orders(
    path: Path | StoredPath,
    *,
    rows: int,
    updated_at: datetime,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write orders 1 to `rows` as they stand at `updated_at` to the CSV file `path`; return its bytes.

    The file appears under its name only when it is whole and on disk, an object only when all of its parts
    are in the store. On any error, Ctrl-C included, an earlier file or object stays as it was and nothing is
    left beside it (a kill leaves the hidden .part file or the parts of an unfinished upload, and Ctrl-C at times
    a part that was on its way). A missing
    folder is made, a missing bucket is not. `progress` is called after every block with the number of rows
    written so far.

    Raises ValueError when rows or seed is negative, or updated_at has no offset or is not in the years 1970
    to 9998; OSError when the file cannot be written or `path` is something else than a file; whatever the
    client of an object store raises when that can't be reached.
    """
    _check(rows, updated_at, seed)
    write = partial(write_orders, rows=rows, updated_at=updated_at, seed=seed, progress=progress)
    if isinstance(path, Path):
        return _write_file(path, write)
    if path.protocol in ("", "file", "local"):
        return _write_file(Path(path.path), write)
    return _write_object(path, write)


def _write_file(path: Path, write: Callable[[BinaryIO], int]) -> int:
    path = path.resolve()  # replace the file behind a symlink, not the symlink
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file, so it is not replaced: give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that it can be renamed; not from tempfile, whose mode is 0600 whatever the umask.
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as out:
            size = write(out)
            out.flush()
            os.fsync(out.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return size


def _write_object(path: StoredPath, write: Callable[[BinaryIO], int]) -> int:
    name = path.fs.unstrip_protocol(path.path)
    try:
        out = path.fs.open(path.path, "wb", autocommit=False, block_size=PART_BYTES)
        try:
            size = write(out)
            out.close()  # sends the last part
            out.commit()
        except BaseException:
            # As if all had been sent: close() would send the rest, which to some stores is the end of a whole object.
            out.forced = True
            try:
                out.discard()
            except Exception as error:  # the one that brought us here is raised
                log.warning("%s: parts of an unfinished upload stay in the store: %s", name, error)
            out.close()
            raise
    except (FileNotFoundError, PermissionError) as error:  # which name no object
        raise type(error)(f"{name}: {error}") from error
    return size


def write_orders(
    out: BinaryIO,
    *,
    rows: int,
    updated_at: datetime,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write what `generate_orders` writes to any binary file-like object; return the number of bytes.

    Memory does not grow with `rows`. Raises ValueError as `generate_orders` does, and whatever `out` raises.
    """
    _check(rows, updated_at, seed)
    updated_at = updated_at.astimezone(UTC)
    now = (updated_at - EPOCH) // timedelta(seconds=1)
    # A line is its order_id and one piece from each of these pools, joined: no other value is formatted per
    # row, and quoting is done once. (pyarrow.csv quotes every text, and took over five times as long.)
    customers, goods, clock = _pools(seed)
    days = [updated_at.date() - timedelta(days=ago) for ago in range(PERIOD_DAYS + 1)]
    states = pa.array([f"{status},{day} " for status in STATUSES for day in days])
    line_end = f"+00:00,{updated_at.isoformat(sep=' ', timespec='microseconds')}\n"

    # Every row takes the next words of one stream, so neither `rows` nor the block size can change it. Raw
    # words: NumPy promises the streams of its bit generators for good, but not what integers() makes of them.
    stream = np.random.PCG64(seed)
    header = (",".join(COLUMNS) + "\n").encode()
    out.write(header)
    size = len(header)
    begun = reported = time.monotonic()
    for start in range(0, rows, BLOCK_ROWS):
        n = min(BLOCK_ROWS, rows - start)
        words = stream.random_raw((n, WORDS_PER_ROW)).astype("<u8", copy=False)
        draws = words.view("<u4").T.astype(np.int64, order="C")
        customer, product, quantity, phase, *durations = draws
        customer %= len(customers)
        item = customer % len(LOCALES) * GOODS + product % GOODS
        age = (now - phase) % PERIOD
        ordered_at = now - age
        state = _status(age, *durations) * len(days) + now // DAY - ordered_at // DAY
        lines = pc.binary_join_element_wise(
            pc.cast(pa.array(np.arange(start + 1, start + n + 1)), pa.string()),
            customers.take(pa.array(customer)),
            goods.take(pa.array(item * MAX_QUANTITY + QUANTITIES[quantity % len(QUANTITIES)] - 1)),
            states.take(pa.array(state)),
            clock.take(pa.array(ordered_at % DAY)),
            line_end,
            "",
        )
        block = pa.ListArray.from_arrays(pa.array([0, n], pa.int32()), lines)
        text = pc.binary_join(block, "")[0].as_buffer()
        out.write(text)
        size += len(text)
        if progress is not None:
            progress(start + n)
        at = time.monotonic()
        if at - reported >= PROGRESS_SECONDS:
            reported = at
            speed = size / 1e6 / (at - begun)
            log.info("%s of %s rows, %.0f MB, %.0f MB/s", f"{start + n:,}", f"{rows:,}", size / 1e6, speed)
    return size


def _check(rows: int, updated_at: datetime, seed: int) -> None:
    if rows < 0:
        raise ValueError(f"rows is {rows}: give 0 (only a header) or more")
    if seed < 0:
        raise ValueError(f"seed is {seed}: give 0 or more")
    if updated_at.utcoffset() is None:
        raise ValueError(f"updated_at {updated_at} has no offset: give an instant, such as datetime.now(UTC)")
    if updated_at.year not in YEARS:
        raise ValueError(f"updated_at {updated_at} is too far off: give a year from {YEARS[0]} to {YEARS[-1]}")


def _status(age: Integers, to_paid: Integers, to_shipped: Integers, to_delivered: Integers, fate: Integers) -> Integers:
    """Return the index in STATUSES at each age in seconds; the other arguments are random numbers."""
    paid = MINUTE + to_paid % DAY
    shipped = paid + HOUR + to_shipped % (3 * DAY)
    delivered = shipped + DAY + to_delivered % (6 * DAY)
    percent, to_returned = fate % 100, fate // 100
    returned = delivered + DAY + to_returned % (14 * DAY)
    steps = (age >= paid).astype(np.int64) + (age >= shipped) + (age >= delivered)
    steps += (age >= returned) & (percent < RETURNED_PERCENT)
    # Cancelled instead of paid: what never was paid can't be shipped.
    return np.where((steps > 0) & (percent >= 100 - CANCELLED_PERCENT), CANCELLED, steps)


@lru_cache(maxsize=1)  # for a process that makes one batch after another
def _pools(seed: int) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Return as CSV text: customers; goods by locale, product and quantity; the seconds of a day."""
    people = [Faker(locale, providers=["faker.providers.person"]) for locale, _, _ in LOCALES]
    for faker in people:
        faker.seed_instance(seed)
    customers = []
    for number in range(len(LOCALES) * CUSTOMERS_PER_LOCALE):
        name = people[number % len(LOCALES)].name()  # so that customer modulo locales is the locale
        customers.append(f",{_field(name)},{_mailbox(name)}.{number}@{MAIL_DOMAINS[number % len(MAIL_DOMAINS)]},")

    shop = Faker("en_US", providers=["faker.providers.person", "faker.providers.color"])
    shop.seed_instance(seed)
    catalogue = []
    for pattern, low, high in PRODUCTS:
        for _ in range(BRANDS_PER_PRODUCT):
            what = pattern.format(colour=shop.safe_color_name(), inches=shop.random_int(15, 34))
            catalogue.append((_field(f"{shop.unique.last_name()} {what}"), shop.random_int(low, high)))
    goods = [
        f"{product},{quantity},{_price(euros, rate)},{currency},"
        for _, currency, rate in LOCALES
        for product, euros in catalogue
        for quantity in range(1, MAX_QUANTITY + 1)
    ]
    clock = [f"{s // HOUR:02}:{s // MINUTE % 60:02}:{s % MINUTE:02}" for s in range(DAY)]
    return pa.array(customers), pa.array(goods), pa.array(clock)


def _field(text: str) -> str:
    """Quote as RFC 4180 says, and only where it must be."""
    return '"' + text.replace('"', '""') + '"' if re.search('[",\r\n]', text) else text


def _mailbox(name: str) -> str:
    """Return the name in ASCII as far as it goes: accents fall off, Greek and Japanese become "customer"."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub("[^a-z]+", ".", ascii_name).strip(".") or "customer"


def _price(euros: int, rate: int) -> str:
    """Return 4.99 for 5 euros, and whole units of a currency that counts in more of them."""
    return f"{euros - 1}.99" if rate == 1 else f"{euros * rate - 1}.00"
