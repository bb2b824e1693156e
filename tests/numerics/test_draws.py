"""What training draws, against timm's and DeiT's own functions: 5,000 draws each, with fixed seeds.

Numbers are compared by the Kolmogorov-Smirnov test and kinds by chi-squared; a p-value below 1e-4 fails. There are 71
comparisons, so chance alone would fail one choice of seeds in 140. Each of them must also reject wrong draws.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from copy import copy
from pathlib import Path
from typing import Any
from unittest import mock
from zlib import crc32

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.stats import chi2_contingency, ks_2samp, spearmanr
from timm.data import Mixup, create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.random_erasing import RandomErasing
from timm.scheduler import create_scheduler_v2
from torchvision.transforms import ColorJitter, RandomCrop

from scaleprog.data.augment import Augmentation, BatchRequest, Draw, random_box
from scaleprog.data.mixing import _seeded, mix
from scaleprog.data.on_device import erase
from scaleprog.data.operations import Operation
from scaleprog.data.order import Order
from scaleprog.data.origin import MOVES
from scaleprog.data.policies import KINDS, RandAugment
from scaleprog.recipe import Recipe
from scaleprog.recipe.keys import AugmentSettings, OptimizerSettings
from scaleprog.sharding.optimizer import learning_rate

RECIPE = Path(__file__).parents[2] / "configs/imagenet/deit_small_original_100.yaml"
ALPHA = 1e-4
DRAWS, LANES, STEPS = 5000, 25, 4
PER_LANE = DRAWS // LANES // STEPS

Draws = dict[str, np.ndarray]
"""By name, numbers (float) or kinds (str)."""


@pytest.fixture(scope="module")
def deit() -> AugmentSettings:
    return Recipe.load(RECIPE).augment


@pytest.fixture(scope="module")
def timm_transform() -> Any:
    """As DeiT's datasets.py builds it."""
    return create_transform(
        224,
        is_training=True,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seeds timm's draws, in each test its own way."""
    with _seeded(crc32(request.node.name.encode())):
        yield


def p_value(ours: np.ndarray, theirs: np.ndarray) -> float:
    """That two samples come from one distribution. Kinds with fewer than 10 samples count as one kind."""
    if ours.dtype.kind == "f":
        return float(ks_2samp(ours, theirs, method="asymp").pvalue)
    kinds = sorted({*ours.tolist(), *theirs.tolist()})
    table = np.array([[(draws == kind).sum() for kind in kinds] for draws in (ours, theirs)])
    rare = table.sum(0) < 10
    table = np.column_stack((table[:, ~rare], table[:, rare].sum(1)))
    table = table[:, table.sum(0) > 0]
    return float(chi2_contingency(table).pvalue) if table.shape[1] > 1 else 1.0


def p_values(ours: Draws, theirs: Draws) -> dict[str, float]:
    assert ours.keys() == theirs.keys()
    return {name: p_value(ours[name], theirs[name]) for name in ours}


def assert_alike(ours: Draws, theirs: Draws) -> None:
    values = p_values(ours, theirs)
    print({name: float(f"{value:.2g}") for name, value in values.items()})
    assert min(values.values()) > ALPHA, values


def assert_differ(ours: Draws, theirs: Draws, *names: str) -> None:
    """The test of each of these quantities rejects that the draws are alike."""
    values = p_values(ours, theirs)
    assert max(values[name] for name in names) < ALPHA, values


def draws(settings: AugmentSettings, side: int, **request: float) -> list[Draw]:
    """What training draws for all lanes and steps, for images of `side` pixels a side."""
    augmentation = Augmentation(settings, 3, seed=5)
    return [
        draw
        for step in range(STEPS)
        for lane in range(LANES)
        for draw in augmentation.draws(BatchRequest(2, step, side, **request), lane, PER_LANE)
    ]


def boxes(settings: AugmentSettings, size: tuple[int, int] = (375, 500)) -> np.ndarray:
    """The boxes (left, top, right, bottom) of all crops of images of one (height, width)."""
    return np.array([random_box(settings, 224, *size, draw.crop) for draw in draws(settings, 224)], dtype=float)


# ---- crop and flip


def shapes(boxes: np.ndarray, size: tuple[int, int]) -> Draws:
    """`boxes`: (left, top, right, bottom)."""
    height, width = size
    left, top, w, h = boxes[:, 0], boxes[:, 1], boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    return {
        "area": w * h / (width * height),
        "aspect": w / h,
        "across": left[w < width] / (width - w)[w < width],
        "down": top[h < height] / (height - h)[h < height],
    }


def crops(settings: AugmentSettings, size: tuple[int, int]) -> Draws:
    flipped = np.array([draw.flipped for draw in draws(settings, 224)])
    return {**shapes(boxes(settings, size), size), "flip": flipped.astype(str)}


def timm_crops(transform: Any, size: tuple[int, int]) -> Draws:
    crop, flip = transform.transforms[:2]
    image = Image.new("RGB", size[::-1])
    draws = np.array([crop.get_params(image, crop.scale, crop.ratio) for _ in range(DRAWS)], dtype=float)
    top, left, h, w = draws.T
    marked = torch.tensor([[[0, 1]]])
    return {
        **shapes(np.stack((left, top, left + w, top + h), 1), size),
        "flip": np.array([bool(flip(marked)[0, 0, 0]) for _ in range(DRAWS)]).astype(str),
    }


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (900, 200)])
def test_crops_and_flips(deit: AugmentSettings, timm_transform: Any, size: tuple[int, int]) -> None:
    """The last size is so narrow that many crops fall back to the center."""
    ours, theirs = crops(deit, size), timm_crops(timm_transform, size)
    assert_alike(ours, theirs)
    for wrong, name in (
        ({"scale": (0.16, 1.0)}, "area"),
        ({"ratio": (0.6, 1 / 0.6)}, "aspect"),
        ({"flip": 0.55}, "flip"),
    ):
        assert_differ(crops(deit.model_copy(update=wrong), size), theirs, name)
    moved = {name: 0.9 * ours[name] for name in ("across", "down")}
    assert_differ({**ours, **moved}, theirs, "across", "down")


