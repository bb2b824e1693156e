"""Growth of a plain timm model, outside of any run."""

import copy

import torch
from timm.models.vision_transformer import Block, VisionTransformer, init_weights_vit_timm
from torch import nn

from scaleprog.errors import RecipeError
from scaleprog.growth.operators import Origin, grow
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
    if not (isinstance(model, VisionTransformer) and all(isinstance(block, Block) for block in model.blocks)):
        raise RecipeError(f"cannot grow {type(model).__name__}: only a timm VisionTransformer of plain blocks can grow")
    layer_map = grow(operator, (len(model.blocks),), (depth,))
    grown = copy.deepcopy(model)
    grown.blocks = nn.Sequential(*(_layer(model.blocks, origin) for origin in layer_map.groups[0]))
    return grown


@torch.no_grad()
def _layer(blocks: nn.Sequential, origin: Origin) -> nn.Module:
    layer = copy.deepcopy(blocks[origin.source or 0])
    if origin.source is None:
        for name, module in layer.named_modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            init_weights_vit_timm(module, name)
    if origin.gate == 0:
        for last in (layer.get_submodule("attn.proj"), layer.get_submodule("mlp.fc2")):
            for parameter in last.parameters():
                parameter.zero_()
    return layer
