"""Reading shards along lanes: what a batch holds must not depend on who reads it, nor on where reading started."""

import dataclasses
import io
import multiprocessing
import os
import random
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from pydantic import ValidationError

from scaleprog.data.augment import Augmentation
from scaleprog.data.damaged import NAME_BYTES
from scaleprog.data.evaluation import EvaluationReader
from scaleprog.data.manifest import Manifest, Shard
from scaleprog.data.order import SEARCH_EPOCH, Order
from scaleprog.data.reader import BatchRequest, DataSet, TrainReader
from scaleprog.data.shard import ShardReader
from scaleprog.data.stream import Batch
from scaleprog.errors import DataError, Unavailable
from scaleprog.recipe.keys import AugmentSettings, DataSettings
from scaleprog.recipe.numbers import ceil_div

pytestmark = pytest.mark.process

CLASSES = 10
SIZES = (13, 20, 9, 17, 14)  # samples per shard: 73
EVERYTHING = AugmentSettings(randaugment="rand-m9-mstd0.5-inc1", erase=0.5)
ON_THE_DEVICE = EVERYTHING.model_copy(update={"device": "accelerator"})
EXACT = AugmentSettings(crop="none", flip=0, eval_crop=1.0)
LANES, BATCH = 4, 8


def write_shard(path: Path, samples: Sequence[dict[str, object]]) -> Shard:
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return Shard.measure(path, len(samples))


