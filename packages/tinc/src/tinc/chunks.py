"""Chunks of larger arrays as `.tinc` files, and the numcodecs codec "tinc" for them.

A writer of chunks cannot choose them: they are padded at edges, and may be tiny or hold NaN. So every chunk of a known
sample type can be written, by rules that depend on the chunk alone:

- A target of size (`ratio`, `bpv`) is at least `MIN_CHUNK_BYTES`, and a ratio at most `MAX_RATIO`.
- A chunk whose PSNR the lossy layers cannot reach is lossless.
- A chunk with values that are not finite is lossless, unless `nan` says otherwise.
- A chunk of fewer than two axes gets leading axes of length 1; one of more than four loses axes of length 1.

`tinc.open(chunk).info()` has an "exact" entry for a lossless chunk.
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
from tinc.signal import DTYPES, MAX_AXES, MAX_CHANNELS, refuse_mask
from visionkernels.checks import InputError

__all__ = ["MAX_RATIO", "MIN_CHUNK_BYTES", "ChunkOptions", "TincChunks"]

MIN_CHUNK_BYTES = 128
"""Smallest target of size; headers take about 50 bytes."""
MAX_RATIO = 10_000
_TARGETS = ("ratio", "bpv", "psnr", "max_error")


@dataclass(frozen=True, kw_only=True)
class ChunkOptions:
    """Options of `tinc.compress` for chunks, with at most one target; chunks are lossless without any."""

    ratio: float | None = None
    """Bytes of a chunk / bytes of its file, at most 10000."""
    bpv: float | None = None
    """Bits a sample."""
    psnr: float | None = None
    """dB, over the range of an integer type, over the range of the chunk for float32."""
    max_error: float | None = None
    """Largest error of a sample."""
    lossless: bool = False
    preset: Preset = "fast"
    layers: Layers = "auto"
    channel_axis: int | None = None
    """Axis of a chunk that holds its channels, at most 64."""
    nan: Literal["exact", "fill", "raise"] = "exact"
    """Treatment of values that are not finite under a lossy target: the whole chunk becomes lossless, the values become
    the mean of the others, or ValueError is raised."""
    seed: int = 0

    def __post_init__(self) -> None:
        given = [name for name in _TARGETS if getattr(self, name) is not None]
        if len(given) + self.lossless > 1:
            named = ", ".join([*given, "lossless"] if self.lossless else given)
            raise InputError(f"give one target of {', '.join(_TARGETS)}, lossless; got {named}")
        if not given:
            object.__setattr__(self, "lossless", True)
        for name in given:
            _check_target(name, getattr(self, name))
        axis = self.channel_axis
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int | np.integer)):
            raise InputError(f"channel_axis={self.channel_axis!r} must be an integer or None")
        choices = {"preset": get_args(Preset), "layers": get_args(Layers), "nan": ("exact", "fill", "raise")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, allowed))}")

    def as_json(self) -> dict[str, Any]:
        """Return the target and the options that differ from their defaults."""
        return {
            option.name: getattr(self, option.name)
            for option in fields(ChunkOptions)
            if getattr(self, option.name) != option.default
        }

    def check(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Raise TypeError or ValueError if no chunk of this type and shape can be written."""
        self.check_type(dtype)
        if self.channel_axis is not None:
            if not -len(shape) <= self.channel_axis < len(shape):
                raise InputError(f"channel_axis={self.channel_axis} must be in [{-len(shape)}, {len(shape)})")
            if shape[self.channel_axis] > MAX_CHANNELS:
                raise InputError(f"a chunk has {shape[self.channel_axis]} channels; at most {MAX_CHANNELS}")
        if len(self.arrange(shape).kept) - (self.channel_axis is not None) > MAX_AXES:
            raise InputError(
                f"chunks of shape {shape} have more than {MAX_AXES} axes longer than 1; set one of these to 1"
            )

    def check_type(self, dtype: np.dtype[Any]) -> None:
        """Raise TypeError if no chunk of this type can be written."""
        if dtype.newbyteorder("=").name not in DTYPES:
            raise TypeError(f"dtype={dtype} must be one of {', '.join(DTYPES)}; convert the array first")

    def arrange(self, shape: tuple[int, ...]) -> "Arrangement":
        """Return the arrangement of a chunk of this shape as an array of 2 to 4 axes, and channels."""
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
        """Return the file of a chunk.

        A target of size refers to `counted` samples, by default all of the chunk. Raises TypeError and ValueError as
        `check` does, and ValueError for an empty chunk.
        """
        refuse_mask(chunk, "chunk")
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
            # one of them is given, since there is no other target
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
        """Return the samples to compress, and whether all of them are finite."""
        if samples.dtype.kind != "f" or self.lossless:
            return samples, True
        finite = np.isfinite(samples)
        if finite.all() or self.nan == "exact" or (self.nan == "fill" and not finite.any()):
            return samples, bool(finite.all())
        if self.nan == "raise":
            count = samples.size - int(finite.sum())
            raise InputError(f"the chunk has {count} values that are not finite; pass nan='exact' or nan='fill'")
        return np.where(finite, samples, samples[finite].mean(dtype=np.float64).astype(samples.dtype)), True

    def open_chunk(self, content: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> TincFile:
        """Open the file of a chunk. Raises TincFormatError unless it has this shape and type."""
        file = TincFile(content)
        expected, native = self.arrange(shape).shape, dtype.newbyteorder("=")
        if file.shape != expected or file.dtype != native:
            raise TincFormatError(f"the chunk is {file.dtype} {file.shape}; the array's chunks are {native} {expected}")
        # the size is that of the array's own chunks
        file.max_nbytes = file.nbytes
        return file


def _check_target(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if name == "max_error":
        if not is_number or value < 0:
            raise InputError(f"max_error={value!r} must be at least 0")
        return
    low, high = {"ratio": (1, MAX_RATIO), "bpv": (0, 32), "psnr": (0, 1000)}[name]
    if not is_number or not low < value <= high:
        raise InputError(f"{name}={value!r} must be above {low} and at most {high}")


@dataclass(frozen=True)
class Arrangement:
    """A chunk as an array for `compress`: `ones` axes of length 1, then the axes `kept` of the chunk."""

    kept: tuple[int, ...]
    ones: int
    channel_axis: int | None
    shape: tuple[int, ...]

    def region(self, box: tuple[slice, ...]) -> tuple[slice, ...]:
        """Return the region of the file that a box of the chunk is stored in."""
        return (slice(0, 1),) * self.ones + tuple(box[axis] for axis in self.kept)


@dataclass(frozen=True, kw_only=True, repr=True)
class TincChunks(ChunkOptions, Codec):  # type: ignore[misc]
    """A numcodecs codec, e.g. `zarr.create_array(..., zarr_format=2, compressors=TincChunks(ratio=16))`.

    It accepts contiguous arrays of at least one axis. As with any numcodecs codec, the decoded array has the bytes of
    the encoded one in the same order, so an array in Fortran order comes back transposed. A lossless codec also accepts
    bytes without a type. The options are those of `ChunkOptions`.
    """

    codec_id = "tinc"

    def encode(self, buf: Any) -> bytes:
        """Return the chunk's `.tinc` file. Raises TypeError and ValueError for chunks that cannot be encoded."""
        refuse_mask(buf, "buf")
        chunk = ensure_ndarray(buf)
        if not isinstance(buf, np.ndarray) and not self.lossless and chunk.dtype == np.uint8 and chunk.ndim == 1:
            raise TypeError(f"buf is of type {type(buf).__name__}; a lossy codec needs an array with a sample type")
        if not chunk.flags.c_contiguous:
            if not chunk.flags.f_contiguous:
                raise InputError("buf is not contiguous; pass np.ascontiguousarray(buf)")
            chunk = chunk.T
        big = chunk.dtype.byteorder == ">" or (chunk.dtype.byteorder == "=" and sys.byteorder == "big")
        return self.encode_chunk(chunk, metadata={"byteorder": "big"} if big and chunk.dtype.itemsize > 1 else None)

    def decode(self, buf: Any, out: Any = None) -> Any:
        """Return the chunk, in `out` if given. Raises TincFormatError for damaged and truncated files."""
        file = TincFile(ensure_bytes(buf))
        if out is not None:
            file.max_nbytes = max(file.max_nbytes, ensure_ndarray(out).nbytes)
        is_big = file.metadata.get("byteorder") == "big"
        chunk = file.decode().astype(file.dtype.newbyteorder(">" if is_big else "<"), order="C", copy=False)
        if out is None:
            return chunk
        if chunk.nbytes != ensure_ndarray(out).nbytes:
            expected = ensure_ndarray(out)
            raise TincFormatError(
                f"the chunk is {chunk.dtype} {chunk.shape}, which does not fit into {expected.dtype} {expected.shape}"
            )
        return ndarray_copy(chunk, out)

    def get_config(self) -> dict[str, Any]:
        """Return the id and the options as JSON values."""
        return {"id": self.codec_id, **self.as_json()}
