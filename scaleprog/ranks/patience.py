"""Notices that this rank makes no progress, writes down where it stands, and ends it; its launcher starts again.

The rank says what it does (`Patience.at`). A thread looks at that now and then, and counts how long it has not
changed. Only time counts in which the thread itself could run: a run that was stopped as a whole, with Ctrl-Z, is not
hung when it continues. The ranks that wait for a hung one wait as long, so all of them notice at about the same time.

The thread also writes into memory that the launcher reads (`Pulse`), so the launcher notices a rank whose thread
cannot run (`launchers/hangs.py`). This module imports no torch.
"""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from scaleprog.errors import HANG_CODE
from scaleprog.files.atomic import write_whole
from scaleprog.files.display import say
from scaleprog.ranks import processes
from scaleprog.ranks.pulse import PULSE as PULSE
from scaleprog.ranks.pulse import Pulse, Stand
from scaleprog.ranks.pulse import stand_of as stand_of

GUARD = "SCALEPROG_GUARD"
"""The variable that holds the number of the process that watches this one, if that is its child."""
LONG_SECONDS = 25 * 60.0
"""Least time for what may be slow once: a start, a growth, the first step of a network, which may compile."""
LONG_FACTOR = 3.0
"""Such things may take this many times the patience, and anything as many times as long as it took before."""
LOOK_SECONDS = 1.0
LEAST_LOOK = 0.05
LINGER_SECONDS = 5.0
"""How long a hung rank waits for the others to notice, because the end of one rank may end all."""
WRITE_SECONDS = 10.0
"""How long writing the stacks may take; the file system may be what hangs."""
ASK_SECONDS = 3.0
"""How long other processes have time to write their stacks."""
STACKS = signal.SIGRTMIN + 5
"""The signal at which a rank or one of its workers writes its stacks, even while another thread holds Python's lock."""
FOLDER = "stacks"
PACKAGE = f"{Path(__file__).parents[1]}/"
TOGETHER = ("/torch/distributed/", "/deepspeed/", f"{PACKAGE}ranks/coordinator.py")
"""In the paths of code that waits for other ranks."""


class Mark(NamedTuple):
    """What a thread does since `began` (seconds by `time.monotonic`)."""

    doing: str
    step: int
    kind: str | None
    began: float
    thread: int
    size: float = 0.0


