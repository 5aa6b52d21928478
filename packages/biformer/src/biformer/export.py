"""Models as files for others: ONNX, programs of torch.export, and checkpoints under other key names."""

import json
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from biformer.checkpoint import convert_stl, load_official
from visionkernels.checkpoints import CheckpointError, read_state, save_weights
from visionkernels.export import export_program

__all__ = ["ExportFormat", "convert_checkpoint", "export_model"]

ExportFormat = Literal["onnx", "pt2"]


def export_model(
    model: nn.Module,
    path: str | Path,
    *,
    format: ExportFormat | None = None,
    size: tuple[int, int] = (224, 224),
    overwrite: bool = False,
) -> None:
    """Write `model` in evaluation mode, for images [batch, channels, height, width] of `size` and any batch.

    "onnx" has the input "images", the output "logits", and needs the extra `export`; "pt2" opens with
    `torch.export.load`. `format` is by default what the suffix of `path` says. Weights are inside the file. Raises
    ValueError for another format, FileExistsError unless `overwrite`.
    """
    if min(size) < 1:
        raise ValueError(f"size={size} must be at least 1 x 1")
    export_program(
        model,
        torch.zeros(2, _in_channels(model), *size, device=next(model.parameters()).device),
        path,
        install="biformer[export]",
        format=format,
        description=_description(model, size),
        overwrite=overwrite,
    )


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    to: Literal["ours", "stl", "stl_nchw"],
    allow_inexact: bool = False,
    overwrite: bool = False,
) -> str:
    """Write the official checkpoint `source` as safetensors and return a sentence on what was done.

    "ours" has this package's keys and opens with `load_model`; "stl" and "stl_nchw" keep official keys and change the
    form of an STL model, which is exact but for the last stage: see `convert_stl`. Raises CheckpointError for a source
    that is neither, or that has the asked form already.
    """
    if to == "ours":
        model = load_official(source)
        name: str = cast(dict[str, Any], model.pretrained_cfg)["architecture"]
        options = json.dumps({"num_classes": model.num_classes})
        metadata = {"model_name": name, "model_options": options}
        save_weights(target, model.state_dict(), metadata=metadata, overwrite=overwrite)
        return f"{target}: {name}, {model.num_classes} classes, {len(model.state_dict())} tensors"
    checkpoint = read_state(source)
    is_nchw = any(key.endswith("attn.qkv_linear.weight") for key in checkpoint.state)
    if is_nchw == (to == "stl_nchw"):
        raise CheckpointError(f"{source} has no form other than biformer_{to} to convert from")
    state = convert_stl(checkpoint.state, allow_inexact=allow_inexact)
    save_weights(target, state, metadata={}, overwrite=overwrite)
    return f"{target}: biformer_{to}, {len(state)} tensors under official keys"


def _in_channels(model: nn.Module) -> int:
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    return first.in_channels


def _description(model: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    config: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    kept = {key: config.get(key) for key in ("architecture", "mean", "std", "interpolation", "crop_pct", "label_names")}
    return {**kept, "size": size}
