"""Compressing an array to a number of bytes, a PSNR, or a bound on the error."""

import math
from collections.abc import Callable
from dataclasses import replace
from time import monotonic
from typing import Any, Literal, get_args

import numpy as np

from tinc.container import MAX_AXES, MAX_CHANNELS, Contents, ExactSection
from tinc.design import cut, tree_share
from tinc.exact import PaletteGrid, StepGrid, choose_grid, encode_box, encode_palette
from tinc.file import TincFile
from tinc.jobs import (
    TRAINING_STEPS,
    Job,
    Layers,
    OutOfReachError,
    Preset,
    Report,
    Target,
    finish,
    fit,
    packed,
    peak,
    with_tree,
)
from tinc.search import Found, best_search
from tinc.signal import DTYPES, SampleFormat, describe
from tinc.tree import QuantizedTree

__all__ = ["Layers", "Preset", "compress"]


def compress(
    array: np.ndarray,
    *,
    ratio: float | None = None,
    bytes: int | None = None,
    bpv: float | None = None,
    psnr: float | None = None,
    max_error: float | None = None,
    lossless: bool = False,
    preset: Preset = "balanced",
    layers: Layers = "auto",
    channel_axis: int | None = None,
    nan: Literal["raise", "fill"] = "raise",
    seed: int = 0,
    max_seconds: float | None = None,
    metadata: dict[str, Any] | None = None,
    callback: Callable[[str, float], None] | None = None,
) -> TincFile:
    """Compress an array of 2 to 4 axes, and channels if `channel_axis` says which axis they are.

    Exactly one target: `ratio` (bytes of the array / bytes of the file), `bytes` of the file, `bpv` (bits a sample),
    `psnr` in dB (over the range of an integer type, over its own range for float32), `max_error` (no sample moves by
    more), or `lossless`. The file is at most as large as a target of size asks, and as good as one of quality.

    Types are uint8, uint16, int16 and float32, in any byte order and memory layout. `preset` is how long to search:
    "fast" takes a second or two for a quarter of a million samples and has no tree; the others train one for thousands
    of steps and keep it where it helps, by the finished sizes. `layers` asks for a tree alone, a residual layer alone
    or both instead. `nan="fill"` replaces what is not finite by the mean; lossless float32 keeps it as it is.
    `max_seconds` cuts training short. `callback` is told what is going on, and the PSNR so far or NaN; it may raise
    KeyboardInterrupt to finish with what there is.

    Raises TypeError for other types, ValueError for other numbers of axes, an empty array, values that are not finite,
    none or several targets, targets out of reach.
    """
    samples, axis = _checked(array, channel_axis)
    is_exact = lossless or max_error is not None
    _check_choices(preset, layers, max_seconds)
    samples = _finite(samples, nan, keeps=is_exact and samples.dtype == np.float32 and not (max_error or 0))
    target = _target(samples, ratio, bytes, bpv, psnr, max_error, lossless)
    format = describe(samples) if np.isfinite(samples).all() else SampleFormat("float32")
    contents = Contents(
        tuple(samples.shape[1:]), len(samples), axis, format, metadata=_as_json(metadata),
    )  # fmt: skip
    working = format.to_working(samples) if np.isfinite(samples).all() else np.zeros(samples.shape, dtype=np.int64)
    job = Job(
        samples,
        working,
        contents,
        preset,
        seed,
        None if max_seconds is None else monotonic() + max_seconds,
        Report(callback),
    )
    if target.max_error is not None:
        return finish(_compress_exactly(job, target.max_error, layers))
    if samples.min() == samples.max():
        return finish(_compress_exactly(job, 0, "residual"))
    file = _compress_to(job, target, layers)
    return finish(file)


def _compress_to(job: Job, target: Target, layers: Layers) -> Contents:
    """Return the best of what `layers` allows."""
    if target.bytes is not None and layers == "auto" and _may_fit_exactly(job.samples, target.bytes):
        exact = _compress_exactly(job, 0, "residual")
        if len(packed(exact)) <= target.bytes:
            return exact
    if layers == "tree":
        return _tree_alone(job, target)
    if target.mse is not None and layers == "auto":
        return _to_quality(job, target)
    return _with_residual(job, target, layers).contents


