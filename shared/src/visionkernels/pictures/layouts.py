"""Where known segmentation sets keep pictures and annotations, and which class each of their labels means."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets import Cityscapes

from visionkernels.files import CorruptFileError
from visionkernels.pictures.annotated import require_files
from visionkernels.pictures.labelled import Split

__all__ = ["IGNORED", "Layout", "find_layout"]

IGNORED = 255
"""The label of pixels that count for nothing."""


class Layout(NamedTuple):
    """A split of a segmentation set."""

    pairs: Sequence[tuple[Path, Path]]
    """Pictures and their annotations."""
    classes: NDArray[np.uint8]
    """From each of the 256 labels of an annotation to a class or `IGNORED`."""


def find_layout(data: str | Path, split: Split) -> Layout:
    """Return the split of a folder in the layout of ADE20K, Pascal VOC 2012 or Cityscapes.

    Raises FileNotFoundError for other folders, and for a missing list, picture or annotation: every one has a partner;
    CorruptFileError for a list that is empty or no text.
    """
    root = Path(data)
    if (root / "JPEGImages").is_dir():
        layout = _pascal_voc(root, split)
    elif (root / "leftImg8bit").is_dir():
        layout = _cityscapes(root, split)
    else:
        layout = _ade20k(root, split)
    require_files(data, "annotations", [annotation for _, annotation in layout.pairs])
    return layout


def _ade20k(root: Path, split: Split) -> Layout:
    name = "training" if split == "train" else "validation"
    pictures, annotations = (root / kind / name for kind in ("images", "annotations"))
    files = sorted(pictures.glob("*.jpg"))
    if not files:
        raise FileNotFoundError(
            f"--data {root} has no pictures {pictures}/*.jpg; it must hold images/ and annotations/ like ADE20K, each "
            "with training/ and validation/, JPEGImages/ like VOC2012, or leftImg8bit/ like Cityscapes, or be shapes"
        )
    require_files(root, "pictures", [pictures / f"{path.stem}.jpg" for path in sorted(annotations.glob("*.png"))])
    classes = np.arange(256, dtype=np.uint8) - np.uint8(1)  # 0, no class, becomes 255
    return Layout([(file, annotations / f"{file.stem}.png") for file in files], classes)


def _pascal_voc(root: Path, split: Split) -> Layout:
    """VOC2012; where the lists and annotations of the augmented set (trainaug) are there, training takes them."""
    lists, annotations = root / "ImageSets" / "Segmentation", root / "SegmentationClass"
    chosen = lists / ("train.txt" if split == "train" else "val.txt")
    if split == "train" and (lists / "trainaug.txt").is_file():
        chosen, annotations = lists / "trainaug.txt", root / "SegmentationClassAug"
    if not chosen.is_file():
        raise FileNotFoundError(f"--data {root} has no list {chosen} of its pictures")
    try:
        names = chosen.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{chosen} is no list of names in UTF-8") from error
    if not names:
        raise CorruptFileError(f"{chosen} lists no pictures")
    pairs = [(root / "JPEGImages" / f"{name}.jpg", annotations / f"{name}.png") for name in names]
    require_files(root, "pictures", [picture for picture, _ in pairs])
    return Layout(pairs, np.arange(256, dtype=np.uint8))


def _cityscapes(root: Path, split: Split) -> Layout:
    """Annotations are labelTrainIds where the set's own tool has made them, else labelIds."""
    name = "train" if split == "train" else "val"
    pictures = sorted((root / "leftImg8bit" / name).glob("*/*_leftImg8bit.png"))
    if not pictures:
        raise FileNotFoundError(f"--data {root} has no pictures {root}/leftImg8bit/{name}/CITY/*_leftImg8bit.png")
    is_ready = any((root / "gtFine" / name).glob("*/*_labelTrainIds.png"))
    kind = "labelTrainIds" if is_ready else "labelIds"
    ending = f"_gtFine_{kind}.png"
    annotated = sorted((root / "gtFine" / name).glob(f"*/*{ending}"))
    expected = [f"{path.parent.name}/{path.name.removesuffix(ending)}_leftImg8bit.png" for path in annotated]
    require_files(root, "pictures", [root / "leftImg8bit" / name / file for file in expected])
    pairs = []
    for picture in pictures:
        stem = picture.name.removesuffix("_leftImg8bit.png")
        pairs.append((picture, root / "gtFine" / name / picture.parent.name / f"{stem}{ending}"))
    classes = np.arange(256, dtype=np.uint8)
    if not is_ready:
        classes[:] = IGNORED
        for kind in Cityscapes.classes:
            if kind.id >= 0:
                classes[kind.id] = kind.train_id
    return Layout(pairs, classes)
