"""What the kernel knows about a process of this machine: its state, and what it waits for. Needs no help from it."""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

STATES = {
    "D": "waits for a device or a file system and cannot be interrupted",
    "R": "running",
    "S": "sleeping",
    "T": "stopped",
    "t": "stopped by a debugger",
    "X": "dead",
    "Z": "dead",
}
MOST_FILES = 100


def state_of(pid: int) -> str:
    """The letter and the meaning of a process's state, as in `T (stopped)`; of its threads, a D counts first."""
    letters = [letter for _, letter in _threads(pid)]
    letter = "D" if "D" in letters else letters[0] if letters else "X"
    return f"{letter} ({STATES.get(letter, 'unknown')})"


def describe(pid: int) -> str:
    """Everything that /proc tells about a process, in lines: command, threads, system calls, and open files."""
    process = Path("/proc") / str(pid)
    command = _read(process / "cmdline").replace("\0", " ").strip()
    lines = [f"process {pid}: {command or _read(process / 'comm')}", f"state: {state_of(pid)}"]
    for tid, letter in _threads(pid):
        thread = process / "task" / str(tid)
        call = _read(thread / "syscall")
        lines.append(
            f"thread {tid} {_read(thread / 'comm')}: state {letter}, waits in {_read(thread / 'wchan') or 'unknown'}, "
            f"system call {call or 'unknown'}"
        )
        lines += [f"    {frame}" for frame in _read(thread / "stack").splitlines()]
    lines += [f"file {number}: {target}" for number, target in _files(process)]
    return "\n".join(lines)


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, and that have not ended."""
    numbers: list[int] = []
    for tid, _ in _threads(pid):
        numbers += map(int, _read(Path(f"/proc/{pid}/task/{tid}/children")).split())
    return numbers


def lives(pid: int) -> bool:
    """Whether a process has not ended."""
    return state_of(pid)[0] not in "XZ"


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal, so that the signal does not end it."""
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)$", _read(Path(f"/proc/{pid}/status")), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)


def kill_with_children(pid: int) -> None:
    """Kills the processes that a process has started, without this one, and then the process."""
    kill(*(child for child in children_of(pid) if child != os.getpid()), pid)


def kill(*pids: int) -> None:
    """Kills processes, if they still live."""
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _threads(pid: int) -> Iterator[tuple[int, str]]:
    """The threads of a process, the main thread first, each with the letter of its state."""
    try:
        numbers = sorted(map(int, os.listdir(f"/proc/{pid}/task")))
    except OSError:
        return
    for tid in numbers:
        fields = _read(Path(f"/proc/{pid}/task/{tid}/stat")).rpartition(")")[2].split()
        if fields:
            yield tid, fields[0]


def _files(process: Path) -> list[tuple[int, str]]:
    """The open files of a process: descriptor and target. Names only: nothing here asks a file system."""
    found = []
    with suppress(OSError):
        for name in sorted(os.listdir(process / "fd"), key=int)[:MOST_FILES]:
            with suppress(OSError):
                found.append((int(name), os.readlink(process / "fd" / name)))
    return found


def _read(path: Path) -> str:
    """The text of a small file of /proc; empty if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
