"""What a run leaves: weights that plain timm loads and that compute the same, and its accuracy measured again."""

import json
import resource
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

from scaleprog.errors import CheckpointError, RecipeError, ScaleprogError
from scaleprog.models import resolve_family
from scaleprog.models.elastic import ElasticModel, Structure
from scaleprog.recipe import Recipe
from scaleprog.rundir.state import RunState
from scaleprog.rundir.storage import committed, read_manifest
from scaleprog.training.export import evaluate_run, export_run
from tests.compare import final_tensors
from tests.conftest import MakeRecipe, run

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
    plain, metadata = read_export(tmp_path / "out" / "model.safetensors")
    better = "online" if results["top1"] > results["top1_ema"] else "ema"
    assert (metadata["weights"], metadata["step"]) == (better, "20")
    assert said.startswith(f"{tmp_path}/out/model.safetensors: {better} weights of step 20\n")

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
        optimizer={"lr": 2e-3},
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
    assert evaluate_run(tmp_path, None, "online") == (results["top1"], "online")
    assert evaluate_run(tmp_path, 32, "ema") == (results["top1_ema"], "ema")
    assert evaluate_run(tmp_path, None, "best")[0] == results["top1_best"]
    for resolution in (8, 24, 40):
        accuracy, _ = evaluate_run(tmp_path, resolution, "online")
        assert accuracy * 24 / 100 == pytest.approx(round(accuracy * 24 / 100))  # of 24 images
    assert evaluate_run(tmp_path, 8, "online") != evaluate_run(tmp_path, 32, "online")


def test_a_resolution_that_patches_do_not_fill_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run(make_recipe(growth={"schedule": "original"}), tmp_path, max_steps=1)
    for resolution in (0, -8, 4, 30, 33):
        with pytest.raises(RecipeError, match=rf"--resolution: {resolution} is not a multiple of .* stride, 8 pixels"):
            evaluate_run(tmp_path, resolution, "best")


def test_a_run_that_stands_in_its_first_search_can_be_evaluated_but_has_no_better_weights(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    run(make_recipe(), tmp_path, max_steps=7)
    assert 0 <= evaluate_run(tmp_path, None, "ema")[0] <= 100
    with pytest.raises(CheckpointError, match="step 7 has no evaluation yet; resume the run first"):
        export_run(tmp_path, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def test_a_folder_that_is_no_run_or_has_no_checkpoint_is_named(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for act in (lambda run: evaluate_run(run, None, "best"), lambda run: export_run(run, tmp_path / "x")):
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
