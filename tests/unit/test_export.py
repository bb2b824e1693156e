"""What a run leaves: weights that plain timm loads and that compute the same, and its accuracy measured again."""

import io
import json
import resource
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from timm.data import create_transform, resolve_model_data_config
from timm.models.volo import VOLO
from torch import Tensor, nn

from scaleprog.data.augment import Augmentation
from scaleprog.errors import CheckpointError, RecipeError, ScaleprogError
from scaleprog.models import resolve_family
from scaleprog.models.elastic import ElasticModel, Structure
from scaleprog.recipe import Recipe
from scaleprog.rundir.recorder import read_rows
from scaleprog.rundir.state import RunState
from scaleprog.rundir.storage import committed, read_manifest
from scaleprog.shards.samples import read_label, read_members
from scaleprog.training.evaluate_run import Request, evaluate_run
from scaleprog.training.export import export_run, preprocessing
from tests.augmented import evaluation_images
from tests.compare import final_tensors
from tests.conftest import MakeRecipe, run
from tests.unit.command import Command, is_mistake

pytestmark = pytest.mark.process

GROWN = {"schedule": "linear", "stages": 2, "operator": "identity"}  # 16 px, 2 layers -> 32 px, 4 layers, two gated


def read_export(path: Path) -> tuple[nn.Module, dict[str, str]]:
    """Plain timm as the file itself says it is to be built, and the file's metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    plain = timm.create_model(**json.loads(metadata["timm"]))
    plain.load_state_dict(safetensors.torch.load_file(path), strict=True)
    return plain.eval(), metadata


def trained(folder: Path, recipe: Recipe, weights: str) -> ElasticModel:
    """Our model with the online ("online") or momentum ("ema.0") weights of a run's newest checkpoint."""
    state = RunState.from_json(read_manifest(committed(folder / "checkpoints")[-1]).state)
    model = resolve_family(recipe.model)[0](recipe.model, Structure(state.gated))
    tensors = final_tensors(folder, recipe)
    model.load_state_dict({name: tensors[f"{weights}/{name}"].view_as(p) for name, p in model.named_parameters()})
    return model.eval()


