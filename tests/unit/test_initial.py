"""Runs that begin with given weights: what is taken, resampled, new, or refused; growth from them; resumes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from timm.models.volo import VOLO
from torch import Tensor, nn

from scaleprog.errors import CheckpointError, RecipeError
from scaleprog.growth.operators import fresh, sources
from scaleprog.models import resolve_family
from scaleprog.models.elastic import Structure
from scaleprog.models.given import fit
from scaleprog.models.vit import ElasticViT
from scaleprog.models.volo import ElasticVolo
from scaleprog.ranks.coordinator import process_group
from scaleprog.recipe import Recipe
from scaleprog.recipe.keys import ModelSettings
from scaleprog.rundir.reading import read_rows
from scaleprog.rundir.storage import committed, read_manifest
from scaleprog.training import initial
from scaleprog.training.loop import train
from scaleprog.training.process import Run
from tests.compare import differences, final_tensors
from tests.conftest import CLASSES, SIDE, MakeRecipe, run
from tests.unit.test_volo import MICRO

pytestmark = pytest.mark.process

STILL = {"lr": 1e-30, "weight_decay": 0.0, "warmup_epochs": 0, "warmup_lr": 0.0, "min_lr": 0.0}
"""AdamW settings under which a step changes nothing: the checkpoint of step 1 holds the initial weights."""
ORIGINAL = {"schedule": "original"}
SMALL = ModelSettings(
    name="vit_tiny_patch16_224", classes=CLASSES, resolution=SIDE, patch=8, width=32, depth=4, heads=2
)


def timms(classes: int = CLASSES, **sizes: Any) -> nn.Module:
    """timm's own model, of the sizes of the tests' recipes unless `sizes` says otherwise."""
    own = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": classes}
    torch.manual_seed(7)
    net = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **{**own, **sizes})
    return drawn(net)


def drawn(net: nn.Module) -> nn.Module:
    for parameter in net.parameters():  # biases, too
        nn.init.normal_(parameter, std=0.1)
    return net.eval()


def saved(net: nn.Module, folder: Path) -> str:
    path = folder / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, path)
    return str(path)


def begun(recipe: Recipe, folder: Path, ranks: int = 1) -> dict[str, Tensor]:
    """The tensors with which a run of `recipe` begins."""
    run(recipe, folder, ranks, max_steps=1)
    return final_tensors(folder, recipe)


def event_of(folder: Path) -> dict[str, Any]:
    (found,) = (row for row in read_rows(folder / "events.jsonl") if row["event"] == "init")
    return found


def elastic(recipe: Recipe, tensors: dict[str, Tensor], of: str = "online", gated: tuple[bool, ...] = ()) -> nn.Module:
    family, full, _ = resolve_family(recipe.model)
    model = family(recipe.model, Structure((gated or (False,) * full.depth,)))
    model.load_state_dict({name: tensors[f"{of}/{name}"].view_as(p) for name, p in model.named_parameters()})
    return model.eval()


def logits(net: nn.Module, side: int = SIDE) -> Tensor:
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return net(images)


# ---- what is taken


def test_a_run_begins_with_the_logits_of_timms_own(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    net = timms()
    recipe = make_recipe(init={"from": saved(net, tmp_path)}, growth=ORIGINAL, optimizer=STILL)
    tensors = begun(recipe, tmp_path / "run")
    for of in ("online", "ema.0"):
        assert torch.allclose(logits(elastic(recipe, tensors, of)), logits(net), atol=1e-6)
    told = event_of(tmp_path / "run")
    assert (told["taken"], told["resampled"], told["left"], told["new"]) == (len(net.state_dict()), [], [], [])
    state = read_manifest(committed(tmp_path / "run" / "checkpoints")[-1]).state
    assert state["weights"] == told["sha256"]


def test_another_head_and_another_size_are_reported(
    make_recipe: MakeRecipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    net = timms(classes=10, img_size=48, patch_size=6)
    recipe = make_recipe(init={"from": saved(net, tmp_path)}, growth=ORIGINAL, optimizer=STILL)
    model = elastic(recipe, begun(recipe, tmp_path / "run"))
    told = event_of(tmp_path / "run")
    assert told["left"] == ["head.weight (10, 32)", "head.bias (10,)"]
    assert told["new"] == ["head.weight (4, 32)", "head.bias (4,)"]
    assert told["resampled"] == [
        "pos_embed (1, 65, 32) to (1, 17, 32)",
        "patch_embed.proj.weight (32, 3, 6, 6) to (32, 3, 8, 8)",
    ]
    assert f"{tmp_path}/weights.safetensors: 4 layers, {told['taken']} tensors taken" in capfd.readouterr().err
    plain = timms(classes=0)
    given = checkpoint_filter_fn(dict(net.state_dict()), plain)
    plain.load_state_dict({name: value for name, value in given.items() if not name.startswith("head.")}, strict=True)
    model.net.head = nn.Identity()
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)


def test_color_becomes_gray_as_in_timm() -> None:
    net = timms()
    given = fit(ElasticViT, SMALL.model_copy(update={"channels": 1}), (4,), net.state_dict(), "here")
    assert given.resampled == ("patch_embed.proj.weight (32, 3, 8, 8) to (32, 1, 8, 8)",)
    kernel = net.get_parameter("patch_embed.proj.weight").sum(1, keepdim=True)
    assert torch.allclose(given.tensors["net.patch_embed.proj.weight"], kernel)


def test_volo_takes_transformers_of_several_stages_and_running_statistics() -> None:
    arguments = ElasticVolo.arguments(MICRO, (2, 4)) | {"layers": (2, 3, 1, 0), "img_size": 64}
    torch.manual_seed(1)
    net = drawn(VOLO(**arguments))
    for name, buffer in net.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    given = fit(ElasticVolo, MICRO, (2, 4), net.state_dict(), "here")
    assert (given.depths, given.left, given.new) == ((2, 4), (), ())
    assert given.resampled == ("pos_embed (1, 8, 8, 32) to (1, 6, 6, 32)",)
    model = ElasticVolo(MICRO, Structure.plain(given.depths)).eval()
    model.load_state_dict({name: given.tensors[name] for name, _ in model.named_parameters()})
    for name, norm in model.norms.items():
        norm.running = given.tensors[name]
    positions = F.interpolate(net.pos_embed.permute(0, 3, 1, 2), size=(6, 6), mode="bicubic")
    net.pos_embed = nn.Parameter(positions.permute(0, 2, 3, 1))
    assert torch.allclose(logits(model, 48), logits(net, 48), atol=1e-5)


# ---- growth


@pytest.mark.parametrize("operator", ["mogrow", "identity"])
def test_six_layers_grow_into_twelve(operator: str, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    net = timms(depth=6)
    recipe = make_recipe(
        model={"depth": 12}, init={"from": saved(net, tmp_path)}, growth=ORIGINAL | {"operator": operator},
        optimizer=STILL,
    )  # fmt: skip
    tensors, weights = begun(recipe, tmp_path / "run"), net.state_dict()
    for new, old in enumerate(sources(operator, 6, 12)):
        found = tensors[f"ema.0/net.blocks.{new}.attn.qkv.weight"].view(96, 32)
        assert torch.equal(found, weights[f"blocks.{old}.attn.qkv.weight"])
    if operator == "identity":
        model = elastic(recipe, tensors, gated=(False, True) * 6)
        assert torch.allclose(logits(model), logits(net), atol=1e-6)
    run(recipe, tmp_path / "run", max_steps=2)  # a resume accepts a state with two networks in its first phase


def test_weights_deeper_than_what_a_first_search_may_choose_are_refused_at_once(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Without recycling, its choice begins with these weights, too; the supernet is as deep as its largest."""
    recipe = make_recipe(init={"from": saved(timms(depth=3), tmp_path)}, growth={"recycle": False})
    with pytest.raises(RecipeError, match="3 layers, more than the first network of the schedule, 2"):
        run(recipe, tmp_path / "run", max_steps=1)
    run(make_recipe(init={"from": recipe.init.source}), tmp_path / "recycled", max_steps=1)


