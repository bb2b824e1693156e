"""Images that cannot be decoded: what a rank reads in their place must be a function of the data and the step alone."""

import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch

from scaleprog.data.damaged import NAME_BYTES, read_names, write_names
from scaleprog.data.decode import decode, problem_of, whole
from scaleprog.data.evaluation import EvaluationReader
from scaleprog.data.manifest import Manifest
from scaleprog.data.order import SEARCH_EPOCH, Order
from scaleprog.data.reader import BatchRequest, DataSet, TrainReader
from scaleprog.data.stream import Batch
from scaleprog.errors import DataError, Unavailable
from scaleprog.recipe.keys import AugmentSettings, DataSettings
from tests.damage import CLASSES, KINDS, image, write_shards

pytestmark = pytest.mark.process

SIZES = (67, 40, 80, 53)
LANES, BATCH, SEED = 4, 16, 5
DAMAGED = frozenset(np.random.default_rng(1).choice(sum(SIZES), 40, replace=False).tolist())  # 4 of each kind
EXACT = AugmentSettings(crop="none", flip=0.0)
EVERYTHING = AugmentSettings(randaugment="rand-m9-mstd0.5-inc1", erase=0.5)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_shards(tmp_path_factory.mktemp("damaged"), SIZES, DAMAGED)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


def reader(
    manifest: Manifest,
    *,
    damaged: str = "replace",
    most: int = 100,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    augment: AugmentSettings = EVERYTHING,
    repeats: int = 1,
) -> TrainReader:
    order = Order(tuple(shard.samples for shard in manifest.split("train")), SEED, LANES, BATCH, repeats)
    settings = {"path": manifest.root, "lanes": LANES, "workers": workers, "cache": 0}
    data = DataSettings.model_validate({**settings, "damaged": damaged, "most_damaged": most})
    return TrainReader(DataSet(manifest, data, augment, 3), order, 11, rank, world)


