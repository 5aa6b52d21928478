"""Pictures with a class for every pixel, or with boxes and masks of objects: ADE20K, COCO, and shapes drawn by us.

Transforms are those of torchvision.transforms.v2; random numbers come from torch's generator, which training seeds.
"""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from biformer.data import Split, read_picture
from biformer.dense_recipes import SceneRecipe
from visionkernels.extras import require
from visionkernels.samples import photographs

__all__ = [
    "IGNORED",
    "SHAPES",
    "ObjectPictures",
    "Scenes",
    "aligned_size",
    "draw_shapes",
    "open_objects",
    "open_scenes",
    "pair_up",
]

IGNORED = 255
"""The label of pixels that count for nothing."""
SHAPES = ("background", "disc", "triangle", "square")
"""The classes of `draw_shapes`."""

_NUM_SHAPES = {"train": 512, "validation": 32}


@dataclass(frozen=True)
class Scenes(Dataset):
    """Pictures with a class for every pixel: item i is `transform(image uint8 [3, H, W], labels uint8 [H, W])`."""

    read: Callable[[int], tuple[tv_tensors.Image, tv_tensors.Mask]]
    num_pictures: int
    transform: Callable[..., tuple[Tensor, Tensor]]

    def __len__(self) -> int:
        return self.num_pictures

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(*self.read(index))


@dataclass(frozen=True)
class ObjectPictures(Dataset):
    """Pictures with objects: item i is (image [3, H, W] in 0..1, target) after `transform`.

    A target holds `boxes` [N, 4] as left, top, right, bottom in pixels, `labels` [N], `iscrowd` [N], and `masks`
    [N, H, W] where the data has them.
    """

    read: Callable[[int], tuple[tv_tensors.Image, dict[str, Any]]]
    num_pictures: int
    transform: Callable[..., tuple[Tensor, dict[str, Tensor]]]

    def __len__(self) -> int:
        return self.num_pictures

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.transform(*self.read(index))


def open_scenes(data: str | Path, split: Split, scene: SceneRecipe, *, num_classes: int) -> Scenes:
    """Open the pictures of one split for segmentation: random crops for "train", whole pictures for "validation".

    `data` is a folder in the layout of ADE20K, `images/training/*.jpg` and `annotations/training/*.png` (and
    `validation`), with 0 in an annotation for pixels without a class and k for class k - 1; or "shapes".
    Raises FileNotFoundError for missing folders and annotations, and ValueError on reading a label above `num_classes`.
    """
    transform = _training_transform(scene) if split == "train" else _evaluation_transform(scene)
    if str(data) == "shapes":
        if num_classes < len(SHAPES):
            raise ValueError(f"num_classes={num_classes} is too few for the {len(SHAPES)} of the shapes")
        return Scenes(partial(_read_shape_scene, split), _NUM_SHAPES[split], transform)
    name = "training" if split == "train" else "validation"
    pictures, annotations = (Path(data) / kind / name for kind in ("images", "annotations"))
    files = sorted(pictures.glob("*.jpg"))
    if not files:
        raise FileNotFoundError(
            f"--data {data} has no pictures {pictures}/*.jpg; it must hold images/ and annotations/, "
            "each with training/ and validation/, or be shapes"
        )
    pairs = [(file, annotations / f"{file.stem}.png") for file in files]
    missing = [str(label) for _, label in pairs if not label.is_file()]
    if missing:
        raise FileNotFoundError(f"--data {data} lacks {len(missing)} annotations; the first is {missing[0]}")
    return Scenes(partial(_read_scene, pairs, num_classes), len(pairs), transform)


def open_objects(data: str | Path, split: Split, *, num_classes: int, has_masks: bool = True) -> ObjectPictures:
    """Open the pictures of one split for detection, in training mirrored at random.

    `data` is a folder in the layout of COCO, `train2017/`, `val2017/` and `annotations/instances_train2017.json` (and
    val), or "shapes". Labels are the category ids of the file; 0 is the background. Training leaves out crowds, boxes
    without area and pictures without objects. Raises FileNotFoundError, ImportError without pycocotools, and
    ValueError for a damaged file and for ids of `num_classes` or more.
    """
    is_train = split == "train"
    steps = [v2.RandomHorizontalFlip()] if is_train else []
    transform = v2.Compose([*steps, v2.ToDtype(_types(torch.uint8), scale=True), v2.ToPureTensor()])
    if str(data) == "shapes":
        if num_classes < len(SHAPES):
            raise ValueError(f"num_classes={num_classes} is too few for the {len(SHAPES)} of the shapes")
        return ObjectPictures(partial(_read_shape_objects, split), _NUM_SHAPES[split], transform)
    require("pycocotools", "biformer[dense]")
    name = "train2017" if is_train else "val2017"
    file = Path(data) / "annotations" / f"instances_{name}.json"
    for path in (Path(data) / name, file):
        if not path.exists():
            raise FileNotFoundError(f"--data {data} has no {path}; it must be in the layout of COCO, or be shapes")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # pycocotools reports there
            coco = CocoDetection(str(Path(data) / name), str(file))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AssertionError) as error:
        raise ValueError(f"{file} is no annotation file of COCO: {type(error).__name__} {error}") from error
    highest = max((category["id"] for category in coco.coco.dataset.get("categories", [])), default=0)
    if highest >= num_classes:
        raise ValueError(f"{file} has category id {highest}; num_classes={num_classes} must be above it")
    if is_train:
        coco.ids = [number for number in coco.ids if any(map(_is_usable, coco.coco.imgToAnns[number]))]
    keys = ["boxes", "labels", "iscrowd", *(["masks"] if has_masks else [])]
    wrapped = wrap_dataset_for_transforms_v2(coco, target_keys=keys)
    return ObjectPictures(partial(_read_coco, wrapped, is_train, has_masks), len(coco.ids), transform)


