"""The one training loop: recipes in, a resumable folder and safetensors weights out."""

from visionkernels.training.batches import TrainingData
from visionkernels.training.loop import FitResult, fit
from visionkernels.training.options import FitOptions
from visionkernels.training.recipes import FitRecipe, OptimizerRecipe, ScheduleRecipe

__all__ = ["FitOptions", "FitRecipe", "FitResult", "OptimizerRecipe", "ScheduleRecipe", "TrainingData", "fit"]
