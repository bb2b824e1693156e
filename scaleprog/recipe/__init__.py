"""What a user asks for: one YAML file, its keys and their ranges. Imports no torch."""

from scaleprog.recipe.recipe import FREE, Recipe

__all__ = ["FREE", "Recipe"]
