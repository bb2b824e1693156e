"""What TensorBoard shows of a run in pictures: the first images of every phase, its growth, and its history."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from scaleprog.data.augment import normalization
from scaleprog.data.on_device import denormalize
from scaleprog.growth.phase import Phase
from scaleprog.rundir.pictures import MOST_IMAGES
from scaleprog.training.process import Run


def show_first_images(run: Run, phase: Phase, images: Tensor) -> None:
    """Shows images (B, C, r, r) of the first step of a phase, as rank 0's network sees them."""
    if run.coordinator.rank == 0:
        statistics = normalization(run.recipe.augment, run.recipe.model.channels)
        shown = denormalize(images[:MOST_IMAGES].detach().float(), *statistics)
        run.recorder.images(run.state.step + 1, f"views/images_stage_{phase.stage}_{phase.kind}", shown)


def show_growth(run: Run) -> None:
    """Shows which networks have trained, and which one trains now, once there are several."""
    phases = run.plan.schedule.phases(run.state.choices)
    if run.coordinator.rank != 0 or run.state.phase == 0:
        return

    def draw(path: Path) -> None:
        from scaleprog.reporting.figures import Segment, draw_schedules  # matplotlib, which other ranks do not need

        so_far = [Segment(p.stage, p.kind, p.start, p.stop, p.network, 0.0) for p in phases[: run.state.phase + 1]]
        draw_schedules(path, [(run.folder.name, so_far)])

    _show(run, "views/growth", draw)


def show_end(run: Run) -> None:
    """Shows the history of a run that has finished: its growth, starts, stops, and checkpoints."""
    if run.coordinator.rank != 0:
        return

    def draw(path: Path) -> None:
        from scaleprog.reporting.history import read_run
        from scaleprog.reporting.timeline_figure import draw_timelines

        timeline = read_run(run.folder, run.folder.name).timeline
        if timeline is not None:
            draw_timelines(path, [timeline])

    run.recorder.conclude()
    _show(run, "views/timeline", draw)


def _show(run: Run, tag: str, draw: Callable[[Path], None]) -> None:
    """Shows what `draw` writes to a PNG; a run does not end for a picture."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "picture.png"
            draw(path)
            run.recorder.picture(run.state.step, tag, path.read_bytes())
    except Exception as error:
        run.progress.say(f"TensorBoard lacks the picture {tag}: {type(error).__name__}: {error}")
