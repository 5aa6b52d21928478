"""The order of training data: which sample stands where in which epoch, and with which randomness it is drawn.

Position p of an epoch belongs to update p // batch_size. A micro-batch is `batch_size / accumulation_steps` positions
in a row, of which rank r of R processes takes r, r + R, r + 2R, ...
"""

import random
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from visionkernels.checks import InputError

__all__ = ["BatchPlan", "TrainingData", "seed_generators"]

# The purposes of seeds, so that no two share random numbers.
SAMPLE, STEP, EVALUATION = range(3)


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Where samples come from and how a model is measured."""

    train: Dataset
    """With `__len__` and `__getitem__`; augmentation draws from random, numpy.random or torch, which are seeded.

    A set with torch's `__getitems__`, from the indices of a micro-batch to its samples, is asked once a micro-batch and
    seeded once, by the first position in it: its random numbers depend on how an update is divided. With a `collate`
    that returns what it gets, `__getitems__` may give the finished batch.
    """
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None
    """Metrics of a model in evaluation mode, without gradients. Runs on every process; the main one's count."""
    batch_transform: Callable[[Any], Any] | None = None
    """From a collated batch on its device to the task's arguments, e.g. `lambda batch: mixup(*batch)`."""
    collate: Callable[[list[Any]], Any] | None = None
    """From samples to a batch; None: torch's default."""
    order: Callable[[int], Sequence[int]] | None = None
    """From an epoch to the indices of its samples, as many in each; None: a permutation seeded by (seed, epoch)."""


def seed_generators(*parts: int) -> None:
    """Seed random, numpy and torch (all devices) with a hash of `parts`: the recipe's seed, a purpose, a place."""
    first, second, third = np.random.SeedSequence(parts).generate_state(3)
    random.seed(int(first))
    np.random.seed(second)  # noqa: NPY002 - what augmentation libraries draw from
    if torch.accelerator.is_available():
        torch.manual_seed(int(third))
    else:  # does the same, but prepares no calls for devices that are not there, which takes longer than a sample
        torch.default_generator.manual_seed(int(third))


class BatchPlan:
    """The batches of one process in every epoch; the last, incomplete update of an epoch is left out."""

    def __init__(
        self, data: TrainingData, *, batch_size: int, accumulation_steps: int, seed: int, rank: int, num_processes: int
    ) -> None:
        if isinstance(data.train, IterableDataset):
            raise TypeError("train is an IterableDataset, which cannot resume in mid-epoch; give one with __getitem__")
        if batch_size % (accumulation_steps * num_processes):
            raise InputError(
                f"batch_size={batch_size} must be a multiple of accumulation_steps={accumulation_steps} times "
                f"the {num_processes} processes"
            )
        self.data, self.seed, self.rank, self.num_processes = data, seed, rank, num_processes
        self.batch_size, self.micro_size = batch_size, batch_size // accumulation_steps
        self.num_samples = len(self.order(0))
        self.updates_per_epoch = self.num_samples // batch_size
        if self.updates_per_epoch == 0:
            raise InputError(f"batch_size={batch_size} exceeds the {self.num_samples} samples of an epoch")

    def order(self, epoch: int) -> Sequence[int]:
        """Return the dataset's indices in the order of `epoch`."""
        if self.data.order is not None:
            return self.data.order(epoch)
        generator = np.random.default_rng([self.seed, epoch])
        return generator.permutation(len(self.data.train))  # type: ignore[arg-type, return-value]

    def positions(self, micro_step: int, rank: int) -> range:
        """Return the positions that `rank` takes in this micro-batch of an epoch."""
        start = micro_step * self.micro_size
        return range(start + rank, start + self.micro_size, self.num_processes)

    def loader(self, epoch: int, first_update: int, *, workers: int, pin_memory: bool) -> DataLoader:
        """Return the micro-batches of this process in `epoch`, from `first_update` of it on."""
        order = self.order(epoch)
        if len(order) != self.num_samples:
            raise InputError(f"order gives {len(order)} indices for epoch {epoch}, but {self.num_samples} for epoch 0")
        micro_steps = self.batch_size // self.micro_size
        steps = range(first_update * micro_steps, self.updates_per_epoch * micro_steps)
        return DataLoader(
            _OrderedSamples(self.data.train, order, self.seed, epoch),
            batch_sampler=[self.positions(step, self.rank) for step in steps],  # type: ignore[misc]
            collate_fn=self.data.collate,
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=_ignore_interrupt,
        )


class _OrderedSamples(Dataset):
    def __init__(self, samples: Dataset, order: Sequence[int], seed: int, epoch: int) -> None:
        self.samples, self.order, self.seed, self.epoch = samples, np.asarray(order), seed, epoch

    def __getitems__(self, positions: range) -> Any:
        whole = getattr(self.samples, "__getitems__", None)
        if whole is None:
            return [self[position] for position in positions]
        seed_generators(self.seed, SAMPLE, self.epoch, positions[0])
        return whole(self.order[positions].tolist())

    def __getitem__(self, position: int) -> Any:
        seed_generators(self.seed, SAMPLE, self.epoch, position)
        return self.samples[int(self.order[position])]


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches the workers too; the main process still wants their batches until it has saved
    signal.signal(signal.SIGINT, signal.SIG_IGN)
