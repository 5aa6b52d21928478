"""Sine networks in plain ATen: batched matrix products of rows of points, a few points at a time.

Points are the last axis, so that the layer that many nodes take from one is a single product without a copy, and every
row is long. Few points at a time stay in the cache.
"""

# N nodes, P points, K inputs and M outputs of a layer

from collections.abc import Sequence

import torch
from torch import Tensor

from visionkernels.ops.siren_mlp.arithmetic import IntegerArithmetic, LayerArithmetic

__all__ = ["integer_siren_mlp", "siren_mlp"]

_ROWS = 16384
"""Nodes times points of one pass on a CPU."""
_MIN_POINTS = 64
"""Least points of a pass, however many nodes there are."""


def siren_mlp(coordinates: Tensor, weights: Sequence[Tensor], parents: Sequence[Tensor | None]) -> Tensor:
    """Return the outputs of the last layer's nodes [N, P, M]; see the public function."""
    dtype = torch.promote_types(coordinates.dtype, torch.float32)
    layers = [layer.to(dtype).mT for layer in weights]  # [N, M, K + 1]
    passes = _passes(coordinates.to(dtype).mT[None], weights)
    parts = [_evaluate(points, layers, parents) for points in passes]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return out.mT.to(coordinates.dtype)


def integer_siren_mlp(
    inputs: Tensor, weights: Sequence[Tensor], parents: Sequence[Tensor | None], table: Tensor,
    arithmetic: IntegerArithmetic,
) -> Tensor:  # fmt: skip
    """Return the integers of the last layer's nodes [N, P, M] as int64; see the public function."""
    layers = []
    for layer, scale in zip(weights, arithmetic.layers, strict=True):
        shifted = torch.cat([layer[:, :-1], layer[:, -1:] * 2.0**arithmetic.bits], 1).mT
        layers.append(shifted if scale.is_exact_in_float32 else shifted.double())
    with torch.no_grad():
        passes = _passes(inputs.mT, weights)
        parts = [_evaluate_integers(points, layers, parents, table, arithmetic.layers) for points in passes]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).mT


def _passes(inputs: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """Cut [N, K, P] along the points."""
    if torch.compiler.is_compiling() or not inputs.is_cpu:
        return [inputs]
    return inputs.split(max(_ROWS // max(len(layer) for layer in weights), _MIN_POINTS), -1)


def _evaluate(hidden: Tensor, layers: Sequence[Tensor], parents: Sequence[Tensor | None]) -> Tensor:
    for number, (layer, taken) in enumerate(zip(layers, parents, strict=True)):
        if number:
            # the derivative needs the phases, so they are only overwritten where there is none
            hidden = torch.sin(hidden) if hidden.requires_grad else hidden.sin_()
        hidden = _linear(_take(hidden, taken), layer)
    return hidden


def _evaluate_integers(
    phases: Tensor, layers: Sequence[Tensor], parents: Sequence[Tensor | None], table: Tensor,
    scales: Sequence[LayerArithmetic],
) -> Tensor:  # fmt: skip
    for number, (layer, taken, scale) in enumerate(zip(layers, parents, scales, strict=True)):
        # the phases of the caller are not overwritten
        index = phases.bitwise_and_(len(table) - 1) if number else phases.bitwise_and(len(table) - 1)
        hidden = table.index_select(0, index.reshape(-1)).view(index.shape)
        sums = _linear(_take(hidden, taken).to(layer.dtype), layer)
        phases = sums.to(torch.int32 if scale.product_fits_int32 else torch.int64)
        phases = phases.mul_(scale.multiplier).add_(1 << scale.shift >> 1).bitwise_right_shift_(scale.shift)
    return phases.to(torch.int64)


def _take(hidden: Tensor, taken: Tensor | None) -> Tensor:
    """Return the inputs of the next nodes, or the one that all take."""
    # not hidden[taken], whose backward takes four times as long
    return hidden if taken is None or len(hidden) == 1 else hidden.index_select(0, taken.to(hidden.device))


def _linear(inputs: Tensor, layer: Tensor) -> Tensor:
    """Multiply [N or 1, K, P] by [N, M, K + 1], whose last column is the bias: [N, M, P]."""
    if len(inputs) == 1:
        rows = layer.flatten(0, 1)
        return torch.addmm(rows[:, -1:], rows[:, :-1], inputs[0]).unflatten(0, layer.shape[:2])
    return torch.baddbmm(layer[:, :, -1:], layer[:, :, :-1], inputs)
