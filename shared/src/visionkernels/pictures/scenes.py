"""Pictures with a class for every pixel: ADE20K, Pascal VOC 2012, Cityscapes, and shapes drawn by us.

Transforms are those of torchvision.transforms.v2; random numbers come from torch's generator, which training seeds.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from visionkernels.checks import InputError
from visionkernels.pictures import shapes
from visionkernels.pictures.annotated import AnnotatedPictures, CorruptAnnotationError, types
from visionkernels.pictures.labelled import Split
from visionkernels.pictures.layouts import IGNORED, Layout, find_layout
from visionkernels.pictures.reading import open_picture, read_picture
from visionkernels.pictures.recipes import SceneRecipe

__all__ = ["IGNORED", "Scenes", "aligned_size", "open_scenes"]


class Scenes(AnnotatedPictures[Tensor]):
    """Pictures with a class for every pixel: item i is `transform(image uint8 [3, H, W], labels uint8 [H, W])`."""


def open_scenes(data: str | Path, split: Split, scene: SceneRecipe, *, num_classes: int) -> Scenes:
    """Open the pictures of one split for segmentation: random crops for "train", whole pictures for "validation".

    `data` is "shapes", or a folder in one of these layouts; class `IGNORED` counts for nothing.

    | like | pictures | annotations | classes |
    |---|---|---|---|
    | ADE20K | `images/training/*.jpg` (and `validation`) | `annotations/training/*.png` | label k - 1, 0 ignored |
    | VOC2012 | `JPEGImages`, listed in `ImageSets/Segmentation` | `SegmentationClass(Aug)` | label k, 255 ignored |
    | Cityscapes | `leftImg8bit/train/CITY` (and `val`) | `gtFine/train/CITY`, labelTrainIds or labelIds | the 19 |

    Raises FileNotFoundError for missing folders and annotations; reading raises CorruptPictureError, and
    CorruptAnnotationError for labels of classes that are none of the `num_classes`.
    """
    transform = _training_transform(scene) if split == "train" else _evaluation_transform(scene)
    if str(data) == "shapes":
        shapes.check_classes(num_classes)
        return Scenes(partial(_read_shapes, split), shapes.NUM_PICTURES[split], transform)
    layout = find_layout(data, split)
    return Scenes(partial(_read_scene, layout, num_classes), len(layout.pairs), transform)


def aligned_size(height: int, width: int, scene: SceneRecipe, scale: float = 1.0) -> tuple[int, int]:
    """Return the size at which a picture of height x width is evaluated, times `scale`.

    The shorter side becomes `short_side` unless the longer one would exceed `long_side`; then both are rounded up to
    `multiple`.
    """
    return tuple(-(-side // scene.multiple) * scene.multiple for side in _fitted(height, width, scene, scale))  # type: ignore[return-value]


def _fitted(height: int, width: int, scene: SceneRecipe, scale: float) -> tuple[int, int]:
    factor = scale * min(scene.short_side / min(height, width), scene.long_side / max(height, width))
    return max(round(height * factor), 1), max(round(width * factor), 1)


def _read_shapes(split: Split, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    image, masks, kinds = shapes.read_shapes(split, index)
    labels = (masks * kinds[:, None, None]).sum(0).astype(np.uint8)  # visible parts do not overlap
    return image, tv_tensors.Mask(torch.from_numpy(labels))


def _read_scene(layout: Layout, num_classes: int, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    file, annotation = layout.pairs[index]
    image = v2.functional.pil_to_tensor(read_picture(file))
    with open_picture(annotation, f"annotation {annotation}", CorruptAnnotationError) as opened:
        raw = _label_numbers(opened)
    if raw.shape != image.shape[1:]:
        raise CorruptAnnotationError(
            f"annotation {annotation} has shape {raw.shape}; its picture is {tuple(image.shape[1:])}"
        )
    labels = layout.classes[raw.clip(0, 255)]
    strange = raw[(raw > 255) | ((labels >= num_classes) & (labels != IGNORED))]
    if strange.size:
        raise CorruptAnnotationError(f"annotation {annotation} has label {strange[0]}; there are {num_classes} classes")
    return tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(labels))


def _label_numbers(opened: Image.Image) -> NDArray[np.int64]:
    """Return the number of every pixel. Raises InputError for colours and floating-point numbers."""
    if opened.mode not in ("1", "L", "P") and not opened.mode.startswith("I"):
        raise InputError(
            f"its mode is {opened.mode}; a pixel must hold the number of its class, as modes L, P and I;16 do"
        )
    return np.asarray(opened).astype(np.int64)


def _evaluation_transform(scene: SceneRecipe) -> v2.Compose:
    """To an image normalised by `scene`, and labels as int64."""
    return v2.Compose(
        [v2.ToDtype(types(torch.int64), scale=True), v2.Normalize(scene.mean, scene.std), v2.ToPureTensor()]
    )


def _training_transform(scene: SceneRecipe) -> v2.Compose:
    colours = {"brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.1}
    return v2.Compose(
        [
            _RandomScale(scene),
            _RandomCrop(scene),
            v2.RandomHorizontalFlip(),
            *(v2.RandomApply([v2.ColorJitter(**{name: amount})]) for name, amount in colours.items()),
            _evaluation_transform(scene),
        ]
    )


class _RandomScale(v2.Transform):  # type: ignore[misc]
    """Resize to the scene's size times a random factor of its range."""

    def __init__(self, scene: SceneRecipe) -> None:
        super().__init__()
        self.scene = scene

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = flat_inputs[0].shape[-2:]
        scale = float(torch.empty(()).uniform_(*self.scene.scale_range))
        return {"size": _fitted(height, width, self.scene, scale)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return v2.functional.resize(inpt, list(params["size"]), antialias=True)  # masks take the nearest pixel


class _RandomCrop(v2.Transform):  # type: ignore[misc]
    """Pad at the right and bottom to the crop's size, and crop where no class fills more than its share."""

    def __init__(self, scene: SceneRecipe) -> None:
        super().__init__()
        self.scene = scene

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        labels: Int[Tensor, "height width"] = next(item for item in flat_inputs if isinstance(item, tv_tensors.Mask))
        crop = self.scene.crop
        height, width = labels.shape[-2:]
        for _ in range(10):
            top, left = (int(torch.randint(max(side - crop, 0) + 1, ())) for side in (height, width))
            counts = torch.bincount(labels[top : top + crop, left : left + crop].flatten(), minlength=IGNORED + 1)
            counts = counts[:IGNORED]
            if 0 < counts.max() <= self.scene.max_class_share * counts.sum():
                break
        return {"top": top, "left": left, "padding": [0, 0, max(crop - width, 0), max(crop - height, 0)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        mean: Any = [round(255 * value) for value in self.scene.mean]
        fill = IGNORED if isinstance(inpt, tv_tensors.Mask) else mean
        padded = v2.functional.pad(inpt, params["padding"], fill=fill)
        return v2.functional.crop(padded, params["top"], params["left"], self.scene.crop, self.scene.crop)
