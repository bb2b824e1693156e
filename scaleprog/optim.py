"""AdamW, its parameter groups and the learning-rate schedule."""

import math
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from scaleprog.settings import Settings

Beta = Annotated[float, Field(ge=0, lt=1)]
MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerSettings(Settings):
    """AdamW with a linear warm-up from `warmup_lr` over `warmup_epochs`, then a cosine to `min_lr`; `clip` is the
    largest global gradient norm (None: no clipping)."""

    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    warmup_epochs: float = Field(default=5, ge=0)
    warmup_lr: float = Field(default=1e-6, ge=0)
    min_lr: float = Field(default=1e-5, ge=0)
    clip: float | None = Field(default=None, gt=0)


def learning_rate(settings: OptimizerSettings, position: int, steps: int, warmup_steps: int) -> float:
    """The learning rate of schedule position 0 <= `position` < `steps`; growth does not restart it."""
    if position < warmup_steps:
        return settings.warmup_lr + (settings.lr - settings.warmup_lr) * position / warmup_steps
    progress = (position - warmup_steps) / max(1, steps - warmup_steps)
    return settings.min_lr + (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def build_optimizer(
    parameters: Mapping[str, Tensor], undecayed: set[str], settings: OptimizerSettings
) -> torch.optim.AdamW:
    """A new AdamW over `parameters` by name; no weight decay on vectors (biases, norms, gates) and on `undecayed`.

    Its moments exist from the start, as the zeros that the first step would create: state in and out has one form.
    """
    decayed = [p for name, p in parameters.items() if p.ndim > 1 and name not in undecayed]
    others = [p for name, p in parameters.items() if p.ndim <= 1 or name in undecayed]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
        }
    return optimizer
