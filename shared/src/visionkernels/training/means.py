"""Means of what a task returns, over the micro-batches of an epoch and all processes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import Tensor

__all__ = ["RunningMeans", "Totals", "merged", "share"]

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

    def of_processes(self) -> list[Totals]:
        """Return the sums and counts of every process, which call this together; their names may differ."""
        own = {name: (total.item(), self.counts[name]) for name, total in self.sums.items()}
        gathered: list[Totals] = gather_object([own])
        return gathered

    def means(self) -> dict[str, float]:
        """Return the means over all processes, which call this together."""
        return {name: total / count for name, (total, count) in merged(self.of_processes()).items()}


def merged(parts: Sequence[Totals]) -> Totals:
    """Return the sums and counts over all processes."""
    result: Totals = {}
    for totals in parts:
        for name, (total, count) in totals.items():
            total_before, count_before = result.get(name, (0.0, 0))
            result[name] = (total_before + total, count_before + count)
    return result


def share(parts: Sequence[Totals] | Totals, process: int, num_processes: int) -> Totals:
    """Return what a process goes on from: its own sums, or the first all of them where the processes were others.

    So the rounding is that of a run without a stop. Older checkpoints hold the sums over all processes alone.
    """
    parts = [parts] if isinstance(parts, Mapping) else parts
    if len(parts) == num_processes:
        return parts[process]
    return {} if process else merged(parts)
