"""What `scaleprog plan --world` says of memory and traffic, against bytes counted on a step of DeiT-S.

    python -m benchmarks.cost_model [--out docs/results/plan.md]

Real ranks where they fit on this machine; larger worlds as rank 0 alone, with a process group whose collectives do
nothing. Below it stand the tables that the command prints.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from scaleprog.launchers.local import launch
from scaleprog.recipe.keys import ModelSettings
from tests.distributed import ranks

MODEL, DEPTH = ModelSettings(name="deit_small_patch16_224", resolution=224), 12
RECIPE = "configs/imagenet/deit_small_autoprog_100.yaml"
PRINTED = (
    [RECIPE, "--world", "8,64", "--device", "h100"],
    [RECIPE, "data.lanes=4096", "train.batch=24576", "--world", "512,4096", "--device", "h100"],
)
COUNTED = (
    *(("fsdp", "fp32", world, True) for world in (1, 2, 4)),
    *(("replicated", "fp32", world, True) for world in (1, 2, 4)),
    *(("fsdp", "bf16", world, False) for world in (8, 64, 512)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/plan.md"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    lines = [
        "Written by `python -m benchmarks.cost_model`.",
        "",
        "DeiT-S at full size, two EMAs, rank 0: bytes counted / bytes predicted of what it holds (weights, gradients, "
        "AdamW's moments, EMA) and of the tensors that a step's collectives carry, padding included.",
        "",
        "| engine | ranks | held, MiB | counted / predicted | collectives | predicted | carried, MiB "
        "| counted / predicted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [row(*case) for case in COUNTED]
    for arguments in PRINTED:
        lines += ["", f"`scaleprog plan {' '.join(arguments)}`", "", "```text", printed(arguments), "```"]
    text = "\n".join(lines) + "\n"
    print(text)
    options.out.write_text(text)


def row(engine: str, precision: str, world: int, real: bool) -> str:
    """One line of the table: counted on `world` ranks, or on one that pretends to be the first of them."""
    sharding = {"engine": engine, "precision": precision}
    if real:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.json"
            launch(world, ranks.count_here, [sharding], MODEL, DEPTH, out)
            (counted,) = json.loads(out.read_text())
    else:
        counted = ranks.count_pretended(sharding, MODEL, DEPTH, world)
    expected = ranks.predicted_step(sharding, MODEL, DEPTH, world)
    if world == 1:  # collectives of one rank with itself
        counted["collectives"] = {}
    held, foreseen = (sum(found["memory"].values()) for found in (counted, expected))
    numbers = [sum(number for number, _ in found["collectives"].values()) for found in (counted, expected)]
    sizes = [sum(size for _, size in found["collectives"].values()) for found in (counted, expected)]
    carried = f"{sizes[0] / sizes[1]:.4f}" if sizes[1] else "-"
    where = world if real else f"{world} (pretended)"
    return (
        f"| {engine}, {precision} | {where} | {held / 2**20:.2f} | {held / foreseen:.4f} "
        f"| {numbers[0]} | {numbers[1]} | {sizes[0] / 2**20:.2f} | {carried} |"
    )


def printed(arguments: list[str]) -> str:
    """What `scaleprog plan` prints."""
    environment = os.environ | {"COLUMNS": "120"}
    command = [sys.executable, "-m", "scaleprog", "plan", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
