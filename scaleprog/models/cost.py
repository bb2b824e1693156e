"""The cost of a Subnet: parameters, multiply-accumulates and activations, counted by torch without any data."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from scaleprog.growth.space import Subnet, View
from scaleprog.models.elastic import ElasticModel, Structure
from scaleprog.recipe.keys import ModelSettings, Precision

Unit = tuple[tuple[int, ...], ...]
"""Shapes of the parameters that an engine gathers together."""


@cache
def parameters(family: type[ElasticModel], model: ModelSettings, depth: int) -> int:
    """Number of parameters of the network of `depth` layers."""
    return _by_layer(
        family.split(depth), lambda depths: sum(p.numel() for p in _on_paper(family, model, depths).parameters())
    )


@cache
def units(family: type[ElasticModel], model: ModelSettings, depth: int) -> tuple[Unit, ...]:
    """Parameter shapes of the network of `depth` layers: first those outside the layers, then those of each layer."""
    depths = family.split(depth)
    root: list[tuple[int, ...]] = []
    layers: list[list[tuple[int, ...]]] = [[] for _ in depths]  # one of each group: the others have the same shapes
    for name, parameter in _on_paper(family, model, (1,) * len(depths)).named_parameters():
        place = family.locate(name)
        (root if place is None else layers[place[0]]).append(tuple(parameter.shape))
    return tuple(root), *(tuple(layer) for layer, d in zip(layers, depths, strict=True) for _ in range(d))


@cache
def gmacs(family: type[ElasticModel], model: ModelSettings, view: View, depth: int) -> float:
    """Billions of multiply-accumulates of one image's forward pass through `depth` layers, attention included."""
    return _by_layer(family.split(depth), lambda depths: _flops(family, model, view, depths)) / 2e9


@cache
def _flops(family: type[ElasticModel], model: ModelSettings, view: View, depths: tuple[int, ...]) -> int:
    """Operations of one more image in a batch: position embeddings are resampled once per batch."""
    network, counts = _on_paper(family, model, depths), []
    for images in (1, 2):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            kept = None if view.patches is None else torch.empty(images, view.patches, dtype=torch.int64)
            network(torch.empty(images, model.channels, view.pixels, view.pixels), kept=kept)
        counts.append(counter.get_total_flops())
    return counts[1] - counts[0]


def _by_layer(depths: tuple[int, ...], count: Callable[[tuple[int, ...]], int]) -> int:
    """`count` of the network with `depths` layers in its groups. Within a group, all layers cost the same. So it
    extrapolates from networks of one or two layers per group: a deep one takes seconds to build, even without data."""
    ones = (1,) * len(depths)
    least = count(ones)
    more = (count((*ones[:g], 2, *ones[g + 1 :])) - least if depth > 1 else 0 for g, depth in enumerate(depths))
    return least + sum((depth - 1) * each for depth, each in zip(depths, more, strict=True))


def activations(
    family: type[ElasticModel],
    model: ModelSettings,
    subnet: Subnet,
    images: int,
    precision: Precision,
    recompute: bool = False,
) -> int:
    """Bytes that autograd keeps between forward and backward, without parameters.

    Assumes fused attention, which torch uses wherever it can; without fusion, add the (tokens, tokens) matrices.

    Args:
        family: the elastic family.
        model: the recipe's model settings.
        subnet: the network's size.
        images: number of images.
        precision: of forward and backward.
        recompute: whether only every layer's input is kept, plus everything in the largest layer, which backward
            computes again.
    """
    one, two = (_kept(family, model, subnet, n, precision, recompute) for n in (1, 2))
    return one + (images - 1) * (two - one)


@cache
def _kept(
    family: type[ElasticModel],
    model: ModelSettings,
    subnet: Subnet,
    images: int,
    precision: Precision,
    recompute: bool,
) -> int:
    network = _on_paper(family, model, family.split(subnet.depth))
    network.autocast = precision == "autocast"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    kept: dict[int, dict[int, torch.UntypedStorage]] = {-1: {}}  # by layer; -1 is everything outside the layers
    inputs: list[int] = []
    place = -1

    def enter(_: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal place
        place = len(inputs)
        kept[place] = {}
        inputs.append(arguments[0].untyped_storage().nbytes())

    def leave(*_: Any) -> None:
        nonlocal place
        place = -1

    for group in network.groups():
        for layer in group:
            layer.register_forward_pre_hook(enter)
            layer.register_forward_hook(leave)

    with FakeTensorMode():  # not meta tensors: torch fuses attention on real devices only
        weights = {
            name: torch.empty(p.shape, dtype=dtype, requires_grad=True) for name, p in network.named_parameters()
        }
        own = {weight.untyped_storage()._cdata for weight in weights.values()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                own.add(storage._cdata)
                kept[place][storage._cdata] = storage
            return tensor

        batch = torch.empty(images, model.channels, subnet.resolution, subnet.resolution, dtype=dtype)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = functional_call(network, weights, (batch,))
        sizes = {at: sum(storage.nbytes() for storage in storages.values()) for at, storages in kept.items()}
        del logits
    outside = sizes.pop(-1)
    if not recompute:
        return outside + sum(sizes.values())
    return outside + sum(inputs) + max(size - inputs[at] for at, size in sizes.items())


def _on_paper(family: type[ElasticModel], model: ModelSettings, depths: tuple[int, ...]) -> ElasticModel:
    with torch.device("meta"):
        return family(model, Structure.plain(depths))
