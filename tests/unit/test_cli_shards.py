"""The command line where shards are missing, damaged or do not fit: what is wrong is named, and all ranks end."""

import multiprocessing
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest

from scaleprog.data.manifest import Manifest, Shard
from scaleprog.data.order import Order
from tests.unit.command import Command, WriteRecipe, is_mistake

pytestmark = pytest.mark.process


def test_missing_shards(command: Command, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe()
    told = command("train", recipe, f"data.path={tmp_path}/nowhere", "--run-dir", tmp_path / "run")
    assert is_mistake(told, f"{tmp_path}/nowhere: the folder of shards does not exist", "scaleprog shards ")
    told = command("train", recipe, f"data.path={tmp_path}", "--run-dir", tmp_path / "run")
    assert is_mistake(told, f"{tmp_path}: the folder has no manifest.json", "scaleprog shards check")
    assert is_mistake(command("shards", "check", tmp_path), f"{tmp_path}: the folder has no manifest.json")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch=6", "6 images in 4 lanes do not give each lane a whole number; use data.lanes="),
        ("model.classes=5", "model.classes: 5, but "),
    ],
)
def test_a_recipe_that_does_not_fit_its_shards(
    override: str, message: str, command: Command, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    assert is_mistake(command("train", write_recipe(), override, "--run-dir", tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()


FIRST = Order((36, 36, 36, 36, 16), seed=0, lanes=4, batch=8).lane(0, 2)[0].tolist()
"""Shard, and index in it, of the sample that lane 2 gives first: with two ranks it is rank 1's."""
KEY = f"train{36 * FIRST[0] + FIRST[1]:05d}"


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def with_member(path: Path, name: str, content: bytes) -> None:
    """Writes the tar anew with another content of one member."""
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert name in members
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, value in (members | {name: content}).items():
            member = tarfile.TarInfo(key)
            member.size = len(value)
            tar.addfile(member, BytesIO(value))


def undecodable(path: Path) -> None:
    with_member(path, f"{KEY}.png", b"\x89PNG\r\n\x1a\n and nothing more")


def mislabelled(path: Path) -> None:
    with_member(path, f"{KEY}.cls", b"4")


DAMAGES: dict[str, tuple[Callable[[Path], None], bool, str]] = {
    "truncated": (truncated, False, "{path}: truncated, {size} bytes where manifest.json says "),
    "truncated before it was indexed": (truncated, True, "{path}: not a tar of samples ("),
    "flipped bit": (flipped, False, "{path}: the checksum differs from the manifest's"),
    "undecodable": (undecodable, True, "{path}: sample '{key}': cannot decode the image"),
    "label out of range": (mislabelled, True, "{path}: sample '{key}': label 4 is outside 0-3"),
}
"""What is done to the shard, whether the manifest is then made to fit, and the message."""


def damage(patterns: Path, folder: Path, kind: str) -> tuple[Path, str]:
    """A copy of the shards in which one is damaged, and the message that is due."""
    harm, indexed, message = DAMAGES[kind]
    shutil.copytree(patterns, folder)
    path = folder / f"train-{FIRST[0]:06d}.tar"
    harm(path)
    if indexed:
        manifest = Manifest.load(folder)
        shards = [Shard.measure(path, s.samples) if s.name == path.name else s for s in manifest.split("train")]
        replace(manifest, splits={**manifest.splits, "train": tuple(shards)}).save()
    return folder, message.format(path=path, size=path.stat().st_size, key=KEY)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_shard_is_named_in_training(
    kind: str, command: Command, write_recipe: WriteRecipe, patterns: Path, tmp_path: Path
) -> None:
    folder, message = damage(patterns, tmp_path / "shards", kind)
    recipe = write_recipe(data={"path": str(folder)})
    for workers, cache in ((0, 0), (1, 0), (1, 256)):
        told = command(
            "train", recipe, f"data.workers={workers}", f"data.cache={cache}", "--run-dir", tmp_path / f"{workers}"
        )
        assert is_mistake(told, message)
    assert multiprocessing.active_children() == []


def test_a_damaged_image_of_the_validation_split_is_named(
    command: Command, write_recipe: WriteRecipe, patterns: Path, tmp_path: Path
) -> None:
    shutil.copytree(patterns, tmp_path / "shards")
    path = tmp_path / "shards" / "val-000001.tar"
    with_member(path, "val00020.png", b"")
    manifest = Manifest.load(tmp_path / "shards")
    val = (manifest.split("val")[0], Shard.measure(path, 11))
    replace(manifest, splits={**manifest.splits, "val": val}).save()
    recipe = write_recipe(data={"path": str(tmp_path / "shards")}, train={"epochs": 0.1})
    told = command("train", recipe, "--run-dir", tmp_path / "run")
    assert is_mistake(told, f"{path}: sample 'val00020': cannot decode the image")


def test_a_rank_that_fails_is_named_and_ends_all(
    command: Command, write_recipe: WriteRecipe, patterns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCALEPROG_TEST", str(tmp_path))  # by which the processes of this run are known
    folder, message = damage(patterns, tmp_path / "shards", "undecodable")
    recipe = write_recipe(data={"path": str(folder), "workers": 1})
    told = command("train", recipe, "--nproc", 2, "--run-dir", tmp_path / "run")
    assert is_mistake(told, f"scaleprog: rank 1: {message}")
    deadline = time.monotonic() + 30
    while (left := processes(f"SCALEPROG_TEST={tmp_path}")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def processes(setting: str) -> list[str]:
    """Command lines of the processes that began with this environment setting, without Python's own housekeeper."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment, line = (folder / "environ").read_text(), (folder / "cmdline").read_text().replace("\0", " ")
        except (OSError, UnicodeDecodeError):  # ended meanwhile, or not ours
            continue
        if setting in environment.split("\0") and "resource_tracker" not in line:
            found.append(line)
    return found
