"""Atomic writes, which an interruption cannot leave half done, and file locks."""

import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, Literal, overload

IN_THE_WAY = (errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENXIO, errno.EFBIG)
"""Errors of opening a path at which there is something other than a usable file."""


@overload
def open_regular(
    path: Path | str, mode: Literal["rb"] = "rb", flags: int = 0, buffering: Literal[-1] = -1
) -> BufferedReader: ...
@overload
def open_regular(path: Path | str, mode: str, flags: int = 0, buffering: int = -1) -> IO[Any]: ...
def open_regular(path: Path | str, mode: str = "rb", flags: int = 0, buffering: int = -1) -> IO[Any]:
    """Opens a file at an untrusted path; does not block on a FIFO or read a device.

    `flags`: flags of `os.open` in addition to those of the mode. Raises OSError, also for anything but a regular file.
    """
    guard = os.O_NONBLOCK | os.O_NOCTTY | flags
    file = open(path, mode, buffering, opener=lambda name, own: os.open(name, own | guard, 0o666))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_text(path: Path, limit: int = 16 * 2**20) -> str:
    """The UTF-8 text of a small untrusted file; does not block on a FIFO.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read, is not a regular file, or has more than `limit` bytes.
        UnicodeDecodeError: it is not UTF-8.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"more than {limit} bytes", str(path))
    return content.decode("utf-8")


def write_whole(path: Path, text: str) -> None:
    """Writes a file atomically: syncs a new file to disk, then renames it. On OSError, the old file stays unchanged."""
    write_parts(path, [text.encode()])


def write_parts(path: Path, parts: Iterable[bytes]) -> None:
    """Like `write_whole`, part by part."""
    with replaced(path) as temporary, open(temporary, "xb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yields where to write a new file, which then replaces the one at `path`; if the block raises, nothing remains."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with suppress(FileNotFoundError):
            temporary.unlink()  # left by an earlier process with this number, or a link to a foreign file
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def sync_folder(folder: Path | str) -> None:
    """Makes renames in a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: IO[Any], seconds: float, pause: float) -> None:
    """Takes the lock of a file, which keeps other processes out if the file system supports locks.

    Tries every `pause` seconds. Raises TimeoutError if another process holds the lock for more than `seconds`.
    """
    give_up = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return
            if time.monotonic() > give_up:
                raise TimeoutError(f"{file.name}: another process holds its lock") from error
            time.sleep(pause)


def unlock(file: IO[Any]) -> None:
    """Releases the lock of a file. Closing is not enough: a worker forked in the meantime has the file open, too."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def new_folder(path: Path, may_replace: Callable[[Path], bool]) -> Iterator[Path]:
    """Yields an empty folder to fill, which then stands at `path`; if the block raises, nothing remains of it.

    `may_replace`: whether the folder that stands there, and is not empty, may be replaced.

    Raises OSError, also if something else stands there.
    """
    if path.exists() and not path.is_dir():
        raise OSError(errno.ENOTDIR, "there is something other than a folder", str(path))
    replaced = path.is_dir() and any(path.iterdir())
    if replaced and not may_replace(path):
        raise OSError(errno.ENOTEMPTY, "the folder is not empty", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{kind}{os.getpid()}") for kind in ("", "old"))
    shutil.rmtree(temporary, ignore_errors=True)  # left by an earlier process with this number
    try:
        temporary.mkdir()
        yield temporary
        if replaced:
            os.rename(path, old)
        os.rename(temporary, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    finally:
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)
