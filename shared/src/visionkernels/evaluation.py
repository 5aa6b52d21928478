"""How processes share the work of an evaluation."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

__all__ = ["check_loading", "own_share"]


def check_loading(workers: int, batch_size: int | None = None) -> None:
    """Raise ValueError for a number of processes or of samples a batch that cannot be."""
    if workers < 0:
        raise ValueError(f"workers={workers} must be at least 0")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")


def own_share(
    samples: Any, workers: int = 0, batch_size: int | None = None, *, show_progress: bool = True
) -> Iterable[Any]:
    """Return the samples that fall to this process, one by one or in batches, under a progress bar.

    Raises ValueError as `check_loading` does.
    """
    check_loading(workers, batch_size)
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, processes = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if shared else (0, 1)
    own = Subset(samples, range(rank, len(samples), processes))
    loader = DataLoader(own, batch_size=batch_size, num_workers=workers)
    return tqdm(loader, desc="evaluating", disable=None if show_progress else True, leave=False)
