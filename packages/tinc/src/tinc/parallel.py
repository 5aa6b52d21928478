"""Parallel compression of a volume larger than memory, chunk by chunk, and of many volumes."""

import inspect
import itertools
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tinc.compression import compress
from tinc.signal import refuse_mask
from tinc.volumes import as_metadata, move_folder, read_volume, refuse_folder, zarr_attributes
from visionkernels import sweeps
from visionkernels.checks import InputError
from visionkernels.extras import require
from visionkernels.files import finite_or_none, replace_file

if TYPE_CHECKING:
    from tinc.chunks import ChunkOptions

__all__ = ["ChunksReport", "ManyReport", "Source", "compress_chunks", "compress_many"]


class Source(Protocol):
    """An array that is read box by box: NumPy arrays, memory maps, Zarr, HDF5, Dask."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def dtype(self) -> Any:
        """Type of the samples."""

    def __getitem__(self, key: tuple[slice, ...], /) -> Any:
        """Return a box."""


@dataclass(frozen=True)
class ChunksReport:
    """Size and quality of a volume that was compressed chunk by chunk."""

    num_chunks: int
    raw_bytes: int
    """Bytes of the volume, without padding."""
    bytes: int
    """Bytes of all files of the folder."""
    psnr: float
    """dB, over the range of an integer type, or over the volume's own range for float32; infinite without any error.
    Voxels that are not finite are left out."""

    @property
    def ratio(self) -> float:
        """Bytes of the volume / bytes of the folder."""
        return self.raw_bytes / self.bytes


def compress_chunks(
    source: Source,
    out: str | Path,
    *,
    chunk: tuple[int, ...],
    jobs: int = -1,
    backend: sweeps.Backend = "loky",
    metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> ChunksReport:
    """Compress `source` chunk by chunk into the Zarr folder `out`, which any program with the codec "tinc" reads.

    A target of size refers to the voxels of the volume in a chunk; a chunk at the edge is padded by repetition. Chunks
    of zeros are not written, as in Zarr. The result is written to `out` + ".partial" and renamed at the end: repeat an
    interrupted call with the same shape, type, chunks and options to resume it. The values of the source are not
    compared.

    Args:
        source: the volume; with several processes it must pickle (memory maps and Zarr folders travel by name)
        out: the folder; all processes must see it
        chunk: sizes of a chunk by axis; a process holds one chunk at a time
        jobs: number of processes, as in `visionkernels.sweeps.map`
        backend: processes of this machine, or a cluster, as in `visionkernels.sweeps.map`
        metadata: those of a `tinc.volumes.Volume`
        overwrite: replace an existing `out`, and a partial folder of another call
        options: those of `tinc.chunks.ChunkOptions`: a target, `preset`, `channel_axis` and so on

    Raises TypeError and ValueError as `ChunkOptions` does, ValueError for chunks that do not fit the source and for a
    partial folder of another call, FileExistsError, and SweepError for a chunk that fails.
    """
    require("zarr", "tinc-vision[zarr]")
    # importable with the extra alone
    from tinc.zarr_codec import TincCodec

    refuse_mask(source, "source")
    out, codec = Path(out), TincCodec(**options)
    dtype, shape = np.dtype(source.dtype), tuple(map(int, source.shape))
    if len(chunk) != len(shape) or min(chunk, default=0) < 1 or min(shape, default=0) < 1:
        raise InputError(f"chunk={chunk} must give {len(shape)} sizes of at least 1 for a source of shape {shape}")
    chunk = tuple(min(size, whole) for size, whole in zip(chunk, shape, strict=True))
    codec.check(chunk, dtype)
    refuse_folder(out, overwrite=overwrite)
    folder = _begin(out, shape, dtype, chunk, codec, as_metadata(metadata), overwrite)
    places = list(itertools.product(*(range(-(-size // part)) for size, part in zip(shape, chunk, strict=True))))
    results = sweeps.map(
        _ChunkWriter(_forward(source), folder, chunk, codec), places, jobs=jobs, backend=backend, description="chunks",
        done=folder / _DONE, key=_chunk_key, install="tinc-vision[sweeps]",
    )  # fmt: skip
    move_folder(folder, out, overwrite=overwrite)
    (out / _DONE).unlink(missing_ok=True)
    written = sum(result["bytes"] for result in results) + (out / "zarr.json").stat().st_size
    return ChunksReport(len(places), math.prod(shape) * dtype.itemsize, written, _total_psnr(results, dtype))


_DONE = "done.jsonl"


def _chunk_key(place: tuple[int, ...]) -> str:
    # the key of Zarr's default encoding
    return "/".join(("c", *map(str, place)))


def _begin(
    out: Path, shape: tuple[int, ...], dtype: np.dtype[Any], chunk: tuple[int, ...], codec: Any,
    metadata: dict[str, Any], overwrite: bool,
) -> Path:  # fmt: skip
    """Return the partial folder, with the metadata of the array in it."""
    import zarr

    folder = out.with_name(f"{out.name}.partial")
    arguments: dict[str, Any] = {
        "shape": shape, "dtype": dtype.newbyteorder("="), "chunks": chunk, "serializer": codec, "compressors": None,
        "fill_value": 0, "attributes": zarr_attributes(metadata, codec.channel_axis),
    }  # fmt: skip
    axes = str(metadata.get("axes", "")).lower()
    if len(axes) == len(shape):
        arguments["dimension_names"] = list(axes)
    if folder.exists():
        wanted = zarr.create_array({}, **arguments).metadata.to_dict()
        try:
            stored = json.loads((folder / "zarr.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            stored = None
        if stored == json.loads(json.dumps(wanted, default=str)):
            return folder
        if not overwrite:
            raise InputError(f"{folder} holds a part of another call; remove it or pass --overwrite")
        shutil.rmtree(folder)
    zarr.create_array(str(folder), **arguments)
    return folder


@dataclass(frozen=True)
class _Backward:
    """An array with negative strides along some axes, as a view of one with positive strides.

    joblib 1.6 sends memory maps to other processes by name, and silently shifts those with negative strides.
    """

    forward: np.ndarray
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.forward.shape

    @property
    def dtype(self) -> Any:
        return self.forward.dtype

    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        mirrored = list(box)
        for axis in self.axes:
            size = self.shape[axis]
            mirrored[axis] = slice(size - box[axis].stop, size - box[axis].start)
        return np.flip(self.forward[tuple(mirrored)], self.axes)


def _forward(source: Source) -> Source:
    if not isinstance(source, np.ndarray) or min(source.strides) >= 0:
        return source
    axes = tuple(axis for axis, stride in enumerate(source.strides) if stride < 0)
    return _Backward(np.flip(source, axes), axes)


@dataclass(frozen=True)
class _ChunkWriter:
    """Writes the chunk at a place of the grid, and returns its size and error as JSON values."""

    source: Source
    folder: Path
    chunk: tuple[int, ...]
    options: "ChunkOptions"

    def __call__(self, place: tuple[int, ...]) -> dict[str, Any]:
        shape = self.source.shape
        box = tuple(
            slice(i * part, min((i + 1) * part, size)) for i, part, size in zip(place, self.chunk, shape, strict=True)
        )
        samples = self.source[box]
        refuse_mask(samples, "source")
        samples = np.asarray(samples)
        samples = samples.astype(samples.dtype.newbyteorder("="), copy=False)
        missing = [(0, part - size) for part, size in zip(self.chunk, samples.shape, strict=True)]
        # a chunk with a negative zero is written, since its bits are not all zero
        if not samples.any() and not (samples.dtype.kind == "f" and np.signbit(samples).any()):
            return {"bytes": 0, "squared_error": 0.0, "samples": samples.size, "low": 0.0, "high": 0.0}
        content = self.options.encode_chunk(np.pad(samples, missing, mode="edge"), counted=samples.size)
        file = self.options.open_chunk(content, self.chunk, samples.dtype)
        inside = tuple(slice(0, size) for size in samples.shape)
        decoded = file.decode(self.options.arrange(self.chunk).region(inside)).reshape(samples.shape)
        with replace_file(self.folder / _chunk_key(place), overwrite=True) as temporary:
            temporary.write_bytes(content)
        return _summary(len(content), samples, decoded)


def _summary(size: int, samples: np.ndarray, decoded: np.ndarray) -> dict[str, Any]:
    if samples.dtype.kind == "f":
        finite = np.isfinite(samples)
        samples, decoded = samples[finite], decoded[finite]
    errors = np.square(samples.astype(np.float64) - decoded)
    low, high = (float(samples.min()), float(samples.max())) if samples.size else (None, None)
    return {"bytes": size, "squared_error": float(errors.sum()), "samples": samples.size, "low": low, "high": high}


def _total_psnr(results: Sequence[dict[str, Any]], dtype: np.dtype[Any]) -> float:
    error, count = sum(result["squared_error"] for result in results), sum(result["samples"] for result in results)
    if error == 0:
        return math.inf
    if dtype.kind == "f":
        known = [result for result in results if result["low"] is not None]
        reach = max(result["high"] for result in known) - min(result["low"] for result in known)
        peak = reach if reach > 0 else 1.0
    else:
        peak = float(np.iinfo(dtype).max) - float(np.iinfo(dtype).min)
    return 10 * math.log10(peak**2 / (error / count))


@dataclass(frozen=True)
class ManyReport:
    """Sizes and qualities of many compressed volumes."""

    files: list[dict[str, Any]]
    """For each volume, in order: path, out, raw_bytes, bytes, ratio, psnr (None for a lossless file), note."""
    failures: dict[str, str] = field(default_factory=dict)
    """Error messages by path."""

    @property
    def ratio(self) -> float:
        """Bytes of all volumes / bytes of all files; NaN without any."""
        written = sum(entry["bytes"] for entry in self.files)
        return sum(entry["raw_bytes"] for entry in self.files) / written if written else math.nan


def compress_many(
    paths: Sequence[str | Path],
    out_dir: str | Path,
    *,
    jobs: int = -1,
    backend: sweeps.Backend = "loky",
    as_type: str | None = None,
    keep_metadata: bool = True,
    done: str | Path | None = None,
    overwrite: bool = False,
    **options: Any,
) -> ManyReport:
    """Compress volumes into `out_dir`, under their names with the suffix .tinc.

    A volume that fails is reported and does not end the others.

    Args:
        paths: the volumes
        out_dir: folder of the files
        jobs: number of processes, as in `visionkernels.sweeps.map`
        backend: processes of this machine, or a cluster, as in `visionkernels.sweeps.map`
        as_type: sample type to convert to, as in `tinc.volumes.read_volume`
        keep_metadata: store axes, spacing and orientation in the files; they count for a target of size
        done: a file of finished volumes; a call with the same options skips these
        overwrite: replace existing files
        options: those of `tinc.compress`; the channel axis defaults to that of the file

    Raises ValueError for two volumes of the same name and for unknown options, and FileExistsError for an existing
    output, before any work.
    """
    out_dir = Path(out_dir)
    outputs = [out_dir / f"{_stem(Path(path))}.tinc" for path in paths]
    names = [output.name for output in outputs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"several volumes would become {twice[0]}; compress them into different folders")
    known = set(inspect.signature(compress).parameters) - {"array", "metadata", "callback"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise InputError(f"unknown options {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    # an interrupted call may have written an output that is not in `done` yet
    is_resumed = done is not None and Path(done).exists()
    for output in outputs:
        if output.exists() and not (overwrite or is_resumed):
            raise FileExistsError(f"{output} exists; pass --overwrite to replace it")
    writer = _VolumeWriter(out_dir, as_type, keep_metadata, overwrite or is_resumed, options)
    items, target = [str(path) for path in paths], json.dumps([as_type, keep_metadata, options], sort_keys=True)
    results = sweeps.map(
        writer, items, jobs=jobs, backend=backend, description="volumes", errors="return", done=done,
        key=lambda path: f"{path} {target}", install="tinc-vision[sweeps]",
    )  # fmt: skip
    files = [result for result in results if not isinstance(result, sweeps.SweepError)]
    failures = {result.item: result.message for result in results if isinstance(result, sweeps.SweepError)}
    return ManyReport(files, failures)


def _stem(path: Path) -> str:
    name = path.name
    for ending in (".nii.gz", ".ome.tif", ".ome.tiff", ".ome.zarr"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return path.stem


@dataclass(frozen=True)
class _VolumeWriter:
    """Compresses the volume at a path, and returns its sizes and quality as JSON values."""

    out_dir: Path
    as_type: str | None
    keep_metadata: bool
    overwrite: bool
    options: dict[str, Any]

    def __call__(self, path: str) -> dict[str, Any]:
        volume = read_volume(path, as_type=self.as_type)
        samples = np.asarray(volume.array)
        options = {"channel_axis": volume.channel_axis} | self.options
        file = compress(samples, metadata=volume.metadata if self.keep_metadata else None, **options)
        out = self.out_dir / f"{_stem(Path(path))}.tinc"
        file.save(out, overwrite=self.overwrite)
        native = samples.astype(samples.dtype.newbyteorder("="), copy=False)
        psnr = _total_psnr([_summary(file.nbytes_stored, native, file.decode())], native.dtype)
        return {
            "path": path, "out": str(out), "raw_bytes": native.nbytes, "bytes": file.nbytes_stored, "ratio": file.ratio,
            "psnr": finite_or_none(psnr), "note": volume.note,
        }  # fmt: skip
