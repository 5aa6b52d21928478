"""What the bars of speed are measured by: decoding, regions, and training beside the official schedule."""

import time
from collections.abc import Callable, Iterator
from functools import cache, partial

import numpy as np

from tinc.compression import Layers, compress
from tinc.file import TincFile
from visionkernels.profiling import BenchRow, compare

__all__ = ["measure"]


def measure(*, full: bool = False) -> Iterator[BenchRow]:
    """Yield the rows, one thread each; `full` also two threads, and more repeats."""
    for threads in (1, 2) if full else (1,):
        yield from _decoding(threads, repeats=15 if full else 5)


@cache
def sample_volume() -> np.ndarray:
    """Return a brain volume of nibabel's own data as uint16 [24, 128, 96]."""
    from visionkernels.extras import require

    nibabel = require("nibabel", "tinc-vision[samples]")
    from importlib.resources import as_file, files

    with as_file(files("nibabel") / "tests" / "data" / "example4d.nii.gz") as path:
        series = np.asarray(nibabel.load(path).dataobj)
    return np.ascontiguousarray(series[..., 0].transpose(2, 0, 1)).astype(np.uint16) * 56


def _decoding(threads: int, *, repeats: int) -> Iterator[BenchRow]:
    volume = sample_volume()
    shape = "x".join(map(str, volume.shape))
    kinds: tuple[Layers, ...] = ("residual", "tree")
    for layers in kinds:
        content = compress(volume, ratio=64, preset="fast", layers=layers).tobytes()
        loaded = TincFile(content).load()
        timings = compare(
            {"whole": loaded.decode, "region": partial(loaded.__getitem__, np.s_[8:16, 56:72, 40:56])},
            repeats=repeats, threads=threads,
        )  # fmt: skip
        whole, region = timings["whole"].median, timings["region"].median
        yield BenchRow(
            id=f"{layers}/region", ours_s=region, baseline_s=whole, ratio=whole / region, target=5.0, threads=threads,
            dtype="uint16", shape=f"8x16x16 of {shape}", note="the same file decoded whole",
        )  # fmt: skip
        opened = _seconds(partial(_load, content))
        yield BenchRow(
            id=f"{layers}/decode", ours_s=whole, baseline_s=opened, ratio=opened / whole, threads=threads,
            dtype="uint16", shape=shape, note="beside opening and entropy decoding",
        )  # fmt: skip


def _load(content: bytes) -> TincFile:
    return TincFile(content).load()


def _seconds(function: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]
