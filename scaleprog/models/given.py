"""Weights of plain timm's that a network begins with: each tensor is taken, resampled, or reported.

A tensor that fits nothing is an error, except those of a head: for another number of classes, it starts at random.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scaleprog.errors import RecipeError
from scaleprog.models.elastic import ElasticModel, Structure
from scaleprog.recipe.keys import ModelSettings

MOST_SHOWN = 8
"""Misfits in one message."""
WRAPPERS = re.compile(r"((module|model|backbone|_orig_mod|state_dict(_ema)?)\.)+")
"""What wrappers such as torch's DistributedDataParallel and torch.compile put before the names of a model's tensors."""


@dataclass(frozen=True)
class Given:
    """Weights for a network of `depths` layers, and what became of every tensor.

    Args:
        depths: layers of each group.
        tensors: whole fp32 tensors by full parameter name, and the (2, C) running statistics of each batch norm.
        resampled: names and shapes of tensors that had another size.
        new: names and shapes of parameters that start at random.
        left: names and shapes of given tensors that are not used.
    """

    depths: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    resampled: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def taken(self) -> int:
        """How many parameters and batch norms were taken as they are."""
        return len(self.tensors) - len(self.resampled)

    def report(self) -> str:
        """What was taken, resampled, left, and new, in one line."""
        parts = [f"{_sum(self.depths)} layers, {self.taken} tensors taken as they are"]
        for what in ("resampled", "left", "new"):
            parts.append(f"{what}: {', '.join(getattr(self, what)) or 'none'}")
        return "; ".join(parts)


def fit(
    family: type[ElasticModel],
    settings: ModelSettings,
    first: Sequence[int],
    plain: Mapping[str, Tensor],
    where: str,
) -> Given:
    """Fits the tensors of a plain timm model to an elastic model of the same depth.

    Args:
        family: the elastic family.
        settings: the recipe's model; its depth does not matter.
        first: layers of each group of the first network, the most that the plain model may have.
        plain: tensors under plain timm's names.
        where: named in errors.

    Raises:
        RecipeError: a tensor is missing, unknown, or of a size that no resampling explains, or there are too many
            layers.
    """
    rest = family.elastic_names(plain)
    depths = _depths(family, rest)
    if not all(depths):
        names = ", ".join(_shown(*item) for item in list(plain.items())[:MOST_SHOWN])
        wrapped = WRAPPERS.match(next(iter(plain), ""))
        remedy = f"; remove {wrapped[0]!r} from the names" if wrapped else ""
        raise RecipeError(
            f"{where}: these are not weights of {settings.name}, which has layers {' and '.join(family.layer_groups)}; "
            f"there are {names or 'no tensors'}{remedy}"
        )
    if any(theirs > ours for theirs, ours in zip(depths, first, strict=True)):
        raise RecipeError(
            f"{where}: has {_sum(depths)} layers, more than the first network of the schedule, {_sum(first)}; use "
            "growth.schedule: original, a larger growth.smallest, or weights of fewer layers"
        )
    with torch.device("meta"):
        model = family(settings, Structure.plain(depths))
    tensors: dict[str, Tensor] = {}
    resampled, new, left, misfits = list[str](), list[str](), list[str](), list[str]()
    for full, parameter in model.named_parameters():
        name = full.removeprefix("net.")
        given = rest.pop(name, None)
        head = name.rpartition(".")[0] in family.heads
        flaw = None if given is None else _flaw(given)
        fitted = None if given is None or flaw else model.resized(name, given.float())
        if flaw:
            misfits.append(f"{name}: {flaw}")
        elif fitted is not None and fitted.shape == parameter.shape:
            tensors[full] = fitted
            if given is not None and given.shape != fitted.shape:
                resampled.append(f"{_shown(name, given)} to {tuple(fitted.shape)}")
        elif head:
            new.append(_shown(name, parameter))
            left += [] if given is None else [_shown(name, given)]
        else:
            found = "missing" if given is None else f"has {tuple(given.shape)}"
            misfits.append(f"{name}: {found}, needs {tuple(parameter.shape)}")
    for name, norm in model.norms.items():
        statistics = [rest.pop(f"{name}.running_{what}", None) for what in ("mean", "var")]
        rest.pop(f"{name}.num_batches_tracked", None)
        fitting = [found.float() for found in statistics if found is not None and found.shape == (norm.num_features,)]
        if len(fitting) < 2:
            misfits.append(f"{name}: needs running_mean and running_var of {(norm.num_features,)}")
        elif flaws := [flaw for found in statistics if found is not None and (flaw := _flaw(found))]:
            misfits.append(f"{name}: {flaws[0]}")
        elif fitting[1].min() < 0:
            misfits.append(f"{name}: running_var is negative")
        else:
            tensors[name] = torch.stack(fitting)
    misfits += [f"{name}: has {tuple(tensor.shape)}, but {settings.name} has none" for name, tensor in rest.items()]
    if misfits:
        raise _refusal(misfits, settings.name, where)
    return Given(depths, tensors, tuple(resampled), tuple(new), tuple(left))


def _depths(family: type[ElasticModel], names: Iterable[str]) -> tuple[int, ...]:
    """The layers of each group, counted up to the first that is missing."""
    layers = [{m[1] for name in names if (m := re.match(rf"{group}\.(\d+)\.", name))} for group in family.layer_groups]
    return tuple(next(depth for depth in range(len(found) + 1) if str(depth) not in found) for found in layers)


def _flaw(tensor: Tensor) -> str:
    """Why no network can begin with a tensor; empty if one can."""
    if not tensor.is_floating_point():
        return f"holds {tensor.dtype}".replace("torch.", "") + ", not floating point"
    if not tensor.numel():
        return f"is empty, {tuple(tensor.shape)}"
    return "" if tensor.float().isfinite().all() else "holds NaN or infinity"


def _refusal(misfits: Sequence[str], model: str, where: str) -> RecipeError:
    lines = [f"{where}: these are not weights of {model} with the recipe's sizes:"]
    lines += [f"  {line}" for line in misfits[:MOST_SHOWN]]
    if len(misfits) > MOST_SHOWN:
        lines.append(f"  ... and {len(misfits) - MOST_SHOWN} more")
    lines.append("set model.* as in the model that was trained, or give other weights")
    return RecipeError("\n".join(lines))


def _sum(depths: Sequence[int]) -> str:
    return " + ".join(map(str, depths))


def _shown(name: str, tensor: Tensor) -> str:
    return f"{name} {tuple(tensor.shape)}"
