"""A checkpoint on disk is verified before it is trusted, whoever has sealed it; it is read whole or not at all."""

import json
import math
import os
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from scaleprog.errors import CheckpointError, OtherFormat, OtherRun, ScaleprogError
from scaleprog.ranks.coordinator import process_group
from scaleprog.rundir.storage import (
    MANIFEST,
    MANIFEST_BYTES,
    Manifest,
    Stored,
    load_tensors,
    publish,
    read_manifest,
    verify,
    write_tensors,
)
from scaleprog.rundir.tensorfile import DTYPES, NAMES
from scaleprog.sharding.placement import LocalSlice, Placement, held_by, share_out
from tests.unit.checkpoints import Save, blank, commit, data_file, flip, newest, parts, reseal, seal, tensors

FILE = "rank-00000.safetensors"
ONE = "online/net.weight"


def test_loading_takes_what_is_asked_for_and_refuses_what_is_not_there(save_checkpoint: Save) -> None:
    path = save_checkpoint(1)
    part = {ONE: torch.zeros(7, 5)}
    load_tensors(path, parts(part), subset=True)
    assert torch.equal(part[ONE], tensors(1)[ONE])
    for wrong, message in {
        "more": (blank() | {"online/other": torch.zeros(1)}, "online/other is not in the checkpoint"),
        "less": ({k: v for k, v in blank().items() if k != "ids"}, "ids is not in the network"),
        "larger": (blank() | {ONE: torch.zeros(5, 8)}, f"size and type of {ONE} are 35 F32 instead of 40 F32"),
        "of another type": (blank() | {ONE: torch.zeros(35).half()}, f"{ONE} are 35 F32 instead of 35 F16"),
    }.values():
        before = {name: tensor.clone() for name, tensor in wrong.items()}
        with pytest.raises(CheckpointError, match=rf"step-00000001: does not fit this run: .*{message}"):
            load_tensors(path, parts(wrong))
        assert all(torch.equal(wrong[name], tensor) for name, tensor in before.items()), "nothing was written"
    with pytest.raises(CheckpointError, match="online/other is not in the checkpoint"):
        load_tensors(path, parts({"online/other": torch.zeros(1)}), subset=True)


def test_whoever_reads_safetensors_can_read_it(save_checkpoint: Save) -> None:
    read = safetensors.torch.load_file(save_checkpoint(3) / FILE)
    assert {name: list(tensor.shape) for name, tensor in read.items()} == {
        name: [tensor.numel()] for name, tensor in tensors().items()
    }
    assert all(torch.equal(read[name], tensor.view(-1)) for name, tensor in tensors(3).items())


def test_each_type_of_tensor_comes_back(one_rank: None, tmp_path: Path) -> None:
    mixed = {name: torch.arange(5).to(dtype) for name, dtype in DTYPES.items()} | {"empty": torch.zeros(0)}
    path = commit(tmp_path / "checkpoints", 1, {}, mixed).path
    loaded = {name: torch.full_like(tensor, 1) for name, tensor in mixed.items()}
    load_tensors(path, parts(loaded))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in mixed.items())
    assert safetensors.torch.load_file(path / FILE).keys() == mixed.keys() - {"empty"}


# ---- from any ranks to any ranks


