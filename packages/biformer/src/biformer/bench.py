"""Speed and memory beside straightforward implementations, measured in turns in one process: `biformer bench`."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from biformer.baselines import Gather, straightforward_core, straightforward_model
from biformer.model import BiFormer
from visionkernels.ops.region_attention import region_attention_packed
from visionkernels.profiling import BenchRow, compare, peak_memory_bytes

__all__ = ["measure"]

# name: (batch, height, width, channels, n_win, topk, heads) of the attention core in some model
_CORES = {
    "stage1-224": (4, 56, 56, 64, 7, 1, 2),
    "stage2-224": (4, 28, 28, 128, 7, 4, 4),
    "stage3-224": (4, 14, 14, 256, 7, 16, 8),
    "stage1-coco-small": (1, 80, 128, 64, 16, 1, 2),
}
_LARGE_CORES = {
    "stage1-coco": (1, 208, 336, 64, 16, 1, 2),
    "stage2-coco": (1, 112, 176, 128, 16, 4, 4),
    "stage3-coco": (1, 64, 96, 256, 16, 16, 8),
}
# the straightforward core at COCO's stage 1 holds 10 GB in backward
_LARGE_BYTES = 14 << 30
_MODEL_TARGETS = {("tiny", 1): 1.4, ("tiny", 8): 1.7, ("small", 1): 1.3, ("small", 8): 1.5}


def measure(*, full: bool = False) -> Iterator[BenchRow]:
    """Yield all rows as they are measured; `full` adds COCO's sizes, timings with two threads and repeats."""
    repeats = 21 if full else 9
    cores = _CORES | (_LARGE_CORES if full and _free_bytes() > _LARGE_BYTES else {})
    for threads in (1, 2) if full else (1,):
        for name, sizes in cores.items():
            few = 3 if name in _LARGE_CORES else repeats
            yield from _core_rows(name, sizes, threads, few)
    for name, sizes in _CORES.items():
        yield from _memory_rows(name, sizes)
    for threads in (1, 2) if full else (1,):
        for size, batch in _MODEL_TARGETS:
            yield from _inference_rows(size, batch, threads, repeats)
        yield from _training_rows("tiny", 4, threads, max(3, repeats // 3))
    yield from _half_precision_rows("tiny", 8, repeats)


def _core_rows(name: str, sizes: tuple[int, ...], threads: int, repeats: int) -> Iterator[BenchRow]:
    for is_training in (False, True):
        timings = compare(_core_candidates(sizes, is_training), threads=threads, repeats=repeats)
        for gather in ("expanded", "index_select"):
            target = {("index_select", False): 1.5, ("index_select", True): 1.0}.get((gather, is_training))
            if gather == "expanded" and name == "stage1-coco-small":
                target = 5.0 if is_training else None
            yield BenchRow(
                id=f"core-{name}-{'fwdbwd' if is_training else 'fwd'}-vs-{gather}-{threads}t",
                ours_s=timings["ours"].median,
                baseline_s=timings[gather].median,
                ratio=timings[gather].median / timings["ours"].median,
                target=target if threads == 1 else None,
                threads=threads,
                dtype="float32",
                shape=_describe(sizes),
            )


def _core_candidates(sizes: tuple[int, ...], is_training: bool) -> dict[str, Callable[[], object]]:
    batch, height, width, channels, n_win, topk, heads = sizes
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, height, width, 3 * channels, generator=generator)
    index = torch.rand(batch, n_win**2, n_win**2, generator=generator).topk(topk, -1).indices
    grad = torch.randn(batch, height, width, channels, generator=generator)
    scale = channels**-0.5

    def ours(qkv: Tensor) -> Tensor:
        return region_attention_packed(
            qkv, index, value_size=channels, num_heads=heads, grid=(n_win, n_win), scale=scale
        )

    def straightforward(qkv: Tensor, gather: Gather) -> Tensor:
        return straightforward_core(qkv, index, n_win=n_win, num_heads=heads, scale=scale, gather=gather)

    def run(core: Callable[[Tensor], Tensor]) -> None:
        if is_training:
            core(qkv.detach().requires_grad_()).backward(grad)
        else:
            with torch.no_grad():
                core(qkv)

    cores: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": ours,
        "expanded": partial(straightforward, gather="expanded"),
        "index_select": partial(straightforward, gather="index_select"),
    }
    return {name: partial(run, core) for name, core in cores.items()}


