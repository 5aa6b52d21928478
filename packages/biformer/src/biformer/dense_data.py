"""Pictures with a class for every pixel, or with boxes and masks of objects: ADE20K, COCO, and shapes drawn by us.

Transforms are those of torchvision.transforms.v2; random numbers come from torch's generator, which training seeds.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import box_convert, masks_to_boxes
from torchvision.transforms import v2

from biformer.data import CorruptPictureError, Split, read_picture
from biformer.dense_recipes import SceneRecipe
from visionkernels.extras import require
from visionkernels.samples import photographs

__all__ = [
    "IGNORED",
    "SHAPES",
    "CorruptAnnotationError",
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


Annotation = TypeVar("Annotation")


class CorruptAnnotationError(CorruptPictureError):
    """An annotation that cannot be read, or does not fit its picture or the classes."""


@dataclass(frozen=True)
class _Pictures(Dataset[tuple[Tensor, Annotation]], Generic[Annotation]):
    read: Callable[[int], tuple[tv_tensors.Image, Any]]
    num_pictures: int
    transform: Callable[..., tuple[Tensor, Annotation]]

    def __len__(self) -> int:
        return self.num_pictures

    def __getitem__(self, index: int) -> tuple[Tensor, Annotation]:
        # the range ends iteration, and lets negative indices count from the end
        return self.transform(*self.read(range(self.num_pictures)[index]))


class Scenes(_Pictures[Tensor]):
    """Pictures with a class for every pixel: item i is `transform(image uint8 [3, H, W], labels uint8 [H, W])`."""


class ObjectPictures(_Pictures[dict[str, Tensor]]):
    """Pictures with objects: item i is (image [3, H, W] in 0..1, target) after `transform`.

    A target holds `boxes` [N, 4] as left, top, right, bottom in pixels, `labels` [N], `iscrowd` [N], and `masks`
    [N, H, W] where they are asked for.
    """


def open_scenes(data: str | Path, split: Split, scene: SceneRecipe, *, num_classes: int) -> Scenes:
    """Open the pictures of one split for segmentation: random crops for "train", whole pictures for "validation".

    `data` is a folder in the layout of ADE20K, `images/training/*.jpg` and `annotations/training/*.png` (and
    `validation`), with 0 in an annotation for pixels without a class and k for class k - 1; or "shapes".
    Raises FileNotFoundError for missing folders and annotations; reading raises CorruptPictureError, and
    CorruptAnnotationError for labels above `num_classes` too.
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
    _require_files(data, "annotations", [annotation for _, annotation in pairs])
    return Scenes(partial(_read_scene, pairs, num_classes), len(pairs), transform)


def open_objects(data: str | Path, split: Split, *, num_classes: int, has_masks: bool = True) -> ObjectPictures:
    """Open the pictures of one split for detection, in training mirrored at random.

    `data` is a folder in the layout of COCO, `train2017/`, `val2017/` and `annotations/instances_train2017.json` (and
    val), or "shapes". Labels are the category ids of the file; 0 is the background. Training leaves out crowds, boxes
    of less than a pixel a side and pictures without objects. Raises FileNotFoundError, ImportError without
    pycocotools, and ValueError for a damaged file, one without objects, and category ids other than 1 to
    `num_classes` - 1; reading raises CorruptPictureError, and CorruptAnnotationError for a picture of another size.
    """
    is_train = split == "train"
    steps = [v2.RandomHorizontalFlip()] if is_train else []
    transform = v2.Compose([*steps, v2.ToDtype(_types(torch.uint8), scale=True), v2.ToPureTensor()])
    if str(data) == "shapes":
        if num_classes < len(SHAPES):
            raise ValueError(f"num_classes={num_classes} is too few for the {len(SHAPES)} of the shapes")
        return ObjectPictures(partial(_read_shape_objects, split, has_masks), _NUM_SHAPES[split], transform)
    name = "train2017" if is_train else "val2017"
    folder, file = Path(data) / name, Path(data) / "annotations" / f"instances_{name}.json"
    for path in (folder, file):
        if not path.exists():
            raise FileNotFoundError(f"--data {data} has no {path}; it must be in the layout of COCO, or be shapes")
    coco = _open_coco(file, num_classes=num_classes, has_masks=has_masks)
    with_objects = {each["image_id"] for each in coco.dataset["annotations"] if _is_usable(each)}
    numbers = [number for number in sorted(coco.imgs) if not is_train or number in with_objects]
    if not with_objects.intersection(numbers):
        raise ValueError(f"{file} has no objects of a pixel or more a side in its pictures")
    _require_files(data, "pictures", [folder / coco.imgs[number]["file_name"] for number in numbers])
    return ObjectPictures(partial(_read_coco, coco, folder, numbers, is_train, has_masks), len(numbers), transform)


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


