"""Shards of Fashion-MNIST: every pixel and label as in the original files."""

import gzip
import os
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from threading import Thread

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchvision.datasets import FashionMNIST

from scaleprog.data.manifest import Manifest
from scaleprog.errors import DataError
from scaleprog.shards import fashion_mnist
from scaleprog.shards.samples import read_label, read_members

pytestmark = pytest.mark.process

needs_fashion_mnist = pytest.mark.skipif(
    not fashion_mnist.DEBIAN_FOLDER.is_dir(), reason="needs the Debian package dataset-fashion-mnist"
)


@needs_fashion_mnist
def test_fashion_mnist_round_trip(tmp_path: Path):
    manifest = fashion_mnist.build(tmp_path, limit=50)
    assert manifest == Manifest.load(tmp_path)
    assert manifest.classes[9] == "Ankle boot"
    assert [shard.samples for shard in manifest.split("train")] == [7, 7, 6, 6, 6, 6, 6, 6]
    assert [shard.samples for shard in manifest.split("val")] == [13, 13, 12, 12]
    for split, prefix in fashion_mnist.PREFIX.items():
        images = fashion_mnist.read_idx(fashion_mnist.DEBIAN_FOLDER / f"{prefix}-images-idx3-ubyte.gz")
        labels = fashion_mnist.read_idx(fashion_mnist.DEBIAN_FOLDER / f"{prefix}-labels-idx1-ubyte.gz")
        samples = list(chain(*(read_members(Path(manifest.path(shard))) for shard in manifest.split(split))))
        indices = [int(key.removeprefix(f"{split}-")) for key, _ in samples]
        assert len(set(indices)) == 50
        assert indices != sorted(indices)
        for index, (_, members) in zip(indices, samples):
            pixels = cv2.imdecode(np.frombuffer(members["png"], np.uint8), cv2.IMREAD_UNCHANGED)
            np.testing.assert_array_equal(pixels, images[index])
            assert read_label(members) == labels[index]


@needs_fashion_mnist
def test_fashion_mnist_is_the_same_bytes_everywhere(tmp_path: Path):
    first = fashion_mnist.build(tmp_path / "a", limit=20)
    assert fashion_mnist.build(tmp_path / "b", limit=20).splits == first.splits
    assert fashion_mnist.build(tmp_path / "c", limit=20, seed=1).splits != first.splits


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(b"no idx"), gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 5, 1]))],
    ids=["empty", "no gzip", "no idx", "cut off"],
)
def test_damaged_idx_file(tmp_path: Path, content: bytes):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz.*dataset-fashion-mnist"):
        fashion_mnist.build(tmp_path / "out", tmp_path)


def test_what_inflates_too_far_or_is_no_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "MOST_BYTES", 1000)
    path = tmp_path / "idx.gz"
    path.write_bytes(gzip.compress(bytes(2000)))
    with pytest.raises(DataError, match=r"idx\.gz: inflates to more than 1000 bytes"):
        fashion_mnist.read_idx(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="not a regular file"):
        fashion_mnist.read_idx(path)


@given(st.lists(st.integers(0, 255), min_size=1, max_size=20))
def test_read_idx(tmp_path_factory: pytest.TempPathFactory, values: list[int]):
    path = tmp_path_factory.mktemp("idx") / "values.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 2]) + (1).to_bytes(4) + len(values).to_bytes(4) + bytes(values)))
    assert fashion_mnist.read_idx(path).tolist() == [values]


def write_idx(folder: Path, most: int) -> None:
    """Files of the form of MNIST: 70 images with the labels 0 to `most` in both splits."""
    labels = bytes(range(most + 1)) + bytes(69 - most)
    for prefix in fashion_mnist.PREFIX.values():
        head = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4) for size in (70, 2, 2))
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + bytes(280)))
        head = bytes([0, 0, 8, 1]) + (70).to_bytes(4)
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head + labels))


@pytest.mark.parametrize(("most", "classes"), [(9, 10), (61, 62)])
def test_the_classes_of_other_files_are_numbers(most: int, classes: int, tmp_path: Path) -> None:
    """Such as MNIST and EMNIST."""
    write_idx(tmp_path, most)
    manifest = fashion_mnist.build(tmp_path / "out", tmp_path)
    assert manifest.classes == tuple(map(str, range(classes)))


def test_files_in_each_others_place(tmp_path: Path) -> None:
    write_idx(tmp_path, 9)
    labels = (tmp_path / "train-labels-idx1-ubyte.gz").read_bytes()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(labels)
    with pytest.raises(DataError, match="images of 1 and labels of 1 dimensions for train, not 3 and 1"):
        fashion_mnist.build(tmp_path / "out", tmp_path)


@pytest.fixture
def mirror() -> Iterator[str]:
    """Address of a server on this machine that offers the Debian package's files."""
    handler = partial(SimpleHTTPRequestHandler, directory=fashion_mnist.DEBIAN_FOLDER)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@needs_fashion_mnist
def test_torchvision_downloads_what_is_not_installed(tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch):
    expected = fashion_mnist.build(tmp_path / "expected", limit=5)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "nowhere")
    # Debian's files are compressed anew, so torchvision's checksums are not theirs.
    unchecked = [(name, None) for name, _ in FashionMNIST.resources]
    monkeypatch.setattr(FashionMNIST, "resources", unchecked)
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"{mirror}nowhere/"])
    with pytest.raises(DataError, match=r"(?s)cannot download.*dataset-fashion-mnist"):
        fashion_mnist.build(tmp_path / "downloaded", limit=5)
    monkeypatch.setattr(FashionMNIST, "mirrors", [mirror])
    assert fashion_mnist.build(tmp_path / "downloaded", limit=5).splits == expected.splits


@needs_fashion_mnist
def test_other_files_are_another_build(tmp_path: Path) -> None:
    """MNIST has files of the same names."""
    original, other = tmp_path / "original", tmp_path / "other"
    original.symlink_to(fashion_mnist.DEBIAN_FOLDER)
    first = fashion_mnist.build(tmp_path / "shards", limit=20)
    assert fashion_mnist.build(tmp_path / "shards", original, limit=20) == first
    other.mkdir()
    for path in original.iterdir():
        if path.name.endswith("ubyte.gz"):
            content = bytearray(gzip.decompress(path.read_bytes()))
            content[-1] ^= 1
            (other / path.name).write_bytes(gzip.compress(content, 1))
    with pytest.raises(DataError, match=r"holds shards of another build .*files"):
        fashion_mnist.build(tmp_path / "shards", other, limit=20)
