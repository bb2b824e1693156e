"""Schemas of the records in a run directory: types, ranges and sizes. `reading.py` lets nothing else through.

Fields that no program reads are not listed. Imports no torch, because a batch script should not wait for it.
"""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from scaleprog.recipe.keys import CandidateRule

METRICS, EVENTS, REQUEUES = "metrics.jsonl", "events.jsonl", "requeues.jsonl"
EVALUATIONS, RESULTS = "evaluations.jsonl", "results.json"

STRICT = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
Count = Annotated[int, Field(ge=0, le=2**53)]
Size = Annotated[int, Field(ge=1, le=2**20)]
Stage = Annotated[int, Field(ge=0, le=2**20)]
Number = Annotated[float, Field(ge=-1e12, le=1e12)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Joules = Annotated[float, Field(ge=0, le=1e15)]
Moment = Annotated[float, Field(ge=0, le=2**33)]
"""Seconds since 1970, until 2242."""
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
Loss = Annotated[float, Field(allow_inf_nan=True)]
"""The only number that may be NaN or infinite: the loss of a step at which a run diverged."""
Name = Annotated[str, Field(max_length=2**10)]
Text = Annotated[str, Field(max_length=2**20)]
Kind = Literal["supernet", "train"]
Pair = tuple[Size, Size]
JOB_ID = r"[0-9]{1,10}(_[0-9]{1,10})?"
JobId = Annotated[str, Field(pattern=f"^{JOB_ID}$")]


# ---- metrics.jsonl


@with_config(STRICT)
class Step(TypedDict):
    """One training step; early versions recorded fewer keys."""

    step: Count
    loss: Loss
    stage: Stage
    phase: Kind
    resolution: Size
    depth: Size
    step_seconds: Seconds
    data_wait_seconds: Seconds
    epoch: NotRequired[Seconds]
    lr: NotRequired[Number]
    grad_norm: NotRequired[Loss]
    images: NotRequired[Count]
    images_per_second: NotRequired[Annotated[float, Field(ge=0)]]
    data_wait_share: NotRequired[Share]
    collective_wait_seconds: NotRequired[Seconds]
    slowest_rank: NotRequired[Count]
    slowest_rank_seconds: NotRequired[Seconds]
    median_rank_seconds: NotRequired[Seconds]
    mfu: NotRequired[Amount]
    host_mib: NotRequired[Amount]
    device_allocated_mib: NotRequired[Amount]
    device_reserved_mib: NotRequired[Amount]
    device_peak_mib: NotRequired[Amount]
    skipped_updates: NotRequired[Count]
    cpu_seconds: NotRequired[Seconds]
    time: NotRequired[Moment]


@with_config(STRICT)
class Evaluation(TypedDict):
    """What an evaluation after a step found, accuracies in percent; early versions recorded top-1 only."""

    step: Count
    top1: Percent
    top1_ema: Percent
    top5: NotRequired[Percent]
    top5_ema: NotRequired[Percent]
    val_loss: NotRequired[Amount]
    val_loss_ema: NotRequired[Amount]
    train_seconds: NotRequired[Seconds]
    train_cpu_seconds: NotRequired[Seconds]


@with_config(STRICT)
class Numbered(TypedDict):
    """The keys of any row of metrics.jsonl that a start needs to truncate the file."""

    step: Count
    loss: NotRequired[Any]
    step_seconds: NotRequired[Seconds]
    data_wait_seconds: NotRequired[Seconds]
    time: NotRequired[Moment]


# ---- events.jsonl


@with_config(STRICT)
class _Event(TypedDict):
    time: Moment
    generation: NotRequired[Count]
    rank: NotRequired[Count]


@with_config(STRICT)
class Began(_Event):
    """A start, and the later steps of earlier starts that it repeats."""

    event: Literal["start"]
    step: Count
    world: NotRequired[Size]
    device: NotRequired[Name]
    hosts: NotRequired[list[Name]]
    tracking: NotRequired[list[Name]]
    log_every: NotRequired[Size]
    startup_seconds: NotRequired[Seconds]
    repeated_steps: NotRequired[Count]
    repeated_seconds: NotRequired[Seconds]
    repeated_until: NotRequired[Moment]


@with_config(STRICT)
class Growth(_Event):
    """A network that has grown."""

    event: Literal["growth"]
    step: Count
    stage: Stage
    phase: Kind
    resolution: Size
    depth: Size
    seconds: Seconds


@with_config(STRICT)
class Measurement(_Event):
    """The losses of candidates, each as [resolution, depth, loss]."""

    event: Literal["measurement"]
    step: Count
    seconds: NotRequired[Seconds]
    losses: Annotated[list[tuple[Size, Size, Number]], Field(max_length=1024)]


@with_config(STRICT)
class Chosen(TypedDict):
    """A search's decision."""

    stage: Stage
    candidates: Annotated[list[Pair], Field(min_length=1, max_length=1024)]
    losses: list[Number]
    times: list[Number]
    scores: list[Number | None]
    chosen: Pair
    alpha: Number | None
    complete_from: NotRequired[Count | None]
    why: NotRequired[Text | None]
    learned: NotRequired[bool]


def _whole(choice: Any) -> Any:
    """Refuses a decision whose parts do not fit together."""
    if not len(choice["candidates"]) == len(choice["losses"]) == len(choice["times"]) == len(choice["scores"]):
        raise ValueError("candidates, losses, times and scores differ in number")
    if choice["chosen"] not in choice["candidates"]:
        raise ValueError("the choice is not a candidate")
    if choice["alpha"] is None and choice.get("complete_from") is None:
        raise ValueError("it has neither alpha nor complete_from")
    return choice


@with_config(STRICT)
class _Choice(Chosen, _Event):
    event: Literal["choice"]
    step: Count


@with_config(STRICT)
class Evaluated(_Event):
    """An evaluation."""

    event: Literal["evaluation"]
    step: Count
    seconds: Seconds
    top1: NotRequired[Percent]
    top1_ema: NotRequired[Percent]


@with_config(STRICT)
class Checkpoint(_Event):
    """A checkpoint that is visible."""

    event: Literal["checkpoint"]
    step: Count
    seconds: Seconds
    bytes: Count
    stall: NotRequired[Seconds]


@with_config(STRICT)
class NoCheckpoint(_Event):
    """A checkpoint that could not be written."""

    event: Literal["checkpoint_failed"]
    step: Count
    message: Text
    stall: NotRequired[Seconds]


@with_config(STRICT)
class Damaged(_Event):
    """Damaged samples that were replaced: how many different ones so far, and the new ones among them."""

    event: Literal["damaged"]
    step: Count
    total: Count
    samples: Annotated[list[Name], Field(max_length=1000)]


@with_config(STRICT)
class SlowRank(TypedDict):
    """A straggler, see `straggler.Slow`."""

    rank: Count
    host: Name
    seconds: Seconds
    data_seconds: Seconds


@with_config(STRICT)
class Straggling(_Event):
    """Ranks that have become stragglers, or are none any more, see `straggler.Change`."""

    event: Literal["straggler", "straggler_over"]
    step: Count
    median_seconds: Seconds
    slow: Annotated[list[SlowRank], Field(max_length=2**16)]


@with_config(STRICT)
class Energy(_Event):
    """What one rank measured of a start: the joules of its GPU, and on the first rank of a node of the node's CPUs."""

    event: Literal["energy"]
    gpu_joules: Joules
    cpu_joules: Joules | None
    """None: no counter was found."""


@with_config(STRICT)
class Signal(_Event):
    """A signal that one rank received."""

    event: Literal["signal"]
    signal: Name


@with_config(STRICT)
class Preempted(_Event):
    """A start that ended because it was asked to stop."""

    event: Literal["preempted"]
    step: NotRequired[Count]
    reason: Name


@with_config(STRICT)
class Failed(_Event):
    """An error on one rank."""

    event: Literal["error"]
    step: NotRequired[Count]
    message: Text


@with_config(STRICT)
class Hung(_Event):
    """A start that ended because it made no progress: the ranks that did not come, as far as known."""

    event: Literal["hang"]
    step: Count
    culprits: Annotated[list[Count], Field(max_length=2**20)]
    doing: Name
    message: Text


@with_config(STRICT)
class Forked(_Event):
    """The beginning of a fork: the run that it continues, and the step of that run's checkpoint.

    `wall_seconds`: what that run had taken by then; missing in records of earlier versions.
    """

    event: Literal["forked"]
    step: Count
    run: Name
    wall_seconds: NotRequired[Seconds]


@with_config(STRICT)
class Lengthened(_Event):
    """A change of `train.epochs` in place."""

    event: Literal["lengthened"]
    step: Count
    before: Number
    epochs: Number


@with_config(STRICT)
class Happened(_Event):
    """An event without details."""

    event: Literal[
        "init",
        "hurried",
        "stopped_early",
        "finish",
        "compiled",
        "nonfinite",
        "data_wait",
        "workers",
        "interval",
        "profile",
        "profile_failed",
    ]
    step: NotRequired[Count]


Event = (
    Began
    | Growth
    | Measurement
    | Annotated[_Choice, AfterValidator(_whole)]
    | Evaluated
    | Checkpoint
    | NoCheckpoint
    | Damaged
    | Straggling
    | Energy
    | Signal
    | Preempted
    | Failed
    | Hung
    | Forked
    | Lengthened
    | Happened
)


# ---- Slurm jobs


@with_config(STRICT)
class Left(TypedDict):
    """A line of requeues.jsonl: how a start of a Slurm job ended, and whether the job is requeued, or its tasks start
    again inside it (`here`)."""

    time: Moment
    cause: Text
    requeue: NotRequired[bool]
    here: NotRequired[bool]
    code: NotRequired[Count]
    job: NotRequired[Name]
    restart: NotRequired[Count]
    repeat: NotRequired[Count]
    kind: NotRequired[Literal["finished", "mistake", "interrupted", "stopped", "crash"]]
    step: NotRequired[Count]
    measured: NotRequired[Count]
    preempted: NotRequired[bool]


@with_config(STRICT)
class Standing(TypedDict):
    """Where a hung rank stands; see `ranks.pulse.Stand`."""

    rank: Count
    host: Name
    pid: Count
    generation: Count
    step: Count
    doing: Name
    seconds: Seconds
    patience: Seconds
    hung: bool
    together: bool
    where: Name
    state: Name
    world: NotRequired[Annotated[int, Field(ge=0, le=2**20)]]


@with_config(STRICT)
class Report(TypedDict):
    """Why a Slurm task ended."""

    time: Moment
    rank: Count
    code: Annotated[int, Field(ge=0, le=255)]
    cause: Text
    reason: NotRequired[Name | None]
    stand: NotRequired[Standing]


@with_config(STRICT)
class Job(TypedDict):
    """The part of job.json that says which job owns the run directory."""

    job: JobId


@with_config(STRICT)
class Owner(TypedDict):
    """The part of owner.json that says which start of which job holds the lease."""

    generation: Count
    job: Name | None
    restart: Count
    repeat: NotRequired[Count]
    step: NotRequired[Name | None]


# ---- evaluations.jsonl


@with_config(STRICT)
class EvaluatedAt(TypedDict):
    """An evaluation by `scaleprog evaluate`: top-1 in percent of a checkpoint's weights, at `resolution` pixels."""

    step: Count
    resolution: Size
    top1: Percent
    top1_ema: Percent


# ---- results of a run


@with_config(STRICT | ConfigDict(extra="allow"))
class _Trained(TypedDict):
    resolution: Size
    depth: Size


@with_config(STRICT | ConfigDict(extra="allow"))
class Results(TypedDict):
    """results.json; its other keys are kept."""

    stages: Annotated[list[_Trained], Field(max_length=1024)]
    top1: Percent
    top1_ema: Percent
    top1_best: Percent
    train_seconds: Seconds
    train_cpu_seconds: Seconds
    search_seconds: Seconds
    wall_seconds: Seconds
    speedup: NotRequired[Number | None]


@with_config(STRICT)
class Baseline(TypedDict):
    """The part of a baseline's results.json that a speedup needs."""

    train_seconds: Annotated[float, Field(gt=0, le=1e9)]


@with_config(STRICT)
class HalfMeasured(TypedDict):
    """measuring.json: how many batches are done, and the losses so far as [rank][network][image]."""

    where: dict[str, Any]
    done: Count
    losses: list[list[list[Number]]]


@with_config(STRICT)
class Measured(TypedDict):
    """The part of measuring.json that says how many batches are done."""

    done: Count


@with_config(STRICT)
class PlannedSchedule(TypedDict):
    """The fields of a `growth.schedule.Schedule` and of its policy."""

    kind: Literal["fixed", "automatic", "supernet"]
    ladder: Annotated[list[Pair], Field(min_length=1, max_length=100)]
    steps: Annotated[int, Field(ge=1, le=10**9)]
    search_steps: Annotated[int, Field(ge=1, le=10**9)]
    rule: CandidateRule | None
    recycle: bool
    adaptive_regularization: bool
    budget: Annotated[float, Field(gt=0, le=1)] | None
    promised: bool
    complete_steps: Annotated[int, Field(ge=0, le=10**9)]
    patch: Size | None
    curriculum: bool
    scoring: Annotated[float, Field(ge=0, le=1e12)]
    cooldown: NotRequired[Annotated[int, Field(ge=0, le=10**9)]]
    most_searches: NotRequired[Annotated[int, Field(ge=1, le=10**9)]]
    unit: NotRequired[Annotated[float, Field(gt=0, le=1e12)]]
    whole: NotRequired[Pair]
    window: NotRequired[tuple[Annotated[float, Field(ge=0, le=1e12)], Annotated[float, Field(ge=0, le=1)]]]


@with_config(STRICT)
class PlanFile(TypedDict):
    """plan.json; `gmacs` lists [resolution, depth, GMACs of an image]."""

    schedule: PlannedSchedule
    gmacs: Annotated[list[tuple[Size, Size, Annotated[float, Field(gt=0, le=1e12)]]], Field(max_length=2**17)]


METRIC: TypeAdapter[Any] = TypeAdapter(Step | Evaluation)
EVENT: TypeAdapter[Any] = TypeAdapter(Annotated[Event, Field(discriminator="event")])
EVALUATED_AT: TypeAdapter[Any] = TypeAdapter(EvaluatedAt)
LEFT: TypeAdapter[Any] = TypeAdapter(Left)
NUMBERED: TypeAdapter[Any] = TypeAdapter(Numbered)
