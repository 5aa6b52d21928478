"""The optimiser and the learning rate of a recipe, built by timm."""

import math
from collections.abc import Collection
from typing import Any

from timm.optim import (  # type: ignore[attr-defined]
    create_optimizer_v2,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from visionkernels.training.recipes import OptimizerRecipe, ScheduleRecipe

__all__ = ["LearningRate", "create_optimizer"]


def create_optimizer(module: nn.Module, recipe: OptimizerRecipe) -> Optimizer:
    """Return the optimiser of the trainable parameters of `module`.

    What the module itself names in `no_weight_decay()`, as timm's models do, does not decay either.
    """
    own_names: Collection[str] = getattr(module, "no_weight_decay", tuple)()
    grouping: dict[str, Any] = {
        "weight_decay": recipe.weight_decay,
        "no_weight_decay_list": (*recipe.no_decay, *own_names),
        "weight_decay_exclude_1d": recipe.decay == "matrices",
    }
    if recipe.layer_decay is None:
        groups = param_groups_weight_decay(module, **grouping)
    else:
        groups = param_groups_layer_decay(module, layer_decay=recipe.layer_decay, **grouping)
    settings = {name: value for name in ("betas", "eps") if (value := getattr(recipe, name)) is not None}
    return create_optimizer_v2(
        groups, opt=recipe.name, lr=recipe.lr, weight_decay=0.0, momentum=recipe.momentum, **settings
    )


class LearningRate:
    """Sets the learning rate of an update from its index alone, so it has no state to save."""

    def __init__(
        self, optimizer: Optimizer, recipe: ScheduleRecipe, *, updates_per_epoch: int, total_updates: int
    ) -> None:
        self.updates_per_tick = updates_per_epoch if recipe.unit == "epoch" else 1
        ticks_per_epoch = updates_per_epoch // self.updates_per_tick
        ticks = math.ceil(total_updates / self.updates_per_tick)
        self.lag = recipe.lag_epochs * ticks_per_epoch
        self.scheduler: Scheduler
        if recipe.name == "onecycle":
            self.scheduler = _OneCycle(optimizer, ticks, recipe.warmup)
            return
        self.scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=recipe.name,
            num_epochs=ticks,
            warmup_epochs=recipe.warmup,
            warmup_lr=recipe.warmup_lr,
            min_lr=recipe.min_lr,
            # timm multiplies one tick before a milestone
            decay_milestones=[epoch * ticks_per_epoch + 1 for epoch in recipe.milestones],
            decay_epochs=recipe.decay_epochs * ticks_per_epoch,
            decay_rate=recipe.power if recipe.name == "poly" else recipe.decay_rate,
        )

    def set(self, update: int) -> None:
        """Give the optimiser the learning rate of the update with this index."""
        self.scheduler.step(max(update // self.updates_per_tick - self.lag, 0))


class _OneCycle(Scheduler):
    """From lr / 25 up to lr and down to lr / 250000, both by half a cosine (L. Smith and N. Topin, 2018)."""

    def __init__(self, optimizer: Optimizer, ticks: int, warmup: int) -> None:
        self.top = (warmup or 0.3 * ticks) - 1
        self.end = ticks - 1
        super().__init__(optimizer, param_group_field="lr")

    def _get_lr(self, t: int) -> list[float]:
        if t <= self.top:
            start, stop, share = 1 / 25, 1.0, t / (self.top or 1)
        else:
            start, stop, share = 1.0, 1 / 250_000, (t - self.top) / (self.end - self.top)
        factor = stop + (start - stop) * (1 + math.cos(math.pi * min(share, 1))) / 2
        return [base * factor for base in self.base_values]