@st.composite
def saved_and_wanted(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Placement], int, dict[str, Placement], int]:
    """Tensors, how they are spread over how many ranks when saved, and when loaded."""
    names = draw(st.lists(st.sampled_from(["online/a", "ema.0/b.c", "step/d", "exp_avg/e"]), min_size=1, unique=True))
    ranks, again = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    whole, before, after = {}, {}, {}
    for seed, name in enumerate(names):
        numel, dtype = draw(st.integers(0, 40)), draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
        generator = torch.Generator().manual_seed(seed)
        whole[name] = torch.randint(-99, 99, (numel,), generator=generator).to(dtype)
        for placed, count in ((before, ranks), (after, again)):
            offset = draw(st.integers(0, 12))
            size = draw(st.integers(max(1, -(-(numel + offset) // count)), numel + offset + 3))
            placed[name] = Placement(numel, size, offset)
    return whole, before, ranks, after, again


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=saved_and_wanted(), copies=st.integers(1, 3))
def test_any_ranks_read_what_any_ranks_wrote(
    case: tuple[dict[str, Tensor], dict[str, Placement], int, dict[str, Placement], int], copies: int, tmp_path: Path
) -> None:
    whole, before, ranks, after, again = case
    final = tmp_path / "step-00000007"
    for leftover in (final, tmp_path / "writing"):
        shutil.rmtree(leftover, ignore_errors=True)

    def part(placement: Placement, tensor: Tensor, rank: int) -> LocalSlice:
        held = placement.local(rank)
        return LocalSlice(tensor[held.start : held.stop].clone(), held.start, placement.numel)

    world = [{n: part(before[n], whole[n], rank) for n in whole} for rank in [*range(ranks)] * copies]
    sizes = {name: tensor.numel() for name, tensor in whole.items()}
    chunks, files = share_out(sizes, [held_by(of_rank) for of_rank in world]), {}
    (tmp_path / "writing").mkdir()
    for rank, of_rank in enumerate(world):
        mine = {n: of_rank[n].tensor for n in whole if any(r == rank for r, _ in chunks[n])}
        files |= write_tensors(tmp_path / "writing", rank, mine)
    stored = {n: Stored(NAMES[t.dtype], t.numel(), chunks[n]) for n, t in whole.items()}
    publish(tmp_path / "writing", final, Manifest("0" * 32, 7, False, {}, {}, files, stored))
    verify(final)
    assert sum(p.stat().st_size for p in final.glob("rank-*")) <= 700 * len(files) + 8 * sum(
        t.numel() for t in whole.values()
    ), "nothing is saved twice"
    for rank in range(again):
        wanted = {n: part(after[n], torch.full_like(whole[n], 55), rank) for n in whole}
        load_tensors(final, wanted)
        for name, read in wanted.items():
            stop = read.start + read.tensor.numel()
            assert torch.equal(read.tensor, whole[name][read.start : stop])


def test_copies_of_a_stretch_are_shared_out_evenly() -> None:
    held = [[5 * (rank % 2), 5] * 8 for rank in range(4)]  # as HSDP has them
    shared = share_out({f"t{i}": 10 for i in range(8)}, held)
    assert [sum(n for chunks in shared.values() for r, n in chunks if r == rank) for rank in range(4)] == [20] * 4
    with pytest.raises(AssertionError, match="t: the ranks hold"):
        share_out({"t": 10}, [[0, 6], [5, 5]])


# ---- damage


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (lambda path: flip(data_file(path)), r"\.safetensors: the checksum differs"),
    "flipped bit in a header": (lambda path: flip(data_file(path), 20), r"\.safetensors: the checksum differs"),
    "flipped bit in the manifest": (lambda path: flip(path / MANIFEST), r"manifest\.json: "),
    "truncated file": (lambda path: os.truncate(data_file(path), 100), r"\.safetensors: 100 bytes, \d+ expected"),
    "longer file": (lambda path: os.truncate(data_file(path), 10**6), r"\.safetensors: 1000000 bytes, \d+ expected"),
    "truncated manifest": (lambda path: os.truncate(path / MANIFEST, 50), r"manifest\.json: Unterminated string"),
    "emptied manifest": (lambda path: (path / MANIFEST).write_text("{}"), r"manifest\.json: the checksum differs"),
    "another manifest": (lambda path: (path / MANIFEST).write_text("[]"), r"manifest\.json: the checksum differs"),
    "no UTF-8": (lambda path: (path / MANIFEST).write_bytes(b'{"\xff": 1}'), r"manifest\.json: .*decode byte 0xff"),
    "nested deeply": (lambda path: (path / MANIFEST).write_text("[" * 10**6), r"manifest\.json: nested too deeply"),
    "a number too long": (lambda path: (path / MANIFEST).write_text("9" * 10**5), r"manifest\.json: .*digits"),
    "no number": (lambda path: (path / MANIFEST).write_text('{"a": NaN}'), r"manifest\.json: NaN is not a JSON number"),
    "large": (lambda path: os.truncate(path / MANIFEST, 10**12), r"manifest\.json: more than \d+ bytes"),
    "missing file": (lambda path: data_file(path).unlink(), r"\.safetensors: missing"),
    "missing manifest": (lambda path: (path / MANIFEST).unlink(), r"manifest\.json: missing"),
    "nothing": (lambda path: [p.unlink() for p in path.iterdir()], r"manifest\.json: missing"),
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
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that nobody changes."""
    with process_group():
        return commit(tmp_path_factory.mktemp("saved") / "checkpoints", 7, {"step": 7, "top1": 9.25}, tensors(7)).path


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return Path(shutil.copytree(saved, tmp_path / "run" / "checkpoints" / saved.name))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(min_value=0), bit=st.integers(0, 7))
def test_no_flipped_bit_of_a_manifest_goes_unnoticed(at: int, bit: int, saved: Path, tmp_path: Path) -> None:
    manifest = (saved / MANIFEST).read_bytes()
    path = tmp_path / MANIFEST
    path.write_bytes(manifest)
    flip(path, at % len(manifest), bit)
    if not same_values(path.read_bytes(), manifest):  # else it hit blank space
        with pytest.raises(CheckpointError, match=r"manifest\.json: "):
            read_manifest(tmp_path)


def same_values(mine: bytes, theirs: bytes) -> bool:
    try:
        return json.loads(mine) == json.loads(theirs)
    except ValueError:
        return False


@pytest.mark.parametrize("version", [4, 9])
def test_a_checkpoint_of_another_format_is_refused_rather_than_skipped(
    version: int, save_checkpoint: Save, checkpoint_folder: Path
) -> None:
    save_checkpoint(20)
    path = save_checkpoint(40)
    (path / MANIFEST).write_text("{}")
    seal(path, {"kind": "scaleprog-checkpoint", "format": version, "versions": {"scaleprog": "9.1.0"}, "files": {}})
    for reading in (lambda: newest(checkpoint_folder), lambda: read_manifest(path).state, lambda: verify(path)):
        with pytest.raises(OtherFormat, match=rf"format {version}, but this version of scaleprog reads 5; .* 9\.1\.0$"):
            reading()


# ---- sealed by somebody else


def set_tensor(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["tensors"].__setitem__(name, value)


def move_file(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["files"].__setitem__(name, manifest["files"].pop(FILE))


def with_files(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["files"].__setitem__(FILE, value)


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest.pop(key)


HUGE = 2**60
RESEALED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a path that leaves the folder": (move_file("../../secret"), r"`files` does not match the files .*: \.\./"),
    "an absolute path": (move_file("/etc/passwd"), r"`files` does not match"),
    "a path below": (move_file("x/rank-00000.safetensors"), r"`files` does not match"),
    "a name with an escape": (move_file("\x1b[2J"), r"`files` does not match the files that hold tensors: '\\x1b"),
    "a file more": (lambda m: m["files"].update({"rank-00001.safetensors": [0, "0" * 64]}), "`files` does not match"),
    "a file less": (lambda m: m["files"].clear(), r"`files` does not match .*: rank-00000"),
    "a file that is nothing": (with_files(None), "needs a size and a checksum"),
    "a file without a size": (with_files(["0" * 64]), "needs a size and a checksum"),
    "a negative size": (with_files([-1, "0" * 64]), "needs a size and a checksum"),
    "a size that is true": (with_files([True, "0" * 64]), "needs a size and a checksum"),
    "another checksum": (lambda m: m["files"][FILE].__setitem__(1, "0" * 64), r"\.safetensors: the checksum differs"),
    "no checksum": (lambda m: m["files"][FILE].__setitem__(1, None), "needs a size and a checksum"),
    "a chunk is missing": (set_tensor(ONE, ["F32", 35, []]), f"chunks of {ONE} do not add up to its 35 elements"),
    "a gap": (set_tensor(ONE, ["F32", 35, [[0, 34]]]), "do not add up to its 35 elements"),
    "an overlap": (set_tensor(ONE, ["F32", 35, [[0, 20], [0, 16]]]), "do not add up to its 35 elements"),
    "a stretch twice": (set_tensor(ONE, ["F32", 70, [[0, 35], [0, 35]]]), "two chunks of one rank"),
    "a negative chunk": (set_tensor(ONE, ["F32", 35, [[0, 36], [0, -1]]]), "a chunk that is not a rank and a length"),
    "a chunk of nothing": (set_tensor(ONE, ["F32", 35, [[0, 35], [1, 0]]]), "a chunk that is not a rank and a length"),
    "a chunk of a rank below zero": (set_tensor(ONE, ["F32", 35, [[-1, 35]]]), "not a rank and a length"),
    "a chunk of a rank beyond all": (set_tensor(ONE, ["F32", 35, [[10**9, 35]]]), "not a rank and a length"),
    "a chunk of half a rank": (set_tensor(ONE, ["F32", 35, [[0.5, 35]]]), "not a rank and a length"),
    "a chunk elsewhere": (set_tensor(ONE, ["F32", 35, [[1, 35]]]), r"`files` does not match .*rank-00001"),
    "another type": (set_tensor(ONE, ["F64", 35, [[0, 35]]]), r"has \d+ bytes, but its tensors need \d+"),
    "another type of that size": (set_tensor(ONE, ["I32", 35, [[0, 35]]]), r"\.safetensors: its header does not match"),
    "a type that is none": (set_tensor(ONE, ["F128", 35, [[0, 35]]]), "needs a type, a size and chunks"),
    "a type that is a list": (set_tensor(ONE, [[], 35, [[0, 35]]]), "needs a type, a size and chunks"),
    "fewer elements": (set_tensor(ONE, ["F32", 34, [[0, 34]]]), r"has \d+ bytes, but its tensors need \d+"),
    "very many elements": (set_tensor(ONE, ["F32", HUGE, [[0, HUGE]]]), r"has \d+ bytes, but its tensors need 461168"),
    "elements beyond numbers": (set_tensor(ONE, ["F32", 10**4000, [[0, 10**4000]]]), "has .* bytes|digits"),
    "no elements at all": (set_tensor(ONE, ["F32", None, []]), "needs a type, a size and chunks"),
    "a tensor that is a number": (set_tensor(ONE, 3), "needs a type, a size and chunks"),
    "a tensor more": (set_tensor("online/other", ["F32", 1, [[0, 1]]]), r"has \d+ bytes, but its tensors need \d+"),
    "an empty tensor more": (set_tensor("online/other", ["F32", 0, []]), "does not fit this run: online/other is not"),
    "a tensor less": (lambda m: m["tensors"].pop("ids"), r"has \d+ bytes, but its tensors need \d+"),
    "a tensor with a strange name": (set_tensor("\x1b[2J\n", ["F32", 0, []]), r"'\\x1b\[2J\\n' is not a tensor name"),
    "a tensor with a long name": (set_tensor("x" * 10**6, ["F32", 0, []]), "is not a tensor name"),
    "very many tensors": (
        lambda m: m["tensors"].update({str(i): ["F32", 0, []] for i in range(100_000)}),
        "`tensors`: more than 100000",
    ),
    "no tensors": (lambda m: m["tensors"].clear(), r"`files` does not match"),
    "tensors that are a list": (lambda m: m.update(tensors=[1]), "`tensors` is not a mapping"),
    "files that are a list": (lambda m: m.update(files=[FILE]), "`files` is not a mapping"),
    "a state that is a list": (lambda m: m.update(state=[1]), "`state` is not a mapping"),
    "no recipe": (without("recipe"), "`recipe` is not a mapping"),
    "no run": (without("run"), "`run` does not name a run"),
    "a run that is a path": (lambda m: m.update(run="../" * 10 + "aa"), "`run` does not name a run"),
    "permanent perhaps": (lambda m: m.update(permanent="yes"), "`permanent` is neither"),
    "no step": (without("step"), "`step` is not a step number"),
    "a negative step": (lambda m: m.update(step=-7), "`step` is not a step number"),
    "a step that is true": (lambda m: m.update(step=True), "`step` is not a step number"),
    "a step of all steps": (lambda m: m.update(step=10**30), "`step` is not a step number"),
    "another kind": (lambda m: m.update(kind="results"), "not a manifest of a checkpoint"),
    "a format that is a name": (lambda m: m.update(format="5"), "not a manifest of a checkpoint"),
    "a format that is true": (lambda m: m.update(format=True), "not a manifest of a checkpoint"),
}


@pytest.mark.parametrize("fault", RESEALED)
def test_a_manifest_that_was_sealed_again_is_believed_no_more_than_any(fault: str, copied: Path) -> None:
    change, message = RESEALED[fault]
    reseal(copied, change)
    loaded = blank()

    def read() -> None:
        verify(copied)
        load_tensors(copied, parts(loaded))

    with pytest.raises(CheckpointError, match=rf"step-00000007.*{message}"):
        read()
    with suppress(CheckpointError):  # nor does a rank that did not verify it get anything else than its tensors
        load_tensors(copied, parts(loaded))
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(7).items())


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.replace(b'"shape":[35]', b'"shape":[99]'),
        lambda content: content.replace(b'"F32"', b'"I32"'),
        lambda content: content.replace(b"online/half", b"online/hulf"),
        lambda content: (2**60).to_bytes(8, "little") + content[8:],
        lambda content: b"[" * len(content),
        lambda content: bytes(len(content)),
    ],
)
def test_a_file_that_describes_itself_otherwise_is_refused(change: Callable[[bytes], bytes], copied: Path) -> None:
    file = copied / FILE
    changed = change(file.read_bytes())
    assert changed != file.read_bytes()
    file.write_bytes(changed)
    reseal(copied)
    for reading in (lambda: verify(copied), lambda: load_tensors(copied, parts(blank()))):
        with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: its header does not match"):
            reading()


def put_socket(place: Path, _: Path) -> None:
    os.chdir(place.parent)  # its path may be too long for a socket
    socket.socket(socket.AF_UNIX).bind(place.name)


IMPOSTORS: dict[str, Callable[[Path, Path], object]] = {
    "link": lambda place, moved: place.symlink_to(moved),
    "FIFO": lambda place, _: os.mkfifo(place),
    "folder": lambda place, _: place.mkdir(),
    "socket": put_socket,
    "link to nowhere": lambda place, _: place.symlink_to("/nowhere"),
    "device": lambda place, _: place.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("impostor", IMPOSTORS)
@pytest.mark.parametrize("name", [FILE, MANIFEST])
def test_only_regular_files_are_read(
    name: str, impostor: str, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (copied / name).rename(tmp_path / "moved")
    IMPOSTORS[impostor](copied / name, tmp_path / "moved")
    for reading in (lambda: verify(copied), lambda: load_tensors(copied, parts(blank()))):
        with pytest.raises(CheckpointError, match=rf"{name}: not a regular file"):
            reading()


def test_a_checkpoint_that_is_a_link_is_refused(copied: Path, tmp_path: Path) -> None:
    copied.rename(tmp_path / copied.name)
    copied.symlink_to(tmp_path / copied.name)
    with pytest.raises(CheckpointError, match="step-00000007: a symbolic link; a checkpoint must be a folder"):
        verify(copied)


def test_files_larger_than_any_checkpoint_of_the_run_are_not_even_read(copied: Path) -> None:
    lease = set_tensor(ONE, ["F32", 2**40, [[0, 2**40]]])
    with pytest.raises(CheckpointError, match="its tensors need") as told:
        verify(reseal(copied, lease))
    size = int(str(told.value).rpartition(" ")[2])
    reseal(copied, lambda manifest: (lease(manifest), with_files([size, "0" * 64])(manifest)))
    os.truncate(copied / FILE, size)  # as many as it says, though next to none of them are on the disk
    with pytest.raises(CheckpointError, match=rf"{size} bytes, but a checkpoint of this run has at most 99"):
        verify(copied, most=99)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_stands_in_a_sealed_manifest_the_tensors_are_those_that_were_saved_or_none(
    data: st.DataObject, saved: Path, tmp_path: Path
) -> None:
    path = tmp_path / saved.name
    if not path.exists():
        shutil.copytree(saved, path)
    manifest = json.loads((saved / MANIFEST).read_text())
    place, inner = manifest, data.draw(st.sampled_from(sorted(manifest)))
    while isinstance(place[inner], list | dict) and place[inner] and data.draw(st.booleans()):
        place = place[inner]
        inner = data.draw(st.sampled_from(range(len(place)) if isinstance(place, list) else sorted(place)))
    was, place[inner] = place[inner], data.draw(anything)
    assume(was != place[inner] or type(was) is not type(place[inner]))
    loaded = blank()
    seal(path, manifest)
    try:
        verify(path)
        load_tensors(path, parts(loaded))
    except ScaleprogError:
        return
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(7).items())


def test_a_manifest_that_could_not_be_read_is_not_written(one_rank: None, tmp_path: Path) -> None:
    ended = commit(tmp_path / "checkpoints", 1, {"x": math.nan}, tensors())
    assert "cannot write the state" in str(ended.error)
    ended = commit(tmp_path / "checkpoints", 1, {"x": "x" * MANIFEST_BYTES}, tensors())
    assert "more than the limit of" in str(ended.error)


# ---- in the wrong place


def test_two_checkpoints_in_each_others_places_are_refused(save_checkpoint: Save, checkpoint_folder: Path) -> None:
    first, second = save_checkpoint(20), save_checkpoint(40)
    first.rename(checkpoint_folder / "between")
    second.rename(first)
    (checkpoint_folder / "between").rename(second)
    for reading in (lambda: newest(checkpoint_folder), lambda: verify(second), lambda: read_manifest(second).state):
        with pytest.raises(OtherRun, match=r"step-00000040: holds step 20, so it was renamed .* must be step-00000020"):
            reading()


def test_a_checkpoint_that_was_renamed_is_refused(save_checkpoint: Save, checkpoint_folder: Path) -> None:
    save_checkpoint(20).rename(checkpoint_folder / "step-00000099")
    with pytest.raises(OtherRun, match=r"step-00000099: holds step 20"):
        newest(checkpoint_folder)
