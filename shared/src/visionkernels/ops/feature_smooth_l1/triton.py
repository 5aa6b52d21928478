"""Smooth L1 loss to normalised features on GPUs: the target is made in registers, and again in backward.

Programs own whole rows and leave one partial sum each, so that both passes are deterministic. No matrices are
multiplied, so there is no flop formula.
"""

# M rows, C channels

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionkernels.ops._cases import AotCase, Roofline

__all__ = ["aot_cases", "feature_smooth_l1", "rooflines"]

_TILE = 4096
"""Elements of a tile; a longer row is a tile by itself."""
_OPTIONS = {"num_warps": 8}


def feature_smooth_l1(prediction: Tensor, hidden: Tensor, beta: float, eps: float) -> Tensor:
    """Return the loss; see the public function."""
    return _forward_op(*(x.reshape(-1, x.shape[-1]) for x in (prediction, hidden)), beta, eps)


@triton.jit
def _clipped_error(
    prediction_ptr, hidden_ptr, M, C, beta, eps, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Return e = prediction - LN(hidden) of a tile of rows, clip(e, -beta, beta), and where the tile lies."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    c = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    offset, mask = m[:, None] * C + c, (m < M)[:, None] & (c < C)
    hidden = tl.load(hidden_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    # squares of larger numbers overflow; the norm does not change with their scale
    peak = tl.max(tl.abs(hidden), 1)
    hidden *= tl.where(peak > 1099511627776.0, 1048576.0 / peak, 1.0)[:, None]
    centred = tl.where(mask, hidden - (tl.sum(hidden, 1) / C)[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    prediction = tl.load(prediction_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    error = prediction - centred / deviation[:, None]
    # unlike minimum and maximum, keeps a NaN
    clipped = tl.where(error > beta, beta, tl.where(error < -beta, -beta, error))
    return error, clipped, offset, mask


@triton.jit
def _feature_smooth_l1_fwd_kernel(
    prediction_ptr, hidden_ptr, partial_ptr,  # [M, C]; [M, C]; [programs]
    M, C, beta, eps, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """With k = clip(e), both branches of the loss are k (e - k / 2) / beta; stores the sum of k (e - k / 2)."""
    error, clipped, _, mask = _clipped_error(prediction_ptr, hidden_ptr, M, C, beta, eps, BLOCK_M, BLOCK_C)
    product = tl.where(mask, clipped * (error - 0.5 * clipped), 0.0)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(product, 1), 0))


@triton.jit
def _feature_smooth_l1_bwd_kernel(
    prediction_ptr, hidden_ptr, grad_ptr, dprediction_ptr,  # [M, C]; [M, C]; []; [M, C]
    M, C, beta, eps, grad_scale, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """d prediction = grad * clip(e, -beta, beta) / (beta * M * C)."""
    _, clipped, offset, mask = _clipped_error(prediction_ptr, hidden_ptr, M, C, beta, eps, BLOCK_M, BLOCK_C)
    dprediction = clipped * (tl.load(grad_ptr).to(tl.float32) * grad_scale)
    tl.store(dprediction_ptr + offset, dprediction.to(dprediction_ptr.dtype.element_ty), mask=mask)


def _blocks(channels: int) -> dict[str, int]:
    block = max(16, triton.next_power_of_2(channels))
    return {"BLOCK_M": max(1, _TILE // block), "BLOCK_C": block}


@torch.library.custom_op("visionkernels::feature_smooth_l1_fwd", mutates_args=())
def _forward_op(prediction: Tensor, hidden: Tensor, beta: float, eps: float) -> Tensor:
    rows, channels = prediction.shape
    blocks = _blocks(channels)
    partial = prediction.new_empty(triton.cdiv(rows, blocks["BLOCK_M"]), dtype=torch.float32)
    _feature_smooth_l1_fwd_kernel[(len(partial),)](
        prediction.contiguous(), hidden.contiguous(), partial, rows, channels, beta, eps, **blocks, **_OPTIONS
    )
    return partial.sum() / (beta * prediction.numel())


@torch.library.custom_op("visionkernels::feature_smooth_l1_bwd", mutates_args=())
def _backward_op(grad: Tensor, prediction: Tensor, hidden: Tensor, beta: float, eps: float) -> Tensor:
    rows, channels = prediction.shape
    blocks = _blocks(channels)
    grad_prediction = torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    _feature_smooth_l1_bwd_kernel[(triton.cdiv(rows, blocks["BLOCK_M"]),)](
        prediction.contiguous(), hidden.contiguous(), grad.contiguous(), grad_prediction, rows, channels, beta, eps,
        1 / (beta * prediction.numel()), **blocks, **_OPTIONS,
    )  # fmt: skip
    return grad_prediction


@_forward_op.register_fake
def _(prediction: Tensor, hidden: Tensor, beta: float, eps: float) -> Tensor:
    return prediction.new_empty((), dtype=torch.float32)


@_backward_op.register_fake
def _(grad: Tensor, prediction: Tensor, hidden: Tensor, beta: float, eps: float) -> Tensor:
    return prediction.new_empty(prediction.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    prediction, hidden, ctx.beta, ctx.eps = inputs
    ctx.save_for_backward(prediction, hidden)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _backward_op(grad, *ctx.saved_tensors, ctx.beta, ctx.eps), None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


def aot_cases(*, is_hip: bool) -> list[AotCase]:
    """Return the cases of the ahead-of-time check: both kernels, for decoders' widths and the widest rows."""
    cases = []
    for channels, kind in ((512, "fp32"), (512, "bf16"), (64, "fp16"), (8192, "fp32"), (8192, "bf16")):
        blocks = _blocks(channels)
        types = dict.fromkeys(("prediction_ptr", "hidden_ptr", "dprediction_ptr"), f"*{kind}")
        types |= {"partial_ptr": "*fp32", "grad_ptr": "*fp32", "beta": "fp32", "eps": "fp32"}
        config = f"C{channels}-{kind}"
        for kernel in (_feature_smooth_l1_fwd_kernel, _feature_smooth_l1_bwd_kernel):
            cases.append(AotCase(kernel=kernel, config=config, types=types, constants=blocks, options=_OPTIONS))
    return cases


def rooflines() -> list[Roofline]:
    """Return the least work for G2SD's 197 tokens of 512 channels, batch 256, bfloat16."""
    size = 256 * 197 * 512
    return [
        Roofline(op="feature_smooth_l1", config="G2SD forward", operations=12 * size, bytes_moved=4 * size),
        Roofline(op="feature_smooth_l1", config="G2SD backward", operations=9 * size, bytes_moved=6 * size),
    ]
