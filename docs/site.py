"""Lays out the site of `make docs` like the repository: README.md is its first page, docs/ a folder of it."""

import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "tests/README.md")
"""The pages outside docs/."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replaces the files of docs/ by themselves and all that they link to, with paths from the root."""
    docs = ROOT / "docs"
    theme = [file for file in files if not Path(file.abs_src_path or "").is_relative_to(docs)]
    paths = {ROOT / page for page in PAGES}
    paths |= {path for path in docs.rglob("*") if path.suffix in (".md", ".png", ".jsonl", ".css")}
    for page in [path for path in paths if path.suffix == ".md"]:
        paths |= set(linked(page))
    own = (File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)) for path in sorted(paths))
    return Files([*theme, *own])


def linked(page: Path) -> Iterator[Path]:
    """The files of the repository that a page links to."""
    for target in re.findall(r"\]\(([^)#:\s]+)", page.read_text()):
        path = (page.parent / target).resolve()
        if path.is_file() and path.is_relative_to(ROOT):
            yield path
