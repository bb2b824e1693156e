"""A run that is asked to stop while it measures or evaluates leaves at once, and does the rest when it goes on."""

from collections.abc import Callable
from pathlib import Path

import pytest

import scaleprog.training.between_steps
import scaleprog.training.loop
from scaleprog.errors import Preempted
from scaleprog.growth.phase import Phase
from scaleprog.growth.space import Subnet
from scaleprog.planning.plan import Plan
from scaleprog.ranks.stop import Watch
from scaleprog.recipe import Recipe
from scaleprog.rundir.recorder import read_rows
from scaleprog.training.between_steps import run_pending
from scaleprog.training.process import Run
from tests.compare import differences
from tests.conftest import run

Asked = list[tuple[str, int]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], Asked]:
    """Makes runs write down when they ask whether to stop: in what and at which step; the given time, they must."""

    def script(stop: int | None) -> Asked:
        asked: Asked = []

        def pending(run: Run, phase: Phase) -> None:
            def ask(_: Watch) -> str | None:
                asked.append((run.state.pending[0], run.state.step))
                return "SIGTERM" if len(asked) - 1 == stop else None

            monkeypatch.setattr(Watch, "asked", ask)
            run_pending(run, phase)

        for module in (scaleprog.training.between_steps, scaleprog.training.loop):
            monkeypatch.setattr(module, "run_pending", pending)
        return asked

    return script


@pytest.mark.parametrize("recycle", [True, False])
def test_what_is_left_is_done_later(
    recycle: bool, make_recipe: Callable[..., Recipe], asked: Callable[[int | None], Asked], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    recipe = make_recipe(
        growth={"schedule": "automatic", "stages": 3, "recycle": recycle}, evaluate={"every": 0.5, "batch": 12}
    )
    straight = asked(None)
    run(recipe, tmp_path / "straight")
    searched = sorted({step for task, step in straight if task == "measurement"})
    evaluated = sorted({step for task, step in straight if task == "evaluation"})
    places = {
        "first of all": ("measurement", 0),
        "in a supernet": ("measurement", searched[2]),
        "before the choice": ("measurement", searched[4]),
        "after growth": ("measurement", searched[5]),
        "evaluation": ("evaluation", evaluated[1]),
        "last evaluation": ("evaluation", evaluated[-1]),
    }
    for name in places if recycle else ("in a supernet", "after growth"):
        place = places[name]
        folder = tmp_path / name
        before = asked(straight.index(place) + (place[0] == "measurement"))
        kept = "with a checkpoint" if place[1] else "before there was anything to save"
        with pytest.raises(Preempted, match=f"stopped by SIGTERM after step {place[1]} {kept}"):
            run(recipe, folder)
        if name == "evaluation":  # once it is done, the run crashes before it has saved that
            asked(None)
            with monkeypatch.context() as patch:
                patch.setattr(scaleprog.training.loop, "save", lambda *_, **__: 1 // 0)
                with pytest.raises(ZeroDivisionError):
                    run(recipe, folder)
        after = asked(None)
        run(recipe, folder)
        assert differences(recipe, folder, tmp_path / "straight") == [], name
        if place[0] == "measurement":
            assert before + after == straight, f"{name}: every batch was measured once"
        else:
            assert before[:-1] + after == straight, f"{name}: evaluated from the start"


def test_a_choice_that_is_pending_keeps_the_times_of_its_search(
    make_recipe: Callable[..., Recipe], asked: Callable[[int | None], Asked], tmp_path: Path
) -> None:
    """Whatever it continues on: no step of the search is left that could be timed there."""
    recipe = make_recipe(growth={"schedule": "automatic", "stages": 3}, search={"times": "measured"})
    straight = asked(None)
    run(recipe, tmp_path / "straight", max_steps=11)
    asked(straight.index(("measurement", 10)) + 1)
    with pytest.raises(Preempted, match="after step 10 with a checkpoint"):
        run(recipe, tmp_path / "run")
    asked(None)
    run(recipe, tmp_path / "run", max_steps=11, micro_batch=4)
    (choice,) = (event for event in read_rows(tmp_path / "run" / "events.jsonl") if event["event"] == "choice")
    plan = Plan.of(recipe)
    counted = [plan.gmacs(Subnet(*candidate)) for candidate in choice["candidates"]]
    assert choice["times"] != pytest.approx(counted)
