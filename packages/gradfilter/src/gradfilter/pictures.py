"""Pictures as a batch that a network takes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

__all__ = ["read_batch"]


def read_batch(paths: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Return pictures as [N, 3, *size], resized, cropped at the centre, and normalised as ImageNet is.

    Raises FileNotFoundError, and ValueError for files that are no pictures.
    """
    transform = create_transform((3, *size))
    images = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"picture {path} is not a file")
        try:
            with Image.open(path) as picture:
                images.append(transform(picture.convert("RGB")))
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"picture {path} cannot be read: {str(error).partition(chr(10))[0]}") from error
    return torch.stack(images)
