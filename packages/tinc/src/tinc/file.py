"""An open `.tinc` file: an array whose parts are decoded when they are read."""

import json
import math
import mmap
import warnings
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinc.container import unpack
from tinc.entropy import BitReader
from tinc.errors import MemoryLimitError, TincFormatError
from tinc.exact import BitsGrid, Grid, PaletteGrid, StepGrid, decode_box, decode_palette
from tinc.regions import Region, check_region, index_region, voxels_of
from tinc.residual.blocks import Blocks
from tinc.residual.decoder import decode_tile, restore_region
from tinc.tree.quantized import Layer, QuantizedTree
from tinc.tree.weights import read_constants, read_weights
from visionkernels.checks import InputError
from visionkernels.files import replace_file

__all__ = ["TincFile", "decompress", "open_file"]

_CACHED_TILES = 64
_SLAB_SAMPLES = 1 << 22
"""Samples that are decoded at once, in working integers of eight bytes."""


class _Tile(NamedTuple):
    """The decoded stream of a tile: levels of the residual layer and their mask, or numbers of the exact layer."""

    values: np.ndarray
    mask: np.ndarray | None = None


class TincFile:
    """A compressed array. `file[z0:z1, y0:y1, x0:x1]` decodes this part alone, to the values of the whole there."""

    def __init__(
        self,
        content: bytes | mmap.mmap,
        *,
        name: str = "the file",
        partial: bool = False,
        max_nbytes: int | None = None,
    ) -> None:
        """Read the header. Raises TincFormatError for anything but a whole `.tinc` file.

        `partial` also accepts the beginning of a file: parts whose streams are missing have the values of the tree.
        `max_nbytes` bounds the bytes that a call may decode to, since a file of a few bytes may hold a constant array
        of any size; by default 256 MiB, or 65,536 times the file where that is more.
        """
        self._content, self.name, self.partial = memoryview(content), name, partial
        self.max_nbytes = max(1 << 28, len(content) << 16) if max_nbytes is None else max_nbytes
        self._contents, self._directory = unpack(self._content, partial=partial)
        self._tiles: OrderedDict[int, _Tile] = OrderedDict()
        self._keeps_all = False

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples."""
        return np.dtype(self._contents.format.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the array, including channels."""
        return self._with_channels(self._contents.shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of samples."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded array."""
        return self.size * self.dtype.itemsize

    @property
    def nbytes_stored(self) -> int:
        """Bytes of the file."""
        return len(self._content)

    @property
    def ratio(self) -> float:
        """Bytes of the decoded array / bytes of the file."""
        return self.nbytes / self.nbytes_stored

    @property
    def chunks(self) -> tuple[int, ...]:
        """Sizes of the boxes that are decoded as a unit, by axis."""
        blocks = self._blocks
        if blocks is None:
            return self.shape
        sizes = [min(b * t, n) for b, t, n in zip(blocks.block, blocks.tile, blocks.extent, strict=True)]
        return self._with_channels(tuple(sizes[1:]))

    @property
    def levels(self) -> int:
        """Number of coarser volumes that `decode` offers; each halves the axes of more than one voxel."""
        sizes, residual = self._contents.shape, self._contents.residual
        largest = [1 << (size - 1).bit_length() for size in sizes if size > 1]
        if residual is not None:
            largest += [b for b, size in zip(residual.blocks.block[1:], sizes, strict=True) if size > 1]
            return min(largest, default=1).bit_length() - 1
        return max(largest, default=1).bit_length() - 1

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata from the writer: axes, spacing, units and the like."""
        try:
            return dict(json.loads(self._contents.metadata)) if self._contents.metadata else {}
        except (ValueError, TypeError, RecursionError) as error:
            raise TincFormatError(f"{self.name}: the metadata is damaged") from error

    def __repr__(self) -> str:
        return f"TincFile({self.shape}, {self.dtype}, {self.nbytes_stored} bytes, ratio {self.ratio:.1f})"

    def __reduce__(self) -> tuple[Any, ...]:
        # a mapped file is opened anew, by its whole path: workers may be in another folder
        is_mapped = isinstance(self._content.obj, mmap.mmap)
        source = Path(self.name).absolute() if is_mapped else bytes(self._content)
        return _reopen, (source, self.partial, self.max_nbytes)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise InputError("copy=False: a compressed array cannot be converted without a copy")
        return self.decode().astype(self.dtype if dtype is None else dtype, copy=False)

    def __getitem__(self, key: Any) -> np.ndarray:
        """Index as NumPy does, with integers, slices and an ellipsis. Raises IndexError for others."""
        region, inner = index_region(key, self.shape)
        return self.decode(region)[inner]

    def decode(self, region: Region | None = None, *, level: int = 0, out: np.ndarray | None = None) -> np.ndarray:
        """Return a region of the array, by default all of it.

        `region` has a slice for each axis, with steps of 1. A `level` above 0 halves each axis but that of the channels
        as many times: values are then means of the voxels of a cell, and the region counts cells. The values are
        written to `out`, if given. Raises IndexError for a region that is not inside, ValueError for a level that the
        file does not have, TincFormatError for damaged streams, and MemoryLimitError for more than `max_nbytes`.
        """
        steps = self._steps(level)
        sizes = self._with_channels(tuple(-(-n // s) for n, s in zip(self._contents.shape, steps[1:], strict=True)))
        inner = self._channels_first(check_region(region, sizes))
        self._check_memory(inner, steps)
        if any(part.stop == part.start for part in inner):
            shape = [part.stop - part.start for part in inner]
            samples = np.zeros(shape, dtype=self.dtype)
        else:
            samples = self._decode_slabs(inner, steps)
        samples = self._channels_last(samples)
        if out is None:
            return samples
        if out.shape != samples.shape or out.dtype != samples.dtype:
            raise InputError(f"out is {out.dtype} {out.shape}; the region is {samples.dtype} {samples.shape}")
        out[...] = samples
        return out

    def metadata_of(self, key: Any = ..., *, level: int = 0) -> dict[str, Any]:
        """Return the metadata of `file[key]`, or of `decode(region, level=level)` for a region `key`.

        Spacing, origin, affines and names of channels are those of the part; a voxel of a coarser level is the centre
        of its cell, where a smaller cell at the end counts as a whole one. What cannot be recomputed is left out, with
        a warning. Raises ValueError for an index with an integer, and the errors of `file[key]` and `decode`.
        """
        # imports the readers of all formats
        from tinc.volumes.geometry import axis_parts, metadata_of_part

        parts = axis_parts(key, self.shape, self._with_channels(self._steps(level)[1:], channels=1))
        metadata, left_out = metadata_of_part(self.metadata, parts, self._contents.channel_axis)
        if left_out:
            warnings.warn(
                f"{self.name}: metadata that cannot be recomputed for a part is left out: {', '.join(left_out)}",
                stacklevel=2,
            )
        return metadata

    def resample(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return the volume with `shape` voxels along its axes, channels excluded, as float32.

        The coarsest level that is at least as fine is interpolated linearly between voxel centres.
        """
        import torch
        from torch.nn import functional as F

        spatial = self._contents.shape
        if len(shape) != len(spatial) or min(shape) < 1:
            raise InputError(f"shape={shape} must give {len(spatial)} sizes of at least 1")
        if len(spatial) > 3:
            raise InputError(f"an array of {len(spatial)} axes cannot be resampled; resample its volumes one by one")
        level = 0
        while level < self.levels and all(-(-n >> (level + 1)) >= m for n, m in zip(spatial, shape, strict=True)):
            level += 1
        values = self._first(self.decode(level=level)).astype(np.float32)
        mode = {2: "bilinear", 3: "trilinear"}[len(spatial)]
        scaled = F.interpolate(torch.from_numpy(values)[None], size=shape, mode=mode, align_corners=False)[0].numpy()
        return self._channels_last(scaled)

    def load(self) -> "TincFile":
        """Decode all streams into memory, so that later calls are arithmetic alone; return the file itself."""
        self._keeps_all = True
        self._tree  # noqa: B018
        if self._contents.exact is not None:
            self._grid  # noqa: B018
        for tile in range(0 if self._blocks is None else self._blocks.num_tiles):
            self._tile(tile)
        return self

    def verify(self) -> None:
        """Decode every stream. Raises TincFormatError if one is damaged."""
        self._tree  # noqa: B018
        if self._contents.exact is not None:
            self._grid  # noqa: B018
        for tile in range(0 if self._blocks is None else self._blocks.num_tiles):
            self._tile(tile)

    def info(self) -> dict[str, Any]:
        """Return a description of the file as JSON values: shape, type, sizes, and the parameters of its layers."""
        contents, sizes = self._contents, np.diff(self._directory.offsets).tolist()
        info: dict[str, Any] = {
            "shape": list(self.shape), "dtype": self.dtype.name, "channel_axis": contents.channel_axis,
            "bytes": self.nbytes_stored, "ratio": self.ratio, "bits_per_sample": 8 * self.nbytes_stored / self.size,
            "levels": self.levels, "chunks": list(self.chunks), "header_bytes": self._directory.offsets[0],
        }  # fmt: skip
        if contents.tree is not None:
            shape = contents.tree.shape
            info["tree"] = {
                "bytes": sizes[0], "leaves": shape.num_leaves, "active_leaves": len(shape.nodes[-1]),
                "splits": shape.splits, "widths": shape.widths, "weights": shape.num_weights,
            }  # fmt: skip
        rest = sum(sizes[contents.tree is not None :])
        if contents.residual is not None:
            blocks = contents.residual.blocks
            step = contents.residual.quantizer.step * 2.0**contents.format.exponent
            info["residual"] = {"bytes": rest, "block": blocks.block[1:], "tiles": blocks.num_tiles, "step": step}
            if contents.residual.background is not None:
                background = contents.format.to_samples(np.array(contents.residual.background))
                info["residual"]["background"] = background.item()
        if contents.exact is not None:
            info["exact"] = {"bytes": rest, "grid": contents.exact.kind, "step": contents.exact.step}
        if self.metadata:
            info["metadata"] = self.metadata
        return info

    def tobytes(self) -> bytes:
        """Return the bytes of the file."""
        return bytes(self._content)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the file, whole or not at all. Raises FileExistsError."""
        with replace_file(path, overwrite=overwrite) as temporary:
            temporary.write_bytes(self._content)

    @property
    def _blocks(self) -> Blocks | None:
        if self._contents.exact is not None:
            return None if self._contents.exact.palette_size == 1 else self._contents.exact.blocks
        return None if self._contents.residual is None else self._contents.residual.blocks

    @cached_property
    def _tree(self) -> QuantizedTree | None:
        section = self._contents.tree
        if section is None:
            return None
        reader = BitReader(self._stream(0))
        weights = read_weights(reader, section.shape, section.spreads)
        constants = read_constants(reader, section.shape)
        layers = map(Layer, weights, section.multipliers, section.shifts)
        return QuantizedTree(section.shape, tuple(layers), constants, section.base)

    @cached_property
    def _grid(self) -> Grid:
        exact = self._contents.exact
        assert exact is not None
        dtype = self._contents.format.dtype
        if exact.kind == "bits":
            return BitsGrid()
        if exact.kind == "step":
            return StepGrid(dtype, exact.step, exact.offset)
        stream = self._stream(int(self._contents.tree is not None))
        return PaletteGrid(dtype, decode_palette(stream, exact.palette_size))

    def _stream(self, number: int) -> bytes:
        try:
            return self._directory.stream(self._content, number)
        except TincFormatError as error:
            raise TincFormatError(f"{self.name}: {error}") from error

    def _tile(self, tile: int) -> _Tile | None:
        """Return the decoded stream of a tile, or None if a partial file lacks it."""
        if tile in self._tiles:
            self._tiles.move_to_end(tile)
            return self._tiles[tile]
        contents = self._contents
        palette = contents.exact is not None and contents.exact.kind == "palette"
        number = (contents.tree is not None) + palette + tile
        if self.partial and self._directory.offsets[number + 1] > len(self._content):
            return None
        stream, blocks = self._stream(number), self._blocks
        assert blocks is not None
        if contents.residual is not None:
            decoded = _Tile(*decode_tile(blocks, tile, stream, has_mask=contents.residual.background is not None))
        else:
            decoded = _Tile(decode_box(stream, [part.stop - part.start for part in blocks.box(tile)]))
        self._tiles[tile] = decoded
        if len(self._tiles) > _CACHED_TILES and not self._keeps_all:
            self._tiles.popitem(last=False)
        return decoded

    def _decode_slabs(self, region: Region, steps: tuple[int, ...]) -> np.ndarray:
        """Decode a region slab by slab, since the working integers of all of it take eight bytes a sample."""
        sizes = [part.stop - part.start for part in region]
        axis = max(range(1, len(sizes)), key=lambda axis: sizes[axis])
        blocks = self._blocks
        tile = 1 if blocks is None else max(1, blocks.block[axis] * blocks.tile[axis] // steps[axis])
        rows = max(1, _SLAB_SAMPLES * sizes[axis] // math.prod(sizes) // tile) * tile
        if rows >= sizes[axis]:
            return self._decode_samples(region, steps)
        samples = np.empty(sizes, dtype=self.dtype)
        start = region[axis].start
        # slabs end between tiles, so that none is decoded twice
        for first in range(start - start % tile, region[axis].stop, rows):
            slab = list(region)
            slab[axis] = slice(max(first, start), min(first + rows, region[axis].stop))
            place = [slice(None)] * len(sizes)
            place[axis] = slice(slab[axis].start - start, slab[axis].stop - start)
            samples[tuple(place)] = self._decode_samples(tuple(slab), steps)
        return samples

    def _decode_samples(self, region: Region, steps: tuple[int, ...]) -> np.ndarray:
        if self._contents.exact is not None:
            return self._decode_exact(region, steps)
        return self._contents.format.to_samples(self._decode_working(region, steps))

    def _decode_working(self, region: Region, steps: tuple[int, ...]) -> np.ndarray:
        sizes = [part.stop - part.start for part in region]
        tree = self._tree
        working = np.zeros(sizes, dtype=np.int64) if tree is None else tree.decode(region[1:], steps[1:])[region[0]]
        residual = self._contents.residual
        if residual is None:
            return working
        blocks = residual.blocks
        voxels = voxels_of(region, steps, blocks.extent)
        for tile in blocks.touching(voxels):
            decoded = self._tile(tile)
            if decoded is None:
                continue
            values, place = restore_region(blocks, residual.quantizer, tile, decoded.values, region, steps)
            working[place] += values
            if decoded.mask is not None:
                assert residual.background is not None
                inside = self._mask_of(tile, decoded.mask, place, region, steps)
                working[place] = _blend(working[place], residual.background, inside, steps)
        return working

    def _mask_of(
        self, tile: int, mask: np.ndarray, place: Region, region: Region, steps: tuple[int, ...]
    ) -> np.ndarray:
        """Return the part of a tile's mask at `place` in the region, in voxels."""
        assert self._blocks is not None
        cells = [slice(a.start + b.start, a.stop + b.start) for a, b in zip(place, region, strict=True)]
        voxels = voxels_of(tuple(cells), steps, self._blocks.extent)
        box = self._blocks.box(tile)
        return mask[tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(voxels, box, strict=True))]

    def _decode_exact(self, region: Region, steps: tuple[int, ...]) -> np.ndarray:
        if max(steps) > 1:
            return self._mean_of_cells(region, steps)
        grid = self._grid
        tree = self._tree
        if tree is None:
            numbers = np.zeros([part.stop - part.start for part in region], dtype=np.int64)
        else:
            guess = self._contents.format.to_samples(tree.decode(region[1:])[region[0]])
            numbers = grid.numbers(guess)
        blocks = self._blocks
        for tile in () if blocks is None else blocks.touching(region):
            decoded = self._tile(tile)
            if decoded is not None:
                assert blocks is not None
                box = blocks.box(tile)
                low = [max(a.start, b.start) for a, b in zip(region, box, strict=True)]
                high = [min(a.stop, b.stop) for a, b in zip(region, box, strict=True)]
                inside = tuple(slice(a - b.start, c - b.start) for a, c, b in zip(low, high, box, strict=True))
                place = tuple(slice(a - r.start, c - r.start) for a, c, r in zip(low, high, region, strict=True))
                numbers[place] += decoded.values[inside]
        return grid.samples(numbers)

    def _mean_of_cells(self, region: Region, steps: tuple[int, ...]) -> np.ndarray:
        """Average voxels of the exact layer, whose coding has no coarser volumes."""
        fine = voxels_of(region, steps, (self._contents.channels, *self._contents.shape))
        values = self._decode_exact(fine, (1,) * len(fine))
        with np.errstate(invalid="ignore"):  # some NaNs are signalling
            values = values.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):  # infinities of both signs have no mean
            means = _sum_cells(values, steps) / _sum_cells(np.ones(values.shape), steps)
            return (means if self._contents.format.is_float else np.rint(means)).astype(self.dtype)

    def _check_memory(self, region: Region, steps: tuple[int, ...]) -> None:
        """Raise MemoryLimitError for a region that decodes to more than `max_nbytes`."""
        # the exact layer has no coarser volumes, and averages its voxels
        cell = math.prod(steps) if self._contents.exact is not None else 1
        needed = math.prod(part.stop - part.start for part in region) * cell * self.dtype.itemsize
        if needed > self.max_nbytes:
            raise MemoryLimitError(
                f"{self.name} of {self.nbytes_stored} bytes decodes to {needed} bytes here, above the limit of "
                f"{self.max_nbytes}; give max_nbytes={needed} (--max-bytes {needed}) if you trust it, or a region"
            )

    def _steps(self, level: int) -> tuple[int, ...]:
        """Return the voxels of a cell of a level by axis, channels first."""
        if isinstance(level, bool) or not 0 <= level <= self.levels:
            raise InputError(f"level={level} must be in [0, {self.levels}]")
        return (1, *(1 << level if size > 1 else 1 for size in self._contents.shape))

    def _with_channels(self, sizes: tuple[int, ...], channels: int | None = None) -> tuple[int, ...]:
        axis, channels = self._contents.channel_axis, self._contents.channels if channels is None else channels
        return sizes if axis is None else (*sizes[:axis], channels, *sizes[axis:])

    def _channels_first(self, region: Region) -> Region:
        axis = self._contents.channel_axis
        if axis is None:
            return (slice(0, 1), *region)
        return (region[axis], *region[:axis], *region[axis + 1 :])

    def _channels_last(self, samples: np.ndarray) -> np.ndarray:
        """Move the channels from the first axis to that of the array."""
        axis = self._contents.channel_axis
        return samples[0] if axis is None else np.moveaxis(samples, 0, axis)

    def _first(self, samples: np.ndarray) -> np.ndarray:
        axis = self._contents.channel_axis
        return samples[None] if axis is None else np.moveaxis(samples, axis, 0)


