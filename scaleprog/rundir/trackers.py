"""Trackers, as plugs: the services besides TensorBoard that may show a run. No torch; each imports its library late.

docs/tracking.md says how to use them, and `sending.py` is what drives them.
"""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from scaleprog.files.display import say, without_password

MOST_METRICS, MOST_PARAMETERS = 1000, 100  # that MLflow takes at a time
MOST_TEXT = 5000  # characters that MLflow takes in a tag or as a parameter
MARK = "scaleprog.run"  # the tag by which a run is found whose creation was not answered


@dataclass(frozen=True)
class Shown:
    """A run as a tracker shows it.

    Args:
        folder: the run directory.
        id: 16 hex digits; the same at every start.
        name: what people call it.
        settings: the resolved recipe, by dotted key.
    """

    folder: Path
    id: str
    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """The points of several curves after a step; `moment`: seconds since 1970."""

    step: int
    moment: float
    values: Mapping[str, float]


class Tracker(Protocol):
    """A service that shows a run. Any method may raise any exception; the sender then repeats what it has sent."""

    keeps: bool
    """Whether points are safe as soon as `scalars` returns; otherwise, once `close` has returned."""
    place: tuple[str, ...] = ()
    """The environment variables that say where it sends."""

    def open(self, run: Shown, known: str | None, unclosed: str | None) -> tuple[str, int]:
        """Begins to send, as the same run at every start.

        Args:
            run: the run.
            known: what identifies the run to the service, as an earlier `open` returned it.
            unclosed: `session` of an earlier start that was killed before `close`.

        Returns:
            What identifies the run to the service, and a step up to which the service surely has all points (or -1).
        """

    def scalars(self, points: Sequence[Point]) -> None:
        """Sends points, of rising steps."""

    def describe(self, text: str) -> None:
        """Shows a Markdown text as the run's description, in place of the one before."""

    @property
    def session(self) -> str | None:
        """What `open` needs to know about this start if it is killed before `close`."""

    def close(self, finished: bool) -> None:
        """Returns once everything is safe; `finished`: whether the run is."""


class MLflow:
    """MLflow's tracking server, or whatever else MLFLOW_TRACKING_URI names.

    A server that keeps its runs in a database takes equal points once, so a request whose answer got lost is repeated.
    """

    keeps = True
    session = None
    place: tuple[str, ...] = ("MLFLOW_TRACKING_URI",)

    def __init__(self) -> None:
        # the sender repeats requests itself
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        import mlflow

        self._client, self._run = mlflow.MlflowClient(), ""

    def open(self, run: Shown, known: str | None, unclosed: str | None) -> tuple[str, int]:
        self._run = known or self._find_or_create(run)
        self._client.update_run(self._run, status="RUNNING")
        self._show(run.settings)
        return self._run, -1

    def _find_or_create(self, run: Shown) -> str:
        experiment = self._experiment()
        found = self._client.search_runs([experiment], f"tags.`{MARK}` = '{run.id}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        tags = {MARK: run.id, "mlflow.source.name": str(run.folder)}
        return str(self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id)

    def _show(self, settings: Mapping[str, Any]) -> None:
        """Shows settings as parameters, and those of a run made longer as tags: MLflow never changes a parameter."""
        from mlflow.entities import Param, RunTag

        shown = {key: str(value)[:MOST_TEXT] for key, value in settings.items()}
        has = self._client.get_run(self._run).data.params
        parameters = [Param(key, value) for key, value in shown.items() if key not in has]
        tags = [RunTag(key, value) for key, value in shown.items() if has.get(key, value) != value]
        for first in range(0, max(len(parameters), len(tags)), MOST_PARAMETERS):
            part = slice(first, first + MOST_PARAMETERS)
            self._client.log_batch(self._run, params=parameters[part], tags=tags[part])

    def _experiment(self) -> str:
        """The experiment that MLflow's environment variables name, by default MLflow's own default."""
        if number := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return number
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
        if not name:
            return "0"
        found = self._client.get_experiment_by_name(name)
        number = found.experiment_id if found is not None else self._client.create_experiment(name)
        return str(number)

    def scalars(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(tag, value, round(1000 * point.moment), point.step)
            for point in points
            for tag, value in point.values.items()
        ]
        for first in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._run, metrics=metrics[first : first + MOST_METRICS])

    def describe(self, text: str) -> None:
        self._client.set_tag(self._run, "mlflow.note.content", text[:MOST_TEXT])

    def close(self, finished: bool) -> None:
        if finished:
            self._client.set_terminated(self._run, "FINISHED")


class WandB:
    """Weights & Biases; offline, in the folder `wandb` of the run directory, where its service cannot be reached.

    wandb keeps points in memory until it is closed. So after a start that was killed, the points since its beginning
    are sent again: online, the service drops the steps that it has; offline, the unfinished folder is deleted first.
    """

    keeps = False
    place: tuple[str, ...] = ("WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT")

    def __init__(self) -> None:
        import wandb

        self._wandb: Any = wandb
        self._run: Any = None

    def open(self, run: Shown, known: str | None, unclosed: str | None) -> tuple[str, int]:
        number = known or run.id
        if unclosed is not None and re.fullmatch(r"offline-run-[\w-]+", unclosed):
            shutil.rmtree(run.folder / "wandb" / unclosed, ignore_errors=True)
        try:
            self._run = self._begin(run, number, None)
        except Exception as error:
            if os.environ.get("WANDB_MODE"):
                raise
            where = run.folder / "wandb"
            say(f"wandb: no connection ({without_password(str(error))}); writing to {where}")
            self._run = self._begin(run, number, "offline")
        has = -1 if self._run.offline else self._run.starting_step - 1
        return number, has

    def _begin(self, run: Shown, number: str, mode: str | None) -> Any:
        settings = self._wandb.Settings(console="off", silent=True, save_code=False, disable_git=True, init_timeout=30)
        return self._wandb.init(
            id=number,
            resume="allow",
            mode=mode,
            dir=str(run.folder),
            project=os.environ.get("WANDB_PROJECT", "scaleprog"),
            name=os.environ.get("WANDB_NAME", run.name),
            config=dict(run.settings),
            settings=settings,
        )

    def scalars(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log({**point.values, "_timestamp": point.moment}, step=point.step)

    def describe(self, text: str) -> None:
        self._run.notes = text

    @property
    def session(self) -> str | None:
        return None if self._run is None else Path(self._run.dir).parent.name

    def close(self, finished: bool) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            run.finish()


TRACKERS: dict[str, type[Tracker]] = {"mlflow": MLflow, "wandb": WandB}
"""By name in a recipe; the extra that installs a tracker's library has the same name."""
