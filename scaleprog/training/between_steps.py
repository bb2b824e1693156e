"""How a run judges its networks between steps: the losses of a search, its choice, and the accuracies.

Each of these tasks may take minutes, so it ends early when the run is asked to stop, and is then pending at the next
start.
"""

import gc
import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F

from scaleprog.data.augment import BatchRequest
from scaleprog.data.on_device import low_pass
from scaleprog.data.order import SEARCH_EPOCH
from scaleprog.errors import Diverged, OverBudget, ScaleprogError
from scaleprog.files.atomic import write_whole
from scaleprog.files.display import counted
from scaleprog.growth.phase import Phase
from scaleprog.growth.search import Decision, candidate_times, decide, decide_within, measurement_steps, step_time
from scaleprog.growth.space import Subnet
from scaleprog.ranks.stop import Agreement, AskedToStop
from scaleprog.rundir.accuracies import Accuracies
from scaleprog.rundir.reading import read_object
from scaleprog.rundir.recorder import StepTimer
from scaleprog.rundir.records import HalfMeasured
from scaleprog.rundir.state import decision_from_json, decision_to_json, pairs
from scaleprog.training.damaged import count_damaged, note_damaged
from scaleprog.training.evaluate import evaluate
from scaleprog.training.inputs import patches_seen
from scaleprog.training.process import Run, collect_commits, save, stopped_early, work_of

HALF_MEASURED = "measuring.json"
COLLECT_EVERY = 500  # steps between two garbage collections, the same steps on all ranks
TIMED_STEPS = 64  # a search also uses the times of at most this many steps before it


@dataclass(frozen=True)
class Following:
    """What follows a step.

    Args:
        pending: what has to be done, in this order: a measurement, a choice, an evaluation.
        permanent: whether the step's checkpoint is kept for good.
        saving: whether the step gets a checkpoint, whatever comes of `pending`.
        resolving: whether the losses that are buffered on the device are resolved.
    """

    pending: tuple[str, ...]
    permanent: bool
    saving: bool
    resolving: bool


def what_follows(run: Run, phase: Phase, agreement: Agreement) -> Following:
    """What follows the present step, by arithmetic and by what the ranks have agreed on."""
    step, recipe, epoch = run.state.step, run.recipe, run.plan.order.steps_per_epoch
    settings, searched = recipe.checkpoint, phase.searched
    ended = step == phase.stop
    last = step == run.plan.schedule.phases(run.state.choices)[-1].stop

    def every(epochs: float | None) -> bool:
        return epochs is not None and phase.position_of(step) % max(1, round(epochs * epoch)) == 0

    wanted = {
        "measurement": step in measuring_steps(run, phase),
        "choice": searched and ended,
        "evaluation": not searched and (last or every(recipe.evaluate.every)),
    }
    permanent = not searched and every(settings.keep_every_epochs)
    by_steps = settings.steps is not None and step % settings.steps == 0
    saving = permanent or by_steps or ended or stopped_early(run) or agreement.save or agreement.stop is not None
    judged = wanted["measurement"] or wanted["evaluation"]
    return Following(
        pending=tuple(name for name, is_wanted in wanted.items() if is_wanted),
        permanent=permanent,
        saving=saving,
        resolving=judged or saving or step % recipe.train.log_every == 0,
    )


def after_step(run: Run, phase: Phase, agreement: Agreement) -> None:
    """Does everything that follows a step; a checkpoint of this step holds the results of all of it.

    Raises:
        AskedToStop: the ranks have agreed to stop. A checkpoint of this step has been started, and slow tasks are left
            pending, because the grace time is short.
        OverBudget: no choice keeps to a budget that was promised. A checkpoint of this step has been started.
    """
    state, follows = run.state, what_follows(run, phase, agreement)
    if state.step % COLLECT_EVERY == 0:
        gc.collect()
    if follows.resolving:
        flush_metrics(run)
    state.pending = list(follows.pending)
    ended: AskedToStop | OverBudget | None = AskedToStop(agreement.stop) if agreement.stop else None
    if state.pending or ended is not None:
        run.profiling.end(state.step)
    if ended is None:
        try:
            run_pending(run, phase)
        except (AskedToStop, OverBudget) as meanwhile:
            ended = meanwhile
    is_best = "evaluation" in follows.pending and state.best_step == state.step
    if follows.saving or ended is not None or (run.recipe.checkpoint.keep_best and is_best):
        save(run, phase, follows.permanent)
    if ended is not None:
        raise ended