def _memory_rows(name: str, sizes: tuple[int, ...]) -> Iterator[BenchRow]:
    for is_training in (False, True):
        peaks = {key: peak_memory_bytes(fn) for key, fn in _core_candidates(sizes, is_training).items()}
        targets = {"expanded": 4.0 if name == "stage1-coco-small" and is_training else None, "index_select": 2.0}
        for gather, target in targets.items():
            yield BenchRow(
                id=f"memory-{name}-{'fwdbwd' if is_training else 'fwd'}-vs-{gather}",
                ratio=peaks[gather] / peaks["ours"],
                target=target,
                threads=1,
                dtype="float32",
                shape=_describe(sizes),
                note=f"peak {peaks['ours'] / 2**20:.1f} MiB, baseline {peaks[gather] / 2**20:.1f} MiB",
            )


def _inference_rows(size: str, batch: int, threads: int, repeats: int) -> Iterator[BenchRow]:
    models, x = _models(size), torch.randn(batch, 3, 224, 224)

    def infer(model: BiFormer) -> None:
        with torch.no_grad():
            model(x)

    timings = compare(
        {name: partial(infer, model.eval()) for name, model in models.items()}, threads=threads, repeats=repeats
    )
    for gather in ("expanded", "index_select"):
        yield BenchRow(
            id=f"infer-{size}-b{batch}-vs-{gather}-{threads}t",
            ours_s=timings["ours"].median,
            baseline_s=timings[gather].median,
            ratio=timings[gather].median / timings["ours"].median,
            target=_MODEL_TARGETS[size, batch] if gather == "expanded" and threads == 1 else None,
            threads=threads,
            dtype="float32",
            shape=f"{batch}x3x224x224",
        )


def _training_rows(size: str, batch: int, threads: int, repeats: int) -> Iterator[BenchRow]:
    models, x, labels = _models(size), torch.randn(batch, 3, 224, 224), torch.arange(batch)

    def step(model: BiFormer, optimizer: torch.optim.Optimizer) -> None:
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    steps = {
        name: partial(step, model.train(), torch.optim.AdamW(model.parameters())) for name, model in models.items()
    }
    timings = compare(steps, threads=threads, repeats=repeats, warmup=1)
    for gather in ("expanded", "index_select"):
        yield BenchRow(
            id=f"train-{size}-b{batch}-vs-{gather}-{threads}t",
            ours_s=timings["ours"].median,
            baseline_s=timings[gather].median,
            ratio=timings[gather].median / timings["ours"].median,
            target=2.0 if gather == "expanded" and threads == 1 else None,
            threads=threads,
            dtype="float32",
            shape=f"{batch}x3x224x224",
            note="forward, backward, AdamW",
        )


def _half_precision_rows(size: str, batch: int, repeats: int) -> Iterator[BenchRow]:
    models, x = _models(size), torch.randn(batch, 3, 224, 224)

    def infer(model: BiFormer, is_half: bool) -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            model(x)

    candidates = {
        "ours": partial(infer, models["ours"].eval(), True),
        "ours in float32": partial(infer, models["ours"].eval(), False),
        "expanded": partial(infer, models["expanded"].eval(), True),
    }
    timings = compare(candidates, repeats=repeats)
    for baseline in ("ours in float32", "expanded"):
        yield BenchRow(
            id=f"infer-{size}-b{batch}-bf16-vs-{baseline.replace(' ', '-')}-1t",
            ours_s=timings["ours"].median,
            baseline_s=timings[baseline].median,
            ratio=timings[baseline].median / timings["ours"].median,
            target=1.0 if baseline == "ours in float32" else None,
            threads=1,
            dtype="bfloat16",
            shape=f"{batch}x3x224x224",
            note="autocast",
        )


def _models(size: str) -> dict[str, BiFormer]:
    torch.manual_seed(0)
    model = timm.create_model(f"biformer_{size}")
    assert isinstance(model, BiFormer)
    return {"ours": model} | {gather: straightforward_model(model, gather) for gather in ("expanded", "index_select")}


def _describe(sizes: tuple[int, ...]) -> str:
    batch, height, width, channels, n_win, topk, heads = sizes
    return f"{batch}x{height}x{width}x{channels} n_win={n_win} topk={topk} heads={heads}"


def _free_bytes() -> int:
    with Path("/proc/meminfo").open() as file:
        entries = dict(line.split(":") for line in file)
    return int(entries["MemAvailable"].split()[0]) * 1024
