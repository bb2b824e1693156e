"""Reads untrusted YAML as plain values within bounds. Imports no torch, because launchers should not wait for it.

`yaml.safe_load` runs no code, but it expands aliases without limit, recurses to any depth, takes the last of two equal
keys, and turns text that looks like a date into a date. A recipe needs none of that.
"""

import errno
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from scaleprog.errors import CheckpointError, RecipeError, Unavailable
from scaleprog.files.atomic import read_text

FILE_BYTES = 2**17
MOST_VALUES = 2000
"""The most values in a file after the expansion of aliases."""
DEEPEST = 20
LONGEST_TEXT, LONGEST_NUMBER = 4096, 100
RECIPE = "recipe.yaml"
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Reads plain values within bounds; anything else is a YAML error with its line and column."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - like the base class
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
                raise _error("an alias inside its own value", mark)
            self._values += self._sizes[node]
        else:
            if getattr(event, "tag", None) is not None:
                raise _error("a tag; scaleprog reads only plain values", mark)
            before, self._values, self._depth = self._values, self._values + 1, self._depth + 1
            if self._depth > DEEPEST:
                raise _error(f"more than {DEEPEST} levels", mark)
            node = super().compose_node(parent, index)
            self._depth -= 1
            if node is not None:
                _check(node)
                self._sizes[node] = self._values - before
        if self._values > MOST_VALUES:
            raise _error(f"more than {MOST_VALUES} values after expanding aliases", mark)
        return node


def parse(text: str) -> Any:
    """The value of a YAML document. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except (ValueError, OverflowError) as error:  # malformed numbers and escapes
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises OSError, also for anything but a regular file, and RecipeError."""
    try:
        values = parse(read_text(path, FILE_BYTES))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe must be a mapping of keys to values")
    return values


def read_run(run: Path) -> dict[str, Any]:
    """The resolved recipe of a run directory. Refuses a recipe with a base, because no run writes one.

    Raises CheckpointError, or Unavailable if the file system does not respond.
    """
    path = run / RECIPE
    try:
        values = read_mapping(path)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{run}: not a run directory (no {RECIPE}); `scaleprog train` creates one") from None
    except OSError as error:
        if error.errno == errno.EFBIG or not path.is_file():
            raise CheckpointError(f"{path}: {error.strerror}; this is not a run directory") from error
        raise Unavailable(f"{path}: not readable: {error}") from error
    except RecipeError as error:
        raise CheckpointError(f"{error}; the run directory is damaged") from error
    if "base" in values:
        raise CheckpointError(f"{path}: has the key `base`, so no run wrote it: a run's recipe is complete")
    return values


def _check(node: Node) -> None:
    """Raises yaml.YAMLError for a value that no recipe needs."""
    if isinstance(node, ScalarNode):
        number = node.tag in (f"{_TAG}int", f"{_TAG}float")
        if number and re.match(r"[-+]?(0[0-9_]|[0-9_]+:)", node.value):
            wrong = f"the number {node.value[:40]}, which YAML reads in base {60 if ':' in node.value else 8}"
            hint = ", or put A:B after --sweep" if ":" in node.value else ""
            raise _error(f"{wrong}; write it without {'colons' if hint else 'leading zeros'}{hint}", node.start_mark)
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
            raise _error(f"a key that is not a name: {shown}", key.start_mark)
        if key.value in seen:
            raise _error(f"the key {key.value!r} twice", key.start_mark)
        seen.add(key.value)


def _error(problem: str, mark: yaml.Mark) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=f"found {problem}", problem_mark=mark)
