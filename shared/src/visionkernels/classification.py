"""Measuring and using a classifier: accuracy on a set, and names for what is in pictures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import nn
from torch.nn import functional as F

from visionkernels.evaluation import own_share
from visionkernels.extras import require
from visionkernels.pictures.labelled import LabelledPictures
from visionkernels.pictures.reading import read_picture

__all__ = ["Evaluation", "Prediction", "class_names", "classify", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Of a classifier on a set; top-1 and top-5 are shares in percent."""

    top1: float
    top5: float
    """Of the five best classes, or of all where there are fewer."""
    loss: float
    """Mean cross-entropy."""
    majority_top1: float
    """Top-1 of always naming the most frequent class."""
    num_pictures: int

    def metrics(self) -> Mapping[str, float]:
        """Return what a training run reports."""
        return {"top1": self.top1, "top5": self.top5, "val_loss": self.loss, "majority_top1": self.majority_top1}


class Prediction(NamedTuple):
    """One of the classes that a picture may be of."""

    name: str
    number: int
    probability: float


def evaluate(
    model: nn.Module,
    pictures: LabelledPictures,
    *,
    num_classes: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    show_progress: bool = True,
) -> Evaluation:
    """Measure a model in evaluation mode, on its device; several processes share the pictures.

    `num_classes` is by default what the model says. Raises ValueError for labels that the model does not have, and
    ImportError without torchmetrics.
    """
    metrics = require("torchmetrics", "torchmetrics")
    device = next(model.parameters()).device
    num_classes = cast(int, model.num_classes) if num_classes is None else num_classes
    if max(pictures.labels) >= num_classes:
        raise ValueError(f"the data has class {max(pictures.labels)}, the model {num_classes} classes")
    accuracy = partial(metrics.classification.MulticlassAccuracy, num_classes, average="micro")
    top1, top5 = accuracy(top_k=1).to(device), accuracy(top_k=min(5, num_classes)).to(device)
    loss = metrics.MeanMetric().to(device)
    model.eval()
    with torch.inference_mode():
        for images, labels in own_share(pictures, workers, batch_size, show_progress=show_progress):
            images, labels = images.to(device), labels.to(device)
            logits = model(images).float()
            for metric in (top1, top5):
                metric.update(logits, labels)
            losses = F.cross_entropy(logits, labels, reduction="none")
            loss.update(losses)
    majority = max(Counter(pictures.labels).values()) / len(pictures)
    best, best5 = (round(100 * float(metric.compute()), 4) for metric in (top1, top5))
    return Evaluation(best, best5, float(loss.compute()), 100 * majority, len(pictures))


def classify(
    images: Sequence[str | Path | BinaryIO | Image.Image], model: nn.Module, *, top: int = 5, batch_size: int = 16
) -> list[list[Prediction]]:
    """Return the `top` most probable classes of each picture, the best first, fewer if the model has fewer.

    Pictures are prepared as the model's `pretrained_cfg` says, on its device; it is put in evaluation mode. Raises
    FileNotFoundError, and ValueError that names a file which is no picture.
    """
    if top < 1:
        raise ValueError(f"top={top} must be at least 1")
    config = resolve_model_data_config(model)
    transform = create_transform(**config)
    names = class_names(model)
    device = next(model.parameters()).device
    model.eval()
    predictions = []
    for start in range(0, len(images), batch_size):
        pictures = [transform(read_picture(image)) for image in images[start : start + batch_size]]
        with torch.inference_mode():
            probabilities = model(torch.stack(pictures).to(device)).float().softmax(-1)
        values, indices = (found.tolist() for found in probabilities.topk(min(top, len(names))))
        for row, chosen in zip(values, indices, strict=True):
            predictions.append([Prediction(names[i], i, value) for i, value in zip(chosen, row, strict=True)])
    return predictions


def class_names(model: nn.Module) -> list[str]:
    """Return the names of the model's classes: those it was trained on, ImageNet's for 1,000 classes, else numbers.

    WordNet's numbers ("n01440764"), which ImageNet's folders have for names, become words.
    """
    count = cast(int, model.num_classes)
    config = cast(dict[str, Any], model.pretrained_cfg)
    names = list(config.get("label_names") or ())
    imagenet = ImageNetInfo()
    if not names and count == imagenet.num_classes():
        names = imagenet.label_names()
    if len(names) != count:
        return [f"class {number}" for number in range(count)]
    synsets = set(imagenet.label_names())
    return [imagenet.label_name_to_description(name) if name in synsets else name for name in names]
