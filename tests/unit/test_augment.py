"""Augmentation: what it does, and that nothing but (seed, epoch, step, lane) decides it."""

import io
import random
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from skimage import data
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms import RandomResizedCrop

from scaleprog.data import mixing
from scaleprog.data.augment import Augmentation, BatchRequest, Encoded, central_box, random_box
from scaleprog.data.mixing import mix
from scaleprog.data.on_device import low_pass
from scaleprog.data.order import Order
from scaleprog.data.policies import RandAugment
from scaleprog.errors import DataError
from scaleprog.recipe.keys import AugmentSettings
from tests.augmented import evaluation_images, train_images

DEIT = AugmentSettings(randaugment="rand-m9-mstd0.5-inc1", erase=0.25, color_jitter=0.3, mixup=0.8, cutmix=1.0)


def encoded(count: int, channels: int = 3, side: int = 40) -> list[Encoded]:
    photo = Image.fromarray(data.astronaut()).convert("RGB" if channels == 3 else "L")
    images = []
    for index in range(count):
        buffer = io.BytesIO()
        photo.crop((index, index, index + 300, index + 300)).resize((side, side)).save(buffer, "PNG")
        images.append((memoryview(buffer.getvalue()), f"sample {index}"))
    return images


def process_state() -> tuple[object, ...]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "chosen", [DEIT, AugmentSettings(crop="padded", color_jitter=0.4), AugmentSettings(crop="none")]
)
def test_only_seed_epoch_step_and_lane_decide(chosen: AugmentSettings, channels: int) -> None:
    images, request = encoded(24, channels), BatchRequest(epoch=3, step=5, resolution=24)
    first = train_images(Augmentation(chosen, channels, seed=1), images, request, 2)
    assert first.shape == (24, channels, 24, 24)
    assert first.dtype == torch.float32
    assert first.is_contiguous()
    random.seed(123)
    np.random.seed(123)
    torch.manual_seed(123)
    before = process_state()
    again = train_images(Augmentation(chosen, channels, seed=1), images, request, 2)
    assert torch.equal(first, again)
    assert process_state() == before, "the training process's own draws are left alone"
    others = [
        train_images(Augmentation(chosen, channels, seed=2), images, request, 2),
        train_images(Augmentation(chosen, channels, seed=1), images, BatchRequest(4, 5, 24), 2),
        train_images(Augmentation(chosen, channels, seed=1), images, BatchRequest(3, 6, 24), 2),
        train_images(Augmentation(chosen, channels, seed=1), images, request, 3),
    ]
    assert not any(torch.equal(first, other) for other in others)


def test_the_states_are_put_back_after_an_error() -> None:
    before = process_state()
    with suppress(RuntimeError), mixing._seeded(1, 2):
        random.random()
        raise RuntimeError
    assert process_state() == before


def test_nothing_on_is_decoding_and_normalising() -> None:
    plain = AugmentSettings(crop="none", flip=0)
    image = encoded(1, 3, side=24)
    pixels = np.asarray(Image.open(io.BytesIO(image[0][0]))) / 255
    expected = ((pixels - IMAGENET_DEFAULT_MEAN) / IMAGENET_DEFAULT_STD).transpose(2, 0, 1)
    got = train_images(Augmentation(plain, 3), image, BatchRequest(0, 0, 24), 0)[0]
    assert torch.allclose(got.double(), torch.from_numpy(expected), atol=1e-5)
    grey = train_images(Augmentation(plain, 1), encoded(1, 1, 24), BatchRequest(0, 0, 24), 0)
    assert grey.min() >= -1
    assert grey.max() <= 1
    own = Augmentation(AugmentSettings(crop="none", flip=0, mean=(0.0,), std=(1.0,)), 1)
    assert torch.allclose(train_images(own, encoded(1, 1, 24), BatchRequest(0, 0, 24), 0) * 2 - 1, grey, atol=1e-6)


def test_flip_is_as_often_as_asked() -> None:
    image = encoded(1, 1, 24) * 400
    plain = train_images(Augmentation(AugmentSettings(crop="none", flip=0), 1), image[:1], BatchRequest(0, 0, 24), 0)[0]
    rows = train_images(Augmentation(AugmentSettings(crop="none", flip=0.25), 1), image, BatchRequest(0, 0, 24), 0)
    flipped = sum(torch.equal(row, plain.flip(-1)) for row in rows)
    assert flipped + sum(torch.equal(row, plain) for row in rows) == 400
    assert 65 <= flipped <= 140


