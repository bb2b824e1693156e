"""What a run that is out of memory can do about it, and how much memory each way would save by the cost model."""

from typing import Any

import torch
from pydantic import ValidationError

from scaleprog.errors import RecipeError
from scaleprog.growth.space import Subnet
from scaleprog.models.elastic import ElasticModel
from scaleprog.planning.cost_model import images_at_a_time, predict
from scaleprog.planning.devices import Device
from scaleprog.recipe import Recipe
from scaleprog.recipe.numbers import ceil_div

EXHAUSTED = (
    "DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)  # fmt: skip
"""What the RuntimeErrors of torch say that have no type of their own: of the host, the driver, and CUDA's libraries."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host has no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in EXHAUSTED)


def advice(recipe: Recipe, family: type[ElasticModel], subnet: Subnet, world: int) -> str:
    """The memory that a step on `subnet` needs per rank, and the settings that would save some, the most saving first.

    All of them may change in a run. Raises RecipeError if `world` ranks cannot run the recipe.
    """
    needed, half = _needed(recipe, family, subnet, world), _half(recipe, family, world)
    ways: dict[str, dict[str, dict[str, Any]]] = {
        f"train.micro_batch={half}": {"train": {"micro_batch": half}},
        "sharding.recompute=true": {"sharding": {"recompute": True}},
        "sharding.offload=all": {"sharding": {"offload": "all"}},
        "sharding.engine=fsdp": {"sharding": {"engine": "fsdp"}},
    }
    saved = {}
    for name, changes in ways.items():
        try:
            saved[name] = needed - _needed(_changed(recipe, changes), family, subnet, world)
        except (RecipeError, ValidationError):  # the engine cannot do that
            continue
    useful = sorted((size, name) for name, size in saved.items() if size > 0)[::-1]
    listed = ", ".join(f"{name} would save {_size(size)}" for size, name in useful)
    return f"a step on {subnet} needs about {_size(needed)} per rank by the cost model; {listed or 'use more ranks'}"


def _half(recipe: Recipe, family: type[ElasticModel], world: int) -> int:
    """About half as many images at a time as now, in whole units."""
    unit = recipe.train.batch // recipe.data.lanes if family.whole_lanes else 1
    return unit * ceil_div(images_at_a_time(recipe, family, world) // unit, 2)


def _changed(recipe: Recipe, changes: dict[str, dict[str, Any]]) -> Recipe:
    values = recipe.model_dump(exclude_unset=True)
    for group, settings in changes.items():
        values[group] = values.get(group, {}) | settings
    return Recipe.model_validate(values)


def _needed(recipe: Recipe, family: type[ElasticModel], subnet: Subnet, world: int) -> int:
    return predict(recipe, family, subnet, world, Device.named("h100")).memory.device


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
