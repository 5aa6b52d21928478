"""Networks as timm models: their configurations and entry points."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from timm.models import build_model_with_cfg, register_model
from torch import nn

from diswot.networks.staged import StagedClassifier

__all__ = ["CIFAR_MEAN", "CIFAR_STD", "network_cfg", "register_variants"]

CIFAR_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR_STD = (0.2675, 0.2565, 0.2761)


def network_cfg(first_conv: str, classifier: str, *, size: int = 32, num_classes: int = 100) -> dict[str, Any]:
    """Return a timm configuration of CIFAR's normalisation; no network of the package has weights to download."""
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 1.0 if size == 32 else 0.875,
        "interpolation": "bilinear",
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "first_conv": first_conv,
        "classifier": classifier,
        "license": "apache-2.0",
    }


def register_variants(
    module: str, network: type[StagedClassifier], variants: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> None:
    """Register timm models of the module named `module`, which has their `default_cfgs`.

    `variants` maps each name to its docstring and to the arguments of `network` that it sets.
    """
    for name, (summary, sizes) in variants.items():
        create = _entry_point(name, network, dict(sizes))
        create.__module__, create.__name__, create.__qualname__, create.__doc__ = module, name, name, summary
        setattr(sys.modules[module], name, register_model(create))


def _entry_point(name: str, network: type[StagedClassifier], sizes: dict[str, Any]) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        img_size = kwargs.pop("img_size", None)
        if img_size is not None:
            size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
            kwargs["pretrained_cfg_overlay"] = {"input_size": (3, *size)} | (kwargs.get("pretrained_cfg_overlay") or {})
        feature_cfg = {"feature_cls": "getter", "out_indices": None}
        options = sizes | kwargs
        model: nn.Module = build_model_with_cfg(network, name, pretrained, feature_cfg=feature_cfg, **options)
        return model

    return create
