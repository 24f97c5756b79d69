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

import re
import unicodedata
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from faker import Faker

from generator.files import EPOCH, Progress, StoredPath, check, field, save, write_lines

Integers = npt.NDArray[np.int64]

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

WORDS_PER_ROW = 4  # of 64 random bits: eight draws of 32 bits for each order


def generate_orders(
    path: Path | StoredPath, *, rows: int, updated_at: datetime, seed: int = 0, progress: Progress = None
) -> int:
    """Write orders 1 to `rows` as they stand at `updated_at` to the CSV file `path`; return its bytes.

    Only whole files and objects appear, as `generator.files.save` says; `progress` is called after every block
    with the number of rows written so far.

    Raises ValueError when rows or seed is negative, or updated_at has no offset or is not in the years 1970
    to 9998; and as `generator.files.save` does.
    """
    check(rows, updated_at, seed)
    return save(path, partial(write_orders, rows=rows, updated_at=updated_at, seed=seed, progress=progress))


def write_orders(
    out: BinaryIO,
    *,
    rows: int,
    updated_at: datetime,
    seed: int = 0,
    progress: Progress = None,
) -> int:
    """Write what `generate_orders` writes to any binary file-like object; return the number of bytes.

    Memory does not grow with `rows`. Raises ValueError as `generate_orders` does, and whatever `out` raises.
    """
    check(rows, updated_at, seed)
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

    def lines(start: int, n: int) -> pa.Array:
        words = stream.random_raw((n, WORDS_PER_ROW)).astype("<u8", copy=False)
        draws = words.view("<u4").T.astype(np.int64, order="C")
        customer, product, quantity, phase, *durations = draws
        customer %= len(customers)
        item = customer % len(LOCALES) * GOODS + product % GOODS
        age = (now - phase) % PERIOD
        ordered_at = now - age
        state = _status(age, *durations) * len(days) + now // DAY - ordered_at // DAY
        return pc.binary_join_element_wise(
            pc.cast(pa.array(np.arange(start + 1, start + n + 1)), pa.string()),
            customers.take(pa.array(customer)),
            goods.take(pa.array(item * MAX_QUANTITY + QUANTITIES[quantity % len(QUANTITIES)] - 1)),
            states.take(pa.array(state)),
            clock.take(pa.array(ordered_at % DAY)),
            line_end,
            "",
        )

    return write_lines(out, COLUMNS, lines, rows, progress)


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


def people(seed: int) -> list[tuple[str, str]]:
    """Name and mailbox of each customer; the number of one modulo that of LOCALES is the locale."""
    fakers = [Faker(locale, providers=["faker.providers.person"]) for locale, _, _ in LOCALES]
    for faker in fakers:
        faker.seed_instance(seed)
    names = [fakers[number % len(LOCALES)].name() for number in range(len(LOCALES) * CUSTOMERS_PER_LOCALE)]
    return [(name, f"{_mailbox(name)}.{number}") for number, name in enumerate(names)]


@lru_cache(maxsize=1)  # for a process that makes one batch after another
def _pools(seed: int) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Return as CSV text: customers; goods by locale, product and quantity; the seconds of a day."""
    customers = [
        f",{field(name)},{mailbox}@{MAIL_DOMAINS[number % len(MAIL_DOMAINS)]},"
        for number, (name, mailbox) in enumerate(people(seed))
    ]

    shop = Faker("en_US", providers=["faker.providers.person", "faker.providers.color"])
    shop.seed_instance(seed)
    catalogue = []
    for pattern, low, high in PRODUCTS:
        for _ in range(BRANDS_PER_PRODUCT):
            what = pattern.format(colour=shop.safe_color_name(), inches=shop.random_int(15, 34))
            catalogue.append((field(f"{shop.unique.last_name()} {what}"), shop.random_int(low, high)))
    goods = [
        f"{product},{quantity},{_price(euros, rate)},{currency},"
        for _, currency, rate in LOCALES
        for product, euros in catalogue
        for quantity in range(1, MAX_QUANTITY + 1)
    ]
    clock = [f"{s // HOUR:02}:{s // MINUTE % 60:02}:{s % MINUTE:02}" for s in range(DAY)]
    return pa.array(customers), pa.array(goods), pa.array(clock)


def _mailbox(name: str) -> str:
    """Return the name in ASCII as far as it goes: accents fall off, Greek and Japanese become "customer"."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub("[^a-z]+", ".", ascii_name).strip(".") or "customer"


def _price(euros: int, rate: int) -> str:
    """Return 4.99 for 5 euros, and whole units of a currency that counts in more of them."""
    return f"{euros - 1}.99" if rate == 1 else f"{euros * rate - 1}.00"
