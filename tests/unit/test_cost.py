"""What a sub-network costs, against timm's published figures, fvcore's counter and arithmetic on paper."""

from itertools import pairwise

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from hypothesis import given, settings
from hypothesis import strategies as st

from scaleprog.growth.space import Subnet, View, ladder
from scaleprog.models import resolve_family
from scaleprog.models.cost import gmacs, parameters
from scaleprog.models.vit import ElasticViT
from scaleprog.recipe.keys import ModelSettings

DEIT_S = ModelSettings(name="deit_small_patch16_224")
LADDER = ladder(Subnet(224, 12), 0.5, 4, 32)


def on_paper(resolution: int, depth: int, width: int, patch: int, classes: int, channels: int) -> float:
    """Multiply-accumulates of a ViT with an MLP ratio of 4, in billions."""
    tokens = (resolution // patch) ** 2 + 1
    embedding = (tokens - 1) * channels * patch**2 * width
    layer = tokens * width * (3 * width + width + 4 * width + 4 * width) + 2 * tokens**2 * width
    return (embedding + depth * layer + width * classes) / 1e9


def test_published_figures_of_deit_s() -> None:
    """timm's model card: 4.6 GMACs, 22.1 M parameters."""
    assert gmacs(ElasticViT, DEIT_S, View(224), 12) == pytest.approx(4.6, rel=0.01)
    assert parameters(ElasticViT, DEIT_S, 12) == pytest.approx(22.05e6, rel=0.001)


@pytest.mark.parametrize(("depth", "millions"), [(6, 11.40), (8, 14.95), (10, 18.50), (12, 22.05)])
def test_parameters_of_the_ladder(depth: int, millions: float) -> None:
    plain = timm.create_model("deit_small_patch16_224", depth=depth)
    assert parameters(ElasticViT, DEIT_S, depth) == sum(p.numel() for p in plain.parameters())
    assert parameters(ElasticViT, DEIT_S, depth) == pytest.approx(millions * 1e6, abs=5e3)


@pytest.mark.parametrize("subnet", LADDER, ids=str)
def test_fvcore_counts_the_same(subnet: Subnet) -> None:
    """fvcore counts multiply-accumulates of plain timm; it sees attention only where it is not fused."""
    plain = timm.create_model("deit_small_patch16_224", img_size=subnet.resolution, depth=subnet.depth).eval()
    for block in plain.blocks:
        block.attn.fused_attn = False
    count = FlopCountAnalysis(plain, torch.zeros(1, 3, subnet.resolution, subnet.resolution))
    count.unsupported_ops_warnings(False)
    assert gmacs(ElasticViT, DEIT_S, View(subnet.resolution), subnet.depth) == pytest.approx(
        count.total() / 1e9, rel=0.01
    )


@given(st.integers(1, 14), st.integers(1, 6), st.sampled_from((4, 8)), st.integers(1, 50), st.sampled_from((1, 3)))
@settings(deadline=None, max_examples=20)
def test_arithmetic_on_paper(side: int, depth: int, patch: int, classes: int, channels: int) -> None:
    model = ModelSettings(
        name="deit_tiny_patch16_224", width=32, heads=4, patch=patch, classes=classes, channels=channels,
        resolution=14 * patch,
    )  # fmt: skip
    count = gmacs(ElasticViT, model, View(side * patch), depth)
    assert count == pytest.approx(on_paper(side * patch, depth, 32, patch, classes, channels), rel=1e-6)


@pytest.mark.parametrize("subnet", LADDER, ids=str)
def test_the_ladder_on_paper(subnet: Subnet) -> None:
    expected = on_paper(subnet.resolution, subnet.depth, 384, 16, 1000, 3)
    assert gmacs(ElasticViT, DEIT_S, View(subnet.resolution), subnet.depth) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("subnet", LADDER, ids=str)
def test_a_subset_of_the_patches_costs_what_as_many_patches_do_but_for_their_embedding(subnet: Subnet) -> None:
    count, total = (subnet.resolution // 16) ** 2, (224 // 16) ** 2
    embedding = (total - count) * 3 * 16**2 * 384 / 1e9
    expected = on_paper(subnet.resolution, subnet.depth, 384, 16, 1000, 3) + embedding
    assert gmacs(ElasticViT, DEIT_S, View(224, count), subnet.depth) == pytest.approx(expected, rel=1e-6)


def test_models_do_not_share_their_counts() -> None:
    """The counts are remembered by class, settings and size."""
    narrow = ModelSettings(name="deit_small_patch16_224", width=96, heads=3)
    first = gmacs(ElasticViT, DEIT_S, View(128), 6), parameters(ElasticViT, DEIT_S, 6)
    assert gmacs(ElasticViT, narrow, View(128), 6) < first[0] / 4
    assert parameters(ElasticViT, narrow, 6) < first[1] / 4
    assert (gmacs(ElasticViT, DEIT_S, View(128), 6), parameters(ElasticViT, DEIT_S, 6)) == first
    again = ModelSettings(name="deit_small_patch16_224")
    assert gmacs(ElasticViT, again, View(128), 6) == first[0]


def test_every_layer_and_pixel_costs() -> None:
    elastic, full, stride = resolve_family(DEIT_S)
    for depth in (6, 12):
        rising = [gmacs(elastic, DEIT_S, View(r), depth) for r in range(8 * stride, full.resolution + 1, 2 * stride)]
        assert all(a < b for a, b in pairwise(rising))
    one = gmacs(elastic, DEIT_S, View(224), 7) - gmacs(elastic, DEIT_S, View(224), 6)
    assert gmacs(elastic, DEIT_S, View(224), 12) - gmacs(elastic, DEIT_S, View(224), 6) == pytest.approx(6 * one)
