"""Image files as a batch for a network."""

from collections.abc import Sequence
from pathlib import Path

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from visionkernels.pictures.reading import read_picture

__all__ = ["read_batch"]


def read_batch(paths: Sequence[Path], size: tuple[int, int], model: nn.Module) -> Tensor:
    """Return images as [N, 3, *size], resized, cropped at the centre, and normalised for `model`.

    A model without its own statistics gets those of ImageNet. Raises FileNotFoundError, and ValueError for files that
    are not images.
    """
    config = resolve_model_data_config(model) | {"input_size": (3, *size)}
    transform = create_transform(**config)
    return torch.stack([transform(read_picture(path)) for path in paths])
