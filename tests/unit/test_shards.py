"""Building, checking and indexing shards, of photographs that come with scikit-learn and scikit-image."""

import errno
import gzip
import io
import os
import re
import resource
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images
from typer.testing import CliRunner

from scaleprog.data.augment import Augmentation, BatchRequest
from scaleprog.data.manifest import NAME, Manifest, Shard
from scaleprog.data.shard import ShardReader
from scaleprog.errors import DataError, Unavailable
from scaleprog.recipe.keys import AugmentSettings
from scaleprog.shards import image_files, image_folder
from scaleprog.shards.build import STAGING, build, shard_files
from scaleprog.shards.check import check, write_manifest
from scaleprog.shards.cli import app
from scaleprog.shards.reduction import Reduction
from scaleprog.shards.samples import SourceSample, read_label, read_members
from tests.augmented import evaluation_images, train_images
from tests.damage import write_shards

pytestmark = pytest.mark.process


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photographs() -> list[bytes]:
    """Fourteen JPEGs: crops of four photographs."""
    china, flower = load_sample_images().images
    cat, astronaut = skimage.data.chelsea(), skimage.data.astronaut()
    crops = [
        photo[top : top + 64, left : left + 96]
        for photo in (china, flower, cat, astronaut)
        for top in (50, 200)
        for left in (40, 250)
    ]
    return [encoded(crop, "JPEG") for crop in crops[:14]]


@pytest.fixture
def tree(tmp_path: Path, photographs: list[bytes]) -> Path:
    """Two classes of seven photographs each, all named alike."""
    src = tmp_path / "photos"
    for index, photograph in enumerate(photographs):
        path = src / ("tower", "blossom")[index % 2] / f"n.{index // 2}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photograph)
    return src


@pytest.fixture
def built(tmp_path: Path, tree: Path) -> Path:
    """A sound folder of four train shards and one val shard."""
    out = tmp_path / "out"
    image_folder.build(tree, out, samples_per_shard=3, val_fraction=0.2, workers=1)
    return out


def contents(out: Path, split: str) -> list[tuple[str, dict[str, bytes]]]:
    manifest = Manifest.load(out)
    return list(chain(*(read_members(Path(manifest.path(shard))) for shard in manifest.split(split))))


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.iterdir()}


# A tree of class folders


def test_image_folder_keeps_every_image_and_its_bytes(built: Path, photographs: list[bytes]):
    manifest = Manifest.load(built)
    assert manifest.classes == ("blossom", "tower")
    assert [shard.samples for shard in manifest.split("train")] == [2, 3, 3, 3]
    assert manifest.samples("val") == 3
    samples = contents(built, "train") + contents(built, "val")
    stored = Counter((members["jpg"], manifest.classes[read_label(members)]) for _, members in samples)
    assert stored == Counter((photo, ("tower", "blossom")[index % 2]) for index, photo in enumerate(photographs))
    assert len({key for key, _ in contents(built, "train")}) == 11
    assert all("." not in key for key, _ in samples)


def test_image_folder_laid_out_like_imagenet(tmp_path: Path, tree: Path, photographs: list[bytes], capsys):
    root = tmp_path / "imagenet"
    (root / "val" / "blossom").mkdir(parents=True)
    tree.rename(root / "train")
    (root / "val" / "blossom" / "v.JPEG").write_bytes(photographs[0])
    (root / "train" / "tower" / "deep").mkdir()
    (root / "train" / "tower" / "deep" / "x.png").write_bytes(photographs[0])
    (root / "train" / "tower" / "readme.txt").touch()
    manifest = image_folder.build(root, tmp_path / "out", workers=1)
    assert (manifest.samples("train"), manifest.samples("val")) == (15, 1)
    [(key, members)] = contents(tmp_path / "out", "val")
    assert key.endswith("-v")
    assert read_label(members) == 0
    kinds = Counter(kind for _, members in contents(tmp_path / "out", "train") for kind in members)
    assert kinds == {"cls": 15, "jpg": 15}, "a JPEG named .JPEG or .png is stored as what it is, under one name"
    notes = capsys.readouterr().out
    assert "left out 1 files that are not images in class folders" in notes
    assert "readme.txt" in notes
    assert "no images of 1 classes: tower" in notes


def test_workers_do_not_change_the_shards(tmp_path: Path, tree: Path):
    smaller = Reduction(48)
    one = image_folder.build(tree, tmp_path / "one", samples_per_shard=8, reduction=smaller, workers=1)
    two = image_folder.build(tree, tmp_path / "two", samples_per_shard=8, reduction=smaller, workers=2)
    assert one.splits == two.splits


