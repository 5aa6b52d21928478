"""Detection with models of torchvision's form, from lists of images and targets: the loss, and average precision."""

from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor, nn

from visionkernels.evaluation import own_share
from visionkernels.extras import require
from visionkernels.pictures.objects import ObjectPictures

__all__ = ["DetectionTask", "evaluate", "has_masks"]


class DetectionTask(TrainingTask):
    """The sum of a detector's losses, in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(verbose=False)
        self.trainable_module = model

    def forward(  # type: ignore[override]  # lists, since images differ in size
        self, images: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Take what the detector takes in training; return the loss and its parts."""
        losses: dict[str, Tensor] = self.trainable_module(images, targets)
        return {"loss": torch.stack([each.float() for each in losses.values()]).sum(), **losses}


def has_masks(model: nn.Module) -> bool:
    """Tell whether a detector outlines what it finds."""
    heads: Any = getattr(model, "roi_heads", None)
    return heads is not None and bool(heads.has_mask())


@torch.inference_mode()
def evaluate(
    model: nn.Module, pictures: ObjectPictures, *, workers: int = 0, show_progress: bool = True
) -> dict[str, float]:
    """Measure a detector on its device by COCO's average precision, in percent; several processes share the pictures.

    `box_ap` is the mean over overlaps 0.5 to 0.95, `box_ap50` and `box_ap75` that at one; `mask_ap` and so on for
    models with masks. Raises ValueError for pictures without an object, and ImportError without torchmetrics or
    pycocotools.
    """
    require("pycocotools", "pycocotools")
    detection = require("torchmetrics.detection", "torchmetrics")
    is_outlined = has_masks(model)
    kinds = {"box": "bbox"} | ({"mask": "segm"} if is_outlined else {})
    metrics = {
        kind: detection.MeanAveragePrecision(iou_type=iou_type, sync_on_compute=False)
        for kind, iou_type in kinds.items()
    }
    device = next(model.parameters()).device
    model.eval()
    for image, target in own_share(pictures, workers, show_progress=show_progress):
        (found,) = model([image.to(device)])
        found = {key: value.cpu() for key, value in found.items()}
        if is_outlined:
            found["masks"] = found["masks"][:, 0] > 0.5
            target = target | {"masks": target["masks"].bool()}
        for metric in metrics.values():
            metric.update([found], [target])
    result: dict[str, float] = {}
    for kind, metric in metrics.items():
        _share(metric)
        if not any((is_crowd == 0).any() for is_crowd in metric.groundtruth_crowds):
            raise ValueError(f"none of the {len(pictures)} pictures has an object, so there is nothing to measure")
        measured = metric.compute()
        parts = {"ap": "map", "ap50": "map_50", "ap75": "map_75"}
        # where nothing at all was found, torchmetrics has -1 for masks
        result |= {f"{kind}_{name}": 100 * max(float(measured[key]), 0.0) for name, key in parts.items()}
    return result


def _share(metric: Any) -> None:
    """Give every process what all have seen.

    The metric's own way pairs the pictures of the processes one by one, and so hangs where they have not equally many.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, metric.metric_state)
    for name in metric.metric_state:
        setattr(metric, name, [each for state in states for each in state[name]])