def pair_up(samples: Sequence[tuple[Tensor, Any]]) -> tuple[list[Tensor], list[Any]]:
    """Collate pictures of different sizes: a list of images and a list of targets."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def aligned_size(height: int, width: int, scene: SceneRecipe, scale: float = 1.0) -> tuple[int, int]:
    """Return the size at which a picture of height x width is evaluated, times `scale`.

    The shorter side becomes `short_side` unless the longer one would exceed `long_side`; then both are rounded up to
    `multiple`.
    """
    return tuple(-(-side // scene.multiple) * scene.multiple for side in _fitted(height, width, scene, scale))  # type: ignore[return-value]


def _fitted(height: int, width: int, scene: SceneRecipe, scale: float) -> tuple[int, int]:
    factor = scale * min(scene.short_side / min(height, width), scene.long_side / max(height, width))
    return max(round(height * factor), 1), max(round(width * factor), 1)


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
        raise ValueError(f"size={size} must be 16 to 300 pixels a side, what the smallest photograph has")
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


def _read_shapes(split: Split, index: int) -> tuple[tv_tensors.Image, NDArray[np.bool_], NDArray[np.int64]]:
    picture, masks, kinds = draw_shapes(index, seed=0 if split == "train" else 1)
    return tv_tensors.Image(torch.from_numpy(picture).permute(2, 0, 1)), masks, kinds


def _read_shape_scene(split: Split, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    image, masks, kinds = _read_shapes(split, index)
    labels = (masks * kinds[:, None, None]).sum(0).astype(np.uint8)  # visible parts do not overlap
    return image, tv_tensors.Mask(torch.from_numpy(labels))


def _read_shape_objects(split: Split, index: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
    image, masks, kinds = _read_shapes(split, index)
    tensor = torch.from_numpy(masks)
    boxes = masks_to_boxes(tensor) + torch.tensor([0, 0, 1, 1])  # of the pixels' outer edges
    return image, _target(boxes, torch.from_numpy(kinds), tensor, image)


def _target(boxes: Tensor, labels: Tensor, masks: Tensor | None, image: Tensor) -> dict[str, Any]:
    canvas_size = (image.shape[-2], image.shape[-1])
    target: dict[str, Any] = {
        "boxes": tv_tensors.BoundingBoxes(boxes.float(), format="XYXY", canvas_size=canvas_size),
        "labels": labels,
        "iscrowd": torch.zeros_like(labels),
    }
    return target if masks is None else target | {"masks": tv_tensors.Mask(masks.to(torch.uint8))}


def _read_scene(
    pairs: Sequence[tuple[Path, Path]], num_classes: int, index: int
) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    file, annotation = pairs[index]
    image = v2.functional.pil_to_tensor(read_picture(file))
    try:
        with Image.open(annotation) as opened:
            raw = np.asarray(opened)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"annotation {annotation} cannot be read: {str(error).splitlines()[0]}") from error
    if raw.ndim != 2 or raw.shape != image.shape[1:]:
        raise ValueError(f"annotation {annotation} has shape {raw.shape}; its picture is {tuple(image.shape[1:])}")
    if raw.max() > num_classes:
        raise ValueError(f"annotation {annotation} has label {raw.max()}; there are {num_classes} classes")
    labels = raw.astype(np.uint8) - np.uint8(1)  # 0, no class, becomes 255
    return tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(labels))


def _is_usable(annotation: dict[str, Any]) -> bool:
    return not annotation.get("iscrowd", 0) and min(annotation["bbox"][2:]) > 0


def _read_coco(wrapped: Any, is_train: bool, has_masks: bool, index: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
    picture, found = wrapped[index]
    image = tv_tensors.Image(v2.functional.pil_to_tensor(picture))
    if "boxes" not in found:
        masks = torch.zeros(0, *image.shape[1:]) if has_masks else None
        return image, _target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), masks, image)
    target = _target(found["boxes"], found["labels"], found.get("masks"), image)
    target["iscrowd"] = torch.tensor(found["iscrowd"])
    if not is_train:
        return image, target
    boxes = target["boxes"]
    is_kept = (target["iscrowd"] == 0) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    return image, {key: tv_tensors.wrap(value[is_kept], like=value) for key, value in target.items()}


def _types(mask: torch.dtype) -> dict[Any, torch.dtype | None]:
    return {tv_tensors.Image: torch.float32, tv_tensors.Mask: mask, "others": None}


def _evaluation_transform(scene: SceneRecipe) -> v2.Compose:
    """To an image normalised by `scene`, and labels as int64."""
    return v2.Compose(
        [v2.ToDtype(_types(torch.int64), scale=True), v2.Normalize(scene.mean, scene.std), v2.ToPureTensor()]
    )


def _training_transform(scene: SceneRecipe) -> v2.Compose:
    colours = {"brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.05}
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
        labels: Int[Tensor, "height width"] = next(each for each in flat_inputs if isinstance(each, tv_tensors.Mask))
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
