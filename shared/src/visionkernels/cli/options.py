"""Groups of flags that commands share."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import arg

from visionkernels.recipes.fit import FitRecipe, Precision, Tracker

__all__ = ["FitOptions", "RecipeDefault", "ReportOptions"]

Value = TypeVar("Value")
RecipeDefault = Annotated[Value, arg(help_behavior_hint="")]
"""A flag whose None keeps what the recipe says; its help does not end in "(default: None)"."""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How to train; a flag that is not given keeps the recipe's value."""

    epochs: RecipeDefault[int | None] = None
    """length of the training"""
    batch_size: RecipeDefault[int | None] = None
    """samples per update; lr scales with it"""
    lr: RecipeDefault[float | None] = None
    """peak learning rate, instead of the one that follows"""
    accumulation_steps: RecipeDefault[int | None] = None
    """micro-batches of an update"""
    precision: RecipeDefault[Precision | None] = None
    """autocast type"""
    seed: RecipeDefault[int | None] = None
    """for weights, order and augmentation"""
    workers: RecipeDefault[int | None] = None
    """data loading processes"""
    device: RecipeDefault[Literal["auto", "cpu"] | None] = None
    """auto: what accelerate finds"""
    trackers: RecipeDefault[tuple[Tracker, ...]] = ()
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
        # first, so that a wrong rate is refused by its own name
        optimizer = replace(fit.optimizer, lr=lr)
        low, start = (min(rate, lr) for rate in (fit.schedule.min_lr, fit.schedule.warmup_lr))
        schedule = replace(fit.schedule, min_lr=low, warmup_lr=start)
        return replace(fit, optimizer=optimizer, schedule=schedule)


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Cells to measure, and files to write."""

    full: bool = False
    """also the cells that take more than minutes"""
    json: Path | None = None
    """write the tables here as well"""
    figures_dir: Path | None = None
    """draw the figures into this folder"""
    overwrite: bool = False
    """replace existing outputs"""
