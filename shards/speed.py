"""How many images per second one core prepares for a recipe: read from memory, decoded, augmented, put into a batch."""

import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, product
from statistics import median

import cv2
import torch

from scaleprog.data.augment import BatchRequest
from scaleprog.data.manifest import Manifest
from scaleprog.data.order import Order
from scaleprog.data.reader import TRAIN, DataSet, TrainReader
from scaleprog.data.token_labels import LabelShards
from scaleprog.planning.plan import outline
from scaleprog.recipe import Recipe
from scaleprog.recipe.keys import AugmentSettings
from scaleprog.recipe.numbers import ceil_div


@dataclass(frozen=True)
class Speed:
    """Images per second of one thread's CPU time, by resolution in pixels, ascending.

    Args:
        whole: everything that a worker does to an image.
        decoded: the ceiling of any augmentation: decoding the same crops and resizing them, nothing more.
    """

    whole: dict[int, float]
    decoded: dict[int, float]

    def as_json(self) -> dict[str, dict[str, float]]:
        """What `scaleprog shards speed --json` prints."""
        named = {"images_per_core_second": self.whole, "without_augmentation": self.decoded}
        return {name: {str(size): rate for size, rate in rates.items()} for name, rates in named.items()}


def measure(recipe: Recipe, images: int, repeats: int) -> Speed:
    """Measures one thread without workers on the first shards of `recipe`, at every resolution that its run may visit.

    Classes and batch of the recipe need not fit the shards. All resolutions take turns, so that a machine whose speed
    drifts slows them alike.

    Args:
        recipe: whose images are prepared, from `data.path`.
        images: in one measurement.
        repeats: measurements of each kind; the median counts.

    Raises:
        RecipeError: the recipe cannot be run.
        DataError: the shards are missing, damaged, or hold too few images for one lane's part of a batch.
    """
    sizes = outline(recipe, None)[1].pixels
    data, order = sample(recipe, images)
    kinds = {"whole": data, "decoded": replace(data, augment=only_crops(data.augment))}
    readers = {kind: TrainReader(each, order, recipe.seed, 0, 1) for kind, each in kinds.items()}
    found: dict[tuple[str, int], list[float]] = {turn: [] for turn in product(kinds, sizes)}
    with one_thread():
        for _, (kind, size) in product(range(repeats), found):
            found[kind, size].append(rate(readers[kind], size, ceil_div(images, order.batch)))
    whole, decoded = ({size: median(found[kind, size]) for size in sizes} for kind in kinds)
    return Speed(whole, decoded)


def sample(recipe: Recipe, images: int) -> tuple[DataSet, Order]:
    """The first shards with so many images, to be kept in memory, and their order as one lane of the recipe's run."""
    manifest = Manifest.load(recipe.data.path)
    held = list(accumulate(shard.samples for shard in manifest.split(TRAIN)))
    manifest = manifest.first(TRAIN, min(bisect_left(held, images) + 1, len(held)))
    shards = manifest.split(TRAIN)
    in_memory = {"workers": 0, "cache": ceil_div(sum(shard.bytes for shard in shards), 2**20)}
    labels = LabelShards.of(recipe.data.token_labels, manifest) if recipe.data.token_labels else None
    data = DataSet(manifest, recipe.data.model_copy(update=in_memory), recipe.augment, recipe.model.channels, labels)
    lane = max(1, min(recipe.train.batch // recipe.data.lanes, manifest.samples(TRAIN)))
    counts = tuple(shard.samples for shard in shards)
    return data, Order(counts, recipe.seed, lanes=1, batch=lane, repeats=recipe.augment.repeats)


def only_crops(settings: AugmentSettings) -> AugmentSettings:
    """The same crops of the same images, without any other augmentation."""
    kept = ("crop", "scale", "ratio", "padding", "repeats", "mean", "std")
    return AugmentSettings(flip=0.0, **{key: getattr(settings, key) for key in kept})


def rate(reader: TrainReader, resolution: int, steps: int) -> float:
    """Images per second of this thread over `steps` batches, after one that also reads the shards."""
    order = reader.order
    requests = [BatchRequest(*divmod(step, order.steps_per_epoch), resolution) for step in range(steps + 1)]
    with reader.stream(requests, resolution) as batches:
        next(batches)
        began = time.thread_time()
        for _ in batches:
            pass
        return steps * order.batch / (time.thread_time() - began)


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch and OpenCV from starting threads, as in a worker."""
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
