"""The manifest: what is saved is what is loaded, and everything wrong with it is said with the file's name."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaleprog.data.manifest import NAME, Manifest, Shard
from scaleprog.data.source import source_of
from scaleprog.errors import DataError

SHARD = Shard("train-000000.tar", samples=3, bytes=5, sha256="0" * 64)

shards = st.builds(
    Shard,
    name=st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}\.tar", fullmatch=True),
    samples=st.integers(0, 10**9),
    bytes=st.integers(0, 10**15),
    sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
)
in_order = st.lists(shards, unique_by=lambda shard: shard.name).map(lambda found: sorted(found, key=lambda s: s.name))
splits = st.fixed_dictionaries(
    {
        name: in_order.map(lambda found, name=name: tuple(replace(s, name=f"{name}-{s.name}") for s in found))
        for name in ("train", "val")
    }
)
names = st.lists(st.text(st.characters(codec="utf-8")), unique=True).map(tuple)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(classes=names, splits=splits)
def test_save_then_load_gives_the_same(tmp_path: Path, classes, splits):
    manifest = Manifest(str(tmp_path), classes, splits, {"builder": "test", "seed": 1})
    manifest.save()
    assert Manifest.load(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_what_is_known_of_the_images_is_kept_and_is_no_source(tmp_path: Path) -> None:
    manifest = Manifest(str(tmp_path), ("a",), {"train": (SHARD,)}, {"builder": "test"}, sound=True)
    manifest.save()
    loaded = Manifest.load(tmp_path)
    assert loaded.sound
    assert loaded.source == manifest.source
    Manifest(str(tmp_path), ("a",), {"train": (SHARD,)}, {"builder": "test"}).save()
    assert not Manifest.load(tmp_path).sound


def test_counts_paths_and_missing_split(tmp_path: Path):
    manifest = Manifest(str(tmp_path), ("a", "b"), {"train": (SHARD, Shard("train-1.tar", 4, 6, "1" * 64))})
    assert manifest.samples("train") == 7
    assert Path(manifest.path(SHARD)) == tmp_path / SHARD.name
    with pytest.raises(DataError, match=r"no split 'val'.*it has: train"):
        manifest.split("val")


def test_travels_to_data_workers(tmp_path: Path):
    manifest = Manifest(str(tmp_path), ("a",), {"train": (SHARD,)})
    assert pickle.loads(pickle.dumps(manifest)) == manifest


def test_may_move_with_its_folder(tmp_path: Path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    Manifest(str(old), ("a",), {"train": (SHARD,)}).save()
    old.rename(new)
    assert str(tmp_path) not in (new / NAME).read_text()
    assert Path(Manifest.load(new).path(SHARD)).parent == new


def test_what_a_data_set_is_does_not_depend_on_where_it_lies(tmp_path: Path):
    shards = (SHARD, Shard("train-000001.tar", 4, 6, "1" * 64))
    held_out = (Shard("val-0.tar", 2, 6, "2" * 64),)
    known = Manifest("/here", ("a", "b"), {"train": shards, "val": held_out}).identity()
    assert [line.rpartition(",")[0] for line in known.values()] == ["7 samples", "2 samples", "2 classes"]
    assert Manifest("/there", ("a", "b"), {"train": shards, "val": held_out}, {"builder": "x"}).identity() == known
    changed = {
        "classes": Manifest("/here", ("b", "a"), {"train": shards, "val": held_out}),
        "train": Manifest("/here", ("a", "b"), {"train": shards[::-1], "val": held_out}),
        "val": Manifest("/here", ("a", "b"), {"train": shards, "val": (replace(held_out[0], sha256="3" * 64),)}),
    }
    for what, manifest in changed.items():
        assert [key for key, line in manifest.identity().items() if known[key] != line] == [what]


def test_two_classes_may_have_the_same_name(tmp_path: Path):
    """As two of ImageNet's have: a crane is a bird and a machine."""
    (tmp_path / NAME).write_text(json.dumps(with_(classes=["crane", "crane"])))
    assert Manifest.load(tmp_path).classes == ("crane", "crane")


def test_missing_folder_and_missing_manifest_say_how_to_build(tmp_path: Path):
    (tmp_path / "train-0.tar").touch()
    with pytest.raises(DataError, match=r"train-0\.tar: a file; give the folder that holds the shards"):
        Manifest.load(tmp_path / "train-0.tar")
    with pytest.raises(DataError, match=r"~/data: the folder of shards does not exist: ~ is not expanded"):
        Manifest.load("~/data")
    with pytest.raises(DataError, match=r"gone: the folder of shards does not exist.*scaleprog shards"):
        Manifest.load(tmp_path / "gone")
    with pytest.raises(DataError, match=rf"{tmp_path}: .*no manifest.json.*--write-manifest"):
        Manifest.load(tmp_path)


