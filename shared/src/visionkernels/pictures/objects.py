"""Pictures with boxes, classes and masks of objects: folders in the layout of COCO, and shapes drawn by us."""

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.ops import box_convert, masks_to_boxes
from torchvision.transforms import v2

from visionkernels.checks import InputError
from visionkernels.extras import require
from visionkernels.pictures import shapes
from visionkernels.pictures.annotated import AnnotatedPictures, CorruptAnnotationError, require_files, types
from visionkernels.pictures.labelled import Split
from visionkernels.pictures.reading import read_picture

__all__ = ["ObjectPictures", "boxes_of_masks", "collate_detection", "open_objects"]

_log = logging.getLogger(__name__)

# the parts of a file whose items have an id each
_NUMBERED = ("images", "annotations", "categories")


@dataclass(frozen=True)
class ObjectPictures(AnnotatedPictures[dict[str, Tensor]]):
    """Pictures with objects: item i is (image [3, H, W] in 0..1, target) after `transform`.

    A target holds `boxes` [N, 4] as left, top, right, bottom in pixels, `labels` [N], `iscrowd` [N], and `masks`
    [N, H, W] where they are asked for.
    """

    category_ids: tuple[int, ...] | None = None
    """COCO's id of each label from 1, where labels are the places of these ids."""


def open_objects(
    data: str | Path,
    split: Split,
    *,
    num_classes: int,
    has_masks: bool = True,
    is_ranked: bool = False,
    steps: Sequence[nn.Module] = (),
) -> ObjectPictures:
    """Open the pictures of one split for detection, in training mirrored at random and then changed by `steps`.

    `data` is a folder in the layout of COCO, `train2017/`, `val2017/` and `annotations/instances_train2017.json` (and
    val), or "shapes". Labels are the category ids of the file or, with `is_ranked`, the places of these ids in rising
    order from 1, as detectron2 numbers them; 0 is the background. Boxes are cut at the edges of their pictures; objects
    outside, and those of images that the file does not list, are left out, and a warning says how many. Training leaves
    out crowds, boxes of less than a pixel a side and pictures without objects. Raises FileNotFoundError, ImportError
    without pycocotools, and ValueError for a damaged file, one without objects, ids that occur twice, and labels other
    than 1 to `num_classes` - 1; reading raises CorruptPictureError, and CorruptAnnotationError for a picture of another
    size.
    """
    is_train = split == "train"
    changes = [v2.RandomHorizontalFlip(), *steps] if is_train else []
    transform = v2.Compose([*changes, v2.ToDtype(types(torch.uint8), scale=True), v2.ToPureTensor()])
    if str(data) == "shapes":
        shapes.check_classes(num_classes)
        return ObjectPictures(partial(_read_shapes, split, has_masks), shapes.NUM_PICTURES[split], transform)
    name = "train2017" if is_train else "val2017"
    folder, file = Path(data) / name, Path(data) / "annotations" / f"instances_{name}.json"
    for path in (folder, file):
        if not path.exists():
            raise FileNotFoundError(f"--data {data} has no {path}; it must be in the layout of COCO, or be shapes")
    coco = _open_coco(file, num_classes=num_classes, has_masks=has_masks, is_ranked=is_ranked)
    with_objects = {item["image_id"] for item in coco.dataset["annotations"] if _is_usable(item)}
    numbers = [number for number in sorted(coco.imgs) if not is_train or number in with_objects]
    if not with_objects.intersection(numbers):
        raise InputError(f"{file} has no objects of a pixel or more a side in its pictures")
    require_files(data, "pictures", [folder / coco.imgs[number]["file_name"] for number in numbers])
    category_ids = tuple(sorted(coco.cats)) if is_ranked else None
    read = partial(_read_coco, coco, folder, numbers, is_train, has_masks)
    return ObjectPictures(read, len(numbers), transform, category_ids)


