"""Runs that begin with given weights: what is taken, resampled, new, or refused; growth from them; resumes."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from scaleprog.models import resolve_family
from scaleprog.models.elastic import Structure
from scaleprog.recipe import Recipe
from scaleprog.rundir.reading import read_rows
from scaleprog.rundir.storage import committed, read_manifest
from tests.compare import final_tensors
from tests.conftest import CLASSES, SIDE, MakeRecipe, run

pytestmark = pytest.mark.process

SIZES: dict[str, Any] = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
STILL = {"lr": 1e-30, "weight_decay": 0.0, "warmup_epochs": 0, "warmup_lr": 0.0, "min_lr": 0.0}
"""AdamW settings under which a step changes nothing: the checkpoint of step 1 holds the initial weights."""


def timms(classes: int = CLASSES, **sizes: Any) -> nn.Module:
    torch.manual_seed(7)
    net = timm.create_model("vit_tiny_patch16_224", num_classes=classes, dynamic_img_size=True, **{**SIZES, **sizes})
    for parameter in net.parameters():  # biases too
        nn.init.normal_(parameter, std=0.1)
    return net.eval()


def saved(net: nn.Module, folder: Path) -> str:
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, folder / "w.safetensors")
    return str(folder / "w.safetensors")


def begun(recipe: Recipe, folder: Path, ranks: int = 1) -> dict[str, Tensor]:
    """The tensors with which a run of `recipe` began."""
    run(recipe, folder, ranks, max_steps=1)
    return final_tensors(folder, recipe)


def event_of(folder: Path) -> dict[str, Any]:
    (found,) = (row for row in read_rows(folder / "events.jsonl") if row["event"] == "init")
    return found


def logits(net: nn.Module, side: int = SIDE) -> Tensor:
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return net(images)


def ours(recipe: Recipe, tensors: dict[str, Tensor], of: str = "online") -> nn.Module:
    family, full, _ = resolve_family(recipe.model)
    model = family(recipe.model, Structure.plain(family.split(full.depth)))
    model.load_state_dict({name: tensors[f"{of}/{name}"].view_as(p) for name, p in model.named_parameters()})
    return model.eval()


def test_a_run_begins_with_the_logits_of_timms_own(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    net = timms()
    recipe = make_recipe(init={"from": saved(net, tmp_path)}, growth={"schedule": "original"}, optimizer=STILL)
    tensors = begun(recipe, tmp_path / "run")
    for of in ("online", "ema.0"):
        assert torch.allclose(logits(ours(recipe, tensors, of)), logits(net), atol=1e-6)
    told = event_of(tmp_path / "run")
    assert (told["taken"], told["resampled"], told["left"], told["new"]) == (len(net.state_dict()), [], [], [])
    state = read_manifest(committed(tmp_path / "run" / "checkpoints")[-1]).state
    assert state["weights"] == told["sha256"]


def test_another_head_and_another_size_are_reported(
    make_recipe: MakeRecipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    net = timms(classes=10, img_size=48, patch_size=6)
    recipe = make_recipe(init={"from": saved(net, tmp_path)}, growth={"schedule": "original"}, optimizer=STILL)
    model = ours(recipe, begun(recipe, tmp_path / "run"))
    told = event_of(tmp_path / "run")
    assert told["left"] == ["head.weight (10, 32)", "head.bias (10,)"]
    assert told["new"] == ["head.weight (4, 32)", "head.bias (4,)"]
    assert told["resampled"] == [
        "pos_embed (1, 65, 32) to (1, 17, 32)",
        "patch_embed.proj.weight (32, 3, 6, 6) to (32, 3, 8, 8)",
    ]
    assert f"init.from: {tmp_path}/w.safetensors: 4 layers, {told['taken']} tensors taken" in capfd.readouterr().err
    plain = timms(classes=0)
    given = checkpoint_filter_fn(dict(net.state_dict()), plain)
    plain.load_state_dict({name: value for name, value in given.items() if not name.startswith("head.")}, strict=True)
    model.net.head = nn.Identity()
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)
