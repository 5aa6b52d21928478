"""The octree of coordinate networks; all nodes of a level are evaluated in a few batched products (TINC, sec. 3.1).

Every leaf is a function of local coordinates, -1 to 1 along each axis, composed of the segments on the path from the
root to the leaf. One grid serves all leaves, and the features of a node are computed once for all leaves below it.
"""

# K leaves, P points of a leaf, C channels, N nodes of a stack, I inputs, O outputs

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tinc.activations import SINE_FREQUENCY, activate, check_activation
from tinc.official.allocation import Dims, TreePlan, check_divisible
from tinc.official.volume import Rounding, SideInfo, denormalise
from visionkernels.checks import check

__all__ = ["OctreeMLP", "SegmentStack", "assemble", "coordinate_grid", "decode", "split"]


def coordinate_grid(shape: Sequence[int]) -> Float[Tensor, "points axes"]:
    """Return the points of a grid in row-major order, from -1 to 1 along each axis; an axis of length 1 has -1."""
    axes = [torch.linspace(-1, 1, size) for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


class SegmentStack(nn.Module):
    """Segments of equal sizes: one small network for each of N nodes.

    Every linear layer is followed by the activation, the last one only if `activates_output`. The first sine of a
    segment of two or more layers multiplies its input by `w0`, all others by 30. Weights [N, O, I] are drawn uniformly
    from ±1 / I in the first layer and ±sqrt(6 / I) / 30 before other sines, biases [N, O, 1] from ±1 / sqrt(I); for
    other activations all are drawn from ±1 / sqrt(I), PyTorch's default.

    Args:
        dims: sizes of the layers
        num_nodes: number of segments
        activation: "Sine", "ReLU", "LeakyReLU" with its slope, "Sigmoid" or "Tanh"
        w0: frequency of the first sine
        activates_output: whether the activation follows the last layer
        generator: source of the initial weights; None is torch's own
    """

    def __init__(
        self,
        dims: Dims,
        num_nodes: int,
        *,
        activation: str,
        w0: float,
        activates_output: bool,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.dims, self.num_nodes, self.activation, self.w0 = dims, num_nodes, activation, w0
        self.activates_output = activates_output
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for layer, (out, inputs) in enumerate(dims.shapes()):
            bound = inputs**-0.5
            if activation == "Sine":
                bound = 1 / inputs if layer == 0 else (6 / inputs) ** 0.5 / SINE_FREQUENCY
            for values, size, limit in ((self.weights, inputs, bound), (self.biases, 1, inputs**-0.5)):
                drawn = torch.rand(num_nodes, out, size, generator=generator)
                values.append(nn.Parameter((2 * drawn - 1) * limit))

    def forward(self, x: Float[Tensor, "parents inputs points"]) -> Float[Tensor, "nodes outputs points"]:
        """Return the outputs of each node; node n reads the input n * parents // nodes, which its siblings share."""
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            is_last = layer == self.dims.layers - 1
            is_active = self.activates_output or not is_last
            if is_active and self.activation == "Sine":
                is_first = layer == 0 and not is_last
                frequency = self.w0 if is_first else SINE_FREQUENCY
                # scaling the weights is cheaper: a node has more points than weights
                weight, bias = weight * frequency, bias * frequency
            if layer == 0 and x.shape[0] != self.num_nodes:
                # siblings are neighbours, so their weights form one taller matrix for each parent
                weight, bias = (parameter.reshape(x.shape[0], -1, parameter.shape[-1]) for parameter in (weight, bias))
                x = torch.baddbmm(bias, weight, x).reshape(self.num_nodes, -1, x.shape[-1])
            else:
                x = torch.baddbmm(bias, weight, x)
            if is_active:
                x = activate(self.activation, x)
        return x


class OctreeMLP(nn.Module):
    """The tree of a `TreePlan`, evaluated at points of the leaf grid; `seed` determines the initial weights."""

    grid: Tensor

    def __init__(self, plan: TreePlan, *, seed: int = 42) -> None:
        super().__init__()
        check_divisible(plan.volume_shape, plan.num_levels)
        self.plan = plan
        generator = torch.Generator().manual_seed(seed)
        self.levels = nn.ModuleList()
        self.sources: list[list[Tensor | None]] = []
        """For each stack, the rows of its nodes' inputs among the features of its width above; None for their order."""
        self.members: list[list[list[int]]] = []
        """For each stack, the places of its nodes within their level."""
        for level, activation in enumerate(plan.activations):
            nodes = plan.on_level(level)
            groups: dict[Dims, list[int]] = {}
            for place, node in enumerate(nodes):
                groups.setdefault(node.dims, []).append(place)
            is_leaf = level == plan.num_levels - 1
            self.levels.append(
                nn.ModuleList(
                    SegmentStack(
                        dims, len(places), activation=activation, w0=plan.w0, activates_output=not is_leaf,
                        generator=generator,
                    )
                    for dims, places in groups.items()
                )
            )  # fmt: skip
            self.sources.append([self._source(level, dims, places) for dims, places in groups.items()])
            self.members.append(list(groups.values()))
        leaf_places = [place for places in self.members[-1] for place in places]
        self._leaf_order = None if len(self.members[-1]) == 1 else np.argsort(leaf_places).tolist()
        self.register_buffer("grid", coordinate_grid(plan.leaf_shape).T.contiguous(), persistent=False)

    def _source(self, level: int, dims: Dims, places: Sequence[int]) -> Tensor | None:
        if level == 0:
            return None
        above = [
            place
            for stack, members in zip(self._stacks(level - 1), self.members[level - 1], strict=True)
            if stack.dims.output == dims.input
            for place in members
        ]
        row = {place: number for number, place in enumerate(above)}
        rows = [row[place // 8] for place in places]
        in_order = rows == [number for number in range(len(above)) for _ in range(len(rows) // len(above))]
        return None if in_order else torch.tensor(rows)

    def _stacks(self, level: int) -> Iterator[SegmentStack]:
        for stack in self.levels[level]:  # type: ignore[attr-defined]
            assert isinstance(stack, SegmentStack)
            yield stack

    def forward(self, points: Int[Tensor, "points"] | None = None) -> Float[Tensor, "leaves points channels"]:
        """Evaluate all leaves, in pre-order, at the rows `points` of the leaf grid; None evaluates the whole grid."""
        *_, leaves = self._walk(points)
        values = torch.cat(leaves) if len(leaves) > 1 else leaves[0]
        if self._leaf_order is not None:
            values = values[self._leaf_order]
        return values.transpose(1, 2)

    def _walk(self, points: Tensor | None) -> Iterator[list[Tensor]]:
        """Yield the outputs of each level's stacks, [N, O, P]."""
        x = self.grid if points is None else self.grid.index_select(1, points)
        above = [x[None]]
        for level, sources in enumerate(self.sources):
            outputs = []
            for stack, source in zip(self._stacks(level), sources, strict=True):
                fitting = [features for features in above if features.shape[1] == stack.dims.input]
                features = torch.cat(fitting) if len(fitting) > 1 else fitting[0]
                outputs.append(stack(features if source is None else features[source.to(features.device)]))
            yield outputs
            above = outputs

    def features(self, points: Int[Tensor, "points"] | None = None) -> list[list[Float[Tensor, "points outputs"]]]:
        """Return the outputs of each node at `points` of the leaf grid: for each level, a list of one tensor a node."""
        levels = []
        for members, outputs in zip(self.members, self._walk(points), strict=True):
            by_place = {
                place: values.T
                for places, stack in zip(members, outputs, strict=True)
                for place, values in zip(places, stack, strict=True)
            }
            levels.append([by_place[place] for place in sorted(by_place)])
        return levels

    def node_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights [O, I] and biases [O] of every node under official names, in the official order.

        They are views of the stacked parameters: copying into them changes the model.
        """
        return self._by_node(lambda parameter: parameter)

    def node_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the gradients under the same names; a parameter without a gradient has zeros."""
        return self._by_node(lambda weight: torch.zeros_like(weight) if weight.grad is None else weight.grad)

    def _by_node(self, pick: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
        layers: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for level, members in enumerate(self.members):
            for stack, places in zip(self._stacks(level), members, strict=True):
                stacked = [(pick(w), pick(b)) for w, b in zip(stack.weights, stack.biases, strict=True)]
                for row, place in enumerate(places):
                    layers[level, place] = [(weight[row], bias[row, :, 0]) for weight, bias in stacked]
        seen = [0] * self.plan.num_levels
        for node in self.plan.nodes:
            for number, (weight, bias) in enumerate(layers[node.level, seen[node.level]]):
                yield f"{node.name}/{number}-W", weight
                yield f"{node.name}/{number}-B", bias
            seen[node.level] += 1


def split(
    volume: Float[Tensor, "depth height width channels"], num_levels: int
) -> Float[Tensor, "leaves points channels"]:
    """Cut a volume into the leaves of a tree, in pre-order, with points in row-major order; `assemble` inverts it."""
    check_divisible(volume.shape[:3], num_levels)
    boxes = volume[None]
    for _ in range(num_levels - 1):
        _, depth, height, width, channels = boxes.shape
        boxes = boxes.reshape(-1, 2, depth // 2, 2, height // 2, 2, width // 2, channels)
        boxes = boxes.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(0, 3)
    return boxes.flatten(1, 3)


def assemble(
    leaves: Float[Tensor, "leaves points channels"], volume_shape: Sequence[int]
) -> Float[Tensor, "depth height width channels"]:
    """Join the leaves of a full octree, in pre-order, into a volume."""
    num_levels = (leaves.shape[0].bit_length() - 1) // 3 + 1
    check(8 ** (num_levels - 1) == leaves.shape[0], "leaves", leaves.shape[0], "a power of 8")
    check_divisible(volume_shape, num_levels)
    depth, height, width = (size // 2 ** (num_levels - 1) for size in volume_shape)
    volume = leaves.reshape(-1, depth, height, width, leaves.shape[2])
    while volume.shape[0] > 1:
        _, depth, height, width, channels = volume.shape
        volume = volume.reshape(-1, 2, 2, 2, depth, height, width, channels).permute(0, 1, 4, 2, 5, 3, 6, 7)
        volume = volume.reshape(-1, 2 * depth, 2 * height, 2 * width, channels)
    return volume[0]


@torch.no_grad()
def decode(
    model: OctreeMLP, side_info: SideInfo, *, batch_size: int = 262_144, rounding: Rounding = "truncate"
) -> np.ndarray:
    """Return the volume [depth, height, width, channels] that the tree represents, in the source's type.

    `batch_size` is the number of points of a leaf that are evaluated at once; it changes voxels by float32 rounding at
    most. Raises ValueError if the side info belongs to another volume.
    """
    check(batch_size >= 1, "batch_size", batch_size, "at least 1")
    wanted = (*model.plan.volume_shape, model.plan.channels)
    check(side_info.shape == wanted, "side_info.shape", side_info.shape, f"{wanted}, the volume of the tree")
    num_points = model.grid.shape[1]
    if batch_size >= num_points:
        leaves = model()
    else:
        points = torch.arange(num_points, device=model.grid.device)
        leaves = torch.cat([model(batch) for batch in points.split(batch_size)], 1)
    volume = assemble(leaves, model.plan.volume_shape)
    return denormalise(volume.cpu().numpy(), side_info, rounding=rounding)
