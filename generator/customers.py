"""Customers as CSV: one row per customer_id. The same seed makes the same people: those of generator.orders.

Each has a mail provider for QUARTER days, then the next one: so later batches bring new versions of the same customers.
"""

from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from generator.files import EPOCH, Progress, StoredPath, check, field, save, write_lines
from generator.orders import MAIL_DOMAINS, people

COLUMNS = ("customer_id", "name", "email", "country", "updated_at")
COUNTRIES = ("US", "DE", "FR", "ES", "GR", "PL", "CZ", "JP")  # of generator.orders.LOCALES
QUARTER = 90


def generate_customers(
    path: Path | StoredPath, *, rows: int, updated_at: datetime, seed: int = 0, progress: Progress = None
) -> int:
    """Write customers 1 to `rows` as they are at `updated_at` to a CSV file; return its bytes. As generate_orders."""
    check(rows, updated_at, seed)
    return save(path, partial(write_customers, rows=rows, updated_at=updated_at, seed=seed, progress=progress))


def write_customers(out: BinaryIO, *, rows: int, updated_at: datetime, seed: int = 0, progress: Progress = None) -> int:
    """Write the same to any binary file-like object; return the number of bytes."""
    check(rows, updated_at, seed)
    known = people(seed)
    starts = pa.array([f",{field(name)},{mailbox}." for name, mailbox in known])
    ends = pa.array([f"@{domain},{country}," for country in COUNTRIES for domain in MAIL_DOMAINS])
    line_end = f"{updated_at.astimezone(UTC).isoformat(sep=' ', timespec='microseconds')}\n"
    day = (updated_at - EPOCH).days

    def lines(start: int, n: int) -> pa.Array:
        number = np.arange(start + 1, start + n + 1)
        person, provider = number % len(known), (number + (day + number) // QUARTER) % len(MAIL_DOMAINS)
        text = pc.cast(pa.array(number), pa.string())
        end = ends.take(pa.array(person % len(COUNTRIES) * len(MAIL_DOMAINS) + provider))
        return pc.binary_join_element_wise(text, starts.take(pa.array(person)), text, end, line_end, "")

    return write_lines(out, COLUMNS, lines, rows, progress)
