"""Tables of text: in Markdown, and for a terminal."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from scaleprog.files.display import as_markdown, as_text

TEXT = (
    "run",
    "recipe",
    "schedule",
    "stages",
    "candidate",
    "scheme",
    "energy from",
    "order",
    "class",
)  # left-aligned columns


def cell(value: float | None, spec: str) -> str:
    """A number in a table; a dash for None."""
    return "–" if value is None else format(value, spec)


def spread(values: Sequence[float], spec: str) -> str:
    """Mean and sample standard deviation of some values; a dash without any, and no deviation of one alone."""
    if len(values) < 2:
        return cell(values[0] if values else None, spec)
    return f"{mean(values):{spec}} ± {stdev(values):{spec.removeprefix('+')}}"


def _padded(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> list[list[str]]:
    """Header and rows with cells of equal width, of at least 2, so that Markdown has room to align a column."""
    widths = {c: max(2, len(c), *(len(row[c]) for row in rows)) for c in columns}
    header = {column: column for column in columns}
    return [[r[c].ljust(widths[c]) if c in TEXT else r[c].rjust(widths[c]) for c in columns] for r in (header, *rows)]


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same keys as a Markdown table."""
    escaped = [{key: as_markdown(cell) for key, cell in row.items()} for row in rows]
    header, *lines = _padded(escaped, list(rows[0]))
    rule = [("-" if c in TEXT else ":").rjust(len(cell), "-") for c, cell in zip(rows[0], header)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def plain_table(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> str:
    """Some columns of the rows for a terminal."""
    shown = [{column: as_text(row[column]) for column in columns} for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in _padded(shown, columns))
