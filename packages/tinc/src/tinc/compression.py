"""Compressing an array to a number of bytes, a PSNR, or a bound on the error."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Literal, get_args

import numpy as np

from tinc.container import MAX_AXES, MAX_CHANNELS, Contents, ExactSection, ResidualSection, TreeSection, pack
from tinc.design import choose_blocks, cut, design_tree, leaf_splits, tree_share
from tinc.entropy import BitWriter
from tinc.exact import PaletteGrid, StepGrid, choose_grid, encode_box, encode_palette
from tinc.file import TincFile
from tinc.fitting import FitPlan, Progress, fit_tree
from tinc.mask import MaskCoder
from tinc.residual import RATE, ResidualEncoder
from tinc.signal import DTYPES, SampleFormat, describe
from tinc.tree import QuantizedTree, TreeShape, write_constants, write_weights

__all__ = ["Layers", "Preset", "compress"]

Preset = Literal["fast", "balanced", "best"]
Layers = Literal["auto", "tree", "residual", "both"]

_STEPS: dict[str, int] = {"fast": 0, "balanced": 2500, "best": 6000}
_STEPS_FROM, _STEPS_TO = 0.25, 2.0**35
"""Of the residual layer, in working units."""
_TILE_CHECKS_FROM = 1 << 16
"""Bytes from which each stream has a checksum of its own, for readers of a part."""


@dataclass(frozen=True)
class _Target:
    """Exactly one of the three."""

    bytes: int | None = None
    mse: float | None = None
    """In squared samples."""
    max_error: float | None = None


class _OutOfReachError(ValueError):
    """No file meets the target."""


class _Report:
    """Tells the caller what is going on, and remembers that it wants no more."""

    def __init__(self, callback: Callable[[str, float], None] | None) -> None:
        self.callback, self.is_stopped = callback, False

    def __call__(self, stage: str, quality: float) -> None:
        if self.callback is None or self.is_stopped:
            return
        try:
            self.callback(stage, quality)
        except KeyboardInterrupt:
            self.is_stopped = True


@dataclass(frozen=True)
class _Job:
    """What does not change while ways to compress are tried."""

    samples: np.ndarray
    """[channels, ...]"""
    working: np.ndarray
    contents: Contents
    preset: Preset
    seed: int
    deadline: float | None
    report: _Report

    @property
    def extent(self) -> tuple[int, ...]:
        return tuple(self.working.shape)

    def squared_error(self, contents: Contents) -> float:
        """Return the sum of squared errors of the samples, in squared working units."""
        decoded = _finish(contents)
        errors = decoded._first(decoded.decode()).astype(np.float64) - self.samples
        return float(np.square(errors).sum()) / 4.0**self.contents.format.exponent


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
    job = _Job(
        samples,
        working,
        contents,
        preset,
        seed,
        None if max_seconds is None else monotonic() + max_seconds,
        _Report(callback),
    )
    if target.max_error is not None:
        return _finish(_compress_exactly(job, target.max_error, layers))
    if samples.min() == samples.max():
        return _finish(_compress_exactly(job, 0, "residual"))
    file = _compress_to(job, target, layers)
    return _finish(file)


def _compress_to(job: _Job, target: _Target, layers: Layers) -> Contents:
    """Return the best of what `layers` allows."""
    if target.bytes is not None and layers == "auto" and _may_fit_exactly(job.samples, target.bytes):
        exact = _compress_exactly(job, 0, "residual")
        if len(_packed(exact)) <= target.bytes:
            return exact
    if layers == "tree":
        return _tree_alone(job, target)
    if target.mse is not None and layers == "auto":
        return _to_quality(job, target)
    return _with_residual(job, target, layers).contents


def _to_quality(job: _Job, target: _Target) -> Contents:
    """Return the smallest file of a quality; without any loss where that is smaller, or nothing else is good enough."""
    try:
        found = _with_residual(job, target, "auto")
    except _OutOfReachError:
        return _compress_exactly(job, 0, "residual")
    if _may_fit_exactly(job.samples, found.size):
        exact = _compress_exactly(job, 0, "residual")
        if len(_packed(exact)) <= found.size:
            return exact
    return found.contents


def _with_residual(job: _Job, target: _Target, layers: Layers) -> "_Found":
    """Return the better of a residual layer alone and one beside a tree, or what `layers` asks for."""
    job.report("residual layer", math.nan)
    plain = _best(job, target, None)
    if layers == "residual" or (layers == "auto" and (not _STEPS[job.preset] or job.report.is_stopped)):
        return plain
    tree = _fit(job, tree_share(target.bytes or plain.size, job.working.size))
    both = _best(job, target, tree)
    return both if layers == "both" or both.is_better(plain, target) else plain


def _best(job: _Job, target: _Target, tree: QuantizedTree | None) -> "_Found":
    """Return the better of a residual layer without a mask and, where there is a background, with one."""
    searches = [_Search(job, target, tree, None)]
    background = _background(job.working)
    if background is not None and _mask_size(job.working != background) < 0.6 * (target.bytes or math.inf):
        searches.append(_Search(job, target, tree, background))
    if job.preset == "fast" and len(searches) > 1:
        searches = [min(searches, key=lambda search: search.loss(searches[0].start))]
    found, errors = [], []
    for search in searches:
        try:
            found.append(search.run())
        except _OutOfReachError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found[-1] if len(found) == 1 or found[1].is_better(found[0], target) else found[0]


def _background(working: np.ndarray) -> int | None:
    """Return the value of at least a twentieth of the voxels, in working units, or None."""
    values, counts = np.unique(working, return_counts=True)
    return int(values[counts.argmax()]) if counts.max() >= working.size / 20 else None


def _mask_size(mask: np.ndarray) -> int:
    """Return the bytes of a mask."""
    writer = BitWriter()
    MaskCoder().write(writer, mask)
    return len(writer.finish())


def _may_fit_exactly(samples: np.ndarray, target: int) -> bool:
    """Tell, by a box in its middle, whether an array without any loss may be as small as the target."""
    sizes = samples.shape[1:]
    box = tuple(slice((n - min(n, 24)) // 2, (n + min(n, 24)) // 2) for n in sizes)
    part = samples[(slice(None), *box)]
    size = len(encode_box(choose_grid(part, 0).numbers(part)))
    return size * samples.size < 1.5 * target * part.size


@dataclass(frozen=True)
class _Found:
    """A way to compress, finished."""

    contents: Contents
    size: int
    error: float
    """Sum of squares, in squared working units."""

    def is_better(self, other: "_Found", target: _Target) -> bool:
        return self.error < other.error if target.bytes is not None else self.size < other.size


class _Search:
    """Looks for the step of the residual layer that meets the target."""

    def __init__(self, job: _Job, target: _Target, tree: QuantizedTree | None, background: int | None) -> None:
        self.job, self.target, self.tree, self.background = job, target, tree, background
        self.mask = None if background is None else job.working != background
        whole = tuple(slice(0, size) for size in job.working.shape[1:])
        self.residual = job.working if tree is None else job.working - tree.decode(whole)
        self.base = job.contents if tree is None else _with_tree(job.contents, tree)
        unit = 2.0**job.contents.format.exponent
        self.largest_error = None if target.mse is None else target.mse / unit**2 * job.working.size
        guess = target.bytes or self.residual.size / 8
        self.blocks, self.start = choose_blocks(self.residual, guess, self.mask)
        self.encoder = ResidualEncoder(self.residual, self.blocks, self.mask)

    def loss(self, step: float) -> float:
        """Return error + rate * bits at a step."""
        encoded = self.encoder.encode(step)
        return encoded.squared_error + 8 * RATE * step**2 * encoded.size

    def run(self) -> _Found:
        """Return the best file that meets the target. Raises ValueError if the smallest is too large."""
        step, low, high = self.start, _STEPS_FROM, _STEPS_TO
        best: _Found | None = None
        for _ in range(24):
            found = self._try(step)
            self.job.report("residual layer", _quality(self.job, found.error))
            if self._meets(found) and (best is None or found.is_better(best, self.target)):
                best = found
            # files get smaller and worse with the step
            if self._meets(found) == (self.target.bytes is None):
                low = step
            else:
                high = step
            if best is not None and (self._is_near(best) or self.job.report.is_stopped):
                break
            if high / low < 1.001:
                # what bits cost depends a little on the way that led here
                low, high = 0.99 * low, 1.01 * high
            step = min(max(self._next(step, low, high, found), _STEPS_FROM), _STEPS_TO)
        if best is None:
            raise _OutOfReachError(
                f"the target is out of reach: the last file of this array has {found.size} bytes, a ratio of "
                f"{self.job.samples.nbytes / found.size:.0f}"
            )
        return best

    def _try(self, step: float) -> _Found:
        encoded = self.encoder.encode(step)
        contents = replace(
            self.base,
            residual=ResidualSection(self.blocks, encoded.quantizer, self.background),
            streams=(*self.base.streams, *encoded.streams),
        )
        error = encoded.squared_error
        if self.target.mse is not None:  # the promise is of samples, which are rounded and kept within their type
            error = self.job.squared_error(contents)
        return _Found(contents, len(_packed(contents)), error)

    def _excess(self, found: _Found) -> float:
        """Return by which share a file is larger or worse than asked for."""
        if self.target.bytes is not None:
            return found.size / max(self.target.bytes, 1) - 1
        assert self.largest_error is not None
        return found.error / self.largest_error - 1

    def _is_near(self, best: _Found) -> bool:
        """Tell whether no better step is worth looking for; streams grow by words of four bytes."""
        return self._excess(best) > -max(0.002, 4 / (self.target.bytes or math.inf))

    def _meets(self, found: _Found) -> bool:
        return self._excess(found) <= 0

    def _next(self, step: float, low: float, high: float, found: _Found) -> float:
        """Return a step that should come out a thousandth below the target, within the bounds."""
        if self.target.bytes is not None:
            fixed = len(_packed(self.base))
            wanted = max(0.999 * self.target.bytes - fixed, 1)
            guess = step * (max(found.size - fixed, 1) / wanted) ** 0.75
        else:
            assert self.largest_error is not None
            guess = step * (0.999 * self.largest_error / max(found.error, 1e-9)) ** 0.6
        if low == _STEPS_FROM or high == _STEPS_TO:  # one end is still open: go on in strides that grow
            return min(max(guess, 1.5 * step), 64 * step) if low == step else max(min(guess, step / 1.5), step / 64)
        margin = (high / low) ** 0.1
        # a guess that lands at an end again would creep along it
        return guess if low * margin < guess < high / margin else math.sqrt(low * high)


def _fit(job: _Job, budget: float) -> QuantizedTree:
    """Train a tree of about `budget` bytes."""
    extent = job.extent[1:]
    splits = leaf_splits(extent, budget)
    everywhere = TreeShape(extent, splits, ((1,),) * (len(splits) - 1) + ((job.extent[0],),))
    boxes = [(slice(None), *everywhere.box(leaf)) for leaf in range(everywhere.num_leaves)]
    constant = np.array(
        [
            bool(
                (
                    job.working[box]
                    == job.working[box].reshape(len(job.working), -1)[:, :1].reshape(-1, *[1] * len(extent))
                ).all()
            )
            for box in boxes
        ]
    )
    if constant.all():
        constant[0] = False
    shape = design_tree(extent, job.extent[0], budget, constant)
    plan = FitPlan(steps=_STEPS[job.preset] or 1000)

    def callback(progress: Progress) -> None:
        mse = progress.mse * job.working.size
        job.report(f"tree, step {progress.step} of {progress.steps}", _quality(job, mse))
        if job.report.is_stopped:
            raise KeyboardInterrupt

    tree = fit_tree(shape, job.working, budget, plan=plan, seed=job.seed, deadline=job.deadline, callback=callback)
    values = [
        job.working[box].reshape(len(job.working), -1)[:, 0] for box, same in zip(boxes, constant, strict=True) if same
    ]
    return replace(tree, constants=np.array(values, dtype=np.int64).reshape(-1, job.extent[0]))


def _tree_alone(job: _Job, target: _Target) -> Contents:
    """Train trees until one meets the target; one that is a little too large gets coarser weights."""
    budget = target.bytes if target.bytes is not None else job.samples.nbytes / 64
    for attempt in range(8):
        tree = _fit(job, budget)
        contents = _with_tree(job.contents, tree)
        size = len(_packed(contents))
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
            coarser = _with_tree(job.contents, tree.coarser(1.02**power))
            if len(_packed(coarser)) <= target.bytes:
                return coarser
        if is_last:
            break
        budget *= 0.995 * target.bytes / size
    raise _OutOfReachError(f"the target is out of reach of a tree alone: the last one has {size} bytes")


def _with_tree(contents: Contents, tree: QuantizedTree) -> Contents:
    writer = BitWriter()
    spreads = write_weights(writer, tree)
    write_constants(writer, tree)
    section = TreeSection(
        tree.shape,
        tuple(layer.multiplier for layer in tree.layers),
        tuple(layer.shift for layer in tree.layers),
        spreads,
        tree.base,
    )
    return replace(contents, tree=section, streams=(writer.finish(),))


def _compress_exactly(job: _Job, max_error: float, layers: Layers) -> Contents:
    """Return the smaller of a file without and with a tree."""
    job.report("exact layer", math.inf)
    plain = _exact_contents(job, max_error, None)
    if layers in ("auto", "residual") and (layers == "residual" or job.preset != "best"):
        return plain
    tree = _fit(job, tree_share(len(_packed(plain)), job.working.size))
    both = _exact_contents(job, max_error, tree)
    return plain if layers == "auto" and len(_packed(plain)) <= len(_packed(both)) else both


def _exact_contents(job: _Job, max_error: float, tree: QuantizedTree | None) -> Contents:
    grid = choose_grid(job.samples, max_error)
    contents = job.contents if tree is None else _with_tree(job.contents, tree)
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


def _packed(contents: Contents) -> bytes:
    size = sum(map(len, contents.streams))
    return pack(contents, checks_tiles=size >= _TILE_CHECKS_FROM)


def _finish(contents: Contents) -> TincFile:
    return TincFile(_packed(contents))


def _quality(job: _Job, squared_error: float) -> float:
    """Return the PSNR of a sum of squares in working units."""
    unit = 2.0**job.contents.format.exponent
    mse = squared_error / job.working.size * unit**2
    return math.inf if mse == 0 else 10 * math.log10(_peak(job.samples) ** 2 / mse)


def _peak(samples: np.ndarray) -> float:
    if samples.dtype == np.float32:
        return float(samples.max()) - float(samples.min()) or 1.0
    return float({"uint8": 255, "uint16": 65535, "int16": 65535}[samples.dtype.name])


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
) -> _Target:  # fmt: skip
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
        return _Target(max_error=0)
    if isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name}={value} must be a finite number")
    if name == "max_error":
        if value < 0:
            raise ValueError(f"max_error={value} must be at least 0")
        return _Target(max_error=float(value))
    if value <= (1 if name == "ratio" else 0):
        raise ValueError(f"{name}={value} must be above {1 if name == 'ratio' else 0}")
    if name == "psnr":
        mse = _peak(samples) ** 2 * 10 ** (-value / 10)
        return _Target(mse=mse) if mse > 0 else _Target(max_error=0)
    by_name = {"ratio": samples.nbytes / value, "bytes": value, "bpv": samples.size * value / 8}
    return _Target(bytes=int(by_name[name]))


def _check_choices(preset: str, layers: str, max_seconds: float | None) -> None:
    for name, value, allowed in (("preset", preset, get_args(Preset)), ("layers", layers, get_args(Layers))):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"max_seconds={max_seconds} must be above 0")


def _as_json(metadata: dict[str, Any] | None) -> bytes:
    import json

    return b"" if not metadata else json.dumps(metadata, separators=(",", ":"), allow_nan=False).encode()
