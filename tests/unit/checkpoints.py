"""Checkpoints to test, and ways to damage them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaleprog.ranks.coordinator import Coordinator
from scaleprog.rundir.checkpoint import Checkpoints, Commit
from scaleprog.rundir.storage import MANIFEST, _checksum
from scaleprog.sharding.placement import LocalSlice

Save = Callable[..., Path]


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """One of each kind that a run has: matrix, vector, gate, scalar step count, half precision, integer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "online/net.weight": torch.randn(7, 5, generator=generator),
        "ema.0/net.bias": torch.randn(3, generator=generator),
        "online/net.gate": torch.zeros(1),
        "step/net.weight": torch.tensor(float(seed)),
        "online/half": torch.randn(2, 2, generator=generator).bfloat16(),
        "ids": torch.arange(4) + seed,
    }


def blank() -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 99) for name, tensor in tensors().items()}


def parts(tensors: dict[str, Tensor]) -> dict[str, LocalSlice]:
    """Each tensor as one rank alone holds it."""
    return {name: LocalSlice.whole(tensor) for name, tensor in tensors.items()}


def commit(
    folder: Path,
    step: int,
    state: dict[str, Any],
    tensors: dict[str, Tensor],
    keep: int = 9,
    protect: tuple[int, ...] = (),
    permanent: bool = False,
    best: int = 0,
) -> Commit:
    """Saves, waits, and tells how it ended."""
    checkpoints = Checkpoints(folder, Coordinator(), keep)
    checkpoints.save(step, state, parts(tensors), protect, permanent, best=best)
    checkpoints.wait()
    [ended] = checkpoints.finished()
    return ended


def newest(folder: Path) -> tuple[str | None, list[str]]:
    """The name of the newest checkpoint, and what was reported."""
    told: list[str] = []
    found = Checkpoints(folder, Coordinator(), keep=9).newest(told.append)
    return (found.name if found else None), told


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, at: int = -1, bit: int = 0) -> None:
    """Turns over one bit; by default of the byte in the middle."""
    data = bytearray(path.read_bytes())
    data[at if at >= 0 else len(data) // 2] ^= 1 << bit
    path.write_bytes(data)


def data_file(path: Path) -> Path:
    return next(p for p in path.iterdir() if p.suffix == ".safetensors")


def reseal(path: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> Path:
    """What whoever damages a checkpoint on purpose does: a manifest that is right for the files as they are now, with
    `change` made to it and a checksum for that."""
    manifest = json.loads((path / MANIFEST).read_text())
    for file in path.glob("rank-*"):
        content = file.read_bytes()
        manifest["files"][file.name] = [len(content), hashlib.sha256(content).hexdigest()]
    change(manifest)
    return seal(path, manifest)


def seal(path: Path, manifest: dict[str, Any]) -> Path:
    """Writes a manifest with its checksum."""
    values = {key: value for key, value in manifest.items() if key != "checksum"}
    (path / MANIFEST).write_text(json.dumps(values | {"checksum": _checksum(values)}))
    return path