def collate_detection(samples: Sequence[tuple[Tensor, Any]]) -> tuple[list[Tensor], list[Any]]:
    """Collate pictures of different sizes: a list of images and a list of targets."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def _read_shapes(split: Split, has_masks: bool, index: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
    image, masks, kinds = shapes.read_shapes(split, index)
    tensor = torch.from_numpy(masks)
    boxes = boxes_of_masks(tensor)
    labels = torch.from_numpy(kinds)
    return image, _target(image, boxes, labels, torch.zeros_like(labels), tensor if has_masks else None)


def boxes_of_masks(masks: Tensor) -> Tensor:
    """Return the boxes [N, 4] around the outer edges of the pixels of masks [N, H, W]."""
    return masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])


def _target(image: Tensor, boxes: Tensor, labels: Tensor, is_crowd: Tensor, masks: Tensor | None) -> dict[str, Any]:
    canvas_size = (image.shape[-2], image.shape[-1])
    target: dict[str, Any] = {
        "boxes": tv_tensors.BoundingBoxes(boxes.float(), format="XYXY", canvas_size=canvas_size),
        "labels": labels,
        "iscrowd": is_crowd,
    }
    return target if masks is None else target | {"masks": tv_tensors.Mask(masks.to(torch.uint8))}


def _open_coco(file: Path, *, num_classes: int, has_masks: bool, is_ranked: bool) -> Any:
    """Read a file of COCO, and see that its annotations have what training reads of them."""
    pycocotools = require("pycocotools.coco", "pycocotools")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # pycocotools reports there
            coco = pycocotools.COCO(str(file))
        annotations, images = coco.dataset["annotations"], coco.imgs.values()
        boxes = np.array([item["bbox"] for item in annotations], dtype=np.float64)
        labels = {item["category_id"] for item in annotations}
        unlisted = sorted(labels - set(coco.cats)) if is_ranked else []
        odd = [item["id"] for item in annotations if item.get("iscrowd", 0) not in (0, 1)]
        unlike = [item for item in images if not (isinstance(item["file_name"], str) and _has_size(item))]
        empty = [item["id"] for item in annotations if has_masks and not item["segmentation"]]
        twice = [(part, item) for part in _NUMBERED for item in _repeated(coco.dataset.get(part, ()))]
        sorted(coco.imgs)  # which numbers of other types are not
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise InputError(f"{file} is no annotation file of COCO: {type(error).__name__} {error}") from error
    if twice:
        raise InputError(f"{file} has id {twice[0][1]!r} twice among its {twice[0][0]}; give each its own")
    if unlisted:
        raise InputError(f"{file} has category id {unlisted[0]!r}, which its categories do not list")
    if is_ranked:
        ranks = {number: place + 1 for place, number in enumerate(sorted(coco.cats))}
        for item in annotations:
            item["category_id"] = ranks[item["category_id"]]
        labels = {ranks[item] for item in labels}
    if odd:
        raise InputError(f"{file} has annotation {odd[0]} whose iscrowd is neither 0 nor 1")
    if unlike:
        raise InputError(f"{file} has an image without name or size: {unlike[0]}")
    if len(boxes) and (boxes.shape[1:] != (4,) or not np.isfinite(boxes).all()):
        raise InputError(f"{file} has a bbox that is not four numbers: left, top, width, height")
    if len(boxes) and (boxes[:, 2:] < 0).any():
        item = annotations[int((boxes[:, 2:] < 0).any(1).argmax())]
        raise InputError(f"{file} has annotation {item['id']} with a bbox of negative width or height: {item['bbox']}")
    if strange := [item for item in labels if not (isinstance(item, int) and 0 < item < num_classes)]:
        what = "category" if is_ranked else "category id"
        raise InputError(f"{file} has {what} {strange[0]!r}; num_classes={num_classes} allows 1 to {num_classes - 1}")
    if empty:
        raise InputError(f"{file} has annotation {empty[0]} without segmentation, which masks need")
    _clip_to_pictures(coco, file)
    return coco


def _repeated(items: Sequence[dict[str, Any]]) -> list[Any]:
    """Return the ids that more than one of the items has."""
    return [number for number, count in Counter(item["id"] for item in items).items() if count > 1]


def _has_size(image: dict[str, Any]) -> bool:
    return all(isinstance(image[side], int) and image[side] > 0 for side in ("height", "width"))


def _clip_to_pictures(coco: Any, file: Path) -> None:
    """Cut boxes at the edges of their pictures, and leave out objects that lie outside."""
    annotations, outside = coco.dataset["annotations"], []
    if strays := [item["id"] for item in annotations if item["image_id"] not in coco.imgs]:
        _log.warning(
            "%s: %d of %d objects belong to images that it does not list and are left out; the first is annotation %s",
            file, len(strays), len(annotations), strays[0],
        )  # fmt: skip
    for item in annotations:
        if (image := coco.imgs.get(item["image_id"])) is None:
            continue
        left, top, width, height = item["bbox"]
        right, bottom = left + width, top + height
        if left >= 0 and top >= 0 and right <= image["width"] and bottom <= image["height"]:
            continue
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, image["width"]), min(bottom, image["height"])
        item["bbox"] = [left, top, right - left, bottom - top]
        if right <= left or bottom <= top:
            outside.append(item["id"])
    if outside:
        _log.warning(
            "%s: %d of %d objects lie outside their pictures and are left out; the first is annotation %s",
            file, len(outside), len(annotations), outside[0],
        )  # fmt: skip
        lost = set(outside)
        coco.dataset["annotations"] = [item for item in annotations if item["id"] not in lost]
        with contextlib.redirect_stdout(sys.stderr):
            coco.createIndex()


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
    found = [item for item in coco.imgToAnns.get(numbers[index], ()) if not is_train or _is_usable(item)]
    boxes = torch.tensor([item["bbox"] for item in found], dtype=torch.float32).reshape(-1, 4)
    labels, is_crowd = (
        torch.tensor([item.get(key, 0) for item in found], dtype=torch.int64) for key in ("category_id", "iscrowd")
    )
    masks = None
    if has_masks:
        masks = torch.from_numpy(np.array([_mask(coco, item, file, size) for item in found], np.uint8))
        masks = masks.reshape(-1, *size)
    return image, _target(image, box_convert(boxes, "xywh", "xyxy"), labels, is_crowd, masks)


def _mask(coco: Any, annotation: dict[str, Any], file: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw an object's mask; a polygon or a run-length code that is none may make pycocotools raise anything."""
    code = annotation["segmentation"]
    try:
        if isinstance(code, dict) and tuple(code["size"]) != size:
            raise ValueError(f"it is for a picture of {code['size']}")
        found: NDArray[np.uint8] = coco.annToMask(annotation)
    except Exception as error:
        reason = f"{type(error).__name__} {error}".rstrip()
        raise CorruptAnnotationError(
            f"picture {file} has annotation {annotation['id']} with a segmentation that cannot be drawn: {reason}"
        ) from error
    return found
