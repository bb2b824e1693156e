"""What TensorBoard shows of a run in pictures, and that it shows it once."""

import io
import shutil
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from scaleprog.data.on_device import denormalize, normalize
from scaleprog.rundir.pictures import LEAST_SIDE, MOST_IMAGES, grid
from tests.compare import texts
from tests.conftest import MakeRecipe, run


def read(png: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.mark.parametrize("channels", [1, 3])
def test_denormalized_images_are_those_that_were_normalized(channels: int) -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(channels).view(1, 16, 16, channels)
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    assert torch.equal(denormalize(normalize(images, mean, std), mean, std), images)
    beyond = torch.tensor([-1e3, 1e3]).view(1, 1, 1, 2).expand(1, channels, 1, 2)
    assert denormalize(beyond, mean, std).unique().tolist() == [0, 255]


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (5, 3, 2), (16, 4, 4), (40, 4, 4)])
def test_a_grid_has_every_image_in_its_place(count: int, columns: int, rows: int) -> None:
    images = torch.randint(0, 200, (count, 32, 48, 3), dtype=torch.uint8)
    shown, scale = read(grid(images)), LEAST_SIDE // 48
    height, width = 32 * scale + 1, 48 * scale + 1
    assert shown.shape == (rows * height - 1, columns * width - 1, 3)
    for number in range(min(count, MOST_IMAGES)):
        row, column = divmod(number, columns)
        part = shown[row * height :, column * width :][: height - 1 : scale, : width - 1 : scale]
        assert np.array_equal(part, images[number].numpy()), number


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_than_three_channels_are_shown_gray(channels: int) -> None:
    images = torch.full((1, LEAST_SIDE, LEAST_SIDE, channels), 7, dtype=torch.uint8)
    assert np.array_equal(read(grid(images)), np.full((LEAST_SIDE, LEAST_SIDE, 3), 7))


@pytest.mark.process
def test_a_run_shows_recipe_settings_images_growth_and_history_once_over_restarts(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe, folder = make_recipe(growth={"schedule": "linear", "stages": 2}, train={"epochs": 2}), tmp_path / "run"
    run(recipe, folder, max_steps=3)
    run(recipe, folder, max_steps=22)
    assert pictures(folder)["views/growth"] == [21]
    shutil.rmtree(folder / "checkpoints" / "step-00000022")  # so that the growth after step 20 is repeated
    run(recipe, folder)
    assert pictures(folder) == {
        "views/growth": [21],
        "views/images_stage_1_train": [1],
        "views/images_stage_2_train": [21],
        "views/timeline": [40],
    }
    (told,) = texts(folder).values()
    assert textwrap.dedent(told) == recipe.dump(), "train.max_steps says where a single start ends"
    events = EventAccumulator(str(folder)).Reload()
    told = events.PluginTagToContent("hparams")
    content = HParamsPluginData.FromString(told["_hparams_/session_start_info"])
    settings = content.session_start_info.hparams
    assert settings["growth.schedule"].string_value == "linear"
    assert settings["optimizer.weight_decay"].number_value == 0.05, "the default, which other runs may not have"
    assert settings["optimizer.clip"].string_value == "null"
    assert settings["train.deterministic"].HasField("bool_value")
    assert "_hparams_/session_end_info" in told


def pictures(folder: Path) -> dict[str, list[int]]:
    """The steps of every picture as TensorBoard shows them."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}
