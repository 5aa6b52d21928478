"""The exact layer of a file: samples, or what a tree leaves of them, on a grid of allowed error."""

from collections.abc import Sequence
from dataclasses import replace

from tinc.contents import Contents, ExactSection
from tinc.encoding.job import Job
from tinc.encoding.tree_layer import with_tree
from tinc.exact import PaletteGrid, StepGrid, choose_grid, encode_box, encode_palette
from tinc.residual.blocks import cut
from tinc.tree.quantized import QuantizedTree

__all__ = ["exact_contents", "may_fit_exactly"]

# samples from which a size is estimated: the coder has then learnt its statistics
_ESTIMATED_FROM = 24**3


def exact_contents(job: Job, max_error: float, tree: QuantizedTree | None) -> Contents:
    """Return contents whose samples differ by at most `max_error`."""
    signal = job.signal
    grid = choose_grid(signal.samples, max_error)
    numbers = grid.numbers(signal.samples)
    contents = job.contents
    if tree is not None:
        contents = with_tree(contents, tree)
        numbers = numbers - grid.numbers(signal.format.to_samples(tree.decode(signal.box)))
    blocks = cut(signal.extent, (1,) * (len(signal.extent) - 1))
    kind, step, offset, palette, streams = "bits", 1.0, 0.0, 0, contents.streams
    if isinstance(grid, StepGrid):
        kind, step, offset = "step", grid.step, grid.offset
    elif isinstance(grid, PaletteGrid):
        kind, palette, streams = "palette", len(grid.values), (*streams, encode_palette(grid.values))
    section = ExactSection(kind, step, offset, palette, blocks)
    boxes = [encode_box(numbers[blocks.box(tile)]) for tile in range(blocks.num_tiles)]
    return replace(contents, exact=section, streams=(*streams, *boxes))


def may_fit_exactly(job: Job, size: int) -> bool:
    """Estimate from a box in the middle whether a lossless file has at most about `size` bytes."""
    samples = job.signal.samples
    part = samples[(slice(None), *_middle(samples.shape[1:], _ESTIMATED_FROM // len(samples)))]
    coded = len(encode_box(choose_grid(part, 0).numbers(part)))
    # a vain attempt costs a twentieth of the search for lossy contents
    return coded * samples.size < 2 * size * part.size


def _middle(extent: Sequence[int], count: int) -> tuple[slice, ...]:
    """Return a box in the middle of about `count` elements, as near to a cube as the axes allow."""
    sides = [0] * len(extent)
    for left, axis in enumerate(sorted(range(len(extent)), key=lambda axis: extent[axis])):
        side = round(max(1, count) ** (1 / (len(extent) - left)))
        sides[axis] = min(extent[axis], max(1, side))
        count //= sides[axis]
    return tuple(slice((n - side) // 2, (n + side) // 2) for n, side in zip(extent, sides, strict=True))
