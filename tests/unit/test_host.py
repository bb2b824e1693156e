"""A step issues its work and reads none of the results: on torch's "meta" device, whose tensors have no values, whoever
reads one fails."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import benchmarks.host
from benchmarks.gpu_cells import in_a_run
from benchmarks.gpu_trainer import Bench, Trainer
from scaleprog.planning.plan import outline
from scaleprog.ranks.coordinator import Coordinator


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch, one_rank: None) -> Iterator[Bench]:
    optimizer = sys.modules["torch.optim.optimizer"]  # torch.optim hides it
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *lists, **numbers: None)  # which meta lacks
    monkeypatch.setattr("scaleprog.data.reader.erase", lambda images, boxes: None)  # meta has no random numbers
    yield Bench(Coordinator(), torch.device("meta"), tiny=True)
    gc.collect()


def test_a_step_reads_nothing_from_the_device(meta: Bench, tmp_path: Path) -> None:
    trainer = Trainer(meta, benchmarks.host.model_for(1), engine="replicated")
    phase = outline(trainer.recipe, 1000)[1].phases(())[0]
    trainer.grow(phase.network)
    run, step = in_a_run(trainer, phase, phase.network, tmp_path)
    for _ in range(2):
        step(None)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        run.recorder.flush()
    run.recorder.close()
