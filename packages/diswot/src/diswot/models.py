"""Networks by name: of timm, of torchvision, of a search space, or of a user's module."""

from typing import Any

from torch import nn

import diswot.networks  # noqa: F401 - registers the models
from diswot.networks.registration import CIFAR_MEAN, CIFAR_STD
from visionkernels import models

__all__ = ["create_network"]


def create_network(name: str, *, num_classes: int | None = None, **options: Any) -> nn.Module:
    """Return a network with random weights.

    `name` is "SPACE:KEY" of a search space, or as `visionkernels.models.create` takes it: one of timm's (ours are among
    them: s0_713, nb201, ...), "torchvision:resnet18", or "package.module:callable" for a function that takes
    `num_classes`. A network of a space or of a user without a `pretrained_cfg` gets CIFAR's. Raises
    InputError for unknown names, with the nearest.
    """
    source, colon, key = name.partition(":")
    if not colon or source in ("timm", "torchvision"):
        return models.create(name, num_classes=num_classes, **options)
    from diswot import spaces  # whose networks may be any of timm's

    cfg = {
        "input_size": (3, 32, 32),
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }
    if source in spaces.SPACES:
        space = spaces.create(source)
        cfg["input_size"] = space.input_size
        classes = {} if num_classes is None else {"num_classes": num_classes}
        model = space.build(key, **classes, **options)
        own = getattr(model, "pretrained_cfg", None) or cfg
        model.pretrained_cfg = {**own, "input_size": space.input_size}  # type: ignore[assignment]
    else:
        model = models.create(name, num_classes=num_classes, **options)
    if not getattr(model, "pretrained_cfg", None):
        model.pretrained_cfg = cfg  # type: ignore[assignment]
    return model
