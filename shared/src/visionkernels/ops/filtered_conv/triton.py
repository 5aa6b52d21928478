"""Filtered convolution's GPU path: the library's forward, and backward kernels on the means over cells.

The forward convolution is cuDNN's or MIOpen's. The kernels average maps over cells into rows of channels, and fuse what
a library product cannot: spreading each product over the pixels of its cell (dX), and weighting rows by their cell's
area and repeating each product for every tap (dW). Sums have a fixed order, so backward is deterministic.
"""

# N batch, G groups, CO CI channels of a group, P Q rows and columns of cells, M = N * P * Q

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visionkernels.autograd import anchor_to, first_order_only
from visionkernels.ops._cases import AotCase, Roofline
from visionkernels.ops.filtered_conv.geometry import Axes, Axis, ConvGeometry

__all__ = ["aot_cases", "filtered_conv2d", "rooflines"]

# tiles that compile without spills for every target; to be tuned where there is a GPU
_BLOCKS = {"BLOCK_M": 64, "BLOCK_O": 32, "BLOCK_C": 32}
_CELL_BLOCKS = {"BLOCK_Q": 8, "BLOCK_C": 32}
_IS_HIP = torch.version.hip is not None


def filtered_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, tap_weight: Tensor | None
) -> Tensor:
    """Return the convolution [N, Co, Ho, Wo]; see the public function."""
    taps = weight.new_ones(weight.shape[2:]) if tap_weight is None else tap_weight
    names = ("stride", "padding", "dilation", "radius")
    numbers = [getattr(axis, name) for name in names for axis in geometry.axes]
    keeps_means = weight.requires_grad and torch.is_grad_enabled()
    anchor = anchor_to("filtered_conv2d", x, weight, bias)
    out, _ = _forward_op(x, weight, bias, taps, [*numbers, geometry.groups], keeps_means, anchor)
    return out


@triton.jit
def _sampled(
    cell, place, OUT, SIZE, RADIUS: tl.constexpr, STRIDE: tl.constexpr, BOX: tl.constexpr, OFFSET: tl.constexpr
):
    """Return the pixel at `place` among those that a cell samples along one axis, and whether there is one."""
    output = cell * RADIUS + place // BOX
    pixel = output * STRIDE + OFFSET + place % BOX
    return pixel, (output < OUT) & (pixel >= 0) & (pixel < SIZE)


