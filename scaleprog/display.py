"""How text that others wrote is shown: as text, whatever it holds. Applied where something is printed or written."""

import re
import unicodedata

MOST = 20_000  # letters; nobody reads more, and a file may hold millions
NAME = 60  # letters of a name in a picture
LINE = 300  # letters of a message's first line
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories of what moves a cursor, changes the direction of writing, or cannot be seen."""
_MARKDOWN = str.maketrans({"&": "&amp;", "<": "&lt;"} | {letter: f"\\{letter}" for letter in "\\`*[]|$~"})


def as_text(text: object, lines: bool = False, most: int = MOST) -> str:
    """Text for a terminal: what would be obeyed by it or not be seen is escaped, as in `\\x1b`.

    Line breaks are kept with `lines` and escaped without; what is longer than `most` letters is cut.
    """
    whole = str(text)
    shown = "".join(
        letter if letter.isprintable() or (lines and letter == "\n") else _escaped(letter) for letter in whole[:most]
    )
    return f"{shown} ... ({len(whole) - most} more letters)" if len(whole) > most else shown


def as_markdown(text: object) -> str:
    """Text for one line of a Markdown file: HTML, links, tables and formulas are shown as they are written."""
    escaped = as_text(text).translate(_MARKDOWN)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", escaped)


def as_label(text: object) -> str:
    """A name for a picture, no longer than there is room for."""
    label = as_text(text, lines=True)
    label = "\n".join(line if len(line) <= NAME else f"{line[: NAME - 3]}..." for line in label.splitlines())
    return f" {label}" if label.startswith("_") else label  # matplotlib keeps such names out of its legends


def first_line(message: str) -> str:
    """The first line of a message, which may be empty."""
    line = next(iter(message[: 2 * LINE].strip().splitlines()), "")
    return line if len(line) <= LINE else f"{line[: LINE - 3]}..."


def counted(number: int, what: str) -> str:
    """As in "1 line" or "3 lines"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _escaped(letter: str) -> str:
    if unicodedata.category(letter) not in _HIDDEN:
        return letter  # a space of another width, say
    code = ord(letter)
    if code in (9, 10, 13):
        return {9: "\\t", 10: "\\n", 13: "\\r"}[code]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