def flush_metrics(run: Run) -> None:
    """Resolves the recorded steps and adds their times to the state.

    Raises Diverged, see `skip`, or DataError, see `count_damaged`.
    """
    state = run.state
    collect_commits(run)
    if run.backend.compilations > run.compilations:
        run.compilations = run.backend.compilations
        run.recorder.event("compiled", step=state.step, graphs=run.compilations)
    if run.coordinator.rank == 0:
        run.lease.beat()
    for row in run.recorder.flush():
        if not math.isfinite(row["grad_norm"]):
            skip(run, row)
        state.train_seconds += row["step_seconds"]
        state.train_cpu_seconds += row["cpu_seconds"]
        if run.plan.schedule.kind == "automatic":
            times = state.step_seconds.setdefault(Subnet(row["resolution"], row["depth"]), [])
            times.append(row["step_seconds"])
            if row["phase"] == "train":
                del times[:-TIMED_STEPS]
        run.progress.update(row, max(run.plan.schedule.steps, run.plan.schedule.phases(state.choices)[-1].stop))
    count_damaged(run)


def skip(run: Run, row: Mapping[str, Any]) -> None:
    """Notes that a step's update has been skipped. Raises Diverged if the run must not continue without it."""
    state, settings, step = run.state, run.recipe.optimizer, row["step"]
    state.skipped.append(step)
    what = f"the norm of the gradients is {row['grad_norm']}"
    if not math.isfinite(row["loss"]):
        ranks = ", ".join(map(str, row["nonfinite_ranks"][:8]))
        what = f"the loss is {row['loss']}"
        what += f" on rank {ranks}" if run.coordinator.world > 1 else ""
    told = f"step {step}: {what} at lr {row['lr']:.3g}; its update was skipped"
    if settings.nonfinite == "stop":
        way = "resume with optimizer.nonfinite=skip"
    elif len(state.skipped) > settings.most_skipped:
        told += f", one more than optimizer.most_skipped={settings.most_skipped}"
        way = "raise optimizer.most_skipped"
    else:
        run.progress.say(f"{told}; {counted(len(state.skipped), 'update')} skipped so far")
        return
    raise Diverged(
        f"{told}, and the newest checkpoint is from before it. To see in which layer it began: scaleprog replay "
        f"{shlex.quote(str(run.folder))} {step}. To continue: {way}; or lower optimizer.lr, set optimizer.clip or warm "
        "up longer in a new run"
    )


def run_pending(run: Run, phase: Phase) -> None:
    """Does the tasks that are pending after the current step, which belongs to `phase`.

    Raises:
        AskedToStop: the ranks have agreed to stop; the unfinished task and all later ones stay pending.
        OverBudget: no choice keeps to a budget that was promised; the choice stays pending.
    """
    tasks = {"measurement": measure, "choice": choose, "evaluation": evaluate_now}
    while run.state.pending:
        tasks[run.state.pending[0]](run, phase)
        run.state.pending.pop(0)


# ---- search


def measuring_steps(run: Run, phase: Phase) -> tuple[int, ...]:
    """The steps after which a run measures the candidates of a phase; empty unless the phase is searched."""
    if not phase.searched:
        return ()
    search = run.recipe.search
    epoch = min(run.plan.order.steps_per_epoch, phase.stop - phase.start)
    return measurement_steps(phase.start, phase.stop, epoch, search.measurements)


