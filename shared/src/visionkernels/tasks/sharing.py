"""How processes share the work of an evaluation."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from visionkernels.checks import check_loading

__all__ = ["shard_loader"]


def shard_loader(
    samples: Any, workers: int = 0, batch_size: int | None = None, *, show_progress: bool = True
) -> Iterable[Any]:
    """Return the samples that fall to this process, one by one or in batches, under a progress bar.

    Raises InputError as `check_loading` does.
    """
    check_loading(workers, 1 if batch_size is None else batch_size)
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, processes = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if shared else (0, 1)
    own = Subset(samples, range(rank, len(samples), processes))
    loader = DataLoader(own, batch_size=batch_size, num_workers=workers)
    return tqdm(loader, desc="evaluating", disable=None if show_progress else True, leave=False)
