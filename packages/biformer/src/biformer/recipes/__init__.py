"""Recipes by name: the paper's settings, and small ones that learn on a CPU."""

from biformer.recipes.base import BiFormerRecipe
from biformer.recipes.classification import (
    CLASSIFICATION,
    ClassificationRecipe,
    DistillationRecipe,
    TokenLabellingRecipe,
)
from biformer.recipes.detection import DETECTION, DetectionHead, DetectionRecipe
from biformer.recipes.segmentation import SEGMENTATION, SegmentationHead, SegmentationRecipe
from visionkernels.recipes import Recipe, by_name

__all__ = [
    "RECIPES",
    "BiFormerRecipe",
    "ClassificationRecipe",
    "DetectionHead",
    "DetectionRecipe",
    "DistillationRecipe",
    "SegmentationHead",
    "SegmentationRecipe",
    "TokenLabellingRecipe",
]

RECIPES: dict[str, Recipe] = by_name(CLASSIFICATION, SEGMENTATION, DETECTION)
