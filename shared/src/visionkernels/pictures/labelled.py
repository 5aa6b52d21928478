"""Pictures with a class each: folders, WebDataset shards, Hugging Face data sets, and digits that need no download.

Folders and Hugging Face data sets come through timm; WebDataset shards are read in place, since training that resumes
exactly needs samples by index.
"""

import io
import tarfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100

from visionkernels.checks import InputError
from visionkernels.extras import require
from visionkernels.pictures.reading import read_picture

__all__ = ["LabelledPictures", "Split", "open_pictures"]

Split = Literal["train", "validation"]

_LAYOUT = (
    "it must hold train/CLASS/*.jpg and val/CLASS/*.jpg, or CIFAR's batches, or be wds/FOLDER, hfds/NAME or mnist5k"
)
_CIFAR = (CIFAR10, CIFAR100)


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


def open_pictures(
    data: str | Path,
    split: Split,
    transform: Callable[[Image.Image], Any],
    *,
    class_names: Sequence[str] | None = None,
) -> LabelledPictures:
    """Open the pictures of one split.

    `data` is a folder with `train` and `val` (or `validation`), each of one folder a class; a folder with CIFAR's
    unpacked `cifar-10-batches-py` or `cifar-100-python`; `wds/FOLDER` with
    WebDataset shards `*train*.tar` and `*val*.tar` of pictures and `.cls` files; `hfds/NAME` on the Hugging Face Hub;
    or `mnist5k`, the 4,000 and 1,000 digits of `visionkernels.samples`. For "validation" a folder may also hold the
    classes itself. `class_names` gives the classes their numbers, by default their order by name.

    Raises FileNotFoundError, and ValueError for data without pictures or with classes outside `class_names`.
    """
    kind, _, rest = str(data).partition("/")
    if str(data) == "mnist5k":
        return _open_digits(split, transform)
    if kind in ("hfids", "tfds"):
        raise InputError(f"--data {data} is a stream, which cannot resume; use hfds/{rest}, wds/FOLDER or a folder")
    if kind == "wds":
        opened = _open_shards(Path(rest), split, transform)
    elif kind == "hfds":
        require("datasets", "datasets")
        opened = _from_timm(create_dataset(str(data), split=split), transform)
    elif (cifar := next((kind for kind in _CIFAR if (Path(data) / kind.base_folder).is_dir()), None)) is not None:
        opened = _open_cifar(cifar, Path(data), split, transform)
    else:
        opened = _open_folder(Path(data), split, transform, class_names)
    if class_names is not None and not set(opened.labels) <= set(range(len(class_names))):
        raise InputError(f"--data {data} has class {max(opened.labels)}; there are {len(class_names)} classes")
    return opened


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
        raise InputError(f"--data {folder} has classes that training does not know: {', '.join(sorted(strange)[:5])}")
    try:
        return _from_timm(create_dataset("", str(folder), search_split=False, class_map=class_map), transform)
    except RuntimeError as error:
        raise InputError(f"--data {folder} holds no pictures in folders of classes; {_LAYOUT}") from error


def _open_cifar(
    kind: type[CIFAR10], root: Path, split: Split, transform: Callable[[Image.Image], Any]
) -> LabelledPictures:
    try:  # torchvision unpickles the batches only where their digests are those of the published ones
        cifar = kind(root, train=split == "train")
    except RuntimeError as error:
        raise InputError(
            f"--data {root / kind.base_folder} is damaged: its files are not the published ones"
        ) from error
    return LabelledPictures(
        files=partial(_picture_of, cifar.data),
        labels=list(cifar.targets),
        class_names=tuple(cifar.classes),
        transform=transform,
        describe=f"{{}} of {kind.base_folder} ({split})".format,
    )


def _picture_of(pixels: NDArray[np.uint8], index: int) -> Image.Image:
    return Image.fromarray(pixels[index])


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
        raise InputError(f"{shard} is no uncompressed WebDataset shard: {error}") from error
    if not samples:
        raise InputError(f"{shard} has no picture with a .cls file beside it")
    return samples


def _open_digits(split: Split, transform: Callable[[Image.Image], Any]) -> LabelledPictures:
    from visionkernels.samples import mnist5k

    images, labels = mnist5k("train" if split == "train" else "test")
    return LabelledPictures(
        files=partial(_picture_of, images),
        labels=labels.tolist(),
        class_names=tuple(map(str, range(10))),
        transform=transform,
        describe=f"digit {{}} of mnist5k ({split})".format,
    )
