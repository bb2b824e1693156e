"""AdamW, its parameter groups and the learning-rate schedule."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import field_validator
from torch import Tensor

from scaleprog.settings import Momentum, NoOrMore, NoOrMoreEpochs, Norm, Rate, Settings, Text

MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerSettings(Settings):
    """AdamW with a linear warm-up from `warmup_lr` over `warmup_epochs`, then a cosine to `min_lr`; `clip` is the
    largest global gradient norm (None: no clipping)."""

    name: Text = "adamw"
    lr: Rate = 1e-3
    weight_decay: NoOrMore = 0.05
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    warmup_epochs: NoOrMoreEpochs = 5
    warmup_lr: NoOrMore = 1e-6
    min_lr: NoOrMore = 1e-5
    clip: Norm | None = None

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name != "adamw":
            raise ValueError(
                f"{name!r} cannot be sharded: engines cut tensors anywhere, so a step must go element by element, as "
                "that of adamw does; lamb, lars and muon need whole tensors"
            )
        return name


def learning_rate(settings: OptimizerSettings, position: int, steps: int, warmup_steps: int) -> float:
    """The learning rate of schedule position 0 <= `position` < `steps`; growth does not restart it."""
    if position < warmup_steps:
        return settings.warmup_lr + (settings.lr - settings.warmup_lr) * position / warmup_steps
    progress = (position - warmup_steps) / max(1, steps - warmup_steps)
    return settings.min_lr + (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Group:
    """Parameters, by name, that AdamW treats alike; `steps`: those behind their moments."""

    names: tuple[str, ...]
    weight_decay: float
    steps: float


def alike(
    shapes: Mapping[str, torch.Size], undecayed: set[str], settings: OptimizerSettings, steps: Mapping[str, float]
) -> list[Group]:
    """The groups of a network: no weight decay on vectors (biases, norms, gates) and `undecayed`."""
    groups: dict[tuple[bool, float], list[str]] = {}
    for name, shape in shapes.items():
        vector = len(shape) <= 1 or name in undecayed
        groups.setdefault((vector, steps.get(name, 0.0)), []).append(name)
    return [
        Group(tuple(names), 0.0 if vector else settings.weight_decay, taken)
        for (vector, taken), names in sorted(groups.items())
    ]


def adamw(groups: Sequence[Group], parameters: Mapping[str, Tensor], settings: OptimizerSettings) -> torch.optim.AdamW:
    """A new AdamW over `parameters` by name."""
    return torch.optim.AdamW(
        [{"params": [parameters[name] for name in g.names], "weight_decay": g.weight_decay} for g in groups],
        lr=settings.lr, betas=settings.betas, fused=True,
    )  # fmt: skip


def moments(like: Tensor, steps: float) -> dict[str, Tensor]:
    """AdamW's state of a parameter, from the start as the zeros that the first step would create: it has one form."""
    return {
        "step": torch.tensor(steps, dtype=torch.float32, device=like.device),
        **{moment: torch.zeros_like(like, requires_grad=False) for moment in MOMENTS},
    }
