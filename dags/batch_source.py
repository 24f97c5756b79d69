"""Which files a run loads: those that a path, a glob or a URL names, below a root, and that the ledger does not know.

On a disk no symbolic link is followed below a root: neither when files are looked for nor when they are opened.
"""

import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from batch_store import BatchError, Below, StoredPath, missing, shown, version_of
from psycopg import Connection, Cursor
from psycopg.rows import tuple_row

# What a folder stands for, in any case: Windows writes ORDERS.CSV.
CSV = (".csv", ".csv.gz")
# No pattern means these: uploads under way, and what is hidden.
UNDER_WAY = (".part", ".tmp", ".crdownload", ".filepart", "~")
MAGIC = re.compile(r"[*?[]")
ANY_DEPTH = "**"
FILE_URL = "file://"
# From here on s3fs takes a key for the number of a version, and would read another object.
VERSION_MARK = "?versionId="
# Of names that can't be loaded, how many are said.
SHOWN_NAMES = 3

OpenPath = Callable[[str], Any]

KNOWN = """
SELECT f.name
FROM unnest(%s::text[], %s::bigint[], %s::text[]) AS f (name, bytes, version)
INNER JOIN raw.loads AS l ON f.name = l.batch_id AND f.bytes = l.bytes AND f.version = l.source_version
WHERE l.table_name = %s
"""


class Found(NamedTuple):
    """A file that a source names.

    :param url: its path or URL, for open_file.
    :param name: what the ledger knows it by, as batch_id: its path below the first root, else all of the URL.
    :param size: in bytes.
    :param version: what tells it from another one of its name: mtime in ns, or what the store says.
    """

    url: str
    name: str
    size: int
    version: str


@dataclass(frozen=True)
class StoredObject:
    """An object by its key, whatever characters that has: a URL would have to be read again."""

    protocol: str
    path: str
    fs: Any
    url: str

    def __str__(self) -> str:
        return self.url


def find_files(source: str, *, roots: Sequence[str], open_path: OpenPath) -> list[Found]:
    """The files that a source names, in the natural order of their names: 2.csv before 10.csv.

    :param source: a path or URL, absolute or below the first root. A folder stands for its *.csv and *.csv.gz files.
        With * ? [...] or ** in it a pattern, but for what is called so.
    :param roots: folders or URLs. What is not below one of them is refused.
    :param open_path: makes a path of the URL of a root, such as airflow.sdk.ObjectStoragePath.
    :raises BatchError: it is below no root, or there is no such file; a root or bucket is not there; a name is no text.
    :raises PermissionError: a folder or bucket may not be listed.
    :raises Exception: of the store's client: it is away or busy. Call again.
    """
    source = source.strip()
    _refuse_names([source] if not _is_text(source) else [])
    root, rest = _below(source, roots)
    parts = [part for part in rest.split("/") if part not in ("", ".")]
    local = _local(root)
    found = _on_disk(local, parts, source) if local else _in_store(open_path(root), root, parts, source)
    files = [file._replace(name=_name_of(file.url, roots)) for file in found]
    _refuse_names([file.name for file in files if not _is_text(file.name)])
    for file in files:
        if not local and VERSION_MARK in file.url:
            raise BatchError(f"{file.name!r}: {VERSION_MARK} in a name means a version to S3. Rename the object.")
    return sorted(files, key=lambda file: (_natural(file.name), file.name))


def open_file(url: str, *, roots: Sequence[str], open_path: OpenPath) -> Below | StoredPath:
    """The path of a file that was found, for load_batch.

    :raises BatchError: it is below none of the roots.
    """
    root, rest = _below(url, roots)
    local = _local(root)
    if local:
        return Below(local, tuple(rest.split("/")))
    at = open_path(root)
    return StoredObject(at.protocol, f"{at.path.rstrip('/')}/{rest}", at.fs, url)


