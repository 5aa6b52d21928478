"""All proxies by name, each computed on a copy of the network in training mode."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diswot.initialisation import Draws, Init, draws_of, generator_for, initialise
from diswot.networks.counting import count_macs
from diswot.observation import check_batch
from diswot.proxies import activations, gradients, inputs
from diswot.scoring import rankable
from visionkernels.checks import InputError, check_known
from visionkernels.modules import copy_module

__all__ = ["PROXIES", "Setting", "compute", "names"]


class Setting(NamedTuple):
    """The inputs of a proxy; it may change the model, which is a copy."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    init: Init
    redraw: Callable[[nn.Module, Init], None]
    """Draws weights for the seed and the key."""
    generator: torch.Generator
    """Generator of noise."""


def _noise(setting: Setting) -> Tensor:
    return torch.randn(setting.images.shape, generator=setting.generator).to(setting.images)


def _activations(setting: Setting) -> dict[str, float]:
    codes = activations.patterns(setting.model, setting.images)
    return {"nwot": activations.nwot(codes), "linear_regions": activations.linear_regions(codes)}


def _jacobian(setting: Setting) -> dict[str, float]:
    rows = inputs.jacobian(setting.model, setting.images)
    with torch.no_grad():
        num_classes = setting.model(setting.images).shape[1]
    return {"jacov": inputs.jacov(rows), "epe_nas": inputs.epe_nas(rows, setting.labels, num_classes)}


def _zen(setting: Setting) -> dict[str, float]:
    # defined for weights from N(0, 1); "keep" uses the present ones
    if setting.init != "keep":
        setting.redraw(setting.model, "gaussian")
    return {"zen": inputs.zen(setting.model, _noise(setting), _noise(setting))}


def _bn_logvar(setting: Setting) -> dict[str, float]:
    if setting.init != "keep":
        setting.redraw(setting.model, "gaussian")
    return {"bn_logvar": inputs.bn_logvar(setting.model, _noise(setting))}


def _counts(setting: Setting) -> dict[str, float]:
    channels, height, width = setting.images.shape[1:]
    return {
        "params": sum(weight.numel() for weight in setting.model.parameters()),
        "flops": count_macs(setting.model, (channels, height, width)),
    }


Family = Callable[[Setting], Mapping[str, float]]
_FAMILIES: dict[tuple[str, ...], Family] = {
    ("grad_norm", "grad_norm_all", "snip", "plain", "snip_mean", "fisher"): lambda setting: gradients.backward(
        setting.model, setting.images, setting.labels
    ),
    ("grasp",): lambda setting: {"grasp": gradients.grasp(setting.model, setting.images, setting.labels)},
    ("synflow",): lambda setting: {"synflow": gradients.synflow(setting.model, setting.images)},
    ("synflow_bn",): lambda setting: {"synflow_bn": gradients.synflow(setting.model, setting.images, with_norms=True)},
    ("jacov", "epe_nas"): _jacobian,
    ("nwot", "linear_regions"): _activations,
    ("l2_norm",): lambda setting: {"l2_norm": gradients.l2_norm(setting.model)},
    ("zen",): _zen,
    ("bn_logvar",): _bn_logvar,
    ("ntk",): lambda setting: {"ntk": -inputs.ntk_condition(setting.model, setting.images)},
    ("params", "flops"): _counts,
}
PROXIES: dict[str, Family] = {name: family for family_names, family in _FAMILIES.items() for name in family_names}
"""Each function gives a proxy and those that come with it."""


def names() -> tuple[str, ...]:
    """Return all proxies' names; higher is said to be better for each."""
    return tuple(PROXIES)


def compute(
    proxies: str | Sequence[str],
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    init: Init = "keep",
    seed: int = 0,
    key: str = "student",
    draws: Draws = "own",
) -> dict[str, float]:
    """Return proxies by name, of a copy of the model in training mode, at least float32; higher is said to be better.

    `init`, `seed`, `key` and `draws` as in `diswot.scoring.TeacherCache`. A figure that is NaN or +infinity is NaN,
    with a warning; -infinity is a value (a singular kernel of nwot). Raises ValueError for unknown names and for a
    batch or a network that does not fit.
    """
    wanted = [proxies] if isinstance(proxies, str) else list(proxies)
    for name in wanted:
        check_known("proxy", name, PROXIES)
    check_batch(images, labels)

    def redraw(own: nn.Module, init: Init) -> None:
        initialise(own, init, draws_of(seed, key, draws))

    values: dict[str, float] = {}
    for name in wanted:
        if name not in values:
            generator = generator_for(seed, f"noise/{key}")
            values |= _run(PROXIES[name], model, images, labels, init, redraw, generator)
    return {name: rankable(name, float(values[name])) for name in wanted}


def _run(
    family: Family,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    init: Init,
    redraw: Callable[[nn.Module, Init], None],
    generator: torch.Generator,
) -> Mapping[str, float]:
    own = copy_module(model).train().requires_grad_(True)
    redraw(own, init)
    weight = next(own.parameters(), None)
    if weight is None:
        raise InputError(f"{type(model).__name__} has no parameters, and so no proxies")
    own.to(torch.promote_types(weight.dtype, torch.float32))
    device = weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(generator.initial_seed())
        return family(Setting(own, images.to(weight), labels.to(device), init, redraw, generator))
