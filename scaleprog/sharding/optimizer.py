"""AdamW, its parameter groups, and the learning-rate schedule."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scaleprog.recipe.keys import OptimizerSettings

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(
    settings: OptimizerSettings,
    position: float,
    steps: int,
    epoch: int,
    began: float = 0,
    takeover: float = math.inf,
) -> float:
    """The learning rate at `began` <= `position` < `steps`. A growth does not restart it.

    The warm-up rises linearly from `warmup_lr` to `lr`, and the cool-down stays at `min_lr`. Between them:

    - smooth: a cosine that begins where the warm-up ends, and changes at every step.
    - timm: the cosine of timm's CosineLRScheduler, by which DeiT, VOLO and AutoProg are trained. It counts from the
      first epoch, warm-up included, and changes once an epoch; so does the warm-up.
    - wsd: constant, then linear to `min_lr` until the cool-down: over the last part `decay` of the steps, or from
      `takeover` on.

    Args:
        settings: the recipe's optimizer settings.
        position: of the schedule: a step, or where the steps so far have brought it by what they cost.
        steps: positions of the schedule.
        epoch: positions per epoch.
        began: position at which the weights were initialized. If that is not 0, the rest of the run is a run of its
            own.
        takeover: position from which the last network trains; infinite if a search has yet to decide it.
    """
    position, length = position - began, steps - began - settings.cooldown_steps(epoch)
    warmup = round(settings.warmup_epochs * epoch)
    if position >= length:
        return settings.min_lr
    if settings.schedule == "timm":  # as if each epoch were one step
        position -= position % epoch
        if position < settings.warmup_epochs * epoch:
            return settings.warmup_lr + (settings.lr - settings.warmup_lr) * position / (settings.warmup_epochs * epoch)
        return _cosine(settings, position / length)
    if position < warmup:
        return settings.warmup_lr + (settings.lr - settings.warmup_lr) * position / warmup
    if settings.schedule == "smooth":
        return _cosine(settings, (position - warmup) / max(1, length - warmup))
    stable = takeover - began if settings.decay == "takeover" else length - round(settings.decay * length)
    return settings.min_lr + (settings.lr - settings.min_lr) * min(
        1.0, (length - position) / max(1, length - max(warmup, stable))
    )


def _cosine(settings: OptimizerSettings, progress: float) -> float:
    return settings.min_lr + (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Group:
    """Names of parameters that AdamW treats alike; `steps`: the AdamW steps behind their moments."""

    names: tuple[str, ...]
    weight_decay: float
    steps: float


def alike(
    shapes: Mapping[str, torch.Size], undecayed: set[str], settings: OptimizerSettings, steps: Mapping[str, float]
) -> list[Group]:
    """The AdamW groups of a network. Vectors (biases, norms, gates) and `undecayed` parameters get no weight decay.

    `steps`: by parameter, the AdamW steps behind its moments; 0 for parameters without an entry.
    """
    groups: dict[tuple[bool, float], list[str]] = {}
    for name, shape in shapes.items():
        vector = len(shape) <= 1 or name in undecayed
        groups.setdefault((vector, steps.get(name, 0.0)), []).append(name)
    return [
        Group(tuple(names), 0.0 if vector else settings.weight_decay, taken)
        for (vector, taken), names in sorted(groups.items())
    ]


class AdamW(torch.optim.AdamW):
    """torch's AdamW with the attribute by which its fused step learns that it must do nothing."""

    found_inf: Tensor | None = None
    """0-D, fp32: 1 if the gradients are not finite, else 0."""


class SGD(torch.optim.SGD):
    """torch's SGD, likewise."""

    found_inf: Tensor | None = None


def adamw(groups: Sequence[Group], parameters: Mapping[str, Tensor], settings: OptimizerSettings) -> AdamW:
    """A new AdamW with these groups of `parameters`, which are given by name."""
    return AdamW(
        [{"params": [parameters[name] for name in g.names], "weight_decay": g.weight_decay} for g in groups],
        lr=settings.lr,
        betas=settings.betas,
        fused=True,
    )


def moments(like: Tensor, steps: float) -> dict[str, Tensor]:
    """AdamW's state of a new parameter, as the first step would create it, so that a state always has the same form.

    `steps`: the AdamW steps behind the moments.
    """
    return {
        "step": torch.tensor(steps, dtype=torch.float32, device=like.device),
        **{moment: torch.zeros_like(like, requires_grad=False) for moment in MOMENTS},
    }
