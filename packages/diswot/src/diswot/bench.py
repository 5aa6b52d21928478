"""Time scoring and its losses beside the official algorithm, in turns in one process."""

import math
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import timm
import torch
from torch import nn

import diswot.networks  # noqa: F401 - registers the models
from diswot.baselines import dense_semantic, looped_nst, plain_score
from diswot.data import batches
from diswot.initialisation import Draws, draws_of, initialise
from diswot.losses import create
from diswot.scoring import TeacherCache
from diswot.searching import search
from diswot.similarity import semantic_loss
from diswot.spaces import S0
from visionkernels.profiling import BenchRow, compare, torch_threads

__all__ = ["measure"]

_BATCH = 64
_CANDIDATES, _SECONDS = 1000, 600


def measure(*, full: bool = False) -> Iterator[BenchRow]:
    """Yield the rows, one thread each; `full` also two threads, and a search of 1,000 candidates."""
    for threads in (1, 2) if full else (1,):
        yield from _losses(threads, repeats=9 if full else 5)
        yield from _sweep(threads)
    if full:
        yield _search()


def _losses(threads: int, repeats: int) -> Iterator[BenchRow]:
    generator = torch.Generator().manual_seed(0)
    for classes, channels in ((100, 64), (1000, 512)):
        ours, theirs = (torch.randn(classes, channels, generator=generator) for _ in range(2))
        timings = compare(
            {"ours": partial(semantic_loss, ours, theirs), "dense": partial(dense_semantic, ours, theirs)},
            repeats=3 if channels > 64 else repeats, threads=threads, warmup=1,
        )  # fmt: skip
        yield _row(
            f"semantic/{classes}x{channels}", timings["ours"].median, timings["dense"].median,
            20.0 if classes == 1000 else None, threads, f"{classes} classes, {channels} channels",
            "beside matrices of all pairs of channels",
        )  # fmt: skip
    ours, theirs = (torch.randn(64, 64, 8, 8, generator=generator) for _ in range(2))
    timings = compare(
        {"ours": partial(create("nst"), [ours], [theirs]), "plain": partial(looped_nst, ours, theirs)},
        repeats=repeats, threads=threads,
    )  # fmt: skip
    yield _row("nst", timings["ours"].median, timings["plain"].median, 20.0, threads, "64x64x8x8",
               "beside the products of all pairs of channels at full size")  # fmt: skip


def _sweep(threads: int) -> Iterator[BenchRow]:
    """Score all of S0, each student by ours and by the official algorithm in turn.

    The weights are the same where draws are shared, so that the scores can be compared.
    """
    space, batch = S0(), batches("patches", 1, _BATCH)[0]
    teacher = timm.create_model("cifar_resnet56")
    draws: tuple[Draws, ...] = ("shared", "own")
    seconds: dict[str, float] = {"plain": 0.0}
    worst, expected = 0.0, (math.nan, math.nan)
    with torch_threads(threads):
        caches: dict[str, TeacherCache] = {}
        for kind in draws:
            start = time.perf_counter()
            caches[kind] = TeacherCache(teacher, [batch], seeds=1, init="kaiming", draws=kind)
            seconds[kind] = time.perf_counter() - start
        initialise(teacher.train(), "kaiming", draws_of(0, caches["own"].key, "own"))
        for number, key in enumerate(space.enumerate()):
            student, scores = space.build(key), {}
            for name in list(seconds)[:: 1 if number % 2 else -1]:
                start = time.perf_counter()
                if name == "plain":
                    expected = _plain(teacher, student, key, *batch)
                else:
                    scores[name] = caches[name].score(student, key=key)
                seconds[name] += time.perf_counter() - start
            score = scores["shared"]
            worst = max(worst, abs(score.semantic / expected[0] - 1), abs(score.relation / expected[1] - 1))
    shape = f"{space.size} students, ResNet-56, batch {_BATCH}"
    notes = {"shared": f"shared layers of students once; scores agree to {worst:.1e}", "own": "of each student"}
    for name in notes:
        note = f"forward {notes[name]}; beside forward and backward of both networks for every student"
        yield _row(f"s0 sweep/{name} draws", seconds[name], seconds["plain"], 10.0, threads, shape, note)


def _plain(
    teacher: nn.Module, student: nn.Module, key: str, images: torch.Tensor, labels: torch.Tensor
) -> tuple[float, float]:
    initialise(student.train(), "kaiming", draws_of(0, key, "shared"))
    return plain_score(teacher, student, images, labels)


def _search() -> BenchRow:
    """Search S0 with depths from 1 to 10, a thousand students, all of them."""
    space = S0(depths=tuple(range(1, 11)))
    start = time.perf_counter()
    cache = TeacherCache(
        timm.create_model("cifar_resnet56"), batches("patches", 1, _BATCH), seeds=1, init="kaiming", draws="shared"
    )
    with tempfile.TemporaryDirectory() as folder:
        result = search(space, cache, algorithm="random", evaluations=_CANDIDATES, out=Path(folder) / "run")
    seconds = time.perf_counter() - start
    return BenchRow(
        id="search", ours_s=seconds, baseline_s=float(_SECONDS), ratio=_SECONDS / seconds, target=1.0, threads=2,
        dtype="float32", shape=f"{_CANDIDATES} evaluations, batch {_BATCH}",
        note=f"beside ten minutes; {len(result.candidates)} different students",
    )  # fmt: skip


def _row(id: str, ours: float, plain: float, target: float | None, threads: int, shape: str, note: str) -> BenchRow:
    return BenchRow(
        id=id, ours_s=ours, baseline_s=plain, ratio=plain / ours, target=target, threads=threads, dtype="float32",
        shape=shape, note=note,
    )  # fmt: skip
