"""Every key of a recipe, group by group: its type, range, default and meaning.

This room imports no torch, so whatever only reads a recipe starts fast. `numbers.py` holds the ranges.
"""

import re
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from scaleprog.recipe.numbers import (
    Aspect,
    Channels,
    Classes,
    Deviation,
    Epochs,
    Few,
    Gibibytes,
    Images,
    Index,
    Layers,
    LocalPath,
    Location,
    Margin,
    Mebibytes,
    Minutes,
    Momentum,
    NoOrMore,
    NoOrMoreEpochs,
    NoOrMoreSteps,
    Norm,
    Number,
    Part,
    PatienceMinutes,
    Pixels,
    RankNumber,
    Ranks,
    Rate,
    Settings,
    Share,
    Stages,
    Steps,
    Strength,
    Subset,
    Text,
    WholeEpochs,
    Width,
    Workers,
    number,
)

Operator = Literal["rand_init", "stacking", "interpolation", "identity", "mogrow"]
CandidateRule = Literal["corners", "all", "window"]
Engine = Literal["fsdp", "hsdp", "zero", "replicated"]
Precision = Literal["fp32", "autocast", "bf16"]
TrackerName = Literal["mlflow", "wandb"]

PUBLISHED_SEARCH = {"epochs": 2, "subset": 50_000, "candidates": "window", "measurements": 5, "weights": "ema"}
"""What `search.method: published` sets where the recipe does not."""
_RANDAUGMENT = (  # timm ignores a section that it does not know, and runs as many operations as n says
    r"m([0-9]|[12][0-9]|30)|mmax([1-9]|[12][0-9]|30)|mstd[0-9]{1,4}(\.[0-9]{1,6})?|n([1-9]|1[0-6])|"
    r"p(0(\.[0-9]{1,6})?|1(\.0{1,6})?)|inc[01]|t(weights|3a|3aw)"
)


TIMM = "timm"
"""As `init.from`: the weights that timm has for the model."""


class ModelSettings(Settings):
    """A timm model by name, and overrides of its sizes."""

    name: Text
    """The name under which timm creates the model."""
    classes: Classes = 1000
    """Number of classes, of the head and of the labels."""
    channels: Channels = 3
    """Color channels of an image: 3, or 1 for gray."""
    resolution: Pixels | None = None
    """Side of the images that the complete model sees, in pixels; default: timm's."""
    patch: Pixels | None = None
    """Side of a patch, in pixels; default: timm's."""
    width: Width | None = None
    """Embedding dimension; default: timm's."""
    depth: Layers | None = None
    """Layers of the complete model; default: timm's."""
    heads: Width | None = None
    """Attention heads; default: timm's."""
    drop_path: Momentum = 0.0
    """Stochastic-depth rate of the last layer; it rises linearly from 0 at the first."""
    init: Literal["jax", "jax_nlhb", "moco"] | None = None
    """timm's scheme of random initialization; default: the model's own."""


class InitSettings(Settings):
    """The weights that the first network begins with."""

    source: LocalPath | None = Field(default=None, alias="from")
    """timm: those that timm has for `model.name`, through huggingface's cache; a .safetensors file, as `scaleprog
    export` or timm writes it; or the directory of another run, for its newest checkpoint. Position embedding and patch
    embedding are resampled to the model's sizes, a head of another number of classes starts at random, and a model of
    fewer layers than the first network grows by `growth.operator`. Default: random weights."""
    weights: Literal["best", "online", "ema"] = "best"
    """Which weights of a run; best: the better ones in its last evaluation."""

    @property
    def told(self) -> str:
        """What the recipe names, for a message."""
        return "none" if self.source is None else f"{self.source} ({self.weights})"


