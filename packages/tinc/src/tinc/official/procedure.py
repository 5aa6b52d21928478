"""How the official code trains: which points a step takes, its loss, its optimiser, and when it evaluates."""

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

# what the official code asserts of a step's points, both bounds excluded
_FEWEST, _MOST = 512, 2_097_152


def points_per_leaf(batch_size: int, num_levels: int, *, population: int, compat: Compat = "official") -> int:
    """Return how many points of the leaf grid, of `population` in all, a step evaluates in every leaf.

    Raises ValueError where the official code refuses the number. compat="none" takes any, at most all points.
    """
    leaves = 8 ** (num_levels - 1)
    points = batch_size // leaves
    if compat == "none":
        return min(max(points, 1), population)
    if not _FEWEST < points < _MOST:
        raise InputError(
            f"batch_size={batch_size} gives each of the {leaves} leaves {points} points a step; the official code "
            f"takes more than {_FEWEST} and less than {_MOST}, so from {(_FEWEST + 1) * leaves} on"
        )
    return points


def draw_points(population: int, points: int, generator: torch.Generator, *, compat: Compat = "official") -> Tensor:
    """Return the places in the leaf grid that a step takes in all leaves, uniform with replacement.

    With compat="none" they differ from each other.
    """
    if compat == "official":
        return torch.randint(0, population, (points,), generator=generator)
    return torch.randperm(population, generator=generator)[:points]


def steps_per_epoch(population: int, points: int) -> int:
    """Return the steps that draw about as many points as a leaf has."""
    return math.ceil(population / points)


def num_steps(population: int, points: int, epochs: int) -> int:
    """Return the optimiser steps of a training."""
    return epochs * steps_per_epoch(population, points)


def evaluation_label(step: int, *, per_epoch: int, epochs: int, every: int) -> int | None:
    """Return the epoch under which the model is evaluated after `step` (from 1), or None.

    That is at the first step of every `every`-th epoch but epoch 0, and after the last step.
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
    """Sum over leaves of the mean of w(y) (prediction - y)^2; w is `weight.scale` for y in [low, high], else 1."""
    errors = (prediction - target).square()
    if weight.scale != 1:
        inside = (target >= weight.low) & (target <= weight.high)
        errors = torch.where(inside, errors * weight.scale, errors)
    # every leaf has as many points, so the sum of means is one mean times their number
    return errors.mean() * len(errors)


_OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "Adamax": torch.optim.Adamax,
    "Adam": torch.optim.Adam,
    "SGD": torch.optim.SGD,
}


def create_optimizer(parameters: Iterable[Tensor], recipe: OfficialRecipe) -> torch.optim.Optimizer:
    """Return the recipe's optimiser, with torch's defaults besides the rate."""
    # all tensors in one call: they are many and small
    return _OPTIMIZERS[recipe.optimizer](list(parameters), lr=recipe.lr, foreach=True)


def create_scheduler(
    optimizer: torch.optim.Optimizer, recipe: OfficialRecipe
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Return the recipe's scheduler, stepped after every update. Raises ValueError for arguments that it lacks."""
    if recipe.scheduler.name == "none":
        return None
    arguments: dict[str, Any] = dict(recipe.scheduler.arguments)
    kind = getattr(torch.optim.lr_scheduler, recipe.scheduler.name)
    if recipe.scheduler.name == "CyclicLR" and recipe.optimizer != "SGD":
        # there is no momentum to cycle
        arguments.setdefault("cycle_momentum", False)
    try:
        return kind(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"arguments of {recipe.scheduler.name}: {error}") from error
