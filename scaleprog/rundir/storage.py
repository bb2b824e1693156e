"""A checkpoint on disk: a folder `step-N` with a file per rank and a manifest. It is complete or does not exist.

The manifest says which run the checkpoint belongs to, which tensors it holds, which file holds which elements, and what
the files' checksums are. A reader checks all of it, because anyone who changes a file can update the manifest to match.

A folder whose name begins with a dot is left over from an interrupted save or deletion; `tidy` removes it.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from scaleprog.errors import CheckpointError, OtherFormat, OtherRun, Unavailable
from scaleprog.files.atomic import IN_THE_WAY, open_regular, sync_folder, write_whole
from scaleprog.rundir import tensorfile
from scaleprog.rundir.tensorfile import DTYPES, NAMES, Layout
from scaleprog.sharding.placement import LocalSlice
from scaleprog.version import VERSION

MANIFEST = "manifest.json"
KIND, FORMAT = "scaleprog-checkpoint", 5
MANIFEST_BYTES = 2**26  # twice the manifest of a ViT-L on 4,096 ranks
RANKS = TENSORS = 100_000  # the most that a manifest may name
RUN = "[0-9a-f]{32}"

FileList = dict[str, tuple[int, str]]
"""File name -> (bytes, SHA-256)."""


@dataclass(frozen=True)
class Stored:
    """A flattened tensor of a checkpoint: the consecutive `chunks`, each (rank, elements), make up the tensor."""

    dtype: str
    numel: int
    chunks: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Manifest:
    """The content of a checkpoint's manifest.json."""

    run: str
    """ID of the run."""
    step: int
    permanent: bool
    recipe: Mapping[str, Any]
    state: Mapping[str, Any]
    files: FileList
    tensors: Mapping[str, Stored]

    @cached_property
    def held(self) -> dict[int, dict[str, tuple[str, int]]]:
        """The contents of each rank's file: rank -> tensor name -> (dtype, elements)."""
        held: dict[int, dict[str, tuple[str, int]]] = {}
        for name, stored in self.tensors.items():
            for rank, length in stored.chunks:
                held.setdefault(rank, {})[name] = stored.dtype, length
        return held