class DataSettings(Settings):
    """Where the samples come from, and how they are read."""

    path: Location
    """Folder of the shards and their manifest: a local path, or a URL (s3, gs, http, https, hf); see docs/data.md."""
    manifest: LocalPath | None = None
    """File of the manifest, for shards behind a URL that has none; default: manifest.json in `data.path`."""
    store: LocalPath | None = None
    """Folder on a local disk that keeps shards from a URL, for all ranks of a node and for later runs; default: a shard
    is downloaded whenever it is needed."""
    store_gib: Gibibytes = 256
    """The most GiB in `data.store`; the shards unused for longest make room."""
    memory: Mebibytes | None = None
    """The most MiB of shards that a rank holds in memory; where its lanes need more, it reads images from disk one by
    one (from `data.store` if `data.path` is a URL). Default: each lane holds a whole shard."""
    token_labels: Location | None = None
    """Folder of the token labels that `scaleprog shards token-labels` made of these shards, a path or URL; default:
    every token has the label of its image."""
    lanes: Ranks = 64
    """V, the number of lanes: a divisor of the batch, and a multiple of every number of ranks that may train it."""
    workers: Workers | Literal["auto"] = 4
    """Decoding processes per rank; 0 decodes in the training process. auto: as many as the rank may use cores, less one
    for the rank itself; one more if steps wait for data; fewer where memory is short."""
    prefetch: Few = 2
    """Steps that each worker decodes ahead."""
    cache: Mebibytes = 256
    """Size in MiB up to which a split is read once and kept in memory. A larger validation split is evaluated in parts
    of half this size; weights change once per network and part."""
    damaged: Literal["stop", "replace"] = "stop"
    """What happens where a training image cannot be decoded. stop: the run ends; replace: the next other sample of its
    lane in the epoch's order takes its place, the same one for every number of ranks and workers. A damaged shard,
    label, label map, or evaluation image always ends the run. `scaleprog shards check --write-manifest --keep-damaged`
    indexes shards with such images."""
    most_damaged: Few = 100
    """replace: the most damaged samples that a run may meet; each counts once."""
    shards: Subset | None = None
    """Number of shards to train on, from the first; default: all. Stored images are shuffled, so the part is random."""
    trace: bool = False
    """Whether each rank writes the ids of every step's samples into `samples-RANK.jsonl`."""

    def processes(self, cores: int) -> int:
        """Decoding processes of a rank that may use so many cores, before it has trained a step."""
        return max(1, cores - 1) if self.workers == "auto" else self.workers