def logits(model: nn.Module, resolution: int) -> Tensor:
    images = torch.randn(3, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.double()(images.double())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_plain_timm_computes_what_the_run_computed(name: str, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    # a learning rate that moves gates, and deit3's LayerScale, far enough to be seen in the logits
    recipe = make_recipe(model={"name": name}, growth=GROWN, train={"epochs": 1}, optimizer={"lr": 0.02})
    results = run(recipe, tmp_path / "run")
    said = export_run(tmp_path / "run", tmp_path / "out" / "model.safetensors")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "run" / "recipe.yaml").stat().st_mode
    plain, metadata = read_export(tmp_path / "out" / "model.safetensors")
    better = "online" if results["top1"] > results["top1_ema"] else "ema"
    assert (metadata["weights"], metadata["step"]) == (better, "20")
    assert said.startswith(f"{tmp_path}/out/model.safetensors: {better} weights of step 20, float32\n")

    ours = trained(tmp_path / "run", recipe, "online" if better == "online" else "ema.0")
    gates = [parameter for name, parameter in ours.named_parameters() if name.endswith(".gate")]
    assert len(gates) == 4
    for resolution in (32, 16, 48):
        assert torch.allclose(logits(plain, resolution), logits(ours, resolution), rtol=0, atol=1e-6)
    before = logits(ours, 32)
    for gate in gates:
        gate.data.fill_(1)
    assert not torch.allclose(before, logits(ours, 32), atol=1e-3)  # the gates did matter


def test_the_printed_line_loads_the_file(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run(make_recipe(growth=GROWN, train={"epochs": 1}), tmp_path / "run")
    said = export_run(tmp_path / "run", tmp_path / "model.safetensors")
    line = said.splitlines()[1].removeprefix("load with: ")
    loaded = eval(line, {"timm": timm, "safetensors": safetensors})
    assert str(loaded) == "<All keys matched successfully>"


def test_the_best_of_several_momentum_networks_is_exported(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(
        growth={"schedule": "original"},
        train={"epochs": 4},
        ema={"momenta": [0.999, 0.8, 0.99]},
        optimizer={"lr": 5e-4},
    )
    results = run(recipe, tmp_path / "run")
    accuracies = [results[f"top1_ema_{i}"] for i in range(3)]
    assert len(set(accuracies)) > 1
    assert results["top1_ema"] == max(accuracies)
    export_run(tmp_path / "run", tmp_path / "model.safetensors")
    plain, metadata = read_export(tmp_path / "model.safetensors")
    best = f"ema.{accuracies.index(max(accuracies))}" if metadata["weights"] == "ema" else "online"
    assert metadata["weights"] == ("online" if results["top1"] > max(accuracies) else "ema")
    assert torch.allclose(logits(plain, 32), logits(trained(tmp_path / "run", recipe, best), 32), rtol=0, atol=1e-6)


def test_a_run_is_evaluated_to_the_number_in_its_results(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(growth=GROWN, train={"epochs": 3}, optimizer={"lr": 3e-3})
    results = run(recipe, tmp_path)
    online, ema = (evaluate_run(tmp_path, Request(weights=weights)) for weights in ("online", "ema"))
    for found, ending in ((online, ""), (ema, "_ema")):
        assert [found.top1, found.top5, found.loss] == [
            results[f"{name}{ending}"] for name in ("top1", "top5", "val_loss")
        ]
    assert (online.weights, ema.weights, online.step, online.images) == ("online", "ema", 60, 24)
    assert evaluate_run(tmp_path, Request()).top1 == results["top1_best"]
    for resolution in (8, 24, 40):
        accuracy = evaluate_run(tmp_path, Request(resolution, "online")).top1
        assert accuracy * 24 / 100 == pytest.approx(round(accuracy * 24 / 100))  # of 24 images
    assert evaluate_run(tmp_path, Request(8, "online")).loss != online.loss


@pytest.mark.parametrize(("asked", "side"), [("stage", 16), ("full", 32)])
def test_a_stage_is_evaluated_at_its_own_resolution_or_at_the_complete_one(
    asked: str, side: int, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    evaluate = {"every": 1, "resolution": asked}
    recipe = make_recipe(growth=GROWN, train={"epochs": 4}, optimizer={"lr": 3e-3}, evaluate=evaluate)
    run(recipe, tmp_path, max_steps=40)  # the last step on 16 px
    found = read_rows(tmp_path / "metrics.jsonl")[-1]
    assert (found["step"], found["top1"]) == (40, evaluate_run(tmp_path, Request(side, "online")).top1)
    assert found["top1"] != evaluate_run(tmp_path, Request(48 - side, "online")).top1


def test_a_resolution_that_patches_do_not_fill_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run(make_recipe(growth={"schedule": "original"}), tmp_path, max_steps=1)
    for resolution, near in ((0, "8"), (-8, "8"), (4, "8"), (30, "24 or 32"), (33, "32 or 40")):
        with pytest.raises(
            RecipeError, match=rf"--resolution: {resolution} is not a multiple of .* stride, 8 pixels; use {near}$"
        ):
            evaluate_run(tmp_path, Request(resolution))


def test_volo_is_evaluated_at_another_resolution_with_positions_interpolated_without_antialias(
    make_recipe: MakeRecipe, patterns: Path, tmp_path: Path
) -> None:
    sizes = {"name": "volo_d1_224", "patch": 4, "width": 32, "depth": 3, "heads": 2}
    recipe = make_recipe(model=sizes, growth={"schedule": "original"}, train={"batch": 16}, optimizer={"lr": 3e-3})
    run(recipe, tmp_path / "run", max_steps=6)
    export_run(tmp_path / "run", tmp_path / "model.safetensors", "online")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        plain = VOLO(**json.loads(file.metadata()["timm"]))
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"), strict=True)
    positions = F.interpolate(plain.pos_embed.permute(0, 3, 1, 2), size=(6, 6), mode="bicubic")
    plain.pos_embed = nn.Parameter(positions.permute(0, 2, 3, 1))
    held_out = [pair for path in sorted(patterns.glob("val-*.tar")) for pair in read_members(path)]
    encoded = [(memoryview(members["png"]), key) for key, members in held_out]
    labels = torch.tensor([read_label(members) for _, members in held_out])
    with torch.no_grad():
        right = plain.eval()(evaluation_images(Augmentation(recipe.augment, 3), encoded, 48)).argmax(1) == labels
    assert evaluate_run(tmp_path / "run", Request(48, "online")).top1 == pytest.approx(
        100 * right.float().mean().item()
    )
    with pytest.raises(RecipeError, match="--resolution: 36 is not a multiple of the model's stride, 8 pixels; use 32"):
        evaluate_run(tmp_path / "run", Request(36, "online"))


def test_timm_shows_the_exported_network_its_images_as_the_run_did(
    make_recipe: MakeRecipe, patterns: Path, tmp_path: Path
) -> None:
    own = {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.1, 0.3]}
    recipe = make_recipe(growth=GROWN, train={"epochs": 3}, optimizer={"lr": 3e-3}, augment=own)
    results = run(recipe, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    shown = {**own, "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic", "input_size": [3, 32, 32]}
    assert {name: json.loads(metadata[name]) for name in shown} == shown

    plain = timm.create_model(**json.loads(metadata["timm"]), checkpoint_path=tmp_path / "model.safetensors").eval()
    config = resolve_model_data_config(plain)
    assert {name: config[name] for name in shown} == shown
    transform = create_transform(**config)
    held_out = [pair for path in sorted(patterns.glob("val-*.tar")) for pair in read_members(path)]
    images = torch.stack([transform(Image.open(io.BytesIO(members["png"]))) for _, members in held_out])
    labels = torch.tensor([read_label(members) for _, members in held_out])
    encoded = [(memoryview(members["png"]), key) for key, members in held_out]
    assert torch.allclose(images, evaluation_images(Augmentation(recipe.augment, 3), encoded, 32), atol=1e-5)
    with torch.no_grad():
        right = plain(images).argmax(1) == labels
    assert 100 * right.float().mean().item() == pytest.approx(results["top1_best"])


def test_the_crop_of_the_recipe_goes_into_the_file(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(model={"channels": 1, "resolution": 24}, augment={"eval_crop": 0.9})
    assert preprocessing(recipe) == {
        "input_size": (1, 24, 24), "interpolation": "bicubic", "mean": (0.5,), "std": (0.5,), "crop_pct": 0.9,
        "crop_mode": "center",
    }  # fmt: skip


def test_either_weights_are_exported_in_any_precision(
    command: Command, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe, out = make_recipe(growth=GROWN), tmp_path / "model.safetensors"
    run(recipe, tmp_path / "run", max_steps=7)  # before the first evaluation
    for weights, dtype in (("online", "float32"), ("ema", "bfloat16"), ("online", "float16")):
        told = command("export", tmp_path / "run", out, "--weights", weights, "--dtype", dtype)
        assert told.code == 0
        assert told.out.startswith(f"{out}: {weights} weights of step 7, {dtype}\n")
        plain, metadata = read_export(out)
        assert metadata["weights"] == weights
        assert {t.dtype for t in safetensors.torch.load_file(out).values()} == {getattr(torch, dtype)}
        ours = trained(tmp_path / "run", recipe, "online" if weights == "online" else "ema.0")
        ours.to(getattr(torch, dtype))
        assert torch.allclose(logits(plain, 16), logits(ours, 16), rtol=0, atol=1e-6)
    assert is_mistake(
        command("export", tmp_path / "run", out), "step 7 has no evaluation yet", "--weights online or ema"
    )


def test_several_emas_need_an_evaluation_to_tell_the_best(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run(make_recipe(growth=GROWN, ema={"momenta": [0.9, 0.99]}), tmp_path / "run", max_steps=3)
    with pytest.raises(CheckpointError, match="use --weights online, or resume the run first"):
        export_run(tmp_path / "run", tmp_path / "model.safetensors", "ema")
    export_run(tmp_path / "run", tmp_path / "model.safetensors", "online")


def test_a_run_that_stands_in_its_first_search_can_be_evaluated_but_has_no_better_weights(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    run(make_recipe(), tmp_path, max_steps=7)
    assert 0 <= evaluate_run(tmp_path, Request(weights="ema")).top1 <= 100
    with pytest.raises(
        CheckpointError, match=r"step 7 has no evaluation yet, .*; use --weights online or ema, or resu"
    ):
        export_run(tmp_path, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def test_a_folder_that_is_no_run_or_has_no_checkpoint_is_named(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for act in (lambda run: evaluate_run(run, Request()), lambda run: export_run(run, tmp_path / "x")):
        with pytest.raises(CheckpointError, match="/nowhere: not a run directory"):
            act(tmp_path / "nowhere")
        (tmp_path / "recipe.yaml").write_text(make_recipe().dump())
        with pytest.raises(CheckpointError, match="no checkpoint yet; has the run trained"):
            act(tmp_path)


def test_a_place_that_cannot_be_written_is_named(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run(make_recipe(growth={"schedule": "original"}, train={"epochs": 1}), tmp_path / "run")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "model.safetensors", tmp_path / "run"):
        with pytest.raises(ScaleprogError, match=rf"^{out}: cannot write it: "):
            export_run(tmp_path / "run", out)


def test_an_export_that_a_full_disk_cuts_off_leaves_the_old_file_and_nothing_else(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """A limit on the size of files stands in for the full disk."""
    run(make_recipe(growth={"schedule": "original"}), tmp_path / "run", max_steps=2)
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "weights.safetensors"
    out.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10240, hard))
    try:
        with pytest.raises(ScaleprogError, match="cannot write it"):
            export_run(tmp_path / "run", out, "online")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_text() for path in out.parent.iterdir()} == {"weights.safetensors": "old"}
