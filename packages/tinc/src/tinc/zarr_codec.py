"""The Zarr v3 codec "tinc": `zarr.create_array(..., serializer=TincCodec(ratio=16), compressors=None)`.

Every chunk is a `.tinc` file, by the rules of `tinc.chunks`. A part of an array decodes only the parts of chunks that
it touches, in an array of its own as well as within shards; a compressor after the codec would cost just that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from zarr.abc.codec import ArrayBytesCodec, ArrayBytesCodecPartialDecodeMixin

from tinc.chunks import ChunkOptions
from tinc.errors import TincFormatError
from tinc.regions import slice_region

if TYPE_CHECKING:
    from zarr.abc.store import ByteGetter
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer
    from zarr.core.chunk_grids import ChunkGrid
    from zarr.core.dtype import ZDType

__all__ = ["TincCodec"]


@dataclass(frozen=True, kw_only=True)
class TincCodec(ChunkOptions, ArrayBytesCodec, ArrayBytesCodecPartialDecodeMixin):
    """Arrays of uint8, uint16, int16 and float32 whose chunks have 1 to 4 axes longer than 1, and channels.

    Options as `ChunkOptions`; without a target chunks are lossless. Creating an array of another type raises TypeError,
    of chunks with more axes ValueError (within shards: writing to it). A chunk that is padded at the array's edge is
    compressed with its padding; see `tinc.parallel.compress_chunks` for a writer that knows the edge.
    """

    is_fixed_size: ClassVar[bool] = False  # type: ignore[misc]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TincCodec:
        """Return the codec of its metadata. Raises ValueError for another name and unknown options."""
        if data.get("name") != "tinc":
            raise ValueError(f"name={data.get('name')!r} must be 'tinc'")
        configuration = data.get("configuration")
        if configuration is None:
            configuration = {}
        if not isinstance(configuration, Mapping):
            raise ValueError(f"configuration={configuration!r} must be an object")
        unknown = sorted(set(configuration) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"the tinc codec has no {', '.join(unknown)}; update it, or correct the name")
        return cls(**configuration)

    def to_dict(self) -> dict[str, Any]:
        """Return the codec's metadata."""
        return {"name": "tinc", "configuration": self.as_json()}

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> TincCodec:
        """Return the codec itself; raises TypeError for types that it does not take."""
        # the shape is not looked at: Zarr gives that of the array here, or that of a chunk in a shard
        self.check_type(array_spec.dtype.to_native_dtype())
        return self

    def validate(self, *, shape: tuple[int, ...], dtype: ZDType[Any, Any], chunk_grid: ChunkGrid) -> None:
        """Raise TypeError or ValueError for an array with chunks that the codec does not take."""
        chunk_shape = getattr(chunk_grid, "chunk_shape", None)
        if chunk_shape is not None:
            self.check(chunk_shape, dtype.to_native_dtype())

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Raise NotImplementedError, as codecs do whose size depends on the data."""
        raise NotImplementedError

    def _encode_sync(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        return chunk_spec.prototype.buffer.from_bytes(self.encode_chunk(chunk_data.as_numpy_array()))

    def _decode_sync(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return self._decode_part(chunk_data, tuple(slice(None) for _ in chunk_spec.shape), chunk_spec)

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        return await asyncio.to_thread(self._encode_sync, chunk_data, chunk_spec)

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return await asyncio.to_thread(self._decode_sync, chunk_data, chunk_spec)

    async def _decode_partial_single(
        self, byte_getter: ByteGetter, selection: Any, chunk_spec: ArraySpec
    ) -> NDBuffer | None:
        content = await byte_getter.get(prototype=chunk_spec.prototype)
        if content is None:
            return None
        try:
            return await asyncio.to_thread(self._decode_part, content, selection, chunk_spec)
        except TincFormatError as error:
            raise TincFormatError(f"chunk {byte_getter}: {error}") from error

    def _decode_part(self, content: Buffer, selection: Any, chunk_spec: ArraySpec) -> NDBuffer:
        dtype = chunk_spec.dtype.to_native_dtype()
        file = self.open_chunk(content.to_bytes(), chunk_spec.shape, dtype)
        box, inner = _box(selection, chunk_spec.shape)
        samples = file.decode(self.arrange(chunk_spec.shape).region(box))
        part = samples.reshape([each.stop - each.start for each in box])[inner]
        return chunk_spec.prototype.nd_buffer.from_numpy_array(np.asarray(part, dtype=dtype))


def _box(selection: Any, shape: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[Any, ...]]:
    """Return the smallest box around a selection of a chunk, and the selection within it.

    A selection has a slice, an integer or an array of integers for each axis, as Zarr's indexers give them.
    """
    keys = selection if isinstance(selection, tuple) else (selection,)
    keys = (*keys, *(slice(None) for _ in range(len(shape) - len(keys))))
    parts = [_axis_box(key, size) for key, size in zip(keys, shape, strict=True)]
    return tuple(part for part, _ in parts), tuple(inner for _, inner in parts)


def _axis_box(key: Any, size: int) -> tuple[slice, Any]:
    if isinstance(key, slice):
        return slice_region(key, size)
    places = np.asarray(key)
    if places.dtype == bool:
        (places,) = np.nonzero(places)
    if places.size == 0:
        return slice(0, 0), places
    low, high = int(places.min()), int(places.max()) + 1
    return slice(low, high), (places - low if places.ndim else int(places) - low)