def committed(folder: Path) -> list[Path]:
    """The published checkpoints, oldest first."""
    found = (p for p in folder.glob("step-*") if re.fullmatch(r"step-[0-9]+", p.name) and p.is_dir())
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The number of optimizer steps before a checkpoint."""
    return int(path.name.removeprefix("step-"))


def file_name(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


# ---- reading


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Opens a regular file for reading. Turns errors, also inside the block, into CheckpointError or Unavailable."""
    try:
        with open_regular(path, flags=os.O_NOFOLLOW) as file:
            yield file
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path}: missing") from error
    except OSError as error:
        if error.errno in IN_THE_WAY:
            raise CheckpointError(f"{path}: not a regular file") from error
        raise Unavailable(f"{path}: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_tensors(path: Path, parts: Mapping[str, LocalSlice], subset: bool = False) -> None:
    """Reads a checkpoint into `parts` in place; the checkpoint may be sharded differently.

    Args:
        path: the checkpoint.
        parts: this rank's elements of each tensor, by name.
        subset: whether `parts` may lack some tensors of the checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, or `parts` do not match its names, sizes and types.
        Unavailable: a file cannot be read now.
    """
    manifest = read_manifest(path)
    unlike = parts.keys() - manifest.tensors.keys() or (not subset and manifest.tensors.keys() - parts.keys())
    if unlike:
        name = min(unlike)
        raise _misfit(path, f"{_shown(name)} is not in the {'checkpoint' if name in parts else 'network'}")
    wanted: dict[int, list[tuple[str, int, Tensor]]] = {}  # rank -> (tensor, first element in its chunk, target)
    for name, part in parts.items():
        stored, target = manifest.tensors[name], part.tensor.detach().view(-1)
        if (stored.numel, stored.dtype) != (part.numel, NAMES[target.dtype]):
            raise _misfit(
                path,
                f"size and type of {_shown(name)} are {stored.numel} {stored.dtype} "
                f"instead of {part.numel} {NAMES[target.dtype]}",
            )
        start, stop = part.start, part.start + target.numel()
        at = 0
        for rank, length in stored.chunks:
            first, last = max(at, start), min(at + length, stop)
            if first < last:
                wanted.setdefault(rank, []).append((name, first - at, target[first - start : last - start]))
            at += length
    for rank, pieces in sorted(wanted.items()):
        with opened(path / file_name(rank)) as file:
            layout = Layout.of(manifest.held[rank])
            tensorfile.check(file, layout)
            for name, first, target in pieces:
                tensorfile.read(file, layout.starts[name] + first * target.element_size(), target)


def verify(path: Path, most: int | None = None) -> Manifest:
    """The manifest of a checkpoint, after checking that all its files match the manifest.

    Args:
        path: the checkpoint.
        most: maximum size of all its files in bytes (None: any).

    Raises:
        CheckpointError: a file is missing, damaged or does not match.
        Unavailable: a file cannot be read now.
    """
    manifest = read_manifest(path)
    size = sum(size for size, _ in manifest.files.values())
    if most is not None and size > most:
        raise CheckpointError(f"{path}: {size} bytes, but a checkpoint of this run has at most {most}")
    for rank, held in manifest.held.items():
        with opened(path / file_name(rank)) as file:
            tensorfile.check(file, Layout.of(held), manifest.files[file_name(rank)][1])
    return manifest


def read_manifest(path: Path) -> Manifest:
    """The manifest, after checking its values and the folder's name. Raises CheckpointError or Unavailable."""
    where = path / MANIFEST
    with opened(where) as file:
        if path.is_symlink():
            raise CheckpointError(f"{path}: a symbolic link; a checkpoint must be a folder of its own")
        content = file.read(MANIFEST_BYTES + 1)
        if len(content) > MANIFEST_BYTES:
            raise ValueError(f"more than {MANIFEST_BYTES} bytes")
        try:
            values = json.loads(content.decode(), parse_constant=_refuse)
            if not isinstance(values, dict) or values.pop("checksum", None) != _checksum(values):
                raise ValueError("the checksum differs")
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if values.get("kind") != KIND or type(values.get("format")) is not int:
            raise ValueError("not a manifest of a checkpoint")
        if values["format"] != FORMAT:
            raise OtherFormat(
                f"{where}: format {values['format']}, but this version of scaleprog reads {FORMAT}; "
                f"use the version that wrote it: {_version(values)}"
            )
        manifest = _checked(values)
    named = re.fullmatch(r"\.?step-([0-9]+)(\.old)?", path.name)
    if named and int(named[1]) != manifest.step:
        raise OtherRun(
            f"{path}: holds step {manifest.step}, so it was renamed or replaced another checkpoint; "
            f"its name must be step-{manifest.step:08d}"
        )
    return manifest


def _checked(values: Mapping[str, Any]) -> Manifest:
    """Builds a manifest from untrusted JSON values. Raises ValueError."""
    run, step, permanent = values.get("run"), values.get("step"), values.get("permanent")
    if not (isinstance(run, str) and re.fullmatch(RUN, run)):
        raise ValueError("`run` does not name a run")
    if not _is_count(step) or step >= 2**53:
        raise ValueError("`step` is not a step number")
    if not isinstance(permanent, bool):
        raise ValueError("`permanent` is neither true nor false")
    if len(_mapping(values, "tensors")) > TENSORS:
        raise ValueError(f"`tensors`: more than {TENSORS} tensors")
    recipe, state, files, tensors = (_mapping(values, key) for key in ("recipe", "state", "files", "tensors"))
    manifest = Manifest(run, step, permanent, recipe, state, {}, {n: _stored(n, t) for n, t in tensors.items()})
    if files.keys() != (expected := {file_name(rank) for rank in manifest.held}):
        raise ValueError(f"`files` does not match the files that hold tensors: {_shown(min(files.keys() ^ expected))}")
    for rank, held in manifest.held.items():
        name = file_name(rank)
        file = files[name]
        if not (isinstance(file, list) and len(file) == 2 and _is_count(file[0]) and _is_digest(file[1])):
            raise ValueError(f"`files`: {name} needs a size and a checksum")
        if file[0] != (size := Layout.of(held).size):
            raise ValueError(f"`files`: {name} has {file[0]} bytes, but its tensors need {size}")
        manifest.files[name] = file[0], file[1]
    return manifest


def _mapping(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"`{key}` is not a mapping")
    return value


def _stored(name: str, value: Any) -> Stored:
    if not re.fullmatch(r"[\w./-]{1,200}", name, re.ASCII):
        raise ValueError(f"`tensors`: {_shown(name)} is not a tensor name")
    if not (
        isinstance(value, list)
        and len(value) == 3
        and isinstance(value[0], str)
        and value[0] in DTYPES
        and _is_count(value[1])
        and isinstance(value[2], list)
    ):
        raise ValueError(f"`tensors`: {name} needs a type, a size and chunks")
    dtype, numel, chunks = value
    for chunk in chunks:
        if not (
            isinstance(chunk, list)
            and len(chunk) == 2
            and all(map(_is_count, chunk))
            and chunk[0] < RANKS
            and chunk[1] > 0
        ):
            raise ValueError(f"`tensors`: {name} has a chunk that is not a rank and a length")
    if sum(length for _, length in chunks) != numel:
        raise ValueError(f"`tensors`: the chunks of {name} do not add up to its {numel} elements")
    if len({rank for rank, _ in chunks}) < len(chunks):
        raise ValueError(f"`tensors`: {name} has two chunks of one rank")
    return Stored(dtype, numel, tuple((rank, length) for rank, length in chunks))


# ---- writing


def write_tensors(
    folder: Path, rank: int, tensors: Mapping[str, Tensor], wrote: Callable[[], object] = lambda: None
) -> FileList:
    """Writes a rank's file, unless there are no tensors, and syncs it to disk; calls `wrote` now and then.

    Raises OSError.
    """
    if not tensors:
        return {}
    name = file_name(rank)
    return {name: tensorfile.write(folder / name, tensors, wrote)}


def prepare(folder: Path) -> None:
    """Creates an empty folder in place of `folder`. Raises OSError."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def publish(temporary: Path, final: Path, manifest: Manifest) -> int:
    """Writes the manifest, makes everything durable and renames `temporary` to `final`.

    Replaces an older checkpoint of the same step, which exists after a restart, or if pending work has been done since.

    Returns:
        Bytes in the files of all ranks.

    Raises:
        CheckpointError: the state holds NaN or infinity, or the manifest is too large.
        OSError: something cannot be written.
    """
    permanent = manifest.permanent or (final.exists() and _permanent(final))
    _write_manifest(temporary, replace(manifest, permanent=permanent))
    sync_folder(temporary)
    replaces = final.exists()
    if replaces:
        os.rename(final, _aside(final))
    try:
        os.rename(temporary, final)
    except OSError:
        if replaces:
            os.rename(_aside(final), final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(_aside(final), ignore_errors=True)
    return sum(size for size, _ in manifest.files.values())


def rename_recipe(path: Path, recipe: Mapping[str, Any]) -> None:
    """Says in the manifest of a checkpoint that a run of another recipe wrote it. Raises as `publish` does."""
    _write_manifest(path, replace(read_manifest(path), recipe=recipe))


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes a manifest into the folder of a checkpoint, atomically; raises what `publish` raises."""
    values = {
        "kind": KIND,
        "format": FORMAT,
        "versions": {"scaleprog": VERSION, "torch": torch.__version__},
        "run": manifest.run,
        "step": manifest.step,
        "permanent": manifest.permanent,
        "recipe": manifest.recipe,
        "state": manifest.state,
        "files": manifest.files,
        "tensors": {name: [t.dtype, t.numel, t.chunks] for name, t in manifest.tensors.items()},
    }
    try:
        text = json.dumps({**values, "checksum": _checksum(values)}, allow_nan=False)
    except ValueError as error:  # readers would refuse NaN and infinity
        raise CheckpointError(f"{folder / MANIFEST}: cannot write the state: {error}") from error
    if len(text) > MANIFEST_BYTES:
        raise CheckpointError(f"{folder / MANIFEST}: {len(text)} bytes, more than the limit of {MANIFEST_BYTES}")
    write_whole(folder / MANIFEST, text)


# ---- deleting


def tidy(folder: Path, most: int | None = None) -> None:
    """Removes what interrupted saves and deletions left behind. Restores a checkpoint that was being replaced, unless
    it is damaged."""
    for path in folder.glob(".step-*.old"):
        final = folder / path.name.removeprefix(".").removesuffix(".old")
        if not final.exists() and not _damaged(path, most):
            os.rename(path, final)
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def discard(folder: Path) -> None:
    """Removes what a failed save has written; never raises OSError."""
    shutil.rmtree(folder, ignore_errors=True)


def best_saved(folder: Path, best: int) -> int:
    """The step of the best checkpoint there is: `best`, or what was the best before if that could not be saved."""
    before = [path for path in committed(folder) if step_of(path) <= best]
    if not before or step_of(before[-1]) == best:
        return best
    try:
        return int(read_manifest(before[-1]).state.get("best_step", 0))
    except (CheckpointError, Unavailable):
        return best


def retire(folder: Path, step: int, keep: int, protect: Collection[int]) -> set[int]:
    """Deletes the checkpoints before `step`, except the newest `keep - 1`, permanent ones and those in `protect`.

    Returns the steps of the permanent ones that are not in `protect`: to find them, this reads all their manifests.
    """
    found = [path for path in committed(folder) if step_of(path) < step and step_of(path) not in protect]
    permanent = {step_of(path) for path in found if _permanent(path)}
    older = [path for path in found if step_of(path) not in permanent]
    for path in older[: max(0, len(older) - keep + 1)]:
        os.rename(path, _aside(path))  # hides it first: an interrupted deletion must not look like damage
        shutil.rmtree(_aside(path), ignore_errors=True)
    return permanent


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _damaged(path: Path, most: int | None) -> bool:
    """Whether a checkpoint is certainly of no use: foreign or unreadable ones must not be deleted."""
    try:
        verify(path, most)
    except (OtherFormat, OtherRun, Unavailable):
        return False
    except CheckpointError:
        return True
    return False


def _permanent(path: Path) -> bool:
    try:
        return read_manifest(path).permanent
    except (OtherFormat, OtherRun, Unavailable):
        return True  # as in `_damaged`
    except CheckpointError:
        return False


# ---- details


def _misfit(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: does not fit this run: {why}")


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _version(values: Mapping[str, Any]) -> str:
    """The version of scaleprog that wrote a manifest of another format, as text for a message."""
    versions = values.get("versions")
    version = versions.get("scaleprog") if isinstance(versions, dict) else None
    known = isinstance(version, str) and re.fullmatch(r"[0-9a-z.+]{1,40}", version)
    return str(version) if known else "unknown"


def _shown(name: str) -> str:
    """An untrusted name as text for a message."""
    return name if re.fullmatch(r"[\w./-]{1,200}", name, re.ASCII) else repr(name[:100])


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def reason(error: BaseException) -> str:
    """The first line of an error's message, or else its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
