"""A checkpoint on disk is verified before it is trusted, and nothing in it is ever run."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from scaleprog.errors import CheckpointError, OtherFormat
from scaleprog.sharding.coordinator import process_group
from scaleprog.storage import MANIFEST, _checksum, load_tensors, read_state, verify
from tests.unit.checkpoints import Save, blank, commit, data_file, flip, newest, parts, tensors


def test_loading_takes_what_is_asked_for_and_refuses_what_is_not_there(save_checkpoint: Save) -> None:
    path = save_checkpoint(1)
    part = {"online/net.weight": torch.zeros(7, 5)}
    load_tensors(path, parts(part))
    assert torch.equal(part["online/net.weight"], tensors(1)["online/net.weight"])
    with pytest.raises(CheckpointError, match=r"step-00000001: does not fit this run: .*online/other"):
        load_tensors(path, parts({"online/other": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"does not fit this run: .*[Ss]ize.*online/net.weight"):
        load_tensors(path, parts({"online/net.weight": torch.zeros(5, 8)}))


# ---- damage


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
def test_a_damaged_checkpoint_is_skipped_by_name_for_an_older_one(
    damage: str, save_checkpoint: Save, checkpoint_folder: Path
) -> None:
    harm, message = DAMAGES[damage]
    save_checkpoint(20)
    path = save_checkpoint(40)
    harm(path)
    with pytest.raises(CheckpointError, match=message):
        verify(path)
    name, told = newest(checkpoint_folder)
    assert name == "step-00000020"
    assert len(told) == 1
    assert told[0].startswith(f"skipped a damaged checkpoint: {path}/")
    save_checkpoint(40)  # trained once more
    assert newest(checkpoint_folder) == ("step-00000040", [])


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


def test_a_checkpoint_of_another_format_is_refused_rather_than_skipped(
    save_checkpoint: Save, checkpoint_folder: Path
) -> None:
    save_checkpoint(20)
    path = sign(save_checkpoint(40), format=9, versions={"scaleprog": "9.1.0", "torch": "4.0"})
    for reading in (lambda: newest(checkpoint_folder), lambda: read_state(path), lambda: verify(path)):
        with pytest.raises(OtherFormat, match=r"format 9, this version of scaleprog reads 4; .* 9\.1\.0$"):
            reading()


# ---- nothing is run


class Command:
    """What unpickles by running a shell command."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.touched}",)


@pytest.mark.parametrize("place", ["whole", "inside"])
def test_a_metadata_pickle_that_runs_a_command_is_refused(place: str, save_checkpoint: Save, tmp_path: Path) -> None:
    path, touched = save_checkpoint(1), tmp_path / "touched"
    metadata = pickle.loads((path / ".metadata").read_bytes())
    if place == "inside":
        metadata.planner_data = Command(touched)
    (path / ".metadata").write_bytes(pickle.dumps(metadata if place == "inside" else Command(touched)))
    verify(sign(path))
    with pytest.raises(CheckpointError, match=r"\.metadata names posix\.system, which no checkpoint metadata contains"):
        load_tensors(path, parts(blank()))
    assert not touched.exists()
    pickle.loads((path / ".metadata").read_bytes())  # it is no empty threat
    assert touched.exists()


@pytest.mark.parametrize(
    "name",
    [("torch", "load"), ("torch", "hub.load"), ("builtins", "eval"), ("pathlib", "Path"), ("torch.nn", "Linear")],
)
def test_metadata_names_nothing_but_what_metadata_is_made_of(name: tuple[str, str], save_checkpoint: Save) -> None:
    path = save_checkpoint(1)
    (path / ".metadata").write_bytes(
        b"\x80\x04\x8c" + bytes([len(name[0])]) + name[0].encode() + b"\x8c" + bytes([len(name[1])]) + name[1].encode()
        + b"\x93."
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=rf"\.metadata names {name[0]}\.{name[1]}, which"):
        load_tensors(path, parts(blank()))


def test_a_tensor_that_metadata_calls_bytes_is_not_unpickled(save_checkpoint: Save, tmp_path: Path) -> None:
    path, touched = save_checkpoint(1), tmp_path / "touched"
    name = "online/net.weight"
    torch.save(Command(touched), path / "__0_0.distcp")
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    entry = next(info for index, info in metadata.storage_data.items() if index.fqn == name)
    entry.relative_path, entry.offset, entry.length = "__0_0.distcp", 0, (path / "__0_0.distcp").stat().st_size
    metadata.storage_data[MetadataIndex(name)] = entry
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"names .*\.BytesStorageMetadata, which no checkpoint metadata contains"):
        load_tensors(sign(path), parts({name: torch.zeros(7, 5)}))
    assert not touched.exists()
