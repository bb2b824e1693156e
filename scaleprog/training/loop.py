"""One whole run, from top to bottom: its start, the loop over phases and steps, and its results."""

import gc
import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaleprog.data.stream import Batch
from scaleprog.errors import Diverged, OverBudget, Preempted, Unavailable
from scaleprog.growth.phase import Phase
from scaleprog.growth.space import Subnet
from scaleprog.models.elastic import Active
from scaleprog.planning.savings import is_out_of_memory
from scaleprog.ranks.coordinator import Coordinator, process_group
from scaleprog.ranks.heap import keep_freed_memory
from scaleprog.ranks.patience import Patience
from scaleprog.ranks.stop import AskedToStop
from scaleprog.recipe import Recipe
from scaleprog.rundir.recorder import StepTimer
from scaleprog.rundir.sending import Senders
from scaleprog.sharding.optimizer import learning_rate
from scaleprog.training.between_steps import after_step, measuring_steps, run_pending
from scaleprog.training.damaged import note_damaged
from scaleprog.training.energy import metered
from scaleprog.training.initial import build_initial
from scaleprog.training.inputs import PhaseRequests, drop_rows, micro_batches, mixed_batch, patches_seen
from scaleprog.training.pictures import show_first_images, show_growth
from scaleprog.training.process import (
    Run,
    collect_commits,
    leave,
    load_network,
    out_of_memory,
    process_began,
    require_checkpoint,
    save,
    stopped_early,
    watched_patience,
    work_of,
)
from scaleprog.training.results import finish
from scaleprog.training.resume import state_of
from scaleprog.training.start import begin
from scaleprog.training.workers import adapt_workers

FLOPS_PER_GMAC = 6e9
"""Of an image: two for each multiply-accumulate of the forward pass, and twice as many in the backward."""


def train_rank(recipe: Recipe, folder: Path, own_process: bool = True) -> dict[str, Any]:
    """Joins the ranks of a run and trains with them, whichever launcher started this process; see `train`.

    `own_process`: whether this process only trains, and may end itself if it hangs.
    """
    began = process_began() if own_process else time.clock_gettime(time.CLOCK_BOOTTIME)
    if own_process:
        keep_freed_memory()
    with (
        watched_patience(recipe, folder) if own_process else nullcontext(Patience()) as patience,
        process_group(recipe.train.deterministic, patience.limit) as (coordinator, device),
    ):
        return train(recipe, folder, coordinator, device, patience=patience, began=began)


