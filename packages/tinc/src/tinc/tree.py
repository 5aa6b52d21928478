"""The tree of a file: which nodes there are, what they compute in integers, and how their weights are written.

A volume is split level by level into equal boxes; each node owns a few layers, and a leaf's function is the composition
of the layers on its path from the root (TINC, sec. 3). All leaves use the same coordinates, from -1 to 1 over the leaf,
so what inner nodes compute is shared by the leaves below them. A leaf may be a constant instead, or no node at all.
"""

# N nodes of a level, P points of a box, K inputs and M outputs of a layer

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor

from tinc.arithmetic import ACTIVATION_BITS, PHASE_BITS, sine_table, to_fixed
from tinc.entropy import BitReader, BitWriter
from tinc.interpolation import IntegerCoder
from visionkernels.ops.siren_mlp import integer_siren_mlp

__all__ = [
    "COORDINATE_BITS",
    "LARGEST_WEIGHT",
    "Layer",
    "QuantizedTree",
    "TreeShape",
    "read_constants",
    "read_weights",
    "write_constants",
    "write_weights",
]

COORDINATE_BITS = 14
"""A coordinate of 1 is 2**14."""
MULTIPLIER_BITS = 7
"""Of the multiplier of a layer; weights adapt to whichever steps this allows."""
MAX_SHIFT = 40
WEIGHT_BITS = 12
LARGEST_WEIGHT = (1 << WEIGHT_BITS) - 1

Box = tuple[slice, ...]
_Cells = tuple[tuple[int, int], ...]
"""By axis twice the middle of the first cell in a leaf, and how many cells."""


