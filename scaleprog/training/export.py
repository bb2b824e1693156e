"""A run's weights for other programs, under plain timm's names."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from scaleprog.data.augment import normalization
from scaleprog.errors import ScaleprogError
from scaleprog.files.atomic import replaced
from scaleprog.models import resolve_family
from scaleprog.ranks.coordinator import process_group
from scaleprog.recipe import Recipe
from scaleprog.training.saved import Weights, read_saved

Dtype = Literal["float32", "bfloat16", "float16"]
MODEL = "model"
"""The key of a file's metadata with the settings of its model, as JSON."""


def export_run(run: Path, out: Path, weights: Weights = "best", dtype: Dtype = "float32") -> str:
    """Writes a run's weights to `out`, as safetensors under plain timm's names, with what timm needs to show it images.

    Args:
        run: the run directory.
        out: the file.
        weights: "best" takes those with the higher accuracy in the last evaluation; the others need no evaluation.
        dtype: of the floating-point tensors.

    Returns:
        Two lines for the user: what was written, and the call that loads it.

    Raises:
        CheckpointError: the run has no checkpoint, or no evaluation that tells which weights are best, or a run of the
            recipe cannot have written the checkpoint.
        ScaleprogError: `out` cannot be written.
    """
    with process_group() as (coordinator, _):
        saved = read_saved(run, weights, coordinator)
    plain, shown = saved.plain, preprocessing(saved.recipe)
    arguments = dict(plain.arguments)
    if plain.builder == "timm.create_model":  # only that knows it
        arguments["pretrained_cfg_overlay"] = shown
    to = getattr(torch, dtype)
    tensors = {
        name: (tensor.to(to) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in plain.tensors.items()
    }
    about = {"timm": json.dumps(arguments), "weights": saved.weights, "step": str(saved.state.step)}
    about |= {MODEL: saved.model.model_dump_json()}
    about |= {key: json.dumps(value) for key, value in shown.items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replaced(out) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(tensors, temporary, about)
            temporary.chmod(mode)  # safetensors lets nobody else read it
    except (OSError, SafetensorError) as error:
        raise ScaleprogError(f"{out}: cannot write it: {error}") from error
    keywords = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return (
        f"{out}: {saved.weights} weights of step {saved.state.step}, {dtype}\n"
        f"load with: {plain.builder}({keywords}).load_state_dict(safetensors.torch.load_file({str(out)!r}))"
    )


def preprocessing(recipe: Recipe) -> dict[str, Any]:
    """How evaluation prepares images, under timm's names: `timm.data.create_transform` needs them, because its defaults
    for most models are other ones."""
    mean, std = normalization(recipe.augment, recipe.model.channels)
    side = resolve_family(recipe.model)[1].resolution
    return {
        "input_size": (recipe.model.channels, side, side),
        "interpolation": "bicubic",
        "mean": mean,
        "std": std,
        "crop_pct": recipe.augment.eval_crop,
        "crop_mode": "center",
    }
