"""What a recipe means, before anything is trained: plan · keys."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from scaleprog.cli.arguments import Overrides, RecipePath
from scaleprog.cli.completion import group_words
from scaleprog.errors import ScaleprogError
from scaleprog.files.display import as_text, table
from scaleprog.ranks.patience import LONG_FACTOR
from scaleprog.recipe.numbers import MOST_RANKS

if TYPE_CHECKING:
    from scaleprog.planning.cost_model import Prediction
    from scaleprog.planning.devices import Device
    from scaleprog.recipe import Recipe

COSTS = (
    *(f"{what}, MiB" for what in ("weights", "gradients", "AdamW", "EMA", "activations", "buffers", "on the host")),
    "peak of run, MiB",
    "collectives",
    "MiB sent",
    "to other nodes",
    "step, ms",
    "efficiency",
)
"""What `plan --world` shows of each engine."""


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, max=MOST_RANKS, help="Ranks that share the memory; default: 1.")
    ] = None,
    world: Annotated[
        str | None,
        typer.Option(help="Numbers of ranks, e.g. 8,64,512: also show the cost of a step under each engine."),
    ] = None,
    device: Annotated[str, typer.Option(help="The device that --world assumes: h100, a100 or cpu.")] = "h100",
    utilization: Annotated[
        float | None,
        typer.Option(min=0.001, max=1, help="Part of its peak FLOP/s that the device reaches; default: 0.4."),
    ] = None,
    cores: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, help="CPU cores per rank of --world: show which stages wait for images, not the engines."
        ),
    ] = None,
    images_per_core_second: Annotated[
        str | None,
        typer.Option(metavar="PX=N,...", help="As `shards speed` printed them; default: measured now, on the shards."),
    ] = None,
) -> None:
    """Shows stages, parameters, GMACs, memory per rank and predicted speedup, without training."""
    from scaleprog.planning.devices import Device
    from scaleprog.planning.plan import describe, longest_step
    from scaleprog.recipe import Recipe
    from scaleprog.recipe.worlds import Worlds

    loaded = Recipe.load(recipe, overrides or ())
    worlds, described = rank_counts(world) if world is not None else (), Device.named(device)
    if cores is not None and not worlds:
        raise ScaleprogError(f"--cores {cores}: add the numbers of ranks that have so many each, e.g. --world 8")
    if utilization is not None:
        described = replace(described, achieved=utilization)
    if nproc is not None and (obstacle := Worlds.of(loaded).obstacle(nproc)):
        raise ScaleprogError(f"--nproc {nproc}: {obstacle}")
    prediction = describe(loaded, nproc or 1)
    stages = table("stage", "phase", "px", "layers", "parameters", "GMACs", "memory/rank", "epochs", words=2)
    for row in prediction["stages"]:
        stages.add_row(
            str(row["stage"]),
            row["phase"],
            str(row["resolution"]),
            str(row["depth"]),
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['gmacs']:.3g}",
            f"{row['bytes_per_rank'] / 2**20:.0f} MiB",
            f"{round(row['epochs'], 3):g}",
        )
    console = Console()
    console.print(stages)
    console.print(f"predicted speedup by GMACs: {prediction['speedup']:+.1%}; memory: weights, gradients, AdamW, EMA")
    if prediction["short"]:
        console.print(prediction["short"])
    elif prediction["kind"] == "automatic":
        console.print(
            "a search will decide each stage; the table shows the equispaced schedule"
            if prediction["budget"] is None
            else f"a search spends at most {prediction['budget']:.1%} of Original's cost; the table, "
            f"{1 / (1 + prediction['speedup']):.1%} of it by GMACs, keeps the smallest network until the takeover"
        )
    for doubt in doubts(loaded, longest_step(loaded, worlds or (nproc or 1,), described)):
        console.print(doubt, markup=False, soft_wrap=True)
    if not prediction["counted"]:
        unseen = f"{as_text(loaded.data.path)}: there are no shards yet, so their images are not counted"
        console.print(unseen, markup=False, soft_wrap=True)
    if worlds and cores is None:
        show_worlds(loaded, worlds, described, console)
    if cores is not None:
        show_supply(loaded, worlds, described, cores, core_rates(loaded, images_per_core_second), console)


def keys(
    group: Annotated[
        str | None,
        typer.Argument(
            metavar="GROUP", help="A group of keys, e.g. search; default: all groups.", autocompletion=group_words
        ),
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="The JSON schema, for editors.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The text of docs/recipe.md.")] = False,
) -> None:
    """Lists every key of a recipe: its values, default and meaning."""
    from scaleprog.recipe import reference

    if schema or markdown:
        print(json.dumps(reference.schema(), indent=1) if schema else reference.markdown(), end="\n" if schema else "")
        return
    console = Console()
    for name, (about, rows) in (reference.groups() if group is None else {group: reference.group(group)}).items():
        console.print(Text(f"{name}: {about}\n", style="bold"))
        for key in rows:
            default = "required" if key.default is None else f"default {key.default}"
            console.print(f"{key.name}: {key.takes}; {default}", markup=False)
            console.print(Padding(Text(key.meaning), (0, 0, 1, 4)))


def rank_counts(text: str) -> tuple[int, ...]:
    """Numbers of ranks from `8,64,512`. Raises ScaleprogError."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 32 or not all(re.fullmatch("0*[1-9][0-9]{0,5}", part) for part in parts):
        raise ScaleprogError(
            f"--world: {text[:100]!r} is not a list of at most 32 numbers of ranks from 1 to 999999, such as 8,64,512"
        )
    return tuple(map(int, parts))


