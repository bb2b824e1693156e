"""A few of the faults that `make chaos` draws; each run must end as if nothing had happened."""

import os

import pytest

from tests.chaos.faults import KINDS, MOMENTS, SLURM_KINDS, Fault
from tests.chaos.harness import SAVE_STEPS, Chaos, draw


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    return Chaos(tmp_path_factory.mktemp("chaos"))


@pytest.mark.parametrize(
    ("kind", "moment", "rank"),
    [
        ("TERM", "search", 1),
        ("kill one", "growth", 1),
        ("kill before the rename", "supernet", 0),
        ("truncation", "last stage", 0),
        pytest.param(
            "full disk", "warm-up", 0, marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
        ),
    ],
)
def test_a_run_under_a_fault_ends_as_the_undisturbed_one(kind: str, moment: str, rank: int, chaos: Chaos) -> None:
    outcome = chaos.run(Fault(kind, moment, rank, 0.0), 2, f"{kind} {moment}".replace(" ", "-"))
    assert outcome.wrong == []
    assert outcome.step >= 0, "it struck"
    if kind == "TERM":
        assert (outcome.lost, outcome.told, outcome.starts) == (0, "preempted", 2)
    elif kind == "full disk":
        assert (outcome.lost, outcome.told, outcome.starts) == (0, "checkpoint_failed", 1)
    else:
        assert outcome.starts == 2
        assert outcome.lost <= 2 * SAVE_STEPS


@pytest.mark.parametrize("seed", range(20))
def test_every_fault_and_moment_is_drawn(seed: int) -> None:
    drawn = draw(20, seed)
    assert {fault.kind for fault, _ in drawn} == {*KINDS, *SLURM_KINDS}
    assert {fault.kind for fault, _ in draw(20, seed, slurm=False)} == set(KINDS)
    assert {fault.moment for fault, _ in drawn} == set(MOMENTS)
    assert all(0 <= fault.rank < ranks for fault, ranks in drawn)
    assert drawn == draw(20, seed)
