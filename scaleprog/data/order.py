"""The order of the samples, as pure arithmetic on lanes.

An epoch has one order of all samples: (seed, epoch) permutes the shards, and (seed, epoch, shard) permutes the samples
inside each shard. That sequence is cut into V equal, contiguous segments, the *lanes*. The global batch of a step takes
the next B / V samples of every lane, and each rank owns V / W lanes. So the global batch is the same for every world
size W that divides V, and the step number alone determines where to resume.
"""

from dataclasses import dataclass

import numpy as np

from scaleprog.errors import DataError
from scaleprog.recipe.numbers import ceil_div

SEARCH_EPOCH = 2**31 - 1
"""Reserved epoch whose order defines the search subset; training epochs stay below it."""

_SHARDS, _SAMPLES = 0, 1  # what is permuted: keeps the two kinds of draws apart


def _permutation(size: int, *entropy: int) -> np.ndarray:
    """A permutation of range(size) drawn from `entropy`.

    Sorts raw bits instead of calling `Generator.permutation`: numpy promises never to change the raw stream of a bit
    generator, so a run that resumes with another version of numpy continues in the same order.
    """
    bits = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(size)
    return np.argsort(bits, kind="stable")


@dataclass(frozen=True)
class Order:
    """The order of the samples of one split, in every epoch.

    Args:
        counts: samples per shard.
        seed: seeds all permutations, together with the epoch (>= 0).
        lanes: V, the number of lanes in an epoch.
        batch: B, samples in a global batch; a multiple of V.
        repeats: R of repeated augmentation: position p of a lane takes sample p // R of its segment. So an epoch keeps
            its number of steps and uses the first 1 / R of each lane, each sample R times. The search subset has no
            repeats.

    Raises:
        ValueError: V, B or R is less than 1, or V does not divide B.
        DataError: the split holds less than one batch.
    """

    counts: tuple[int, ...]
    seed: int
    lanes: int
    batch: int
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.repeats < 1 or self.batch < 1:
            raise ValueError(f"must be at least 1: {self.lanes} lanes, a batch of {self.batch}, {self.repeats} repeats")
        if self.batch % self.lanes:
            raise ValueError(f"{self.lanes} lanes cannot share a batch of {self.batch} equally")
        if self.steps_per_epoch < 1:
            raise DataError(
                f"{self.samples} samples in {self.lanes} lanes do not fill one global batch of {self.batch}: "
                "use a smaller batch or more data"
            )

    @property
    def samples(self) -> int:
        """N, samples in the split."""
        return sum(self.counts)

    @property
    def per_lane(self) -> int:
        """B / V, samples that a lane contributes to a step."""
        return self.batch // self.lanes

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch: whole batches only."""
        return (self.samples // self.lanes) // self.per_lane

    @property
    def dropped(self) -> int:
        """Positions in the epoch's order that no step uses; fewer than B."""
        return self.samples - self.steps_per_epoch * self.batch

    def lane(self, epoch: int, lane: int) -> np.ndarray:
        """The samples of one lane in one epoch, in order. Permutes only the shards that the lane touches.

        Returns:
            (steps_per_epoch * per_lane, 2) int64: shard, index in shard.

        Raises:
            ValueError: there is no such lane.
        """
        if not 0 <= lane < self.lanes:
            raise ValueError(f"lane {lane} is not one of the {self.lanes} lanes")
        length = self.steps_per_epoch * self.per_lane
        repeats = 1 if epoch == SEARCH_EPOCH else self.repeats
        start = lane * (self.samples // self.lanes)
        stop = start + ceil_div(length, repeats)
        shards = _permutation(len(self.counts), self.seed, _SHARDS, epoch)
        ends = np.cumsum(np.asarray(self.counts, dtype=np.int64)[shards])
        first, last = np.searchsorted(ends, (start, stop - 1), side="right")
        rows = []
        for shard, end in zip(shards[first : last + 1].tolist(), ends[first : last + 1].tolist()):
            count = self.counts[shard]
            begin = end - count
            indices = _permutation(count, self.seed, _SAMPLES, epoch, shard)[max(start - begin, 0) : stop - begin]
            rows.append(np.stack((np.full(len(indices), shard), indices), axis=1))
        return np.repeat(np.concatenate(rows), repeats, axis=0)[:length]

    def lanes_of(self, rank: int, world: int) -> range:
        """The contiguous lanes that a rank owns. Raises ValueError if the lanes cannot be shared by such ranks."""
        if self.lanes % world or not 0 <= rank < world:
            raise ValueError(f"{self.lanes} lanes cannot be shared by rank {rank} of {world}")
        owned = self.lanes // world
        return range(rank * owned, (rank + 1) * owned)
