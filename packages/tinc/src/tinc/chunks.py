"""Chunks of larger arrays, each a `.tinc` file of its own; and the numcodecs codec of them, "tinc".

What a chunk is, is not in the hands of who writes it: edges are padded, some are tiny, some hold NaN. So every chunk
that has samples of a known type can be written, by rules that depend on the chunk alone:

- A target of size (`ratio`, `bpv`) asks for no less than `MIN_CHUNK_BYTES`; ratios end at `MAX_RATIO`.
- A PSNR that the lossy layer cannot reach gives a lossless chunk.
- A chunk with values that are not finite is lossless, unless `nan` says otherwise.
- A chunk of less than two axes has axes of one put before them; of more than four, axes of one are left out.

What was done is in the chunk: `tinc.open(chunk).info()` has an "exact" part for a lossless one.
"""

import math
import sys
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
from numcodecs.abc import Codec  # type: ignore[import-untyped]
from numcodecs.compat import ensure_bytes, ensure_ndarray, ndarray_copy  # type: ignore[import-untyped]

from tinc.compression import compress
from tinc.encoding.job import Layers, Preset
from tinc.encoding.targets import OutOfReachError
from tinc.errors import TincFormatError
from tinc.file import TincFile
from tinc.signal import DTYPES, MAX_AXES, MAX_CHANNELS

__all__ = ["MAX_RATIO", "MIN_CHUNK_BYTES", "ChunkOptions", "TincChunks"]

MIN_CHUNK_BYTES = 128
"""Headers take about 50."""
MAX_RATIO = 10_000
_TARGETS = ("ratio", "bpv", "psnr", "max_error")


