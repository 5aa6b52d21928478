"""The common part of images with a class per pixel and of images with objects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from visionkernels.pictures.reading import CorruptPictureError

__all__ = ["AnnotatedPictures", "CorruptAnnotationError", "require_files", "types"]

Annotation = TypeVar("Annotation")


class CorruptAnnotationError(CorruptPictureError):
    """An annotation that cannot be read, or does not fit its picture or the classes."""


@dataclass(frozen=True)
class AnnotatedPictures(Dataset[tuple[Tensor, Annotation]], Generic[Annotation]):
    """Item i is `transform(*read(i))`: an image and its annotation."""

    read: Callable[[int], tuple[tv_tensors.Image, Any]]
    num_pictures: int
    transform: Callable[..., tuple[Tensor, Annotation]]

    def __len__(self) -> int:
        return self.num_pictures

    def __getitem__(self, index: int) -> tuple[Tensor, Annotation]:
        # the range ends iteration, and lets negative indices count from the end
        return self.transform(*self.read(range(self.num_pictures)[index]))


def require_files(data: str | Path, what: str, files: Sequence[Path]) -> None:
    """Raise FileNotFoundError that counts the missing `files` of `data` and names the first."""
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"--data {data} lacks {len(missing)} {what}; the first is {missing[0]}")


def types(mask: torch.dtype) -> dict[Any, torch.dtype | None]:
    """Return what `ToDtype` makes of images (float32), masks, and the rest (as it is)."""
    return {tv_tensors.Image: torch.float32, tv_tensors.Mask: mask, "others": None}
