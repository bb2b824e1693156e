"""Computes which rank holds which elements of a tensor, and moves elements from one placement to another."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """How the `numel` elements of one flattened tensor lie on the ranks of a group: each rank holds one stretch.

    With `offset` other elements before the tensor, element i is number `offset` + i. Rank r holds the numbers from
    r * `size` up to, but not including, (r + 1) * `size`. Every engine has this form: FSDP2 cuts rows, ZeRO-3 cuts
    elements, and ZeRO-1 and 2 cut a row of whole tensors laid end to end.
    """

    numel: int
    size: int
    offset: int = 0

    @classmethod
    def whole(cls, numel: int) -> "Placement":
        """All elements on rank 0 of the group."""
        return cls(numel, max(1, numel))

    def local(self, rank: int) -> range:
        """The elements that a rank holds."""
        start = rank * self.size - self.offset
        return range(*(min(max(0, bound), self.numel) for bound in (start, start + self.size)))

    def holders(self, elements: range) -> Iterator[tuple[int, range]]:
        """The ranks that hold any of `elements`, in ascending order, each with those that it holds."""
        if not elements:
            return
        for rank in range(
            (elements.start + self.offset) // self.size, (elements.stop - 1 + self.offset) // self.size + 1
        ):
            part = self.local(rank)
            yield rank, range(max(part.start, elements.start), min(part.stop, elements.stop))


@dataclass(frozen=True)
class LocalSlice:
    """This rank's elements of a tensor of `numel` elements: `tensor` (1-D) holds those from `start` on."""

    tensor: Tensor
    start: int
    numel: int

    @classmethod
    def whole(cls, tensor: Tensor) -> "LocalSlice":
        """All elements of a contiguous tensor; the slice shares its memory."""
        return cls(tensor.detach().view(-1), 0, tensor.numel())


def held_by(parts: Mapping[str, LocalSlice]) -> list[int]:
    """What a rank holds, as `share_out` takes it: of each tensor in turn, the first element and how many there are."""
    return [number for part in parts.values() for number in (part.start, part.tensor.numel())]


def share_out(sizes: Mapping[str, int], held: Sequence[Sequence[int]]) -> dict[str, tuple[tuple[int, int], ...]]:
    """Decides which rank saves which stretch of each tensor, so that each element is saved once.

    Args:
        sizes: the elements of each tensor.
        held: what each rank holds, see `held_by`, in the order of `sizes`.

    Returns:
        For each name, (rank, elements) of consecutive stretches. If several ranks hold the same stretch, the rank
        with the least to save so far saves it.
    """
    loads, shared = [0] * len(held), {}
    columns = iter(zip(*held))  # by tensor: with thousands of ranks, most hold nothing of it
    for (name, numel), starts, lengths in zip(sizes.items(), columns, columns, strict=True):
        holders: dict[tuple[int, int], list[int]] = {}
        for rank, stretch in enumerate(zip(starts, lengths)):
            if stretch[1]:
                holders.setdefault(stretch, []).append(rank)
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
    sources: Sequence[Tensor],
    old: Placement,
    targets: Sequence[Tensor],
    new: Placement,
    group: dist.ProcessGroup | None,
) -> None:
    """Copies tensors from one placement into another; every rank of `group` calls it.

    Elements that stay on their rank are copied there. A rank sends all others directly to the rank that needs them,
    once and without buffers.

    Args:
        sources: this rank's elements under `old`, 1-D.
        old: the placement of every source.
        targets: this rank's elements under `new`, 1-D, one tensor for each source.
        new: the placement of every target.
        group: the ranks of both placements; None: this rank alone.
    """
    rank = 0 if group is None else dist.get_rank(group)
    held, wanted = old.local(rank), new.local(rank)
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
