"""One process of a run: what it works with, how it saves and resumes, and how it reacts to signals."""

import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from scaleprog.data.evaluation import EvaluationReader
from scaleprog.data.reader import TrainReader
from scaleprog.errors import EXIT_CODE, CheckpointError, OutOfMemory, Preempted, Unavailable
from scaleprog.files.display import say
from scaleprog.growth.phase import Phase
from scaleprog.growth.space import Subnet
from scaleprog.models.elastic import ElasticModel, Structure
from scaleprog.planning.plan import Plan
from scaleprog.planning.savings import advice, is_out_of_memory
from scaleprog.ranks.coordinator import Coordinator, collectives
from scaleprog.ranks.patience import Patience
from scaleprog.ranks.pulse import Stand
from scaleprog.ranks.rendezvous import Place
from scaleprog.ranks.stop import TIME_LIMIT, Watch
from scaleprog.recipe import Recipe
from scaleprog.recipe.keys import Engine
from scaleprog.rundir.checkpoint import Checkpoints, Commit
from scaleprog.rundir.lease import Lease
from scaleprog.rundir.progress import ProgressLine
from scaleprog.rundir.recorder import Recorder
from scaleprog.rundir.state import RunState
from scaleprog.rundir.storage import load_tensors
from scaleprog.sharding import Backend, engine
from scaleprog.sharding.placement import LocalSlice
from scaleprog.training.profiling import Profiling, keep_snapshot
from scaleprog.training.resume import check_arithmetic, check_data, state_of
from scaleprog.version import ARITHMETIC


@dataclass
class Run:
    """What one process of a run works with."""

    folder: Path
    recipe: Recipe
    plan: Plan
    coordinator: Coordinator
    lease: Lease
    backend: Backend
    reader: TrainReader
    evaluation: EvaluationReader
    checkpoints: Checkpoints
    watch: Watch
    recorder: Recorder
    progress: ProgressLine
    state: RunState
    profiling: Profiling
    patience: Patience = field(default_factory=Patience)
    hosts: Sequence[str] = ()  # of all ranks
    compilations: int = 0  # as last recorded
    on_saved: Callable[[Commit], None] = lambda commit: None  # called for every checkpoint that is visible
    damaged: set[str] = field(default_factory=set)  # names of the samples that this rank found since the last count


# ---- resume


def restore(plan: Plan, checkpoints: Checkpoints, backend: Backend, progress: ProgressLine) -> RunState:
    """Loads the newest checkpoint that verifies into `backend` and returns its state; without one, a new state.

    Raises:
        CheckpointError: the checkpoint belongs to another run or version, or no run of `plan` can have written it.
        OutOfMemory: this rank has too little memory for the network.
        Unavailable: none of the checkpoints can be read now.
    """
    newest = checkpoints.newest(progress.say)
    data = plan.data.identity()
    if newest is None and (parent := plan.recipe.parent):
        raise CheckpointError(
            f"{checkpoints.folder}: no checkpoint of step {parent.step}, from which this fork continues; move the run "
            f"directory away, and make it again with --from {parent.run}@{parent.step}"
        )
    if newest is None:
        return RunState(data=data)
    state = state_of(newest, plan)
    plan = plan.resumed(state.last_search)
    phases = plan.schedule.phases(state.choices)
    check_data(newest, state, plan.data)
    if state.step < phases[-1].stop:
        check_arithmetic(newest, state, plan.recipe)
    state.arithmetic, state.data = ARITHMETIC, data
    phase = phases[state.phase]
    try:
        load_network(newest, state, backend, may_skip_layers=phase.kind == "supernet")
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, plan, checkpoints, backend.device, state) from error
    progress.say(f"resuming {newest}")
    return state


def make_backend(name: Engine, recipe: Recipe, family: type[ElasticModel], device: torch.device) -> Backend:
    """A backend of the engine `name` for a recipe's model, without a network yet."""
    lane = recipe.train.batch // recipe.data.lanes
    return engine(name)(family, recipe.model, recipe.optimizer, recipe.ema, recipe.sharding, device, recipe.seed, lane)


def load_network(checkpoint: Path, state: RunState, backend: Backend, may_skip_layers: bool) -> None:
    """Rebuilds a checkpoint's network in `backend`, with its AdamW moments and EMAs.

    `may_skip_layers`: whether training steps may skip layers. Raises CheckpointError.
    """

    def load(parts: Mapping[str, LocalSlice], subset: bool = False) -> None:
        load_tensors(checkpoint, parts, subset)
        for name, part in parts.items() if subset else ():  # an engine may group parameters by these step counts
            count = float(part.tensor)
            if not (0 <= count <= state.step and count.is_integer()):
                raise CheckpointError(f"{checkpoint}: {name} is {count}, which is not a possible number of steps")

    backend.growths = state.growths
    backend.restore(Structure(state.gated), may_skip_layers, load)


# ---- checkpoints


def save(run: Run, phase: Phase, permanent: bool) -> None:
    """Starts a checkpoint of the current step, which belongs to `phase`; a `permanent` one is never deleted."""
    run.recorder.sync()
    last_skipped = max(run.state.skipped, default=0)  # `scaleprog replay` needs the checkpoint before it
    schedule, choices = run.plan.schedule, run.state.choices
    needing = [phase, *(each for each in schedule.phases(choices) if each.start < last_skipped <= each.stop)]
    protect = {step for each in needing if (step := schedule.rewinds_to(choices, each)) is not None}
    best = run.state.best_step if run.recipe.checkpoint.keep_best else 0
    state, parts = run.state.to_json(), run.backend.state()
    run.checkpoints.save(run.state.step, state, parts, protect, permanent, last_skipped, best)
    run.watch.saved()


