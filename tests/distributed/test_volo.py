"""VOLO under every engine: two layer groups, MixToken, and batch norms whose lanes lie on different ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from scaleprog.data.mixing import token_boxes
from scaleprog.growth.operators import fresh, grow, keep
from scaleprog.growth.phase import active_layers
from scaleprog.launchers.local import launch
from scaleprog.models.elastic import Targets, TokenMix, drop_scales
from scaleprog.ranks.coordinator import Coordinator, process_group
from scaleprog.recipe import Recipe
from scaleprog.recipe.keys import AugmentSettings, ModelSettings
from scaleprog.sharding import Backend
from scaleprog.shards.token_labels import build
from tests.compare import differences, final_tensors
from tests.conftest import CLASSES, SHARDINGS, run, short_recipe, step_rows
from tests.distributed.ranks import make
from tests.numerics.whole_runs import train_all

MODEL = ModelSettings(name="volo_d1_224", classes=10, resolution=48, patch=4, width=32, depth=8, heads=2, drop_path=0.1)
BATCH, LANES = 32, 4
ENGINES: dict[int, list[dict[str, Any]]] = {
    1: [{"engine": "replicated"}, {"engine": "fsdp"}],
    2: [
        {"engine": "fsdp", "recompute": True},
        {"engine": "zero", "stage": 3},
        {"engine": "fsdp", "precision": "autocast"},
        {"engine": "fsdp", "precision": "bf16"},
        {"engine": "zero", "stage": 3, "precision": "bf16"},
    ],
}
"""What lives the life of growths below."""
WHOLE: dict[int, list[dict[str, Any]]] = {
    1: [{"engine": "fsdp"}, {"engine": "zero", "stage": 2}],
    2: list(SHARDINGS),
    4: [{"engine": "hsdp", "shard": 2}, {"engine": "zero", "stage": 3}, {"engine": "replicated"}],
}
"""What trains whole runs, in micro-batches."""
MICRO_BATCH = {1: 8, 2: 4, 4: 4}  # of 16, 8, and 4 rows in lanes of 4


def lives(shardings: list[dict[str, Any]], out: Path) -> None:
    with process_group() as (coordinator, device):
        found = []
        for sharding in shardings:
            backend = make(sharding, device, MODEL)
            backend.lane = BATCH // LANES
            found.append(life(backend, coordinator))
        if coordinator.rank == 0:
            out.write_text(json.dumps(found))


def life(backend: Backend, coordinator: Coordinator) -> list[list[float]]:
    """Losses, gradient norms and running statistics through growths of both groups, with skipped layers."""
    record: list[list[float]] = []
    generator = torch.Generator().manual_seed(1)

    def train(size: int, active: Any, micro_batches: int) -> None:
        step, rows = len(record), BATCH // coordinator.world
        mine = slice(coordinator.rank * rows, (coordinator.rank + 1) * rows)
        images = torch.randn(BATCH, 3, size, size, generator=generator)[mine]
        own = F.one_hot(torch.randint(0, 10, (BATCH,), generator=generator), 10).float()[mine]
        depths = backend.structure.depths
        drop = drop_scales(backend.family.drop_rates(0.1, depths), BATCH, 0, step)[:, :, mine]
        lanes = range(
            coordinator.rank * LANES // coordinator.world, (coordinator.rank + 1) * LANES // coordinator.world
        )
        settings = AugmentSettings(mix_token=True)
        mixed = TokenMix(*token_boxes(rows, size // 8, lanes=lanes, of=LANES, seed=0, step=step, settings=settings))
        share = mixed.inside.flatten(1).float().mean(1, keepdim=True)
        targets = Targets(own.lerp(own[mixed.partner], share), own)
        total = 0.0
        for part in range(micro_batches):
            some = slice(part * rows // micro_batches, (part + 1) * rows // micro_batches)
            output = backend.forward(images[some], active, drop[:, :, some], None, mixed.of(some))
            loss = backend.family.loss(output, targets.of(some)) / micro_batches
            backend.backward(loss)
            total += loss.item()
        norm = float(backend.step(1e-4, step))
        statistics = [float(value.double().abs().sum()) for value in backend.network.statistics.values()]
        record.append([coordinator.mean([total])[0], norm, *statistics])

    parts = 2 if coordinator.world == 1 else 1
    backend.regrow(fresh((2, 2)), inherit=False, may_skip_layers=False)
    train(32, None, parts)
    train(32, None, 1)
    for operator, old, new in (("mogrow", (2, 2), (2, 4)), ("identity", (2, 4), (3, 5))):
        backend.regrow(grow(operator, old, new), inherit=True, may_skip_layers=True)
        for i, size in enumerate((32, 48)):
            few = tuple(active_layers(operator, o, n, o if i == 0 else n) for o, n in zip(old, new))
            train(size, few, parts)
    backend.regrow(keep(few), inherit=True, may_skip_layers=False)
    train(48, None, 1)
    for ema in (0, None):
        with backend.weights(ema):
            logits = backend.forward(torch.ones(2, 3, 48, 48) / 2)
            record.append([float(logits.double().square().mean())])
    return record


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[list[float]]]]:
    results = {}
    for world, shardings in ENGINES.items():
        out = tmp_path_factory.mktemp("volo") / "out.json"
        launch(world, lives, shardings, out)
        results[world] = json.loads(out.read_text())
    return results


@pytest.mark.parametrize(
    ("world", "number"), [(w, i) for w in ENGINES for i in range(len(ENGINES[w])) if (w, i) != (1, 0)], ids=str
)
def test_engines_train_what_one_process_trains(
    world: int, number: int, found: dict[int, list[list[list[float]]]]
) -> None:
    reference, life = found[1][0], found[world][number]
    rounded = ENGINES[world][number].get("precision", "fp32") != "fp32"
    assert len(reference) == 9
    for step, (theirs, ours) in enumerate(zip(reference, life, strict=True)):
        assert ours == pytest.approx(theirs, rel=5e-2 if rounded else 1e-5), (step, ENGINES[world][number])


# ---- whole runs, on token labels


def whole_run(shards: Path, labels: Path, sharding: dict[str, Any], micro_batch: int | None, lr: float) -> Recipe:
    return short_recipe(
        shards,
        model={"name": "volo_d1_224", "patch": 4, "width": 32, "depth": 6, "heads": 2, "drop_path": 0.1},
        data={"token_labels": str(labels)},
        augment={"crop": "resized", "scale": (0.4, 1.0), "mix_token": True, "erase": 0.25},
        train={"batch": 16, "epochs": 3, "micro_batch": micro_batch}, search={"measurements": 2},
        optimizer={"lr": lr, "clip": 1.0}, sharding=sharding,
    )  # fmt: skip


@pytest.fixture(scope="module")
def labels(patterns: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    torch.save(timm.create_model("test_byobnet", num_classes=CLASSES).state_dict(), folder / "teacher.pth")
    build(patterns, folder / "labels", "test_byobnet", folder / "teacher.pth", 64, 3, 32, 1)
    return folder / "labels"


@pytest.fixture(scope="module")
def runs(patterns: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directories: `reference`, and WORLD/NUMBER of each of WHOLE."""
    folder, calm = tmp_path_factory.mktemp("runs"), 5e-5  # AdamW amplifies rounding with the learning rate
    run(whole_run(patterns, labels, {"engine": "replicated"}, None, calm), folder / "reference")
    for world, shardings in WHOLE.items():
        recipes = [whole_run(patterns, labels, sharding, MICRO_BATCH[world], calm) for sharding in shardings]
        train_all(world, [(recipe, folder / f"{world}/{i}") for i, recipe in enumerate(recipes)])
    return folder


