"""A phase: a stretch of steps that trains one network. A supernet (paper 4.3) trains several Subnets in turn.

Adaptive regularization, AdaReg (paper 5.3), gives each phase its strengths of augmentation and stochastic depth.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from scaleprog.growth.operators import sources
from scaleprog.growth.space import Subnet
from scaleprog.recipe.keys import Operator, RegularizationSettings

Split = Callable[[int], tuple[int, ...]]
"""Divides a depth among a model family's layer groups."""


def undivided(depth: int) -> tuple[int, ...]:
    """The `Split` of a model with one layer group."""
    return (depth,)


@dataclass(frozen=True)
class Regularization:
    """Factors on the recipe's RandAugment magnitude, random-erase probability and stochastic-depth rate, 0 to 1."""

    magnitude: float = 1.0
    erase: float = 1.0
    drop_path: float = 1.0

    @classmethod
    def at(cls, ramp: float, first: "Regularization | None" = None) -> "Regularization":
        """Strengths at the growth progress `ramp`, from 0 (growth begins) to 1 (complete model). All increase linearly
        from `first` (None: the paper's) to 1."""
        first = first or PAPERS_FIRST
        return cls(*(begin + (1 - begin) * ramp for begin in (first.magnitude, first.erase, first.drop_path)))


PAPERS_FIRST = Regularization(**RegularizationSettings().model_dump())
"""The strengths with which AdaReg begins in the paper."""


@dataclass(frozen=True)
class Course:
    """How a phase goes along its schedule, if the schedule counts compute instead of steps.

    Args:
        start: progress of the schedule when the phase begins, in schedule positions.
        pace: progress that a step makes.
        began: progress at which the phase's weights were initialized.
    """

    start: float
    pace: float
    began: float = 0


@dataclass(frozen=True)
class Window:
    """Networks from which every step of a phase draws one: rather the first ones at its start, and the last at its end.

    At a progress of 0 to 1, the probability of a network is a Gaussian of its distance from that part of the list, as
    of timm's `--train-size-schedule progressive`.

    Args:
        networks: in the order in which their time comes.
        spread: standard deviation, in networks; 0: always the nearest one.
        mix: the part of the steps that draws evenly.
        length: steps in which it moves from the first network to the last.
        cooldown: steps after them, which train only the last network.
    """

    networks: tuple[Subnet, ...]
    spread: float
    mix: float
    length: int
    cooldown: int = 0

    def shares(self, progress: float) -> list[float]:
        """The probability of each network."""
        distances = [abs(i - progress * (len(self.networks) - 1)) for i in range(len(self.networks))]
        nearest = min(distances)
        if self.spread:  # in proportion to the nearest, which so does not underflow
            weights = [
                math.exp(-(far - nearest) * (far + nearest) / 2 / self.spread / self.spread) for far in distances
            ]
        else:
            weights = [float(far == nearest) for far in distances]
        return [self.mix / len(weights) + (1 - self.mix) * weight / sum(weights) for weight in weights]

    def draw(self, seed: int, step: int) -> Subnet:
        """The network of a step, counted from the start of the phase; the same on every rank."""
        if step >= self.length:
            return self.networks[-1]
        shares = self.shares(step / max(1, self.length - 1))
        return random.Random(f"window {seed} {step}").choices(self.networks, shares)[0]

    def mean(self, price: Callable[[Subnet], float], begun: int = 0) -> float:
        """The mean price of the steps after the first `begun`."""
        last = price(self.networks[-1])
        if begun >= self.length:
            return last
        points, progress = 1000, begun / max(1, self.length - 1)
        shares = (self.shares(progress + (1 - progress) * i / points) for i in range(points + 1))
        totals = [sum(column) / (points + 1) for column in zip(*shares)]
        moving = sum(share * price(network) for share, network in zip(totals, self.networks, strict=True))
        length = self.length - begun
        return (length * moving + self.cooldown * last) / (length + self.cooldown)


