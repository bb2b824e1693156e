"""The operations as tensors: the same pictures as timm's, whatever else is in the batch, and the draws of the host."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torch.profiler import ProfilerActivity, profile

from scaleprog.data import tensor_operations
from scaleprog.data.augment import Augmentation, BatchRequest
from scaleprog.data.operations import OPERATIONS, Operation, apply
from scaleprog.data.origin import MOVES
from scaleprog.data.tensor_operations import KERNELS, NAMES, operate, packed
from scaleprog.recipe.keys import AugmentSettings
from tests.augmented import train_images_with_origins
from tests.unit.test_augment import encoded
from tests.unit.test_operations import CASES, FILL, TIMMS, photo, psnr

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MOVED, BLURRED = 60, 55
"""The least PSNR in decibels where Pillow computes with more digits. All other pixels are equal, of color and sharpness
too, which OpenCV only comes near."""
Drawn = list[tuple[Operation, ...]]


def changed(images: np.ndarray, drawn: Sequence[Sequence[Operation]], device: str = "cpu") -> np.ndarray:
    """(B, r, r, C) uint8, with the operations of each image."""
    most = max(map(len, drawn))
    there = torch.from_numpy(images).to(device)
    return operate(there, packed(drawn, most), FILL[-images.shape[-1] :]).cpu().numpy()


def mixture(seed: int, count: int = 24) -> Drawn:
    """For each image up to three operations, all of them in turn."""
    rng = np.random.default_rng(seed)
    found = [
        tuple(Operation(name, amount) for name, amount, _ in (CASES[i] for i in rng.integers(len(CASES), size=n)))
        for n in rng.integers(4, size=count)
    ]
    return [(Operation(name, amount), *found[i % count][:2]) for i, (name, amount, _) in enumerate(CASES)] + found


def noise(count: int, side: int, channels: int) -> np.ndarray:
    """Images with few levels in the first of them, and all levels in the last."""
    rng, most = np.random.default_rng(side), np.linspace(1, 256, count).astype(int)[:, None, None, None]
    return (rng.random((count, side, side, channels)) * most).astype(np.uint8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "amount"), [case[:2] for case in CASES])
def test_pictures_are_timms(name: str, amount: float, channels: int, device: str) -> None:
    pixels, fill = photo(channels), FILL[-channels:]
    before = pixels.copy()
    ours = changed(pixels[None], [[Operation(name, amount)]], device)[0]
    image = Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)
    moving = {"fillcolor": fill if channels == 3 else fill[0], "resample": Image.Resampling.BICUBIC}
    theirs = TIMMS[name](image, amount, **(moving if name in MOVES else {}))
    assert np.array_equal(pixels, before), "the caller's images stay"
    assert ours.dtype == np.uint8
    found = psnr(ours, np.asarray(theirs).reshape(ours.shape))
    assert found >= (MOVED if name in MOVES else BLURRED if name == "blur" else math.inf), found


def test_every_operation_is_there() -> None:
    assert set(KERNELS) == set(NAMES[1:]) == {*OPERATIONS, *MOVES}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [1, 2, 17, 32])
def test_an_image_does_not_depend_on_its_batch(side: int, channels: int, device: str) -> None:
    """A mixed batch equals its rows one by one, and a part of it, in another order."""
    drawn = mixture(side)
    images = noise(len(drawn), side, channels)
    whole = changed(images, drawn, device)
    for row, operations in enumerate(drawn):
        assert np.array_equal(whole[row], changed(images[row : row + 1], [operations], device)[0]), operations
    some = np.random.default_rng(1).permutation(len(drawn))[:17]
    assert np.array_equal(whole[some], changed(images[some], [drawn[row] for row in some], device))


def test_operations_apply_one_after_another() -> None:
    """As on the host, but for its rounding, which equalizing would amplify."""
    exact = [name for name, _, least in CASES if least == math.inf]
    drawn = [tuple(Operation(name, amount) for name, amount, _ in CASES if name in exact)[i : i + 5] for i in range(15)]
    images = np.stack([photo(3)] * len(drawn))
    for ours, image, operations in zip(changed(images, drawn), images, drawn):
        for operation in operations:
            image = apply(image, operation, FILL)
        assert np.array_equal(ours, image), operations


@pytest.mark.parametrize("device", DEVICES)
def test_few_rows_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    drawn = mixture(0)
    images = noise(len(drawn), 16, 3)
    whole = changed(images, drawn, device)
    monkeypatch.setattr(tensor_operations, "WORKING", 100 * 2 * 16 * 16 * 3)  # two rotations
    assert np.array_equal(changed(images, drawn, device), whole)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", KERNELS)
def test_working_memory_is_what_is_stated(name: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight images, two at a time may be changed."""
    amount = next(amount for known, amount, _ in CASES if known == name)
    images = torch.from_numpy(noise(8, 96, channels))
    operations = packed([[Operation(name, amount)]] * len(images), 1)
    bound = KERNELS[name].bytes * 2 * images[0].numel()
    monkeypatch.setattr(tensor_operations, "WORKING", bound)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        operate(images, operations, FILL[-channels:])
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    taken = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).max()
    assert bound / 4 < taken - 2 * images.nbytes <= bound


