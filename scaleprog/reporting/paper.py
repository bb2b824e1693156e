"""The tables of the paper (Li et al., CVPR 2022, arXiv 2203.14509): their rows, and the numbers that it reports.

Tables 2 and 4 to 8 compare training schemes. A run belongs to a scheme by what its recipe says. Its results stand
beside those of the paper's model: of the same one if the recipe trains it at full size; otherwise a small model stands
for DeiT-S or VOLO-D1, trained for 100 epochs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from scaleprog.reporting.history import RunRecord

SOURCE = "arXiv 2203.14509"
MODELS = {
    "deit_tiny_patch16_224": "DeiT-Tiny",
    "deit_small_patch16_224": "DeiT-S",
    "volo_d1_224": "VOLO-D1",
    "volo_d2_224": "VOLO-D2",
}
SIZES = ("model.patch", "model.width", "model.depth", "model.heads")
LONG = 300  # epochs of the second half of Table 2
CO2_PER_KWH = 0.429  # kg, footnote 2
POUND = 0.45359237  # kg


@dataclass(frozen=True)
class Numbers:
    """What the paper reports for a row: accuracies and the speedup in percent; None where it reports nothing."""

    top1: float | None = None
    speedup: float | None = None
    at_288: float | None = None
    at_growth: float | None = None


@dataclass(frozen=True)
class Scheme:
    """A row of a table.

    Args:
        name: of the row.
        wants: what a recipe must say, by dotted key; `USUAL` says it for the other keys of the growth.
        paper: the name under which the table's numbers have it; default: `name`.
        against: the row of the same table with which its accuracy is compared.
    """

    name: str
    wants: Mapping[str, Any]
    paper: str = ""
    against: str | None = "Original"

    def fits(self, run: RunRecord) -> bool:
        """Whether a run belongs to the row."""
        wants = {**USUAL, "growth.adaptive_regularization": family(run) == "VOLO-D1", **self.wants}
        return not run.grown_before and all(said(run, key) == value for key, value in wants.items())

    def of(self, numbers: Mapping[str, Numbers]) -> Numbers:
        """The paper's numbers for the row."""
        return numbers.get(self.paper or self.name, Numbers())


@dataclass(frozen=True)
class SchemeTable:
    """A table that compares schemes. `numbers`: by model and epochs, the paper's numbers of each row.

    `at_288`, `at_growth`: whether the table has these columns.
    """

    title: str
    rows: tuple[Scheme, ...]
    numbers: Mapping[tuple[str, int], Mapping[str, Numbers]]
    at_288: bool = False
    at_growth: bool = False


def said(run: RunRecord, key: str) -> Any:
    """What a recipe says for a dotted key; one that is older than `growth.steps` counts epochs."""
    value = run.says(key)
    return "epochs" if key == "growth.steps" and value is None else value


def family(run: RunRecord) -> str:
    """The paper's model of the same family, with which its ablations are made."""
    return "VOLO-D1" if run.says("model.name").startswith("volo") else "DeiT-S"


def counterpart(run: RunRecord) -> tuple[str, int]:
    """The paper's model and epochs beside which a run stands."""
    full_size = all(run.says(key) is None for key in SIZES) and run.says("model.resolution") in (None, 224)
    model = MODELS.get(run.says("model.name")) if full_size else None
    return (model, LONG if run.says("train.epochs") >= LONG else 100) if model else (family(run), 100)


# ---- rows

USUAL = {
    "growth.operator": "mogrow",
    "growth.optimizer": "reset",
    "growth.recycle": True,
    "growth.stages": 4,
    "growth.steps": "epochs",
    "growth.window": None,
}
"""The paper's defaults; AdaReg is on for VOLO and off for DeiT."""
SMALL_IMAGES = {"growth.patches": "resolution"}
HALF, TWO_FIFTHS = "AutoProg 0.5Ω", "AutoProg 0.4Ω"

ORIGINAL = Scheme("Original", {"growth.schedule": "original"}, against=None)
PROG = Scheme("Prog", {**SMALL_IMAGES, "growth.schedule": "linear", "growth.smallest": 0.5})
SUPERNET = Scheme("Supernet", {**SMALL_IMAGES, "growth.schedule": "supernet", "growth.smallest": 0.5})


def _autoprog(name: str, smallest: float, method: str) -> Scheme:
    published = method == "published"
    wants = {"growth.schedule": "automatic", "growth.smallest": smallest, "search.method": method}
    return Scheme(
        f"{name}, as published" if published else f"{name}, within a budget",
        {**wants, **(SMALL_IMAGES if published else {})},
        paper=name,
    )


PUBLISHED = _autoprog(HALF, 0.5, "published")
PUBLISHED_04 = _autoprog(TWO_FIFTHS, 0.4, "published")
WITHIN_BUDGET = _autoprog(HALF, 0.5, "budget")
WITHIN_BUDGET_04 = _autoprog(TWO_FIFTHS, 0.4, "budget")


def _changed(scheme: Scheme, name: str, against: str | None, **growth: Any) -> Scheme:
    """A row of an ablation: a scheme with some keys of its growth set."""
    wants = {**scheme.wants, **{f"growth.{key}": value for key, value in growth.items()}}
    return replace(scheme, name=name, wants=wants, paper="", against=against)


def _adareg(scheme: Scheme) -> tuple[Scheme, Scheme]:
    off, on = (f"{scheme.paper}, {word} AdaReg" for word in ("without", "with"))
    return (
        _changed(scheme, off, None, adaptive_regularization=False),
        _changed(scheme, on, off, adaptive_regularization=True),
    )


