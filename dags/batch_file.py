"""A delivered CSV file: opened once, only ever read, in blocks, and cut into records where that is asked for.

It is a file on disk, or an object of a store such as S3 (batch_store). What is a whole CSV file is decided here; what
its values may be is PostgreSQL's business (batch_load, batch_rejects).
"""

import codecs
import csv
import gzip
import hashlib
import io
import logging
import os
import time
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import RawIOBase
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from batch_format import DEFAULT, Dialect, Format
from batch_store import BatchError, Below, Source, StoredPath, open_source, shown
from numpy.typing import NDArray

log = logging.getLogger(__name__)

# One read, hash and send at a time, so memory stays the same for any file. Blocks of 256 KiB are each got from the
# kernel and given back: three times the system time.
BLOCK_BYTES = 64 * 1024
# A header is one line of names: what is longer is not one.
HEADER_BYTES = 64 * 1024
# How often a long load says how far it is.
PROGRESS_SECONDS = 5.0
# Records are cut out of this much text at a time: enough that a round trip to the server does not show.
CHUNK_BYTES = 4 * 1024 * 1024
# And no more of them at a time: text of nothing but line ends has millions of records to the chunk.
CHUNK_RECORDS = 100_000
# PostgreSQL takes no longer record: a quoted field that is still open after this much text never ends for it either.
# Only records() looks for that end, and holds what it reads in memory.
RECORD_BYTES = 1024 * 1024 * 1024

CR, LF = b"\r\n"
BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
# How files begin that get delivered under the name .csv without being one.
NOT_CSV = {
    GZIP: "gzip within gzip: unpack it once",
    b"PK\x03\x04": "a zip archive or an Excel workbook: unpack it, or export it as CSV",
    b"%PDF": "PDF",
    b"\xff\xfe": "UTF-16 text: declare the dataset's encoding, or convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text: declare the dataset's encoding, or convert it to UTF-8",
    b"<": "HTML or XML, perhaps the error page of a download",
    b"{": "JSON",
    b"[": "JSON",
}
# With these the first record of a file without a header may begin, too.
MAY_BEGIN_DATA = (b"<", b"{", b"[")
# Marks at the beginning of a text, and the encodings that have them.
MARKS = {BOM: ["utf-8"], b"\xff\xfe": ["utf-16", "utf-16-le"], b"\xfe\xff": ["utf-16", "utf-16-be"]}

STRAY_QUOTE = "a quote inside a field that is not quoted, or one that is not doubled inside a field that is"
OPEN_QUOTE = "a quoted field that never ends"
END_OF_DATA = r"a line of just \., the end of the data for PostgreSQL 17 and older"


@dataclass(frozen=True)
class Records:
    """Some thousand records of a file, in its order.

    :param data: the bytes of each as received, without the line end.
    :param lines: on which line of the file each begins; the header is line 1.
    :param problems: by position in data, why it can't be a record of a CSV file, whatever its columns are.
    :param line_ends: how many lines they take in all.
    """

    data: list[bytes]
    lines: list[int]
    problems: dict[int, str]
    line_ends: int


