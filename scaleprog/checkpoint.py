"""Checkpoints through torch.distributed.checkpoint: there whole or not at all, verified before they are trusted."""

import hashlib
import json
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from pydantic import Field
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

import scaleprog
from scaleprog.errors import CheckpointError
from scaleprog.settings import Settings
from scaleprog.sharding.coordinator import Coordinator

MANIFEST = "manifest.json"
FORMAT = 1


class OtherFormat(CheckpointError):
    """A sound checkpoint of another version of scaleprog: nothing to skip as if it were damaged."""


class CheckpointSettings(Settings):
    """A checkpoint is committed at the end of every phase and of the run, and every `every_steps` optimizer steps;
    the newest `keep` stay."""

    every_steps: int | None = Field(default=None, ge=1)
    keep: int = Field(default=2, ge=1)


@dataclass(frozen=True)
class Commit:
    """A checkpoint that became visible."""

    path: Path
    step: int
    seconds: float
    bytes: int


class Checkpoints:
    """The checkpoints of one run directory, `step-N` each."""

    def __init__(self, folder: Path, coordinator: Coordinator, keep: int) -> None:
        self.folder, self.coordinator, self.keep = folder, coordinator, keep

    def save(self, step: int, state: Mapping[str, Any], tensors: dict[str, Tensor], protect: int | None) -> Commit:
        """Writes, verifies and then publishes a checkpoint; all ranks together. Older ones go only after that.

        `protect`: the step of an older checkpoint that must stay. Raises CheckpointError on every rank, with the
        previous checkpoints untouched, if any rank cannot write.
        """
        began = time.perf_counter()
        final, temporary = self.folder / f"step-{step:08d}", self.folder / f".step-{step:08d}.writing"
        self._on_rank_0(lambda: _clear(temporary), f"cannot prepare {temporary}; older checkpoints stay")
        try:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary, sync_files=True))
        except (OSError, dcp.api.CheckpointException) as error:
            raise CheckpointError(
                f"{temporary}: not written ({_reason(error)}); is the disk full or over quota? Older checkpoints stay"
            ) from error
        size = self._on_rank_0(
            lambda: _publish(temporary, final, state), f"cannot publish {final}; older checkpoints stay"
        )
        self._on_rank_0(lambda: self._retire(step, protect), "cannot delete older checkpoints")
        return Commit(final, step, time.perf_counter() - began, size)

    def newest(self, report: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that verifies, agreed by all ranks; rank 0 reports what it skipped and why.

        Raises OtherFormat where that is one of another version of scaleprog.
        """

        def find() -> str | None:
            for path in reversed(committed(self.folder)):
                try:
                    verify(path)
                except OtherFormat:
                    raise
                except CheckpointError as error:
                    report(f"skipped a damaged checkpoint: {error}")
                else:
                    return path.name
            return None

        name = self.coordinator.decide("checkpoint to resume from", find)
        return self.folder / name if name else None

    def at(self, step: int) -> Path:
        """The checkpoint of a step, verified. Raises CheckpointError on every rank."""
        path = self.folder / f"step-{step:08d}"
        self._on_rank_0(lambda: verify(path), "cannot go back to the weights from before the search")
        return path

    def _retire(self, step: int, protect: int | None) -> None:
        older = [p for p in committed(self.folder) if step_of(p) < step and step_of(p) != protect]
        for path in older[: max(0, len(older) - self.keep + 1)]:
            shutil.rmtree(path)

    def _on_rank_0(self, action: Callable[[], Any], failure: str) -> Any:
        """Runs `action` on rank 0; its failure becomes a CheckpointError on every rank."""

        def attempt() -> list[Any]:
            try:
                return [action(), None]
            except (OSError, CheckpointError) as error:
                return [None, str(error)]

        value, error = self.coordinator.decide("checkpoint", attempt)
        if error is not None:
            raise CheckpointError(f"{failure}: {error}")
        return value


def committed(folder: Path) -> list[Path]:
    """The published checkpoints, oldest first."""
    found = (p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir())
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The optimizer step a checkpoint was taken after."""
    return int(path.name.removeprefix("step-"))


def read_state(path: Path) -> dict[str, Any]:
    """What `save` was given as state. Raises CheckpointError."""
    return _manifest(path)["state"]


def load_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Reads a checkpoint into `tensors` in place, however it and they are sharded. Raises CheckpointError."""
    try:
        dcp.load(tensors, storage_reader=_Reader(path))
    except (OSError, pickle.UnpicklingError, RuntimeError, dcp.api.CheckpointException) as error:
        raise CheckpointError(f"{path}: does not fit this run: {_reason(error)}") from error


def verify(path: Path) -> None:
    """Raises CheckpointError unless every file of the checkpoint has the size and checksum of its manifest."""
    for name, (size, digest) in _manifest(path)["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, {size} expected")
        if _sha256(file) != digest:
            raise CheckpointError(f"{file}: the checksum differs")


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST}: not readable: {error}") from error
    if not isinstance(manifest, dict) or manifest.pop("checksum", None) != _checksum(manifest):
        raise CheckpointError(f"{path / MANIFEST}: the checksum differs")
    if manifest["format"] != FORMAT:
        raise OtherFormat(
            f"{path / MANIFEST}: format {manifest['format']}, this version of scaleprog reads {FORMAT}; "
            f"use the version that wrote it, {manifest['versions']['scaleprog']}"
        )
    return manifest


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(temporary: Path, final: Path, state: Mapping[str, Any]) -> int:
    """Writes the manifest, makes everything durable, renames. Returns bytes."""
    files = {p.name: (p.stat().st_size, _sha256(p)) for p in sorted(temporary.iterdir())}
    manifest = {
        "kind": "scaleprog-checkpoint",
        "format": FORMAT,
        "versions": {"scaleprog": scaleprog.__version__, "torch": torch.__version__},
        "state": state,
        "files": files,
    }
    with open(temporary / MANIFEST, "w") as file:
        json.dump({**manifest, "checksum": _checksum(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():  # the same step written once more after a restart
        shutil.rmtree(final)
    os.rename(temporary, final)
    directory = os.open(final.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    return sum(size for size, _ in files.values())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, on the first rank where something did."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        rank, (error, _) = min(error.failures.items(), key=lambda failure: failure[0])
        return f"rank {rank}: {_reason(error)}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _Reader(dcp.FileSystemReader):
    """DCP's reader, but its `.metadata` pickle may name nothing beyond what such metadata is made of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    ALLOWED = frozenset(
        {
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            *(("torch.distributed.checkpoint.metadata", name) for name in (
                "Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
                "_MEM_FORMAT_ENCODING", "StorageMeta")),  # not BytesStorageMetadata: DCP would unpickle such bytes
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.distributed.checkpoint._storage_utils", "_StorageInfo"),
        }
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        value = super().find_class(module, name) if (module, name) in self.ALLOWED else None
        if value is None and module == "torch":
            value = getattr(torch, name, None)
            if not isinstance(value, torch.dtype):
                value = None
        if value is None:
            raise pickle.UnpicklingError(f".metadata names {module}.{name}, which no checkpoint metadata contains")
        return value
