"""What a finished run leaves: `results.json`."""

import json
from typing import Any

from scaleprog.errors import Unavailable
from scaleprog.files.atomic import write_whole
from scaleprog.rundir.records import RESULTS
from scaleprog.rundir.state import summary
from scaleprog.training.process import Run


def finish(run: Run) -> dict[str, Any]:
    """Has rank 0 write the run's results, and returns them. Raises Unavailable if they cannot be written."""
    results = {
        "schedule": run.recipe.model_dump(mode="json")["growth"]["schedule"],
        **summary(run.state, run.plan.schedule, run.plan.order.steps_per_epoch),
    }

    def write() -> None:
        try:
            write_whole(run.folder / RESULTS, json.dumps(results, indent=1))
        except OSError as error:
            raise Unavailable(f"{run.folder / RESULTS}: {error}; start again; only this file is missing") from error

    run.coordinator.on_rank_0("results", write)
    run.recorder.event("finish", step=run.state.step, top1_best=results["top1_best"])
    return results
