"""Trees of small sine networks (SIREN; TINC, sec. 3), in floating point and in the integers of a decoder."""

from collections.abc import Sequence
from numbers import Integral

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from visionkernels.ops._checks import check_floating, check_range
from visionkernels.ops._dispatch import Backend, choose_backend, implementation, without_autocast
from visionkernels.ops.siren_mlp.arithmetic import IntegerArithmetic, LayerArithmetic, column_sums

__all__ = ["integer_siren_mlp", "siren_mlp"]

_MAX_KERNEL_WIDTH = 64  # inputs or outputs of the largest tile that fits into registers
_TURN = 4096


def siren_mlp(
    coordinates: Float[Tensor, "points axes"],
    weights: Sequence[Float[Tensor, "_nodes _inputs_and_bias _outputs"]],
    parents: Sequence[Int64[Tensor, " _nodes"] | None] | None = None,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "leaves points outputs"]:
    r"""Evaluate a tree of small sine networks at the same points for all leaves (TINC, sec. 3).

    With x the coordinates, W_l, b_l the rows of `weights[l]` but the last, and the last, of node n of layer l,

        z_0[n] = x @ W_0[n] + b_0[n],   z_l[n] = sin(z_{l-1}[parents[l][n]]) @ W_l[n] + b_l[n],   out = z_last.

    There is no frequency: multiply it into the weights and biases. `parents[l]` says which outputs of the layer before
    the nodes of layer l take; with None, each node takes the output of its own number, or all nodes take the only one.
    `parents=None` stands for None at every layer. Indices may repeat, be in any order, and lie on the CPU.

    Computes in float32 (float64 for float64 input), under autocast too, since a phase of some turns has no digits left
    in half precision; the output has the dtype of `coordinates`. Gradients of all weights and of the coordinates are
    deterministic for Triton, and for eager on a CPU. Triton has no second derivative, takes layers of at most 64
    inputs and outputs, and keeps float32 accuracy for phases up to 50000 radians.

    Raises TypeError for dtypes and devices, ValueError for shapes that disagree and an index outside the nodes of the
    layer before (on a GPU: a device-side assertion), RuntimeError for `backend="triton"` where it cannot run.
    """
    check_floating("siren_mlp", "coordinates", coordinates=coordinates)
    if coordinates.ndim != 2 or not coordinates.shape[1]:
        raise ValueError(f"coordinates has shape {list(coordinates.shape)}; expected [points, axes >= 1]")
    _check_weights(weights, coordinates)
    parents = _check_parents(parents, weights, 1, "coordinates")
    chosen = choose_backend("siren_mlp", backend, coordinates, unsupported=_too_wide(weights))
    with without_autocast(coordinates):
        return implementation(__name__, chosen).siren_mlp(coordinates, weights, parents)


def integer_siren_mlp(
    inputs: Int32[Tensor, "_nodes points _inputs"],
    weights: Sequence[Float[Tensor, "_nodes _inputs_and_bias _outputs"]],
    multipliers: Sequence[int],
    shifts: Sequence[int],
    parents: Sequence[Int64[Tensor, " _nodes"] | None] | None = None,
    *,
    table: Float[Tensor, "4096"],
    bits: int = 10,
    backend: Backend = "auto",
) -> Int64[Tensor, "leaves points outputs"]:
    r"""Evaluate a tree of sine networks in integers: the same ones on every machine and by every backend.

    `inputs` are phases, 4096 a turn; `table` holds the sine of each, as integers up to 2**bits. For every layer

        h = table[z % 4096],   s = h @ W + (b << bits),   z = (s * multiplier + (1 << shift >> 1)) >> shift

    with W, b the rows of `weights[l]` but the last, and the last: float32 numbers that are integers. The z of the last
    layer are returned. `inputs` has one entry for each node of the first layer or a single one, and `parents` is as in
    `siren_mlp`, with `parents[0]` an index of `inputs`.

    Products are taken in floating point where every partial sum is exact: float32 while the sums of |W|, |b| over the
    rows, times 2**bits, stay below 2**24, else float64 (Triton: two float32 products of half the bits each). These
    sums are read back from a GPU once a call. The function has no gradient.

    Raises TypeError for dtypes and devices, ValueError for shapes that disagree, indices out of range, `bits` outside
    [1, 23], multipliers outside [1, 2**31), shifts outside [0, 62], weights and a table that are no integers or too
    large (sums of 2**53, products of 2**63), RuntimeError for `backend="triton"` where it cannot run.
    """
    if inputs.dtype != torch.int32:
        raise TypeError(f"inputs is {inputs.dtype}; integer_siren_mlp takes int32 phases")
    if inputs.ndim != 3 or not inputs.shape[0] or not inputs.shape[2]:
        raise ValueError(f"inputs has shape {list(inputs.shape)}; expected [nodes >= 1, points, inputs >= 1]")
    _check_table(table, inputs, bits)
    _check_weights(weights, inputs, dtype=torch.float32)
    parents = _check_parents(parents, weights, len(inputs), "inputs")
    for name, numbers, low, high in (("multipliers", multipliers, 1, (1 << 31) - 1), ("shifts", shifts, 0, 62)):
        is_allowed = all(isinstance(number, Integral) and low <= number <= high for number in numbers)
        if len(numbers) != len(weights) or not is_allowed:
            raise ValueError(f"{name}={list(numbers)} must be {len(weights)} integers in [{low}, {high}]")
    arithmetic = _arithmetic(weights, multipliers, shifts, table, bits)
    unsupported = _too_wide(weights)
    if not all(layer.is_exact_in_halves for layer in arithmetic.layers):
        unsupported = "the sums of its weights exceed what two float32 products hold (or torch.compile hides them)"
    chosen = choose_backend("integer_siren_mlp", backend, table, unsupported=unsupported)
    weights = [layer.detach() for layer in weights]
    return implementation(__name__, chosen).integer_siren_mlp(inputs, weights, parents, table, arithmetic)


