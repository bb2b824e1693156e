"""What a group of recipe settings is: a small, typed, immutable model. Every number has a range.

No honest recipe leaves these ranges, and each kind of range has its name here: a recipe may come from anybody, and what
nothing can train is refused before it takes memory or time.
"""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

from scaleprog.files.location import check_location

MOST_RANKS = 2**16
MOST_CLASSES = 10**6
MOST_PIXELS = 4096
"""Of a side of what a network is shown."""


class Settings(BaseModel):
    """Base of every settings group: unknown keys are errors, values are checked, nothing changes afterwards."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        serialize_by_alias=True,
    )


def number(value: Any) -> Any:
    """The value, unless it is YAML's yes or no."""
    if isinstance(value, bool):  # to Python, these are 1 and 0
        raise PydanticCustomError("number", "Input should be a number")
    return value


def printable(text: str) -> str:
    if not text.isprintable():
        raise PydanticCustomError("printable", "Input should be text without control characters")
    return text


def _local(path: str) -> str:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", path):
        raise PydanticCustomError(
            "local",
            "Input should be a path: scaleprog does not read URLs or pipes (write ./ before a name with a colon)",
        )
    return path


_Number = BeforeValidator(number)

Number = Annotated[float, _Number]
"""One whose bounds a group checks itself."""
Index = Annotated[int, _Number]

Text = Annotated[str, StringConstraints(max_length=200), AfterValidator(printable)]
LocalPath = Annotated[str, StringConstraints(max_length=4096), AfterValidator(printable), AfterValidator(_local)]

Location = Annotated[str, StringConstraints(max_length=4096), AfterValidator(printable), AfterValidator(check_location)]
"""A local path, or a URL of an allowed protocol."""

Pixels = Annotated[int, Field(ge=1, le=MOST_PIXELS), _Number]
Layers = Annotated[int, Field(ge=1, le=256), _Number]
Width = Annotated[int, Field(ge=1, le=2**16), _Number]
"""Of an embedding, and heads that share it."""
Classes = Annotated[int, Field(ge=1, le=MOST_CLASSES), _Number]
Channels = Annotated[int, Field(ge=1, le=16), _Number]
Images = Annotated[int, Field(ge=1, le=2**20), _Number]
"""In one batch."""
Subset = Annotated[int, Field(ge=1, le=10**9), _Number]
"""Images or shards of a data set."""
Ranks = Annotated[int, Field(ge=1, le=MOST_RANKS), _Number]
"""Or lanes, of which each rank has one or more."""
RankNumber = Annotated[int, Field(ge=0, lt=MOST_RANKS), _Number]
Workers = Annotated[int, Field(ge=0, le=256), _Number]
Mebibytes = Annotated[int, Field(ge=0, le=2**24), _Number]
Gibibytes = Annotated[int, Field(ge=1, le=2**20), _Number]
Margin = Annotated[int, Field(ge=0, le=MOST_PIXELS), _Number]
"""Pixels around an image."""
Few = Annotated[int, Field(ge=1, le=1000), _Number]
"""How often something is done, or how many are kept ready."""
Stages = Annotated[int, Field(ge=1, le=32), _Number]
Steps = Annotated[int, Field(ge=1, le=10**9), _Number]
NoOrMoreSteps = Annotated[int, Field(ge=0, le=10**9), _Number]
WholeEpochs = Annotated[int, Field(ge=1, le=10**5), _Number]
Epochs = Annotated[float, Field(gt=0, le=10**5), _Number]
NoOrMoreEpochs = Annotated[float, Field(ge=0, le=10**5), _Number]
Minutes = Annotated[float, Field(gt=0, le=10**6), _Number]
PatienceMinutes = Annotated[float, Field(ge=0.01, le=10**6), _Number]
"""Less would end every run."""
Rate = Annotated[float, Field(gt=0, le=10**3), _Number]
"""A learning rate."""
NoOrMore = Annotated[float, Field(ge=0, le=10**3), _Number]
"""A learning rate or weight decay that may be 0."""
Norm = Annotated[float, Field(gt=0, le=10**6), _Number]
Share = Annotated[float, Field(ge=0, le=1), _Number]
"""A part of a whole, or a probability."""
Momentum = Annotated[float, Field(ge=0, lt=1), _Number]
"""Or any other part that cannot be the whole."""
Part = Annotated[float, Field(gt=0, le=1), _Number]
Strength = Annotated[float, Field(ge=0, le=10), _Number]
Deviation = Annotated[float, Field(ge=1e-3, le=10**3), _Number]
Aspect = Annotated[float, Field(gt=0, le=100), _Number]


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up; exact for numbers of any size."""
    return -(-a // b)
