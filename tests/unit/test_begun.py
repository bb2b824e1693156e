"""The schedule of a fork: it begins with what the parent trained, and goes on as the new recipe says."""

from dataclasses import replace
from itertools import pairwise

from hypothesis import assume, given
from hypothesis import strategies as st

from scaleprog.growth.begun import begun_by, to_settings, trained
from scaleprog.growth.phase import Phase
from scaleprog.growth.schedule import Schedule
from scaleprog.growth.space import Choice
from scaleprog.recipe.keys import SubnetSettings
from scaleprog.recipe.parent import ParentSettings
from tests.unit.schedules import Unrolled, of

STEPS = 400
BY_HAND = (SubnetSettings(resolution=96, depth=5), SubnetSettings(resolution=224, depth=12))


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """A schedule of any kind."""
    kind = draw(st.sampled_from(("original", "linear", "automatic", "budget", "supernet", BY_HAND)))
    return of(
        steps=draw(st.integers(60, 3 * STEPS)),
        search_steps=draw(st.integers(1, 8)),
        rule=draw(st.sampled_from(("all", "window"))) if kind != "budget" else "corners",
        budget=0.6 if kind == "budget" else None,
        promised=draw(st.booleans()),
        schedule="automatic" if kind == "budget" else kind,
        stages=draw(st.integers(1, 6)),
        smallest=draw(st.sampled_from((0.3, 0.5, 1.0))),
        recycle=draw(st.booleans()),
        adaptive_regularization=draw(st.booleans()),
    )


def chosen(draw: st.DrawFn, schedule: Schedule, choices: list[Choice]) -> tuple[list[Phase], list[Choice]]:
    """All phases after these choices, and all choices: any that a search may make."""
    while (phases := schedule.phases(choices))[-1].searched:
        position = schedule.position_after(phases[-1])
        until = None
        if schedule.budget is not None:
            until = draw(st.integers(position, max(position, schedule.budget.latest)))
        subnet = schedule.full if until == position else draw(st.sampled_from(phases[-1].candidates))
        choices = [*choices, Choice(subnet, until)]
    return phases, choices


def joined(schedule: Schedule, begun: tuple[Phase, ...], position: int | None = None) -> Schedule:
    """`schedule` for a fork of a run that has trained `begun`, as a recipe says it."""
    last = begun[-1]
    at = last.position_of(last.stop) if position is None else position
    parent = ParentSettings(
        run="/a", id="0" * 32, step=last.stop, position=at, began=last.began, phases=to_settings(begun)
    )
    return replace(schedule, begun=begun_by(ParentSettings.model_validate(parent.model_dump(mode="json"))))


@st.composite
def forks(draw: st.DrawFn) -> Unrolled:
    """A fork, under any schedule, of a run of any schedule that stopped where it trained one network."""
    parent, child = draw(schedules()), draw(schedules())
    phases, _ = chosen(draw, parent, [])
    stops = [step for p in phases if p.kind == "train" for step in (p.start + 1, p.stop) if p.start < step <= p.stop]
    stops = [step for step in stops if trained(phases, step)[-1].position_of(step) < child.steps]
    assume(stops)
    child = joined(child, trained(phases, draw(st.sampled_from(stops))))
    return Unrolled(child, *chosen(draw, child, child.settled))


@given(forks())
def test_a_fork_tiles_on_and_never_shrinks_and_ends_with_the_complete_model(run: Unrolled) -> None:
    schedule, phases, begun = run.schedule, run.phases, run.schedule.begun
    assert tuple(phases[: len(begun)]) == begun
    for before, after in pairwise(phases):
        assert before.stop == after.start
        assert before.start < before.stop
    new = phases[len(begun) :]
    for before, after in pairwise(phases[len(begun) - 1 :]):
        end = schedule.position_after(before) if before.searched else before.position_of(before.stop)
        assert after.position == end
        assert [s for s in after.candidates if s.at_least(begun[-1].network) != s] == []
        if not before.searched:
            assert min(s.depth for s in after.candidates) >= before.network.depth
    assert phases[-1].position_of(phases[-1].stop) == schedule.steps
    assert phases[-1].network == schedule.full
    assert [phase.stage for phase in new] == sorted(phase.stage for phase in new)
    assert new[0].stage == begun[-1].stage + 1
    assert {s for phase in phases for s in phase.candidates} <= set(schedule.networks)


@given(forks())
def test_every_network_of_a_fork_grows_from_the_one_before(run: Unrolled) -> None:
    for index in range(len(run.schedule.begun), len(run.phases)):
        before, phase = run.phases[index - 1], run.phases[index]
        entry = run.schedule.entry(run.phases, index)
        if phase.began == phase.position > 0:
            assert entry is not None
            assert entry.layer_map.rest == "fresh"  # after a probe that failed
        elif entry is None:
            assert phase.candidates == before.candidates
        else:
            assert entry.layer_map.rest != "fresh"
            assert entry.layer_map.depths == (phase.network.depth,)
            for subnet in phase.candidates:
                assert len(run.schedule.active(phase, subnet)[0]) == subnet.depth


@given(schedules(), st.data())
def test_phases_survive_the_recipe(schedule: Schedule, data: st.DataObject) -> None:
    phases, _ = chosen(data.draw, schedule, [])
    begun = trained(phases, data.draw(st.integers(1, phases[-1].stop)))
    told = joined(schedule, begun).begun
    form = [(p.stage, p.kind, p.start, p.stop, p.candidates, p.base, p.searched) for p in begun]
    assert [(p.stage, p.kind, p.start, p.stop, p.candidates, p.base, p.searched) for p in told] == form
    assert told[-1].position_of(told[-1].stop) == begun[-1].position_of(begun[-1].stop)
