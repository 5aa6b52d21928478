"""Sine networks on GPUs: runs of layers with the same nodes are one kernel, whose activations stay in registers.

A run is at most as long as its tiles fit into registers. Only the phases between runs are written; backward computes
those inside a run again, and sums the gradients of weights over points in a fixed order.
"""

# N nodes, P points, K inputs and M outputs of a layer, S weights of a node's run

# tuples grow inside kernels, where Triton knows no starred expressions
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visionkernels.ops._cases import AotCase, Roofline
from visionkernels.ops.siren_mlp.arithmetic import HALF_BITS, IntegerArithmetic

__all__ = ["aot_cases", "integer_siren_mlp", "rooflines", "siren_mlp"]

_IS_HIP = torch.version.hip is not None
_BLOCK_P, _BWD_BLOCK_P = 32, 16
_SUM_BLOCK = 256
_RUN_SIZE = 13
"""Tiles of 16 x 16 weights, and two a layer, that fit into registers in one run; a larger layer is a run by itself."""
_SLOTS = 1024
"""Partial sums of weight gradients for all nodes together; those of a node take tiles of points in turn."""
_ONE_PRODUCT_INT32, _ONE_PRODUCT, _TWO_PRODUCTS = 0, 1, 2


def siren_mlp(coordinates: Tensor, weights: Sequence[Tensor], parents: Sequence[Tensor | None]) -> Tensor:
    """Return the outputs of the last layer's nodes [N, P, M]; see the public function."""
    phases = coordinates.float()[None]
    for first, last in _runs(weights, parents):
        packed = _pack(weights[first:last])
        sources = _sources(len(phases), len(packed), parents[first], phases.device)
        phases = _forward_op(phases, packed, sources, _widths(weights[first:last]), first > 0)
    return phases.to(coordinates.dtype)


def integer_siren_mlp(
    inputs: Tensor, weights: Sequence[Tensor], parents: Sequence[Tensor | None], table: Tensor,
    arithmetic: IntegerArithmetic,
) -> Tensor:  # fmt: skip
    """Return the integers of the last layer's nodes [N, P, M] as int64; see the public function."""
    phases = inputs
    scales = torch.tensor([(layer.multiplier, layer.shift) for layer in arithmetic.layers], device=inputs.device)
    modes = [
        _ONE_PRODUCT_INT32 if layer.product_fits_int32 and layer.is_exact_in_float32
        else _ONE_PRODUCT if layer.is_exact_in_float32 else _TWO_PRODUCTS
        for layer in arithmetic.layers
    ]  # fmt: skip
    for first, last in _runs(weights, parents):
        packed = _pack(weights[first:last]).detach()
        sources = _sources(len(phases), len(packed), parents[first], phases.device)
        phases = _integer_op(
            phases, packed, scales[first:last], table.contiguous(), sources, _widths(weights[first:last]),
            modes[first:last], arithmetic.bits, last == len(weights),
        )  # fmt: skip
    return phases


@triton.jit
def _reduced(phase):
    """Return the nearest multiple of pi, and the phase without it.

    Pi is split into numbers of ten bits, whose products with up to fourteen bits are exact without fused operations.
    """
    turns = tl.floor(phase * 0.3183098861837907 + 0.5)
    rest = phase - turns * 3.140625
    rest = rest - turns * 0.0009670257568359375
    rest = rest - turns * 6.277114152908325e-07
    return turns, rest - turns * 1.2154201013012384e-10


@triton.jit
def _sign(turns):
    return 1.0 - 2.0 * (turns - 2.0 * tl.floor(turns * 0.5))


@triton.jit
def _sine(phase):
    """Return the sine to 2e-7; the library's has a branch for large phases, for which backward would spill."""
    turns, x = _reduced(phase)
    square = x * x
    series = square * 2.608646127555403e-06 - 0.00019810993399005383
    series = square * series + 0.008333086967468262
    series = square * series - 0.16666659712791443
    return _sign(turns) * (x + x * square * series)


@triton.jit
def _cosine(phase):
    turns, x = _reduced(phase)
    square = x * x
    series = square * -2.6074215497828845e-07 + 2.4761729946476407e-05
    series = square * series - 0.0013888400280848145
    series = square * series + 0.04166664183139801
    series = square * series - 0.5
    return _sign(turns) * (1.0 + square * series)