@dataclass(frozen=True, kw_only=True)
class ChunkOptions:
    """How chunks are compressed: as `tinc.compress` takes it, with at most one target; without one, losslessly."""

    ratio: float | None = None
    """Bytes of a chunk / bytes of its file, at most 10000."""
    bpv: float | None = None
    """Bits a sample."""
    psnr: float | None = None
    """dB, over the range of an integer type, over the range of the chunk for float32."""
    max_error: float | None = None
    """No sample moves by more."""
    lossless: bool = False
    preset: Preset = "fast"
    layers: Layers = "auto"
    channel_axis: int | None = None
    """Axis of a chunk that counts channels, at most 64."""
    nan: Literal["exact", "fill", "raise"] = "exact"
    """What becomes of values that are not finite if there is a target: the whole chunk is lossless, they become the
    mean of the others, or ValueError."""
    seed: int = 0

    def __post_init__(self) -> None:
        given = [name for name in _TARGETS if getattr(self, name) is not None]
        if len(given) + self.lossless > 1:
            named = ", ".join([*given, "lossless"] if self.lossless else given)
            raise ValueError(f"give one target of {', '.join(_TARGETS)}, lossless; got {named}")
        if not given:
            object.__setattr__(self, "lossless", True)
        for name in given:
            _check_target(name, getattr(self, name))
        choices = {"preset": get_args(Preset), "layers": get_args(Layers), "nan": ("exact", "fill", "raise")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, allowed))}")

    def as_json(self) -> dict[str, Any]:
        """Return the options that are not the default, and the target."""
        return {
            each.name: getattr(self, each.name)
            for each in fields(ChunkOptions)
            if getattr(self, each.name) != each.default
        }

    def check(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Raise TypeError or ValueError if no chunk of this type and shape can be written."""
        self.check_type(dtype)
        if self.channel_axis is not None:
            if not -len(shape) <= self.channel_axis < len(shape):
                raise ValueError(f"channel_axis={self.channel_axis} must be in [{-len(shape)}, {len(shape)})")
            if shape[self.channel_axis] > MAX_CHANNELS:
                raise ValueError(f"a chunk has {shape[self.channel_axis]} channels; at most {MAX_CHANNELS}")
        if len(self.arrange(shape).kept) - (self.channel_axis is not None) > MAX_AXES:
            raise ValueError(
                f"chunks of shape {shape} have more than {MAX_AXES} axes longer than 1; make one axis of them 1"
            )

    def check_type(self, dtype: np.dtype[Any]) -> None:
        """Raise TypeError if no chunk of this type can be written."""
        if dtype.newbyteorder("=").name not in DTYPES:
            raise TypeError(f"dtype={dtype}: tinc takes {', '.join(DTYPES)}; convert the array first")

    def arrange(self, shape: tuple[int, ...]) -> "Arrangement":
        """Return how a chunk of this shape becomes an array of 2 to 4 axes, and channels."""
        channel = None if self.channel_axis is None else self.channel_axis % len(shape)
        kept = list(range(len(shape)))
        for axis in range(len(shape)):
            if len(kept) - (channel is not None) > MAX_AXES and shape[axis] == 1 and axis != channel:
                kept.remove(axis)
        ones = max(2 - (len(kept) - (channel is not None)), 0)
        return Arrangement(
            tuple(kept), ones, None if channel is None else ones + kept.index(channel),
            (1,) * ones + tuple(shape[axis] for axis in kept),
        )  # fmt: skip

    def encode_chunk(
        self, chunk: np.ndarray, *, counted: int | None = None, metadata: dict[str, Any] | None = None
    ) -> bytes:
        """Return the file of a chunk. Of its samples `counted`, by default all, count for a target of size.

        Raises TypeError and ValueError as `check`, ValueError for an empty chunk.
        """
        self.check(chunk.shape, chunk.dtype)
        arrangement = self.arrange(chunk.shape)
        samples, is_finite = self._finite(chunk.reshape(arrangement.shape))
        shared: dict[str, Any] = {
            "preset": self.preset, "channel_axis": arrangement.channel_axis, "seed": self.seed, "metadata": metadata,
        }  # fmt: skip
        if self.lossless or not is_finite:
            return compress(samples, lossless=True, **shared).tobytes()
        shared["layers"] = self.layers
        if self.max_error is not None:
            return compress(samples, max_error=self.max_error, **shared).tobytes()
        if self.psnr is None:
            # one of the two is given where nothing else is
            bits = self.bpv if self.ratio is None else 8 * chunk.dtype.itemsize / self.ratio
            assert bits is not None
            counted = chunk.size if counted is None else counted
            size = max(int(counted * bits / 8), MIN_CHUNK_BYTES)
            return compress(samples, bytes=size, **shared).tobytes()
        try:
            return compress(samples, psnr=self.psnr, **shared).tobytes()
        except OutOfReachError:
            return compress(samples, lossless=True, **shared | {"layers": "auto"}).tobytes()

    def _finite(self, samples: np.ndarray) -> tuple[np.ndarray, bool]:
        """Return the samples to be compressed, and whether all of them are finite."""
        if samples.dtype.kind != "f" or self.lossless:
            return samples, True
        finite = np.isfinite(samples)
        if finite.all() or self.nan == "exact" or (self.nan == "fill" and not finite.any()):
            return samples, bool(finite.all())
        if self.nan == "raise":
            count = samples.size - int(finite.sum())
            raise ValueError(f"the chunk has {count} values that are not finite; pass nan='exact' or nan='fill'")
        return np.where(finite, samples, samples[finite].mean(dtype=np.float64).astype(samples.dtype)), True

    def open_chunk(self, content: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> TincFile:
        """Open the file of a chunk of this shape and type. Raises TincFormatError if it is none."""
        file = TincFile(content)
        expected, native = self.arrange(shape).shape, dtype.newbyteorder("=")
        if file.shape != expected or file.dtype != native:
            raise TincFormatError(f"the chunk is {file.dtype} {file.shape}; the array's chunks are {native} {expected}")
        return file


def _check_target(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if name == "max_error":
        if not is_number or value < 0:
            raise ValueError(f"max_error={value!r} must be at least 0")
        return
    low, high = {"ratio": (1, MAX_RATIO), "bpv": (0, 32), "psnr": (0, 1000)}[name]
    if not is_number or not low < value <= high:
        raise ValueError(f"{name}={value!r} must be above {low} and at most {high}")


@dataclass(frozen=True)
class Arrangement:
    """A chunk as the codec takes it: `ones` axes of one, then the axes `kept` of the chunk."""

    kept: tuple[int, ...]
    ones: int
    channel_axis: int | None
    shape: tuple[int, ...]

    def region(self, box: tuple[slice, ...]) -> tuple[slice, ...]:
        """Return the region of the file for a box of the chunk."""
        return (slice(0, 1),) * self.ones + tuple(box[axis] for axis in self.kept)


@dataclass(frozen=True, kw_only=True, repr=True)
class TincChunks(ChunkOptions, Codec):  # type: ignore[misc]
    """A numcodecs codec, e.g. `zarr.create_array(..., zarr_format=2, compressors=TincChunks(ratio=16))`.

    It takes arrays of 1 and more axes in one piece of memory. As with any numcodecs codec, memory is what comes back:
    the decoded array has the bytes of the encoded one in the same order, so one in Fortran order comes back transposed.
    Bytes without a type are taken if lossless. Options as `ChunkOptions`.
    """

    codec_id = "tinc"

    def encode(self, buf: Any) -> bytes:
        """Return the chunk's `.tinc` file. Raises TypeError and ValueError for chunks that have no codec."""
        chunk = ensure_ndarray(buf)
        if not isinstance(buf, np.ndarray) and not self.lossless and chunk.dtype == np.uint8 and chunk.ndim == 1:
            raise TypeError(f"buf is {type(buf).__name__}; a lossy codec takes arrays, which tell their type")
        if not chunk.flags.c_contiguous:
            if not chunk.flags.f_contiguous:
                raise ValueError("buf is not contiguous; pass np.ascontiguousarray(buf)")
            chunk = chunk.T
        big = chunk.dtype.byteorder == ">" or (chunk.dtype.byteorder == "=" and sys.byteorder == "big")
        return self.encode_chunk(chunk, metadata={"byteorder": "big"} if big and chunk.dtype.itemsize > 1 else None)

    def decode(self, buf: Any, out: Any = None) -> Any:
        """Return the chunk, in `out` if given. Raises TincFormatError for anything but a whole chunk."""
        file = TincFile(ensure_bytes(buf))
        is_big = file.metadata.get("byteorder") == "big"
        chunk = file.decode().astype(file.dtype.newbyteorder(">" if is_big else "<"), order="C", copy=False)
        return chunk if out is None else ndarray_copy(chunk, out)

    def get_config(self) -> dict[str, Any]:
        """Return the id and the options as JSON values."""
        return {"id": self.codec_id, **self.as_json()}