def requests(start: int, stop: int, epoch: int | None = None) -> list[BatchRequest]:
    """Steps of a run whose epochs have 15 steps, or of one epoch, at changing resolutions."""
    return [BatchRequest(t // 15 if epoch is None else epoch, t % 15, (16, 12)[t % 2]) for t in range(start, stop)]


def read(reader: TrainReader, requests: Sequence[BatchRequest]) -> list[Batch]:
    with reader.stream(requests, 16) as batches:
        return [batch.clone() for batch in batches]


def rows(batches: Sequence[Batch]) -> Batch:
    return Batch(*(torch.cat(parts) for parts in zip(*(vars(batch).values() for batch in batches))))


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(vars(a).values(), vars(b).values(), strict=True))


def expected(order: Order, request: BatchRequest) -> tuple[list[int], list[int]]:
    """What a step should train on by the text of `data.damaged`, and what it would have trained on without damage."""
    offsets, trained, wanted = np.cumsum((0, *SIZES)), [], []
    for lane in range(LANES):
        positions = [int(offsets[shard]) + index for shard, index in order.lane(request.epoch, lane).tolist()]
        others = list(dict.fromkeys(positions))  # repeats left out
        for position in positions[request.step * order.per_lane : (request.step + 1) * order.per_lane]:
            at = others.index(position)
            trained.append(next(other for other in [*others[at:], *others[:at]] if other not in DAMAGED))
            wanted.append(position)
    return trained, wanted


def name(position: int) -> str:
    shard = int(np.searchsorted(np.cumsum(SIZES), position, side="right"))
    return f"train-{shard:06d}.tar: sample 's{position:05d}'"


def test_every_kind_of_damage_is_damage() -> None:
    assert len(KINDS) == 10
    assert all(problem_of(damage(1)) for damage in KINDS.values())
    assert not any(problem_of(image(1, kind)) for kind in ("JPEG", "PNG", "WEBP"))


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("epoch", [0, 3, SEARCH_EPOCH])
def test_the_next_other_sample_of_the_lane_takes_the_place(manifest: Manifest, repeats: int, epoch: int) -> None:
    exact, plan = reader(manifest, augment=EXACT, repeats=repeats), requests(0, 15, epoch)
    replaced = 0
    for request, batch in zip(plan, read(exact, plan), strict=True):
        trained, wanted = expected(exact.order, request)
        assert batch.ids.tolist() == trained
        assert batch.labels.tolist() == [position % CLASSES for position in trained]
        places = [row for row in range(BATCH) if trained[row] != wanted[row]]
        assert read_names(batch.replaced) == [name(wanted[row]) for row in places]
        assert batch.replaced.any(1).nonzero().flatten().tolist() == places
        for row in places:
            data = image(trained[row], "JPEG" if trained[row] % 3 else "PNG")
            pixels = decode(data, "", 3, request.resolution, [whole], fast=True)[0]
            assert np.array_equal(batch.images[row].numpy(), pixels)
        replaced += len(places)
    assert replaced > 10


@pytest.fixture(scope="module")
def straight(manifest: Manifest) -> list[Batch]:
    """More than an epoch with three repeats, read by one rank in its own process."""
    return read(reader(manifest, repeats=3), requests(0, 18))


@pytest.mark.parametrize(("world", "workers"), [(1, 3), (2, 0), (2, 1), (4, 0), (4, 1)])
def test_replacements_depend_neither_on_ranks_nor_on_workers(
    manifest: Manifest, straight: list[Batch], world: int, workers: int
) -> None:
    ranks = [
        read(reader(manifest, repeats=3, workers=workers, rank=rank, world=world), requests(0, 18))
        for rank in range(world)
    ]
    assert any(batch.replaced.any() for batch in straight)
    for step, batch in enumerate(straight):
        assert same(rows([batches[step] for batches in ranks]), batch)


@pytest.mark.parametrize("start", range(1, 18, 3))
def test_replacements_depend_on_nothing_met_before(manifest: Manifest, straight: list[Batch], start: int) -> None:
    resumed = read(reader(manifest, repeats=3), requests(start, 18))
    assert all(same(mine, theirs) for mine, theirs in zip(resumed, straight[start:], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_names_the_first_damaged_sample_of_the_earliest_step(manifest: Manifest, workers: int) -> None:
    stopping = reader(manifest, damaged="stop", workers=workers)
    steps = [expected(stopping.order, request)[1] for request in requests(0, 15)]
    step = next(step for step, wanted in enumerate(steps) if not DAMAGED.isdisjoint(wanted))
    first = next(position for position in steps[step] if position in DAMAGED)
    with stopping.stream(requests(0, 15), 16) as batches:
        for wanted in steps[:step]:
            assert next(batches).ids.tolist() == wanted
        with pytest.raises(DataError, match=rf"{name(first)}: cannot decode the image .*data\.damaged=replace"):
            next(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_lane_without_a_sound_sample_ends_the_run(tmp_path: Path, workers: int) -> None:
    nothing = write_shards(tmp_path, (20, 12), range(32))
    for most, message in (
        (8, "all samples of lane 0 in epoch 0 are damaged, such as .*train-.*rebuild"),
        (7, r"8 samples are damaged, more than data\.most_damaged=7: train-.*raise data\.most_damaged"),
    ):
        with pytest.raises(DataError, match=message):
            read(reader(nothing, most=most, workers=workers), requests(0, 1))


def test_a_damaged_image_for_evaluation_is_never_replaced(manifest: Manifest) -> None:
    data = DataSettings(path=manifest.root, workers=0, damaged="replace")
    with pytest.raises(DataError, match="cannot decode the image"):
        list(EvaluationReader(DataSet(manifest, data, EXACT, 3), "train", 16, 0, 1).batches(12))


def test_memory_that_ran_out_is_no_damage(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(simplejpeg, "decode_jpeg", exhausted)
    with pytest.raises(Unavailable, match="memory ran out while decoding"):
        read(reader(manifest), requests(0, 1))


def test_names_in_a_batch() -> None:
    memory = torch.full((4, NAME_BYTES), 7, dtype=torch.uint8)
    write_names({1: "train-0.tar: sample 'é'", 3: "x" * (NAME_BYTES - 1) + "é"}, memory)
    assert read_names(memory) == ["train-0.tar: sample 'é'", "x" * (NAME_BYTES - 1)]
    write_names({}, memory)
    assert read_names(memory) == []
