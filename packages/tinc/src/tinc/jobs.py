"""What is compressed, to which target, and how its file is put together."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tinc.container import Contents, TreeSection, pack
from tinc.design import design_tree, leaf_splits
from tinc.entropy import BitWriter
from tinc.file import TincFile
from tinc.fitting import FitPlan, Progress, fit_tree
from tinc.tree import QuantizedTree, TreeShape, write_constants, write_weights

__all__ = [
    "TRAINING_STEPS",
    "Job",
    "Layers",
    "OutOfReachError",
    "Preset",
    "Report",
    "Target",
    "finish",
    "fit",
    "packed",
    "peak",
    "quality",
    "with_tree",
]

Preset = Literal["fast", "balanced", "best"]
Layers = Literal["auto", "tree", "residual", "both"]

TRAINING_STEPS: dict[str, int] = {"fast": 0, "balanced": 2500, "best": 6000}
"""Of a tree, by preset; 0: no tree, unless it is asked for."""
TILE_CHECKS_FROM = 1 << 16
"""Bytes from which each stream has a checksum of its own, for readers of a part."""


@dataclass(frozen=True)
class Target:
    """Exactly one of the three."""

    bytes: int | None = None
    mse: float | None = None
    """In squared samples."""
    max_error: float | None = None


class OutOfReachError(ValueError):
    """No file meets the target."""


class Report:
    """Tells the caller what is going on, and remembers that it wants no more."""

    def __init__(self, callback: Callable[[str, float], None] | None) -> None:
        self.callback, self.is_stopped = callback, False

    def __call__(self, stage: str, quality: float) -> None:
        if self.callback is None or self.is_stopped:
            return
        try:
            self.callback(stage, quality)
        except KeyboardInterrupt:
            self.is_stopped = True


@dataclass(frozen=True)
class Job:
    """What does not change while ways to compress are tried."""

    samples: np.ndarray
    """[channels, ...]"""
    working: np.ndarray
    contents: Contents
    preset: Preset
    seed: int
    deadline: float | None
    report: Report

    @property
    def extent(self) -> tuple[int, ...]:
        """Sizes, channels first."""
        return tuple(self.working.shape)

    def squared_error(self, contents: Contents) -> float:
        """Return the sum of squared errors of the samples, in squared working units."""
        decoded = finish(contents)
        errors = decoded._first(decoded.decode()).astype(np.float64) - self.samples
        return float(np.square(errors).sum()) / 4.0**self.contents.format.exponent


def fit(job: Job, budget: float) -> QuantizedTree:
    """Train a tree of about `budget` bytes."""
    extent = job.extent[1:]
    splits = leaf_splits(extent, budget)
    everywhere = TreeShape(extent, splits, ((1,),) * (len(splits) - 1) + ((job.extent[0],),))
    boxes = [(slice(None), *everywhere.box(leaf)) for leaf in range(everywhere.num_leaves)]
    values = [job.working[box].reshape(job.extent[0], -1) for box in boxes]
    constant = np.array([bool((each == each[:, :1]).all()) for each in values])
    if constant.all():
        constant[0] = False
    shape = design_tree(extent, job.extent[0], budget, constant)
    plan = FitPlan(steps=TRAINING_STEPS[job.preset] or 1000)

    def callback(progress: Progress) -> None:
        mse = progress.mse * job.working.size
        job.report(f"tree, step {progress.step} of {progress.steps}", quality(job, mse))
        if job.report.is_stopped:
            raise KeyboardInterrupt

    tree = fit_tree(shape, job.working, budget, plan=plan, seed=job.seed, deadline=job.deadline, callback=callback)
    constants = [each[:, 0] for each, same in zip(values, constant, strict=True) if same]
    return replace(tree, constants=np.array(constants, dtype=np.int64).reshape(-1, job.extent[0]))


def with_tree(contents: Contents, tree: QuantizedTree) -> Contents:
    """Return contents with a tree, and its stream as the first one."""
    writer = BitWriter()
    spreads = write_weights(writer, tree)
    write_constants(writer, tree)
    section = TreeSection(
        tree.shape,
        tuple(layer.multiplier for layer in tree.layers),
        tuple(layer.shift for layer in tree.layers),
        spreads,
        tree.base,
    )
    return replace(contents, tree=section, streams=(writer.finish(),))


def packed(contents: Contents) -> bytes:
    """Return the bytes of a file."""
    size = sum(map(len, contents.streams))
    return pack(contents, checks_tiles=size >= TILE_CHECKS_FROM)


def finish(contents: Contents) -> TincFile:
    """Return the file, read back from its bytes."""
    return TincFile(packed(contents))


def quality(job: Job, squared_error: float) -> float:
    """Return the PSNR of a sum of squares in working units."""
    unit = 2.0**job.contents.format.exponent
    mse = squared_error / job.working.size * unit**2
    return math.inf if mse == 0 else 10 * math.log10(peak(job.samples) ** 2 / mse)


def peak(samples: np.ndarray) -> float:
    """Return the range that a PSNR is over: that of an integer type, or of float32 values."""
    if samples.dtype == np.float32:
        return float(samples.max()) - float(samples.min()) or 1.0
    return float({"uint8": 255, "uint16": 65535, "int16": 65535}[samples.dtype.name])
