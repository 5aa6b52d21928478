"""Labelled pictures for training and evaluation: where they come from, how they are read, in which order they are seen.

Folders and Hugging Face data sets come through timm; WebDataset shards are read in place, since training that resumes
exactly needs samples by index. The order with repeated augmentation is the paper's (sec. 4.1, after DeiT).
"""

import io
import random
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image, ImageOps
from timm.data import create_dataset, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import roi_align
from torchvision.transforms.functional import resized_crop

from biformer.recipes import AugmentationRecipe, PictureRecipe
from visionkernels.extras import require

__all__ = [
    "CellLabelledPictures",
    "CorruptPictureError",
    "LabelledPictures",
    "Split",
    "crop_label_map",
    "evaluation_transform",
    "open_pictures",
    "read_label_map",
    "read_picture",
    "repeated_augmentation_order",
    "training_transform",
]

Split = Literal["train", "validation"]

_LAYOUT = "it must hold train/CLASS/*.jpg and val/CLASS/*.jpg, or be wds/FOLDER, hfds/NAME or mnist5k"


class CorruptPictureError(ValueError):
    """A file that is no readable picture."""

    def __init__(self, message: str) -> None:
        # from a data loading process an error comes back with its traceback as text; its last line is the message
        super().__init__(
            message.strip().splitlines()[-1].removeprefix(f"{type(self).__module__}.{type(self).__name__}: ")
        )


@dataclass(frozen=True)
class LabelledPictures(Dataset):
    """Pictures with a class each: item i is (transform(picture i), labels[i])."""

    files: Callable[[int], Path | BinaryIO | Image.Image]
    """From an index to a picture."""
    labels: Sequence[int]
    class_names: tuple[str, ...]
    transform: Callable[[Image.Image], Any]
    describe: Callable[[int], str] = str
    """From an index to a name for messages."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.picture(index)), self.labels[index]

    def picture(self, index: int) -> Image.Image:
        """Return picture `index` as it is."""
        source = self.files(index)
        # pictures in memory are kept, files were opened for this one call
        with nullcontext() if isinstance(source, Image.Image | Path) else source:
            return read_picture(source, name=self.describe(index))


@dataclass(frozen=True)
class CellLabelledPictures(Dataset):
    """Training pictures with stored labels of their cells: item i is (image, class, cell labels [rows, columns, K])."""

    pictures: LabelledPictures
    label_maps: Path
    """Folder with `CLASS/NAME.npz` for the picture `CLASS/NAME.jpg`: see `read_label_map`."""
    recipe: PictureRecipe
    augmentation: AugmentationRecipe

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
        picture = self.pictures.picture(index)
        path = Path(self.pictures.describe(index))
        classes, scores = read_label_map(self.label_maps / path.parent.name / f"{path.stem}.npz")
        # timm's cropping and flipping, but with the box known
        first, augment, normalise = _timm_training_transform(self.recipe, self.augmentation, is_separate=True)
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


def open_pictures(
    data: str | Path,
    split: Split,
    transform: Callable[[Image.Image], Any],
    *,
    class_names: Sequence[str] | None = None,
) -> LabelledPictures:
    """Open the pictures of one split.

    `data` is a folder with `train` and `val` (or `validation`), each of one folder a class; `wds/FOLDER` with
    WebDataset shards `*train*.tar` and `*val*.tar` of pictures and `.cls` files; `hfds/NAME` on the Hugging Face Hub;
    or `mnist5k`, the 4,000 and 1,000 digits of `visionkernels.samples`. For "validation" a folder may also hold the
    classes itself. `class_names` gives the classes their numbers, by default their order by name.

    Raises FileNotFoundError, and ValueError for data without pictures or with classes outside `class_names`.
    """
    kind, _, rest = str(data).partition("/")
    if str(data) == "mnist5k":
        return _open_digits(split, transform)
    if kind in ("hfids", "tfds"):
        raise ValueError(f"--data {data} is a stream, which cannot resume; use hfds/{rest}, wds/FOLDER or a folder")
    if kind == "wds":
        opened = _open_shards(Path(rest), split, transform)
    elif kind == "hfds":
        require("datasets", "datasets")
        opened = _from_timm(create_dataset(str(data), split=split), transform)
    else:
        opened = _open_folder(Path(data), split, transform, class_names)
    if class_names is not None and not set(opened.labels) <= set(range(len(class_names))):
        raise ValueError(f"--data {data} has class {max(opened.labels)}; there are {len(class_names)} classes")
    return opened


def read_picture(source: str | Path | BinaryIO | Image.Image, *, name: str | None = None) -> Image.Image:
    """Return an upright RGB picture: rotated as EXIF says, transparency over white, 16 bits scaled to 8.

    `name` stands in messages for a source without a path. Raises FileNotFoundError, and CorruptPictureError (a
    ValueError) for what Pillow cannot read whole.
    """
    name = name or str(source)
    if isinstance(source, str | Path) and not Path(source).is_file():
        raise FileNotFoundError(f"picture {source} is not a file")
    try:
        # what the caller opened stays open
        with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as picture:
            picture.load()
            return _to_rgb(ImageOps.exif_transpose(picture))
    except (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(source), "it").partition("\n")[0]
        raise CorruptPictureError(f"picture {name} cannot be read: {reason}") from error


def training_transform(pictures: PictureRecipe, augmentation: AugmentationRecipe) -> Callable[[Image.Image], Any]:
    """Return timm's training transform with the recipe's settings."""
    transform: Callable[[Image.Image], Any] = _timm_training_transform(pictures, augmentation)
    return transform


def _timm_training_transform(
    pictures: PictureRecipe, augmentation: AugmentationRecipe, *, is_separate: bool = False
) -> Any:
    return create_transform(
        pictures.size,
        is_training=True,
        no_aug=not augmentation.random_crop,
        color_jitter=0.0,
        auto_augment=augmentation.rand_augment,
        interpolation=pictures.interpolation,
        mean=pictures.mean,
        std=pictures.std,
        re_prob=augmentation.erasing,
        re_mode="pixel",
        separate=is_separate,
    )


def evaluation_transform(pictures: PictureRecipe) -> Callable[[Image.Image], Any]:
    """Return timm's evaluation transform: resize the shorter side, crop the centre, normalise."""
    return create_transform(
        pictures.size,
        interpolation=pictures.interpolation,
        mean=pictures.mean,
        std=pictures.std,
        crop_pct=pictures.size / pictures.resize,
    )


