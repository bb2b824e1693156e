"""`scaleprog export --format hf`: a folder that timm loads, which computes what the run computed, with a model card."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import yaml
from timm.models.volo import VOLO
from torch import Tensor, nn

from scaleprog import api
from scaleprog.errors import ScaleprogError
from scaleprog.training.export import export_run
from tests.conftest import MakeRecipe, run
from tests.unit.command import Command, is_mistake

pytestmark = pytest.mark.process

FILES = {"README.md", "accuracy_over_time.png", "config.json", "model.safetensors"}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def loaded(told: str) -> dict[str, Any]:
    """What the printed lines of Python leave."""
    names: dict[str, Any] = {}
    exec(told.partition("load with:\n")[2], names)
    return names


def test_timm_loads_the_folder_as_it_loads_the_file(
    command: Command, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(
        model={"name": "deit_tiny_patch16_224"},
        growth={"schedule": "linear", "stages": 2, "operator": "identity"},
        train={"epochs": 1},
        optimizer={"lr": 0.02},
        augment={"mean": [0.3, 0.4, 0.5], "eval_crop": 0.9},
    )
    results = run(recipe, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "file.safetensors", "ema")
    arguments = json.loads(safetensors.safe_open(tmp_path / "file.safetensors", "pt").metadata()["timm"])
    file = timm.create_model(**arguments)

    monkeypatch.chdir(tmp_path)
    for dtype in ("bfloat16", "float32"):  # the second in the place of the first
        told = command("export", "run", "a model", "--weights", "ema", "--dtype", dtype)
        assert told.out.startswith(f"a model: ema weights of step 20, {dtype}\n"), told
        names = loaded(told.out)
        file.load_state_dict(safetensors.torch.load_file(tmp_path / "file.safetensors"))
        assert torch.equal(logits(names["model"]), logits(file.to(getattr(torch, dtype)).float()))
    assert {path.name for path in tmp_path.iterdir()} == {"run", "file.safetensors", "a model"}
    assert {path.name for path in (tmp_path / "a model").iterdir()} == FILES

    config = timm.data.resolve_model_data_config(names["model"])
    assert (config["input_size"], config["crop_pct"]) == ((3, 32, 32), 0.9)
    assert (config["mean"], config["std"]) == ([0.3, 0.4, 0.5], [0.229, 0.224, 0.225])
    stored = json.loads((tmp_path / "a model/config.json").read_text())
    assert stored["label_names"] == ["0", "1", "2", "3"]
    assert stored["pretrained_cfg"].keys().isdisjoint({"license", "tag", "url", "hf_hub_id"}), "of timm's own weights"
    front, card = (tmp_path / "a model/README.md").read_text().removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["library_name"] == "timm"
    assert f"{results['top1_ema']:.4g}" in card
    assert "- architecture: deit_tiny_patch16_224 with img_size=32, " in card
    assert yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0]) == recipe.model_dump(mode="json")


def test_a_volo_that_timm_has_no_name_for_is_loaded_by_the_lines_that_are_printed(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    sizes = {"name": "volo_d1_224", "patch": 4, "width": 32, "depth": 3, "heads": 2}
    run(make_recipe(model=sizes, growth={"schedule": "original"}), tmp_path / "run", max_steps=2)
    export_run(tmp_path / "run", tmp_path / "file.safetensors", "online")
    file = VOLO(**json.loads(safetensors.safe_open(tmp_path / "file.safetensors", "pt").metadata()["timm"]))
    file.load_state_dict(safetensors.torch.load_file(tmp_path / "file.safetensors"))
    told = api.export(tmp_path / "run", tmp_path / "folder", "online")
    assert "timm.create_model builds no volo_d1_224 of this size" in told
    assert torch.equal(logits(loaded(told)["model"]), logits(file))


def test_no_foreign_folder_is_replaced_and_nothing_half_done_is_left(
    command: Command, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(growth={"schedule": "original"})
    run(recipe, tmp_path / "run", max_steps=1)
    foreign, file, mine = (tmp_path / name for name in ("foreign", "file", "mine"))
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    file.write_text("")
    for out, why in ((foreign, "the folder is not empty"), (file, "something other than a folder")):
        told = command("export", tmp_path / "run", out, "--weights", "online", "--format", "hf")
        assert is_mistake(told, f"{out}: cannot write it: ", why)
    assert (foreign / "config.json").read_text() == "{}"

    mine.mkdir()
    command("export", tmp_path / "run", mine, "--weights", "online")
    license = mine / "LICENSE"
    license.write_text("the user's")
    assert is_mistake(command("export", tmp_path / "run", mine, "--weights", "online"), "the folder is not empty")
    assert license.read_text() == "the user's"
    license.unlink()
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    assert before.keys() == FILES
    (tmp_path / "run/metrics.jsonl").unlink()
    (tmp_path / "run/events.jsonl").unlink()
    for out in (mine, tmp_path / "new"):
        with pytest.raises(ScaleprogError, match="the run has not recorded anything yet"):
            api.export(tmp_path / "run", out, "online")
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "foreign", "file", "mine"}