def doubts(recipe: "Recipe", step: float) -> Iterator[str]:
    """What a recipe may say, and hardly anybody wants. `step`: the predicted seconds of its longest step."""
    optimizer, patience = recipe.optimizer, recipe.train.patience
    if 60 * patience < LONG_FACTOR * step:
        yield (
            f"train.patience, {patience:g} min, is less than three times the longest step, predicted to take "
            f"{step:.3g} s: a rank that only waits for a slow one may count as hung"
        )
    if optimizer.warmup_epochs >= recipe.train.epochs:
        yield (
            f"optimizer.warmup_epochs, {optimizer.warmup_epochs:g}, is no less than train.epochs, "
            f"{recipe.train.epochs:g}: the learning rate never falls"
        )
    for key in ("min_lr", "warmup_lr"):
        if getattr(optimizer, key) > optimizer.lr:
            yield f"optimizer.{key}, {getattr(optimizer, key):g}, is more than optimizer.lr, {optimizer.lr:g}"


def show_worlds(recipe: "Recipe", worlds: tuple[int, ...], device: "Device", console: Console) -> None:
    """What a step of the complete model costs a rank, a table for every number of ranks; then what it rests on."""
    from scaleprog.errors import RecipeError
    from scaleprog.planning.cost_model import assumptions
    from scaleprog.planning.plan import forecast

    console.print(
        f"\none step of {as_text(recipe.model.name)} at full size on {device.name}, per rank",
        markup=False,
        highlight=False,
    )
    shown = False
    for world in worlds:
        try:
            found = forecast(recipe, world, device)
        except RecipeError as error:
            say_cannot_run(world, error, console)
            continue
        console.print(f"\n{world} ranks, {next(iter(found.values()))[0].images} images each", highlight=False)
        costs = table("", *found)
        for title, *row in zip(COSTS, *(cost(prediction, peak, device) for prediction, peak in found.values())):
            if set(row) != {"0.0"}:
                costs.add_row(title, *row)
        console.print(costs)
        shown = True
    if not shown:
        return
    console.print("\n* the recipe's engine; ! more memory than the device has. Assumptions:")
    for line in assumptions(recipe, device):
        console.print(as_text(f"- {line}"), markup=False, highlight=False)


def cost(prediction: "Prediction", peak: float, device: "Device") -> list[str]:
    """What a step costs a rank under one engine, in the order of COSTS. `peak`: of the run, in bytes."""
    memory, traffic = prediction.memory, prediction.traffic
    held = [memory.parameters, memory.gradients, memory.optimizer, memory.ema, memory.activations, memory.buffers]
    return [
        *(f"{size / 2**20:.1f}" for size in (*held, memory.host)),
        f"{peak / 2**20:.0f}{'!' if peak > device.memory else ''}",
        str(traffic.count()),
        f"{traffic.sent() / 2**20:.1f}",
        f"{traffic.between_nodes(device) / 2**20:.1f}",
        f"{1000 * prediction.step:.2f}",
        f"{prediction.efficiency:.0%}",
    ]