class AugmentSettings(Settings):
    """Augmentation of the training images, and the crop of the evaluation images; the defaults are only DeiT's
    cropping."""

    crop: Literal["resized", "simple", "padded", "none"] = "resized"
    """resized: RandomResizedCrop; simple: DeiT III's, a random square as large as the shorter side, which may reach 4
    pixels beyond the image, into its mirror; padded: zeros around a small image, then a random window of its size;
    none: all."""
    scale: tuple[Number, Number] = (0.08, 1.0)
    """Range of a resized crop's area, as a fraction of the image's."""
    ratio: tuple[Aspect, Aspect] = (3 / 4, 4 / 3)
    """Range of a resized crop's aspect ratio."""
    padding: Margin = 2
    """Width of the zeros on every side of a padded crop, in pixels of the stored image."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""
    device: Literal["cpu", "accelerator"] = "cpu"
    """Where the operations of color_jitter, three_augment and randaugment run. cpu: in the decoding workers;
    accelerator: on the device that trains, for a batch at a time. The draws are the same, but pictures differ a little,
    and images are flipped before the operations, as in DeiT, in place of after them."""
    color_jitter: Strength = 0.0
    """Strength of random brightness, contrast and saturation, in random order; RandAugment replaces them, as in
    timm."""
    three_augment: bool = False
    """DeiT III's 3-Augment: every image turns gray, is solarized, or is blurred; then color_jitter."""
    randaugment: Text | None = None
    """timm's configuration string, e.g. rand-m9-mstd0.5-inc1."""
    round_magnitude: bool = False
    """Whether AdaReg rounds RandAugment's magnitude to a whole number (9: 4, 6, 8, 9), as in the authors' code."""
    erase: Share = 0.0
    """Probability of random erasing, with noise per pixel."""
    mixup: NoOrMore = 0.0
    """Parameter of Mixup's beta distribution; 0 is off."""
    cutmix: NoOrMore = 0.0
    """Parameter of CutMix's beta distribution; 0 is off."""
    mix_probability: Share = 1.0
    """Probability that a batch is mixed at all."""
    mix_switch: Share = 0.5
    """Probability of CutMix instead of Mixup if both are on."""
    mix_groups: Ranks | None = None
    """Number of groups of lanes that each draw their own Mixup, CutMix, or MixToken, as each rank of DeiT does; it must
    divide data.lanes. Default: the largest divisor up to 4."""
    mix_token: bool = False
    """MixToken: whether images take a box of tokens from each other, behind the patch embedding (VOLO)."""
    token_label_crop: Literal["correct", "transposed"] = "correct"
    """Which part of a label map belongs to a crop. transposed: with x and y exchanged, as in TokenLabeling's code, so
    that the labels are those of another part of the image."""
    smoothing: Momentum = 0.1
    """Label smoothing."""
    repeats: Few = 1
    """Repeated augmentation: how often an epoch repeats each of the 1 / repeats of the samples that it uses."""
    eval_crop: Part = 0.875
    """Side of the central square that evaluation sees, as a fraction of the image's shorter side."""
    mean: Annotated[tuple[Share, ...], Field(max_length=16)] | None = None
    """Mean of each channel; default: ImageNet's for color and 0.5 for gray."""
    std: Annotated[tuple[Deviation, ...], Field(max_length=16)] | None = None
    """Standard deviation of each channel; default: ImageNet's for color and 0.5 for gray."""

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return bool(self.mixup or self.cutmix or self.mix_token)

    @property
    def operates(self) -> bool:
        """Whether operations change the colors of images, or move their pixels."""
        return bool(self.randaugment is not None or self.three_augment or self.color_jitter)

    def groups(self, lanes: int) -> int:
        """The number of groups that `lanes` lanes form for mixing."""
        return self.mix_groups or max(groups for groups in range(1, 5) if lanes % groups == 0)

    @model_validator(mode="after")
    def _check(self) -> "AugmentSettings":
        if self.mix_token and (self.mixup or self.cutmix):
            raise ValueError("mix_token replaces mixup and cutmix: set them to 0, or mix_token to false")
        if self.three_augment and self.randaugment is not None:
            raise ValueError("three_augment replaces randaugment: set one of them, not both")
        if self.device == "accelerator" and not self.operates:
            raise ValueError(
                "device: accelerator moves the operations of randaugment, three_augment and color_jitter, and all of "
                "them are off: turn one on, or use device: cpu"
            )
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two positive numbers, the lower first, not {(low, high)}")
        if self.scale[1] > 1:
            raise ValueError(f"scale is a fraction of the image's area: at most 1, not {self.scale[1]}")
        if self.randaugment is not None:
            if not re.fullmatch(r"rand(-((m|mmax|mstd|n|p|inc)[0-9.]+|t(weights|3a|3aw)))*", self.randaugment):
                raise ValueError(
                    f"randaugment: timm does not understand {self.randaugment!r}; use e.g. rand-m9-mstd0.5-inc1"
                )
            if not re.fullmatch(rf"rand(-({_RANDAUGMENT}))*", self.randaugment):
                raise ValueError(
                    f"randaugment: {self.randaugment!r}: use m and mmax up to 30, n from 1 to 16, p up to 1, "
                    "mstd up to 9999 and inc0 or inc1"
                )
        return self


