"""The cache of shards on a local disk: right whatever happens to a process or the disk, and never too large."""

import errno
import hashlib
import os
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from scaleprog.data import store as stores
from scaleprog.data.manifest import Manifest
from scaleprog.data.shard import ShardReader
from scaleprog.data.source import Remote, Shard
from scaleprog.data.store import Store
from tests.unit.faulty_server import FaultyServer, serve

pytestmark = pytest.mark.process
LARGE = 2**40


def shards_of(server: FaultyServer) -> tuple[Shard, ...]:
    return Manifest.load(server.url).split("train")


def downloads(server: FaultyServer) -> int:
    return sum(path.endswith(".tar") for path in server.asked)


def stored(folder: Path) -> dict[str, int]:
    """Bytes of the finished files by checksum, each of which must be the one of its content."""
    found = {}
    for path in folder.glob("*.tar"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
        found[path.stem] = path.stat().st_size
    return found


def test_a_shard_is_downloaded_once(patterns: Path, tmp_path: Path) -> None:
    with serve(patterns) as server:
        source, shards = Remote(server.url, Store(tmp_path / "new/store", LARGE)), shards_of(server)
        for verify in (True, False, True):
            for shard in shards:
                assert source.read(shard, verify)[:] == (patterns / shard.name).read_bytes()
        assert downloads(server) == len(shards)
        with source.open(shards[0], verify=True) as file:
            assert file.read() == (patterns / shards[0].name).read_bytes()
        another = Remote(server.url, Store(tmp_path / "new/store", LARGE))
        assert another.read(shards[1], verify=True)[:] == (patterns / shards[1].name).read_bytes()
        assert downloads(server) == len(shards)
    assert stored(tmp_path / "new/store") == {shard.sha256: shard.bytes for shard in shards}


def test_a_shard_for_which_there_is_no_room_is_downloaded_once_each_time(patterns: Path, tmp_path: Path) -> None:
    """Also where it is to be read from a file, because memory is short."""
    with serve(patterns) as server:
        source, shard = Remote(server.url, Store(tmp_path, 1)), shards_of(server)[0]
        for times in (1, 2):
            assert source.open(shard, verify=times == 1)[:] == (patterns / shard.name).read_bytes()
            assert downloads(server) == times
        reader = ShardReader(replace(Manifest.load(server.url), store=Store(tmp_path, 1)), "train", on_disk=True)
        assert len(reader.load(0).keys) == shard.samples
        assert downloads(server) == 3


@pytest.mark.parametrize("damage", [b"short", None])
def test_a_damaged_file_is_downloaded_again(damage: bytes | None, patterns: Path, tmp_path: Path) -> None:
    with serve(patterns) as server:
        source, shard = Remote(server.url, Store(tmp_path, LARGE)), shards_of(server)[0]
        source.read(shard, verify=True)
        (tmp_path / f"{shard.sha256}.tar").write_bytes(bytes(shard.bytes) if damage is None else damage)
        assert source.read(shard, verify=True)[:] == (patterns / shard.name).read_bytes()
        assert downloads(server) == 2
    assert list(stored(tmp_path)) == [shard.sha256]


def test_the_shards_unused_for_longest_make_room(patterns: Path, tmp_path: Path) -> None:
    with serve(patterns) as server:
        first, second, third, *_ = shards = shards_of(server)
        (tmp_path / "train-0.tar").write_bytes(b"of somebody else")
        source = Remote(server.url, Store(tmp_path, first.bytes + second.bytes + third.bytes // 2))
        for age, shard in enumerate((second, first)):
            source.read(shard, verify=True)
            os.utime(tmp_path / f"{shard.sha256}.tar", (age, age))
        source.read(second, verify=True)  # now the first is the one unused for longest
        source.read(third, verify=True)
        assert (tmp_path / "train-0.tar").read_bytes() == b"of somebody else"
        (tmp_path / "train-0.tar").unlink()
        assert stored(tmp_path).keys() == {second.sha256, third.sha256}
        assert downloads(server) == 3
        small = Remote(server.url, Store(tmp_path / "small", shards[0].bytes - 1))
        assert small.read(first, verify=True)[:] == (patterns / first.name).read_bytes()
        assert stored(tmp_path / "small") == {}


def fill_disk(patch: pytest.MonkeyPatch, _folder: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(os, "posix_fallocate", full)


def fill_disk_late(patch: pytest.MonkeyPatch, _folder: Path) -> None:
    """A file system that reserves nothing, and is full in the middle of a file."""
    write = os.write

    def full(descriptor: int, content: bytes) -> int:
        if len(content) < 50_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[:30_000])

    patch.setattr(os, "posix_fallocate", lambda *_: None)
    patch.setattr(stores.os, "write", full)


def obstruct(_patch: pytest.MonkeyPatch, folder: Path) -> None:
    folder.write_text("not a folder")


@pytest.mark.parametrize("trouble", [fill_disk, fill_disk_late, obstruct])
def test_a_full_disk_is_read_around_with_one_warning(
    trouble, patterns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with serve(patterns) as server:
        shards, folder = shards_of(server), tmp_path / "store"
        source = Remote(server.url, Store(folder, LARGE))
        trouble(monkeypatch, folder)
        for shard in (*shards, *shards):
            assert source.read(shard, verify=True)[:] == (patterns / shard.name).read_bytes()
        if (worker := os.fork()) == 0:  # it must not warn again
            os._exit(source.read(shards[0], verify=True)[:] != (patterns / shards[0].name).read_bytes())
        assert os.waitpid(worker, 0)[1] == 0
    told = capfd.readouterr().err
    assert told.count(f"data.store {folder}: ") == 1
    assert told.count("shards are read without it") == 1
    if folder.is_dir():
        assert stored(folder) == {}
        assert not list(folder.glob("*.part"))


def in_process(work) -> int:
    """Starts a process that does some work, and returns its number."""
    if number := os.fork():
        return number
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def test_processes_download_a_shard_once_between_them(patterns: Path, tmp_path: Path) -> None:
    with serve(patterns) as server:
        server.delays = 1.0
        source, shard = Remote(server.url, Store(tmp_path, LARGE)), shards_of(server)[0]
        processes = [in_process(lambda: source.read(shard, verify=True)) for _ in range(4)]
        assert all(os.waitpid(number, 0)[1] == 0 for number in processes)
        assert downloads(server) == 1


def test_killed_processes_leave_no_half_file(patterns: Path, tmp_path: Path) -> None:
    """20 kills at random moments, of processes that keep evicting each other's shards."""
    chosen = random.Random(0)
    with serve(patterns) as server:
        shards = shards_of(server)
        limit = sum(shard.bytes for shard in shards[:3])
        source = Remote(server.url, Store(tmp_path, limit))

        def read_forever() -> None:
            while True:
                source.read(chosen.choice(shards), verify=True)

        fsspec.get_filesystem_class("http")  # or each process would import it
        for kill in range(20):
            chosen.seed(kill)
            before = downloads(server)
            processes = [in_process(read_forever) for _ in range(2)]
            while downloads(server) == before:
                time.sleep(0.001)
            time.sleep(chosen.uniform(0.0, 0.1))
            for number in processes:
                os.kill(number, signal.SIGKILL)
                os.waitpid(number, 0)
            assert sum(stored(tmp_path).values()) <= limit
        assert downloads(server) >= 20, "the processes came that far"
        for shard in shards:
            assert source.read(shard, verify=True)[:] == (patterns / shard.name).read_bytes()
    everything = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert sum(stored(tmp_path).values()) <= everything <= limit
    assert not list(tmp_path.glob("*.part")), "the next process removes what a killed one left"


def test_what_is_being_written_is_not_removed(patterns: Path, tmp_path: Path) -> None:
    shard = Manifest.load(patterns).split("train")[0]
    writing, other = Store(tmp_path, LARGE), Store(tmp_path, LARGE)
    part = tmp_path / f"{shard.sha256}.part"
    with writing.alone(shard.sha256):
        part.write_bytes(b"half")
        with serve(patterns) as server:
            Remote(server.url, other).read(shards_of(server)[1], verify=True)
        assert part.exists()
    with serve(patterns) as server:
        Remote(server.url, other).read(shards_of(server)[2], verify=True)
    assert not part.exists(), "nobody writes it any more"


def test_a_dead_owner_loses_its_lock(patterns: Path, tmp_path: Path) -> None:
    store, shard = Store(tmp_path, LARGE), Manifest.load(patterns).split("train")[0]

    def hold() -> None:
        with store.alone(shard.sha256):
            (tmp_path / "held").touch()
            time.sleep(60)

    owner = in_process(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    got = threading.Event()

    def wait() -> None:
        with store.alone(shard.sha256):
            got.set()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    assert not got.wait(0.2)
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    assert got.wait(10)
    waiting.join()
