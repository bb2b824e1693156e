"""What a newcomer sees in TensorBoard: a real server over what the recorder writes, and a real browser."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import torch
from PIL import Image

from scaleprog.rundir.board import About
from scaleprog.rundir.recorder import Recorder
from tests.unit.browser import Page, browsing
from tests.unit.test_recorder import DECISION, recorder, train

pytestmark = pytest.mark.process
CHROMIUM = shutil.which("chromium")
SECONDS = 60  # for TensorBoard to start and to read its files on a busy machine
TEXT, RECIPE, IMAGES = "search/stage_2/text_summary", "run/recipe/text_summary", "views/images_stage_1_train"
RESUMED = "linear"
RUNS = ("autoprog", "linear", "original", "sweep/lr=0.1", "sweep/lr=0.2")


RATES = {"sweep/lr=0.1": 0.1, "sweep/lr=0.2": 0.2}


def show_images(record: Recorder, step: int) -> None:
    record.images(step, IMAGES, torch.full((4, 8, 8, 1), 10 * step, dtype=torch.uint8))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where TensorBoard shows five runs of two ranks.

    One of them was killed after step 8, resumed from step 5, and later from step 9 on a single rank.
    """
    root = tmp_path_factory.mktemp("runs with spaces")
    for name in RUNS:
        (root / name).mkdir(parents=True)
        for rank in range(2):
            rate = RATES.get(name)
            about = About({"optimizer.lr": rate, "augment.crop": "padded"}, f"lr: {rate}\n") if rate else None
            record = recorder(root / name, rank, world=2, rank_curves=False, about=about)
            if name == RESUMED:
                show_images(record, 3)
                show_images(record, 6)
            train(record, *range(1, 9))
            record.evaluation(8, {"top1": 50.0, "top5": 90.0, "val_loss": 1.5, "top1_ema": 60.0, "train_seconds": 2.0})
            if name == "autoprog":
                record.choice(6, DECISION)
            if rate:
                record.conclude()
            record.close()
    for generation, world, first, last_step in ((2, 2, 6, 10), (3, 1, 10, 12)):
        for rank in range(world):
            record = recorder(root / RESUMED, rank, world, generation, first - 1, rank_curves=False)
            if generation == 2:
                show_images(record, 6)
            train(record, *range(first, last_step + 1))
            record.close()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", root, "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        told = next(line for line in server.stderr if " at http://" in line)
        found = re.search(r"http://[0-9.:]+", told)
        assert found is not None
        try:
            wait_for(found[0])
            yield found[0]
        finally:
            server.terminate()


def wait_for(address: str) -> None:
    """Waits until TensorBoard has read the last point of every run."""
    limit = time.monotonic() + SECONDS
    while not all(
        name in fetch(address, "scalars/tags") and losses(address, name)[-1:] == [last(name)] for name in RUNS
    ):
        assert time.monotonic() < limit, "TensorBoard has not read the runs"
        time.sleep(0.2)


def last(run: str) -> int:
    return 12 if run == RESUMED else 8


def losses(address: str, run: str) -> list[int]:
    """The steps of a run's training loss."""
    return [step for _, step, _ in fetch(address, "scalars/scalars", run=run, tag="train/loss")]