@pytest.mark.parametrize(
    ("world", "number"), [pytest.param(w, i, id=f"{w} {s}") for w, all_ in WHOLE.items() for i, s in enumerate(all_)]
)
def test_a_whole_run_trains_what_one_unsharded_process_trains(world: int, number: int, runs: Path) -> None:
    reference, rows = step_rows(runs / "reference"), step_rows(runs / f"{world}/{number}")
    assert reference.keys() == rows.keys() == set(range(1, 31))
    assert {row["phase"] for row in reference.values()} == {"supernet", "train"}
    for step, row in reference.items():
        assert rows[step]["loss"] == pytest.approx(row["loss"], rel=1e-5), f"step {step}"
        assert rows[step]["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3), f"step {step}"
        assert all(rows[step][key] == row[key] for key in ("resolution", "depth", "lr"))


def test_a_run_resumes_bit_for_bit(patterns: Path, labels: Path, tmp_path: Path) -> None:
    recipe = whole_run(patterns, labels, {"engine": "fsdp"}, None, 5e-4)
    runs = [(recipe, tmp_path / "straight")]
    for stop in (2, 8, 13, 18, 24, None):  # in each phase
        train = recipe.train.model_copy(update={"max_steps": stop})
        runs.append((recipe.model_copy(update={"train": train}), tmp_path / "resumed"))
    train_all(2, runs)
    assert differences(recipe, tmp_path / "resumed", tmp_path / "straight") == []
    names = final_tensors(tmp_path / "straight", recipe)
    assert sum("statistics/" in name for name in names) == 6, "of three batch norms, online and EMA"
