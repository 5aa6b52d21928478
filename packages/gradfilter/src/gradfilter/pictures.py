"""Pictures as a batch that a network takes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from visionkernels.pictures.reading import read_picture

__all__ = ["read_batch"]


def read_batch(paths: Sequence[Path], size: tuple[int, int], model: nn.Module) -> Tensor:
    """Return pictures as [N, 3, *size], resized, cropped at the centre, and normalised for `model`.

    A model that does not say how gets pictures as ImageNet's. Raises FileNotFoundError, and ValueError for files that
    are no pictures.
    """
    config = resolve_model_data_config(model) | {"input_size": (3, *size)}
    transform = create_transform(**config)
    return torch.stack([transform(read_picture(path)) for path in paths])