class ProfileSettings(Settings):
    """Steps that a run profiles by itself; `scaleprog profile` asks a running run for others."""

    at: Annotated[tuple[Steps, ...], Field(min_length=1, max_length=100)]
    """The first step of each profile, as numbered in metrics.jsonl; profiles must not overlap."""
    steps: Few = 3
    """Steps of each profile."""
    ranks: Annotated[tuple[RankNumber, ...], Field(min_length=1, max_length=1024)] = (0,)
    """The ranks that write a trace; those that a run does not have write none."""

    @model_validator(mode="after")
    def _check(self) -> "ProfileSettings":
        for one, other in pairwise(sorted(self.at)):
            if other < one + self.steps:
                raise ValueError(
                    f"at: the profile of step {other} would begin before that of step {one}, of {self.steps} steps, "
                    "has ended: at most one can run at a time"
                )
        return self


class TrainSettings(Settings):
    """Length of the training, and its batch."""

    epochs: Epochs
    """Length of the schedule."""
    batch: Images
    """Images of one optimizer step, over all ranks."""
    micro_batch: Images | None = None
    """Most images in one forward and backward of a rank; it accumulates gradients if it has more of the batch."""
    max_steps: Steps | None = None
    """Stop after this many steps, with a checkpoint; `epochs` still sets the schedule."""
    accept_arithmetic: Annotated[int, Field(ge=1, le=10**6)] | None = None
    """Resume a run that an earlier version of scaleprog's arithmetic began, with this version's; default: refuse to."""
    deterministic: bool = False
    """On CUDA: whether every start computes the same bits, so that a resumed run equals a straight one to the last bit.
    On the CPU that is always so."""
    log_every: Steps = 20
    """Steps between two points in TensorBoard, and between two reductions of the losses."""
    patience: PatienceMinutes = 8.0
    """Minutes for which a rank may make no progress: in a step, for a batch, in a save, or waiting for the others. Then
    it hangs: every rank writes its stacks into the run directory, and the run starts again. What is slow at first may
    take 25 minutes, or 3 times as long as this if that is more: a start, its first batch, step, and evaluation, a
    growth, and the first wait for what other ranks save. So may the first step of each compiled network. What always
    takes long may take 3 times as long as it took; for a step, that counts for each network."""
    rank_curves: bool = False
    """Whether every rank also draws the seconds of its own steps and waits, as a run of its own in TensorBoard."""
    profile: ProfileSettings | None = None
    """Steps to profile: `at` begins each profile, of `steps` steps, on `ranks`; see docs/profiling.md."""


class OptimizerSettings(Settings):
    """AdamW, and its learning rate."""

    name: Text = "adamw"
    """The only optimizer is adamw."""
    lr: Rate = 1e-3
    """Learning rate at the end of the warm-up."""
    weight_decay: NoOrMore = 0.05
    """Weight decay of all parameters except vectors (biases, norms, gates) and those that timm exempts."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    warmup_epochs: NoOrMoreEpochs = 5
    """Length of the linear warm-up."""
    warmup_lr: NoOrMore = 1e-6
    """Learning rate of the first step."""
    min_lr: NoOrMore = 1e-5
    """Learning rate at the end of the schedule, and in the cool-down."""
    schedule: Literal["smooth", "timm", "wsd"] = "smooth"
    """smooth: a cosine from the end of the warm-up, by the step; timm: timm's cosine, from the first epoch, by the
    epoch; wsd: constant, then linear to min_lr."""
    decay: Part | Literal["takeover"] = 0.2
    """wsd: the last part of the steps, over which the rate falls; takeover: the steps of the last network,
    which is usually the complete model."""
    cooldown_epochs: NoOrMoreEpochs = 0
    """Epochs at min_lr that follow the epochs of `train.epochs`; the last stage trains them."""
    clip: Norm | None = None
    """Largest global norm of the gradients; default: no clipping."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What a run does after a step whose loss or gradients are not finite; no engine applies such an update. stop: it
    ends, within `train.log_every` steps; skip: it continues."""
    most_skipped: Few = 10
    """skip: the most updates that a run may skip."""

    def cooldown_steps(self, epoch: int) -> int:
        """The steps of the cool-down; `epoch`: steps per epoch."""
        return round(self.cooldown_epochs * epoch)

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name in ("lamb", "lars", "muon"):
            raise ValueError(
                f"{name!r} cannot be sharded; use adamw. Engines cut tensors anywhere, so an optimizer must work "
                "element by element; lamb, lars and muon need whole tensors"
            )
        if name != "adamw":
            raise ValueError(f"{name!r} is not there; the only optimizer is adamw")
        return name


class SubnetSettings(Settings):
    """One stage of a schedule given by hand."""

    resolution: Pixels
    """Resolution of the network, in pixels."""
    depth: Layers
    """Depth of the network, in layers."""


class RegularizationSettings(Settings):
    """With how much regularization a growing network begins, as fractions of the recipe's strengths."""

    magnitude: Share = 0.5
    """Fraction of RandAugment's magnitude."""
    erase: Share = 0.0
    """Fraction of the probability of random erasing."""
    drop_path: Share = 0.0
    """Fraction of the stochastic-depth rate."""


