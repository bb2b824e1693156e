"""What faults would cost a run, before a cluster is asked for: simulate."""

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding

from scaleprog.cli.arguments import Overrides, RecipePath, in_job
from scaleprog.errors import ScaleprogError
from scaleprog.files.display import as_text, table

if TYPE_CHECKING:
    from scaleprog.planning.limits import Limit
    from scaleprog.planning.scenario import Input
    from scaleprog.planning.simulation import Outcome

HEADS = {"detection": "detect", "repeated steps": "repeated"}
"""Shorter words for some parts of a cost, so that all fit into 80 columns."""
MOST_NODES, MOST_DAYS, MOST_STEPS = 10**5, 3650, 10**9


def simulate(
    recipe: RecipePath,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, max=MOST_NODES, help="Nodes that train.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, max=64, help="GPUs of each node, one for each rank.")] = 8,
    faults: Annotated[
        str,
        typer.Option(
            metavar="llama3|none|RATES",
            help="RATES: faults per 1,000 node-days, e.g. crash=2,hang=0.5,preemption=10,node=1.5.",
        ),
    ] = "llama3",
    days: Annotated[
        float | None, typer.Option(help="Days of training that count; default: 54, as long as Llama 3's record.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MOST_STEPS, help="Steps of training in place of days.")
    ] = None,
    step_seconds: Annotated[
        float | None, typer.Option(help="Seconds of a step; default: as `plan --world` models it.")
    ] = None,
    device: Annotated[str, typer.Option(help="The device of the model: h100, a100 or cpu.")] = "h100",
    spare_nodes: Annotated[int, typer.Option(min=0, max=1000, help="Nodes held besides those that train.")] = 0,
    restart: Annotated[
        str, typer.Option(metavar="in-job|requeue", help="Whether a run starts again on the nodes that it holds.")
    ] = "in-job",
    assume: Annotated[
        str | None, typer.Option(metavar="NAME=SECONDS,...", help="Other values of the inputs in seconds.")
    ] = None,
    runs: Annotated[int, typer.Option(min=2, max=10_000, help="Simulated runs.")] = 200,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the faults that are drawn.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Simulates a run under faults: effective training time, what each cause costs, and what would change it."""
    from scaleprog.planning import scenario
    from scaleprog.planning.devices import Device
    from scaleprog.planning.faults import FaultRates, named_numbers
    from scaleprog.planning.limits import limits
    from scaleprog.planning.simulation import simulate
    from scaleprog.recipe import Recipe

    if days is not None and steps is not None:
        raise ScaleprogError("--days and --steps both say how long the run is; give one of them")
    check_positive("--days", days, MOST_DAYS)
    check_positive("--step-seconds", step_seconds, 1e5)
    rates = FaultRates.parse(faults, gpus_per_node)
    given = named_numbers(assume, "--assume", scenario.SECONDS) if assume is not None else {}
    cluster = scenario.Cluster(nodes, gpus_per_node, Device.named(device), spare_nodes, in_job(restart))
    length = scenario.Length(days or 54.0, steps, step_seconds)
    found = scenario.inputs(Recipe.load(recipe, overrides or ()), cluster, length, rates, given)
    asked = scenario.scenario_of(found, cluster)
    others = {name: simulate(each, runs, seed) for name, each in scenario.alternatives(asked).items()}
    outcome, breaking = others["as asked"], limits(asked, seed)
    if as_json:
        print(json.dumps(as_plain(found, outcome, others, breaking), indent=1))
    else:
        show(found, outcome, others, breaking, cluster.world)


def check_positive(option: str, value: float | None, most: float) -> None:
    """Raises ScaleprogError unless `value` is None, or a number above 0 and up to `most`."""
    if value is not None and not (math.isfinite(value) and 0 < value <= most):
        raise ScaleprogError(f"{option} {value:g}: use a number above 0, at most {most:g}")


def as_plain(
    found: "list[Input]", outcome: "Outcome", others: "Mapping[str, Outcome]", breaking: "list[Limit]"
) -> dict[str, Any]:
    """What `show` prints, for programs; times in seconds, shares of the wall time."""
    return {
        "inputs": [vars(each) for each in found],
        "effective": outcome.mean,
        "confidence": outcome.confidence,
        "spread": outcome.spread,
        "wall_seconds": float(outcome.wall.mean()),
        "finished": outcome.finished,
        "faults": outcome.counts(),
        "costs": outcome.shares(),
        "alternatives": {name: other.mean for name, other in others.items()},
        "limits": {each.name: {"value": each.value, "reached": each.reached} for each in breaking},
    }


def show(
    found: "list[Input]",
    outcome: "Outcome",
    others: "Mapping[str, Outcome]",
    breaking: "list[Limit]",
    world: int,
) -> None:
    """Prints the result, what it costs by cause, what would change it, and the inputs with their origins."""
    from scaleprog.planning.simulation import MOST_FAULTS

    console = Console()
    low, high = outcome.confidence
    least, most = outcome.spread
    console.print(
        f"effective training time on {world} ranks: {outcome.mean:.2%} (95 % confidence of the mean: {low:.2%} to "
        f"{high:.2%}; 95 % of the runs: {least:.2%} to {most:.2%}), {outcome.wall.mean() / 86400:.4g} days from the "
        "first start to the end",
        soft_wrap=True,
        highlight=False,
    )
    if outcome.finished < 1:
        console.print(
            f"{1 - outcome.finished:.0%} of the runs had not finished after {MOST_FAULTS} faults, where they end",
            soft_wrap=True,
            highlight=False,
        )
    show_costs(outcome, console)
    console.print("\nWhat would change it")
    changes = table("instead", "effective", "points", words=1)
    for name, other in others.items():
        changes.add_row(name, f"{other.mean:.2%}", f"{100 * (other.mean - outcome.mean):+.2f}")
    console.print(changes, markup=False)
    show_limits(found, breaking, console)
    console.print("\nEvery input, and where it comes from")
    inputs = table("input", "value", "unit", "origin", words=1)
    inputs.columns[2].justify = inputs.columns[3].justify = "left"
    before = ""
    for each in found:
        inputs.add_row(
            each.name, f"{each.value:.4g}", each.unit, '"' if each.origin == before else as_text(each.origin)
        )
        before = each.origin
    console.print(Padding(inputs, (0, 0, 0, 1)), markup=False)
    console.print(
        "Left out: faults of the nodes while they wait or ranks end, partial growth to other numbers of nodes, slow "
        "nodes, evaluation and growth. Faults come at random (a Poisson process), each from one cause.",
        soft_wrap=True,
        highlight=False,
    )


def show_limits(found: "list[Input]", breaking: "list[Limit]", console: Console) -> None:
    """Prints how far each input alone would have to change for the run to reach, or to miss, the target."""
    from scaleprog.planning.limits import TARGET

    values = {each.name: each.value for each in found}
    limits = table("input", "now", "limit")
    for each in breaking:
        if each.value is not None:
            limits.add_row(each.name, f"{values[each.name]:.4g}", f"{each.value:.3g}")
    console.print(f"\nHow large each input alone may be for {TARGET:.0%}")
    if limits.rows:
        console.print(limits, markup=False)
    others = {
        "alone, no value reaches it": [each.name for each in breaking if each.value is None and not each.reached],
        "alone, no value that was tried misses it": [
            each.name for each in breaking if each.value is None and each.reached
        ],
    }
    for what, names in others.items():
        if names:
            console.print(f"{what}: {', '.join(names)}", highlight=False)


def show_costs(outcome: "Outcome", console: Console) -> None:
    """Prints what each cause costs, part by part, in percent of the wall time."""
    from scaleprog.planning.simulation import PARTS

    console.print("\nWhat each cause costs, in percent of the wall time")
    costs = table("cause", "faults", *(HEADS.get(part, part) for part in (*PARTS, "stall", "all")))
    counts = outcome.counts()
    for cause, parts in outcome.shares().items():
        cells = [f"{100 * parts[part]:.3f}" if part in parts else "" for part in (*PARTS, "stall")]
        number = f"{counts[cause]:.1f}" if cause in counts else ""
        costs.add_row(cause, number, *cells, f"{100 * sum(parts.values()):.3f}")
    console.print(costs, markup=False)
