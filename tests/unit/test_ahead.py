"""Reading ahead, and image by image: the same samples as plain reading, in the stated memory, and no thread left."""

import itertools
import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.writer import TarWriter

from scaleprog.data import ahead
from scaleprog.data.ahead import AHEAD, ReadAhead
from scaleprog.data.augment import BatchRequest
from scaleprog.data.lanes import lanes_ahead
from scaleprog.data.manifest import Manifest, Shard
from scaleprog.data.order import SEARCH_EPOCH, Order
from scaleprog.data.reader import DataSet, TrainReader
from scaleprog.data.shard import Cursor, ShardReader, StoredSample
from scaleprog.errors import DataError, Unavailable
from scaleprog.recipe.keys import AugmentSettings, DataSettings


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name == "read-ahead"] == []


def data_set(folder: Path, counts: tuple[int, ...]) -> Manifest:
    """Shards whose images are any bytes, because nothing decodes them."""
    shards, position = [], itertools.count()
    for number, count in enumerate(counts):
        path = folder / f"train-{number}.tar"
        with TarWriter(str(path)) as tar:
            for at in itertools.islice(position, count):
                tar.write({"__key__": f"{at:04d}", "jpg": b"image %d" % at, "cls": b"%d" % (at % 7)})
        shards.append(Shard.measure(path, count))
    return Manifest(str(folder), tuple(map(str, range(7))), {"train": tuple(shards)})


def taken(samples: list[StoredSample]) -> list[tuple[bytes, str, int, int]]:
    return [(bytes(sample.image[0]), sample.image[1], sample.label, sample.id) for sample in samples]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6).map(tuple),
    lanes=st.sampled_from([1, 2, 3]),
    repeats=st.integers(1, 3),
    data=st.data(),
)
def test_every_way_of_reading_gives_the_same_samples(
    counts: tuple[int, ...], lanes: int, repeats: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    manifest = data_set(tmp_path_factory.mktemp("shards"), (*counts, lanes))
    order = Order((*counts, lanes), 3, lanes, lanes, repeats)
    steps = st.tuples(st.sampled_from([0, 1, 2, SEARCH_EPOCH]), st.integers(0, order.steps_per_epoch - 1))
    requests = [BatchRequest(epoch, step, 8) for epoch, step in data.draw(st.lists(steps, max_size=12))]
    expected = []
    cursor = Cursor(ShardReader(manifest, "train"))
    for request in requests:
        for lane in range(lanes):
            rows = order.lane(request.epoch, lane)[request.step * order.per_lane :][: order.per_lane]
            expected.append(taken([cursor.sample(shard, index) for shard, index in rows.tolist()]))
    for on_disk in (False, True):
        reader = ShardReader(manifest, "train", on_disk=on_disk)
        with lanes_ahead(order, requests, range(lanes), reader) as reading:
            assert [taken(lane.take(request)) for request in requests for lane in reading] == expected


def test_shards_are_loaded_in_order_and_few_are_held() -> None:
    held, most = 0, 0
    lock = threading.Lock()

    def load(index: int) -> int:
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        time.sleep(0.001)
        return index

    with ReadAhead(load, range(30)) as reading:
        for index in range(30):
            assert reading.take(index) == index
            with lock:
                held -= 1
    assert most == AHEAD


def test_the_next_shards_are_loaded_before_they_are_asked_for() -> None:
    loaded = threading.Semaphore(0)

    def load(index: int) -> int:
        loaded.release()
        return index

    with ReadAhead(load, range(5)):
        assert all(loaded.acquire(timeout=10) for _ in range(AHEAD))
        assert not loaded.acquire(timeout=0.05), "and no more than are allowed"


@pytest.mark.parametrize("error", [DataError("damaged"), Unavailable("away")])
def test_an_error_surfaces_where_it_belongs(error: Exception) -> None:
    def load(index: int) -> int:
        if index == 2:
            raise error
        return index

    with ReadAhead(load, range(5)) as reading:
        assert [reading.take(0), reading.take(1)] == [0, 1]
        with pytest.raises(type(error), match=str(error)):
            reading.take(2)
        with pytest.raises(type(error), match=str(error)):
            reading.take(3)
    with ReadAhead(load, range(2)) as reading:
        assert [reading.take(0), reading.take(1)] == [0, 1]
        with pytest.raises(RuntimeError, match="no shard was to follow shard 1"):
            reading.take(2)


def test_another_order_is_a_mistake() -> None:
    with ReadAhead(lambda index: index, [0, 1]) as reading, pytest.raises(RuntimeError, match="1 was asked for, but 0"):
        reading.take(1)


def test_a_thread_that_waits_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the block's, nor that of a process whose work is done."""
    monkeypatch.setattr(ahead, "_END_SECONDS", 0.1)
    answered = threading.Event()

    def wait(index: int) -> int:
        answered.wait(60)
        return index

    def work() -> None:
        with ReadAhead(wait, range(3)):
            pass

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0
    with ReadAhead(wait, range(3)) as reading:
        thread = reading._thread
    answered.set()
    thread.join(10)


def test_images_stay_on_disk_where_lanes_exceed_the_memory(tmp_path: Path) -> None:
    counts = (200,) * 6
    manifest = data_set(tmp_path, counts)
    largest = max(shard.bytes for shard in manifest.split("train"))

    def reader(memory: int | None, world: int = 1) -> TrainReader:
        settings = DataSettings(path=str(tmp_path), lanes=4, workers=0, cache=0, memory=memory)
        augment = AugmentSettings(crop="none")
        return TrainReader(DataSet(manifest, settings, augment, 3), Order(counts, 0, 4, 4), 0, 0, world)

    whole = reader(None).memory(8)
    assert whole >= (4 + AHEAD) * largest > 2**20
    assert reader(2 * whole // 2**20).memory(8) == whole, "there is room"
    assert reader(3).memory(8) < 2**20 < 3 * 2**20 < whole
    assert reader(3, world=4).memory(8) == reader(None, world=4).memory(8), "a rank of fewer lanes holds whole shards"


def test_a_file_that_shrinks_while_images_are_read_from_it(tmp_path: Path) -> None:
    manifest = data_set(tmp_path, (20,))
    cursor = Cursor(ShardReader(manifest, "train", on_disk=True))
    assert bytes(cursor.sample(0, 3).image[0]) == b"image 3"
    (tmp_path / "train-0.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"train-0\.tar: sample '0004': truncated after it was opened"):
        cursor.sample(0, 4)


def test_the_checksum_of_a_file_is_compared_once(tmp_path: Path) -> None:
    manifest = data_set(tmp_path, (20,))
    content = bytearray((tmp_path / "train-0.tar").read_bytes())
    reader = ShardReader(manifest, "train", on_disk=True)
    reader.load(0)
    content[content.index(b"image 7")] ^= 1
    (tmp_path / "train-0.tar").write_bytes(content)
    assert bytes(reader.load(0).image(7)[0]) != b"image 7"
    with pytest.raises(DataError, match="the checksum differs"):
        ShardReader(manifest, "train", on_disk=True).load(0)


def test_descriptors_are_closed(tmp_path: Path) -> None:
    manifest = data_set(tmp_path, (5,) * 40)
    cursor = Cursor(ShardReader(manifest, "train", on_disk=True))

    def opened() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = opened()
    assert np.array_equal([cursor.sample(shard, 0).label for shard in range(40)], [5 * n % 7 for n in range(40)])
    assert opened() <= before + 1
