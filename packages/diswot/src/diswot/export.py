"""Networks as files for others: ONNX, and programs of torch.export."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from diswot import spaces
from diswot.evaluation import load_network
from diswot.models import create_network
from visionkernels.export import export_program
from visionkernels.recipes import check

__all__ = ["export_model"]


def export_model(
    name: str,
    out: str | Path,
    *,
    checkpoint: str | Path | None = None,
    num_classes: int = 100,
    size: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> str:
    """Write the network `name` of `diswot.models` in evaluation mode, and return the shapes that it takes and gives.

    The suffix of `out` says how: .onnx has the input "images", the output "logits", and needs the extra `export`; .pt2
    opens with `torch.export.load`. Any number of images goes in, of `size`, by default the network's own. Weights are
    inside: those of `checkpoint`, which then tells the number of classes, or random ones. Raises ValueError for another
    suffix, FileExistsError unless `overwrite`, and as `create_network` and `diswot.evaluation.load_network` do.
    """
    check(num_classes >= 1, "num_classes", num_classes, "at least 1")
    if size is not None and min(size) < 1:
        raise ValueError(f"size={size} must be at least 1 x 1")
    if checkpoint is None:
        model, trained = create_network(name, num_classes=num_classes).eval(), None
    else:
        network = load_network(checkpoint, name)
        model, trained, num_classes = network.model, network, network.num_classes
    height, width = size or ((trained.pictures.size,) * 2 if trained else _own_size(model, name))
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    export_program(
        model,
        torch.zeros(2, channels, height, width),
        out,
        install="diswot[export]",
        description={"name": name, "num_classes": num_classes, "size": [height, width]},
        overwrite=overwrite,
    )
    return f"images [batch, {channels}, {height}, {width}] to logits [batch, {num_classes}]"


def _own_size(model: nn.Module, name: str) -> tuple[int, int]:
    """Return what the search space, or timm, says; 224 pixels for torchvision, 32 for anything else."""
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    source = name.partition(":")[0]
    default = (3, 224, 224) if source == "torchvision" else (3, 32, 32)
    # "timm:NAME" is a network, not one of a space
    is_of_space = source != "timm" and source in spaces.SPACES
    _, height, width = spaces.create(source).input_size if is_of_space else cfg.get("input_size", default)
    return height, width