class WindowSettings(Settings):
    """A window over the stages: which of them a step draws its network from."""

    spread: NoOrMore = 0.65
    """Standard deviation of the window, in stages; 0: always the nearest stage."""
    mix: Share = 0.1
    """Part of the steps that draws from all stages evenly."""


ByHand = Annotated[tuple[SubnetSettings, ...], Field(max_length=100)]


class GrowthSettings(Settings):
    """How the network grows."""

    schedule: Literal["original", "linear", "automatic", "supernet"] | ByHand = "automatic"
    """original: the complete model throughout; linear: "Prog", equispaced stages; automatic: "AutoProg", a search
    decides; supernet: the baseline of the paper's Table 8; or a list of stages by hand, the last of which is the
    complete model, or with `patches: subset` all of its layers."""
    operator: Operator = "mogrow"
    """Where the layers of the larger network come from (paper 3.3)."""
    stages: Stages = 4
    """Stages of the schedule."""
    window: WindowSettings | None = None
    """Draws the network of every step from the stages, `linear` or by hand, instead of one stage after the other: a
    window, a Gaussian of `spread` stages, moves from the first stage to the last, and a part `mix` of the steps draws
    evenly (timm's --train-size-schedule progressive). The whole network is there from the first step; a step runs only
    the layers of what it draws, and gives the others zero gradients. Default: one stage after the other."""
    steps: Literal["epochs", "compute"] = "epochs"
    """How stages share the run, and what the learning rate follows. epochs: stages of equal length, and the learning
    rate falls by the step; compute: stages of equal cost, so that cheap ones have more steps, and the learning rate
    falls by what the steps cost. The run costs the same either way; with the published search, compute has it cost what
    the ladder would, whatever is chosen. A budget sets the lengths of its stages itself, so there it is only the
    learning rate that follows the cost."""
    smallest: Part = 0.5
    """s1, resolution and depth of the smallest network, as fractions of the complete model's ("0.5 Omega")."""
    recycle: bool = True
    """Whether a stage inherits the weights of its search."""
    optimizer: Literal["reset", "inherit"] = "reset"
    """Whether a growth resets AdamW's moments or lets them follow their layers."""
    resolution_multiple: Pixels | None = None
    """Resolutions are rounded to a multiple of this; default: the model's stride; published: 32 for DeiT/16."""
    adaptive_regularization: bool = False
    """AdaReg: augmentation and stochastic depth grow with the network."""
    regularization_from: RegularizationSettings = RegularizationSettings()
    """AdaReg: the fractions of the recipe's `magnitude` (of RandAugment), `erase`, and `drop_path` with which growth
    begins; the last stage has all of them. The default is the paper's."""
    patches: Literal["resolution", "subset"] = "resolution"
    """How a small network sees fewer patches. resolution: those of a smaller image, as published; subset: a random
    subset of the patches at full resolution, drawn for every image and step (PatchDropout, arXiv 2208.07220), so that
    growth does not change the scale of images."""
    curriculum: bool = False
    """With `patches: subset`: whether the subset holds only the frequencies that an image of the network's `resolution`
    could show (EfficientTrain++, arXiv 2405.08768)."""


