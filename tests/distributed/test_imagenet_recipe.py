"""One recipe per family for the cluster, at its full model size; benchmarks/imagenet_recipes.py runs all of them."""

from pathlib import Path

import pytest

from tests.distributed.imagenet_runs import draw_shards, run_short


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    draw_shards(out, tmp_path_factory.mktemp("tree"))
    return out


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "engine"), [("deit_small_autoprog_published_100", "fsdp"), ("volo_d1_autoprog_published_100", "zero 3")]
)
def test_a_recipe_trains_three_steps_in_every_phase_in_the_memory_that_was_planned(
    name: str, engine: str, imagenet: Path, tmp_path: Path
) -> None:
    outcome = run_short(name, engine, imagenet, tmp_path / "run", "search.measurements=1")  # more would do the same
    assert outcome.steps.keys() >= {"1 supernet", *(f"{stage} train" for stage in (1, 2, 3, 4))}
    assert min(outcome.steps.values()) >= 3
    assert outcome.last == (224, 12 if "deit" in name else 18)
    assert outcome.finite
    assert outcome.peak == pytest.approx(outcome.planned, rel=0.1)
