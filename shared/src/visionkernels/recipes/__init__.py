"""Recipes: complete settings as frozen dataclasses that check themselves, by name or read back from a run.json."""

from visionkernels.recipes.fit import FitRecipe, OptimizerRecipe, ScheduleRecipe
from visionkernels.recipes.named import ModelRecipe, Recipe, by_name, choose, data_of, settings

__all__ = [
    "FitRecipe",
    "ModelRecipe",
    "OptimizerRecipe",
    "Recipe",
    "ScheduleRecipe",
    "by_name",
    "choose",
    "data_of",
    "settings",
]
