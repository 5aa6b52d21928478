"""Proxies of which units are on: NWOT, and the number of linear regions."""

import math

import torch
from torch import Tensor, nn

from visionkernels.checks import InputError

__all__ = ["linear_regions", "nwot", "patterns"]


@torch.no_grad()
def patterns(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return for each call of a ReLU module which inputs are above 0: bools [batch, units].

    Functional ReLUs are not seen, such as the last one of a residual block: that is the proxies' definition.
    """
    codes: list[Tensor] = []
    modules = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    if not modules:
        raise InputError(f"{type(model).__name__} has no ReLU modules, which nwot and linear_regions look at")
    handles = [
        module.register_forward_pre_hook(lambda _, inputs: codes.append((inputs[0] > 0).flatten(1)))
        for module in modules
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return codes


def nwot(codes: list[Tensor]) -> float:
    """Return log |det K| with K = sum over ReLUs of x x^T + (1 - x)(1 - x)^T for patterns x; -inf for singular K."""
    kernel = torch.zeros(len(codes[0]), len(codes[0]), dtype=torch.float64)
    for code in codes:
        # counts of agreeing units are whole numbers, exact in float32 below 2**24
        on = code.float()
        kernel += (on @ on.T + (1 - on) @ (1 - on).T).cpu()
    sign, logarithm = torch.linalg.slogdet(kernel)
    return float(logarithm) if float(sign) else -math.inf


def linear_regions(codes: list[Tensor]) -> int:
    """Return how many different patterns the images of a batch have."""
    return len(torch.unique(torch.cat(codes, 1), dim=0))
