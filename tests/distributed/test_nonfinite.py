"""Steps whose loss or gradients are not finite: no engine applies them, and the run says where they came from."""

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from scaleprog.errors import Diverged, ScaleprogError
from scaleprog.growth.operators import fresh
from scaleprog.launchers.local import RankFailed, launch
from scaleprog.models.elastic import ElasticModel
from scaleprog.ranks.coordinator import process_group
from scaleprog.recipe import Recipe
from scaleprog.rundir.checkpoint import Checkpoints
from scaleprog.rundir.recorder import read_rows
from scaleprog.rundir.storage import committed, step_of
from scaleprog.training.loop import train_rank
from scaleprog.training.replay import copied, result, summary
from tests.compare import differences
from tests.conftest import SHARDINGS, run, step_rows
from tests.distributed.ranks import make

ENGINES = [
    *SHARDINGS,
    {"engine": "replicated", "precision": "autocast"},
    {"engine": "zero", "stage": 2, "precision": "bf16"},
    {"engine": "zero", "stage": 3, "precision": "bf16"},
    {"engine": "fsdp", "offload": "all"},
    {"engine": "zero", "stage": 2, "offload": "optimizer"},
]
POISON = {"nan": math.nan, "inf": math.inf}


def skip_and_go_on(out: Path) -> None:
    """Under each engine: a step, one in which a rank's loss is not finite, and a step; what has changed after each."""
    with process_group() as (coordinator, device):
        found = []
        for sharding in ENGINES:
            for poison in POISON.values():
                backend = make(sharding, device)
                backend.regrow(fresh((2,)), inherit=False, may_skip_layers=False)
                states, norms = [], []
                for step in range(3):
                    generator = torch.Generator().manual_seed(step)
                    images = torch.randn(4, 1, 28, 28, generator=generator)
                    loss = F.cross_entropy(backend.forward(images).float(), torch.arange(4))
                    bad = step == 1 and coordinator.rank == coordinator.world - 1
                    backend.backward(loss * poison if bad else loss)
                    norms.append(float(backend.step(1e-3, step)))
                    states.append({name: part.tensor.clone() for name, part in backend.state().items()})
                same = [name for name, value in states[0].items() if torch.equal(value, states[1][name])]
                held = [
                    name for name, value in states[1].items() if value.numel()
                ]  # of small ones, a rank may hold none
                moved = [name for name in held if not torch.equal(states[1][name], states[2][name])]
                finite = all(bool(value.isfinite().all()) for value in states[2].values())
                good = [math.isfinite(norm) for norm in norms]
                found.append([len(states[0]) - len(same), len(moved) / len(held), finite, good])
        (out / f"{coordinator.rank}.json").write_text(json.dumps(found))


def test_no_engine_applies_a_step_that_is_not_finite_on_any_rank(tmp_path: Path) -> None:
    launch(2, skip_and_go_on, tmp_path)
    for rank in range(2):
        cases = json.loads((tmp_path / f"{rank}.json").read_text())
        for (sharding, poison), (changed, moved, finite, norms) in zip(
            [(sharding, poison) for sharding in ENGINES for poison in POISON], cases, strict=True
        ):
            assert norms == [True, False, True], (sharding, poison)
            assert changed == 0, (sharding, poison, "weights, moments, counts and EMAs")
            assert moved > 0.9, (sharding, poison, "the next step counts again")
            assert finite, (sharding, poison)


# ---- a run


def poisoned_rank(recipe: Recipe, folder: Path, rank: int, steps: list[int], inside: bool) -> None:
    """A rank of a run in which one rank's loss, or an activation of its network, is NaN at some steps."""
    import os

    import scaleprog.training.loop as loop

    original = loop.forward_and_backward

    def forward_and_backward(run: Any, *arguments: Any) -> torch.Tensor:
        bad = run.coordinator.rank == rank and run.state.step + 1 in steps
        with pytest.MonkeyPatch.context() as patch:
            if bad and inside:
                block = run.backend.network.model.net.blocks[1]
                patch.setattr(block.mlp.fc1, "forward", lambda x, of=block.mlp.fc1.forward: of(x) * math.nan)
            elif bad:
                patch.setattr(ElasticModel, "loss", lambda *a, of=ElasticModel.loss: of(*a) * math.inf)
            return original(run, *arguments)

    def slowly(self: Checkpoints, *arguments: Any, of: Callable[..., Any] = Checkpoints._write) -> Any:
        time.sleep(1)
        return of(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "_write", slowly)  # a checkpoint is still being written when the run stops
        patch.setattr(loop, "forward_and_backward", forward_and_backward)
        if "replay" in str(folder):
            import scaleprog.training.replay as replaying

            patch.setattr(replaying, "forward_and_backward", forward_and_backward)
            replaying.replay_rank(recipe, folder)
        elif int(os.environ["RANK"]) >= 0:
            train_rank(recipe, folder)


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    return make_recipe(
        growth={"schedule": "original"}, train={"epochs": 2, "log_every": 4}, checkpoint={"every_steps": 3, "keep": 1},
        data={"trace": True},
    )  # fmt: skip


