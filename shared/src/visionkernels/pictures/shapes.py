"""Shapes drawn on photographs: pictures whose every pixel has a known class and object, without a download."""

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision import tv_tensors

from visionkernels.checks import InputError
from visionkernels.samples import photographs

__all__ = ["NUM_PICTURES", "SHAPES", "check_classes", "draw_shapes", "read_shapes"]

SHAPES = ("background", "disc", "triangle", "square")
"""The classes of `draw_shapes`."""
NUM_PICTURES = {"train": 512, "validation": 32}
"""Number of images in each split of the set "shapes"."""


def draw_shapes(
    index: int, *, seed: int = 0, size: tuple[int, int] = (128, 160), max_shapes: int = 4
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.int64]]:
    """Draw one to `max_shapes` discs, triangles and squares on a piece of a photograph.

    Returns the picture [height, width, 3], what is visible of each shape as masks [N, height, width], and the classes
    [N], indices of `SHAPES`. A pixel belongs to a shape if its centre does; later shapes cover earlier ones, and none
    shows fewer than 16 pixels. The same `seed`, `index` and options give the same picture. Sides go up to 300.
    Needs `visionkernels[samples]`.
    """
    height, width = size
    if not (16 <= height <= 300 and 16 <= width <= 300):
        raise InputError(f"size={size} must be 16 to 300 pixels a side, what the smallest photograph has")
    random = np.random.default_rng([seed, index])
    photograph = _photographs()[random.integers(len(_photographs()))]
    top, left = (random.integers(side - want + 1) for side, want in zip(photograph.shape, size, strict=False))
    picture = photograph[top : top + height, left : left + width].copy()
    masks: list[NDArray[np.bool_]] = []
    kinds = random.integers(1, len(SHAPES), random.integers(1, max_shapes + 1))
    for kind in kinds:
        radius = random.uniform(0.12, 0.25) * min(size)
        centre = random.uniform(radius, np.array(size) - radius)
        shape = _inside(int(kind), centre, radius, random.uniform(0, 2 * np.pi), size)
        colour = random.integers(0, 96, 3)
        colour[kind - 1] = random.integers(160, 256)  # mostly red discs, green triangles, blue squares
        picture[shape] = np.clip(colour + random.normal(0, 12, (int(shape.sum()), 3)), 0, 255)
        masks = [earlier & ~shape for earlier in masks] + [shape]
    is_seen = np.array([mask.sum() >= 16 for mask in masks])
    return picture, np.stack(masks)[is_seen], kinds[is_seen]


def check_classes(num_classes: int) -> None:
    """Raise ValueError for fewer classes than the shapes have."""
    if num_classes < len(SHAPES):
        raise InputError(f"num_classes={num_classes} is too few for the {len(SHAPES)} of the shapes")


def read_shapes(split: str, index: int) -> tuple[tv_tensors.Image, NDArray[np.bool_], NDArray[np.int64]]:
    """Return picture `index` of "train" or "validation" [3, 128, 160], the masks and the classes of its shapes."""
    picture, masks, kinds = draw_shapes(index, seed=0 if split == "train" else 1)
    return tv_tensors.Image(torch.from_numpy(picture).permute(2, 0, 1)), masks, kinds


def _inside(
    kind: int, centre: NDArray[np.float64], radius: float, angle: float, size: tuple[int, int]
) -> NDArray[np.bool_]:
    """The pixels whose centres lie in the shape, whose corners lie on the circle of `radius`."""
    rows, columns = np.indices(size) + 0.5 - centre[:, None, None]
    distance, corners = np.hypot(rows, columns), {"triangle": 3, "square": 4}.get(SHAPES[kind])
    if corners is None:
        return distance <= radius
    half = np.pi / corners
    bearing = (np.arctan2(rows, columns) - angle) % (2 * half) - half
    return distance * np.cos(bearing) <= radius * np.cos(half)


@functools.cache
def _photographs() -> list[NDArray[np.uint8]]:
    return list(photographs().values())
