"""Other codecs at the same bytes: HEVC by PyAV; JPEG 2000, SPERR, SZ3 and zfp by imagecodecs.

A bisection of the one quality setting of a codec finds its best result of at most raw bytes / ratio. Only its coded
stream counts, without a container, while all bytes of a `.tinc` file count.
"""

import io
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from tinc.compression import compress
from tinc.encoding.job import Layers, Preset
from tinc.encoding.targets import OutOfReachError
from tinc.metrics import psnr, ssim
from tinc.signal import refuse_mask
from visionkernels.checks import InputError
from visionkernels.extras import require

__all__ = ["RIVALS", "compare", "match", "rivalry_table"]

Coded = tuple[int, np.ndarray]
Codec = Callable[[np.ndarray, float], tuple[int, np.ndarray | None]]


def compare(
    source: str | Path | np.ndarray,
    ratios: Sequence[float],
    against: Sequence[str] = ("hevc", "jpeg2k", "sperr", "sz3"),
    *,
    preset: Preset = "balanced",
    layers: Sequence[Layers] = ("tree", "residual", "auto"),
) -> Iterator[dict[str, Any]]:
    """Yield a row for each ratio and codec: bytes, ratio, PSNR and SSIM over the range of the type, CPU seconds.

    A codec that cannot reach a ratio has NaN for its figures. Raises ValueError for other volumes and names.

    Args:
        source: a volume of uint8 or uint16, with 2 or 3 axes of more than one sample, or its path
        ratios: bytes of the samples / bytes of the coded stream
        against: names of `RIVALS`
        preset: that of `tinc.compress`
        layers: those of `tinc.compress`, one row of tinc for each; "auto" is the row "tinc"
    """
    if not isinstance(source, np.ndarray):
        from tinc.volumes import read_volume

        source = np.asarray(read_volume(source).array)
    refuse_mask(source, "source")
    source = np.squeeze(source)
    if source.dtype not in (np.uint8, np.uint16) or source.ndim not in (2, 3):
        raise InputError(
            f"the volume is {source.dtype} {source.shape}; other codecs need uint8 or uint16 with 2 or 3 axes"
        )
    if unknown := sorted(set(against) - set(RIVALS)):
        raise InputError(f"against={', '.join(unknown)} is not known; known: {', '.join(RIVALS)}")
    for ratio in ratios:
        for layer in layers:
            name = {"auto": "tinc", "tree": "tinc tree", "residual": "tinc residual"}.get(layer, f"tinc {layer}")
            yield _row(source, ratio, name, partial(_own, source, ratio, preset, layer))
        for name in against:
            yield _row(source, ratio, name, partial(match, name, source, ratio))


def _row(volume: np.ndarray, asked: float, name: str, code: Callable[[], Coded | None]) -> dict[str, Any]:
    start = time.process_time()
    coded = code()
    seconds = time.process_time() - start
    row: dict[str, Any] = {"codec": name, "asked": asked}
    if coded is None:
        return row | dict.fromkeys(("bytes", "ratio", "psnr", "ssim"), math.nan) | {"seconds": seconds}
    size, decoded = coded
    quality = {"psnr": psnr(volume, decoded), "ssim": ssim(volume, decoded)}
    return row | {"bytes": size, "ratio": volume.nbytes / size, **quality, "seconds": seconds}


def _own(volume: np.ndarray, ratio: float, preset: Preset, layers: Layers) -> Coded | None:
    try:
        file = compress(volume, ratio=ratio, preset=preset, layers=layers)
    except OutOfReachError:
        return None
    return file.nbytes_stored, file.decode()


