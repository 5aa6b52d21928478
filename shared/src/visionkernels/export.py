"""Models as files for other runtimes: ONNX, and programs of torch.export."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionkernels.checks import InputError
from visionkernels.extras import require
from visionkernels.files import replace_file
from visionkernels.ops import use_backend

__all__ = ["FORMATS", "export_program", "first_channels"]

FORMATS = ("onnx", "pt2")


def export_program(
    model: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    install: str = "visionkernels[export]",
    format: str | None = None,
    names: tuple[str, str] = ("images", "logits"),
    description: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write `model` in evaluation mode, from one tensor to one tensor, weights inside.

    The first axis of `example`, which has two items or more, stays open; the others are fixed. "onnx" has the input and
    output `names`, and needs the extra that pip installs with `install`, e.g. "biformer[export]". "pt2" opens with
    `torch.export.load`, and has `description` as its extra file model.json. `format` is by default what the suffix of
    `path` says. Raises ValueError for another format or a smaller example, ImportError without the extra,
    FileExistsError unless `overwrite`.
    """
    path = Path(path)
    chosen = format or path.suffix.removeprefix(".")
    if chosen not in FORMATS:
        raise InputError(f"format={chosen!r} must be onnx or pt2, or the suffix of {path.name} one of them")
    if len(example) < 2 or example.numel() == 0:
        # torch.export takes an axis of one for a constant
        raise InputError(f"example has shape {list(example.shape)}; it must have two items or more, none of them empty")
    if chosen == "onnx":
        for module in ("onnx", "onnxscript"):
            require(module, install)
    shapes = ({0: torch.export.Dim("batch")},)
    with replace_file(path, overwrite=overwrite) as temporary, torch.no_grad(), use_backend("eager"):
        # strict: else the length of a tensor is a constant too
        program = torch.export.export(model.eval(), (example,), dynamic_shapes=shapes, strict=True)
        if chosen == "pt2":
            torch.export.save(program, temporary, extra_files={"model.json": json.dumps(description or {})})
        else:
            written = torch.onnx.export(
                program, (example,), input_names=[names[0]], output_names=[names[1]], dynamo=True, verbose=False
            )
            if written is None:
                raise RuntimeError("torch.onnx.export returned no program")
            written.save(temporary, external_data=False)


def first_channels(model: nn.Module) -> int:
    """Return the channels of the images that a model takes, those of its first convolution; 3 where it has none."""
    return next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
