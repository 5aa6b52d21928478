"""The named trees as timm models, built for a volume's shape and a number of parameters, without its values."""

from functools import partial
from typing import Any

from tinc.official.allocation import TreePlan, allocate, check_divisible
from tinc.official.model import OctreeMLP
from tinc.recipes import equal_shares, find_recipe
from visionkernels.extras import require

require("timm.models", "tinc-vision[train]")
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model  # noqa: E402 - named above

__all__ = ["tinc_default", "tinc_multi0", "tinc_multi1", "tinc_multi2"]

# every volume is a model of its own, so that there is nothing to download
default_cfgs = generate_default_cfgs(
    {
        f"tinc_{name}": {"url": "", "num_classes": -1, "input_size": None, "license": "apache-2.0"}
        for name in ("default", "multi0", "multi1", "multi2")
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> OctreeMLP:
    if pretrained:
        raise ValueError(f"pretrained=True: tinc_{name} has no weights to download, since each volume is its own model")
    for argument in ("num_classes", "in_chans", "img_size", "global_pool", "features_only"):
        if argument in kwargs:
            raise ValueError(
                f"tinc_{name} takes no {argument}; it reads coordinates, and takes volume_shape, parameters, channels "
                "and seed"
            )
    for argument in ("volume_shape", "parameters"):
        if argument not in kwargs:
            raise ValueError(f"tinc_{name} needs {argument}=, e.g. volume_shape=(8, 128, 128), parameters=4096")
    return build_model_with_cfg(partial(_build, name), f"tinc_{name}", False, **kwargs)


def _build(
    name: str, *, volume_shape: tuple[int, int, int], parameters: int, channels: int = 1, seed: int = 42
) -> OctreeMLP:
    recipe = equal_shares(find_recipe(name))
    check_divisible(volume_shape, len(recipe.levels))
    plan = TreePlan(
        nodes=allocate(recipe.levels, parameters, channels=channels),
        volume_shape=volume_shape,
        activations=tuple(level.activation for level in recipe.levels),
        w0=recipe.w0,
    )
    return OctreeMLP(plan, seed=seed)


@register_model
def tinc_default(pretrained: bool = False, **kwargs: Any) -> OctreeMLP:
    """Three levels, 73 nodes; little for the middle level. At most `parameters` for `volume_shape` and `channels`."""
    return _create("default", pretrained, **kwargs)


@register_model
def tinc_multi0(pretrained: bool = False, **kwargs: Any) -> OctreeMLP:
    """One network of five layers. At most `parameters` for `volume_shape` and `channels`."""
    return _create("multi0", pretrained, **kwargs)


@register_model
def tinc_multi1(pretrained: bool = False, **kwargs: Any) -> OctreeMLP:
    """Two levels, 9 nodes. At most `parameters` for `volume_shape` and `channels`."""
    return _create("multi1", pretrained, **kwargs)


@register_model
def tinc_multi2(pretrained: bool = False, **kwargs: Any) -> OctreeMLP:
    """Three levels, 73 nodes. At most `parameters` for `volume_shape` and `channels`."""
    return _create("multi2", pretrained, **kwargs)
