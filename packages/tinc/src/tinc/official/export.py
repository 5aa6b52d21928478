"""Export of official trees to other runtimes."""

from pathlib import Path

import torch

from tinc.official.model import OctreeMLP
from visionkernels.export import export_program

__all__ = ["export_tree"]


def export_tree(model: OctreeMLP, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a tree as ONNX (.onnx) or as a program of torch.export (.pt2).

    The input `points` holds indices of a leaf's voxels [points], the output `values` is [leaves, points, channels].
    Raises FileExistsError, ValueError for another suffix, and ImportError without onnx.
    """
    points = torch.arange(min(model.grid.shape[1], 8))
    export_program(model, points, path, install="tinc-vision[export]", names=("points", "values"), overwrite=overwrite)
