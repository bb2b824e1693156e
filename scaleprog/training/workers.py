"""How many decoding processes a rank starts for a phase if the recipe leaves that open (`data.workers: auto`).

Their number changes how fast batches come, never what they hold.
"""

import os
from collections import Counter
from dataclasses import replace

from scaleprog.planning.cost_model import host_memory_available
from scaleprog.planning.plan import Plan
from scaleprog.ranks.coordinator import Coordinator, ranks_per_node
from scaleprog.training.process import Run

MOST_WAITING = 0.05
"""Share of the time in which steps may wait for data before the next phase has a worker on the rank's own core, too."""


def with_own_cores(plan: Plan, coordinator: Coordinator) -> Plan:
    """The plan with the cores that this rank has for itself; cores that several ranks may use are shared out."""
    if plan.data.settings.workers != "auto":
        return plan
    host, mine = os.uname().nodename, sorted(os.sched_getaffinity(0))
    everyones = coordinator.gather([host, mine])
    users = Counter(core for there, cores in everyones if there == host for core in cores)
    own = sum(1 / users[core] for core in mine)
    return replace(plan, data=replace(plan.data, cores=max(1, round(own))))


def adapt_workers(run: Run, pixels: int) -> None:
    """Sets the number of workers for a phase with images of `pixels` a side, and records it.

    That is one for each core of the rank except its own; if steps waited for data, one for that core, too, which was
    idle meanwhile. Each rank has an equal part of the memory of its machine, and fewer workers where that is short.
    """
    reader, data = run.reader, run.plan.data
    if data.settings.workers != "auto":
        return
    wanted = data.cores if run.recorder.waiting > MOST_WAITING else data.workers
    reader.workers = min(wanted, len(reader.lanes))
    available = host_memory_available() // ranks_per_node()
    while reader.workers > 1 and reader.memory(pixels) > available:
        reader.workers -= 1
    run.recorder.own_event("workers", step=run.state.step, workers=reader.workers)
