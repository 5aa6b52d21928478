"""Weights files: read safely, renamed by tables, loaded strictly, and opened by the record that they keep."""

from visionkernels.weights.loading import load_strict, misfit, without_prefixes
from visionkernels.weights.opening import TrainedModel, open_trained
from visionkernels.weights.reading import Checkpoint, CheckpointError, read_checkpoint
from visionkernels.weights.rules import KeyRules
from visionkernels.weights.torch_files import read_torch
from visionkernels.weights.trained import Trained, save_weights

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "KeyRules",
    "Trained",
    "TrainedModel",
    "load_strict",
    "misfit",
    "open_trained",
    "read_checkpoint",
    "read_torch",
    "save_weights",
    "without_prefixes",
]
