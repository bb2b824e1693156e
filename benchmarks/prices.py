"""What runs cost, in steps of the complete model: by prices that all runs of a recipe share, and by GMACs."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from statistics import median

from benchmarks.search_lab import CHOICE, Record, Records, Trial, costs
from scaleprog.growth.space import Subnet
from scaleprog.planning.plan import gmacs_of, outline, steps_per_epoch
from scaleprog.recipe import Recipe


def by_gmacs(trial: Trial, record: Record) -> float:
    """What a run costs if everything costs what its GMACs say. A search scores each network on whole batches."""
    family, schedule = outline(trial.recipe, _steps_per_epoch(trial.recipe, record))
    gmacs = partial(gmacs_of, trial.recipe, family, schedule)
    complete = gmacs(schedule.full)
    steps = sum(count * gmacs(_subnet(kind)) for kind, count in record.counts[-1].items() if kind != CHOICE)
    scored = sum(
        schedule.scoring * gmacs(target)
        for search in record.searches
        if search
        for target in {schedule.policy.proxy(_subnet(name)) for name in search[-1]}
    )
    return (steps + scored) / complete


def _steps_per_epoch(recipe: Recipe, record: Record) -> int | None:
    """As the run had them, if it trained whole epochs: the shards may not be there any more."""
    steps, rest = divmod(record.steps, recipe.train.epochs)
    return steps_per_epoch(recipe) if rest else int(steps)


def _subnet(kind: str) -> Subnet:
    """`train 16x3` -> 16 px, 3 layers."""
    resolution, depth = kind.split()[-1].split("x")
    return Subnet(int(resolution), int(depth))


def pooled(trials: Sequence[Trial], records: Records) -> dict[str, list[float]]:
    """What each run had cost at each evaluation, by its digest, in steps of the complete model, at `shared` prices."""
    prices = shared(trials, records)
    return {trial.digest: costs(records[trial].counts, prices[trial.digest]) for trial in trials}


def shared(trials: Sequence[Trial], records: Records) -> dict[str, dict[str, float]]:
    """The prices of each run, by its digest, in steps of the complete model.

    A kind of step costs the same in all runs of a recipe: the median of their prices. In one run alone, what else its
    cores did during a stage changes the price by tens of percent. A run that never trains the complete model has set
    its prices by GMACs; they count where no other run has measured one. Measurements cost what they cost in their own
    run.
    """
    found = {}
    for recipe in dict.fromkeys(trial.case.recipe for trial in trials):
        members = [records[trial] for trial in trials if trial.case.recipe == recipe]
        known = medians([record.prices for record in members if trains_alone(record)])
        prices = {record.digest: in_complete_steps(record, known) for record in members}
        measured = [prices[record.digest] for record in members if 1 in record.prices.values()]
        common = medians(prices.values()) | medians(measured)
        for digest, own in prices.items():
            found[digest] = {kind: price if kind == CHOICE else common[kind] for kind, price in own.items()}
    return found


def of_searches(record: Record, prices: Mapping[str, float]) -> float:
    """What the searches of a run cost: the steps of its supernets, and the measurements."""
    if CHOICE not in record.counts[-1]:
        return 0.0  # a window over the stages trains a supernet, too
    return sum(
        count * prices[kind]
        for kind, count in record.counts[-1].items()
        if kind == CHOICE or kind.startswith("supernet ")
    )


def trains_alone(record: Record) -> bool:
    """Whether a run trained anything but a supernet."""
    return any(kind.startswith("train ") for kind in record.prices)


def in_complete_steps(record: Record, known: Mapping[str, float]) -> dict[str, float]:
    """A run's prices. Those of one that only trained a supernet are in steps of its largest network, of which `known`
    says what one costs."""
    if trains_alone(record):
        return record.prices
    unit = next(kind for kind, price in record.prices.items() if price == 1)
    return {kind: price * known.get(unit, 1.0) for kind, price in record.prices.items()}


def medians(prices: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The median price of each kind."""
    found: dict[str, list[float]] = defaultdict(list)
    for own in prices:
        for kind, price in own.items():
            found[kind].append(price)
    return {kind: median(values) for kind, values in found.items()}
