"""Checkpoints of a run: taken while training goes on, visible once all ranks agree that they are sound."""

import copy
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from scaleprog.errors import CheckpointError, OtherFormat, Unavailable
from scaleprog.settings import Few, Minutes, Settings, Steps, WholeEpochs
from scaleprog.sharding.coordinator import Coordinator
from scaleprog.sharding.spread import Part
from scaleprog.storage import (
    FileList,
    committed,
    digest_files,
    flat,
    prepare,
    publish,
    reason,
    retire,
    step_of,
    tidy,
    verify,
)


class CheckpointSettings(Settings):
    """When a checkpoint is taken, beside the ends of phases and of the run and when the run is asked to stop, and which
    ones stay."""

    every_steps: Steps | None = None
    every_minutes: Minutes | None = 10.0
    """By rank 0's clock; the least work that a crash can lose is what was done since the last commit."""
    keep: Few = 2
    """The newest so many stay."""
    keep_best: bool = False
    """One is taken at each evaluation with a new best top-1, and that one stays."""
    keep_every_epochs: WholeEpochs | None = None
    """One is taken at the end of every so many epochs of the schedule, and they all stay."""


@dataclass(frozen=True)
class Commit:
    """How a checkpoint ended: visible, or failed with `error`."""

    path: Path
    step: int
    stall: float
    """Seconds that training stood still for it."""
    seconds: float
    """From then until it was visible."""
    bytes: int
    error: str | None = None


class Checkpoints:
    """The checkpoints of one run directory. Every rank calls the same methods in the same order.

    Args:
        folder: where they are; one folder `step-N` each.
        coordinator: of the ranks.
        keep: how many of the newest stay.
        fence: held on rank 0 while something becomes visible or is deleted; raises Superseded.
        generation: of this start; names what is being written. 0 for whoever only reads.
    """

    def __init__(
        self,
        folder: Path,
        coordinator: Coordinator,
        keep: int,
        fence: Callable[[], AbstractContextManager[None]] = nullcontext,
        generation: int = 0,
    ) -> None:
        self.folder, self.coordinator, self.keep = folder, coordinator, keep
        self._fence, self._generation = fence, generation
        group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._background = Coordinator(group)  # its collectives meet only each other
        gpu = torch.cuda.is_available()
        device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if gpu else (None, ())  # a thread has its own
        self._writer = ThreadPoolExecutor(1, "checkpoint", *device)
        # one for all saves: its host memory is used again, as `save` waits for the save before
        options = StagingOptions(gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=gpu)
        self._stager = DefaultStager(options)
        self._writing: Future[Commit] | None = None
        self._finished: list[Commit] = []

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        parts: Mapping[str, Part],
        protect: Collection[int] = (),
        permanent: bool = False,
    ) -> None:
        """Copies everything and lets a thread write, verify and publish it; older checkpoints go only after that.

        Waits for the save before. What cannot be written is told by `finished`, with older checkpoints untouched.

        Args:
            protect: steps of older checkpoints that must stay.
            permanent: this one is never deleted.
        """
        began = time.monotonic()
        self.wait()
        copies = cast(dict[str, Tensor], self._stager.stage({name: part.tensor for name, part in parts.items()}))
        staged = {name: flat(part, copies[name]) for name, part in parts.items()}
        state = copy.deepcopy(dict(state))
        stall = time.monotonic() - began
        self._writing = self._writer.submit(self._write, step, state, staged, stall, tuple(protect), permanent)

    def wait(self) -> None:
        """Returns when the last save is visible or has failed. Raises Superseded."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._finished.append(writing.result())

    def finished(self) -> list[Commit]:
        """The saves that have ended since the last call; may differ between ranks by the one still being written."""
        if self._writing is not None and self._writing.done():
            self.wait()
        ended, self._finished = self._finished, []
        return ended

    def newest(self, report: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that verifies, agreed by all ranks; rank 0 reports what it skipped and why, and takes
        it out of the way.

        Raises OtherFormat where that is one of another version of scaleprog, Unavailable where none can be read.
        """

        def find() -> str | None:
            damaged: list[Path] = []
            unreadable: Unavailable | None = None
            for path in reversed(committed(self.folder)):
                try:
                    verify(path)
                except OtherFormat:
                    raise
                except CheckpointError as error:
                    report(f"skipped a damaged checkpoint: {error}")
                    damaged.append(path)
                except Unavailable as error:
                    report(f"skipped a checkpoint that cannot be read: {error}")
                    unreadable = error
                else:
                    set_aside(damaged)
                    return path.name
            if unreadable is not None:
                raise unreadable
            set_aside(damaged)
            return None

        def set_aside(damaged: list[Path]) -> None:
            if damaged and self._generation:
                with self._fence(), suppress(OSError):
                    for path in damaged:
                        path.rename(path.with_name(f"{path.name}.damaged"))

        name = self.coordinator.on_rank_0("checkpoint to resume from", find)
        return self.folder / name if name else None

    @property
    def newest_step(self) -> int:
        """The step of the newest visible checkpoint; 0 if there is none."""
        return max(map(step_of, committed(self.folder)), default=0)

    def at(self, step: int) -> Path:
        """The checkpoint of a step, verified. Raises CheckpointError on every rank."""
        self.wait()
        path = self.folder / f"step-{step:08d}"
        try:
            self.coordinator.on_rank_0("checkpoint to go back to", lambda: verify(path))
        except CheckpointError as error:
            raise CheckpointError(f"cannot go back to the weights from before the search: {error}") from None
        return path

    def tidy(self) -> None:
        """Removes what interrupted starts have left; to be called on rank 0 when no other start can be writing."""
        tidy(self.folder)

    def _write(
        self, step: int, state: Mapping[str, Any], tensors: Any, stall: float, protect: Collection[int], permanent: bool
    ) -> Commit:
        """What the thread does."""
        began = time.monotonic()
        group = self._background
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".step-{step:08d}.{self._generation}.writing"

        def make_room() -> None:
            with self._fence():
                prepare(temporary)

        def digest() -> FileList | str:
            try:
                return digest_files(temporary, group.rank)
            except OSError as failure:
                return f"rank {group.rank}: {failure}"

        def make_visible() -> int:
            files: FileList = {}
            for part in parts:
                if isinstance(part, str):
                    raise CheckpointError(part)
                files |= part
            with self._fence():
                return publish(temporary, final, state, files, permanent)

        def delete_older() -> None:
            with self._fence():
                retire(self.folder, step, self.keep, protect)

        size, error = 0, None
        try:
            group.on_rank_0("prepare", lambda: _on_disk(temporary, make_room))
            dcp.save(
                tensors,
                storage_writer=dcp.FileSystemWriter(temporary, sync_files=True),
                process_group=group.group,
            )
            parts = group.gather(digest())
            size = group.on_rank_0("publish", lambda: _on_disk(final, make_visible))
            group.on_rank_0("retire", lambda: _on_disk(self.folder, delete_older))
        except (OSError, CheckpointError, Unavailable, dcp.api.CheckpointException) as failure:
            error = f"{temporary}: not written ({reason(failure)}); is the disk full or over quota?"
        return Commit(final, step, stall, time.monotonic() - began, size, error)


def _on_disk(path: Path, action: Callable[[], Any]) -> Any:
    """Runs `action`; an OSError becomes a CheckpointError."""
    try:
        return action()
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from error
