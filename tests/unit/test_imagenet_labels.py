"""The classes of ImageNet's validation images, from the development kit and from lists."""

import gzip
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scaleprog.errors import DataError
from scaleprog.shards.imagenet_labels import DEVKIT, META, TRUTH, from_devkit, from_list
from tests.unit.imagenet_files import packed, write_devkit

WNIDS = {f"ILSVRC2012_val_{number:08d}": f"n0144{number % 3}001" for number in range(1, 7)}
"""The class of each image by its name."""


def ordered() -> str:
    return "\n".join(WNIDS.values())


def named() -> str:
    return "\n".join(f"val/{name}.JPEG {wnid}" for name, wnid in reversed(WNIDS.items()))


def kaggle() -> str:
    rows = [f"{name},{wnid} 1 2 3 4 {wnid} 5 6 7 8 " for name, wnid in reversed(WNIDS.items())]
    return "\n".join(["ImageId,PredictionString", *rows, ""])


@pytest.mark.parametrize("form", [ordered, named, kaggle])
def test_a_list_in_any_form(form: Callable[[], str], tmp_path: Path) -> None:
    (tmp_path / "labels").write_text(form())
    assert from_list(tmp_path / "labels") == WNIDS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"65\n970\n", "labels: image 1: '65' is not a WordNet ID .*Numbers of classes are not read"),
        (b"n01440764\n\nn01440764\n", "labels: image 2: '' is not a WordNet ID"),
        (b"n01440764 n01440765", "labels: image 1: .* is not a WordNet ID"),
        (b"n01440764 val.JPEG", "labels: image 1: .* is not a WordNet ID"),
        (b"a.JPEG n01440764 1 2 3 4 n01440765 5 6 7 8", "labels: image 1: .* is not a WordNet ID"),
        (b"a.JPEG n01440764\na.JPEG n01440764", "labels: image 2: a occurs twice"),
        (b"\xff", "labels: cannot be read"),
    ],
)
def test_a_list_in_no_form_is_refused(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(text)
    with pytest.raises(DataError, match=message):
        from_list(tmp_path / "labels")


def test_the_development_kit_counts_classes_in_its_own_order(tmp_path: Path) -> None:
    order = ["n01442001", "n01440001", "n01441001"]
    write_devkit(tmp_path / DEVKIT, order, [order.index(wnid) + 1 for wnid in WNIDS.values()])
    assert from_devkit(tmp_path / DEVKIT) == WNIDS


def test_the_development_kit_needs_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_devkit(tmp_path / DEVKIT, ["n01440001"], [1])
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match=rf"{DEVKIT}: SciPy is needed .* pip install scipy, or .*--val-labels"):
        from_devkit(tmp_path / DEVKIT)


def test_a_truth_about_no_class_is_refused(tmp_path: Path) -> None:
    write_devkit(tmp_path / DEVKIT, ["n01440001"], [1, 9])
    with pytest.raises(DataError, match=f"{DEVKIT}: {TRUTH} has '9', but {META} has no such class"):
        from_devkit(tmp_path / DEVKIT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (packed({META: b"x", TRUTH: b"1"}), f"cannot be read as {DEVKIT}: Not a gzipped file"),
        (gzip.compress(packed({META: b"x", TRUTH: b"1"}))[:-9], f"cannot be read as {DEVKIT}: Compressed file ended"),
        (gzip.compress(packed({META: b"x"})), f"cannot be read as {DEVKIT}: it has no {TRUTH}"),
        (gzip.compress(packed({META: b"x" * 999, TRUTH: b"1"})), f"{META} is damaged"),
    ],
)
def test_a_damaged_development_kit_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / DEVKIT).write_bytes(content)
    with pytest.raises(DataError, match=message):
        from_devkit(tmp_path / DEVKIT)
