"""Convolution with the exact forward pass and a backward pass on patch means (gradient filtering, sec. 3)."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from visionkernels.checks import InputError
from visionkernels.modules import is_exporting
from visionkernels.ops._checks import check_devices, check_floating
from visionkernels.ops._dispatch import Backend, choose_backend, implementation, is_autocast, without_autocast
from visionkernels.ops.filtered_conv import eager
from visionkernels.ops.filtered_conv.geometry import ConvGeometry, patch_axis

__all__ = [
    "Border",
    "Radius",
    "check_border",
    "check_radius",
    "filtered_conv2d",
    "grid_size",
    "kernel_sum",
    "pad_unevenly",
    "patch_mean",
    "saved_input",
]

Radius = int | tuple[int, int]
Border = Literal["plain", "covered"]


def filtered_conv2d(
    x: Float[Tensor, "*batch in_channels height width"],
    weight: Float[Tensor, "out_channels in_channels_of_group kernel_height kernel_width"],
    bias: Float[Tensor, " out_channels"] | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    radius: Radius = 2,
    *,
    border: Border = "plain",
    kernel: Float[Tensor, "out_channels in_channels_of_group"] | None = None,
    straight_through: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "*batch out_channels out_height out_width"]:
    r"""Convolve exactly, and filter the gradients (Yang, Li and Marculescu, CVPR 2023, sec. 3).

    The value is that of `torch.nn.functional.conv2d` with the same arguments. In backward the output gradient is
    replaced by its mean g over patches of `radius` x `radius` outputs (rows, columns), the last ones cut off by the
    map's edge. With the sums X of the input over the pixels that a patch samples, and the sum T of the kernel's taps,

        d weight[o, c, u, v] = sum g[n, o, p, q] X[n, c, p, q]  for every tap u, v
        d x                  = the pixels of each patch get sum_o T[o, c] g[n, o, p, q]
        d bias               = exact

    so both products run on a map radius^2 times smaller, as if the kernel were 1x1, and only X is kept for backward.
    `radius=1` still treats the kernel as one tap; exact gradients are those of `conv2d`. Sums are float32 (float64
    for float64 input) and d x, d weight have the inputs' dtype. A NaN or infinity spoils its patch, and on a
    CPU its whole image.

    `border="covered"` weights each tap by the share of outputs for which it reads the map and no padding, in T and in
    d weight: closer to the exact gradient on maps of few pixels. `kernel` gives T to a caller who keeps it up to date;
    eager's d weight is then a view that repeats one value for all taps, and no weight-sized tensor is touched in
    backward (not with "covered"). `straight_through` builds the same value and gradients from
    ordinary operations, for graphs that are exported with their backward (export inlines custom functions and would
    record the exact backward); inside `torch.export` it is implied. Autocast works as for `conv2d`.

    A second derivative raises RuntimeError; forward-mode derivatives and torch.func raise torch's own errors. With
    `straight_through` they are those of the 1x1 convolution on patch means that has the filtered gradients, not of the
    convolution.

    Raises TypeError for dtypes and devices, ValueError for a wrong radius, border, stride, padding, dilation, groups or
    shape, and RuntimeError for a kernel larger than the padded input or `backend="triton"` where it cannot run.
    """
    rows_columns = check_radius(radius)
    _check(x, weight, bias, groups)
    check_border(border)
    if kernel is not None and (border != "plain" or kernel.shape != weight.shape[:2]):
        raise InputError(
            f"kernel has shape {list(kernel.shape)} with border={border!r}; expected {list(weight.shape[:2])} and "
            "border='plain'"
        )
    if is_autocast(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    strides, dilations = _pair(stride, "stride"), _pair(dilation, "dilation")
    x, paddings = pad_unevenly(x, padding, weight.shape[-2:], strides, dilations)
    geometry = ConvGeometry.of(x.shape[-2:], weight.shape[-2:], strides, paddings, dilations, rows_columns, groups)
    tap_weight = _tap_weight(geometry, weight) if border == "covered" else None
    arguments = (x if x.ndim == 4 else x[None], weight, bias, geometry, tap_weight)
    with without_autocast(x):
        if straight_through or is_exporting():
            out = eager.straight_through(*arguments)
        elif (chosen := choose_backend("filtered_conv", backend, x)) == "eager":
            out = eager.filtered_conv2d(*arguments, kernel=kernel)
        else:
            out = implementation(__name__, chosen).filtered_conv2d(*arguments)
    return out if x.ndim == 4 else out[0]


def patch_mean(
    grad: Float[Tensor, "batch channels height width"], radius: Radius
) -> Float[Tensor, "batch channels rows columns"]:
    """Average a map over patches of `radius` pixels, the last ones over the pixels that they have: the gradient filter.

    Returns float32, or float64 for float64 input. Raises TypeError for dtypes, ValueError for a wrong radius or shape.
    """
    rows, columns = check_radius(radius)
    _check_axes("grad", grad, "patch_mean", "[batch, channels, height, width]")
    return eager.mean_over_cells(grad, (patch_axis(grad.shape[2], rows), patch_axis(grad.shape[3], columns)))


def saved_input(
    x: Float[Tensor, "batch channels height width"],
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    radius: Radius = 2,
) -> Float[Tensor, "batch channels rows columns"]:
    """Sum the input over the pixels that each patch of outputs samples, for the gradient of the weight.

    Each output samples the mean of the box of pixels in the middle of its kernel's span, as wide as the stride. For
    stride 1 and "same" padding this is the plain sum over patches of the input. Raises as `filtered_conv2d` does.
    """
    _check_axes("x", x, "saved_input", "[batch, channels, height, width]")
    sizes = _pair(kernel_size, "kernel_size")
    strides, paddings, dilations = _pair(stride, "stride"), _pair(padding, "padding", 0), _pair(dilation, "dilation")
    axes = ConvGeometry.of(x.shape[-2:], sizes, strides, paddings, dilations, check_radius(radius), 1).axes
    return eager.mean_over_cells(x, axes) * eager.area(axes, x)


def kernel_sum(
    weight: Float[Tensor, "out_channels in_channels kernel_height kernel_width"],
) -> Float[Tensor, "out_channels in_channels"]:
    """Sum a kernel over its taps, for the gradient of the input.

    Raises TypeError for dtypes, ValueError for a wrong shape.
    """
    _check_axes("weight", weight, "kernel_sum", "[out_channels, in_channels, height, width]")
    return eager.kernel_sum(weight)


def grid_size(size: tuple[int, int], radius: Radius) -> tuple[int, int]:
    """Return the rows and columns of patches that cover a map of `size` (rows, columns)."""
    rows, columns = check_radius(radius)
    return -(-size[0] // rows), -(-size[1] // columns)


def check_radius(radius: object) -> tuple[int, int]:
    """Return `radius` as (rows, columns). Raises ValueError unless it is a positive integer or a pair of them."""
    pair = (radius, radius) if isinstance(radius, int) else radius
    if isinstance(pair, Sequence) and len(pair) == 2:
        rows, columns = pair
        if all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in pair):
            return rows, columns
    raise InputError(f"radius={radius!r} must be a positive integer or pair (rows, columns) of them")


def check_border(border: object) -> None:
    """Raise ValueError unless `border` is one of `Border`."""
    if border not in get_args(Border):
        raise InputError(f"border={border!r} must be 'plain' or 'covered'")


def pad_unevenly(
    x: Tensor, padding: int | Sequence[int] | str, kernel_size: Sequence[int], stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, tuple[int, int]]:  # fmt: skip
    """Return the padding as numbers, with the input padded already where the two sides of an axis differ."""
    if not isinstance(padding, str):
        return x, _pair(padding, "padding", 0)
    if padding == "valid":
        return x, (0, 0)
    if padding != "same" or stride != (1, 1):
        raise InputError(f"padding={padding!r} with stride={stride} must be numbers, 'valid', or 'same' with stride 1")
    rows, columns = (d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True))
    if rows % 2 == columns % 2 == 0:
        return x, (rows // 2, columns // 2)
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)), (0, 0)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    check_floating("filtered_conv2d", "tensors", x=x, weight=weight)
    if x.device != weight.device:
        raise TypeError(f"x is on {x.device} and weight on {weight.device}; they must be alike")
    if not is_autocast(x) and x.dtype != weight.dtype:
        raise TypeError(f"x is {x.dtype} and weight is {weight.dtype}; they must be alike")
    if x.ndim not in (3, 4) or weight.ndim != 4:
        raise InputError(
            f"x has shape {list(x.shape)} and weight {list(weight.shape)}; expected [batch, channels, height, width] "
            "or [channels, height, width], and [out_channels, in_channels / groups, height, width]"
        )
    if not isinstance(groups, int):
        raise InputError(f"groups={groups!r} must be a positive integer")
    if groups < 1 or len(weight) % groups or x.shape[-3] != groups * weight.shape[1]:
        raise InputError(
            f"x has {x.shape[-3]} channels; weight {list(weight.shape)} with groups={groups} takes "
            f"{groups * weight.shape[1]}, and groups must divide the {len(weight)} outputs"
        )
    if bias is not None:
        check_floating("filtered_conv2d", "tensors", bias=bias)
        check_devices(x=x, bias=bias)
        if not is_autocast(x) and bias.dtype != x.dtype:
            raise TypeError(f"bias is {bias.dtype} and x is {x.dtype}; they must be alike")
    if bias is not None and bias.shape != (len(weight),):
        raise InputError(f"bias has shape {list(bias.shape)}; expected [{len(weight)}], one for each output channel")


def _check_axes(name: str, tensor: Tensor, function: str, axes: str) -> None:
    check_floating(function, "tensors", **{name: tensor})
    if tensor.ndim != 4:
        raise InputError(f"{name} has shape {list(tensor.shape)}; {function} takes {axes}")


def _pair(value: object, name: str, least: int = 1) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if isinstance(pair, Sequence) and len(pair) == 2:
        first, second = pair
        if all(isinstance(side, int) and not isinstance(side, bool) and side >= least for side in pair):
            return first, second
    raise InputError(f"{name}={value!r} must be an integer of at least {least}, or a pair of them")


def _tap_weight(geometry: ConvGeometry, weight: Tensor) -> Tensor:
    rows, columns = (torch.tensor(axis.coverage, dtype=weight.dtype, device=weight.device) for axis in geometry.axes)
    return rows[:, None] * columns
