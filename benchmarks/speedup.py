"""The speedups of the paper's Table 2, predicted by multiply-accumulates, beside those that the paper measured.

    python -m benchmarks.speedup [--out docs/results/speedup.md]

Nothing is fitted to the paper: a schedule's cost is that of its steps and of the scoring in its searches, as
`scaleprog plan` computes it, and the speedup is Original's cost / this cost - 1.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from scaleprog.growth.phase import Phase
from scaleprog.growth.policy import Price
from scaleprog.growth.schedule import Schedule
from scaleprog.growth.space import Choice, Subnet
from scaleprog.models.cost import gmacs
from scaleprog.planning.plan import outline
from scaleprog.recipe import Recipe

STEPS_PER_EPOCH = 1_281_167 // 1024
PROG = {"deit_small": 53.6, "volo_d1": 60.9, "volo_d2": 54.4}
"""The paper's speedups in percent, by model, of 100 epochs."""
AUTOPROG = {
    ("deit_small", "", 100): 40.7,
    ("volo_d1", "", 100): 65.6,
    ("volo_d1", "_04", 100): 85.1,
    ("volo_d2", "", 100): 45.3,
    ("deit_tiny", "", 300): 51.2,
    ("deit_small", "", 300): 42.0,
    ("volo_d1", "", 300): 48.9,
    ("volo_d2", "", 300): 42.7,
}
"""By model, growth space and epochs."""
H100_MS = (14.7, 24.41, 33.3, 50.47)
"""A step of each of DeiT-S's four networks, 256 images (docs/results/gpu.md, first call, replicated autocast)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/speedup.md"))
    options = parser.parse_args()
    text = "\n".join(["Written by `python -m benchmarks.speedup`.", "", *prog_table(), "", *autoprog_table()]) + "\n"
    print(text)
    options.out.write_text(text)


def prog_table() -> list[str]:
    """The lines about Prog."""
    lines = [
        "Speedup over Original in percent. The paper's are measured on 3090s (Table 2); all others are predicted, and "
        "nothing is fitted.",
        "",
        "## Prog, 100 epochs",
        "",
        "| model | by GMACs | the same without cool-down | by layers | paper | gap to GMACs |",
        "|---|---|---|---|---|---|",
    ]
    for model, paper in PROG.items():
        schedule, price = planned(f"{model}_prog_100")
        warm, _ = planned(f"{model}_prog_100", "optimizer.cooldown_epochs=0")
        by_gmacs = speedup(schedule, schedule.phases(()), price)
        lines.append(
            f"| {model} | {by_gmacs:+.1f} | {speedup(warm, warm.phases(()), price):+.1f} "
            f"| {speedup(schedule, schedule.phases(()), lambda subnet: subnet.depth):+.1f} | {paper:+.1f} "
            f"| {by_gmacs - paper:.1f} points |"
        )
    measured = 100 * (len(H100_MS) * H100_MS[-1] / sum(H100_MS) - 1)
    return [
        *lines,
        "",
        "What lies between:",
        "",
        "- On a smaller network, a GPU computes at a lower rate. `By layers` is the other extreme: a step takes as "
        "long as it has layers, whatever their size, as if only issuing kernels counted. The paper lies between the "
        "two.",
        f"- So does an H100: DeiT-S's four networks take {', '.join(f'{ms:.1f}' for ms in H100_MS)} ms per step of 256 "
        f"images ([gpu.md](gpu.md)), which makes Prog {measured:.1f} % faster. The smallest network reaches 7.7 % of "
        "the peak FLOP/s, the complete one 14.1 %.",
        "- VOLO's 10 cool-down epochs train the complete model. The paper does not say whether its runtime includes "
        "them; both columns are above it.",
        "- The paper's runtime is that of forward and backward passes, so neither the optimizer nor the data explains "
        "the gap.",
    ]


def autoprog_table() -> list[str]:
    """The lines about AutoProg."""
    lines = [
        "## AutoProg",
        "",
        "As published, by GMACs, with its searches: if every search chooses the cheapest candidate, what the "
        "equispaced ladder has, or the dearest. Ours: what the budget allows (docs/search.md).",
        "",
        "| model | epochs | growth space | cheapest | equispaced | dearest | paper | ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (model, start, epochs), paper in AUTOPROG.items():
        schedule, price = planned(f"{model}_autoprog_published{start}_{epochs}")
        ours, our_price = planned(f"{model}_autoprog{start}_{epochs}")
        found = [
            speedup(schedule, history(schedule, partial(min, key=price)), price),
            speedup(schedule, schedule.expected((), price), price),
            speedup(schedule, history(schedule, partial(max, key=price)), price),
            paper,
            speedup(ours, ours.expected((), our_price), our_price),
        ]
        lines.append(
            f"| {model} | {epochs} | {'0.4' if start else '0.5'} Omega | "
            + " | ".join(f"{s:+.1f}" for s in found)
            + " |"
        )
    return [
        *lines,
        "",
        "The dearest history trains the complete model from the first search on. The paper does not print its "
        "choices, so its AutoProg cannot be predicted more closely than by this range.",
    ]


def planned(name: str, *overrides: str) -> tuple[Schedule, Price]:
    """The schedule of a recipe for ImageNet, and the GMACs of a Subnet in it."""
    recipe = Recipe.load(f"configs/imagenet/{name}.yaml", overrides)
    family, schedule = outline(recipe, STEPS_PER_EPOCH)

    def price(subnet: Subnet) -> float:
        return gmacs(family, recipe.model, schedule.view(subnet), subnet.depth)

    return schedule, price


def history(schedule: Schedule, choose: Callable[[tuple[Subnet, ...]], Subnet]) -> list[Phase]:
    """All phases, if each search makes the choice that `choose` makes."""
    choices: list[Choice] = []
    while (phases := schedule.phases(choices))[-1].searched:
        choices.append(Choice(choose(phases[-1].candidates)))
    return phases


def speedup(schedule: Schedule, phases: list[Phase], price: Price) -> float:
    """Original's cost / the cost of `phases` - 1, in percent."""
    return 100 * (price(schedule.full) * schedule.steps / schedule.cost(phases, price) - 1)


if __name__ == "__main__":
    main()
