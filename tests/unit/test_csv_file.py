"""Shards of the images that a CSV file names."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from scaleprog.errors import DataError
from scaleprog.shards.csv_file import build
from scaleprog.shards.samples import read_label, read_members

pytestmark = pytest.mark.process


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve images of different brightness, and no CSV file yet."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((4, 4), 20 * i, np.uint8))
    return tmp_path


def write(folder: Path, *rows: str) -> Path:
    path = folder / "list.csv"
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


def labels(out: Path, split: str) -> dict[str, int]:
    """The label of each image by the number in its file's name."""
    members = (pair for path in sorted(out.glob(f"{split}-*.tar")) for pair in read_members(path))
    return {key.rpartition("-")[2]: read_label(files) for key, files in members}


def test_rows_become_samples_of_their_split(photos: Path) -> None:
    rows = [f"photos/{i}.png,{'dog' if i % 2 else 'cat'},{'val' if i > 8 else 'train'}" for i in range(12)]
    manifest = build(write(photos, "path,label,split", *rows), photos / "out", samples_per_shard=5)
    assert manifest.classes == ("cat", "dog")
    assert [len(manifest.splits[split]) for split in ("train", "val")] == [2, 1]
    assert labels(photos / "out", "train") == {str(i): i % 2 for i in range(9)}
    assert labels(photos / "out", "val") == {str(i): i % 2 for i in range(9, 12)}


def test_a_part_is_split_off_by_seed_and_built_once(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(photos, "label,path", *(f'"a, {i % 3}",{photos}/photos/{i}.png' for i in range(12)))
    first = build(source, photos / "out", val_fraction=0.25, seed=3)
    assert first.classes == ("a, 0", "a, 1", "a, 2")
    assert len(labels(photos / "out", "val")) == 3
    assert len(labels(photos / "out", "train")) == 9
    assert build(source, photos / "out", val_fraction=0.25, seed=3) == first
    assert "already built" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"holds shards of another build .*seed: built with 3, requested 4"):
        build(source, photos / "out", val_fraction=0.25, seed=4)


def test_other_labels_are_another_build(photos: Path) -> None:
    rows = [f"photos/{i}.png" for i in range(12)]
    build(write(photos, "path,label", *(f"{row},{i % 2}" for i, row in enumerate(rows))), photos / "out")
    for others in ([1 - i % 2 for i in range(12)], [i % 2 + 1 for i in range(12)]):
        source = write(photos, "path,label", *(f"{row},{label}" for row, label in zip(rows, others)))
        with pytest.raises(DataError, match=r"holds shards of another build .*labels"):
            build(source, photos / "out")


def test_classes_that_are_numbers_are_in_their_order(photos: Path) -> None:
    rows = [f"photos/{i}.png,{i}" for i in range(12)]
    manifest = build(write(photos, "path,label", *rows), photos / "out")
    assert manifest.classes == tuple(map(str, range(12)))
    found = labels(photos / "out", "train") | labels(photos / "out", "val")
    assert found == {str(i): i for i in range(12)}
    mixed = build(write(photos, "path,label", *rows[:-1], "photos/11.png,none"), photos / "mixed")
    assert mixed.classes == tuple(sorted([*map(str, range(11)), "none"]))


def test_an_image_that_is_named_again(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"photos/{i}.png,{i % 2}" for i in range(12)]
    build(write(photos, "path,label", *rows, *rows[:3]), photos / "out")
    assert "names 3 images again; without a column `split`, each counts once" in capsys.readouterr().out
    found = [labels(photos / "out", split) for split in ("train", "val")]
    assert not found[0].keys() & found[1].keys(), "none is in both splits"
    split = [f"{row},{'val' if i > 8 else 'train'}" for i, row in enumerate(rows)]
    manifest = build(write(photos, "path,label,split", *split, split[0]), photos / "more")
    assert manifest.samples("train") == 10, "an image may count twice in training"


def test_a_class_keeps_an_image_to_train(photos: Path) -> None:
    """Whatever the seed draws: here two classes have one image each."""
    rows = [f"photos/{i}.png,{'a' if i < 10 else i}" for i in range(12)]
    for seed in range(8):
        out = photos / f"out{seed}"
        build(write(photos, "path,label", *rows), out, val_fraction=0.5, seed=seed)
        assert len(labels(out, "val")) == 6
        assert {"10", "11"} <= labels(out, "train").keys()


def test_the_file_of_a_spreadsheet(photos: Path) -> None:
    """It begins with a mark, and fields may have what only some programs take for the end of a line."""
    rows = [f"photos/{i}.png,a\u2028{i % 2}" for i in range(12)]
    (photos / "list.csv").write_text("\ufeff" + "\r\n".join(["path,label", *rows]), newline="")
    assert build(photos / "list.csv", photos / "out").classes == ("a\u20280", "a\u20281")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ["path,label,split", "photos/1.png,a,train", "photos/1.png,a,val"],
            r"validation images that are training images, too: \S+1.png is",
        ),
        (["path,label", "photos/1.png,a", "photos/2.png,b", "photos/1.png,b"], "it is in two classes"),
        ([], "the first line must be path,label or path,label,split; here it is ''"),
        (["file,class", "a,b"], "the first line must be .* it is 'file,class'"),
        (["path,label"], "no rows after the header"),
        (["path,label", "photos/1.png"], "row 2 must have 2 nonempty values"),
        (["path,label", "photos/1.png,"], "row 2 must have 2 nonempty values"),
        (["path,label", "photos/1.png,a,b"], "row 2 must have 2 nonempty values"),
        (["path,label", "photos/1.png,a", "photos/2.png,a "], "row 3: the label 'a ' begins or ends with a blank"),
        (["path,label", 'photos/1.png,"a\nb"'], r"row 2: 'a\\nb' has a line break or a NUL"),
        (["path,label", "photos/1.png\0,a"], r"row 2: 'photos/1.png\\x00' has a line break or a NUL"),
        (["path,label,split", "photos/1.png,a,test"], "row 2: split is 'test', not train or val"),
        (["path,label,split", "photos/1.png,a,train"], "no rows of the split val"),
        (
            ["path,label,split", "photos/1.png,cat,train", "photos/2.png,Cat,val"],
            "labels of the split val that no row of the split train has: Cat",
        ),
        (["path,label", "photos/1.png,a"], "1 images are too few to split off 1"),
        (["path,label", "photos/1.png,a", "photos/99.png,b"], "photos/99.png: cannot be read"),
        (["path,label", "photos/1.png,a", '"photos/2.png,b'], "line"),
        (["path,label", "photos/1.png,a", "list.csv,b"], "list.csv: not a JPEG, PNG, or WebP image"),
    ],
)
def test_what_cannot_be_is_named(rows: list[str], message: str, photos: Path) -> None:
    with pytest.raises(DataError, match=message):
        build(write(photos, *rows), photos / "out", workers=1)
    assert not list(photos.glob("out/*.tar"))


def test_a_file_that_is_no_text(photos: Path) -> None:
    (photos / "list.csv").write_bytes(b"path,label\n\xff\xfe,a\n")
    with pytest.raises(DataError, match=r"list\.csv: cannot be read"):
        build(photos / "list.csv", photos / "out")
