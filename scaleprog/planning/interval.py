"""How often to save: the interval that loses the least time, from what a save costs and how often training fails."""

import math

from scaleprog.planning.faults import LLAMA3_COUNTS, LLAMA3_NODE_DAYS

DAY = 86400.0


def young_daly(pause: float, mtbf: float, save: float) -> float:
    """Seconds of training between two saves that lose the least time (Young 1974, Daly 2006): sqrt(2 * pause * mtbf).

    The time to write does not count as a cost, because training continues, but the next save waits for it.

    Args:
        pause: seconds for which a save pauses training.
        mtbf: mean seconds between two faults that cost the steps since the last save.
        save: seconds until a save is visible, the least interval.
    """
    return max(math.sqrt(2 * pause * mtbf), save)


def estimated_mtbf(faults: int, seconds: float, nodes: int) -> float:
    """Mean seconds between two faults of a run that has seen `faults` in `seconds` on `nodes` nodes.

    The prior weighs as much as one fault: one in a day, or sooner where Llama 3's rate says so for as many nodes.
    """
    prior = DAY * min(1.0, LLAMA3_NODE_DAYS / sum(LLAMA3_COUNTS.values()) / nodes)
    return (prior + seconds) / (1 + faults)
