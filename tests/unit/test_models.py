"""Elastic ViTs: whatever part of them runs, it computes what plain timm would."""

import copy
from collections.abc import Sequence
from itertools import combinations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from scaleprog.errors import RecipeError
from scaleprog.growth.operators import fresh, grow, keep
from scaleprog.models import resolve_family
from scaleprog.models.elastic import Structure, draw_patches, drop_scales, residuals
from scaleprog.models.vit import ElasticViT
from scaleprog.recipe.keys import ModelSettings

NAMES = (
    "deit_tiny_patch16_224",
    "deit3_small_patch16_224",  # LayerScale, class token without position
    "deit_tiny_distilled_patch16_224",  # two heads
    "vit_base_patch16_clip_224",  # a norm before the layers
    "vit_base_patch16_reg4_gap_256",  # registers, mean pooling
    "vit_so150m_patch16_reg4_map_256",  # attention pooling
)
SIZES = {"resolution": 32, "patch": 8, "width": 24, "heads": 3, "classes": 7, "channels": 2}


def plain_timm(name: str, depth: int, resolution: int = 32) -> nn.Module:
    return timm.create_model(
        name, img_size=resolution, patch_size=8, embed_dim=24, num_heads=3, num_classes=7, in_chans=2, depth=depth
    ).eval()


def elastic(name: str, gated: Sequence[bool], seed: int = 0, **changes: object) -> ElasticViT:
    """A small network in evaluation mode, none of whose parameters is zero or negligible."""
    torch.manual_seed(seed)
    network = ElasticViT(ModelSettings(name=name, **(SIZES | changes)), Structure((tuple(gated),))).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.1, 0.3)
    return network


@pytest.mark.parametrize(
    ("name", "spread"),
    [("deit_tiny_patch16_224", 0.02), ("deit3_small_patch16_224", 0.02), ("vit_tiny_patch16_224", 1e-6)],
)
def test_the_class_token_of_deit_begins_as_its_authors_draw_it(name: str, spread: float) -> None:
    torch.manual_seed(0)
    settings = ModelSettings(name=name, **(SIZES | {"width": 768}))
    token = ElasticViT(settings, Structure.plain((1,))).net.cls_token
    assert token.std().item() == pytest.approx(spread, rel=0.1)


def images(batch: int = 3, resolution: int = 32) -> Tensor:
    return torch.randn(batch, 2, resolution, resolution, generator=torch.Generator().manual_seed(1))