def train(
    recipe: Recipe,
    folder: Path,
    coordinator: Coordinator,
    device: torch.device,
    at_stop: Callable[[Run], None] = lambda run: None,
    patience: Patience | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """Trains `recipe` in the run directory `folder`, from its newest checkpoint on; every rank calls this.

    Args:
        recipe: what is trained.
        folder: the run directory.
        coordinator: the ranks.
        device: of this rank.
        at_stop: called if `train.max_steps` ends the run before its last step.
        patience: watches this rank.
        began: the reading of CLOCK_BOOTTIME, in seconds, when this start began; default: when the process did.

    Returns:
        The contents of `results.json`; empty if `train.max_steps` ended the run before its last step.

    Raises:
        RecipeError: the recipe cannot be run.
        OverBudget: no choice of a search keeps to the budget, at the measured step times.
        DataError: the shards are missing, damaged, or do not fit the recipe.
        CheckpointError: the newest checkpoint belongs to another run or version, or a run cannot have written it.
        Disagreement: ranks would act on different values.
        OutOfMemory: a step needs more memory than this rank has.
        Diverged: a loss or a gradient is not finite, and the recipe does not allow another skipped update.
        Preempted: the run was asked to stop.
        Superseded: a later start has taken over the run directory.
        Unavailable: something failed that may work at the next start, such as a full disk.
    """
    patience, rank = patience or Patience(), coordinator.rank
    run = begin(recipe, folder, coordinator, device, patience, began)
    trackers = recipe.tracking if rank == 0 else ()
    senders = Senders(folder, trackers, recipe.train.log_every, patience.generation)
    if not isinstance(run, Run):
        senders.close()  # which sends what a tracker may have missed
        return run
    recorder, state = run.recorder, run.state
    first_on_host = run.hosts.index(run.hosts[rank]) == rank
    gc.disable()
    zero = time.perf_counter() - state.wall_seconds
    try:
        # the workers of the evaluation end before the watch does, because they hold its sockets, too
        with metered(recorder, device, first_on_host), run.watch, closing(run.evaluation):
            try:
                train_phases(run, zero)
                patience.at("finishing", state.step, kind="the end")
                wait_for_checkpoint(run)
            except AskedToStop as asked:
                leave(run, asked.reason)
            except OverBudget:
                wait_for_checkpoint(run)
                raise
            except Diverged:  # on all ranks after the same step; a checkpoint that is being written is from before it
                collect_commits(run, wait=True)
                raise
        state.wall_seconds = time.perf_counter() - zero
        if current_phase(run) is None:
            return finish(run)
        recorder.event("stopped_early", step=state.step)
        at_stop(run)
        return {}
    except Preempted:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            error = out_of_memory(error, run.plan, run.checkpoints, run.backend.device, state)
        recorder.own_event("error", step=state.step, message=f"{type(error).__name__}: {error}")
        if coordinator.world == 1:
            with suppress(Exception):
                run.checkpoints.wait()  # with more ranks it could hang: the others may be gone
        raise error
    finally:
        gc.unfreeze()
        gc.enable()
        run.progress.close()
        recorder.close()
        senders.close()


def train_phases(run: Run, zero: float) -> None:
    """Trains every step of every phase, from the current step on. Raises AskedToStop or OverBudget.

    `zero`: the reading of `time.perf_counter` at which the run's `wall_seconds` were 0.
    """
    state, plan = run.state, run.plan
    if state.pending:
        phase = plan.schedule.phases(state.choices)[state.phase]
        run_pending(run, phase)
        save(run, phase, permanent=False)
    while current_phase(run) is not None and not stopped_early(run):
        phase = enter_phase(run)
        actives = {s: plan.schedule.active(phase, s) for s in phase.candidates}
        pixels = plan.schedule.view(phase.network).pixels
        adapt_workers(run, pixels)
        marks = run.patience.steps
        with run.reader.stream(PhaseRequests(run, phase), pixels) as batches:
            while state.step < phase.stop and not stopped_early(run):
                marks.at("waiting for data", state.step + 1, kind="a batch")
                batch = next(batches)
                subnet = phase.subnet(run.recipe.seed, state.step)
                run.profiling.before(state.step + 1)
                marks.at("training", kind=f"a step of {subnet}", size=work_of(run, subnet))
                train_step(run, phase, subnet, actives[subnet], batch, batches.waited)
                state.wall_seconds = time.perf_counter() - zero
                marks.at("after the step", kind="what follows a step")
                if state.step == phase.start + 1:
                    show_growth(run)
                agreement = run.watch.agree()
                run.profiling.after(state.step, agreement.requested)
                after_step(run, phase, agreement)
        run.profiling.end(state.step)


def wait_for_checkpoint(run: Run) -> None:
    """Returns when the last checkpoint is visible. Raises Unavailable if it could not be written, or Diverged."""
    last = collect_commits(run, wait=True)
    if last is not None and last.poisoned:
        raise Diverged(f"{last.error}; lower optimizer.lr, set optimizer.clip or warm up longer, in a new run")
    if last is not None and last.error:
        raise Unavailable(f"{last.error}; free some space and start again: the run resumes from its newest checkpoint")


def current_phase(run: Run) -> int | None:
    """The index of the next step's phase; None once the last phase is done."""
    phases = run.plan.schedule.phases(run.state.choices)
    return next((i for i, phase in enumerate(phases) if run.state.step < phase.stop), None)


# ---- growth


def enter_phase(run: Run) -> Phase:
    """The phase of the next step, with its network built. Raises AskedToStop."""
    phases, index = run.plan.schedule.phases(run.state.choices), current_phase(run)
    assert index is not None, "a run that has finished has no next step"
    if run.state.phase != index:
        enter(run, phases, index)
    return phases[index]


def enter(run: Run, phases: list[Phase], index: int) -> None:
    """Grows the network into that of phase `index`, and takes the measurement due before its first step, if any.

    Raises AskedToStop.
    """
    state, backend, schedule = run.state, run.backend, run.plan.schedule
    run.patience.at("growing", state.step, kind=f"growth into phase {index}")
    phase, growth = phases[index], run.recipe.growth
    if phase.searched and schedule.rewinds_to(state.choices, phase) == state.step > 0:
        require_checkpoint(run)
    if (entry := schedule.entry(phases, index)) is not None:
        layer_map, began = entry.layer_map, time.perf_counter()
        if entry.rewind_to is not None:
            before = run.checkpoints.at(entry.rewind_to)
            load_network(before, state_of(before, run.plan), backend, may_skip_layers=False)
            backend.growths = state.growths
        skips = phase.kind == "supernet"
        if layer_map.rest == "fresh":
            build_initial(run, layer_map, may_skip_layers=skips)
        else:
            backend.regrow(layer_map, inherit=growth.optimizer == "inherit", may_skip_layers=skips)
        sources = [[o.source for o in group] for group in layer_map.groups]
        run.recorder.event(
            "growth",
            step=state.step,
            stage=phase.stage,
            phase=phase.kind,
            resolution=phase.network.resolution,
            depth=phase.network.depth,
            sources=sources,
            weights=layer_map.rest,
            seconds=time.perf_counter() - began,
        )
        run.progress.say(f"stage {phase.stage} {phase.kind}: {', '.join(map(str, phase.candidates))}")
    state.phase, state.growths, state.gated = index, backend.growths, backend.structure.gated
    state.measured, state.errors = [], {}
    if phase.searched:
        state.last_search = phase.start, phase.stop
    timed = phase.candidates if phase.searched else ()  # the previous network may be one: keep its times
    state.step_seconds = {subnet: times for subnet, times in state.step_seconds.items() if subnet in timed}
    if phase.start in measuring_steps(run, phase):
        state.pending = ["measurement"]
        run_pending(run, phase)


# ---- one step


def train_step(run: Run, phase: Phase, subnet: Subnet, active: Active, batch: Batch, waited: float) -> None:
    """Trains one step (forward, backward, AdamW, EMAs) on this rank's part of a global batch, and records it.

    `active`: the layers of `subnet`; `waited`: seconds that the step waited for `batch`.
    """
    recipe, plan, step = run.recipe, run.plan, run.state.step
    position = phase.position_of(step)
    progress, began = phase.progress_of(step), phase.progress_began
    takeover = plan.schedule.takeover(run.state.choices) if recipe.optimizer.decay == "takeover" else math.inf
    lr = learning_rate(recipe.optimizer, progress, plan.schedule.steps, plan.order.steps_per_epoch, began, takeover)
    timer = StepTimer(run.backend.device)
    with run.backend.waits.measured(sampled=(step + 1) % recipe.train.log_every == 0) as in_collectives:
        loss = forward_and_backward(run, phase, subnet, active, batch)
        grad_norm = run.backend.step(lr, phase.age(step))
    timer.stop()
    flops = FLOPS_PER_GMAC * plan.gmacs(subnet) * recipe.train.batch if run.recorder.peak_flops else 0.0

    row = {
        "step": step + 1,
        "epoch": position / plan.order.steps_per_epoch,
        "stage": phase.stage,
        "phase": phase.kind,
        "resolution": subnet.resolution,
        "depth": subnet.depth,
        "lr": lr,
        "data_wait_seconds": waited,
        "images": recipe.train.batch,
    }
    if recipe.data.trace:
        trace(run, batch)
    note_damaged(run, batch)
    run.recorder.step(row, loss, grad_norm, timer, batch.ids.clone(), flops=flops, waited=in_collectives)
    run.state.step += 1
    run.state.images += recipe.train.batch


def forward_and_backward(run: Run, phase: Phase, subnet: Subnet, active: Active, batch: Batch) -> Tensor:
    """Adds up the gradients of this rank's part of a global batch, and returns its mean loss, 0-D; see `train_step`."""
    recipe, plan, backend = run.recipe, run.plan, run.backend
    view = plan.schedule.view(subnet)
    drop = drop_rows(run, phase, len(batch.labels))
    kept = patches_seen(run, view, *divmod(phase.position_of(run.state.step), plan.order.steps_per_epoch))
    images, targets, mixed = mixed_batch(run, batch, view)
    if run.state.step == phase.start:
        show_first_images(run, phase, images)
    loss = torch.zeros((), device=backend.device)
    unit = plan.order.per_lane if plan.family.whole_lanes else 1
    for rows in micro_batches(len(images), recipe.train.micro_batch, unit):
        output = backend.forward(
            images[rows],
            active,
            None if drop is None else drop[:, :, rows],
            None if kept is None else kept[rows],
            None if mixed is None else mixed.of(rows),
        )
        part = plan.family.loss(output, targets.of(rows)) * ((rows.stop - rows.start) / len(images))
        # a loss that is not finite may have finite gradients; this makes them NaN, and AdamW skips them on all ranks
        backend.backward(part * (0 * part.detach() + 1))
        loss += part.detach()
    return loss


def trace(run: Run, batch: Batch) -> None:
    """Records which samples this rank has trained on in the current step."""
    run.recorder.samples(run.state.step + 1, batch.ids.tolist())
