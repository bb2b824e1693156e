"""The phases that a run has trained so far, and how the recipe of a fork names them."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise, product

from scaleprog.growth.phase import Phase, Regularization
from scaleprog.growth.space import GrowthSpace, Subnet
from scaleprog.recipe.parent import ParentSettings, TrainedSettings


def trained(phases: Iterable[Phase], step: int) -> tuple[Phase, ...]:
    """The part of `phases` that lies before `step`; the last phase ends there."""
    return tuple(replace(phase, stop=min(phase.stop, step)) for phase in phases if phase.start < step)


def networks(phases: Iterable[Phase]) -> tuple[Phase, ...]:
    """`phases` without their regularization, which leaves no trace in a network's form."""
    return tuple(replace(phase, regularization=Regularization()) for phase in phases)


def to_settings(phases: Iterable[Phase]) -> tuple[TrainedSettings, ...]:
    """Trained phases as a recipe names them."""
    return tuple(
        TrainedSettings(
            stage=phase.stage,
            stop=phase.stop,
            resolutions=(space := GrowthSpace.of(phase.candidates)).resolutions,
            depths=space.depths,
            base=phase.base,
            searched=phase.searched,
        )
        for phase in phases
    )


def begun_by(parent: ParentSettings | None) -> tuple[Phase, ...]:
    """The phases with which the schedule of a fork begins; the last one ends at the parent's step and position."""
    if parent is None:
        return ()
    stops = [0, *(phase.stop for phase in parent.phases)]
    return tuple(
        Phase(
            phase.stage,
            "supernet" if len(phase.resolutions) * len(phase.depths) > 1 else "train",
            start,
            stop,
            parent.position - (parent.step - start),
            tuple(Subnet(*size) for size in product(phase.resolutions, phase.depths)),
            phase.base,
            phase.searched,
            began=parent.began,
        )
        for phase, (start, stop) in zip(parent.phases, pairwise(stops))
    )
