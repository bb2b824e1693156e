"""Growth of a plain timm model, outside of any run."""

import copy

import torch
from timm.layers import DropPath
from timm.models._input import update_model_args
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import nn

from scaleprog.errors import RecipeError
from scaleprog.growth.operators import Origin, grow
from scaleprog.models.vit import is_plain, last_linears
from scaleprog.recipe.keys import Operator


def grow_model(model: nn.Module, depth: int, operator: Operator = "interpolation") -> VisionTransformer:
    """A deeper copy of a timm VisionTransformer, grown like the network of a run.

    With `identity`, new layers start behind a closed gate and add nothing: their last linear layers are zero.
    `mogrow` differs from `interpolation` only in the weights that it reads, so give it a model of averaged weights.

    Args:
        model: a model whose layers are plain pre-norm blocks, such as timm's deit_* and vit_*; it is not modified.
        depth: layers of the copy, at least as many as `model` has.
        operator: chooses the source of each layer (paper 3.3).

    Raises:
        RecipeError: `model` is of another kind.
        ValueError: `depth` is too small, or there is no such operator.
    """
    if not (isinstance(model, VisionTransformer) and all(map(is_plain, model.blocks))):
        raise RecipeError(f"cannot grow {type(model).__name__}: only a timm VisionTransformer of plain blocks can grow")
    layer_map = grow(operator, (len(model.blocks),), (depth,))
    grown = copy.deepcopy(model)
    grown.blocks = nn.Sequential(*(_layer(model.blocks, origin) for origin in layer_map.groups[0]))
    _spread_drop_path(grown.blocks, getattr(model.blocks[-1].drop_path1, "drop_prob", 0.0))
    update_model_args(grown, depth=depth)  # timm writes them beside weights that it saves
    grown.feature_info = [{**model.feature_info[-1], "module": f"blocks.{place}"} for place in range(depth)]
    return grown


def _spread_drop_path(blocks: nn.Sequential, last: float) -> None:
    """Makes the rates of stochastic depth rise from 0 to that of the last layer, as in a model that timm creates."""
    for block, rate in zip(blocks, torch.linspace(0, last, len(blocks)).tolist()):
        for name in ("drop_path1", "drop_path2"):
            setattr(block, name, DropPath(rate) if rate else nn.Identity())


@torch.no_grad()
def _layer(blocks: nn.Sequential, origin: Origin) -> nn.Module:
    layer = copy.deepcopy(blocks[origin.source or 0])
    if origin.source is None:
        for name, module in layer.named_modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            init_weights_vit_timm(module, name)
    if origin.gate == 0:
        for last in last_linears(layer):
            for parameter in last.parameters():
                parameter.zero_()
    return layer
