"""Batches to score on: patches of photographs that come with scikit-image, images of a folder, handwritten digits.

Also the accuracies that the official repository published for networks of S0, as cited figures.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diswot.networks.registration import CIFAR_MEAN, CIFAR_STD
from visionkernels.checks import InputError, check
from visionkernels.samples import mnist5k, photographs

__all__ = [
    "CIFAR_MEAN",
    "CIFAR_STD",
    "batches",
    "digits",
    "folder",
    "noise",
    "normalised",
    "patches",
    "s0_ground_truth",
]

_SMALLEST_CROP = 48
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif")


def normalised(images: Tensor, mean: Sequence[float] = CIFAR_MEAN, std: Sequence[float] = CIFAR_STD) -> Tensor:
    """Return images [B, 3, H, W] in 0..1 with mean and deviation of channels taken out."""
    return (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def batches(
    source: str | Path, count: int, batch_size: int, *, size: int = 32, num_classes: int = 100
) -> list[tuple[Tensor, Tensor]]:
    """Return a batch for each of `count` seeds: "patches", "mnist5k", "noise", or the images of a folder.

    Images are float32 [B, 3, size, size], normalised by CIFAR's statistics; labels int64 [B] are random in
    [0, num_classes), but for digits, which have their own. Raises ValueError for batches below 2, ImportError without
    the samples' packages, and what `folder` raises.
    """
    check(batch_size >= 2, "batch_size", batch_size, "at least 2: norms take the statistics of the batch")
    check(size >= 1, "size", size, "at least 1")
    check(num_classes >= 1, "num_classes", num_classes, "at least 1")
    if source == "patches":
        return [patches(batch_size, size=size, num_classes=num_classes, seed=seed) for seed in range(count)]
    if source == "noise":
        return [noise(batch_size, size=size, num_classes=num_classes, seed=seed) for seed in range(count)]
    if source == "mnist5k":
        check(num_classes >= 10, "num_classes", num_classes, "at least 10 for digits")
        return [digits(batch_size, size=size, seed=seed) for seed in range(count)]
    return [folder(source, batch_size, size=size, num_classes=num_classes, seed=seed) for seed in range(count)]


def patches(batch_size: int, *, size: int = 32, num_classes: int = 100, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return square crops of photographs, 48 pixels to half the shorter side, half of them flipped, and random labels.

    Random labels are enough: the semantic term asks how two networks answer them, not whether they are right.
    """
    return _crops(list(photographs().values()), batch_size, size, num_classes, np.random.default_rng(seed))


def noise(batch_size: int, *, size: int = 32, num_classes: int = 100, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return images of independent normal pixels, mean 0 and deviation 1, and random labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch_size, 3, size, size, generator=generator)
    return images, torch.randint(num_classes, (batch_size,), generator=generator)


def folder(
    path: str | Path, batch_size: int, *, size: int = 32, num_classes: int = 100, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return crops as `patches` does, of the images in a folder and its sub-folders.

    Raises FileNotFoundError for no folder, ValueError for one without images, and for a damaged image by its name.
    """
    from visionkernels.pictures.reading import read_picture

    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"data {path} is none of 'patches', 'mnist5k' and 'noise', and no folder")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _PICTURES and file.is_file())
    if not files:
        raise InputError(f"data {path} holds no images (.jpg, .png, .bmp, .webp, .tif)")
    random = np.random.default_rng(seed)
    chosen = random.choice(len(files), min(batch_size, len(files)), replace=False)
    pictures = [np.asarray(read_picture(files[index]).convert("RGB")) for index in chosen]
    return _crops(pictures, batch_size, size, num_classes, random)


def digits(batch_size: int, *, size: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return handwritten digits of the training part, in three equal channels, with their labels."""
    images, labels = mnist5k("train")
    chosen = np.random.default_rng(seed).choice(len(labels), batch_size, replace=batch_size > len(labels))
    grey = torch.from_numpy(images[chosen]).float()[:, None] / 255
    resized = F.interpolate(grey, (size, size), mode="bilinear", align_corners=False)
    return normalised(resized.expand(-1, 3, -1, -1)), torch.from_numpy(labels[chosen])


def _crops(
    pictures: Sequence[np.ndarray], batch_size: int, size: int, num_classes: int, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    crops = []
    for _ in range(batch_size):
        picture = pictures[int(random.integers(len(pictures)))]
        shorter = min(picture.shape[:2])
        side = int(random.integers(min(_SMALLEST_CROP, shorter), max(shorter // 2, min(_SMALLEST_CROP, shorter)) + 1))
        top, left = (int(random.integers(0, n - side + 1)) for n in picture.shape[:2])
        crop = torch.from_numpy(picture[top : top + side, left : left + side].copy()).float().movedim(-1, 0) / 255
        crop = F.interpolate(crop[None], (size, size), mode="bilinear", align_corners=False, antialias=True)[0]
        crops.append(crop.flip(-1) if random.random() < 0.5 else crop)
    labels = torch.from_numpy(random.integers(0, num_classes, batch_size))
    return normalised(torch.stack(crops)), labels


def s0_ground_truth(kind: str = "distilled") -> dict[str, float]:
    """Return CIFAR-100 top-1 accuracy in percent of 32 networks of S0, by key.

    "distilled": trained with knowledge distillation; "vanilla": without. Cited from the official repository
    (lilujunai/DisWOT-CVPR2023, Apache-2.0), trained once.
    """
    column = {"distilled": 0, "vanilla": 1}.get(kind)
    if column is None:
        raise InputError(f"kind={kind!r} must be 'distilled' or 'vanilla'")
    return {key: figures[column] for key, figures in _S0.items()}


_S0 = {
    "111": (61.87, 60.20),
    "113": (69.01, 67.26),
    "117": (72.36, 70.64),
    "131": (65.95, 64.50),
    "137": (73.31, 70.77),
    "153": (71.91, 69.93),
    "155": (72.88, 70.60),
    "171": (69.22, 68.50),
    "331": (66.64, 65.31),
    "333": (70.76, 69.57),
    "335": (72.89, 70.27),
    "337": (73.79, 71.40),
    "353": (71.84, 70.46),
    "355": (73.26, 71.39),
    "373": (72.63, 69.98),
    "511": (64.61, 62.71),
    "515": (72.42, 70.09),
    "517": (73.16, 71.06),
    "531": (66.97, 66.39),
    "533": (71.25, 70.28),
    "535": (73.18, 70.95),
    "553": (72.73, 70.75),
    "555": (73.94, 72.09),
    "571": (70.56, 69.27),
    "573": (72.86, 70.63),
    "713": (71.01, 69.13),
    "715": (72.02, 70.63),
    "735": (73.36, 72.04),
    "737": (73.97, 71.65),
    "755": (73.34, 71.69),
    "757": (74.23, 72.27),
    "777": (74.44, 72.56),
}