def test_neighbors_draw_independently(deit: AugmentSettings) -> None:
    """The widths of the crops of neighbors in a lane, of neighboring lanes, and of neighboring steps."""
    found = boxes(deit)
    widths = (found[:, 2] - found[:, 0]).reshape(STEPS, LANES, PER_LANE)
    for axis in range(3):
        along = np.moveaxis(widths, axis, 0)
        assert spearmanr(along[1:].ravel(), along[:-1].ravel()).pvalue > ALPHA
        pairwise = along[np.arange(len(along)) // 2 * 2]  # as if two neighbors shared their draws
        assert spearmanr(pairwise[1:].ravel(), pairwise[:-1].ravel()).pvalue < ALPHA


def test_a_simple_crop(deit: AugmentSettings) -> None:
    """DeiT III's, at its resolution: the shorter side resized to 224, mirrored 4 pixels beyond the edges, cut out."""
    found = boxes(deit.model_copy(update={"crop": "simple"}), (224, 300))
    padded = torch.empty(3, 224 + 8, 300 + 8)
    theirs = np.array([RandomCrop.get_params(padded, (224, 224))[:2] for _ in range(DRAWS)], dtype=float) - 4
    assert set(found[:, 3] - found[:, 1]) == set(found[:, 2] - found[:, 0]) == {224.0}
    ours = {"across": found[:, 0], "down": found[:, 1].astype(str)}
    assert_alike(ours, {"across": theirs[:, 1], "down": theirs[:, 0].astype(str)})
    moved = {"across": theirs[:, 1] + 4, "down": (theirs[:, 0] + 1).astype(str)}
    assert_differ(ours, moved, "across", "down")


# ---- operations

SIGNED = tuple(MOVES)
ENHANCED = ("color", "contrast", "brightness", "sharpness")


def timm_operations(policy: timm.data.auto_augment.RandAugment) -> list[list[Operation]]:
    """The operations that timm applies to images, under our names."""
    images: list[list[Operation]] = []

    def note(op: timm.data.auto_augment.AugmentOp) -> Callable[..., Any]:
        name, _ = KINDS[op.name]
        return lambda image, amount=0.0, **_: images[-1].append(Operation(name, amount)) or image

    with ExitStack() as stack:
        for op in policy.ops:
            stack.enter_context(mock.patch.object(op, "aug_fn", note(op)))
        for _ in range(DRAWS):
            images.append([])
            policy(Image.new("RGB", (8, 8)))
    return images


def described(images: Sequence[Sequence[Operation]]) -> Draws:
    """How many operations an image gets, which, how strong, and with which sign."""
    applied = [operation for image in images for operation in image]
    found = {
        "count": np.array([str(len(image)) for image in images]),
        "operation": np.array([name for name, _ in applied]),
        "pair": np.array(["-".join(str(name in SIGNED) for name, _ in image) for image in images if len(image) == 2]),
    }
    signed = [(name, amount - (name in ENHANCED)) for name, amount in applied if name in SIGNED + ENHANCED]
    found["sign"] = np.array([f"{name}{'-' if amount < 0 else '+'}" for name, amount in signed])
    for name in SIGNED + ENHANCED:
        found[f"strength of {name}"] = np.array([abs(amount) for other, amount in signed if other == name])
    for name in ("posterize", "solarize", "solarize_add"):
        least = name == "posterize"  # timm asks for 0 bits at the end of its scale, which Pillow refuses
        found[f"strength of {name}"] = np.array([str(int(max(least, a))) for other, a in applied if other == name])
    return found


@pytest.mark.parametrize(
    ("factor", "config", "same"),
    [
        (1.0, "rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1"),
        (2 / 3, "rand-m9-mstd0.5-inc1", "rand-m6-mstd0.5-inc1"),  # AdaReg's factor
        (1.0, "rand-m12-mmax15-n3-p0.7", "rand-m12-mmax15-n3-p0.7"),
        (1.0, "rand-m9-mstd101-inc1", "rand-m9-mstd101-inc1"),
    ],
)
def test_randaugment(deit: AugmentSettings, factor: float, config: str, same: str) -> None:
    settings = deit.model_copy(update={"randaugment": config})
    ours = described([draw.operations for draw in draws(settings, 8, magnitude=factor)])
    theirs = described(timm_operations(rand_augment_transform(same)))
    assert_alike(ours, theirs)


@pytest.mark.parametrize("config", ["rand-m9-mstd0.5-t3aw", "rand-n5-m9-mstd1-tweights", "rand-t3a-n1-m5-mstd1-p1.0"])
def test_randaugment_with_other_operations(deit: AugmentSettings, config: str) -> None:
    """Those with weights are drawn without repetition."""
    found = []
    for images in (
        [draw.operations for draw in draws(deit.model_copy(update={"randaugment": config}), 8)],
        timm_operations(rand_augment_transform(config)),
    ):
        names = np.array([operation.name for image in images for operation in image])
        count = np.array([str(len(image)) for image in images])
        found.append({"operation": names, "count": count})
    assert_alike(*found)


def test_the_comparisons_of_randaugment_reject_others() -> None:
    config = "rand-m9-mstd0.5-inc1"
    theirs = described(timm_operations(rand_augment_transform(config)))
    strengths = [name for name in theirs if name.startswith("strength of")]
    assert_differ(described(timm_operations(rand_augment_transform("rand-m5-mstd0.5-inc1"))), theirs, *strengths)
    assert_differ(described(timm_operations(rand_augment_transform(config + "-p0.55"))), theirs, "count")
    thrice = rand_augment_transform(config)
    thrice.ops[:2] = [copy(op) for op in thrice.ops if op.name == "Rotate"] * 2
    assert_differ(described(timm_operations(thrice)), theirs, "operation", "pair")
    with mock.patch("timm.data.auto_augment._randomly_negate", lambda value: value):
        assert_differ(described(timm_operations(rand_augment_transform(config))), theirs, "sign")


def test_deits_transform_is_this_randaugment(deit: AugmentSettings, timm_transform: Any) -> None:
    """The same operations with the same probability and magnitudes."""
    ours = RandAugment(deit.randaugment)
    (theirs,) = [step for step in timm_transform.transforms if isinstance(step, timm.data.auto_augment.RandAugment)]
    assert (ours.most, ours.magnitude) == (theirs.num_layers, theirs.ops[0].magnitude) == (2, 9)
    names = ("name", "prob", "magnitude", "magnitude_std", "magnitude_max")
    for op, other in zip(ours.operations, theirs.ops, strict=True):
        assert [getattr(op, name) for name in names] == [getattr(other, name) for name in names]
    assert {op.kwargs["fillcolor"] for op in theirs.ops} == {Augmentation(deit, 3).fill}


def test_color_jitter() -> None:
    """The order and the factors, against torchvision's."""
    settings = AugmentSettings(color_jitter=0.4)
    jitter = ColorJitter(0.4, 0.4, 0.4)
    names = ("brightness", "contrast", "color")
    theirs = []
    for _ in range(DRAWS):
        order, *factors, _ = jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, None)
        theirs.append([Operation(names[kind], factors[kind]) for kind in order.tolist() if kind < 3])
    found = []
    for images in ([draw.operations for draw in draws(settings, 8)], theirs):
        factors = {name: np.array([dict(image)[name] for image in images]) for name in names}
        found.append({**factors, "order": np.array(["-".join(name for name, _ in image) for image in images])})
    assert_alike(*found)
    assert_differ({**found[0], "color": found[0]["color"] + 0.05}, found[1], "color")
    assert_differ({**found[0], "order": np.roll(np.sort(found[0]["order"]), 500)[:4000]}, found[1], "order")


