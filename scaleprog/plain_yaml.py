"""YAML that anybody may have written, as plain values within bounds. Needs no torch, as launchers may not wait for it.

`yaml.safe_load` runs no code, but it expands aliases without end, recurses as deep as a file wants, takes the last of
two equal keys and turns what looks like a date into one. A recipe needs none of that.
"""

import errno
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from scaleprog.errors import CheckpointError, RecipeError, Unavailable
from scaleprog.files import read_text

FILE_BYTES = 2**17
MOST_VALUES = 2000
"""With each alias counted as all that it stands for."""
DEEPEST = 20
LONGEST_TEXT, LONGEST_NUMBER = 4096, 100
RECIPE = "recipe.yaml"
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Reads plain values within bounds; what leaves them is an error of YAML with its line and column."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as its base has it
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0
        self._sizes: dict[Node, int] = {}

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if node not in self._sizes:
                raise _error("an alias inside what it stands for", mark)
            self._values += self._sizes[node]
        else:
            if getattr(event, "tag", None) is not None:
                raise _error("a tag, and only plain values are read", mark)
            before, self._values, self._depth = self._values, self._values + 1, self._depth + 1
            if self._depth > DEEPEST:
                raise _error(f"more than {DEEPEST} levels", mark)
            node = super().compose_node(parent, index)
            self._depth -= 1
            if node is not None:
                _check(node)
                self._sizes[node] = self._values - before
        if self._values > MOST_VALUES:
            raise _error(f"more than {MOST_VALUES} values, aliases counted as what they stand for", mark)
        return node


def parse(text: str) -> Any:
    """The value of a YAML document. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except (ValueError, OverflowError) as error:  # numbers and escapes that only look like some
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises OSError, also for what is no regular file, and RecipeError."""
    try:
        values = parse(read_text(path, FILE_BYTES))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    return values


def read_run(run: Path) -> dict[str, Any]:
    """The recipe of a run directory, which is resolved: one with a base is not one that a run has written.

    Raises CheckpointError, or Unavailable where the file system does not answer.
    """
    path = run / RECIPE
    try:
        values = read_mapping(path)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{run}: no run directory (no {RECIPE}); it is what `scaleprog train` writes") from None
    except OSError as error:
        if error.errno == errno.EFBIG or not path.is_file():
            raise CheckpointError(f"{path}: {error.strerror}; this is no run directory") from error
        raise Unavailable(f"{path}: not readable: {error}") from error
    except RecipeError as error:
        raise CheckpointError(f"{error}; the run directory is damaged") from error
    if "base" in values:
        raise CheckpointError(f"{path}: names a base, and the recipe of a run is complete; no run has written this")
    return values


def _check(node: Node) -> None:
    """Raises yaml.YAMLError for a value that no recipe needs."""
    if isinstance(node, ScalarNode):
        number = node.tag in (f"{_TAG}int", f"{_TAG}float")
        if len(node.value) > (LONGEST_NUMBER if number else LONGEST_TEXT):
            raise _error(f"a {'number' if number else 'text'} of {len(node.value)} characters", node.start_mark)
        if not all(char.isprintable() or char in "\n\t" for char in node.value):
            raise _error("a control character", node.start_mark)
    if not isinstance(node, MappingNode):
        return
    seen: set[Hashable] = set()
    for key, _ in node.value:
        if key.tag not in (f"{_TAG}str", f"{_TAG}merge") or not re.fullmatch(r"[\w.-]{1,200}|<<", key.value):
            shown = repr(key.value[:200]) if isinstance(key, ScalarNode) else "a list or a mapping"
            raise _error(f"a key that is no name: {shown}", key.start_mark)
        if key.value in seen:
            raise _error(f"the key {key.value!r} for the second time", key.start_mark)
        seen.add(key.value)


def _error(problem: str, mark: yaml.Mark) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=f"found {problem}", problem_mark=mark)
