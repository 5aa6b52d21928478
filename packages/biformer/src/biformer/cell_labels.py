"""Stored labels of the cells of training images, for token labelling."""

import random
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import roi_align
from torchvision.transforms.functional import resized_crop

from visionkernels.checks import InputError
from visionkernels.pictures.labelled import LabelledPictures
from visionkernels.pictures.recipes import AugmentationRecipe, PictureRecipe
from visionkernels.pictures.transforms import training_steps

__all__ = ["CellLabelledPictures", "crop_label_map", "read_label_map"]


@dataclass(frozen=True)
class CellLabelledPictures(Dataset):
    """Training images with stored labels of their cells: item i is (image, class, cell labels [rows, columns, K])."""

    pictures: LabelledPictures
    label_maps: Path
    """Folder with `CLASS/NAME.npz` for the image `CLASS/NAME.jpg`: see `read_label_map`."""
    recipe: PictureRecipe
    augmentation: AugmentationRecipe

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
        picture = self.pictures.picture(index)
        path = Path(self.pictures.describe(index))
        classes, scores = read_label_map(self.label_maps / path.parent.name / f"{path.stem}.npz")
        # timm's cropping and flipping, but with the box known
        first, augment, normalise = training_steps(self.recipe, self.augmentation)
        crop = first.transforms[0]
        top, left, height, width = crop.get_params(picture, crop.scale, crop.ratio)
        is_flipped = random.random() < 0.5
        across, down = picture.width, picture.height
        cells = crop_label_map(
            classes,
            scores,
            (left / across, top / down, (left + width) / across, (top + height) / down),
            grid=(self.recipe.size // 32, self.recipe.size // 32),
            num_classes=len(self.pictures.class_names),
            is_flipped=is_flipped,
        )
        picture = resized_crop(picture, top, left, height, width, list(crop.size), crop.interpolation)
        picture = ImageOps.mirror(picture) if is_flipped else picture
        return normalise(augment(picture)), self.pictures.labels[index], cells


def read_label_map(path: Path) -> tuple[Int[Tensor, "k height width"], Float[Tensor, "k height width"]]:
    """Read the stored labels of an image, an .npz file with `classes` (integers) and `scores` (probabilities).

    Both are [k, height, width]: the k best classes at each place of a coarse grid over the whole image. Raises
    FileNotFoundError, and ValueError for a file without the two.
    """
    if not path.is_file():
        raise FileNotFoundError(f"label map {path} is not a file")
    try:
        with np.load(path) as stored:
            classes, scores = stored["classes"].astype(np.int64), stored["scores"].astype(np.float32)
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"label map {path} must be .npz with classes and scores: {error}") from error
    if classes.ndim != 3 or classes.shape != scores.shape:
        raise InputError(
            f"label map {path} has classes {classes.shape}, scores {scores.shape}; expected [k, h, w] both"
        )
    return torch.from_numpy(classes), torch.from_numpy(scores)


def crop_label_map(
    classes: Int[Tensor, "k height width"],
    scores: Float[Tensor, "k height width"],
    box: tuple[float, float, float, float],
    *,
    grid: tuple[int, int],
    num_classes: int,
    is_flipped: bool = False,
) -> Float[Tensor, "rows columns classes"]:
    """Return the class probabilities of the cells of a crop, from the stored map of an image's best k classes.

    `box` is (left, top, right, bottom) as fractions of the image; cells are averaged by RoIAlign. Probability that the
    scores of a cell leave out is spread evenly over all classes.
    """
    height, width = classes.shape[-2:]
    dense = scores.new_zeros(num_classes, height, width).scatter_add_(0, classes.long(), scores)
    left, top, right, bottom = box
    corners = torch.tensor([[left * width, top * height, right * width, bottom * height]], dtype=dense.dtype)
    cells = roi_align(dense[None], [corners], grid, aligned=True)[0].permute(1, 2, 0)
    cells = cells + (1 - cells.sum(-1, keepdim=True)).clamp_min(0) / num_classes
    cells = cells / cells.sum(-1, keepdim=True)
    return cells.flip(1) if is_flipped else cells
