"""Classifiers and segmentation models as files for others: ONNX, and programs of torch.export."""

from pathlib import Path
from typing import Any, cast

import torch

from g2sd.evaluation import load_classifier
from g2sd.layouts import contents_of
from g2sd.segmentation_checkpoint import load_official_segmentation
from g2sd.vit import DistilledViT, EvalHead
from visionkernels.checkpoints import CheckpointError, read_state
from visionkernels.export import export_program

__all__ = ["export_model"]


def export_model(
    checkpoint: str | Path, out: str | Path, *, head: EvalHead | None = None, overwrite: bool = False
) -> str:
    """Write the model of a weights file, and return the shapes that it takes and gives.

    The suffix of `out` says how: .onnx has the input "images", the output "logits", and needs the extra `export`; .pt2
    opens with `torch.export.load`. `head` picks the logits of a model with a distillation token: "mean" of both heads,
    or "class" alone. Raises ValueError for another suffix, or a `head` where there is one anyway; FileExistsError
    unless `overwrite`; CheckpointError for a detector, and as `load_classifier`.
    """
    kind = contents_of(read_state(checkpoint).state, checkpoint).kind
    if kind == "vitdet":
        raise CheckpointError(
            f"{checkpoint} holds a detector, which is not exported: how many regions it takes differs from image to "
            "image. Its pyramid goes through torch.export: load_official_detection(FILE).backbone"
        )
    if kind == "mmseg":
        if head is not None:
            raise ValueError(f"head={head!r} is for models with a distillation token; {checkpoint} has one head")
        return _export_segmentation(checkpoint, out, overwrite)
    model: Any = load_classifier(checkpoint)
    if head is not None:
        if not isinstance(model, DistilledViT):
            raise ValueError(f"head={head!r} is for models with a distillation token; {checkpoint} has one head")
        model.eval_head = head
    config = cast(dict[str, Any], model.pretrained_cfg)
    channels, height, width = config["input_size"]
    described = {"classes": model.num_classes, **{name: config.get(name) for name in ("mean", "std", "label_names")}}
    export_program(
        model, torch.zeros(2, channels, height, width), out, install="g2sd-vision[export]", description=described,
        overwrite=overwrite,
    )  # fmt: skip
    return f"images [batch, {channels}, {height}, {width}] to logits [batch, {model.num_classes}]"


def _export_segmentation(checkpoint: str | Path, out: str | Path, overwrite: bool) -> str:
    model = load_official_segmentation(checkpoint)
    height, width = model.img_size
    described = {"classes": model.num_classes, "mean": model.scene.mean, "std": model.scene.std}
    export_program(
        model, torch.zeros(2, 3, height, width), out, install="g2sd-vision[export]", description=described,
        overwrite=overwrite,
    )  # fmt: skip
    return f"images [batch, 3, {height}, {width}] to logits [batch, {model.num_classes}, {height}, {width}]"
