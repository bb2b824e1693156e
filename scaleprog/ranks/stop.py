"""Turns signals, the time limit, and the clock into the same decision on every rank, after the same step.

A signal may reach only some of the ranks, at different steps, and Python may not see it while the main thread is
inside C code. So a handler only wakes a thread, and the thread sets a flag. Every few steps, a collective reduces the
flags over the ranks. It starts after one step, and the ranks read its result after a later step, so no step waits.
"""

import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from scaleprog.ranks.coordinator import Coordinator

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
DEADLINE = 128  # stands for the time limit among the signal numbers
TIME_LIMIT = "time limit"
LOOK_SECONDS = 2.0  # roughly, between two reductions of the flags
FLIGHT_SECONDS = 0.1  # roughly, from the start of a reduction until the ranks read its result
ASK_AGAIN_SECONDS = 60.0  # so long before a deadline is acted upon, it is asked for again, up to three times
MOST_STEPS = 1000  # most steps between two reductions
SECOND_SIGNAL_SECONDS = 2.0  # a sooner signal repeats the first: terminals and launchers may both send it


def ignore_stops() -> None:
    """Leaves the signals that ask to stop to the other processes that get them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class Agreement:
    """What all ranks have agreed to do after this step."""

    stop: str | None = None
    """Why the run must stop: a signal's name or "time limit"; None: it need not stop."""
    save: bool = False
    """Whether `every_minutes` have passed since the last checkpoint."""
    requested: bool = False
    """Whether someone asks something of the run, see `Watch.requested`."""


