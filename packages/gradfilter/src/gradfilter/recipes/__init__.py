"""Recipes by name: the paper's settings, and small ones that learn on a CPU."""

from gradfilter.recipes.base import FilteredRecipe, FilterRecipe
from gradfilter.recipes.classification import CLASSIFICATION, CLASSIFICATION_FAMILY, ClassificationRecipe
from gradfilter.recipes.digits import DIGITS, TransferRecipe
from gradfilter.recipes.segmentation import SEGMENTATION, SEGMENTATION_FAMILY, SegmentationRecipe

__all__ = [
    "DIGITS",
    "FAMILIES",
    "RECIPES",
    "ClassificationRecipe",
    "FilterRecipe",
    "FilteredRecipe",
    "SegmentationRecipe",
    "TransferRecipe",
]

FAMILIES = (CLASSIFICATION_FAMILY, SEGMENTATION_FAMILY)
"""Patterns of the names of recipes that need data and weights."""
RECIPES: dict[str, FilteredRecipe] = {**DIGITS, **CLASSIFICATION, **SEGMENTATION}
