"""Registry of the spaces."""

from collections.abc import Callable
from functools import partial
from typing import Any

from diswot.networks.checkpoint import variant_names
from diswot.spaces.nasbench101 import NasBench101
from diswot.spaces.nasbench201 import NasBench201
from diswot.spaces.protocol import Space
from diswot.spaces.s0 import S0
from diswot.spaces.structures import StructureSpace
from diswot.spaces.timm_models import TIMM_PRESETS, TimmSpace
from visionkernels.checks import InputError, check_known

__all__ = ["SPACES", "create", "kin_of"]

SPACES: dict[str, Callable[..., Space]] = {
    "s0": S0,
    "nasbench201": NasBench201,
    "nasbench101": NasBench101,
    "xxbl": partial(StructureSpace, "xxbl"),
    "res18": partial(StructureSpace, "res18"),
    "timm": TimmSpace,
    **{f"timm_{name}": partial(TimmSpace.preset, name) for name in TIMM_PRESETS},
}


def create(name: str, **options: Any) -> Space:
    """Return the space `name`; `options` are those of its class, e.g. `create("nasbench201", width=8, cells=1)`.

    "xxbl" and "res18" are the spaces of structure strings, "timm_resnet" and the like presets of `TimmSpace`. Raises
    ValueError for unknown names, with the nearest, and for options that the space does not take.
    """
    check_known("space", name, SPACES)
    try:
        return SPACES[name](**options)
    except TypeError as error:
        given = f"the options {', '.join(options)}" if options else "no options"
        raise InputError(f"space {name} cannot be made with {given}: {error}") from error


# prefixes of names of teachers
_KINDS = {
    "timm_convnext": ("convnext",),
    "timm_vit": ("vit_", "deit", "beit", "eva", "flexivit"),
    "timm_efficientnet": ("efficientnet", "tf_efficientnet", "mixnet"),
    "timm_mobilenet": ("mobilenet", "tf_mobilenet", "lcnet", "tinynet"),
}


def kin_of(teacher: str) -> str:
    """Return the space whose networks are of the kind of a teacher, by its name as `create_network` takes it.

    It is SPACE for "SPACE:KEY", and s0 for this package's own. A teacher of no kind that has a space gets
    "timm_resnet".
    """
    source, colon, rest = teacher.partition(":")
    if colon and source != "timm" and source in SPACES:
        return source
    name = rest if source in ("timm", "torchvision") else teacher
    if name in variant_names():
        return "s0"
    kinds = (space for space, starts in _KINDS.items() if name.startswith(starts))
    return next(kinds, "timm_resnet")