class BatchFile:
    """A CSV file, as it is or packed with gzip: a context manager that closes it.

    It has the `header` line as received, the `names` in it and the `columns` that they stand for, the `newline` that
    ends it, and how many `header_lines` it takes, 0 where the names are declared; `lines` of the whole file, and its
    `sha256`, once blocks or records came to their end. All text of it is in UTF-8, whatever the file is in.

    :param path: only a regular file, or an object.
    :param file_format: how it is written.
    :raises BatchError: it is missing, empty, cut off, or visibly something else.
    :raises Exception: whatever else the store's client says, such as that the store can't be reached.
    """

    def __init__(self, path: Path | StoredPath | Below, file_format: Format = DEFAULT) -> None:
        self.path = shown(path)
        self.format, self.dialect = file_format, file_format.dialect
        self._file = open_source(path)
        try:
            self._state = self._file.opened
            self.is_gzip = self._file.read(len(GZIP)) == GZIP
            self._file.seek(0)
            start = self._start()
            self.mark = BOM if start.startswith(BOM) else b""
            first, self.newline = self._first_record(start.removeprefix(BOM))
            self.has_header = not file_format.header
            self.header = first if self.has_header else b""
            self.names = self._names() if self.has_header else list(file_format.header)
            self.columns = [file_format.columns.get(name, name) for name in self.names]
        except BaseException:
            self._file.close()
            raise
        self.header_lines = 1 + self.header.count(self.newline[-1:]) if self.has_header else 0
        self.lines = 0
        self.sha256 = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def version(self) -> str:
        """What tells the file from another one under its name: the time of its last change, or what the store says."""
        return str(self._state.version)

    @property
    def size(self) -> int:
        """Bytes of the file on disk, or of the object."""
        return self._state.size

    def digest(self) -> str:
        """SHA-256 of the file as it is on disk, 64 hexadecimal digits.

        :raises BatchError: it changed while it was read.
        """
        self._file.seek(0)
        digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        self._check_unchanged()
        return digest

    def blocks(self) -> Iterator[bytes]:
        """The text from its first byte to its last, unpacked.

        When it is exhausted `sha256` is that of the file on disk as it was read, and `lines` how many lines it has.

        :raises BatchError: the file changed while it was read, or is cut off.
        """
        self._file.seek(0)
        hashed = _Hashed(self._file)
        source = self._text_of(hashed)
        started = reported = time.monotonic()
        last, lines = b"", 0
        try:
            while block := source.read(BLOCK_BYTES):
                last = block
                yield block
                lines += count(block, self.newline[-1])
                now = time.monotonic()
                if now - reported >= PROGRESS_SECONDS:
                    reported, done = now, self._file.tell()
                    share, rate = 100 * done // max(self.size, 1), done / 1e6 / (now - started)
                    log.info(
                        "%s: %s lines, %.0f MB (%d%%), %.1f MB/s", self.path, f"{lines:,}", done / 1e6, share, rate
                    )
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            self._check_unchanged()  # the likelier cause
            raise BatchError(f"{self.path}: the gzip file is damaged or cut off: {error}. Deliver it again.") from None
        self._check_unchanged()
        if not last.endswith((b"\n", b"\r")):
            raise self._cut_off()
        self.lines = lines + (not last.endswith(self.newline[-1:]))
        self.sha256 = hashed.digest.hexdigest()

    def records(self) -> Iterator[Records]:
        """All records behind the header. Sets `sha256` at the end, as blocks does.

        A record with a stray quote, or with a quoted field that never ends, is taken to be one line long: what
        follows is read from the next line on.

        :raises BatchError: as blocks.
        """
        blocks = self.blocks()
        data, at, at_end = b"", 0, False  # the text that was read, and how much of it is done with
        line = 1 + self.header_lines
        skip = len(self.mark) + (len(self.header) + len(self.newline) if self.has_header else 0)
        while not at_end or at < len(data):
            if len(data) - at < skip + CHUNK_BYTES and not at_end:
                parts, size = [data[at:]], len(data) - at
                while size < skip + CHUNK_BYTES and not at_end:
                    block = next(blocks, b"")
                    at_end = not block
                    parts.append(block)
                    size += len(block)
                data, at, skip = b"".join(parts), skip, 0
            text = data[at : at + CHUNK_BYTES]
            is_last = at_end and at + len(text) == len(data)
            records, done = self._cut(text, line, is_last)
            if not done and not is_last:
                data = data[at:]
                records, at, more = self._cut_long(data, line, blocks)
                data = b"".join([data, *more])
            else:
                at += done
            yield records
            line += records.line_ends

    def _cut_long(self, data: bytes, line: int, blocks: Iterator[bytes]) -> tuple[Records, int, list[bytes]]:
        """Cut off the one record that some text begins with, and that is longer than a chunk.

        It takes memory for its text only, whatever is in it.

        :param data: begins with the record, on this line.
        :param blocks: what follows. As many are read as the record needs, up to RECORD_BYTES.
        :return: the record, where it ends in data and the blocks that were read, and those.
        """
        end = self.newline[-1]
        more: list[bytes] = []
        size, quotes, before = 0, 0, self.newline[-1:]
        pieces = chain((data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)), blocks)
        has_stray = has_line_end = False
        for piece in pieces:
            if size >= len(data):
                more.append(piece)
            text = np.frombuffer(piece, np.uint8)
            line_ends = np.flatnonzero(text == end)
            parity = (quotes + np.searchsorted(np.flatnonzero(text == self.dialect.quote_byte), line_ends)) % 2
            stops = line_ends[parity == 0][:1].tolist()
            found = scan(before + (piece[: stops[0] + 1] if stops else piece), quotes, end, self.dialect)
            has_stray |= found.has_stray
            has_line_end |= len(line_ends) > 0
            if stops and not has_stray:
                stop = size + int(stops[0])
                whole = b"".join([data, *more])[: stop + 1]
                problem = None
                record = whole[:-1]
                if self.newline == b"\r\n":
                    problem = None if record.endswith(b"\r") else self._wrong_line_end()
                    record = record.removesuffix(b"\r")
                problem = problem or self._problem(record) or next((text for _, text in _not_utf8(record, [0])), None)
                problems = {0: problem} if problem else {}
                return Records([record], [line], problems, count(whole, end)), stop + 1, more
            size += len(piece)
            if (has_stray and has_line_end) or size >= RECORD_BYTES:
                break
            quotes += found.quotes
            before = piece[-1:]
        # It never ends as a record, so it is one line.
        whole = b"".join([data, *more])
        stop = whole.find(end)
        first = whole if stop < 0 else whole[: stop + 1]
        problem = STRAY_QUOTE if scan(self.newline[-1:] + first, 0, end, self.dialect).has_stray else OPEN_QUOTE
        record = first.removesuffix(self.newline)
        return Records([record], [line], {0: problem}, int(stop >= 0)), len(first), more

    def _cut(self, data: bytes, line: int, at_end: bool) -> tuple[Records, int]:
        """Cut text into records, and say where the first one begins that is not complete.

        :param data: begins with a record, on this line.
        :param at_end: nothing follows it.
        """
        text = np.frombuffer(data, np.uint8)
        quotes = np.flatnonzero(text == self.dialect.quote_byte)
        beside_a_quote = self.dialect.beside_a_quote
        line_ends = np.flatnonzero(text == self.newline[-1])
        number = np.arange(len(quotes)) % 2
        may_begin = (quotes == 0) | beside_a_quote[text[quotes - 1]]
        may_end = (quotes == len(data) - 1) | beside_a_quote[text[np.minimum(quotes + 1, len(data) - 1)]]
        parity = np.searchsorted(quotes, line_ends) % 2
        # Counted from where a record begins every other quote begins a field, and a line end with an even number of
        # quotes before it ends a record. There are two ways to count, so both are worked out once.
        strays = [np.flatnonzero(~np.where(number == first, may_begin, may_end)) for first in (0, 1)]
        record_ends = [line_ends[parity == first] for first in (0, 1)]

        starts: list[int] = []
        stops: list[int] = []
        problems: dict[int, str] = {}
        start = 0
        while start < len(data):
            first = int(np.searchsorted(quotes, start))
            stray = _next(strays[first % 2], first)
            limit = len(data) if stray is None else int(quotes[stray])
            ends = record_ends[first % 2]
            complete = ends[np.searchsorted(ends, start) : np.searchsorted(ends, limit)]
            complete = complete[: CHUNK_RECORDS - len(starts)].tolist()
            if complete:
                starts += [start, *(stop + 1 for stop in complete[:-1])]
                stops += complete
                start = complete[-1] + 1
            if len(starts) == CHUNK_RECORDS:
                break
            if start == len(data) or (stray is None and not at_end):
                break
            stop = _next(line_ends, start)
            if stop is None and not at_end:
                break
            if stray is not None and (stop is None or quotes[stray] < stop):
                problems[len(starts)] = STRAY_QUOTE
            elif stop is not None or (len(quotes) - first) % 2 == 1:
                problems[len(starts)] = OPEN_QUOTE
            starts.append(start)
            stops.append(len(data) if stop is None else stop)
            start = stops[-1] + 1
            if len(starts) == CHUNK_RECORDS:
                break
        rest = min(start, len(data))

        firsts, lasts = np.array(starts, np.int64), np.array(stops, np.int64)
        suspects = (text == 0) | (text == CR)
        if self.newline == b"\r\n":
            ended_by_cr = (lasts > firsts) & (text[np.maximum(lasts - 1, 0)] == CR)
            suspects[lasts[ended_by_cr] - 1] = False
            for place in np.flatnonzero(~ended_by_cr).tolist():
                problems.setdefault(place, self._wrong_line_end())
            lasts = lasts - ended_by_cr
        elif self.newline == b"\r":
            suspects &= text != CR
            suspects |= text == LF
        records = [data[start:stop] for start, stop in zip(firsts.tolist(), lasts.tolist(), strict=True)]
        suspects = suspects[:rest]
        places = np.unique(np.searchsorted(firsts, np.flatnonzero(suspects), side="right") - 1)
        for place in [*places.tolist(), *np.flatnonzero(lasts - firsts == 2).tolist()]:  # two bytes may be \.
            problem = self._problem(records[place]) if place not in problems else None
            if problem is not None:
                problems[place] = problem
        for place, problem in _not_utf8(data[:rest], starts):
            problems.setdefault(place, problem)
        lines = (np.searchsorted(line_ends, firsts) + line).tolist()
        return Records(records, lines, problems, int(np.searchsorted(line_ends, rest))), rest

    def _problem(self, record: bytes) -> str | None:
        """Why PostgreSQL would not read a record, or not on every version, whatever the columns are."""
        if record == rb"\.":
            return END_OF_DATA
        if b"\0" in record:
            return "a NUL byte"
        outside = self.dialect.quoted.sub(b"", record)
        return self._wrong_line_end() if b"\r" in outside or b"\n" in outside else None

    def _wrong_line_end(self) -> str:
        return f"a line end unlike that of the header, which is {self.newline.decode()!r}"

    def _check_unchanged(self) -> None:
        now = self._file.state()
        if now != self._state:
            raise self._file.changed(self._state.size, now.size)

    def _unpacked(self, file: Any) -> Any:
        return gzip.GzipFile(fileobj=file) if self.is_gzip else file

    def _text_of(self, file: Any) -> Any:
        """What reads the text of it, unpacked, in UTF-8."""
        unpacked = self._unpacked(file)
        return unpacked if self.format.encoding == "utf-8" else _Decoded(unpacked, self.format.encoding, self.path)

    def _start(self) -> bytes:
        """The first bytes of the text. Refuses what is visibly not a whole CSV file."""
        is_utf_16 = self.format.encoding.startswith("utf-16")
        try:
            first = bytes(self._unpacked(self._file).read(len(BOM) + 1))
            for mark, encodings in MARKS.items():
                # Without a declaration, or with one of bytes, UTF-16 is refused below, as what is no CSV file.
                if first.startswith(mark) and self.format.encoding not in encodings and (is_utf_16 or mark == BOM):
                    raise BatchError(
                        f"{self.path}: the file begins with the mark of {encodings[-1]}, but its dataset's encoding is "
                        f"declared as {self.format.encoding}. Declare {encodings[-1]}, or let the source keep to it."
                    )
            self._file.seek(0)
            reader = self._text_of(self._file)
            start = bytes(reader.read(HEADER_BYTES))
            # Or a line end of two bytes would be taken for the first of them.
            more = bytes(reader.read(1))
            start, self._is_short = start + more, not more
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise BatchError(f"{self.path}: the gzip file is damaged or cut off: {error}. Deliver it again.") from None
        text = start.removeprefix(BOM)
        if not text.strip():
            remedy = "" if self.format.header else " A batch without rows has a header all the same."
            raise BatchError(f"{self.path}: the file is empty.{remedy}")
        for magic, what in NOT_CSV.items():
            if self.format.header and magic in MAY_BEGIN_DATA:
                continue
            if text.lstrip().startswith(magic) or (first.startswith(magic) and not is_utf_16):
                raise BatchError(f"{self.path}: not a CSV file but {what}")
        if b"\0" in first and not is_utf_16:
            raise BatchError(
                f"{self.path}: not a CSV file but binary, or UTF-16 text without its mark: if it is that, declare the "
                f"dataset's encoding as utf-16-le or utf-16-be"
            )
        if not self.is_gzip and not is_utf_16:  # else the end is seen when it is reached
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) not in (b"\n", b"\r"):
                raise self._cut_off()
        return start

    def _first_record(self, start: bytes) -> tuple[bytes, bytes]:
        """The first line, which is the header if there is one, and the line end behind it."""
        match = self.dialect.first_record.match(start)
        if match is None and self.format.header and self._is_no_record(start):
            # It is one line, as records() has it, and its quotes are looked at there.
            newline = next((end for end in (b"\r\n", b"\n", b"\r") if end in start), b"")
            if newline:
                return start.partition(newline)[0], newline
        if match is None:
            looked_at = min(len(start), HEADER_BYTES)
            problem = f"no line ends in its first {looked_at:,} bytes"
            if self.dialect.quote in start:
                problem = "a quote in it is not closed"
            what = "line" if self.format.header else "header"
            raise BatchError(f"{self.path}, line 1: the {what} can't be read: {problem}")
        return match[1], match[2]

    def _is_no_record(self, start: bytes) -> bool:
        """Whether what a text begins with is no record: it has a stray quote, or a quoted field that never ends."""
        return self._is_short or scan(b"\n" + start, 0, LF, self.dialect).has_stray

    def _names(self) -> list[str]:
        try:
            text = self.header.decode()
        except UnicodeDecodeError as error:
            raise BatchError(
                f"{self.path}, line 1: the header can't be read: not UTF-8: byte 0x{self.header[error.start]:02x} at "
                f"position {error.start + 1}. Declare the dataset's encoding, or convert the file to UTF-8."
            ) from None
        if "\0" in text:
            raise BatchError(f"{self.path}, line 1: the header can't be read: it has a NUL byte")
        try:
            reader = csv.reader(
                io.StringIO(text, newline=""),
                delimiter=self.format.delimiter,
                quotechar=self.format.quote,
                strict=True,
            )
            return next(reader, [])
        except csv.Error as error:
            raise BatchError(f"{self.path}, line 1: the header can't be read: {error}") from None

    def _cut_off(self) -> BatchError:
        return BatchError(
            f"{self.path}: the last line has no line end, so the file is cut off or still being written. "
            f"If it is whole, add the line end."
        )