def test_a_padded_crop_is_a_window_of_the_padded_image() -> None:
    image = encoded(1, 1, 12)
    chosen = AugmentSettings(crop="padded", padding=2, flip=0)
    rows = train_images(Augmentation(chosen, 1), image * 300, BatchRequest(0, 0, 12), 0)
    whole = train_images(Augmentation(AugmentSettings(crop="none", flip=0), 1), image, BatchRequest(0, 0, 12), 0)[0]
    padded = torch.nn.functional.pad(whole, (2, 2, 2, 2), value=-1.0)  # a pixel of 0 is -1 when normalised
    windows = {(y, x): padded[:, y : y + 12, x : x + 12] for y in range(5) for x in range(5)}
    found = [next(at for at, window in windows.items() if torch.equal(row, window)) for row in rows]
    assert set(found) == set(windows), "every offset occurs"


@given(st.integers(1, 900), st.integers(1, 900), st.lists(st.floats(0, 1, exclude_max=True), min_size=22, max_size=22))
def test_a_resized_crop_lies_inside_the_image(height: int, width: int, draws: list[float]) -> None:
    left, top, right, bottom = random_box(AugmentSettings(), 24, height, width, draws)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_resized_crops_are_distributed_as_torchvisions() -> None:
    size = (375, 500)
    draws = np.random.default_rng(0).random((4000, 22)).tolist()
    ours = np.array([random_box(AugmentSettings(), 224, *size, row) for row in draws], dtype=float)
    torch.manual_seed(0)
    image = torch.empty(1, *size)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)], dtype=float
    )
    ours = np.stack((ours[:, 1], ours[:, 0], ours[:, 3] - ours[:, 1], ours[:, 2] - ours[:, 0]), axis=1)
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert np.abs(np.quantile(ours, quantile, axis=0) - np.quantile(theirs, quantile, axis=0)).max() < 15


def test_the_central_square() -> None:
    assert central_box(375, 500, 1.0) == (62, 0, 437, 375)
    assert central_box(256, 256, 0.875) == (16, 16, 240, 240)
    assert central_box(1, 1, 0.875) == (0, 0, 1, 1)
    images = encoded(2, 3, 32)
    assert evaluation_images(Augmentation(AugmentSettings(), 3), images, 16).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(("rounded", "magnitudes"), [(False, [4.5, 6, 7.5, 9]), (True, [4, 6, 8, 9])])
def test_adareg_scales_the_magnitude_and_may_round_it(rounded: bool, magnitudes: list[float]) -> None:
    factors = (1 / 2, 2 / 3, 5 / 6, 1.0)
    assert [RandAugment("rand-m9-mstd0.5-inc1", factor, rounded).magnitude for factor in factors] == magnitudes


def test_adareg_changes_images_less_at_a_small_magnitude() -> None:
    images = encoded(64, 3, 32)
    chosen = AugmentSettings(crop="none", flip=0, randaugment="rand-m9-n2-p1.0-inc1")
    plain = train_images(Augmentation(AugmentSettings(crop="none", flip=0), 3), images, BatchRequest(0, 0, 32), 0)
    changes = [
        (train_images(Augmentation(chosen, 3), images, BatchRequest(0, 0, 32, magnitude), 0) - plain).abs().mean()
        for magnitude in (0.25, 1.0)
    ]
    assert changes[0] < changes[1]


@pytest.mark.parametrize("config", ["rand-m10-n4-p1.0-inc1", "rand-m1-n4-p1.0"])
def test_randaugment_survives_both_ends_of_its_scale(config: str) -> None:
    """timm asks Pillow for a posterisation to 0 bits there, which Pillow 13 refuses."""
    chosen = AugmentSettings(crop="none", randaugment=config)
    train_images(Augmentation(chosen, 1), encoded(1, 1, 16) * 200, BatchRequest(0, 0, 16), 0)


def test_adareg_scales_how_often_is_erased() -> None:
    images = encoded(1, 1, 24) * 400
    plain = train_images(Augmentation(AugmentSettings(crop="none", flip=0), 1), images[:1], BatchRequest(0, 0, 24), 0)[
        0
    ]
    augmentation = Augmentation(AugmentSettings(crop="none", flip=0, erase=0.5), 1)
    erased = {}
    for factor in (0.0, 0.5, 1.0):
        rows = train_images(augmentation, images, BatchRequest(0, 0, 24, erase=factor), 0)
        erased[factor] = sum(not torch.equal(row, plain) for row in rows)
    assert erased[0.0] == 0
    assert 65 <= erased[0.5] <= 140
    assert 160 <= erased[1.0] <= 240


