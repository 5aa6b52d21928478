"""The pixels that the cells of a filtered convolution cover, for one axis, since all is separable, and for both.

A cell is a run of `radius` outputs. Along the input it samples, for each of its outputs, the box of pixels in the
middle of the kernel's span, as wide as the stride.
"""

# i output, h input pixel, q cell, u tap of the kernel

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn.functional import conv2d

__all__ = ["Axes", "Axis", "ConvGeometry", "Slice", "cell_means", "cell_sums", "patch_axis"]


@dataclass(frozen=True)
class Axis:
    """One axis of a convolution and its filter; sizes in pixels, `radius` in outputs."""

    size: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    radius: int

    @property
    def span(self) -> int:
        """Input pixels from the first tap of the kernel to the last."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def outputs(self) -> int:
        return (self.size + 2 * self.padding - self.span) // self.stride + 1

    @property
    def cells(self) -> int:
        return -(-self.outputs // self.radius)

    @property
    def box(self) -> int:
        """Input pixels that stand for one output: all between two outputs, without those that no tap can read."""
        return min(self.stride, self.span)

    @property
    def offset(self) -> int:
        """First pixel of output 0's box; negative where it begins in the padding."""
        return -((self.box - self.span) // 2) - self.padding

    @property
    def coverage(self) -> tuple[float, ...]:
        """Share of the outputs for which each tap reads a pixel and no padding."""
        first = np.arange(self.outputs) * self.stride - self.padding
        reads = first[:, None] + np.arange(self.kernel) * self.dilation
        return tuple(((reads >= 0) & (reads < self.size)).mean(0).tolist())

    @property
    def is_tiled(self) -> bool:
        """Whether the cells are runs of equally many pixels that fill the axis from its start to its end."""
        step = self.radius * self.stride
        is_whole = self.outputs == self.cells * self.radius and self.size == self.cells * step
        return is_whole and self.box == self.stride and self.offset == 0

    def slices(self) -> Iterator["Slice"]:
        """Yield strided runs of pixels: together all that are sampled, once, in the order of their cells."""
        step = self.radius * self.stride
        for place in range(min(self.radius, self.outputs)):
            for pixel in range(self.box):
                first = self.offset + place * self.stride + pixel
                begin = max(0, -(first // step))
                end = min((self.outputs - 1 - place) // self.radius, (self.size - 1 - first) // step) + 1
                if begin < end:
                    yield Slice(begin, end, first + begin * step, first + (end - 1) * step + 1, step)


class Slice(NamedTuple):
    """Cells `begin:end`, and one pixel of each of them, `start:stop:step`."""

    begin: int
    end: int
    start: int
    stop: int
    step: int


Axes = tuple[Axis, Axis]  # rows, columns


@dataclass(frozen=True)
class ConvGeometry:
    """The sizes of one filtered convolution."""

    rows: Axis
    columns: Axis
    groups: int

    @classmethod
    def of(
        cls, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
        dilation: Sequence[int], radius: Sequence[int], groups: int,
    ) -> "ConvGeometry":  # fmt: skip
        """Return the geometry for an input's `size`, all pairs (rows, columns).

        Raises RuntimeError, as torch does, for a kernel that spans more than the padded input.
        """
        rows, columns = (Axis(*sizes) for sizes in zip(size, kernel, stride, padding, dilation, radius, strict=True))
        for name, axis in (("height", rows), ("width", columns)):
            padded = axis.size + 2 * axis.padding
            if padded < axis.span:
                raise RuntimeError(f"the kernel spans {axis.span} pixels of {name}; the padded input has {padded}")
        return cls(rows, columns, groups)

    @property
    def axes(self) -> Axes:
        return self.rows, self.columns

    @property
    def patches(self) -> Axes:
        """The axes of the output, whose cells are patches of it."""
        return patch_axis(self.rows.outputs, self.rows.radius), patch_axis(self.columns.outputs, self.columns.radius)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the exact convolution [N, Co, Ho, Wo]."""
        places = ((axis.stride, axis.padding, axis.dilation) for axis in self.axes)
        stride, padding, dilation = zip(*places, strict=True)
        return conv2d(x, weight, bias, stride, padding, dilation, self.groups)


def patch_axis(size: int, radius: int) -> Axis:
    """Return the axis whose cells are patches of a map itself."""
    return Axis(size, kernel=1, stride=1, padding=0, dilation=1, radius=radius)


@lru_cache(maxsize=512)
def cell_sums(axis: Axis) -> npt.NDArray[np.float64]:
    """Return the matrix [cells, size] that sums over a cell's outputs the means of their boxes (C S of the README)."""
    matrix = np.zeros((axis.cells, axis.size))
    for part in axis.slices():
        matrix[np.arange(part.begin, part.end), np.arange(part.start, part.stop, part.step)] = 1 / axis.box
    return matrix


@lru_cache(maxsize=512)
def cell_means(axis: Axis) -> npt.NDArray[np.float64]:
    """Return `cell_sums` with each row divided by the number of the cell's outputs, [cells, size]."""
    counts = np.minimum(axis.outputs - axis.radius * np.arange(axis.cells), axis.radius)
    return cell_sums(axis) / counts[:, None]
