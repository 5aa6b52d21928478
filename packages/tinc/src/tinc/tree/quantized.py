"""A tree in integers, as a file holds it, and its evaluation: the same values on every machine."""

# N nodes of a level, P points of a box, K inputs and M outputs of a layer

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tinc.arithmetic import ACTIVATION_BITS, PHASE_BITS, sine_table, to_fixed
from tinc.tree.shape import Box, TreeShape
from visionkernels.ops.siren_mlp import integer_siren_mlp

__all__ = ["COORDINATE_BITS", "LARGEST_WEIGHT", "Layer", "QuantizedTree"]

COORDINATE_BITS = 14
"""A coordinate of 1 is 2**14."""
MULTIPLIER_BITS = 7
"""Bits of a layer's multiplier; weights adapt to the steps that this allows."""
MAX_SHIFT = 40
WEIGHT_BITS = 12
LARGEST_WEIGHT = (1 << WEIGHT_BITS) - 1

_Cells = tuple[tuple[int, int], ...]
"""For each axis, twice the middle of the first cell in a leaf, and the number of cells."""


@dataclass(frozen=True)
class Layer:
    """Integer weights [N, K + 1, M] that stand for weights * multiplier / 2**shift.

    Inputs have 10 fractional bits, coordinates 14. A sine layer computes phases, with 2**12 for a full turn; the last
    layer computes values of the volume.
    """

    weights: np.ndarray
    multiplier: int
    shift: int

    @cached_property
    def tensor(self) -> Tensor:
        """The weights as float32."""
        return torch.from_numpy(self.weights).float()


@dataclass(frozen=True)
class QuantizedTree:
    """A tree as a file holds it."""

    shape: TreeShape
    layers: tuple[Layer, ...]
    constants: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), dtype=np.int64))
    """Values of the constant leaves [constants, channels]."""
    base: int = 0
    """Added to the output of the last layer."""

    def coarser(self, factor: float) -> "QuantizedTree":
        """Return the tree with steps between weights that are `factor` times as large."""
        layers = []
        for layer in self.layers:
            step = layer.multiplier / 2**layer.shift
            multiplier, shift = to_fixed(step * factor, mantissa_bits=MULTIPLIER_BITS, max_shift=MAX_SHIFT)
            weights = np.rint(layer.weights * (step * 2**shift / multiplier)).astype(np.int64)
            layers.append(Layer(weights.clip(-LARGEST_WEIGHT, LARGEST_WEIGHT), multiplier, shift))
        return replace(self, layers=tuple(layers))

    def decode(self, region: Box, steps: tuple[int, ...] | None = None) -> np.ndarray:
        """Return the values of a region as int64 [channels, ...].

        `steps` are voxels of a cell by axis: the region then counts cells, and a value is that at the middle of a cell.
        """
        shape = self.shape
        if steps is None:
            steps = (1,) * len(region)
        sizes = [part.stop - part.start for part in region]
        result = np.zeros((shape.channels, *sizes), dtype=np.int64)
        active = {int(leaf): row for row, leaf in enumerate(shape.nodes[-1])}
        constant = 0
        groups: dict[_Cells, list[tuple[int, Box]]] = {}
        for leaf in range(shape.num_leaves):
            local, place = self._overlap(leaf, region, steps)
            if leaf not in active:
                if local is not None:
                    result[(slice(None), *place)] = self.constants[constant].reshape(-1, *[1] * len(sizes))
                constant += 1
            elif local is not None:
                groups.setdefault(local, []).append((active[leaf], place))
        for local, members in groups.items():
            values = self._evaluate(local, np.array([row for row, _ in members]), steps)
            for (_, place), value in zip(members, values, strict=True):
                result[(slice(None), *place)] = value
        return result

    def _overlap(
        self, leaf: int, region: Box, steps: tuple[int, ...]
    ) -> tuple[tuple[tuple[int, int], ...] | None, Box]:
        """Return the cells of a leaf within the region, None if there are none, and their place in the region."""
        local, place = [], []
        for part, box, step in zip(region, self.shape.box(leaf), steps, strict=True):
            # a cell belongs to the leaf that holds its first voxel
            first = max(part.start, -(-box.start // step))
            last = min(part.stop, -(-box.stop // step))
            if first >= last:
                return None, ()
            local.append((2 * (first * step - box.start) + step - 1, last - first))
            place.append(slice(first - part.start, last - part.start))
        return tuple(local), tuple(place)

    def _evaluate(self, local: _Cells, rows: np.ndarray, steps: tuple[int, ...]) -> np.ndarray:
        """Return the values of some leaves [rows, channels, ...], all at the same cells."""
        chosen = [rows]
        for parents in self.shape.parents[::-1]:
            chosen.insert(0, np.unique(parents[chosen[0]]))
        values = self._first(local, steps)
        if len(self.layers) > 1:
            levels = [level for level, _ in self.shape.layers]
            taken: list[Tensor | None] = []
            for before, level in pairwise(levels):
                if level == before:
                    taken.append(None)
                else:
                    parents = self.shape.parents[before][chosen[level]]
                    taken.append(torch.from_numpy(np.searchsorted(chosen[before], parents)))
            phases = values.bitwise_and((1 << PHASE_BITS) - 1).to(torch.int32)
            weights = [
                layer.tensor[torch.from_numpy(chosen[level])]
                for layer, level in zip(self.layers[1:], levels[1:], strict=True)
            ]
            values = integer_siren_mlp(
                phases, weights, [layer.multiplier for layer in self.layers[1:]],
                [layer.shift for layer in self.layers[1:]], taken, table=sine_table(), bits=ACTIVATION_BITS,
            )  # fmt: skip
        sizes = [count for _, count in local]
        return values.mT.reshape(len(rows), -1, *sizes).numpy() + self.base

    def _first(self, local: _Cells, steps: tuple[int, ...]) -> Tensor:
        """Return the phases of the first layer [1, P, M]: on a grid, the sum of one table for each axis."""
        layer = self.layers[0]
        axes = len(local)
        total = torch.from_numpy(layer.weights[:, -1:] << COORDINATE_BITS).view(*[1] * axes, -1)
        for axis, ((first, count), size, step) in enumerate(zip(local, self.shape.leaf_size, steps, strict=True)):
            coordinates = torch.tensor([_coordinate(first + 2 * step * i, size) for i in range(count)])
            table = coordinates[:, None] * torch.from_numpy(layer.weights[0, axis])
            total = total + table.view(*[count if other == axis else 1 for other in range(axes)], -1)
        half = (1 << layer.shift) >> 1
        return (total.reshape(1, -1, layer.weights.shape[2]) * layer.multiplier + half) >> layer.shift


def _coordinate(twice: int, size: int) -> int:
    """Return the coordinate of half a count of voxels in a leaf: -2**14 for 0, 2**14 for size - 1, rounded half up."""
    if size == 1:
        return -(1 << COORDINATE_BITS)
    return ((twice << COORDINATE_BITS) + ((size - 1) >> 1)) // (size - 1) - (1 << COORDINATE_BITS)
