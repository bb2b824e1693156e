"""Text of others is shown as text: on a terminal, in Markdown, in a picture."""

import os
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.files.display import as_label, as_markdown, as_text, first_line
from tests.unit.hostile import ESCAPES


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b–Ω", "a b–Ω"), ("\x1b[2J", "\\x1b[2J"), ("a\nb\tc\r", "a\\nb\\tc\\r"), ("\x9b31m", "\\x9b31m"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"), ("a\u200bb\ufeff", "a\\u200bb\\ufeff"), ("\u2028", "\\u2028"),
        (os.fsdecode(b"run\xff"), "run\\udcff"), ("\U000e0041", "\\U000e0041"), ("\x7f\x00", "\\x7f\\x00"),
        ("日本 é", "日本 é"),
    ],
)  # fmt: skip
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str) -> None:
    assert as_text(text) == shown


@given(st.text(st.characters(exclude_categories=())) | st.text(st.sampled_from(ESCAPES)))
def test_nothing_else_gets_through(text: str) -> None:
    for letter in as_text(text) + as_markdown(text):
        assert unicodedata.category(letter) not in {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert "<" not in as_markdown(text)
    assert "\n" not in as_text(text) + as_markdown(text) + first_line(text)
    as_label(text).encode()


def test_lines_are_kept_where_they_are_meant_and_what_is_long_is_cut() -> None:
    assert as_text("a\nb\x1b", lines=True) == "a\nb\\x1b"
    assert as_text("x" * 30, most=10) == "xxxxxxxxxx ... (20 more characters)"
    assert first_line("") == first_line("\n\n") == ""
    assert first_line("a\nb") == "a"


def test_markdown_shows_html_tables_links_and_formulas_as_they_are_written() -> None:
    assert as_markdown("<b>&amp;|a|") == "&lt;b>&amp;amp;\\|a\\|"
    assert as_markdown("`x` [a](b) $y$ *z*") == "\\`x\\` \\[a\\](b) \\$y\\$ \\*z\\*"
    assert as_markdown("max_steps _x_ a\\b") == "max_steps \\_x\\_ a\\\\b"
