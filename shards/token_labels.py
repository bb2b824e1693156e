"""Builds the token labels of a data set: a teacher classifies every place of its training images (arXiv 2104.10858).

The teacher sees each image whole, resized to a square, so that a label map covers all of it. It is a timm model that
ends in a grid of features and a classifier of their mean; the classifier is applied to each place of the grid alone.
"""

import hashlib
import pickle
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from scaleprog.data.decode import decode, whole
from scaleprog.data.manifest import Manifest
from scaleprog.data.shard import ShardReader
from scaleprog.data.token_labels import BUILDER, EXTENSION, GRID, MOST_CELLS, MOST_CLASSES, SPLIT, encode
from scaleprog.errors import DataError
from scaleprog.planning.savings import is_out_of_memory
from scaleprog.shards.build import build as build_shards
from scaleprog.shards.build import finished
from scaleprog.shards.pool import worker
from scaleprog.training.initial import SUFFIX, read_tensors

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2  # batches decoded while the teacher computes


@dataclass(frozen=True)
class Teacher:
    """A timm model that labels images.

    Args:
        name: timm's name of the model.
        classes: the classes that it must know.
        weights: a file of its weights, safetensors or a state dict of torch; None: timm's pretrained weights.
        resolution: side of the images that it sees, in pixels; None: the largest that timm names for it.
        top: how many logits of each place to keep.
    """

    name: str
    classes: int
    weights: Path | None = None
    resolution: int | None = None
    top: int = 5

    def outline(self) -> tuple[int, tuple[int, int, int]]:
        """The resolution, and (h, w, K) of the label maps; reads no weights. Raises DataError if it cannot teach."""
        if not re.fullmatch(r"\w+(\.\w+)?", self.name) or not timm.is_model(self.name):
            raise DataError(f"--teacher: timm has no model {self.name!r}; `timm.list_models()` lists all")
        with torch.device("meta"):
            try:
                net = self._create(pretrained=False)
            except (RuntimeError, TypeError, ValueError) as error:
                raise DataError(f"--teacher: timm cannot build {self.name} ({error})") from error
            side = self.resolution or resolve_model_data_config(net, use_test_size=True)["input_size"][-1]
            try:
                places, grid = _places(net, net.forward_features(torch.empty(1, 3, side, side)))
                net.forward_head(places)
            except (RuntimeError, AssertionError, AttributeError, ValueError) as error:
                raise DataError(f"--teacher: {self.name} cannot label places of {side} px images ({error})") from error
        if max(grid) > MOST_CELLS or self.top > self.classes:
            raise DataError(f"--teacher: {self.name} gives maps of {grid} with {self.top} of {self.classes} classes")
        if net.num_classes != self.classes:
            raise DataError(self._unlike(net))
        return side, (*grid, self.top)

    def load(self, device: torch.device) -> nn.Module:
        """The model with its weights. Raises DataError."""
        try:
            net = self._create(pretrained=self.weights is None)
        except Exception as error:  # whatever the network or the cache of weights raises
            raise DataError(
                f"--teacher: cannot get timm's weights of {self.name} ({error}); give them with --weights FILE"
            ) from error
        if self.weights is not None:
            try:
                net.load_state_dict(_state(self.weights))
            except RuntimeError as error:
                raise DataError(
                    f"{self.weights}: not weights of {self.name} for the {self.classes} classes of the shards: {error}"
                ) from error
        if net.num_classes != self.classes:
            raise DataError(self._unlike(net))
        return net.eval().to(device)

    def _unlike(self, net: Any) -> str:
        return (
            f"--teacher: {self.name} knows {net.num_classes} classes, but the shards have {self.classes}; give the "
            "weights of one that knows these with --weights FILE"
        )

    def _create(self, pretrained: bool) -> Any:
        if self.weights is None:
            return timm.create_model(self.name, pretrained=pretrained)
        return timm.create_model(self.name, num_classes=self.classes)


def build(
    shards: Path, out: Path, teacher: str, weights: Path | None, resolution: int | None, top: int, batch: int,
    workers: int | None,
) -> Manifest:  # fmt: skip
    """Builds OUT, the token labels of the training images in the folder `shards`. Resumes an interrupted build.

    Args:
        shards, out: folders of shards.
        teacher, weights, resolution, top: see `Teacher`.
        batch: images that the teacher sees at a time.
        workers: number of processes; default: one per GPU, or one.

    Raises:
        DataError: the teacher cannot label these images, or a file cannot be read or written.
    """
    images = Manifest.load(shards)
    images.verify_sizes(SPLIT)
    if len(images.classes) > MOST_CLASSES:
        raise DataError(f"{shards}: {len(images.classes)} classes, but token labels name at most {MOST_CLASSES}")
    model = Teacher(teacher, len(images.classes), weights, resolution, top)
    side, grid = model.outline()
    source = {
        "builder": BUILDER,
        "teacher": teacher,
        "weights": "timm" if weights is None else _checksum(weights),
        "resolution": side,
        **dict(zip(GRID, grid)),
        "images": images.identity()[SPLIT],
    }
    if manifest := finished(out, source):
        return manifest
    labels = [_Labels(images, index, model, side, batch) for index in range(len(images.split(SPLIT)))]
    count = workers or max(1, torch.cuda.device_count())
    return build_shards(out, classes=images.classes, splits={SPLIT: labels}, source=source, workers=count, keep=True)


