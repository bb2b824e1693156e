"""VOLO: timm's own in evaluation, a plain reference in training; lanes that do not depend on one another; exports."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from scipy.stats import ks_2samp
from timm.models.volo import VOLO, rand_bbox
from torch import nn

from scaleprog.data.mixing import token_boxes
from scaleprog.errors import RecipeError
from scaleprog.growth.space import Subnet
from scaleprog.models import resolve_family
from scaleprog.models.batch_norm import LaneNorm
from scaleprog.models.elastic import Structure, Targets, TokenMix
from scaleprog.models.volo import ElasticVolo
from scaleprog.planning.plan import describe
from scaleprog.planning.savings import advice
from scaleprog.recipe import Recipe
from scaleprog.recipe.keys import AugmentSettings, ModelSettings

MICRO = ModelSettings(name="volo_d1_224", classes=7, resolution=48, patch=4, width=32, depth=6, heads=2)


def micro(depths: tuple[int, int] = (2, 4), gated: bool = False) -> ElasticVolo:
    torch.manual_seed(0)
    structure = Structure(tuple((gated,) * depth for depth in depths))
    model = ElasticVolo(MICRO, structure)
    for norm in model.norms.values():
        norm.running = torch.stack((torch.randn(norm.num_features) / 10, torch.rand(norm.num_features) + 0.5))
    return model


def plain_of(model: ElasticVolo) -> VOLO:
    """timm's own model with the same weights."""
    plain = model.plain(MICRO)
    assert plain.builder == "timm.models.volo.VOLO"
    net = VOLO(**plain.arguments)
    net.load_state_dict(plain.tensors, strict=True)
    return net.eval()


@pytest.mark.parametrize(
    ("name", "full", "split"),
    [("volo_d1_224", (224, 18), (4, 14)), ("volo_d2_224", (224, 24), (6, 18)), ("volo_d5_224", (224, 48), (12, 36))],
)
def test_family_and_sizes(name: str, full: tuple[int, int], split: tuple[int, int]) -> None:
    assert resolve_family(ModelSettings(name=name)) == (ElasticVolo, Subnet(*full), 16)
    assert ElasticVolo.split(full[1]) == split


def test_a_depth_is_divided_as_by_the_authors() -> None:
    assert [ElasticVolo.split(depth) for depth in (9, 12, 15, 18)] == [(2, 7), (4, 8), (4, 11), (4, 14)]
    assert [ElasticVolo.split(depth) for depth in (7, 11, 14)] == [(2, 5), (4, 7), (4, 10)]
    assert ElasticVolo.split(2) == (1, 1)
    assert ElasticVolo.split(24) == (6, 18)
    with pytest.raises(RecipeError, match="at least 2 layers"):
        ElasticVolo.split(1)


def test_the_stem_is_as_narrow_as_the_layers() -> None:
    def stem(width: int | None) -> int:
        return ElasticVolo.arguments(MICRO.model_copy(update={"width": width}), None)["stem_hidden_dim"]

    assert (stem(None), stem(384), stem(192), stem(2)) == (64, 64, 32, 1)


@pytest.mark.parametrize("depths", [(2, 4), (1, 1), (3, 5)])
def test_in_evaluation_it_is_timms_own(depths: tuple[int, int]) -> None:
    model = micro(depths).eval()
    images = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        assert torch.allclose(model(images), plain_of(model)(images), atol=1e-6)


@pytest.mark.parametrize("size", [24, 32, 40, 64])
def test_positions_are_resampled_without_antialias(size: int) -> None:
    model = micro().eval()
    plain, side = plain_of(model), size // 8
    positions = F.interpolate(plain.pos_embed.permute(0, 3, 1, 2), size=(side, side), mode="bicubic")
    plain.pos_embed = nn.Parameter(positions.permute(0, 2, 3, 1))
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.allclose(model(images), plain(images), atol=1e-5)


