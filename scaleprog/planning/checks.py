"""Refuses recipes that cannot be trained, by what they say and what their model is; `plan.py` looks at the shards."""

from collections.abc import Sequence
from itertools import pairwise

from scaleprog.data.augment import normalization
from scaleprog.data.reader import decoded_bytes
from scaleprog.data.stream import Layout
from scaleprog.errors import RecipeError
from scaleprog.growth.space import Subnet
from scaleprog.models.cost import parameters
from scaleprog.models.elastic import ElasticModel
from scaleprog.recipe import Recipe
from scaleprog.recipe.keys import RegularizationSettings
from scaleprog.recipe.numbers import MOST_PIXELS, ceil_div

MOST_PARAMETERS, MOST_TOKENS = 10**11, 2**16
"""Limits of the complete model, and of an image: a recipe beyond them is a mistake, and too large to train."""
MOST_DECODED = 64 * 2**30
"""Most bytes of decoded images that one rank may hold in its host's memory."""


def check_size(recipe: Recipe, resolution: int, stride: int) -> None:
    """Raises RecipeError if images of `resolution` pixels a side are too large to train or evaluate."""
    tokens = (resolution // stride) ** 2
    if tokens > MOST_TOKENS or resolution > MOST_PIXELS:
        raise RecipeError(
            f"model: an image of {resolution} x {resolution} pixels in patches of {stride} has {tokens} tokens; "
            f"the limits are {MOST_PIXELS} pixels per side and {MOST_TOKENS} tokens"
        )
    check_decoded(recipe, resolution, recipe.data.lanes)


def check_decoded(recipe: Recipe, resolution: int, world: int) -> None:
    """Raises RecipeError if one of `world` ranks would hold more decoded images than `MOST_DECODED` allows."""
    batch = recipe.evaluate.batch
    for key, rows in (("train.batch", ceil_div(recipe.train.batch, world)), ("evaluate.batch", batch)):
        size = decoded_bytes(Layout(rows, resolution, recipe.model.channels), recipe.data)
        if size > MOST_DECODED:
            raise RecipeError(
                f"{key}: {rows} images of {resolution} x {resolution} pixels per rank, with data.prefetch "
                f"{recipe.data.prefetch}, take {size / 2**30:.0f} GiB decoded; the limit is "
                f"{MOST_DECODED / 2**30:.0f} GiB; lower {key} or data.prefetch"
            )


def check_model(recipe: Recipe, family: type[ElasticModel], full: Subnet, stride: int) -> None:
    """Raises RecipeError for a model that cannot be trained, even if each of its sizes is usual on its own."""
    if recipe.model.channels not in (1, 3):
        raise RecipeError(f"model.channels: {recipe.model.channels}; images have 1 channel (gray) or 3 (color)")
    normalization(recipe.augment, recipe.model.channels)
    check_size(recipe, full.resolution, stride)
    count = parameters(family, recipe.model, full.depth)
    if count > MOST_PARAMETERS:
        raise RecipeError(
            f"model: {recipe.model.name} with these sizes has {count:.3g} parameters, "
            f"{12 * count / 2**30:.3g} GiB with AdamW's moments; the limit is {MOST_PARAMETERS:.3g} parameters"
        )


def check_lanes_of(recipe: Recipe, family: type[ElasticModel]) -> None:
    """Raises RecipeError if the family cannot mix tokens, or a micro-batch cuts a lane whose images belong together."""
    name, micro_batch = recipe.model.name, recipe.train.micro_batch
    if recipe.augment.mix_token and not family.mixes_tokens:
        raise RecipeError(f"augment.mix_token: {name} cannot mix tokens; use augment.mixup or augment.cutmix")
    if recipe.data.token_labels and not family.labels_tokens:
        raise RecipeError(f"data.token_labels: {name} has no head for its tokens; leave it out, or use a VOLO")
    if recipe.data.token_labels and (recipe.augment.mixup or recipe.augment.cutmix):
        raise RecipeError("data.token_labels: Mixup and CutMix would leave the tokens' labels behind; use mix_token")
    lane = recipe.train.batch // recipe.data.lanes
    if family.whole_lanes and micro_batch is not None and micro_batch < lane:
        raise RecipeError(
            f"train.micro_batch: {micro_batch}, but {name} normalizes the {lane} images of a lane (train.batch / "
            f"data.lanes) together; use {lane} or more, or more data.lanes"
        )


def check_growth(recipe: Recipe, family: type[ElasticModel], full: Subnet, stride: int) -> None:
    """Raises RecipeError for growth settings that do not fit the model or each other."""
    growth, emas = recipe.growth, len(recipe.ema.momenta)
    if recipe.search.ema is not None and not -emas <= recipe.search.ema < emas:
        raise RecipeError(f"search.ema: {recipe.search.ema} is not an index of ema.momenta, which has {emas}")
    if recipe.search.budget is not None:
        asked = f"search.budget: {recipe.search.budget}"
        if recipe.search.method != "budget":
            raise RecipeError(f"{asked}, but search.method: {recipe.search.method} has no budget")
        if growth.schedule != "automatic":
            raise RecipeError(f"{asked}, but only growth.schedule: automatic has a budget")
    for key, multiple in (
        ("growth.resolution_multiple", growth.resolution_multiple),
        ("model.resolution", full.resolution),
    ):
        if multiple is not None and multiple % stride:
            raise RecipeError(f"{key}: {multiple} is not a multiple of the model's stride, {stride} pixels")
    if (growth.resolution_multiple or 0) > full.resolution:
        raise RecipeError(
            f"growth.resolution_multiple: {growth.resolution_multiple} is more than model.resolution, "
            f"{full.resolution}, so nothing could grow"
        )
    if isinstance(growth.schedule, tuple):
        _check_by_hand(recipe, full, stride)
    if growth.schedule == "automatic" and recipe.model.classes < 2:
        raise RecipeError(
            "growth.schedule: automatic compares losses, which are all 0 with model.classes: 1; use linear, or original"
        )
    if growth.patches == "subset" and not family.sees_subsets:
        raise RecipeError(
            f"growth.patches: subset, but the outlookers of {recipe.model.name} need the whole grid of patches; use "
            "growth.patches: resolution"
        )
    if growth.window is not None and growth.schedule != "linear" and not isinstance(growth.schedule, tuple):
        raise RecipeError(
            f"growth.window: needs stages to draw from, and growth.schedule: {growth.schedule} has none; use linear, "
            "or a list of stages"
        )
    if growth.window is not None and growth.adaptive_regularization:
        raise RecipeError(
            "growth.adaptive_regularization: true follows the stages, and growth.window draws from all of them at each "
            "step; use false"
        )
    mixed = ""
    if growth.window is not None:
        mixed = "growth.window"
    elif growth.schedule == "supernet" and growth.steps == "epochs":  # that cannot count compute anyway
        mixed = "growth.schedule: supernet"
    if recipe.optimizer.decay == "takeover" and mixed:
        raise RecipeError(
            f"optimizer.decay: takeover waits until the last network trains, and {mixed} draws from all of them at "
            "each step; set the part of the steps over which the rate falls, such as 0.2"
        )
    if growth.regularization_from != RegularizationSettings() and not growth.adaptive_regularization:
        raise RecipeError("growth.regularization_from: needs growth.adaptive_regularization: true")
    if growth.window is not None and recipe.parent is not None and recipe.parent.phases:
        raise RecipeError(
            "growth.window: cannot continue a run with other stages; take only its weights, with init.from"
        )
    if growth.curriculum and growth.patches != "subset":
        raise RecipeError(
            "growth.curriculum: needs growth.patches: subset; an image of low resolution holds no high frequencies"
        )


def check_groups(recipe: Recipe, family: type[ElasticModel], ladder: Sequence[Subnet]) -> None:
    """Raises RecipeError if a layer group would shrink from one network of the ladder to the next."""
    for few, more in pairwise(subnet.depth for subnet in ladder):
        before, after = family.split(few), family.split(more)
        if any(old > new for old, new in zip(before, after, strict=True)):
            both = ((few, before), (more, after))
            parts = (f"{depth} layers as {' + '.join(map(str, split))}" for depth, split in both)
            raise RecipeError(
                f"growth: {recipe.model.name} divides {' and '.join(parts)}, so a group would shrink; choose other "
                "growth.stages, growth.smallest, or depths"
            )


def _check_by_hand(recipe: Recipe, full: Subnet, stride: int) -> None:
    stages = recipe.growth.schedule
    assert isinstance(stages, tuple)
    for i, stage in enumerate(stages):
        if stage.resolution % stride or stage.resolution > full.resolution or stage.depth > full.depth:
            raise RecipeError(
                f"growth.schedule.{i}: {stage.resolution} px, {stage.depth} layers; use a multiple of {stride} px "
                f"up to {full.resolution} and at most {full.depth} layers"
            )
        if i and stage.depth < stages[i - 1].depth:
            raise RecipeError(
                f"growth.schedule.{i}: depth {stage.depth} after {stages[i - 1].depth}; it must not shrink"
            )
    complete = bool(stages) and stages[-1].depth == full.depth
    if not complete or (stages[-1].resolution != full.resolution and recipe.growth.patches != "subset"):
        raise RecipeError(f"growth.schedule: the last stage must be the complete model, {full}")