@dataclass(frozen=True)
class TreeShape:
    """What a tree is, apart from its weights."""

    extent: tuple[int, ...]
    """Voxels of the volume by axis, without channels."""
    splits: tuple[tuple[int, ...], ...]
    """For each level, into how many parts a node of the level above is split by axis; all ones for the root."""
    widths: tuple[tuple[int, ...], ...]
    """For each level, the outputs of the layers of a node; the last one of all is the number of channels."""
    active: tuple[bool, ...] = ()
    """Which leaves have layers of their own; the others are constants. Empty: all have."""

    def __post_init__(self) -> None:
        if len(self.splits) != len(self.widths) or not self.widths or not all(self.widths):
            raise ValueError(f"splits={self.splits} and widths={self.widths} must have the same levels")
        if self.active and len(self.active) != self.num_leaves:
            raise ValueError(f"active has {len(self.active)} entries for {self.num_leaves} leaves")

    @property
    def num_leaves(self) -> int:
        """Leaves, active or constant."""
        return math.prod(math.prod(split) for split in self.splits)

    @property
    def channels(self) -> int:
        """Values of a voxel."""
        return self.widths[-1][-1]

    @cached_property
    def leaf_size(self) -> tuple[int, ...]:
        """Voxels of a leaf by axis; the last leaf of an axis may reach beyond the volume."""
        parts = [math.prod(split[axis] for split in self.splits) for axis in range(len(self.extent))]
        return tuple(-(-size // part) for size, part in zip(self.extent, parts, strict=True))

    @cached_property
    def leaves(self) -> np.ndarray:
        """Place of each leaf in the grid of leaves [leaves, axes]: breadth first, the children of a node in a row."""
        places = np.zeros((1, len(self.extent)), dtype=np.int64)
        for split in self.splits:
            offsets = np.array(list(product(*map(range, split))), dtype=np.int64)
            places = (places[:, None] * np.array(split) + offsets).reshape(-1, len(self.extent))
        return places

    @cached_property
    def nodes(self) -> tuple[np.ndarray, ...]:
        """Of each level, the nodes that an active leaf needs, in order."""
        needed = np.nonzero(np.array(self.active or (True,) * self.num_leaves))[0]
        levels = [needed]
        for split in self.splits[:0:-1]:
            needed = np.unique(needed // math.prod(split))
            levels.append(needed)
        return tuple(levels[::-1])

    @cached_property
    def parents(self) -> tuple[np.ndarray, ...]:
        """Of each level below the root, where the parents of `nodes` stand among those of the level above."""
        return tuple(
            np.searchsorted(self.nodes[level], self.nodes[level + 1] // math.prod(self.splits[level + 1]))
            for level in range(len(self.splits) - 1)
        )

    @cached_property
    def layers(self) -> tuple[tuple[int, tuple[int, int, int]], ...]:
        """Level and weight shape [N, K + 1, M] of each layer, from the root on; the last row is the bias."""
        inputs, layers = len(self.extent), []
        for level, widths in enumerate(self.widths):
            for width in widths:
                layers.append((level, (len(self.nodes[level]), inputs + 1, width)))
                inputs = width
        return tuple(layers)

    @property
    def num_weights(self) -> int:
        """Weights of all layers."""
        return sum(math.prod(shape) for _, shape in self.layers)

    def box(self, leaf: int) -> Box:
        """Return the part of the volume that a leaf covers."""
        return tuple(
            slice(place * size, min((place + 1) * size, end))
            for place, size, end in zip(self.leaves[leaf].tolist(), self.leaf_size, self.extent, strict=True)
        )


@dataclass(frozen=True)
class Layer:
    """Integer weights [N, K + 1, M] that stand for weights * multiplier / 2**shift.

    A sine layer turns them into phases of 2**12 a turn, from inputs of 2**10 (coordinates: 2**14); the last layer into
    values of the volume.
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
    """A tree as a file holds it, and what it decodes to: the same integers on every machine."""

    shape: TreeShape
    layers: tuple[Layer, ...]
    constants: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), dtype=np.int64))
    """Values of the constant leaves [constants, channels]."""
    base: int = 0
    """Added to what the layers compute."""

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

        With `steps` the region counts cells of so many voxels along each axis, and a value is that at the middle of its
        cell.
        """
        shape = self.shape
        steps = steps or (1,) * len(region)
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
        """Return which cells of a leaf lie in the region (None: none), as twice their middle, and where."""
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
        """Return the values of leaves [rows, channels, ...] on the same cells of each."""
        chosen = [rows]
        for parents in self.shape.parents[::-1]:
            chosen.insert(0, np.unique(parents[chosen[0]]))
        values = self._first(local, steps)
        if len(self.layers) > 1:
            levels = [level for level, _ in self.shape.layers]
            taken: list[Tensor | None] = []
            for before, level in pairwise(levels):
                found = (
                    np.searchsorted(chosen[before], self.shape.parents[before][chosen[level]])
                    if level > before
                    else None
                )
                taken.append(None if found is None else torch.from_numpy(found))
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
        """Return the phases of the first layer [1, P, M]: on a grid they are a sum of one table an axis."""
        layer = self.layers[0]
        axes = len(local)
        total = torch.from_numpy(layer.weights[:, -1:] << COORDINATE_BITS).view(*[1] * axes, -1)
        for axis, ((first, count), size, step) in enumerate(zip(local, self.shape.leaf_size, steps, strict=True)):
            coordinates = torch.tensor([_coordinate(first + 2 * step * i, size) for i in range(count)])
            table = coordinates[:, None] * torch.from_numpy(layer.weights[0, axis])
            total = total + table.view(*[count if each == axis else 1 for each in range(axes)], -1)
        half = (1 << layer.shift) >> 1
        return (total.reshape(1, -1, layer.weights.shape[2]) * layer.multiplier + half) >> layer.shift


def _coordinate(twice: int, size: int) -> int:
    """Return the coordinate of half a count of voxels in a leaf: -2**14 for 0, 2**14 for size - 1, rounded half up."""
    if size == 1:
        return -(1 << COORDINATE_BITS)
    return ((twice << COORDINATE_BITS) + ((size - 1) >> 1)) // (size - 1) - (1 << COORDINATE_BITS)


def write_weights(writer: BitWriter, tree: QuantizedTree) -> bytes:
    """Append all weights to the stream; return the bytes that say how they are spread, two a layer."""
    spreads = bytearray()
    for layer in tree.layers:
        for part in (layer.weights[:, :-1], layer.weights[:, -1:]):
            spread = _spread(float(np.abs(part).mean()) if part.size else 0.0)
            spreads.append(spread)
            magnitudes = np.abs(part).reshape(-1)
            for place, ones in enumerate(_digit_probabilities(spread)):
                writer.write((magnitudes >> place) & 1, np.full(magnitudes.shape, ones))
            writer.write_raw((part.reshape(-1)[magnitudes > 0] < 0).astype(np.int64), 1)
    return bytes(spreads)


def read_weights(reader: BitReader, shape: TreeShape, spreads: Sequence[int]) -> list[np.ndarray]:
    """Return the weights of each layer."""
    layers = []
    for number, (_, (nodes, rows, outputs)) in enumerate(shape.layers):
        parts = []
        for spread, size in zip(spreads[2 * number : 2 * number + 2], (rows - 1, 1), strict=True):
            magnitudes = np.zeros(nodes * size * outputs, dtype=np.int64)
            for place, ones in enumerate(_digit_probabilities(spread)):
                magnitudes |= reader.read(np.full(magnitudes.shape, ones)) << place
            (nonzero,) = np.nonzero(magnitudes)
            magnitudes[nonzero] *= 1 - 2 * reader.read_raw(len(nonzero), 1)
            parts.append(magnitudes.reshape(nodes, size, outputs))
        layers.append(np.concatenate(parts, 1))
    return layers


def write_constants(writer: BitWriter, tree: QuantizedTree) -> None:
    """Append the values of constant leaves."""
    if tree.constants.size:
        IntegerCoder().write(writer, tree.constants)


def read_constants(reader: BitReader, shape: TreeShape) -> np.ndarray:
    """Return the values of constant leaves [constants, channels]."""
    count = shape.num_leaves - len(shape.nodes[-1])
    if not count:
        return np.zeros((0, shape.channels), dtype=np.int64)
    return IntegerCoder().read(reader, (count, shape.channels))


def _mean(spread: int) -> int:
    """Return the mean magnitude that a byte says, in 1 / 64."""
    return (8 + spread % 8) << (spread // 8)


def _spread(mean: float) -> int:
    return min(range(160), key=lambda spread: abs(_mean(spread) - max(64 * mean, 1)))


def _digit_probabilities(spread: int) -> list[int]:
    """Return the probability out of 2**16 of each binary digit of a magnitude to be 1, the lowest first.

    The digits of a geometric magnitude, P(m) ~ ratio**m, are independent: digit j is 1 with odds ratio**(2**j).
    """
    mean = _mean(spread)
    ratio = (mean << 16) // (mean + 64)
    digits = []
    for _ in range(WEIGHT_BITS):
        digits.append(min(max((ratio << 16) // ((1 << 16) + ratio), 1), (1 << 16) - 1))
        ratio = ratio * ratio >> 16
    return digits
