"""Which numbers of ranks can train a recipe. No torch: a Slurm job's batch script waits for the answer."""

import math
from dataclasses import dataclass

from scaleprog.errors import RecipeError
from scaleprog.recipe.numbers import ceil_div
from scaleprog.recipe.recipe import Recipe


@dataclass(frozen=True)
class Worlds:
    """The numbers of ranks that can train a recipe: all that divide its lanes and are a multiple of its groups.

    Args:
        lanes: data.lanes; each rank owns equally many.
        batch: train.batch, images of a global batch; every lane holds equally many.
        pairs: pairs that each lane must hold, as Mixup and CutMix pair the images of a lane and an image with `repeats`
            views may not meet itself; 0 if images are not mixed.
        shard: ranks that hold one copy of the model under hsdp (None: the ranks of a node); 1 for other engines.
        groups: groups of lanes that are mixed separately (None: any number).
    """

    lanes: int
    batch: int
    pairs: int = 0
    shard: int | None = 1
    groups: int | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> "Worlds":
        """The numbers of ranks that can train `recipe`."""
        sharding, augment = recipe.sharding, recipe.augment
        shard = sharding.shard if sharding.engine == "hsdp" else 1
        pairs = augment.repeats if augment.mixes else 0
        return cls(recipe.data.lanes, recipe.train.batch, pairs, shard, augment.mix_groups)

    def obstacle(self, world: int, per_node: int | None = None) -> str:
        """Why `world` ranks cannot train, and what can be changed; empty if they can.

        `per_node`: how many of them are on each node (None: all).
        """
        if self.lanes % world:
            return (
                f"{world} ranks do not divide data.lanes, {self.lanes}; to use them, start a new run with "
                f"{self._change(world)}"
            )
        if world % (shard := self.shard or per_node or world):
            return f"sharding.shard: {world} ranks are not a multiple of {shard}, the ranks that share one copy"
        return ""

    def check_lanes(self) -> None:
        """Raises RecipeError if the lanes cannot hold equally many images of a batch, or not as many as they must."""
        if self.groups is not None and self.lanes % self.groups:
            raise RecipeError(
                f"augment.mix_groups: {self.groups} does not divide data.lanes, {self.lanes}; use a divisor of it"
            )
        if self._fills(self.lanes, self.batch):
            return
        kind = "a whole number"
        if self.pairs:
            kind = "an even number" if self.pairs == 1 else f"an even number of at least {2 * self.pairs}"
            kind += ", as Mixup, CutMix, and MixToken need" + (
                f" with augment.repeats={self.pairs}" if self.pairs > 1 else ""
            )
        raise RecipeError(
            f"data.lanes: {self.batch} images in {self.lanes} lanes do not give each lane {kind}; use {self._change(1)}"
        )

    def check(self, world: int, per_node: int | None = None) -> None:
        """Raises RecipeError if `world` ranks cannot train."""
        self.check_lanes()
        if obstacle := self.obstacle(world, per_node):
            raise RecipeError(obstacle)

    @property
    def _unit(self) -> int:
        return 2 if self.pairs else 1

    def _fills(self, lanes: int, batch: int) -> bool:
        """Whether `batch` images can be taken from `lanes` lanes."""
        return batch % (lanes * self._unit) == 0 and batch >= lanes * 2 * self.pairs

    def fitted(self, world: int) -> tuple[int, int]:
        """Lanes and batch with which `world` ranks can train: the most lanes for the batch; if none, a larger batch."""
        fewest = math.lcm(world, self.groups or 1)
        unit = fewest * self._unit
        batch = max(ceil_div(self.batch, unit) * unit, fewest * 2 * self.pairs)
        return max(n for n in range(fewest, min(self.lanes, batch) + fewest, fewest) if self._fills(n, batch)), batch

    def _change(self, world: int) -> str:
        """Settings with which `world` ranks can train."""
        lanes, batch = self.fitted(world)
        if batch == self.batch:
            return f"data.lanes={lanes}"
        return f"data.lanes={lanes} train.batch={batch} (which changes the training)"
