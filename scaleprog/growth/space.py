"""Subnet and growth space Omega (paper 3.2, 5): which sizes a network may take on its way to full size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from scaleprog.recipe.keys import CandidateRule


@dataclass(frozen=True, order=True)
class Subnet:
    """One size of the network: input resolution in pixels and depth in layers (over all layer groups).

    With `growth.patches: subset`, the resolution stands for a number of patches: as many as in an image of that size.
    """

    resolution: int
    depth: int

    def at_least(self, other: "Subnet") -> "Subnet":
        """This Subnet, but in no dimension smaller than `other`."""
        return Subnet(max(self.resolution, other.resolution), max(self.depth, other.depth))

    def __str__(self) -> str:
        return f"{self.resolution} px, {self.depth} layers"

    @property
    def short(self) -> str:
        """Pixels x layers, as in "16x4"."""
        return f"{self.resolution}x{self.depth}"


@dataclass(frozen=True)
class Choice:
    """The result of a search: the Subnet of its stage and, with a budget, `complete_from`, the schedule position of the
    takeover (None: no budget). `learned`: whether a probe that chose the complete model found that the network before
    it has learned, so that it grows instead of starting afresh."""

    subnet: Subnet
    complete_from: int | None = None
    learned: bool = False


@dataclass(frozen=True)
class View:
    """The part of an image that a Subnet sees.

    Args:
        pixels: side of the image.
        patches: number of patches, drawn at random (None: all).
        cutoff: the image keeps only frequencies that so many pixels per side can hold (None: all).
    """

    pixels: int
    patches: int | None = None
    cutoff: int | None = None


@dataclass(frozen=True)
class GrowthSpace:
    """Omega: ascending resolutions and depths. Every combination of them is a Subnet that a search may choose."""

    resolutions: tuple[int, ...]
    depths: tuple[int, ...]

    @classmethod
    def of(cls, subnets: Sequence[Subnet]) -> "GrowthSpace":
        """The space spanned by `subnets`: every resolution with every depth, duplicates dropped."""
        return cls(tuple(sorted({s.resolution for s in subnets})), tuple(sorted({s.depth for s in subnets})))

    def candidates(self, previous: Subnet | None, rule: CandidateRule) -> tuple[Subnet, ...]:
        """Lambda_k: the candidates of the stage after `previous` (None: of the first stage), ascending.

        - `corners`: each dimension stays as it is or becomes complete (first stage: is smallest or complete).
        - `all`, eq. 8: every member with at least as many parameters as `previous` (only depth adds parameters).
        - `window`, the published implementation: the first stage takes the smallest, middle and largest value of each
          dimension; a later one takes the current and the next resolution, and up to three depths above the current
          one.
        """
        if rule == "corners":
            before = previous or Subnet(self.resolutions[0], self.depths[0])
            resolutions = tuple(sorted({before.resolution, self.resolutions[-1]}))
            depths = tuple(sorted({before.depth, self.depths[-1]}))
        elif previous is None:
            resolutions, depths = self.resolutions, self.depths
            if rule == "window":
                resolutions, depths = _spread(resolutions), _spread(depths)
        elif rule == "all":
            resolutions, depths = self.resolutions, tuple(d for d in self.depths if d >= previous.depth)
        else:
            resolutions = tuple(r for r in self.resolutions if r >= previous.resolution)[:2]
            depths = tuple(d for d in self.depths if d > previous.depth)[:3] or self.depths[-1:]
        return tuple(Subnet(r, d) for r, d in product(resolutions, depths))


def ladder(full: Subnet, smallest: float, stages: int, multiple: int) -> tuple[Subnet, ...]:
    """The `stages` Subnets at equispaced ratios smallest..1 of both dimensions, ascending; the last is `full`.

    Resolutions are rounded to multiples of `multiple` pixels and depths to whole layers, halves up and never below one
    unit.
    """
    if stages == 1:
        return (full,)
    ratios = [smallest + (1 - smallest) * k / (stages - 1) for k in range(stages - 1)]
    steps = [Subnet(_nearest(s * full.resolution, multiple), _nearest(s * full.depth, 1)) for s in ratios]
    return (*(Subnet(min(s.resolution, full.resolution), s.depth) for s in steps), full)


def _nearest(value: float, multiple: int) -> int:
    """`value` rounded to a multiple, halves up; the tolerance keeps 0.7 * 10 from being 6.999..."""
    return max(1, math.floor(value / multiple + 0.5 + 1e-9)) * multiple


def _spread(values: tuple[int, ...]) -> tuple[int, ...]:
    """Smallest, middle and largest."""
    return tuple(sorted({values[0], values[len(values) // 2], values[-1]}))