class SearchSettings(Settings):
    """How `growth.schedule: automatic` searches; see docs/search.md."""

    method: Literal["budget", "published"] = "budget"
    """budget: the search saves, within a budget, where that costs the least accuracy; published: the paper's search,
    with the paper's settings as defaults."""
    budget: Part | None = None
    """The most that the run may cost, searches included, as a fraction of Original's cost; default: about the cost of
    the equispaced ladder ("Prog")."""
    complete_steps: NoOrMoreSteps = 300
    """Fewest steps that a budget leaves for the complete model at the end; a run too short for that trains it from the
    first step."""
    most_searches: Few | None = None
    """Most searches under a budget, besides the probe; default: one in each stage before the complete model takes over.
    Each trains for an 80th of the run, or for less (`most_cost`)."""
    most_cost: Part | None = None
    """The most that all searches under a budget may cost, the probe included, as a fraction of the run's budget, if
    each chooses the smallest network. It shortens the training of the supernets, to two steps for each candidate if
    need be, unless `epochs` gives its length; default: no limit."""
    epochs: Epochs | None = None
    """Epochs of supernet training per search; default: 1/80 of the run's epochs, or less for `most_cost`."""
    subset: Subset | None = None
    """Training images that score a candidate, rounded down to whole batches, at least one; default: 1/25 of all."""
    candidates: CandidateRule = "corners"
    """corners: each dimension as it is or complete; window: as in the authors' code; all: the paper's eq. 8."""
    measurements: Few = 1
    """How often a search measures losses, equispaced from the start to the end of its last epoch."""
    weights: Literal["ema", "online"] = "online"
    """Weights that the search scores."""
    ema: Index | None = None
    """Index of the EMA that the search scores with `weights: ema`; default: `ema.grow_from`. The authors score one of
    0.998 and grow from one of 0.9996."""
    times: Literal["measured", "modelled"] = "measured"
    """Step times as measured, or in proportion to GMACs so that a repeated run makes the same choices."""

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, values: Any) -> Any:
        published = isinstance(values, dict) and values.get("method") == "published"
        return PUBLISHED_SEARCH | values if published else values


class EmaSettings(Settings):
    """EMAs, exponential moving averages of the weights: the paper's momentum networks."""

    momenta: tuple[Number, ...] = Field(default=(0.998,), min_length=1, max_length=16)
    """Momentum of each EMA."""
    grow_from: Index = -1
    """Index of the EMA that MoGrow reads, and the search unless `search.ema` names another."""
    warmup: bool = True
    """Whether the averages follow more closely in the first steps: a momentum of at most (1 + step) / (10 + step)."""

    @model_validator(mode="after")
    def _check(self) -> "EmaSettings":
        if not all(0 <= m < 1 for m in self.momenta):
            raise ValueError(f"momenta must lie in [0, 1), got {list(self.momenta)}")
        if not -len(self.momenta) <= self.grow_from < len(self.momenta):
            raise ValueError(f"grow_from must name one of the {len(self.momenta)} momenta, got {self.grow_from}")
        return self


