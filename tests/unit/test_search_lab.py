"""The laboratory's grids and table: what its figures stand for."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.search_lab import Case, Grid, Record, Records, Trial, by_hand, costs, table
from scaleprog.planning.plan import describe, outline
from scaleprog.recipe import Recipe

GRIDS = sorted((Path(__file__).parents[2] / "benchmarks/grids").glob("*.yaml"))
ORIGINAL = Case("Original", "", "configs/fashion_mnist/base.yaml", ("growth.schedule=original",), curve=False)
PROG = Case("Prog", "", "configs/fashion_mnist/base.yaml", ("growth.schedule=linear",), curve=False)


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_case_of_a_grid_is_a_recipe_of_its_own(path: Path) -> None:
    grid = Grid.load(path)
    digests = [Trial(case, seed, Path("runs")).digest for case in grid.cases for seed in grid.seeds]
    assert len(set(digests)) == len(digests) == len(grid.cases) * len(grid.seeds)
    other = Grid.load(path, "configs/fashion_mnist/small_data.yaml")
    assert other.name == f"{path.stem}_small_data"
    assert {Trial(case, 0, Path("runs")).digest for case in other.cases}.isdisjoint(digests)
    for case in (*grid.cases, *other.cases):
        outline(Trial(case, 0, Path("runs")).recipe, 1000)  # raises if it could not be trained


def test_the_rivals_autoprog_is_the_recipes() -> None:
    grid = Grid.load(next(path for path in GRIDS if path.stem == "rivals"))
    (case,) = (case for case in grid.cases if case.name == "50 %, AutoProg")
    shipped = Recipe.load("configs/fashion_mnist/autoprog.yaml", ["search.budget=0.5", "search.times=modelled"])
    tried = Recipe.load(case.recipe, case.settings)
    assert (tried.growth, tried.search, tried.optimizer) == (shipped.growth, shipped.search, shipped.optimizer)


def test_a_schedule_by_hand() -> None:
    small, full = {"resolution": 16, "depth": 3}, {"resolution": 28, "depth": 6}
    assert by_hand("2 * 16x3 + 28x6") == [small, small, full]


@pytest.mark.parametrize(("recipe", "epochs"), [("base", 8), ("small_data", 16)])
@pytest.mark.parametrize("schedule", [["28x6"], ["20x6"], ["12x6", "20x6", "28x6"]])
@pytest.mark.parametrize("steps", ["epochs", "compute"])
def test_a_case_with_a_cost_trains_as_long_as_that_pays_for(
    tmp_path: Path, recipe: str, epochs: int, schedule: list[str], steps: str
) -> None:
    path = tmp_path / "grid.yaml"
    method = {"schedule": " + ".join(schedule), "growth.patches": "subset", "growth.steps": steps}
    grid = {"recipe": f"configs/fashion_mnist/{recipe}.yaml", "cases": {}, "budgets": [0.25], "methods": {"a": method}}
    path.write_text(yaml.safe_dump(grid))
    (case,) = Grid.load(path).cases
    assert case.name == "25 %, a"
    trained = Recipe.load(case.recipe, case.settings)
    full = Recipe.load(case.recipe, ["growth.schedule=original"])
    assert full.train.epochs == epochs
    cost = trained.train.epochs / (1 + describe(trained)["speedup"])
    assert cost == pytest.approx(0.25 * epochs, rel=0.01)
    shares = [of.optimizer.warmup_epochs / of.train.epochs for of in (trained, full)]
    assert shares[0] == pytest.approx(shares[1], rel=0.01)


@pytest.mark.parametrize(("recipe", "lr"), [("base", 6e-3), ("small_data", 4e-3)])
def test_a_case_multiplies_the_recipes_own_numbers(tmp_path: Path, recipe: str, lr: float) -> None:
    path = tmp_path / "grid.yaml"
    cases = {"a": {"times": {"optimizer.lr": 2}}}
    path.write_text(yaml.safe_dump({"recipe": f"configs/fashion_mnist/{recipe}.yaml", "cases": cases}))
    (case,) = Grid.load(path).cases
    assert Recipe.load(case.recipe, case.settings).optimizer.lr == lr


def test_a_budget_is_that_of_a_search(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    methods = {"a": {"growth.schedule": "automatic"}}
    path.write_text(
        yaml.safe_dump({"recipe": ORIGINAL.recipe, "cases": {}, "budgets": [0.4, 0.45], "methods": methods})
    )
    settings = {case.name: case.settings for case in Grid.load(path).cases}
    assert settings == {
        name: ('growth.schedule="automatic"', f"search.budget={budget}")
        for name, budget in (("40 %, a", 0.4), ("45 %, a", 0.45))
    }


def test_what_a_schedule_by_hand_would_have_searched_does_not_matter() -> None:
    searching = Case("", "", PROG.recipe, (*PROG.settings, "search.times=modelled"), curve=False)
    assert Trial(PROG, 0, Path("a")).digest == Trial(searching, 0, Path("b")).digest
    assert Trial(PROG, 0, Path("a")).digest != Trial(PROG, 1, Path("a")).digest


def recorded(run: Trial, folder: Path, step_seconds: tuple[float, float], top1: float) -> Record:
    """The record of a run of two small and two complete steps, whose search ended after the second."""
    sizes = [("train", 16, 3, step_seconds[0])] * 2 + [("train", 28, 6, step_seconds[1])] * 2
    rows = [
        {"step": i + 1, "loss": 1.0 - i / 10, "phase": phase, "resolution": r, "depth": d, "cpu_seconds": s}
        for i, (phase, r, d, s) in enumerate(sizes)
    ]
    events = [
        {"event": "start", "step": 0},
        {"event": "growth", "step": 1, "phase": "supernet"},
        {"event": "measurement", "step": 2, "losses": [[16, 3, 0.5], [28, 6, 0.4]]},
        {"event": "choice", "step": 2},
    ]
    stages = [{"resolution": 16, "depth": 3, "epochs": 1.0}, {"resolution": 28, "depth": 6, "epochs": 1.0}]
    spent = 2 * sum(step_seconds) + step_seconds[1] / 2
    results = {"top1": top1, "top1_ema": top1 - 1, "train_cpu_seconds": spent, "stages": stages}
    folder.mkdir(parents=True)
    run.folder = folder
    (folder / "results.json").write_text(json.dumps(results))
    for name, lines in (("metrics", [*rows, {"step": 4, "top1": top1, "top1_ema": top1 - 1}]), ("events", events)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Record.of(run)


def test_costs_are_in_complete_steps_whatever_the_machine(tmp_path: Path) -> None:
    one = recorded(Trial(PROG, 0, tmp_path), tmp_path / "one", (0.1, 0.4), 80.0)
    slow = recorded(Trial(PROG, 0, tmp_path), tmp_path / "slow", (0.25, 1.0), 80.0)
    assert (one.cost, one.scoring, one.steps, one.best) == (
        3.0,
        0.5,
        4,
        80.0,
    )  # 2 quarters, 2 whole, half a step scored
    assert vars(one) == vars(slow)
    assert one.curve == [(3.0, 80.0)]
    assert one.counts == [{"train 16x3": 2, "train 28x6": 2, "choice": 1}]
    assert costs(one.counts, {"train 16x3": 0.5, "train 28x6": 1.0, "choice": 0.0}) == [3.0]
    assert one.searches == [[{"16x3": 0.5, "28x6": 0.4}]]
    assert one.schedule == "1 · 16x3 → 1 · 28x6"


def test_a_supernet_is_counted_in_steps_of_its_largest_subnet(tmp_path: Path) -> None:
    run = Trial(PROG, 0, tmp_path)
    run.folder = tmp_path / "supernet"
    recorded(run, run.folder, (0.1, 0.4), 80.0)
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [{**row, "phase": "supernet"} for row in rows[3::-1]]  # ends with the small ones
    renumbered = [{**row, "step": i + 1} for i, row in enumerate(steps)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*renumbered, rows[4]]))
    record = Record.of(run)
    assert record.prices == {"supernet 28x6": 1.0, "supernet 16x3": 0.25, "choice": 0.5}
    assert record.cost == 3.0


def test_a_step_of_a_run_that_never_trains_the_complete_model_costs_less_than_one(tmp_path: Path) -> None:
    run = Trial(PROG, 0, tmp_path)
    run.folder = tmp_path / "small"
    recorded(run, run.folder, (0.1, 0.4), 80.0)
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    small = [{**rows[0], "step": i + 1} for i in range(4)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*small, rows[4]]))
    price = Record.of(run).prices["train 16x3"]
    assert price == pytest.approx(16**2 / 28**2 * 3 / 6, rel=0.2), "nearly as patches times layers"


def test_the_table_compares_the_same_seeds(tmp_path: Path) -> None:
    records, runs = Records(tmp_path / "records.jsonl"), []
    for seed, (original, prog) in enumerate(((80.0, 79.0), (82.0, 80.0))):
        for case, seconds, top1 in ((ORIGINAL, (0.4, 0.4), original), (PROG, (0.1, 0.4), prog)):
            run = Trial(case, seed, tmp_path)
            records.add(recorded(run, tmp_path / f"{case.name}{seed}", seconds, top1))
            runs.append(run)
    again = Records(tmp_path / "records.jsonl")
    assert all(run in again for run in runs)
    text = table(Grid("grid", (ORIGINAL, PROG), (0, 1)), runs, again)
    assert "| Original | 0, 1 | 81.00 ± 1.41 | +0.00 ± 0.00 | +0% | 0.00 | 11.1% |" in text
    assert "| Prog | 0, 1 | 79.50 ± 0.71 | -1.50 ± 0.50 | +50% | 0.00 | 16.7% |" in text
