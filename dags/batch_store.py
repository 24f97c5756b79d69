"""Where a batch file is: on disk, or in an object store such as S3, by the shape of ObjectStoragePath and UPath.

Imports neither: whoever has such a path has the file system that it belongs to.
"""

import errno
import os
import re
import stat
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO, RawIOBase
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

# One ranged GET, and how many of them are held, whatever the size of the object: the one that is read, the next, which
# comes meanwhile, and one more, so that a look at the last byte does not cost the first block.
OBJECT_BLOCK_BYTES = 8 * 1024 * 1024
OBJECT_BLOCKS = 3
# What tells one version of an object from the next, in the words of S3, Google, Azure and SFTP, as far as there.
# The first of them that there is: with an ETag the time does not count, as the same bytes may be written again.
VERSION = [
    *("ETag", "etag", "generation", "LastModified", "last_modified", "updated"),
    *("mtime", "created", "modificationTime", "modify"),
]
# As ObjectStoragePath and UPath call the file system of this machine.
LOCAL = ("", "file", "local")

Result = TypeVar("Result")


class BatchError(Exception):
    """The batch can't be loaded as it is, now or later; nothing was written.

    The message names the file, the line, column and value where there are any, and the remedy.
    """


class StoredPath(Protocol):
    """What airflow.sdk.ObjectStoragePath and upath.UPath have: a path in a file system of fsspec."""

    @property
    def protocol(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def fs(self) -> Any: ...


class Below(NamedTuple):
    """A file on disk below a root, of which no part is a symbolic link: it is opened step by step, to be sure."""

    root: str
    parts: tuple[str, ...]

    def __str__(self) -> str:
        return "/".join([self.root.rstrip("/"), *self.parts])


class State(NamedTuple):
    """Bytes of a file, and what changes when it is written."""

    size: int
    version: Hashable


class Source(Protocol):
    """A file that is open for reading."""

    @property
    def opened(self) -> State:
        """As it was when it was opened: what is read is of this state, or the read fails."""

    def read(self, size: int = -1, /) -> Any: ...
    def readinto(self, buffer: Any, /) -> Any: ...
    def readable(self) -> bool: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def tell(self) -> int: ...
    def close(self) -> None: ...
    def state(self) -> State:
        """As it is now, not as it was when it was opened."""

    def changed(self, before: int, now: int) -> BatchError:
        """What to say of two states that differ, by their bytes."""


def shown(path: "Path | StoredPath | Below | str") -> str:
    """The path as text for messages and the ledger. A user or connection stays; a password or signature does not."""
    text = re.sub(r"^(https?://[^?]*)\?.*", r"\1", str(path), flags=re.DOTALL)
    # A port is no password; S3 has no port there, and keys that may look like one.
    return re.sub(r"^(?:(s3a?://[^/:@]*):|(\w+://[^/:@]*):(?!\d+/))[^@]*@", r"\1\2@", text)


def version_of(info: dict[str, Any]) -> str | None:
    """What tells one version of an object from the next, of what its store says of it; None when there is nothing."""
    return next((str(info[name]) for name in VERSION if info.get(name)), None)


def open_source(path: Path | StoredPath | Below) -> Source:
    """Open a batch file for reading.

    :raises BatchError: it is not there, or no file.
    :raises PermissionError: the store does not let us look at the object.
    """
    if isinstance(path, Below | str | os.PathLike):
        return _open_file(path, shown(path))
    if path.protocol in LOCAL:
        return _open_file(path.path, shown(path))
    return _Object(path.fs, path.path, shown(path))


class _File(FileIO):
    """A file on disk."""

    shown: str
    opened: State

    def state(self) -> State:
        now = os.fstat(self.fileno())
        return State(now.st_size, now.st_mtime_ns)

    def changed(self, before: int, now: int) -> BatchError:
        return BatchError(
            f"{self.shown}: the file changed while it was read ({before:,} bytes, then {now:,}): "
            f"it is still being written. Write it beside and rename it when it is whole."
        )


def _open_file(path: str | os.PathLike[str] | Below, name: str) -> _File:
    try:
        # O_NONBLOCK: opening a FIFO would wait for its writer, for ever.
        fd = _open_below(path) if isinstance(path, Below) else os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if getattr(error, "errno", None) == errno.ENXIO:  # a socket
            raise BatchError(f"{name}: not a regular file") from None
        raise missing(name, getattr(error, "strerror", error)) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise BatchError(f"{name}: not a regular file")
    file = _File(fd, "rb")
    file.shown, file.opened = name, file.state()
    return file


def _open_below(path: Below) -> int:
    folder = os.open(path.root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in path.parts[:-1]:
            folder, above = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder), folder
            os.close(above)
        return os.open(path.parts[-1], os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise BatchError(
                f"{path}: a symbolic link, or below one: none is followed below {path.root}. Bring the file itself."
            ) from None
        raise
    finally:
        os.close(folder)


class _Object(RawIOBase):
    """An object, in one version of it.

    What s3fs and its like raise is let through: a store that is away or busy will be back. Only where it has another
    version of the object now, or none, the error is about the batch.
    """

    def __init__(self, fs: Any, path: str, name: str) -> None:
        self.fs, self.path, self.shown = fs, path, name
        self.opened = self.state()
        self._file = self._ask(lambda: fs.open(path, "rb", cache_type="none"))
        self._thread = ThreadPoolExecutor(1)  # the only one that reads from the file
        self._blocks: dict[int, Future[bytes]] = {}
        self._at = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """At most to the end of a block."""
        if self._at >= self.opened.size:
            return b""
        number, start = divmod(self._at, OBJECT_BLOCK_BYTES)
        data = self._block(number)[start : start + size if size >= 0 else None]
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (self.opened.size if whence == os.SEEK_END else 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        if not self.closed and hasattr(self, "_thread"):  # else it could not be opened
            self._thread.shutdown(cancel_futures=True)
            self._blocks.clear()
            self._file.close()
        super().close()

    def _block(self, number: int) -> bytes:
        wanted = [number, number + 1]
        for block in wanted:
            if block not in self._blocks and block * OBJECT_BLOCK_BYTES < self.opened.size:
                self._blocks[block] = self._thread.submit(self._fetch, block * OBJECT_BLOCK_BYTES)
        others = [block for block in self._blocks if block not in wanted]
        for block in others[: max(len(self._blocks) - OBJECT_BLOCKS, 0)]:
            del self._blocks[block]
        try:
            return self._blocks[number].result()
        except Exception as error:
            self._explain(error)

    def _fetch(self, start: int) -> bytes:
        size = min(OBJECT_BLOCK_BYTES, self.opened.size - start)
        self._file.seek(start)
        data: bytes = self._file.read(size)
        if len(data) != size:
            raise OSError(f"{self.shown}: the store's answer ended after {len(data):,} of {size:,} bytes")
        return data

    def state(self) -> State:
        self.fs.invalidate_cache(self.path)  # or it may say what a listing of an hour ago said
        info = self._ask(lambda: self.fs.info(self.path))
        if info["type"] != "file":
            raise BatchError(f"{self.shown}: not a regular file")
        version = version_of(info)
        if version is None:
            raise BatchError(
                f"{self.shown}: the store does not tell one version of an object from the next, so it could be "
                f"replaced while it is read. Copy the file to a disk, or to a store that does."
            )
        return State(info["size"], version)

    def changed(self, before: int, now: int) -> BatchError:
        return BatchError(
            f"{self.shown}: the file changed while it was read ({before:,} bytes, then {now:,}): another object was "
            f"written under its name. Give each delivery a name of its own, and load it again."
        )

    def _ask(self, question: Callable[[], Result]) -> Result:
        try:
            return question()
        except FileNotFoundError as error:
            raise missing(self.shown, f"no such object ({error})") from None
        except PermissionError as error:
            raise PermissionError(
                f"{self.shown}: {error}. The credentials are wrong or have expired, or may not read the object "
                f"(s3:GetObject); or there is none, which a store tells only who may list the bucket (s3:ListBucket)."
            ) from error

    def _explain(self, error: Exception) -> NoReturn:
        """What a failed read means: the store refuses the rest of an object that was replaced or removed."""
        try:
            now = self.state()
        except BatchError:
            raise
        except Exception:
            raise error from None  # the store is away
        if now != self.opened:
            raise self.changed(self.opened.size, now.size) from error
        raise error


def missing(name: str, why: object) -> BatchError:
    """What to say of a file that is not there."""
    return BatchError(f"{name}: {why}. Has the file been moved, or not been delivered yet?")
