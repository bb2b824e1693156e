"""The label of a sample: the number or the name of a class, in KEY.cls or else in a field of KEY.json."""

import json
from collections import Counter
from collections.abc import Container, Sequence

from scaleprog.data import tar

KINDS = ("cls", "json")
FIELDS = ("cls", "label")
LONGEST_NAME, LONGEST_JSON = 200, 2**20


def kind_of(extensions: Container[str]) -> str | None:
    """Which of a sample's files holds its label; None if none does."""
    return next((kind for kind in KINDS if kind in extensions), None)


def parse(kind: str, content: bytes) -> int | str:
    """The label in a `.cls` or `.json` file: a number, which may be negative, or a name. Raises ValueError."""
    if kind == "json":
        return _of_json(content)
    if (number := tar.label(content)) is not None:
        return number
    try:
        return _name(content.decode("utf-8"))
    except ValueError:
        raise ValueError(
            f"its label (.cls) is {content.strip()[:20]!r}, neither the number nor the name of a class; rebuild the "
            "shard"
        ) from None


class Numbering:
    """The number of each class of a data set."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.count = len(classes)
        often = Counter(classes)
        self._numbers = {name: number for number, name in enumerate(classes) if often[name] == 1}

    def number(self, label: int | str) -> int:
        """The number of the class of a label. Raises ValueError, which ends in what to do."""
        number = self._numbers.get(label) if isinstance(label, str) else label
        if number is None:
            raise ValueError(
                f"label {label!r} is not one of the {self.count} class names that occur once in the manifest; "
                "add it there"
            )
        if not 0 <= number < self.count:
            raise ValueError(
                f"label {number} is outside 0-{self.count - 1}, the manifest's {self.count} classes; "
                "add the missing classes to the manifest or rebuild the shard"
            )
        return number


def _of_json(content: bytes) -> int | str:
    try:
        if len(content) > LONGEST_JSON:
            raise ValueError
        fields = json.loads(content)
        found = next(fields[field] for field in FIELDS if field in fields)
        if type(found) is int:
            return found
        number = tar.label(found.encode())
        return _name(found) if number is None else number
    except (ValueError, TypeError, AttributeError, StopIteration, RecursionError):
        raise ValueError(
            f"its label (.json) is not in a field {' or '.join(FIELDS)} with the number or the name of a class; "
            "rebuild the shard"
        ) from None


def _name(text: str) -> str:
    name = text.strip()
    if not name or not (name[0].isalpha() or name[0] == "_") or len(name) > LONGEST_NAME or not name.isprintable():
        raise ValueError
    return name
