"""The shape of a tree: its splits, the widths of its layers, its nodes and its leaves."""

# N nodes of a level, K inputs and M outputs of a layer

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

__all__ = ["Box", "TreeShape"]

Box = tuple[slice, ...]


@dataclass(frozen=True)
class TreeShape:
    """Everything about a tree but its weights."""

    extent: tuple[int, ...]
    """Voxels of the volume by axis, without channels."""
    splits: tuple[tuple[int, ...], ...]
    """For each level, into how many parts a node of the level above is split by axis; all ones for the root."""
    widths: tuple[tuple[int, ...], ...]
    """For each level, the outputs of the layers of a node; the very last one is the number of channels."""
    active: tuple[bool, ...] = ()
    """For each leaf, whether it has layers of its own; the others are constants. Empty if all leaves have layers."""

    def __post_init__(self) -> None:
        if len(self.splits) != len(self.widths) or not self.widths or not all(self.widths):
            raise ValueError(f"splits={self.splits} and widths={self.widths} must have the same levels")
        if self.active and len(self.active) != self.num_leaves:
            raise ValueError(f"active has {len(self.active)} entries for {self.num_leaves} leaves")

    @property
    def num_leaves(self) -> int:
        """Number of leaves, active or constant."""
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
        """Places of the leaves in their grid [leaves, axes]: breadth first, the children of a node in a row."""
        places = np.zeros((1, len(self.extent)), dtype=np.int64)
        for split in self.splits:
            offsets = np.array(list(product(*map(range, split))), dtype=np.int64)
            places = (places[:, None] * np.array(split) + offsets).reshape(-1, len(self.extent))
        return places

    @cached_property
    def nodes(self) -> tuple[np.ndarray, ...]:
        """For each level, the numbers of the nodes with an active leaf below them, in order."""
        needed = np.flatnonzero(self.active) if self.active else np.arange(self.num_leaves)
        levels = [needed]
        for split in self.splits[:0:-1]:
            needed = np.unique(needed // math.prod(split))
            levels.append(needed)
        return tuple(levels[::-1])

    @cached_property
    def parents(self) -> tuple[np.ndarray, ...]:
        """For each level below the root, the rows of its nodes' parents in `nodes` of the level above."""
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
        """Number of weights and biases of all layers."""
        return sum(math.prod(shape) for _, shape in self.layers)

    def box(self, leaf: int) -> Box:
        """Return the part of the volume that a leaf covers."""
        return tuple(
            slice(place * size, min((place + 1) * size, end))
            for place, size, end in zip(self.leaves[leaf].tolist(), self.leaf_size, self.extent, strict=True)
        )
