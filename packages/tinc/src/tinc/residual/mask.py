"""Where a volume is background: one bit a voxel, coded from coarse to fine in the order of `tinc.interpolation`.

A brain without its skull, a masked map, a clipped stack: there the step from tissue to one constant value costs a block
transform more than everything else. With the mask, blocks see whatever continues the tissue best, and the background is
exact.
"""

import numpy as np

from tinc.entropy import AdaptiveBits, BitReader, BitWriter
from tinc.interpolation import Pass, passes

__all__ = ["MaskCoder"]

_CONTEXTS = 3 * 3 * 17 * 3
"""Both neighbours along the axis, the next ones, up to sixteen diagonal ones, and how coarse the pass is."""


class MaskCoder:
    """Codes arrays of bools of at least one value; one coder for one stream, in one direction."""

    def __init__(self) -> None:
        near, far, beside, _ = np.unravel_index(np.arange(_CONTEXTS), (3, 3, 17, 3))
        share = (4 * near + far + beside / 4) / (8 + 2 + 4)
        self.bits = AdaptiveBits(np.round(65536 * (0.02 + 0.96 * np.clip(share, 0, 1))).astype(np.int64))

    def write(self, writer: BitWriter, mask: np.ndarray) -> None:
        """Append a mask to the stream."""
        values = mask.astype(np.int64)
        writer.write_raw(values.reshape(-1)[:1], 1)
        for each in passes(values.shape):
            self.bits.write(writer, _contexts(values, each), values[each.place].reshape(-1))

    def read(self, reader: BitReader, shape: tuple[int, ...]) -> np.ndarray:
        """Return the mask of a stream."""
        values = np.zeros(shape, dtype=np.int64)
        values.reshape(-1)[:1] = reader.read_raw(1, 1)
        for each in passes(shape):
            contexts = _contexts(values, each)
            values[each.place] = self.bits.read(reader, contexts).reshape(values[each.place].shape)
        return values > 0


def _contexts(values: np.ndarray, each: Pass) -> np.ndarray:
    axis, step = each.axis, each.step
    lines = [np.arange(size)[part] for size, part in zip(values.shape, each.place, strict=True)]

    def beside(*moves: tuple[int, int]) -> np.ndarray:
        """Return the values at some steps along some axes; beyond an edge, those at the edge."""
        places = list(lines)
        for moved, by in moves:
            last = (values.shape[moved] - 1) // each.grid(moved) * each.grid(moved)
            places[moved] = np.clip(places[moved] + by, 0, last)
        return values[np.ix_(*places)]

    left, right = beside((axis, -step)), beside((axis, step))
    far = beside((axis, -3 * step)) + beside((axis, 3 * step))
    diagonal = np.zeros_like(left)
    others = [other for other in range(values.ndim) if other != axis and values.shape[other] > each.grid(other)]
    for other in others:
        for along in (-step, step):
            for across in (-each.grid(other), each.grid(other)):
                diagonal += beside((axis, along), (other, across))
    coarse = min(step.bit_length() - 1, 2)
    contexts = np.ravel_multi_index((left + right, far, diagonal, np.full_like(left, coarse)), (3, 3, 17, 3))
    return contexts.reshape(-1)
