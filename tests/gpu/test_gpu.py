"""What only a GPU can show: skipped updates, the same bits in every process, no waiting, no memory left behind."""

import gc
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import scaleprog.training.loop
from scaleprog.growth.operators import fresh, grow
from scaleprog.ranks.coordinator import process_group
from scaleprog.recipe import Recipe
from tests.compare import differences
from tests.conftest import MakeRecipe, run
from tests.distributed.ranks import make

pytestmark = [pytest.mark.gpu, pytest.mark.process]

ENGINES: list[dict[str, Any]] = [
    {"engine": engine, "precision": precision}
    for engine in ("replicated", "fsdp")
    for precision in ("fp32", "autocast", "bf16")
]


@pytest.mark.parametrize("sharding", ENGINES, ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_skipped_on_the_device(sharding: dict[str, Any], poison: float) -> None:
    with process_group() as (_, device):
        backend = make(sharding, device)
        backend.regrow(fresh((2,)), inherit=False, may_skip_layers=False)
        states = []
        for step in range(3):
            loss = F.cross_entropy(
                backend.forward(torch.randn(4, 1, 28, 28, device=device)).float(), torch.arange(4).to(device)
            )
            backend.backward(loss * poison if step == 1 else loss)
            norm = backend.step(1e-3, step)
            assert bool(norm.isfinite()) == (step != 1)
            states.append({name: part.tensor.clone() for name, part in backend.state().items()})
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert sum(not torch.equal(states[1][name], states[2][name]) for name in states[0]) > 0.9 * len(states[0])
        assert all(bool(value.isfinite().all()) for value in states[2].values())


@pytest.mark.parametrize("engine", ["replicated", "fsdp"])
def test_the_device_is_waited_for_only_where_losses_are_read(
    engine: str, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = scaleprog.training.loop.train_step

    def strict(run: Any, *arguments: Any) -> None:
        settled = run.state.step % 30 > 2  # kernels load, and AdamW makes its state
        torch.cuda.set_sync_debug_mode("error" if settled else "default")
        try:
            step(run, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(scaleprog.training.loop, "train_step", strict)
    recipe = make_recipe(
        model={"drop_path": 0.1}, augment={"mixup": 0.8, "cutmix": 1.0, "crop": "resized"}, optimizer={"clip": 1.0},
        sharding={"engine": engine, "precision": "autocast"},
    )  # fmt: skip
    assert run(recipe, tmp_path)["steps"] >= 80


@pytest.mark.parametrize("engine", ["replicated", "fsdp"])
@pytest.mark.parametrize("patches", ["resolution", "subset"])
def test_a_resumed_run_is_the_straight_one_bit_for_bit(
    engine: str, patches: str, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(
        train={"deterministic": True}, growth={"patches": patches}, model={"drop_path": 0.1}, augment={"mixup": 0.8},
        sharding={"engine": engine, "precision": "autocast"},
    )  # fmt: skip
    in_a_process_of_its_own(recipe, tmp_path / "straight", tmp_path)
    for stop in (13, 47):
        until = recipe.train.model_copy(update={"max_steps": stop})
        in_a_process_of_its_own(recipe.model_copy(update={"train": until}), tmp_path / "resumed", tmp_path)
    in_a_process_of_its_own(recipe, tmp_path / "resumed", tmp_path)
    assert differences(recipe, tmp_path / "resumed", tmp_path / "straight") == []


def in_a_process_of_its_own(recipe: Recipe, folder: Path, scratch: Path) -> None:
    (scratch / "recipe.yaml").write_text(recipe.dump())
    command = [sys.executable, "-m", "scaleprog", "train", scratch / "recipe.yaml", "--run-dir", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("engine", ["replicated", "fsdp"])
def test_a_growth_leaves_no_memory_behind(engine: str) -> None:
    with process_group() as (_, device):
        backend = make({"engine": engine}, device)
        held = []
        for depth in (4, 8, 4, 8):
            backend.regrow(fresh((depth,)), inherit=False, may_skip_layers=False)
            held.append(torch.cuda.memory_allocated())
        assert held[2] <= held[0] * 1.01
        assert held[3] <= held[1] * 1.01
        backend.regrow(grow("mogrow", (8,), (8,)), inherit=True, may_skip_layers=False)
        del backend
        gc.collect()


def test_more_ranks_than_gpus_are_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(make_recipe().dump())
    ranks = str(torch.cuda.device_count() + 1)
    command = [sys.executable, "-m", "scaleprog", "train", tmp_path / "recipe.yaml", "--nproc", ranks]
    done = subprocess.run([*command, "--run-dir", tmp_path / "run"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "CUDA devices" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_exhausted_device_ends_the_run_with_advice(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(train={"batch": 4096}, model={"width": 384, "heads": 6, "resolution": 512}, data={"lanes": 4})
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    command = [sys.executable, "-m", "scaleprog", "train", tmp_path / "recipe.yaml", "--run-dir", tmp_path / "run"]
    limited = "import torch; torch.cuda.set_per_process_memory_fraction(0.01)"
    code = (
        f"{limited}; import sys; from scaleprog.cli import main; sys.argv = {[str(c) for c in command[2:]]!r}; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    for word in ("out of memory", "train.micro_batch", "sharding.recompute"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[-1])["event"] == "error"
