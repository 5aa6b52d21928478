"""Fitting a tree to a volume: its weights are trained as the integers that the file will hold.

The loss is ln(mean squared error) + rate * bits, with the bits of the weights as they will be coded and a rate that is
steered to a byte budget, so both terms are free of the volume's scale. First the weights move freely, then they are
rounded in the forward pass, each layer by a step of its own that is learned too.
"""

# N nodes of a level, P points, K inputs and M outputs of a layer, C channels

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

import numpy as np
import torch
from torch import Tensor

from tinc.arithmetic import ACTIVATION_BITS, PHASE_BITS, to_fixed
from tinc.tree.quantized import (
    COORDINATE_BITS,
    LARGEST_WEIGHT,
    MAX_SHIFT,
    MULTIPLIER_BITS,
    Layer,
    QuantizedTree,
)
from tinc.tree.shape import TreeShape
from tinc.tree.soap import BatchedSoap
from visionkernels.ops.siren_mlp import siren_mlp

__all__ = ["FitPlan", "Progress", "fit_tree"]

LOOKAHEAD = 100


@dataclass(frozen=True)
class FitPlan:
    """How a tree is trained. The defaults were chosen on microscopy and MRI volumes and on photographs together."""

    steps: int = 3000
    points: int = 1024
    """Points of a leaf that a step looks at, the same for all leaves."""
    max_points: int = 16384
    """Of all leaves together."""
    learning_rate: float = 0.04
    free_share: float = 0.6
    """Of the steps, before weights are rounded."""
    first_frequency: float = 12.0
    """Largest weight of the first layer, in radians per half a leaf; less along axes of few voxels."""
    start_bits: int = 8
    """Of a weight when rounding begins."""


@dataclass(frozen=True)
class Progress:
    """Where a fit is."""

    step: int
    steps: int
    mse: float
    """Of the last step's points, in squared units of the volume."""


