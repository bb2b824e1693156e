"""Every key of a recipe with its type, default, range and meaning: for people, for docs/recipe.md, and for editors."""

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from scaleprog.errors import RecipeError
from scaleprog.recipe.recipe import Recipe

BOUNDS = {"minimum": ">= {}", "exclusiveMinimum": "> {}", "maximum": "<= {}", "exclusiveMaximum": "< {}"}
NAMES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}


@dataclass(frozen=True)
class Key:
    """One key: its full name, what it takes, its default as JSON (None: the key is required), and its meaning."""

    name: str
    takes: str
    default: str | None
    meaning: str


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors."""
    return Recipe.model_json_schema() | {"title": "Recipe of scaleprog"}


def groups() -> dict[str, tuple[str, list[Key]]]:
    """By name of a group: what it is about, and its keys. Keys of no group are those of `recipe`."""
    whole = schema()
    found: dict[str, tuple[str, list[Key]]] = {"recipe": (whole["description"], [])}
    for name, field in whole["properties"].items():
        if "$ref" in field:
            group = _resolved(field, whole)
            rows = [_key(f"{name}.{key}", each, whole, group) for key, each in group["properties"].items()]
            found[name] = _one_line(group["description"]), rows
        else:
            found["recipe"][1].append(_key(name, field, whole, whole))
    return found


def group(name: str) -> tuple[str, list[Key]]:
    """One group, see `groups`. Raises RecipeError, with what was probably meant, if there is none of this name."""
    found = groups()
    if name not in found:
        near = difflib.get_close_matches(name, found, 1)
        hint = f"did you mean {near[0]}?" if near else f"the groups are {', '.join(found)}"
        raise RecipeError(f"{name[:100]!r} is not a group of keys; {hint}")
    return found[name]


def markdown() -> str:
    """docs/recipe.md."""
    parts = [
        "# Every key of a recipe",
        "`scaleprog keys --markdown` writes this page, and a test checks it. `scaleprog keys GROUP` prints one group, "
        "and `scaleprog keys --schema` prints the JSON schema, from which editors complete and check recipes.",
    ]
    for name, (about, rows) in groups().items():
        table = ["| key | takes | default | meaning |", "|---|---|---|---|"]
        for key in rows:
            default = "required" if key.default is None else f"`{key.default}`"
            table.append(f"| `{key.name}` | {_cell(key.takes)} | {default} | {_cell(key.meaning)} |")
        parts += [f"## {name}", about, "\n".join(table)]
    return "\n\n".join(parts) + "\n"


def _key(name: str, field: Mapping[str, Any], whole: Mapping[str, Any], group: Mapping[str, Any]) -> Key:
    required = name.rpartition(".")[2] in group.get("required", ())
    default = None if required else json.dumps(field.get("default"))
    return Key(name, "; or ".join(_takes(field, whole)), default, _one_line(field.get("description", "")))


def _takes(field: Mapping[str, Any], whole: Mapping[str, Any]) -> Iterator[str]:
    """What a field takes, in words, one for each alternative."""
    field = _resolved(field, whole)
    if "anyOf" in field:
        for each in field["anyOf"]:
            if each.get("type") != "null":
                yield from _takes(each, whole)
    elif "enum" in field:
        yield ", ".join(map(str, field["enum"]))
    elif "const" in field:
        yield str(field["const"])
    elif field.get("type") == "array":
        items = field.get("prefixItems")
        if items:
            yield f"[{', '.join('; or '.join(_takes(item, whole)) for item in items)}]"
        else:
            yield f"[{'; or '.join(_takes(field['items'], whole))}, ...]"
    elif field.get("type") == "object":
        yield f"{{{', '.join(field['properties'])}}}"
    else:
        bounds = [text.format(field[key]) for key, text in BOUNDS.items() if key in field]
        yield " ".join([NAMES[field["type"]], ", ".join(bounds)]).strip()


def _resolved(field: Mapping[str, Any], whole: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = field.get("$ref")
    return field if reference is None else whole["$defs"][reference.rpartition("/")[2]]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")