class Track:
    """One sequence of things that a rank does; the checkpoints that a thread writes are another than the steps."""

    def __init__(self) -> None:
        self.mark: Mark | None = None
        self.least: dict[str, float] = {}
        """The fewest seconds that something of a kind took."""
        self.often: set[str] = set()
        """The kinds that were measured more than once."""
        self.sizes: dict[str, float] = {}
        """Of the measured kinds that have one."""

    def at(self, doing: str, step: int | None = None, kind: str | None = None, size: float = 0.0) -> None:
        """Notes progress: this thread now begins, or continues, something.

        Args:
            doing: what, in words.
            step: the training step that it belongs to (None: that of the last mark).
            kind: names things that take about as long each time. The first of a kind may take long.
            size: of the work, in comparison with that of other kinds that have one; the first of such a kind may take
                long only until one of the others has been measured.
        """
        before, now = self.mark, time.monotonic()
        if before is not None:
            if step is None:
                step = before.step
            if (ended := before.kind) is not None:  # all in one function, because every step comes here several times
                taken, least = now - before.began, self.least.get(ended)
                if least is None or taken < least:
                    self.least[ended] = taken
                if least is not None:
                    self.often.add(ended)
                elif before.size:
                    self.sizes[ended] = before.size
        self.mark = Mark(doing, step or 0, kind, now, threading.get_ident(), size)

    def rest(self) -> None:
        """Nothing is to be watched until the next `at`."""
        self.at("nothing")
        self.mark = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is to be watched; then what was begun before begins now, and was never measured."""
        mark, self.mark = self.mark, None
        try:
            yield
        finally:
            self.mark = None if mark is None else mark._replace(began=time.monotonic())

    def allowed(self, mark: Mark, patience: float) -> float:
        """How many seconds what `mark` says may take, with so many seconds of patience."""
        if mark.kind is None:
            return patience
        expected = self.least.get(mark.kind)
        if expected is None and mark.size and self.sizes:
            expected = min(self.least[kind] * max(1.0, mark.size / size) for kind, size in self.sizes.copy().items())
        return long_wait(patience) if expected is None else max(patience, LONG_FACTOR * expected)


def long_wait(patience: float) -> float:
    """The seconds that something slow may take, such as a start, with so many seconds of patience."""
    return max(LONG_SECONDS, LONG_FACTOR * patience)


@dataclass
class Patience:
    """The patience of one rank. Without `watching`, it only takes notes.

    Args:
        seconds: how long the rank may make no progress.
        folder: the run directory.
        rank: of this process.
        extra: what the rank knows about its collectives, as JSON, or None; called when it hangs.
        alone: called with where the rank stands, if it hangs and no launcher watches it.
    """

    seconds: float = 600.0
    folder: Path | None = None
    rank: int = 0
    extra: Callable[[], str | None] = lambda: None
    alone: Callable[[Stand], None] = lambda stand: None
    generation: int = 0
    steps: Track = field(default_factory=Track)
    saves: Track = field(default_factory=Track)
    world: int = 0

    def __post_init__(self) -> None:
        self._pulse, self._beats, self._warned = Pulse.current(), 0, False
        self._ended = threading.Event()
        self._seen: dict[int, tuple[Mark | None, float]] = {}
        self._memory = -1

    @property
    def limit(self) -> timedelta:
        """How long a collective may wait: longer than this rank, so that the rank says where it stands."""
        return timedelta(seconds=long_wait(self.seconds) + 300)

    def at(self, doing: str, step: int | None = None, kind: str | None = None, size: float = 0.0) -> None:
        """Notes progress of the steps; see `Track.at`."""
        self.steps.at(doing, step, kind, size)

    @contextmanager
    def watching(self) -> Iterator["Patience"]:
        """Inside, a thread ends this process with HANG_CODE if it makes no progress for too long."""
        self._memory = os.memfd_create("stacks")
        faulthandler.register(STACKS, self._memory, all_threads=True)
        thread = threading.Thread(target=self._watch, name="patience", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()
            if self._pulse is not None:
                self._pulse.clear()
            faulthandler.unregister(STACKS)
            os.close(self._memory)

    # ---- the thread

    def _watch(self) -> None:
        look = max(LEAST_LOOK, min(LOOK_SECONDS, self.seconds / 20))
        last = time.monotonic()
        while not self._ended.wait(look):
            now = time.monotonic()
            elapsed, last = min(now - last, 2 * look), now
            longest, most = Mark("nothing that is watched", 0, None, now, 0), 0.0
            for number, track in enumerate((self.steps, self.saves)):
                mark = track.mark
                before, waited = self._seen.get(number, (None, 0.0))
                waited = waited + elapsed if mark is before else 0.0
                self._seen[number] = mark, waited
                if mark is None:
                    continue
                if waited > track.allowed(mark, self.seconds):
                    self._hang(mark, waited)
                if waited >= most:
                    longest, most = mark, waited
            self._beats += 1
            self._tell(self._stand(longest, most))
            self._warn()

    def _stand(self, mark: Mark, waited: float) -> Stand:
        return Stand(
            self.rank, socket.gethostname(), os.getpid(), self.generation, mark.step, mark.doing, round(waited, 1),
            self.seconds, self._beats, stacks=self._memory, world=self.world,
        )  # fmt: skip

    def _tell(self, stand: Stand) -> None:
        if self._pulse is not None:
            self._pulse.write(stand)

    def _warn(self) -> None:
        """Says once that something takes long in comparison with the patience; rank 0 speaks for all."""
        taken = {kind: track.least[kind] for track in (self.steps, self.saves) for kind in track.often.copy()}
        slow = {kind: seconds for kind, seconds in taken.items() if LONG_FACTOR * seconds > self.seconds}
        if not slow or self._warned or self.rank:
            return
        self._warned = True
        kind, seconds = max(slow.items(), key=lambda item: item[1])
        told = (
            f"train.patience={self.seconds / 60:g} is {self.seconds:.3g} s, but {kind} takes {seconds:.3g} s; "
            f"a hang in it is noticed only after {LONG_FACTOR * seconds:.3g} s; set train.patience="
            f"{max(LONG_FACTOR * seconds / 60, 0.01):.2g} or more"
        )
        within(WRITE_SECONDS, lambda: say(told))  # the log may be on a file system that hangs

    def _hang(self, mark: Mark, waited: float) -> None:
        """Tells the launcher, writes the stacks, waits for other ranks to do so, too, and ends the process."""
        try:
            stand = replace(self._stand(mark, waited), hung=True)
            self._tell(stand)  # first, because all that follows may hang or fail, too
            frames, found = _frames(mark.thread), list[str]()
            stand = replace(stand, where=_where(frames), together=_together(frames))
            within(WRITE_SECONDS, lambda: found.append(self._stacks()))
            self._tell(stand)
            began = time.monotonic()
            stacks = f"{stand} hangs: {mark.doing}, step {mark.step}, {waited:.0f} s, at {stand.where}\n\n"
            stacks += found[0] if found else read_all(self._memory)
            if self.folder is None or not within(WRITE_SECONDS, lambda: self._write(stacks)):
                within(WRITE_SECONDS, lambda: print(stacks, file=sys.stderr, flush=True))
            if self._pulse is None:
                within(WRITE_SECONDS, lambda: self.alone(stand))
            else:
                time.sleep(max(0.0, LINGER_SECONDS - (time.monotonic() - began)))
            processes.kill(*_workers())
        finally:
            os._exit(HANG_CODE)

    def _stacks(self) -> str:
        """The stacks of all threads of this process and of its workers, and what the kernel knows of the workers."""
        children, give_up = _workers(), time.monotonic() + ASK_SECONDS
        for child in children:
            if processes.handles(child, STACKS):
                os.write(self._memory, f"worker {child}\n".encode())
                ask_stacks(child, self._memory, give_up)
        os.write(self._memory, f"\nprocess {os.getpid()}\n".encode())
        faulthandler.dump_traceback(self._memory, all_threads=True)
        return "\n\n".join([read_all(self._memory), *map(processes.describe, children)])

    def _write(self, stacks: str) -> None:
        assert self.folder is not None
        write_stacks(self.folder, self.generation, self.rank, stacks)
        if more := self.extra():
            write_stacks(self.folder, self.generation, self.rank, more, "-collectives.json")


def ask_stacks(pid: int, memory: int, give_up: float) -> None:
    """Has another process write its stacks into a file in memory that it has open; waits for that, but not after
    `give_up` (seconds by `time.monotonic`)."""
    before = now = os.fstat(memory).st_size
    with suppress(OSError):
        os.kill(pid, STACKS)
    while time.monotonic() < give_up:
        time.sleep(0.1)
        last, now = now, os.fstat(memory).st_size
        if now == last > before:
            return


def write_stacks(folder: Path, generation: int, rank: int, text: str, suffix: str = ".txt") -> None:
    """Writes where a rank stands into the run directory. Raises OSError."""
    (folder / FOLDER).mkdir(exist_ok=True)
    write_whole(folder / FOLDER / f"stack-generation-{generation}-rank-{rank}{suffix}", text)


def within(seconds: float, work: Callable[[], Any]) -> bool:
    """Whether some work ended without an error in time. If not, its thread is left behind."""
    done = threading.Event()

    def run() -> None:
        with suppress(Exception):
            work()
            done.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return done.is_set()


def read_all(descriptor: int) -> str:
    """The text of a file in memory."""
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")


def _workers() -> list[int]:
    """The processes that this one has started, without the one that watches it."""
    return [pid for pid in processes.children_of(os.getpid()) if str(pid) != os.environ.get(GUARD)]


def _frames(thread: int) -> list[traceback.FrameSummary]:
    """The stack of a thread, the innermost frame first; empty if the thread has ended. Reads no source files, because
    their file system may be what hangs."""
    frame = sys._current_frames().get(thread)
    calls = [] if frame is None else [(each.f_code, line) for each, line in traceback.walk_stack(frame)]
    return [traceback.FrameSummary(code.co_filename, line, code.co_name, lookup_line=False) for code, line in calls]


def _where(frames: list[traceback.FrameSummary]) -> str:
    """The innermost line of scaleprog, or else the innermost line."""
    for frame in frames:
        if frame.filename.startswith(PACKAGE):
            return f"scaleprog/{frame.filename.removeprefix(PACKAGE)}:{frame.lineno} in {frame.name}"
    return f"{frames[0].filename}:{frames[0].lineno} in {frames[0].name}" if frames else "the end of its thread"


def _together(frames: list[traceback.FrameSummary]) -> bool:
    """Whether a thread waits for other ranks: of what is ours or exchanges values, the innermost frame does."""
    for frame in frames:
        if any(part in frame.filename for part in TOGETHER):
            return True
        if frame.filename.startswith(PACKAGE):
            return False
    return False
