"""Networks by name: of timm, of torchvision, of a search space, or of the user's own module."""

import importlib
from typing import Any

import timm
import torchvision
from torch import nn

import diswot.networks  # noqa: F401 - registers the models
from visionkernels.recipes import check_known

__all__ = ["create_network"]


def create_network(name: str, *, num_classes: int | None = None, **options: Any) -> nn.Module:
    """Return a network with random weights.

    `name` is one of timm's, with or without "timm:" (ours are among them: s0_713, nb201, ...), "torchvision:resnet18",
    "SPACE:KEY" of a search space, or "package.module:callable" for a function that takes `num_classes` and returns a
    network. Raises ValueError for names that nobody knows, with the nearest.
    """
    if num_classes is not None:
        options["num_classes"] = num_classes
    source, colon, rest = name.partition(":")
    if not colon or source == "timm":
        model_name = rest if colon else name
        check_known("model of timm", model_name, timm.list_models(), listing="timm.list_models() lists them")
        return timm.create_model(model_name, **options)
    if source == "torchvision":
        check_known("model of torchvision", rest, torchvision.models.list_models(torchvision.models))
        return torchvision.models.get_model(rest, **options)
    from diswot import spaces

    if source in spaces.SPACES:
        return spaces.create(source).build(rest, **options)
    try:
        build = getattr(importlib.import_module(source), rest)
        if not callable(build):
            raise TypeError(f"{rest} is a {type(build).__name__}, not callable")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"model {name!r}: {error}; give a name of timm, torchvision:NAME, SPACE:KEY or module:callable"
        ) from error
    model = build(**options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r} gave a {type(model).__name__}, which is no torch.nn.Module")
    return model
