"""The elastic supernet (paper 4.3): which layers a Subnet activates, and which Subnet a step samples."""

import random
from collections.abc import Sequence

from scaleprog.growth.operators import sources
from scaleprog.growth.space import Subnet
from scaleprog.recipe.keys import Operator


def active_layers(operator: Operator, base: int, full: int, depth: int) -> tuple[int, ...]:
    """Ascending positions of the `depth` layers that a Subnet activates in a group grown from `base` to `full` layers.

    They match the layers that the operator would build at that depth: they have the same sources in the same order, and
    each is as early as possible. So Subnets are nested.

    Raises:
        ValueError: there is no Subnet of that depth, or no such operator.
    """
    if not base <= depth <= full:
        raise ValueError(f"a supernet of {base} to {full} layers has no sub-network of {depth}")
    built, position, active = sources(operator, base, full), 0, list[int]()
    for source in sources(operator, base, depth):
        position = built.index(source, position)
        active.append(position)
        position += 1
    return tuple(active)


def sample(candidates: Sequence[Subnet], seed: int, step: int) -> Subnet:
    """The Subnet that step `step` trains: drawn uniformly from the candidates, the same on every rank."""
    return candidates[random.Random(f"supernet {seed} {step}").randrange(len(candidates))]