def fetch(address: str, what: str, **query: str) -> Any:
    """What one of TensorBoard's plugins answers."""
    with urlopen(f"{address}/data/plugin/{what}?{urlencode(query)}", timeout=SECONDS) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def page(address: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first page of TensorBoard as a browser shows it, before any click."""
    if CHROMIUM is None:
        pytest.skip("no chromium; make test installs it where root and apt are available")
    profile = tmp_path_factory.mktemp("profile")
    flags = "--headless=new --no-sandbox --disable-gpu --window-size=1600,1200 --virtual-time-budget=30000 --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", address]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=2 * SECONDS).stdout


def test_each_run_has_its_name_and_a_color_of_its_own(page: str) -> None:
    assert sorted(re.findall(r'data-id="defaultExperimentId/([^"]*)"', page)) == sorted(RUNS)
    colors = re.findall(r'class="run-color-swatch" style="background: ([^;]*);"', page)
    assert len(colors) == len(set(colors)) == len(RUNS)


def test_speed_loss_and_accuracy_are_seen_without_a_click(page: str) -> None:
    cards = re.findall(r'<tb-truncated-path[^>]*title="([^"]*)"', page)
    assert cards[:4] == ["train/images_per_second", "train/loss", "validation/top1", "validation/top1_ema"]
    loss = page.split('title="train/loss"')[1].split("</scalar-card>")[0]
    assert "<canvas" in loss
    shown = " ".join(re.sub(r"<!--.*?-->|<[^>]+>", " ", loss).split())
    for name in RUNS:  # name, smoothed value, value, step
        assert re.search(rf"{re.escape(name)} [0-9.]+ {last(name)} {last(name)} ", shown), shown


def test_the_groups_of_curves_sort_by_weight(address: str) -> None:
    for name, tags in fetch(address, "scalars/tags").items():
        groups = {tag.split("/")[0] for tag in tags}
        assert sorted(groups) == ["train", "validation", "vitals"], name
        assert {"train/loss", "train/images_per_second", "validation/top5", "validation/val_loss"} <= tags.keys()
        assert not {"step", "phase", "time", "images"} & {tag.split("/")[1] for tag in tags}
        assert len([tag for tag in tags if tag.startswith("train/")]) == 2


def test_a_resumed_run_shows_every_step_once(address: str) -> None:
    assert losses(address, RESUMED) == [2, 4, 6, 8, 10, 12]


def test_custom_scalars_compare_what_belongs_together(address: str) -> None:
    (category,) = fetch(address, "custom_scalars/layout")["category"]
    assert category["title"] == "The run"
    drawn = {}
    for chart in category["chart"]:
        found = [
            fetch(address, "custom_scalars/scalars", run=RESUMED, tag=pattern)["tag_to_events"]
            for pattern in chart["multiline"]["tag"]
        ]
        drawn[chart["title"]] = sorted(tag for tags in found for tag in tags)
    assert drawn == {
        "loss": ["train/loss", "validation/val_loss"],
        "top-1 (%), online and EMA": ["validation/top1", "validation/top1_ema"],
        "images per second": ["train/images_per_second"],
    }


def test_a_search_is_one_table(address: str) -> None:
    assert fetch(address, "text/tags") == {"autoprog": [TEXT], **{name: [RECIPE] for name in RATES}}
    (text,) = fetch(address, "text/text", run="autoprog", tag=TEXT)
    assert text["step"] == 6
    assert "<strong>16 px, 2 layers</strong>" in text["text"]
    assert "nothing is lost by 2 candidates: the cheaper one is taken" in text["text"]
    rows = re.findall(r"<tr>(.*?)</tr>", text["text"], re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    assert cells == [
        ["candidate", "loss", "step ms", "score", "chosen"],
        ["16x2", "1.5000", "125", "0.0000", "chosen"],
        ["16x4", "1.2500", "250", "0.0000", ""],
        ["32x4", "1.1250", "1000", "–", ""],
    ]


def test_pictures_of_a_step_that_was_trained_twice_are_shown_once(address: str) -> None:
    (tags,) = fetch(address, "images/tags").items()
    assert tags[0] == RESUMED
    shown = fetch(address, "images/images", run=RESUMED, tag=IMAGES, sample="0")
    assert [picture["step"] for picture in shown] == [3, 6]
    with urlopen(f"{address}/data/plugin/images/individualImage?{shown[1]['query']}", timeout=SECONDS) as answer:
        image = Image.open(answer)
        assert image.size == (2 * 96 + 1, 2 * 96 + 1)
        assert [image.getpixel(at) for at in ((0, 0), (96, 0), (192, 192))] == [(60,) * 3, (255,) * 3, (60,) * 3]


def test_the_recipe_is_a_text(address: str) -> None:
    (told,) = fetch(address, "text/text", run="sweep/lr=0.2", tag=RECIPE)
    assert "<code>lr: 0.2\n</code>" in told["text"]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A tab of a browser."""
    if CHROMIUM is None:
        pytest.skip("no chromium; make test installs it where root and apt are available")
    with browsing(CHROMIUM, tmp_path_factory.mktemp("profile")) as page:
        yield page


def test_the_table_of_runs_compares_settings_and_accuracies(address: str, tab: Page) -> None:
    tab.open(f"{address}/#hparams")
    shown = tab.text_with(r"Show Metrics.*lr=0\.1.*lr=0\.2.*Color by", SECONDS)
    table = re.search(r"Show Metrics(.*?)Color by", shown, re.DOTALL)
    assert table is not None
    settings = ["optimizer.lr", "augment.crop"]  # first those that differ
    curves = ["train/images_per_second", "train/loss", "validation/top1", "validation/top1_ema", "validation/top5"]
    head, *rows = re.split(r"\n(?=sweep)", table[1].strip())
    assert head.split("\n") == settings + curves
    for row, (name, rate) in zip(rows, RATES.items(), strict=True):
        shown_name, shown_rate, crop, _, *last_points = row.split("\n")
        assert (shown_name, float(shown_rate), crop) == (name, rate, "padded")
        assert [float(point) for point in last_points] == [8.0, 50.0, 60.0, 90.0]


def test_pictures_are_seen(address: str, tab: Page) -> None:
    tab.open(f"{address}/#images")
    shown = tab.text_with(rf"{re.escape(IMAGES)}\n{RESUMED}\ntag:.*step\n6\n", SECONDS)
    assert shown.count(f"tag:\n{IMAGES}\n") == 1
