"""How many parameters each node of the octree gets, and how wide its segment then is (TINC, sec. 3.2).

Nodes stand in depth-first pre-order everywhere: a node, then its eight children, depth slowest and width fastest.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tinc.recipes import Compat, Level, OfficialRecipe
from visionkernels.checks import check

__all__ = [
    "Dims",
    "LevelStatistics",
    "Node",
    "TreePlan",
    "allocate",
    "check_divisible",
    "hidden_width",
    "node_places",
    "parameter_budget",
    "plan_tree",
    "statistics",
]

_AXES = ("depth", "height", "width")


class Dims(NamedTuple):
    """Sizes of a segment: `layers` linear layers from `input` over `hidden` to `output`."""

    input: int
    hidden: int
    output: int
    layers: int

    def shapes(self) -> list[tuple[int, int]]:
        """Return (outputs, inputs) of each linear layer."""
        sizes = [self.input, *[self.hidden] * (self.layers - 1), self.output]
        return [(after, before) for before, after in pairwise(sizes)]

    @property
    def num_parameters(self) -> int:
        """Weights and biases."""
        return sum(after * (before + 1) for after, before in self.shapes())


@dataclass(frozen=True)
class Node:
    """A node of the tree: where it is, and the sizes of its segment."""

    level: int
    index: tuple[int, int, int]
    """Along depth, height and width, each from 0 to 2 ** level - 1."""
    dims: Dims

    @property
    def name(self) -> str:
        """As official folders name it."""
        return "-".join(map(str, (self.level, *self.index)))


@dataclass(frozen=True, kw_only=True)
class TreePlan:
    """All that defines an `OctreeMLP` but its weights."""

    nodes: tuple[Node, ...]
    """A full octree in pre-order."""
    volume_shape: tuple[int, int, int]
    activations: tuple[str, ...]
    """One a level."""
    w0: float = 30.0

    @property
    def num_levels(self) -> int:
        """Levels, the root among them."""
        return len(self.activations)

    @property
    def leaf_shape(self) -> tuple[int, int, int]:
        """Voxels of a leaf along each axis."""
        parts = 2 ** (self.num_levels - 1)
        depth, height, width = self.volume_shape
        return depth // parts, height // parts, width // parts

    @property
    def channels(self) -> int:
        """Values of a voxel."""
        return self.nodes[-1].dims.output

    @property
    def num_parameters(self) -> int:
        """Weights and biases of all nodes."""
        return sum(node.dims.num_parameters for node in self.nodes)

    def on_level(self, level: int) -> list[Node]:
        """Return the nodes of a level, in pre-order."""
        return [node for node in self.nodes if node.level == level]


class LevelStatistics(NamedTuple):
    """Of the nodes of one level, each array [2 ** level] * 3, on normalised voxels."""

    aoi: np.ndarray
    """Number of values above zero."""
    var: np.ndarray
    """Population variance."""


def parameter_budget(origin_bytes: int, ratio: float) -> int:
    """Return how many float32 parameters a file of `origin_bytes` may cost at this ratio."""
    return int(int(origin_bytes / ratio) / 4)


def hidden_width(parameters: float, *, layers: int, input: int, output: int | None) -> int:
    """Return the hidden width h whose segment costs about `parameters`, at least 1 (rounded down).

    With a given `output` width o (a leaf) h solves (n-2) h^2 + (i+n-1+o) h + o = p, for n layers of which there must
    be two; without one (an inner node, whose output is as wide as its hidden layers) (n-1) h^2 + (i+n) h = p.
    """
    least = 1 if output is None else 2
    check(layers >= least, "layers", layers, f"at least {least}" + ("" if output is None else " in a leaf"))
    if output is None:
        a, b, c = layers - 1, input + layers, -parameters
    else:
        a, b, c = layers - 2, input + layers - 1 + output, output - parameters
    width = -c / b if a == 0 else (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a)
    return max(int(width), 1)


def check_divisible(volume_shape: Sequence[int], num_levels: int) -> None:
    """Raise ValueError that names an axis which the leaves do not divide; the official code overlooks the width."""
    parts = 2 ** (num_levels - 1)
    for axis, size in zip(_AXES, volume_shape, strict=True):
        if size % parts:
            raise ValueError(
                f"{axis}={size} is not divisible by the {parts} leaves along it of a tree of {num_levels} levels; "
                f"crop or pad to {max(size // parts, 1) * parts} or {(size // parts + 1) * parts}, or use fewer levels"
            )


def statistics(normalised: np.ndarray, num_levels: int) -> list[LevelStatistics]:
    """Return the statistics of all nodes of volume [depth, height, width, channels], one entry a level."""
    check_divisible(normalised.shape[:3], num_levels)
    measured = []
    for level in range(num_levels):
        parts = 2**level
        depth, height, width = (size // parts for size in normalised.shape[:3])
        aoi, var = np.empty((parts,) * 3), np.empty((parts,) * 3)
        # a slab at a time: variances take a float64 copy
        for place in range(parts):
            slab = normalised[place * depth : (place + 1) * depth]
            blocks = slab.reshape(depth, parts, height, parts, width, -1)
            aoi[place] = (blocks > 0).sum((0, 2, 4, 5))
            var[place] = blocks.var((0, 2, 4, 5), dtype=np.float64)
        measured.append(LevelStatistics(aoi, var))
    return measured


def node_places(num_levels: int) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """Yield level and index of every node of the full octree, in pre-order."""
    stack: list[tuple[int, tuple[int, int, int]]] = [(0, (0, 0, 0))]
    while stack:
        level, (d, h, w) = stack.pop()
        yield level, (d, h, w)
        if level + 1 < num_levels:
            corners = ((2 * d + i, 2 * h + j, 2 * w + k) for i in (1, 0) for j in (1, 0) for k in (1, 0))
            stack += [(level + 1, corner) for corner in corners]


def allocate(
    levels: Sequence[Level],
    budget: int,
    measured: Sequence[LevelStatistics] | None = None,
    *,
    channels: int = 1,
    compat: Compat = "none",
    origin_bytes: int | None = None,
) -> tuple[Node, ...]:
    """Return the nodes, in pre-order, of the tree that spends about `budget` parameters.

    Level l has the share r_l 8^l / sum_k r_k 8^k; within a level a node has an equal part, or (from `measured`) one in
    proportion to its values above zero ("aoi"), or to its variance ("var"). With compat="official" a variance counts
    relative to the eight siblings instead of the level, so that levels from the third on spend 8 times too much or
    more, and a budget that is too small gives a tree that is larger than asked. Widths are rounded down, so that trees
    are mostly a little smaller than the budget.

    Raises ValueError for a leaf of one layer, an allocation without its statistics or with no variance to share by,
    and, unless compat="official", for a budget that the narrowest tree exceeds; `origin_bytes` lets it name the ratio.
    """
    check(budget >= 0, "budget", budget, "at least 0")
    check(channels >= 1, "channels", channels, "at least 1")
    layers = levels[-1].layers
    check(layers >= 2, "levels[-1].layers", layers, "at least 2: a leaf of one layer has no width to choose")
    shares = [_node_budgets(levels, level, budget, measured, compat) for level in range(len(levels))]
    outputs: dict[tuple[int, ...], int] = {}
    nodes = []
    for level, index in node_places(len(levels)):
        parent = (level - 1, *(place // 2 for place in index))
        is_leaf = level == len(levels) - 1
        width_in, width_out = outputs[parent] if level else 3, channels if is_leaf else None
        layers = levels[level].layers
        hidden = hidden_width(float(shares[level][index]), layers=layers, input=width_in, output=width_out)
        dims = Dims(width_in, hidden, hidden if width_out is None else width_out, layers)
        outputs[(level, *index)] = dims.output
        nodes.append(Node(level, index, dims))
    if compat != "official":
        _check_reached(nodes, levels, budget, channels, origin_bytes)
    return tuple(nodes)


def _node_budgets(
    levels: Sequence[Level], level: int, budget: int, measured: Sequence[LevelStatistics] | None, compat: Compat
) -> np.ndarray:
    """Return the budget of every node of a level, an array [2 ** level] * 3."""
    total = sum(each.ratio * 8**depth for depth, each in enumerate(levels))
    own = budget * (levels[level].ratio * 8**level) / total
    how = levels[level].allocation if level else "equal"
    parts = 2**level
    if how == "equal":
        return np.full((parts,) * 3, own / 8**level)
    if measured is None:
        raise ValueError(f"allocation {how!r} of level {level} needs statistics of a volume; without one use 'equal'")
    if how == "aoi":
        counts, whole = measured[level].aoi, float(measured[0].aoi.item())
        if whole == 0:
            raise ValueError("allocation 'aoi' finds no value above 0 after scaling; use 'equal', or a higher range")
        return own * counts / whole
    variances = measured[level].var
    if compat == "official":
        octets = variances.reshape(parts // 2, 2, parts // 2, 2, parts // 2, 2).sum((1, 3, 5))
        sums = octets.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    else:
        sums = np.full_like(variances, variances.sum())
    if not sums.all():
        place = "-".join(map(str, (level, *np.argwhere(sums == 0)[0].tolist())))
        raise ValueError(
            f"allocation 'var' of level {level}: node {place} and its siblings have no variance; use 'aoi'"
        )
    return own * variances / sums


def _check_reached(
    nodes: Sequence[Node], levels: Sequence[Level], budget: int, channels: int, origin_bytes: int | None
) -> None:
    """Raise ValueError if widths of 1, which cannot become less, made the tree larger than its budget."""
    used = sum(node.dims.num_parameters for node in nodes)
    if used <= budget or all(node.dims.hidden > 1 for node in nodes):
        return
    least = 0
    for level, each in enumerate(levels):
        is_leaf = level == len(levels) - 1
        dims = Dims(1 if level else 3, 1, channels if is_leaf else 1, each.layers)
        least += 8**level * dims.num_parameters
    ratios = "" if origin_bytes is None else f", the largest reachable ratio is {origin_bytes / (4 * least):.4g}"
    raise ValueError(
        f"a budget of {budget} parameters is too small: widths fall to 1 and the tree has {used}; "
        f"the narrowest tree of these levels has {least}{ratios}"
    )


def plan_tree(recipe: OfficialRecipe, normalised: np.ndarray, origin_bytes: int) -> TreePlan:
    """Return the tree that `recipe` gives a normalised volume [depth, height, width, channels].

    `origin_bytes` is the size of the file that it came from. Raises ValueError as `allocate` and `check_divisible` do,
    and if the channels are not the recipe's.
    """
    channels = normalised.shape[3]
    check(channels == recipe.output, "output", recipe.output, f"{channels}, the channels of the volume")
    depth, height, width = normalised.shape[:3]
    check_divisible((depth, height, width), len(recipe.levels))
    nodes = allocate(
        recipe.levels, parameter_budget(origin_bytes, recipe.ratio), statistics(normalised, len(recipe.levels)),
        channels=channels, compat=recipe.compat, origin_bytes=origin_bytes,
    )  # fmt: skip
    activations = tuple(level.activation for level in recipe.levels)
    return TreePlan(nodes=nodes, volume_shape=(depth, height, width), activations=activations, w0=recipe.w0)
