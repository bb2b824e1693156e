"""plan.json: what `scaleprog status` needs to know about a run's plan, so that it does not have to build a model."""

import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from scaleprog.files.atomic import write_whole
from scaleprog.growth.schedule import Schedule
from scaleprog.growth.space import Subnet
from scaleprog.rundir.reading import read_object
from scaleprog.rundir.records import PlanFile

PLAN = "plan.json"


def write_plan(run: Path, schedule: Schedule, gmacs: Callable[[Subnet], float]) -> None:
    """Writes the schedule, and the GMACs of an image in every network that it may train. May raise OSError."""
    networks = set(schedule.ladder)
    if schedule.kind != "fixed":
        networks |= {Subnet(*size) for size in product(schedule.space.resolutions, schedule.space.depths)}
    costs = [[subnet.resolution, subnet.depth, gmacs(subnet)] for subnet in sorted(networks)]
    ladder = [[subnet.resolution, subnet.depth] for subnet in schedule.ladder]
    write_whole(run / PLAN, json.dumps({"schedule": asdict(schedule) | {"ladder": ladder}, "gmacs": costs}))


def read_plan(run: Path) -> tuple[Schedule, dict[Subnet, float]] | None:
    """The schedule and GMACs that `write_plan` wrote; None without a file. Raises CheckpointError or Unavailable."""
    values = read_object(run / PLAN, PlanFile)
    if values is None:
        return None
    fields: dict[str, Any] = {**values["schedule"]}
    fields["ladder"] = tuple(Subnet(*size) for size in fields["ladder"])
    schedule = Schedule(**fields)
    return schedule, {Subnet(resolution, depth): cost for resolution, depth, cost in values["gmacs"]}
