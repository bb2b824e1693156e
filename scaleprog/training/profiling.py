"""Profiles of some steps of a running run, for `scaleprog profile` or its recipe; see rundir/profiles.py."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from scaleprog.files.atomic import write_whole
from scaleprog.files.display import counted
from scaleprog.ranks.coordinator import Coordinator
from scaleprog.recipe.keys import ProfileSettings
from scaleprog.rundir.profiles import PROFILES, Inbox, error_name, folder_of, memory_name, trace_name
from scaleprog.rundir.recorder import Recorder

MOST_ENTRIES = 100_000  # of the history of allocations
OUT_OF_MEMORY = "out_of_memory"


@dataclass(frozen=True)
class Window:
    """A profile: its first step, its last step, the ranks that write one, and whether they follow their memory."""

    first: int
    last: int
    ranks: Sequence[int]
    memory: bool = False


class Profiling:
    """The profiles of one process. Every rank calls the same methods after the same steps.

    A profile follows what the host and the device do; it changes no number. It ends early where the network grows, is
    measured or evaluated, because a trace of that would be large.
    """

    def __init__(
        self,
        run: Path,
        coordinator: Coordinator,
        recorder: Recorder,
        device: torch.device,
        settings: ProfileSettings | None,
    ) -> None:
        self._run, self._coordinator, self._recorder, self._device = run, coordinator, recorder, device
        self._planned = {} if settings is None else {
            first: Window(first, first + settings.steps - 1, settings.ranks) for first in settings.at
        }  # fmt: skip
        self._inbox = Inbox(run)
        self._window: Window | None = None
        self._profile: profile | None = None

    def requested(self) -> bool:
        """Whether someone asks for a profile that can begin; for rank 0."""
        return self._window is None and self._inbox.holds_one()

    def before(self, step: int) -> None:
        """Call it before `step`, numbered from 1: begins the profile that is due."""
        if (due := self._planned.pop(step, None)) is not None:
            if self._window is None:
                self._window = due
            elif self._coordinator.rank in due.ranks:
                self._recorder.own_event("profile_failed", step=step, message="another profile was running")
        if self._window is not None and self._window.first == step and self._profile is None:
            self._begin(self._window)

    def after(self, step: int, requested: bool) -> None:
        """Call it after `step`. `requested`: what the ranks have agreed on, from `requested` on rank 0."""
        if self._window is not None and step >= self._window.last:
            self.end(step)
        if requested and self._window is None:
            asked = self._coordinator.decide("profile", lambda: self._inbox.take(step + 1))
            if asked is not None:
                self._window = Window(step + 1, step + asked["steps"], asked["ranks"], asked["memory"])
                self._refuse_absent(self._window)

    def end(self, step: int) -> None:
        """Ends a profile that has begun, after `step`, and writes it."""
        window, running = self._window, self._profile
        if window is None or step < window.first:
            return
        self._window = self._profile = None
        if running is None:
            return
        folder, rank = folder_of(self._run, window.first), self._coordinator.rank
        try:
            try:
                running.stop()
                if window.memory:
                    _snapshot(folder / memory_name(rank))
            finally:
                _follow_memory(window, False)
            temporary = folder / f".{os.getpid()}.{trace_name(rank)}"
            running.export_chrome_trace(str(temporary))
            os.replace(temporary, folder / trace_name(rank))
        except Exception as error:  # no run ends for a profile
            self._tell(window, error)
            return
        self._recorder.own_event("profile", step=window.first, steps=step - window.first + 1, folder=str(folder))

    def _refuse_absent(self, window: Window) -> None:
        """Says of ranks that are asked for, by someone who knows an earlier start, that this start has none of them."""
        world = self._coordinator.world
        for rank in window.ranks:
            if rank >= world and self._coordinator.rank == 0:
                with suppress(OSError):
                    told = f"this start has {counted(world, 'rank')}"
                    write_whole(folder_of(self._run, window.first) / error_name(rank), told)

    def _begin(self, window: Window) -> None:
        if self._coordinator.rank not in window.ranks:
            return
        on_cuda = self._device.type == "cuda"
        try:
            folder = folder_of(self._run, window.first)
            folder.mkdir(parents=True, exist_ok=True)
            if window.memory:
                if not on_cuda:
                    raise ValueError(f"memory is followed on CUDA devices only, not on {self._device.type}")
                _follow_memory(window, True)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
            running = profile(activities=activities)
            running.start()
            self._profile = running
        except Exception as error:  # such as another profiler in this process
            if on_cuda:
                _follow_memory(window, False)
            self._tell(window, error)

    def _tell(self, window: Window, error: Exception) -> None:
        rank, message = self._coordinator.rank, f"{type(error).__name__}: {error}"
        try:
            write_whole(folder_of(self._run, window.first) / error_name(rank), message)
        except OSError as other:
            message = f"{message}; {other}"
        self._recorder.own_event("profile_failed", step=window.first, message=message)


def _follow_memory(window: Window, follow: bool) -> None:
    """Begins or ends the history of allocations, if the profile has one; while it lasts, each of them keeps a stack."""
    if window.memory:
        memory: Any = torch.cuda.memory
        memory._record_memory_history(**({"max_entries": MOST_ENTRIES} if follow else {"enabled": None}))


def keep_snapshot(run: Path, rank: int, device: torch.device) -> Path | None:
    """Keeps what a device's memory holds when it has run out; None without CUDA, or if that fails, too."""
    if device.type != "cuda":
        return None
    path = run / PROFILES / OUT_OF_MEMORY / memory_name(rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _snapshot(path)
    except Exception:
        return None
    return path


def _snapshot(path: Path) -> None:
    """Writes what https://pytorch.org/memory_viz shows."""
    memory: Any = torch.cuda.memory
    memory._dump_snapshot(str(path))
