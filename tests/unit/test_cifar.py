"""Shards of CIFAR-10 and CIFAR-100: every pixel and label as in files of the binary layout, which the tests write."""

from itertools import chain
from pathlib import Path

import cv2
import numpy as np
import pytest

from scaleprog.data.manifest import Manifest
from scaleprog.errors import DataError
from scaleprog.shards import cifar
from scaleprog.shards.samples import read_label, read_members

PER_FILE = 6
LAYOUTS = {10: cifar.CIFAR_10, 100: cifar.CIFAR_100}


def write(folder: Path, classes: int) -> dict[str, list[tuple[np.ndarray, int]]]:
    """Files of the official layout with few records; by split, the (32, 32, 3) RGB image and label of each."""
    rng, layout, written = np.random.default_rng(0), LAYOUTS[classes], {}
    folder.mkdir()
    (folder / layout.names).write_text("\n".join(f"class {i}" for i in range(classes)) + "\n\n")
    for split, names in layout.files.items():
        written[split] = []
        for name in names:
            content = b""
            for _ in range(PER_FILE):
                image, label = rng.integers(0, 256, (32, 32, 3), np.uint8), int(rng.integers(0, classes))
                coarse = b"" if classes == 10 else bytes([19])
                planes = b"".join(image[:, :, channel].tobytes() for channel in range(3))
                content += coarse + bytes([label]) + planes
                written[split].append((image, label))
            (folder / name).write_bytes(content)
    return written


@pytest.mark.parametrize("classes", [10, 100])
def test_round_trip(classes: int, tmp_path: Path) -> None:
    written = write(tmp_path / "src", classes)
    manifest = cifar.build(tmp_path / "src", tmp_path / "out")
    assert manifest == Manifest.load(tmp_path / "out")
    assert (len(manifest.classes), manifest.classes[7]) == (classes, "class 7")
    for split, records in written.items():
        samples = list(chain(*(read_members(Path(manifest.path(shard))) for shard in manifest.split(split))))
        places = [int(key.removeprefix(f"{split}-")) for key, _ in samples]
        assert sorted(places) == list(range(len(records)))
        assert places != sorted(places)
        for place, (_, members) in zip(places, samples):
            pixels = cv2.imdecode(np.frombuffer(members["png"], np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
            np.testing.assert_array_equal(pixels, records[place][0])
            assert read_label(members) == records[place][1]


def test_the_same_files_are_built_once_and_others_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "ten", 10)
    write(tmp_path / "hundred", 100)
    first = cifar.build(tmp_path / "ten", tmp_path / "out")
    assert cifar.build(tmp_path / "ten", tmp_path / "out").splits == first.splits
    assert "already built" in capfd.readouterr().out
    with pytest.raises(DataError, match="holds shards of another build"):
        cifar.build(tmp_path / "hundred", tmp_path / "out")
    with pytest.raises(DataError, match="seed: built with 0, requested 1"):
        cifar.build(tmp_path / "ten", tmp_path / "out", seed=1)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    with pytest.raises(DataError, match=r"src: holds neither batches\.meta\.txt \(CIFAR-10\) nor fine_label_names"):
        cifar.build(src, out)
    write(src, 10)
    whole = (src / "data_batch_3.bin").read_bytes()
    (src / "data_batch_3.bin").write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"data_batch_3\.bin: 18437 bytes are no whole number of records of 3073 bytes"):
        cifar.build(src, out)
    (src / "data_batch_3.bin").write_bytes(bytes([10]) + whole[1:])
    with pytest.raises(DataError, match=r"train has the label 10, but batches\.meta\.txt names 10 classes"):
        cifar.build(src, out)
    (src / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin: cannot be read: No such file"):
        cifar.build(src, out)
    assert not out.exists()
