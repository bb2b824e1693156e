"""Shows untrusted text as plain text, no matter what it contains, wherever text is printed or written; and tables."""

import re
import sys
import time
import unicodedata
from contextlib import suppress

from rich import box
from rich.table import Table

MOST = 20_000  # characters; nobody reads more, and a file may hold millions
NAME = 60  # characters of a name in a picture
LINE = 300  # characters of a message's first line
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories of characters that move the cursor, change the direction of writing, or are invisible."""
_MARKDOWN = str.maketrans({"&": "&amp;", "<": "&lt;"} | {letter: f"\\{letter}" for letter in "\\`*[]|$~"})


def as_text(text: object, lines: bool = False, most: int = MOST) -> str:
    """Text for a terminal. Control characters and invisible characters are escaped, as in `\\x1b`.

    `lines` keeps line breaks instead of escaping them. Text of more than `most` characters is cut.
    """
    whole = str(text)
    shown = "".join(
        letter if letter.isprintable() or (lines and letter == "\n") else _escaped(letter) for letter in whole[:most]
    )
    return f"{shown} ... ({len(whole) - most} more characters)" if len(whole) > most else shown


def say(message: object) -> None:
    """Prints a message that is no result on stderr, after the program's name; loses it if the log's disk is full."""
    with suppress(OSError):
        print(f"scaleprog: {as_text(message, lines=True)}", file=sys.stderr, flush=True)


def as_markdown(text: object) -> str:
    """Text for one line of a Markdown file; HTML, links, tables and formulas appear literally."""
    escaped = as_text(text).translate(_MARKDOWN)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", escaped)


def as_label(text: object) -> str:
    """A name for a picture, cut to the available room."""
    label = as_text(text, lines=True)
    label = "\n".join(line if len(line) <= NAME else f"{line[: NAME - 3]}..." for line in label.splitlines())
    return f" {label}" if label.startswith("_") else label  # matplotlib keeps such names out of its legends


def first_line(message: str) -> str:
    """The first line of a message, which may be empty."""
    line = next(iter(message[: 2 * LINE].strip().splitlines()), "")
    return line if len(line) <= LINE else f"{line[: LINE - 3]}..."


def without_password(message: str) -> str:
    """A message in which `***` stands for the user and the password of every URL."""
    return re.sub(r"(?<=://)[^/\s@]*@", "***@", message)


def clock(moment: float) -> str:
    """A moment, given in seconds since 1970, as local time."""
    return time.strftime("%d %b %H:%M:%S", time.localtime(moment))


def counted(number: int, what: str) -> str:
    """A number with its noun, as in "1 line" or "3 lines"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def table(*titles: str, words: int = 1) -> Table:
    """A table for a terminal of 80 columns; the columns after the first `words` hold numbers."""
    empty = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for index, title in enumerate(titles):
        empty.add_column(title, justify="left" if index < words else "right")
    return empty


def _escaped(letter: str) -> str:
    if unicodedata.category(letter) not in _HIDDEN:
        return letter  # for example, a space of another width
    code = ord(letter)
    if code in (9, 10, 13):
        return {9: "\\t", 10: "\\n", 13: "\\r"}[code]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
