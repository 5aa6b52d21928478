"""Time of a convolution's training step on this machine, exact and filtered."""

from collections.abc import Sequence
from functools import partial
from statistics import quantiles
from typing import Any, cast

import torch
from torch import nn

from gradfilter.conv import FilteredConv2d, pads_to_same, timm_layer
from gradfilter.trace import Call
from visionkernels.ops.filtered_conv import Radius
from visionkernels.profiling import Timing, compare

__all__ = ["step_seconds", "wins_time"]

MARGIN = 0.05


def wins_time(call: Call, radius: Radius, *, needs_input_gradient: bool = True) -> bool:
    """Measure whether forward and backward of the layer are faster filtered than exact, on its traced sizes.

    The median and the fastest step must be faster by `MARGIN`, and the upper quartile of the filtered steps must be
    faster than the lower quartile of the exact ones: where memory must be fetched again, times scatter.
    """
    exact, filtered = _time_steps(call, [None, radius], needs_input_gradient=needs_input_gradient, repeats=9)
    pairs = ((filtered.median, exact.median), (min(filtered.samples), min(exact.samples)))
    is_faster = all(ours * (1 + MARGIN) < theirs for ours, theirs in pairs)
    return is_faster and quantiles(filtered.samples)[2] < quantiles(exact.samples)[0]


def step_seconds(
    call: Call, radii: Sequence[Radius | None], *, needs_input_gradient: bool = True, repeats: int = 5
) -> list[float]:
    """Return the median seconds of forward and backward of one layer for each radius (None: exact), measured in turns.

    The layer is a copy with its own weights, on the device of the call's module; its input is random.
    """
    timings = _time_steps(call, radii, needs_input_gradient=needs_input_gradient, repeats=repeats)
    return [timing.median for timing in timings]


def _time_steps(
    call: Call, radii: Sequence[Radius | None], *, needs_input_gradient: bool, repeats: int
) -> list[Timing]:
    weight = call.module.weight
    x = torch.randn(call.input_size, dtype=weight.dtype, device=weight.device).requires_grad_(needs_input_gradient)
    grad = torch.randn(call.output_size, dtype=weight.dtype, device=weight.device)
    layers = [_layer(call.module, radius) for radius in radii]

    def step(layer: nn.Conv2d) -> None:
        wanted = [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]
        torch.autograd.grad(layer(x), [*wanted, x] if needs_input_gradient else wanted, grad)

    candidates = {str(i): partial(step, layer) for i, layer in enumerate(layers)}
    timings = compare(candidates, threads=torch.get_num_threads(), repeats=repeats, min_seconds=0.01)
    return list(timings.values())


def _layer(conv: nn.Conv2d, radius: Radius | None) -> nn.Conv2d:
    options: dict[str, Any] = {
        name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    }
    weight = conv.weight
    layer = nn.Conv2d(
        conv.in_channels, conv.out_channels, bias=conv.bias is not None, device=weight.device, dtype=weight.dtype,
        **options,
    )  # fmt: skip
    if pads_to_same(conv):
        layer.__class__ = cast(type[nn.Conv2d], timm_layer("Conv2dSame"))  # of the same attributes
    return layer if radius is None else FilteredConv2d.from_conv(layer, radius)
