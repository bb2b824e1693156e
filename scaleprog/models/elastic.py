"""What "elastic" means: a model in layer groups, run at any resolution with any of its layers active."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import timm
import torch
from timm.layers import resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from scaleprog.errors import RecipeError
from scaleprog.growth.operators import LayerMap
from scaleprog.growth.space import Subnet
from scaleprog.models.batch_norm import replace_batch_norms
from scaleprog.recipe.keys import ModelSettings

Active = tuple[tuple[int, ...], ...]  # per layer group, the positions of the layers that run, ascending


Output = Tensor | tuple[Tensor, ...]
"""What a network computes: (B, classes) logits; in training, a family may compute more."""


@dataclass(frozen=True)
class Plain:
    """A network under plain timm's names, and the call that builds the model: `builder`(**`arguments`)."""

    tensors: dict[str, Tensor]
    builder: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Targets:
    """What a network should answer to images.

    Args:
        mixed: (B, classes) fp32, how much of each class is in each image, smoothed.
        own: likewise, without what images took from others.
        tokens: likewise of each token of the grid, (B, tokens, classes); None: that of its image.
    """

    mixed: Tensor
    own: Tensor
    tokens: Tensor | None = None

    def of(self, rows: slice) -> "Targets":
        """Those of some of the images."""
        return Targets(self.mixed[rows], self.own[rows], None if self.tokens is None else self.tokens[rows])


@dataclass(frozen=True)
class TokenMix:
    """MixToken (arXiv 2104.10858): inside a box, images take the tokens of their partners.

    Args:
        partner: (B,) the row of each image's partner; partners of partners are the images themselves.
        inside: (B, h, w) bool, on the grid of the tokens that attend to each other; the same for both partners.
    """

    partner: Tensor
    inside: Tensor

    def of(self, rows: slice) -> "TokenMix":
        """That of some of the images, whose partners are among them."""
        return TokenMix(self.partner[rows] - rows.start, self.inside[rows])

    def swapped(self, tokens: Tensor) -> Tensor:
        """(B, H, W, C) tokens with those inside taken from the partners; H and W are multiples of h and w.

        Swapping twice gives the tokens back.
        """
        inside = self.inside
        for axis in (1, 2):
            inside = inside.repeat_interleave(tokens.shape[axis] // inside.shape[axis], axis)
        return torch.where(inside.unsqueeze(-1), tokens[self.partner], tokens)


@dataclass(frozen=True)
class Structure:
    """The structure of a network beyond its settings: for each layer of each group, whether it has a residual gate."""

    gated: tuple[tuple[bool, ...], ...]

    @classmethod
    def plain(cls, depths: Sequence[int]) -> "Structure":
        """Groups of `depths` layers without gates."""
        return cls(tuple((False,) * depth for depth in depths))

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers of each group."""
        return tuple(len(group) for group in self.gated)

    def after(self, layer_map: LayerMap) -> "Structure":
        """The structure after a growth with `layer_map`, which adds gates; layers also inherit their source's gate."""
        return Structure(
            tuple(
                tuple(o.gate == 0 or (o.source is not None and gated[o.source]) for o in group)
                for gated, group in zip(self.gated, layer_map.groups, strict=True)
            )
        )


class Residual(nn.Module):
    """The end of a residual branch: stochastic depth with scales drawn elsewhere, and an optional learnable gate.

    It replaces timm's DropPath, whose draws would depend on how the ranks share the batch.
    """

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(1)) if gated else None
        self.scale: Tensor | None = None  # (B,): 0 or 1 / keep probability; None keeps every sample

    def forward(self, branch: Tensor) -> Tensor:
        if self.gate is not None:
            branch = branch * self.gate
        if self.scale is not None:
            branch = branch * self.scale.to(branch.dtype).view(-1, *(1,) * (branch.ndim - 1))
        return branch


