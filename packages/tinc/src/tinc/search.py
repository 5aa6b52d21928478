"""The search for the step of the residual layer that meets a target."""

import math
from dataclasses import dataclass, replace

import numpy as np

from tinc.container import Contents, ResidualSection
from tinc.design import choose_blocks
from tinc.entropy import BitWriter
from tinc.jobs import Job, OutOfReachError, Target, packed, quality, with_tree
from tinc.mask import MaskCoder
from tinc.residual import RATE, ResidualEncoder
from tinc.tree import QuantizedTree

__all__ = ["Found", "best_search"]

STEPS_FROM, STEPS_TO = 0.25, 2.0**35
"""Of the residual layer, in working units."""


def best_search(job: Job, target: Target, tree: QuantizedTree | None) -> "Found":
    """Return the better of a residual layer without a mask and, where there is a background, with one."""
    searches = [Search(job, target, tree, None)]
    background = _background(job.working)
    if background is not None and _mask_size(job.working != background) < 0.6 * (target.bytes or math.inf):
        searches.append(Search(job, target, tree, background))
    if job.preset == "fast" and len(searches) > 1:
        searches = [min(searches, key=lambda search: search.loss(searches[0].start))]
    found, errors = [], []
    for search in searches:
        try:
            found.append(search.run())
        except OutOfReachError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found[-1] if len(found) == 1 or found[1].is_better(found[0], target) else found[0]


def _background(working: np.ndarray) -> int | None:
    """Return the value of at least a twentieth of the voxels, in working units, or None."""
    values, counts = np.unique(working, return_counts=True)
    return int(values[counts.argmax()]) if counts.max() >= working.size / 20 else None


def _mask_size(mask: np.ndarray) -> int:
    """Return the bytes of a mask."""
    writer = BitWriter()
    MaskCoder().write(writer, mask)
    return len(writer.finish())


@dataclass(frozen=True)
class Found:
    """A way to compress, finished."""

    contents: Contents
    size: int
    error: float
    """Sum of squares, in squared working units."""

    def is_better(self, other: "Found", target: Target) -> bool:
        """Tell which of two that meet the target is better."""
        return self.error < other.error if target.bytes is not None else self.size < other.size


class Search:
    """Looks for the step of the residual layer that meets the target."""

    def __init__(self, job: Job, target: Target, tree: QuantizedTree | None, background: int | None) -> None:
        self.job, self.target, self.tree, self.background = job, target, tree, background
        self.mask = None if background is None else job.working != background
        whole = tuple(slice(0, size) for size in job.working.shape[1:])
        self.residual = job.working if tree is None else job.working - tree.decode(whole)
        self.base = job.contents if tree is None else with_tree(job.contents, tree)
        unit = 2.0**job.contents.format.exponent
        self.largest_error = None if target.mse is None else target.mse / unit**2 * job.working.size
        guess = target.bytes or self.residual.size / 8
        self.blocks, self.start = choose_blocks(self.residual, guess, self.mask)
        self.encoder = ResidualEncoder(self.residual, self.blocks, self.mask)

    def loss(self, step: float) -> float:
        """Return error + rate * bits at a step."""
        encoded = self.encoder.encode(step)
        return encoded.squared_error + 8 * RATE * step**2 * encoded.size

    def run(self) -> Found:
        """Return the best file that meets the target. Raises ValueError if the smallest is too large."""
        step, low, high = self.start, STEPS_FROM, STEPS_TO
        best: Found | None = None
        for _ in range(24):
            found = self._try(step)
            self.job.report("residual layer", quality(self.job, found.error))
            if self._meets(found) and (best is None or found.is_better(best, self.target)):
                best = found
            # files get smaller and worse with the step
            if self._meets(found) == (self.target.bytes is None):
                low = step
            else:
                high = step
            if best is not None and (self._is_near(best) or self.job.report.is_stopped):
                break
            if high / low < 1.001:
                # what bits cost depends a little on the way that led here
                low, high = 0.99 * low, 1.01 * high
            step = min(max(self._next(step, low, high, found), STEPS_FROM), STEPS_TO)
        if best is None:
            raise OutOfReachError(
                f"the target is out of reach: the last file of this array has {found.size} bytes, a ratio of "
                f"{self.job.samples.nbytes / found.size:.0f}"
            )
        return best

    def _try(self, step: float) -> Found:
        encoded = self.encoder.encode(step)
        contents = replace(
            self.base,
            residual=ResidualSection(self.blocks, encoded.quantizer, self.background),
            streams=(*self.base.streams, *encoded.streams),
        )
        error = encoded.squared_error
        if self.target.mse is not None:  # the promise is of samples, which are rounded and kept within their type
            error = self.job.squared_error(contents)
        return Found(contents, len(packed(contents)), error)

    def _excess(self, found: Found) -> float:
        """Return by which share a file is larger or worse than asked for."""
        if self.target.bytes is not None:
            return found.size / max(self.target.bytes, 1) - 1
        assert self.largest_error is not None
        return found.error / self.largest_error - 1

    def _is_near(self, best: Found) -> bool:
        """Tell whether no better step is worth looking for; streams grow by words of four bytes."""
        return self._excess(best) > -max(0.002, 4 / (self.target.bytes or math.inf))

    def _meets(self, found: Found) -> bool:
        return self._excess(found) <= 0

    def _next(self, step: float, low: float, high: float, found: Found) -> float:
        """Return a step that should come out a thousandth below the target, within the bounds."""
        if self.target.bytes is not None:
            fixed = len(packed(self.base))
            wanted = max(0.999 * self.target.bytes - fixed, 1)
            guess = step * (max(found.size - fixed, 1) / wanted) ** 0.75
        else:
            assert self.largest_error is not None
            guess = step * (0.999 * self.largest_error / max(found.error, 1e-9)) ** 0.6
        if low == STEPS_FROM or high == STEPS_TO:  # one end is still open: go on in strides that grow
            return min(max(guess, 1.5 * step), 64 * step) if low == step else max(min(guess, step / 1.5), step / 64)
        margin = (high / low) ** 0.1
        # a guess that lands at an end again would creep along it
        return guess if low * margin < guess < high / margin else math.sqrt(low * high)