class ShardingSettings(Settings):
    """How the model is spread over the ranks; master weights, moments and EMA are fp32 in every engine."""

    engine: Engine = "fsdp"
    """fsdp: FSDP2, parameters, gradients, moments and EMA sharded over all ranks; hsdp: sharded over groups of `shard`
    ranks, replicated across them; zero: DeepSpeed, of the given `stage`; replicated: a whole copy on every rank."""
    precision: Precision = "fp32"
    """Precision of forward and backward. autocast: torch.autocast to bf16, as DeiT is trained: matrix products in bf16,
    residual stream and parameters in fp32; bf16: parameters and activations cast to bf16 as a whole, half the bytes
    between ranks."""
    stage: Annotated[Literal[1, 2, 3], BeforeValidator(number)] = 3
    """zero: optimizer and EMA sharded (1), gradients too (2), parameters too (3)."""
    shard: Ranks | None = None
    """hsdp: number of ranks that share one copy of the model; default: the ranks of a node."""
    offload: Literal["optimizer", "all"] | None = None
    """What the host's memory holds. optimizer: zero's optimizer state; all: also the parameters (fsdp, hsdp, zero of
    stage 3)."""
    gather: Literal["layer", "model"] = "layer"
    """What fsdp and hsdp gather and reduce at a time. layer: the active layers, one by one, each while the previous one
    computes; model: everything at once, which takes the host far less time."""
    reshard_after_forward: bool = True
    """Whether each layer's parameters are freed after forward and gathered for backward: less memory, more traffic."""
    recompute: bool = False
    """Whether backward recomputes a layer's activations (activation checkpointing) instead of keeping them."""
    compile: bool = False
    """Whether torch.compile turns each layer into one kernel sequence for all resolutions and depths."""

    @model_validator(mode="after")
    def _check(self) -> "ShardingSettings":
        if self.shard is not None and self.engine != "hsdp":
            raise ValueError(f"shard needs engine hsdp, got engine {self.engine}")
        if self.engine != "zero" and "stage" in self.model_fields_set and self.stage != 3:
            raise ValueError(f"stage needs engine zero, got engine {self.engine}")
        if self.engine == "replicated" and self.precision == "bf16" and self.recompute:
            raise ValueError(
                "recompute with engine replicated needs precision autocast or fp32, or engine fsdp for bf16"
            )
        if self.offload is None:
            return self
        if self.engine == "replicated":
            raise ValueError("offload needs an engine that shards: fsdp, hsdp or zero")
        if self.engine == "zero" and self.offload == "all" and self.stage != 3:
            raise ValueError(
                f"offload: all needs stage 3, which shards the parameters; with {self.stage}, use offload: optimizer"
            )
        if self.engine != "zero" and self.offload == "optimizer":
            raise ValueError(f"engine {self.engine} offloads all or nothing, got offload: optimizer")
        return self

    def shard_ranks(self, world: int, per_node: int) -> int:
        """Of `world` ranks, `per_node` of them on each node: how many hold one copy of the model together."""
        if self.engine != "hsdp":
            return 1 if self.engine == "replicated" else world
        return self.shard or per_node


class EvaluateSettings(Settings):
    """Accuracy on the validation split, during training and at the end."""

    every: Epochs = 1
    """Epochs between two evaluations."""
    batch: Images = 256
    """Images that a rank evaluates at a time."""
    resolution: Literal["stage", "full"] = "stage"
    """Resolution of the images: that of the network in training, or the complete model's throughout, as in the
    authors' code."""


class CheckpointSettings(Settings):
    """When a run saves checkpoints, besides at the ends of phases and of the run and when it is asked to stop, and
    which ones it keeps."""

    every: Literal["auto"] | None = None
    """auto: the run chooses the time between two checkpoints from what saving costs and how often it has failed, in
    place of every_steps and every_minutes; an event says which and why."""
    every_steps: Steps | None = None
    """Steps between two checkpoints; default: no limit."""
    every_minutes: Minutes | None = 10.0
    """Minutes between two checkpoints, by rank 0's clock; a crash loses the steps since the last one."""
    keep: Few = 2
    """Number of newest checkpoints to keep."""
    keep_best: bool = False
    """Whether each evaluation with a new best top-1 saves a checkpoint; the run keeps the best one."""
    keep_every_epochs: WholeEpochs | None = None
    """Epochs of the schedule between two checkpoints that the run keeps for good."""

    @property
    def minutes(self) -> float | None:
        """Minutes between two checkpoints; with `every: auto`, until the first, which shows what saving costs."""
        return 1.0 if self.every == "auto" else self.every_minutes

    @property
    def steps(self) -> int | None:
        """Steps between two checkpoints."""
        return None if self.every == "auto" else self.every_steps
