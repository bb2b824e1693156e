"""The recipes of the repository; those for ImageNet are the paper's Table 2, and cost what timm's models cost."""

from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from timm.models.volo import VOLO
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scaleprog.planning.plan import describe, outline
from scaleprog.recipe import Recipe
from scaleprog.recipe.keys import SearchSettings
from tests.conftest import CONFIGS, RECIPES

pytestmark = pytest.mark.process  # counts some twenty networks

AUTOPROG = ("autoprog", "autoprog_published")
TABLE_2 = {
    ("deit_small", 100): ("original", "prog", *AUTOPROG),
    ("volo_d1", 100): ("original", "prog", *AUTOPROG, "autoprog_04", "autoprog_published_04"),
    ("volo_d2", 100): ("original", "prog", *AUTOPROG),
    ("deit_tiny", 300): ("original", *AUTOPROG),
    ("deit_small", 300): ("original", *AUTOPROG),
    ("volo_d1", 300): ("original", *AUTOPROG),
    ("volo_d2", 300): ("original", *AUTOPROG),
}
"""Training schemes by model and epochs, each AutoProg also as published."""
ROWS = [(model, scheme, epochs) for (model, epochs), schemes in TABLE_2.items() for scheme in schemes]
LADDERS = {
    "deit_tiny": [(128, 6), (160, 8), (192, 10), (224, 12)],
    "deit_small": [(128, 6), (160, 8), (192, 10), (224, 12)],
    "volo_d1": [(128, 9), (160, 12), (192, 15), (224, 18)],
    "volo_d1 04": [(96, 7), (128, 11), (192, 14), (224, 18)],
    "volo_d2": [(128, 12), (160, 16), (192, 20), (224, 24)],
}
WIDTHS = {"deit_tiny": 192, "deit_small": 384}
OUTLOOKERS = {7: 2, 9: 2, 11: 4, 12: 4, 14: 4, 15: 4, 16: 4, 18: 4, 20: 6, 24: 6}
"""In a VOLO of so many layers, by the authors' code."""
VOLOS = {
    "volo_d1_224": {"embed_dims": (192, 384, 384, 384), "num_heads": (6, 12, 12, 12)},
    "volo_d2_224": {"embed_dims": (256, 512, 512, 512), "num_heads": (8, 16, 16, 16)},
}


@cache
def timms_parameters(name: str, depth: int) -> int:
    """Parameters of timm's own model of that depth at full resolution, whose position embedding all networks have."""
    with torch.device("meta"):
        return sum(p.numel() for p in timms_own(name, 224, depth).parameters())


@cache
def timms_gmacs(name: str, resolution: int, depth: int) -> float:
    """Billions of multiply-accumulates of an image through timm's own model of that size, as torch counts them; on
    meta, because on the CPU torch leaves fused attention out."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        timms_own(name, resolution, depth).eval()(torch.empty(1, 3, resolution, resolution))
    return counter.get_total_flops() / 2e9


def timms_own(name: str, resolution: int, depth: int) -> nn.Module:
    if name not in VOLOS:
        return timm.create_model(name, img_size=resolution, depth=depth)
    layers = (OUTLOOKERS[depth], depth - OUTLOOKERS[depth], 0, 0)
    return VOLO(layers=layers, img_size=resolution, **VOLOS[name])


def test_there_is_a_recipe_for_every_row_of_table_2() -> None:
    names = sorted(path.stem for path in (CONFIGS / "imagenet").glob("*.yaml"))
    assert names == sorted(f"{model}_{scheme}_{epochs}" for model, scheme, epochs in ROWS)
    assert len(names) == 18 + 8


@pytest.mark.parametrize(("model", "scheme", "epochs"), ROWS)
def test_every_stage_of_table_2_costs_what_timms_own_model_costs(model: str, scheme: str, epochs: int) -> None:
    recipe = Recipe.load(CONFIGS / "imagenet" / f"{model}_{scheme}_{epochs}.yaml")
    rows = describe(recipe)["stages"]
    cooldown = 10 if model.startswith("volo") else 0
    assert sum(row["epochs"] for row in rows) == pytest.approx(epochs + cooldown)
    trained = {(row["resolution"], row["depth"]): row for row in rows if row["phase"] == "train"}
    ladder = LADDERS[f"{model} 04" if scheme.endswith("04") else model]
    stages = {"original": ladder[-1:], "autoprog": [ladder[0], ladder[-1]], "autoprog_04": [ladder[0], ladder[-1]]}
    assert list(trained) == stages.get(scheme, ladder)
    for (resolution, depth), row in trained.items():
        gmacs = timms_gmacs(recipe.model.name, resolution, depth)
        if recipe.growth.patches == "subset":  # all patches of the whole image are embedded before most are left out
            gmacs += (14**2 - (resolution // 16) ** 2) * 3 * 16**2 * WIDTHS[model] / 1e9
        assert row["parameters"] == timms_parameters(recipe.model.name, depth)
        assert row["gmacs"] == pytest.approx(gmacs, rel=1e-9)


def test_all_scales_have_one_default_search() -> None:
    def searched(search: SearchSettings) -> tuple[object, ...]:
        return search.method, search.most_searches, search.most_cost

    default = {("automatic", "epochs", "budget", 1, 0.02, "wsd", "takeover")}
    for folder in ("digits", "fashion_mnist", "imagenet"):
        recipes = [
            Recipe.load(path) for path in (CONFIGS / folder).glob("*autoprog*.yaml") if "published" not in path.stem
        ]
        assert {
            (r.growth.schedule, r.growth.steps, *searched(r.search), r.optimizer.schedule, r.optimizer.decay)
            for r in recipes
        } == default


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_recipe_has_an_outlook_that_ends_in_the_complete_model(path: Path) -> None:
    recipe = Recipe.load(path)
    prediction = describe(recipe)
    _, schedule = outline(recipe, 1000)
    last = prediction["stages"][-1]
    assert (last["resolution"], last["depth"]) == (schedule.full.resolution, schedule.full.depth)
    assert prediction["speedup"] >= -1e-12
