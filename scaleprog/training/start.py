"""How a start of a run begins: its data, network, checkpoint, and records, up to where `loop` trains on."""

import gc
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from scaleprog.data.evaluation import VALIDATION, EvaluationReader
from scaleprog.data.reader import TrainReader
from scaleprog.planning.devices import PEAKS
from scaleprog.planning.plan import Plan, plan_start
from scaleprog.ranks.coordinator import Coordinator, ranks_per_node
from scaleprog.ranks.patience import Patience
from scaleprog.ranks.stop import Watch, deadline
from scaleprog.recipe import Recipe, directories
from scaleprog.rundir import slurm_queue
from scaleprog.rundir.board import About
from scaleprog.rundir.checkpoint import Checkpoints
from scaleprog.rundir.lease import Lease, take_lease
from scaleprog.rundir.planned import write_plan
from scaleprog.rundir.progress import ProgressLine
from scaleprog.rundir.reading import read_results
from scaleprog.rundir.recorder import Recorder
from scaleprog.rundir.state import RunState
from scaleprog.sharding import Backend
from scaleprog.training.interval import AutomaticInterval
from scaleprog.training.process import (
    Run,
    leave_at_once,
    make_backend,
    name_of,
    process_began,
    restore,
    tell_hang,
    tell_signal,
)
from scaleprog.training.profiling import Profiling
from scaleprog.training.resume import owner_of
from scaleprog.training.workers import with_own_cores


def begin(
    recipe: Recipe,
    folder: Path,
    coordinator: Coordinator,
    device: torch.device,
    patience: Patience,
    began: float | None,
) -> Run | dict[str, Any]:
    """Takes the run directory over, and stands where its newest checkpoint stands; every rank calls this.

    The arguments are those of `loop.train`, which says what it raises. Returns the results of a run that has finished.
    """
    began = process_began() if began is None else began
    typed, recipe = recipe, recipe.located(directories.to_train(folder))
    plan = with_own_cores(plan_start(recipe, coordinator.world, ranks_per_node()), coordinator)
    rank, world = coordinator.rank, coordinator.world
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # an earlier run in this process may have held more
    coordinator.verify("recipe", typed.dump())
    coordinator.verify("shards", [plan.data.identity(), [[s.name, s.sha256] for s in plan.manifest.split("train")]])
    reader = TrainReader(plan.data, plan.order, recipe.seed, rank, world)
    evaluation = EvaluationReader(plan.data, VALIDATION, recipe.evaluate.batch, rank, world)
    lease = take_lease(folder, typed, coordinator)
    patience.generation = lease.generation
    backend = make_backend(recipe.sharding.engine, recipe, plan.family, device)
    gc.collect()
    gc.freeze()  # modules and the like stay for good: later collections need not look at them

    # ---- resume
    progress = ProgressLine(plan.schedule.steps, 0, rank == 0)
    checkpoints = Checkpoints(
        folder / "checkpoints",
        coordinator,
        recipe.checkpoint.keep,
        lease.fence,
        lease.generation,
        owner_of(typed),
        patience,
    )
    if rank == 0:
        with lease.fence():
            checkpoints.tidy()
    if plan.data.token_labels is not None and plan.data.token_labels.other_images:
        progress.say(
            f"data.token_labels: {recipe.data.token_labels} was made of other files than {recipe.data.path} holds; if "
            "these are not the same images in another size or form, build the token labels again"
        )
    state = restore(plan, checkpoints, backend, progress)
    plan = plan.resumed(state.last_search)
    timed_on = f"{world} x {name_of(device)}, {recipe.sharding}, micro_batch={recipe.train.micro_batch}"
    if state.timed_on != timed_on:  # times of different machines must not be mixed
        if "choice" not in state.pending:  # which has all its times already
            state.step_seconds = {}
        state.timed_on = timed_on
    finished = state.step == plan.schedule.phases(state.choices)[-1].stop
    if finished and (results := coordinator.on_rank_0("results", lambda: read_results(folder))) is not None:
        progress.say(f"{folder} is finished: {state.step} steps")
        return dict(results)

    # ---- records
    hosts = coordinator.gather(os.uname().nodename)
    recorder = _recorder(folder, typed, plan, coordinator, lease, state, device, hosts)
    profiling = Profiling(folder, coordinator, recorder, device, recipe.train.profile)
    job = slurm_queue.own_job()
    watch = Watch(
        coordinator,
        partial(tell_signal, recorder, checkpoints, state),
        partial(leave_at_once, recorder),
        recipe.checkpoint.minutes,
        slurm_queue.end_of_job(job, deadline()) if rank == 0 else None,
        profiling.requested,
        lambda: slurm_queue.end_of_job(job, deadline()),
    )
    run = Run(
        folder, recipe, plan, coordinator, lease, backend, reader, evaluation, checkpoints, watch, recorder, progress,
        state, profiling, patience, hosts,
    )  # fmt: skip
    patience.alone = partial(tell_hang, recorder)
    if rank == 0:
        recorder.event(
            "start",
            step=state.step,
            world=world,
            engine=recipe.sharding.engine,
            device=str(device),
            hosts=[host for host, _ in groupby(hosts)],
            job=job,
            startup_seconds=max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began),
            tracking=recipe.tracking,
            log_every=recipe.train.log_every,
            **recorder.lost,
            reader_bytes=reader.memory(plan.schedule.full.resolution),
        )
        if recipe.checkpoint.every == "auto":
            run.on_saved = AutomaticInterval(run, nodes=len(set(hosts))).saved
    if plan.schedule.budget and plan.schedule.budget.short:
        progress.say(plan.schedule.budget.short)
    if unmeasured := no_slow_ranks(backend, world):
        progress.say(unmeasured)
    return run


def no_slow_ranks(backend: Backend, world: int) -> str:
    """Why no rank of a run will be called slow, as a sentence; empty if one may be, or if there is only one."""
    if world == 1 or backend.waits.known:
        return ""
    where = " on GPUs" if backend.device.type == "cuda" and backend.sharding.engine != "zero" else ""
    return (
        f"no rank will be called slow: sharding.engine: {backend.sharding.engine}{where} does not measure the time in "
        "collectives (docs/tensorboard.md)"
    )


def _recorder(
    folder: Path,
    typed: Recipe,
    plan: Plan,
    coordinator: Coordinator,
    lease: Lease,
    state: RunState,
    device: torch.device,
    hosts: Sequence[str],
) -> Recorder:
    """The records of a run, cut back to `state`. `typed`: the recipe as it was given; `hosts`: of all ranks."""
    peak, first = PEAKS.get(name_of(device)), coordinator.rank == 0
    with lease.fence() if first else nullcontext():  # a start superseded by now must not truncate the records
        if first:
            with suppress(OSError):  # only other commands read them
                directories.note(folder)
                write_plan(folder, plan.schedule, plan.gmacs)
        return Recorder(
            folder,
            coordinator,
            lease.generation,
            state.step,
            plan.recipe.train.log_every,
            redo_evaluation=bool(state.pending),
            rank_curves=plan.recipe.train.rank_curves,
            unit="GMACs" if plan.recipe.search.times == "modelled" else "step ms",
            about=About.of(typed),
            hosts=hosts,
            skipped=len(state.skipped),
            peak_flops=None if peak is None else coordinator.world * peak,
            device=device,
        )
