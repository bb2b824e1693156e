"""Checkpoints: whole or absent, verified before they are trusted, and nothing in them is ever run."""

import hashlib
import json
import os
import pickle
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from scaleprog.checkpoint import Checkpoints, Commit
from scaleprog.errors import CheckpointError, OtherFormat, Superseded
from scaleprog.sharding.coordinator import Coordinator, process_group
from scaleprog.storage import MANIFEST, _checksum, committed, load_tensors, read_state, step_of, tidy, verify

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


def commit(
    folder: Path,
    step: int,
    state: dict[str, Any],
    tensors: dict[str, Tensor],
    keep: int = 9,
    protect: tuple[int, ...] = (),
    permanent: bool = False,
) -> Commit:
    """Saves, waits, and tells how it ended."""
    checkpoints = Checkpoints(folder, Coordinator(), keep)
    checkpoints.save(step, state, tensors, protect, permanent)
    checkpoints.wait()
    [ended] = checkpoints.finished()
    return ended


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def save(folder: Path, one_rank: None) -> Save:
    """Saves a checkpoint whose tensors are drawn from its step."""

    def write(step: int, keep: int = 9, protect: tuple[int, ...] = ()) -> Path:
        return commit(folder, step, {"step": step}, tensors(step), keep, protect).path

    return write


def newest(folder: Path) -> tuple[str | None, list[str]]:
    """The name of the newest checkpoint, and what was reported."""
    told: list[str] = []
    found = Checkpoints(folder, Coordinator(), keep=9).newest(told.append)
    return (found.name if found else None), told


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- writing and reading


def test_what_was_saved_is_loaded_bit_for_bit(save: Save, folder: Path) -> None:
    path = save(40)
    loaded = blank()
    load_tensors(path, loaded)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(40).items())
    assert {name: t.dtype for name, t in loaded.items()} == {name: t.dtype for name, t in tensors().items()}
    assert read_state(path) == {"step": 40}
    verify(path)


def test_a_commit_tells_what_it_wrote(one_rank: None, folder: Path) -> None:
    ended = commit(folder, 3, {"x": [1.5, None]}, tensors())
    assert (ended.path, ended.step, ended.error) == (folder / "step-00000003", 3, None)
    assert ended.bytes == sum(p.stat().st_size for p in ended.path.iterdir() if p.name != MANIFEST)
    assert ended.seconds > 0
    assert read_state(ended.path) == {"x": [1.5, None]}


def test_loading_takes_what_is_asked_for_and_refuses_what_is_not_there(save: Save) -> None:
    path = save(1)
    part = {"online/net.weight": torch.zeros(7, 5)}
    load_tensors(path, part)
    assert torch.equal(part["online/net.weight"], tensors(1)["online/net.weight"])
    with pytest.raises(CheckpointError, match=r"step-00000001: does not fit this run: .*online/other"):
        load_tensors(path, {"online/other": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"does not fit this run: .*[Ss]ize.*online/net.weight"):
        load_tensors(path, {"online/net.weight": torch.zeros(5, 7)})


def test_a_step_that_is_saved_again_replaces_only_a_damaged_checkpoint(one_rank: None, folder: Path) -> None:
    path = commit(folder, 5, {"try": 1}, tensors(1)).path
    commit(folder, 5, {"try": 2}, tensors(2))
    assert read_state(path) == {"try": 1}
    flip(data_file(path))
    commit(folder, 5, {"try": 3}, tensors(3))
    assert names(folder) == ["step-00000005"]
    assert read_state(path) == {"try": 3}
    verify(path)


def test_what_is_saved_is_what_the_tensors_were_then(one_rank: None, folder: Path) -> None:
    checkpoints, live = Checkpoints(folder, Coordinator(), keep=1), tensors(1)
    checkpoints.save(1, {}, live)
    for tensor in live.values():
        tensor.fill_(7)
    checkpoints.wait()
    loaded = blank()
    load_tensors(folder / "step-00000001", loaded)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(1).items())


# ---- which one is the newest


def test_there_is_no_newest_where_nothing_was_saved(one_rank: None, folder: Path) -> None:
    assert newest(folder) == (None, [])
    folder.mkdir(parents=True)
    assert newest(folder) == (None, [])


def test_the_newest_is_the_last_step(save: Save, folder: Path) -> None:
    for step in (20, 100, 3):
        save(step)
    assert [step_of(path) for path in committed(folder)] == [3, 20, 100]
    assert newest(folder) == ("step-00000100", [])


def test_what_is_no_published_checkpoint_is_ignored(save: Save, folder: Path) -> None:
    path = save(20)
    shutil.copytree(path, folder / ".step-00000040.writing")  # a write that was interrupted before its rename
    shutil.copytree(path, folder / "step-00000060.bak")  # a user's copy
    (folder / "step-00000080").write_text("not a folder")
    assert newest(folder) == ("step-00000020", [])
    save(40)
    assert newest(folder) == ("step-00000040", [])


