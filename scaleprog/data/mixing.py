"""Mixes the images of a batch with each other: Mixup and CutMix (timm's), and the boxes of MixToken.

The result depends neither on the number of ranks nor on who owns which lane. timm draws from the global generator of
numpy; `mix` seeds it and restores it afterwards, so that the training process's own draws do not change.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from scaleprog.recipe.keys import AugmentSettings

_MIX = 1  # the purpose of a draw: keeps its seeds apart from those of `augment.py`


def mix(
    images: Tensor,
    labels: Tensor,
    *,
    lanes: range,
    of: int,
    seed: int,
    step: int,
    classes: int,
    settings: AugmentSettings,
) -> tuple[Tensor, Tensor]:
    """Applies Mixup or CutMix. The result depends neither on the number of ranks nor on who owns which lane.

    The lanes are cut into `mix_groups` contiguous groups. Each group draws once per step whether to mix, how, and how
    much, as each rank of DeiT does. The partners are samples j and j + n/2 of one lane with n samples. So, with R
    repeats of an image next to each other, no image is mixed with itself if n/2 >= R.

    Does not modify `images`; without Mixup and CutMix it returns the same tensor.

    Args:
        images: (B_local, C, r, r), lane-major.
        labels: (B_local,) int64.
        lanes: this rank's lanes, of which each contributes an even number of samples.
        of: V, the number of lanes over all ranks.
        seed, step: seed the draws; `step` counts over the whole run.
        classes: number of classes, the width of the targets.
        settings: mixup, cutmix, mix_groups, mix_probability, mix_switch and smoothing.

    Returns:
        images (B_local, C, r, r), and smoothed and mixed one-hot targets (B_local, classes) float32.

    Raises:
        ValueError: a lane contributes an odd number of samples.
    """
    if not settings.mixup and not settings.cutmix:
        return images, mixup_target(labels, classes, smoothing=settings.smoothing)
    per_lane, rest = divmod(len(images), len(lanes))
    if rest or per_lane % 2:
        raise ValueError(f"{len(images)} samples in {len(lanes)} lanes are not an even number each")
    mixup = Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        prob=settings.mix_probability,
        switch_prob=settings.mix_switch,
        label_smoothing=settings.smoothing,
        num_classes=classes,
    )
    groups, mixed, first = settings.groups(of), [], 0
    for group, members in groupby(lanes, key=lambda lane: lane * groups // of):
        rows = torch.arange(first, first := first + per_lane * len(list(members)), device=images.device)
        halves = rows.view(-1, 2, per_lane // 2)
        paired = torch.cat((halves[:, 0].flatten(), halves[:, 1].flatten().flip(0)))  # timm mixes row i with B - 1 - i
        with _seeded(seed, _MIX, step, group):
            pixels, targets = mixup(images[paired], labels[paired])
        back = torch.argsort(paired)
        mixed.append((pixels[back], targets[back]))
    return torch.cat([pixels for pixels, _ in mixed]), torch.cat([targets for _, targets in mixed])


def token_boxes(
    rows: int, side: int, *, lanes: range, of: int, seed: int, step: int, settings: AugmentSettings
) -> tuple[Tensor, Tensor]:
    """Draws MixToken's boxes (arXiv 2104.10858), one per group of lanes; partners are those of `mix`.

    Args:
        rows: B_local, this rank's images, lane-major.
        side: tokens on a side of the grid.
        lanes, of, seed, step, settings: as in `mix`.

    Returns:
        partner (B_local,) int64, the row of each image's partner; inside (B_local, side, side) bool, the box.
    """
    per_lane, groups = rows // len(lanes), settings.groups(of)
    partner = torch.arange(rows).view(len(lanes), 2, per_lane // 2).flip(1).flatten()
    boxes = []
    for lane in lanes:
        rng = np.random.default_rng((seed, _MIX, step, lane * groups // of))
        cut = int(side * (1 - rng.beta(1.0, 1.0)) ** 0.5) if rng.random() < settings.mix_probability else 0
        top, left = (int(rng.integers(side)) for _ in range(2))
        box = torch.zeros(side, side, dtype=torch.bool)
        box[
            max(0, top - cut // 2) : max(0, top + (cut + 1) // 2),
            max(0, left - cut // 2) : max(0, left + (cut + 1) // 2),
        ] = True
        boxes.append(box.expand(per_lane, -1, -1))
    return partner, torch.cat(boxes)


@contextmanager
def _seeded(*entropy: int) -> Iterator[None]:
    """Seeds the global generators of `random`, numpy and torch (CPU) from `entropy`, and restores them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    first, second, third = np.random.SeedSequence(entropy).generate_state(3).tolist()
    try:
        random.seed(first)
        np.random.seed(second)
        torch.default_generator.manual_seed(third)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
