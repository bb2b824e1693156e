"""plan.json: what `scaleprog status` needs to know about a run's plan, so that it does not have to build a model."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from scaleprog.files.atomic import write_whole
from scaleprog.growth.begun import begun_by
from scaleprog.growth.phase import Window
from scaleprog.growth.policy import Budget, EqualStages, Policy
from scaleprog.growth.schedule import Compute, Schedule
from scaleprog.growth.space import Subnet
from scaleprog.recipe.parent import ParentSettings
from scaleprog.rundir.reading import read_object
from scaleprog.rundir.records import PlanFile, PlannedSchedule

PLAN = "plan.json"
SCHEDULE = ("kind", "steps", "search_steps", "scoring", "recycle", "adaptive_regularization", "patch", "curriculum")
"""The fields of a Schedule that the file holds under their own names."""


def write_plan(run: Path, schedule: Schedule, gmacs: Callable[[Subnet], float]) -> None:
    """Writes the schedule, and the GMACs of an image in every network that it may train. May raise OSError."""
    budget = schedule.budget
    fields: PlannedSchedule = {
        **{name: getattr(schedule, name) for name in SCHEDULE},  # type: ignore[typeddict-item]
        "ladder": [(subnet.resolution, subnet.depth) for subnet in schedule.ladder],
        "rule": schedule.policy.rule,
        "budget": budget.limit if budget else None,
        "promised": budget is not None and budget.promised,
        "complete_steps": budget.complete_steps if budget else 0,
        "cooldown": schedule.policy.cooldown,
    }
    if budget is not None and budget.most is not None:
        fields["most_searches"] = budget.most
    if schedule.compute is not None:
        fields["unit"] = schedule.compute.unit
    if schedule.whole is not None:
        fields["whole"] = schedule.whole.resolution, schedule.whole.depth
    if schedule.window is not None:
        fields["window"] = schedule.window.spread, schedule.window.mix
    costs = [[subnet.resolution, subnet.depth, gmacs(subnet)] for subnet in schedule.networks]
    write_whole(run / PLAN, json.dumps({"schedule": fields, "gmacs": costs}))


def read_plan(run: Path, parent: ParentSettings | None = None) -> tuple[Schedule, dict[Subnet, float]] | None:
    """The schedule and GMACs that `write_plan` wrote; None without a file. Raises CheckpointError or Unavailable.

    The schedule tells steps and costs; how a network grows is not in the file. `parent`: the run that it continues,
    according to its recipe.
    """
    values = read_object(run / PLAN, PlanFile)
    if values is None:
        return None
    fields = values["schedule"]
    ladder, limit, rule = tuple(Subnet(*size) for size in fields["ladder"]), fields["budget"], fields["rule"]
    cooldown = fields.get("cooldown", 0)  # earlier versions had none
    policy: Policy = EqualStages(ladder, fields["steps"], rule if fields["kind"] == "automatic" else None, cooldown)
    if limit is not None and rule is not None:
        policy = Budget(
            ladder,
            fields["steps"],
            rule,
            fields["search_steps"],
            fields["scoring"],
            limit,
            fields["promised"],
            fields["complete_steps"],
            subset=fields["patch"] is not None,
            cooldown=cooldown,
            recycle=fields["recycle"],
            most=fields.get("most_searches"),
        )
    begun = begun_by(parent)
    named = {name: fields[name] for name in SCHEDULE}  # type: ignore[literal-required]
    moving = fields["steps"] - cooldown
    window = None if (drawn := fields.get("window")) is None else Window(ladder, *drawn, moving, cooldown)
    whole = None if (sides := fields.get("whole")) is None else Subnet(*sides)
    schedule = Schedule(ladder=ladder, policy=policy, begun=begun, whole=whole, window=window, **named)
    gmacs = {Subnet(resolution, depth): cost for resolution, depth, cost in values["gmacs"]}
    if (unit := fields.get("unit")) is not None:
        complete = gmacs.get(schedule.full, math.nan)
        prices = tuple((subnet, cost / complete) for subnet, cost in gmacs.items())
        schedule = replace(schedule, compute=Compute(prices, unit))
    return schedule, gmacs