def new_files(conn: Connection[Any], table: str, files: Sequence[Found]) -> tuple[list[Found], list[Found]]:
    """Those that are to be loaded, and those that the ledger knows: by name, bytes and version.

    One that was touched or replaced is to be loaded: the loader reads it, and finds that it is the same or refuses it.

    :param table: such as "raw.orders".
    """
    columns = ([file.name for file in files], [file.size for file in files], [file.version for file in files])
    with Cursor(conn, row_factory=tuple_row) as cur:  # not conn.cursor(): the caller's rows may be of another kind
        known = {name for (name,) in cur.execute(KNOWN, (*columns, table))}
    return [file for file in files if file.name not in known], [file for file in files if file.name in known]


def _is_text(name: str) -> bool:
    """Whether the ledger can keep it and a log show it in one line."""
    return all(char.isprintable() or unicodedata.category(char) == "Zs" for char in name)


def _refuse_names(names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else ""
        raise BatchError(
            f"{', '.join(map(repr, names[:SHOWN_NAMES]))}{more}: a name that is no text, or has line ends in it. "
            f"Rename the file."
        )


def _local(root: str) -> str | None:
    """The folder that a root is, links in it resolved; None when it is a URL of a store."""
    if root.startswith(FILE_URL):
        root = root.removeprefix(FILE_URL)
    return None if "://" in root else os.path.realpath(root)


def _below(source: str, roots: Sequence[str]) -> tuple[str, str]:
    """The root that a source is below, the longest if there are several, and the rest of it."""
    is_url = "://" in source and not source.startswith(FILE_URL)
    path = source.removeprefix(FILE_URL)
    if not is_url and not path.startswith("/"):
        first = _local(roots[0])
        is_url, path = first is None, f"{(first or roots[0]).rstrip('/')}/{path}"
    found = [
        (len(prefix), root, path[len(prefix) + 1 :])
        for root in roots
        if (_local(root) is None) == is_url
        for prefix in (root.removeprefix(FILE_URL).rstrip("/"), (_local(root) or root).rstrip("/"))
        if f"{path}/".startswith(f"{prefix}/")
    ]
    if not found:
        raise BatchError(
            f"source {shown(source)!r} is below none of {', '.join(shown(root) for root in roots)}: name its folder "
            f"in WAREHOUSE_SOURCES, or bring the file there"
        )
    _, root, rest = max(found)
    if ".." in rest.split("/"):
        raise BatchError(f"source {shown(source)!r}: it has .. in it. Say the path without.")
    return root, rest


def _name_of(url: str, roots: Sequence[str]) -> str:
    first = _local(roots[0]) or roots[0]
    prefix = first.rstrip("/") + "/"
    return url.removeprefix(prefix) if url.startswith(prefix) else shown(url)


def _natural(name: str) -> list[str | int]:
    """Text and numbers in turn, so that two names are compared like with like."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _is_meant(name: str, pattern: str) -> bool:
    """Whether one part of a pattern means a file or folder of this name."""
    return name == pattern or (
        fnmatchcase(name, pattern)
        and (pattern.startswith(".") or not name.startswith("."))
        and not name.endswith(UNDER_WAY)
    )


class _Pattern:
    """Parts of a path, each a pattern, and how far a path has come in them.

    That is a set of places, because ** stands for any number of folders: so each folder is looked at once, and each
    file is found once.
    """

    def __init__(self, parts: Sequence[str]) -> None:
        repeated = [part == above == ANY_DEPTH for part, above in zip(parts, [None, *parts], strict=False)]
        self.parts = [part for part, is_repeated in zip(parts, repeated, strict=True) if not is_repeated]
        if self.parts[-1] == ANY_DEPTH:
            self.parts.append("*")
        self.start = self._and_beyond({0})

    def _and_beyond(self, places: set[int]) -> frozenset[int]:
        """With the places behind a **, which may stand for no folder at all."""
        return frozenset(places | {place + 1 for place in places if self.parts[place : place + 1] == [ANY_DEPTH]})

    def after(self, places: frozenset[int], name: str) -> frozenset[int]:
        """Where a file or folder of this name leads from there: nowhere, if it is not meant."""
        meant = [place for place in places if place < len(self.parts) and _is_meant(name, self.parts[place])]
        return self._and_beyond({place + (self.parts[place] != ANY_DEPTH) for place in meant})

    def is_whole(self, places: frozenset[int]) -> bool:
        """Whether it means a file that has come here."""
        return len(self.parts) in places

    def goes_on(self, places: frozenset[int]) -> bool:
        """Whether it may mean something in a folder that has come here."""
        return any(place < len(self.parts) for place in places)

    def means(self, parts: Sequence[str], places: frozenset[int]) -> bool:
        """Whether it means the file to which these parts lead from there."""
        for part in parts:
            places = self.after(places, part)
        return self.is_whole(places)


def _split(parts: list[str], is_folder: Callable[[list[str]], bool]) -> tuple[list[str], _Pattern]:
    """Folders that are called so, whatever characters that has, and the pattern of what is below them."""
    at = 0
    while at < len(parts) - 1 and is_folder(parts[: at + 1]):
        at += 1
    return parts[:at], _Pattern(parts[at:])


# On a disk


def _on_disk(root: str, parts: list[str], source: str) -> Iterator[Found]:
    if not os.path.isdir(root):  # noqa: PTH112 # a path would be no shorter
        raise BatchError(f"source {source!r}: there is no folder {root} to load from. Is it mounted?")
    try:
        state = _state(root, parts)
    except FileNotFoundError as error:
        if not any(MAGIC.search(part) for part in parts):
            raise missing(f"source {source!r}", f"{error.strerror} below {root}") from None
        yield from _matching(root, *_split(parts, lambda parts: _is_folder(root, parts)))
        return
    except NotADirectoryError as error:
        raise BatchError(f"source {source!r}: {error.strerror}. No symbolic link is followed below {root}.") from None
    except PermissionError as error:
        raise _unreadable(f"source {source!r}", error) from None
    except OSError as error:  # such as a name that is too long
        raise BatchError(f"source {source!r}: {error.strerror}. Correct it.") from None
    if stat.S_ISDIR(state.st_mode):
        yield from (file for file in _matching(root, parts, _Pattern(["*"])) if file.url.lower().endswith(CSV))
    elif stat.S_ISREG(state.st_mode):
        yield _file(root, parts, state)
    else:
        raise BatchError(f"source {source!r}: not a regular file. No symbolic link is followed below {root}.")


def _folder(root: str, parts: Sequence[str]) -> int:
    """A folder, open for reading; none of those on the way is a link.

    :raises OSError: it is not there, or no folder.
    """
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for part in parts:
        above = fd
        try:
            fd = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
        finally:
            os.close(above)
    return fd


def _state(root: str, parts: Sequence[str]) -> os.stat_result:
    """Of a file or folder, or of a link itself.

    :raises OSError: it is not there, or below something that is no folder.
    """
    folder = _folder(root, parts[:-1])
    try:
        return os.stat(parts[-1], dir_fd=folder, follow_symlinks=False) if parts else os.fstat(folder)
    finally:
        os.close(folder)


def _is_folder(root: str, parts: Sequence[str]) -> bool:
    try:
        return stat.S_ISDIR(_state(root, parts).st_mode)
    except FileNotFoundError:
        return False


def _file(root: str, parts: Sequence[str], state: os.stat_result) -> Found:
    # What is no file is found too: that it can't be loaded is said when it is opened, and keeps no other from it.
    return Found("/".join([root.rstrip("/"), *parts]), "", state.st_size, str(state.st_mtime_ns))


def _matching(root: str, above: Sequence[str], pattern: _Pattern) -> Iterator[Found]:
    """What a pattern means below a folder: files, what is neither file nor folder, and links where it would go on."""
    folders = [([*above], pattern.start)]
    while folders:
        parts, places = folders.pop()
        for name, state, leads_on in _entries(root, parts):
            after = pattern.after(places, name)
            goes_on = leads_on and pattern.goes_on(after)
            if stat.S_ISDIR(state.st_mode):
                if goes_on:
                    folders.append(([*parts, name], after))
            elif goes_on or pattern.is_whole(after):
                yield _file(root, [*parts, name], state)


def _entries(root: str, parts: Sequence[str]) -> list[tuple[str, os.stat_result, bool]]:
    """Of each entry of a folder its name, what it is, and whether it is a folder or a link that may lead to one."""
    entries = []
    try:
        folder = _folder(root, parts)
        try:
            with os.scandir(folder) as found:
                for entry in found:
                    try:
                        state = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:  # removed meanwhile
                        continue
                    entries.append((entry.name, state, _leads_on(entry)))
        finally:
            os.close(folder)
    except FileNotFoundError:  # removed meanwhile
        return []
    except NotADirectoryError:
        raise BatchError(
            f"{'/'.join([root, *parts])}: exchanged while it was read, for something that is no folder. "
            f"No symbolic link is followed below {root}."
        ) from None
    except PermissionError as error:
        raise _unreadable("/".join([root, *parts]), error) from None
    return entries


def _leads_on(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to where we may not look
        return True


def _unreadable(what: str, error: PermissionError) -> PermissionError:
    return PermissionError(f"{what}: {error.strerror}. Let Airflow's user read and enter the folder.")


# In a store


def _in_store(at: Any, root: str, parts: list[str], source: str) -> Iterator[Found]:
    fs, base = at.fs, at.path.rstrip("/")
    fs.invalidate_cache()  # or it may say what a listing of an hour ago said

    def path_of(parts: Sequence[str]) -> str:
        return "/".join([base, *parts])

    def is_folder(parts: Sequence[str]) -> bool:
        if not MAGIC.search(parts[-1]):
            return True  # or nothing is listed below it: no need to ask
        info = _info(fs, path_of(parts))
        return bool(info) and info["type"] == "directory"

    try:
        info = _info(fs, path_of(parts))
        if info and info["type"] == "file":
            found = [info | {"name": path_of(parts)}]
        elif info:
            listed = _objects(fs, base, parts, _Pattern(["*"]))
            found = [info for info in listed if info["name"].lower().endswith(CSV)]
        elif any(MAGIC.search(part) for part in parts):
            found = _objects(fs, base, *_split(parts, is_folder))
        else:
            raise missing(f"source {shown(source)!r}", "no such object")
    except FileNotFoundError as error:
        raise missing(f"source {shown(source)!r}", f"no such bucket ({error})") from None
    except PermissionError as error:
        raise PermissionError(
            f"source {shown(source)!r}: {error}. The credentials are wrong or have expired, or may not list the bucket "
            f"(s3:ListBucket)."
        ) from error
    for info in found:
        # Without a version it can't be loaded, as the loader says.
        yield Found(f"{root.rstrip('/')}/{info['name'][len(base) + 1 :]}", "", info["size"], version_of(info) or "")


def _info(fs: Any, path: str) -> Any:
    try:
        return fs.info(path)
    except FileNotFoundError:
        return None


def _objects(fs: Any, base: str, above: Sequence[str], pattern: _Pattern) -> list[Any]:
    """What a store says of the objects that a pattern means below a folder.

    Not fs.glob: what it may not list, or can't at the moment, it leaves out in silence.

    :raises FileNotFoundError: there is no such bucket.
    """
    objects = []
    folders = [("/".join([base, *above]), pattern.start)]
    while folders:
        folder, places = folders.pop()
        if any(pattern.parts[place : place + 1] == [ANY_DEPTH] for place in places):
            listed = list(fs.find(folder, detail=True).values())  # a thousand objects per request, of any depth
        else:
            try:
                listed = fs.ls(folder, detail=True)
            except FileNotFoundError:
                listed = list(fs.find(folder, detail=True).values())  # nothing, unless there is no bucket
        for info in listed:
            parts = info["name"][len(folder) + 1 :].split("/")
            if not parts[-1]:  # the mark of a folder
                continue
            if info["type"] == "directory":
                after = pattern.after(places, parts[-1])
                if pattern.goes_on(after):
                    folders.append((info["name"], after))
            elif info["type"] == "file" and pattern.means(parts, places):
                objects.append(info)
    return objects
