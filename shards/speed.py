"""How many images per second one core prepares for a recipe: read from memory, decoded, augmented, put into a batch."""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, product
from statistics import median

import cv2
import torch

from scaleprog.data.augment import BatchRequest
from scaleprog.data.order import Order
from scaleprog.data.reader import TRAIN, DataSet, TrainReader
from scaleprog.data.stream import Batch, Fill, Layout, Stream
from scaleprog.data.token_labels import LabelShards
from scaleprog.planning.plan import manifest_of, outline
from scaleprog.recipe import Recipe
from scaleprog.recipe.keys import AugmentSettings
from scaleprog.recipe.numbers import ceil_div


@dataclass(frozen=True)
class Speed:
    """Images per second of one thread's CPU time, by resolution in pixels, ascending.

    Args:
        whole: everything that a worker does to an image; with repeats, each view counts as an image.
        decoded: the ceiling of any augmentation: decoding the same crops and resizing them, nothing more.
        copied: the ceiling of any decoder: copying batches that are ready.
    """

    whole: dict[int, float]
    decoded: dict[int, float]
    copied: dict[int, float]

    def as_json(self) -> dict[str, dict[str, float]]:
        """What `scaleprog shards speed --json` prints."""
        named = {
            "images_per_core_second": self.whole,
            "without_augmentation": self.decoded,
            "copies_of_ready_batches": self.copied,
        }
        return {name: {str(size): rate for size, rate in rates.items()} for name, rates in named.items()}


def measure(recipe: Recipe, images: int, turns: int) -> Speed:
    """Measures one thread without workers on the first shards of `recipe`, at every resolution that its run may visit.

    Classes and batch of the recipe need not fit the shards. All resolutions take turns, so that a machine whose speed
    drifts slows them alike.

    Args:
        recipe: whose images are prepared, from `data.path`.
        images: in one measurement.
        turns: measurements of each kind; the median counts.

    Raises:
        RecipeError: the recipe cannot be run.
        DataError: the shards are missing, damaged, or hold too few images for one lane's part of a batch.
    """
    sizes = outline(recipe, None)[1].pixels
    data, order = sample(recipe, images)
    whole, decoded = (TrainReader(each, order, recipe.seed, 0, 1) for each in (data, ceiling(data)))
    steps = ceil_div(images, order.batch)
    kinds: dict[str, Callable[[int], float]] = {
        "whole": lambda size: rate(whole, size, steps),
        "decoded": lambda size: rate(decoded, size, steps),
        "copied": lambda size: _copying(Layout(order.batch, size, data.channels), steps),
    }
    with one_thread():
        rounds = [{(kind, size): kinds[kind](size) for kind, size in product(kinds, sizes)} for _ in range(turns)]
    return Speed(**{kind: {size: median(each[kind, size] for each in rounds) for size in sizes} for kind in kinds})


def sample(recipe: Recipe, images: int) -> tuple[DataSet, Order]:
    """The first shards with so many images, to be kept in memory, and their order as one lane of the recipe's run."""
    manifest = manifest_of(recipe)
    held = list(accumulate(shard.samples for shard in manifest.split(TRAIN)))
    manifest = manifest.first(TRAIN, min(bisect_left(held, images) + 1, len(held)))
    shards = manifest.split(TRAIN)
    in_memory = {"workers": 0, "cache": ceil_div(sum(shard.bytes for shard in shards), 2**20)}
    labels = LabelShards.of(recipe.data.token_labels, manifest) if recipe.data.token_labels else None
    data = DataSet(manifest, recipe.data.model_copy(update=in_memory), recipe.augment, recipe.model.channels, labels)
    lane = max(1, min(recipe.train.batch // recipe.data.lanes, manifest.samples(TRAIN)))
    counts = tuple(shard.samples for shard in shards)
    return data, Order(counts, recipe.seed, lanes=1, batch=lane, repeats=recipe.augment.repeats)


def ceiling(data: DataSet) -> DataSet:
    """The same crops of the same images, without any other augmentation."""
    kept = ("crop", "scale", "ratio", "padding", "repeats", "mean", "std")
    crops = AugmentSettings(flip=0.0, **{key: getattr(data.augment, key) for key in kept})
    return replace(data, augment=crops, token_labels=None)


def rate(reader: TrainReader, resolution: int, steps: int) -> float:
    """Images per second of this thread over `steps` batches, after one that also reads the shards."""
    epoch = reader.order.steps_per_epoch
    requests = [BatchRequest(*divmod(step, epoch), resolution) for step in range(steps + 1)]
    return _taking(reader.stream(requests, resolution))


def _copying(layout: Layout, steps: int) -> float:
    """Images per second of this thread if it only copies them into batches."""
    ready = torch.zeros(layout.rows, layout.resolution, layout.resolution, layout.channels, dtype=torch.uint8)

    def fill(batch: Batch) -> None:
        batch.images[:] = ready

    def produce(units: range) -> Iterator[Fill]:
        for _ in range(steps + 1):
            yield layout.resolution, fill

    return _taking(Stream(produce, units=1, workers=0, prefetch=1, layout=layout))


def _taking(batches: Stream) -> float:
    """Images per second of this thread in all batches but the first."""
    with batches:
        next(batches)
        began = time.thread_time()
        images = sum(len(batch.labels) for batch in batches)
        return images / (time.thread_time() - began)


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
