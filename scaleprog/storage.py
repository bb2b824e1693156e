"""What a checkpoint is on disk: `step-N` with DCP's files and a manifest of their checksums; there whole or not at all.

A name that begins with a dot is unfinished business of somebody who was interrupted; `tidy` removes it.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

import scaleprog
from scaleprog.errors import CheckpointError, OtherFormat, Unavailable
from scaleprog.files import sync_folder
from scaleprog.sharding.spread import Part

MANIFEST = "manifest.json"
FORMAT = 4

FileList = dict[str, tuple[int, str]]
"""Name -> (bytes, SHA-256)."""


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


def load_tensors(path: Path, parts: Mapping[str, Part]) -> None:
    """Reads a checkpoint into `parts` in place, however it and they are spread. Raises CheckpointError."""
    try:
        dcp.load({name: flat(part) for name, part in parts.items()}, storage_reader=_Reader(path))
    except (OSError, pickle.UnpicklingError, dcp.api.CheckpointException) as error:
        failures = [cause for cause, _ in getattr(error, "failures", {}).values()] or [error]
        if any(isinstance(cause, OSError) for cause in failures):
            raise Unavailable(f"{path}: cannot be read: {reason(error)}") from error
        raise CheckpointError(f"{path}: does not fit this run: {reason(error)}") from error


def flat(part: Part, tensor: Tensor | None = None) -> Tensor:
    """A part (or `tensor`, a copy of it) as DCP takes it: 1-D, with the attributes of DCP's CheckpointableTensor.

    So a checkpoint holds every tensor flattened, whatever the shapes in which an engine had cut it.
    """
    local = (part.tensor if tensor is None else tensor).view(-1)
    held = local.numel() > 0
    attributes = {
        "global_shape": (part.numel,),
        "global_offsets": ((part.start,),) * held,
        "local_offsets": ((0,),) * held,
        "local_sizes": ((local.numel(),),) * held,
    }
    for name, value in attributes.items():
        setattr(local, name, value)
    return local


def verify(path: Path) -> None:
    """Raises CheckpointError unless every file of the checkpoint has the size and checksum of its manifest.

    Raises Unavailable where that cannot be told.
    """
    for name, (size, digest) in _manifest(path)["files"].items():
        file = path / name
        try:
            if file.stat().st_size != size:
                raise CheckpointError(f"{file}: {file.stat().st_size} bytes, {size} expected")
            if _sha256(file) != digest:
                raise CheckpointError(f"{file}: the checksum differs")
        except FileNotFoundError as error:
            raise CheckpointError(f"{file}: missing") from error
        except OSError as error:
            raise Unavailable(f"{file}: {error}") from error


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST}: not readable: {error}") from error
    except OSError as error:
        raise Unavailable(f"{path / MANIFEST}: {error}") from error
    if not isinstance(manifest, dict) or manifest.pop("checksum", None) != _checksum(manifest):
        raise CheckpointError(f"{path / MANIFEST}: the checksum differs")
    if manifest["format"] != FORMAT:
        raise OtherFormat(
            f"{path / MANIFEST}: format {manifest['format']}, this version of scaleprog reads {FORMAT}; "
            f"use the version that wrote it, {manifest['versions']['scaleprog']}"
        )
    return manifest


def prepare(folder: Path) -> None:
    """An empty folder to write into."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def tidy(folder: Path) -> None:
    """Removes what interrupted saves and deletions left behind; a checkpoint that was being replaced comes back."""
    for path in folder.glob(".step-*.old"):
        final = folder / path.name.removeprefix(".").removesuffix(".old")
        if not final.exists() and _sound(path):
            os.rename(path, final)
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def digest_files(folder: Path, rank: int) -> FileList:
    """Size and checksum of the files that a rank has written; rank 0's include DCP's metadata."""
    mine = [*folder.glob(f"__{rank}_*"), *([folder / ".metadata"] if rank == 0 else [])]
    return {path.name: (path.stat().st_size, _sha256(path)) for path in sorted(mine)}


def publish(temporary: Path, final: Path, state: Mapping[str, Any], files: FileList, permanent: bool) -> int:
    """Writes the manifest, makes everything durable, renames. Returns bytes.

    In place of a checkpoint of the same step: after a restart, or with more done of what is due after that step.
    """
    permanent |= final.exists() and _permanent(final)
    manifest = {
        "kind": "scaleprog-checkpoint",
        "format": FORMAT,
        "versions": {"scaleprog": scaleprog.__version__, "torch": torch.__version__},
        "permanent": permanent,
        "state": state,
        "files": files,
    }
    with open(temporary / MANIFEST, "w") as file:
        json.dump({**manifest, "checksum": _checksum(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        os.rename(final, _aside(final))
    os.rename(temporary, final)
    sync_folder(final.parent)
    shutil.rmtree(_aside(final), ignore_errors=True)
    return sum(size for size, _ in files.values())


def retire(folder: Path, step: int, keep: int, protect: Collection[int]) -> None:
    """Deletes the checkpoints before `step` but the newest `keep - 1`, the permanent ones and those of `protect`."""
    older = [p for p in committed(folder) if step_of(p) < step and step_of(p) not in protect and not _permanent(p)]
    for path in older[: max(0, len(older) - keep + 1)]:
        os.rename(path, _aside(path))  # at once invisible: an interrupted deletion must not look like damage
        shutil.rmtree(_aside(path), ignore_errors=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _sound(path: Path) -> bool:
    try:
        verify(path)
    except (CheckpointError, Unavailable):
        return False
    return True


def _permanent(path: Path) -> bool:
    try:
        return bool(_manifest(path)["permanent"])
    except CheckpointError:
        return False
    except Unavailable:
        return True  # not to be deleted as long as it is not known


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def reason(error: BaseException) -> str:
    """The first line of what went wrong, on the first rank where something did."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        rank, (error, _) = min(error.failures.items(), key=lambda failure: failure[0])
        return f"rank {rank}: {reason(error)}"
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
