"""The paper's tables from run directories: which run belongs to which row, and whose numbers stand beside it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from benchmarks.paper import GRID, RECIPES, PaperTrial, enlarged, pooled, whole_seeds
from benchmarks.search_lab import Grid, Record, Records, Trial
from scaleprog.errors import ScaleprogError
from scaleprog.recipe import Recipe
from scaleprog.reporting import paper_tables
from scaleprog.reporting.history import read_run
from scaleprog.reporting.paper import TABLES, VOLO_D1, Numbers, counterpart
from scaleprog.reporting.paper_tables import Costs, Energy, write_paper
from tests.conftest import write_lines
from tests.unit.test_report import tables

DEIT, VOLO = "configs/micro/deit.yaml", "configs/micro/volo.yaml"
EPOCH = 4  # steps
ORIGINAL = {"growth.schedule": "original"}
PUBLISHED = {"growth.schedule": "automatic", "search.method": "published"}


class Trained:
    """Writes run directories as short runs leave them: two stages of two epochs each, evaluated after every epoch."""

    def __init__(self, root: Path) -> None:
        self.root, self.folders = root, []  # type: Path, list[Path]

    def run(
        self, recipe: str = DEIT, seed: int = 0, top1: float = 80.0, seconds: float = 100.0, **settings: Any
    ) -> Path:
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        folder = self.root / f"run{len(self.folders)}-seed{seed}"
        folder.mkdir()
        (folder / "recipe.yaml").write_text(Recipe.load(recipe, [*overrides, f"seed={seed}"]).dump())
        rows: list[dict[str, Any]] = []
        for step in range(4 * EPOCH):
            size = {"stage": 1 + step // (2 * EPOCH), "phase": "train", "resolution": 28, "depth": 6}
            timing = {"step_seconds": 1.0, "data_wait_seconds": 0.0, "time": 1e9 + 100 + step}
            rows.append({"step": step + 1, "loss": 1.0, "epoch": step / EPOCH, **size, **timing})
            if (step + 1) % EPOCH == 0:
                accuracy = top1 - 10 * (3 - step // EPOCH)
                rows.append(
                    {"step": step + 1, "top1": accuracy - 1, "top1_ema": accuracy, "train_cpu_seconds": step + 1.0}
                )
        write_lines(folder / "metrics.jsonl", rows)
        start = {"time": 1e9, "event": "start", "step": 0, "world": 2, "device": "cpu"}
        write_lines(folder / "events.jsonl", [start, {"time": 1e9 + 3600, "event": "finish", "step": 4 * EPOCH}])
        results = {
            "stages": [{"resolution": 28, "depth": 6}], "top1": top1 - 1, "top1_ema": top1, "top1_best": top1,
            "train_seconds": 7.0, "train_cpu_seconds": seconds, "search_seconds": 0.0, "wall_seconds": 3600.0,
        }  # fmt: skip
        (folder / "results.json").write_text(json.dumps(results))
        self.folders.append(folder)
        return folder

    def write(
        self,
        *numbers: int,
        figures: tuple[int, ...] = (),
        energy: Energy | None = None,
        costs: Costs | None = None,
    ) -> str:
        write_paper(self.folders, self.root / "out", numbers, figures, energy or Energy(), costs)
        return (self.root / "out/paper.md").read_text()


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return Trained(tmp_path)


def by_scheme(table: list[dict[str, str]]) -> dict[str, dict[str, str]]:
    return {row["scheme"]: row for row in table}


def test_every_case_of_the_grid_belongs_to_a_row_and_every_row_has_a_case(trained: Trained) -> None:
    for recipe in RECIPES:
        for case in Grid.load(GRID, recipe).cases:
            folder = trained.run(recipe)
            (folder / "recipe.yaml").write_text(Trial(case, 0, trained.root).recipe.dump())
    text = trained.write(*TABLES)
    assert "Runs in no table" not in text
    found = tables(text)
    assert len(found) == 2 * len(TABLES)
    for number, pair in zip(TABLES, zip(found[::2], found[1::2])):
        names = {scheme.name for scheme in TABLES[number].rows}
        for deit_or_volo in pair:
            assert all(row["seeds"] == "1" for row in deit_or_volo), number
            if number != 7:
                assert by_scheme(deit_or_volo).keys() == names
    deit, volo = map(by_scheme, found[-4:-2])
    assert {"AutoProg 0.5Ω, without AdaReg", "AutoProg 0.5Ω, with AdaReg"} <= deit.keys()
    assert {"AutoProg 0.4Ω, without AdaReg", "AutoProg 0.4Ω, with AdaReg"} <= volo.keys()


def test_the_papers_numbers_stand_beside_means_over_the_seeds(trained: Trained) -> None:
    for seed, (original, prog) in enumerate(((80.0, 78.0), (82.0, 79.0), (84.0, 83.0))):
        trained.run(seed=seed, top1=original, seconds=100.0, **ORIGINAL)
        trained.run(seed=seed, top1=prog, seconds=50.0, **{"growth.schedule": "linear"})
    found = by_scheme(tables(trained.write(2))[0])
    assert found["Prog"] == {
        "scheme": "Prog", "seeds": "3", "top-1, paper": "72.60", "top-1": "80.00 ± 2.65", "Δ, paper": "-1.50",
        "Δ": "-2.00 ± 0.58", "order": "as in the paper", "speedup, paper": "+53.6%", "speedup": "+100.0%",
        "top-1 @288, paper": "73.20", "top-1 @288": "–",
    }  # fmt: skip
    assert (found["Original"]["Δ"], found["Original"]["speedup"]) == ("–", "–")
    assert found["AutoProg 0.5Ω, as published"]["seeds"] == "0"
    assert "AutoProg 0.4Ω, as published" not in found, "neither the paper nor we have it"


def test_speedups_and_figures_are_by_cost_where_that_is_known(trained: Trained) -> None:
    for seed in (0, 1):
        trained.run(seed=seed, seconds=100.0, **ORIGINAL)
        trained.run(seed=seed, seconds=500.0, **{"growth.schedule": "linear"})
    spent = {folder.name: [4.0, 6.0, 8.0, 10.0 if i % 2 else 15.0] for i, folder in enumerate(trained.folders)}
    text = trained.write(2, figures=(4,), costs=Costs("cost (steps)", spent))
    assert by_scheme(tables(text)[0])["Prog"]["speedup"] == "+50.0%"
    assert "Speedup: the mean cost (steps) of Original" in text
    assert "![Top-1 over cost (steps)](paper_figure_4_1.png)" in text


def test_a_kind_of_step_costs_the_same_in_every_run_of_a_recipe(tmp_path: Path) -> None:
    cases = Grid.load(GRID, DEIT).cases[:2]
    trials = [PaperTrial(case, seed, tmp_path, tmp_path) for case in cases for seed in (0, 1, 2)]
    records = Records(tmp_path / "records.jsonl")
    for trial, small, scoring in zip(trials, (0.2, 0.3, 0.7, 0.3, 0.3, 0.3), (8.0, *[1.0] * 5)):
        prices = {"train 16x3": small, "train 28x6": 1.0, "choice": scoring}
        counts = [{"train 16x3": 10}, {"train 16x3": 10, "train 28x6": 10, "choice": 1}]
        records.add(Record(trial.digest, "", trial.seed, "", 0.0, 0.0, 0.0, 0.0, 0.0, 20, prices, [], [], [], counts))
    found = pooled(trials, records)
    assert found[trials[0].digest] == pytest.approx([3.0, 21.0])
    assert [found[trial.digest] for trial in trials[1:]] == [pytest.approx([3.0, 14.0])] * 5


def test_a_supernets_prices_are_converted_to_complete_steps(tmp_path: Path) -> None:
    trials = [PaperTrial(case, 0, tmp_path, tmp_path) for case in Grid.load(GRID, DEIT).cases[:2]]
    prices = (
        {"train 28x6": 1.0, "supernet 28x6": 1.2, "supernet 16x3": 0.24},
        {"supernet 28x6": 1.0, "supernet 16x3": 0.2, "supernet 20x3": 0.3},
    )
    records = Records(tmp_path / "records.jsonl")
    for trial, own in zip(trials, prices):
        counts = [dict.fromkeys(own, 10)]
        records.add(Record(trial.digest, "", 0, "", 0.0, 0.0, 0.0, 0.0, 0.0, 30, own, [], [], [], counts))
    for _ in range(2):
        found = pooled(trials, records)
        assert [found[trial.digest] for trial in trials] == [pytest.approx([24.4]), pytest.approx([18.0])]


def test_rows_have_the_same_seeds_once_one_is_whole(tmp_path: Path) -> None:
    cases = Grid.load(GRID, DEIT).cases[:2]
    trials = [PaperTrial(case, seed, tmp_path, tmp_path) for seed in (0, 1) for case in cases]
    records = Records(tmp_path / "records.jsonl")
    for trial in trials[:3]:
        records.add(Record(trial.digest, "", trial.seed, "", 0.0, 0.0, 0.0, 0.0, 0.0, 0, {}, [], [], []))
    assert whole_seeds(trials, records) == trials[:2]


def test_what_the_paper_finds_equal_is_too_close_to_tell_from_few_seeds(trained: Trained) -> None:
    for seed, (without, with_recycling) in enumerate(((83.2, 81.8), (80.1, 80.8))):
        trained.run(VOLO, seed=seed, top1=without, **PUBLISHED, **{"growth.recycle": False})
        trained.run(VOLO, seed=seed, top1=with_recycling, **PUBLISHED)
    row = by_scheme(tables(trained.write(6))[0])["with recycling"]
    assert (row["Δ, paper"], row["order"]) == ("+0.00", "too close to tell")


@pytest.mark.parametrize(
    ("prog", "order"),
    [((81.0, 82.0), "unlike the paper"), ((79.0, 80.5), "too close to tell"), ((78.0, 79.0), "as in the paper")],
)
def test_an_order_shows_where_it_exceeds_the_noise(trained: Trained, prog: tuple[float, ...], order: str) -> None:
    for seed, top1 in enumerate(prog):
        trained.run(seed=seed, top1=80.0 + seed / 10, **ORIGINAL)
        trained.run(seed=seed, top1=top1, **{"growth.schedule": "linear"})
    assert by_scheme(tables(trained.write(2))[0])["Prog"]["order"] == order


def test_a_run_belongs_to_a_row_by_its_recipe(trained: Trained) -> None:
    trained.run(**PUBLISHED)
    trained.run(**PUBLISHED, **{"growth.recycle": False})
    trained.run(**PUBLISHED, **{"growth.operator": "interpolation"})
    trained.run(**{"growth.schedule": "automatic", "growth.patches": "subset"})
    trained.run(**{"growth.schedule": "linear", "growth.optimizer": "inherit"})
    text = trained.write(2, 6)
    second, sixth = map(by_scheme, tables(text))
    assert {name for name, row in second.items() if row["seeds"] == "1"} == {
        "AutoProg 0.5Ω, as published", "AutoProg 0.5Ω, within a budget"
    }  # fmt: skip
    assert {name: row["seeds"] for name, row in sixth.items()} == {"without recycling": "1", "with recycling": "1"}
    assert "- run2-seed0: AutoProg 0.5Ω; it belongs to no row, or" in text
    assert "- run4-seed0: Prog 0.5Ω; it belongs to no row, or" in text


def test_what_the_paper_has_not_is_in_no_row(trained: Trained) -> None:
    linear = {"growth.schedule": "linear", "growth.smallest": 0.5}
    earlier = trained.run(**linear)
    recipe = yaml.safe_load((earlier / "recipe.yaml").read_text())
    del recipe["growth"]["steps"]
    del recipe["growth"]["window"]
    (earlier / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    trained.run(**linear, **{"growth.steps": "compute"})
    trained.run(**linear, **{"growth.window": {"spread": 0.65}})
    text = trained.write(2)
    assert by_scheme(tables(text)[0])["Prog"]["seeds"] == "1", "the one of an earlier version"
    assert "- run1-seed0: Prog 0.5Ω, by compute; it belongs to no row, or" in text
    assert "- run2-seed0: Prog 0.5Ω, in a window; it belongs to no row, or" in text


def test_an_ablation_needs_more_than_runs_of_table_2(trained: Trained) -> None:
    trained.run(**ORIGINAL)
    trained.run(**PUBLISHED)
    text = trained.write(2, 4, 5)
    assert len(tables(text)) == 1
    assert text.count("No finished run belongs to this table.") == 2


def test_recipes_of_one_row_are_never_averaged(trained: Trained) -> None:
    trained.run(**ORIGINAL)
    trained.run(**ORIGINAL, **{"augment.erase": 0.1})
    trained.run(**ORIGINAL, **{"train.epochs": 2})
    found = tables(trained.write(2))
    names = [[row["scheme"] for row in table if row["seeds"] == "1"] for table in found]
    assert names == [["Original (run0)", "Original (run1)"], ["Original"]]


@pytest.mark.parametrize(
    ("recipe", "settings", "beside"),
    [
        ("configs/imagenet/deit_small_original_100.yaml", {}, ("DeiT-S", 100)),
        ("configs/imagenet/deit_small_original_100.yaml", {"train.epochs": 300}, ("DeiT-S", 300)),
        ("configs/imagenet/deit_small_original_100.yaml", {"model.name": "deit_tiny_patch16_224"}, ("DeiT-Tiny", 100)),
        ("configs/imagenet/deit_small_original_100.yaml", {"train.epochs": 300, "model.depth": 6}, ("DeiT-S", 100)),
        (VOLO, {}, VOLO_D1),
        (DEIT, {"train.epochs": 400}, ("DeiT-S", 100)),
    ],
)
def test_a_model_stands_beside_the_papers(
    trained: Trained, recipe: str, settings: dict[str, Any], beside: tuple[str, int]
) -> None:
    folder = trained.run(recipe, **{"growth.schedule": "original", **settings})
    assert counterpart(read_run(folder, "run")) == beside


def test_a_grown_network_that_trains_on_is_no_original(trained: Trained) -> None:
    record = read_run(trained.run(**ORIGINAL), "run")
    parent = {"run": "runs/prog", "phases": [{"stage": 1}, {"stage": 2}]}
    fork = replace(record, recipe={**record.recipe, "parent": parent})
    assert (record.schedule, fork.schedule) == ("Original", "Original, of a grown network")
    rows = [row for table in TABLES.values() for row in table.rows]
    assert any(row.fits(record) for row in rows)
    assert not any(row.fits(fork) for row in rows)


def test_top_1_at_growth_is_that_after_the_first_epoch_of_stage_2(trained: Trained) -> None:
    trained.run(top1=80.0, **PUBLISHED, **{"growth.operator": "interpolation"})
    text = trained.write(5)
    assert by_scheme(tables(text)[0])["AutoProg without MoGrow"]["top-1 @growth"] == "70.00"
    assert "| :" not in text, "a column of dashes is wide enough for Markdown"


def test_top_1_at_288_is_that_at_about_9_sevenths_of_the_size(trained: Trained) -> None:
    folder = trained.run(**ORIGINAL)
    rows = [{"step": 16, "resolution": side, "top1": top1, "top1_ema": 1.0} for side, top1 in ((36, 81), (28, 99))]
    rows.append({"step": 9, "resolution": 36, "top1": 60, "top1_ema": 1.0})  # of an earlier checkpoint
    write_lines(folder / "evaluations.jsonl", rows)
    assert by_scheme(tables(trained.write(2))[0])["Original"]["top-1 @288"] == "81.00"
    sides = [enlarged(Trial(Grid.load(GRID, recipe).cases[0], 0, trained.root)) for recipe in RECIPES]
    assert sides == [36, 40]


def test_emissions_follow_from_an_assumed_power_that_is_stated(trained: Trained) -> None:
    trained.run(**ORIGINAL)
    row = tables(trained.write(1, energy=Energy(co2=0.5, watts=250)))[0][-1]
    assert row["energy from"] == "modeled: 2 rank-hours x 250 W"
    assert (row["kWh"], row["CO2e kg"], row["CO2e lbs"]) == ("0.5", "0.25", "0.551")
    unknown = tables(trained.write(1))[0]
    assert [unknown[-1][column] for column in ("energy from", "kWh", "CO2e kg")] == [
        "not measured: 2 rank-hours",
        "–",
        "–",
    ]
    assert (unknown[0]["run"], unknown[0]["CO2e kg"], unknown[0]["CO2e lbs"]) == ("ResNet-50", "121", "267")


def test_measured_energy_counts_only_if_every_start_measured_it(trained: Trained) -> None:
    folder = trained.run(**ORIGINAL)
    once, again = (
        [
            {"time": 1e9 + generation, "event": "start", "step": 0, "world": 2, "generation": generation},
            {"time": 2e9, "event": "energy", "rank": 0, "generation": generation, "gpu_joules": 3e6, "cpu_joules": 6e5},
        ]
        for generation in (1, 2)
    )
    write_lines(folder / "events.jsonl", [*once, *again])
    row = tables(trained.write(1, energy=Energy(watts=250)))[0][-1]
    assert (row["energy from"], row["kWh"]) == ("measured", "2")
    write_lines(folder / "events.jsonl", [*once, again[0]])
    assert tables(trained.write(1, energy=Energy(watts=250)))[0][-1]["energy from"].startswith("modeled")


@pytest.mark.parametrize(
    ("ranks", "cpu", "source"),
    [
        ((0, 1, 2, 3), 6e5, "measured"),
        ((0, 1, 2, 3), None, "measured, GPUs only"),
        ((0, 2), 6e5, "not measured"),  # the other ranks were killed
    ],
)
def test_energy_is_measured_if_every_gpu_of_a_start_is(
    trained: Trained, ranks: tuple[int, ...], cpu: float | None, source: str
) -> None:
    folder = trained.run(**ORIGINAL)
    told: dict[str, Any] = {"generation": 1, "step": 0, "world": 4, "device": "cuda:0", "hosts": ["a", "b"]}
    events: list[dict[str, Any]] = [{"time": 1e9, "event": "start", **told}]
    for rank in ranks:
        joules = {"gpu_joules": 1e6, "cpu_joules": 0.0 if rank % 2 else cpu}
        events.append({"time": 2e9, "event": "energy", "rank": rank, "generation": 1, **joules})
    write_lines(folder / "events.jsonl", events)
    assert tables(trained.write(1))[0][-1]["energy from"].partition(":")[0] == source


@pytest.mark.parametrize(
    "other",
    [
        {"tracking": ["mlflow"], "checkpoint": {"keep": 3}},
        {"train": {"max_steps": 3, "log_every": 7}, "data": {"workers": 5, "path": "/elsewhere/fashion_mnist"}},
    ],
)
def test_seeds_belong_together_whatever_their_runs_log_and_wherever_their_shards_lie(
    trained: Trained, other: dict[str, dict[str, Any]]
) -> None:
    trained.run(seed=0, **ORIGINAL)
    folder = trained.run(seed=1, **ORIGINAL)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    for group, settings in other.items():
        recipe[group] = {**recipe[group], **settings} if isinstance(settings, dict) else settings
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert by_scheme(tables(trained.write(2))[0])["Original"]["seeds"] == "2"


def test_transferred_runs_are_told_by_whose_weights_they_started_from(trained: Trained) -> None:
    original, autoprog = trained.run(**ORIGINAL), trained.run(**PUBLISHED)
    for source, top1 in ((original, 98.0), (autoprog, 98.5)):
        folder = trained.run(top1=top1, **ORIGINAL)
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "init": {"from": source.name}}))
        started = {"run": str(folder.resolve()), "directories": [str(source.parent)]}
        (folder / "directories.json").write_text(json.dumps(started))
    second, third = tables(trained.write(2, 3))
    assert by_scheme(second)["Original"]["seeds"] == "1"
    assert [(row["scheme"], row["top-1, paper"], row["top-1"]) for row in third] == [
        ("from AutoProg 0.5Ω, as published", "99.00", "98.50"), ("from Original", "99.00", "98.00")
    ]  # fmt: skip


def test_transfers_by_different_recipes_are_never_averaged(trained: Trained) -> None:
    source = trained.run(**ORIGINAL)
    for rate in (1e-3, 1e-7):
        folder = trained.run(**ORIGINAL, **{"optimizer.lr": rate})
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "init": {"from": source.name}}))
        started = {"run": str(folder.resolve()), "directories": [str(source.parent)]}
        (folder / "directories.json").write_text(json.dumps(started))
    (third,) = tables(trained.write(3))
    assert sorted(row["scheme"] for row in third) == ["from Original (run1)", "from Original (run2)"]


def test_the_figures_are_drawn_once_per_setting(trained: Trained) -> None:
    trained.run(**ORIGINAL)
    trained.run(**PUBLISHED)
    trained.run(VOLO, **ORIGINAL)
    text = trained.write(figures=(1, 4))
    for name in ("paper_figure_1_1.png", "paper_figure_4_1.png", "paper_figure_4_2.png"):
        assert f"]({name})" in text
        with Image.open(trained.root / "out" / name) as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 50
    assert text.count("](paper_figure") == 3


def test_different_recipes_of_a_scheme_are_no_seeds_of_one_in_a_figure(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[str]] = []
    monkeypatch.setattr(paper_tables, "draw_accuracy", lambda _, curves, __: drawn.append([c.recipe for c in curves]))
    for settings in ({}, {"optimizer.lr": 1e-7}, {"train.batch": 4096}):
        trained.run(**ORIGINAL, **settings)
    trained.write(figures=(4,))
    assert drawn == [["run0: Original", "run1: Original"], ["Original"]]
    trained.write(figures=(1,))
    assert len(set(drawn[2])) == 3


@pytest.mark.parametrize("phases", [3, "x", None])
def test_a_parent_that_is_nonsense_has_not_grown(phases: object, trained: Trained) -> None:
    record = read_run(trained.run(**ORIGINAL), "run")
    assert not replace(record, recipe={**record.recipe, "parent": {"phases": phases}}).grown_before


def test_a_forks_energy_is_its_own(trained: Trained) -> None:
    folder = trained.run(**ORIGINAL)
    parent = {"run": "runs/prog", "step": 4, "id": "0" * 32, "position": 4}
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"parent": parent}))
    assert "without its parent's" in trained.write(1, energy=Energy(watts=350))


def test_unfinished_runs_and_unknown_tables_are_named(trained: Trained) -> None:
    (trained.run(**ORIGINAL) / "results.json").unlink()
    text = trained.write(2)
    assert "No finished run belongs to this table." in text
    assert "- run0-seed0: it has not finished" in text
    with pytest.raises(ScaleprogError, match="--table: there is no table 9; choose from 1, 2, 3, 4, 5, 6, 7, 8"):
        trained.write(2, 9)
    with pytest.raises(ScaleprogError, match="--figure: there is no figure 2; choose from 1, 4"):
        trained.write(figures=(2,))


def test_every_number_of_the_paper_belongs_to_a_row() -> None:
    for number, table in TABLES.items():
        names = {scheme.paper or scheme.name for scheme in table.rows}
        for model, numbers in table.numbers.items():
            assert numbers.keys() <= names, (number, model)
            assert all(value != Numbers() for value in numbers.values())
