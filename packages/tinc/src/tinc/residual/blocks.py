"""The cut of a volume [channels, ...] into tiles of blocks. A tile has a stream of its own, and is decoded alone."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

__all__ = ["Blocks", "cut"]

TILE_VOXELS = 1 << 19


@dataclass(frozen=True)
class Blocks:
    """Blocks and tiles of a volume, along the axis of channels too."""

    extent: tuple[int, ...]
    """Sizes of the volume."""
    block: tuple[int, ...]
    """Voxels of a block by axis: 1, 2, 4, 8, 16 or 32."""
    tile: tuple[int, ...]
    """Blocks of a tile by axis."""

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Tiles by axis."""
        return tuple(-(-n // (b * t)) for n, b, t in zip(self.extent, self.block, self.tile, strict=True))

    @property
    def num_tiles(self) -> int:
        """Number of tiles, which are numbered in row-major order."""
        return math.prod(self.counts)

    def grid(self, tile: int) -> tuple[int, ...]:
        """Return the blocks of a tile by axis; the last tile of an axis may have fewer."""
        return tuple(
            min(t, -(-n // b) - place * t)
            for place, n, b, t in zip(self.place(tile), self.extent, self.block, self.tile, strict=True)
        )

    def place(self, tile: int) -> tuple[int, ...]:
        """Return the place of a tile among the tiles."""
        return tuple(int(index) for index in np.unravel_index(tile, self.counts))

    def box(self, tile: int) -> tuple[slice, ...]:
        """Return the part of the volume that a tile covers, without the margin that fills its last blocks."""
        sizes = [b * t for b, t in zip(self.block, self.tile, strict=True)]
        return tuple(
            slice(place * size, min((place + 1) * size, n))
            for place, size, n in zip(self.place(tile), sizes, self.extent, strict=True)
        )

    def touching(self, region: Sequence[slice]) -> Iterator[int]:
        """Yield the tiles that a region touches."""
        sizes = [b * t for b, t in zip(self.block, self.tile, strict=True)]
        ranges = [range(part.start // s, -(-part.stop // s)) for part, s in zip(region, sizes, strict=True)]
        for place in product(*ranges):
            yield int(np.ravel_multi_index(place, self.counts))


def cut(extent: tuple[int, ...], block: Sequence[int]) -> Blocks:
    """Return tiles of about 2**19 voxels, near to cubes, for blocks of these sizes along the axes after channels."""
    counts = [-(-size // b) for size, b in zip(extent[1:], block, strict=True)]
    tile, channels = list(counts), extent[0]
    while channels * math.prod(t * b for t, b in zip(tile, block, strict=True)) > TILE_VOXELS:
        axis = max(range(len(tile)), key=lambda axis: (tile[axis] > 1, tile[axis] * block[axis]))
        if tile[axis] > 1:
            tile[axis] = -(-tile[axis] // 2)
        elif channels > 1:
            channels = -(-channels // 2)
        else:
            break
    return Blocks(extent, (1, *block), (channels, *tile))
