"""Means of what a task returns, over the micro-batches of an epoch and all processes."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import Tensor

__all__ = ["RunningMeans", "Totals"]

Totals = dict[str, tuple[float, int]]
"""Sum and count by name."""


class RunningMeans:
    """Sums on the device, so that no micro-batch waits for it; a name counts in the micro-batches that give it."""

    def __init__(self, totals: Totals | None = None, *, device: torch.device | None = None) -> None:
        self.sums = {name: torch.tensor(total, device=device) for name, (total, _) in (totals or {}).items()}
        self.counts = {name: count for name, (_, count) in (totals or {}).items()}

    def add(self, results: Mapping[str, Any]) -> None:
        """Count the scalars among a task's results."""
        for name, value in results.items():
            if isinstance(value, Tensor) and value.ndim == 0:
                value = value.detach().float()
                self.sums[name] = self.sums[name] + value if name in self.sums else value
                self.counts[name] = self.counts.get(name, 0) + 1

    def totals(self) -> Totals:
        """Return the sums and counts of all processes, which call this together; their names may differ."""
        merged: Totals = {}
        for totals in gather_object([{name: (total.item(), self.counts[name]) for name, total in self.sums.items()}]):
            for name, (total, count) in totals.items():
                total_before, count_before = merged.get(name, (0.0, 0))
                merged[name] = (total_before + total, count_before + count)
        return merged

    def means(self) -> dict[str, float]:
        """Return the means over all processes, which call this together."""
        return {name: total / count for name, (total, count) in self.totals().items()}