def test_a_schedule_that_begins_with_as_many_layers_begins_with_exactly_those(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    net = timms(depth=2)
    stages = [{"resolution": SIDE, "depth": depth} for depth in (2, 4)]
    recipe = make_recipe(init={"from": saved(net, tmp_path)}, growth={"schedule": stages}, optimizer=STILL)
    tensors = begun(recipe, tmp_path / "run")
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensors[f"online/net.{name}"], tensor.flatten())


# ---- from a run


def test_a_run_begins_with_the_better_weights_of_another(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    first = make_recipe(growth=ORIGINAL, train={"epochs": 1}, optimizer={"lr": 3e-3})
    results = run(first, tmp_path / "first")
    recipe = make_recipe(init={"from": str(tmp_path / "first")}, growth=ORIGINAL, optimizer=STILL, seed=5)
    tensors, theirs = begun(recipe, tmp_path / "run"), final_tensors(tmp_path / "first", first)
    better = "online" if results["top1"] > results["top1_ema"] else "ema.0"
    for name, tensor in theirs.items():
        if name.startswith(better):
            assert torch.equal(tensors[name.replace(better, "online")], tensor)
    volo = recipe.model_copy(update={"model": ModelSettings(name="volo_d1_224")})
    with (
        process_group() as (coordinator, _),
        pytest.raises(
            RecipeError, match="first trained vit_tiny_patch16_224, and its weights do not fit another famil"
        ),
    ):
        initial.read_plain(volo, coordinator)


def test_a_run_without_an_evaluation_offers_the_weights_that_are_asked_for(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    run(make_recipe(growth=ORIGINAL), tmp_path / "first", max_steps=2)
    init = {"from": str(tmp_path / "first")}
    with pytest.raises(CheckpointError, match="step 2 has no evaluation yet"):
        run(make_recipe(init=init, growth=ORIGINAL), tmp_path / "run", max_steps=1)
    run(make_recipe(init={**init, "weights": "ema"}, growth=ORIGINAL), tmp_path / "run", max_steps=1)
    assert event_of(tmp_path / "run")["source"] == init["from"]


# ---- resume


def test_a_resume_does_not_read_the_weights_again(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(init={"from": saved(timms(), tmp_path)}, train={"epochs": 1}, growth=ORIGINAL)
    run(recipe, tmp_path / "straight")
    run(recipe, tmp_path / "resumed", max_steps=3)
    Path(recipe.init.source).unlink()
    run(recipe, tmp_path / "resumed")
    assert differences(recipe, tmp_path / "resumed", tmp_path / "straight") == []


def test_a_network_that_starts_over_takes_no_other_weights(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(init={"from": saved(timms(), tmp_path)}, growth=ORIGINAL, train={"max_steps": 1})

    def start_over(run: Run) -> None:
        initial.build_initial(run, fresh((4,)), may_skip_layers=False)
        saved(drawn(timms(depth=2)), tmp_path)
        with pytest.raises(CheckpointError, match="starts over, but not with the weights that the run began with"):
            initial.build_initial(run, fresh((4,)), may_skip_layers=False)

    with process_group() as (coordinator, device):
        train(recipe, tmp_path / "run", coordinator, device, at_stop=start_over)


def test_tensors_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    names = [f"layer_{i}" for i in range(9)]
    save_file({name: torch.zeros(1) for name in reversed(names)}, tmp_path / "weights.safetensors")
    assert list(initial.read_tensors(tmp_path / "weights.safetensors")) == names


# ---- what is refused


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, r"weights\.safetensors: no such file of weights"),
        (truncate, r"weights\.safetensors: not a whole safetensors file \(.*\); copy it again"),
        (lambda path: path.write_text("no weights"), "not a whole safetensors file"),
        (lambda path: saved(timms(embed_dim=48), path.parent), r"cls_token: has \(1, 1, 48\), needs \(1, 1, 32\)"),
        (lambda path: saved(timms(init_values=0.1), path.parent), r"blocks\.0\.ls1\.gamma: has \(32,\), but vit_tiny"),
        (lambda path: saved(timms(class_token=False, global_pool="avg"), path.parent), "cls_token: missing"),
        (
            lambda path: saved(nn.Linear(2, 3), path.parent),
            r"has layers blocks; there are bias \(3,\), weight \(3, 2\)",
        ),
        (
            lambda path: saved(nn.ModuleDict({"module": timms()}), path.parent),
            r"has layers blocks; .*; remove 'module\.' from the names",
        ),
        (lambda path: changed(path, "blocks.1.attn.proj.weight", lambda t: t.char()), "holds int8, not floating point"),
        (lambda path: changed(path, "head.bias", lambda t: t / 0), r"head\.bias: holds NaN or infinity"),
        (lambda path: changed(path, "pos_embed", lambda t: torch.cat([t, t])), r"pos_embed: has \(2, "),
        (lambda path: changed(path, "patch_embed.proj.weight", lambda t: t[:, :, :0]), r"proj\.weight: is empty"),
    ],
)
def test_weights_that_do_not_fit(spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    path = Path(saved(timms(), tmp_path))
    spoil(path)
    with pytest.raises(RecipeError, match=message):
        fit(ElasticViT, SMALL, (4,), initial.read_tensors(path), "here")


def changed(path: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors = initial.read_tensors(path)
    save_file({**tensors, name: change(tensors[name])}, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda name, tensor: None if name.startswith("network.2.1.") else tensor, r"network\.2\.2\..*: .* has none"),
        (lambda name, tensor: None if name.startswith("network.3.0.") else tensor, r"network\.2\.4\..*: .* has none"),
        (lambda name, tensor: None if name.startswith("network.3.") else tensor, r"network\.2\.4\..*: .* has none"),
        (lambda name, tensor: tensor - 9 if name.endswith("running_var") else tensor, "running_var is negative"),
        (lambda name, tensor: tensor / 0 if name.endswith("running_mean") else tensor, "holds NaN or infinity"),
    ],
)  # fmt: skip
def test_weights_of_a_volo_with_a_gap_or_impossible_statistics(
    spoil: Callable[[str, Tensor], Tensor | None], message: str
) -> None:
    torch.manual_seed(1)
    net = drawn(VOLO(**ElasticVolo.arguments(MICRO, (2, 9)) | {"layers": (2, 3, 2, 2)}))
    found = {name: spoil(name, tensor) for name, tensor in net.state_dict().items()}
    whole = {name: tensor for name, tensor in found.items() if tensor is not None}
    with pytest.raises(RecipeError, match=message):
        fit(ElasticVolo, MICRO, (2, 9), whole, "here")


def test_a_run_does_not_go_on_with_other_weights(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    mine, others = saved(timms(), tmp_path), saved(drawn(timms()), tmp_path / "other")
    recipe = make_recipe(init={"from": mine}, growth=ORIGINAL, train={"epochs": 1})
    run(recipe, tmp_path / "run", max_steps=1)
    other = make_recipe(init={"from": others}, growth=ORIGINAL, train={"epochs": 1})
    with pytest.raises(CheckpointError, match=f"began with other weights: init is {others} .best. here, {mine} .best."):
        run(other, tmp_path / "run")
    run(make_recipe(growth=ORIGINAL, train={"epochs": 1}), tmp_path / "run")
    with pytest.raises(CheckpointError, match="began with other weights"):
        run(other, tmp_path / "run")


def test_a_place_that_holds_no_weights(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"")
    for place in ("weights.pth", "nowhere"):
        with pytest.raises(RecipeError, match=f"{place} is neither timm, nor a .safetensors file, nor the directory"):
            run(make_recipe(init={"from": str(tmp_path / place)}, growth=ORIGINAL), tmp_path / "run")


def test_weights_of_timm(make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = saved(timms(), tmp_path), []
    monkeypatch.setattr(initial, "hf_hub_download", lambda *place: asked.append(place) or path)
    recipe = make_recipe(init={"from": "timm"}, growth=ORIGINAL)
    run(recipe, tmp_path / "run", max_steps=1)
    assert asked == [("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "model.safetensors")]

    def offline(*_: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(initial, "hf_hub_download", offline)
    with pytest.raises(RecipeError, match=r"cannot be downloaded \(no network\).*set init.from to its path"):
        run(recipe, tmp_path / "offline", max_steps=1)
