"""The elastic supernet (paper 4.3): which of its layers a sub-network activates, which sub-network a step samples."""

import random
from collections.abc import Sequence

from scaleprog.growth.operators import Operator, interpolation
from scaleprog.growth.space import Subnet


def active_layers(operator: Operator, base: int, full: int, depth: int) -> tuple[int, ...]:
    """Positions, ascending, of the `depth` layers that a sub-network activates in a group grown from `base` to `full`.

    All base layers, plus added ones in the order in which the operator would have added them: sub-networks nest, and
    each one is what the operator would have built at its depth. For Interpolation and its kin these are the copies that
    follow their source, starting from the final layers; Stacking and RandInit add on top.
    """
    if not base <= depth <= full:
        raise ValueError(f"a supernet of {base} to {full} layers has no sub-network of {depth}")
    if operator in ("stacking", "rand_init"):
        return tuple(range(depth))
    position, active = 0, tuple[int, ...]()
    for here, places in zip(_counts(base, depth), _counts(base, full)):
        active += tuple(range(position, position + here))
        position += places
    return active


def sample(candidates: Sequence[Subnet], seed: int, step: int) -> Subnet:
    """The sub-network that step `step` trains: uniform over the candidates, the same on every rank."""
    return candidates[random.Random(f"supernet {seed} {step}").randrange(len(candidates))]


def _counts(base: int, depth: int) -> list[int]:
    """How often each of `base` layers appears among `depth` interpolated ones."""
    sources = interpolation(base, depth)
    return [sources.count(i) for i in range(base)]
