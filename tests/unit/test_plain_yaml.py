"""Recipes that anybody may have written: plain values within bounds, or an error in time."""

import os
import tracemalloc
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.errors import CheckpointError, RecipeError, ScaleprogError
from scaleprog.files.plain_yaml import parse, read_run
from scaleprog.recipe import Recipe

LEAST = "model: {name: vit_tiny_patch16_224}\ndata: {path: shards}\ntrain: {epochs: 4, batch: 64}\n"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGE_BOMB = "a0: &a0 {k0: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)
)

HOSTILE = {
    "bomb of aliases": (BOMB, "more than 2000 values"),
    "bomb of merges": (MERGE_BOMB, "more than 2000 values"),
    "many values": ("a: [" + "1, " * 3000 + "]", "more than 2000 values"),
    "an alias of itself": ("a: &a [*a]", "alias inside its own value"),
    "a mapping of itself": ("a: &a {b: *a}", "alias inside its own value"),
    "an unknown alias": ("a: *b", "undefined alias"),
    "deep lists": ("a: " + "[" * 50_000, "more than 20 levels"),
    "deep mappings": ("{a: " * 20_000, "more than 20 levels"),
    "deep blocks": ("\n".join(" " * i + "a:" for i in range(400)), "more than 20 levels"),
    "deep dashes": ("- " * 50_000, "more than 20 levels"),
    "a key twice": ("seed: 1\nseed: 2", "the key 'seed' twice"),
    "a key twice below": ("model: {name: a, name: b}", "the key 'name' twice"),
    "a number as key": ("1: 2", "a key that is not a name: '1'"),
    "a truth as key": ("on: 2", "a key that is not a name: 'on'"),
    "nothing as key": ("~: 2", "a key that is not a name"),
    "a list as key": ("[a]: 2", "a key that is not a name: a list or a mapping"),
    "a mapping as key": ("{a: 1}: 2", "a key that is not a name: a list or a mapping"),
    "a sentence as key": ("two words: 2", "a key that is not a name: 'two words'"),
    "pydantic's own name": ("growth: {'tuple[': 1}", "a key that is not a name"),
    "a tag": ("seed: !!int 3", "a tag; scaleprog reads only plain values"),
    "a tag of Python": ("seed: !!python/object/apply:os.getcwd []", "a tag; scaleprog reads only plain values"),
    "a tag of bytes": ("seed: !!binary aGk=", "a tag; scaleprog reads only plain values"),
    "a tag of time": ("seed: !!timestamp x", "a tag; scaleprog reads only plain values"),
    "an own tag": ("seed: !x {a: 1}", "a tag; scaleprog reads only plain values"),
    "many digits": ("seed: " + "9" * 10**5, "a number of 100000 characters"),
    "many digits of 16": ("seed: 0x" + "f" * 10**5, "a number of 100002 characters"),
    "no digits of 2": ("seed: 0b_", "not readable as YAML"),
    "a long text": ("data: {path: " + "x" * 10**5 + "}", "a text of 100000 characters"),
    "NUL": ("data: {path: \"a\\0b\"}", "a control character"),
    "an escape": ("data: {path: \"a\\e[31m\"}", "a control character"),
    "half of a character": ("data: {path: \"\\ud800\"}", "a control character"),
    "no character": ("data: {path: \"\\U00110000\"}", "not readable as YAML"),
    "a raw escape": ("data: {path: a\x1b[31m}", "not readable as YAML"),
    "two documents": (LEAST + "---\n" + LEAST, "not readable as YAML"),
    "another version": ("%YAML " + "9" * 5000 + ".1\n---\na: 1", "not readable as YAML"),
    "too long": (LEAST + "#" * 2**20, "more than 131072 bytes"),
    "UTF-16": (LEAST.encode("utf-16"), "not readable as YAML"),
    "Latin-1": ("data: {path: Käse}".encode("latin-1"), "not readable as YAML"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_no_recipe_needs_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    content, message = HOSTILE[kind]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    tracemalloc.start()
    try:
        with pytest.raises(RecipeError, match=message) as caught:
            Recipe.load(path)
        assert tracemalloc.get_traced_memory()[1] < 10**8
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000
    with pytest.raises(CheckpointError):
        read_run(tmp_path)


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder", "link in a circle", "nothing"])
@pytest.mark.parametrize("place", ["recipe", "base", "run"])
def test_what_is_no_file_does_not_hang(kind: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link in a circle":
        path.symlink_to(path)
    if place == "run":
        with pytest.raises(ScaleprogError, match=r"not a run directory|not readable"):
            Recipe.of_run(tmp_path)
        return
    if place == "base":
        named, path = path, tmp_path / "above.yaml"
        path.write_text(f"base: {named.name}\n{LEAST}")
    with pytest.raises(RecipeError, match=r"no such recipe|not readable as YAML"):
        Recipe.load(path)


def test_the_recipe_of_a_run_reads_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(LEAST)
    (tmp_path / "recipe.yaml").write_text(LEAST)
    assert Recipe.of_run(tmp_path) == Recipe.load(tmp_path / "base.yaml")
    for base in ("base.yaml", "/etc/passwd", "/dev/zero", "~", "''", "[]"):
        (tmp_path / "recipe.yaml").write_text(f"base: {base}\n{LEAST}")
        with pytest.raises(CheckpointError, match="has the key `base`, so no run wrote it"):
            Recipe.of_run(tmp_path)
    with pytest.raises(CheckpointError, match="not a run directory"):
        Recipe.of_run(tmp_path / "nowhere")


@pytest.mark.parametrize("base", ["[]", "[b.yaml, 1]", "{a: 1}", "3", "true", "2020-01-01.5"])
def test_a_base_is_the_path_of_a_recipe(base: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"base: {base}\n{LEAST}")
    with pytest.raises(RecipeError, match=r"must be the path of a recipe|no such recipe"):
        Recipe.load(tmp_path / "a.yaml")


def test_bases_in_a_long_row(tmp_path: Path) -> None:
    (tmp_path / "0.yaml").write_text(LEAST)
    for i in range(1, 30):
        (tmp_path / f"{i}.yaml").write_text(f"base: {i - 1}.yaml\nseed: {i}\n")
    assert Recipe.load(tmp_path / "9.yaml").seed == 9
    with pytest.raises(RecipeError, match="more than 20 bases"):
        Recipe.load(tmp_path / "29.yaml")
    for i in range(1, 8):
        (tmp_path / f"{i}.yaml").write_text(f"base: [{', '.join([f'{i - 1}.yaml'] * 10)}]\n")
    with pytest.raises(RecipeError, match="more than 20 bases"):  # and not after reading ten million files
        Recipe.load(tmp_path / "7.yaml")


@pytest.mark.parametrize(
    "override",
    ["a..b=1", "=1", ".=1", "a.=1", ".a=1", "a", "", "a b=1", "a\nb=1", "a.b.c.d.e.f.g.h=1", "x" * 10**5,
     "a" * 10**5 + "=1", ".".join("a" * 9) + "=1",
          "seed=" + "9" * 10**5, "seed=" + "[" * 10**5, "seed=!!python/name:os.system", "seed=&a [*a]", "seed=\x1b",
     "seed={a: 1, a: 2}", "data.path=" + "x" * 10**5, "data.path=\"\\0\"", "seed=\udcff", "growth.schedule=" + BOMB],
)  # fmt: skip
def test_overrides_go_the_same_way(override: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(LEAST)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(tmp_path / "a.yaml", [override])
    assert len(str(caught.value)) < 2000


def test_many_mistakes_are_told_in_part(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(LEAST + "".join(f"key{i}: {i}\n" for i in range(900)))
    with pytest.raises(RecipeError, match=r"\.\.\. and 850 more") as caught:
        Recipe.load(tmp_path / "a.yaml")
    assert len(str(caught.value)) < 10**5


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("1:4", r"the number 1:4, which YAML reads in base 60; write it without colons, or put A:B after --sweep"),
        ("-1:30.5", "the number -1:30.5, which YAML reads in base 60"),
        ("010", "the number 010, which YAML reads in base 8; write it without leading zeros"),
    ],
)
def test_a_number_that_yaml_would_change_is_refused(written: str, message: str) -> None:
    with pytest.raises(yaml.YAMLError, match=message):
        parse(written)
    assert parse(f'["{written}", 0, 0.5, -0.1, 60]') == [written, 0, 0.5, -0.1, 60]


def test_what_looks_like_a_date_is_text() -> None:
    assert parse("a: 2020-01-01\nb: 2001-99-99") == {"a": "2020-01-01", "b": "2001-99-99"}


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text("abä :#\n"),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), below),
    max_leaves=20,
)


@given(plain)
def test_what_yaml_writes_is_read_as_it_was(value: object) -> None:
    assert parse(yaml.safe_dump(value)) == value


@given(st.text() | st.text("{}[]:,-&*!|>'\"%@`#? \n\tab01.e<=~"))
def test_any_text_is_a_value_or_an_error_of_yaml(text: str) -> None:
    try:
        parse(text)
    except yaml.YAMLError:
        return
