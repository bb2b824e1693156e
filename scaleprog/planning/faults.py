"""How often what happens to a run: published rates, or the user's own, per 1,000 node-days."""

import math
import re
from dataclasses import dataclass

from scaleprog.errors import ScaleprogError

CAUSES = ("crash", "hang", "preemption", "node")
"""A rank crashes; a rank hangs; the run is asked to stop, with notice; a node is lost and must be replaced."""
MOST = 1e9

LLAMA3_NODE_DAYS, LLAMA3_GPUS = 54 * 2048, 8
LLAMA3_COUNTS = {"crash": 54 + 2, "hang": 7, "preemption": 0, "node": 148 + 72 + 35 + 32 + 19 + 17 + 7 + 26}
"""The 419 unplanned interruptions of Llama 3's pre-training in 54 days on 2,048 nodes (arXiv 2407.21783, table 5).

Crashes: software bugs, dependencies. Hangs: timeouts of NCCL's watchdog. Nodes: GPUs (148), their HBM3 (72), SRAM (19)
and system processors (17), switches and cables (35), unplanned maintenance of hosts (32), NICs (7), and others (26).
"""


@dataclass(frozen=True)
class FaultRates:
    """Faults per 1,000 node-days, by cause, and where the rates come from."""

    rates: dict[str, float]
    origin: str

    @classmethod
    def parse(cls, text: str, gpus: int) -> "FaultRates":
        """From `llama3`, `none`, or e.g. `crash=2,node=1.5`; causes that it leaves out never happen.

        `gpus`: of each node, to which Llama 3's rates are in proportion.

        Raises ScaleprogError.
        """
        if text == "llama3":
            node_days = LLAMA3_NODE_DAYS * LLAMA3_GPUS / gpus
            rates = {cause: 1000 * count / node_days for cause, count in LLAMA3_COUNTS.items()}
            return cls(rates, "Llama 3 (arXiv 2407.21783): 419 unplanned interruptions in 54 days on 16,384 GPUs")
        if text == "none":
            return cls(dict.fromkeys(CAUSES, 0.0), "--faults none")
        return cls(dict.fromkeys(CAUSES, 0.0) | named_numbers(text, "--faults", CAUSES), "--faults")


def named_numbers(text: str, option: str, names: tuple[str, ...]) -> dict[str, float]:
    """Numbers from 0 to 10^9 by name, from `name=1,other=2.5`. Raises ScaleprogError."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in names:
            raise ScaleprogError(
                f"{option}: {part[:100]!r} is not NAME=NUMBER with one of the names {', '.join(names)}; for example "
                f"{names[0]}=2.5,{names[-1]}=1" + ("; or llama3, or none" if option == "--faults" else "")
            )
        number = float(value) if re.fullmatch(r"[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]{1,3})?", value) else math.inf
        if not number <= MOST:
            raise ScaleprogError(f"{option}: {name}={value[:100]!r} is not a number from 0 to {MOST:g}")
        if name in found:
            raise ScaleprogError(f"{option}: {name} appears twice")
        found[name] = number
    return found