@triton.jit
def _weight(weight_ptr, K: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr):
    k, m = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    mask = (k < K)[:, None] & (m < M)
    return tl.load(weight_ptr + k[:, None] * M + m, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_M]


@triton.jit
def _bias(weight_ptr, K: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr):
    m = tl.arange(0, BLOCK_M)
    return tl.load(weight_ptr + K * M + m, mask=m < M, other=0.0)  # [BLOCK_M]


@triton.jit
def _siren_mlp_fwd_kernel(
    x_ptr, weight_ptr, source_ptr, out_ptr,  # any strides; [N, S]; [N] which x a node takes; [N, P, M] contiguous
    stride_xn, stride_xp, stride_xk, P,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr, IS_PHASE: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """z = h W + b, h = sin(z), layer by layer, for one node and tile of points; without a sine after the last."""
    NUM_LAYERS: tl.constexpr = len(WIDTHS) - 1
    tiles = tl.cdiv(P, BLOCK_P)
    node = (tl.program_id(0) // tiles).to(tl.int64)
    p = ((tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)  # [BLOCK_P]
    k, m = tl.arange(0, BLOCKS[0]), tl.arange(0, BLOCKS[NUM_LAYERS])
    hidden = tl.load(
        x_ptr + tl.load(source_ptr + node) * stride_xn + p[:, None] * stride_xp + k * stride_xk,
        mask=(p < P)[:, None] & (k < WIDTHS[0]), other=0.0,
    )  # [BLOCK_P, BLOCKS[0]]  # fmt: skip
    if IS_PHASE:
        hidden = _sine(hidden)
    weight_ptr += node * SIZE
    for layer in tl.static_range(NUM_LAYERS):
        weight = _weight(weight_ptr, WIDTHS[layer], WIDTHS[layer + 1], BLOCKS[layer], BLOCKS[layer + 1])
        bias = _bias(weight_ptr, WIDTHS[layer], WIDTHS[layer + 1], BLOCKS[layer + 1])
        hidden = tl.dot(hidden, weight, input_precision="ieee") + bias  # [BLOCK_P, BLOCKS[layer + 1]]
        weight_ptr += (WIDTHS[layer] + 1) * WIDTHS[layer + 1]
        if layer < NUM_LAYERS - 1:
            hidden = _sine(hidden)
    tl.store(
        out_ptr + (node * P + p)[:, None] * WIDTHS[NUM_LAYERS] + m, hidden,
        mask=(p < P)[:, None] & (m < WIDTHS[NUM_LAYERS]),
    )  # fmt: skip


@triton.jit
def _siren_mlp_bwd_kernel(
    x_ptr, weight_ptr, source_ptr, grad_ptr, dx_ptr, partial_ptr,  # dx [N, P, K] contiguous; [SLOTS, N, S]
    stride_xn, stride_xp, stride_xk, stride_gn, stride_gp, stride_gm, P, N, SLOTS,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr, IS_PHASE: tl.constexpr,
    NEEDS_DX: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dW = h^T dz, db = sum dz, dh = dz W^T, dz' = dh cos(z'), for one node and every SLOTS-th tile of points."""
    NUM_LAYERS: tl.constexpr = len(WIDTHS) - 1
    node, slot = (tl.program_id(0) // SLOTS).to(tl.int64), tl.program_id(0) % SLOTS
    k, m = tl.arange(0, BLOCKS[0]), tl.arange(0, BLOCKS[NUM_LAYERS])
    x_ptr += tl.load(source_ptr + node) * stride_xn
    weight_ptr += node * SIZE
    sums, bias_sums = (), ()
    for layer in tl.static_range(NUM_LAYERS):
        sums = sums + (tl.zeros([BLOCKS[layer], BLOCKS[layer + 1]], dtype=tl.float32),)
        bias_sums = bias_sums + (tl.zeros([BLOCKS[layer + 1]], dtype=tl.float32),)
    for start in range(slot * BLOCK_P, P, SLOTS * BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)  # [BLOCK_P]
        x = tl.load(
            x_ptr + p[:, None] * stride_xp + k * stride_xk, mask=(p < P)[:, None] & (k < WIDTHS[0]), other=0.0
        )  # [BLOCK_P, BLOCKS[0]]  # fmt: skip
        hidden = _sine(x) if IS_PHASE else x
        phases = ()
        for layer in tl.static_range(NUM_LAYERS - 1):
            weight = _weight(weight_ptr, WIDTHS[layer], WIDTHS[layer + 1], BLOCKS[layer], BLOCKS[layer + 1])
            bias = _bias(weight_ptr, WIDTHS[layer], WIDTHS[layer + 1], BLOCKS[layer + 1])
            phases = phases + (tl.dot(hidden, weight, input_precision="ieee") + bias,)
            hidden = _sine(phases[layer])
            weight_ptr += (WIDTHS[layer] + 1) * WIDTHS[layer + 1]
        grad = tl.load(
            grad_ptr + node * stride_gn + p[:, None] * stride_gp + m * stride_gm,
            mask=(p < P)[:, None] & (m < WIDTHS[NUM_LAYERS]), other=0.0,
        )  # [BLOCK_P, BLOCKS[-1]]  # fmt: skip
        new_sums, new_bias_sums = (), ()
        for layer in tl.static_range(NUM_LAYERS - 1, -1, -1):
            hidden = _sine(phases[layer - 1]) if layer > 0 else _sine(x) if IS_PHASE else x
            new_sums = (sums[layer] + tl.dot(tl.trans(hidden), grad, input_precision="ieee"),) + new_sums
            new_bias_sums = (bias_sums[layer] + tl.sum(grad, 0),) + new_bias_sums
            if layer > 0 or NEEDS_DX:
                weight = _weight(weight_ptr, WIDTHS[layer], WIDTHS[layer + 1], BLOCKS[layer], BLOCKS[layer + 1])
                grad = tl.dot(grad, tl.trans(weight), input_precision="ieee")  # [BLOCK_P, BLOCKS[layer]]
            if layer > 0:
                grad = grad * _cosine(phases[layer - 1])
                weight_ptr -= (WIDTHS[layer - 1] + 1) * WIDTHS[layer]
        sums, bias_sums = new_sums, new_bias_sums
        if NEEDS_DX:
            if IS_PHASE:
                grad = grad * _cosine(x)
            tl.store(dx_ptr + (node * P + p)[:, None] * WIDTHS[0] + k, grad, mask=(p < P)[:, None] & (k < WIDTHS[0]))
    partial_ptr += (slot.to(tl.int64) * N + node) * SIZE
    for layer in tl.static_range(NUM_LAYERS):
        rows, columns = tl.arange(0, BLOCKS[layer]), tl.arange(0, BLOCKS[layer + 1])
        mask = (rows < WIDTHS[layer])[:, None] & (columns < WIDTHS[layer + 1])
        tl.store(partial_ptr + rows[:, None] * WIDTHS[layer + 1] + columns, sums[layer], mask=mask)
        bias_ptr = partial_ptr + WIDTHS[layer] * WIDTHS[layer + 1]
        tl.store(bias_ptr + columns, bias_sums[layer], mask=columns < WIDTHS[layer + 1])
        partial_ptr += (WIDTHS[layer] + 1) * WIDTHS[layer + 1]


@triton.jit
def _siren_mlp_sum_kernel(
    dx_ptr, order_ptr, first_ptr, out_ptr,  # [N, E]; [N] nodes by source; [sources + 1]; [sources, E]
    E, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Sum the gradients that the nodes of one source send back to it, in order."""
    blocks = tl.cdiv(E, BLOCK_E)
    source = (tl.program_id(0) // blocks).to(tl.int64)
    e = ((tl.program_id(0) % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)  # [BLOCK_E]
    acc = tl.zeros([BLOCK_E], dtype=tl.float32)
    for place in range(tl.load(first_ptr + source), tl.load(first_ptr + source + 1)):
        acc += tl.load(dx_ptr + tl.load(order_ptr + place) * E + e, mask=e < E, other=0.0)
    tl.store(out_ptr + source * E + e, acc, mask=e < E)


@triton.jit
def _integer_siren_mlp_kernel(
    x_ptr, weight_ptr, scale_ptr, table_ptr, source_ptr, out_ptr,  # scale [layers, 2]: multiplier, shift
    stride_xn, stride_xp, stride_xk, P,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr, MODES: tl.constexpr, BITS: tl.constexpr,
    HALF: tl.constexpr, TURN: tl.constexpr, IS_LAST: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """s = h W + (b << bits), z = (s multiplier + half) >> shift, h = table[z % TURN], as _siren_mlp_fwd_kernel."""
    NUM_LAYERS: tl.constexpr = len(WIDTHS) - 1
    tiles = tl.cdiv(P, BLOCK_P)
    node = (tl.program_id(0) // tiles).to(tl.int64)
    p = ((tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)  # [BLOCK_P]
    k, m = tl.arange(0, BLOCKS[0]), tl.arange(0, BLOCKS[NUM_LAYERS])
    phase = tl.load(
        x_ptr + tl.load(source_ptr + node) * stride_xn + p[:, None] * stride_xp + k * stride_xk,
        mask=(p < P)[:, None] & (k < WIDTHS[0]), other=0,
    )  # [BLOCK_P, BLOCKS[0]]  # fmt: skip
    weight_ptr += node * SIZE
    for layer in tl.static_range(NUM_LAYERS):
        hidden = tl.load(table_ptr + (phase & (TURN - 1)))
        weight = _weight(weight_ptr, WIDTHS[layer], WIDTHS[layer + 1], BLOCKS[layer], BLOCKS[layer + 1])
        bias = _bias(weight_ptr, WIDTHS[layer], WIDTHS[layer + 1], BLOCKS[layer + 1])
        weight_ptr += (WIDTHS[layer] + 1) * WIDTHS[layer + 1]
        multiplier, shift = tl.load(scale_ptr + 2 * layer), tl.load(scale_ptr + 2 * layer + 1)
        rounding = (tl.full([], 1, tl.int64) << shift) >> 1
        if MODES[layer] == 2:
            upper = tl.floor(hidden * (1.0 / (1 << HALF)))
            lower = hidden - upper * (1 << HALF)
            total = tl.dot(upper, weight, input_precision="ieee").to(tl.int64) * (1 << HALF)
            total += tl.dot(lower, weight, input_precision="ieee").to(tl.int64)
            total += (bias.to(tl.int64) * (1 << BITS))[None, :]
        else:
            total = (tl.dot(hidden, weight, input_precision="ieee") + bias * (1 << BITS)).to(tl.int32)
        if MODES[layer] == 0:
            phase = (total * multiplier.to(tl.int32) + rounding.to(tl.int32)) >> shift.to(tl.int32)
        else:
            phase = (total.to(tl.int64) * multiplier + rounding) >> shift
    out = out_ptr + (node * P + p)[:, None] * WIDTHS[NUM_LAYERS] + m
    mask = (p < P)[:, None] & (m < WIDTHS[NUM_LAYERS])
    if IS_LAST:
        tl.store(out, phase.to(tl.int64), mask=mask)
    else:
        # all that the next layer looks at
        tl.store(out, (phase & (TURN - 1)).to(tl.int32), mask=mask)


def _runs(weights: Sequence[Tensor], parents: Sequence[Tensor | None]) -> Iterator[tuple[int, int]]:
    """Yield the first and the end of each run of layers that one kernel computes."""
    first = size = 0
    for number, (layer, taken) in enumerate(zip(weights, parents, strict=True)):
        needed = 2 + _block(layer.shape[1] - 1) * _block(layer.shape[2]) // 256
        is_new = taken is not None or len(layer) != len(weights[number - 1])
        if number and (is_new or size + needed > _RUN_SIZE):
            yield first, number
            first, size = number, 0
        size += needed
    yield first, len(weights)


def _pack(weights: Sequence[Tensor]) -> Tensor:
    return torch.cat([layer.float().flatten(1) for layer in weights], 1)


def _widths(weights: Sequence[Tensor]) -> list[int]:
    return [weights[0].shape[1] - 1, *(layer.shape[2] for layer in weights)]


def _sources(available: int, nodes: int, taken: Tensor | None, device: torch.device) -> Tensor:
    if taken is not None:
        return taken.to(device).contiguous()
    own = torch.arange(nodes, device=device)
    return own if available == nodes else torch.zeros_like(own)


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _constants(widths: Sequence[int]) -> dict[str, Any]:
    size = sum((k + 1) * m for k, m in pairwise(widths))
    blocks = tuple(map(_block, widths))
    return {"WIDTHS": tuple(widths), "BLOCKS": blocks, "SIZE": size}


def _tile(widths: Sequence[int], *, is_backward: bool, is_hip: bool = _IS_HIP) -> dict[str, Any]:
    """Return the points of a tile and the launch options: of those that compile without spills, the largest tile."""
    block, options = _BWD_BLOCK_P if is_backward and not is_hip else _BLOCK_P, {"num_warps": 4}
    if not is_hip:
        options = {"num_warps": 8 if is_backward or max(widths) > 32 else 4, "maxnreg": 255}
    # float32 dots run on plain multiply-adds, whose operands leave no registers to load the next tile ahead
    return {"BLOCK_P": block, "num_stages": 1} | options


@torch.library.custom_op("visionkernels::siren_mlp_fwd", mutates_args=())
def _forward_op(x: Tensor, packed: Tensor, sources: Tensor, widths: list[int], is_phase: bool) -> Tensor:
    points, nodes = x.shape[1], len(packed)
    out = x.new_empty(nodes, points, widths[-1])
    if points:
        _siren_mlp_fwd_kernel[(nodes * triton.cdiv(points, _BLOCK_P),)](
            x, packed, sources, out, *x.stride(), points, **_constants(widths), IS_PHASE=is_phase,
            **_tile(widths, is_backward=False),
        )  # fmt: skip
    return out


@torch.library.custom_op("visionkernels::siren_mlp_bwd", mutates_args=())
def _backward_op(
    grad: Tensor, x: Tensor, packed: Tensor, sources: Tensor, widths: list[int], is_phase: bool, needs_x: bool
) -> tuple[Tensor, Tensor]:
    points, nodes = x.shape[1], len(packed)
    grad_x = x.new_empty(nodes if needs_x else 0, points, widths[0])
    if not points:
        return x.new_zeros(len(x) if needs_x else 0, points, widths[0]), torch.zeros_like(packed)
    tile = _tile(widths, is_backward=True)
    slots = min(triton.cdiv(points, tile["BLOCK_P"]), max(_SLOTS // nodes, 1))
    partial = packed.new_empty(slots, *packed.shape)
    _siren_mlp_bwd_kernel[(nodes * slots,)](
        x, packed, sources, grad, grad_x, partial, *x.stride(), *grad.stride(), points, nodes, slots,
        **_constants(widths), IS_PHASE=is_phase, NEEDS_DX=needs_x, **tile,
    )  # fmt: skip
    return _sum_over_nodes(grad_x, sources, len(x)) if needs_x else grad_x, partial.sum(0)


def _sum_over_nodes(grad_x: Tensor, sources: Tensor, available: int) -> Tensor:
    out = grad_x.new_empty(available, *grad_x.shape[1:])
    order = torch.argsort(sources, stable=True)
    first = torch.searchsorted(sources[order], torch.arange(available + 1, device=sources.device))
    elements = grad_x[0].numel()
    _siren_mlp_sum_kernel[(available * triton.cdiv(elements, _SUM_BLOCK),)](
        grad_x, order, first, out, elements, BLOCK_E=_SUM_BLOCK
    )
    return out


@torch.library.custom_op("visionkernels::integer_siren_mlp", mutates_args=())
def _integer_op(
    x: Tensor, packed: Tensor, scales: Tensor, table: Tensor, sources: Tensor, widths: list[int], modes: list[int],
    bits: int, is_last: bool,
) -> Tensor:  # fmt: skip
    points, nodes = x.shape[1], len(packed)
    out = x.new_empty(nodes, points, widths[-1], dtype=torch.int64 if is_last else torch.int32)
    if points:
        _integer_siren_mlp_kernel[(nodes * triton.cdiv(points, _BLOCK_P),)](
            x, packed, scales, table, sources, out, *x.stride(), points, **_constants(widths), MODES=tuple(modes),
            BITS=bits, HALF=HALF_BITS, TURN=len(table), IS_LAST=is_last,
            **_tile(widths, is_backward=False),
        )  # fmt: skip
    return out


@_forward_op.register_fake
def _(x: Tensor, packed: Tensor, sources: Tensor, widths: list[int], is_phase: bool) -> Tensor:
    return x.new_empty(len(packed), x.shape[1], widths[-1])


@_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, packed: Tensor, sources: Tensor, widths: list[int], is_phase: bool, needs_x: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x) if needs_x else 0, x.shape[1], widths[0]), packed.new_empty(packed.shape)


@_integer_op.register_fake
def _(
    x: Tensor, packed: Tensor, scales: Tensor, table: Tensor, sources: Tensor, widths: list[int], modes: list[int],
    bits: int, is_last: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(len(packed), x.shape[1], widths[-1], dtype=torch.int64 if is_last else torch.int32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, sources, ctx.widths, ctx.is_phase = inputs
    ctx.save_for_backward(x, packed, sources)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    grad_x, grad_packed = _backward_op(grad, *ctx.saved_tensors, ctx.widths, ctx.is_phase, needs_x)
    return grad_x if needs_x else None, grad_packed if needs_weight else None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.visionkernels.siren_mlp_fwd)
def _forward_flops(x: Any, packed: Any, sources: Any, widths: list[int], *_: Any, **__: Any) -> int:
    return 2 * packed[0] * x[1] * _products(widths)


@register_flop_formula(torch.ops.visionkernels.integer_siren_mlp)
def _integer_flops(
    x: Any, packed: Any, scales: Any, table: Any, sources: Any, widths: list[int], *_: Any, **__: Any
) -> int:
    return 2 * packed[0] * x[1] * _products(widths)


@register_flop_formula(torch.ops.visionkernels.siren_mlp_bwd)
def _backward_flops(
    grad: Any, x: Any, packed: Any, sources: Any, widths: list[int], is_phase: bool, needs_x: bool, *_: Any, **__: Any
) -> int:
    # hidden phases again, dW, and dh of all layers but the first, whose dx may not be needed
    products = _products(widths[:-1]) + _products(widths) + _products(widths if needs_x else widths[1:])
    return 2 * packed[0] * x[1] * products


def _products(widths: list[int]) -> int:
    return sum(k * m for k, m in pairwise(widths))


def aot_cases(*, is_hip: bool) -> list[AotCase]:
    """Return the cases of the ahead-of-time check: each kernel for a trunk's, a leaf's and the widest runs."""
    pointers = ("x_ptr", "weight_ptr", "grad_ptr", "dx_ptr", "partial_ptr", "table_ptr", "out_ptr")
    types = dict.fromkeys(pointers, "*fp32") | dict.fromkeys(("source_ptr", "order_ptr", "first_ptr"), "*i64")
    cases = []

    def add(kernel: Any, widths: tuple[int, ...], constants: dict[str, Any], config: str = "", **changes: str) -> None:
        tile = _tile(widths, is_backward=kernel is _siren_mlp_bwd_kernel, is_hip=is_hip)
        constants = _constants(widths) | constants | {"BLOCK_P": tile.pop("BLOCK_P")}
        name = "-".join(map(str, widths)) + config
        cases.append(AotCase(kernel=kernel, config=name, types=types | changes, constants=constants, options=tile))

    # of all runs that _RUN_SIZE allows none spills; these are a trunk's, a leaf's and the ones closest to it
    for widths in ((3, 36), (28, 20, 14, 1), (64, 64), (32, 32, 32), (32, 16, 16, 64)):
        is_phase = widths[0] > 3
        add(_siren_mlp_fwd_kernel, widths, {"IS_PHASE": is_phase})
        add(_siren_mlp_bwd_kernel, widths, {"IS_PHASE": is_phase, "NEEDS_DX": is_phase})
    integer = {"BITS": 10, "HALF": HALF_BITS, "TURN": 4096, "IS_LAST": True}
    for widths in ((28, 20, 14, 1), (64, 64), (32, 16, 16, 64)):
        for mode in (_ONE_PRODUCT_INT32, _ONE_PRODUCT, _TWO_PRODUCTS):
            constants = integer | {"MODES": (mode,) * (len(widths) - 1)}
            changes = {"x_ptr": "*i32", "scale_ptr": "*i64", "out_ptr": "*i64"}
            add(_integer_siren_mlp_kernel, widths, constants, f"-mode{mode}", **changes)
    constants = {"BLOCK_E": _SUM_BLOCK}
    cases.append(AotCase(kernel=_siren_mlp_sum_kernel, config="sum", types=types, constants=constants))
    return cases


def rooflines() -> list[Roofline]:
    """Return the least work of a tree of 3-36-36-28 and 64 leaves of 28-20-14-1.

    The kernels' products are float32 multiply-adds, which an H100 does at 67 TFLOP/s, so they cannot come near.
    """
    lines = []
    for name, points, passes in (("forward 32768 points", 32768, 1), ("training 4096 points", 4096, 4)):
        operations = 2 * points * (_products([3, 36, 36, 28]) + 64 * _products([28, 20, 14, 1])) * passes
        moved = 4 * points * (3 + 28 * 2 + 64) * (1 if passes == 1 else 2)
        lines.append(Roofline(op="siren_mlp", config=name, operations=operations, bytes_moved=moved))
    return lines
