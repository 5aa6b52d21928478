"""A teacher's targets on disk, for training on images that do not vary: the teacher runs once."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from g2sd.generic import GenericDistiller
from g2sd.masking import mask_patches
from visionkernels.checks import InputError, check
from visionkernels.files import replace_file, write_json

__all__ = ["StoredTargets", "store_targets"]


class StoredTargets(Dataset):
    """Images with stored targets: item i is (image, noise, hidden) for one of its masks, drawn at random.

    `noise` decides the mask, `hidden` [tokens, channels] is the teacher's hidden state in its order, float32. Raises
    ValueError for pictures that the folder is not of.
    """

    def __init__(self, pictures: Any, folder: str | Path) -> None:
        folder = Path(folder)
        try:
            self.settings = dict(json.loads((folder / "targets.json").read_text(encoding="utf-8")))
            self.hidden = np.load(folder / "targets.npy", mmap_mode="r")
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{folder} holds no targets of `store_targets`: {error}") from error
        shape = self.settings.get("shape")
        if list(self.hidden.shape) != shape or self.hidden.dtype != np.float16 or len(pictures) != shape[0]:
            raise InputError(
                f"{folder} has targets {list(self.hidden.shape)}; expected {shape}, for {len(pictures)} images"
            )
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        index = range(len(self))[index]
        image, _ = self.pictures[index]
        number = int(torch.randint(self.hidden.shape[1], ()))
        noise = _noise(self.settings["seed"], index, number, self.hidden.shape[2] - 1)
        return image, noise, torch.from_numpy(self.hidden[index, number].astype(np.float32))


def store_targets(
    distiller: GenericDistiller,
    pictures: Any,
    folder: str | Path,
    *,
    masks_per_picture: int = 4,
    seed: int = 0,
    batch_size: int = 32,
    workers: int = 0,
) -> Path:
    """Compute the teacher's hidden states of all images under several masks, and return the folder.

    `pictures` are a data set of (image, label) that does not vary. Stored are float16 numbers, 2 (1 + patches) width
    bytes for each mask. A folder that holds the same targets is left as it is. Raises ValueError for a folder of others
    (of another teacher, layer, mask ratio or seed), and for counts below 1.
    """
    check(masks_per_picture >= 1, "masks_per_picture", masks_per_picture, "at least 1")
    check(batch_size >= 1, "batch_size", batch_size, "at least 1")
    folder = Path(folder)
    rows, columns = distiller.teacher.grid
    shape = [len(pictures), masks_per_picture, 1 + rows * columns, distiller.teacher_width]
    settings = {
        "shape": shape, "seed": seed, "mask_ratio": distiller.mask_ratio, "teacher_layer": distiller.teacher_layer,
        "teacher": _digest(distiller.teacher),
    }  # fmt: skip
    path = folder / "targets.json"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in settings if kept.get(name) != settings[name]]
        if other:
            raise InputError(f"{folder} holds targets with other {', '.join(other)}; give another folder")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with replace_file(folder / "targets.npy", overwrite=True) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_2_0(file, {"descr": "<f2", "fortran_order": False, "shape": tuple(shape)})
        loader = DataLoader(pictures, batch_size=batch_size, num_workers=workers)
        done = 0
        for images, _ in tqdm(loader, desc="targets", disable=None):
            file.write(_hidden(distiller, images, done, masks_per_picture, seed).tobytes())
            done += len(images)
    write_json(path, settings)
    return folder


def _hidden(distiller: GenericDistiller, images: Tensor, first: int, masks: int, seed: int) -> np.ndarray:
    """Return hidden states [batch, masks, tokens, width] of the images from `first` on."""
    device = next(distiller.teacher.parameters()).device
    patches = distiller.teacher.grid[0] * distiller.teacher.grid[1]
    states = []
    for number in range(masks):
        noise = torch.stack([_noise(seed, first + i, number, patches) for i in range(len(images))])
        mask = mask_patches(noise.to(device), distiller.mask_ratio)
        states.append(distiller.target(images.to(device), mask).cpu())
    hidden = torch.stack(states, 1)
    if not hidden.half().isfinite().all():
        raise InputError("the teacher's hidden states exceed float16, which targets are stored in")
    return hidden.half().numpy()


def _noise(seed: int, picture: int, number: int, patches: int) -> Float[Tensor, " patches"]:
    state = np.random.default_rng([seed, picture, number])
    return torch.from_numpy(state.random(patches, dtype=np.float32))


def _digest(teacher: nn.Module) -> str:
    content = hashlib.sha256()
    for name, tensor in teacher.state_dict().items():
        content.update(name.encode())
        content.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()[:16]
