"""Filtered convolution in plain ATen: sums over cells, two small matrix products, and copies back to pixels.

Cells are summed in one of two ways. On a CPU, channels-first maps are multiplied by small constant matrices, which is
twice as fast as pooling. Channels-last maps, other devices and graphs (compile, export) add strided slices.
"""

# P, Q rows and columns of cells, M = N * P * Q

from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from visionkernels.autograd import anchor_to, first_order_only
from visionkernels.ops.filtered_conv.geometry import Axes, Axis, ConvGeometry, Slice, cell_means, cell_sums

__all__ = ["area", "filtered_conv2d", "kernel_sum", "mean_over_cells", "spread_over_cells", "straight_through"]

_MAX_MATRIX_ELEMENTS = 10_000
"""Entries of the matrix of both axes at once; above it, rows and then columns are faster (28 x 28 by 4: 1.7 times)."""

_MANY_SLICES = 6
"""Pixels of a cell from which one sum over them is faster than adding them one by one."""


def filtered_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, tap_weight: Tensor | None,
    *, kernel: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the convolution [N, Co, Ho, Wo]; see the public function."""
    anchor = anchor_to("filtered_conv2d", x, weight, bias)
    return _FilteredConv.apply(x, weight, bias, geometry, tap_weight, kernel, anchor)  # type: ignore[no-any-return]


class _FilteredConv(torch.autograd.Function):
    """Keeps the means of the input over the cells instead of the input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, tap_weight: Tensor | None,
        kernel: Tensor | None, anchor: Tensor | None,
    ) -> Tensor:  # fmt: skip
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        # means and not sums: a sum of 49 values overflows float16, and loses the last bits of bfloat16
        means = mean_over_cells(x, geometry.axes).to(x.dtype) if needs_weight else None
        ctx.save_for_backward(weight if needs_x and kernel is None else None, kernel if needs_x else None, means,
                              tap_weight)  # fmt: skip
        ctx.geometry, ctx.weight_shape, ctx.dtype = geometry, weight.shape, x.dtype
        ctx.repeats_taps, ctx.anchor = kernel is None, anchor
        return geometry.convolve(x, weight, bias)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, kernel, input_means, tap_weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        axes, groups, dtype = ctx.geometry.axes, ctx.geometry.groups, ctx.dtype
        grad_means = mean_over_cells(grad, ctx.geometry.patches)
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            kernel = kernel_sum(weight, tap_weight) if kernel is None else kernel
            mixed = _grad_of_means(grad_means, kernel.to(grad_means.dtype), groups)
            grad_x = spread_over_cells(mixed, axes).to(dtype)
        grad_sums = grad_means * area(axes, grad_means) if needs_weight or needs_bias else grad_means
        if needs_weight:
            grad_kernel = _correlate(grad_sums, input_means.to(grad_sums.dtype), groups)
            if ctx.repeats_taps:
                grad_weight = _broadcast_taps(grad_kernel, ctx.weight_shape, tap_weight).to(dtype)
            else:
                grad_weight = grad_kernel.to(dtype)[:, :, None, None].expand(ctx.weight_shape)
        if needs_bias:
            grad_bias = grad_sums.sum((0, 2, 3)).to(dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def straight_through(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, tap_weight: Tensor | None
) -> Tensor:
    """Return the same values and gradients without a custom autograd function, for graphs that are exported.

    Export inlines the forward of a custom function and so records the exact backward. Here y = conv(x, weight, bias),
    all detached, plus z - z: the 1x1 convolution z of the cells' means with the summed kernel, spread over the outputs,
    and the bias have as ordinary gradients exactly the filtered ones.
    """
    value = geometry.convolve(x.detach(), weight.detach(), None if bias is None else bias.detach())
    kernel = kernel_sum(weight, tap_weight)[:, :, None, None]
    mixed = conv2d(mean_over_cells(x, geometry.axes).to(x.dtype), kernel.to(x.dtype), None, groups=geometry.groups)
    surrogate = spread_over_cells(mixed, geometry.patches).to(x.dtype)
    surrogate = surrogate if bias is None else surrogate + bias[:, None, None]
    return value + (surrogate - surrogate.detach())


def mean_over_cells(x: Tensor, axes: Axes) -> Tensor:
    """Average [N, C, H, W] over the pixels of each cell, [N, C, P, Q]; float32, or float64 for float64 input."""
    x = _widened(x)
    if _is_plain_contiguous(x):
        rows, columns = axes
        if _fits_one_matrix(axes):
            return (x.flatten(2) @ _matrix(axes, x.dtype, "mean").mT).unflatten(2, (rows.cells, columns.cells))
        sums = _sum_slices(x, 2, rows)
        means = sums @ _matrix((columns,), x.dtype, "mean", 1 / (rows.box * rows.radius)).mT
        if rows.outputs % rows.radius:
            means[:, :, -1] *= rows.radius / (rows.outputs % rows.radius)
        return means
    sums = _sum_slices(_sum_slices(x, 2, axes[0]), 3, axes[1])
    return sums / (area(axes, x) * (axes[0].box * axes[1].box))


def spread_over_cells(cells: Tensor, axes: Axes) -> Tensor:
    """Give every pixel its cell's value times the pixel's share in the box, [N, C, P, Q] to [N, C, H, W]."""
    if _is_plain_contiguous(cells):
        rows, columns = axes
        if _fits_one_matrix(axes):
            return (cells.flatten(2) @ _matrix(axes, cells.dtype, "sum")).unflatten(2, (rows.size, columns.size))
        return _copy_slices(cells @ _matrix((columns,), cells.dtype, "sum", 1 / rows.box), 2, rows)
    share = 1 / (axes[0].box * axes[1].box)
    return _copy_slices(_copy_slices(cells * share if share != 1 else cells, 3, axes[1]), 2, axes[0])


def kernel_sum(weight: Tensor, tap_weight: Tensor | None = None) -> Tensor:
    """Sum the taps of [Co, Ci / groups, Kh, Kw], weighted if `tap_weight` [Kh, Kw] is given: [Co, Ci / groups]."""
    if weight.shape[2:].numel() == 1 and tap_weight is None:
        return weight[:, :, 0, 0]
    # a product with a vector of ones is twice as fast as a sum over the last axes
    return torch.mv(weight.flatten(2).flatten(0, 1), _taps(weight, tap_weight)).view(weight.shape[:2])


def _broadcast_taps(grad_kernel: Tensor, shape: torch.Size, tap_weight: Tensor | None) -> Tensor:
    grad_weight = grad_kernel[:, :, None, None]
    return grad_weight.expand(shape).contiguous() if tap_weight is None else grad_weight * tap_weight.to(grad_weight)


def _taps(weight: Tensor, tap_weight: Tensor | None) -> Tensor:
    if tap_weight is None:
        return weight.new_ones(weight.shape[-2:].numel())
    return tap_weight.to(weight.dtype).flatten()


def _grad_of_means(grad_means: Tensor, kernel: Tensor, groups: int) -> Tensor:
    """Multiply [N, Co, P, Q] by the transposed kernel [Co, Ci / groups]: [N, Ci, P, Q], in the layout of the former."""
    if kernel.shape[1] == 1 and len(kernel) == groups:
        return grad_means * kernel[:, :, None]
    batch, size = len(grad_means), grad_means.shape[2:]
    kernels = kernel.unflatten(0, (groups, -1))  # [g, Co / g, Ci / g]
    if batch == 1 or _is_channels_last(grad_means):
        rows = grad_means.permute(0, 2, 3, 1).flatten(0, 2).unflatten(1, (groups, -1))  # [M, g, Co / g]
        mixed = (rows.transpose(0, 1) @ kernels).transpose(0, 1).flatten(1)
        mixed = mixed.unflatten(0, (-1, *size)).permute(0, 3, 1, 2)
        return mixed if _is_channels_last(grad_means) else mixed.contiguous()
    # one wide product: a product for each image, on cells as few as these, takes twice as long
    columns = _columns(grad_means, groups)  # [g, Co / g, M]
    return (kernels.mT @ columns).flatten(0, 1).unflatten(1, (batch, *size)).transpose(0, 1).contiguous()


def _correlate(grad_sums: Tensor, input_means: Tensor, groups: int) -> Tensor:
    """Sum the products of [N, Co, P, Q] and [N, Ci, P, Q] over images and cells: [Co, Ci / groups]."""
    if grad_sums.shape[1] == input_means.shape[1] == groups:
        return (grad_sums * input_means).sum((0, 2, 3))[:, None]
    return (_columns(grad_sums, groups) @ _columns(input_means, groups).mT).flatten(0, 1)


def _columns(x: Tensor, groups: int) -> Tensor:
    """Lay [N, C, P, Q] out as [groups, C / groups, M]; channels-last maps without a copy."""
    return x.transpose(0, 1).flatten(1).unflatten(0, (groups, -1))


def _sum_slices(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Add up the pixels along `dim` that each cell samples: [..., size, ...] to [..., cells, ...]."""
    if axis.is_tiled and axis.radius * axis.stride >= _MANY_SLICES:
        return x.unflatten(dim, (axis.cells, -1)).sum(dim + 1)
    slices = list(axis.slices())
    whole = [_take(x, dim, part) for part in slices if part.end - part.begin == axis.cells]
    if len(whole) == len(slices) == 1:
        return whole[0]
    if len(whole) > 1:
        total = whole[0] + whole[1]
        for pixels in whole[2:]:
            total += pixels
    else:
        shape = [axis.cells if i == dim else size for i, size in enumerate(x.shape)]
        total = whole[0].clone() if whole else _empty_like(x, shape).zero_()
    for part in slices:
        if part.end - part.begin != axis.cells:
            total.narrow(dim, part.begin, part.end - part.begin).add_(_take(x, dim, part))
    return total


def _copy_slices(cells: Tensor, dim: int, axis: Axis) -> Tensor:
    """Copy each cell along `dim` to the pixels that it samples; other pixels get zero."""
    if axis.cells == axis.size == axis.outputs and axis.offset == 0:  # every pixel is a cell
        return cells
    if axis.is_tiled and cells.is_contiguous():
        step = axis.radius * axis.stride
        sizes = [-1] * (dim + 1) + [step] + [-1] * (cells.ndim - dim - 1)
        return cells.unsqueeze(dim + 1).expand(sizes).flatten(dim, dim + 1)
    slices = list(axis.slices())
    out = _empty_like(cells, [axis.size if i == dim else size for i, size in enumerate(cells.shape)])
    if sum(part.end - part.begin for part in slices) < axis.size:
        out.zero_()
    for part in slices:
        _take(out, dim, part).copy_(cells.narrow(dim, part.begin, part.end - part.begin))
    return out


def _take(x: Tensor, dim: int, part: Slice) -> Tensor:
    return x[(slice(None),) * dim + (slice(part.start, part.stop, part.step),)]


def _empty_like(x: Tensor, shape: list[int]) -> Tensor:
    layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _widened(x: Tensor) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    return x if x.is_contiguous() or _is_channels_last(x) else x.contiguous()


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _is_plain_contiguous(x: Tensor) -> bool:
    # subclasses (fake tensors among them) do not mix with cached constants
    is_plain = type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    return is_plain and x.is_cpu and x.is_contiguous()


def _fits_one_matrix(axes: Axes) -> bool:
    rows, columns = axes
    return rows.size * columns.size * rows.cells * columns.cells <= _MAX_MATRIX_ELEMENTS


@lru_cache(maxsize=512)
def _matrix(axes: tuple[Axis, ...], dtype: torch.dtype, kind: Literal["mean", "sum"], factor: float = 1.0) -> Tensor:
    """Return `factor` times the matrix [cells, pixels] of one axis, or of both: their Kronecker product."""
    parts = [(cell_means if kind == "mean" else cell_sums)(axis) for axis in axes]
    with torch.inference_mode(False):  # kept for calls that save it for backward
        return torch.from_numpy(factor * (parts[0] if len(parts) == 1 else np.kron(*parts))).to(dtype)


def _counts(axis: Axis) -> list[int]:
    return [min(axis.outputs - first, axis.radius) for first in range(0, axis.outputs, axis.radius)]


def area(axes: Axes, x: Tensor) -> Tensor | int:
    """Return the number of outputs of each cell, [P, Q], or one number where all have as many."""
    rows, columns = (_counts(axis) for axis in axes)
    if len({*rows}) == len({*columns}) == 1:
        return rows[0] * columns[0]
    row_counts, column_counts = (torch.tensor(counts, dtype=x.dtype, device=x.device) for counts in (rows, columns))
    return row_counts[:, None] * column_counts
