"""Damaged samples that a run has replaced: their names in its state and its events, and the most that it may meet."""

from itertools import chain

from scaleprog.data.damaged import read_names, too_many
from scaleprog.data.stream import Batch
from scaleprog.files.display import counted
from scaleprog.training.process import Run

MOST_NAMED = 1000  # in one event


def note_damaged(run: Run, batch: Batch) -> None:
    """Notes which damaged samples were replaced in this rank's part of a batch."""
    run.damaged.update(read_names(batch.replaced))


def count_damaged(run: Run) -> None:
    """Adds the damaged samples that any rank has noted since the last call to the state; every rank calls this.

    The state counts each sample once, so repeated epochs, repeated steps, and other numbers of ranks do not change it.

    Raises DataError on every rank if there are more than `data.most_damaged`.
    """
    state, settings = run.state, run.recipe.data
    if settings.damaged == "stop":
        return
    found, run.damaged = sorted(run.damaged.difference(state.damaged)), set()
    if not any(run.coordinator.maximum([len(found)])):
        return
    new = sorted(set(chain(*run.coordinator.gather(found))))
    state.damaged = sorted([*state.damaged, *new])
    run.recorder.event("damaged", step=state.step, total=len(state.damaged), samples=new[:MOST_NAMED])
    run.progress.say(
        f"step {state.step}: {new[0]} is damaged, and another sample takes its place; "
        f"{counted(len(state.damaged), 'damaged sample')} so far"
    )
    if len(state.damaged) > settings.most_damaged:
        raise too_many(state.damaged, settings.most_damaged)
