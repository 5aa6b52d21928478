"""NumPy's .npy, and PNG for 2-D images."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from tinc.volumes.description import DEFLATE_RATIO, Volume, check_claim, damage_named
from visionkernels.checks import InputError

__all__ = ["check_png", "read_npy", "read_png"]


def read_npy(path: Path) -> Volume:
    """Map a .npy file into memory."""
    with damage_named(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise InputError("it is an archive of arrays")
    return Volume(array, None, {"format": "npy"})


def read_png(path: Path) -> Volume:
    """Read a grey or colour PNG."""
    # from memory, where a chunk of any stated size ends with the file
    content = path.read_bytes()
    with damage_named(path), Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        mode, depth = image.mode, content[24]
        # a grey pixel of one bit is the smallest
        check_claim(image.width * image.height // 8, DEFLATE_RATIO * len(content))
        pixels = np.array(image)
    if mode in ("L", "I;16", "I"):
        return Volume(pixels.astype(np.uint16) if mode == "I" else pixels, None, {"format": "png", "axes": "YX"})
    # Pillow reduces colours of 16 bits to 8
    if mode in ("RGB", "RGBA") and depth == 8:
        return Volume(pixels, 2, {"format": "png", "axes": "YXS"})
    raise InputError(
        f"volume {path} is a PNG of mode {mode} with {depth} bits; it must be grey with 8 or 16 bits, or RGB with 8: "
        "convert it, or save it as .tif"
    )


def check_png(path: Path, array: np.ndarray, channel_axis: int | None) -> None:
    """Raise ValueError unless a PNG can hold the array."""
    is_grey = array.ndim == 2 and channel_axis is None and array.dtype.name in ("uint8", "uint16")
    is_colour = array.ndim == 3 and channel_axis in (2, -1) and array.shape[2] in (3, 4) and array.dtype == np.uint8
    if not is_grey and not is_colour:
        channels = "" if channel_axis is None else f" with channels along axis {channel_axis}"
        raise InputError(
            f"{path} cannot hold {array.dtype} {array.shape}{channels}; a PNG holds uint8 or uint16 with 2 axes, or "
            "uint8 with 3 or 4 channels last: write .tif or .npy"
        )