def match(name: str, volume: np.ndarray, ratio: float) -> Coded | None:
    """Return the bytes and the decoded volume of a codec of `RIVALS` at a ratio, or None if it is out of reach.

    The order of the axes, of which codecs of images and of volumes prefer one, is the best one.
    """
    found = []
    # HEVC predicts along the first axis, which was its best on each of five volumes; it is slow, too
    orders = [tuple(range(volume.ndim))] if name == "hevc" else list(permutations(range(volume.ndim)))
    for order in orders:
        coded = _search(RIVALS[name], np.ascontiguousarray(volume.transpose(order)), volume.nbytes / ratio)
        if coded is not None:
            found.append((coded[0], coded[1].transpose(np.argsort(order))))
    return max(found, key=lambda coded: psnr(volume, coded[1]), default=None)


def _search(codec: Codec, volume: np.ndarray, target: float) -> Coded | None:
    """Return the result of most PSNR within `target` bytes; the knob of a codec runs from 0 (best) to 1 (smallest)."""
    low, high = 0.0, 1.0
    best, best_psnr = None, -math.inf
    for _ in range(12):
        middle = (low + high) / 2
        size, decoded = codec(volume, middle)
        if size > target:
            low = middle
            continue
        high = middle
        # neither size nor quality of every codec is monotonic; a corrupt stream is no result
        if decoded is not None and (quality := psnr(volume, decoded)) > best_psnr:
            best, best_psnr = (size, decoded), quality
    return best


def _hevc(volume: np.ndarray, knob: float) -> tuple[int, np.ndarray | None]:
    """x265, grey of 12 bits, slowest preset, tuned for PSNR; the decoder verifies the encoder's MD5 of each frame.

    One thread, so that the stream is the same each time. x265 4.1 writes corrupt streams of frames that are one block
    wide, so that blocks are smaller there, with weighted prediction, which is off (it saved nothing either), and at the
    lowest qualities; the volume of a stream that is not sound is None.
    """
    top = float(np.iinfo(volume.dtype).max)
    # x265 has 12 bits; both conversions round
    frames = np.rint(volume.reshape(-1, *volume.shape[-2:]) * (4095 / top)).astype(np.uint16)
    # PyAV 18.1 corrupts the heap with rows whose length is not a multiple of 32; x265 takes no frame below a block
    rows = max(frames.shape[1] + frames.shape[1] % 2, 16)
    frames = np.pad(frames, [(0, 0), (0, rows - frames.shape[1]), (0, -frames.shape[2] % 32)], mode="edge")
    for block in (block for block in (64, 32, 16) if block <= rows and block < frames.shape[2]):
        stream = _x265(frames, 51 * knob, block)
        decoded = _verified(stream)
        if decoded is not None and decoded.shape == frames.shape:
            decoded = decoded[:, : volume.shape[-2], : volume.shape[-1]]
            back = np.rint(decoded.astype(np.float64) * (top / 4095)).astype(volume.dtype)
            return _bytes_without_digests(stream), back.reshape(volume.shape)
    return _bytes_without_digests(stream), None


def _x265(frames: np.ndarray, quality: float, block: int) -> bytes:
    av = require("av", "tinc-vision[bench]")
    stream = io.BytesIO()
    container = av.open(stream, "w", format="hevc")
    video = container.add_stream("libx265", rate=25)
    video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], "gray12le"
    details = f"log-level=none:info=0:hash=1:pools=none:frame-threads=1:wpp=0:weightp=0:weightb=0:ctu={block}"
    video.options = {"preset": "veryslow", "tune": "psnr", "crf": f"{quality:.3f}", "x265-params": details}
    for values in frames:
        for packet in video.encode(av.VideoFrame.from_ndarray(values, format="gray12le")):
            container.mux(packet)
    for packet in video.encode():
        container.mux(packet)
    container.close()
    return stream.getvalue()


def _verified(stream: bytes) -> np.ndarray | None:
    """Return the frames of an HEVC stream; None if it is damaged or a frame differs from its MD5."""
    av = require("av", "tinc-vision[bench]")
    with av.open(io.BytesIO(stream), format="hevc") as reader:
        context = reader.streams.video[0].codec_context
        context.options = {"err_detect": "crccheck+explode"}
        try:
            return np.stack([frame.to_ndarray() for frame in reader.decode(video=0)])
        except (av.error.FFmpegError, ValueError):
            return None