def gates(network: ElasticViT) -> list[nn.Parameter]:
    return [end.gate for block in network.net.blocks for end in residuals(block) if end.gate is not None]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert expected.std() > 1e-2, "logits that say nothing prove nothing"
    assert (found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


# ---- logits


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_are_those_of_timm(name: str) -> None:
    network = elastic(name, [False] * 3)
    plain = plain_timm(name, 3)
    plain.load_state_dict(network.net.state_dict(), strict=True)
    assert_close(network(images()), plain(images()))


@pytest.mark.parametrize("resolution", [16, 24, 40])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_at_other_resolutions_are_those_of_timm(name: str, resolution: int) -> None:
    """Twice: timm interpolating on the fly, and a timm model built for that resolution with interpolated positions."""
    network = elastic(name, [False] * 2)
    state = network.net.state_dict()
    logits = network(images(resolution=resolution))

    dynamic = timm.create_model(
        name, img_size=32, patch_size=8, embed_dim=24, num_heads=3, num_classes=7, in_chans=2, depth=2,
        dynamic_img_size=True,
    ).eval()  # fmt: skip
    dynamic.load_state_dict(state, strict=True)
    assert_close(logits, dynamic(images(resolution=resolution)))

    built = plain_timm(name, 2, resolution)
    prefix = state["pos_embed"].shape[1] - 16
    positions = resample_abs_pos_embed(state["pos_embed"], [resolution // 8] * 2, [4, 4], num_prefix_tokens=prefix)
    built.load_state_dict({**state, "pos_embed": positions}, strict=True)
    assert_close(logits, built(images(resolution=resolution)))


def without(state: dict[str, Tensor], active: Sequence[int]) -> dict[str, Tensor]:
    """A state dict of only the active layers, renumbered."""
    kept = {name: value for name, value in state.items() if not name.startswith("blocks.")}
    for new, old in enumerate(active):
        prefix = f"blocks.{old}."
        kept |= {f"blocks.{new}." + n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    return kept


@pytest.mark.parametrize("name", NAMES[:3])
@torch.no_grad()
def test_active_layers_are_a_smaller_timm_model(name: str) -> None:
    """Every subset of four layers, at a resolution that is not the full one."""
    network = elastic(name, [False] * 4)
    seen = []
    for size in (1, 2, 3, 4):
        plain = plain_timm(name, size, 32)
        plain.set_input_size((24, 24))
        for active in combinations(range(4), size):
            state = without(network.net.state_dict(), active)
            prefix = state["pos_embed"].shape[1] - 16
            state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [3, 3], [4, 4], num_prefix_tokens=prefix)
            plain.load_state_dict(state, strict=True)
            logits = network(images(resolution=24), (active,))
            assert_close(logits, plain(images(resolution=24)))
            seen.append(logits)
    assert all((a - b).abs().max() > 1e-3 for a, b in combinations(seen, 2)), "every subset computes something else"
    assert torch.equal(network(images(resolution=24)), seen[-1]), "None: all layers"


# ---- patches


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_subset_of_the_patches_is_timm_on_their_tokens_alone(name: str) -> None:
    """The reference embeds whole images and takes the tokens image by image."""
    network = elastic(name, [False] * 2)
    plain = plain_timm(name, 2)
    plain.load_state_dict(network.net.state_dict(), strict=True)
    kept = draw_patches(5, 16, range(3), 1, 7)
    embedded = plain._pos_embed(plain.patch_embed(images()))
    first = plain.num_prefix_tokens
    expected = []
    for tokens, chosen in zip(embedded, kept.tolist()):
        row = torch.stack([*tokens[:first], *(tokens[first + i] for i in chosen)]).unsqueeze(0)
        expected.append(plain.forward_head(plain.norm(plain.blocks(plain.norm_pre(row)))))
    assert_close(network(images(), kept=kept), torch.cat(expected))


@pytest.mark.parametrize("name", NAMES[:2])
@torch.no_grad()
def test_all_patches_in_any_order_are_the_whole_image(name: str) -> None:
    network, order = elastic(name, [False] * 2), torch.randperm(16).expand(3, -1)
    assert_close(network(images(), kept=order), network(images()))


@given(st.integers(1, 20), st.integers(0, 20), st.sampled_from((1, 2, 4, 8)), st.integers(1, 3), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_no_number_of_ranks_changes_the_patches(count: int, more: int, world: int, per_lane: int, step: int) -> None:
    lanes = range(8)
    whole = draw_patches(count, count + more, lanes, per_lane, 0, step)
    parts = [lanes[8 * rank // world : 8 * (rank + 1) // world] for rank in range(world)]
    assert torch.equal(whole, torch.cat([draw_patches(count, count + more, part, per_lane, 0, step) for part in parts]))
    for row in whole.tolist():
        assert row == sorted(set(row))
        assert len(row) == count
        assert 0 <= row[0] <= row[-1] < count + more


def test_every_step_and_image_sees_other_patches_and_all_equally_often() -> None:
    drawn = torch.stack([draw_patches(4, 16, range(8), 8, 0, step) for step in range(200)])
    assert (drawn[0, 0] != drawn[0]).any(1).sum() >= 60, "of 64 images, one of 1,820 subsets each"
    assert (drawn[0] != drawn[1]).any(1).sum() >= 60
    shares = drawn.flatten().bincount() / drawn.numel()
    assert shares.numpy() == pytest.approx(1 / 16, rel=0.1)  # 3,200 each, 3 standard deviations are 5 %


def test_skipped_layers_get_no_gradient() -> None:
    network = elastic("deit_tiny_patch16_224", [False] * 3)
    network(images(), ((0, 2),)).sum().backward()
    assert all(p.grad is None for p in network.net.blocks[1].parameters())
    assert all(p.grad is not None for i in (0, 2) for p in network.net.blocks[i].parameters())


# ---- stochastic depth


@given(st.floats(0.01, 0.9), st.integers(2, 24), st.integers(0, 2**31), st.integers(0, 10**7))
@settings(deadline=None, max_examples=50)
def test_scales_are_a_function_of_seed_and_step(rate: float, layers: int, seed: int, step: int) -> None:
    scales = drop_scales(torch.linspace(0, rate, layers), 64, seed, step)
    assert scales.shape == (layers, 2, 64)
    torch.manual_seed(step)  # nothing else may matter
    assert torch.equal(scales, drop_scales(torch.linspace(0, rate, layers), 64, seed, step))
    for layer in range(layers):
        kept = 1 / (1 - rate * layer / (layers - 1))
        values = scales[layer].unique()
        assert all(v == 0 or v == pytest.approx(kept, rel=1e-5) for v in values.tolist())
    assert (scales[0] == 1).all(), "the first layer is never dropped"


def test_scales_drop_at_linear_rates_and_have_mean_one() -> None:
    """65,536 draws a branch: three standard errors of a rate of 0.4 are 0.0057."""
    scales = drop_scales(torch.linspace(0, 0.4, 5), 65_536, 3, 14)
    for layer, rate in enumerate((0.0, 0.1, 0.2, 0.3, 0.4)):
        for branch in (0, 1):
            assert float((scales[layer, branch] == 0).float().mean()) == pytest.approx(rate, abs=0.008)
            assert float(scales[layer, branch].mean()) == pytest.approx(1, abs=0.015)


def test_steps_seeds_and_branches_drop_differently() -> None:
    scales = drop_scales(torch.linspace(0, 0.5, 6), 64, 0, 0)
    for other in (drop_scales(torch.linspace(0, 0.5, 6), 64, 0, 1), drop_scales(torch.linspace(0, 0.5, 6), 64, 1, 0)):
        assert not torch.equal(scales, other)
    dropped = (scales == 0).flatten(0, 1)
    assert len({tuple(row) for row in dropped[2:].tolist()}) == 10, "no two branches alike"


def test_rate_zero_draws_nothing() -> None:
    assert drop_scales(torch.zeros(12), 8, 0, 0) is None


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit3_small_patch16_224"])
@torch.no_grad()
def test_scales_multiply_the_branches_they_belong_to(name: str) -> None:
    """Against plain timm's blocks written out, gates and inactive layers included."""
    network = elastic(name, [False, True, True, False])
    drop = torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(5)) * 2
    active = (0, 2, 3)
    net = network.net
    tokens = net._pos_embed(net.patch_embed(images()))
    for i in active:
        block = net.blocks[i]
        first, second = (end.gate if end.gate is not None else 1.0 for end in (block.drop_path1, block.drop_path2))
        tokens = tokens + drop[i, 0].view(3, 1, 1) * first * block.ls1(block.attn(block.norm1(tokens)))
        tokens = tokens + drop[i, 1].view(3, 1, 1) * second * block.ls2(block.mlp(block.norm2(tokens)))
    expected = net.forward_head(net.norm(tokens))
    assert_close(network(images(), (active,), drop), expected)

    whole = network(images(), None, drop)
    for row in range(3):
        assert_close(network(images()[row : row + 1], None, drop[:, :, row : row + 1]), whole[row : row + 1])
    undropped = network(images())
    assert (undropped - whole).abs().max() > 1e-3, "the scales of a step do not stay for the next"
    assert_close(network(images(), None, torch.ones(4, 2, 3)), undropped)


@torch.no_grad()
def test_a_dropped_layer_is_an_absent_one() -> None:
    network = elastic("deit_tiny_patch16_224", [False] * 3)
    drop = torch.ones(3, 2, 3)
    drop[1] = 0
    assert_close(network(images(), None, drop), network(images(), ((0, 2),)))
    assert_close(network(images(), None, torch.zeros(3, 2, 3)), network(images(), ((),)))


@torch.no_grad()
def test_training_mode_draws_nothing_of_its_own() -> None:
    """timm's DropPath is gone: only scales from outside drop."""
    network = elastic("deit_tiny_patch16_224", [False] * 2, drop_path=0.5).train()
    assert_close(network(images()), network.eval()(images()))


# ---- gates


def test_a_gated_layer_starts_open_and_can_learn() -> None:
    network = ElasticViT(ModelSettings(name="deit_tiny_patch16_224", **SIZES), Structure(((False, True, True),)))
    assert [gate.item() for gate in gates(network)] == [1.0] * 4
    network(images()).square().sum().backward()
    assert all(gate.grad.abs().item() > 0 for gate in gates(network))
    assert [network.locate(n) for n, _ in network.named_parameters() if n.endswith("gate")] == [
        (0, i, f"drop_path{j}.gate") for i in (1, 2) for j in (1, 2)
    ]


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit3_small_patch16_224"])
@torch.no_grad()
def test_closed_gates_leave_the_function_as_it_was(name: str) -> None:
    """Growth by the Identity operator, done by hand: the logits of 3 layers and of 5 are the same."""
    small = elastic(name, [False] * 3)
    layer_map = grow("identity", (3,), (5,))
    structure = Structure.plain((3,)).after(layer_map)
    assert structure.gated == ((False, False, True, False, True),)  # 0 1 1 2 2
    large = elastic(name, structure.gated[0], seed=9)
    state = dict(small.net.state_dict())
    for new, origin in enumerate(layer_map.groups[0]):
        prefix = f"blocks.{origin.source}."
        layer = {n.removeprefix(prefix): v for n, v in small.net.state_dict().items() if n.startswith(prefix)}
        state |= {f"blocks.{new}.{n}": v for n, v in layer.items()}
        if structure.gated[0][new]:
            state |= {f"blocks.{new}.drop_path{j}.gate": torch.zeros(1) for j in (1, 2)}
    large.net.load_state_dict(state, strict=True)
    assert_close(large(images()), small(images()), 1e-6)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit3_small_patch16_224", "vit_base_patch16_clip_224"])
@torch.no_grad()
def test_folded_gates_leave_plain_timm_with_the_same_logits(name: str) -> None:
    network = elastic(name, [False, True, True, False])
    for i, gate in enumerate(gates(network)):
        gate.fill_((0.7, -1.3, 0.0, 2.1)[i])
    before, plain = network(images()), plain_timm(name, 4)
    open_gates = copy.deepcopy(network)
    for gate in gates(open_gates):
        gate.fill_(1.0)
    assert (open_gates(images()) - before).abs().max() > 1e-2, "the gates matter"
    with pytest.raises(RuntimeError, match="gate"):
        plain.load_state_dict(network.net.state_dict(), strict=True)
    ungated = {n: p.clone() for i in (0, 3) for n, p in network.net.blocks[i].named_parameters(f"blocks.{i}")}

    network.fold_gates()
    assert gates(network) == []
    assert_close(network(images()), before, 1e-6)
    plain.load_state_dict(network.net.state_dict(), strict=True)
    assert_close(plain(images()), before, 1e-6)
    assert all(torch.equal(dict(network.net.named_parameters())[n], p) for n, p in ungated.items())
    network.fold_gates()
    assert_close(network(images()), before, 1e-6)


@torch.no_grad()
def test_gates_fold_into_the_last_linear_layers_whatever_the_mlp() -> None:
    """timm names them fc2, and w2 in ViTamin's."""
    for name, sizes in (
        ("vitamin_small_224", {"resolution": 64}),
        ("vit_giant_patch14_dinov2", {"resolution": 56, "width": 32, "heads": 2}),
        ("aimv2_large_patch14_224", {"resolution": 56, "width": 32, "heads": 2}),
    ):
        settings = ModelSettings(name=name, classes=4, depth=2, **sizes)
        family, _, _ = resolve_family(settings)
        torch.manual_seed(0)
        network = family(settings, Structure(((True, False),))).eval()
        for gate in gates(network):
            gate.fill_(0.5)
        seen = torch.randn(2, 3, sizes["resolution"], sizes["resolution"])
        before = network(seen)
        network.fold_gates()
        assert_close(network(seen), before, 1e-5)
        family(settings, Structure(((False, False),))).fold_gates()


def test_layers_that_know_their_position_do_not_grow() -> None:
    for name in ("vit_dwee_patch16_reg1_gap_256", "vit_dlittle_patch16_reg1_gap_256"):
        with pytest.raises(RecipeError, match="is not in an elastic family"):
            resolve_family(ModelSettings(name=name))


# ---- structure


def test_structure_after_growth() -> None:
    plain = Structure.plain((2, 3))
    assert plain.gated == ((False,) * 2, (False,) * 3)
    assert plain.depths == (2, 3)
    once = plain.after(grow("identity", (2, 3), (3, 4)))  # 0 1 1, 0 1 2 2
    assert once.gated == ((False, False, True), (False, False, False, True))
    twice = once.after(grow("identity", (3, 4), (5, 4)))  # 0 1 1 2 2: the copy of a gated layer is gated like it
    assert twice.gated == ((False, False, True, True, True), (False, False, False, True))
    assert once.after(grow("mogrow", (3, 4), (4, 8))).gated == (
        (False, False, True, True),
        (False, False, False, False, False, False, True, True),
    )
    assert twice.after(keep([(0, 2, 4), (3,)])).gated == ((False, True, True), (True,))
    assert twice.after(fresh((2, 2))).gated == ((False, False), (False, False))
    assert once.after(grow("rand_init", (3, 4), (4, 5))).gated == (
        (False, False, True, False),
        (False, False, False, True, False),
    )


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.integers(0, 8), st.sampled_from(("identity", "mogrow")))
def test_gates_follow_their_layers(gated: list[bool], more: int, operator: str) -> None:
    layer_map = grow(operator, (len(gated),), (len(gated) + more,))
    structure = Structure((tuple(gated),)).after(layer_map)
    assert structure.depths == layer_map.depths
    for has, origin in zip(structure.gated[0], layer_map.groups[0]):
        assert has == (gated[origin.source] or origin.gate == 0)


def test_groups_of_structure_and_map_must_agree() -> None:
    with pytest.raises(ValueError, match="argument"):
        Structure.plain((2, 3)).after(keep([(0, 1)]))


# ---- names


def test_parameters_are_located() -> None:
    network = elastic("deit_tiny_patch16_224", [False] * 12)
    located = {name: network.locate(name) for name, _ in network.named_parameters()}
    assert located["net.blocks.11.attn.qkv.weight"] == (0, 11, "attn.qkv.weight")
    assert located["net.blocks.1.norm1.bias"] == (0, 1, "norm1.bias")
    outside = {n for n, where in located.items() if where is None}
    assert {"net.pos_embed", "net.cls_token", "net.norm.weight", "net.head.bias"} <= outside
    assert not any(".blocks." in n for n in outside)


def test_parameters_of_two_groups_are_located() -> None:
    class TwoGroups(ElasticViT):
        layer_groups = ("first", "second")

    assert TwoGroups.locate("net.second.3.mlp.fc1.weight") == (1, 3, "mlp.fc1.weight")
    assert TwoGroups.locate("net.seconds.3.mlp.fc1.weight") is None


def test_no_weight_decay_names_parameters_of_the_elastic_model() -> None:
    network = elastic("deit_tiny_distilled_patch16_224", [False])
    named = dict(network.named_parameters())
    tokens = {"net.pos_embed", "net.cls_token", "net.dist_token"}
    assert network.no_weight_decay() & set(named) == tokens
