"""Reading one picture file, whatever it holds, as upright RGB."""

from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from visionkernels.checks import InputError
from visionkernels.files import CorruptFileError

__all__ = ["CorruptPictureError", "read_picture"]


class CorruptPictureError(CorruptFileError):
    """A file that is no readable picture."""

    def __init__(self, message: str) -> None:
        # from a data loading process an error comes back with its traceback as text; its last line is the message
        super().__init__(
            message.strip().splitlines()[-1].removeprefix(f"{type(self).__module__}.{type(self).__name__}: ")
        )


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


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        values = np.asarray(picture, dtype=np.int64)
        # 16 bits, or a wider file with values of 8 bits in it
        scale = 257 if picture.mode.startswith("I;16") or values.max() > 255 else 1
        picture = Image.fromarray((values.clip(0, 255 * scale) // scale).astype(np.uint8))
    if picture.mode == "F":
        raise InputError("floating-point pixels have no stated range; save it with 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")
