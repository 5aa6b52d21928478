"""The baseline of the benches: a tree whose nodes are evaluated one by one."""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from tinc.official.allocation import TreePlan
from tinc.official.model import coordinate_grid, split

__all__ = ["PlainTree"]


class PlainTree:
    """A straightforward tree: a list of layers and an optimiser group for each node, labels gathered leaf by leaf."""

    def __init__(self, plan: TreePlan, volume: np.ndarray) -> None:
        """`volume` [depth, height, width, channels] is normalised."""
        self.plan = plan
        self.segments: list[list[nn.Linear]] = []
        for node in plan.nodes:
            sizes = [node.dims.input, *[node.dims.hidden] * (node.dims.layers - 1), node.dims.output]
            self.segments.append([nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes)])
        self.labels = list(split(torch.from_numpy(volume), plan.num_levels))
        self.grid = coordinate_grid(plan.leaf_shape)
        groups = [{"params": list(nn.ModuleList(segment).parameters())} for segment in self.segments]
        self.optimizer = torch.optim.Adamax(groups, lr=1e-3, foreach=False)

    def step(self, points: Tensor) -> float:
        """Take a training step on some points of the leaf grid, and return the loss."""
        self.optimizer.zero_grad()
        features: dict[int, Tensor] = {}
        loss = torch.zeros(())
        leaf = 0
        for node, segment in zip(self.plan.nodes, self.segments, strict=True):
            x = self.grid[points] if node.level == 0 else features[node.level - 1]
            is_leaf = node.level == self.plan.num_levels - 1
            for number, linear in enumerate(segment):
                x = linear(x)
                if not is_leaf or number < len(segment) - 1:
                    x = torch.sin(self.plan.w0 * x)
            features[node.level] = x
            if is_leaf:
                loss = loss + (x - self.labels[leaf][points]).square().mean()
                leaf += 1
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())
