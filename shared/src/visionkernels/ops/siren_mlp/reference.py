"""Sine networks by their definition, node by node (TINC, sec. 3)."""

# P points, K inputs and M outputs of a layer

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from visionkernels.ops.siren_mlp.arithmetic import IntegerArithmetic

__all__ = ["integer_siren_mlp", "siren_mlp"]


def siren_mlp(coordinates: Tensor, weights: Sequence[Tensor], parents: Sequence[Tensor | None]) -> Tensor:
    """Return the outputs of the last layer's nodes [N, P, M]; see the public function."""
    dtype = torch.promote_types(coordinates.dtype, torch.float32)
    inputs = [coordinates.to(dtype)]  # of each node [P, K]
    for layer, taken in zip(weights, parents, strict=True):
        sources = _sources(len(inputs), len(layer), taken)
        phases = [inputs[i] @ node[:-1] + node[-1] for i, node in zip(sources, layer.to(dtype), strict=True)]
        inputs = [torch.sin(phase) for phase in phases]
    return torch.stack(phases).to(coordinates.dtype)


def integer_siren_mlp(
    inputs: Tensor, weights: Sequence[Tensor], parents: Sequence[Tensor | None], table: Tensor,
    arithmetic: IntegerArithmetic,
) -> Tensor:  # fmt: skip
    """Return the integers of the last layer's nodes [N, P, M] as int64; see the public function."""
    sines = table.cpu().numpy().astype(np.int64)
    phases = list(inputs.cpu().numpy().astype(np.int64))
    for layer, scale, taken in zip(weights, arithmetic.layers, parents, strict=True):
        sources = _sources(len(phases), len(layer), taken)
        nodes = layer.cpu().numpy().astype(np.int64)
        hidden = [sines[phases[i] % len(sines)] for i in sources]
        sums = [h @ node[:-1] + (node[-1] << arithmetic.bits) for h, node in zip(hidden, nodes, strict=True)]
        phases = [(total * scale.multiplier + (1 << scale.shift >> 1)) >> scale.shift for total in sums]
    return torch.from_numpy(np.stack(phases)).to(inputs.device)


def _sources(available: int, nodes: int, taken: Tensor | None) -> list[int]:
    if taken is not None:
        return taken.tolist()
    return [0] * nodes if available == 1 else list(range(nodes))