def measure(run: Run, phase: Phase) -> None:
    """Measures the loss of every candidate on the search subset, with fixed augmentation, and adds it to the state.

    Raises:
        AskedToStop: the ranks have agreed to stop; the next start resumes after the batches measured so far.
    """
    state, device, stop = run.state, run.backend.device, None
    timer, schedule = StepTimer(device), run.plan.schedule
    targets = schedule.scoring_targets(phase)
    sizes = sorted({schedule.view(s).pixels for s in targets})
    requests = [BatchRequest(SEARCH_EPOCH, i, r, erase=0.0) for r in sizes for i in range(run.plan.search_batches)]
    done, found = _half_measured(run, targets, requests)
    search, emas = run.recipe.search, run.recipe.ema
    scored = emas.grow_from if search.ema is None else search.ema
    weights = scored % len(emas.momenta) if search.weights == "ema" else None
    run.patience.at("measuring candidates", kind="a batch")
    with run.reader.stream(requests[done:], sizes[-1]) as batches, run.backend.weights(weights):
        for request, batch in zip(requests[done:], batches, strict=True):
            images, labels = run.plan.data.images(batch, device), batch.labels.to(device, non_blocking=True)
            for subnet in targets:
                view = schedule.view(subnet)
                if view.pixels != request.resolution:
                    continue
                kept = patches_seen(run, view, SEARCH_EPOCH, request.step)
                shown = images if view.cutoff is None else low_pass(images, view.cutoff)
                run.patience.at("measuring candidates", kind=f"a measurement of {subnet}", size=work_of(run, subnet))
                logits = run.backend.forward(shown, schedule.active(phase, subnet), kept=kept)
                found[subnet] += F.cross_entropy(logits.float(), labels, reduction="none").tolist()
            note_damaged(run, batch)
            done += 1
            if done < len(requests) and (stop := run.watch.asked()):
                break
    timer.stop()
    state.search_seconds += timer.seconds()
    state.train_seconds += timer.seconds()  # the paper's time includes the scoring
    state.train_cpu_seconds += timer.cpu_seconds
    count_damaged(run)
    if stop:
        _keep_half(run, done, found)
        raise AskedToStop(stop)
    means, errors = _means_and_errors(run, found)
    losses = {subnet: means[schedule.policy.proxy(subnet)] for subnet in phase.candidates}
    state.measured.append(losses)
    state.errors = {subnet: errors[schedule.policy.proxy(subnet)] for subnet in phase.candidates}
    run.recorder.event(
        "measurement", step=state.step, seconds=timer.seconds(), losses=pairs(losses), errors=pairs(state.errors)
    )


def _means_and_errors(
    run: Run, found: Mapping[Subnet, Sequence[float]]
) -> tuple[dict[Subnet, float], dict[Subnet, float]]:
    """The mean losses over all ranks, and the standard errors of their differences from the largest Subnet's loss.

    `found`: the losses of this rank's images, in the same order for every Subnet.
    """
    losses = {subnet: np.asarray(values) for subnet, values in found.items()}
    largest = losses[max(losses)]
    sums = [(values.sum(), (values - largest).sum(), ((values - largest) ** 2).sum()) for values in losses.values()]
    totals = iter(run.coordinator.total([float(value) for each in sums for value in each]))
    images = len(largest) * run.coordinator.world
    means, errors = {}, {}
    for subnet in losses:
        total, difference, squares = (next(totals) / images for _ in range(3))
        means[subnet] = total
        errors[subnet] = math.sqrt(max(0.0, squares - difference**2) / images)
    return means, errors


def _half_measured(
    run: Run, targets: Sequence[Subnet], requests: Sequence[BatchRequest]
) -> tuple[int, dict[Subnet, list[float]]]:
    """The progress of the current measurement when the run stopped: the batches done, and their losses on this rank.

    A separate file holds both. A checkpoint cannot: a search starts from one that is older than the search's network.
    """

    world, rows = run.coordinator.world, run.recipe.train.batch // run.coordinator.world
    where, pixels = _where(run, targets), [run.plan.schedule.view(subnet).pixels for subnet in targets]

    def read() -> tuple[int, list[list[list[float]]]]:
        with suppress(ScaleprogError):  # then the measurement starts from scratch
            kept = read_object(run.folder / HALF_MEASURED, HalfMeasured)
            if kept is not None and kept["where"] == where and kept["done"] < len(requests):
                shown = [request.resolution for request in requests[: kept["done"]]]
                held = [rows * shown.count(side) for side in pixels]  # losses that each network must have by now
                if [[len(losses) for losses in rank] for rank in kept["losses"]] == [held] * world:
                    return kept["done"], kept["losses"]
        return 0, [[[] for _ in targets] for _ in range(world)]

    done, losses = run.coordinator.decide("measurement so far", read)
    return done, dict(zip(targets, losses[run.coordinator.rank]))


