"""Shards of ImageNet, from small tars of the official form."""

import errno
import io
import multiprocessing
import os
import pkgutil
import shutil
import signal
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from typer.testing import CliRunner

from scaleprog.data.manifest import Manifest
from scaleprog.errors import DataError, Unavailable, WorkerDied
from scaleprog.shards import build as shards_build
from scaleprog.shards import cli
from scaleprog.shards.build import STAGING, shard_files
from scaleprog.shards.check import check
from scaleprog.shards.imagenet import build
from scaleprog.shards.imagenet_labels import DEVKIT
from scaleprog.shards.imagenet_tars import TRAIN, VAL
from scaleprog.shards.samples import read_label, read_members
from tests.unit.imagenet_files import (
    SmallImageNet,
    class_tars,
    extract,
    packed,
    wnid_of,
    write_imagenet,
    write_train,
)

pytestmark = pytest.mark.process


@pytest.fixture
def files(tmp_path: Path) -> SmallImageNet:
    return write_imagenet(tmp_path / "src")


def build_in(folder: Path, name: str, **options: object) -> Manifest:
    """The shards of folder/src in folder/name: 3 for training, 1 for validation."""
    return build(folder / "src", folder / name, **{"samples_per_shard": 6, "workers": 1} | options)  # type: ignore[arg-type]


def stored(out: Path, split: str) -> list[tuple[str, bytes, int]]:
    """The samples as (name of the file, image, label), in the order of the shards."""
    manifest = Manifest.load(out)
    samples = [sample for shard in manifest.split(split) for sample in read_members(Path(manifest.path(shard)))]
    images = [(key, next(files[kind] for kind in files if kind != "cls"), files) for key, files in samples]
    return [(f"{key.partition('-')[2]}.JPEG", image, read_label(files)) for key, image, files in images]


# What the shards hold