@dataclass(frozen=True)
class LabelMap:
    """One sample of a label shard."""

    key: str
    content: bytes

    def members(self) -> Mapping[str, bytes]:
        """The files of the sample by extension."""
        return {EXTENSION: self.content}


@dataclass(frozen=True)
class _Labels:
    """The label maps of one training shard; iterating runs the teacher."""

    images: Manifest
    index: int
    teacher: Teacher
    side: int
    batch: int

    def __iter__(self) -> Iterator[LabelMap]:
        device = _device()
        net, mean, std = _loaded(self.teacher, device)
        shard = ShardReader(self.images, SPLIT).load(self.index)

        def decoded(row: int) -> np.ndarray:
            data, where = shard.image(row)
            return decode(data, where, 3, self.side, [whole])[0]

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            pixels = _ahead(pool, decoded, range(len(shard.keys)), AHEAD * self.batch)
            for first in range(0, len(shard.keys), self.batch):
                keys = shard.keys[first : first + self.batch]
                images = torch.from_numpy(np.stack(list(islice(pixels, len(keys))))).to(device)
                try:
                    logits = place_logits(net, ((images.permute(0, 3, 1, 2) / 255) - mean) / std)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    raise DataError(f"--batch {self.batch} does not fit on {device}; use a smaller one") from error
                top = logits.float().topk(self.teacher.top, dim=-1)
                values, classes = top.values.cpu().numpy(), top.indices.cpu().numpy()
                if not np.isfinite(values.astype(np.float16)).all():
                    raise DataError(f"{shard.path}: the logits of {self.teacher.name} are not finite in half precision")
                for key, of_image, named in zip(keys, values, classes, strict=True):
                    yield LabelMap(key, encode(of_image, named))


@torch.inference_mode()
def place_logits(net: Any, images: Tensor) -> Tensor:
    """(B, 3, r, r) normalized images -> (B, h, w, classes), what `net` makes of each place of its features alone."""
    with torch.autocast(images.device.type, torch.float16, enabled=images.device.type == "cuda"):
        places, grid = _places(net, net.forward_features(images))
        return net.forward_head(places).view(len(images), *grid, -1)


def _places(net: Any, features: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The places of a batch's features, each as an image of one place, and (h, w) of the grid."""
    if features.ndim != 4:
        raise ValueError("it ends in tokens, not in a grid of features; choose a convolutional model")
    if getattr(net, "output_fmt", "NCHW") == "NHWC":
        return features.reshape(-1, 1, 1, features.shape[-1]), (features.shape[1], features.shape[2])
    places = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1], 1, 1)
    return places, (features.shape[2], features.shape[3])


@cache
def _loaded(teacher: Teacher, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """The teacher of this process, and the mean and standard deviation of its images."""
    net = teacher.load(device)
    config = resolve_model_data_config(net)
    mean, std = (torch.tensor(config[name], device=device).view(1, -1, 1, 1) for name in ("mean", "std"))
    return net, mean, std


def _device() -> torch.device:
    """The GPU of this worker, or the CPU."""
    count = torch.cuda.device_count()
    return torch.device("cuda", worker() % count) if count else torch.device("cpu")


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], most: int
) -> Iterator[Result]:
    """Like `map`, but computes up to `most` results in advance."""
    left = iter(items)
    running = deque[Future[Result]](pool.submit(function, item) for item in islice(left, most))
    while running:
        result = running.popleft().result()
        running.extend(pool.submit(function, item) for item in islice(left, 1))
        yield result


def _state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights; never unpickles anything else. Raises DataError or RecipeError."""
    if path.suffix == SUFFIX:
        return read_tensors(path)
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        state = dict(found.get("state_dict", found))
    except pickle.UnpicklingError as error:  # torch's text advises to unpickle whatever the file holds
        raise DataError(
            f"{path}: holds more than tensors, which could run code when read; save the state dict alone, or as "
            "safetensors"
        ) from error
    except Exception as error:  # a file of a stranger raises anything
        raise DataError(f"{path}: cannot read the weights: {error}") from error
    if foreign := [key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]:
        raise DataError(f"{path}: not the weights of a model: {foreign[0]!r} is no tensor with a name")
    return state


def _checksum(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot read the weights: {error}") from error
