"""The one training loop: recipes in, a resumable folder and safetensors weights out."""

from visionkernels.recipes import FitRecipe, OptimizerRecipe, ScheduleRecipe
from visionkernels.training.batches import TrainingData
from visionkernels.training.dispatch import train_by_recipe
from visionkernels.training.loop import fit
from visionkernels.training.result import FitResult

__all__ = ["FitRecipe", "FitResult", "OptimizerRecipe", "ScheduleRecipe", "TrainingData", "fit", "train_by_recipe"]