def test_every_image_is_stored_once_with_its_bytes_and_its_class(
    files: SmallImageNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = build_in(tmp_path, "out")
    assert list(manifest.classes) == files.wnids
    train, val = stored(tmp_path / "out", "train"), stored(tmp_path / "out", "val")
    assert Counter((name, image) for name, image, _ in train) == Counter(files.train.items())
    assert Counter((name, image) for name, image, _ in val) == Counter(files.val.items())
    assert all(manifest.classes[label] == wnid_of(name) for name, _, label in train)
    assert all(manifest.classes[label] == files.val_wnids[name] for name, _, label in val)
    kinds = Counter(kind for path in shard_files(tmp_path / "out") for _, found in read_members(path) for kind in found)
    assert kinds == {"jpg": 23, "png": 1, "cls": 24}, "a PNG is stored as .png, though its name is .JPEG"
    assert check(tmp_path / "out", workers=1).samples == {"train": 18, "val": 6}
    assert "holds 3 of the 1000 classes of ImageNet" in capsys.readouterr().out


@pytest.mark.parametrize("val_in_classes", [True, False])
def test_tars_and_folders_give_the_same_shards(val_in_classes: bool, files: SmallImageNet, tmp_path: Path) -> None:
    tars = build_in(tmp_path, "tars")
    extract(files, files.folder, val_in_classes=val_in_classes)
    (files.folder / TRAIN).unlink()
    (files.folder / VAL).unlink()
    assert build_in(tmp_path, "folders").splits == tars.splits


def test_a_tar_takes_precedence_over_what_was_extracted_from_it(
    files: SmallImageNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files.folder / "train").mkdir()
    build_in(tmp_path, "out")
    assert f"src has {TRAIN}, so train/ is left out" in capsys.readouterr().out


def test_the_seed_shuffles_all_classes_into_every_shard(files: SmallImageNet, tmp_path: Path) -> None:
    first, again, other = (build_in(tmp_path, name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first.splits == again.splits
    orders = [[name for name, *_ in stored(tmp_path / name, "train")] for name in "ac"]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    for order in orders:
        assert [len({wnid_of(name) for name in order[i : i + 6]}) for i in (0, 6, 12)] == [3, 3, 3]
    assert first.source["files"] != other.source["files"]


def test_workers_do_not_change_the_shards(files: SmallImageNet, tmp_path: Path) -> None:
    assert build_in(tmp_path, "one").splits == build_in(tmp_path, "two", workers=2).splits


# Resuming


def kill(owner: object, function: str, calls: int, folder: Path) -> None:
    """Builds in a process that dies in the call of `owner.function` after so many calls."""
    original, seen = getattr(owner, function), []

    def call(subject: object, *rest: object) -> object:
        if len(seen) == calls:
            if isinstance(subject, Path):
                subject.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(subject)
        return original(subject, *rest)

    def work() -> None:
        setattr(owner, function, call)
        build_in(folder, "out")

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def times(out: Path) -> dict[str, int]:
    """When each shard was written."""
    return {path.name: path.stat().st_mtime_ns for path in shard_files(out)}


def test_a_killed_build_resumes_without_writing_finished_shards_again(
    files: SmallImageNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kill(shards_build, "write_shard", 2, tmp_path)
    out, staging = tmp_path / "out", tmp_path / "out" / STAGING
    assert (staging / "train-000002.tar").read_bytes() == b"half"
    before = times(staging)
    build_in(tmp_path, "out")
    assert "resuming an interrupted build, of which 2 shards are finished" in capsys.readouterr().out
    after = times(out)
    assert [name for name in before if after[name] == before[name]] == ["train-000000.tar", "train-000001.tar"]
    build_in(tmp_path, "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_shard_that_was_damaged_meanwhile_is_written_again(files: SmallImageNet, tmp_path: Path) -> None:
    kill(shards_build, "write_shard", 2, tmp_path)
    (tmp_path / "out" / STAGING / "train-000000.tar").write_bytes(b"damaged")
    build_in(tmp_path, "out")
    check(tmp_path / "out", workers=1)


def test_a_build_that_is_killed_before_its_manifest_writes_no_shard_again(files: SmallImageNet, tmp_path: Path) -> None:
    out, staging = tmp_path / "out", tmp_path / "out" / STAGING
    kill(Manifest, "save", 0, tmp_path)
    (out / "train-000002.tar").rename(staging / "train-000002.tar")  # as if it had died while it renamed them
    before = times(out) | times(staging)
    assert len(before) == 4
    build_in(tmp_path, "out")
    assert times(out) == before
    assert not staging.exists()
    check(out, workers=1)


def test_another_build_starts_over(files: SmallImageNet, tmp_path: Path) -> None:
    kill(shards_build, "write_shard", 2, tmp_path)
    build_in(tmp_path, "out", seed=1)
    build_in(tmp_path, "whole", seed=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_slip_does_not_cost_the_finished_shards(
    files: SmallImageNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kill(shards_build, "write_shard", 2, tmp_path)
    before = times(tmp_path / "out" / STAGING)

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards_build, "write_shard", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_in(tmp_path, "out", seed=1)
    assert "keeps 2 finished shards of another, interrupted build" in capsys.readouterr().out
    build_in(tmp_path, "out")
    after = times(tmp_path / "out")
    assert [name for name in before if after[name] == before[name]] == ["train-000000.tar", "train-000001.tar"]
    assert not list((tmp_path / "out").glob(f"{STAGING}*"))


@pytest.mark.parametrize(
    ("where", "calls", "code", "error", "message"),
    [
        (
            "image_files.Image.read",
            10,
            errno.EIO,
            Unavailable,
            rf"{TRAIN}: n\d+\.tar/n\w+\.JPEG: cannot be read now: Input",
        ),
        ("build.write_shard", 1, errno.ENOSPC, DataError, r"out: cannot write shards: .*No space left.*keeps finished"),
    ],
)
def test_a_failure_that_may_go_away_keeps_finished_shards(
    where: str, calls: int, code: int, error: type[Exception], message: str, files: SmallImageNet, tmp_path: Path
) -> None:
    original, seen = pkgutil.resolve_name(f"scaleprog.shards.{where}"), []

    def call(*arguments: object) -> object:
        seen.append(arguments)
        if len(seen) > calls:
            raise OSError(code, os.strerror(code))
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"scaleprog.shards.{where}", call)
        with pytest.raises(error, match=message):
            build_in(tmp_path, "out")
    kept = times(tmp_path / "out" / STAGING)["train-000000.tar"]
    assert build_in(tmp_path, "out").splits == build_in(tmp_path, "whole").splits
    assert times(tmp_path / "out")["train-000000.tar"] == kept


def test_a_worker_that_dies_takes_no_finished_shard_with_it(
    files: SmallImageNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_two(function: Callable[[object], object], jobs: list[object], **_: object) -> NoReturn:
        for job in jobs[:2]:
            function(job)
        raise WorkerDied("a worker died")

    monkeypatch.setattr(shards_build, "run_all", run_two)
    with pytest.raises(WorkerDied):
        build_in(tmp_path, "out")
    assert list(times(tmp_path / "out" / STAGING)) == ["train-000000.tar", "train-000001.tar"]


# What is not ImageNet


def change_class(files: SmallImageNet, change: Callable[[bytes], bytes]) -> None:
    """Writes the train tar again with another first class tar."""
    tars = class_tars(files.train)
    first = next(iter(tars))
    write_train(files.folder / TRAIN, tars | {first: change(tars[first])})


def change_images(files: SmallImageNet, **images: bytes) -> None:
    """Writes the train tar again with other bytes of these images."""
    write_train(files.folder / TRAIN, class_tars({**files.train, **{f"{name}.JPEG": images[name] for name in images}}))


def leave_out_a_class(files: SmallImageNet) -> None:
    tars = class_tars(files.train)
    tars.pop(f"{files.wnids[0]}.tar")
    write_train(files.folder / TRAIN, tars)


def add_to_val(files: SmallImageNet, name: str) -> None:
    (files.folder / VAL).write_bytes(packed({**files.val, name: b"x"}))


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def without_end(content: bytes) -> bytes:
    """The tar up to the end of its last member."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        last = archive.getmembers()[-1]
    return content[: last.offset_data + -(-last.size // 512) * 512]


def cut_end(files: SmallImageNet, more: bytes = b"") -> None:
    """Cuts off the train tar where its last member ends, and appends `more`."""
    (files.folder / TRAIN).write_bytes(without_end((files.folder / TRAIN).read_bytes()) + more)


def with_folder(files: SmallImageNet, name: str) -> None:
    extract(files, files.folder, val_in_classes=True)
    (files.folder / TRAIN).unlink()
    (files.folder / "train" / files.wnids[0]).rename(files.folder / "train" / name)


BAD: dict[str, tuple[Callable[[SmallImageNet], object], str]] = {
    "no train tar": (lambda files: (files.folder / TRAIN).unlink(), f"src: has neither {TRAIN} nor train/; download"),
    "no val tar": (lambda files: (files.folder / VAL).unlink(), f"src: has neither {VAL} nor val/; download"),
    "no labels": (lambda files: (files.folder / DEVKIT).unlink(), f"src: has no {DEVKIT}, .* or use --val-labels"),
    "a truncated train tar": (lambda files: cut(files.folder / TRAIN, 0.7), f"{TRAIN}: cannot be read .* truncated"),
    "a train tar without its end": (cut_end, f"{TRAIN}: cannot be read as a tar: no end marker .*Download the tar ag"),
    "a truncated val tar": (lambda files: cut(files.folder / VAL, 0.5), f"{VAL}: cannot be read .* truncated"),
    "a web page": (lambda files: (files.folder / VAL).write_bytes(b"<html>" * 99), f"{VAL}: .* it is a web page"),
    "an empty tar": (lambda files: (files.folder / VAL).write_bytes(packed({})), f"{VAL}: is empty"),
    "a missing class tar": (leave_out_a_class, rf"{VAL}: classes that are not in .*{TRAIN}: n01440764\."),
    "a foreign class tar": (
        lambda files: write_train(files.folder / TRAIN, {**class_tars(files.train), "n1.tar": b""}),
        rf"{TRAIN}: holds n1\.tar, but only n\[0-9\]",
    ),
    "a foreign image in a class tar": (
        lambda files: change_class(files, lambda _: packed({"n01440764_1.JPEG": b"x"})),
        rf"{TRAIN}: n01442718\.tar: holds n01440764_1\.JPEG, but only n01442718_",
    ),
    "a truncated class tar": (
        lambda files: change_class(files, lambda content: content[: len(content) // 1024 * 512]),
        rf"{TRAIN}: n01442718\.tar: cannot be read as a tar",
    ),
    "a class tar without its end": (
        lambda files: change_class(files, without_end), rf"{TRAIN}: n01442718\.tar: cannot be read as a tar: no end",
    ),
    "an empty class tar": (
        lambda files: change_class(files, lambda _: packed({})), rf"{TRAIN}: n01442718\.tar: is empty",
    ),
    "class tars twice": (
        lambda files: cut_end(files, (files.folder / TRAIN).read_bytes()), rf"{TRAIN}: holds n01442718\.tar, .* twice",
    ),
    "a foreign validation image": (
        lambda files: add_to_val(files, "val/ILSVRC2012_val_00000007.JPEG"), f"{VAL}: holds val/ILSVRC2012_val_0",
    ),
    "a validation image without a label": (
        lambda files: add_to_val(files, "ILSVRC2012_val_00000007.JPEG"),
        f"{VAL}: 7 images, but .*{DEVKIT} has 6 labels: no label of ILSVRC2012_val_00000007",
    ),
    "class folders of another data set": (lambda files: with_folder(files, "tench"), r"not WordNet IDs .*: tench\."),
    "unreadable images": (
        lambda files: change_images(files, n01440764_3=b"<html>", n01442718_10=files.train["n01442718_10.JPEG"][:-300]),
        rf"(?s)(?=.*{TRAIN}: n01442718\.tar/n01442718_10\.JPEG: cannot decode the image .*; download the tar again)"
        rf"(?=.*{TRAIN}: n01440764\.tar/n01440764_3\.JPEG: not a JPEG, PNG, or WebP image \(6 bytes\); download the)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_imagenet_is_named(kind: str, files: SmallImageNet, tmp_path: Path) -> None:
    harm, message = BAD[kind]
    harm(files)
    with pytest.raises(DataError, match=message):
        build_in(tmp_path, "out", samples_per_shard=100)
    assert not list(tmp_path.glob("out/*")), "a source that must change leaves nothing"
    assert not (tmp_path / "out" / STAGING).exists()


LISTS: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "one too few": (
        lambda wnids: wnids[:-1],
        "6 images, but .*labels has 5 labels: no label of ILSVRC2012_val_00000006",
    ),
    "one too many": (lambda wnids: [*wnids, wnids[0]], "6 images, but .* 7 labels: no image ILSVRC2012_val_00000007"),
    "an unknown class": (lambda wnids: [*wnids[:-1], "n09999999"], rf"classes that are not in .*{TRAIN}: n09999999\."),
}


@pytest.mark.parametrize("kind", LISTS)
def test_labels_that_do_not_fit_the_images_are_refused(kind: str, files: SmallImageNet, tmp_path: Path) -> None:
    change, message = LISTS[kind]
    (tmp_path / "labels").write_text("\n".join(change([*files.val_wnids.values()])))
    with pytest.raises(DataError, match=message):
        build_in(tmp_path, "out", val_labels=tmp_path / "labels")


def test_a_folder_without_validation_images_is_refused(files: SmallImageNet, tmp_path: Path) -> None:
    (files.folder / VAL).unlink()
    (files.folder / "val").mkdir()
    (tmp_path / "labels").touch()
    with pytest.raises(DataError, match="val: holds no images"):
        build_in(tmp_path, "out", val_labels=tmp_path / "labels")


def test_labels_of_class_folders_are_refused(files: SmallImageNet, tmp_path: Path) -> None:
    extract(files, files.folder, val_in_classes=True)
    (files.folder / VAL).unlink()
    with pytest.raises(DataError, match="val: has class folders, so --val-labels has no meaning"):
        build_in(tmp_path, "out", val_labels=tmp_path / "labels")


def test_validation_images_that_are_the_training_images_are_refused(files: SmallImageNet, tmp_path: Path) -> None:
    extract(files, files.folder, val_in_classes=True)
    (files.folder / TRAIN).unlink()
    (files.folder / VAL).unlink()
    shutil.rmtree(files.folder / "val")
    (files.folder / "val").symlink_to("train")
    with pytest.raises(DataError, match="validation images that are training images, too"):
        build_in(tmp_path, "out")


def test_the_command(files: SmallImageNet, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("\n".join(files.val_wnids.values()))
    words = [
        "imagenet",
        files.folder,
        tmp_path / "out",
        "--val-labels",
        tmp_path / "labels",
        "--seed",
        3,
        "--workers",
        1,
    ]
    result = CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0
    assert "built 18 train samples in 1 shards, 6 val samples in 1 shards, 3 classes" in result.output
    assert Manifest.load(tmp_path / "out").source["seed"] == 3
