"""Reads the records in a run directory, which are untrusted and may be damaged.

Records that are not of the requested kind (`records.py`) are left out; a sentence for the user, the trouble, says so.
"""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from scaleprog.errors import CheckpointError, ScaleprogError, Unavailable
from scaleprog.files.atomic import IN_THE_WAY, open_regular, read_text
from scaleprog.files.display import counted
from scaleprog.rundir.records import RESULTS, Results

MOST_BYTES = 2**31  # of a .jsonl file
MOST_LINE = 4 * 2**20  # bytes
MOST_ROWS = 2**21
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
MOST_DAMAGED = 100_000  # lines, after which reading stops
T = TypeVar("T")


@dataclass(frozen=True)
class Told:
    """The records of a file. `trouble`: a sentence on what was left out; empty if nothing was."""

    rows: list[Any]
    trouble: str = ""


def read(path: Path, kind: TypeAdapter[Any], last: int | None = None) -> Told:
    """The records of one kind in a .jsonl file, which does not have to exist.

    A last line that is still being written is left out, and is no trouble.

    Args:
        path: the file.
        kind: the schema of its records (`records.py`).
        last: how many bytes to read from the end of the file (None: all).
    """
    rows: list[Any] = []
    damaged, first, number, rest = 0, 0, 0, ""
    try:
        for number, line in enumerate(lines(path, last), 1):
            try:
                rows.append(kind.validate_json(line))
            except ValidationError:
                if line.endswith(b"\n") and not line.isspace():
                    damaged, first = damaged + 1, first or number
            if len(rows) >= MOST_ROWS or damaged >= MOST_DAMAGED:
                rest = f"; scaleprog read nothing after line {number}"
                break
    except FileNotFoundError:
        return Told([])
    except OSError as error:
        return Told([], f"{path.name} is left out: {reason(error)}")
    if not damaged:
        return Told(rows, f"{path.name} is very long{rest}" if rest else "")
    where = f"the first is line {first}" if last is None else "among the last lines"
    are = "is not a record" if damaged == 1 else "are not records"
    return Told(rows, f"{path.name}: {counted(damaged, 'line')} of {number} {are} and left out ({where}){rest}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All JSON objects in a .jsonl file, whatever their keys; other lines are left out. Empty without a file."""
    return list(each_row(path))


def each_row(path: Path) -> Iterator[dict[str, Any]]:
    """Like `read_rows`, one by one."""
    if path.exists():
        for line in lines(path):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row


def still_told(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The events that still hold. A start cancels the events of earlier starts about steps beyond its own first step,
    and all events that an earlier start writes after it."""
    told: list[Mapping[str, Any]] = []
    latest = -1
    for event in with_generations(events):
        if event["event"] == "start":
            latest = event["generation"]
        if event["generation"] >= latest:
            told.append(event)
    kept: list[Mapping[str, Any]] = []
    back_to: float = math.inf
    for event in reversed(told):
        if event.get("step", 0) <= back_to:
            kept.append(event)
        if event["event"] == "start":
            back_to = min(back_to, event["step"])
    return kept[::-1]


def with_generations(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The events, each with its generation, which early versions recorded for start events at most."""
    known: list[Mapping[str, Any]] = []
    latest = 0
    for event in events:
        if event["event"] == "start":
            latest = event.get("generation", latest + 1)
        known.append({"generation": latest, **event})
    return known


def lines(path: Path, last: int | None = None) -> Iterator[bytes]:
    """The lines of a regular file, each with its newline. An overlong line becomes `too long`.

    With `last`, only the whole lines in so many bytes at the end of the file. Raises OSError, without `last` also if
    the file is too large.
    """
    with open_regular(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if last is None and size > MOST_BYTES:
            raise OSError(errno.EFBIG, f"{size} bytes are more than a run writes", str(path))
        if last is not None and size > last:
            file.seek(size - last - 1)
            _skip_line(file)
        while line := file.readline(MOST_LINE):
            if len(line) == MOST_LINE and not line.endswith(b"\n"):
                line = b"too long" + _skip_line(file)
            yield line


def _skip_line(file: IO[bytes]) -> bytes:
    """Skips the rest of a line. Returns its newline, or nothing if the line is still unfinished."""
    while part := file.readline(MOST_LINE):
        if part.endswith(b"\n"):
            return b"\n"
    return b""


def kind_of(error: Exception) -> type[CheckpointError] | type[Unavailable]:
    """Unavailable for an error of the file system that another try may not meet, else CheckpointError."""
    passing = isinstance(error, OSError) and error.errno not in (*IN_THE_WAY, *FORBIDDEN)
    return Unavailable if passing else CheckpointError


def read_object(path: Path, kind: type[T]) -> T | None:
    """The record in a small JSON file; None if there is no such file.

    Raises CheckpointError, or Unavailable if another attempt may succeed.
    """
    try:
        return _adapter(kind).validate_json(read_text(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise kind_of(error)(f"{path}: not readable: {reason(error)}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not readable: it is not UTF-8") from error
    except ValidationError as error:
        raise CheckpointError(f"{path}: {_mistake(error, kind)}") from error


def read_results(run: Path) -> Results | None:
    """The results of a finished run; None if they are missing, or if they are damaged: the run writes them again."""
    with suppress(ScaleprogError):
        return read_object(run / RESULTS, Results)
    return None


def checked(path: Path, values: object, kind: type[T]) -> T:
    """Checks values from the file at `path` and returns them as a record of `kind`. Raises CheckpointError."""
    try:
        return _adapter(kind).validate_python(values)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {_mistake(error, kind)}") from error


def open_to_append(path: Path) -> IO[bytes]:
    """Opens a regular file for reading and appending, unbuffered. Raises OSError, also for a symlink, because a run
    never writes one."""
    return open_regular(path, "a+b", os.O_NOFOLLOW, buffering=0)


def is_torn(file: IO[bytes]) -> bool:
    """Whether a process died in the middle of the last line."""
    with suppress(OSError):
        size = os.fstat(file.fileno()).st_size
        return size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
    return False


def append_row(path: Path, row: object) -> None:
    """Appends a record to a file; ends a line that a killed process left unfinished. Raises OSError."""
    with open_to_append(path) as file:
        file.write((b"\n" if is_torn(file) else b"") + to_line(row))


def reason(error: OSError) -> str:
    """What went wrong, without the path."""
    return error.strerror or str(error)


def to_line(row: object) -> bytes:
    """An object as one line of JSON that `read` takes back."""
    # file names may contain bytes that are not Unicode, which would make the line unreadable
    return _ENCODER.encode(row).encode("utf-8", "replace") + b"\n"


def _adapter(kind: type[T]) -> TypeAdapter[T]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


_ENCODER = json.JSONEncoder(ensure_ascii=False)
_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def _mistake(error: ValidationError, kind: Any) -> str:
    """What is wrong with a file that should hold a record."""
    first = error.errors(include_url=False, include_input=False)[0]
    place, what = ".".join(map(str, first["loc"])), first["msg"]
    if first["type"] == "json_invalid":
        return f"not readable: {what}"
    if first["type"] in ("missing", "dict_type") and len(first["loc"]) < 2:
        keys = [key for key in kind.__annotations__ if key in kind.__required_keys__]
        return f"expected the keys {', '.join(keys)}; was it written by another version?"
    return f"{place}: {what[0].lower()}{what[1:]}; was it damaged, or written by another version?"
