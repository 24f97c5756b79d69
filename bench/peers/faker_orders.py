"""Orders as CSV with Faker and csv.writer, row by row: the ten columns of raw.orders, in the most direct way."""

# ruff: noqa: S311
import csv
import json
import os
import random
import time
from datetime import UTC, datetime, timedelta

from faker import Faker

rows = int(os.environ["BENCH_ROWS"])
updated_at = datetime(2026, 1, 2, tzinfo=UTC)

started = time.perf_counter()
fake = Faker()
with open(os.environ["BENCH_FILE"], "w", encoding="utf-8", newline="") as file:  # noqa: PTH123
    writer = csv.writer(file)
    writer.writerow(
        [
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
        ]
    )
    for order_id in range(1, rows + 1):
        writer.writerow(
            [
                order_id,
                fake.name(),
                fake.email(),
                fake.catch_phrase(),
                random.randint(1, 10),
                round(random.uniform(5, 2000), 2),
                fake.currency_code(),
                random.choice(["created", "paid", "shipped", "delivered", "returned", "cancelled"]),
                fake.date_time_between(updated_at - timedelta(days=30), updated_at, tzinfo=UTC),
                updated_at,
            ]
        )
print(json.dumps({"seconds": time.perf_counter() - started}))
