"""What a shell offers for a word that is not finished. Fast: nothing here imports torch.

Where these functions find nothing, a shell offers file names.
"""

from glob import escape, glob
from pathlib import Path

from scaleprog.files.plain_yaml import RECIPE


def recipe_words(incomplete: str) -> list[str]:
    """Recipe files, and names of shipped recipes."""
    from scaleprog.recipe import shipped

    shipped_names = [name for name in shipped.recipes() if name.startswith(incomplete)]
    return sorted(glob(f"{escape(incomplete)}*.yaml")) + shipped_names


def shipped_words(incomplete: str) -> list[str]:
    """Names of what is shipped: recipes, and scripts for Slurm."""
    from scaleprog.recipe import shipped

    return [name for name in (*shipped.recipes(), *shipped.scripts()) if name.startswith(incomplete)]


def key_words(incomplete: str) -> list[str]:
    """Keys of a recipe, as far as their =."""
    from scaleprog.recipe import reference

    keys = (key.name for _, group in reference.groups().values() for key in group)
    return [f"{key}=" for key in keys if key.startswith(incomplete)]


def group_words(incomplete: str) -> list[str]:
    """Groups of keys."""
    from scaleprog.recipe import reference

    return [name for name in reference.groups() if name.startswith(incomplete)]


def run_words(incomplete: str) -> list[str]:
    """Run directories: below runs/ as long as the word may become that, otherwise those that the word begins."""
    start = "runs/" if "runs/".startswith(incomplete) else escape(incomplete)
    found = (path for below in ("*", "*/*") for path in glob(f"{start}{below}/{RECIPE}"))
    return sorted(str(Path(path).parent) for path in found)
