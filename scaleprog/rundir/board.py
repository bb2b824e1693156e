"""What TensorBoard shows of a run. docs/tensorboard.md has a picture.

TensorBoard names a run after the folder of its event files, so they lie in the run directory itself. It sorts groups of
curves by name, and opens the first two: `train` and `validation`. Names that sort after these have the rest.
"""

import errno
import json
import os
import re
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars, text

from scaleprog.files.atomic import open_regular, write_parts
from scaleprog.growth.search import Decision
from scaleprog.recipe import Recipe
from scaleprog.rundir.appending import Appended
from scaleprog.rundir.drawn import points, story

EVENT_FILE = "events.out.tfevents."
RECIPE = "run/recipe"
OF_RECIPE = (metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG, f"{RECIPE}/text_summary")
"""The tags that speak of a run's settings, recipe, and end."""
LAYOUT = custom_scalars(  # each chart shows the curves whose names begin with one of its patterns
    {
        "The run": {
            "loss": ["Multiline", ["train/loss$", "validation/val_loss"]],
            "top-1 (%), online and EMA": ["Multiline", ["validation/top1"]],
            "images per second": ["Multiline", ["train/images_per_second$"]],
        }
    }
)


@dataclass(frozen=True)
class About:
    """What a board says of a run at its beginning.

    Args:
        settings: the columns of a run in TensorBoard's table of runs, by dotted key; lists and null are shown as text.
        recipe: the resolved recipe, as YAML.
    """

    settings: Mapping[str, Any]
    recipe: str

    @classmethod
    def of(cls, recipe: Recipe) -> "About":
        """What a recipe says, but for `train.max_steps`: that is where a single start ends."""
        train = recipe.train.model_copy(update={"max_steps": None})
        whole = recipe.model_copy(update={"train": train})
        return cls(whole.settings(), whole.dump())


class Board:
    """Curves, texts and pictures in a TensorBoard event file.

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

    def introduce(self, about: About) -> None:
        """Writes the run's recipe as a text, and its settings into the table of runs.

        Without a summary of a whole experiment, TensorBoard makes the table's columns from the settings of all runs,
        and from the last points of their curves.
        """
        started = SessionStartInfo(start_time_secs=time.time())
        for key, value in about.settings.items():
            shown = value if isinstance(value, bool | int | float | str) else json.dumps(value)
            form = (
                "bool_value"
                if isinstance(shown, bool)
                else "string_value"
                if isinstance(shown, str)
                else "number_value"
            )
            setattr(started.hparams[key], form, shown)
        self._add_session(metadata.SESSION_START_INFO_TAG, session_start_info=started)
        self._add(step=0, summary=text(RECIPE, indent(about.recipe, "    ")))

    def conclude(self) -> None:
        """Marks the run as finished in the table of runs."""
        ended = SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
        self._add_session(metadata.SESSION_END_INFO_TAG, session_end_info=ended)

    def draw(self, row: Mapping[str, Any]) -> None:
        """Draws one point of each number in a row of metrics.jsonl."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in points(row).items()]
        self._add(step=row["step"], summary=Summary(value=values), wall_time=row.get("time", time.time()))

    def curve(self, step: int, tag: str, values: Mapping[str, float]) -> None:
        """Draws one point of each value, as `tag/NAME`."""
        points = [Summary.Value(tag=f"{tag}/{name}", simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=Summary(value=points))

    def picture(self, step: int, tag: str, png: bytes) -> None:
        """Shows a PNG."""
        width, height = struct.unpack(">II", png[16:24])
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
        self._add(step=step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))

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

    def _add_session(self, tag: str, **told: Any) -> None:
        content = HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **told).SerializeToString()
        plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=content)
        self._add(step=0, summary=Summary(value=[Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))]))

    def _add(self, **event: Any) -> None:
        self._records.write(Event(**{"wall_time": time.time(), **event}).SerializeToString())


def reintroduce(folder: Path, about: About, step: int) -> None:
    """Replaces what the board of a run says of its settings and recipe, and removes that it has ended.

    TensorBoard keeps what it reads first of these, so the old records are cut out of the files. All others stay.

    Args:
        folder: the run directory; one without a board stays as it is.
        about: what to say instead.
        step: the step from which the run continues.

    Raises:
        OSError: the files cannot be read or written now.
    """
    files = event_files(folder)
    for path in files:
        with open_regular(path, "rb") as file:
            records = list(_records(file.read()))
        kept = [record for record in records if not any(tag.encode() in record for tag in OF_RECIPE)]
        if len(kept) < len(records):
            write_parts(path, kept)
    if files:
        board = Board(folder, step)
        board.introduce(about)
        taken = board.sync()
        board.close()
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _records(content: bytes) -> Iterator[bytes]:
    """The records of an event file, each with its length and its checksums; without what is torn at the end."""
    begin = 0
    while begin + 8 <= len(content):
        end = begin + 16 + struct.unpack_from("<Q", content, begin)[0]
        if end > len(content):
            return
        yield content[begin:end]
        begin = end


def event_files(folder: Path) -> list[Path]:
    """TensorBoard's files in a folder, which need not exist."""
    return list(folder.glob(f"{EVENT_FILE}*"))
