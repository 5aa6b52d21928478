"""The decoder's input on GPUs: one kernel forward, one backward.

Backward scatters: a permutation sends each visible token's gradient to one place, so nothing is added atomically. The
mask token's gradient is summed by tiles of patches, in a fixed order. Without products there is no flop formula.
"""

# B batch, K visible patches, L patches, D channels

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionkernels.ops._cases import AotCase, Roofline

__all__ = ["aot_cases", "restore_tokens", "rooflines"]

_BLOCKS = {"BLOCK_L": 8, "BLOCK_D": 128}


def restore_tokens(visible: Tensor, mask_token: Tensor, positions: Tensor, ids_restore: Tensor) -> Tensor:
    """Return the tokens [B, 1 + L, D]; see the public function."""
    return _forward_op(visible, mask_token, positions, ids_restore)


@triton.jit
def _tile(ids_ptr, L, D, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the image, the tokens and channels of a tile, the row of each token in the shuffled order, and the mask.

    Tokens count from the class token, which is row 0.
    """
    tiles = tl.cdiv(L + 1, BLOCK_L)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * BLOCK_L + tl.arange(0, BLOCK_L)  # [BLOCK_L]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    is_patch = (token > 0) & (token <= L)
    row = tl.load(ids_ptr + image * L + token - 1, mask=is_patch, other=-1).to(tl.int64) + 1
    return image, token.to(tl.int64), d, row, (token <= L)[:, None] & (d < D)


@triton.jit
def _restore_tokens_fwd_kernel(
    visible_ptr, mask_token_ptr, position_ptr, ids_ptr, out_ptr,  # [B, 1+K, D]; [D]; [1+L, D]; [B, L]; [B, 1+L, D]
    K, L, D, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    image, token, d, row, mask = _tile(ids_ptr, L, D, BLOCK_L, BLOCK_D)
    is_visible = (row <= K)[:, None]
    visible = tl.load(
        visible_ptr + (image * (K + 1) + row)[:, None] * D + d, mask=mask & is_visible, other=0.0
    )  # [BLOCK_L, BLOCK_D]  # fmt: skip
    mask_token = tl.load(mask_token_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    position = tl.load(position_ptr + token[:, None] * D + d, mask=mask, other=0.0).to(tl.float32)
    out = tl.where(is_visible, visible.to(tl.float32), mask_token[None, :]) + position
    offset = (image * (L + 1) + token)[:, None] * D + d
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _restore_tokens_bwd_kernel(
    grad_ptr, ids_ptr, dvisible_ptr, partial_ptr,  # [B, 1+L, D]; [B, L]; [B, 1+K, D]; [tiles of tokens, D]
    K, L, D, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    image, token, d, row, mask = _tile(ids_ptr, L, D, BLOCK_L, BLOCK_D)
    is_visible = (row <= K)[:, None]
    grad = tl.load(
        grad_ptr + (image * (L + 1) + token)[:, None] * D + d, mask=mask, other=0.0
    )  # [BLOCK_L, BLOCK_D]  # fmt: skip
    tl.store(
        dvisible_ptr + (image * (K + 1) + row)[:, None] * D + d, grad.to(dvisible_ptr.dtype.element_ty),
        mask=mask & is_visible,
    )  # fmt: skip
    masked = tl.sum(tl.where(is_visible, 0.0, grad.to(tl.float32)), 0)  # [BLOCK_D]
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + d, masked, mask=d < D)


def _grid(batch: int, tokens: int, channels: int) -> tuple[int, int]:
    return batch * triton.cdiv(tokens, _BLOCKS["BLOCK_L"]), triton.cdiv(channels, _BLOCKS["BLOCK_D"])


@torch.library.custom_op("visionkernels::restore_tokens_fwd", mutates_args=())
def _forward_op(visible: Tensor, mask_token: Tensor, positions: Tensor, ids_restore: Tensor) -> Tensor:
    out = _empty_output(visible, mask_token, positions)
    batch, kept, channels = visible.shape
    if batch:
        _restore_tokens_fwd_kernel[_grid(batch, len(positions), channels)](
            visible.contiguous(), mask_token.contiguous(), positions.contiguous(), ids_restore.contiguous(), out,
            kept - 1, len(positions) - 1, channels, **_BLOCKS,
        )  # fmt: skip
    return out


@torch.library.custom_op("visionkernels::restore_tokens_bwd", mutates_args=())
def _backward_op(grad: Tensor, ids_restore: Tensor, kept: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = grad.shape
    grid = _grid(batch, tokens, channels)
    grad_visible = grad.new_empty(batch, kept, channels, dtype=dtype)
    partial = grad.new_empty(grid[0], channels, dtype=torch.float32)
    if batch:
        _restore_tokens_bwd_kernel[grid](
            grad.contiguous(), ids_restore.contiguous(), grad_visible, partial, kept - 1, tokens - 1, channels,
            **_BLOCKS,
        )  # fmt: skip
    return grad_visible, partial.sum(0)


def _empty_output(visible: Tensor, mask_token: Tensor, positions: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(visible.dtype, mask_token.dtype), positions.dtype)
    return visible.new_empty(len(visible), *positions.shape, dtype=dtype)


@_forward_op.register_fake
def _(visible: Tensor, mask_token: Tensor, positions: Tensor, ids_restore: Tensor) -> Tensor:
    return _empty_output(visible, mask_token, positions)


@_backward_op.register_fake
def _(grad: Tensor, ids_restore: Tensor, kept: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, _, channels = grad.shape
    return grad.new_empty(batch, kept, channels, dtype=dtype), grad.new_empty(channels, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    visible, mask_token, positions, ids_restore = inputs
    ctx.save_for_backward(ids_restore)
    ctx.kept, ctx.dtypes = visible.shape[1], (visible.dtype, mask_token.dtype, positions.dtype)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (ids_restore,) = ctx.saved_tensors
    visible_dtype, mask_dtype, position_dtype = ctx.dtypes
    grad_visible, grad_mask = _backward_op(grad, ids_restore, ctx.kept, visible_dtype)
    needs_positions = ctx.needs_input_grad[2]
    grad_positions = grad.sum(0, dtype=torch.float32).to(position_dtype) if needs_positions else None
    return grad_visible, grad_mask.to(mask_dtype), grad_positions, None


_forward_op.register_autograd(_backward, setup_context=_save)


def aot_cases(*, is_hip: bool) -> list[AotCase]:
    """Return the cases of the ahead-of-time check: both kernels, for each dtype and for the mixture under autocast."""
    cases = []
    for token, other in (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32")):
        types = dict.fromkeys(("visible_ptr", "dvisible_ptr"), f"*{token}") | {"ids_ptr": "*i64"}
        types |= dict.fromkeys(("mask_token_ptr", "position_ptr", "out_ptr", "grad_ptr"), f"*{other}")
        types |= {"partial_ptr": "*fp32"}
        for kernel in (_restore_tokens_fwd_kernel, _restore_tokens_bwd_kernel):
            cases.append(AotCase(kernel=kernel, config=f"{token}-{other}", types=types, constants=_BLOCKS))
    return cases


def rooflines() -> list[Roofline]:
    """Return the least work for ViT-S's decoder, 49 of 196 patches and 256 channels, batch 256, bfloat16."""
    visible, out, ids = 2 * 256 * 50 * 256, 2 * 256 * 197 * 256, 8 * 256 * 196
    moved, operations = visible + out + ids, out / 2
    return [
        Roofline(op="restore_tokens", config=f"MAE {name}", operations=operations, bytes_moved=moved)
        for name in ("forward", "backward")
    ]
