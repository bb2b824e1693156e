"""Checkpoints of a run: written while training continues, visible once all ranks agree that they are sound."""

import copy
import os
import re
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from scaleprog.errors import CheckpointError, OtherFormat, OtherRun, Unavailable
from scaleprog.files.atomic import write_whole
from scaleprog.ranks.coordinator import Coordinator
from scaleprog.ranks.patience import Patience
from scaleprog.rundir.storage import (
    RUN,
    FileList,
    Manifest,
    Stored,
    best_saved,
    committed,
    discard,
    opened,
    prepare,
    publish,
    reason,
    retire,
    step_of,
    tidy,
    verify,
    write_tensors,
)
from scaleprog.rundir.tensorfile import NAMES
from scaleprog.sharding.placement import LocalSlice, held_by, share_out

Chunks = Mapping[str, tuple[tuple[int, int], ...]]
"""For each tensor, (rank, elements) of consecutive stretches."""
RUN_ID = "run.id"
POISONED = "numbers that are not finite"
ELSEWHERE = "move it to its own run directory; scaleprog then uses this run's newest"


@dataclass(frozen=True)
class Commit:
    """The outcome of a save: the checkpoint at `path` is visible, or the save failed with `error`."""

    path: Path
    step: int
    stall: float
    """Seconds for which training paused."""
    seconds: float
    """Seconds from the end of the pause until the checkpoint was visible."""
    bytes: int
    error: str | None = None
    poisoned: bool = False
    """Whether the save failed because some numbers were not finite."""
    left: str | None = None
    """Why older checkpoints are still there that should have been deleted; None if none are."""


@dataclass(frozen=True)
class Owner:
    """What a checkpoint must match to belong to the run; the default accepts every checkpoint.

    Args:
        recipe: plain values to store in each checkpoint.
        differences: given the values stored in a checkpoint, explains in lines why its run cannot continue with this
            recipe; empty if it can.
        most: maximum size of a checkpoint of the run in bytes (None: unknown).
    """

    recipe: Mapping[str, Any] = field(default_factory=dict)
    differences: Callable[[Mapping[str, Any]], list[str]] = lambda recipe: []
    most: int | None = None