def core_rates(recipe: "Recipe", given: str | None) -> dict[int, float]:
    """Images per second that a core prepares, by resolution: from `224=300,160=450`, or measured on the shards.

    Raises ScaleprogError.
    """
    from scaleprog.planning.plan import steps_per_epoch
    from scaleprog.shards.speed import measure

    if given is not None:
        found = re.findall(r"([0-9]{1,4})=([0-9]{1,9}(?:\.[0-9]{1,20})?)(?:,|$)", given)
        if ",".join(f"{size}={rate}" for size, rate in found) != given or not all(float(rate) for _, rate in found):
            raise ScaleprogError(
                f"--images-per-core-second: {given[:100]!r} is not a list of resolutions with rates, such as "
                "224=300,160=450"
            )
        return {int(size): float(rate) for size, rate in found}
    if steps_per_epoch(recipe) is None:
        raise ScaleprogError(
            f"--cores: there are no shards in {recipe.data.path} to measure; build them, or give "
            "--images-per-core-second PX=N,... as `scaleprog shards speed` printed it elsewhere"
        )
    return measure(recipe, images=128, turns=3).whole


def say_cannot_run(world: int, error: Exception, console: Console) -> None:
    """Tells why a number of ranks cannot run the recipe, in the place of what would be shown of it."""
    console.print(as_text(f"\n{world} ranks: cannot run: {error}", lines=True), markup=False, highlight=False)


def show_supply(
    recipe: "Recipe",
    worlds: tuple[int, ...],
    device: "Device",
    cores: int,
    rates: Mapping[int, float],
    console: Console,
) -> None:
    """Which phases wait for images, a table for every number of ranks, and what is left of the speedup."""
    from scaleprog.errors import RecipeError
    from scaleprog.planning.plan import outline, steps_per_epoch
    from scaleprog.planning.supply import Supply, check_rates

    check_rates(outline(recipe, steps_per_epoch(recipe))[1], rates)
    console.print(
        f"\nimages/s of all ranks: eaten, as {device.name} would at {device.achieved:.0%} of its peak (an estimate "
        "from a model, not a measurement), and prepared, at "
        + ", ".join(f"{rate:.0f} of a core at {size} px" for size, rate in sorted(rates.items())),
        highlight=False,
    )
    for world in worlds:
        try:
            supply = Supply.of(recipe, world, device, cores, rates)
        except RecipeError as error:
            say_cannot_run(world, error, console)
            continue
        console.print(
            f"\n{world} ranks, {cores} cores each, of which {supply.decoders} prepare images", highlight=False
        )
        phases = table("stage", "phase", "px", "layers", "eaten", "prepared", "waiting", "cores needed", words=2)
        for phase in supply.phases:
            phases.add_row(
                str(phase.stage),
                phase.kind,
                str(phase.network.resolution),
                str(phase.network.depth),
                f"{supply.rate(phase, supply.computing):.0f}",
                f"{supply.rate(phase, supply.decoding):.0f}",
                f"{supply.waiting(phase):.0%}",
                str(supply.cores_needed(phase)),
            )
        console.print(phases)
        console.print(
            f"predicted speedup over Original by wall-clock time: {supply.speedup(supply.stepping):+.1%}; "
            f"if no step waited: {supply.speedup(supply.computing):+.1%}",
            highlight=False,
        )
    console.print(
        "\nwaiting: the part of a phase's time in which ranks wait for images. Less of it: more cores, with "
        "data.workers (auto: all cores but one), smaller stored images (`shards ... --shorter-side`), or packed "
        "shards (`shards pack`). Left out: launching kernels, which keeps small networks on fast "
        "devices from eating so much; evaluation, checkpoints, growth, and reading the shards.",
        highlight=False,
    )
