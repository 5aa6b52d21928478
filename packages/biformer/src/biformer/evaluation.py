"""Measuring a weights file, whatever kind of model it holds."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import create_transform, resolve_model_data_config

from biformer.checkpoint import load_model
from visionkernels.checkpoints import read_state, stored_options
from visionkernels.classification import evaluate as evaluate_classifier
from visionkernels.evaluation import check_loading
from visionkernels.pictures.labelled import open_pictures

__all__ = ["evaluate_checkpoint"]


def evaluate_checkpoint(
    checkpoint: str | Path, data: str, *, device: torch.device, workers: int = 0, batch_size: int = 64
) -> dict[str, float]:
    """Return the metrics of a weights file of `biformer train`, or of an official one, on the validation data.

    A classifier has those of `visionkernels.classification.Evaluation`, a segmentation model those of
    `visionkernels.segmentation.evaluate`, a detector those of `visionkernels.detection.evaluate`. `data` is as for the
    training; `batch_size` is a classifier's. Raises ValueError for numbers below 1, or of `workers` below 0.
    """
    check_loading(workers, batch_size)
    match read_state(checkpoint).metadata.get("task"):
        case "segmentation":
            return _evaluate_segmentation(checkpoint, data, device, workers)
        case "detection":
            return _evaluate_detection(checkpoint, data, device, workers)
        case _:
            return _evaluate_classifier(checkpoint, data, device, workers, batch_size)


def _evaluate_classifier(
    checkpoint: str | Path, data: str, device: torch.device, workers: int, batch_size: int
) -> dict[str, float]:
    model = load_model(checkpoint).to(device)
    transform = cast(Any, create_transform(**resolve_model_data_config(model)))
    names = cast(dict[str, Any], model.pretrained_cfg).get("label_names")
    pictures = open_pictures(data, "validation", transform, class_names=names)
    return asdict(evaluate_classifier(model, pictures, batch_size=batch_size, workers=workers))


def _evaluate_segmentation(checkpoint: str | Path, data: str, device: torch.device, workers: int) -> dict[str, float]:
    from biformer.segmentation import load_segmentation_model
    from visionkernels.pictures.scenes import open_scenes
    from visionkernels.segmentation import evaluate

    model = load_segmentation_model(checkpoint).to(device)
    scenes = open_scenes(data, "validation", model.scene, num_classes=model.num_classes)
    return evaluate(model, scenes, model.scene, num_classes=model.num_classes, workers=workers)


def _evaluate_detection(checkpoint: str | Path, data: str, device: torch.device, workers: int) -> dict[str, float]:
    from biformer.detection import load_detection_model
    from visionkernels.detection import evaluate, has_masks
    from visionkernels.pictures.objects import open_objects

    options = stored_options(read_state(checkpoint), checkpoint, "detection_model", package="biformer")
    model = load_detection_model(checkpoint).to(device)
    objects = open_objects(data, "validation", num_classes=options["num_classes"], has_masks=has_masks(model))
    return evaluate(model, objects, workers=workers)
