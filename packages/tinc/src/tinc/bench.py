"""What the bars of speed are measured by: decoding, regions, and training beside the official schedule."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tinc.baselines import PlainTree
from tinc.compression import compress
from tinc.encoding.job import Layers
from tinc.file import TincFile
from tinc.metrics import psnr
from tinc.official.allocation import plan_tree
from tinc.official.model import OctreeMLP, split
from tinc.official.procedure import create_optimizer, weighted_loss
from tinc.official.training import train
from tinc.official.volume import normalise
from tinc.recipes import LossWeight, find_recipe
from tinc.samples import has_official_volume, official_volume, sample_volume
from tinc.signal import SampleFormat
from tinc.tree.design import design_tree
from tinc.tree.fitting import FitPlan, fit_tree
from visionkernels.profiling import BenchRow, compare, torch_threads

__all__ = ["measure"]

_OFFICIAL_STEPS = 10_000


def measure(*, full: bool = False) -> Iterator[BenchRow]:
    """Yield the rows, one thread each; `full` also two threads, and more repeats."""
    for threads in (1, 2) if full else (1,):
        yield from _decoding(threads, repeats=15 if full else 5)
        yield from _official_steps(threads, repeats=15 if full else 5)
        yield _training("example4d", sample_volume(), threads)
        if has_official_volume():
            yield _training("test.tif", official_volume(), threads)


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


def _training(name: str, volume: np.ndarray, threads: int) -> BenchRow:
    """Train until the volume is as good as after the official schedule, with as many bytes of weights."""
    with torch_threads(threads), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "volume.npy"
        np.save(path, volume)
        recipe = replace(
            find_recipe("multi0"), ratio=64.0, batch_size=2048, epochs=_OFFICIAL_STEPS * 2048 // volume.size
        )
        start = time.process_time()
        official = train(recipe, path, Path(folder) / "run", device="cpu")
        baseline = time.process_time() - start
        working = SampleFormat("uint16").to_working(volume[None])
        budget = 4 * official.parameters
        whole = tuple(slice(0, size) for size in volume.shape)
        for steps in (150, 200, 300, 400, 600, 1200):
            start = time.process_time()
            shape = design_tree(volume.shape, 1, budget)
            tree = fit_tree(shape, working, budget, plan=FitPlan(steps=steps, learning_rate=0.05))
            seconds = time.process_time() - start
            decoded = SampleFormat("uint16").to_samples(tree.decode(whole)[0])
            if psnr(volume, decoded) >= official.psnr:
                break
    return BenchRow(
        id=f"tree/official training of {name}", ours_s=seconds, baseline_s=baseline, ratio=baseline / seconds,
        target=10.0, threads=threads, dtype="uint16", shape="x".join(map(str, volume.shape)),
        note=f"CPU seconds; multi0 at 64x, 2048 points a step: {official.psnr:.2f} dB after {_OFFICIAL_STEPS} steps; "
        f"ours {psnr(volume, decoded):.2f} dB after {steps}",
    )  # fmt: skip


def _official_steps(threads: int, *, repeats: int) -> Iterator[BenchRow]:
    """Time a step of the official procedure, nodes stacked, beside one node after the other; weights are as drawn."""
    volume = np.ascontiguousarray(sample_volume()[:8, :, :96])[..., None]
    normalised, _ = normalise(volume)
    for name, ratio, points, target in (("multi2", 4, 513, 4.0), ("multi2", 16, 513, 4.0), ("multi1", 4, 513, None)):
        recipe = replace(find_recipe(name), ratio=float(ratio))
        plan = plan_tree(recipe, normalised, volume.nbytes)
        model, plain = OctreeMLP(plan), PlainTree(plan, normalised)
        optimizer = create_optimizer(model.parameters(), recipe)
        labels = split(torch.from_numpy(normalised), plan.num_levels)
        chosen = torch.randint(0, len(plain.grid), (points,), generator=torch.Generator().manual_seed(0))

        def step(
            model: OctreeMLP = model, optimizer: torch.optim.Optimizer = optimizer, labels: torch.Tensor = labels,
            chosen: torch.Tensor = chosen,
        ) -> None:  # fmt: skip
            optimizer.zero_grad()
            weighted_loss(model(chosen), labels[:, chosen], LossWeight()).backward()
            optimizer.step()

        timings = compare({"ours": step, "plain": partial(plain.step, chosen)}, repeats=repeats, threads=threads)
        ours, baseline = timings["ours"].median, timings["plain"].median
        yield BenchRow(
            id=f"official/{name} {ratio}x", ours_s=ours, baseline_s=baseline, ratio=baseline / ours, target=target,
            threads=threads, dtype="float32", shape=f"{plan.num_parameters} parameters, {points} points a leaf",
            note="a training step beside one node after the other",
        )  # fmt: skip
