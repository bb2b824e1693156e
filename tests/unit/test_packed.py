"""Packed shards: the same batches as from encoded ones, fewer bytes read, and damage that is named."""

import io
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from scaleprog.data import packed, token_labels
from scaleprog.data.decode import Box, decode, decode_whole, whole
from scaleprog.data.evaluation import VALIDATION, EvaluationReader
from scaleprog.data.manifest import NAME, Manifest, Shard
from scaleprog.data.order import Order
from scaleprog.data.packed import PackedShard
from scaleprog.data.reader import BatchRequest, DataSet, TrainReader
from scaleprog.data.shard import ShardReader
from scaleprog.data.stream import Batch
from scaleprog.data.token_labels import LabelShards
from scaleprog.errors import DamagedSample, DataError
from scaleprog.recipe.keys import AugmentSettings, DataSettings
from scaleprog.shards import pack
from scaleprog.shards.build import STAGING, shard_files
from scaleprog.shards.check import check, write_manifest
from scaleprog.shards.cli import app

pytestmark = pytest.mark.process

UNREDUCED = 4096


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels if pixels.shape[-1] == 1 else pixels[..., ::-1])[1].tobytes()


def noise(seed: int, height: int, width: int, channels: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of PNGs of several sizes, every third of them gray: 7 + 7 + 6 for training, 5 for validation."""
    folder = tmp_path_factory.mktemp("encoded")
    place = 0
    for name, count in (("train-0", 7), ("train-1", 7), ("train-2", 6), ("val-0", 5)):
        with webdataset.TarWriter(str(folder / f"{name}.tar")) as writer:
            for _ in range(count):
                pixels = noise(place, 20 + place % 5, 24 - place % 7, 3 if place % 3 else 1)
                writer.write({"__key__": f"n{place:03d}", "png": png(pixels), "cls": place % 4})
                place += 1
    write_manifest(folder, workers=1)
    return folder


@pytest.fixture
def out(encoded: Path, tmp_path: Path) -> Path:
    """The same shards, packed at their own size."""
    pack.build(encoded, tmp_path / "out", shorter_side=UNREDUCED, workers=1)
    return tmp_path / "out"


def training_batches(folder: Path, workers: int, labels: Path | None = None, **augment: object) -> list[Batch]:
    """Two epochs."""
    manifest = Manifest.load(folder)
    order = Order(tuple(shard.samples for shard in manifest.split("train")), 5, lanes=2, batch=4)
    data = DataSet(
        manifest,
        DataSettings(path=str(folder), lanes=2, workers=workers),
        AugmentSettings.model_validate(augment),
        3,
        LabelShards.of(str(labels), manifest) if labels else None,
    )
    reader = TrainReader(data, order, 11, 0, 1)
    with reader.stream([BatchRequest(t // 5, t % 5, (16, 12)[t % 2]) for t in range(10)], 16) as batches:
        return [batch.clone() for batch in batches]


def evaluated_batches(folder: Path) -> list[Batch]:
    data = DataSet(Manifest.load(folder), DataSettings(path=str(folder), workers=0), AugmentSettings(), 3)
    return [batch.clone() for batch in EvaluationReader(data, VALIDATION, 4, 0, 1).batches(16)]


def same(some: list[Batch], others: list[Batch]) -> bool:
    return all(
        torch.equal(mine, theirs)
        for a, b in zip(some, others, strict=True)
        for mine, theirs in zip(vars(a).values(), vars(b).values(), strict=True)
    )


# The same pixels


@pytest.mark.parametrize(
    ("workers", "augment"),
    [(0, {"randaugment": "rand-m9-mstd0.5-inc1", "erase": 0.5}), (1, {"crop": "simple", "three_augment": True})],
)
def test_batches_are_those_of_the_encoded_images(
    workers: int, augment: dict[str, object], encoded: Path, out: Path
) -> None:
    expected = training_batches(encoded, 0, **augment)
    assert same(training_batches(out, workers, **augment), expected)
    assert same(evaluated_batches(out), evaluated_batches(encoded))


def test_token_labels_of_the_encoded_images_fit(encoded: Path, out: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(encoded)
    reader, shards, folder = ShardReader(manifest, "train"), [], tmp_path / "labels"
    folder.mkdir()
    for index, shard in enumerate(manifest.split("train")):
        with webdataset.TarWriter(str(folder / shard.name), encoder=False) as writer:
            for row, key in enumerate(reader.load(index).keys):
                classes = (np.arange(12).reshape(2, 3, 2) + row) % 4
                writer.write({"__key__": key, "topk.npy": token_labels.encode(classes / 2, classes)})
        shards.append(Shard.measure(folder / shard.name, shard.samples))
    source = {"builder": token_labels.BUILDER, "rows": 2, "columns": 3, "top": 2}
    Manifest(str(folder), manifest.classes, {"train": tuple(shards)}, source).save()
    for a, b in zip(*(training_batches(each, 0, folder) for each in (encoded, out)), strict=True):
        assert a.token_labels.any()
        assert torch.equal(a.token_labels, b.token_labels)


Sides, Places = st.integers(1, 40), st.integers(-45, 45)
Boxes = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), Places, Places, Sides, Sides)


@settings(max_examples=60)
@given(
    Sides, Sides, st.sampled_from((1, 3)), st.sampled_from((1, 3)), st.lists(Boxes, min_size=1, max_size=3),
    st.booleans(), st.integers(0, 10),
)  # fmt: skip
def test_any_crops_are_those_of_the_encoded_image(
    height: int, width: int, stored: int, channels: int, boxes: list[Box], reflect: bool, seed: int
) -> None:
    pixels = noise(seed, height, width, stored)
    with io.BytesIO() as buffer:
        with webdataset.TarWriter(buffer, encoder=False) as writer:
            writer.write({"__key__": "a", **packed.encode(pixels, seed)})
        content = buffer.getvalue()
    image, _ = in_memory(content).image(0)
    crops = [partial(lambda box, *_: box, box) for box in boxes]
    for _ in range(2):  # the first time, the whole image is read, then rows
        found, expected = (
            decode(data, "", channels, 16, crops, reflect=reflect).astype(int) for data in (image, png(pixels))
        )
        rounding = 3 if (stored, channels) == (3, 1) else 0  # decoders round gray of colors in ways of their own
        assert np.abs(found - expected).max() <= rounding


def in_memory(content: bytes) -> PackedShard:
    file = io.BytesIO(content)
    samples = ((key, files, 0) for key, files in packed.tar.samples(file, len(content)))
    return PackedShard.index("here", file, memoryview(content), samples)


def test_images_are_reduced_and_gray_ones_have_one_channel(encoded: Path, tmp_path: Path) -> None:
    pack.build(encoded, tmp_path / "out", shorter_side=19, workers=1)
    before, after = (ShardReader(Manifest.load(folder), "train") for folder in (encoded, tmp_path / "out"))
    place = 0
    for index in range(3):
        originals, shard = before.load(index), after.load(index)
        assert isinstance(shard, PackedShard)
        assert shard.keys == originals.keys
        assert shard.labels.tolist() == originals.labels.tolist()
        for row in range(len(shard.keys)):
            image, (data, _) = shard.image(row)[0], originals.image(row)
            assert (min(image.shape[:2]), image.shape[2]) == (min(19, 24 - place % 7), 3 if place % 3 else 1)
            assert np.array_equal(image.rows(0, image.shape[0]), decode_whole(data, 19).pixels)
            place += 1


# What is read


def test_a_crop_reads_its_rows_and_the_file_is_closed_in_the_end(out: Path) -> None:
    reader = ShardReader(Manifest.load(out), "train")
    shard = reader.load(0)
    assert isinstance(shard, PackedShard)
    spy = Spy(shard.data)
    image, _ = replace(shard, data=spy).image(1)
    assert isinstance(image, packed.PackedImage)
    height, width, channels = image.shape
    for _ in range(2):
        assert np.array_equal(image.rows(3, 8), noise(1, height, width, channels)[3:8])
    assert spy.sizes == [packed.HEADER_BYTES + height * width * channels, 5 * width * channels]
    assert open_files(out) == [str(out / "train-000000.tar")]
    again = ShardReader(Manifest.load(out), "train", cache=2**30)
    again.preload()
    assert open_files(out) == [str(out / "train-000000.tar")], "packed shards are not preloaded"
    del reader, shard, image, spy
    assert open_files(out) == []


class Spy(packed.OpenFile):
    """Notes how many bytes are read at a time."""

    def __init__(self, data: memoryview | packed.OpenFile) -> None:
        self.data, self.sizes = data, list[int]()

    def __getitem__(self, part: slice) -> memoryview:
        self.sizes.append(part.stop - part.start)
        return self.data[part]


def open_files(folder: Path) -> list[str]:
    links = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(link))
        except OSError:  # closed meanwhile
            continue
    return [target for target in links if target.startswith(str(folder))]


# Damage


def rewritten(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Writes the tar again with other files of the sample n001."""
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    changed = {name.partition(".")[2]: files.pop(name) for name in list(files) if name.startswith("n001.")}
    change(changed)
    files |= {f"n001.{extension}": content for extension, content in changed.items()}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def array(values: np.ndarray) -> Callable[[dict[str, bytes]], None]:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=True)
    return lambda files: files.update(npy=buffer.getvalue())


