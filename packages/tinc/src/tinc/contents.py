"""Everything that a file holds, before it is bytes: the layers' parameters, and their coded streams."""

from dataclasses import dataclass, field

from tinc.residual.blocks import Blocks
from tinc.residual.quantizer import Quantizer
from tinc.signal import SampleFormat
from tinc.tree.shape import TreeShape

__all__ = ["Contents", "ExactSection", "ResidualSection", "TreeSection"]


@dataclass(frozen=True)
class TreeSection:
    """The shape of a tree, and the parameters of its layers, from the root on."""

    shape: TreeShape
    multipliers: tuple[int, ...]
    shifts: tuple[int, ...]
    spreads: bytes
    """Two for each layer: of its weights, and of its biases."""
    base: int
    """Added to the output of the last layer, in working units."""


@dataclass(frozen=True)
class ResidualSection:
    """The blocks and the quantiser of a residual layer."""

    blocks: Blocks
    quantizer: Quantizer
    background: int | None = None
    """Value of the voxels outside of the mask, in working units; None without a mask."""


@dataclass(frozen=True)
class ExactSection:
    """The grid of an exact layer, and its boxes."""

    kind: str
    """"step", "palette" or "bits"."""
    step: float
    offset: float
    palette_size: int
    blocks: Blocks


@dataclass(frozen=True)
class Contents:
    """What a file holds; the streams are those of the tree, of the palette, and of all tiles, in this order."""

    shape: tuple[int, ...]
    """Sizes of the axes, without channels."""
    channels: int
    channel_axis: int | None
    format: SampleFormat
    tree: TreeSection | None = None
    residual: ResidualSection | None = None
    exact: ExactSection | None = None
    metadata: bytes = b""
    """A JSON object in UTF-8, or nothing."""
    streams: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def num_streams(self) -> int:
        """Number of streams that these layers have, whether or not `streams` holds them."""
        count = int(self.tree is not None)
        if self.exact is not None:
            return count + (self.exact.kind == "palette") + self.exact.blocks.num_tiles
        return count + (0 if self.residual is None else self.residual.blocks.num_tiles)
