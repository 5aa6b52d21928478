"""How good a model is on validation data, told from its file: classifier, segmentation model or detector."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from g2sd.checkpoint import load_official
from g2sd.layouts import contents_of
from visionkernels import classification
from visionkernels.checkpoints import CheckpointError, read_state, stored_options
from visionkernels.evaluation import check_loading
from visionkernels.pictures.labelled import open_pictures

__all__ = ["evaluate_checkpoint", "load_classifier"]


def load_classifier(path: str | Path) -> nn.Module:
    """Return a classifier in evaluation mode, whose `pretrained_cfg` tells how it takes pictures.

    For files of `g2sd train` as in training, for others as ImageNet's: bicubic, 256 pixels, of which 224. Raises
    CheckpointError for a file that is no classifier, and as `load_official`.
    """
    checkpoint = read_state(path)
    model: Any = load_official(path)
    if not hasattr(model, "head"):
        raise CheckpointError(f"{path} has no classification head; `g2sd inspect {path}` tells what it is for")
    config: dict[str, Any] = {"input_size": (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)}
    if "pictures" in checkpoint.metadata:
        pictures = stored_options(checkpoint, path, "pictures", package="g2sd")
        config |= {
            "crop_pct": pictures["size"] / pictures["resize"],
            **{name: pictures[name] for name in ("interpolation", "mean", "std")},
            "label_names": stored_options(checkpoint, path, "class_names", package="g2sd"),
        }
    model.pretrained_cfg = {**cast(dict[str, Any], model.pretrained_cfg), **config}
    return cast(nn.Module, model)


def evaluate_checkpoint(
    checkpoint: str | Path, data: str, *, device: torch.device, batch_size: int = 64, workers: int = 0
) -> Mapping[str, float]:
    """Return the metrics of a weights file on validation data.

    For classifiers those of `visionkernels.classification.Evaluation`, and `data` is as for
    `visionkernels.pictures.labelled.open_pictures`; for segmentation models those of
    `visionkernels.segmentation.evaluate`, and `data` is as for `visionkernels.pictures.scenes.open_scenes`; for
    detectors those of `visionkernels.detection.evaluate`, and `data` is as for
    `visionkernels.pictures.objects.open_objects`. Raises ValueError for a `batch_size` below 1, `workers` below 0 and
    data of other classes, and as the functions that read weights and data do.
    """
    check_loading(workers, batch_size)
    kind = contents_of(read_state(checkpoint).state, checkpoint).kind
    if kind in ("mmseg", "vitdet"):
        evaluate = _evaluate_segmentation if kind == "mmseg" else _evaluate_detection
        return evaluate(checkpoint, data, device, workers)
    model = load_classifier(checkpoint).to(device)
    config = cast(dict[str, Any], model.pretrained_cfg)
    transform = cast(Any, create_transform(**resolve_model_data_config(model)))
    pictures = open_pictures(data, "validation", transform, class_names=config.get("label_names"))
    return asdict(classification.evaluate(model, pictures, batch_size=batch_size, workers=workers))


def _evaluate_segmentation(
    checkpoint: str | Path, data: str, device: torch.device, workers: int
) -> Mapping[str, float]:
    from g2sd.segmentation import load_official_segmentation
    from visionkernels.pictures.scenes import open_scenes
    from visionkernels.segmentation import evaluate

    model = load_official_segmentation(checkpoint).to(device)
    scenes = open_scenes(data, "validation", model.scene, num_classes=model.num_classes)
    return evaluate(model, scenes, model.scene, num_classes=model.num_classes, workers=workers)


def _evaluate_detection(checkpoint: str | Path, data: str, device: torch.device, workers: int) -> Mapping[str, float]:
    from g2sd.detection import load_official_detection
    from visionkernels.detection import evaluate
    from visionkernels.pictures.objects import open_objects

    model = load_official_detection(checkpoint).to(device)
    # null: classes are category ids themselves; official files do not tell, and know classes by their places
    told = read_state(checkpoint).metadata.get("category_ids")
    trained = None if told is None else json.loads(told)
    is_ranked = told is None or trained is not None
    objects = open_objects(data, "validation", num_classes=model.num_classes, is_ranked=is_ranked)
    if trained is not None and list(objects.category_ids or ()) != trained:
        raise ValueError(
            f"{checkpoint} was trained for categories {trained}, and --data {data} lists {objects.category_ids}; their "
            "places are the classes, so that they must be the same"
        )
    return evaluate(model, objects, workers=workers)