def flip(extension: str, at: int) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        content = bytearray(files[extension])
        content[at] ^= 1
        files[extension] = bytes(content)

    return change


HEADER = r"its header is not that of \(H, W, 1 or 3\) uint8 in C order"
DAMAGES: dict[str, tuple[Callable[[dict[str, bytes]], object], str]] = {
    "a pixel": (flip("npy", 700), "damaged: its checksum differs"),
    "the label": (flip("cls", 0), "damaged: its checksum differs"),
    "the checksum": (flip("crc", 7), "(damaged: its checksum differs|expected eight hexadecimal digits)"),
    "no checksum": (lambda files: files.pop("crc"), r"\.crc"),
    "no hexadecimal checksum": (lambda files: files.update(crc=b"0x123456"), "expected eight hexadecimal digits"),
    "cut off pixels": (lambda files: files.update(npy=files["npy"][:-1]), "bytes, but its header says"),
    "a header that lies": (
        lambda files: files.update(npy=files["npy"].replace(b"(21, 23, 3)", b"(31, 23, 3)")),
        "bytes, but its header says 31 x 23 x 3",
    ),
    "objects": (array(np.array([[[{}]]], dtype=object)), HEADER),
    "Fortran order": (array(np.asfortranarray(noise(0, 20, 22, 3))), HEADER),
    "floats": (array(np.zeros((4, 4, 3), np.float32)), HEADER),
    "signed": (array(np.zeros((4, 4, 3), np.int8)), HEADER),
    "two dimensions": (array(np.zeros((4, 4), np.uint8)), HEADER),
    "four channels": (array(np.zeros((4, 4, 4), np.uint8)), HEADER),
    "no rows": (array(np.zeros((0, 4, 3), np.uint8)), HEADER),
    "nothing": (lambda files: files.update(npy=b""), HEADER),
    "an encoded image": (
        lambda files: files.update(png=png(noise(0, 4, 4, 3))) or files.pop("npy"),
        r"(both \.npy and \.crc|both packed and encoded images)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_in_training_and_by_check(kind: str, out: Path) -> None:
    change, message = DAMAGES[kind]
    path = out / "train-000000.tar"
    rewritten(path, change)
    with pytest.raises(DataError, match=rf"train-000000\.tar: key 'n001': .*{message}"):
        write_manifest(out, workers=1)
    manifest = Manifest.load(out)
    first, *others = manifest.split("train")
    Manifest(str(out), manifest.classes, {"train": (Shard.measure(path, first.samples), *others)}).save()
    with pytest.raises(DataError, match=rf"train-000000\.tar: key 'n001': .*{message}"):
        check(out, workers=1)
    with pytest.raises(DataError, match=rf"train-000000\.tar: sample 'n001'.*{message}") as raised:
        training_batches(out, 0)
    assert not isinstance(raised.value, DamagedSample), "data.damaged=replace is for images, not for wrong copies"


@given(st.sampled_from(("npy", "cls", "crc")), st.integers(0), st.integers(1, 255))
def test_any_changed_byte_is_found(extension: str, place: int, change: int) -> None:
    files = packed.encode(noise(1, 3, 4, 3), 12)
    content = bytearray(files[extension])
    content[place % len(content)] ^= change
    assert packed.problem_of(files) == ""
    assert packed.problem_of(files | {extension: bytes(content)})


def test_a_packed_image_among_encoded_ones_is_named(encoded: Path, tmp_path: Path) -> None:
    path = tmp_path / "train-0.tar"
    path.write_bytes((encoded / "train-0.tar").read_bytes())
    rewritten(path, lambda files: (files.pop("png"), files.update(packed.encode(noise(0, 4, 4, 3), 1))))
    shard = Shard.measure(path, 7)
    with pytest.raises(DataError, match=r"train-0\.tar: sample 'n001' is packed, but others are not"):
        ShardReader(Manifest(str(tmp_path), ("0",) * 4, {"train": (shard,)}), "train").load(0)
    with pytest.raises(DataError, match="key 'n001': the shard holds both packed and encoded images"):
        write_manifest(tmp_path, workers=1)


def test_a_shard_of_another_size_is_named_when_it_is_opened(out: Path) -> None:
    path = out / "train-000001.tar"
    reader = ShardReader(Manifest.load(out), "train")
    size = path.stat().st_size
    os.truncate(path, size - 512)
    with pytest.raises(DataError, match=rf"train-000001\.tar: truncated: {size - 512} of {size} bytes"):
        reader.load(1)
    os.truncate(path, size + 512)
    with pytest.raises(DataError, match=rf"train-000001\.tar: too long: {size + 512} of {size} bytes"):
        reader.load(1)


@pytest.mark.parametrize("seen", [False, True])
def test_a_shard_that_is_cut_off_while_it_is_open_is_named(seen: bool, out: Path) -> None:
    shard = ShardReader(Manifest.load(out), "train").load(0)
    data, where = shard.image(6)
    assert isinstance(data, packed.PackedImage)
    if seen:
        data.rows(0, 1)
    os.truncate(out / "train-000000.tar", 1024)
    with pytest.raises(DataError, match=r"train-000000\.tar: sample 'n006': truncated after it was opened"):
        decode(data, where, 3, 16, [whole])


# Building


def test_an_interrupted_build_resumes_and_another_one_is_refused(encoded: Path, out: Path) -> None:
    whole_build = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / NAME).unlink()
    (out / STAGING).mkdir()
    for path in shard_files(out)[1:]:
        path.rename(out / STAGING / path.name)
    (out / STAGING / "train-000001.tar").write_bytes(b"half")
    pack.build(encoded, out, shorter_side=UNREDUCED, workers=1)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole_build
    with pytest.raises(DataError, match=r"another build \(shorter_side: built with 4096, requested 19\)"):
        pack.build(encoded, out, shorter_side=19, workers=1)


def test_what_cannot_be_packed_is_named(encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pack, "MOST_BYTES", 20_000)
        with pytest.raises(DataError, match=r"train-0\.tar: its pixels would take more than 20000 bytes.* fewer --sam"):
            pack.build(encoded, tmp_path / "out", shorter_side=UNREDUCED, workers=1)
    broken = tmp_path / "broken"
    broken.mkdir()
    with webdataset.TarWriter(str(broken / "train-0.tar")) as writer:
        for key in "abc":
            image = b"not one" if key < "c" else png(noise(0, 4, 4, 3))
            writer.write({"__key__": key, "png": image, "cls": 0})
    shard = Shard.measure(broken / "train-0.tar", 3)
    Manifest(str(broken), ("0",), {"train": (shard,)}).save()
    with pytest.raises(DataError, match=r"'a': cannot decode the image(.|\n)*'b': cannot decode the image"):
        pack.build(broken, tmp_path / "out", shorter_side=8, workers=1)
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_command_line(encoded: Path, tmp_path: Path) -> None:
    def run(*words: object) -> str:
        return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False).output

    told = run("pack", encoded, tmp_path / "out", "--shorter-side", 20, "--workers", 1)
    assert "built 20 train samples in 3 shards, 5 val samples in 1 shards, 4 classes" in told
    assert "20 train, 5 val samples, 4 classes: all intact" in run("check", tmp_path / "out", "--workers", 1)
    assert Manifest.load(tmp_path / "out").source["shorter_side"] == 20
