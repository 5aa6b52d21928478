"""The outcome of a training run."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["FitResult"]


@dataclass(frozen=True)
class FitResult:
    """The last epoch's losses and metrics, those of every epoch, and the files of the final weights."""

    metrics: dict[str, float]
    history: list[dict[str, float]]
    weights: Path
    ema_weights: Path | None