def with_(**changes):
    return {"kind": "scaleprog-manifest", "version": 1, "classes": ["a"], "splits": {}} | changes


def entry(**changes):
    return {"name": "train-0.tar", "samples": 1, "bytes": 1, "sha256": "0" * 64} | changes


@pytest.mark.parametrize(
    ("stored", "complaint"),
    [
        (with_(version=2), "format version 2, .* reads version 1"),
        (with_(kind="something"), "malformed at kind"),
        (with_(classes="ab"), "malformed at classes"),
        (with_(extra=1), "malformed at extra"),
        ([], "malformed at the top level"),
        (with_(splits={"train": [entry(samples=-1)]}), "malformed at splits.train.0.samples"),
        (with_(splits={"train": [entry(sha256="abc")]}), "malformed at splits.train.0.sha256"),
        (with_(splits={"train": [entry(name="../elsewhere.tar")]}), "malformed at splits.train.0.name"),
        (with_(splits={"train": [entry(name="a/../elsewhere.tar")]}), "malformed at splits.train.0.name"),
        (with_(splits={"train": [entry(name="a/.hidden/b.tar")]}), "malformed at splits.train.0.name"),
        (with_(splits={"train": [entry(name="http://elsewhere/a.tar")]}), "malformed at splits.train.0.name"),
        (with_(root="http://elsewhere", splits={}), "malformed at root"),
        (with_(splits={"train": [entry()], "val": [entry()]}), "listed twice"),
    ],
)
def test_malformed(tmp_path: Path, stored, complaint: str):
    (tmp_path / NAME).write_text(json.dumps(stored))
    with pytest.raises(DataError, match=complaint) as caught:
        Manifest.load(tmp_path)
    assert str(tmp_path / NAME) in str(caught.value)


def test_well_formed_loads(tmp_path: Path):
    """The counterpart of `test_malformed`: the values that its cases spoil are good."""
    (tmp_path / NAME).write_text(json.dumps(with_(splits={"train": [entry()]})))
    assert Manifest.load(tmp_path).samples("train") == 1


@pytest.mark.parametrize("text", [b"", b'{"kind": ', b"\xff\xfe"])
def test_not_json(tmp_path: Path, text: bytes):
    (tmp_path / NAME).write_bytes(text)
    with pytest.raises(DataError, match=NAME):
        Manifest.load(tmp_path)


def test_save_where_it_cannot(tmp_path: Path):
    (tmp_path / NAME).mkdir()
    with pytest.raises(DataError, match=r"cannot write manifest\.json"):
        Manifest(str(tmp_path), (), {}).save()
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_shard_that_may_not_be_read_is_told_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    manifest = Manifest(str(tmp_path), ("a",), {"train": (SHARD,)})
    path = Path(manifest.path(SHARD))
    path.write_bytes(b"x" * SHARD.bytes)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may read anything
    with pytest.raises(DataError, match=rf"{path}: you may not read this shard. Make it readable"):
        manifest.verify_sizes("train")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("scaleprog.data.source.open_regular", refuse)
    with pytest.raises(DataError, match=rf"{path}: you may not read this shard; make it readable"):
        source_of(tmp_path).read(SHARD, False)


def test_verify_sizes(tmp_path: Path):
    manifest = Manifest(str(tmp_path), ("a",), {"train": (SHARD, Shard("train-000001.tar", 1, 2, "0" * 64))})
    for shard in manifest.split("train"):
        Path(manifest.path(shard)).write_bytes(b"x" * shard.bytes)
    manifest.verify_sizes("train")

    first, second = (Path(manifest.path(shard)) for shard in manifest.split("train"))
    first.write_bytes(b"xx")
    with pytest.raises(DataError, match=r"train-000000\.tar: truncated, 2 bytes where manifest.json says 5") as caught:
        manifest.verify_sizes("train")
    assert "more" not in str(caught.value)
    second.unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar: truncated.* 1 more"):
        manifest.verify_sizes("train")
    first.write_bytes(b"x" * 5)
    with pytest.raises(DataError, match=r"train-000001\.tar: .*No such file"):
        manifest.verify_sizes("train")


def test_shards_out_of_order_and_of_another_split_are_refused(tmp_path: Path) -> None:
    """Their order is that of the samples: a run that resumed on another would repeat some and skip others."""
    first, second = (replace(SHARD, name=f"train-00000{i}.tar") for i in range(2))
    Manifest(str(tmp_path), ("a",), {"train": (second, first)}, {}).save()
    with pytest.raises(DataError, match=r"split 'train' lists train-000000\.tar after train-000001\.tar"):
        Manifest.load(tmp_path)
    Manifest(str(tmp_path), ("a",), {"train": (first,), "val": (second,)}, {}).save()
    with pytest.raises(DataError, match=r"split 'val' lists train-000001\.tar, whose name says 'train'"):
        Manifest.load(tmp_path)