@pytest.mark.parametrize(
    "wrong",
    [
        {"randaugment": "rand-q9"},
        {"randaugment": "augmix-m3"},
        {"scale": (0.5, 0.1)},
        {"scale": (0.5, 1.5)},
        {"ratio": (0.0, 1.0)},
        {"flip": 1.5},
        {"crop": "random"},
        {"eval_crop": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AugmentSettings(**wrong)


def test_normalisation_must_fit_the_channels() -> None:
    with pytest.raises(DataError, match=r"must have 3 numbers each"):
        Augmentation(AugmentSettings(mean=(0.5,), std=(0.5,)), 3)
    with pytest.raises(DataError, match="1 or 3 channels"):
        Augmentation(AugmentSettings(), 2)


# Mixup and CutMix

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def batch(lanes: int, per_lane: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = lanes * per_lane
    return torch.randn(size, 1, 8, 8, generator=generator), torch.randint(0, 10, (size,), generator=generator)


def mix_all(
    images: torch.Tensor, labels: torch.Tensor, lanes: int, step: int, classes: int, chosen: AugmentSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes a whole batch, as the only rank."""
    return mix(images, labels, lanes=range(lanes), of=lanes, seed=0, step=step, classes=classes, settings=chosen)


@pytest.mark.parametrize("device", DEVICES)
@given(st.sampled_from((1, 2, 4)), st.sampled_from((2, 4, 6)), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_mixing_does_not_depend_on_the_world_size(device: str, lanes: int, per_lane: int, step: int) -> None:
    images, labels = (tensor.to(device) for tensor in batch(2 * lanes, per_lane, step))
    arguments = {"of": 2 * lanes, "seed": 3, "step": step, "classes": 10, "settings": DEIT}
    whole = mix(images, labels, lanes=range(2 * lanes), **arguments)
    half = len(images) // 2
    parts = [
        mix(images[rows], labels[rows], lanes=owned, **arguments)
        for rows, owned in ((slice(half), range(lanes)), (slice(half, None), range(lanes, 2 * lanes)))
    ]
    for index in range(2):
        assert torch.equal(whole[index], torch.cat([part[index] for part in parts]))


@pytest.mark.parametrize("device", DEVICES)
def test_mixup_pairs_the_samples_of_a_lane(device: str) -> None:
    """Row (lane, j) is lambda of itself and 1 - lambda of (lane, j + n/2), in pixels and in labels alike."""
    lanes, per_lane = 3, 4
    labels = torch.arange(12, device=device)
    images = torch.eye(12, device=device).view(12, 12, 1, 1)
    kept = images.clone()
    chosen = AugmentSettings(mixup=0.8, mix_groups=1, smoothing=0)
    mixed, targets = mix_all(images, labels, lanes, 1, 12, chosen)
    assert torch.equal(images, kept), "the caller's images are left as they were"
    assert torch.allclose(mixed.flatten(1), targets)
    partner = torch.arange(12).view(lanes, per_lane).roll(per_lane // 2, 1).flatten().to(device)
    factors = targets[labels, labels]
    assert torch.unique(factors).numel() == 1
    assert 0 < factors[0] < 1
    assert torch.allclose(targets[labels, partner], 1 - factors)


def test_cutmix_weighs_labels_by_area() -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 16, 16)
    chosen = AugmentSettings(cutmix=1.0, smoothing=0)
    for step in range(5):
        mixed, targets = mix_all(images, torch.arange(4), 1, step, 4, chosen)
        own = (mixed == images).float().mean(dim=(1, 2, 3))
        assert torch.allclose(own, targets.diagonal())
        assert torch.unique(own).numel() == 1


def test_one_draw_per_step() -> None:
    images, labels = batch(2, 4)
    states = process_state()
    draws = [mix_all(images, labels, 2, step, 10, DEIT)[1] for step in (0, 1, 0)]
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    assert process_state() == states


@given(
    repeats=st.integers(1, 9), more=st.integers(0, 6), step=st.integers(0, 40), epoch=st.integers(0, 3)
)  # fmt: skip
def test_no_image_is_mixed_with_itself(repeats: int, more: int, step: int, epoch: int) -> None:
    """At any step of any lane, at every number of repeats whose pairs a lane can hold."""
    per_lane = 2 * (repeats + more)
    order = Order((per_lane * (step + 1) * 2,), 5, 2, 2 * per_lane, repeats)
    shown = torch.from_numpy(order.lane(epoch, 1)[step * per_lane : (step + 1) * per_lane, 1].copy())
    chosen = AugmentSettings(mixup=1.0, smoothing=0, repeats=repeats)
    pixels = torch.arange(per_lane, dtype=torch.float32).view(-1, 1, 1, 1)
    _, targets = mix(pixels, torch.arange(per_lane), lanes=range(1, 2), of=2, seed=epoch, step=step, classes=per_lane,
                     settings=chosen)  # fmt: skip
    for row, weights in enumerate(targets):
        (partner,) = set(weights.nonzero().flatten().tolist()) - {row} or {row}
        assert partner == row or shown[partner] != shown[row]


def test_each_group_of_lanes_has_its_own_draw() -> None:
    """6 lanes in 3 groups: one factor in each, and another one in each; without a number, the most up to 4 that fit."""
    images, labels = torch.rand(24, 1, 8, 8), torch.arange(24)
    for asked, groups in ((3, 3), (None, 3), (1, 1), (6, 6)):
        chosen = AugmentSettings(mixup=0.8, mix_groups=asked, smoothing=0)
        _, targets = mix_all(images, labels, 6, 1, 24, chosen)
        factors = targets.diagonal().view(groups, -1)
        assert torch.equal(factors.amin(1), factors.amax(1))
        assert len(factors[:, 0].unique()) == groups
    assert [AugmentSettings().groups(lanes) for lanes in (1, 2, 5, 6, 64)] == [1, 2, 1, 3, 4]


def test_the_mixed_mass_varies_from_step_to_step_as_with_deit() -> None:
    """The mean share of the lesser partner in a global batch, over 2,000 steps: a draw for each of four groups, as for
    each of DeiT's ranks, halves its spread."""
    images, labels = torch.zeros(64, 1, 8, 8), torch.arange(64)

    def spread(groups: int) -> float:
        chosen = AugmentSettings(mixup=0.8, cutmix=1.0, mix_groups=groups, smoothing=0)
        own = [mix_all(images, labels, 4, step, 64, chosen)[1].diagonal() for step in range(2000)]
        return float(np.std([torch.minimum(shares, 1 - shares).mean().item() for shares in own]))

    assert spread(1) == pytest.approx(0.155, abs=0.01)
    assert spread(4) == pytest.approx(0.078, abs=0.01)


def test_both_kinds_are_used_as_often_as_asked() -> None:
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 16, 16)
    chosen = AugmentSettings(mixup=0.8, cutmix=1.0, mix_probability=0.8, mix_switch=0.5)
    kinds = {"none": 0, "mixup": 0, "cutmix": 0}
    for step in range(300):
        values = mix_all(images, torch.arange(2), 1, step, 2, chosen)[0][1].unique()
        kinds["none" if values.tolist() == [1.0] else "mixup" if len(values) == 1 else "cutmix"] += 1
    assert 40 <= kinds["none"] <= 90, "a fifth, and the boxes that happen to be empty"
    assert 90 <= kinds["mixup"] <= 150
    assert 85 <= kinds["cutmix"] <= 150


def test_without_mixing_targets_are_smoothed_one_hot() -> None:
    images, labels = batch(1, 3)
    same, targets = mix_all(images, labels, 1, 0, 10, AugmentSettings(smoothing=0.1))
    assert same is images
    expected = torch.full((3, 10), 0.01)
    expected[torch.arange(3), labels] = 0.91
    assert torch.allclose(targets, expected)


def test_an_odd_number_per_lane_is_refused() -> None:
    images, labels = batch(2, 3)
    with pytest.raises(ValueError, match="6 samples in 2 lanes"):
        mix_all(images, labels, 2, 0, 10, DEIT)


# ---- low frequencies


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("cutoff", "kept"), [(4, (0, 1)), (5, (0, 1, 2)), (16, range(8)), (3, (0, 1)), (2, (0,))])
def test_waves_pass_that_the_band_can_hold(cutoff: int, kept: Sequence[int], device: str) -> None:
    place = torch.arange(16.0, device=device) * 2 * torch.pi / 16
    for frequency in range(8):
        wave = torch.cos(frequency * place).expand(2, 3, 12, 16).contiguous()
        for images in (wave, wave.transpose(-1, -2)):
            passed = low_pass(images, cutoff)
            assert passed.shape == images.shape
            assert torch.allclose(passed, images if frequency in kept else torch.zeros_like(images), atol=1e-5)


def test_what_has_passed_passes_again() -> None:
    images = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    once = low_pass(images, 16)
    assert torch.allclose(low_pass(once, 16), once, atol=1e-5)
    assert 0.2 < once.square().sum() / images.square().sum() < 0.4, "15 x 15 of 28 x 28 frequencies"
    assert low_pass(images.bfloat16(), 16).dtype == torch.bfloat16