@triton.jit
def _cell_means_kernel(
    x_ptr, mean_ptr,  # [N, C, H, W] any strides; [N, P, Q, C] contiguous
    stride_xn, stride_xc, stride_xh, stride_xw, C, H, W, P, Q, OUT_H, OUT_W,
    RADIUS_H: tl.constexpr, STRIDE_H: tl.constexpr, BOX_H: tl.constexpr, OFFSET_H: tl.constexpr,
    RADIUS_W: tl.constexpr, STRIDE_W: tl.constexpr, BOX_W: tl.constexpr, OFFSET_W: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    image = (row // P).to(tl.int64)
    # a block, since the interpreter turns masks of one element into integers
    p = tl.full([BLOCK_Q], row % P, dtype=tl.int32)
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)  # [BLOCK_Q]
    c = (tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)  # [BLOCK_C]
    acc = tl.zeros([BLOCK_Q, BLOCK_C], dtype=tl.float32)
    for place_h in range(RADIUS_H * BOX_H):
        h, has_row = _sampled(p, place_h, OUT_H, H, RADIUS_H, STRIDE_H, BOX_H, OFFSET_H)
        for place_w in range(RADIUS_W * BOX_W):
            w, has_column = _sampled(q, place_w, OUT_W, W, RADIUS_W, STRIDE_W, BOX_W, OFFSET_W)
            pixel = image * stride_xn + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
            mask = (has_row & has_column & (q < Q))[:, None] & (c < C)
            acc += tl.load(x_ptr + pixel[:, None] + c * stride_xc, mask=mask, other=0.0).to(tl.float32)
    count = tl.minimum(OUT_H - p * RADIUS_H, RADIUS_H) * tl.minimum(OUT_W - q * RADIUS_W, RADIUS_W)
    # columns past the last cell have a count of zero or less, and are not stored
    mean = acc / (tl.maximum(count, 1) * (BOX_H * BOX_W)).to(tl.float32)[:, None]
    cell = row.to(tl.int64) * Q + q
    tl.store(
        mean_ptr + cell[:, None] * C + c, mean.to(mean_ptr.dtype.element_ty), mask=(q < Q)[:, None] & (c < C)
    )  # fmt: skip


@triton.jit
def _filtered_conv_bwd_dx_kernel(
    grad_ptr, kernel_ptr, dx_ptr,  # [M, G * CO]; [G * CO, CI]; [N, G * CI, H, W] any strides
    stride_xn, stride_xc, stride_xh, stride_xw, M, G, CO, CI, H, W, P, Q, OUT_H, OUT_W,
    RADIUS_H: tl.constexpr, STRIDE_H: tl.constexpr, BOX_H: tl.constexpr, OFFSET_H: tl.constexpr,
    RADIUS_W: tl.constexpr, STRIDE_W: tl.constexpr, BOX_W: tl.constexpr, OFFSET_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    group = tl.program_id(2)
    acc = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    for start in range(0, CO, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)  # [BLOCK_O]
        channel = (group * CO + o).to(tl.int64)
        grad = tl.load(
            grad_ptr + m.to(tl.int64)[:, None] * (G * CO) + channel, mask=(m < M)[:, None] & (o < CO), other=0.0
        )  # [BLOCK_M, BLOCK_O]  # fmt: skip
        kernel = tl.load(
            kernel_ptr + channel[:, None] * CI + c, mask=(o < CO)[:, None] & (c < CI), other=0.0
        )  # [BLOCK_O, BLOCK_C]  # fmt: skip
        acc += tl.dot(grad, kernel, input_precision="ieee")
    share = (acc / (BOX_H * BOX_W)).to(dx_ptr.dtype.element_ty)
    image, p, q = (m // (P * Q)).to(tl.int64), m // Q % P, m % Q
    first = image * stride_xn + group.to(tl.int64) * CI * stride_xc
    for place_h in range(RADIUS_H * BOX_H):
        h, has_row = _sampled(p, place_h, OUT_H, H, RADIUS_H, STRIDE_H, BOX_H, OFFSET_H)
        for place_w in range(RADIUS_W * BOX_W):
            w, has_column = _sampled(q, place_w, OUT_W, W, RADIUS_W, STRIDE_W, BOX_W, OFFSET_W)
            pixel = first + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
            mask = (has_row & has_column & (m < M))[:, None] & (c < CI)
            tl.store(dx_ptr + pixel[:, None] + c.to(tl.int64) * stride_xc, share, mask=mask)


@triton.jit
def _filtered_conv_bwd_dw_kernel(
    grad_ptr, mean_ptr, tap_ptr, dw_ptr,  # [M, G * CO]; [M, G * CI]; [TAPS]; [G * CO, CI, TAPS]
    M, G, CO, CI, P, Q, OUT_H, OUT_W,
    RADIUS_H: tl.constexpr, RADIUS_W: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)  # [BLOCK_O]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    group = tl.program_id(2)
    acc = tl.zeros([BLOCK_O, BLOCK_C], dtype=tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        grad = tl.load(
            grad_ptr + m.to(tl.int64)[None, :] * (G * CO) + (group * CO + o)[:, None],
            mask=(m < M)[None, :] & (o < CO)[:, None], other=0.0,
        )  # [BLOCK_O, BLOCK_M]  # fmt: skip
        mean = tl.load(
            mean_ptr + m.to(tl.int64)[:, None] * (G * CI) + group * CI + c,
            mask=(m < M)[:, None] & (c < CI), other=0.0,
        )  # [BLOCK_M, BLOCK_C]  # fmt: skip
        rows = tl.minimum(OUT_H - m // Q % P * RADIUS_H, RADIUS_H)
        columns = tl.minimum(OUT_W - m % Q * RADIUS_W, RADIUS_W)
        area = (rows * columns).to(tl.float32)
        acc += tl.dot((grad.to(tl.float32) * area[None, :]).to(mean.dtype), mean, input_precision="ieee")
    entry = ((group * CO + o).to(tl.int64)[:, None] * CI + c) * TAPS
    mask = (o < CO)[:, None] & (c < CI)
    for tap in range(TAPS):
        scaled = acc * tl.load(tap_ptr + tap).to(tl.float32)
        tl.store(dw_ptr + entry + tap, scaled.to(dw_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _filtered_conv_bwd_depthwise_kernel(
    grad_ptr, kernel_ptr, mean_ptr, dx_ptr, partial_ptr,  # [M, C]; [C]; [M, C]; [N, C, H, W]; [N * P, C]
    stride_xn, stride_xc, stride_xh, stride_xw, C, H, W, P, Q, OUT_H, OUT_W,
    RADIUS_H: tl.constexpr, STRIDE_H: tl.constexpr, BOX_H: tl.constexpr, OFFSET_H: tl.constexpr,
    RADIUS_W: tl.constexpr, STRIDE_W: tl.constexpr, BOX_W: tl.constexpr, OFFSET_W: tl.constexpr,
    NEEDS_DX: tl.constexpr, NEEDS_DW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    image = (row // P).to(tl.int64)
    p = tl.full([BLOCK_Q], row % P, dtype=tl.int32)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)  # [BLOCK_C]
    acc = tl.zeros([BLOCK_Q, BLOCK_C], dtype=tl.float32)
    rows = tl.minimum(OUT_H - p * RADIUS_H, RADIUS_H)
    for start in range(0, Q, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)  # [BLOCK_Q]
        cell = (row.to(tl.int64) * Q + q)[:, None] * C + c
        mask = (q < Q)[:, None] & (c < C)
        grad = tl.load(grad_ptr + cell, mask=mask, other=0.0).to(tl.float32)
        if NEEDS_DW:
            area = (rows * tl.minimum(OUT_W - q * RADIUS_W, RADIUS_W)).to(tl.float32)
            acc += grad * area[:, None] * tl.load(mean_ptr + cell, mask=mask, other=0.0).to(tl.float32)
        if NEEDS_DX:
            kernel = tl.load(kernel_ptr + c, mask=c < C, other=0.0).to(tl.float32)
            share = (grad * kernel / (BOX_H * BOX_W)).to(dx_ptr.dtype.element_ty)
            for place_h in range(RADIUS_H * BOX_H):
                h, has_row = _sampled(p, place_h, OUT_H, H, RADIUS_H, STRIDE_H, BOX_H, OFFSET_H)
                for place_w in range(RADIUS_W * BOX_W):
                    w, has_column = _sampled(q, place_w, OUT_W, W, RADIUS_W, STRIDE_W, BOX_W, OFFSET_W)
                    pixel = image * stride_xn + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
                    inside = mask & (has_row & has_column)[:, None]
                    tl.store(dx_ptr + pixel[:, None] + c * stride_xc, share, mask=inside)
    if NEEDS_DW:
        tl.store(partial_ptr + row.to(tl.int64) * C + c, tl.sum(acc, 0), mask=c < C)


def _options(dtype: torch.dtype, *, is_hip: bool = _IS_HIP) -> dict[str, Any]:
    # float32 dots run on plain multiply-adds: no registers are left to load the next tile ahead
    stages = 1 if is_hip or dtype == torch.float32 else 2
    return {"num_warps": 4, "num_stages": stages} | ({} if is_hip else {"maxnreg": 255})


def _constants(axes: Axes) -> dict[str, int]:
    return {
        f"{name}_{letter}": value
        for letter, axis in zip("HW", axes, strict=True)
        for name, value in (
            ("RADIUS", axis.radius), ("STRIDE", axis.stride), ("BOX", axis.box), ("OFFSET", axis.offset)
        )
    }  # fmt: skip


def _geometry(size: Any, kernel: Any, numbers: list[int]) -> ConvGeometry:
    """Return the geometry from the `numbers` that a registered op takes in its stead."""
    stride, padding, dilation, radius = (numbers[i : i + 2] for i in (0, 2, 4, 6))
    return ConvGeometry.of(size, kernel, stride, padding, dilation, radius, numbers[8])


def _means(x: Tensor, axes: Axes) -> Tensor:
    """Average [N, C, H, W] over cells: rows of channels [N, P, Q, C], in the dtype of `x`."""
    rows, columns = axes
    batch, channels, height, width = x.shape
    means = x.new_empty(batch, rows.cells, columns.cells, channels)
    grid = (
        batch * rows.cells,
        triton.cdiv(columns.cells, _CELL_BLOCKS["BLOCK_Q"]),
        triton.cdiv(channels, _CELL_BLOCKS["BLOCK_C"]),
    )
    if means.numel():
        _cell_means_kernel[grid](
            x, means, *x.stride(), channels, height, width, rows.cells, columns.cells, rows.outputs, columns.outputs,
            **_constants(axes), **_CELL_BLOCKS,
        )  # fmt: skip
    return means


@torch.library.custom_op("visionkernels::filtered_conv_fwd", mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: Tensor,
    numbers: list[int],
    keeps_means: bool,
    anchor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    geometry = _geometry(x.shape[2:], weight.shape[2:], numbers)
    out = geometry.convolve(x, weight, bias)
    return out, _means(x, geometry.axes) if keeps_means else x.new_empty(0)


@torch.library.custom_op("visionkernels::filtered_conv_bwd", mutates_args=())
def _backward_op(
    grad: Tensor, weight: Tensor, means: Tensor, taps: Tensor, size: list[int], layout: list[int],
    numbers: list[int], needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    geometry = _geometry(size[2:], weight.shape[2:], numbers)
    needs_x, needs_weight, needs_bias = needs
    rows, columns = geometry.axes
    grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(grad.dtype) if needs_bias else grad.new_empty(0)
    grad_means = _means(grad, geometry.patches)
    samples = [sum(part.end - part.begin for part in axis.slices()) for axis in geometry.axes]
    grad_x = torch.empty_strided(size if needs_x else [0] * 4, layout, dtype=grad.dtype, device=grad.device)
    if samples != size[2:] or not grad.numel():
        grad_x.zero_()
    grad_weight = (
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else means.new_empty(0)
    )
    if not grad.numel():
        return grad_x, grad_weight.zero_(), grad_bias
    kernel = (weight * taps).sum((2, 3), dtype=torch.float32).to(grad.dtype) if needs_x else grad.new_empty(0)
    if weight.shape[1] == 1 and len(weight) == geometry.groups:
        _depthwise_backward(grad_means, kernel, means, grad_x, grad_weight, taps, geometry, needs)
        return grad_x, grad_weight, grad_bias
    count, per_output, per_input = grad_means[..., 0].numel(), len(weight) // geometry.groups, weight.shape[1]
    shared, constants = (*grad_means.shape[1:3], rows.outputs, columns.outputs), _constants(geometry.axes)
    tiles = {name: triton.cdiv(value, _BLOCKS[name]) for name, value in
             {"BLOCK_M": count, "BLOCK_O": per_output, "BLOCK_C": per_input}.items()}  # fmt: skip
    if needs_x:
        _filtered_conv_bwd_dx_kernel[(tiles["BLOCK_M"], tiles["BLOCK_C"], geometry.groups)](
            grad_means, kernel, grad_x, *grad_x.stride(), count, geometry.groups, per_output, per_input, *size[2:],
            *shared, **constants, **_BLOCKS, **_options(grad.dtype),
        )  # fmt: skip
    if needs_weight:
        radii = {name: constants[name] for name in ("RADIUS_H", "RADIUS_W")}
        _filtered_conv_bwd_dw_kernel[(tiles["BLOCK_O"], tiles["BLOCK_C"], geometry.groups)](
            grad_means, means, taps.contiguous(), grad_weight, count, geometry.groups, per_output, per_input,
            *shared, **radii, TAPS=taps.numel(), **_BLOCKS, **_options(grad.dtype),
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias


def _depthwise_backward(
    grad_means: Tensor, kernel: Tensor, means: Tensor, grad_x: Tensor, grad_weight: Tensor, taps: Tensor,
    geometry: ConvGeometry, needs: list[bool],
) -> None:  # fmt: skip
    needs_x, needs_weight, _ = needs
    batch, cell_rows, cell_columns, channels = grad_means.shape
    rows, columns = geometry.axes
    partial = grad_means.new_empty(batch * cell_rows, channels, dtype=torch.float32)
    grid = (batch * cell_rows, triton.cdiv(channels, _CELL_BLOCKS["BLOCK_C"]))
    _filtered_conv_bwd_depthwise_kernel[grid](
        grad_means, kernel, means, grad_x, partial, *grad_x.stride(), channels, rows.size, columns.size,
        cell_rows, cell_columns, rows.outputs, columns.outputs, **_constants(geometry.axes),
        NEEDS_DX=needs_x, NEEDS_DW=needs_weight, **_CELL_BLOCKS,
    )  # fmt: skip
    if needs_weight:
        grad_weight.copy_(partial.sum(0)[:, None, None, None] * taps)


@_forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: Tensor,
    numbers: list[int],
    keeps_means: bool,
    anchor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    geometry = _geometry(x.shape[2:], weight.shape[2:], numbers)
    out = geometry.convolve(x, weight, bias)
    cells = [axis.cells for axis in geometry.axes]
    return out, x.new_empty(len(x), *cells, x.shape[1]) if keeps_means else x.new_empty(0)


@_backward_op.register_fake
def _(
    grad: Tensor, weight: Tensor, means: Tensor, taps: Tensor, size: list[int], layout: list[int],
    numbers: list[int], needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    needs_x, needs_weight, needs_bias = needs
    grad_x = torch.empty_strided(size if needs_x else [0] * 4, layout, dtype=grad.dtype, device=grad.device)
    grad_weight = weight.new_empty(weight.shape) if needs_weight else means.new_empty(0)
    return grad_x, grad_weight, grad.new_empty(len(weight) if needs_bias else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, taps, ctx.numbers, _, ctx.anchor = inputs
    ctx.save_for_backward(weight, output[1], taps)
    ctx.mark_non_differentiable(output[1])
    # the gradient is laid out as the input is: channels first or last
    is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if is_last else torch.contiguous_format
    ctx.size, ctx.layout = list(x.shape), list(torch.empty_like(x, device="meta", memory_format=layout).stride())


@first_order_only
def _backward(ctx: Any, grad: Tensor, _grad_means: Tensor) -> tuple[Any, ...]:
    weight, means, taps = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = _backward_op(grad, weight, means, taps, ctx.size, ctx.layout, ctx.numbers, needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.visionkernels.filtered_conv_fwd)
def _forward_flops(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    batch, channels, height, width = out_shape[0]
    return int(2 * batch * channels * height * width * weight[1] * weight[2] * weight[3])


@register_flop_formula(torch.ops.visionkernels.filtered_conv_bwd)
def _backward_flops(
    grad: Any, weight: Any, means: Any, taps: Any, size: Any, layout: Any, numbers: Any, needs: Any, *_: Any, **__: Any
) -> int:
    cells = [axis.cells for axis in _geometry(size[2:], weight[2:], numbers).axes]
    return int(2 * (needs[0] + needs[1]) * grad[0] * cells[0] * cells[1] * weight[0] * weight[1])


def aot_cases(*, is_hip: bool) -> list[AotCase]:
    """Return the cases of the ahead-of-time check: each kernel, for strides 1 and 2 and two dtypes."""
    tiles = {
        _cell_means_kernel: _CELL_BLOCKS,
        _filtered_conv_bwd_dx_kernel: _BLOCKS,
        _filtered_conv_bwd_dw_kernel: _BLOCKS | {"TAPS": 9},
        _filtered_conv_bwd_depthwise_kernel: _CELL_BLOCKS | {"NEEDS_DX": True, "NEEDS_DW": True},
    }
    pointers = ("x_ptr", "mean_ptr", "grad_ptr", "kernel_ptr", "dx_ptr", "tap_ptr", "dw_ptr")
    cases = []
    for stride, radius, dtype in ((1, 2, torch.float32), (2, 4, torch.bfloat16), (1, 7, torch.float16)):
        kind = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        axis = Axis(56, kernel=3, stride=stride, padding=1, dilation=1, radius=radius)
        geometry = _constants((axis, axis))
        for kernel, blocks in tiles.items():
            constants = {name: value for name, value in (geometry | blocks).items() if name in kernel.arg_names}
            types = dict.fromkeys(pointers, f"*{kind}") | {"partial_ptr": "*fp32"}
            config = f"s{stride}-r{radius}-{kind}"
            options = _options(dtype, is_hip=is_hip) if blocks.keys() >= _BLOCKS.keys() else {}
            cases.append(AotCase(kernel=kernel, config=config, types=types, constants=constants, options=options))
    return cases


def rooflines() -> list[Roofline]:
    """Return the least work of the backward pass of ResNet's 3x3 layers, batch 128 at 224 pixels, bfloat16."""
    lines = []
    for name, size, channels in (("stage 2", 28, 128), ("stage 3", 14, 256), ("stage 4", 7, 512)):
        for radius in (2, 4):
            cells = 128 * (-(-size // radius)) ** 2
            # reads the gradient, the kept means and the kernel; writes two gradients
            moved = 2 * (2 * 128 * channels * size**2 + cells * channels + 2 * 9 * channels**2)
            lines.append(
                Roofline(op="filtered_conv", config=f"{name} radius {radius} backward",
                         operations=4 * cells * channels**2, bytes_moved=moved)
            )  # fmt: skip
    return lines
