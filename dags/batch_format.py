"""How the files of a dataset are written, declared once: by default CSV as RFC 4180 has it, in UTF-8."""

import codecs
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any

import numpy as np

# What is decoded while it is read: every ASCII character is the one byte or, in UTF-16, two; no two bytes are one
# character, but for some 400 that cp932 and 14 that cp950 and big5 have twice.
ENCODINGS = re.compile(
    r"utf-8|utf-16(-[lb]e)?|ascii|iso8859-\d+|koi8-[rtu]|mac-(cyrillic|greek|iceland|latin2|roman|turkish)"
    r"|cp(125\d|437|737|775|85[02578]|86[0-356]|866|869|874)"
    r"|gb18030|gbk|gb2312|big5|euc_jp|euc_kr|shift_jis|cp932|cp949|cp950"
)
# What PostgreSQL finds in its list of time zones. UTC+2 it would take for two hours west of it.
TIME_ZONE = re.compile(r"[A-Za-z_]+(/[A-Za-z_-]+)*|Etc/GMT[+-]\d\d?")
EXTRA = ("refuse", "ignore", "keep")
DATE_ORDERS = ("YMD", "DMY", "MDY")
DECIMALS = (".", ",")
# What PostgreSQL takes for neither delimiter nor quote of CSV, or what would make a file ambiguous.
NO_DELIMITER = "\r\n\0\\."
# Instants as numbers: how many of what are a second.
EPOCHS = {"epoch": (1, "seconds"), "epoch_ms": (1000, "milliseconds")}
# What depends on the server's language, or what PostgreSQL writes in its own time zone, whatever was read.
NO_PATTERN = re.compile("TZ|OF|TM", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a file may look like. Names of columns in the header are matched in any order, whatever is declared.

    :param delimiter: one ASCII character between fields, such as ";", "|" or a tab.
    :param quote: one ASCII character around fields that have one of these or a line end in them; doubled within.
    :param null: what stands for NULL where it is not in quotes, such as "NULL" or "\\N". A field with nothing in it
        is an empty text then, as one of "" is by default.
    :param encoding: as Python names it: utf-8, utf-16 (with its mark; else utf-16-le, utf-16-be), latin-1, cp1252 ...
    :param header: of files that have no header line, the names of their columns in order.
    :param columns: of header names that differ from those of the table: name in the file -> column.
    :param extra: what becomes of columns that the table does not have. "refuse": the file is; "ignore": they are left
        out; "keep": they go to the table's column `extra` jsonb, by their names in the file, as text.
    :param optional: columns that a file need not have: they get the column's DEFAULT, or NULL.
    :param decimal: the sign before the fraction of a number, "." or ",". With "," a number has no other sign in it:
        1.234 is bad, because nobody can know which of the two it is.
    :param date_order: what 03/04/2026 is, as in PostgreSQL's DateStyle. A date that begins with its year is clear.
    :param time_zone: of instants without an offset, such as "Europe/Berlin". PostgreSQL takes one that its clocks skip
        in spring to be an hour later, and one that they show twice in autumn to be the second.
    :param timestamps: of columns that PostgreSQL would not read: column -> a pattern of its to_timestamp, such as
        "YYYYMMDDHH24MISS", or "epoch" for seconds since 1970, "epoch_ms" for milliseconds. A value that does not come
        out as it went in is bad.
    :raises ValueError: one of them is none.
    """

    delimiter: str = ","
    quote: str = '"'
    null: str = ""
    encoding: str = "utf-8"
    header: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    extra: str = "refuse"
    optional: tuple[str, ...] = ()
    decimal: str = "."
    date_order: str = "YMD"
    time_zone: str = "UTC"
    timestamps: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("delimiter", "quote"):
            value = getattr(self, name)
            is_letter = name == "delimiter" and value.isalnum()
            if len(value) != 1 or not value.isascii() or value in NO_DELIMITER or is_letter:
                raise ValueError(f"{name} {value!r} is not one ASCII character that can be it, such as ; | or a tab")
        if self.delimiter == self.quote:
            raise ValueError(f"delimiter and quote are both {self.quote!r}")
        if self.null == "\\." or not self.null.isprintable() or {self.delimiter, self.quote} & {*self.null}:
            raise ValueError(f"null {self.null!r} has delimiter, quote or a line end in it, or is the end of data")
        try:
            known = codecs.lookup(self.encoding).name.removesuffix("-sig")
        except LookupError:
            known = ""
        if not ENCODINGS.fullmatch(known):
            raise ValueError(
                f"encoding {self.encoding!r} is none that is read: utf-8, utf-16, utf-16-le, utf-16-be, latin-1 and "
                f"the other iso8859 ones, cp1252 and the other code pages on top of ASCII, koi8-r, koi8-u, mac-roman, "
                f"gb18030, gbk, big5, shift_jis, euc_jp, euc_kr"
            )
        object.__setattr__(self, "encoding", known)
        for name, choices in (("extra", EXTRA), ("date_order", DATE_ORDERS), ("decimal", DECIMALS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, and must be one of {', '.join(choices)}")
        if not TIME_ZONE.fullmatch(self.time_zone):
            raise ValueError(f"time_zone is {self.time_zone!r}, and must be a name such as UTC or Europe/Berlin")
        for column, pattern in self.timestamps.items():
            if not pattern.strip() or NO_PATTERN.search(re.sub(r'"[^"]*"', "", pattern)):
                raise ValueError(
                    f"the pattern {pattern!r} of {column} must have something in it, but not TZ, OF or TM: PostgreSQL "
                    f"reads these but does not write them as they were. What is no part of it belongs in double quotes"
                )
        for name in ("optional", "header"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}, and must be a tuple of columns")

    def declared(self) -> dict[str, Any]:
        """What differs from the default, by name."""
        found = {}
        for one in fields(self):
            default = one.default if one.default is not MISSING else {}
            value = getattr(self, one.name)
            if value != default:
                found[one.name] = dict(value) if isinstance(value, Mapping) else value
        return found

    @property
    def dialect(self) -> "Dialect":
        return dialect(self.delimiter.encode(), self.quote.encode(), self.null.encode())


class Dialect:
    """Delimiter, quote and what stands for NULL, with what finds them in text."""

    def __init__(self, delimiter: bytes, quote: bytes, null: bytes) -> None:
        self.delimiter, self.quote, self.null = delimiter, quote, null
        self.quote_byte = quote[0]
        self.is_default = (delimiter, quote, null) == (b",", b'"', b"")
        # By byte: may it stand before the quote that begins a field and after the one that ends it? A doubled one may.
        self.beside_a_quote = np.isin(np.arange(256), list(b"\r\n" + delimiter + quote))
        d, q = re.escape(delimiter), re.escape(quote)
        quoted = q + b"[^" + q + b"]*+" + q
        # The first record, and what ends it: the rest of the file must end its lines in the same way.
        self.first_record = re.compile(rb"((?:[^" + q + rb"\r\n]++|" + quoted + rb")*+)(\r\n|\n|\r)")
        # A field as it stands in a record, quotes included.
        self.field = re.compile(rb"((?:[^" + q + d + rb"]++|" + quoted + rb")*+)(?:" + d + rb"|\Z)")
        self.quoted = re.compile(quoted)


@cache
def dialect(delimiter: bytes, quote: bytes, null: bytes) -> Dialect:
    return Dialect(delimiter, quote, null)


DEFAULT = Format()
