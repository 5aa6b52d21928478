"""Filtered convolution by its definition, with dense sampling and cell matrices (gradient filtering, sec. 3).

Forward is the exact convolution. Backward replaces the output gradient by its mean over patches of outputs, the input
by its sum over the pixels that a patch samples, and the kernel by the sum of its taps.
"""

# i output, h input pixel, p q cells, u v taps, g groups

import torch
from torch import Tensor

from visionkernels.autograd import anchor_to, first_order_only
from visionkernels.ops.filtered_conv.geometry import Axes, Axis, ConvGeometry

__all__ = ["cell_matrix", "filtered_conv2d", "kernel_sum", "patch_mean", "sampling_matrix", "saved_input"]


def filtered_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, tap_weight: Tensor | None
) -> Tensor:
    """Return the convolution [N, Co, Ho, Wo]; see the public function."""
    return _FilteredConv.apply(x, weight, bias, geometry, tap_weight, anchor_to("filtered_conv2d", x, weight, bias))  # type: ignore[no-any-return]


class _FilteredConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, geometry, tap_weight, anchor):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight, tap_weight)
        ctx.geometry, ctx.has_bias, ctx.anchor = geometry, bias is not None, anchor
        return geometry.convolve(x, weight, bias)

    @staticmethod
    @first_order_only
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, tap_weight = ctx.saved_tensors
        axes, groups = ctx.geometry.axes, ctx.geometry.groups
        cells = [cell_matrix(axis).to(grad) for axis in axes]  # C
        samples = [sampling_matrix(axis).to(grad) for axis in axes]  # S
        mean = patch_mean(grad, axes).unflatten(1, (groups, -1))
        spread = torch.einsum("ngopq,pi,qj->ngoij", mean, *cells)
        kernel = kernel_sum(weight, tap_weight).unflatten(0, (groups, -1))
        grad_x = torch.einsum("goc,ngoij,ih,jw->ngchw", kernel, spread, *samples).flatten(1, 2)
        inputs = saved_input(x, axes).unflatten(1, (groups, -1))
        taps = torch.ones_like(weight[0, 0]) if tap_weight is None else tap_weight
        grad_weight = torch.einsum("ngopq,ngcpq,uv->gocuv", mean, inputs, taps).flatten(0, 1)
        return grad_x, grad_weight, grad.sum((0, 2, 3)) if ctx.has_bias else None, None, None, None


def patch_mean(grad: Tensor, axes: Axes) -> Tensor:
    """Average [N, C, Ho, Wo] over the outputs of each cell: [N, C, P, Q]."""
    rows, columns = (cell_matrix(axis).to(grad) for axis in axes)
    sums = torch.einsum("pi,qj,ncij->ncpq", rows, columns, grad)
    return sums / (rows.sum(1)[:, None] * columns.sum(1))


def saved_input(x: Tensor, axes: Axes) -> Tensor:
    """Average [N, C, H, W] over the box of each output, and sum over the outputs of each cell: [N, C, P, Q]."""
    rows, columns = (cell_matrix(axis).to(x) @ sampling_matrix(axis).to(x) for axis in axes)
    return torch.einsum("ph,qw,nchw->ncpq", rows, columns, x)


def kernel_sum(weight: Tensor, tap_weight: Tensor | None = None) -> Tensor:
    """Sum the taps of [Co, Ci / groups, Kh, Kw], weighted if `tap_weight` [Kh, Kw] is given: [Co, Ci / groups]."""
    return (weight if tap_weight is None else weight * tap_weight).sum((2, 3))


def cell_matrix(axis: Axis) -> Tensor:
    """C [cells, outputs]: 1 where cell q holds output i, which is i // radius = q."""
    cell_of_output = torch.arange(axis.outputs) // axis.radius
    return (cell_of_output == torch.arange(axis.cells)[:, None]).double()


def sampling_matrix(axis: Axis) -> Tensor:
    """S [outputs, size]: 1 / box for the pixels of the box in the middle of output i's span, none outside the map."""
    span = axis.dilation * (axis.kernel - 1) + 1
    box = min(axis.stride, span)
    offset = -(-(span - box) // 2) - axis.padding
    first = torch.arange(axis.outputs)[:, None] * axis.stride + offset
    pixel = torch.arange(axis.size)
    return ((pixel >= first) & (pixel < first + box)).double() / box
