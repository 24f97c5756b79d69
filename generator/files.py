"""What every generator does: check what it is asked for, write lines block by block, save them as a file or object."""

import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.compute as pc

log = logging.getLogger(__name__)

# How often a long run says in the log how far it is.
PROGRESS_SECONDS = 5.0
BLOCK_ROWS = 8_192  # 1.3 MB of text: 4k to 32k rows ran equally fast, and more only takes memory
# One part of an upload. S3 takes 10,000 of them: 160 GB, a billion orders.
PART_BYTES = 16 * 1024 * 1024
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
YEARS = range(1970, 9_999)  # a month earlier or an offset later is then still a date that Python can hold

# The lines of the rows after the first `start`, `n` of them, with their line ends: lines(start, n).
Lines = Callable[[int, int], pa.Array]
Progress = Callable[[int], None] | None


class StoredPath(Protocol):
    """What airflow.sdk.ObjectStoragePath and upath.UPath have: a path in a file system of fsspec.

    As in dags/batch_store.py: a generator runs without that folder on its path.
    """

    @property
    def protocol(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def fs(self) -> Any: ...


def save(path: Path | StoredPath, write: Callable[[BinaryIO], int]) -> int:
    """Write a CSV file or object, and return its bytes.

    The file appears under its name only when it is whole and on disk, an object only when all of its parts
    are in the store. On any error, Ctrl-C included, an earlier file or object stays as it was and nothing is
    left beside it (a kill leaves the hidden .part file or the parts of an unfinished upload, and Ctrl-C at times
    a part that was on its way). A missing folder is made, a missing bucket is not.

    Raises OSError when the file cannot be written or `path` is something else than a file; whatever the
    client of an object store raises when that can't be reached; and what `write` raises.
    """
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


def write_lines(out: BinaryIO, columns: Sequence[str], lines: Lines, rows: int, progress: Progress) -> int:
    """Write a header and `rows` lines, block by block; return the number of bytes.

    `progress` is called after every block with the number of rows written so far.
    """
    header = (",".join(columns) + "\n").encode()
    out.write(header)
    size = len(header)
    begun = reported = time.monotonic()
    for start in range(0, rows, BLOCK_ROWS):
        n = min(BLOCK_ROWS, rows - start)
        block = pa.ListArray.from_arrays(pa.array([0, n], pa.int32()), lines(start, n))
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


def check(rows: int, updated_at: datetime, seed: int) -> None:
    """Raise ValueError when rows or seed is negative, or updated_at has no offset or is not of the years in YEARS."""
    if rows < 0:
        raise ValueError(f"rows is {rows}: give 0 (only a header) or more")
    if seed < 0:
        raise ValueError(f"seed is {seed}: give 0 or more")
    if updated_at.utcoffset() is None:
        raise ValueError(f"updated_at {updated_at} has no offset: give an instant, such as datetime.now(UTC)")
    if updated_at.year not in YEARS:
        raise ValueError(f"updated_at {updated_at} is too far off: give a year from {YEARS[0]} to {YEARS[-1]}")


def field(text: str) -> str:
    """Quote as RFC 4180 says, and only where it must be."""
    return '"' + text.replace('"', '""') + '"' if re.search('[",\r\n]', text) else text