@dataclass(frozen=True)
class Phase:
    """A stretch of steps that trains one network: a supernet (with several candidates) or a chosen Subnet.

    Args:
        stage: number of the stage, from 1.
        kind: whether the phase trains a supernet, or a Subnet.
        start, stop: optimizer steps finished when the phase begins and ends.
        position: position of `start` in the data order. It equals `start`, unless `growth.recycle: false` went back to
            repeat the epochs of a search.
        candidates: the Subnets to train.
        base: depth of the network from which a supernet grows.
        searched: whether the phase is a search.
        regularization: strengths in this phase.
        began: position at which its weights were initialized: not 0 after a probe found that nothing was learned.
        course: the phase's part of the schedule, if that counts compute (None: a step is a position).
        window: which of its candidates a supernet trains when (None: all of them, evenly).
    """

    stage: int
    kind: Literal["supernet", "train"]
    start: int
    stop: int
    position: int
    candidates: tuple[Subnet, ...]
    base: int
    searched: bool = False
    regularization: Regularization = Regularization()
    began: int = 0
    course: Course | None = None
    window: Window | None = None

    @property
    def network(self) -> Subnet:
        """The network that holds all candidates."""
        return Subnet(max(s.resolution for s in self.candidates), max(s.depth for s in self.candidates))

    def subnet(self, seed: int, step: int) -> Subnet:
        """The Subnet that step `step` trains."""
        if self.window is not None:
            return self.window.draw(seed, step - self.start)
        return self.candidates[0] if self.kind == "train" else sample(self.candidates, seed, step)

    def mean(self, price: Callable[[Subnet], float], begun: int = 0) -> float:
        """The mean price of the steps after the first `begun`."""
        if self.window is not None:
            return self.window.mean(price, begun)
        return sum(map(price, self.candidates)) / len(self.candidates)

    def active(self, subnet: Subnet, operator: Operator, split: Split) -> tuple[tuple[int, ...], ...]:
        """Positions of the layers that `subnet` runs in each group of this phase's network."""
        if self.kind == "train":
            return tuple(tuple(range(depth)) for depth in split(subnet.depth))
        sizes = zip(split(self.base), split(self.network.depth), split(subnet.depth), strict=True)
        return tuple(active_layers(operator, *size) for size in sizes)

    def position_of(self, step: int) -> int:
        """The position of step `step` in the data order."""
        return self.position + step - self.start

    def age(self, step: int) -> int:
        """How many steps the weights have been trained for before step `step`: the EMA warms up by it."""
        return self.position_of(step) - self.began

    def progress_of(self, step: int) -> float:
        """How far the schedule is before step `step`, in schedule positions: it sets the learning rate."""
        if self.course is None:
            return self.position_of(step)
        return self.course.start + self.course.pace * (step - self.start)

    @property
    def progress_began(self) -> float:
        """How far the schedule was when the phase's weights were initialized."""
        return self.began if self.course is None else self.course.began


# ---- supernet


def active_layers(operator: Operator, base: int, full: int, depth: int) -> tuple[int, ...]:
    """Ascending positions of the `depth` layers that a Subnet activates in a group grown from `base` to `full` layers.

    They match the layers that the operator would build at that depth: they have the same sources in the same order, and
    each is as early as possible. So Subnets are nested.

    Raises:
        ValueError: there is no Subnet of that depth, or no such operator.
    """
    if not base <= depth <= full:
        raise ValueError(f"a supernet of {base} to {full} layers has no Subnet of {depth}")
    built, position, active = sources(operator, base, full), 0, list[int]()
    for source in sources(operator, base, depth):
        position = built.index(source, position)
        active.append(position)
        position += 1
    return tuple(active)


def sample(candidates: Sequence[Subnet], seed: int, step: int) -> Subnet:
    """The Subnet that step `step` trains: drawn uniformly from the candidates, the same on every rank."""
    return candidates[random.Random(f"supernet {seed} {step}").randrange(len(candidates))]
