"""A run's weights as a Hugging Face folder, which timm's `local-dir:` and `hf-hub:` load."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from timm.models.volo import VOLO
from torch import nn

from scaleprog.data.manifest import Manifest
from scaleprog.errors import DataError, Unavailable
from scaleprog.files.atomic import read_text
from scaleprog.files.display import counted
from scaleprog.files.location import local_path
from scaleprog.ranks.coordinator import process_group
from scaleprog.recipe import directories
from scaleprog.reporting.model_card import CARD, CURVE
from scaleprog.training.export import Dtype, preprocessing
from scaleprog.training.saved import Saved, Weights, read_saved
from scaleprog.version import VERSION

CONFIG, TENSORS = "config.json", "model.safetensors"
MARK = "scaleprog"
"""The key of config.json by which an earlier export is recognized."""
SIZES = ("img_size", "patch_size", "embed_dim", "embed_dims", "depth", "layers", "num_heads")
ABOUT_MODEL = ("first_conv", "classifier", "fixed_input_size")
"""What stays of timm's configuration of a pretrained model; its license, tag, and origin are those of other weights."""


@dataclass(frozen=True)
class Exported:
    """What a folder holds.

    Args:
        architecture: timm's name of the model.
        sizes: of the model, as timm's arguments.
        parameters: their number.
        weights: "online" or "ema".
        step: of the checkpoint.
        dtype: of the floating-point tensors.
        found: what the last evaluation before the checkpoint found, by name.
        preprocessing: of the images, under timm's names.
        classes: their names; empty if the shards are not here.
        registered: whether timm's `create_model` can build the model.
    """

    architecture: str
    sizes: dict[str, Any]
    parameters: int
    weights: str
    step: int
    dtype: str
    found: dict[str, float]
    preprocessing: dict[str, Any]
    classes: Sequence[str]
    registered: bool

    def loading(self, folder: str) -> str:
        """The Python that loads the model from a folder, and the transform of its images."""
        if self.registered:
            return (
                "import timm\n"
                f"model = timm.create_model({f'local-dir:{folder}'!r}, pretrained=True).eval()\n"
                "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
            )
        config, tensors = (f"{folder}/{name}" for name in (CONFIG, TENSORS))
        return (
            "import json, safetensors.torch, timm\n"
            f"config = json.load(open({config!r}))\n"
            "model = timm.models.volo.VOLO(**config['model_args']).eval()\n"
            f"model.load_state_dict(safetensors.torch.load_file({tensors!r}))\n"
            "transform = timm.data.create_transform(**timm.data.resolve_data_config(config['pretrained_cfg']))"
        )

    def notes(self) -> list[str]:
        """What the user should know besides."""
        notes = []
        if not self.registered:
            notes.append(f"timm.create_model builds no {self.architecture} of this size; VOLO itself does")
        if not self.classes:
            notes.append("the names of the classes are left out: the run's shards are not here")
        return notes

    def summary(self) -> dict[str, str]:
        """What the model is, in a few words each."""
        channels, side, _ = self.preprocessing["input_size"]
        sizes = ", ".join(f"{key}={size}" for key, size in self.sizes.items())
        return {
            "architecture": f"{self.architecture} with {sizes}",
            "parameters": f"{self.parameters / 1e6:.1f} M",
            "images": f"{side} x {side} pixels, {counted(channels, 'channel')}",
            "weights": f"{self.weights}, of step {self.step}, {self.dtype}",
        }


def write_model(run: Path, folder: Path, weights: Weights, dtype: Dtype) -> Exported:
    """Writes the weights of a run's newest checkpoint and their configuration into an empty folder.

    Raises:
        CheckpointError: as `read_saved` does.
        OSError: the folder cannot be written.
    """
    with process_group() as (coordinator, _):
        saved = read_saved(run, weights, coordinator)
    registered = saved.plain.builder == "timm.create_model"
    shown, classes = preprocessing(saved.recipe), _classes(run, saved)
    model = _model(saved, shown, registered)
    about = {"version": VERSION, "weights": saved.weights, "step": saved.state.step}
    save_for_hf(
        model.to(getattr(torch, dtype)),
        str(folder),
        model_config={"label_names": classes, MARK: about},
        model_args={} if registered else saved.plain.arguments,
        safe_serialization=True,
    )
    (folder / TENSORS).chmod((folder / CONFIG).stat().st_mode)  # safetensors lets nobody else read it
    return Exported(
        architecture=saved.model.name,
        sizes={key: size for key, size in saved.plain.arguments.items() if key in SIZES},
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weights=saved.weights,
        step=saved.state.step,
        dtype=dtype,
        found=saved.state.accuracies,
        preprocessing=shown,
        classes=classes,
        registered=registered,
    )


def is_export(folder: Path) -> bool:
    """Whether a folder is an exported model and nothing else, such as a repository with a license."""
    with suppress(OSError, ValueError, RecursionError):
        config = json.loads(read_text(folder / CONFIG))
        others = {path.name for path in folder.iterdir()} - {CONFIG, TENSORS, CARD, CURVE}
        return isinstance(config, dict) and MARK in config and not others
    return False


def _model(saved: Saved, shown: dict[str, Any], registered: bool) -> nn.Module:
    """Plain timm's model with the weights, configured for the images that the run showed it."""
    plain = saved.plain
    model: Any = (timm.create_model if registered else VOLO)(**plain.arguments)
    known: Any = timm.get_pretrained_cfg(saved.model.name, allow_unregistered=False)
    model.pretrained_cfg = {key: known.to_dict()[key] for key in ABOUT_MODEL} | shown
    model.pretrained_cfg |= {"architecture": saved.model.name, "num_classes": saved.model.classes}
    model.load_state_dict(plain.tensors)
    return model


def _classes(run: Path, saved: Saved) -> list[str]:
    """The names of the classes that a run learned; none if its shards are not here, or are others now."""
    data = saved.recipe.located(directories.to_read(run)).data
    if data.manifest is None and local_path(data.path) is None:
        return []  # an export waits for no network
    with suppress(DataError, Unavailable):
        manifest = Manifest.load(data.path, data.manifest)
        now = manifest.identity()["classes"]
        if len(manifest.classes) == saved.model.classes and saved.state.data.get("classes", now) == now:
            return list(manifest.classes)
    return []
