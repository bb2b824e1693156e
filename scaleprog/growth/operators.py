"""Growth operators zeta (paper 3.3) as layer maps: for each layer of the new network, its source in the old one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from scaleprog.recipe.keys import Operator

Weights = Literal["online", "ema", "fresh"]


@dataclass(frozen=True)
class Origin:
    """The source of one layer of the new network.

    `source` is the index of the old layer in the same group (None: fresh). `gate` is the initial value of the layer's
    residual gate: 1, or 0 for a layer that must not change the network's function when it grows (ReZero).
    """

    source: int | None
    weights: Weights = "online"
    gate: Literal[0, 1] = 1


@dataclass(frozen=True)
class LayerMap:
    """The origin of every layer of every group of a new network, which a growth or a search's choice builds.

    `rest`: which weights everything outside the layers (embeddings, norms, head) comes from.
    """

    groups: tuple[tuple[Origin, ...], ...]
    rest: Weights = "online"

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers of each group of the new network."""
        return tuple(len(group) for group in self.groups)


def grow(operator: Operator, old: Sequence[int], new: Sequence[int]) -> LayerMap:
    """The layer map with which `operator` grows each group g from `old[g]` to `new[g]` layers.

    Raises ValueError unless 1 <= `old[g]` <= `new[g]`, and for an unknown operator.
    """
    rule = rule_of(operator)
    groups = (_origins(rule, sources(operator, o, n)) for o, n in zip(old, new, strict=True))
    return LayerMap(tuple(groups), rest=rule.weights)


def keep(active: Sequence[Sequence[int]]) -> LayerMap:
    """The layer map that keeps only the `active` layers of each group, to pass on a supernet's weights."""
    return LayerMap(tuple(tuple(Origin(i) for i in group) for group in active))


def fresh(depths: Sequence[int]) -> LayerMap:
    """The layer map of a network that starts from random initialization."""
    return LayerMap(tuple((Origin(None, "fresh"),) * depth for depth in depths), rest="fresh")


def sources(operator: Operator, old: int, new: int) -> tuple[int | None, ...]:
    """For each of the `new` layers of a group, the index of its source among the `old` layers (None: fresh).

    Raises ValueError unless 1 <= `old` <= `new`, and for an unknown operator.
    """
    if not 1 <= old <= new:
        raise ValueError(
            f"cannot grow {old} layers into {new}: growth starts from at least one layer and never shrinks"
        )
    return rule_of(operator).sources(old, new)


def _origins(rule: "Rule", found: Sequence[int | None]) -> tuple[Origin, ...]:
    copies = [source in found[:i] for i, source in enumerate(found)]
    return tuple(
        Origin(None, "fresh") if source is None else Origin(source, rule.weights, 0 if copy and rule.closed else 1)
        for source, copy in zip(found, copies)
    )


# ---- the operators; docs/extending.md says how to add one


@dataclass(frozen=True)
class Rule:
    """How an operator grows one group of layers.

    Args:
        sources: (old, new) numbers of layers -> for each new layer, the index of its source (None: fresh).
        weights: which weights of the old network to copy.
        closed: whether every copy of a layer but the first starts behind a residual gate of 0.
    """

    sources: Callable[[int, int], tuple[int | None, ...]]
    weights: Weights = "online"
    closed: bool = False


def rule_of(operator: str) -> Rule:
    """The rule of an operator. Raises ValueError for an unknown name."""
    if operator not in RULES:
        raise ValueError(f"{operator!r} is not a growth operator; choose from {', '.join(RULES)}")
    return RULES[operator]


def interpolation(old: int, new: int) -> tuple[int, ...]:
    """Places copies next to their source, beginning with the final layers.

    With q, m = divmod(new, old) the first old - m layers appear q times each and the last m layers q + 1 times each.
    """
    q, m = divmod(new, old)
    return tuple(i for i in range(old) for _ in range(q + 1 if i >= old - m else q))


def stacking(old: int, new: int) -> tuple[int, ...]:
    """The old stack, repeated on top of itself."""
    return tuple(i % old for i in range(new))


def rand_init(old: int, new: int) -> tuple[int | None, ...]:
    """The old layers, and fresh ones on top."""
    return tuple(i if i < old else None for i in range(new))


RULES: dict[str, Rule] = {
    "rand_init": Rule(rand_init),
    "stacking": Rule(stacking),
    "interpolation": Rule(interpolation),
    "identity": Rule(interpolation, closed=True),
    "mogrow": Rule(interpolation, weights="ema"),
}
