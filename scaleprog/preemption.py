"""Signals, the time limit and the clock -> the same decision on every rank, after the same step.

A signal reaches some ranks and not others, at different steps, and Python may not see it while the main thread is
inside C code. So a handler only wakes a thread, the thread raises a flag, and every few steps the flags are reduced
over the ranks by a collective that is begun after one step and looked at after a later one, when it has long been done.
"""

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Self

from scaleprog.sharding.coordinator import Coordinator

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
DEADLINE = 128  # among signal numbers, the time limit
LOOK_SECONDS = 2.0  # about how often the flags are reduced
FLIGHT_SECONDS = 0.1  # about how long after that the ranks act on what came out
MOST_STEPS = 1000  # at most so many steps between two reductions
SECOND_SIGNAL_SECONDS = 2.0  # what comes sooner belongs to the first: launchers pass on what a terminal sent to all


@dataclass(frozen=True)
class Due:
    """What all ranks have agreed to do after this step."""

    stop: str | None = None
    """Why the run must stop: a signal's name or "time limit"."""
    save: bool = False
    """Whether `every_minutes` have passed since the last checkpoint."""


class AskedToStop(Exception):
    """What ends a part of a run where all ranks have agreed to stop; never seen outside the run."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Watch:
    """Watches for reasons to stop or to save; a context manager, inside of which the signals no longer kill.

    Args:
        coordinator: of the ranks that must agree; every one of them makes a Watch and calls `due` after every step.
        tell: called with (name of the signal) from a thread of its own, as soon as one arrives here.
        hurry: called from that thread at a second signal, two or more seconds later; expected to leave at once.
        every_minutes: between two agreements to save.
        deadline: when this job ends, in seconds since the epoch; None if it may run for ever.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        tell: Callable[[str], None],
        hurry: Callable[[], None],
        every_minutes: float | None = None,
        deadline: float | None = None,
    ) -> None:
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

    def due(self) -> Due:
        """What to do now that a step is done; the same on every rank after the same step."""
        if self._coordinator.world == 1:
            return self._decided(*self._flags())
        self._countdown -= 1
        if self._countdown > 0:
            return Due()
        due = Due()
        if self._pending is not None:
            stop, save, seconds = self._pending()
            due, self._pending = self._decided(stop, save), None
            self._interval = min(MOST_STEPS, max(1, round(LOOK_SECONDS / seconds)))
            self._flight = min(self._interval, max(1, round(FLIGHT_SECONDS / seconds)))
            self._countdown = self._interval - self._flight
            if due.stop or self._countdown:
                return due
        now = time.monotonic()
        seconds, self._looked = (now - self._looked) / self._interval, now
        self._pending = self._coordinator.maximum_later([*self._flags(), seconds])
        self._countdown = self._flight
        return due

    def asked(self) -> str | None:
        """Whether to stop, and why, while there are no steps: all ranks ask at once, and wait for the answer."""
        stop, save = self._coordinator.maximum(list(self._flags()))
        return self._decided(stop, save).stop

    def saved(self, seconds: float = 0.0) -> None:
        """Call when a checkpoint has been begun, and with its seconds when it has been written."""
        if seconds:
            self._margin = max(self._margin, 3 * seconds)
        else:
            self._saved = time.monotonic()

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

    def _flags(self) -> tuple[float, float]:
        """What this rank knows: the reason to stop, and whether to save."""
        stop, save = self._signal, False
        if self._coordinator.rank == 0:  # one clock
            if self._deadline is not None and time.time() > self._deadline - self._margin:
                stop = max(stop, DEADLINE)
            save = self._every is not None and time.monotonic() - self._saved >= self._every
        return float(stop), float(save)

    def _decided(self, stop: float, save: float) -> Due:
        """What the flags of all ranks come to."""
        self._leaving = bool(stop)
        return Due(_name(int(stop)) if stop else None, bool(save))

    def _listen(self) -> None:
        """Runs in a thread: the C part of a handler writes the signal's number whatever the main thread is doing."""
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
    """When Slurm will end this job, in seconds since the epoch, as far as its environment tells."""
    end = (os.environ if environment is None else environment).get("SLURM_JOB_END_TIME", "")
    return float(end) if re.fullmatch("[0-9]{1,12}", end) else None


def _name(number: int) -> str:
    return "time limit" if number == DEADLINE else signal.Signals(number).name


def _nothing(_: int, __: FrameType | None) -> None:
    """A handler must exist for the wake-up to be written."""
