"""The training of the official code: points of a step, loss, optimiser, and times of evaluation."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tinc.recipes import Compat, LossWeight, OfficialRecipe
from visionkernels.checks import InputError

__all__ = [
    "create_optimizer",
    "create_scheduler",
    "draw_points",
    "evaluation_label",
    "evaluation_schedule",
    "num_steps",
    "points_per_leaf",
    "weighted_loss",
]

# bounds of the points a step in the official code, both excluded
_FEWEST, _MOST = 512, 2_097_152


def points_per_leaf(batch_size: int, num_levels: int, *, population: int, compat: Compat = "official") -> int:
    """Return the number of points that a step evaluates in every leaf; `population` is that of the leaf grid.

    Raises ValueError for numbers that the official code refuses. compat="none" accepts any, up to all points.
    """
    leaves = 8 ** (num_levels - 1)
    points = batch_size // leaves
    if compat == "none":
        return min(max(points, 1), population)
    if not _FEWEST < points < _MOST:
        raise InputError(
            f"batch_size={batch_size} gives each of the {leaves} leaves {points} points a step; the official code "
            f"needs more than {_FEWEST} and less than {_MOST}, so at least {(_FEWEST + 1) * leaves}"
        )
    return points


def draw_points(population: int, points: int, generator: torch.Generator, *, compat: Compat = "official") -> Tensor:
    """Return the points of the leaf grid that a step evaluates in all leaves, drawn uniformly with replacement.

    compat="none" draws without replacement.
    """
    if compat == "official":
        return torch.randint(0, population, (points,), generator=generator)
    return torch.randperm(population, generator=generator)[:points]


def steps_per_epoch(population: int, points: int) -> int:
    """Return the number of steps that draw about as many points as a leaf has."""
    return math.ceil(population / points)


def num_steps(population: int, points: int, epochs: int) -> int:
    """Return the number of optimiser steps of a training."""
    return epochs * steps_per_epoch(population, points)


def evaluation_label(step: int, *, per_epoch: int, epochs: int, every: int) -> int | None:
    """Return the epoch label of the evaluation after `step` (from 1), or None without an evaluation.

    Evaluations follow the first step of every `every`-th epoch but epoch 0, and the last step.
    """
    epoch, within = divmod(step - 1, per_epoch)
    if within == 0 and epoch and epoch % every == 0:
        return epoch
    return epochs if step == epochs * per_epoch else None


def evaluation_schedule(population: int, points: int, *, epochs: int, every: int) -> list[tuple[int, int]]:
    """Return (step, epoch label) of every evaluation."""
    per_epoch = steps_per_epoch(population, points)
    labels = (
        (step, evaluation_label(step, per_epoch=per_epoch, epochs=epochs, every=every))
        for step in range(1, epochs * per_epoch + 1)
    )
    return [(step, label) for step, label in labels if label is not None]


def weighted_loss(
    prediction: Float[Tensor, "leaves points channels"],
    target: Float[Tensor, "leaves points channels"],
    weight: LossWeight,
) -> Float[Tensor, ""]:
    """Return the sum over leaves of mean(w(y) (prediction - y)^2), with w = `weight.scale` in [low, high], else 1."""
    errors = (prediction - target).square()
    if weight.scale != 1:
        inside = (target >= weight.low) & (target <= weight.high)
        errors = torch.where(inside, errors * weight.scale, errors)
    # all leaves have the same number of points, so the sum of means is the mean times their number
    return errors.mean() * len(errors)


_OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "Adamax": torch.optim.Adamax,
    "Adam": torch.optim.Adam,
    "SGD": torch.optim.SGD,
}


def create_optimizer(parameters: Iterable[Tensor], recipe: OfficialRecipe) -> torch.optim.Optimizer:
    """Return the recipe's optimiser, with torch's defaults for everything but the learning rate."""
    # foreach updates many small tensors in one call
    return _OPTIMIZERS[recipe.optimizer](list(parameters), lr=recipe.lr, foreach=True)


def create_scheduler(
    optimizer: torch.optim.Optimizer, recipe: OfficialRecipe
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Return the recipe's scheduler, to be stepped after every update. Raises ValueError for unknown arguments."""
    if recipe.scheduler.name == "none":
        return None
    arguments: dict[str, Any] = dict(recipe.scheduler.arguments)
    kind = getattr(torch.optim.lr_scheduler, recipe.scheduler.name)
    if recipe.scheduler.name == "CyclicLR" and recipe.optimizer != "SGD":
        # only SGD has a momentum to cycle
        arguments.setdefault("cycle_momentum", False)
    try:
        return kind(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"arguments of {recipe.scheduler.name}: {error}") from error