def collect_commits(run: Run, wait: bool = False) -> Commit | None:
    """Reports how checkpoints have ended since the last call, and returns the last of them, if any.

    `wait`: also waits for the checkpoint that is being written. Raises Superseded.
    """
    if wait:
        run.checkpoints.wait()
    commit = None
    for commit in run.checkpoints.finished():
        if commit.error is None:
            run.watch.saved(commit.seconds)
            run.on_saved(commit)
            run.recorder.event(
                "checkpoint", step=commit.step, seconds=commit.seconds, stall=commit.stall, bytes=commit.bytes
            )
            if commit.left is not None:
                run.progress.say(commit.left)
        else:
            run.recorder.event("checkpoint_failed", step=commit.step, message=commit.error, stall=commit.stall)
            run.progress.say(
                f"NO CHECKPOINT of step {commit.step}, training continues; older ones are kept: {commit.error}"
            )
    return commit


def require_checkpoint(run: Run) -> None:
    """Raises Unavailable on every rank if there is no checkpoint of the present step, which the run will need."""
    collect_commits(run, wait=True)
    path = run.checkpoints.folder / f"step-{run.state.step:08d}"
    if not run.coordinator.on_rank_0("checkpoint before a search", path.is_dir):
        raise Unavailable(
            f"{path}: could not be written, and with growth.recycle: false the network grows from it after the search"
        )


def leave(run: Run, reason: str) -> None:
    """Ends a run that was asked to stop, once its checkpoint is visible. Raises Preempted."""
    collect_commits(run, wait=True)
    step, kept = run.state.step, run.checkpoints.newest_step
    run.recorder.event("preempted", step=step, reason=reason)
    stopped = f"{'reached its time limit' if reason == TIME_LIMIT else f'stopped by {reason}'} after step {step}"
    if kept < step:
        lost = f"the {step - kept} steps since step {kept} are lost"
        raise Preempted(f"{stopped} WITHOUT a checkpoint of it; {lost}", reason)
    raise Preempted(f"{stopped} {'with a checkpoint' if step else 'before there was anything to save'}", reason)


# ---- hangs


@contextmanager
def watched_patience(recipe: Recipe, folder: Path) -> Iterator[Patience]:
    """The patience of this process, a rank of a run; inside, the process ends if it hangs."""
    place = Place.current()
    patience = Patience(60 * recipe.train.patience, folder, place.rank, collectives, world=place.world)
    patience.at("starting", 0, kind="a start")
    with patience.watching():
        yield patience


def work_of(run: Run, subnet: Subnet) -> float:
    """The size of a step on `subnet`, by which its patience is chosen; 0 where compiling may take its own time."""
    return 0.0 if run.recipe.sharding.compile else run.plan.gmacs(subnet)


def tell_hang(recorder: Recorder, stand: Stand) -> None:
    """Records that this rank hangs, where no launcher does."""
    told = f"{stand} hung for {stand.seconds:.0f} s in step {stand.step}: {stand.doing}, at {stand.where}"
    say(told)
    recorder.own_event("hang", step=stand.step, culprits=[stand.rank], doing=stand.doing, message=told)


# ---- signals


def tell_signal(recorder: Recorder, checkpoints: Checkpoints, state: RunState, name: str) -> None:
    """Reports at once that a signal came, and what is lost if no time is left for a checkpoint; runs in a thread."""
    rank = checkpoints.coordinator.rank
    steps = state.step - checkpoints.newest_step
    seconds = steps * state.wall_seconds / max(1, state.step)
    recorder.own_event("signal", signal=name, unsaved_steps=steps, unsaved_seconds=seconds)
    print(f"rank {rank}: {name}; all ranks will stop after the same step", file=sys.stderr, flush=True)
    if rank == 0:
        since = f"{steps} steps since the last checkpoint, about {seconds:.1f} s of training"
        print(f"rank 0: writing a checkpoint after this step ({since})", file=sys.stderr, flush=True)


def leave_at_once(recorder: Recorder) -> None:
    """Ends the process at a second signal, without another checkpoint; runs in a thread."""
    try:
        recorder.own_event("hurried")
        print("a second signal: exiting without a checkpoint of this step", file=sys.stderr, flush=True)
    finally:
        os._exit(EXIT_CODE)


def out_of_memory(
    error: Exception, plan: Plan, checkpoints: Checkpoints, device: torch.device, state: RunState
) -> OutOfMemory:
    """What to raise instead of an error by which the memory of this rank, on `device`, has run out."""
    phases, coordinator = plan.schedule.phases(state.choices), checkpoints.coordinator
    subnet = phases[state.phase].network if 0 <= state.phase < len(phases) else plan.schedule.full
    known = str(error).splitlines()[0] if str(error) else type(error).__name__
    kept = keep_snapshot(checkpoints.folder.parent, coordinator.rank, device)
    shown = "" if kept is None else f"; {kept} shows what its memory held, at https://pytorch.org/memory_viz"
    return OutOfMemory(
        f"rank {coordinator.rank} is out of memory on {name_of(device)} after step {state.step}: "
        f"{advice(plan.recipe, plan.family, subnet, coordinator.world)}. The same command with one of these "
        f"settings resumes from the last checkpoint ({known}){shown}"
    )


# ---- clocks


def name_of(device: torch.device) -> str:
    """The name of the GPU or of the CPU architecture: step times of different ones must not be mixed."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def process_began() -> float:
    """The reading of CLOCK_BOOTTIME, in seconds, when this process started."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")


def stopped_early(run: Run) -> bool:
    """Whether the run has reached `train.max_steps`."""
    return run.recipe.train.max_steps is not None and run.state.step >= run.recipe.train.max_steps
