"""Which files a run loads: those that a path, a glob or a URL names, below a root, and that the ledger does not know.

On a disk no symbolic link is followed below a root: neither when files are looked for nor when they are opened.
"""

import glob
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from batch_store import BatchError, Below, StoredPath, missing, shown, version_of
from psycopg import Connection

# What a folder stands for.
CSV = ("*.csv", "*.csv.gz")
# No pattern means these: uploads under way, and what is hidden.
UNDER_WAY = (".part", ".tmp", ".crdownload", ".filepart", "~")
MAGIC = re.compile(r"[*?[]")
ANY_DEPTH = "**"
FILE_URL = "file://"

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
        With * ? [...] or ** in it a pattern, unless there is a file that is called so.
    :param roots: folders or URLs. What is not below one of them is refused.
    :param open_path: makes a path of the URL of a root, such as airflow.sdk.ObjectStoragePath.
    :raises BatchError: it is below no root, or there is no such file; a name is no text.
    """
    root, rest = _below(source, roots)
    parts = [part for part in rest.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise BatchError(f"source {source!r}: it has .. in it. Say the path without.")
    local = _local(root)
    found = _on_disk(local, parts, source) if local else _in_store(open_path(root), root, "/".join(parts), source)
    files = [file._replace(name=_name_of(file.url, roots)) for file in found]
    for file in files:
        if not file.name.isprintable():
            raise BatchError(f"{file.name!r}: a name that is no text, or has line ends in it. Rename the file.")
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
    known = {name for (name,) in conn.execute(KNOWN, (*columns, table))}
    return [file for file in files if file.name not in known], [file for file in files if file.name in known]


def _local(root: str) -> str | None:
    """The folder that a root is, links in it resolved; None when it is a URL of a store."""
    if root.startswith(FILE_URL):
        root = root.removeprefix(FILE_URL)
    return None if "://" in root else os.path.realpath(root)


def _below(source: str, roots: Sequence[str]) -> tuple[str, str]:
    """The root that a source is below, the longest if there are several, and the rest of it."""
    source = source.strip()
    is_url = "://" in source and not source.startswith(FILE_URL)
    source = source.removeprefix(FILE_URL)
    if not is_url and not source.startswith("/"):
        return roots[0], source
    for root in sorted(roots, key=len, reverse=True):
        local = _local(root)
        if (local is None) != is_url:
            continue
        for prefix in dict.fromkeys([root.removeprefix(FILE_URL), local or root]):
            if source == prefix.rstrip("/") or source.startswith(prefix.rstrip("/") + "/"):
                return root, source[len(prefix.rstrip("/")) + 1 :]
    raise BatchError(
        f"source {shown(source)!r} is below none of {', '.join(shown(root) for root in roots)}: name its folder in "
        f"WAREHOUSE_SOURCES, or bring the file there"
    )


def _name_of(url: str, roots: Sequence[str]) -> str:
    first = _local(roots[0]) or roots[0]
    prefix = first.rstrip("/") + "/"
    return url.removeprefix(prefix) if url.startswith(prefix) else shown(url)


def _natural(name: str) -> list[str | int]:
    """Text and numbers in turn, so that two names are compared like with like."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _is_meant(name: str, pattern: str) -> bool:
    """Whether a pattern means a file or folder of this name."""
    return (
        fnmatchcase(name, pattern)
        and (pattern.startswith(".") or not name.startswith("."))
        and (not name.endswith(UNDER_WAY) or not MAGIC.search(pattern))
    )


def _on_disk(root: str, parts: list[str], source: str) -> Iterator[Found]:
    try:
        state = _state(root, parts)
    except OSError as error:
        if any(MAGIC.search(part) for part in parts) and isinstance(error, FileNotFoundError):
            yield from _matching(root, [], parts)
            return
        if isinstance(error, FileNotFoundError):
            raise missing(f"source {source!r}", error.strerror) from None
        raise BatchError(f"source {source!r}: {error.strerror}. No symbolic link is followed below {root}.") from None
    if stat.S_ISDIR(state.st_mode):
        for pattern in CSV:
            yield from _matching(root, parts, [pattern])
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


def _names(root: str, parts: Sequence[str]) -> list[str]:
    """What is in a folder; nothing if there is none."""
    try:
        folder = _folder(root, parts)
    except (FileNotFoundError, NotADirectoryError):
        return []
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 # a path might lead elsewhere by now
    finally:
        os.close(folder)


def _file(root: str, parts: Sequence[str], state: os.stat_result) -> Found:
    # What is no file is found too: that it can't be loaded is said when it is opened, and keeps no other from it.
    return Found("/".join([root.rstrip("/"), *parts]), "", state.st_size, str(state.st_mtime_ns))


def _matching(root: str, above: list[str], patterns: list[str]) -> Iterator[Found]:
    """What a pattern means below a folder: files, and what is neither a file nor a folder."""
    pattern, *rest = patterns
    if pattern == ANY_DEPTH:
        yield from _matching(root, above, rest or ["*"])
    for name in _names(root, above):
        if not _is_meant(name, "*" if pattern == ANY_DEPTH else pattern):
            continue
        try:
            state = _state(root, [*above, name])
        except OSError:  # gone meanwhile, or exchanged
            continue
        if stat.S_ISDIR(state.st_mode):
            if pattern == ANY_DEPTH:
                yield from _matching(root, [*above, name], patterns)
            elif rest:
                yield from _matching(root, [*above, name], rest)
        elif pattern != ANY_DEPTH and (not rest or stat.S_ISLNK(state.st_mode)):
            yield _file(root, [*above, name], state)


def _in_store(at: Any, root: str, key: str, source: str) -> Iterator[Found]:
    fs, base = at.fs, at.path.rstrip("/")
    fs.invalidate_cache()  # or it may say what a listing of an hour ago said
    try:
        info = fs.info(f"{base}/{key}".rstrip("/"))
    except FileNotFoundError:
        info = None
    if info and info["type"] == "file":
        found = {f"{base}/{key}": info}
    elif info or MAGIC.search(key):
        found = {}
        for pattern in CSV if info else [key]:
            folder = f"{base}/{key}".rstrip("/") if info else base
            found |= fs.glob(f"{glob.escape(folder)}/{pattern}", detail=True)
        found = {
            path: info
            for path, info in found.items()
            if info["type"] == "file" and all(_is_meant(part, "*") for part in path[len(base) + 1 :].split("/"))
        }
    else:
        raise missing(f"source {source!r}", "no such object")
    for path, info in found.items():
        version = version_of(info)
        # Without one it can't be loaded, as the loader says.
        yield Found(f"{root.rstrip('/')}/{path[len(base) + 1 :]}", "", info["size"], version or "")
