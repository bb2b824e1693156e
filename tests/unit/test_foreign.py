"""Shards that other programs made are indexed and read where they lie, also behind a URL."""

import gzip
import io
import json
import mmap
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest

from scaleprog.data.manifest import NAME, Manifest, split_of
from scaleprog.data.shard import ShardReader
from scaleprog.data.source import inflated
from scaleprog.errors import DataError
from scaleprog.shards.check import check, write_manifest
from tests.conftest import CLASSES, MakeRecipe, pattern, run, step_rows
from tests.unit.faulty_server import serve

NAMES = ("n01440764", "n01443537", "goldfish, Carassius auratus", "n01484850")


def pack(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def images(count: int, seed: int = 0) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [cv2.imencode(".jpg", pattern(i % CLASSES, rng))[1].tobytes() for i in range(count)]


def as_timm(folder: Path) -> None:
    """imagenet1k-train-0000.tar: key.cls, key.jpg, key.json; keys with a folder."""
    for split, count in (("train", 64), ("validation", 24)):
        for shard in range(2):
            files = []
            for i, image in enumerate(images(count // 2, shard)):
                key = f"n0{i % CLASSES}/{split}_{shard}_{i}"
                about = {"label": i % CLASSES, "filename": f"{key}.JPEG"}
                files += [(f"{key}.cls", b"%d" % (i % CLASSES)), (f"{key}.jpg", image)]
                files += [(f"{key}.json", json.dumps(about).encode())]
            pack(folder / f"imagenet1k-{split}-{shard:04d}.tar", files)


def as_img2dataset(folder: Path) -> None:
    """train/00000.tar: key.jpg, key.json, key.txt; the label, a class's name, is a column kept in key.json."""
    for split, count in (("train", 64), ("val", 24)):
        for shard in range(2):
            files = []
            for i, image in enumerate(images(count // 2, shard)):
                key, about = (
                    f"{shard:05d}{i:04d}",
                    {"caption": "a picture", "label": NAMES[i % CLASSES], "status": "success"},
                )
                files += [
                    (f"{key}.jpg", image),
                    (f"{key}.json", json.dumps(about).encode()),
                    (f"{key}.txt", b"a picture"),
                ]
            pack(folder / split / f"{shard:05d}.tar", files)


@pytest.mark.process
@pytest.mark.parametrize(("write", "classes"), [(as_timm, tuple("0123")), (as_img2dataset, tuple(sorted(NAMES)))])
def test_a_foreign_set_is_indexed_from_a_url_and_trained(
    write, classes: tuple[str, ...], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    write(tmp_path / "set")
    file = str(tmp_path / "manifest.json")
    with serve(tmp_path / "set") as server:
        server.drops = 0.1
        report = write_manifest(server.url, manifest=file, workers=1)
        assert report.samples == {"train": 64, "val": 24}
        manifest = Manifest.load(server.url, file)
        assert manifest.classes == classes
        local = write_manifest(tmp_path / "set", workers=1)
        assert (local, Manifest.load(tmp_path / "set").splits) == (report, manifest.splits)
        loaded = ShardReader(manifest, "train").load(0)
        names = classes if classes[0] == "0" else NAMES
        assert [classes[label] for label in loaded.labels] == [names[i % CLASSES] for i in range(32)]
        recipe = make_recipe(
            data={"path": server.url, "manifest": file}, growth={"schedule": "original"}, train={"epochs": 1}
        )
        run(recipe, tmp_path / "run")
    assert len(step_rows(tmp_path / "run")) == 8
    assert check(tmp_path / "set", workers=1) == report


@pytest.mark.parametrize(
    ("name", "split"),
    [("train-000.tar", "train"), ("imagenet1k-train-0000.tar", "train"), ("imagenet1k-validation-00.tar", "val"),
     ("val/00000.tar", "val"), ("Train_3.tar", "train"), ("cifar10-test-0.tar", "test"), ("00000.tar", None),
     ("trained-0.tar", None), ("valley.tar", None)],
)  # fmt: skip
def test_splits_by_name(name: str, split: str | None) -> None:
    assert split_of(name) == split


def packed(folder: Path, *shards: str, **files: bytes) -> Path:
    """Shards of one image with these sidecars."""
    for shard in shards:
        pack(folder / shard, [("a.jpg", images(1)[0]), *((f"a.{kind}", content) for kind, content in files.items())])
    return folder


LABELS: dict[str, tuple[dict[str, bytes], list[str] | None]] = {
    "a number as text": ({"cls": b" 2\n"}, None),
    "a number in JSON": ({"json": b'{"label": 2}'}, None),
    "digits in JSON": ({"json": b'{"cls": "2", "label": 1}'}, None),
    "the file comes before JSON": ({"cls": b"2", "json": b'{"label": 1}'}, None),
    "a name as text": ({"cls": b"crane\n"}, ["b", "a", "crane"]),
    "a name in JSON": ({"json": b'{"label": "crane"}'}, ["b", "a", "crane"]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels(kind: str, tmp_path: Path) -> None:
    files, classes = LABELS[kind]
    write_manifest(packed(tmp_path, "train-0.tar", **files), classes, workers=1)
    assert ShardReader(Manifest.load(tmp_path), "train").load(0).labels.tolist() == [2]


NO_LABELS: dict[str, tuple[dict[str, bytes], str]] = {
    "no field": ({"json": b'{"caption": "x"}'}, r"\(\.json\) is not in a field cls or label"),
    "no JSON": ({"json": b"{"}, r"\(\.json\) is not in a field"),
    "a list": ({"json": b"[1]"}, r"\(\.json\) is not in a field"),
    "deep JSON": ({"json": b"[" * 10**5}, r"\(\.json\) is not in a field"),
    "large JSON": ({"json": b'{"label": 1}' + b" " * 2**20}, r"\(\.json\) is not in a field"),
    "true": ({"json": b'{"label": true}'}, r"\(\.json\) is not in a field"),
    "a fraction": ({"json": b'{"label": 1.0}'}, r"\(\.json\) is not in a field"),
    "negative": ({"json": b'{"label": -1}'}, r"-1"),
    "no name": ({"cls": b"1.5"}, r"\(\.cls\) is b'1\.5'"),
    "a caption": ({"txt": b"a crane"}, r"no \.cls member"),
}


@pytest.mark.parametrize("kind", NO_LABELS)
def test_what_is_no_label(kind: str, tmp_path: Path) -> None:
    files, message = NO_LABELS[kind]
    with pytest.raises(DataError, match=rf"train-0\.tar: key 'a': .*{message}"):
        write_manifest(packed(tmp_path, "train-0.tar", **files), workers=1)


def test_names_and_numbers_together_need_the_names_of_the_classes(tmp_path: Path) -> None:
    packed(tmp_path, "train-0.tar", cls=b"crane")
    packed(tmp_path, "train-1.tar", cls=b"1")
    with pytest.raises(DataError, match=r"some labels are names \('crane', \.\.\.\) and others numbers.*--classes"):
        write_manifest(tmp_path, workers=1)
    write_manifest(tmp_path, ["other", "crane"], workers=1)
    reader = ShardReader(Manifest.load(tmp_path), "train")
    assert [reader.load(shard).labels.tolist() for shard in range(2)] == [[1], [1]]


def test_a_name_that_two_classes_have_is_no_label(tmp_path: Path) -> None:
    packed(tmp_path, "train-0.tar", cls=b"crane")
    with pytest.raises(DataError, match=r"label 'crane' is not one of the 2 class names that occur once"):
        write_manifest(tmp_path, ["crane", "crane"], workers=1)


def test_shards_of_other_splits_are_left_out_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed(tmp_path, "x-train-0.tar", "x-test-0.tar", "backup.tar", cls=b"0")
    write_manifest(tmp_path, workers=1)
    assert (
        "left out, because their names say neither train nor val: backup.tar, x-test-0.tar" in capsys.readouterr().out
    )
    assert [shard.name for shard in Manifest.load(tmp_path).split("train")] == ["x-train-0.tar"]
    (tmp_path / NAME).unlink()
    (tmp_path / "x-train-0.tar").unlink()
    write_manifest(tmp_path, workers=1)
    assert [shard.name for shard in Manifest.load(tmp_path).split("train")] == ["backup.tar"]


def test_gzipped_shards_hold_what_they_held_before(tmp_path: Path) -> None:
    as_timm(tmp_path / "plain")
    (tmp_path / "gzipped").mkdir()
    for number, path in enumerate(sorted((tmp_path / "plain").iterdir())):
        content, half = path.read_bytes(), path.stat().st_size // 2
        parts = gzip.compress(content[:half]) + gzip.compress(content[half:])  # a gzip file may have several members
        (tmp_path / "gzipped" / f"{path.stem}{'.tgz' if number else '.tar.gz'}").write_bytes(parts)
    found = []
    for name in ("plain", "gzipped"):
        write_manifest(tmp_path / name, workers=1)
        check(tmp_path / name, workers=1)
        manifest = Manifest.load(tmp_path / name)
        manifest.verify_counts("train")
        shards = [ShardReader(manifest, "train", on_disk=True).load(index) for index in range(2)]
        found.append([(shard.keys, shard.labels.tolist(), bytes(shard.image(5)[0])) for shard in shards])
    assert sorted(found[0]) == sorted(found[1])


@pytest.mark.parametrize("members", [1, 3, 2000])
def test_a_gzipped_shard_of_several_members_with_zeros_after_them(members: int, tmp_path: Path) -> None:
    pack(tmp_path / "train-0.tar", [("a.jpg", images(1)[0]), ("a.cls", b"0")])
    whole = (tmp_path / "train-0.tar").read_bytes()
    size = len(whole) // members + 1
    parts = [gzip.compress(whole[at : at + size]) for at in range(0, len(whole), size)]
    packed = mmap.mmap(-1, sum(map(len, parts)) + 70_000)
    packed.write(b"".join(parts))
    assert inflated("train-0.tar.gz", packed, "")[:] == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: gzip.compress(whole)[:-20], "its gzip stream is cut off"),
        (lambda whole: whole, "not gzip, although its name says so"),
        (lambda whole: gzip.compress(bytes(2**21)), "inflates to more than 1048576 bytes"),
    ],
)
def test_a_gzipped_shard_that_cannot_be_inflated(
    content: Callable[[bytes], bytes], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaleprog.data.source.MOST_BYTES", 2**20)
    pack(tmp_path / "train-0.tar", [("a.jpg", images(1)[0]), ("a.cls", b"0")])
    whole = (tmp_path / "train-0.tar").read_bytes()
    (tmp_path / "train-0.tar").unlink()
    (tmp_path / "train-0.tar.gz").write_bytes(content(whole))
    with pytest.raises(DataError, match=rf"train-0\.tar\.gz: {message}"):
        write_manifest(tmp_path, workers=1)