# ---- numbers

DEIT_S, VOLO_D1 = ("DeiT-S", 100), ("VOLO-D1", 100)

TABLES = {
    2: SchemeTable(
        "efficient training",
        (ORIGINAL, PROG, PUBLISHED, PUBLISHED_04, WITHIN_BUDGET, WITHIN_BUDGET_04),
        {
            DEIT_S: {
                "Original": Numbers(74.1, at_288=74.6),
                "Prog": Numbers(72.6, 53.6, 73.2),
                HALF: Numbers(74.4, 40.7, 74.9),
            },
            VOLO_D1: {
                "Original": Numbers(82.6, at_288=83.0),
                "Prog": Numbers(81.7, 60.9, 82.1),
                HALF: Numbers(82.8, 65.6, 83.2),
                TWO_FIFTHS: Numbers(82.7, 85.1, 83.1),
            },
            ("VOLO-D2", 100): {
                "Original": Numbers(83.6, at_288=84.1),
                "Prog": Numbers(82.9, 54.4, 83.3),
                HALF: Numbers(83.8, 45.3, 84.2),
            },
            ("DeiT-Tiny", LONG): {"Original": Numbers(72.2, at_288=72.9), HALF: Numbers(72.4, 51.2, 73.0)},
            ("DeiT-S", LONG): {"Original": Numbers(79.8, at_288=80.1), HALF: Numbers(79.8, 42.0, 80.1)},
            ("VOLO-D1", LONG): {"Original": Numbers(84.2, at_288=84.4), HALF: Numbers(84.3, 48.9, 84.6)},
            ("VOLO-D2", LONG): {"Original": Numbers(85.2, at_288=85.1), HALF: Numbers(85.2, 42.7, 85.2)},
        },
        at_288=True,
    ),
    4: SchemeTable(
        "growth operators with Prog",
        (
            replace(ORIGINAL, against="MoGrow"),
            _changed(PROG, "RandInit", "MoGrow", operator="rand_init"),
            _changed(PROG, "Stacking", "MoGrow", operator="stacking"),
            _changed(PROG, "Interpolation", "MoGrow", operator="interpolation"),
            _changed(PROG, "Identity", "MoGrow", operator="identity"),
            _changed(PROG, "MoGrow", None, operator="mogrow"),
        ),
        {
            VOLO_D1: {
                "Original": Numbers(82.53),
                "RandInit": Numbers(80.02, at_growth=60.61),
                "Stacking": Numbers(81.55, at_growth=61.50),
                "Interpolation": Numbers(81.78, at_growth=61.53),
                "Identity": Numbers(79.32, at_growth=61.04),
                "MoGrow": Numbers(81.90, at_growth=61.65),
            }
        },
        at_growth=True,
    ),
    5: SchemeTable(
        "MoGrow in AutoProg",
        (
            _changed(PUBLISHED, "AutoProg without MoGrow", None, operator="interpolation"),
            _changed(PUBLISHED, "AutoProg with MoGrow", "AutoProg without MoGrow"),
        ),
        {
            VOLO_D1: {
                "AutoProg without MoGrow": Numbers(82.6, at_growth=59.41),
                "AutoProg with MoGrow": Numbers(82.8, at_growth=62.14),
            }
        },
        at_growth=True,
    ),
    6: SchemeTable(
        "weight recycling",
        (
            _changed(PUBLISHED, "without recycling", None, recycle=False),
            _changed(PUBLISHED, "with recycling", "without recycling"),
        ),
        {VOLO_D1: {"without recycling": Numbers(82.8, 53.3), "with recycling": Numbers(82.8, 65.6)}},
    ),
    7: SchemeTable(
        "adaptive regularization",
        (*_adareg(PUBLISHED), *_adareg(PUBLISHED_04)),
        {
            DEIT_S: {f"{HALF}, without AdaReg": Numbers(74.4, 40.7), f"{HALF}, with AdaReg": Numbers(0.1)},
            VOLO_D1: {
                f"{TWO_FIFTHS}, without AdaReg": Numbers(81.5, 50.9),
                f"{TWO_FIFTHS}, with AdaReg": Numbers(82.7, 85.1),
            },
        },
    ),
    8: SchemeTable(
        "a supernet without growth",
        (ORIGINAL, SUPERNET, PUBLISHED),
        {VOLO_D1: {"Original": Numbers(82.6), "Supernet": Numbers(81.7, 48.5), HALF: Numbers(82.8, 65.6)}},
    ),
}
"""Tables 2 and 4 to 8, by number."""
FIGURE_4 = (ORIGINAL, PROG, PUBLISHED, WITHIN_BUDGET)

TRANSFER = {  # Table 3: by the number of classes, the data set, and the top-1 by the scheme that trained DeiT-S
    10: ("CIFAR-10", {"Original": Numbers(99.0), HALF: Numbers(99.0, 48.9)}),
    100: ("CIFAR-100", {"Original": Numbers(89.5), HALF: Numbers(89.7, 48.9)}),
}
EMISSIONS = {  # Table 1: pounds of CO2e, and top-1 in percent
    "ResNet-50": (267, 77.54),
    "BERT base": (1438, None),
    "a person in a year, on average": (11023, None),
    "ViT-H/14": (22793, 88.55),
    "CoAtNet": (183256, 90.88),
}