def read_label_map(path: Path) -> tuple[Int[Tensor, "k height width"], Float[Tensor, "k height width"]]:
    """Read the stored labels of a picture: an .npz file with `classes` (integers) and `scores` (probabilities).

    Both are [k, height, width]: the k best classes at each place of a coarse grid over the whole picture. Raises
    FileNotFoundError, and ValueError for a file without the two.
    """
    if not path.is_file():
        raise FileNotFoundError(f"label map {path} is not a file")
    try:
        with np.load(path) as stored:
            classes, scores = stored["classes"].astype(np.int64), stored["scores"].astype(np.float32)
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"label map {path} must be .npz with classes and scores: {error}") from error
    if classes.ndim != 3 or classes.shape != scores.shape:
        raise ValueError(
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
    """Return the class probabilities of the cells of a crop, from a picture's stored map of its best k classes.

    `box` is (left, top, right, bottom) as fractions of the picture; cells are averaged by RoIAlign. What the scores of
    a cell lack to 1 is spread evenly over all classes.
    """
    height, width = classes.shape[-2:]
    dense = scores.new_zeros(num_classes, height, width).scatter_add_(0, classes.long(), scores)
    left, top, right, bottom = box
    corners = torch.tensor([[left * width, top * height, right * width, bottom * height]], dtype=dense.dtype)
    cells = roi_align(dense[None], [corners], grid, aligned=True)[0].permute(1, 2, 0)
    cells = cells + (1 - cells.sum(-1, keepdim=True)).clamp_min(0) / num_classes
    cells = cells / cells.sum(-1, keepdim=True)
    return cells.flip(1) if is_flipped else cells


def repeated_augmentation_order(length: int, epoch: int, *, repeats: int = 3) -> Sequence[int]:
    """Return the images of one epoch: a permutation seeded by `epoch`, each image `repeats` times in a row.

    The order is cut to as many entries as the dataset has, in whole groups of 256. Process r of R takes entries
    r, r + R, ..., so that the copies of an image meet different processes.
    """
    sampler = RepeatAugSampler(range(length), num_replicas=1, rank=0, num_repeats=repeats)
    sampler.set_epoch(epoch)
    return list(sampler)


def _open_folder(
    root: Path, split: Split, transform: Callable[[Image.Image], Any], class_names: Sequence[str] | None
) -> LabelledPictures:
    if not root.exists():
        raise FileNotFoundError(f"--data {root} does not exist; {_LAYOUT}")
    names = ("train",) if split == "train" else ("val", "validation")
    folder = next((root / name for name in names if (root / name).is_dir()), root)
    if folder == root and (split == "train" or (root / "train").is_dir()):
        raise FileNotFoundError(f"--data {root} has no folder {names[0]}; {_LAYOUT}")
    class_map = {name: number for number, name in enumerate(class_names or ())}
    found = {path.parent.name for path in folder.glob("*/*")} if folder.is_dir() else set()
    if class_map and (strange := found - set(class_map)):
        raise ValueError(f"--data {folder} has classes that training does not know: {', '.join(sorted(strange)[:5])}")
    try:
        return _from_timm(create_dataset("", str(folder), search_split=False, class_map=class_map), transform)
    except RuntimeError as error:
        raise ValueError(f"--data {folder} holds no pictures in folders of classes; {_LAYOUT}") from error


def _from_timm(dataset: Any, transform: Callable[[Image.Image], Any]) -> LabelledPictures:
    # timm's own dataset answers a broken file with the next picture; its reader leaves the reading to us
    reader = dataset.reader
    samples = getattr(reader, "samples", None)
    labels = list(reader.iter_targets()) if samples is None else [label for _, label in samples]
    names = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
    return LabelledPictures(
        files=partial(_file_of_reader, reader),
        labels=labels,
        class_names=tuple(names),
        transform=transform,
        describe=partial(reader.filename, absolute=True),
    )


def _file_of_reader(reader: Any, index: int) -> BinaryIO:
    file: BinaryIO = reader[index][0]
    return file


@dataclass(frozen=True)
class _Member:
    """A file within an uncompressed tar: where its bytes are."""

    shard: Path
    name: str
    offset: int
    size_bytes: int

    def read(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size_bytes)


def _open_shards(folder: Path, split: Split, transform: Callable[[Image.Image], Any]) -> LabelledPictures:
    if not folder.is_dir():
        raise FileNotFoundError(f"--data wds/{folder}: {folder} is not a folder of WebDataset shards")
    pattern = "*train*.tar" if split == "train" else "*val*.tar"
    shards = sorted(folder.glob(pattern))
    if not shards:
        raise FileNotFoundError(f"--data wds/{folder}: {folder} has no shards {pattern}")
    samples = [sample for shard in shards for sample in _shard_samples(shard)]
    pictures, labels = zip(*samples, strict=True)
    return LabelledPictures(
        files=partial(_open_member, pictures),
        labels=labels,
        class_names=tuple(map(str, range(max(labels) + 1))),
        transform=transform,
        describe=partial(_name_of_member, pictures),
    )


def _open_member(members: Sequence[_Member], index: int) -> BinaryIO:
    return io.BytesIO(members[index].read())


def _name_of_member(members: Sequence[_Member], index: int) -> str:
    return f"{members[index].shard}:{members[index].name}"


def _shard_samples(shard: Path) -> list[tuple[_Member, int]]:
    """The pictures of a shard, in its order, with the number in the `.cls` file of the same name."""
    members: dict[str, dict[str, _Member]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                stem, _, suffix = info.name.rpartition(".")
                members.setdefault(stem, {})[suffix.lower()] = _Member(shard, info.name, info.offset_data, info.size)
        samples = []
        for files in members.values():
            picture = next((files[suffix] for suffix in ("jpg", "jpeg", "png", "webp") if suffix in files), None)
            if picture is not None and "cls" in files:
                samples.append((picture, int(files["cls"].read())))
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"{shard} is no uncompressed WebDataset shard: {error}") from error
    if not samples:
        raise ValueError(f"{shard} has no picture with a .cls file beside it")
    return samples


def _open_digits(split: Split, transform: Callable[[Image.Image], Any]) -> LabelledPictures:
    from visionkernels.samples import mnist5k

    images, labels = mnist5k("train" if split == "train" else "test")
    return LabelledPictures(
        files=[Image.fromarray(image) for image in images].__getitem__,
        labels=labels.tolist(),
        class_names=tuple(map(str, range(10))),
        transform=transform,
        describe=f"digit {{}} of mnist5k ({split})".format,
    )


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        values = np.asarray(picture, dtype=np.int64)
        # 16 bits, or a wider file with values of 8 bits in it
        scale = 257 if picture.mode.startswith("I;16") or values.max() > 255 else 1
        picture = Image.fromarray((values.clip(0, 255 * scale) // scale).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no stated range; save it with 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")
