"""Which models of timm can be grown, and with which sizes."""

import pytest
import torch
from pydantic import ValidationError

from scaleprog.errors import RecipeError
from scaleprog.growth.space import Subnet
from scaleprog.models import resolve_family
from scaleprog.models.elastic import Structure
from scaleprog.models.vit import ElasticViT
from scaleprog.recipe.keys import ModelSettings


@pytest.mark.parametrize(
    ("name", "full", "stride"),
    [
        ("deit_tiny_patch16_224", (224, 12), 16),
        ("deit3_small_patch16_224", (224, 12), 16),
        ("deit_tiny_distilled_patch16_224", (224, 12), 16),
        ("vit_tiny_patch16_224", (224, 12), 16),
        ("vit_small_patch32_224", (224, 12), 32),
        ("vit_base_patch16_clip_224", (224, 12), 16),
        ("vit_base_patch16_reg4_gap_256", (256, 12), 16),
        ("vit_small_patch14_reg4_dinov2", (518, 12), 14),
        ("vit_so150m_patch16_reg4_map_256", (256, 18), 16),
    ],
)
def test_families(name: str, full: tuple[int, int], stride: int) -> None:
    assert resolve_family(ModelSettings(name=name)) == (ElasticViT, Subnet(*full), stride)


def test_settings_override_the_sizes() -> None:
    model = ModelSettings(name="deit_tiny_patch16_224", resolution=28, patch=4, width=48, depth=8, heads=3, channels=1)
    assert resolve_family(model) == (ElasticViT, Subnet(28, 8), 4)
    network = ElasticViT(model, Structure.plain((5,)))
    assert [len(group) for group in network.groups()] == [5], "the structure's depth goes before the settings'"
    assert network.net.embed_dim == 48
    assert network.net.blocks[0].attn.num_heads == 3
    assert network(torch.zeros(2, 1, 20, 20)).shape == (2, 1000)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "vit_relpos_small_patch16_224",
        "vit_small_patch16_18x2_224",  # parallel branches
        "vit_small_resnet26d_224",  # batch norm: running statistics have no layer map
        "swin_tiny_patch4_window7_224",
        "eva02_tiny_patch14_224",
    ],
)
def test_other_models_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"model.name: {name} is not in an elastic family"):
        resolve_family(ModelSettings(name=name))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("deit_smal_patch16_224", "did you mean deit_small_patch16_224 or"),
        ("vit_tiny_patch16_225", "did you mean vit_tiny_patch16_224 or"),
        ("qqqqqqqq", "did you mean deit_.*"),
    ],
)
def test_a_misspelt_name_gets_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match=f"model.name: timm has no model '{name}'; {nearest}"):
        resolve_family(ModelSettings(name=name))


def test_sizes_that_timm_refuses() -> None:
    with pytest.raises(RecipeError, match=r"cannot build deit_tiny_patch16_224 with these sizes: .*divisible"):
        resolve_family(ModelSettings(name="deit_tiny_patch16_224", width=64, heads=5))


@pytest.mark.parametrize("change", [{"depth": 0}, {"patch": 0}, {"drop_path": 1.0}, {"drop_path": -0.1}, {"dept": 3}])
def test_settings_that_cannot_be(change: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(change))):
        ModelSettings(name="deit_tiny_patch16_224", **change)
