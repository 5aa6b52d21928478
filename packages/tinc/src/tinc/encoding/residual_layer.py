"""The residual layer of a file: a search for the step of its quantiser that meets the target."""

import math
from dataclasses import replace

import numpy as np

from tinc.contents import ResidualSection
from tinc.encoding.candidate import Candidate, packed_size
from tinc.encoding.job import Job
from tinc.encoding.targets import OutOfReachError
from tinc.encoding.tree_layer import with_tree
from tinc.entropy import BitWriter
from tinc.residual.decoder import restore_region
from tinc.residual.design import choose_blocks
from tinc.residual.encoder import EncodedResidual, ResidualEncoder
from tinc.residual.mask import MaskCoder
from tinc.tree.quantized import QuantizedTree

__all__ = ["best_residual"]

STEPS_FROM, STEPS_TO = 0.25, 2.0**35
"""Range of the step, in working units."""


def best_residual(job: Job, tree: QuantizedTree | None) -> Candidate:
    """Return the better of a residual layer without a mask and, where there is a background, with one."""
    searches = [StepSearch(job, tree, None)]
    working = job.signal.working
    background = _background(working)
    if background is not None and _mask_size(working != background) < 0.6 * job.target.size_limit:
        searches.append(StepSearch(job, tree, background))
    if job.preset == "fast" and len(searches) > 1:
        first = searches[0].start
        searches = [min(searches, key=lambda search: search.encoder.encode(first).loss(first))]
    candidates, errors = [], []
    for search in searches:
        try:
            candidates.append(search.run())
        except OutOfReachError as error:
            errors.append(error)
    if not candidates:
        raise errors[0]
    best, *others = candidates
    return others[0] if others and others[0].is_better(best, job.target) else best


def _background(working: np.ndarray) -> int | None:
    """Return the most frequent value if at least a twentieth of the voxels have it, else None."""
    values, counts = np.unique(working, return_counts=True)
    return int(values[counts.argmax()]) if counts.max() >= working.size / 20 else None


def _mask_size(mask: np.ndarray) -> int:
    """Return the bytes of a mask."""
    writer = BitWriter()
    MaskCoder().write(writer, mask)
    return len(writer.finish())


class StepSearch:
    """Searches the step that meets the target, with or without a tree and a mask."""

    def __init__(self, job: Job, tree: QuantizedTree | None, background: int | None) -> None:
        self.job, self.background = job, background
        working = job.signal.working
        self.mask = None if background is None else working != background
        self.predicted = np.zeros_like(working) if tree is None else tree.decode(job.signal.box)
        self.base = job.contents if tree is None else with_tree(job.contents, tree)
        residual = working - self.predicted
        guess = residual.size / 8 if job.target.bytes is None else job.target.bytes
        self.blocks, self.start = choose_blocks(residual, guess, self.mask)
        self.encoder = ResidualEncoder(residual, self.blocks, self.mask)

    def run(self) -> Candidate:
        """Return the best candidate that meets the target. Raises OutOfReachError without any."""
        step, low, high = self.start, STEPS_FROM, STEPS_TO
        best: Candidate | None = None
        for _ in range(24):
            tried = self._try(step)
            self.job.report("residual layer", self.job.signal.psnr(tried.error))
            if self._meets(tried) and (best is None or tried.is_better(best, self.job.target)):
                best = tried
            # files get smaller and worse with the step
            if self._meets(tried) == (self.job.target.bytes is None):
                low = step
            else:
                high = step
            if best is not None and (self._is_near(best) or self.job.report.is_stopped):
                break
            if high / low < 1.001:
                # costs depend a little on the steps that were tried before
                low, high = 0.99 * low, 1.01 * high
            step = min(max(self._next(step, low, high, tried), STEPS_FROM), STEPS_TO)
        if best is None:
            reached = f"{tried.size} bytes, a ratio of {self.job.signal.samples.nbytes / tried.size:.0f}"
            raise OutOfReachError(f"the target is out of reach: the last file of this array has {reached}")
        return best

    def _try(self, step: float) -> Candidate:
        encoded = self.encoder.encode(step)
        contents = replace(
            self.base,
            residual=ResidualSection(self.blocks, encoded.quantizer, self.background),
            streams=(*self.base.streams, *encoded.streams),
        )
        error = encoded.squared_error
        if self.job.target.mse is not None:  # it refers to samples, which are rounded and clipped to their type
            error = self.job.signal.squared_error(self._decoded(encoded))
        return Candidate(contents, packed_size(contents), error)

    def _decoded(self, encoded: EncodedResidual) -> np.ndarray:
        """Return the working integers that the file decodes to."""
        working, extent = self.predicted.copy(), self.job.signal.extent
        whole, steps = tuple(slice(0, size) for size in extent), (1,) * len(extent)
        for tile, levels in enumerate(encoded.levels):
            values, place = restore_region(self.blocks, encoded.quantizer, tile, levels, whole, steps)
            working[place] += values
        if self.mask is None or self.background is None:
            return working
        return np.where(self.mask, working, self.background)

    def _excess(self, candidate: Candidate) -> float:
        """Return by which share a candidate is larger or worse than the target."""
        if self.job.target.bytes is not None:
            return candidate.size / max(self.job.target.bytes, 1) - 1
        assert self.job.allowed_error is not None
        return candidate.error / self.job.allowed_error - 1

    def _meets(self, candidate: Candidate) -> bool:
        return self._excess(candidate) <= 0

    def _is_near(self, best: Candidate) -> bool:
        """Tell whether the best candidate is as near as steps come; streams grow by words of four bytes."""
        return self._excess(best) > -max(0.002, 4 / self.job.target.size_limit)

    def _next(self, step: float, low: float, high: float, tried: Candidate) -> float:
        """Return a step within the bounds whose file should be a thousandth below the target."""
        if self.job.target.bytes is not None:
            fixed = packed_size(self.base)
            wanted = max(0.999 * self.job.target.bytes - fixed, 1)
            guess = step * (max(tried.size - fixed, 1) / wanted) ** 0.75
        else:
            assert self.job.allowed_error is not None
            guess = step * (0.999 * self.job.allowed_error / max(tried.error, 1e-9)) ** 0.6
        if low == STEPS_FROM or high == STEPS_TO:  # one end is still open, so strides grow
            return min(max(guess, 1.5 * step), 64 * step) if low == step else max(min(guess, step / 1.5), step / 64)
        margin = (high / low) ** 0.1
        # a guess that lands at an end again would creep along it
        return guess if low * margin < guess < high / margin else math.sqrt(low * high)
