"""Images that builders reduce on their way into shards."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from typer.testing import CliRunner

from scaleprog.data.decode import decode_whole
from scaleprog.data.manifest import NAME
from scaleprog.errors import DataError
from scaleprog.shards import image_files, image_folder
from scaleprog.shards.build import STAGING, shard_files
from scaleprog.shards.cli import app
from scaleprog.shards.image_files import Files
from scaleprog.shards.reduction import Reduction
from scaleprog.shards.samples import SourceSample

pytestmark = pytest.mark.process

PHOTO: np.ndarray = load_sample_images().images[0][:256, :320]


def encoded(pixels: np.ndarray, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of six images, of which a third is too small to be reduced."""
    src = tmp_path_factory.mktemp("photos")
    for index in range(12):
        path = src / ("tower", "roof")[index % 2] / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(PHOTO[index:, : 40 if index < 4 else 120], quality=92))
    return src


def stored(folder: Path, content: bytes, reduction: Reduction | None) -> SourceSample:
    (folder / "image").write_bytes(content)
    [sample] = Files(0, [image_files.Image(folder / "image", 0)], reduction)
    return sample


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("shorter_side", "size"), [(64, (80, 64)), (128, (160, 128)), (255, (319, 255))])
def test_a_larger_image_becomes_a_jpeg_of_the_shorter_side(
    kind: str, shorter_side: int, size: tuple[int, int], tmp_path: Path
) -> None:
    original = encoded(PHOTO, kind)
    sample = stored(tmp_path, original, Reduction(shorter_side))
    assert sample.extension == "jpg"
    reduced = Image.open(io.BytesIO(sample.image))
    assert (reduced.format, reduced.mode, reduced.size) == ("JPEG", "RGB", size)
    expected = Image.open(io.BytesIO(original)).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    error = np.asarray(decode_whole(original, shorter_side).pixels, float) - np.asarray(expected)
    assert 10 * np.log10(255**2 / (error**2).mean()) > 35


@pytest.mark.parametrize("shorter_side", [256, 300])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_that_is_small_enough_keeps_its_bytes(kind: str, shorter_side: int, tmp_path: Path) -> None:
    assert stored(tmp_path, encoded(PHOTO, kind), Reduction(shorter_side)).image == encoded(PHOTO, kind)


def test_gray_stays_gray_and_quality_sets_the_bytes(tmp_path: Path) -> None:
    gray = stored(tmp_path, encoded(PHOTO[..., 0]), Reduction(128)).image
    assert Image.open(io.BytesIO(gray)).mode == "L"
    low, high = (len(stored(tmp_path, encoded(PHOTO), Reduction(128, quality)).image) for quality in (50, 95))
    assert low < high / 2


@pytest.mark.parametrize("content", [b"", b"<html>", encoded(PHOTO)[:5000], encoded(PHOTO, "PNG")[:5000]])
def test_an_image_that_cannot_be_decoded_is_named_as_without_a_reduction(content: bytes, tmp_path: Path) -> None:
    messages = []
    for reduction in (None, Reduction(64)):
        with pytest.raises(DataError, match="image: ") as caught:
            stored(tmp_path, content, reduction)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_an_interrupted_build_resumes_and_another_one_is_refused(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(quality: int = 92) -> dict[str, bytes]:
        image_folder.build(tree, out, samples_per_shard=4, reduction=Reduction(64, quality), workers=1)
        return {path.name: path.read_bytes() for path in out.iterdir()}

    out = tmp_path / "out"
    whole_build = build()
    assert "MB of images became" in capsys.readouterr().out
    (out / NAME).unlink()
    (out / STAGING).mkdir()
    for path in shard_files(out)[1:]:
        path.rename(out / STAGING / path.name)
    (out / STAGING / "train-000001.tar").write_bytes(b"half")
    assert build() == whole_build
    with pytest.raises(DataError, match=r"another build \(quality: built with 92, requested 80\)"):
        build(quality=80)
    with pytest.raises(DataError, match=r"another build \(.*shorter_side: built with 64, requested None\)"):
        image_folder.build(tree, out, samples_per_shard=4)


def test_command_line(tree: Path, tmp_path: Path) -> None:
    def run(*words: object) -> str:
        return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False).output

    told = run("image-folder", tree, tmp_path / "out", "--shorter-side", 64, "--workers", 1)
    assert "of the images: a core decodes and crops " in told
    with pytest.raises(DataError, match="--quality is that of reduced images; add --shorter-side"):
        run("image-folder", tree, tmp_path / "out", "--quality", 80)
