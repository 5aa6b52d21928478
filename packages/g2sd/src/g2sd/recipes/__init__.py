"""The paper's settings of all stages and tasks as frozen data by name, and small ones that learn on a CPU."""

from g2sd.recipes.base import AutoencoderSizes, ViTSizes, check_teacher
from g2sd.recipes.detection import DETECTION, DetectionRecipe, DetectionSizes
from g2sd.recipes.pictures import PICTURES, FinetuneRecipe, GenericRecipe, PretrainRecipe, ProbeRecipe
from g2sd.recipes.segmentation import SEGMENTATION, SegmentationMode, SegmentationRecipe, SegmentationSizes
from visionkernels.recipes import Recipe, by_name

__all__ = [
    "RECIPES",
    "AutoencoderSizes",
    "DetectionRecipe",
    "DetectionSizes",
    "FinetuneRecipe",
    "GenericRecipe",
    "PretrainRecipe",
    "ProbeRecipe",
    "SegmentationMode",
    "SegmentationRecipe",
    "SegmentationSizes",
    "ViTSizes",
    "check_teacher",
]

RECIPES: dict[str, Recipe] = by_name(PICTURES, SEGMENTATION, DETECTION)