class AskedToStop(Exception):
    """Raised to end the current task of a run after all ranks have agreed to stop; the run always catches it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Watch:
    """Watches for reasons to stop or to save. As a context manager, it keeps the signals from killing the process.

    Args:
        coordinator: of the ranks that must agree; each rank makes a Watch and calls `agree` after every step.
        tell: called with the name of a signal as soon as this process gets its first one, from a separate thread.
        hurry: called from that thread at a second signal, two or more seconds later, unless the ranks have agreed to
            stop by then; it should end the process at once.
        every_minutes: minutes between two agreements to save (None: never).
        deadline: when this job ends, in seconds since the epoch (None: never).
        deadline_now: asks for it again, from a separate thread, before the deadline is acted upon: it may have moved.
        requested: whether someone asks something of the run; rank 0 calls it each time that the ranks agree.
    """

    def __init__(
        self,
        coordinator: "Coordinator",
        tell: Callable[[str], None],
        hurry: Callable[[], None],
        every_minutes: float | None = None,
        deadline: float | None = None,
        requested: Callable[[], bool] = lambda: False,
        deadline_now: Callable[[], float | None] | None = None,
    ) -> None:
        self._requested, self._deadline_now = requested, deadline_now
        self._asked_deadline = -math.inf
        self._coordinator, self._tell, self._hurry = coordinator, tell, hurry
        self._every = None if every_minutes is None else 60 * every_minutes
        self._deadline = deadline
        self._signal = 0
        self._signalled = 0.0
        self._leaving = False
        self._saved = time.monotonic()
        self._margin = 30.0
        self._pending: Callable[[], list[float]] | None = None
        self._interval = self._flight = self._countdown = 1  # steps
        self._looked = time.monotonic()
        self._handlers: dict[signal.Signals, Any] = {}

    def agree(self) -> Agreement:
        """Decides what to do after a step: the same on every rank after the same step."""
        if self._coordinator.world == 1:
            return self._decided(*self._flags())
        self._countdown -= 1
        if self._countdown > 0:
            return Agreement()
        agreement = Agreement()
        if self._pending is not None:
            *flags, seconds = self._pending()
            agreement, self._pending = self._decided(*flags), None
            self._interval = min(MOST_STEPS, max(1, round(LOOK_SECONDS / seconds)))
            self._flight = min(self._interval, max(1, round(FLIGHT_SECONDS / seconds)))
            self._countdown = self._interval - self._flight
            if agreement.stop or self._countdown:
                return agreement
        now = time.monotonic()
        seconds, self._looked = (now - self._looked) / self._interval, now
        self._pending = self._coordinator.maximum_later([*self._flags(), seconds])
        self._countdown = self._flight
        return agreement

    def asked(self) -> str | None:
        """Why the run must stop, or None. For use between steps: all ranks call it together and wait for the answer."""
        stop, save = self._coordinator.maximum(list(self._flags()[:2]))
        return self._decided(stop, save).stop

    def saved(self, seconds: float = 0.0) -> None:
        """Call this when a checkpoint starts, and again with its duration in `seconds` when it is written."""
        if seconds:
            self._margin = max(self._margin, 3 * seconds)
        else:
            self._saved = time.monotonic()

    def save_every(self, seconds: float) -> None:
        """Changes the time between two agreements to save; only rank 0's counts."""
        self._every = seconds

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._receiver, self._sender = socket.socketpair()
            self._sender.setblocking(False)
            self._wakeup = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
            for number in SIGNALS:
                self._handlers[number] = signal.signal(number, _nothing)
            self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._handlers:
            for number, handler in self._handlers.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
            signal.set_wakeup_fd(self._wakeup)
            self._sender.close()  # ends the thread
            self._thread.join()
            self._receiver.close()
            self._handlers = {}

    def _flags(self) -> tuple[float, float, float]:
        """This rank's flags: its reason to stop (0: none), whether to save, and whether there is a request."""
        stop, save, requested = self._signal, False, False
        if self._coordinator.rank == 0:  # only one rank's clock may count
            left = math.inf if self._deadline is None else self._deadline - self._margin - time.time()
            if left < ASK_AGAIN_SECONDS:
                self._ask_for_deadline()
            if left < 0:
                stop = max(stop, DEADLINE)
            save = self._every is not None and time.monotonic() - self._saved >= self._every
            requested = self._requested()
        return float(stop), float(save), float(requested)

    def _ask_for_deadline(self) -> None:
        """Adopts a later deadline soon, unless this was done just now."""
        now = time.monotonic()
        if self._deadline_now is None or now - self._asked_deadline < ASK_AGAIN_SECONDS / 3:
            return
        self._asked_deadline, ask, before = now, self._deadline_now, self._deadline

        def adopt() -> None:
            end = ask()
            if end is None or (before is not None and end > before):
                self._deadline = end

        threading.Thread(target=adopt, name="deadline", daemon=True).start()

    def _decided(self, stop: float, save: float, requested: float = 0.0) -> Agreement:
        """The agreement, from the maximum of each flag over all ranks."""
        self._leaving = bool(stop)
        return Agreement(_name(int(stop)) if stop else None, bool(save), bool(requested))

    def _listen(self) -> None:
        """Runs in a thread. Python's C code sends it the number of each signal, whatever the main thread is doing."""
        while received := self._receiver.recv(1):
            number = received[0]
            if number not in SIGNALS:
                continue
            now = time.monotonic()
            if not self._signal:
                self._signal, self._signalled = number, now
                self._tell(_name(number))
            elif not self._leaving and now - self._signalled >= SECOND_SIGNAL_SECONDS:
                self._hurry()


def deadline(environment: dict[str, str] | None = None) -> float | None:
    """When Slurm will end this job, in seconds since the epoch; None if the environment does not say."""
    end = (os.environ if environment is None else environment).get("SLURM_JOB_END_TIME", "")
    return float(end) if re.fullmatch("[0-9]{1,12}", end) else None


def _name(number: int) -> str:
    return TIME_LIMIT if number == DEADLINE else signal.Signals(number).name


def _nothing(_: int, __: FrameType | None) -> None:
    """Does nothing: Python writes to the wakeup socket only for signals that have a handler."""