def _to_quality(job: Job, target: Target) -> Contents:
    """Return the smallest file of a quality; without any loss where that is smaller, or nothing else is good enough."""
    try:
        found = _with_residual(job, target, "auto")
    except OutOfReachError:
        return _compress_exactly(job, 0, "residual")
    if _may_fit_exactly(job.samples, found.size):
        exact = _compress_exactly(job, 0, "residual")
        if len(packed(exact)) <= found.size:
            return exact
    return found.contents


def _with_residual(job: Job, target: Target, layers: Layers) -> Found:
    """Return the better of a residual layer alone and one beside a tree, or what `layers` asks for."""
    job.report("residual layer", math.nan)
    plain = best_search(job, target, None)
    if layers == "residual" or (layers == "auto" and (not TRAINING_STEPS[job.preset] or job.report.is_stopped)):
        return plain
    tree = fit(job, tree_share(target.bytes or plain.size, job.working.size))
    both = best_search(job, target, tree)
    return both if layers == "both" or both.is_better(plain, target) else plain


def _may_fit_exactly(samples: np.ndarray, target: int) -> bool:
    """Tell, by a box in its middle, whether an array without any loss may be as small as the target."""
    sizes = samples.shape[1:]
    box = tuple(slice((n - min(n, 24)) // 2, (n + min(n, 24)) // 2) for n in sizes)
    part = samples[(slice(None), *box)]
    size = len(encode_box(choose_grid(part, 0).numbers(part)))
    return size * samples.size < 1.5 * target * part.size


def _tree_alone(job: Job, target: Target) -> Contents:
    """Train trees until one meets the target; one that is a little too large gets coarser weights."""
    budget = target.bytes if target.bytes is not None else job.samples.nbytes / 64
    for attempt in range(8):
        tree = fit(job, budget)
        contents = with_tree(job.contents, tree)
        size = len(packed(contents))
        if target.mse is not None:
            allowed = target.mse / 4.0**job.contents.format.exponent * job.working.size
            if job.squared_error(contents) <= allowed:
                return contents
            budget *= 1.5
            continue
        assert target.bytes is not None
        if size <= target.bytes:
            return contents
        is_last = attempt == 2 or job.report.is_stopped
        for power in range(1, 400 if is_last else 6):
            coarser = with_tree(job.contents, tree.coarser(1.02**power))
            if len(packed(coarser)) <= target.bytes:
                return coarser
        if is_last:
            break
        budget *= 0.995 * target.bytes / size
    raise OutOfReachError(f"the target is out of reach of a tree alone: the last one has {size} bytes")


def _compress_exactly(job: Job, max_error: float, layers: Layers) -> Contents:
    """Return the smaller of a file without and with a tree."""
    job.report("exact layer", math.inf)
    plain = _exact_contents(job, max_error, None)
    if layers in ("auto", "residual") and (layers == "residual" or job.preset != "best"):
        return plain
    tree = fit(job, tree_share(len(packed(plain)), job.working.size))
    both = _exact_contents(job, max_error, tree)
    return plain if layers == "auto" and len(packed(plain)) <= len(packed(both)) else both


def _exact_contents(job: Job, max_error: float, tree: QuantizedTree | None) -> Contents:
    grid = choose_grid(job.samples, max_error)
    contents = job.contents if tree is None else with_tree(job.contents, tree)
    numbers = grid.numbers(job.samples)
    if tree is not None:
        whole = tuple(slice(0, size) for size in job.working.shape[1:])
        numbers = numbers - grid.numbers(job.contents.format.to_samples(tree.decode(whole)))
    blocks = cut(job.extent, (1,) * (len(job.extent) - 1))
    kind, step, offset, palette, streams = "bits", 1.0, 0.0, 0, contents.streams
    if isinstance(grid, StepGrid):
        kind, step, offset = "step", grid.step, grid.offset
    elif isinstance(grid, PaletteGrid):
        kind, palette, streams = "palette", len(grid.values), (*streams, encode_palette(grid.values))
    section = ExactSection(kind, step, offset, palette, blocks)
    boxes = [encode_box(numbers[blocks.box(tile)]) for tile in range(blocks.num_tiles)]
    return replace(contents, exact=section, streams=(*streams, *boxes))


def _checked(array: np.ndarray, channel_axis: int | None) -> tuple[np.ndarray, int | None]:
    """Return samples [channels, ...] in native byte order, and the channels' axis."""
    array = np.asarray(array)
    if array.dtype.newbyteorder("=").name not in DTYPES:
        raise TypeError(f"array is {array.dtype}; it must be one of {', '.join(DTYPES)}: convert it first")
    if array.size == 0:
        raise ValueError(f"array has shape {array.shape}: it is empty")
    axes = array.ndim - (channel_axis is not None)
    if not 2 <= axes <= MAX_AXES:
        raise ValueError(f"array has {axes} axes besides channels; it must have 2 to {MAX_AXES}")
    if channel_axis is None:
        return array.astype(array.dtype.newbyteorder("="), copy=False)[None], None
    if not -array.ndim <= channel_axis < array.ndim:
        raise ValueError(f"channel_axis={channel_axis} must be in [{-array.ndim}, {array.ndim})")
    channel_axis %= array.ndim
    if array.shape[channel_axis] > MAX_CHANNELS:
        raise ValueError(f"axis {channel_axis} has {array.shape[channel_axis]} channels; at most {MAX_CHANNELS}")
    moved = np.moveaxis(array, channel_axis, 0)
    return np.ascontiguousarray(moved.astype(array.dtype.newbyteorder("="), copy=False)), channel_axis


def _finite(samples: np.ndarray, nan: str, *, keeps: bool) -> np.ndarray:
    if nan not in ("raise", "fill"):
        raise ValueError(f"nan={nan!r} must be 'raise' or 'fill'")
    if samples.dtype != np.float32 or keeps:
        return samples
    finite = np.isfinite(samples)
    if finite.all():
        return samples
    count = int(finite.size - finite.sum())
    if nan == "raise" or not finite.any():
        raise ValueError(f"array has {count} values that are not finite; pass nan='fill' to replace them by the mean")
    return np.where(finite, samples, samples[finite].mean(dtype=np.float64).astype(np.float32))


def _target(
    samples: np.ndarray, ratio: float | None, size: int | None, bpv: float | None, psnr: float | None,
    max_error: float | None, lossless: bool,
) -> Target:  # fmt: skip
    given = {
        "ratio": ratio,
        "bytes": size,
        "bpv": bpv,
        "psnr": psnr,
        "max_error": max_error,
        "lossless": lossless or None,
    }
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1:
        raise ValueError(f"give exactly one target of {', '.join(given)}; got {', '.join(named) or 'none'}")
    ((name, value),) = named.items()
    if name == "lossless":
        return Target(max_error=0)
    if isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name}={value} must be a finite number")
    if name == "max_error":
        if value < 0:
            raise ValueError(f"max_error={value} must be at least 0")
        return Target(max_error=float(value))
    if value <= (1 if name == "ratio" else 0):
        raise ValueError(f"{name}={value} must be above {1 if name == 'ratio' else 0}")
    if name == "psnr":
        mse = peak(samples) ** 2 * 10 ** (-value / 10)
        return Target(mse=mse) if mse > 0 else Target(max_error=0)
    by_name = {"ratio": samples.nbytes / value, "bytes": value, "bpv": samples.size * value / 8}
    return Target(bytes=int(by_name[name]))


def _check_choices(preset: str, layers: str, max_seconds: float | None) -> None:
    for name, value, allowed in (("preset", preset, get_args(Preset)), ("layers", layers, get_args(Layers))):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"max_seconds={max_seconds} must be above 0")


def _as_json(metadata: dict[str, Any] | None) -> bytes:
    import json

    return b"" if not metadata else json.dumps(metadata, separators=(",", ":"), allow_nan=False).encode()
