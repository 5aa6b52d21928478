"""Distillation beside the official algorithm, in turns in one process: `g2sd bench`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from g2sd.baselines import (
    plain_attention,
    plain_biased_attention,
    plain_channel_wise,
    plain_generic_loss,
    two_softmax_channel_wise,
)
from g2sd.blocks import LeanAttention
from g2sd.generic import GenericDistiller
from g2sd.mae import create_autoencoder
from g2sd.segmentation_backbone import BiasedAttention, relative_index
from g2sd.segmentation_losses import channel_wise_loss
from visionkernels.profiling import BenchRow, Timing, compare, saved_activation_bytes

__all__ = ["measure"]

_BATCH = 8
_TEACHER = "mae_vit_base_patch16"


def measure(*, full: bool = False) -> Iterator[BenchRow]:
    """Yield the rows, one thread each; `full` also two threads and more repeats."""
    for threads in (1, 2) if full else (1,):
        yield from _losses(threads, 21 if full else 9)
        yield from _attention(threads, 9 if full else 5)
        yield from _steps(threads, 9 if full else 5)
        yield _several(threads, 7 if full else 3)
    yield _saved()


def _distiller(*names: str) -> tuple[GenericDistiller, Tensor, Tensor]:
    torch.manual_seed(0)
    students = [create_autoencoder(name, teacher_width=768, teacher_decoder_width=512) for name in names]
    return (
        GenericDistiller(create_autoencoder(_TEACHER), students),
        torch.randn(_BATCH, 3, 224, 224),
        torch.rand(_BATCH, 196),
    )


def _steps(threads: int, repeats: int) -> Iterator[BenchRow]:
    """Time forward, backward and update of ViT-S, in float32 and under bfloat16 autocast."""
    distiller, images, noise = _distiller("mae_vit_small_patch16")
    optimizer = _optimizer(distiller, fused=True)
    plain_optimizer = _optimizer(distiller, fused=False)

    def ours() -> Tensor:
        return distiller(images, noise).loss

    timings = compare(
        {
            "float32": partial(_step, ours, optimizer),
            "bfloat16": partial(_step, ours, optimizer, is_half=True),
            "plain": partial(_step, partial(plain_generic_loss, distiller, images, noise), plain_optimizer),
        },
        repeats=repeats, threads=threads, warmup=1,
    )  # fmt: skip
    for dtype, target in (("float32", 1.15), ("bfloat16", 1.8)):
        note = "beside the official algorithm in float32: clamped scores kept, encoder head run, torch's default AdamW"
        yield _row(f"generic step/{dtype}", timings, dtype, "plain", target, threads, _shape("S"), note, dtype)


def _several(threads: int, repeats: int) -> BenchRow:
    """Time Tiny and Small at once beside one after the other, forward, backward and update."""
    both, images, noise = _distiller("mae_vit_tiny_patch16", "mae_vit_small_patch16")
    alone = [
        GenericDistiller(both.teacher, student) for student in both.students.members  # type: ignore[arg-type]
    ]  # fmt: skip
    optimizers = {id(model): _optimizer(model, fused=True) for model in (both, *alone)}

    def run(*distillers: GenericDistiller) -> None:
        for distiller in distillers:
            _step(lambda model=distiller: model(images, noise).loss, optimizers[id(distiller)])  # type: ignore[misc]

    timings = compare(
        {"together": partial(run, both), "apart": partial(run, *alone)},
        repeats=repeats, threads=threads, warmup=1,
    )  # fmt: skip
    return _row("two students", timings, "together", "apart", 1 / 0.75, threads, _shape("Ti and S"), "beside two runs")


def _saved() -> BenchRow:
    distiller, images, noise = _distiller("mae_vit_small_patch16")
    ours = saved_activation_bytes(lambda: distiller(images, noise).loss)
    plain = saved_activation_bytes(lambda: plain_generic_loss(distiller, images, noise))
    note = f"kept for backward: {ours / _BATCH / 1e6:.1f} MB an image, official algorithm {plain / _BATCH / 1e6:.1f} MB"
    return BenchRow(
        id="saved activations", ratio=plain / ours, target=1 / 0.6, threads=1, dtype="float32", shape=_shape("S"),
        note=note,
    )  # fmt: skip


def _losses(threads: int, repeats: int) -> Iterator[BenchRow]:
    """Time channel-wise distillation, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 150, 128, 128, generator=generator) for _ in range(2))
    losses: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
        "ours": channel_wise_loss, "official": plain_channel_wise, "two softmaxes": two_softmax_channel_wise
    }  # fmt: skip

    def run(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        # the weight of the paper, whose gradient counts
        (3 * loss(student.detach().requires_grad_(), teacher)).backward()

    timings = compare({name: partial(run, loss) for name, loss in losses.items()}, repeats=repeats, threads=threads)
    for baseline, target in (("official", 2.0), ("two softmaxes", 1.2)):
        yield _row(
            f"channel-wise/{baseline}", timings, "ours", baseline, target, threads, "2x150x128x128",
            "forward and backward",
        )  # fmt: skip


def _attention(threads: int, repeats: int) -> Iterator[BenchRow]:
    """Time attention of ViT-S over 1,025 tokens, as at 512 pixels: alone, and with its linear layers."""
    torch.manual_seed(0)
    x, grid = torch.randn(1, 1025, 384), (32, 32)
    plain, biased = LeanAttention(384, 6, qkv_bias=True), BiasedAttention(384, 6, grid).eval()
    index = relative_index(grid)
    pairs: Mapping[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "plain": (partial(plain, x), lambda: plain_attention(plain, x)[0]),
        "biased": (partial(biased, x, index), partial(plain_biased_attention, biased, x, index)),
    }
    notes = {"plain": "scores that are kept and clamped", "biased": "biases gathered at each call"}
    with torch.no_grad():
        for is_alone in (True, False):
            for name, (ours, theirs) in pairs.items():
                with _identities(plain, biased, active=is_alone):
                    timings = compare({"ours": ours, "official": theirs}, repeats=repeats, threads=threads)
                place = f"attention/{name}" + ("" if is_alone else " with linear layers")
                note = f"inference, beside {notes[name]}"
                yield _row(
                    place, timings, "ours", "official", 2.0 if is_alone else None, threads, "1x1025x384, 6 heads", note
                )


@contextmanager
def _identities(*modules: Any, active: bool) -> Iterator[None]:
    """Let attention do without its linear layers: queries, keys and values are the input."""
    kept = [(module, module.qkv, module.proj) for module in modules]
    for module in modules if active else ():
        module.qkv, module.proj = _Thrice(), nn.Identity()
    try:
        yield
    finally:
        for module, qkv, proj in kept:
            module.qkv, module.proj = qkv, proj


class _Thrice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 1, 3)


def _optimizer(distiller: nn.Module, *, fused: bool) -> torch.optim.Optimizer:
    trained = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, 1e-4, fused=fused)


def _step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, *, is_half: bool = False) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        value = loss()
    optimizer.zero_grad()
    value.backward()
    optimizer.step()


def _shape(student: str) -> str:
    return f"batch {_BATCH}, 224 pixels, teacher ViT-B, student ViT-{student}"


def _row(
    id: str, timings: Mapping[str, Timing], ours: str, baseline: str, target: float | None, threads: int, shape: str,
    note: str, dtype: str = "float32",
) -> BenchRow:  # fmt: skip
    mine, theirs = timings[ours].median, timings[baseline].median
    return BenchRow(
        id=id, ours_s=mine, baseline_s=theirs, ratio=theirs / mine, target=target, threads=threads, dtype=dtype,
        shape=shape, note=note,
    )  # fmt: skip