def _bytes_without_digests(stream: bytes) -> int:
    """Return the bytes of a stream but for its suffix SEI units (type 40), in which x265 puts the MD5 of frames."""
    starts = [match.start() for match in re.finditer(b"\0\0\1", stream)]
    ends = [*starts[1:], len(stream)]
    digests = sum(end - start for start, end in zip(starts, ends, strict=True) if stream[start + 3] >> 1 & 63 == 40)
    return len(stream) - digests


def _jpeg2k(volume: np.ndarray, knob: float) -> Coded:
    """JPEG 2000, irreversible, with all slices stacked in one image."""
    imagecodecs = require("imagecodecs", "tinc-vision[bench]")
    stacked = volume.reshape(-1, volume.shape[-1])
    coded = imagecodecs.jpeg2k_encode(stacked, level=100 - 85 * knob, reversible=False, codecformat="j2k")
    return len(coded), imagecodecs.jpeg2k_decode(coded).reshape(volume.shape)


def _as_floats(volume: np.ndarray) -> np.ndarray:
    return volume.astype(np.float32)


def _back(values: np.ndarray, volume: np.ndarray) -> np.ndarray:
    limits = np.iinfo(volume.dtype)
    return np.rint(values).clip(limits.min, limits.max).astype(volume.dtype).reshape(volume.shape)


def _sperr(volume: np.ndarray, knob: float) -> Coded:
    """SPERR, a wavelet codec, by PSNR over the values' own range."""
    imagecodecs = require("imagecodecs", "tinc-vision[bench]")
    # imagecodecs 2026.3.6 loses volumes whose slices are not square
    rows, columns = volume.shape[-2:]
    margins = [(0, 0)] * (volume.ndim - 2) + [(0, max(columns - rows, 0)), (0, max(rows - columns, 0))]
    square = np.pad(_as_floats(volume), margins, mode="edge")
    coded = imagecodecs.sperr_encode(square, level=100 - 95 * knob, mode="psnr")
    decoded = imagecodecs.sperr_decode(coded)[..., :rows, :columns]
    return len(coded), _back(decoded, volume)


def _sz3(volume: np.ndarray, knob: float) -> Coded:
    """SZ3 by absolute error, from 1 to half the range."""
    imagecodecs = require("imagecodecs", "tinc-vision[bench]")
    bound = (float(np.iinfo(volume.dtype).max) / 2) ** knob
    coded = imagecodecs.sz3_encode(_as_floats(volume), mode="abs", abs=bound)
    return len(coded), _back(imagecodecs.sz3_decode(coded, volume.shape, np.float32), volume)


def _zfp(volume: np.ndarray, knob: float) -> Coded:
    """zfp by absolute error, from 1 to the range."""
    imagecodecs = require("imagecodecs", "tinc-vision[bench]")
    bound = float(np.iinfo(volume.dtype).max) ** knob
    coded = imagecodecs.zfp_encode(_as_floats(volume), mode="accuracy", level=bound)
    return len(coded), _back(imagecodecs.zfp_decode(coded), volume)


RIVALS: dict[str, Codec] = {"hevc": _hevc, "jpeg2k": _jpeg2k, "sperr": _sperr, "sz3": _sz3, "zfp": _zfp}


def rivalry_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows of `compare` as text."""
    columns = {
        "codec": "codec",
        "asked": "asked",
        "bytes": "bytes",
        "ratio": "ratio",
        "psnr": "PSNR dB",
        "ssim": "SSIM",
    }
    headers = columns | {"seconds": "CPU s"}
    formats = ("", "g", ".0f", ".1f", ".2f", ".3f", ".1f")
    return tabulate([[row[key] for key in headers] for row in rows], list(headers.values()), floatfmt=formats)
