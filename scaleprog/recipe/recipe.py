"""One YAML file -> one validated, immutable Recipe. Unknown keys and bad values are errors that say what is valid."""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from scaleprog.errors import RecipeError
from scaleprog.files.location import local_path
from scaleprog.files.plain_yaml import RECIPE, parse, read_mapping, read_run
from scaleprog.recipe import shipped
from scaleprog.recipe.keys import (
    TIMM,
    AugmentSettings,
    CheckpointSettings,
    DataSettings,
    EmaSettings,
    EvaluateSettings,
    GrowthSettings,
    InitSettings,
    ModelSettings,
    OptimizerSettings,
    SearchSettings,
    ShardingSettings,
    TrackerName,
    TrainSettings,
)
from scaleprog.recipe.numbers import Index, Settings
from scaleprog.recipe.parent import ParentSettings

# Keys that may change between two starts of one run: they alter speed or bookkeeping, never the weights; but
# search.budget, which is what the searches still to come may spend. A run that has begun does not read `init` again.
FREE = (
    "train.max_steps",
    "train.log_every",
    "train.patience",
    "train.rank_curves",
    "train.profile",
    "tracking",
    "train.accept_arithmetic",
    "train.micro_batch",
    "init",
    "data.path",
    "data.manifest",
    "data.store",
    "data.store_gib",
    "data.memory",
    "data.token_labels",
    "data.workers",
    "data.prefetch",
    "data.cache",
    "data.damaged",
    "data.most_damaged",
    "data.trace",
    "sharding.engine",
    "sharding.stage",
    "sharding.shard",
    "sharding.gather",
    "sharding.offload",
    "sharding.reshard_after_forward",
    "sharding.recompute",
    "sharding.compile",
    "checkpoint",
    "evaluate.batch",
    "optimizer.nonfinite",
    "optimizer.most_skipped",
    "search.budget",
)
PATHS = (("init", "source"), ("data", "path"), ("data", "manifest"), ("data", "store"), ("data", "token_labels"))
"""The settings that are paths, URLs, or `timm`."""
MOST_BASES = 20
"""Of one recipe, those of its bases included."""
MOST_PROBLEMS, LONGEST_SHOWN = 50, 200
"""In one message."""
KEY = r"[\w-]+(\.[\w-]+)*"
"""The form of a key in `key=value`."""