def test_three_augment() -> None:
    """One of three with equal probability, the blur as in DeiT III's code, then the jitter."""
    images = [draw.operations for draw in draws(AugmentSettings(three_augment=True, color_jitter=0.3), 8)]
    assert {len(image) for image in images} == {4}
    ours = {
        "kind": np.array([image[0].name for image in images]),
        "blur": np.array([image[0].amount for image in images if image[0].name == "blur"]),
    }
    theirs = {
        "kind": np.random.choice(["color", "solarize", "blur"], DRAWS),
        "blur": np.random.uniform(0.1, 2.0, DRAWS),
    }
    assert_alike(ours, theirs)
    assert {image[0] for image in images if image[0].name != "blur"} == {("color", 0.0), ("solarize", 128.0)}


# ---- random erasing

ERASED = 48  # pixels


def rectangles(images: torch.Tensor) -> Draws:
    """The erased rectangles of (N, 3, H, W) images that had one value everywhere."""
    changed = (images != images[:, :, -1:, -1:].median(0).values).any(1).numpy()
    rows, columns = changed.any(2), changed.any(1)
    erased = changed.any((1, 2))
    height, width = rows.sum(1)[erased], columns.sum(1)[erased]
    assert (height * width == changed.sum((1, 2))[erased]).all(), "one rectangle each"
    noise = images.permute(0, 2, 3, 1)[torch.from_numpy(changed)]
    return {
        "erased": erased.astype(str),
        "area": height * width / changed[0].size,
        "aspect": height / width,
        "down": rows.argmax(1)[erased] / (changed.shape[1] - height),
        "across": columns.argmax(1)[erased] / (changed.shape[2] - width),
        "noise": noise[:: max(1, len(noise) // DRAWS)].flatten().double().numpy(),
    }


def erasings(settings: AugmentSettings, factor: float = 1.0) -> Draws:
    images = torch.zeros(DRAWS, 3, ERASED, ERASED)
    erase(images, torch.tensor([draw.erasing for draw in draws(settings, ERASED, erase=factor)]))
    return rectangles(images)


def timm_erasings(transform: RandomErasing) -> Draws:
    return rectangles(torch.stack([transform(torch.zeros(3, ERASED, ERASED)) for _ in range(DRAWS)]))


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_random_erasing(deit: AugmentSettings, timm_transform: Any, factor: float) -> None:
    """The factor is AdaReg's."""
    (published,) = [step for step in timm_transform.transforms if isinstance(step, RandomErasing)]
    assert (published.min_count, published.max_count) == (1, 1)
    published.device = "cpu"
    with mock.patch.object(published, "probability", published.probability * factor):
        theirs = timm_erasings(published)
    ours = erasings(deit, factor)
    assert_alike(ours, theirs)

    assert_differ(erasings(deit.model_copy(update={"erase": 0.25 + 0.05 / factor}), factor), theirs, "erased")
    for name, wrong in (("area", {"max_area": 0.45}), ("aspect", {"min_aspect": 0.5})):
        assert_differ(timm_erasings(RandomErasing(0.25 * factor, mode="pixel", device="cpu", **wrong)), theirs, name)
    moved = {name: 0.8 * ours[name] for name in ("across", "down", "noise")}
    assert_differ({**ours, **moved}, theirs, *moved)


# ---- Mixup and CutMix

SIDE, GROUPS = 32, 4
MIXED = DRAWS // GROUPS  # steps


def pairs(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(2 * number, 1, SIDE, SIDE) images and labels: black images of label 0 beside white ones of label 1."""
    labels = torch.arange(2).repeat(number)
    return labels.float().view(-1, 1, 1, 1).expand(-1, 1, SIDE, SIDE).clone(), labels


def mixings(images: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.1) -> Draws:
    """The draws behind mixed pairs: (N, 2, 1, SIDE, SIDE) images and (N, 2, 2) targets."""
    black = images[:, 0, 0].numpy()
    share = (targets[:, 0, 0].double().numpy() - smoothing / 2) / (1 - smoothing)
    assert np.allclose(black.mean((1, 2)), 1 - share, atol=1e-5), "labels are mixed as pixels are"
    assert torch.allclose(images[:, 1], 1 - images[:, 0], atol=1e-5), "the partner gets the rest"
    box = black.min((1, 2)) < black.max((1, 2))
    mixed = ~box & (np.abs(share - 0.5) < 0.5 - 1e-6)
    rows, columns = black[box].any(2), black[box].any(1)
    height, width = rows.sum(1), columns.sum(1)
    assert np.array_equal(height * width, black[box].sum((1, 2))), "one rectangle each"
    return {
        "kind": np.where(box, "cutmix", np.where(mixed, "mixup", np.where(share > 0.5, "none", "all"))),
        "share of mixup": share[mixed],
        "share of cutmix": share[box],
        "height": height / SIDE,
        "aspect": height / width,
        "down": rows.argmax(1) + height / 2,
        "across": columns.argmax(1) + width / 2,
        "mass of a batch": np.minimum(share, 1 - share).reshape(-1, GROUPS).mean(1),
    }


def our_mixings(settings: AugmentSettings) -> Draws:
    """As training mixes, with one pair in each of four lanes."""
    images, labels = pairs(GROUPS)
    steps = [
        mix(images, labels, lanes=range(GROUPS), of=GROUPS, seed=3, step=step, classes=2, settings=settings)
        for step in range(MIXED)
    ]
    mixed = torch.stack([images for images, _ in steps]).view(-1, 2, 1, SIDE, SIDE)
    return mixings(mixed, torch.stack([targets for _, targets in steps]).view(-1, 2, 2))


def test_mixup_and_cutmix(deit: AugmentSettings) -> None:
    """Four lanes against four ranks of DeiT. The mass of a batch is the mean share of the lesser partner, which shows
    that each group of lanes draws its own."""
    published = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, label_smoothing=0.1, num_classes=2)
    calls = [published(*pairs(1)) for _ in range(MIXED * GROUPS)]
    theirs = mixings(torch.stack([images for images, _ in calls]), torch.stack([targets for _, targets in calls]))
    ours = our_mixings(deit)
    assert_alike(ours, theirs)

    wrong = our_mixings(deit.model_copy(update={"mix_switch": 0.6, "mixup": 0.4, "cutmix": 0.4}))
    assert_differ(wrong, theirs, "kind", "share of mixup", "share of cutmix", "height")
    wrong = our_mixings(deit.model_copy(update={"mix_probability": 0.95, "mix_groups": 1}))
    assert_differ(wrong, theirs, "kind", "mass of a batch")
    moved = {name: 0.9 * ours[name] for name in ("down", "across", "aspect")}
    assert_differ({**ours, **moved}, theirs, *moved)


# ---- repeated augmentation

IMAGES, RANKS, BATCH, REPEATS = 5120, 4, 64, 3  # DeiT's sampler drops what does not fill 256


def our_order(repeats: int = REPEATS, shard: int = 8) -> Order:
    return Order((shard,) * (IMAGES // shard), seed=1, lanes=RANKS, batch=BATCH, repeats=repeats)


def our_epoch(order: Order, epoch: int) -> np.ndarray:
    """(ranks, samples of a rank): the images that each rank sees, in order."""
    rows = np.stack([order.lane(epoch, lane) for lane in range(order.lanes)])
    return rows[..., 0] * order.counts[0] + rows[..., 1]


def deit_epoch(epoch: int, repeats: int = REPEATS) -> np.ndarray:
    """As `our_epoch`. timm's sampler is DeiT's."""
    ranks = [RepeatAugSampler(range(IMAGES), RANKS, rank, num_repeats=repeats) for rank in range(RANKS)]
    for sampler in ranks:
        sampler.set_epoch(epoch)
    return np.array([list(sampler) for sampler in ranks])


def test_repeats_of_an_epoch() -> None:
    """An epoch has as many samples as DeiT's, of as many images, each three times, and a batch holds as many images.

    Only the ranks differ: DeiT shows the versions of an image to different ranks, and a lane shows all of them to one.
    """
    ours, theirs = our_epoch(our_order(), 0), deit_epoch(0)
    assert ours.shape == theirs.shape == (RANKS, IMAGES // RANKS)
    for epoch, cut in ((ours, RANKS), (theirs, 1)):
        counts = np.unique_counts(epoch).counts
        assert (counts != REPEATS).sum() <= cut, "only where an epoch ends within the versions of an image"
        assert abs(len(counts) - IMAGES / REPEATS) <= cut
    for start in range(0, ours.shape[1], BATCH // RANKS):
        step = slice(start, start + BATCH // RANKS)
        shown, of_deit = (len(np.unique(epoch[:, step])) for epoch in (ours, theirs))
        assert of_deit <= shown <= of_deit + 2 * RANKS, "a lane's batch begins and ends within the versions of an image"
    assert all(len(np.unique(rank)) == len(rank) for rank in theirs)
    assert all(abs(len(np.unique(rank)) - len(rank) / REPEATS) < 1 for rank in ours)
    assert len(np.unique(ours)) == sum(len(np.unique(rank)) for rank in ours), "no image is in two lanes"
    assert len(np.unique(our_epoch(our_order(2), 0))) > 1.4 * len(np.unique(theirs))


def test_repeats_over_the_epochs() -> None:
    """How often an image is shown in 30 epochs; of ours, one image per shard, since a shard's images come together."""

    def shown(epochs: list[np.ndarray], every: int) -> Draws:
        counts = np.bincount(np.concatenate(epochs, axis=None), minlength=IMAGES)[::every] // REPEATS
        return {"epochs": counts.astype(str)}

    theirs = shown([deit_epoch(epoch) for epoch in range(30)], 1)
    assert_alike(shown([our_epoch(our_order(), epoch) for epoch in range(30)], 8), theirs)
    assert_differ(shown([our_epoch(our_order(2), epoch) for epoch in range(30)], 8), theirs, "epochs")


def test_an_image_is_never_mixed_with_itself(deit: AugmentSettings) -> None:
    """Over an epoch, with the fewest samples per lane that repeats allow. With two samples less, or in the order of
    timm's pairs, images meet themselves."""
    settings = deit.model_copy(update={"cutmix": 0.0, "smoothing": 0.0})

    def ours(images: torch.Tensor, labels: torch.Tensor, lanes: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = {"lanes": range(lanes), "of": lanes, "seed": 3, "step": 0, "settings": settings}
        return mix(images, labels, classes=len(labels), **chosen)

    def timms(images: torch.Tensor, labels: torch.Tensor, _: int) -> tuple[torch.Tensor, torch.Tensor]:
        return Mixup(mixup_alpha=0.8, label_smoothing=0.0, num_classes=len(labels))(images, labels)

    def selves(mixed: Callable[..., tuple[torch.Tensor, torch.Tensor]], lanes: int, per_lane: int) -> int:
        """The samples of an epoch whose partner is the same image."""
        order = Order((8,) * 60, seed=1, lanes=lanes, batch=lanes * per_lane, repeats=REPEATS)
        epoch, met = our_epoch(order, 0), 0
        for start in range(0, epoch.shape[1], per_lane):
            shown = epoch[:, start : start + per_lane].ravel()
            _, targets = mixed(torch.zeros(len(shown), 1, 1, 1), torch.arange(len(shown)), lanes)
            first, second = targets.topk(2).indices.T.numpy()
            met += int((shown[first] == shown[second]).sum())
        return met

    assert selves(ours, RANKS, 2 * REPEATS) == 0
    assert selves(ours, 1, 2 * REPEATS + 2) == 0
    assert selves(ours, RANKS, 2 * REPEATS - 2) > 0
    assert selves(timms, 1, 2 * REPEATS + 2) > 0


# ---- learning rate

EPOCH = 1251  # steps, of ImageNet in batches of 1,024


def timm_rates(lr: float, epochs: int, warmup: int, cooldown: int, delay: int = 0) -> np.ndarray:
    """The rate of every step, by timm's scheduler as its train script calls it.

    `delay`: epochs by which it is called late, as in DeiT's main.py, which has no cool-down.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, total = create_scheduler_v2(
        optimizer, "cosine", epochs, cooldown_epochs=cooldown, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=warmup
    )
    rates = []
    for epoch in range(total):
        rates += [optimizer.param_groups[0]["lr"]] * EPOCH
        scheduler.step(epoch + 1 - delay)
    return np.array(rates)


def our_rates(lr: float, epochs: int, warmup: int, cooldown: int, schedule: str = "timm") -> np.ndarray:
    settings = OptimizerSettings(
        lr=lr, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=warmup, cooldown_epochs=cooldown, schedule=schedule
    )
    steps = (epochs + cooldown) * EPOCH
    return np.array([learning_rate(settings, position, steps, EPOCH) for position in range(steps)])


@pytest.mark.parametrize(
    "run", [(1e-3, 300, 5, 0), (1e-3, 100, 5, 0), (1.6e-3, 300, 20, 10), (1.6e-3, 100, 20, 10)],
    ids=["DeiT-S", "DeiT-S, 100 epochs", "VOLO-D1", "VOLO-D1, 100 epochs"],
)  # fmt: skip
def test_the_rate_of_every_step_of_a_run(run: tuple[float, int, int, int]) -> None:
    ours = our_rates(*run)
    theirs = timm_rates(*run)
    assert ours.shape == theirs.shape
    assert np.abs(ours / theirs - 1).max() < 1e-9
    lr, epochs, warmup, cooldown = run
    for wrong in (our_rates(lr, epochs, warmup + 1, cooldown), our_rates(*run, schedule="smooth")):
        assert np.abs(wrong / theirs - 1).max() > 0.01


def test_the_rates_of_deit_come_one_epoch_later() -> None:
    """DeiT's main.py steps its scheduler to epoch e after epoch e, so that epochs 0 and 1 have the first rate."""
    ours, theirs = our_rates(1e-3, 100, 5, 0), timm_rates(1e-3, 100, 5, 0, delay=1)
    assert np.abs(ours[:-EPOCH] / theirs[EPOCH:] - 1).max() < 1e-9
    assert (theirs[: 2 * EPOCH] == 1e-6).all()
