"""Reading one picture file, whatever it holds, as upright RGB."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from visionkernels.checks import InputError
from visionkernels.files import CorruptFileError

__all__ = ["CorruptPictureError", "open_picture", "read_picture"]

# TIFF's numbers of tags and values
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
_SAMPLE_FORMAT, _SIGNED = 339, 2
# a picture whose shorter side becomes 256 pixels then has at most 66 million
_LONGEST_RATIO = 1000


class CorruptPictureError(CorruptFileError):
    """A file that is no readable picture."""

    def __init__(self, message: str) -> None:
        # from a data loading process an error comes back with its traceback as text; its last line is the message
        super().__init__(
            message.strip().splitlines()[-1].removeprefix(f"{type(self).__module__}.{type(self).__name__}: ")
        )


def read_picture(source: str | Path | BinaryIO | Image.Image, *, name: str | None = None) -> Image.Image:
    """Return an upright RGB picture: rotated as EXIF says, transparency over white, 16 bits scaled to 8.

    Of an animation it is the first frame. `name` stands in messages for a source without a path. Raises
    FileNotFoundError, and CorruptPictureError (a ValueError) for what Pillow cannot read whole, and for pixels whose
    black and white are not known: floating-point numbers, negative ones, and those above 16 bits. A side may be up to
    1,000 times the other, since the shorter one is mostly enlarged.
    """
    with open_picture(source, f"picture {name or source}", CorruptPictureError) as picture:
        return _to_rgb(picture)


@contextmanager
def open_picture(
    source: str | Path | BinaryIO | Image.Image, name: str, error: type[CorruptPictureError]
) -> Iterator[Image.Image]:
    """Yield the picture as Pillow loads it; what fails, also in the block, is raised as "`name` cannot be read"."""
    # a file's name may hold line breaks, and bytes that are no text
    name = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)
    if isinstance(source, str | Path) and not Path(source).is_file():
        raise FileNotFoundError(f"{name} is not a file")
    try:
        # what the caller opened stays open
        with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as picture:
            picture.load()
            yield picture
    except MemoryError:
        raise
    except UnidentifiedImageError as cause:
        is_empty = isinstance(source, str | Path) and not Path(source).stat().st_size
        reason = "it is empty" if is_empty else "it is in no format that Pillow knows"
        raise error(f"{name} cannot be read: {reason}") from cause
    except Exception as cause:  # on damaged files Pillow's decoders raise anything
        reason = str(cause).replace(str(source), "it").partition("\n")[0] or type(cause).__name__
        raise error(f"{name} cannot be read: {reason}") from cause


def _to_rgb(picture: Image.Image) -> Image.Image:
    _refuse_unknown_range(picture)
    if max(picture.size) > _LONGEST_RATIO * min(picture.size):
        width, height = picture.size
        raise InputError(f"it is {width} x {height} pixels; a side may be {_LONGEST_RATIO} times the other at most")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = _to_8_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _refuse_unknown_range(picture: Image.Image) -> None:
    """Raise InputError for pixels of which Pillow does not tell what is black and what is white."""
    tags = getattr(picture, "tag_v2", {})  # of TIFF
    if picture.mode == "F":
        raise InputError("floating-point pixels have no stated range; save it with 8 or 16 bits")
    if picture.mode == "L" and _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        raise InputError("its pixels are signed numbers; save it with unsigned ones")
    if picture.mode.startswith("I") and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise InputError("its 0 is white, which Pillow observes with 8 bits alone; save it with 0 as black")


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """Return grey of 8 bits, of mode LA where one value of the wider pixels means transparent."""
    values = np.asarray(picture).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise InputError(f"its pixels go from {low} to {high}; save it with 8 or 16 bits")
    # 16 bits, or a wider file with values of 8 bits in it
    scale = 257 if picture.mode.startswith("I;16") or high > 255 else 1
    grey = Image.fromarray((values // scale).astype(np.uint8))
    if (transparent := picture.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey
