"""VOLO under every engine: two layer groups, MixToken, and batch norms whose lanes lie on different ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from scaleprog.data.augment import token_boxes
from scaleprog.growth.operators import fresh, grow, keep
from scaleprog.growth.phase import active_layers
from scaleprog.launchers.local import launch
from scaleprog.models.elastic import Targets, TokenMix, drop_scales
from scaleprog.ranks.coordinator import Coordinator, process_group
from scaleprog.recipe.keys import AugmentSettings, ModelSettings
from scaleprog.sharding import Backend
from scaleprog.shards.token_labels import build
from tests.compare import differences, final_tensors
from tests.conftest import CLASSES, MakeRecipe, run
from tests.distributed.ranks import make

MODEL = ModelSettings(name="volo_d1_224", classes=10, resolution=48, patch=4, width=32, depth=8, heads=2, drop_path=0.1)
BATCH, LANES = 32, 4
ENGINES: dict[int, list[dict[str, Any]]] = {
    1: [{"engine": "replicated"}, {"engine": "fsdp"}],
    2: [
        {"engine": "replicated"},
        {"engine": "fsdp", "recompute": True},
        *({"engine": "zero", "stage": stage} for stage in (1, 2, 3)),
        {"engine": "fsdp", "precision": "autocast"},
        {"engine": "fsdp", "precision": "bf16"},
        {"engine": "zero", "stage": 3, "precision": "bf16"},
    ],
    4: [{"engine": "hsdp", "shard": 2}, {"engine": "replicated"}],
}


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
    ("world", "number"), [(world, i) for world in ENGINES for i in range(len(ENGINES[world]))], ids=str
)
def test_engines_train_what_one_process_trains(
    world: int, number: int, found: dict[int, list[list[list[float]]]]
) -> None:
    reference, life = found[1][0], found[world][number]
    rounded = ENGINES[world][number].get("precision", "fp32") != "fp32"
    assert len(reference) == 9
    for step, (theirs, ours) in enumerate(zip(reference, life, strict=True)):
        assert ours == pytest.approx(theirs, rel=5e-2 if rounded else 1e-5), (step, ENGINES[world][number])


def test_a_run_with_token_labels_resumes_bit_for_bit(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    patterns = Path(make_recipe().data.path)
    weights, labels = tmp_path / "teacher.pth", tmp_path / "labels"
    torch.save(timm.create_model("test_byobnet", num_classes=CLASSES).state_dict(), weights)
    build(patterns, labels, "test_byobnet", weights, 64, 3, 32, 1)
    recipe = make_recipe(
        data={"token_labels": str(labels)},
        model={"name": "volo_d1_224", "patch": 4, "width": 32, "depth": 6, "heads": 2, "drop_path": 0.1},
        augment={"mix_token": True}, train={"batch": 16, "epochs": 4}, sharding={"engine": "fsdp"},
    )  # fmt: skip
    run(recipe, tmp_path / "straight", ranks=2)
    for stop in (2, 8, 22):
        run(recipe, tmp_path / "resumed", ranks=2, max_steps=stop)
    run(recipe, tmp_path / "resumed", ranks=2)
    assert differences(recipe, tmp_path / "resumed", tmp_path / "straight") == []
    names = final_tensors(tmp_path / "straight", recipe)
    assert sum("statistics/" in name for name in names) == 6, "of three batch norms, online and EMA"
