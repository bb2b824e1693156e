"""Whether the loader keeps up: images per second that the ranks eat in each phase, and that their cores prepare."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from scaleprog.errors import RecipeError
from scaleprog.growth.phase import Phase
from scaleprog.growth.schedule import Schedule
from scaleprog.growth.space import Subnet
from scaleprog.planning.cost_model import predict
from scaleprog.planning.devices import Device
from scaleprog.planning.plan import gmacs_of, outline, steps_per_epoch
from scaleprog.recipe import Recipe

Seconds = Mapping[Subnet, float]
"""How long a step of each Subnet takes."""


@dataclass(frozen=True)
class Supply:
    """What the ranks of a run need of their cores, and get.

    Args:
        schedule: of the run.
        phases: of the schedule; `Schedule.expected` stands in for what searches will choose.
        images: of one step, over all ranks.
        decoders: cores of each rank that prepare images.
        computing: how long a step takes on the devices (modeled), the images being there.
        decoding: in how long the decoders of all ranks prepare the images of a step.
    """

    schedule: Schedule
    phases: tuple[Phase, ...]
    images: int
    decoders: int
    computing: Seconds
    decoding: Seconds

    @classmethod
    def of(cls, recipe: Recipe, world: int, device: Device, cores: int, rates: Mapping[int, float]) -> "Supply":
        """The supply of `world` ranks with a device and `cores` each.

        `rates`: images per second that one core prepares, by resolution.

        Raises:
            RecipeError: the ranks cannot run the recipe, or `rates` lack a resolution.
            DataError: the recipe's shards are damaged.
        """
        family, schedule = outline(recipe, steps_per_epoch(recipe))
        check_rates(schedule, rates)
        subnets = schedule.networks
        decoders = max(1, min(recipe.data.processes(cores), cores))
        prepared = {subnet: rates[schedule.view(subnet).pixels] * decoders * world for subnet in subnets}
        return cls(
            schedule,
            tuple(schedule.expected((), partial(gmacs_of, recipe, family, schedule))),
            recipe.train.batch,
            decoders,
            {subnet: predict(recipe, family, subnet, world, device).step for subnet in subnets},
            {subnet: recipe.train.batch / rate for subnet, rate in prepared.items()},
        )

    @property
    def stepping(self) -> Seconds:
        """How long a step takes: images are prepared ahead, so the slower of the two sets the pace."""
        return {subnet: max(each, self.decoding[subnet]) for subnet, each in self.computing.items()}

    def rate(self, phase: Phase, seconds: Seconds) -> float:
        """Images per second in a phase, if its steps took so long; the candidates of a search take turns."""
        return self.images / phase.mean(seconds.__getitem__)

    def waiting(self, phase: Phase) -> float:
        """The fraction of a phase in which its ranks wait for images."""
        return 1 - self.rate(phase, self.stepping) / self.rate(phase, self.computing)

    def cores_needed(self, phase: Phase) -> int:
        """Cores per rank with which a phase would not wait: to prepare its images, and one for the rank itself."""
        ratios = [self.decoding[subnet] / self.computing[subnet] for subnet in phase.candidates]
        return math.ceil(max(ratios) * self.decoders) + 1

    def speedup(self, seconds: Seconds) -> float:
        """Original's seconds / the run's - 1, searches included, if steps took so long."""
        original = seconds[self.schedule.full] * self.schedule.steps
        return original / self.schedule.cost(self.phases, seconds.__getitem__) - 1


def check_rates(schedule: Schedule, rates: Mapping[int, float]) -> None:
    """Checks that `rates` have every resolution at which a run may train. Raises RecipeError."""
    if missing := [str(size) for size in schedule.pixels if size not in rates]:
        raise RecipeError(
            f"images per second of a core are not known at {', '.join(missing)} px, where this recipe may train; "
            "`scaleprog shards speed` measures all its sizes"
        )