def test_a_run_stops_names_the_rank_and_the_samples_and_resumes(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(RankFailed, match=r"step 5: the loss is (nan|inf) on rank 1 at lr .*scaleprog replay .* 5"):
        launch(2, poisoned_rank, recipe, folder, 1, [5], True)
    (event,) = [event for event in read_rows(folder / "events.jsonl") if event["event"] == "nonfinite"]
    assert (event["step"], event["ranks"], event["loss"]) == (5, [1], "nan")
    traced = {row["step"]: row["ids"] for row in read_rows(folder / "samples-1.jsonl")}
    assert event["samples"] == {"1": traced[5]}
    assert [step_of(path) for path in committed(folder / "checkpoints")] == [3], "none after the step"

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with copied(folder, 5) as (again, copy, ranks):
        launch(ranks, _poisoned_replay, again, copy)
    out = result(folder, 5)
    assert {path: path.read_bytes() for path in before} == before, "the run stays as it is"
    told = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert told[1]["samples"] == traced[5]
    assert told[1]["layers"][0] == "net.blocks.1.mlp.fc1"
    assert told[0]["layers"] == []
    assert "not finite first: the output of net.blocks.1.mlp.fc1" in summary(out)
    shutil.rmtree(out)

    skipping = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"nonfinite": "skip"})})
    launch(2, poisoned_rank, skipping, folder, 1, [5], True)
    launch(2, poisoned_rank, skipping, tmp_path / "straight", 1, [5], True)
    assert differences(skipping, folder, tmp_path / "straight") == []
    with copied(folder, 8) as (again, copy, ranks):  # behind the skipped step
        launch(ranks, _poisoned_replay, again, copy)
    told = json.loads((result(folder, 8) / "rank-0.json").read_text())
    assert float(told["grad_norm"]) == pytest.approx(step_rows(folder)[8]["grad_norm"], rel=1e-12)
    assert (told["step"], told["layers"]) == (8, [])
    rows = step_rows(folder)
    with pytest.raises(ScaleprogError, match=f"has trained {max(rows)} steps, not step 9999"), copied(folder, 9999):
        pass
    assert not result(folder, 9999).exists()
    assert [step for step, row in rows.items() if not math.isfinite(row["grad_norm"])] == [5]
    assert json.loads((folder / "results.json").read_text())["top1"] > 0


def _poisoned_replay(recipe: Recipe, folder: Path) -> None:
    poisoned_rank(recipe, folder, 1, [5], True)


def test_a_run_skips_so_many_steps_and_no_more(recipe: Recipe, tmp_path: Path) -> None:
    def skipping(most: int) -> Recipe:
        return recipe.model_copy(
            update={"optimizer": recipe.optimizer.model_copy(update={"nonfinite": "skip", "most_skipped": most})}
        )

    with pytest.raises(RankFailed, match=r"step 9: the loss is inf .*one more than optimizer.most_skipped=2"):
        launch(2, poisoned_rank, skipping(2), tmp_path, 0, [2, 7, 9], False)
    assert 6 in [step_of(path) for path in committed(tmp_path / "checkpoints")], "the one before step 7 is kept"
    launch(2, poisoned_rank, skipping(3), tmp_path, 0, [2, 7, 9], False)
    assert step_of(committed(tmp_path / "checkpoints")[-1]) == len(step_rows(tmp_path))


def test_a_checkpoint_of_weights_that_are_not_finite_is_never_committed(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import scaleprog.training.between_steps as between_steps

    save = between_steps.save

    def poison_and_save(run: Any, *arguments: Any) -> None:
        if run.state.step > 3:
            next(iter(run.backend.network.emas[0].weights.values()))[0] = math.nan
        save(run, *arguments)

    monkeypatch.setattr(between_steps, "save", poison_and_save)
    with pytest.raises(Diverged, match=r"not written .*numbers that are not finite in ema"):
        run(recipe, tmp_path)
    assert [step_of(path) for path in committed(tmp_path / "checkpoints")] == [3], "the good one is not replaced"
    failed = [event for event in read_rows(tmp_path / "events.jsonl") if event["event"] == "checkpoint_failed"]
    assert failed
    assert all("disk" not in event["message"] for event in failed)