def _keep_half(run: Run, done: int, found: Mapping[Subnet, Sequence[float]]) -> None:
    everyones = run.coordinator.gather(list(found.values()))
    if run.coordinator.rank == 0:
        with suppress(OSError):  # then the measurement starts from scratch
            kept = {"where": _where(run, list(found)), "done": done, "losses": everyones}
            write_whole(run.folder / HALF_MEASURED, json.dumps(kept))


def _where(run: Run, targets: Sequence[Subnet]) -> dict[str, Any]:
    """What tells one measurement from another: its step, its networks, and the number of ranks."""
    subnets = [[s.resolution, s.depth] for s in targets]
    return {"step": run.state.step, "networks": subnets, "ranks": run.coordinator.world}


def choose(run: Run, phase: Phase) -> None:
    """Ends a search: rank 0 decides, by the slowest rank's step times, and all ranks verify the decision.

    Raises:
        OverBudget: no choice keeps to a budget that was promised.
    """
    state = run.state
    local = [step_time(state.step_seconds[s]) if s in state.step_seconds else 0.0 for s in phase.candidates]
    measured = dict(zip(phase.candidates, run.coordinator.maximum(local)))
    costs = {subnet: run.plan.gmacs(subnet) for subnet in phase.candidates}
    times = costs if run.recipe.search.times == "modelled" else candidate_times(measured, costs)
    what = f"choice of stage {phase.stage}"
    decision = decision_from_json(run.coordinator.on_rank_0(what, lambda: decision_to_json(_decide(run, phase, times))))
    state.decisions.append(decision)
    run.recorder.event("choice", step=state.step, **decision_to_json(decision))
    run.recorder.choice(state.step, decision)
    run.progress.say(f"stage {phase.stage} chose {decision.chosen}, {decision.because}")


def _decide(run: Run, phase: Phase, times: dict[Subnet, float]) -> Decision:
    state, schedule = run.state, run.plan.schedule
    if schedule.budget is None:
        return decide(phase.stage, state.measured, times)
    # relative to the complete model's: the machines may change during a run
    prices = {subnet: run.plan.gmacs(subnet) / run.plan.gmacs(schedule.full) for subnet in schedule.networks}
    for measured in (*(dict(zip(d.candidates, d.times)) for d in state.decisions), times):
        if complete := measured.get(schedule.full):  # the published search of a fork's parent may not have timed it
            prices |= {subnet: each / complete for subnet, each in measured.items()}
    budget = schedule.budget_state(schedule.phases(state.choices), prices.__getitem__, run.plan.gmacs)
    guessing = math.log(run.recipe.model.classes)
    return decide_within(budget, phase.stage, state.measured, times, state.errors, guessing)


# ---- accuracy


def evaluate_now(run: Run, phase: Phase) -> None:
    """Measures the accuracies of a phase's network, and records whether this is the best evaluation so far.

    Raises:
        AskedToStop: the ranks have agreed to stop; the evaluation stays pending.
    """
    state, recipe, schedule, network = run.state, run.recipe, run.plan.schedule, phase.network
    began = time.perf_counter()
    run.patience.at("evaluating", kind="the beginning of an evaluation")

    def between() -> None:
        run.patience.at("evaluating", kind="a batch of the evaluation")
        if reason := run.watch.asked():
            raise AskedToStop(reason)

    shown = schedule.full if recipe.evaluate.resolution == "full" else network
    state.accuracies = evaluate(
        run.backend,
        run.coordinator,
        run.evaluation,
        schedule.view(shown).pixels,
        schedule.active(phase, network),
        between,
    ).by_name()
    spent = {"train_seconds": state.train_seconds, "train_cpu_seconds": state.train_cpu_seconds}
    run.recorder.evaluation(state.step, state.accuracies | spent)
    run.recorder.event("evaluation", step=state.step, seconds=time.perf_counter() - began, **state.accuracies)
    run.progress.say(
        f"step {state.step}: top-1 {state.accuracies['top1']:.2f} %, EMA {state.accuracies['top1_ema']:.2f} %"
    )
    best = Accuracies(state.accuracies).best
    if best > state.best_top1:
        state.best_step, state.best_top1 = state.step, best
