"""VOLO: timm's Vision Outlooker, two layer groups (outlookers on a fine grid, transformers on a coarse one)."""

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

import timm
import torch
from timm.layers import make_divisible
from timm.models.volo import VOLO
from torch import Tensor, nn
from torch.nn import functional

from scaleprog.errors import RecipeError
from scaleprog.growth.space import Subnet
from scaleprog.models.elastic import (
    Active,
    ElasticModel,
    Output,
    Plain,
    Targets,
    TokenMix,
    resampled,
    residuals,
    resized_kernel,
)
from scaleprog.recipe.keys import ModelSettings

OUTLOOKERS = 0.23
"""The part of the layers that are outlookers (authors' code)."""
PATCHES = (4, 8, 16)
DENSE = 0.5
"""Weight of the dense loss, and of the best dense logits in evaluation (arXiv 2104.10858)."""


@cache
def _named(name: str) -> nn.Module:
    """timm's model of this name, on meta, to look at: all callers get the same one."""
    with torch.device("meta"):
        return timm.create_model(name)


class ElasticVolo(ElasticModel):
    """A timm VOLO with elastic depth and resolution.

    Of a timm model with transformers in several stages of the same width, such as volo_d1_224 with 4, 8, and 2, the
    elastic model has all in one.
    """

    layer_groups = ("network.0", "network.2")
    heads = ("head", "aux_head")
    sees_subsets = False  # outlookers need the whole grid
    mixes_tokens = labels_tokens = whole_lanes = True
    net: VOLO

    @classmethod
    def create(cls, settings: ModelSettings, depths: tuple[int, ...] | None) -> nn.Module:
        if not cls._is_volo(plain := _named(settings.name)):
            return plain
        return VOLO(**cls.arguments(settings, depths))

    @classmethod
    def arguments(cls, settings: ModelSettings, depths: tuple[int, ...] | None) -> dict[str, Any]:
        plain = cast(VOLO, _named(settings.name))
        first, last = (cast(Any, plain.network.get_submodule(name)) for name in ("0.0", "2.0"))
        fine = cast(Any, plain.patch_embed)
        wide, heads = settings.width or plain.pos_embed.shape[-1], settings.heads or last.attn.num_heads
        narrow = settings.width // 2 if settings.width else fine.proj.out_channels
        stem = max(1, fine.conv[0].out_channels * wide // plain.pos_embed.shape[-1])
        few = max(1, settings.heads // 2) if settings.heads else first.attn.num_heads
        own = fine.proj.kernel_size[0] * fine.conv[0].stride[0]
        patch = settings.patch or own
        if patch not in PATCHES:
            raise RecipeError(f"model.patch: VOLO has patches of {', '.join(map(str, PATCHES))} pixels, not {patch}")
        stride = patch * plain.pooling_scale
        side = settings.resolution or plain.pos_embed.shape[1] * own * plain.pooling_scale
        if side % stride:
            near = side // stride * stride
            raise RecipeError(f"model.resolution: {side} is not a multiple of {stride}; use {near} or {near + stride}")
        if settings.init is not None:
            raise RecipeError(f"model.init: {settings.init}, but VOLO has one scheme of initialization; leave it out")
        if wide % heads or narrow % few:
            raise RecipeError(
                f"model.heads: {heads} heads of transformers and {few} of outlookers do not divide the widths {wide} "
                f"and {narrow}; set model.width to a multiple of {math.lcm(heads, 2 * few)}, or model.heads"
            )
        layers = depths or cls.split(settings.depth or sum(cls._depths(plain)))
        return {
            "layers": (*layers, 0, 0),
            "img_size": side,
            "in_chans": settings.channels,
            "num_classes": settings.classes,
            "patch_size": patch,
            "stem_hidden_dim": stem,
            "embed_dims": (narrow, wide, wide, wide),
            "num_heads": (few, heads, heads, heads),
            "mlp_ratio": last.mlp.fc1.out_features / last.mlp.fc1.in_features,
        }

    @classmethod
    def fits(cls, net: nn.Module) -> bool:
        return cls._is_volo(net)

    @classmethod
    def _is_volo(cls, net: nn.Module) -> bool:
        return isinstance(net, VOLO) and net.global_pool == "token" and net.aux_head is not None

    @classmethod
    def _depths(cls, net: VOLO) -> tuple[int, int]:
        stages = [stage for stage in net.network if isinstance(stage, nn.Sequential)]
        return len(stages[0]), sum(map(len, stages[1:]))

    @classmethod
    def split(cls, depth: int) -> tuple[int, ...]:
        if depth < 2:
            raise RecipeError(f"model.depth: VOLO needs at least 2 layers, one of each kind, got {depth}")
        outlookers = min(make_divisible(OUTLOOKERS * depth, 2), depth - 1)
        return outlookers, depth - outlookers

    @classmethod
    def sizes(cls, net: nn.Module) -> tuple[Subnet, int]:
        assert isinstance(net, VOLO)
        fine = cast(Any, net.patch_embed)
        stride = fine.proj.kernel_size[0] * fine.conv[0].stride[0] * net.pooling_scale
        return Subnet(net.pos_embed.shape[1] * stride, sum(cls._depths(net))), stride

    @classmethod
    def drop_rates(cls, rate: float, depths: Sequence[int]) -> Tensor:
        rates = torch.linspace(0, rate, sum(depths))
        rates[: depths[0]] = 0  # as in timm: outlookers are never dropped
        return rates

    def run(self, images: Tensor, active: Active, kept: Tensor | None, mixed: TokenMix | None) -> Output:
        assert kept is None, "outlookers need the whole grid"
        net = self.net
        tokens = net.patch_embed(images).permute(0, 2, 3, 1)
        if mixed is not None:
            tokens = mixed.swapped(tokens)
        outlookers, transformers = self.groups()
        for position in active[0]:
            tokens = self.run_layer(outlookers[position], tokens)
        tokens = net.network[1](tokens)
        positions = net.pos_embed.flatten(1, 2), net.pos_embed.shape[1], tokens.shape[1]
        tokens = net.pos_drop(tokens + resampled(*positions, antialias=False).view(1, *tokens.shape[1:]))
        for position in active[1]:
            tokens = self.run_layer(transformers[position], tokens)
        ended = net.norm(net.forward_cls(tokens.flatten(1, 2)))
        whole, dense = net.head(net.head_drop(ended[:, 0])), cast(nn.Linear, net.aux_head)(ended[:, 1:])
        if not self.training:
            return whole + DENSE * dense.max(1).values
        if mixed is not None:
            # flat, because a view of the grid makes FSDP2 warn of in-place operations
            dense = torch.where(mixed.inside.flatten(1).unsqueeze(-1), dense[mixed.partner], dense)
        return whole, dense

    @classmethod
    def loss(cls, output: Output, targets: Targets) -> Tensor:
        whole, dense = output
        tokens = targets.own.unsqueeze(1).expand_as(dense) if targets.tokens is None else targets.tokens
        return functional.cross_entropy(whole.float(), targets.mixed) + DENSE * functional.cross_entropy(
            dense.float().flatten(0, 1), tokens.flatten(0, 1)
        )

    def plain(self, settings: ModelSettings) -> Plain:
        """Under the names of timm's own model if that has as many layers; timm's entry points build no others."""
        found = super().plain(settings)
        named = cast(VOLO, _named(settings.name))
        sizes = ("patch", "width", "depth", "heads")
        if self._depths(named) != self.structure.depths or any(getattr(settings, key) for key in sizes):
            return Plain(found.tensors, "timm.models.volo.VOLO", found.arguments)
        stages = [(number, stage) for number, stage in enumerate(named.network) if isinstance(stage, nn.Sequential)]
        places = [f"network.{number}.{i}" for number, stage in stages[1:] for i in range(len(stage))]
        tensors = {}
        for name, tensor in found.tensors.items():
            if name.startswith("network.2."):
                position, _, inner = name.removeprefix("network.2.").partition(".")
                name = f"{places[int(position)]}.{inner}"
            tensors[name] = tensor
        arguments = {
            "model_name": settings.name,
            "img_size": found.arguments["img_size"],
            "in_chans": settings.channels,
            "num_classes": settings.classes,
        }
        return Plain(tensors, "timm.create_model", arguments)

    @classmethod
    def elastic_names(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Puts the transformers of all stages into one. A layer or a stage that is missing leaves a gap."""
        found = {name: re.fullmatch(r"network\.([2-9])\.(\d{1,3})\.(.+)", name) for name in tensors}
        places = [(int(match[1]), int(match[2])) for match in found.values() if match]
        depths = [max([1, *(layer + 1 for of, layer in places if of == stage)]) for stage in range(2, 10)]
        return {
            f"network.2.{sum(depths[: int(match[1]) - 2]) + int(match[2])}.{match[3]}" if match else name: tensors[name]
            for name, match in found.items()
        }

    def resized(self, name: str, tensor: Tensor) -> Tensor:
        net = self.net
        if name in ("patch_embed.conv.0.weight", "patch_embed.proj.weight"):
            return resized_kernel(tensor, net.get_parameter(name).shape)
        if name == "pos_embed" and tensor.ndim == 4 and len(tensor) == 1 and tensor.shape[1] == tensor.shape[2]:
            side = net.pos_embed.shape[1]
            positions = resampled(tensor.flatten(1, 2), tensor.shape[1], side, antialias=False)
            return positions.view(1, side, side, -1)
        return tensor

    @torch.no_grad()
    def fold_gates(self) -> None:
        for group in self.groups():
            for layer in group:
                for end, name in zip(residuals(layer), ("attn.proj", "mlp.fc2"), strict=True):
                    if end.gate is not None:
                        for parameter in layer.get_submodule(name).parameters():
                            parameter.mul_(end.gate)
                        end.gate = None