def test_skipped_layers_do_not_run() -> None:
    model = micro().eval()
    active = ((1,), (0, 3))
    few = micro((1, 2)).eval()
    state = model.state_dict()
    kept = {
        "net.network.0.1.": "net.network.0.0.",
        "net.network.2.0.": "net.network.2.0.",
        "net.network.2.3.": "net.network.2.1.",
    }
    chosen = {name: value for name, value in state.items() if ".network.0." not in name and ".network.2." not in name}
    for old, new in kept.items():
        chosen |= {name.replace(old, new): value for name, value in state.items() if name.startswith(old)}
    few.load_state_dict(chosen, strict=True)
    for name, norm in few.norms.items():
        norm.running = model.norms[name].running
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.allclose(model(images, active), few(images), atol=1e-6)


def test_folded_gates_compute_the_same() -> None:
    model = micro(gated=True).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".gate"):
            nn.init.uniform_(parameter, -1, 1)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        before = model(images)
        model.fold_gates()
        assert torch.allclose(plain_of(model)(images), before, atol=1e-5)


# ---- training


def reference(model: ElasticVolo, images: torch.Tensor, lane: int, mixed: TokenMix | None) -> tuple[torch.Tensor, ...]:
    """What VOLO computes in training, step by step, with loops in the place of index arithmetic."""
    net, outputs = model.net, []
    features = images
    for module in net.patch_embed.conv:
        if isinstance(module, LaneNorm):
            parts = [
                F.batch_norm(p, None, None, module.weight, module.bias, True, eps=module.eps)
                for p in features.split(lane)
            ]
            features = torch.cat(parts)
        else:
            features = module(features.clone())
    tokens = net.patch_embed.proj(features).permute(0, 2, 3, 1)
    if mixed is not None:
        whole = tokens.clone()
        for i, partner in enumerate(mixed.partner.tolist()):
            for y, x in mixed.inside[i].nonzero().tolist():
                tokens = tokens.index_put((torch.tensor(i),), tokens[i])
                tokens[i, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = whole[partner, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
    for block in net.network[0]:
        tokens = block(tokens)
    tokens = net.network[1](tokens) + net.pos_embed
    for block in net.network[2]:
        tokens = block(tokens)
    ended = net.norm(net.forward_cls(tokens.flatten(1, 2)))
    dense = net.aux_head(ended[:, 1:])
    if mixed is not None:
        side = mixed.inside.shape[1]
        own = dense.clone()
        for i, partner in enumerate(mixed.partner.tolist()):
            for y, x in mixed.inside[i].nonzero().tolist():
                own[i, y * side + x] = dense[partner, y * side + x]
        dense = own
    outputs = [net.head(ended[:, 0]), dense]
    return tuple(outputs)


def drawn(lanes: int, per_lane: int, side: int, step: int = 3) -> TokenMix:
    settings = AugmentSettings(mix_token=True)
    found = token_boxes(lanes * per_lane, side, lanes=range(lanes), of=lanes, seed=1, step=step, settings=settings)
    return TokenMix(*found)


@pytest.mark.parametrize("mixing", [False, True])
def test_in_training_it_is_the_reference(mixing: bool) -> None:
    model = micro().train()
    for norm in model.norms.values():
        norm.rows = 4
    images, mixed = torch.randn(8, 3, 48, 48), drawn(2, 4, 6) if mixing else None
    whole, dense = model(images, mixed=mixed)
    expected = reference(model, images, 4, mixed)
    assert torch.allclose(whole, expected[0], atol=1e-5)
    assert torch.allclose(dense, expected[1], atol=1e-5)
    assert not whole._is_view()
    assert not dense._is_view(), "FSDP2 warns of views, because an operation in place on one loses its hooks"
    labels = torch.arange(8) % 7
    own = F.one_hot(labels, 7).float()
    share = torch.zeros(8, 1) if mixed is None else mixed.inside.flatten(1).float().mean(1, keepdim=True)
    targets = Targets(own if mixed is None else own.lerp(own[mixed.partner], share), own)
    loss = model.loss((whole, dense), targets)
    by_hand = -(targets.mixed * expected[0].log_softmax(1)).sum(1).mean()
    by_hand += 0.5 * -(own[:, None] * expected[1].log_softmax(2)).sum(2).mean()
    assert torch.allclose(loss, by_hand, atol=1e-5)


def test_lanes_do_not_depend_on_each_other_in_forward_backward_and_statistics() -> None:
    images, mixed = torch.randn(8, 3, 48, 48), drawn(4, 2, 6)
    own = F.one_hot(torch.arange(8) % 7, 7).float()

    def run(parts: list[slice]) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        model = micro().train()
        for norm in model.norms.values():
            norm.rows = 2
        losses = []
        for rows in parts:
            output = model(images[rows], mixed=mixed.of(rows))
            loss = model.loss(output, Targets(own, own).of(rows)) * (rows.stop - rows.start) / 8
            loss.backward()
            losses.append(loss.detach())
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        return sum(losses), gradients, {name: norm.take_mean() for name, norm in model.norms.items()}

    whole = run([slice(0, 8)])
    for parts in ([slice(0, 4), slice(4, 8)], [slice(0, 2), slice(2, 8)], [slice(i, i + 2) for i in range(0, 8, 2)]):
        loss, gradients, statistics = run(parts)
        assert torch.allclose(loss, whole[0], rtol=1e-6)
        assert gradients.keys() == whole[1].keys()
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, whole[1][name], rtol=1e-4, atol=1e-6), name
        for name, statistic in statistics.items():
            assert torch.allclose(statistic, whole[2][name], rtol=1e-6), name


def test_statistics_are_torchs() -> None:
    images = torch.randn(6, 5, 4, 3)
    norm = LaneNorm(nn.BatchNorm2d(5)).train()
    like = nn.BatchNorm2d(5, momentum=1.0).train()
    assert torch.allclose(norm(images), like(images), atol=1e-6)
    assert torch.allclose(norm.take_mean(), torch.stack((like.running_mean, like.running_var)), atol=1e-6)
    assert norm.pending == []


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_batch_norm_in_bf16_keeps_its_statistics_in_fp32(precision: torch.dtype) -> None:
    norm = LaneNorm(nn.BatchNorm2d(5)).to(precision).train()
    norm(torch.randn(6, 5, 4, 3).to(precision)).sum().backward()
    assert norm.take_mean().dtype == torch.float32
    assert norm.weight.grad is not None


def test_mix_token_is_the_same_on_any_number_of_ranks_and_pairs_within_a_lane() -> None:
    arguments: dict[str, Any] = {
        "of": 8,
        "seed": 5,
        "step": 2,
        "settings": AugmentSettings(mix_token=True, mix_groups=4),
    }
    partner, inside = token_boxes(32, 6, lanes=range(8), **arguments)
    halves = [token_boxes(16, 6, lanes=lanes, **arguments) for lanes in (range(4), range(4, 8))]
    assert torch.equal(inside, torch.cat([box for _, box in halves]))
    assert torch.equal(partner, torch.cat([part + 16 * i for i, (part, _) in enumerate(halves)]))
    assert torch.equal(partner[partner], torch.arange(32))
    assert all(abs(int(partner[row]) - row) == 2 and int(partner[row]) // 4 == row // 4 for row in range(32))
    boxes = inside.view(4, 8, 36)
    assert all((group == group[0]).all() for group in boxes), "one box per group"
    assert len({tuple(group[0].tolist()) for group in boxes}) > 1


def test_boxes_have_the_areas_of_timms() -> None:
    settings, timms = AugmentSettings(mix_token=True), []
    ours = [
        float(token_boxes(4, 14, lanes=range(1), of=1, seed=0, step=step, settings=settings)[1][0].float().mean())
        for step in range(2000)
    ]
    torch.manual_seed(0)
    for _ in range(2000):
        top, left, bottom, right = rand_bbox((1, 14, 14, 1), torch.rand(()))
        timms.append((bottom - top) * (right - left) / 14**2)
    assert ks_2samp(ours, timms).pvalue > 1e-3
    assert ks_2samp([share * 1.1 for share in ours], timms).pvalue < 1e-3, "a difference would be seen"


def test_outlookers_are_never_dropped() -> None:
    rates = ElasticVolo.drop_rates(0.2, (2, 4))
    assert torch.allclose(rates, torch.tensor([0, 0, 0.08, 0.12, 0.16, 0.2]))


# ---- recipes


def recipe(**groups: dict[str, Any]) -> Recipe:
    values: dict[str, dict[str, Any]] = {
        "model": {"name": "volo_d1_224"}, "data": {"path": "none"}, "train": {"epochs": 100, "batch": 1024},
        "augment": {"mix_token": True, "smoothing": 0.1}, "growth": {"schedule": "linear", "resolution_multiple": 32},
    }  # fmt: skip
    return Recipe.of({**values, **{group: {**values.get(group, {}), **more} for group, more in groups.items()}}, "test")


def test_a_plan_counts_timms_own_models() -> None:
    stages = describe(recipe(), 1)["stages"]
    assert [(stage["resolution"], stage["depth"]) for stage in stages] == [(128, 9), (160, 12), (192, 15), (224, 18)]
    for stage, layers in zip(stages, ((2, 7, 0, 0), (4, 8, 0, 0), (4, 11, 0, 0), (4, 14, 0, 0)), strict=True):
        with torch.device("meta"):
            timms = VOLO(layers, stage["resolution"], embed_dims=(192, 384, 384, 384), num_heads=(6, 12, 12, 12))
        positions = 384 * (14**2 - (stage["resolution"] // 16) ** 2)  # the elastic one has those of the full size
        assert stage["parameters"] == sum(p.numel() for p in timms.parameters()) + positions
    assert sum(p.numel() for p in timm.create_model("volo_d1_224").parameters()) == stages[-1]["parameters"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"growth": {"patches": "subset", "schedule": "automatic"}}, "growth.patches: subset, but the outlookers of"),
        ({"train": {"micro_batch": 8}}, "train.micro_batch: 8, but volo_d1_224 normalizes the 16 images of a lane"),
        (
            {"growth": {"stages": 8}},
            r"growth: volo_d1_224 divides 9 layers as 2 \+ 7 and 10 layers as 4 \+ 6, so a group",
        ),
        ({"model": {"name": "deit_tiny_patch16_224"}}, "augment.mix_token: deit_tiny_patch16_224 cannot mix tokens"),
    ],
)
def test_what_cannot_be_is_refused(groups: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        describe(recipe(**groups), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 232}, "model.resolution: 232 is not a multiple of 16; use 224 or 240"),
        ({"resolution": 60, "patch": 4}, "model.resolution: 60 is not a multiple of 8; use 56 or 64"),
        ({"patch": 2}, "model.patch: VOLO has patches of 4, 8, 16 pixels, not 2"),
        (
            {"heads": 5},
            "model.heads: 5 heads .* do not divide the widths 384 and 192; .* multiple of 20",
        ),
        ({"width": 64}, "model.heads: 12 heads .* do not divide the widths 64 and 32"),
        ({"init": "jax"}, "model.init: jax, but VOLO has one scheme"),
    ],
)
def test_sizes_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve_family(ModelSettings(name="volo_d1_224", **change))


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_other_patches_see_images_of_the_same_size(patch: int) -> None:
    assert resolve_family(ModelSettings(name="volo_d1_224", patch=patch))[1].resolution == 224


