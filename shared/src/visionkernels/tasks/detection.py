"""Detection with models of torchvision's form, from lists of images and targets: data, loss, training, precision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionkernels.checks import InputError
from visionkernels.extras import require
from visionkernels.pictures.objects import ObjectPictures, collate_detection, open_objects
from visionkernels.recipes import Recipe, data_of
from visionkernels.tasks.sets import LabelledSets
from visionkernels.tasks.sharing import shard_loader
from visionkernels.training import FitResult
from visionkernels.training.task import Task
from visionkernels.weights import Trained, TrainedModel

__all__ = ["DetectionSets", "DetectionTask", "evaluate", "evaluate_trained", "has_masks"]


@dataclass(frozen=True)
class DetectionSets(LabelledSets):
    """Images with objects; `source` is as `visionkernels.pictures.objects.open_objects` takes it.

    `num_classes` counts the background, class 0.
    """

    train: ObjectPictures
    validation: ObjectPictures

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        data: str | Path | None,
        *,
        num_classes: int,
        install: str,
        has_masks: bool = True,
        is_ranked: bool = False,
        steps: Sequence[nn.Module] = (),
    ) -> "DetectionSets":
        """Open `data`, by default the recipe's own; other arguments are those of `open_objects`.

        Raises ImportError with the pip line, InputError where training and validation list other categories whose
        places are the classes, and as `open_objects`.
        """
        for module in ("accelerate", "torchmetrics", "pycocotools"):
            require(module, install)
        source = data_of(recipe, data)
        opened = partial(open_objects, source, num_classes=num_classes, has_masks=has_masks, is_ranked=is_ranked)
        train, validation = opened("train", steps=steps), opened("validation")
        if train.category_ids != validation.category_ids:
            raise InputError(
                f"--data {source} lists categories {train.category_ids} to train and {validation.category_ids} to "
                "validate; their places are the classes, so that they must be the same"
            )
        return cls(recipe, source, num_classes, train, validation)

    def record(self, **details: Any) -> Trained:
        """Return the record; its `category_ids` are those of the classes from 1, where these are their places."""
        return super().record(category_ids=self.train.category_ids, **details)

    def fit(self, task: Task, out: str | Path, trained: Trained, **options: Any) -> FitResult:
        """Run `visionkernels.training.fit`; see `LabelledSets.fit`."""
        return super().fit(task, out, trained, collate=collate_detection, **options)

    def measure(self, model: nn.Module, *, workers: int = 0) -> Mapping[str, float]:
        return evaluate(model, self.validation, workers=workers)


class DetectionTask(Task):
    """The sum of a detector's losses, in float32."""

    def forward(  # type: ignore[override]  # lists, since images differ in size
        self, images: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Take what the detector takes in training; return the loss and its parts."""
        losses: dict[str, Tensor] = self.trainable_module(images, targets)
        return {"loss": torch.stack([loss.float() for loss in losses.values()]).sum(), **losses}


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
    for image, target in shard_loader(pictures, workers, show_progress=show_progress):
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
            raise InputError(f"none of the {len(pictures)} pictures has an object, so there is nothing to measure")
        measured = metric.compute()
        parts = {"ap": "map", "ap50": "map_50", "ap75": "map_75"}
        # where nothing at all was found, torchmetrics has -1 for masks
        result |= {f"{kind}_{name}": 100 * max(float(measured[key]), 0.0) for name, key in parts.items()}
    return result


def evaluate_trained(
    opened: TrainedModel, data: str | Path, *, workers: int = 0, batch_size: int = 1
) -> Mapping[str, float]:
    """Return the metrics of a detector on the validation images of `data`, one by one.

    Classes are category ids, or the places of the `category_ids` that the detector was trained for; raises InputError
    where `data` lists others.
    """
    trained = opened.trained
    category_ids = trained.details.get("category_ids")
    is_ranked = category_ids is not None or bool(trained.details.get("is_ranked"))
    objects = open_objects(
        data, "validation", num_classes=trained.options["num_classes"], has_masks=has_masks(opened.model),
        is_ranked=is_ranked,
    )  # fmt: skip
    if category_ids is not None and tuple(objects.category_ids or ()) != tuple(category_ids):
        raise InputError(
            f"{opened.source} was trained for categories {list(category_ids)}, and --data {data} lists "
            f"{objects.category_ids}; their places are the classes, so that they must be the same"
        )
    return evaluate(opened.model, objects, workers=workers)


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
