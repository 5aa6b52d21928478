"""What a command lets its user change of a run."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import arg

from visionkernels.training.recipes import FitRecipe, Precision, Tracker

__all__ = ["FitOptions", "Own"]

Value = TypeVar("Value")
# a flag whose help does not end in "(default: None)": None means the recipe's own
Own = Annotated[Value, arg(help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How to train; what is not given stays as the recipe has it."""

    epochs: Own[int | None] = None
    """length of the training"""
    batch_size: Own[int | None] = None
    """of all processes; the learning rate follows"""
    lr: Own[float | None] = None
    """peak learning rate, instead of the one that follows"""
    accumulation_steps: Own[int | None] = None
    """micro-batches of an update"""
    precision: Own[Precision | None] = None
    """of autocast"""
    seed: Own[int | None] = None
    """of weights, order and augmentation"""
    workers: Own[int | None] = None
    """data loading processes"""
    device: Own[Literal["auto", "cpu"] | None] = None
    """auto: what accelerate finds"""
    trackers: Own[tuple[Tracker, ...]] = ()
    """besides log.jsonl"""

    def apply(self, recipe: FitRecipe) -> FitRecipe:
        """Return `recipe` with these options.

        A new `batch_size` scales the learning rate in proportion, unless `lr` gives it. The ends of the schedule stay,
        unless the new rate lies below them. `epochs` replaces a length in updates. Raises ValueError as FitRecipe does.
        """
        changes: dict[str, Any] = {
            "batch_size": self.batch_size,
            "accumulation_steps": self.accumulation_steps,
            "precision": self.precision,
            "seed": self.seed,
            "num_workers": self.workers,
            "device": self.device,
            "trackers": self.trackers or None,
        }
        changes = {name: value for name, value in changes.items() if value is not None}
        if self.epochs is not None:
            changes |= {"epochs": self.epochs, "updates": None}
        fit = replace(recipe, **changes)
        lr = self.lr
        if lr is None and self.batch_size is not None:
            lr = recipe.optimizer.lr * self.batch_size / recipe.batch_size
        if lr is None:
            return fit
        low, start = (min(rate, lr) for rate in (fit.schedule.min_lr, fit.schedule.warmup_lr))
        schedule = replace(fit.schedule, min_lr=low, warmup_lr=start)
        return replace(fit, optimizer=replace(fit.optimizer, lr=lr), schedule=schedule)