def _check_weights(weights: Sequence[Tensor], inputs: Tensor, *, dtype: torch.dtype | None = None) -> None:
    if not weights:
        raise ValueError("weights is empty; expected one tensor for each layer")
    dtype, width = dtype or inputs.dtype, inputs.shape[-1]
    for number, layer in enumerate(weights):
        if layer.dtype != dtype or layer.device != inputs.device:
            raise TypeError(
                f"weights[{number}] is {layer.dtype} on {layer.device}; expected {dtype} on {inputs.device}"
            )
        if layer.ndim != 3 or layer.shape[1] != width + 1 or not layer.shape[0] or not layer.shape[2]:
            raise ValueError(
                f"weights[{number}] has shape {list(layer.shape)}; expected [nodes >= 1, {width + 1}, outputs >= 1], "
                f"for {width} inputs and a bias"
            )
        width = layer.shape[2]


def _check_parents(
    parents: Sequence[Tensor | None] | None, weights: Sequence[Tensor], sources: int, source: str
) -> Sequence[Tensor | None]:
    """Return one entry a layer; the first layer takes from `source`, which has `sources` entries."""
    if parents is None:
        parents = [None] * len(weights)
    if len(parents) != len(weights):
        raise ValueError(f"parents has {len(parents)} entries; weights has {len(weights)} layers")
    for number, (taken, layer) in enumerate(zip(parents, weights, strict=True)):
        nodes = len(layer)
        if taken is None:
            if sources not in (1, nodes):
                raise ValueError(
                    f"weights[{number}] has {nodes} nodes and {source} {sources}; name in parents[{number}] "
                    "which ones they take"
                )
        else:
            _check_index(taken, f"parents[{number}]", nodes, sources, layer.device)
        sources, source = nodes, f"weights[{number}]"
    return parents


def _check_index(taken: Tensor, name: str, nodes: int, sources: int, device: torch.device) -> None:
    if taken.dtype != torch.int64:
        raise TypeError(f"{name} is {taken.dtype}; expected int64")
    if taken.device != device and not taken.is_cpu:
        raise TypeError(f"{name} is on {taken.device}; expected {device} or the CPU")
    if taken.shape != (nodes,):
        raise ValueError(f"{name} has shape {list(taken.shape)}; expected [{nodes}], one for each node")
    check_range(name, taken, sources)


def _check_table(table: Tensor, inputs: Tensor, bits: int) -> None:
    if not 1 <= bits <= 23:
        raise ValueError(f"bits={bits} must be in [1, 23]")
    if table.dtype != torch.float32 or table.device != inputs.device:
        raise TypeError(f"table is {table.dtype} on {table.device}; expected torch.float32 on {inputs.device}")
    if table.shape != (_TURN,):
        raise ValueError(f"table has shape {list(table.shape)}; expected [{_TURN}], one sine for each phase")


def _arithmetic(
    weights: Sequence[Tensor], multipliers: Sequence[int], shifts: Sequence[int], table: Tensor, bits: int
) -> IntegerArithmetic:
    scales = [(int(multiplier), int(shift)) for multiplier, shift in zip(multipliers, shifts, strict=True)]
    if torch.compiler.is_compiling() or table.is_meta:
        return IntegerArithmetic(bits, tuple(LayerArithmetic(*scale) for scale in scales))
    largest, sums, remainders = column_sums(table, weights)
    for number, remainder in enumerate(remainders):
        if remainder != 0:  # NaN too
            name = "table" if number == 0 else f"weights[{number - 1}]"
            raise ValueError(f"{name} holds a number that is {remainder:g} off an integer; round it")
    if largest > 1 << bits:
        raise ValueError(f"table reaches {largest:g}; with bits={bits}, allowed is {1 << bits}")
    layers = (LayerArithmetic.of(total, *scale, bits) for total, scale in zip(sums, scales, strict=True))
    return IntegerArithmetic(bits, tuple(layers))


def _too_wide(weights: Sequence[Tensor]) -> str | None:
    widest = max(max(layer.shape[1] - 1, layer.shape[2]) for layer in weights)
    if widest <= _MAX_KERNEL_WIDTH:
        return None
    return f"a layer of {widest} inputs or outputs exceeds the kernels' {_MAX_KERNEL_WIDTH}"
