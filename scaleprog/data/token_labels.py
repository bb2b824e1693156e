"""Token labels (arXiv 2104.10858): what a teacher sees at each place of a training image.

A label map has the K highest logits of each cell of a grid over the whole stored image, with their classes. The i-th
label shard of a data set holds the map of every sample of the i-th training shard, `KEY.topk.npy`, and the reader joins
both by key.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from tokenize import TokenError

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from scaleprog.data import tar
from scaleprog.data.manifest import Manifest
from scaleprog.data.source import source_of
from scaleprog.errors import DataError
from scaleprog.recipe.numbers import ceil_div

SPLIT, EXTENSION = "train", "topk.npy"
ENTRY = np.dtype([("logit", "<f2"), ("class", "<u2")])
BUILDER, GRID = "token-labels", ("rows", "columns", "top")
MOST_CLASSES, MOST_CELLS = 2**16, 2**10
NUMBERS = 6  # of an origin
HINT = "build the token labels again, for the shards of data.path"


@dataclass(frozen=True)
class LabelShards:
    """The label shards that belong to the training shards of a data set.

    Args:
        manifest: lists the label shards; `source` says how a teacher made them.
        grid: (h, w) cells, and K entries per cell.
        other_images: whether the teacher has seen other files, as far as that is known: the same images in another
            size or form, or images that only have the same keys.
    """

    manifest: Manifest
    grid: tuple[int, int, int]
    other_images: bool = False

    @classmethod
    def of(cls, folder: str, images: Manifest, whole: Manifest | None = None) -> "LabelShards":
        """Those in `folder`, a path or URL. `whole`: the manifest of all shards, if `images` lists the first of them.

        Raises DataError if they do not belong to the training shards that `images` lists.
        """
        labels = Manifest.load(folder)
        labels.verify_sizes(SPLIT)
        grid = _grid(labels)
        if labels.classes != images.classes:
            raise DataError(
                f"{folder}: the teacher has other classes ({len(labels.classes)}) than {images.root} "
                f"({len(images.classes)}); {HINT}"
            )
        theirs, ours = images.split(SPLIT), labels.split(SPLIT)
        if len(ours) < len(theirs) or any(a.samples != b.samples for a, b in zip(ours, theirs)):
            raise DataError(
                f"{folder}: token labels of {labels.samples(SPLIT)} images in {len(ours)} shards, but {images.root} "
                f"has {images.samples(SPLIT)} in {len(theirs)}; {HINT}"
            )
        splits = {SPLIT: ours[: len(theirs)]}
        whole = whole or images
        seen, there = labels.source.get("images"), (whole.identity()[SPLIT], whole.source.get(SPLIT))
        as_many = len(ours) == len(whole.split(SPLIT))
        other = as_many and seen is not None and seen not in there  # packed shards name theirs
        return cls(Manifest(labels.root, labels.classes, splits, labels.source, images.store), grid, other)

    def load(self, index: int, keys: Sequence[str], verify: bool) -> np.ndarray:
        """The maps (samples, h, w, K) of ENTRY of the training shard `index`, in the order of its `keys`.

        `verify`: whether to compare the checksum. Raises DataError, or Unavailable if the shard cannot be read now.
        """
        shard = self.manifest.split(SPLIT)[index]
        source = source_of(self.manifest.root, self.manifest.store)
        path, content = source.path(shard.name), source.read(shard, verify)
        rows = {key: row for row, key in enumerate(keys)}
        maps = np.empty((len(keys), *self.grid), ENTRY)
        try:
            for key, files in tar.samples(content, len(content)):
                if (row := rows.pop(key, None)) is None or EXTENSION not in files:
                    raise DataError(f"{path}: sample {key!r} is not in the training shard; {HINT}")
                maps[row] = self._map(tar.read(content, files[EXTENSION]), f"{path}: sample {key!r}")
        except (ValueError, OSError) as error:
            raise DataError(f"{path}: not a tar of token labels ({error}); {HINT}") from error
        if rows:
            raise DataError(f"{path}: no token labels of {len(rows)} samples, such as {next(iter(rows))!r}; {HINT}")
        return maps

    def _map(self, content: bytes, where: str) -> np.ndarray:
        """One map, (h, w, K) of ENTRY."""
        try:
            found = npy.read_array(io.BytesIO(content), allow_pickle=False)
        except (ValueError, SyntaxError, TokenError, MemoryError) as error:  # numpy parses the header as Python
            raise DataError(f"{where}: no label map ({error}); {HINT}") from error
        if found.dtype != ENTRY or found.shape != self.grid:
            raise DataError(f"{where}: a label map of {found.shape} {found.dtype}, not {self.grid} {ENTRY}; {HINT}")
        if found["class"].max() >= len(self.manifest.classes) or not np.isfinite(found["logit"]).all():
            raise DataError(
                f"{where}: a label map with a class that does not exist, or a logit that is not finite; {HINT}"
            )
        return found

    @property
    def numbers(self) -> int:
        """Numbers in a row of `pack`."""
        return 2 * math.prod(self.grid) + NUMBERS

    @property
    def sample_bytes(self) -> int:
        """Bytes of one map in memory."""
        return math.prod(self.grid) * ENTRY.itemsize

    def identity(self) -> str:
        """What tells these labels from others, in one line."""
        return f"{self.manifest.identity()[SPLIT]}, by {self.manifest.source.get('teacher')}"


def _grid(manifest: Manifest) -> tuple[int, int, int]:
    """(h, w, K) of the label maps that a manifest lists. Raises DataError if it lists none."""
    grid = [n for n in map(manifest.source.get, GRID) if isinstance(n, int) and 0 < n <= MOST_CELLS]
    if manifest.source.get("builder") == BUILDER and len(grid) == len(GRID):
        return grid[0], grid[1], grid[2]
    raise DataError(f"{manifest.root}: no token labels; build them with `scaleprog shards token-labels`")


def encode(logits: np.ndarray, classes: np.ndarray) -> bytes:
    """The file of one label map, from (h, w, K) logits and their classes."""
    entries = np.empty(logits.shape, ENTRY)
    entries["logit"], entries["class"] = logits, classes
    file = io.BytesIO()
    npy.write_array(file, entries, allow_pickle=False)
    return file.getvalue()


def pack(maps: Sequence[np.ndarray], origins: Tensor) -> Tensor:
    """One row of numbers per image, (n, numbers) float32: its label map (h, w, K) of ENTRY, and its origin (2, 3)."""
    whole = np.stack(maps)
    parts = [torch.from_numpy(whole[name].astype(np.float32)) for name in ("logit", "class")]
    return torch.cat([part.flatten(1) for part in (*parts, origins)], 1)


def unpack(rows: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Maps (n, 2, h, w, K), logits and classes, and origins (n, 2, 3) from the rows that `pack` makes."""
    maps, origins = rows[:, :-NUMBERS], rows[:, -NUMBERS:]
    return maps.reshape(-1, 2, *grid), origins.reshape(-1, 2, 3)