class Checkpoints:
    """The checkpoints of one run directory. Every rank calls the same methods in the same order.

    Args:
        folder: holds one folder `step-N` per checkpoint. The run directory above it names the run in `run.id`.
        coordinator: the ranks that save together.
        keep: how many of the newest checkpoints to keep.
        fence: context in which rank 0 publishes or deletes checkpoints; raises Superseded.
        generation: number of this start, used in the names of unfinished checkpoints; 0 for a reader.
        owner: what a checkpoint must match to belong to this run.
        patience: hears of the progress of the writing.
    """

    def __init__(
        self,
        folder: Path,
        coordinator: Coordinator,
        keep: int,
        fence: Callable[[], AbstractContextManager[None]] = nullcontext,
        generation: int = 0,
        owner: Owner = Owner(),
        patience: Patience | None = None,
    ) -> None:
        self.folder, self.coordinator, self.keep = folder, coordinator, keep
        self._fence, self._generation, self._owner = fence, generation, owner
        self._patience = patience or Patience()
        group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=self._patience.limit))
        self._background = Coordinator(group)  # its collectives must not mix with those of training
        self._gpu = torch.cuda.is_available()
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._host: dict[str, Tensor] = {}  # reused, because `save` waits for the previous save
        self._writing: Future[Commit] | None = None
        self._finished: list[Commit] = []
        self._holding: tuple[dict[str, int], list[int]] | None = None  # at the last save
        self._chunks: Chunks = {}
        self._permanent: frozenset[int] = frozenset()  # steps of checkpoints that are known to be so, or foreign

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        parts: Mapping[str, LocalSlice],
        protect: Collection[int] = (),
        permanent: bool = False,
        replayable: int = 0,
        best: int = 0,
    ) -> None:
        """Copies the state to the host. A thread then writes and publishes it, and only then deletes older ones.

        Waits for the previous save. If a write fails, `finished` reports it, and the older checkpoints stay.

        Args:
            step: optimizer steps finished.
            state: plain values.
            parts: this rank's elements of each tensor, by name.
            protect: steps of older checkpoints that must stay.
            permanent: whether this checkpoint is never deleted.
            replayable: a step; the newest checkpoint before it must stay.
            best: step of the best checkpoint so far, which must stay; if it was never saved, the best before it.

        Raises:
            Superseded: a later start has taken the run directory over.
        """
        began = time.monotonic()
        self.wait()
        staged = self._staged(parts)
        state = copy.deepcopy(dict(state))
        stall = time.monotonic() - began
        self._writing = self._writer.submit(
            self._write, step, state, staged, stall, tuple(protect), permanent, replayable, best
        )

    def wait(self) -> None:
        """Waits until the last save is visible or has failed. Raises Superseded."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            with self._patience.steps.paused():  # the thread that writes is watched
                self._finished.append(writing.result())

    def finished(self) -> list[Commit]:
        """The saves that have ended since the last call. Ranks may disagree about one that is still running."""
        if self._writing is not None and self._writing.done():
            self.wait()
        ended, self._finished = self._finished, []
        return ended

    def _staged(self, parts: Mapping[str, LocalSlice]) -> dict[str, LocalSlice]:
        """Copies `parts` to buffers on the host, which the next call overwrites."""
        sources = {name: part.tensor.detach().view(-1) for name, part in parts.items()}
        like = {name: (source.shape, source.dtype) for name, source in sources.items()}
        self._host = {name: t for name, t in self._host.items() if like.get(name) == (t.shape, t.dtype)}
        for name, source in sources.items():
            if name not in self._host:
                self._host[name] = torch.empty(source.shape, dtype=source.dtype, pin_memory=self._gpu)
            self._host[name].copy_(source, non_blocking=self._gpu)
        if self._gpu:
            torch.cuda.current_stream().synchronize()
        return {name: LocalSlice(self._host[name], part.start, part.numel) for name, part in parts.items()}

    def newest(self, report: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that verifies, the same on all ranks; None if there are no checkpoints.

        Rank 0 calls `report` with a sentence for each checkpoint that it skips. If an older one verifies, a start
        renames those that it skips: its steps are not those that an unreadable one would bring back later.

        Raises:
            CheckpointError: there are checkpoints, and all of them are damaged.
            OtherFormat: the newest undamaged checkpoint was written by another version of scaleprog.
            OtherRun: the newest undamaged checkpoint belongs to another run or step.
            Unavailable: no checkpoint verifies, and some cannot be read now; or one that cannot be read cannot be
                renamed either.
        """

        def find() -> str | None:
            damaged: list[Path] = []
            unreadable: dict[Path, Unavailable] = {}
            run = run_of(self.folder.parent)
            there = committed(self.folder)
            for path in reversed(there):
                try:
                    self._verify(path, run)
                except (OtherFormat, OtherRun):
                    raise
                except CheckpointError as error:
                    report(f"skipped a damaged checkpoint: {error}")
                    damaged.append(path)
                except Unavailable as error:
                    report(f"skipped a checkpoint that cannot be read: {error}")
                    unreadable[path] = error
                else:
                    if self._generation:
                        set_aside(damaged, unreadable)
                    return path.name
            if unreadable:
                raise next(iter(unreadable.values()))
            if damaged and not self._generation and committed(self.folder) != there:
                return find()  # the run trains on, and has replaced those that a reader was reading
            if damaged:
                raise CheckpointError(
                    f"{self.folder}: all checkpoints are damaged ({len(damaged)}), and a run does not start over by "
                    "itself; nothing was changed. Copy the run directory again, with every file in it; or move this "
                    "folder away to train from step 0"
                )
            return None

        def set_aside(damaged: list[Path], unreadable: Mapping[Path, Unavailable]) -> None:
            if damaged:
                with self._fence(), suppress(OSError):
                    for path in damaged:
                        path.rename(_free_name(path, "damaged"))
            for path, error in unreadable.items():
                try:
                    with self._fence():
                        path.rename(_free_name(path, "unreadable"))
                except OSError:
                    raise error from None

        name = self.coordinator.on_rank_0("checkpoint to resume from", find)
        return self.folder / name if name else None

    def _verify(self, path: Path, run: str | None) -> None:
        """Like `verify`, but also raises OtherRun unless the checkpoint belongs to `run`."""
        manifest = verify(path, self._owner.most)
        differences = self._owner.differences(manifest.recipe)
        if differences:
            listing = "\n".join(f"  {line}" for line in differences)
            raise OtherRun(f"{path}: a checkpoint of another recipe:\n{listing}\n{ELSEWHERE}")
        if run is None and self._generation:  # `run.id` is lost; the newest checkpoint restores it
            with self._fence(), suppress(OSError):
                write_whole(self.folder.parent / RUN_ID, manifest.run)
        if run not in (None, manifest.run):
            raise OtherRun(f"{path}: a checkpoint of another run of the same recipe; {ELSEWHERE}")

    @property
    def newest_step(self) -> int:
        """The step of the newest visible checkpoint; 0 if there is none."""
        return max(map(step_of, committed(self.folder)), default=0)

    def at(self, step: int) -> Path:
        """The checkpoint of a step, after verifying it. Raises CheckpointError on every rank."""
        self.wait()
        path = self.folder / f"step-{step:08d}"
        try:
            self.coordinator.on_rank_0("checkpoint to restore", lambda: self._verify(path, run_of(self.folder.parent)))
        except CheckpointError as error:
            raise CheckpointError(f"cannot restore the weights from before the search: {error}") from None
        return path

    def tidy(self) -> None:
        """Removes what interrupted starts left behind. Call it on rank 0 while no other start can be writing."""
        tidy(self.folder, self._owner.most)

    def _write(
        self,
        step: int,
        state: Mapping[str, Any],
        parts: Mapping[str, LocalSlice],
        stall: float,
        protect: Collection[int],
        permanent: bool,
        replayable: int,
        best: int,
    ) -> Commit:
        """Writes and publishes a checkpoint, then deletes older ones; runs in the thread."""
        began, saves = time.monotonic(), self._patience.saves
        group = self._background
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".step-{step:08d}.{self._generation}.writing"

        def make_room() -> None:
            with self._fence():
                prepare(temporary)

        def write() -> FileList | str:
            mine = [name for name, shared in chunks.items() if any(rank == group.rank for rank, _ in shared)]
            if poisoned := [name for name in mine if not _is_finite(parts[name].tensor)]:
                return f"{POISONED} in {poisoned[0]}, among {len(poisoned)} tensors of rank {group.rank}"
            try:
                tensors = {name: parts[name].tensor for name in mine}
                return write_tensors(temporary, group.rank, tensors, lambda: saves.at("writing a checkpoint", step))
            except OSError as failure:
                return f"rank {group.rank}: {failure}"

        def make_visible() -> int:
            files: FileList = {}
            for files_or_error in written:
                if isinstance(files_or_error, str):
                    raise CheckpointError(files_or_error)
                files |= files_or_error
            tensors = {name: Stored(NAMES[part.tensor.dtype], part.numel, chunks[name]) for name, part in parts.items()}
            with self._fence():
                manifest = Manifest(self._run(), step, permanent, self._owner.recipe, state, files, tensors)
                return publish(temporary, final, manifest)

        def delete_older() -> None:
            with self._fence():
                before = [at for at in map(step_of, committed(self.folder)) if at < replayable]
                stay = {*protect, *before[-1:], best_saved(self.folder, best)}
                self._permanent |= retire(self.folder, step, self.keep, stay | self._permanent)

        size, error, poisoned, left = 0, None, False, None
        saves.at("saving", step)
        try:
            group.on_rank_0("prepare", lambda: _on_disk(temporary, make_room))
            chunks = self._share_out(parts)
            mine_written = write()
            saves.at("saving: waiting for what the other ranks write", step, "the wait for the other ranks' files")
            written = group.gather(mine_written)
            saves.at("saving: the checkpoint becomes visible", step)
            size = group.on_rank_0("publish", lambda: _on_disk(final, make_visible))
            seconds = time.monotonic() - began
            saves.at("saving: older checkpoints are deleted", step)
            try:
                group.on_rank_0("retire", lambda: _on_disk(self.folder, delete_older))
            except (CheckpointError, Unavailable) as failure:
                left = f"{self.folder}: older checkpoints are not deleted ({reason(failure)})"
        except (CheckpointError, Unavailable) as failure:
            seconds = time.monotonic() - began
            poisoned = POISONED in str(failure)
            hint = "" if poisoned else "; is the disk full or over quota?"
            error = f"{temporary}: not written ({reason(failure)}){hint}"
            group.on_rank_0("remove", lambda: discard(temporary))  # it may fill the disk
        finally:
            saves.rest()
        return Commit(final, step, stall, seconds, size, error, poisoned, left)

    def _share_out(self, parts: Mapping[str, LocalSlice]) -> Chunks:
        """Which rank saves what. The ranks tell each other what they hold only if it has changed since then."""
        group, holding = self._background, ({name: part.numel for name, part in parts.items()}, held_by(parts))
        if any(group.maximum([float(holding != self._holding)])):
            self._holding, self._chunks = holding, share_out(holding[0], group.gather(holding[1]))
        return self._chunks

    def _run(self) -> str:
        """The ID of the run, which its first checkpoint creates."""
        folder = self.folder.parent
        run = run_of(folder)
        if run is None:
            run = uuid.uuid4().hex
            write_whole(folder / RUN_ID, run)
        return run


def run_of(folder: Path) -> str | None:
    """The ID of a run, which moves and copies of its directory keep; None before the first checkpoint.

    Raises CheckpointError and Unavailable.
    """
    path = folder / RUN_ID
    if not os.path.lexists(path):
        return None
    with opened(path) as file:
        run = file.read(100)
        if not re.fullmatch(RUN.encode(), run):
            raise ValueError("does not name a run; delete it if the checkpoints beside it are this run's")
    return run.decode()


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _on_disk(path: Path, action: Callable[[], Any]) -> Any:
    """Runs `action`; an OSError becomes a CheckpointError."""
    try:
        return action()
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _free_name(path: Path, why: str) -> Path:
    """Where a checkpoint is set aside: NAME.WHY, or NAME.WHY.2 and so on if an earlier one of that step is there."""
    names = (path.with_name(f"{path.name}.{why}{f'.{n}' if n > 1 else ''}") for n in count(1))
    return next(name for name in names if not os.path.lexists(name))
