"""Command line of the generator: reads the arguments, shows a bar on a terminal, prints one line."""

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from generator import datasets, generator_of

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports a command that Ctrl-C ended


class RateColumn(ProgressColumn):
    """Rows per second; rich's own column counts bytes."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} rows/s")


def whole_number(text: str) -> int:
    """Return `text` as an int; raise ArgumentTypeError unless it is one and 0 or more."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return number


def instant(text: str) -> datetime:
    """Return `text` as a datetime, in UTC when it has no offset; raise ArgumentTypeError unless ISO 8601."""
    try:
        value = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not ISO 8601: give a date and time such as 2026-11-25T10:11:12.123456+00:00"
        ) from None
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def place(text: str) -> Any:
    """Return `text` as a path: a URL such as s3://bucket/orders.csv as UPath, with the environment's credentials.

    Raise ArgumentTypeError when nobody here knows such URLs.
    """
    if "://" not in text:
        return Path(text)
    try:
        from upath import UPath

        return UPath(text)
    except (ImportError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def main() -> int:
    """Return the exit status: 0, 1 when the file can't be written, 2 for a bad argument, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m generator",
        description="Write a batch of made-up rows as CSV. Same rows, seed and instant: same bytes.",
    )
    parser.add_argument("--dataset", choices=datasets(), default="orders", help="what it is of (default: %(default)s)")
    parser.add_argument("--rows", type=whole_number, default=100, help="number of keys (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=place,
        help="file or URL (s3://bucket/orders.csv) to write; replaced only by a whole one "
        "(default: data/raw/DATASET.csv)",
    )
    parser.add_argument("--seed", type=whole_number, default=0, help="another seed makes others (default: %(default)s)")
    parser.add_argument(
        "--updated-at",
        type=instant,
        metavar="TS",
        help="the instant of the batch in ISO 8601; without an offset it is read as UTC; at a later one "
        "the same have moved on (default: now)",
    )
    options = parser.parse_args()
    rows = options.rows
    options.out = options.out or Path(f"data/raw/{options.dataset}.csv")
    bar = Progress(
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} rows"),
        BarColumn(),
        RateColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
    try:
        # Only now: NumPy, PyArrow and Faker take half a second to import, and a Ctrl-C in it is a Ctrl-C too.
        generate = generator_of(options.dataset)

        started = time.perf_counter()
        with bar:
            task = bar.add_task("", total=rows)
            size = generate(
                options.out,
                rows=rows,
                updated_at=options.updated_at or datetime.now(UTC),
                seed=options.seed,
                progress=lambda done: bar.update(task, completed=done),
            )
        seconds = time.perf_counter() - started
    except KeyboardInterrupt:
        print(f"\nInterrupted: nothing half-written is left at {options.out}", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        parser.error(str(error))
    except Exception as error:
        if isinstance(options.out, Path):
            raise
        # No client for such a URL, no credentials, nobody at the address: each client has errors of its own.
        print(f"{parser.prog}: {options.out}: {error}", file=sys.stderr)
        return 1
    print(f"{rows:,} rows, {size:,} bytes in {seconds:.2f} s ({rows / seconds:,.0f} rows/s): {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
