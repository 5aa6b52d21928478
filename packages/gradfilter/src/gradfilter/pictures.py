"""Pictures as a batch that a network takes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from timm.data import create_transform
from torch import Tensor

from visionkernels.pictures.reading import read_picture

__all__ = ["read_batch"]


def read_batch(paths: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Return pictures as [N, 3, *size], resized, cropped at the centre, and normalised as ImageNet is.

    Raises FileNotFoundError, and ValueError for files that are no pictures.
    """
    transform = create_transform((3, *size))
    return torch.stack([transform(read_picture(path)) for path in paths])