class Recipe(Settings):
    """Everything that determines a run."""

    seed: Index = Field(default=0, ge=0, lt=2**32)
    """Seed of initialization, of the order of samples and of augmentation."""
    model: ModelSettings
    init: InitSettings = InitSettings()
    data: DataSettings
    augment: AugmentSettings = AugmentSettings()
    train: TrainSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    growth: GrowthSettings = GrowthSettings()
    search: SearchSettings = SearchSettings()
    ema: EmaSettings = EmaSettings()
    sharding: ShardingSettings = ShardingSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: Annotated[tuple[TrackerName, ...], Field(max_length=8)] = ()
    """Trackers that show the run besides TensorBoard: mlflow, wandb; see docs/tracking.md."""
    parent: ParentSettings | None = None
    """The run that this one continues, see docs/continue.md; `scaleprog train --from` writes it."""

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> "Recipe":
        """Reads a recipe, the bases it names, and `key=value` overrides such as `growth.stages=3`.

        `path`: a file, or the name of a shipped recipe, see `shipped.locate`.
        """
        return cls.overridden(_read(shipped.locate(Path(path)), (), []), overrides, str(path))

    @classmethod
    def overridden(cls, values: Mapping[str, Any], overrides: Sequence[str], where: str) -> "Recipe":
        """Validates plain values under `key=value` overrides; `where` is named in errors."""
        for override in overrides:
            values = _merge(values, _override(override))
        return cls.of(values, where)

    @classmethod
    def of_run(cls, run: Path) -> "Recipe":
        """The recipe of a run directory. Raises RecipeError, CheckpointError or Unavailable, see `read_run`."""
        return cls.of(read_run(run), str(run / RECIPE))

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> "Recipe":
        """Validates plain values; `where` is named in errors."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RecipeError(f"{where}:\n" + "\n".join(f"  {line}" for line in _explain(error))) from None

    def located(self, directories: Sequence[Path]) -> "Recipe":
        """The recipe with absolute paths: a relative one leads from the first of `directories` in which it exists, or
        else from the first; see `directories.py`."""
        groups: dict[str, Settings] = {}
        for group, field in PATHS:
            settings = groups.get(group, getattr(self, group))
            path = getattr(settings, field)
            if path is None or (group, path) == ("init", TIMM) or os.path.isabs(local_path(path) or "/"):
                continue
            places = [os.path.join(directory, path) for directory in directories] or [path]
            found = next(filter(os.path.exists, places), places[0])
            groups[group] = settings.model_copy(update={field: found})
        return self.model_copy(update=groups)

    def dump(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def settings(self) -> dict[str, Any]:
        """All settings, by dotted key."""
        return _flat(self.model_dump(mode="json"))

    def differences(self, other: "Recipe") -> list[str]:
        """Keys (with both values) in which two recipes differ so that a run cannot go on from one to the other."""
        mine, theirs = _flat(self.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
        # with growth.steps: compute, the learning rates so far depend on the budget
        free = [key for key in FREE if key != "search.budget" or self.growth.steps == "epochs"]
        return [
            f"{key}: {mine.get(key)} here, {theirs.get(key)} there"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key) and not any(key == f or key.startswith(f + ".") for f in free)
        ]


def files_of(path: Path) -> list[Path]:
    """A recipe's file and those of its bases, resolved. Raises RecipeError."""
    files: list[Path] = []
    _read(path, (), files)
    return files


def _read(path: Path, parents: tuple[Path, ...], read: list[Path]) -> dict[str, Any]:
    """A recipe file merged over its `base`: a path relative to it, or several, each merged over those before it.

    `parents`: the files that have it as a base, from the first; `read`: all files read so far.
    """
    of = f", the base of {parents[-1]}" if parents else ""
    try:
        values = read_mapping(path)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 3)
        near = near or difflib.get_close_matches(shipped.name_of(str(path)), shipped.recipes(), 1, cutoff=0.8)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise RecipeError(f"{path}: no such recipe{of}{hint}") from None
    except IsADirectoryError:
        kept = path / RECIPE
        hint = f" (to resume it, use {kept} --run-dir {path})" if kept.exists() else ""
        raise RecipeError(f"{path}: not readable as YAML: a folder{of}{hint}") from None
    except OSError as error:
        raise RecipeError(f"{path}: not readable as YAML: {error}{of}") from error
    resolved = path.resolve()
    read.append(resolved)
    if resolved in parents or len(read) > MOST_BASES:
        what = "cannot be its own base" if resolved in parents else f"has more than {MOST_BASES} bases"
        raise RecipeError(f"{path}: a recipe {what} ({' -> '.join(map(str, parents))})")
    base = values.pop("base", None)
    if base is None:
        return values
    bases = [base] if isinstance(base, str) else base
    if not isinstance(bases, list) or not bases or not all(isinstance(each, str) for each in bases):
        raise RecipeError(f"{path}: base: must be the path of a recipe, or a list of paths, got {_shown(base)}")
    merged: dict[str, Any] = {}
    for each in bases:
        merged = _merge(merged, _read(_base(path, each), (*parents, resolved), read))
    return _merge(merged, values)


def _base(recipe: Path, name: str) -> Path:
    """The file of a recipe's base: beside it, or else the shipped file of this name."""
    beside = recipe.parent / name
    return beside if beside.exists() else shipped.files().get(shipped.name_of(name), beside)


