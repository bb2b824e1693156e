"""A few of the faults that `make chaos` draws; each run must end as if nothing had happened."""

import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest

from scaleprog.recipe.keys import Engine
from tests import forked
from tests.chaos.faults import KINDS, MOMENTS, SLURM_KINDS, Fault
from tests.chaos.harness import SAVE_STEPS, START_SECONDS, Chaos, draw, put_section


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Engine], Chaos]:
    """Gives that of an engine. Commands and their ranks are forked; `make chaos` starts them as a user does."""

    def make(engine: Engine) -> Chaos:
        folder = tmp_path_factory.mktemp(engine)
        command = partial(forked.run, "tests.chaos.faults", output=folder / "output", seconds=START_SECONDS)
        return Chaos(folder, engine, command=command)

    return cache(make)


@pytest.mark.parametrize(
    ("engine", "kind", "moment", "rank"),
    [
        ("fsdp", "TERM", "search", 1),
        ("fsdp", "kill one", "growth", 1),
        ("fsdp", "kill before the rename", "supernet", 0),
        ("fsdp", "truncation", "last stage", 0),
        pytest.param(
            "fsdp", "full disk", "warm-up", 0, marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
        ),
        ("fsdp", "not a number", "last stage", 1),
        ("fsdp", "clock set back", "last stage", 0),
        ("fsdp", "sleeping decoder", "supernet", 0),
        ("hsdp", "TERM", "supernet", 1),
        ("zero", "kill one", "search", 1),
    ],
)
def test_a_run_under_a_fault_ends_as_the_undisturbed_one(
    engine: Engine, kind: str, moment: str, rank: int, chaos: Callable[[Engine], Chaos]
) -> None:
    outcome = chaos(engine).run(Fault(kind, moment, rank, 0.0), 2, f"{kind} {moment}".replace(" ", "-"))
    assert outcome.wrong == []
    assert outcome.step >= 0, "it struck"
    if kind == "TERM":
        assert (outcome.lost, outcome.told, outcome.starts) == (0, "preempted", 2)
    elif kind == "full disk":
        assert (outcome.lost, outcome.told, outcome.starts) == (0, "checkpoint_failed", 1)
    else:
        assert kind != "sleeping decoder" or outcome.told == "hang"
        assert outcome.starts == 2
        assert outcome.lost <= 2 * SAVE_STEPS


@pytest.mark.parametrize("seed", range(20))
def test_every_fault_and_moment_is_drawn(seed: int) -> None:
    runs = len(KINDS + SLURM_KINDS)
    drawn = draw(runs, seed)
    assert {fault.kind for fault, _ in drawn} == {*KINDS, *SLURM_KINDS}
    assert {fault.kind for fault, _ in draw(runs, seed, slurm=False)} == set(KINDS)
    assert {fault.moment for fault, _ in drawn} == set(MOMENTS)
    assert all(0 <= fault.rank < ranks for fault, ranks in drawn)
    assert drawn == draw(runs, seed)


def test_the_table_of_one_engine_leaves_those_of_others(tmp_path: Path) -> None:
    path = tmp_path / "chaos.md"
    for engine, text in (("zero", "one\n\n| a |"), ("fsdp", "two"), ("zero", "three\n\n| b |"), ("fsdp", "four")):
        put_section(path, engine, text)
    assert path.read_text() == "## fsdp\n\nfour\n\n## zero\n\nthree\n\n| b |\n"
