"""Given weights are the same under every engine, bit for bit: before and after they grow, in EMAs and batch norms."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scaleprog.growth.operators import fresh, grow
from scaleprog.launchers.local import launch
from scaleprog.models.elastic import Structure
from scaleprog.models.given import fit
from scaleprog.models.volo import ElasticVolo
from scaleprog.ranks.coordinator import process_group
from tests.compare import final_tensors
from tests.conftest import MakeRecipe, run
from tests.distributed.ranks import make
from tests.distributed.test_volo import MODEL

SHARDINGS: list[dict[str, Any]] = [
    {"engine": "fsdp"}, {"engine": "zero", "stage": 1}, {"engine": "zero", "stage": 3}, {"engine": "replicated"},
]  # fmt: skip


def begin(shardings: list[dict[str, Any]], out: Path) -> None:
    """Under each engine, the names of tensors of which a rank holds other elements than `replicated`, the last one."""
    with process_group() as (coordinator, device):
        torch.manual_seed(3)
        model = ElasticVolo(MODEL, Structure.plain((2, 2)))
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        for norm in model.norms.values():
            norm.running.uniform_(1, 2)
        given = fit(ElasticVolo, MODEL, (2, 2), model.plain(MODEL).tensors, "here")
        reference, unlike = {}, []
        for sharding in reversed(shardings):
            backend, found = make(sharding, device, MODEL), []
            for growth in (fresh((2, 2)), grow("mogrow", (2, 2), (2, 4))):
                backend.regrow(growth, inherit=False, may_skip_layers=False, given=given.tensors)
                for name, part in backend.state().items():
                    whole = reference.setdefault((backend.growths, name), part.tensor.clone())
                    if not torch.equal(part.tensor, whole[part.start : part.start + part.tensor.numel()]):
                        found.append(name)
            unlike.append([name for names in coordinator.gather(found) for name in names])
        same = all(
            torch.equal(reference[1, f"{of}/{name}"], given.tensors[name].flatten())
            for of in ("online", "ema.1")
            for name, _ in model.named_parameters()
        )
        if coordinator.rank == 0:
            out.write_text(json.dumps({"unlike": unlike, "same": same, "tensors": len(reference)}))


def test_every_engine_begins_with_the_weights_of_the_replicated_one(tmp_path: Path) -> None:
    launch(2, begin, SHARDINGS, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["unlike"] == [[]] * len(SHARDINGS)
    assert found["same"]
    assert found["tensors"] > 500


def test_a_run_on_two_ranks_begins_with_the_weights_of_another_run(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    first = make_recipe(growth={"schedule": "original"})
    run(first, tmp_path / "first", max_steps=2)
    still = {"lr": 1e-30, "weight_decay": 0.0, "warmup_epochs": 0, "warmup_lr": 0.0, "min_lr": 0.0}
    init = {"from": str(tmp_path / "first"), "weights": "ema"}
    recipe = make_recipe(init=init, growth={"schedule": "original"}, optimizer=still)
    run(recipe, tmp_path / "run", ranks=2, max_steps=1)
    theirs, ours = final_tensors(tmp_path / "first", first), final_tensors(tmp_path / "run", recipe)
    for name, tensor in theirs.items():
        if name.startswith("ema.0/"):
            assert torch.equal(ours[name.replace("ema.0", "online")], tensor)
