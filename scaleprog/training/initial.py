"""The weights that a run begins with if its recipe names some: where they come from, and how they become a network."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from torch import Tensor

from scaleprog.data.augment import normalization
from scaleprog.errors import AbsentWeights, CheckpointError, RecipeError
from scaleprog.files.atomic import open_regular
from scaleprog.growth.operators import LayerMap, fresh, grow
from scaleprog.models import resolve_family
from scaleprog.models.given import Given, fit
from scaleprog.ranks.coordinator import Coordinator
from scaleprog.recipe import Recipe
from scaleprog.recipe.keys import TIMM, ModelSettings
from scaleprog.training.process import Run
from scaleprog.training.saved import read_saved

SUFFIX = ".safetensors"
HUB_FILE = "model.safetensors"
"""The file in which timm keeps the weights of a model on the hub."""


def build_initial(run: Run, layer_map: LayerMap, may_skip_layers: bool) -> None:
    """Builds a network that starts from scratch or, if the recipe says so, from given weights.

    Given weights of fewer layers grow by the recipe's operator to the depth of `layer_map`.

    Raises:
        RecipeError: the weights are missing, damaged, or do not fit the recipe's model.
        CheckpointError: the run that should give them has no checkpoint, or they have changed since this run began.
    """
    backend = run.backend
    if run.recipe.init.source is None and not run.state.weights:
        backend.regrow(layer_map, inherit=False, may_skip_layers=may_skip_layers)
        return
    schedule = run.plan.schedule
    first, least = schedule.phases(())[0], layer_map.depths
    if first.searched and not schedule.recycle:  # the network that it chooses begins with the same weights
        least = schedule.split(first.candidates[0].depth)
    given = _given(run, least)
    grows = given.depths != layer_map.depths
    backend.regrow(
        fresh(given.depths), inherit=False, may_skip_layers=may_skip_layers and not grows, given=given.tensors
    )
    if grows:
        growth = grow(run.recipe.growth.operator, given.depths, layer_map.depths)
        backend.regrow(growth, inherit=False, may_skip_layers=may_skip_layers)


def _given(run: Run, first: tuple[int, ...]) -> Given:
    """The weights that a run begins with, reported; `first`: layers of each group of its first network.

    The state keeps their checksum: a resume does not read them again, and a network that starts over takes no others.
    """
    source, state = run.recipe.init.source, run.state
    where = f"init.from: {source}"
    plain = read_plain(run.recipe, run.coordinator)
    checksum = checksum_of(plain)
    run.coordinator.verify("initial weights", checksum)
    if state.weights not in ("", checksum):
        raise CheckpointError(
            f"{where}: the network starts over, but not with the weights that the run began with: their checksum was "
            f"{state.weights[:12]} and is {checksum[:12]}; put the old ones back, or start a new run"
        )
    state.weights = checksum
    given = fit(run.plan.family, run.recipe.model, first, plain, where)
    run.recorder.event(
        "init", step=state.step, source=source, sha256=checksum, taken=given.taken,
        depths=given.depths, resampled=given.resampled, left=given.left, new=given.new,
    )  # fmt: skip
    run.progress.say(f"{where}: {given.report()}")
    if source == TIMM and (unlike := _shown_otherwise(run.recipe)):
        run.progress.say(f"{where}: {unlike}")
    return given


def timms_images(model: ModelSettings) -> Mapping[str, Any]:
    """How timm shows images to its weights for a model, as settings; empty if it has none, or none of these sizes."""
    found = timm.get_pretrained_cfg(model.name, allow_unregistered=True)
    resized = any((model.patch, model.width, model.depth, model.heads))
    if found is None or not found.has_weights or resized or len(found.mean) != model.channels:
        return {}
    return {"mean": found.mean, "std": found.std, "eval_crop": found.crop_pct}


def _shown_otherwise(recipe: Recipe) -> str:
    """What to set so that timm's weights see images as they have always seen them; empty if they do."""
    theirs, ours = timms_images(recipe.model), normalization(recipe.augment, recipe.model.channels)
    if not theirs or (tuple(theirs["mean"]), tuple(theirs["std"])) == ours:
        return ""
    keys = " ".join(f"augment.{key}={list(theirs[key])}" for key in ("mean", "std"))
    return f"these weights were trained on images normalized otherwise than by this recipe: {keys}".replace(", ", ",")


def read_plain(recipe: Recipe, coordinator: Coordinator) -> Mapping[str, Tensor]:
    """The tensors that a recipe names, on every rank, under plain timm's names; raises what `build_initial` raises."""
    source = recipe.init.source
    if source is None:
        raise RecipeError("init.from: the run began with given weights and starts over from them; name them again")
    if source == TIMM:
        return read_tensors(Path(coordinator.on_rank_0("timm's weights", lambda: _from_hub(recipe.model.name))))
    if source.endswith(SUFFIX):
        return read_tensors(Path(source))
    with _legible(Path(source)):
        is_folder = Path(source).is_dir()
    if not is_folder:
        raise AbsentWeights(f"init.from: {source} is neither timm, nor a {SUFFIX} file, nor the directory of a run")
    saved = read_saved(Path(source), recipe.init.weights, coordinator)
    theirs, ours = (resolve_family(model)[0] for model in (saved.model, recipe.model))
    if theirs is not ours:
        raise RecipeError(
            f"init.from: {source} trained {saved.model.name}, and its weights do not fit another family; set "
            f"model.name to one like it, not to {recipe.model.name}, or give the directory of another run"
        )
    return saved.plain.tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, sorted by name. Raises RecipeError."""
    with _legible(path), open_regular(path) as file:
        tensors = safetensors.torch.load(file.read())  # no memory map: if the file system fails, the process must not
    return dict(sorted(tensors.items()))  # safetensors lists them in another order each time


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises RecipeError."""
    with _legible(path), open_regular(path), safetensors.safe_open(path, "pt") as file:
        return file.metadata() or {}


@contextmanager
def _legible(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise AbsentWeights(f"{path}: no such file of weights") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise RecipeError(
            f"{path}: not a whole safetensors file ({error}); copy it again, or write it with `scaleprog export` or "
            "safetensors.torch.save_file"
        ) from error


def checksum_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, types, and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _from_hub(name: str) -> str:
    """The file of timm's pretrained weights of a model, in huggingface's cache. Raises RecipeError."""
    config: Any = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise RecipeError(f"init.from: timm has no weights of {name} on the hub; give a {SUFFIX} file")
    file = config.hf_hub_filename or HUB_FILE
    try:
        return hf_hub_download(config.hf_hub_id, file)
    except OSError as error:
        raise RecipeError(
            f"init.from: timm: {file} of huggingface.co/{config.hf_hub_id} is not in the cache and cannot be "
            f"downloaded ({str(error).splitlines()[0]}). Where there is a network, run `hf download {config.hf_hub_id} "
            f"{file}`; then copy the file here, and set init.from to its path"
        ) from error