class _Hashed(RawIOBase):
    """What is read from a file, with the SHA-256 of it."""

    def __init__(self, file: Source) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._file.read(size)
        self.digest.update(data)
        return data


class _Decoded(RawIOBase):
    """What is read from a file in some encoding, in UTF-8."""

    def __init__(self, file: Any, encoding: str, name: str) -> None:
        self._file, self._encoding, self._name = file, encoding, name
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._line_ends = Counter[str]()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """About as much: a character that takes one byte in the file may take three."""
        while True:
            data = bytes(self._file.read(size))
            before = self._decoder.getstate()
            try:
                text = self._decoder.decode(data, final=not data)
            except UnicodeError as error:
                if not isinstance(error, UnicodeDecodeError):  # UTF-16 that does not begin with its mark
                    raise BatchError(f"{self._name}: {error}. Declare utf-16-le or utf-16-be.") from None
                self._decoder.setstate(before)
                kept = len(before[0])  # of the block before, which the error counts in
                if not data:
                    raise BatchError(
                        f"{self._name}: the file ends amid a character of {self._encoding}, so it is cut off or still "
                        f"being written. Deliver it again."
                    ) from None
                self._count(self._decoder.decode(data[: max(error.start - kept, 0)]))
                line = 1 + (self._line_ends["\n"] or self._line_ends["\r"])
                wrong = error.object[error.start : error.end].hex()
                raise BatchError(
                    f"{self._name}, line {line:,}: not {self._encoding}: 0x{wrong} is no character of it. Nothing was "
                    f"loaded. Is it the encoding that the file is in?"
                ) from None
            self._count(text)
            if text or not data:
                return text.encode()

    def _count(self, text: str) -> None:
        for line_end in "\r\n":
            self._line_ends[line_end] += text.count(line_end)