def _override(text: str) -> dict[str, Any]:
    """What `key=value` asks for, as a recipe that says nothing else."""
    key, equals, written = text.partition("=")
    if not equals or not re.fullmatch(KEY, key) or len(key) > LONGEST_SHOWN:
        raise RecipeError(f"override {_shown(text)} is not of the form key=value")
    try:
        value = parse(written)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {_shown(text)}: the value is not YAML: {error}") from error
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, mapping by mapping; anything else replaces what it covers."""
    merged = dict(below)
    for key, value in above.items():
        covered = merged.get(key)
        merged[key] = _merge(covered, value) if isinstance(covered, dict) and isinstance(value, dict) else value
    return merged


def _explain(error: ValidationError) -> Iterator[str]:
    problems = [(_location(problem["loc"]), problem) for problem in error.errors()[:MOST_PROBLEMS]]
    for location, problem in problems:
        key = ".".join(location)
        if any(len(other) > len(location) and other[: len(location)] == location for other, _ in problems):
            continue  # of a value that may have several forms, the deeper problem is the one to mend
        if problem["type"] == "extra_forbidden":
            yield f"{key}: unknown key; {_hint(location)}"
        elif problem["type"] == "missing":
            yield f"{key}: missing"
        elif problem["type"] == "value_error":  # our own checks across a group name keys and values themselves
            yield f"{key}: {problem['msg'].removeprefix('Value error, ')}"
        elif problem["type"] == "tuple_type":
            yield f"{key}: Input should be a list, such as [{_shown(problem['input'])}], got {_shown(problem['input'])}"
        else:
            forms = [other["msg"] for at, other in problems if at == location]  # of a value that may have several
            if problem["msg"] == forms[0]:
                alternatives = ", or ".join([forms[0], *(form.removeprefix("Input should be ") for form in forms[1:])])
                yield f"{key}: {alternatives}, got {_shown(problem['input'])}"
    if error.error_count() > MOST_PROBLEMS:
        yield f"... and {error.error_count() - MOST_PROBLEMS} more problems"


def _hint(location: Sequence[str]) -> str:
    """What may be meant by the last part of an unknown key."""
    *groups, name = location
    keys, valid = list(_flat(_names())), _keys_at(groups)
    if name in keys:
        group, _, rest = name.partition(".")
        return f"in a file, each group is a mapping of its own: {group}: {{{rest}: ...}}"
    elsewhere = [key for key in keys if key.rpartition(".")[2] == name][:2]
    here = [".".join([*groups, each]) for each in difflib.get_close_matches(name, valid, 1, 0.75 if elsewhere else 0.5)]
    near = here or elsewhere
    return f"did you mean {' or '.join(near)}?" if near else f"valid here: {', '.join(valid)}"


def _names(settings: type[BaseModel] | None = None) -> dict[str, Any]:
    """The names of all keys, as mappings of groups."""
    fields = (settings or Recipe).model_fields
    groups = {field.alias or name: field.annotation for name, field in fields.items()}
    return {
        name: _names(kind) if isinstance(kind, type) and issubclass(kind, BaseModel) else None
        for name, kind in groups.items()
    }


def _shown(value: Any) -> str:
    """A value as a message shows it."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no whole number of thousands of digits
        return "a number with too many digits to show"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _location(parts: Sequence[str | int]) -> list[str]:
    """Keys and list indices; pydantic also names the alternative of a union that it tried, as in `tuple[...]`."""
    return [str(part) for part in parts if not re.match(r"(literal|tuple|function-before)\[.*\]$", str(part))]


def _keys_at(location: Sequence[str]) -> list[str]:
    group: type[BaseModel] = Recipe
    for part in location:
        if not part.isdigit():  # an index: the groups of a list are alike
            group = _group_in(group.model_fields[part].annotation) or group
    return [field.alias or name for name, field in group.model_fields.items()]


def _group_in(annotation: Any) -> type[BaseModel] | None:
    """The settings group that a field holds, alone or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_group_in, get_args(annotation))), None)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
