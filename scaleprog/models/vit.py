"""DeiT and ViT: timm's VisionTransformer family, one layer group."""

import math
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from scaleprog.errors import RecipeError
from scaleprog.growth.space import Subnet
from scaleprog.models.elastic import Active, ElasticModel, TokenMix, resampled, residuals, resized_kernel
from scaleprog.recipe.keys import ModelSettings


class ElasticViT(ElasticModel):
    """A timm VisionTransformer with elastic depth and resolution; positional encodings are interpolated on the fly."""

    layer_groups = ("blocks",)
    heads = ("head", "head_dist")
    net: VisionTransformer

    @classmethod
    def arguments(cls, settings: ModelSettings, depths: tuple[int, ...] | None) -> dict[str, Any]:
        overrides = {
            "img_size": settings.resolution,
            "patch_size": settings.patch,
            "embed_dim": settings.width,
            "depth": settings.depth if depths is None else depths[0],
            "num_heads": settings.heads,
            "weight_init": settings.init,
        }
        return {
            "model_name": settings.name,
            "in_chans": settings.channels,
            "num_classes": settings.classes,
            "dynamic_img_size": True,
            **{key: value for key, value in overrides.items() if value is not None},
        }

    @classmethod
    def create(cls, settings: ModelSettings, depths: tuple[int, ...] | None) -> nn.Module:
        net = super().create(settings, depths)
        if settings.name.startswith("deit") and isinstance(net, VisionTransformer) and net.cls_token is not None:
            nn.init.trunc_normal_(net.cls_token, std=0.02)  # as DeiT draws it; timm's own draw has 1e-6
        return net

    @classmethod
    def fits(cls, net: nn.Module) -> bool:
        # a growth does not move buffers
        return isinstance(net, VisionTransformer) and all(map(is_plain, net.blocks)) and not list(net.buffers())

    @classmethod
    def split(cls, depth: int) -> tuple[int, ...]:
        return (depth,)

    @classmethod
    def sizes(cls, net: nn.Module) -> tuple[Subnet, int]:
        assert isinstance(net, VisionTransformer)
        height, width = net.patch_embed.img_size
        if height != width:
            raise RecipeError(
                f"model.resolution: set it: images must be square, but timm's default is {height} x {width}"
            )
        return Subnet(height, len(net.blocks)), int(net.patch_embed.feat_ratio())

    def run(self, images: Tensor, active: Active, kept: Tensor | None, mixed: TokenMix | None) -> Tensor:
        net = self.net
        tokens = _with_positions(net, net.patch_embed(images))
        if kept is not None:
            prefix, patches = tokens[:, : net.num_prefix_tokens], tokens[:, net.num_prefix_tokens :]
            patches = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
            tokens = torch.cat((prefix, patches), 1)
        tokens = net.norm_pre(net.patch_drop(tokens))
        for position in active[0]:
            tokens = self.run_layer(net.blocks[position], tokens)
        return net.forward_head(net.norm(tokens))

    def resized(self, name: str, tensor: Tensor) -> Tensor:
        net = self.net
        if name == "patch_embed.proj.weight":
            return resized_kernel(tensor, net.patch_embed.proj.weight.shape)
        if name == "pos_embed" and tensor.ndim == 3 and len(tensor) == 1:
            prefix = 0 if net.no_embed_class else net.num_prefix_tokens
            side = math.isqrt(max(0, tensor.shape[1] - prefix))
            if side and side * side == tensor.shape[1] - prefix:
                return resample_abs_pos_embed(tensor, net.patch_embed.grid_size, num_prefix_tokens=prefix)
        return tensor

    @torch.no_grad()
    def fold_gates(self) -> None:
        for block in self.net.blocks:
            lasts = last_linears(block)
            scales = block.get_submodule("ls1"), block.get_submodule("ls2")
            for end, scale, last in zip(residuals(block), scales, lasts):
                if end.gate is None:
                    continue
                for parameter in scale.parameters() if list(scale.parameters()) else last.parameters():
                    parameter.mul_(end.gate)
                end.gate = None


def is_plain(block: nn.Module) -> bool:
    """Whether a block has the two residual branches, and computes the same at every depth: differential attention, for
    one, has a number that follows from its position."""
    return isinstance(block, Block) and isinstance(block.attn, Attention)


def last_linears(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The last linear layer of each residual branch of a block."""
    mlp = block.get_submodule("mlp")
    return block.get_submodule("attn.proj"), mlp.get_submodule("w2" if isinstance(mlp, GeGluMlp) else "fc2")


def _with_positions(net: VisionTransformer, patches: Tensor) -> Tensor:
    """timm's `_pos_embed`: (B, H, W, C) patches -> (B, tokens, C), prefix tokens first, with position embeddings."""
    side, full = patches.shape[1], net.patch_embed.grid_size[0]
    if net.pos_embed is None or side == full:
        return net._pos_embed(patches)
    embedded = 0 if net.no_embed_class else net.num_prefix_tokens
    first, table = net.pos_embed[:, :embedded], net.pos_embed[:, embedded:]
    table = resampled(table, full, side, antialias=True)
    learned = (net.cls_token, net.dist_token if isinstance(net, VisionTransformerDistilled) else net.reg_token)
    prefix = [token.expand(len(patches), -1, -1) for token in learned if token is not None]
    tokens = patches.flatten(1, 2)
    if net.no_embed_class:
        return net.pos_drop(torch.cat((*prefix, tokens + table), 1))
    return net.pos_drop(torch.cat((*prefix, tokens), 1) + torch.cat((first, table), 1))
