"""Compare the filtered gradients of a real batch with the exact ones, layer by layer.

The error of a weight's gradient is a product of what the filter removes from the output gradient and what it removes
from the input, plus the change of the input within the reach of the kernel. It is small where either is smooth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from gradfilter.conv import FilteredConv2d, pad_first, why_unfilterable
from gradfilter.conversion import choose, exact_twin
from gradfilter.trace import call_model, trace
from visionkernels.checks import InputError
from visionkernels.modules import copy_module
from visionkernels.ops.filtered_conv import (
    Border,
    Radius,
    check_border,
    check_radius,
    pad_unevenly,
    patch_mean,
    saved_input,
)

__all__ = ["Diagnosis", "LayerDiagnosis", "diagnose"]


@dataclass(frozen=True)
class LayerDiagnosis:
    """Figures of one layer, for the exact output gradient of the whole network; `diagnose` defines them.

    A figure is None where its denominator, a gradient or an input, is zero.
    """

    name: str
    radius: tuple[int, int]
    gradient_energy: float | None
    input_energy: float | None
    weight_cosine: float | None
    weight_norm_ratio: float | None
    weight_error: float | None
    weight_error_bound: float | None
    input_cosine: float | None
    input_norm_ratio: float | None


@dataclass(frozen=True)
class Diagnosis:
    """The layers in the order of execution."""

    layers: tuple[LayerDiagnosis, ...]

    def __str__(self) -> str:
        headers = [field.name.replace("_", "\n") for field in fields(LayerDiagnosis)]
        rows = [
            [layer.name, "x".join(map(str, layer.radius)), *list(vars(layer).values())[2:]] for layer in self.layers
        ]
        grid = tabulate(rows, headers, tablefmt="simple", floatfmt=".3f", missingval="-")
        # the energy is a share of the gradient's own
        lost = [layer.name for layer in self.layers if layer.gradient_energy is None]
        if not lost:
            return grid
        return (
            f"{grid}\n\nthe gradient is zero in {', '.join(lost)}: as behind a norm whose scale starts at zero "
            "(zero_init_last); diagnose trained weights"
        )


def diagnose(
    model: nn.Module,
    batch: tuple[Any, Any],
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
    *,
    radius: Radius = 2,
    last_n: int | None = None,
    layers: Sequence[str] | None = None,
    border: Border = "plain",
) -> Diagnosis:
    """Compare filtered with exact gradients on a batch (inputs, targets), for `loss(model(inputs), targets)`.

    The layers are the filtered ones of a converted model with their radii and borders, else those that `last_n` and
    `layers` choose as for `gradfilter.convert`, with `radius` and `border`. Each gets the exact output gradient g of
    the whole network and its own input x; the model does not change. For each layer:

    - `gradient_energy`, `input_energy`: share of |g|^2 and of |x|^2 (as sampled) that patch means keep, in [0, 1]; the
      signal-to-noise ratio of the filtered g is energy / (1 - energy);
    - `weight_cosine`, `weight_norm_ratio`: of the filtered gradient of the weight to the exact one;
    - `weight_error`: norm of their difference over that of the exact one, and `weight_error_bound` above it, which
      Cauchy and Schwarz prove: for output o, input c, tap u, with x_u what the tap reads, s what is sampled, A the
      patch mean, and k_u the share of outputs for which the tap reads the map if `border` is "covered", else 1,
      |g_o| |x_u,c - k_u s_c| + k_u |g_o - A g_o| |s_c - A s_c|;
    - `input_cosine`, `input_norm_ratio`: of the gradient of the input.

    Raises ValueError as `convert` does, and if the loss does not reach a layer.
    """
    check_border(border)
    inputs, targets = batch
    filters = {
        name: (module.radius, module.border)
        for name, module in model.named_modules()
        if isinstance(module, FilteredConv2d) and (last_n is None and layers is None)
    }
    twin = exact_twin(model)
    if not filters:
        chosen = choose(trace(twin, inputs), last_n, layers)
        filters = {
            call.name: (check_radius(radius), border) for call in chosen if why_unfilterable(call.module) is None
        }
    records = _record(twin, filters, lambda: loss(call_model(twin, inputs), targets))
    modules = dict(twin.named_modules())
    return Diagnosis(
        tuple(
            _compare(name, cast(nn.Conv2d, modules[name]), *records[name], *filters[name])
            for name in records
            if name in filters
        )
    )


def _record(
    model: nn.Module, names: Sequence[str] | dict[str, Any], run: Callable[[], Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return input and output gradient of the named layers, in the order of execution."""
    records: dict[str, list[Tensor]] = {}

    def note(name: str, x: Tensor, output: Tensor) -> None:
        # a layer that is called twice is judged by its last call
        records.pop(name, None)
        records[name] = [x.detach()]
        output.register_hook(lambda grad: records[name].append(grad))

    handles = []
    for name, module in model.named_modules():
        if name in names:
            cast(Tensor, module.weight).requires_grad_()
            handles.append(
                module.register_forward_hook(lambda _, inputs, output, name=name: note(name, inputs[0], output))
            )
    with torch.enable_grad():
        run().backward()
    for handle in handles:
        handle.remove()
    for name in names:
        if len(records.get(name, ())) < 2:
            raise InputError(f"the loss does not depend on {name!r}; diagnose the layers that it reaches")
    return {name: (record[0], record[1]) for name, record in records.items()}


