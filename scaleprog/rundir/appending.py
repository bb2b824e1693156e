"""Files to which a run appends: records in lines of JSON, and anything else that a full disk must not tear."""

import errno
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from scaleprog.files.atomic import lock, unlock, write_parts
from scaleprog.files.display import as_text, counted
from scaleprog.rundir.reading import is_torn, lines, open_to_append, to_line
from scaleprog.rundir.records import NUMBERED

LOCK_SECONDS = 2.0  # if another process holds the lock for this long, a line is written without it


class Appended:
    """A file to append: each write succeeds whole or not at all. The next write retries what a full disk refused."""

    def __init__(self, path: Path) -> None:
        self.file = open_to_append(path)
        self._refused = b""

    def write(self, data: bytes = b"", mend: bytes = b"") -> None:
        """Appends `mend`, then what was refused so far, then `data`."""
        data = self._refused + data
        try:
            size = os.fstat(self.file.fileno()).st_size
            if self.file.write(mend + data) < len(mend + data):
                self.file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._refused = b""
        except OSError as error:
            if not self._refused:
                self._tell(f"{error}; will retry")
            self._refused = data

    def sync(self) -> bool:
        """Makes the file durable. Returns whether the disk has taken everything."""
        try:
            os.fsync(self.file.fileno())
        except OSError:
            return False
        return not self._refused

    def close(self) -> None:
        if self._refused:
            self._tell(f"the last {len(self._refused)} bytes ARE LOST: the disk refused them")
        try:
            self.file.close()
        except OSError as error:  # a network file system may report a failed write only now
            self._tell(str(error))

    def _tell(self, text: str) -> None:
        with suppress(OSError):  # the log may be on the same full disk
            print(f"{self.file.name}: {text}", file=sys.stderr, flush=True)


class Lines:
    """A .jsonl file to which several processes append objects."""

    def __init__(self, path: Path) -> None:
        self._appended = Appended(path)
        self._lock = threading.Lock()

    def write(self, *rows: Mapping[str, Any]) -> None:
        file = self._appended.file
        with self._lock, _locked(file):
            self._appended.write(b"".join(map(to_line, rows)), mend=b"\n" if is_torn(file) else b"")

    def sync(self) -> None:
        self.write()
        self._appended.sync()

    def close(self) -> None:
        self.write()
        self._appended.close()


@contextmanager
def _locked(file: IO[bytes]) -> Iterator[None]:
    """Keeps other processes from writing: on NFS, two hosts that append at the same time overwrite each other."""
    with suppress(TimeoutError):  # the holder hangs: better to risk the overlap than to lose the line
        lock(file, LOCK_SECONDS, pause=0.002)
    try:
        yield
    finally:
        unlock(file)


def truncate(path: Path, step: int, redo_evaluation: bool) -> dict[str, Any]:
    """Drops rows after `step`, so that each step appears in the file once, no matter how often it was trained.

    With `redo_evaluation`, also drops the accuracies after that step. Drops lines that are not rows, and prints how
    many. Keeps all other rows unchanged.

    Returns:
        The fields of a start event about the lost steps: how many, how long they took, when they were trained.

    Raises:
        OSError: the file cannot be read or written.
    """
    lost: list[Mapping[str, Any]] = []
    damaged = 0

    def kept() -> Iterator[bytes]:
        nonlocal damaged
        for line in lines(path):
            try:
                row = NUMBERED.validate_json(line)
            except ValidationError:
                damaged += line.endswith(b"\n") and not line.isspace()
                continue
            if row["step"] < step or (row["step"] == step and ("loss" in row or not redo_evaluation)):
                yield line if line.endswith(b"\n") else line + b"\n"
            elif row["step"] > step and "loss" in row:
                lost.append(row)

    if path.is_symlink() or path.exists():
        write_parts(path, kept())
    if damaged:
        print(f"{as_text(path)}: dropped {counted(damaged, 'line')} without a step", file=sys.stderr, flush=True)
    told: dict[str, Any] = {"repeated_steps": len(lost)}
    if lost and all(row.keys() >= {"time", "step_seconds", "data_wait_seconds"} for row in lost):  # not in early rows
        seconds = [row["step_seconds"] + row["data_wait_seconds"] for row in lost]
        told |= {
            "repeated_seconds": sum(seconds),
            "repeated_since": max(0.0, lost[0]["time"] - seconds[0]),
            "repeated_until": lost[-1]["time"],
        }
    return told
