"""`compress`: from an array to a file, step by step.

`tinc.signal` checks the array and turns its samples into working integers, `tinc.encoding` searches layers that meet
the target, `tinc.container` packs them, and `tinc.file` is the file as its reader sees it.
"""

import json
from collections.abc import Callable
from time import monotonic
from typing import Any, Literal

import numpy as np

from tinc.container import pack
from tinc.contents import Contents
from tinc.encoding.candidate import Candidate, packed_size
from tinc.encoding.exact_layer import exact_contents, may_fit_exactly
from tinc.encoding.job import Job, Layers, Preset, Report
from tinc.encoding.residual_layer import best_residual
from tinc.encoding.targets import OutOfReachError, one_request
from tinc.encoding.tree_layer import train_tree, tree_alone
from tinc.file import TincFile
from tinc.signal import read_signal
from tinc.tree.design import tree_share
from visionkernels.checks import check, check_choice

__all__ = ["compress"]


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
    """Compress an array to exactly one target.

    A target of size (`ratio`, `bytes`, `bpv`) is an upper bound of the file's size, a target of quality (`psnr`,
    `max_error`, `lossless`) a lower bound of its quality.

    Args:
        array: 2 to 4 axes, and channels, of uint8, uint16, int16 or float32, in any byte order and memory layout
        ratio: bytes of the array / bytes of the file
        bytes: bytes of the file
        bpv: bits a sample
        psnr: dB, over the range of an integer type, or over the array's own range for float32
        max_error: largest error of a sample
        lossless: keep every sample, bit for bit
        preset: "fast" trains no tree and takes a second or two for a quarter of a million samples; "balanced" and
            "best" train one for thousands of steps, and keep it where the finished file is better with it
        layers: force a tree alone, a residual layer alone, or both; "auto" takes what is best
        channel_axis: axis of the channels; None without channels
        nan: raise ValueError for float32 values that are not finite, or fill them with the mean of the others;
            a lossless file keeps them
        seed: seed of the training
        max_seconds: time limit for the training
        metadata: a JSON object to store in the file; its bytes count
        callback: receives the stage of the search and the PSNR so far, or NaN; it may raise KeyboardInterrupt to
            finish with the best file so far

    Raises TypeError for other types; ValueError for other numbers of axes, an empty array, values that are not finite,
    none or several targets, and a target that cannot be met.
    """
    request = one_request(ratio=ratio, bytes=bytes, bpv=bpv, psnr=psnr, max_error=max_error, lossless=lossless)
    for name, value, choices in (("preset", preset, Preset), ("layers", layers, Layers)):
        check_choice(name, value, choices)
    check_choice("nan", nan, Literal["raise", "fill"])
    check(max_seconds is None or max_seconds > 0, "max_seconds", max_seconds, "above 0")
    is_lossless = request.name == "max_error" and request.value == 0
    signal = read_signal(array, channel_axis, nan=nan, keeps_nan=is_lossless)
    job = Job(
        signal, request.target(signal), preset, seed, None if max_seconds is None else monotonic() + max_seconds,
        Report(callback), _as_json(metadata),
    )  # fmt: skip
    try:
        content = pack(_best_contents(job, layers))
        if len(content) > job.target.size_limit:
            raise OutOfReachError(f"the target is out of reach: a file of this array has {len(content)} bytes")
    except OutOfReachError as error:
        if not job.metadata:
            raise
        what = f"its metadata take {len(job.metadata)} bytes; give a larger target, or leave metadata out"
        raise OutOfReachError(f"{error}; {what}") from error
    # what was just compressed is in memory already
    return TincFile(content, max_nbytes=max(signal.samples.nbytes, 1 << 28))


def _best_contents(job: Job, layers: Layers) -> Contents:
    """Return the best contents that `layers` allows."""
    target = job.target
    if target.max_error is not None:
        return _exact(job, target.max_error, layers)
    if job.signal.samples.min() == job.signal.samples.max():
        return _exact(job, 0, "residual")
    if layers == "tree":
        return tree_alone(job)
    if layers != "auto":
        return _lossy(job, layers).contents
    lossy = None
    if target.bytes is not None:
        exact = _lossless_within(job, target.bytes)
    else:
        try:
            lossy = _lossy(job, layers)
        except OutOfReachError:
            return _exact(job, 0, "residual")
        exact = _lossless_within(job, lossy.size)
    if exact is not None:
        return exact
    return (_lossy(job, layers) if lossy is None else lossy).contents


def _lossless_within(job: Job, size: int) -> Contents | None:
    """Return lossless contents of at most `size` bytes, or None."""
    if may_fit_exactly(job, size):
        exact = _exact(job, 0, "residual")
        if packed_size(exact) <= size:
            return exact
    return None


def _lossy(job: Job, layers: Layers) -> Candidate:
    """Return a residual layer alone, or one beside a tree: what `layers` asks for, or the better."""
    job.report("residual layer", float("nan"))
    plain, size = None, job.target.bytes
    if layers != "both" or size is None:
        plain = best_residual(job, None)
        size = plain.size if size is None else size
        if layers == "residual" or (layers == "auto" and (job.preset == "fast" or job.report.is_stopped)):
            return plain
    both = best_residual(job, train_tree(job, tree_share(size, job.signal.working.size)))
    return both if layers == "both" or plain is None or both.is_better(plain, job.target) else plain


def _exact(job: Job, max_error: float, layers: Layers) -> Contents:
    """Return an exact layer alone, or one beside a tree: what `layers` asks for, or the smaller."""
    job.report("exact layer", float("inf"))
    plain = exact_contents(job, max_error, None)
    if layers == "residual" or (layers == "auto" and job.preset != "best"):
        return plain
    tree = train_tree(job, tree_share(packed_size(plain), job.signal.working.size))
    both = exact_contents(job, max_error, tree)
    return plain if layers == "auto" and packed_size(plain) <= packed_size(both) else both


def _as_json(metadata: dict[str, Any] | None) -> bytes:
    if metadata is None or metadata == {}:
        return b""
    if not isinstance(metadata, dict):
        raise TypeError(f"metadata is of type {type(metadata).__name__}; it must be a dict of JSON values")
    return json.dumps(metadata, separators=(",", ":"), allow_nan=False).encode()
