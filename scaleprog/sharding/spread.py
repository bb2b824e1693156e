"""Which rank holds which elements of a tensor, as arithmetic; and moving them where another spread wants them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Spread:
    """How the `numel` elements of one tensor, flattened, lie on the ranks of a group: each holds one stretch of them.

    Laid end to end behind `offset` other elements, rank r holds what falls into r * size <= position < (r + 1) * size.
    Every engine's sharding is of this form: FSDP2 cuts rows, ZeRO-3 elements, ZeRO-1 and 2 a row of whole tensors.
    """

    numel: int
    size: int
    offset: int = 0

    @classmethod
    def whole(cls, numel: int) -> "Spread":
        """All on the group's rank 0."""
        return cls(numel, max(1, numel))

    def part(self, rank: int) -> range:
        """The elements that a rank holds."""
        start = rank * self.size - self.offset
        return range(*(min(max(0, bound), self.numel) for bound in (start, start + self.size)))

    def holders(self, elements: range) -> Iterator[tuple[int, range]]:
        """The ranks that hold any of `elements`, and which of them; ascending."""
        if not elements:
            return
        for rank in range(
            (elements.start + self.offset) // self.size, (elements.stop - 1 + self.offset) // self.size + 1
        ):
            part = self.part(rank)
            yield rank, range(max(part.start, elements.start), min(part.stop, elements.stop))


@dataclass(frozen=True)
class Part:
    """This rank's elements of a tensor of `numel`: `tensor`, 1-D, holds those from `start` on."""

    tensor: Tensor
    start: int
    numel: int

    @classmethod
    def whole(cls, tensor: Tensor) -> "Part":
        """All elements of a contiguous tensor; writing into the part writes into it."""
        return cls(tensor.detach().view(-1), 0, tensor.numel())


def share_out(held: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, tuple[tuple[int, int], ...]]:
    """Which rank saves which stretch of each tensor, so that each element is saved once.

    Args:
        held: by rank, what it holds of each tensor: name -> (numel, start, elements).

    Returns:
        By name, (rank, elements) of stretches that follow each other. Of ranks that hold the same stretch, the one
        that has least to save so far takes it.
    """
    loads, shared = [0] * len(held), {}
    for name, (numel, _, _) in held[0].items():
        holders: dict[tuple[int, int], list[int]] = {}
        for rank, parts in enumerate(held):
            _, start, length = parts[name]
            if length:
                holders.setdefault((start, length), []).append(rank)
        stretches, at = [], 0
        for (start, length), ranks in sorted(holders.items()):
            assert start == at, f"{name}: the ranks hold {holders} of {numel}"
            rank = min(ranks, key=loads.__getitem__)
            loads[rank] += length
            stretches.append((rank, length))
            at += length
        assert at == numel, f"{name}: the ranks hold {holders} of {numel}"
        shared[name] = tuple(stretches)
    return shared


@torch.no_grad()
def move(
    sources: Sequence[Tensor], old: Spread, targets: Sequence[Tensor], new: Spread, group: dist.ProcessGroup | None
) -> None:
    """Copies tensors that are spread one way into tensors spread another way; every rank of `group` calls it.

    What stays on its rank is copied there; the rest goes straight from its holder to whoever needs it, without buffers
    and nothing twice. `sources` and `targets` are this rank's elements, 1-D. `group` None: this rank alone.
    """
    rank = 0 if group is None else dist.get_rank(group)
    held, wanted = old.part(rank), new.part(rank)
    transfers = []
    for source, target in zip(sources, targets, strict=True):
        for holder, part in old.holders(wanted):
            into = target[part.start - wanted.start : part.stop - wanted.start]
            if holder == rank:
                into.copy_(source[part.start - held.start : part.stop - held.start])
            else:
                transfers.append(dist.P2POp(dist.irecv, into, group=group, group_peer=holder))
        for needer, part in new.holders(held):
            if needer != rank:
                out = source[part.start - held.start : part.stop - held.start]
                transfers.append(dist.P2POp(dist.isend, out, group=group, group_peer=needer))
    for work in dist.batch_isend_irecv(transfers) if transfers else ():
        work.wait()