def _compare(
    name: str, conv: nn.Conv2d, x: Tensor, grad: Tensor, radius: tuple[int, int], border: Border
) -> LayerDiagnosis:
    x, grad = x.double(), grad.double()
    conv = copy_module(conv).double()
    exact_weight, exact_input = _gradients(conv, x, grad)
    weight, input_grad = _gradients(FilteredConv2d.from_conv(conv, radius, border=border), x, grad)
    x, padding = _pad(conv, x)
    sampled, read = _samples(conv, x, padding)
    # [taps]
    ones = torch.ones_like(x[:1, :1])
    share = _samples(conv, ones, padding)[1].mean((0, 1, 3)) if border == "covered" else x.new_ones(())
    smooth_grad, smooth_samples = _smooth(grad, radius), _smooth(sampled, radius)
    across = (0, 2, 3)
    grad_norm, grad_rest = grad.square().sum(across).sqrt(), (grad - smooth_grad).square().sum(across).sqrt()
    samples_rest = (sampled - smooth_samples).square().sum(across).sqrt()
    # [Ci, taps] and, by groups, [Co, Ci / g, taps]
    reach = (read - share[..., None] * sampled.flatten(2)[:, :, None]).square().sum((0, 3)).sqrt()
    groups = conv.groups
    grad_norms, grad_rests = (norm.view(groups, -1, 1, 1) for norm in (grad_norm, grad_rest))
    bound = grad_norms * reach.view(groups, 1, -1, reach.shape[1])
    bound = bound + share * grad_rests * samples_rest.view(groups, 1, -1, 1)
    return LayerDiagnosis(
        name=name,
        radius=radius,
        gradient_energy=_energy(smooth_grad, grad),
        input_energy=_energy(smooth_samples, sampled),
        weight_cosine=_cosine(weight, exact_weight),
        weight_norm_ratio=_ratio(weight.norm(), exact_weight.norm()),
        weight_error=_ratio((weight - exact_weight).norm(), exact_weight.norm()),
        weight_error_bound=_ratio(bound.norm(), exact_weight.norm()),
        input_cosine=_cosine(input_grad, exact_input),
        input_norm_ratio=_ratio(input_grad.norm(), exact_input.norm()),
    )


def _gradients(conv: nn.Conv2d, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    weight, input_grad = torch.autograd.grad(conv(x), (conv.weight, x), grad)
    return weight, input_grad


def _pad(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return the input with the padding that counts as pixels, and the zeros that are left to pad on both sides."""
    x, padding = pad_first(conv, x)
    stride, dilation = cast(Any, conv.stride), cast(Any, conv.dilation)
    return pad_unevenly(x, padding, conv.kernel_size, stride, dilation)


def _samples(conv: nn.Conv2d, x: Tensor, padding: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return what the filter samples for each output [N, Ci, Ho, Wo], and what each tap reads [N, Ci, taps, Ho Wo]."""
    geometry = {"stride": conv.stride, "padding": padding, "dilation": conv.dilation}
    sampled = saved_input(x, conv.kernel_size, radius=1, **geometry)  # type: ignore[arg-type]
    read = F.unfold(x, conv.kernel_size, **geometry)  # type: ignore[arg-type]
    return sampled, read.unflatten(1, (x.shape[1], -1))


def _smooth(x: Tensor, radius: tuple[int, int]) -> Tensor:
    """Replace each patch by its mean."""
    means = patch_mean(x, radius)
    for axis, side in ((2, radius[0]), (3, radius[1])):
        means = means.repeat_interleave(side, axis).narrow(axis, 0, x.shape[axis])
    return means


def _energy(smooth: Tensor, x: Tensor) -> float | None:
    return _ratio(smooth.square().sum(), x.square().sum())


def _cosine(left: Tensor, right: Tensor) -> float | None:
    return _ratio((left * right).sum(), left.norm() * right.norm())


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return float(part / whole) if whole > 0 else None