def fit_tree(
    shape: TreeShape,
    values: np.ndarray,
    budget: float,
    *,
    plan: FitPlan = FitPlan(),
    seed: int = 0,
    deadline: float | None = None,
    callback: Callable[[Progress], None] | None = None,
) -> QuantizedTree:
    """Return the tree of `shape` that fits `values` [channels, ...] with weights of about `budget` bytes.

    The result depends on the seed and the arguments, not on the time, unless `deadline` (of `time.monotonic`) or
    KeyboardInterrupt from `callback` ends the training: then the remaining schedule is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    labels, mask = _labels(shape, values)
    centre, spread = float(values.mean()), float(values.std()) or 1.0
    labels = (labels - centre) / spread
    fit = _Fit(shape, labels, mask, plan, generator)
    started = steps = plan.steps
    step = 0
    while step < steps:
        mse = fit.step(step / steps, budget)
        step += 1
        try:
            if callback is not None and step % 10 == 0:
                callback(Progress(step, started, float(mse) * spread**2))
            is_late = deadline is not None and monotonic() > deadline
        except KeyboardInterrupt:
            is_late = True
        if is_late and steps == started:
            # some steps are left in which weights learn to be integers
            left = min(started // 20, step // 4 + 20)
            steps = min(started, step + left)
    return fit.quantize(centre, spread)


class _Fit:
    """The state of a training."""

    def __init__(
        self, shape: TreeShape, labels: Tensor, mask: Tensor | None, plan: FitPlan, generator: torch.Generator
    ) -> None:
        self.shape, self.labels, self.mask, self.plan, self.generator = shape, labels, mask, plan, generator
        sizes = [weights for _, weights in shape.layers]
        self.sizes = sizes
        start = _initial_weights(shape, labels, mask, plan, generator)
        self.flat = torch.cat([each.reshape(-1) for each in start]).requires_grad_()
        # weights and biases of a layer are coded apart
        self.part = torch.cat([_parts(number, size).reshape(-1) for number, size in enumerate(sizes)])
        self.layer = self.part // 2
        self.counts = torch.bincount(self.part, minlength=2 * len(sizes)).float()
        self.log_steps = torch.zeros(len(sizes), requires_grad=True)
        self.optimizer = BatchedSoap(self.views(self.flat.detach()))
        self.step_optimizer = torch.optim.Adam([self.log_steps], lr=1e-2)
        self.rate, self.is_rounding = 0.0, False
        self.excess = self.trend = 0.0
        self.grid = _grid(shape.leaf_size)
        self.order, self.place = torch.empty(0, dtype=torch.int64), 0
        self.points = min(plan.points, max(64, plan.max_points // max(len(labels), 1)), len(self.grid))

    def views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([math.prod(size) for size in self.sizes])
        return [part.view(size) for part, size in zip(parts, self.sizes, strict=True)]

    def step(self, done: float, budget: float) -> Tensor:
        """Train on some points; `done` is the share of the schedule behind. Returns their mean squared error."""
        plan = self.plan
        chosen = self._next_points()
        rounding = done >= plan.free_share
        if rounding and not self.is_rounding:
            self._start_rounding()
        weights, bits = self._rounded() if rounding else (self.flat, torch.zeros(()))
        output = siren_mlp(self.grid[chosen], self.views(weights), self._parents)
        squares = (output - self.labels[:, chosen]).square()
        mse = (
            squares.mean() if self.mask is None else (squares * self.mask[:, chosen]).sum() / self.mask[:, chosen].sum()
        )
        loss = mse.clamp_min(1e-12).log() + self.rate * bits
        self.flat.grad = self.log_steps.grad = None
        loss.backward()
        warm = min(1.0, done * plan.steps / min(100, plan.steps / 8))
        rate = plan.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * done))
        assert self.flat.grad is not None
        self.optimizer.step(self.views(self.flat.grad), rate)
        if rounding:
            self.step_optimizer.param_groups[0]["lr"] = 1e-2 * max(0.1, (1 - done) / (1 - plan.free_share))
            self.step_optimizer.step()
            self._steer(float(bits.detach()) / 8 / budget - 1)
        return mse.detach()

    def _steer(self, excess: float) -> None:
        """Raise the rate where the bytes will be above the budget, a hundred steps ahead at their present trend."""
        self.trend += 0.05 * (excess - self.excess - self.trend)
        self.excess = excess
        self.rate *= math.exp(0.02 * min(max(10 * (excess + LOOKAHEAD * self.trend), -1), 1))

    @property
    def _parents(self) -> list[Tensor | None]:
        """Of each layer, which outputs of the one before its nodes take; None for the same level."""
        parents: list[Tensor | None] = []
        before = 0
        for level, _ in self.shape.layers:
            parents.append(None if level == before else torch.from_numpy(self.shape.parents[level - 1]))
            before = level
        return parents

    def _next_points(self) -> Tensor:
        if self.place + self.points > len(self.order):
            self.order, self.place = torch.randperm(len(self.grid), generator=self.generator), 0
        chosen = self.order[self.place : self.place + self.points]
        self.place += self.points
        return chosen

    @torch.no_grad()
    def _start_rounding(self) -> None:
        self.is_rounding, self.rate = True, 3e-6
        for number, weights in enumerate(self.views(self.flat)):
            mean = float(weights.abs().mean())
            self.log_steps[number] = math.log(max(mean, 1e-6) * 2.5 / 2 ** (self.plan.start_bits - 1))

    def _rounded(self) -> tuple[Tensor, Tensor]:
        steps = self.log_steps.exp()[self.layer]
        scaled = self.flat / steps
        mean = torch.zeros_like(self.counts).index_add(0, self.part, scaled.abs()) / self.counts
        # of a Laplace distribution with this mean magnitude; right where it is large, and zero at zero
        bits = (self.counts * torch.log2(1 + 2 * math.e * mean)).sum()
        return (scaled + (scaled.round() - scaled).detach()) * steps, bits

    @torch.no_grad()
    def quantize(self, centre: float, spread: float) -> QuantizedTree:
        """Return the integers, for values that are `centre` + `spread` * output."""
        if not self.is_rounding:
            self._start_rounding()
        layers = []
        for number, weights in enumerate(self.views(self.flat)):
            step = math.exp(float(self.log_steps[number]))
            is_first, is_last = number == 0, number == len(self.sizes) - 1
            in_bits = COORDINATE_BITS if is_first else ACTIVATION_BITS
            # what a weight of 1 and an input of 1 come to
            unit = spread if is_last else 2**PHASE_BITS / (2 * math.pi)
            multiplier, shift = to_fixed(step * unit / 2**in_bits, mantissa_bits=MULTIPLIER_BITS, max_shift=MAX_SHIFT)
            exact = multiplier / 2**shift / unit * 2**in_bits
            rounded = (weights / exact).round().clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)
            layers.append(Layer(rounded.to(torch.int64).numpy(), multiplier, shift))
        return QuantizedTree(self.shape, tuple(layers), base=round(centre))


def _parts(number: int, size: Sequence[int]) -> Tensor:
    """Return 2 * number for weights and 2 * number + 1 for biases."""
    parts = torch.full(tuple(size), 2 * number)
    parts[:, -1] += 1
    return parts


def _initial_weights(
    shape: TreeShape, labels: Tensor, mask: Tensor | None, plan: FitPlan, generator: torch.Generator
) -> list[Tensor]:
    """Sines of the first layer have frequencies up to `first_frequency`; later ones keep the variance (SIREN)."""
    start = []
    for number, (_, size) in enumerate(shape.layers):
        nodes, rows, outputs = size
        weights = 2 * torch.rand(nodes, rows - 1, outputs, generator=generator) - 1
        bias = math.pi * (2 * torch.rand(nodes, 1, outputs, generator=generator) - 1)
        if number == 0:
            weights *= torch.tensor([min(plan.first_frequency, 0.4 * n) for n in shape.leaf_size]).view(1, -1, 1)
        else:
            weights *= math.sqrt(6 / (rows - 1))
        if number == len(shape.layers) - 1:
            weights *= 0.1
            bias = labels.mean(1, keepdim=True) if mask is None else _masked_mean(labels, mask)
        start.append(torch.cat([weights, bias], 1))
    return start


def _masked_mean(labels: Tensor, mask: Tensor) -> Tensor:
    return (labels * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)


def _grid(sizes: Sequence[int]) -> Tensor:
    """Return the coordinates of a leaf's voxels [P, axes]."""
    axes = [torch.linspace(-1, 1, size) if size > 1 else torch.tensor([-1.0]) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, len(sizes))


def _labels(shape: TreeShape, values: np.ndarray) -> tuple[Tensor, Tensor | None]:
    """Return the values of each active leaf [leaves, points, channels], and 1 where they lie in the volume."""
    labels = np.zeros((len(shape.nodes[-1]), *shape.leaf_size, len(values)), dtype=np.float32)
    mask = np.zeros((*labels.shape[:-1], 1), dtype=np.float32)
    for row, leaf in enumerate(shape.nodes[-1].tolist()):
        box = shape.box(leaf)
        inner = tuple(slice(part.stop - part.start) for part in box)
        labels[row][inner] = np.moveaxis(values[(slice(None), *box)], 0, -1)
        mask[row][inner] = 1
    flat = torch.from_numpy(labels).flatten(1, -2)
    return flat, None if mask.all() else torch.from_numpy(mask).flatten(1, -2)
