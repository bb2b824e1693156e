"""What a step feeds to the network: batches, mixed images, layers and patches left out, micro-batches."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

from timm.data.mixup import mixup_target
from torch import Tensor

from scaleprog.data.augment import BatchRequest
from scaleprog.data.mixing import mix, token_boxes
from scaleprog.data.on_device import low_pass, sent
from scaleprog.data.stream import Batch
from scaleprog.data.token_labels import targets as token_targets
from scaleprog.data.token_labels import unpack
from scaleprog.growth.phase import Phase
from scaleprog.growth.space import View
from scaleprog.models import resolve_family
from scaleprog.models.elastic import Targets, TokenMix, draw_patches, drop_scales
from scaleprog.recipe.numbers import ceil_div
from scaleprog.training.process import Run


class PhaseRequests:
    """The batch requests of a phase, from the current step on; every worker iterates over them from the start."""

    def __init__(self, run: Run, phase: Phase) -> None:
        self._phase, self._first, self._seed = phase, run.state.step, run.recipe.seed
        self._schedule, self._epoch = run.plan.schedule, run.plan.order.steps_per_epoch

    def __iter__(self) -> Iterator[BatchRequest]:
        strength = self._phase.regularization
        for step in range(self._first, self._phase.stop):
            epoch, within = divmod(self._phase.position_of(step), self._epoch)
            pixels = self._schedule.view(self._phase.subnet(self._seed, step)).pixels
            yield BatchRequest(epoch, within, pixels, strength.magnitude, strength.erase)


def mixed_batch(run: Run, batch: Batch, view: View) -> tuple[Tensor, Targets, TokenMix | None]:
    """This rank's part of a batch as a network of `view` sees it, and what the network should answer."""
    recipe, device = run.recipe, run.backend.device
    images, labels = run.plan.data.images(batch, device), batch.labels.to(device, non_blocking=True)
    drawn: dict[str, Any] = {
        "lanes": run.reader.lanes,
        "of": recipe.data.lanes,
        "seed": recipe.seed,
        "step": run.state.step,
        "settings": recipe.augment,
    }
    mixed = None
    if recipe.augment.mixup or recipe.augment.cutmix:
        images, target = mix(images, labels, classes=recipe.model.classes, **drawn)
        targets = Targets(target, target)
    else:
        targets = _own_targets(run, labels, batch.token_labels, view)
        if recipe.augment.mix_token:
            side = _tokens_beside(run, view)
            partner, inside = (sent(part, device) for part in token_boxes(len(labels), side, **drawn))
            share, own = inside.flatten(1).float().mean(1, keepdim=True), targets.own
            targets, mixed = replace(targets, mixed=own.lerp(own[partner], share)), TokenMix(partner, inside)
    return images if view.cutoff is None else low_pass(images, view.cutoff), targets, mixed


def _tokens_beside(run: Run, view: View) -> int:
    """How many tokens lie side by side in an image as `view` shows it."""
    return view.pixels // resolve_family(run.recipe.model)[2]


def _own_targets(run: Run, labels: Tensor, token_labels: Tensor, view: View) -> Targets:
    """What a network of `view` should answer to images that are not mixed.

    `labels`: on the device; `token_labels`: the batch's, see `Batch`.
    """
    classes, smoothing = run.recipe.model.classes, run.recipe.augment.smoothing
    shards = run.plan.data.token_labels
    if shards is None:
        own = mixup_target(labels, classes, smoothing=smoothing)
        return Targets(own, own)
    maps, origins = unpack(token_labels.to(labels.device, non_blocking=True), shards.grid)
    own, tokens = token_targets(maps, origins, _tokens_beside(run, view), classes, smoothing)
    return Targets(own, own, tokens)


def micro_batches(rows: int, most: int | None, unit: int = 1) -> list[slice]:
    """Cuts a rank's rows of a batch into the fewest slices of at most `most` rows (None: one), of nearly equal size.

    Each has a multiple of `unit` rows.
    """
    units = rows // unit
    count = ceil_div(units, max(1, (most or rows) // unit))
    bounds = [unit * (units * i // count) for i in range(count + 1)]
    return [slice(*bound) for bound in pairwise(bounds)]


def drop_rows(run: Run, phase: Phase, rows: int) -> Tensor | None:
    """This rank's part (layers, 2, rows) of the step's stochastic-depth scales; None if no layer is ever dropped."""
    rate = run.recipe.model.drop_path * phase.regularization.drop_path
    if not rate:
        return None
    family, depth = run.plan.family, phase.network.depth
    rates = family.drop_rates(rate, family.split(depth))
    scales = drop_scales(rates, run.recipe.train.batch, run.recipe.seed, run.state.step)
    if scales is None:
        return None
    first = run.coordinator.rank * rows
    return sent(scales[:, :, first : first + rows], run.backend.device)


def patches_seen(run: Run, view: View, epoch: int, step: int) -> Tensor | None:
    """Which patches of this rank's images the network sees: (images, patches) indices, ascending; None: all patches.

    `step` counts from the start of `epoch`.
    """
    side = run.plan.schedule.patch
    if view.patches is None or side is None:
        return None
    total, order = (view.pixels // side) ** 2, run.plan.order
    kept = draw_patches(view.patches, total, run.reader.lanes, order.per_lane, run.recipe.seed, epoch, step)
    return sent(kept, run.backend.device)