def image(position: int) -> bytes:
    """A picture whose pixels tell which sample it is."""
    pixels = np.random.default_rng(position).integers(0, 256, (12, 14, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG" if position % 3 else "JPEG")
    return buffer.getvalue()


def samples_of(split: str) -> list[list[dict[str, object]]]:
    shards, position = [], 0
    for size in SIZES:
        shard = []
        for _ in range(size):
            extension = "png" if position % 3 else "jpg"
            label = str(position % CLASSES).encode()
            shard.append({"__key__": f"{split}-{position:04d}", extension: image(position), "cls": label})
            position += 1
        shards.append(shard)
    return shards


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    root = tmp_path_factory.mktemp("shards")
    splits = {
        split: tuple(write_shard(root / f"{split}-{i}.tar", s) for i, s in enumerate(samples_of(split)))
        for split in ("train", "val")
    }
    return Manifest(str(root), tuple(f"class {i}" for i in range(CLASSES)), splits)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


def make_reader(
    manifest: Manifest,
    *,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    cache: int = 0,
    memory: int | None = None,
    augment: AugmentSettings = EVERYTHING,
    lanes: int = LANES,
    repeats: int = 1,
) -> TrainReader:
    order = Order(tuple(shard.samples for shard in manifest.split("train")), 5, lanes, BATCH, repeats)
    data = DataSettings(path=manifest.root, lanes=lanes, workers=workers, cache=cache, memory=memory)
    return TrainReader(DataSet(manifest, data, augment, 3), order, 11, rank, world)


def read(reader: TrainReader, requests: Sequence[BatchRequest]) -> list[Batch]:
    with reader.stream(requests, 16) as batches:
        return [batch.clone() for batch in batches]


def requests(start: int, stop: int) -> list[BatchRequest]:
    """Steps of a run whose epochs have 9 steps, at changing resolutions and strengths."""
    return [
        BatchRequest(t // 9, t % 9, (16, 12)[t % 2], magnitude=0.5 + t / 40, erase=t / 20) for t in range(start, stop)
    ]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(vars(a).values(), vars(b).values(), strict=True))


def rows(batches: Sequence[Batch]) -> Batch:
    return Batch(*(torch.cat(parts) for parts in zip(*(vars(batch).values() for batch in batches))))


@pytest.fixture(scope="module")
def straight(manifest: Manifest) -> list[Batch]:
    """Two epochs and two steps, read by one rank in its own process."""
    return read(make_reader(manifest), requests(0, 20))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_batch_is_the_same_for_every_world_size_and_number_of_workers(
    manifest: Manifest, straight: list[Batch], world: int, workers: int
) -> None:
    ranks = [read(make_reader(manifest, workers=workers, rank=r, world=world), requests(0, 20)) for r in range(world)]
    for step, expected in enumerate(straight):
        assert same(rows([batches[step] for batches in ranks]), expected)


@pytest.mark.parametrize("start", [4, 8, 9, 13, 18])
@pytest.mark.parametrize("workers", [0, 2])
def test_starting_in_the_middle_continues_the_straight_stream(
    manifest: Manifest, straight: list[Batch], start: int, workers: int
) -> None:
    resumed = read(make_reader(manifest, workers=workers), requests(start, 20))
    assert len(resumed) == 20 - start
    assert all(same(a, b) for a, b in zip(resumed, straight[start:]))


@pytest.mark.parametrize(("world", "workers"), [(1, 3), (2, 0), (4, 1)])
def test_what_the_device_changes_is_the_same_for_every_world_size_and_start(
    manifest: Manifest, world: int, workers: int
) -> None:
    data = DataSet(manifest, DataSettings(path=""), ON_THE_DEVICE, 3)
    read_by = partial(make_reader, manifest, augment=ON_THE_DEVICE)
    straight = read(read_by(), requests(0, 6))
    assert straight[0].operations.shape == (BATCH, 2, 2)
    ranks = [read(read_by(workers=workers, rank=rank, world=world), requests(3, 6)) for rank in range(world)]
    for whole, *parts in zip(straight[3:], *ranks):
        assert same(rows(parts), whole)
        images = torch.cat([data.images(part, torch.device("cpu")) for part in parts])
        assert torch.equal(data.images(whole, torch.device("cpu")), images)


def test_ids_labels_and_pixels_belong_together(manifest: Manifest) -> None:
    reader = make_reader(manifest, augment=EXACT)
    order = reader.order
    offsets = np.cumsum((0, *SIZES))
    plan = [BatchRequest(2, step, 14) for step in range(order.steps_per_epoch)]
    seen = []
    for step, batch in enumerate(read(reader, plan)):
        assert batch.images.shape == (BATCH, 14, 14, 3)
        expected = np.concatenate(
            [order.lane(2, lane)[step * order.per_lane : (step + 1) * order.per_lane] for lane in range(LANES)]
        )
        assert batch.ids.tolist() == [int(offsets[shard]) + index for shard, index in expected.tolist()]
        assert batch.labels.tolist() == [position % CLASSES for position in batch.ids.tolist()]
        seen += batch.ids.tolist()
    assert len(seen) == len(set(seen)) == 72
    by_id = read(reader, plan[:1])[0]
    again = next(EvaluationReader(DataSet(manifest, reader.data, EXACT, 3), "train", 100, 0, 1).batches(14))
    table = dict(zip(again.ids.tolist(), again.images))
    for position, pixels in zip(by_id.ids.tolist(), by_id.images):
        # evaluation cuts the central square, training here squeezes the whole: the same sample, not another one
        distances = {
            other: float((pixels.float() - table[other].float()).abs().mean()) for other in table if other >= 0
        }
        assert min(distances, key=distances.__getitem__) == position


def test_repeated_augmentation_gives_the_same_sample_in_other_views(manifest: Manifest) -> None:
    batch = read(make_reader(manifest, repeats=2), [BatchRequest(0, 0, 16)])[0]
    ids, images = batch.ids.view(LANES, 2), batch.images.view(LANES, 2, 16, 16, 3)
    assert torch.equal(ids[:, 0], ids[:, 1])
    assert not any(torch.equal(first, second) for first, second in images)


def test_more_lanes_than_shards_and_the_search_epoch(manifest: Manifest) -> None:
    plan = [BatchRequest(SEARCH_EPOCH, step, 12) for step in (0, 3, 7)]
    whole = read(make_reader(manifest, lanes=8), plan)
    halves = [read(make_reader(manifest, lanes=8, rank=rank, world=2, workers=2), plan) for rank in range(2)]
    assert all(same(a, rows(parts)) for a, parts in zip(whole, zip(*halves)))
    assert not torch.equal(whole[0].ids, read(make_reader(manifest, lanes=8), [BatchRequest(0, 0, 12)])[0].ids)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_process_random_numbers_are_left_alone(manifest: Manifest, workers: int) -> None:
    def states() -> tuple[object, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    with make_reader(manifest, workers=workers).stream(requests(0, 5), 16) as batches:
        for _ in batches:
            assert states() == before
    data = DataSet(manifest, DataSettings(path="", workers=workers), EVERYTHING, 3)
    list(EvaluationReader(data, "val", 16, 0, 1).batches(12))
    assert states() == before


def test_requests_must_be_re_iterable_and_exist(manifest: Manifest) -> None:
    with pytest.raises(TypeError, match="re-iterable"):
        make_reader(manifest).stream(iter(requests(0, 2)), 16)
    with pytest.raises(ValueError, match="step 9 is not in an epoch of 9 steps"):
        read(make_reader(manifest), [BatchRequest(0, 9, 12)])


def test_a_cached_split_is_read_once(manifest: Manifest, straight: list[Batch], tmp_path: Path) -> None:
    moved = dataclasses.replace(manifest, root=str(tmp_path))
    for shard in manifest.split("train"):
        (tmp_path / shard.name).write_bytes(Path(manifest.path(shard)).read_bytes())
    reader, uncached = make_reader(moved, workers=2, cache=1), make_reader(moved)
    read(reader, requests(0, 3))
    for shard in moved.split("train"):
        (tmp_path / shard.name).unlink()
    assert all(same(a, b) for a, b in zip(read(reader, requests(0, 20)), straight, strict=True))
    with pytest.raises(DataError, match="cannot read"):
        read(uncached, requests(0, 3))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_read_one_by_one_make_the_same_batches(manifest: Manifest, straight: list[Batch], workers: int) -> None:
    one_by_one = read(make_reader(manifest, workers=workers, memory=0), requests(0, 20))
    assert all(same(a, b) for a, b in zip(one_by_one, straight, strict=True))


URLS = ["pipe:touch ruined; cat", "file:.", "file://host/a", "sftp://nowhere", "ais://nowhere", "htgs://nowhere",
        "zip://a::http://127.0.0.1:9", "http://127.0.0.1:9::pipe:", "s3:bucket", "http://a:b@127.0.0.1"]  # fmt: skip
"""What webdataset or fsspec would open: by a shell, by a program that it starts in one, or one place by another."""


@pytest.mark.parametrize("url", URLS)
def test_no_path_is_anything_but_that_of_a_file(
    manifest: Manifest, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValidationError, match=r"scaleprog does not read|no chained URLs|may not hold a user"):
        DataSettings(path=url)
    (tmp_path / url).mkdir(parents=True)  # a manifest may lie in a folder of that name
    with pytest.raises(DataError, match=r"scaleprog does not read|no chained URLs|may not hold a user"):
        ShardReader(dataclasses.replace(manifest, root=url), "train")
    with pytest.raises(DataError, match=r"train-\d\.tar: cannot read the shard"):
        ShardReader(dataclasses.replace(manifest, root=f"./{url}"), "train").load(0)
    for name in (f"{url}.tar", "pipe:touch ruined; exit.tar", "-.tar", "|touch ruined.tar"):
        (tmp_path / "plain").mkdir(exist_ok=True)
        shards = tuple(dataclasses.replace(shard, name=name) for shard in manifest.split("train")[:1])
        with pytest.raises(DataError, match="cannot read the shard"):
            ShardReader(dataclasses.replace(manifest, root="", splits={"train": shards}), "train").load(0)
    assert not (tmp_path / "ruined").exists()


@pytest.mark.parametrize("kind", ["FIFO", "folder", "device", "link to a FIFO", "link in a circle"])
def test_what_is_no_file_in_place_of_a_shard(manifest: Manifest, kind: str, tmp_path: Path) -> None:
    path = tmp_path / manifest.split("train")[0].name
    if "FIFO" in kind:
        os.mkfifo(tmp_path / "fifo")
    targets = {"device": Path("/dev/zero"), "link in a circle": path}
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(targets.get(kind, tmp_path / "fifo"))
    moved = dataclasses.replace(manifest, root=str(tmp_path))
    with pytest.raises(DataError, match=r"cannot read the shard|the shard is not a regular file"):
        ShardReader(moved, "train").load(0)
    with pytest.raises(DataError, match=r"not a regular file|Too many levels"):
        moved.verify_sizes("train")


def test_a_shard_may_be_a_link_to_a_file(manifest: Manifest, tmp_path: Path) -> None:
    for shard in manifest.split("train"):
        (tmp_path / shard.name).symlink_to(manifest.path(shard))
    moved = dataclasses.replace(manifest, root=str(tmp_path))
    moved.verify_sizes("train")
    assert len(ShardReader(moved, "train").load(0).keys) == moved.split("train")[0].samples


def test_an_order_of_other_shards_is_refused(manifest: Manifest) -> None:
    with pytest.raises(DataError, match="do not match the order"):
        TrainReader(DataSet(manifest, DataSettings(path=""), EXACT, 3), Order((99,), 0, 1, 1), 0, 0, 1)


def test_memory_is_stated(manifest: Manifest) -> None:
    total = sum(shard.bytes for shard in manifest.split("train"))
    largest = max(shard.bytes for shard in manifest.split("train"))
    batch = 4096 * ceil_div(BATCH * (3 * 16 * 16 + 7 * 8 + NAME_BYTES), 4096)
    assert make_reader(manifest).memory(16) == (LANES + 2) * largest + batch
    assert make_reader(manifest, workers=2).memory(16) == (LANES + 4) * largest + 3 * batch
    assert make_reader(manifest, cache=1).memory(16) == total + 2 * largest + batch


# Damage


def damaged(manifest: Manifest, root: Path, kind: str) -> Manifest:
    """The data set with one thing wrong in shard 1, whose samples are 13 to 32."""
    samples = samples_of("train")
    shards = [write_shard(root / f"train-{i}.tar", shard) for i, shard in enumerate(samples)]
    path, wrong = root / "train-1.tar", samples[1]
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[:5000])
    elif kind == "too long":
        path.write_bytes(content + bytes(512))
    elif kind == "checksum":
        path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    elif kind == "no tar":
        path.write_bytes(b"text " * 1000)
        shards[1] = Shard.measure(path, len(wrong))
    elif kind == "count":
        shards[1] = dataclasses.replace(write_shard(path, wrong[:-1]), samples=len(wrong))
    else:
        change: dict[str, object] = {
            "undecodable": {"png": b"\x89PNG no picture"},
            "label": {"cls": b"10"},
            "negative": {"cls": b"-1"},
            "no number": {"cls": b"4.0"},
            "no name": {"cls": b"cat"},
        }.get(kind, {})
        sample = {**wrong[6], **change}  # number 19 of the split, a PNG
        if kind == "no image":
            del sample["png"]
        if kind == "no label":
            del sample["cls"]
        shards[1] = write_shard(path, [*wrong[:6], sample, *wrong[7:]])
    return dataclasses.replace(manifest, root=str(root), splits={"train": tuple(shards), "val": tuple(shards)})


DAMAGE = {
    "missing": r"train-1\.tar: cannot read the shard",
    "truncated": r"train-1\.tar: truncated: 5000 of \d+ bytes.*scaleprog shards check",
    "too long": r"train-1\.tar: too long: \d+ of \d+ bytes.*scaleprog shards check",
    "checksum": r"train-1\.tar: the checksum differs.*scaleprog shards check",
    "no tar": r"train-1\.tar: not a tar",
    "count": r"train-1\.tar: holds 19 samples, but the manifest says 20",
    "undecodable": r"train-1\.tar: sample 'train-0019': cannot decode",
    "label": r"train-1\.tar: sample 'train-0019': label 10 is outside 0-9",
    "negative": r"train-1\.tar: sample 'train-0019': label -1 is outside 0-9",
    "no number": r"train-1\.tar: sample 'train-0019': its label \(\.cls\) is b'4\.0'",
    "no name": r"train-1\.tar: sample 'train-0019': label 'cat' is not one of the 10 class names",
    "no label": r"train-1\.tar: sample 'train-0019': its label \(\.cls\) is b''",
    "no image": r"train-1\.tar: sample 'train-0019' has no image",
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(manifest: Manifest, tmp_path: Path, kind: str, workers: int) -> None:
    wrong = damaged(manifest, tmp_path, kind)
    with pytest.raises(DataError, match=DAMAGE[kind]) as caught:
        read(make_reader(wrong, workers=workers), requests(0, 9))
    assert "Traceback" not in str(caught.value)
    data = DataSet(wrong, DataSettings(path="", workers=workers), EXACT, 3)
    with pytest.raises(DataError, match=DAMAGE[kind]):
        list(EvaluationReader(data, "val", 16, 0, 1).batches(12))


def test_batches_before_the_damage_still_come(manifest: Manifest, straight: list[Batch], tmp_path: Path) -> None:
    wrong = damaged(manifest, tmp_path, "undecodable")
    at = next(step for step, batch in enumerate(straight) if 19 in batch.ids)
    for workers in (0, 2):
        with make_reader(wrong, workers=workers).stream(requests(0, 20), 16) as batches:
            for step in range(at):
                assert same(next(batches), straight[step])
            with pytest.raises(DataError, match="train-0019"):
                next(batches)


# Workers


def test_closing_early_leaves_no_process(manifest: Manifest) -> None:
    batches = make_reader(manifest, workers=3).stream(requests(0, 900), 16)
    next(batches)
    assert len(multiprocessing.active_children()) == 3
    batches.close()
    assert multiprocessing.active_children() == []
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)


def test_an_error_in_the_training_step_leaves_no_process(manifest: Manifest) -> None:
    with pytest.raises(ZeroDivisionError), make_reader(manifest, workers=2).stream(requests(0, 900), 16) as batches:  # noqa: PT012
        next(batches)
        raise ZeroDivisionError
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("name", ["INT", "TERM", "USR2"])
def test_workers_outlive_the_signals_that_slurm_sends_to_all(
    manifest: Manifest, straight: list[Batch], name: str
) -> None:
    """The rank stops some steps after a signal; until then it needs its workers."""
    with make_reader(manifest, workers=2).stream(requests(0, 20), 16) as batches:
        assert same(next(batches), straight[0])
        for worker in multiprocessing.active_children():
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
        time.sleep(0.2)
        assert all(same(a, b) for a, b in zip(batches, straight[1:], strict=True))


def test_the_rank_can_still_terminate_its_workers(manifest: Manifest) -> None:
    with make_reader(manifest, workers=1).stream(requests(0, 900), 16) as batches:
        next(batches)
        [worker] = multiprocessing.active_children()
        worker.terminate()
        worker.join(5)
        assert worker.exitcode == 0


def test_a_killed_worker_is_reported(manifest: Manifest) -> None:
    with make_reader(manifest, workers=1).stream(requests(0, 900), 16) as batches:
        next(batches)
        [worker] = multiprocessing.active_children()
        worker.kill()
        with pytest.raises(Unavailable, match=r"a decoding worker died.*lower data\.workers"):
            list(batches)


# Evaluation


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("batch_local", [2, 7, 100])
def test_evaluation_sees_every_sample_once_and_ranks_stay_in_step(
    manifest: Manifest, world: int, workers: int, batch_local: int
) -> None:
    data = DataSet(manifest, DataSettings(path="", workers=workers), EXACT, 3)
    ranks = [
        [batch.clone() for batch in EvaluationReader(data, "val", batch_local, rank, world).batches(14)]
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1, "else a collective hangs"
    share = -(-sum(SIZES) // world)
    assert len(ranks[0]) == -(-share // batch_local)
    every = rows([batch for batches in ranks for batch in batches])
    assert {len(batch.labels) for batches in ranks for batch in batches} == {batch_local}
    real = every.labels >= 0
    assert sorted(every.ids[real].tolist()) == list(range(sum(SIZES)))
    assert torch.equal(every.labels[real], every.ids[real] % CLASSES)
    assert every.images[real].flatten(1).float().std(dim=1).min() > 5
    assert torch.equal(every.ids[~real], torch.full_like(every.ids[~real], -1))
    assert not every.images[~real].any()


def test_evaluation_does_not_depend_on_who_reads(manifest: Manifest) -> None:
    def by_id(world: int, workers: int) -> dict[int, torch.Tensor]:
        data = DataSet(manifest, DataSettings(path="", workers=workers), EXACT, 3)
        batches = [b.clone() for r in range(world) for b in EvaluationReader(data, "val", 8, r, world).batches(12)]
        every = rows(batches)
        return {position: pixels for position, pixels in zip(every.ids.tolist(), every.images) if position >= 0}

    alone = by_id(1, 0)
    for world, workers in ((2, 0), (3, 2)):
        other = by_id(world, workers)
        assert other.keys() == alone.keys()
        assert all(torch.equal(alone[position], other[position]) for position in alone)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", [0, 8])
def test_evaluations_see_the_same_images_and_decode_them_once_if_they_fit(
    manifest: Manifest, workers: int, cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataSet(manifest, DataSettings(path="", workers=workers, cache=cache), EXACT, 3)
    reader = EvaluationReader(data, "val", 8, 1, 2)

    def passed(resolution: int) -> Batch:
        return rows([batch.clone() for batch in reader.batches(resolution)])

    with closing(reader):
        first = passed(14)
        children = multiprocessing.active_children()
        assert len(children) == (0 if cache else workers)
        assert same(passed(14), first)
        assert multiprocessing.active_children() == children, "the same workers"
        monkeypatch.setattr(Augmentation, "evaluation", None)  # would fail in this process
        if cache:
            assert same(passed(14), first)
        monkeypatch.undo()
        larger = passed(18)
        assert larger.images.shape[1] == 18
        assert torch.equal(larger.ids, first.ids)
        assert same(passed(14), first)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_that_ends_early_does_not_shift_the_next(manifest: Manifest, workers: int) -> None:
    data = DataSet(manifest, DataSettings(path="", workers=workers, cache=0), EXACT, 3)
    with closing(EvaluationReader(data, "val", 8, 0, 1)) as reader:
        first = next(reader.batches(14)).clone()
        assert same(next(reader.batches(14)), first)
