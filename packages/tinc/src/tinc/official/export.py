"""Official trees for other runtimes."""

from pathlib import Path

import torch

from tinc.official.model import OctreeMLP
from visionkernels.extras import require
from visionkernels.files import replace_file

__all__ = ["export_onnx"]


def export_onnx(model: OctreeMLP, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a tree as ONNX: `points`, indices of a leaf's voxels [points], to `values` [leaves, points, channels].

    Raises FileExistsError, and ImportError without onnx.
    """
    require("onnx", "tinc-vision[export]")
    require("onnxscript", "tinc-vision[export]")
    points = torch.arange(min(model.grid.shape[1], 8))
    program = torch.onnx.export(
        model.eval(), (points,), input_names=["points"], output_names=["values"],
        dynamic_shapes={"points": {0: torch.export.Dim("num_points", min=1, max=1 << 24)}}, dynamo=True, verbose=False,
    )  # fmt: skip
    assert program is not None
    with replace_file(path, overwrite=overwrite) as temporary:
        program.save(str(temporary))
