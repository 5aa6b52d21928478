"""The settings that define a training run, as frozen data that checks itself."""

import math
from dataclasses import dataclass, field
from typing import Literal

from visionkernels.checks import check, check_choice

__all__ = ["FitRecipe", "OptimizerRecipe", "ScheduleRecipe"]

Precision = Literal["no", "bf16", "fp16"]
ScheduleName = Literal["cosine", "multistep", "poly", "loglinear", "onecycle", "constant"]
Tracker = Literal["tensorboard", "wandb", "trackio"]
Unit = Literal["epoch", "update"]


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """The optimiser and its settings."""

    name: str = "adamw"
    """A name in `timm.optim`, or "module:Class", which takes parameter groups, `lr` and `momentum`."""
    lr: float = 1e-3
    """Peak learning rate, for the global batch as it is."""
    weight_decay: float = 0.05
    decay: Literal["matrices", "all"] = "matrices"
    """Which parameters decay: those of two or more axes that are no bias, or all."""
    no_decay: tuple[str, ...] = ()
    """Patterns of further parameter names without decay, e.g. `*norm*`."""
    betas: tuple[float, float] | None = None
    """None: the optimiser's own."""
    eps: float | None = None
    """None: the optimiser's own."""
    momentum: float = 0.9
    """For optimisers that have one."""
    layer_decay: float | None = None
    """Factor on the learning rate from each layer to the one below; None: one rate for all."""
    clip_norm: float | None = None
    """Upper bound of the gradient's global norm; None: no clipping."""

    def __post_init__(self) -> None:
        check(self.lr > 0, "lr", self.lr, "above 0")
        check(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "at least 0")
        check(self.lr < math.inf, "lr", self.lr, "a number")
        check(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        betas = self.betas
        check(betas is None or all(0 <= beta < 1 for beta in betas), "betas", betas, "two numbers in [0, 1), or None")
        check(self.eps is None or 0 <= self.eps < math.inf, "eps", self.eps, "at least 0, or None")
        check_choice("decay", self.decay, Literal["matrices", "all"])
        rate = self.layer_decay
        check(rate is None or 0 < rate <= 1, "layer_decay", rate, "in (0, 1] or None")
        check(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "above 0 or None")


@dataclass(frozen=True, kw_only=True)
class ScheduleRecipe:
    """The learning rate over time: a linear warm-up, and a curve that counts from the start of training below it."""

    name: ScheduleName = "cosine"
    """"onecycle" is torch's OneCycleLR without its momentum cycle: `warmup` is its rise, by default 30 %. "loglinear"
    falls exponentially from `lr` to `min_lr`, times a sine that rises from warmup_lr / lr to 1 in `warmup`, as
    mip-NeRF's rate does."""
    unit: Unit = "epoch"
    """Whether the rate changes with every epoch or with every update."""
    warmup: int = 0
    """In `unit`."""
    warmup_epochs: float = 0.0
    """Instead of `warmup`, in epochs whatever the unit."""
    after_warmup: bool = False
    """Whether cosine and poly count from the end of the warm-up, so that they start at the peak."""
    warmup_lr: float = 1e-6
    """Where the warm-up starts."""
    min_lr: float = 0.0
    """Where cosine, poly and loglinear end."""
    milestones: tuple[int, ...] = ()
    """Epochs before which multistep multiplies by `decay_rate`."""
    milestone_unit: Unit = "epoch"
    """Or updates, with `unit="update"`."""
    decay_rate: float = 0.1
    power: float = 1.0
    """Exponent of the "poly" schedule."""
    lag_epochs: int = 0
    """Epoch e trains at the rate of epoch max(e - lag_epochs, 0)."""

    def __post_init__(self) -> None:
        check_choice("name", self.name, ScheduleName)
        check_choice("unit", self.unit, Unit)
        check(self.warmup >= 0, "warmup", self.warmup, "at least 0")
        once = self.warmup_epochs == 0 or (self.warmup_epochs > 0 and self.warmup == 0)
        check(once, "warmup_epochs", self.warmup_epochs, "above 0 with warmup=0, or 0")
        counted = not self.after_warmup or self.name in ("cosine", "poly")
        check(counted, "after_warmup", self.after_warmup, f"False for name={self.name!r}")
        check(self.min_lr >= 0, "min_lr", self.min_lr, "at least 0")
        check(self.warmup_lr >= 0, "warmup_lr", self.warmup_lr, "at least 0")
        check(self.min_lr > 0 or self.name != "loglinear", "min_lr", self.min_lr, "above 0 for name='loglinear'")
        check(self.lag_epochs >= 0, "lag_epochs", self.lag_epochs, "at least 0")
        rises = list(self.milestones) == sorted(set(self.milestones))
        check(rises, "milestones", self.milestones, "rising numbers, each once")
        check_choice("milestone_unit", self.milestone_unit, Unit)
        is_finer = self.milestone_unit == "update" and self.unit == "epoch"
        check(not is_finer, "milestone_unit", self.milestone_unit, "'epoch' for unit='epoch'")
        needs = bool(self.milestones) == (self.name == "multistep")
        check(needs, "milestones", self.milestones, "given for name='multistep' and for no other")


@dataclass(frozen=True, kw_only=True)
class FitRecipe:
    """A complete training run, apart from its model and data."""

    epochs: int | None = None
    updates: int | None = None
    """Length of training: either `epochs` or optimiser `updates`."""
    batch_size: int
    """Samples of one update, over all processes and accumulation steps."""
    accumulation_steps: int = 1
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    precision: Precision = "no"
    """Autocast type; weights, losses and optimiser stay float32."""
    seed: int = 0
    ema_decay: float | None = None
    """Decay of the averaged weights; None: no averaging."""
    norm_eval: bool = False
    """Whether BatchNorm layers keep their running statistics in training."""
    evaluate_every_epochs: int = 1
    best_metric: str | None = None
    """Metric whose best weights are kept in best.safetensors; `ema_...` for that of the averaged weights."""
    best: Literal["max", "min"] = "max"
    num_workers: int = 0
    """Data loading processes, of each training process; no influence on results."""
    save_every_updates: int | None = None
    """Checkpoints within an epoch; None: at ends of epochs only."""
    save_every_epochs: int = 1
    """Checkpoints at ends of epochs; the last epoch always has one."""
    keep_checkpoints: int = 2
    trackers: tuple[Tracker, ...] = ()
    device: Literal["auto", "cpu"] = "auto"
    """"auto": the device that accelerate chooses, or that its environment variables name."""

    def __post_init__(self) -> None:
        both = (self.epochs, self.updates)
        check((both[0] is None) != (both[1] is None), "epochs, updates", both, "exactly one number, the other None")
        counts = ("epochs", "updates", "batch_size", "accumulation_steps", "evaluate_every_epochs", "keep_checkpoints")
        for name in (*counts, "save_every_updates", "save_every_epochs"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, "at least 1")
        whole = self.batch_size % self.accumulation_steps == 0
        check(whole, "batch_size", self.batch_size, f"a multiple of accumulation_steps={self.accumulation_steps}")
        check_choice("precision", self.precision, Precision)
        check_choice("best", self.best, Literal["max", "min"])
        check_choice("device", self.device, Literal["auto", "cpu"])
        for tracker in self.trackers:
            check_choice("trackers", tracker, Tracker)
        check(self.seed >= 0, "seed", self.seed, "at least 0")
        check(self.num_workers >= 0, "num_workers", self.num_workers, "at least 0")
        decay = self.ema_decay
        check(decay is None or 0 <= decay < 1, "ema_decay", decay, "in [0, 1) or None")