@given(st.integers(1, 200), st.integers(1, 50))
def test_cut_is_even_and_whole(count: int, samples_per_shard: int):
    images = [image_folder.Image(Path(str(place)), 0) for place in range(count)]
    parts = image_files.cut(images, samples_per_shard)
    assert list(chain(*(part.images for part in parts))) == images
    assert all(part.images[0] == images[part.first] for part in parts)
    sizes = [len(part.images) for part in parts]
    assert max(sizes) <= samples_per_shard
    assert max(sizes) - min(sizes) <= 1


def test_image_folder_refuses(tmp_path: Path, tree: Path, photographs: list[bytes]):
    def refused(src: Path, message: str) -> None:
        with pytest.raises(DataError, match=message):
            image_folder.build(src, tmp_path / "out", workers=1)

    refused(tmp_path / "gone", r"gone: cannot be read.*No such file")
    (tmp_path / "loose").mkdir()
    refused(tmp_path / "loose", "no class folders")
    (tmp_path / "loose" / "a.jpg").write_bytes(photographs[0])
    refused(tmp_path / "loose", "no class folders.* loose image")
    (tmp_path / "loose" / "only").mkdir()
    (tmp_path / "loose" / "a.jpg").rename(tmp_path / "loose" / "only" / "a.jpg")
    refused(tmp_path / "loose", "1 images are too few")
    (tree / "hollow").mkdir()
    refused(tree, r"class folders without an image \(\.jpg.*hollow")
    (tree / "hollow").rmdir()
    (tmp_path / "both" / "val" / "weed").mkdir(parents=True)
    (tmp_path / "both" / "val" / "weed" / "w.jpg").write_bytes(photographs[0])
    refused(tmp_path / "both", "has val/ but no train/.*If val is a class, put all class folders into a folder train/")
    tree.rename(tmp_path / "both" / "train")
    refused(tmp_path / "both", "classes that are not in .*both/train: weed")
    with pytest.raises(DataError, match="lies inside"):
        image_folder.build(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_file_that_is_no_image_is_named(tmp_path: Path, tree: Path):
    (tree / "tower" / "page.jpg").write_bytes(b"<html>not found")
    (tree / "blossom" / "empty.png").touch()
    with pytest.raises(DataError) as caught:
        image_folder.build(tree, tmp_path / "out", samples_per_shard=8, workers=1)
    assert "page.jpg: not a JPEG" in str(caught.value)
    assert "empty.png: not a JPEG" in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


# Which files of a tree count


@pytest.mark.parametrize("train", ["train", "training"])
@pytest.mark.parametrize("val", ["val", "validation", "valid", "test"])
def test_folders_of_the_splits_have_the_names_that_people_give_them(
    train: str, val: str, tmp_path: Path, tree: Path, photographs: list[bytes]
):
    src = tmp_path / "src"
    (src / val / "tower").mkdir(parents=True)
    (src / val / "tower" / "v.jpg").write_bytes(photographs[0])
    tree.rename(src / train)
    manifest = image_folder.build(src, tmp_path / "out", workers=1)
    assert manifest.classes == ("blossom", "tower")
    assert (manifest.samples("train"), manifest.samples("val")) == (14, 1)


def test_classes_beside_a_folder_that_is_named_like_a_split_are_told(
    tmp_path: Path, tree: Path, photographs: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    src = tmp_path / "src"
    for name in ("bus", "notes"):
        (src / name).mkdir(parents=True)
    (src / "bus" / "b.jpg").write_bytes(photographs[0])
    (src / "notes" / "n.txt").write_text("no image")
    tree.rename(src / "train")
    image_folder.build(src, tmp_path / "out", workers=1)
    assert "has images beside train/, which are left out: bus. If train is a class, " in capsys.readouterr().out


@pytest.mark.parametrize("names", [("train", "training"), ("train", "val", "test")])
def test_two_folders_for_one_split_are_refused(names: tuple[str, ...], tmp_path: Path, tree: Path):
    for name in names:
        shutil.copytree(tree, tmp_path / "src" / name)
    with pytest.raises(DataError, match=rf"src: has {names[-2]}/, {names[-1]}/, which could all be the same split"):
        image_folder.build(tmp_path / "src", tmp_path / "out", workers=1)


def test_what_is_hidden_or_left_behind_is_no_image_and_no_class(tmp_path: Path, tree: Path, photographs: list[bytes]):
    sound = image_folder.build(tree, tmp_path / "sound", workers=1)
    for stray in (
        ".cache/a.jpg", "__MACOSX/a.jpg", "@eaDir/a.jpg", "tower/.thumbnails/a.jpg", "tower/@eaDir/n.0.JPEG/a.jpg",
        "tower/._n.0.JPEG", "blossom/deep/.hidden/a.jpg",
    ):  # fmt: skip
        (tree / stray).parent.mkdir(parents=True, exist_ok=True)
        (tree / stray).write_bytes(photographs[0])
    assert image_folder.build(tree, tmp_path / "out", workers=1).splits == sound.splits


def test_a_link_to_a_folder_within_changes_no_shard(tmp_path: Path, tree: Path):
    (tree / "tower" / "b" / "c").mkdir(parents=True)
    (tree / "tower" / "n.0.JPEG").rename(tree / "tower" / "b" / "c" / "n.0.JPEG")
    plain = image_folder.build(tree, tmp_path / "plain", workers=1)
    (tree / "tower" / "zz").symlink_to(tree / "tower" / "b" / "c")
    assert image_folder.build(tree, tmp_path / "linked", workers=1).splits == plain.splits


def test_every_file_counts_once_whatever_leads_to_it(tmp_path: Path, tree: Path):
    (tree / "tower" / "same.JPEG").symlink_to(tree / "tower" / "n.0.JPEG")
    (tree / "tower" / "zz").symlink_to(tree / "tower")
    (tree / "blossom" / "elsewhere").mkdir()
    (tree / "blossom" / "elsewhere" / "back").symlink_to(tree / "blossom")
    for here, there in ("ab", "ba"):  # as many ways through as links may lead on, if a folder were entered twice
        (tree / "tower" / here).mkdir()
        for name in "12":
            (tree / "tower" / here / name).symlink_to(tree / "tower" / there)
    manifest = image_folder.build(tree, tmp_path / "out", workers=1)
    assert manifest.samples("train") + manifest.samples("val") == 14


def test_hard_links_lead_to_one_file_too(tmp_path: Path, tree: Path):
    (tree / "tower" / "same.JPEG").hardlink_to(tree / "tower" / "n.0.JPEG")
    manifest = image_folder.build(tree, tmp_path / "out", workers=1)
    assert manifest.samples("train") + manifest.samples("val") == 14
    (tree / "blossom" / "other.JPEG").hardlink_to(tree / "tower" / "n.0.JPEG")
    with pytest.raises(DataError, match=r"the same file as .*, so it is in two classes"):
        image_folder.build(tree, tmp_path / "again", workers=1)
    (tree / "blossom" / "other.JPEG").unlink()
    (tmp_path / "src" / "val" / "tower").mkdir(parents=True)
    tree.rename(tmp_path / "src" / "train")
    (tmp_path / "src/val/tower/v.JPEG").hardlink_to(tmp_path / "src/train/tower/n.1.JPEG")
    with pytest.raises(DataError, match=r"training images, too: .*val/tower/v\.JPEG is .*train/tower/n\.1\.JPEG"):
        image_folder.build(tmp_path / "src", tmp_path / "out2", workers=1)


def test_a_class_folder_whose_name_is_no_text_is_refused_first(tmp_path: Path, tree: Path):
    (tree / "tower").rename(tree / os.fsdecode(b"caf\xe9"))
    with pytest.raises(DataError, match=r"class folders whose names are not UTF-8: 'caf\\udce9'. Rename them"):
        image_folder.build(tree, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_shards_larger_than_one_may_be_are_refused_first(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = [path.stat().st_size for path in tree.glob("*/*")]
    monkeypatch.setattr(image_files, "SHARD_BYTES", 6 * max(sizes))
    with pytest.raises(DataError, match=r"a shard of \d+ images, from .*JPEG on, .* --samples-per-shard \d+, or less"):
        image_folder.build(tree, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    assert image_folder.build(tree, tmp_path / "out", samples_per_shard=2, workers=1)


def test_a_shard_that_becomes_too_large_is_no_shard(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("scaleprog.shards.samples.MOST_BYTES", 20_000)
    with pytest.raises(DataError, match=r"more than 20000 bytes after .* the limit of a shard; build with fewer"):
        image_folder.build(tree, tmp_path / "out", reduction=Reduction(48), workers=1)


def test_a_file_is_in_one_class_and_in_one_split(tmp_path: Path, tree: Path):
    (tree / "tower" / "other.JPEG").symlink_to(tree / "blossom" / "n.0.JPEG")
    with pytest.raises(
        DataError, match=r"tower/other\.JPEG: the same file as .*blossom/n\.0\.JPEG, so it is in two cl"
    ):
        image_folder.build(tree, tmp_path / "out", workers=1)
    (tree / "tower" / "other.JPEG").unlink()
    (tmp_path / "src").mkdir()
    tree.rename(tmp_path / "src" / "train")
    (tmp_path / "src" / "val").symlink_to(tmp_path / "src" / "train")
    with pytest.raises(
        DataError, match=r"validation images that are training images, too: .*val/blossom/n\.\d\.JPEG is "
    ):
        image_folder.build(tmp_path / "src", tmp_path / "out", workers=1)


@pytest.mark.parametrize(
    ("code", "error", "advice"),
    [(errno.EACCES, DataError, "make it readable, or remove it"), (errno.EIO, Unavailable, "run the command again")],
)
def test_a_folder_that_cannot_be_listed_is_not_left_out(
    code: int, error: type[Exception], advice: str, tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
):
    (tree / "tower" / "more").mkdir()
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("more"):
            raise OSError(code, os.strerror(code), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(error, match=rf"tower/more: cannot be listed: .*; {advice}"):
        image_folder.build(tree, tmp_path / "out", workers=1)


# Builder, check and training agree


LARGEST = 2**15  # pixels, instead of the real limit


@pytest.fixture(scope="module")
def images(photographs: list[bytes]) -> dict[str, bytes]:
    """Images of all kinds, some of them damaged."""
    photo, large = Image.open(io.BytesIO(photographs[0])), np.zeros((LARGEST // 128 + 1, 128, 3), np.uint8)
    png, webp, cmyk = (
        encoded(np.asarray(photo), "PNG"), encoded(np.asarray(photo), "WEBP"), as_cmyk(np.asarray(photo)),
    )  # fmt: skip
    return {
        "sound": photographs[0],
        "half": photographs[0][: len(photographs[0]) // 2],
        "without its last two bytes": photographs[0][:-2],
        "empty": b"",
        "PNG": png,
        "half of a PNG": png[: len(png) // 2],
        "PNG without its end": png[:-12],
        "large PNG": encoded(large, "PNG"),
        "WebP": webp,
        "WebP without its last two bytes": webp[:-2],
        "CMYK": cmyk,
        "CMYK without its last two bytes": cmyk[:-2],
        "large CMYK": as_cmyk(large),
    }


def as_cmyk(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(buffer, "JPEG")
    return buffer.getvalue()


def trains_on(image: bytes, channels: int) -> bool:
    """Whether training decodes an image, whole or a crop of it."""
    try:
        for crop in ("none", "resized"):
            augmentation = Augmentation(AugmentSettings(crop=crop), channels)
            train_images(augmentation, [(memoryview(image), "here")], BatchRequest(0, 0, 32), 0)
        evaluation_images(augmentation, [(memoryview(image), "here")], 224)
    except DataError:
        return False
    return True


KINDS = {
    "sound": True, "half": False, "without its last two bytes": None, "empty": False, "PNG": True,
    "half of a PNG": False, "PNG without its end": None, "large PNG": False, "WebP": True,
    "WebP without its last two bytes": None, "CMYK": True, "CMYK without its last two bytes": None, "large CMYK": False,
}  # fmt: skip
"""Whether training must accept them; None: it may do as it likes, but builder and check must do the same."""


@pytest.mark.parametrize("kind", KINDS)
def test_builder_and_check_refuse_what_training_refuses_and_nothing_else(
    kind: str, images: dict[str, bytes], tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("scaleprog.data.decode.MOST_PIXELS", LARGEST)
    image = images[kind]
    trained = trains_on(image, 3)
    assert trains_on(image, 1) == trained
    assert KINDS[kind] in (None, trained)
    (tree / "tower" / "n.0.JPEG").write_bytes(image)
    shards = tmp_path / "shards"
    shards.mkdir()
    with webdataset.TarWriter(str(shards / "train-0.tar"), encoder=False) as writer:
        writer.write({"__key__": "first", "jpg": images["sound"], "cls": b"0"})
        writer.write({"__key__": "doubtful", "jpg": image, "cls": b"0"})
    indexed = Shard.measure(shards / "train-0.tar", 2)
    if trained:
        built = image_folder.build(tree, tmp_path / "out", workers=1)
        assert built.samples("train") == 13
        assert built.sound
        assert Manifest.load(tmp_path / "out").sound
        assert write_manifest(shards, workers=1) == check(shards, workers=1)
        return
    with pytest.raises(DataError, match=rf"^{tree}/tower/n\.0\.JPEG: (?!.*n\.1\.JPEG)"):
        image_folder.build(tree, tmp_path / "out", workers=1)
    for manifest in (None, Manifest(str(shards), ("0",), {"train": (indexed,)})):
        if manifest:
            manifest.save()
        with pytest.raises(DataError, match=r"1 problems.*\n.*train-0\.tar: key 'doubtful': cannot decode the image"):
            check(shards, workers=1) if manifest else write_manifest(shards, workers=1)


def test_damaged_training_images_are_indexed_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_shards(tmp_path, (8, 4), (3, 9))
    written = Manifest.load(tmp_path)
    (tmp_path / NAME).unlink()
    with pytest.raises(DataError, match=rf"2 problems, no {NAME} written\n.*s00003.*see data\.damaged\n.*s00009"):
        write_manifest(tmp_path, manifest.classes, workers=1)
    write_manifest(tmp_path, manifest.classes, keep_damaged=True, workers=1)
    assert Manifest.load(tmp_path) == written
    assert not Manifest.load(tmp_path).sound
    assert re.search(r"data\.damaged=replace: 2 damaged images\n.*s00003.*\n.*s00009", capsys.readouterr().out)
    os.rename(tmp_path / "train-000001.tar", tmp_path / "val-000001.tar")
    with pytest.raises(DataError, match=r"1 problems, .*\n.*val-000001\.tar: key 's00009'"):
        write_manifest(tmp_path, manifest.classes, keep_damaged=True, workers=1)


# Once, and whole or not at all


def test_second_call_does_nothing(built: Path, tree: Path, capsys):
    before = times(built)
    image_folder.build(tree, built, samples_per_shard=3, val_fraction=0.2, workers=1)
    assert times(built) == before
    assert "already built, nothing to do" in capsys.readouterr().out


def test_damaged_shard_is_built_again(built: Path, tree: Path, capsys):
    shard = built / "train-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    image_folder.build(tree, built, samples_per_shard=3, val_fraction=0.2, workers=1)
    assert shard.read_bytes() == whole
    assert "train-000001.tar is missing or damaged; rebuilding all shards" in capsys.readouterr().out


def test_shards_that_are_not_of_a_damaged_build_stay(built: Path, tree: Path):
    shard = built / "train-000001.tar"
    shutil.copy(shard, built / "train-mine.tar")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train-000001\.tar is missing or damaged, but .* remove train-mine\.tar"):
        image_folder.build(tree, built, samples_per_shard=3, val_fraction=0.2, workers=1)
    assert (built / "train-mine.tar").exists()


def test_a_part_of_an_interrupted_build_is_not_indexed(built: Path):
    (built / NAME).unlink()
    (built / STAGING).mkdir()
    with pytest.raises(DataError, match=rf"an interrupted build has left .* in {re.escape(STAGING)}; run its command"):
        write_manifest(built, workers=1)
    assert not (built / NAME).exists()


@pytest.mark.parametrize("kind", ["link", "FIFO"])
def test_what_lies_in_place_of_the_lock_is_neither_emptied_nor_waited_for(kind: str, tree: Path, tmp_path: Path):
    out, other = tmp_path / "out", tmp_path / "other"
    out.mkdir()
    other.write_text("precious")
    if kind == "link":
        (out / ".building.lock").symlink_to(other)
    else:
        os.mkfifo(out / ".building.lock")
    with pytest.raises(DataError, match="cannot write shards"):
        image_folder.build(tree, out, workers=1)
    assert other.read_text() == "precious"


def test_another_build_is_not_overwritten(built: Path, tree: Path):
    before = times(built)
    with pytest.raises(DataError, match=r"another build .*samples_per_shard: built with 3, requested 4"):
        image_folder.build(tree, built, samples_per_shard=4, val_fraction=0.2, workers=1)
    (tree / "tower" / "n.0.JPEG").rename(tree / "tower" / "new.JPEG")
    with pytest.raises(DataError, match=r"another build .*files"):
        image_folder.build(tree, built, samples_per_shard=3, val_fraction=0.2, workers=1)
    assert times(built) == before


def test_shards_of_others_are_not_overwritten(built: Path, tree: Path):
    (built / NAME).unlink()
    before = times(built)
    with pytest.raises(DataError, match=r"train-000000\.tar, .*no manifest\.json.*--write-manifest"):
        image_folder.build(tree, built, workers=1)
    assert times(built) == before


@pytest.mark.parametrize("published", [0, 2])
def test_interrupted_build_starts_cleanly(built: Path, tree: Path, published: int):
    """Killed while shards were written, or after some of them had got their final names."""
    whole = {path.name: path.read_bytes() for path in built.iterdir()}
    (built / NAME).unlink()
    (built / STAGING).mkdir()
    for path in shard_files(built)[published:]:
        path.rename(built / STAGING / path.name)
    (built / STAGING / "train-000003.tar").write_bytes(b"half")
    if published:
        (built / "train-000007.tar").write_bytes(b"of an interrupted build into more shards")
    image_folder.build(tree, built, samples_per_shard=3, val_fraction=0.2, workers=1)
    assert {path.name: path.read_bytes() for path in built.iterdir()} == whole


def test_a_full_disk_is_named_and_the_same_command_resumes(tmp_path: Path, tree: Path):
    """A limit on the size of files stands in for the full disk: writing fails in the middle of a shard."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "out"
    resource.setrlimit(resource.RLIMIT_FSIZE, (10240, hard))
    try:
        with pytest.raises(
            DataError, match=r"out: cannot write shards: .*run the same command again; it keeps finished"
        ):
            image_folder.build(tree, out, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert shard_files(out) == []
    image_folder.build(tree, out, workers=1)
    check(out, workers=1)


def test_a_disk_that_is_full_only_for_the_manifest_keeps_all_shards(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("scaleprog.data.manifest.write_whole", full)
        with pytest.raises(DataError, match=r"out: cannot write manifest\.json: .*No space left"):
            image_folder.build(tree, out, workers=1)
    assert shard_files(out) == []
    before = times(out / STAGING)
    image_folder.build(tree, out, workers=1)
    after = times(out)
    assert {path.name: after[path.name] for path in shard_files(out)}.items() <= before.items()


# Checking


def problems(out: Path) -> str:
    with pytest.raises(DataError) as caught:
        check(out, workers=1)
    return str(caught.value)


def test_check_finds_nothing_wrong(built: Path):
    report = check(built, workers=1)
    assert (report.shards, report.samples, report.classes) == (5, {"train": 11, "val": 3}, 2)
    assert report.bytes == sum(path.stat().st_size for path in shard_files(built))


def test_check_lists_all_problems(built: Path):
    truncated, flipped, missing = (built / f"train-00000{index}.tar" for index in range(3))
    os.truncate(truncated, truncated.stat().st_size // 2)
    content = bytearray(flipped.read_bytes())
    content[1600] ^= 1
    flipped.write_bytes(content)
    missing.unlink()
    (built / "train-000009.tar").touch()
    found, size = problems(built), truncated.stat().st_size
    assert "train-000000.tar: cannot read this tar after key '00000000-n_" in found
    assert f"{truncated}: has {size} bytes, but manifest.json says {2 * size}" in found
    assert f"{flipped}: damaged: its checksum differs" in found
    assert f"{missing}: {NAME} lists this shard, but it is missing" in found
    assert "train-000009.tar: not in manifest.json" in found
    assert "train-000003.tar" not in found


def test_an_empty_file_is_no_shard(built: Path) -> None:
    os.truncate(built / "train-000000.tar", 0)
    assert "train-000000.tar: the file is empty" in problems(built)
    with pytest.raises(DataError, match=r"train-000000\.tar: truncated: 0 of"):
        ShardReader(Manifest.load(built), "train").load(0)


def test_check_finds_a_label_out_of_range(built: Path):
    manifest = Manifest.load(built)
    Manifest(manifest.root, manifest.classes[:1], manifest.splits).save()
    found = problems(built)
    for shard in manifest.split("train"):
        for key, members in read_members(Path(manifest.path(shard))):
            complaint = f"{shard.name}: key {key!r}: label 1 is out of range; with 1 classes"
            assert (complaint in found) == (read_label(members) == 1)
    assert found.count("out of range") == 7


def test_check_finds_a_wrong_count(built: Path):
    manifest = Manifest.load(built)
    first, *others = manifest.split("train")
    Manifest(manifest.root, manifest.classes, {"train": (replace(first, samples=9), *others)}).save()
    assert "train-000000.tar: has 2 samples, but manifest.json says 9" in problems(built)


def test_check_without_manifest(built: Path):
    (built / NAME).unlink()
    assert "no manifest.json" in problems(built)


@given(st.binary(max_size=6))
def test_only_decimal_labels_are_read(text: bytes):
    try:
        label = read_label({"cls": text})
    except ValueError:
        assert not text.strip().isdigit()
    else:
        assert label == int(text)
        assert label >= 0


# WebDataset reads ours, we read WebDataset's


def test_plain_webdataset_reads_our_shards(built: Path):
    manifest = Manifest.load(built)
    pipeline = webdataset.WebDataset([manifest.path(shard) for shard in manifest.split("train")], shardshuffle=False)
    samples = list(pipeline.decode("rgb8").to_tuple("jpg", "cls"))
    assert len(samples) == 11
    assert {image.shape for image, _ in samples} == {(64, 96, 3)}
    assert [label for _, label in samples] == [read_label(members) for _, members in contents(built, "train")]


@pytest.fixture
def foreign(tmp_path: Path, photographs: list[bytes]) -> Path:
    """What plain webdataset.ShardWriter writes: two train shards, one val shard, labels 0 to 4."""
    for split in ("train", "val"):
        with webdataset.ShardWriter(str(tmp_path / f"{split}-%d.tar"), maxcount=8, verbose=0) as writer:
            for index, photograph in enumerate(photographs[:: 1 if split == "train" else 3]):
                writer.write({"__key__": f"{split}{index}", "jpg": photograph, "cls": index % 5})
    return tmp_path


def test_write_manifest_makes_foreign_shards_usable(foreign: Path):
    report = write_manifest(foreign, workers=1)
    assert report.samples == {"train": 14, "val": 5}
    manifest = Manifest.load(foreign)
    assert manifest.classes == ("0", "1", "2", "3", "4")
    assert [shard.samples for shard in manifest.split("train")] == [8, 6]
    assert check(foreign, workers=1) == report
    write_manifest(foreign, list("abcde"), workers=1)
    write_manifest(foreign, workers=1)
    assert Manifest.load(foreign).classes == tuple("abcde"), "names once given stay"


def pack(path: Path, names: list[str]) -> None:
    """A tar of black images and labels, in this order."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "jpeg")
    with tarfile.open(path, "w") as archive:
        for name in names:
            content = b"0" if name.endswith("cls") else image.getvalue()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


MISPLACED = {
    "dots": (
        ["a.b.jpg", "a.b.cls", "c.d.jpg", "c.d.cls"],
        "has the key 'a' and the extension 'b.jpg'; rename the files",
    ),
    "numbers": (["v.1.jpg", "v.1.cls", "v.2.jpg", "v.2.cls"], "has the key 'v' and the extension '1.jpg'; rename the"),
    "a dotted label": (["a.jpg", "a.x.cls"], "a.x.cls has the key 'a' and the extension 'x.cls'; rename the files"),
    "by extension": (
        ["x/a.jpg", "x/b.jpg", "x/a.cls", "x/b.cls"],
        "not one after the other; pack them in the order of",
    ),
    "labels first": (["a.cls", "b.cls", "a.jpg", "b.jpg"], "not one after the other; .*`tar --sort=name`"),
}


@pytest.mark.parametrize("kind", MISPLACED)
def test_samples_that_webdataset_finds_elsewhere_are_explained_once(kind: str, tmp_path: Path) -> None:
    names, why = MISPLACED[kind]
    pack(tmp_path / "train-0.tar", names)
    with pytest.raises(DataError, match=why) as caught:
        write_manifest(tmp_path, workers=1)
    assert "1 problems" in str(caught.value)
    assert "train-0.tar: key " in str(caught.value)
    samples = len({name.partition(".")[0] for name in names})
    shard = Shard.measure(tmp_path / "train-0.tar", samples)
    with pytest.raises(DataError, match=f"train-0.tar: sample .*{why}"):
        ShardReader(Manifest(str(tmp_path), ("0",), {"train": (shard,)}), "train").load(0)


@pytest.mark.parametrize("name", ["train-000000.tar.bz2", "val-0.tar.xz", "train-0.tar.zst"])
def test_compressed_shards_are_named_where_there_are_no_others(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=f"no shards named .*{name} is compressed: unpack it to a plain tar"):
        write_manifest(tmp_path, workers=1)


@pytest.mark.parametrize("ending", ["tar.gz", "tgz"])
def test_a_shard_beside_its_compressed_self_is_not_indexed_twice(ending: str, foreign: Path) -> None:
    (foreign / f"train-0.{ending}").write_bytes(gzip.compress((foreign / "train-0.tar").read_bytes()))
    with pytest.raises(DataError, match=rf"train-0\.tar and train-0\.{ending} look like one shard"):
        write_manifest(foreign, workers=1)


def test_write_manifest_refuses_unsound_shards(foreign: Path, photographs: list[bytes]):
    def refused(classes=None) -> str:
        with pytest.raises(DataError) as caught:
            write_manifest(foreign, classes, workers=1)
        assert not (foreign / NAME).exists()
        return str(caught.value)

    assert "train-0.tar: key 'train4': label 4 is out of range" in refused(list("abcd"))
    with webdataset.TarWriter(str(foreign / "train-9.tar")) as writer:
        writer.write({"__key__": "negative", "jpg": photographs[0], "cls": -1})
        writer.write({"__key__": "unlabelled", "jpg": photographs[0]})
        writer.write({"__key__": "imageless", "cls": 1})
        writer.write({"__key__": "twice", "jpg": photographs[0], "cls": 1})
        writer.write({"__key__": "between", "jpg": photographs[1], "cls": 1})
        writer.write({"__key__": "twice", "jpg": photographs[0], "cls": 1})
    found = refused()
    assert "4 problems" in found
    assert "train-9.tar: key 'negative': .cls is b'-1'" in found
    assert "train-9.tar: key 'unlabelled': no .cls member" in found
    assert "train-9.tar: key 'imageless': 0 images" in found
    assert "train-9.tar: key 'twice': the key occurs twice" in found


@pytest.mark.parametrize("damage", ["cut between members", "header"])
def test_write_manifest_notices_what_tarfile_overlooks(built: Path, damage: str):
    """A tar that ends at a member's edge, or has a damaged header, looks complete to Python's tarfile."""
    path = built / "train-000001.tar"
    first, _, last = (key for key, _ in read_members(path))
    content = bytearray(path.read_bytes())
    header = content.index(f"{last}.cls".encode())
    if damage == "header":
        content[header] ^= 1
    else:
        del content[header:]
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"train-000001\.tar: cannot read this tar after key '{first}': no end marker"):
        write_manifest(built, workers=1)


@pytest.mark.parametrize(
    ("labels", "classes", "note"),
    [
        ((1, 2, 3), None, "note: no training image has label 0; if the labels count from 1, subtract 1 from each"),
        ((0, 1, 3), None, "note: no training image has label 2\n"),
        ((0, 1), "abc", "note: no training image has label 2 (c)\n"),
        ((0, 1, 2), "aba", ""),
    ],
)
def test_labels_that_no_training_image_has_are_told(
    labels: tuple[int, ...], classes: str | None, note: str, tmp_path: Path, photographs: list[bytes], capsys
):
    for split, shown in (("train", labels), ("val", range(4 if classes is None else len(classes)))):
        with webdataset.TarWriter(str(tmp_path / f"{split}-0.tar")) as writer:
            for label in shown:
                writer.write({"__key__": f"{split}{label}", "jpg": photographs[0], "cls": label})
    write_manifest(tmp_path, classes and list(classes), workers=1)
    told = capsys.readouterr().out
    assert note in told
    assert told.count("note: ") == bool(note)


def test_write_manifest_without_shards(tmp_path: Path):
    with pytest.raises(DataError, match="no shards named"):
        write_manifest(tmp_path)


# The command line


def test_command_line(tmp_path: Path, tree: Path):
    def run(*words: object) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    out = tmp_path / "out"
    assert "built 13 train samples" in run("image-folder", tree, out, "--workers", 1)
    assert "13 train, 1 val samples, 2 classes: all intact" in run("check", out, "--workers", 1)
    names = tmp_path / "names.txt"
    names.write_text("flower\nchurch\n")
    run("check", out, "--write-manifest", "--classes", names, "--workers", 1)
    assert Manifest.load(out).classes == ("flower", "church")
    with pytest.raises(DataError, match="works only with"):
        run("check", out, "--classes", names)


def test_two_builds_of_one_folder_leave_each_other_alone(tmp_path: Path) -> None:
    """As two jobs do that both begin with building the shards."""
    begun, may_end = threading.Event(), threading.Event()

    def slow() -> Iterator[SourceSample]:
        yield SourceSample("a", "png", encoded(np.zeros((4, 4, 3), np.uint8), "PNG"), 0)
        begun.set()
        may_end.wait(60)

    def samples() -> list[SourceSample]:
        return [SourceSample(key, "png", encoded(np.zeros((4, 4, 3), np.uint8), "PNG"), 0) for key in "ab"]

    common = {"classes": ("x",), "source": {"builder": "test"}, "workers": 1}
    splits = {"train": [slow(), samples()], "val": [samples()]}
    first = threading.Thread(target=build, args=(tmp_path / "out",), kwargs={**common, "splits": splits})
    first.start()
    begun.wait(60)
    with pytest.raises(DataError, match="out: another process is building shards there"):
        build(tmp_path / "out", **common, splits={"train": [samples()], "val": [samples()]})
    may_end.set()
    first.join()
    check(tmp_path / "out", workers=1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        NAME, "train-000000.tar", "train-000001.tar", "val-000000.tar"
    }  # fmt: skip
