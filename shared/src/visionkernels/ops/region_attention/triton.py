"""Region attention as block-sparse flash attention: Triton kernels, forward and backward, on the NHWC maps as they lie.

A program owns a tile of one region's tokens for one head, and walks over the tokens of the regions that it is routed
to (forward, dQ) or over those that are routed to it (dK, dV), so that nothing is gathered, partitioned or added
atomically: backward is deterministic. Formulas and the inverse routing list: README.md beside this file.
"""

# B batch, G query regions, L key regions, T tokens of a region, S slots (topk), M heads, D head size

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visionkernels.ops._cases import AotCase, Roofline
from visionkernels.ops.region_attention.geometry import RegionGeometry

__all__ = ["aot_cases", "region_attention", "rooflines"]

_LOG2E = 1.4426950408889634
# tiles and options that compile without spills for every target and head size; to be tuned where there is a GPU
_IS_HIP = torch.version.hip is not None


def region_attention(
    query: Tensor, key: Tensor, value: Tensor, region_index: Tensor, geometry: RegionGeometry,
    slot_weight: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the attended map [B, H, W, C]; see the public function. `slot_weight` has no kernel and must be None."""
    valid_size = geometry.valid_size or key.shape[1:3]
    sizes = [geometry.num_heads, *geometry.query_grid, *geometry.key_grid, *valid_size]
    out, _ = _forward_op(query, key, value, region_index.to(torch.int32), sizes, geometry.scale)
    return out


@triton.jit
def _token_offsets(token, region, columns, height, width, stride_y, stride_x):
    """Return the address of each token of a region, and its row and column in the map.

    Divisions stay in int32, since those of int64 are calls that spill registers; addresses are int64.
    """
    y = (region // columns * height + token // width).to(tl.int64)
    x = (region % columns * width + token % width).to(tl.int64)
    return y * stride_y + x * stride_x, y, x


@triton.jit
def _region_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, out_ptr, lse_ptr,  # maps [B, H, W, M * D]; [B, G, S]; out contiguous; [B, G, M, T]
    stride_qb, stride_qy, stride_qx, stride_kb, stride_ky, stride_kx, stride_vb, stride_vy, stride_vx,
    HEIGHT, WIDTH, KEY_HEIGHT, KEY_WIDTH, VALID_HEIGHT, VALID_WIDTH, scale_log2,
    G: tl.constexpr, L: tl.constexpr, S: tl.constexpr, M: tl.constexpr,
    COLUMNS: tl.constexpr, KEY_COLUMNS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program, head = tl.program_id(0), tl.program_id(2)
    image, region, image_region = (program // G).to(tl.int64), program % G, program.to(tl.int64)
    num_tokens, num_keys = HEIGHT * WIDTH, S * KEY_HEIGHT * KEY_WIDTH
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    channel, value_channel = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    has_token, has_channel, has_value = token < num_tokens, channel < D, value_channel < DV
    offset, y, x = _token_offsets(token, region, COLUMNS, HEIGHT, WIDTH, stride_qy, stride_qx)
    q = tl.load(
        q_ptr + image * stride_qb + offset[:, None] + head * D + channel,
        mask=has_token[:, None] & has_channel, other=0.0,
    )  # [BLOCK_M, BLOCK_D]  # fmt: skip
    # a finite floor: a row without any valid key so far has top - top = 0 instead of the NaN of infinities
    top = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    for start in range(0, num_keys, BLOCK_N):
        key_token = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        has_key = key_token < num_keys
        slot, token_in_slot = key_token // (KEY_HEIGHT * KEY_WIDTH), key_token % (KEY_HEIGHT * KEY_WIDTH)
        routed = tl.load(index_ptr + image_region * S + slot, mask=has_key, other=0)
        k_offset, key_y, key_x = _token_offsets(
            token_in_slot, routed, KEY_COLUMNS, KEY_HEIGHT, KEY_WIDTH, stride_ky, stride_kx
        )
        has_key &= (key_y < VALID_HEIGHT) & (key_x < VALID_WIDTH)
        k = tl.load(
            k_ptr + image * stride_kb + k_offset[None, :] + head * D + channel[:, None],
            mask=has_key & has_channel[:, None], other=0.0,
        )  # [BLOCK_D, BLOCK_N]  # fmt: skip
        logits = tl.dot(q, k, input_precision="ieee") * scale_log2
        new_top = tl.maximum(top, tl.max(tl.where(has_key, logits, -1e30), 1))
        weights = tl.where(has_key, tl.exp2(logits - new_top[:, None]), 0.0)
        decay = tl.exp2(top - new_top)
        v_offset = key_y * stride_vy + key_x * stride_vx
        v = tl.load(
            v_ptr + image * stride_vb + v_offset[:, None] + head * DV + value_channel,
            mask=has_key[:, None] & has_value, other=0.0,
        )  # [BLOCK_N, BLOCK_DV]  # fmt: skip
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = new_top
    is_empty = total == 0.0
    acc = acc / tl.where(is_empty, 1.0, total)[:, None]
    # +inf makes every recomputed weight of an empty row zero
    lse = tl.where(is_empty, float("inf"), top + tl.log2(total))
    tl.store(lse_ptr + (image_region * M + head) * num_tokens + token, lse, mask=has_token)
    pixel = (image * (G // COLUMNS) * HEIGHT + y) * (COLUMNS * WIDTH) + x
    tl.store(
        out_ptr + pixel[:, None] * (M * DV) + head * DV + value_channel,
        acc.to(out_ptr.dtype.element_ty), mask=has_token[:, None] & has_value,
    )  # fmt: skip


@triton.jit
def _region_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr,  # out, grad, dq contiguous maps
    stride_qb, stride_qy, stride_qx, stride_kb, stride_ky, stride_kx, stride_vb, stride_vy, stride_vx,
    HEIGHT, WIDTH, KEY_HEIGHT, KEY_WIDTH, VALID_HEIGHT, VALID_WIDTH, scale_log2, scale,
    G: tl.constexpr, L: tl.constexpr, S: tl.constexpr, M: tl.constexpr,
    COLUMNS: tl.constexpr, KEY_COLUMNS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program, head = tl.program_id(0), tl.program_id(2)
    image, region, image_region = (program // G).to(tl.int64), program % G, program.to(tl.int64)
    num_tokens, num_keys = HEIGHT * WIDTH, S * KEY_HEIGHT * KEY_WIDTH
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel, value_channel = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    has_token, has_channel, has_value = token < num_tokens, channel < D, value_channel < DV
    offset, y, x = _token_offsets(token, region, COLUMNS, HEIGHT, WIDTH, stride_qy, stride_qx)
    q = tl.load(
        q_ptr + image * stride_qb + offset[:, None] + head * D + channel,
        mask=has_token[:, None] & has_channel, other=0.0,
    )  # [BLOCK_M, BLOCK_D]  # fmt: skip
    pixel = (image * (G // COLUMNS) * HEIGHT + y) * (COLUMNS * WIDTH) + x
    out_offset = pixel[:, None] * (M * DV) + head * DV + value_channel
    grad = tl.load(grad_ptr + out_offset, mask=has_token[:, None] & has_value, other=0.0)  # [BLOCK_M, BLOCK_DV]
    out = tl.load(out_ptr + out_offset, mask=has_token[:, None] & has_value, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    row = (image_region * M + head) * num_tokens + token
    tl.store(delta_ptr + row, delta, mask=has_token)
    lse = tl.load(lse_ptr + row, mask=has_token, other=float("inf"))
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start in range(0, num_keys, BLOCK_N):
        key_token = start + tl.arange(0, BLOCK_N)
        has_key = key_token < num_keys
        slot, token_in_slot = key_token // (KEY_HEIGHT * KEY_WIDTH), key_token % (KEY_HEIGHT * KEY_WIDTH)
        routed = tl.load(index_ptr + image_region * S + slot, mask=has_key, other=0)
        k_offset, key_y, key_x = _token_offsets(
            token_in_slot, routed, KEY_COLUMNS, KEY_HEIGHT, KEY_WIDTH, stride_ky, stride_kx
        )
        has_key &= (key_y < VALID_HEIGHT) & (key_x < VALID_WIDTH)
        k = tl.load(
            k_ptr + image * stride_kb + k_offset[:, None] + head * D + channel,
            mask=has_key[:, None] & has_channel, other=0.0,
        )  # [BLOCK_N, BLOCK_D]  # fmt: skip
        v_offset = key_y * stride_vy + key_x * stride_vx
        v = tl.load(
            v_ptr + image * stride_vb + v_offset[None, :] + head * DV + value_channel[:, None],
            mask=has_key & has_value[:, None], other=0.0,
        )  # [BLOCK_DV, BLOCK_N]  # fmt: skip
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        weights = tl.where(has_key, tl.exp2(logits - lse[:, None]), 0.0)
        grad_weights = tl.dot(grad, v, input_precision="ieee")
        grad_logits = weights * (grad_weights - delta[:, None])
        acc += tl.dot(grad_logits.to(k.dtype), k, input_precision="ieee")
    tl.store(
        dq_ptr + pixel[:, None] * (M * D) + head * D + channel,
        (acc * scale).to(dq_ptr.dtype.element_ty), mask=has_token[:, None] & has_channel,
    )  # fmt: skip


@triton.jit
def _region_attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,  # grad, dk, dv contiguous maps
    order_ptr, first_ptr,  # [B * G * S] routes sorted by key region; [B * L + 1] their first by key region
    stride_qb, stride_qy, stride_qx, stride_kb, stride_ky, stride_kx, stride_vb, stride_vy, stride_vx,
    HEIGHT, WIDTH, KEY_HEIGHT, KEY_WIDTH, VALID_HEIGHT, VALID_WIDTH, scale_log2, scale,
    G: tl.constexpr, L: tl.constexpr, S: tl.constexpr, M: tl.constexpr,
    COLUMNS: tl.constexpr, KEY_COLUMNS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program, head = tl.program_id(0), tl.program_id(2)
    image, region, image_region = (program // L).to(tl.int64), program % L, program.to(tl.int64)
    num_tokens, num_keys = HEIGHT * WIDTH, KEY_HEIGHT * KEY_WIDTH
    token = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel, value_channel = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    has_token, has_channel, has_value = token < num_keys, channel < D, value_channel < DV
    k_offset, y, x = _token_offsets(token, region, KEY_COLUMNS, KEY_HEIGHT, KEY_WIDTH, stride_ky, stride_kx)
    is_valid = has_token & (y < VALID_HEIGHT) & (x < VALID_WIDTH)
    k = tl.load(
        k_ptr + image * stride_kb + k_offset[:, None] + head * D + channel,
        mask=is_valid[:, None] & has_channel, other=0.0,
    )  # [BLOCK_N, BLOCK_D]  # fmt: skip
    v = tl.load(
        v_ptr + image * stride_vb + (y * stride_vy + x * stride_vx)[:, None] + head * DV + value_channel,
        mask=is_valid[:, None] & has_value, other=0.0,
    )  # [BLOCK_N, BLOCK_DV]  # fmt: skip
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    first, last = tl.load(first_ptr + image_region), tl.load(first_ptr + image_region + 1)
    num_queries = (last - first) * num_tokens
    for start in range(0, num_queries, BLOCK_M):
        query_token = start + tl.arange(0, BLOCK_M)
        has_query = query_token < num_queries
        route = tl.load(order_ptr + first + query_token // num_tokens, mask=has_query, other=0)
        source, token_in_region = route // S, query_token % num_tokens  # source counts regions over all images
        q_offset, query_y, query_x = _token_offsets(
            token_in_region, source % G, COLUMNS, HEIGHT, WIDTH, stride_qy, stride_qx
        )
        q = tl.load(
            q_ptr + image * stride_qb + q_offset[:, None] + head * D + channel,
            mask=has_query[:, None] & has_channel, other=0.0,
        )  # [BLOCK_M, BLOCK_D]  # fmt: skip
        pixel = (image * (G // COLUMNS) * HEIGHT + query_y) * (COLUMNS * WIDTH) + query_x
        grad = tl.load(
            grad_ptr + pixel[:, None] * (M * DV) + head * DV + value_channel,
            mask=has_query[:, None] & has_value, other=0.0,
        )  # [BLOCK_M, BLOCK_DV]  # fmt: skip
        row = (source.to(tl.int64) * M + head) * num_tokens + token_in_region
        lse = tl.load(lse_ptr + row, mask=has_query, other=float("inf"))
        delta = tl.load(delta_ptr + row, mask=has_query, other=0.0)
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2  # [BLOCK_N, BLOCK_M]
        weights = tl.where(is_valid[:, None], tl.exp2(logits - lse[None, :]), 0.0)
        acc_v += tl.dot(weights.to(grad.dtype), grad, input_precision="ieee")
        grad_weights = tl.dot(v, tl.trans(grad), input_precision="ieee")
        grad_logits = weights * (grad_weights - delta[None, :])
        acc_k += tl.dot(grad_logits.to(q.dtype), q, input_precision="ieee")
    pixel = (image * (L // KEY_COLUMNS) * KEY_HEIGHT + y) * (KEY_COLUMNS * KEY_WIDTH) + x
    tl.store(
        dk_ptr + pixel[:, None] * (M * D) + head * D + channel,
        (acc_k * scale).to(dk_ptr.dtype.element_ty), mask=has_token[:, None] & has_channel,
    )  # fmt: skip
    tl.store(
        dv_ptr + pixel[:, None] * (M * DV) + head * DV + value_channel,
        acc_v.to(dv_ptr.dtype.element_ty), mask=has_token[:, None] & has_value,
    )  # fmt: skip


@torch.library.custom_op("visionkernels::region_attention_fwd", mutates_args=())
def _forward_op(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, sizes: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    launch = _Launch(query, key, value, index, sizes, scale)
    out = value.new_empty(*query.shape[:3], value.shape[-1])
    lse = query.new_empty(*index.shape[:2], sizes[0], launch.num_tokens, dtype=torch.float32)
    if out.numel():
        _region_attention_fwd_kernel[launch.query_programs](
            *launch.maps, index.contiguous(), out, lse, *launch.numbers, **launch.constants, **launch.options
        )
    return out, lse


@torch.library.custom_op("visionkernels::region_attention_bwd", mutates_args=())
def _backward_op(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, index: Tensor, out: Tensor, lse: Tensor,
    sizes: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    launch = _Launch(query, key, value, index, sizes, scale)
    grad_query, grad_key, grad_value = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
    )
    if not query.numel():
        return grad_query, grad_key.zero_(), grad_value.zero_()
    delta, grad, index = torch.empty_like(lse), grad.contiguous(), index.contiguous()
    _region_attention_bwd_dq_kernel[launch.query_programs](
        *launch.maps, index, out, grad, lse, delta, grad_query, *launch.numbers, scale,
        **launch.constants, **launch.options,
    )  # fmt: skip
    order, first = _inverse_routes(index, launch.constants["L"])
    _region_attention_bwd_dkv_kernel[launch.key_programs](
        *launch.maps, grad, lse, delta, grad_key, grad_value, order, first, *launch.numbers, scale,
        **launch.constants, **launch.options,
    )  # fmt: skip
    return grad_query, grad_key, grad_value


def _inverse_routes(index: Tensor, key_regions: int) -> tuple[Tensor, Tensor]:
    """Return the order of the routes [B, G, S] by image and key region, and the place where each region's begin."""
    first_region = torch.arange(len(index), device=index.device)[:, None, None] * key_regions
    target = (index + first_region).flatten()
    order = torch.argsort(target, stable=True)
    boundaries = torch.arange(len(index) * key_regions + 1, device=index.device)
    return order.to(torch.int32), torch.searchsorted(target[order], boundaries, out_int32=True)


class _Launch:
    """The arguments and the grids of programs that the three kernels share."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, index: Tensor, sizes: list[int], scale: float
    ) -> None:
        num_heads, rows, columns, key_rows, key_columns, *valid_size = sizes
        height, width = query.shape[1] // rows, query.shape[2] // columns
        key_height, key_width = key.shape[1] // key_rows, key.shape[2] // key_columns
        self.num_tokens = height * width
        # channels are read as contiguous runs; a map that strides over them is copied
        self.maps = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)]
        strides = [stride for x in self.maps for stride in x.stride()[:3]]
        self.numbers = (*strides, height, width, key_height, key_width, *valid_size, scale * _LOG2E)
        head_size, value_size = query.shape[-1] // num_heads, value.shape[-1] // num_heads
        # sizes that a model fixes are constants; those that depend on the image are not, or each would compile anew
        self.constants = {
            "G": rows * columns, "L": key_rows * key_columns, "S": index.shape[2], "M": num_heads,
            "COLUMNS": columns, "KEY_COLUMNS": key_columns, **_blocks(head_size, value_size),
        }  # fmt: skip
        self.options = _options(query.dtype)
        tiles = triton.cdiv(self.num_tokens, self.constants["BLOCK_M"])
        key_tiles = triton.cdiv(key_height * key_width, self.constants["BLOCK_N"])
        self.query_programs = (len(query) * rows * columns, tiles, num_heads)
        self.key_programs = (len(query) * key_rows * key_columns, key_tiles, num_heads)


def _blocks(head_size: int, value_size: int, *, is_hip: bool = _IS_HIP) -> dict[str, int]:
    return {
        "D": head_size,
        "DV": value_size,
        "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
        "BLOCK_DV": max(16, triton.next_power_of_2(value_size)),
        "BLOCK_M": 16 if is_hip else 32,
        "BLOCK_N": 32,
    }


def _options(dtype: torch.dtype, *, is_hip: bool = _IS_HIP) -> dict[str, Any]:
    if is_hip:
        return {"num_warps": 4, "num_stages": 1}
    # float32 dots run on plain multiply-adds, whose operands leave no registers to load the next tile ahead;
    # without the explicit limit the assembler aims at more programs at a time and spills a word to get there
    return {"num_warps": 4, "num_stages": 1 if dtype == torch.float32 else 2, "maxnreg": 255}


@_forward_op.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, sizes: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    num_tokens = query.shape[1] * query.shape[2] // (sizes[1] * sizes[2])
    lse = query.new_empty(*index.shape[:2], sizes[0], num_tokens, dtype=torch.float32)
    return value.new_empty(*query.shape[:3], value.shape[-1]), lse


@_backward_op.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, index: Tensor, out: Tensor, lse: Tensor,
    sizes: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, index, ctx.sizes, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, index, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Any, ...]:
    return *_backward_op(grad, *ctx.saved_tensors, ctx.sizes, ctx.scale), None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.visionkernels.region_attention_fwd)
def _forward_flops(query: Any, key: Any, value: Any, index: Any, sizes: list[int], *_: Any, **__: Any) -> int:
    batch, height, width, channels = query
    keys = index[2] * key[1] * key[2] // (sizes[3] * sizes[4])
    return int(2 * batch * height * width * keys * (channels + value[3]))


@register_flop_formula(torch.ops.visionkernels.region_attention_bwd)
def _backward_flops(
    grad: Any, query: Any, key: Any, value: Any, index: Any, out: Any, lse: Any, sizes: list[int], *_: Any, **__: Any
) -> int:
    batch, height, width, channels = query
    keys = index[2] * key[1] * key[2] // (sizes[3] * sizes[4])
    # weights again, dQ and dK over the query's channels; dP and dV over the value's
    return int(2 * batch * height * width * keys * (3 * channels + 2 * value[3]))


def aot_cases(*, is_hip: bool) -> list[AotCase]:
    """Return the cases of the ahead-of-time check: each kernel, for the head sizes and dtypes that models use."""
    kernels = (_region_attention_fwd_kernel, _region_attention_bwd_dq_kernel, _region_attention_bwd_dkv_kernel)
    numbers = {"index_ptr": "*i32", "lse_ptr": "*fp32", "delta_ptr": "*fp32", "order_ptr": "*i32", "first_ptr": "*i32"}
    maps = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "grad_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
    cases = []
    for head_size, dtype in ((32, torch.float32), (32, torch.bfloat16), (64, torch.float16), (128, torch.bfloat16)):
        kind = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
        grid = {"G": 49, "L": 49, "S": 4, "M": 4, "COLUMNS": 7, "KEY_COLUMNS": 7}
        constants = grid | _blocks(head_size, head_size, is_hip=is_hip)
        types, options = numbers | dict.fromkeys(maps, kind), _options(dtype, is_hip=is_hip)
        config = f"D{head_size}-{kind.removeprefix('*')}"
        for kernel in kernels:
            cases.append(AotCase(kernel=kernel, config=config, types=types, constants=constants, options=options))
    return cases


def rooflines() -> list[Roofline]:
    """Return the least work of forward and backward in the stages of BiFormer-S, batch 64 at 224 pixels and COCO."""
    stages = {
        "224 stage 1": (64, 56 * 56, 49, 1, 64),
        "224 stage 2": (64, 28 * 28, 49, 4, 128),
        "224 stage 3": (64, 14 * 14, 49, 16, 256),
        "COCO stage 1": (2, 208 * 336, 256, 1, 64),
        "COCO stage 2": (2, 112 * 176, 256, 4, 128),
        "COCO stage 3": (2, 64 * 96, 256, 16, 256),
    }
    lines = []
    for name, (batch, pixels, regions, topk, channels) in stages.items():
        product = 2 * batch * pixels * (topk * pixels / regions) * channels  # one of Q K^T, P V, ...
        feature, statistic = 2 * batch * pixels * channels, 4 * batch * pixels * (channels // 32)
        # forward: two products; reads q, k, v, writes out and lse
        lines.append(
            Roofline(op="region_attention", config=f"{name} forward", operations=2 * product,
                     bytes_moved=4 * feature + statistic)
        )  # fmt: skip
        # backward: weights are computed twice, once for dQ and once for dK and dV; reads five maps, writes three
        lines.append(
            Roofline(op="region_attention", config=f"{name} backward", operations=7 * product,
                     bytes_moved=8 * feature + 2 * statistic)
        )  # fmt: skip
    return lines