class ElasticModel(nn.Module, ABC):
    """A timm model (`net`) whose layer groups are elastic. A family says where its groups are and how they run.

    A Subnet's depth counts the layers of all groups; `split` divides it among them. The address of a layer is
    (group, position).
    """

    layer_groups: ClassVar[tuple[str, ...]]  # submodule of `net` that holds each group's layers
    heads: ClassVar[tuple[str, ...]]  # submodules of `net` that classify
    sees_subsets: ClassVar[bool] = True
    """Whether the family can run on a subset of the patches, see `forward`."""
    mixes_tokens: ClassVar[bool] = False
    """Whether the family can mix tokens, see `TokenMix`."""
    labels_tokens: ClassVar[bool] = False
    """Whether the family learns labels of tokens, see `Targets`."""
    whole_lanes: ClassVar[bool] = False
    """Whether a micro-batch must hold whole lanes, because images of a lane depend on one another."""

    def __init__(self, settings: ModelSettings, structure: Structure) -> None:
        super().__init__()
        self.structure = structure
        self.recompute = False  # whether backward recomputes a layer's activations instead of keeping them
        self.autocast = False  # whether torch.autocast computes in bf16 what it deems safe
        self.net = self.create(settings, structure.depths)
        for layers, gates in zip(self.groups(), structure.gated, strict=True):
            for layer, gated in zip(layers, gates, strict=True):
                _replace_drop_path(layer, gated, settings.name)
        self._residuals = [residuals(layer) for group in self.groups() for layer in group]
        self.norms = replace_batch_norms(self.net)

    @classmethod
    @abstractmethod
    def arguments(cls, settings: ModelSettings, depths: tuple[int, ...] | None) -> dict[str, Any]:
        """Arguments of timm.create_model for a network with `depths` layers (None: the settings' depth, or timm's)."""

    @classmethod
    def create(cls, settings: ModelSettings, depths: tuple[int, ...] | None) -> nn.Module:
        """timm's model on the current default device."""
        return timm.create_model(**cls.arguments(settings, depths))

    @classmethod
    @abstractmethod
    def split(cls, depth: int) -> tuple[int, ...]:
        """How many layers each group has in a network of `depth` layers."""

    @classmethod
    @abstractmethod
    def sizes(cls, net: nn.Module) -> tuple[Subnet, int]:
        """The full size of a timm model of this family and its stride in pixels."""

    @classmethod
    @abstractmethod
    def fits(cls, net: nn.Module) -> bool:
        """Whether timm's model is of this family."""

    @abstractmethod
    def run(self, images: Tensor, active: Active, kept: Tensor | None, mixed: TokenMix | None) -> Output:
        """(B, C, H, W) images through the active layers of each group; see `forward`."""

    @classmethod
    def loss(cls, output: Output, targets: Targets) -> Tensor:
        """The mean loss of the images, 0-D, from what `forward` returns in training."""
        assert isinstance(output, Tensor)
        return functional.cross_entropy(output.float(), targets.mixed)

    @classmethod
    def drop_rates(cls, rate: float, depths: Sequence[int]) -> Tensor:
        """The stochastic-depth rates (layers,) of groups of `depths` layers; `rate` is that of the last layer."""
        return torch.linspace(0, rate, sum(depths))

    @abstractmethod
    def fold_gates(self) -> None:
        """Multiplies every residual gate into the weights before it, so that plain timm computes the same."""

    def plain(self, settings: ModelSettings) -> "Plain":
        """The network for plain timm, once gates are folded."""
        tensors = dict(self.net.state_dict())
        for name, norm in self.norms.items():
            tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"] = norm.running.cpu().unbind()
            tensors[f"{name}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
        return Plain(tensors, "timm.create_model", self.arguments(settings, self.structure.depths))

    @classmethod
    def elastic_names(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A network of plain timm's, under the names that its tensors have in `net`; the inverse of `plain`."""
        return dict(tensors)

    @abstractmethod
    def resized(self, name: str, tensor: Tensor) -> Tensor:
        """A position or patch embedding of another size, resampled to that of `net`; other tensors as they are."""

    def forward(
        self,
        images: Tensor,
        active: Active | None = None,
        drop: Tensor | None = None,
        kept: Tensor | None = None,
        mixed: TokenMix | None = None,
    ) -> Output:
        """Computes (B, classes) logits; in training, what `loss` takes.

        Args:
            images: (B, C, H, W).
            active: the layers that run (None: all).
            drop: stochastic-depth scales (layers, 2, B), see `drop_scales` (None: every layer keeps every sample).
            kept: the patches that the network sees of each image, (B, patches) indices, see `draw_patches` (None: all).
            mixed: which tokens the images take from one another (None: none do).
        """
        for i, ends in enumerate(self._residuals):
            for j, end in enumerate(ends):
                end.scale = None if drop is None else drop[i, j]
        with torch.autocast(images.device.type, torch.bfloat16) if self.autocast else nullcontext():
            return self.run(images, active or self.all_active(), kept, mixed)

    def all_active(self) -> Active:
        """Every layer of each group."""
        return tuple(tuple(range(len(group))) for group in self.groups())

    def run_layer(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """Runs one layer; a family must call its layers through this method."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, tokens, use_reentrant=False)
        return layer(tokens)

    def groups(self) -> tuple[Sequence[nn.Module], ...]:
        """The layers of each group, in order."""
        return tuple(list(cast(nn.Sequential, self.net.get_submodule(name))) for name in self.layer_groups)

    @classmethod
    def locate(cls, parameter: str) -> tuple[int, int, str] | None:
        """(group, position, name inside the layer) of a parameter by its full name; None if it is in no layer."""
        for group, name in enumerate(cls.layer_groups):
            prefix = f"net.{name}."
            if parameter.startswith(prefix):
                position, _, inner = parameter.removeprefix(prefix).partition(".")
                return group, int(position), inner
        return None

    def no_weight_decay(self) -> set[str]:
        """Full names of parameters that weight decay must leave alone, beyond biases, norms and gates."""
        return {f"net.{name}" for name in cast(Any, self.net).no_weight_decay()}


def residuals(layer: nn.Module) -> list[Residual]:
    """The ends of a layer's residual branches, in order."""
    return [module for module in layer.modules() if isinstance(module, Residual)]


def resampled(positions: Tensor, old: int, new: int, antialias: bool) -> Tensor:
    """A (1, old^2, C) position embedding on a grid of new x new, (1, new^2, C), interpolated bicubically.

    It is a matrix product, because the gradient of torch's interpolation adds in random order on CUDA.
    """
    if old == new:
        return positions
    device = positions.device
    if device.type == "meta":  # torch would interpolate step by step in Python, for a shape
        return torch.empty(1, old * old, new * new, device=device).mT @ positions
    with torch.autocast(device.type, enabled=False):
        grids = torch.eye(old * old, device=device).view(-1, 1, old, old)
        resized = functional.interpolate(grids, size=(new, new), mode="bicubic", antialias=antialias)
        return (resized.flatten(1).T @ positions.float()).to(positions.dtype)


def resized_kernel(kernel: Tensor, shape: torch.Size) -> Tensor:
    """A convolution's (O, C, H, W) kernel for the channels and patches of `shape`: from 3 channels to any number, and
    between sizes of patches as FlexiViT does (arXiv 2212.08013)."""
    if kernel.ndim != 4:
        return kernel
    if kernel.shape[1] == 3:
        kernel = adapt_input_conv(shape[1], kernel)
    return resample_patch_embed(kernel, list(shape[2:]))


def drop_scales(rates: Tensor, batch: int, seed: int, step: int) -> Tensor | None:
    """Stochastic-depth scales (layers, 2, batch) of one global batch: 0, or 1 / keep; None if all `rates` are 0.

    They depend only on (seed, step), so each rank can take its rows of the batch.
    """
    if not rates.any():
        return None
    keep = 1 - rates.view(-1, 1, 1)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return (torch.rand(len(rates), 2, batch, generator=generator) < keep) / keep


def draw_patches(count: int, total: int, lanes: Iterable[int], per_lane: int, *entropy: int) -> Tensor:
    """Draws `count` of `total` patches for each image of a rank: (lanes * per_lane, count) indices, ascending.

    They depend only on `entropy` and the lane, so that the world size does not change them.
    """
    drawn = []
    for lane in lanes:
        seed = int(np.random.SeedSequence((*entropy, lane)).generate_state(1, np.uint64)[0])
        drawn.append(torch.rand(per_lane, total, generator=torch.Generator().manual_seed(seed)))
    return torch.cat(drawn).topk(count, sorted=False).indices.sort().values


def _replace_drop_path(layer: nn.Module, gated: bool, name: str) -> None:
    ends = [key for key in ("drop_path1", "drop_path2") if hasattr(layer, key)]
    if len(ends) != 2:
        raise RecipeError(f"model.name: a layer of {name} ({type(layer).__name__}) is not two residual branches")
    for key in ends:
        setattr(layer, key, Residual(gated))
