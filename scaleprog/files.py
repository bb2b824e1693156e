"""Small files that are there whole or as they were, whoever is interrupted meanwhile; locks on files."""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any


def open_regular(path: Path | str, mode: str = "rb", flags: int = 0, buffering: int = -1) -> IO[Any]:
    """Opens a regular file, and nothing else that may lie in its place: a FIFO does not block. Raises OSError."""
    guard = os.O_NONBLOCK | os.O_NOCTTY | flags
    file = open(path, mode, buffering, opener=lambda name, own: os.open(name, own | guard, 0o666))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_text(path: Path, limit: int = 16 * 2**20) -> str:
    """The UTF-8 text of a small file that anybody may have put there; a FIFO in its place does not block.

    Raises FileNotFoundError, another OSError if it is no regular file or has more than `limit` bytes, and ValueError
    (UnicodeDecodeError) if it is not UTF-8.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"more than {limit} bytes", str(path))
    return content.decode("utf-8")


def write_whole(path: Path, text: str) -> None:
    """Writes a file, or leaves it as it was (OSError); its content is on the disk before its name is."""
    write_parts(path, [text.encode()])


def write_parts(path: Path, parts: Iterable[bytes]) -> None:
    """As `write_whole`, part by part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with suppress(FileNotFoundError):
            temporary.unlink()  # of another process of this number, or a link to what is none of ours
        with open(temporary, "xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def sync_folder(folder: Path | str) -> None:
    """Makes renames in a folder durable (OSError)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: IO[Any], seconds: float, pause: float) -> None:
    """Keeps other processes' `lock` of the same file waiting, where the file system knows locks.

    Raises TimeoutError if another holds it for more than `seconds`; it is asked every `pause` seconds.
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
    """Ends `lock`. Closing is not enough: a worker that was forked meanwhile has the file open, too."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)