@given(st.floats(0.1, 2.0), st.integers(0, 99))
def test_any_blur_is_pillows(sigma: float, seed: int) -> None:
    image = noise(1, 12, 3)
    blurred = changed(image, [[Operation("blur", sigma)]])[0].astype(int)
    theirs = np.asarray(TIMMS["blur"](Image.fromarray(image[0]), sigma)).astype(int)
    assert abs(blurred - theirs).max() <= 1


def test_the_host_never_waits_for_the_device() -> None:
    """A meta tensor has no data, so that whatever reads some of it fails."""
    drawn = mixture(3)
    images = torch.empty(len(drawn), 16, 16, 3, dtype=torch.uint8, device="meta")
    assert operate(images, packed(drawn, 3), FILL).shape == images.shape
    with pytest.raises(RuntimeError, match="meta"):
        images.max().item()


# ---- in the augmentation of a lane

CHOSEN = [
    {"randaugment": "rand-m9-mstd0.5-n3-inc1", "erase": 0.3},
    {"three_augment": True, "color_jitter": 0.3},
    {"color_jitter": 0.4, "crop": "padded"},
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("chosen", CHOSEN)
def test_the_drawn_operations_arrive(chosen: dict[str, object], channels: int) -> None:
    """So their statistics are those of the host, which `tests/numerics/test_draws.py` compares with timm's."""
    images, request = encoded(24, channels), BatchRequest(1, 2, 24, magnitude=0.7, erase=0.5)
    here, there = (
        Augmentation(AugmentSettings(**chosen, device=device), channels, 5) for device in ("cpu", "accelerator")
    )
    drawn = here.draws(request, 3, len(images))
    assert there.draws(request, 3, len(images)) == drawn
    out = np.empty((len(images), 24, 24, channels), np.uint8)
    _, deferred, erasing = there.lane(images, request, 3, out)
    assert deferred == [draw.operations for draw in drawn]
    assert there.deferred == max(map(len, deferred))
    indices, amounts = packed(deferred, there.deferred).unbind(-1)
    for draw, names, numbers in zip(drawn, indices.int().tolist(), amounts):
        arrived = [NAMES[index] for index in names if index]
        assert arrived == [operation.name for operation in draw.operations]
        assert torch.equal(numbers[: len(arrived)], torch.tensor([amount for _, amount in draw.operations]))
    assert [draw.erasing for draw in drawn] == erasing
    _, none, _ = here.lane(images, request, 3, out)
    assert (here.deferred, set(none)) == (0, {()})


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_pictures_are_those_of_the_host(flip: float) -> None:
    """Where images are flipped, the host flips them last; so an operation that looks to the right looks to the left."""
    chosen = {"randaugment": "rand-m9-mstd0.5-inc1", "flip": flip, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    run = partial(train_images_with_origins, images=encoded(64), request=BatchRequest(0, 0, 48), lane=0)
    here, there = (
        run(Augmentation(AugmentSettings(**chosen, device=device), 3, 5)) for device in ("cpu", "accelerator")
    )
    sideways = {"rotate", "shear_x", "shear_y", "translate_x"}
    drawn = Augmentation(AugmentSettings(**chosen), 3, 5).draws(BatchRequest(0, 0, 48), 0, 64)
    alike = [not flip or sideways.isdisjoint(name for name, _ in draw.operations) for draw in drawn]
    assert sum(alike) > 30
    for same, mine, theirs, origin, other in zip(alike, there[0], here[0], there[1], here[1]):
        error = float((mine - theirs).square().mean())
        assert (error < 0.02) == same
        assert np.allclose(origin, other) == same


@pytest.mark.parametrize("off", [{}, {"randaugment": None, "color_jitter": 0}, {"erase": 0.5}])
def test_an_accelerator_without_operations_is_refused(off: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="turn one on, or use device: cpu"):
        AugmentSettings(device="accelerator", **off)