def fields(record: bytes, dialect: Dialect = DEFAULT.dialect) -> list[bytes]:
    """The fields of a record without stray quotes, as they stand in it, their quotes included.

    :raises ValueError: it has one.
    """
    found = []
    position = 0
    while True:
        match = dialect.field.match(record, position)
        if match is None:
            raise ValueError("the record has a stray quote")
        found.append(match[1])
        if match.end() == match.end(1):
            return found
        position = match.end()


def count(data: bytes, byte: int) -> int:
    """How often a byte is there. bytes.count takes six times as long where it is as frequent as line ends are."""
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) == byte))


class Scan(NamedTuple):
    """What a block of text has in it: quotes, line ends outside of quotes, and whether a quote is a stray one."""

    quotes: int
    record_ends: int
    has_stray: bool


def scan(window: bytes, quotes: int, end: int, dialect: Dialect = DEFAULT.dialect) -> Scan:
    """Look at a block of text for a quote that neither begins nor ends a field nor is doubled, and count its records.

    PostgreSQL begins and ends quoting anywhere in a field: a stray pair vanishes, and what is between two strays, line
    ends included, becomes one field.

    :param window: the last byte of the block before, then the block.
    :param quotes: number of quotes before the block; after an even number the next one begins a field.
    :param end: the last byte of a line end.
    :param dialect: delimiter and quote.
    """
    text = np.frombuffer(window, np.uint8)
    places = np.flatnonzero(text[1:] == dialect.quote_byte)  # in the block, so one further in the window
    begins, ends = places[quotes % 2 :: 2], places[1 - quotes % 2 :: 2]
    if len(ends) and ends[-1] + 2 == len(text):
        ends = ends[:-1]  # what is after it is in the next block
    has_stray = not (dialect.beside_a_quote[text[begins]].all() and dialect.beside_a_quote[text[ends + 2]].all())
    if window[:1] == dialect.quote and quotes % 2 == 0 and not dialect.beside_a_quote[text[1]]:
        has_stray = True  # the quote before this block
    line_ends = np.flatnonzero(text[1:] == end)
    if len(places):
        line_ends = line_ends[(quotes + np.searchsorted(places, line_ends)) % 2 == 0]
    record_ends = len(line_ends) if len(places) or quotes % 2 == 0 else 0
    return Scan(len(places), record_ends, has_stray)


def _not_utf8(data: bytes, starts: list[int]) -> Iterator[tuple[int, str]]:
    """Which of the records that start there are not UTF-8 text, and where."""
    view = memoryview(data)
    start = 0
    while start < len(data):
        try:
            str(view[start:], "utf-8")
        except UnicodeDecodeError as error:
            wrong = start + error.start
            place = bisect_right(starts, wrong) - 1
            yield place, f"not UTF-8: byte 0x{data[wrong]:02x} at position {wrong - starts[place] + 1} of the record"
            start = starts[place + 1] if place + 1 < len(starts) else len(data)
        else:
            break


def _next(sorted_numbers: NDArray[np.int64], least: int) -> int | None:
    """The first of them that is not less than least, or None."""
    place = np.searchsorted(sorted_numbers, least)
    return int(sorted_numbers[place]) if place < len(sorted_numbers) else None
