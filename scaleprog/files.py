"""Small files that are there whole or as they were, whoever is interrupted meanwhile; locks on files."""

import errno
import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any


def write_whole(path: Path, text: str) -> None:
    """Writes a file, or leaves it as it was (OSError); its content is on the disk before its name is."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
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
