"""Growth operators zeta (paper 3.3) as layer maps: for each layer of the new network, where it comes from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Operator = Literal["rand_init", "stacking", "interpolation", "identity", "mogrow"]
Weights = Literal["online", "ema", "fresh"]


@dataclass(frozen=True)
class Origin:
    """Where one layer of the new network comes from.

    `source` is the layer's index in the same group of the old network (None when fresh); `gate` is the residual gate it
    starts behind: 1, or 0 for a layer that must not change the function at the moment of growth (ReZero).
    """

    source: int | None
    weights: Weights = "online"
    gate: Literal[0, 1] = 1


@dataclass(frozen=True)
class LayerMap:
    """A growth, a sub-network or a search decision: the origin of every layer of every group of the new network.

    `rest` says which weights everything that is no layer (embeddings, norms, head) is read from.
    """

    groups: tuple[tuple[Origin, ...], ...]
    rest: Weights = "online"

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers of each group of the new network."""
        return tuple(len(group) for group in self.groups)


def grow(operator: Operator, old: Sequence[int], new: Sequence[int]) -> LayerMap:
    """The layer map by which `operator` grows groups of `old[g]` layers into groups of `new[g]` >= `old[g]` layers."""
    weights: Weights = "ema" if operator == "mogrow" else "online"
    return LayerMap(tuple(_grow_group(operator, weights, o, n) for o, n in zip(old, new, strict=True)), rest=weights)


def keep(active: Sequence[Sequence[int]]) -> LayerMap:
    """The layer map that keeps only the `active` layers of each group: how a supernet hands on its weights."""
    return LayerMap(tuple(tuple(Origin(i) for i in group) for group in active))


def fresh(depths: Sequence[int]) -> LayerMap:
    """The layer map of a network that starts from random initialisation."""
    return LayerMap(tuple((Origin(None, "fresh"),) * depth for depth in depths), rest="fresh")


def interpolation(old: int, new: int) -> tuple[int, ...]:
    """Sources of `new` layers interpolated between `old`: copies next to their source, starting from the final layers.

    With q, m = divmod(new, old) the first old - m layers appear q times each and the last m layers q + 1 times each.
    """
    _check(old, new)
    q, m = divmod(new, old)
    return tuple(i for i in range(old) for _ in range(q + (i >= old - m)))


def stacking(old: int, new: int) -> tuple[int, ...]:
    """Sources of `new` layers when the old stack is repeated on top of itself."""
    _check(old, new)
    return tuple(i % old for i in range(new))


def _grow_group(operator: Operator, weights: Weights, old: int, new: int) -> tuple[Origin, ...]:
    _check(old, new)
    if operator == "rand_init":
        return tuple(Origin(i) if i < old else Origin(None, "fresh") for i in range(new))
    sources = stacking(old, new) if operator == "stacking" else interpolation(old, new)
    closed = operator == "identity"
    return tuple(
        Origin(source, weights, gate=0 if closed and source in sources[:i] else 1) for i, source in enumerate(sources)
    )


def _check(old: int, new: int) -> None:
    if not 1 <= old <= new:
        raise ValueError(
            f"cannot grow {old} layers into {new}: growth starts from at least one layer and never shrinks"
        )
