"""What TensorBoard shows of a run. docs/tensorboard.md has a picture.

TensorBoard names a run after the folder of its event files, so they lie in the run directory itself. It sorts groups of
curves by name, and opens the first two: `train` and `validation`. Names that sort after these have the rest.
"""

import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars, text

from scaleprog.growth.search import Decision
from scaleprog.rundir.appending import Appended
from scaleprog.rundir.drawn import points, story

EVENT_FILE = "events.out.tfevents."
LAYOUT = custom_scalars(  # each chart shows the curves whose names begin with one of its patterns
    {
        "The run": {
            "loss": ["Multiline", ["train/loss$", "validation/val_loss"]],
            "top-1 (%), online and EMA": ["Multiline", ["validation/top1"]],
            "images per second": ["Multiline", ["train/images_per_second$"]],
        }
    }
)


class Board:
    """Curves and texts in a TensorBoard event file.

    TensorBoard's own SummaryWriter cannot handle a full disk: the error in its thread reaches the training loop, and
    the file ends in half a record, which hides everything that is written later.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """Continues what is in a folder. TensorBoard drops everything beyond `step` that earlier starts drew."""
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names, also if a clock has been set back since the last one
        found = (re.match(rf"{re.escape(EVENT_FILE)}([0-9]{{10}}\.[0-9]{{6}})", path.name) for path in folder.iterdir())
        moment = max([time.time(), *(float(match[1]) + 1 for match in found if match)])
        name = f"{EVENT_FILE}{moment:017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._appended = Appended(folder / name)
        self._records = RecordWriter(self._appended)
        self._add(file_version="brain.Event:2")
        self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def lay_out(self) -> None:
        """Arranges the main curves under "Custom Scalars"."""
        self._add(step=0, summary=LAYOUT)

    def draw(self, row: Mapping[str, Any]) -> None:
        """Draws one point of each number in a row of metrics.jsonl."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in points(row).items()]
        self._add(step=row["step"], summary=Summary(value=values), wall_time=row.get("time", time.time()))

    def curve(self, step: int, tag: str, values: Mapping[str, float]) -> None:
        """Draws one point of each value, as `tag/NAME`."""
        points = [Summary.Value(tag=f"{tag}/{name}", simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=Summary(value=points))

    def tell(self, step: int, decision: Decision, unit: str) -> None:
        """Writes what a search found and chose as a text; `unit` is that of the candidates' times."""
        self._add(step=step, summary=text(f"search/stage_{decision.stage}", story(decision, unit)))

    def sync(self) -> bool:
        """Makes everything durable. Returns whether the disk has taken it."""
        self._appended.write()
        return self._appended.sync()

    def close(self) -> None:
        self._appended.write()
        self._appended.close()

    def _add(self, **event: Any) -> None:
        self._records.write(Event(**{"wall_time": time.time(), **event}).SerializeToString())


def event_files(folder: Path) -> list[Path]:
    """TensorBoard's files in a folder, which need not exist."""
    return list(folder.glob(f"{EVENT_FILE}*"))
