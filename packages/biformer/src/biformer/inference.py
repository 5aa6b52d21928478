"""Naming what is in a picture with a trained classifier."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import nn

from biformer.data import read_picture

__all__ = ["Prediction", "class_names", "classify"]


class Prediction(NamedTuple):
    """One of the classes that a picture may be of."""

    name: str
    number: int
    probability: float


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
