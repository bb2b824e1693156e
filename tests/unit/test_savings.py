"""Out of memory: recognized, and answered by the settings that help, with what each would save."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import scaleprog.training.loop
import scaleprog.training.process
from scaleprog.errors import OutOfMemory
from scaleprog.growth.space import Subnet
from scaleprog.launchers.exits import MISTAKE, exit_by
from scaleprog.models import resolve_family
from scaleprog.planning.cost_model import predict
from scaleprog.planning.devices import Device
from scaleprog.planning.savings import advice, is_out_of_memory
from scaleprog.recipe import Recipe
from tests.conftest import MakeRecipe, run

DEIT: dict[str, Any] = {
    "model": {"name": "deit_small_patch16_224"}, "data": {"path": "none"}, "train": {"epochs": 100, "batch": 1024},
}  # fmt: skip


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("NCCL error"))


@pytest.mark.parametrize("engine", ["replicated", "fsdp", "zero"])
def test_savings_are_the_cost_models(engine: str) -> None:
    recipe = Recipe.of(DEIT | {"sharding": {"engine": engine}}, "test")
    family = resolve_family(recipe.model)[0]
    text = advice(recipe, family, Subnet(224, 12), 8)
    found = {name: float(size) for name, size in re.findall(r"(\S+) would save ([0-9.]+) GiB", text)}
    assert {"train.micro_batch=64", "sharding.recompute=true"} <= found.keys()
    assert ("sharding.offload=all" in text) == (engine != "replicated")
    assert list(found.values()) == sorted(found.values(), reverse=True)

    def needed(**sharding: Any) -> int:
        changed = Recipe.of(DEIT | {"sharding": {"engine": engine, **sharding}}, "test")
        return predict(changed, family, Subnet(224, 12), 8, Device.named("h100")).memory.device

    assert found["sharding.recompute=true"] == pytest.approx((needed() - needed(recompute=True)) / 2**30, abs=0.01)


def test_a_run_that_is_out_of_memory_is_not_a_crash(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(scaleprog.training.loop, "forward_and_backward", exhausted)
    with pytest.raises(
        OutOfMemory, match=r"rank 0 is out of memory .* after step 0: .*train.micro_batch=4.*2.00 GiB"
    ) as caught:
        run(make_recipe(), tmp_path)
    assert exit_by(caught.value).code == MISTAKE, "so no launcher starts it again"


def test_a_run_whose_checkpoint_does_not_fit_any_more_is_not_a_crash(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that resumes on smaller GPUs."""

    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    run(make_recipe(), tmp_path, max_steps=2)
    monkeypatch.setattr(scaleprog.training.process, "load_network", exhausted)
    with pytest.raises(
        OutOfMemory, match=r"rank 0 is out of memory .* after step 2: .*train.micro_batch=4.*2.00 GiB"
    ) as caught:
        run(make_recipe(), tmp_path)
    assert exit_by(caught.value).code == MISTAKE