def open_file(source: str | Path | bytes, *, partial: bool = False, max_nbytes: int | None = None) -> TincFile:
    """Open a `.tinc` file by its path or its bytes; the streams of a path are read when they are decoded.

    `max_nbytes` bounds the bytes that a call may decode to, as for `TincFile`.

    Raises FileNotFoundError, and TincFormatError for anything but a whole `.tinc` file, or with `partial` a beginning.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return TincFile(bytes(source), partial=partial, max_nbytes=max_nbytes)
    path = Path(source)
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise TincFormatError(f"{path} is empty")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return TincFile(content, name=str(path), partial=partial, max_nbytes=max_nbytes)
    except TincFormatError as error:
        raise TincFormatError(f"{path}: {error}") from error


def _reopen(source: Path | bytes, partial: bool, max_nbytes: int) -> TincFile:
    return open_file(source, partial=partial, max_nbytes=max_nbytes)


def decompress(source: str | Path | bytes, *, max_nbytes: int | None = None) -> np.ndarray:
    """Return the whole array of a `.tinc` file; see `open_file`."""
    return open_file(source, max_nbytes=max_nbytes).decode()


def _sum_cells(values: np.ndarray, steps: tuple[int, ...]) -> np.ndarray:
    for axis, step in enumerate(steps):
        if step > 1:
            values = np.add.reduceat(values, np.arange(0, values.shape[axis], step), axis=axis)
    return values


def _blend(working: np.ndarray, background: int, inside: np.ndarray, steps: tuple[int, ...]) -> np.ndarray:
    """Put the background outside of the mask; a cell mixes both by its voxels inside and outside, rounded half up."""
    if max(steps) == 1:
        return np.where(inside, working, background)
    share, count = (
        _sum_cells(voxels, steps) for voxels in (inside.astype(np.int64), np.ones(inside.shape, dtype=np.int64))
    )
    return (working * share + background * (count - share) + (count >> 1)) // count
