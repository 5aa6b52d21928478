"""The optimiser and the learning rate of a recipe, built by timm."""

import importlib
import math
from collections.abc import Callable, Collection
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

from visionkernels.checks import InputError
from visionkernels.recipes import OptimizerRecipe, ScheduleRecipe

__all__ = ["LearningRate", "create_optimizer"]

_FUSED = ("adam", "adamw")


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
    if ":" in recipe.name:
        optimizer: Optimizer = _named(recipe.name)(groups, lr=recipe.lr, momentum=recipe.momentum, **settings)
        return optimizer
    # one kernel for all steps of an update: five times as fast on a CPU as torch's default
    settings |= {"fused": True} if recipe.name in _FUSED else {}
    return create_optimizer_v2(
        groups, opt=recipe.name, lr=recipe.lr, weight_decay=0.0, momentum=recipe.momentum, **settings
    )


def _named(name: str) -> Callable[..., Optimizer]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"optimizer {name!r} cannot be found: {error}; give a name of timm or module:Class") from error
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise InputError(f"optimizer {name!r} is no torch.optim.Optimizer")
    return found


class LearningRate:
    """Sets the learning rate of an update from its index alone, so it has no state to save."""

    def __init__(
        self, optimizer: Optimizer, recipe: ScheduleRecipe, *, updates_per_epoch: int, total_updates: int
    ) -> None:
        self.updates_per_tick = updates_per_epoch if recipe.unit == "epoch" else 1
        ticks_per_epoch = updates_per_epoch // self.updates_per_tick
        ticks = math.ceil(total_updates / self.updates_per_tick)
        self.lag = recipe.lag_epochs * ticks_per_epoch
        warmup = recipe.warmup or round(recipe.warmup_epochs * ticks_per_epoch)
        in_epochs = recipe.milestone_unit == "epoch"
        self.scheduler: Scheduler
        if recipe.name == "onecycle":
            self.scheduler = _Curve(optimizer, _one_cycle(ticks, warmup))
            return
        if recipe.name == "loglinear":
            self.scheduler = _Curve(optimizer, _log_linear(ticks, warmup, recipe))
            return
        self.scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=recipe.name,
            num_epochs=max(ticks - warmup, 1) if recipe.after_warmup else ticks,
            warmup_epochs=warmup,
            warmup_prefix=recipe.after_warmup,
            warmup_lr=recipe.warmup_lr,
            min_lr=recipe.min_lr,
            # timm multiplies one tick before a milestone
            decay_milestones=[milestone * (ticks_per_epoch if in_epochs else 1) + 1 for milestone in recipe.milestones],
            decay_rate=recipe.power if recipe.name == "poly" else recipe.decay_rate,
        )

    def set(self, update: int) -> None:
        """Give the optimiser the learning rate of the update with this index."""
        self.scheduler.step(max(update // self.updates_per_tick - self.lag, 0))


class _Curve(Scheduler):
    """From a tick and the peak rate to the rate."""

    def __init__(self, optimizer: Optimizer, curve: Callable[[int, float], float]) -> None:
        self.curve = curve
        super().__init__(optimizer, param_group_field="lr")

    def _get_lr(self, t: int) -> list[float]:
        return [self.curve(t, peak) for peak in self.base_values]


def _one_cycle(ticks: int, warmup: int) -> Callable[[int, float], float]:
    """From peak / 25 up to the peak and down to peak / 250000, both by half a cosine (L. Smith and N. Topin, 2018)."""
    top, end = (warmup or 0.3 * ticks) - 1, ticks - 1

    def rate(tick: int, peak: float) -> float:
        if tick <= top:
            start, stop, share = 1 / 25, 1.0, tick / (top or 1)
        else:
            start, stop, share = 1.0, 1 / 250_000, (tick - top) / (end - top)
        return peak * (stop + (start - stop) * (1 + math.cos(math.pi * min(share, 1))) / 2)

    return rate


def _log_linear(ticks: int, warmup: int, recipe: ScheduleRecipe) -> Callable[[int, float], float]:
    """From the peak to min_lr, linear in the logarithm, times a factor that rises to 1 by a quarter of a sine."""

    def rate(tick: int, peak: float) -> float:
        decayed = peak * (recipe.min_lr / peak) ** (tick / ticks)
        if tick >= warmup:
            return decayed
        start = recipe.warmup_lr / peak
        return decayed * (start + (1 - start) * math.sin(math.pi / 2 * tick / warmup))

    return rate
