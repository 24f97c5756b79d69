"""Customers: valid rows, the same people as long as the seed is the same, and new versions of them in time."""

import csv
import io
from datetime import UTC, datetime, timedelta

import pytest

from generator import datasets, generator_of
from generator.customers import COLUMNS, COUNTRIES, QUARTER, write_customers
from generator.files import BLOCK_ROWS
from generator.orders import write_orders

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)


def customers(rows: int, updated_at: datetime = NOON, seed: int = 0) -> list[dict[str, str]]:
    out = io.BytesIO()
    assert write_customers(out, rows=rows, updated_at=updated_at, seed=seed) == len(out.getvalue())
    return list(csv.DictReader(io.StringIO(out.getvalue().decode(), newline=""), strict=True))


def test_there_is_one_row_per_customer_and_more_rows_begin_with_the_same() -> None:
    found = customers(BLOCK_ROWS + 3)

    assert [row["customer_id"] for row in found] == [str(number) for number in range(1, BLOCK_ROWS + 4)]
    assert tuple(found[0]) == COLUMNS
    assert len({row["email"] for row in found}) == len(found)
    assert {row["country"] for row in found} == set(COUNTRIES)
    assert {row["updated_at"] for row in found} == {"2026-11-25 12:00:00.000000+00:00"}
    assert customers(10) == found[:10]


def test_each_has_another_mail_provider_after_a_quarter_and_else_stays_the_same() -> None:
    before, soon, later = (customers(200, NOON + timedelta(days=days)) for days in (0, 1, QUARTER))

    assert 0 < sum(row["email"] != then["email"] for row, then in zip(before, soon, strict=True)) < 10
    for row, then in zip(before, later, strict=True):
        assert row["email"] != then["email"]
        assert row["email"].partition("@")[0] == then["email"].partition("@")[0]
        assert (row["name"], row["country"]) == (then["name"], then["country"])


def test_they_are_those_who_order() -> None:
    out = io.BytesIO()
    write_orders(out, rows=500, updated_at=NOON)

    buyers = {row["customer_name"] for row in csv.DictReader(io.StringIO(out.getvalue().decode(), newline=""))}

    assert buyers <= {row["name"] for row in customers(1000)}


def test_generator_is_found_by_the_name_of_its_dataset() -> None:
    assert datasets() == ["customers", "orders"]
    assert generator_of("customers").__name__ == "generate_customers"
    with pytest.raises(ValueError, match=r"no generator/files\.py makes files: there are customers, orders"):
        generator_of("files")