def flip(path: Path, at: int = -1, bit: int = 0) -> None:
    """Turns over one bit; by default of the byte in the middle."""
    data = bytearray(path.read_bytes())
    data[at if at >= 0 else len(data) // 2] ^= 1 << bit
    path.write_bytes(data)


def data_file(path: Path) -> Path:
    return next(p for p in path.iterdir() if p.suffix == ".distcp")


def sign(path: Path, **changes: Any) -> Path:
    """Makes the manifest right for what the checkpoint holds now, and for `changes` to itself."""
    manifest = json.loads((path / MANIFEST).read_text()) | changes
    del manifest["checksum"]
    for name in manifest["files"]:
        content = (path / name).read_bytes()
        manifest["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
    (path / MANIFEST).write_text(json.dumps(manifest | {"checksum": _checksum(manifest)}))
    return path


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (lambda path: flip(data_file(path)), r"\.distcp: the checksum differs"),
    "flipped bit in the metadata": (lambda path: flip(path / ".metadata"), r"\.metadata: the checksum differs"),
    "flipped bit in the manifest": (lambda path: flip(path / MANIFEST), r"manifest\.json: "),
    "truncated file": (lambda path: os.truncate(data_file(path), 100), r"\.distcp: 100 bytes, \d+ expected"),
    "truncated manifest": (lambda path: os.truncate(path / MANIFEST, 50), r"manifest\.json: not readable"),
    "emptied manifest": (lambda path: (path / MANIFEST).write_text("{}"), r"manifest\.json: the checksum differs"),
    "another manifest": (lambda path: (path / MANIFEST).write_text("[]"), r"manifest\.json: the checksum differs"),
    "missing file": (lambda path: data_file(path).unlink(), r"\.distcp: missing"),
    "missing metadata": (lambda path: (path / ".metadata").unlink(), r"\.metadata: missing"),
    "missing manifest": (lambda path: (path / MANIFEST).unlink(), r"manifest\.json: not readable"),
    "nothing": (lambda path: [p.unlink() for p in path.iterdir()], r"manifest\.json: not readable"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_by_name_for_an_older_one(damage: str, save: Save, folder: Path) -> None:
    harm, message = DAMAGES[damage]
    save(20)
    path = save(40)
    harm(path)
    with pytest.raises(CheckpointError, match=message):
        verify(path)
    name, told = newest(folder)
    assert name == "step-00000020"
    assert len(told) == 1
    assert told[0].startswith(f"skipped a damaged checkpoint: {path}/")
    save(40)  # trained once more
    assert newest(folder) == ("step-00000040", [])


def test_if_all_are_damaged_there_is_none(save: Save, folder: Path) -> None:
    for step in (1, 2):
        flip(data_file(save(step)))
    name, told = newest(folder)
    assert name is None
    assert ["step-00000002" in told[0], "step-00000001" in told[1]] == [True, True]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The manifest of a checkpoint."""
    with process_group():
        path = commit(tmp_path_factory.mktemp("manifest"), 7, {"step": 7, "top1": 9.25}, tensors(7)).path
    return (path / MANIFEST).read_bytes()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(min_value=0), bit=st.integers(0, 7))
def test_no_flipped_bit_of_a_manifest_goes_unnoticed(at: int, bit: int, manifest: bytes, tmp_path: Path) -> None:
    path = tmp_path / MANIFEST
    path.write_bytes(manifest)
    flip(path, at % len(manifest), bit)
    if not same_values(path.read_bytes(), manifest):  # else it hit blank space
        with pytest.raises(CheckpointError, match=r"manifest\.json: "):
            read_state(tmp_path)


def same_values(mine: bytes, theirs: bytes) -> bool:
    try:
        return json.loads(mine) == json.loads(theirs)
    except ValueError:
        return False


def test_a_checkpoint_of_another_format_is_refused_rather_than_skipped(save: Save, folder: Path) -> None:
    save(20)
    path = sign(save(40), format=9, versions={"scaleprog": "9.1.0", "torch": "4.0"})
    for reading in (lambda: newest(folder), lambda: read_state(path), lambda: verify(path)):
        with pytest.raises(OtherFormat, match=r"format 9, this version of scaleprog reads 2; .* 9\.1\.0$"):
            reading()


# ---- which ones stay


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay(keep: int, save: Save, folder: Path) -> None:
    for step in range(10, 60, 10):
        save(step, keep)
    assert [step_of(path) for path in committed(folder)] == list(range(10, 60, 10))[-keep:]


def test_the_protected_one_stays_beyond_those(save: Save, folder: Path) -> None:
    for step in (10, 20):
        save(step, keep=2)
    for step in (30, 40, 50):
        save(step, keep=2, protect=(10,))
    assert [step_of(path) for path in committed(folder)] == [10, 40, 50]
    save(60, keep=2)
    assert [step_of(path) for path in committed(folder)] == [50, 60]


def test_a_permanent_one_stays(one_rank: None, folder: Path) -> None:
    for step in (10, 20, 30, 40):
        commit(folder, step, {}, tensors(), keep=1, permanent=step == 20)
    assert [step_of(path) for path in committed(folder)] == [20, 40]


def test_what_an_interruption_left_is_tidied_away(save: Save, folder: Path) -> None:
    save(10)
    for name in (".step-00000020.3.writing", ".step-00000005.old"):
        (folder / name).mkdir()
        (folder / name / "__0_0.distcp").write_bytes(b"half")
    assert newest(folder) == ("step-00000010", [])
    tidy(folder)
    assert names(folder) == ["step-00000010"]


def test_a_start_that_was_superseded_neither_commits_nor_deletes(one_rank: None, folder: Path, save: Save) -> None:
    save(10)

    @contextmanager
    def fence() -> Iterator[None]:
        raise Superseded("generation 1 was superseded by generation 2")
        yield

    orphan = Checkpoints(folder, Coordinator(), keep=1, fence=fence)
    orphan.save(20, {}, tensors())
    with pytest.raises(Superseded, match="generation 1 was superseded"):
        orphan.wait()
    assert names(folder) == ["step-00000010"]


# ---- writing that fails


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 64 KiB: what a full disk does, but to this process alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_breaks_off_leaves_the_older_ones(save: Save, folder: Path, small_files: None) -> None:
    save(20)
    large = {"online/net.weight": torch.zeros(2**16)}
    ended = commit(folder, 40, {}, large, keep=1)
    assert re.search(r"step-00000040\.0\.writing: not written \(rank 0: .*\); is the disk full", str(ended.error))
    assert newest(folder) == ("step-00000020", [])
    assert [path.name for path in committed(folder)] == ["step-00000020"]


def test_a_disk_that_is_full_only_for_the_manifest_leaves_the_older_ones(
    save: Save, folder: Path, small_files: None
) -> None:
    save(20)
    ended = commit(folder, 40, {"x": "x" * 2**17}, tensors(), keep=1)
    assert re.search(r"not written \(.*large\); is the disk full", str(ended.error))
    assert newest(folder) == ("step-00000020", [])


def test_a_folder_that_cannot_be_made_is_named(one_rank: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = commit(tmp_path / "file" / "checkpoints", 1, {}, tensors())
    assert re.search(r"file/checkpoints/\.step-00000001\.0\.writing: not written \(.*Not a di", str(ended.error))


# ---- nothing is run


class Command:
    """What unpickles by running a shell command."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.touched}",)


@pytest.mark.parametrize("place", ["whole", "inside"])
def test_a_metadata_pickle_that_runs_a_command_is_refused(place: str, save: Save, tmp_path: Path) -> None:
    path, touched = save(1), tmp_path / "touched"
    metadata = pickle.loads((path / ".metadata").read_bytes())
    if place == "inside":
        metadata.planner_data = Command(touched)
    (path / ".metadata").write_bytes(pickle.dumps(metadata if place == "inside" else Command(touched)))
    verify(sign(path))
    with pytest.raises(CheckpointError, match=r"\.metadata names posix\.system, which no checkpoint metadata contains"):
        load_tensors(path, blank())
    assert not touched.exists()
    pickle.loads((path / ".metadata").read_bytes())  # it is no empty threat
    assert touched.exists()


@pytest.mark.parametrize(
    "name",
    [("torch", "load"), ("torch", "hub.load"), ("builtins", "eval"), ("pathlib", "Path"), ("torch.nn", "Linear")],
)
def test_metadata_names_nothing_but_what_metadata_is_made_of(name: tuple[str, str], save: Save) -> None:
    path = save(1)
    (path / ".metadata").write_bytes(
        b"\x80\x04\x8c" + bytes([len(name[0])]) + name[0].encode() + b"\x8c" + bytes([len(name[1])]) + name[1].encode()
        + b"\x93."
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=rf"\.metadata names {name[0]}\.{name[1]}, which"):
        load_tensors(path, blank())


def test_a_tensor_that_metadata_calls_bytes_is_not_unpickled(save: Save, tmp_path: Path) -> None:
    path, touched = save(1), tmp_path / "touched"
    name = "online/net.weight"
    torch.save(Command(touched), path / "__0_0.distcp")
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    entry = next(info for index, info in metadata.storage_data.items() if index.fqn == name)
    entry.relative_path, entry.offset, entry.length = "__0_0.distcp", 0, (path / "__0_0.distcp").stat().st_size
    metadata.storage_data[MetadataIndex(name)] = entry
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"names .*\.BytesStorageMetadata, which no checkpoint metadata contains"):
        load_tensors(sign(path), {name: torch.zeros(7, 5)})
    assert not touched.exists()
