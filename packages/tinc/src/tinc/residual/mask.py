"""Coding of the mask of a volume: one bit a voxel, from coarse to fine in the order of `tinc.interpolation`.

In a brain without its skull, a masked map or a clipped stack, the edge to the constant background costs a block
transform more than everything else. With a mask, blocks contain a smooth continuation instead, and the background is
exact.
"""

import numpy as np

from tinc.entropy import AdaptiveBits, BitReader, BitWriter
from tinc.interpolation import Pass, passes

__all__ = ["MaskCoder"]

_CONTEXTS = 3 * 3 * 17 * 3
"""Sums of both neighbours along the axis, of the next ones and of up to sixteen diagonal ones, and the step's class."""


class MaskCoder:
    """Codes boolean arrays of at least one value; a coder serves one stream, in one direction."""

    def __init__(self) -> None:
        near, far, beside, _ = np.unravel_index(np.arange(_CONTEXTS), (3, 3, 17, 3))
        share = (4 * near + far + beside / 4) / (8 + 2 + 4)
        self.bits = AdaptiveBits(np.round(65536 * (0.02 + 0.96 * np.clip(share, 0, 1))).astype(np.int64))

    def write(self, writer: BitWriter, mask: np.ndarray) -> None:
        """Append a mask to the stream."""
        values = mask.astype(np.int64)
        writer.write_raw(values.reshape(-1)[:1], 1)
        for pass_ in passes(values.shape):
            self.bits.write(writer, _contexts(values, pass_), values[pass_.place].reshape(-1))

    def read(self, reader: BitReader, shape: tuple[int, ...]) -> np.ndarray:
        """Return the mask of a stream."""
        values = np.zeros(shape, dtype=np.int64)
        values.reshape(-1)[:1] = reader.read_raw(1, 1)
        for pass_ in passes(shape):
            contexts = _contexts(values, pass_)
            values[pass_.place] = self.bits.read(reader, contexts).reshape(values[pass_.place].shape)
        return values > 0


def _contexts(values: np.ndarray, pass_: Pass) -> np.ndarray:
    axis, step = pass_.axis, pass_.step
    lines = [np.arange(size)[part] for size, part in zip(values.shape, pass_.place, strict=True)]

    def beside(*moves: tuple[int, int]) -> np.ndarray:
        """Return the values at some distance along some axes; beyond an edge, those at the edge."""
        places = list(lines)
        for moved, by in moves:
            last = (values.shape[moved] - 1) // pass_.grid(moved) * pass_.grid(moved)
            places[moved] = np.clip(places[moved] + by, 0, last)
        return values[np.ix_(*places)]

    left, right = beside((axis, -step)), beside((axis, step))
    far = beside((axis, -3 * step)) + beside((axis, 3 * step))
    diagonal = np.zeros_like(left)
    others = [other for other in range(values.ndim) if other != axis and values.shape[other] > pass_.grid(other)]
    for other in others:
        for along in (-step, step):
            for across in (-pass_.grid(other), pass_.grid(other)):
                diagonal += beside((axis, along), (other, across))
    coarse = min(step.bit_length() - 1, 2)
    contexts = np.ravel_multi_index((left + right, far, diagonal, np.full_like(left, coarse)), (3, 3, 17, 3))
    return contexts.reshape(-1)