def test_a_batch_may_be_left_unmixed() -> None:
    settings = AugmentSettings(mix_token=True, mix_probability=0.0)
    _, inside = token_boxes(8, 6, lanes=range(2), of=2, seed=0, step=0, settings=settings)
    assert not inside.any()


def test_advice_keeps_lanes_whole() -> None:
    few = recipe(train={"micro_batch": 40})
    text = advice(few, ElasticVolo, Subnet(224, 18), 8)
    assert "train.micro_batch=16 would save" in text, "two lanes of 16 are half of what is 32 at a time"
    assert "micro_batch" not in advice(recipe(train={"micro_batch": 16}), ElasticVolo, Subnet(224, 18), 8)


def test_mix_token_replaces_mixup() -> None:
    with pytest.raises(RecipeError, match="mix_token replaces mixup and cutmix"):
        recipe(augment={"mixup": 0.8})


@pytest.mark.parametrize("name", ["volo_d1_224"])
def test_the_published_depth_has_timms_own_names(name: str) -> None:
    settings = ModelSettings(name=name, classes=5)
    family, full, _ = resolve_family(settings)
    model = family(settings, Structure.plain(family.split(full.depth))).eval()
    plain = model.plain(settings)
    assert plain.builder == "timm.create_model"
    net = timm.create_model(**plain.arguments)
    net.load_state_dict(plain.tensors, strict=True)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(model(images), net.eval()(images), atol=1e-6)