def dense_logits(maps: Tensor, classes: int) -> Tensor:
    """(B, 2, h, w, K) logits and classes -> (B, h, w, classes) logits, 0 where a map has none."""
    logits, found = maps.unbind(1)
    return logits.new_zeros(*logits.shape[:-1], classes).scatter_(-1, found.long(), logits)


def aligned(logits: Tensor, origins: Tensor, side: int) -> Tensor:
    """RoIAlign (arXiv 1703.06870) for any affine map: averages `logits` over each cell of an augmented image.

    Each cell has n x n points, n = the longer side of the map / `side`, rounded up. At a point, the logits are
    interpolated bilinearly; beyond the image they are 0.

    Args:
        logits: (B, h, w, classes), over the whole stored images.
        origins: (B, 2, 3), see `data/origin.py`.
        side: cells on a side of the result.

    Returns:
        (B, side * side, classes).
    """
    (height, width), points = logits.shape[1:3], ceil_div(max(logits.shape[1:3]), side)
    steps = (torch.arange(side * points, device=logits.device, dtype=logits.dtype) + 0.5) / (side * points)
    y, x = (
        part.view(side, points, side, points).transpose(1, 2).reshape(side**2, points**2)
        for part in torch.meshgrid(steps, steps, indexing="ij")
    )
    across, down = torch.einsum("bij,jcp->ibcp", origins, torch.stack((x, y, torch.ones_like(x))))
    weights = torch.einsum("bcpi,bcpj->bcij", _shares(down, height), _shares(across, width)) / points**2
    return weights.flatten(2) @ logits.flatten(1, 2)


def _shares(at: Tensor, cells: int) -> Tensor:
    """How much linear interpolation takes of each cell at points of the unit interval: (...) -> (..., cells)."""
    inside = (at >= 0) & (at <= 1)
    place = (at * cells - 0.5).clamp(0, cells - 1)
    shares = (1 - (place.unsqueeze(-1) - torch.arange(cells, device=at.device)).abs()).clamp_min(0)
    return shares * inside.unsqueeze(-1)


def targets(maps: Tensor, origins: Tensor, side: int, classes: int, smoothing: float) -> tuple[Tensor, Tensor]:
    """The smoothed targets of augmented images.

    Args:
        maps: (B, 2, h, w, K), logits and classes.
        origins: (B, 2, 3), see `data/origin.py`.
        side: tokens on a side of the network's grid.
        classes: their number.
        smoothing: the part of each target that all classes share equally.

    Returns:
        (B, classes) of whole images, and (B, side * side, classes) of their tokens.
    """
    logits = dense_logits(maps, classes)
    whole, dense = (aligned(logits, origins, cells).softmax(-1) for cells in (1, side))
    whole, dense = (part * (1 - smoothing) + smoothing / classes for part in (whole, dense))
    return whole.squeeze(1), dense