def _read_shape_objects(split: Split, has_masks: bool, index: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
    image, masks, kinds = _read_shapes(split, index)
    tensor = torch.from_numpy(masks)
    boxes = masks_to_boxes(tensor) + torch.tensor([0, 0, 1, 1])  # of the pixels' outer edges
    labels = torch.from_numpy(kinds)
    return image, _target(image, boxes, labels, torch.zeros_like(labels), tensor if has_masks else None)


def _target(image: Tensor, boxes: Tensor, labels: Tensor, is_crowd: Tensor, masks: Tensor | None) -> dict[str, Any]:
    canvas_size = (image.shape[-2], image.shape[-1])
    target: dict[str, Any] = {
        "boxes": tv_tensors.BoundingBoxes(boxes.float(), format="XYXY", canvas_size=canvas_size),
        "labels": labels,
        "iscrowd": is_crowd,
    }
    return target if masks is None else target | {"masks": tv_tensors.Mask(masks.to(torch.uint8))}


def _require_files(data: str | Path, what: str, files: Sequence[Path]) -> None:
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"--data {data} lacks {len(missing)} {what}; the first is {missing[0]}")


def _read_scene(
    pairs: Sequence[tuple[Path, Path]], num_classes: int, index: int
) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    file, annotation = pairs[index]
    image = v2.functional.pil_to_tensor(read_picture(file))
    try:
        with Image.open(annotation) as opened:
            raw = np.asarray(opened)
    except (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).partition("\n")[0]
        raise CorruptAnnotationError(f"annotation {annotation} cannot be read: {reason}") from error
    if raw.shape != image.shape[1:]:
        raise CorruptAnnotationError(
            f"annotation {annotation} has shape {raw.shape}; its picture is {tuple(image.shape[1:])}"
        )
    if raw.max() > num_classes:
        raise CorruptAnnotationError(f"annotation {annotation} has label {raw.max()}; there are {num_classes} classes")
    labels = raw.astype(np.uint8) - np.uint8(1)  # 0, no class, becomes 255
    return tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(labels))


def _open_coco(file: Path, *, num_classes: int, has_masks: bool) -> Any:
    """Read a file of COCO, and see that its annotations have what training reads of them."""
    pycocotools = require("pycocotools.coco", "biformer[dense]")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # pycocotools reports there
            coco = pycocotools.COCO(str(file))
        annotations, images = coco.dataset["annotations"], coco.imgs.values()
        boxes = np.array([each["bbox"] for each in annotations], dtype=np.float64)
        labels = {each["category_id"] for each in annotations}
        unlike = [
            each for each in images if not (isinstance(each["file_name"], str) and each["height"] * each["width"])
        ]
        empty = [each["id"] for each in annotations if has_masks and not each["segmentation"]]
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"{file} is no annotation file of COCO: {type(error).__name__} {error}") from error
    if unlike:
        raise ValueError(f"{file} has an image without name or size: {unlike[0]}")
    if len(boxes) and (boxes.shape[1:] != (4,) or not np.isfinite(boxes).all()):
        raise ValueError(f"{file} has a bbox that is not four numbers: left, top, width, height")
    if strange := [each for each in labels if not (isinstance(each, int) and 0 < each < num_classes)]:
        raise ValueError(
            f"{file} has category id {strange[0]!r}; num_classes={num_classes} allows 1 to {num_classes - 1}"
        )
    if empty:
        raise ValueError(f"{file} has annotation {empty[0]} without segmentation, which masks need")
    return coco


def _is_usable(annotation: dict[str, Any]) -> bool:
    return not annotation.get("iscrowd", 0) and min(annotation["bbox"][2:]) >= 1


def _read_coco(
    coco: Any, folder: Path, numbers: Sequence[int], is_train: bool, has_masks: bool, index: int
) -> tuple[tv_tensors.Image, dict[str, Any]]:
    stated = coco.imgs[numbers[index]]
    file, size = folder / stated["file_name"], (stated["height"], stated["width"])
    image = tv_tensors.Image(v2.functional.pil_to_tensor(read_picture(file)))
    if image.shape[1:] != size:
        raise CorruptAnnotationError(f"picture {file} is {tuple(image.shape[1:])}; its annotations are for {size}")
    found = [each for each in coco.imgToAnns.get(numbers[index], ()) if not is_train or _is_usable(each)]
    boxes = torch.tensor([each["bbox"] for each in found], dtype=torch.float32).reshape(-1, 4)
    labels, is_crowd = (
        torch.tensor([each.get(key, 0) for each in found], dtype=torch.int64) for key in ("category_id", "iscrowd")
    )
    masks = None
    if has_masks:
        masks = torch.from_numpy(np.array([coco.annToMask(each) for each in found], np.uint8).reshape(-1, *size))
    return image, _target(image, box_convert(boxes, "xywh", "xyxy"), labels, is_crowd, masks)


def _types(mask: torch.dtype) -> dict[Any, torch.dtype | None]:
    return {tv_tensors.Image: torch.float32, tv_tensors.Mask: mask, "others": None}


def _evaluation_transform(scene: SceneRecipe) -> v2.Compose:
    """To an image normalised by `scene`, and labels as int64."""
    return v2.Compose(
        [v2.ToDtype(_types(torch.int64), scale=True), v2.Normalize(scene.mean, scene.std), v2.ToPureTensor()]
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
