"""A model by name, the same names in all packages: of timm, of torchvision, or a callable of the user's."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any
from urllib.error import URLError

from torch import nn

from visionkernels.checks import InputError, check_known
from visionkernels.extras import require

__all__ = ["classifier_name", "create", "is_callable"]


def create(name: str, *, num_classes: int | None = None, pretrained: bool = False, **options: Any) -> nn.Module:
    """Return the model `name` with random weights, or with published ones where they are `pretrained`.

    `name` is one of timm's, with or without "timm:"; "torchvision:NAME"; or "module:callable", a function that returns
    a module. `num_classes` None keeps the model's own; other `options` go to timm or the callable. Raises InputError
    for an unknown name, with near ones, and for published weights that cannot be had.
    """
    source, colon, rest = name.partition(":")
    if num_classes is not None:
        options["num_classes"] = num_classes
    if not colon or source == "timm":
        return _of_timm(rest if colon else name, pretrained, options)
    if source == "torchvision":
        return _of_torchvision(rest, num_classes, pretrained)
    if pretrained:
        raise InputError(f"pretrained weights are published by timm and torchvision; {name} brings its own")
    return _called(name, source, rest, options)


def is_callable(name: str | None, sources: Sequence[str] = ()) -> bool:
    """Tell whether `name` is "module:callable", code that is imported and run; `sources` are no modules."""
    source, colon, _ = (name or "").partition(":")
    return bool(colon) and source not in ("timm", "torchvision", *sources)


def classifier_name(model: nn.Module) -> str:
    """Return the name of the classifier: what timm's `get_classifier` says, or the last linear layer, or convolution.

    Raises InputError for a model without one.
    """
    modules = dict(model.named_modules())
    if callable(get_classifier := getattr(model, "get_classifier", None)):
        classifier = get_classifier()
        name = next((name for name, module in modules.items() if module is classifier), None)
        if name is not None and isinstance(classifier, nn.Linear | nn.Conv2d):
            return name
    for kind in (nn.Linear, nn.Conv2d):
        if names := [name for name, module in modules.items() if isinstance(module, kind)]:
            return names[-1]
    raise InputError(f"{type(model).__name__} has no classifier")


def _of_timm(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    timm = require("timm", "timm")
    known = name.partition(".")[0]  # "resnet18.a1_in1k": which weights, timm checks
    if not timm.is_model(known) and not name.startswith("hf-hub:"):
        from visionkernels.package import installed_packages

        for package in installed_packages().values():
            package.register_models()
        check_known("model", known, timm.list_models(), listing="timm.list_models() lists them")
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise InputError(f"the published weights of {name} cannot be had: {_first_line(error)}") from error
    return model


def _of_torchvision(name: str, num_classes: int | None, pretrained: bool) -> nn.Module:
    torchvision = require("torchvision", "torchvision")
    check_known("torchvision model", name, torchvision.models.list_models(module=torchvision.models))
    if not pretrained:
        own = {} if num_classes is None else {"num_classes": num_classes}
        built: nn.Module = torchvision.models.get_model(name, **own)
        return built
    try:
        model: nn.Module = torchvision.models.get_model(name, weights="DEFAULT")
    except URLError as error:
        raise InputError(f"the published weights of torchvision:{name} cannot be had: {error.reason}") from error
    if num_classes is not None:
        _replace_classifier(model, num_classes)
    return model


def _replace_classifier(model: nn.Module, num_classes: int) -> None:
    """Give a torchvision model as many outputs: in its last linear layer, or SqueezeNet in its last 1x1 convolution."""
    name = classifier_name(model)
    last = model.get_submodule(name)
    if isinstance(last, nn.Linear):
        if last.out_features != num_classes:
            model.set_submodule(name, nn.Linear(last.in_features, num_classes))
    elif isinstance(last, nn.Conv2d) and last.out_channels != num_classes:
        model.set_submodule(name, nn.Conv2d(last.in_channels, num_classes, 1))


def _called(name: str, module: str, attribute: str, options: dict[str, Any]) -> nn.Module:
    try:
        build: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"model {name!r} cannot be imported: {error}; give a name of timm, torchvision:NAME or module:callable"
        ) from error
    if not callable(build):
        raise InputError(f"model {name!r} is a {type(build).__name__}, which cannot be called")
    model = build(**options)
    if not isinstance(model, nn.Module):
        raise InputError(f"model {name!r} gave a {type(model).__name__}; expected a torch.nn.Module")
    return model


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
