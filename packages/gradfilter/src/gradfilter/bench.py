"""Speed and memory of filtered training beside PyTorch's exact backward pass, measured in turns in one process."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from gradfilter.conv import CompactConv2d, FilteredConv2d
from gradfilter.conversion import convert
from gradfilter.timing import step_seconds
from gradfilter.trace import trace
from visionkernels.profiling import BenchRow, compare, saved_activation_bytes, torch_threads

__all__ = ["measure"]

# name: (batch, in, out, side, kernel, stride, padding, dilation, groups), {radius: target of backward}
_LAYERS: dict[str, tuple[tuple[int, ...], dict[int, float | None]]] = {
    "resnet18-stage2-b32": ((32, 128, 128, 28, 3, 1, 1, 1, 1), {2: 6.5, 4: 13.0, 7: 14.0}),
    "resnet18-stage2-b1": ((1, 128, 128, 28, 3, 1, 1, 1, 1), {2: None, 4: None, 7: None}),
    "resnet18-stage3-b32": ((32, 256, 256, 14, 3, 1, 1, 1, 1), {2: None, 4: None, 7: None}),
    "resnet18-stage4-b1": ((1, 512, 512, 7, 3, 1, 1, 1, 1), {2: 4.0, 4: None, 7: None}),
    "resnet18-stage4-b32": ((32, 512, 512, 7, 3, 1, 1, 1, 1), {2: None, 4: None, 7: None}),
    "aspp-dilation12-b8": ((8, 512, 256, 28, 3, 1, 12, 12, 1), {2: 7.0, 4: None, 7: 16.0}),
    "resnet18-shortcut-b32": ((32, 256, 512, 14, 1, 2, 0, 1, 1), {2: None, 7: None}),
    "mobilenetv2-project-b32": ((32, 960, 320, 7, 1, 1, 0, 1, 1), {2: None, 7: None}),
    "mobilenetv2-depthwise-b32": ((32, 960, 960, 7, 3, 1, 1, 1, 960), {2: None, 7: None}),
}
_MODELS = ("resnet18", "mobilenet_v2")


def measure(*, full: bool = False) -> Iterator[BenchRow]:
    """Yield all rows as they are measured; `full` adds repeats and timings with two threads."""
    yield from _memory_rows()
    repeats = 21 if full else 9
    for threads in (1, 2) if full else (1,):
        for name, (sizes, targets) in _LAYERS.items():
            yield from _layer_rows(name, sizes, targets, threads, repeats)
        yield from _compact_rows(threads, repeats)
        yield from _training_rows(threads, max(3, repeats // 3))
    with torch_threads(1):
        for model in _MODELS:
            for batch in (1, 8, 32):
                yield _objective_row(model, batch)


def _layer_rows(
    name: str, sizes: tuple[int, ...], targets: dict[int, float | None], threads: int, repeats: int
) -> Iterator[BenchRow]:
    """Time backward alone: the gradients of weight and input, from a kept forward pass."""
    batch, channels, outputs, side, kernel, stride, padding, dilation, groups = sizes
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups, bias=False)
    x = torch.randn(batch, channels, side, side, generator=generator)
    layers: dict[str, nn.Conv2d] = {"exact": conv}
    layers |= {str(radius): FilteredConv2d.from_conv(copy.deepcopy(conv), radius) for radius in targets}
    passes = {key: _backward(layer, x.clone().requires_grad_()) for key, layer in layers.items()}
    timings = compare(passes, threads=threads, repeats=repeats)
    for radius, target in targets.items():
        yield _row(
            f"backward-{name}-r{radius}-{threads}t", timings[str(radius)].median, timings["exact"].median,
            target if threads == 1 else None, threads, "x".join(map(str, sizes[:4])),
            f"kernel {kernel}, stride {stride}, dilation {dilation}, groups {groups}",
        )  # fmt: skip


def _backward(layer: nn.Conv2d, x: Tensor) -> Callable[[], object]:
    out = layer(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return lambda: torch.autograd.grad(out, (layer.weight, x), grad, retain_graph=True)


def _row(
    name: str, ours: float, baseline: float, target: float | None, threads: int, shape: str, note: str = ""
) -> BenchRow:
    return BenchRow(
        id=name, ours_s=ours, baseline_s=baseline, ratio=baseline / ours, target=target, threads=threads,
        dtype="float32", shape=shape, note=note,
    )  # fmt: skip


def _compact_rows(threads: int, repeats: int) -> Iterator[BenchRow]:
    """Time a whole step of one layer with momentum: compact beside filtered and exact training."""
    x = torch.randn(1, 512, 7, 7)
    steps = {}
    for name in ("exact", "filtered", "compact"):
        conv = nn.Conv2d(512, 512, 3, padding=1, bias=False)
        layer: nn.Module = conv if name == "exact" else FilteredConv2d.from_conv(conv, 2)
        if name == "compact":
            CompactConv2d.from_filtered(layer)  # type: ignore[arg-type]
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        steps[name] = partial(_step, layer, torch.optim.SGD(trained, lr=1e-6, momentum=0.9), x.clone().requires_grad_())
    timings = compare(steps, threads=threads, repeats=repeats)
    for baseline in ("exact", "filtered"):
        yield _row(
            f"step-resnet18-stage4-b1-r2-compact-vs-{baseline}-{threads}t", timings["compact"].median,
            timings[baseline].median, None, threads, "1x512x512x7", "forward, backward, SGD with momentum",
        )  # fmt: skip


def _step(layer: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    layer(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    x.grad = None


def _training_rows(threads: int, repeats: int) -> Iterator[BenchRow]:
    """Time fine-tuning of ResNet-18, batch 32 of 224 pixels: last four convolutions; the head alone is the ceiling."""
    x, labels = torch.randn(32, 3, 224, 224), torch.arange(32)
    steps = {}
    for name, radius in (("exact", None), ("r2", 2), ("r4", 4), ("r7", 7), ("head", None)):
        torch.manual_seed(0)
        model = torchvision.models.resnet18().train()
        convert(model, {"*": radius}, last_n=4, example_input=x, lean_activations=radius is not None, warns=False)
        if name == "head":
            model.requires_grad_(False)
            model.fc.requires_grad_(True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)
        steps[name] = partial(_train, model, optimizer, x, labels)
    timings = compare(steps, threads=threads, repeats=repeats, warmup=1)
    for name in ("r2", "r4", "r7", "head"):
        share = timings["head"].median / timings[name].median
        yield _row(
            f"finetune-resnet18-last4-b32-{name}-vs-exact-{threads}t", timings[name].median, timings["exact"].median,
            None, threads, "32x3x224x224",
            f"{32 / timings[name].median:.1f} images/s, {100 * share:.0f} % of the speed of training the head alone",
        )  # fmt: skip


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> None:
    F.cross_entropy(model(x), labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def _objective_row(name: str, batch: int) -> BenchRow:
    """Time the layers that `objective="time"` filters again and report the one that gains least."""
    x = torch.empty(batch, 3, 224, 224)
    model = getattr(torchvision.models, name)()
    report = convert(model, 2, example_input=x, objective="time", warns=False)
    filtered = set(report.filtered)
    first, *others = trace(model, x).convolutions
    calls = [call for call in (first, *others) if call.name in filtered]
    ratios = {}
    for call in calls:
        exact, ours = step_seconds(call, [None, 2], needs_input_gradient=call.name != first.name, repeats=15)
        ratios[call.name] = exact / ours
    slowest = min(ratios, key=ratios.__getitem__, default="none")
    return BenchRow(
        # without a filtered layer, none is slower than exact
        id=f"objective-time-{name}-b{batch}-least", ratio=ratios.get(slowest, 1.0), target=1.0,
        threads=torch.get_num_threads(), dtype="float32", shape=f"{batch}x3x224x224",
        note=f"{slowest} of {len(calls)} filtered, {len(report.layers) - len(calls)} left exact; forward and backward",
    )  # fmt: skip


def _memory_rows() -> Iterator[BenchRow]:
    """Measure what autograd keeps for the whole model, training its last four convolutions on one 224 px image."""
    x = torch.randn(1, 3, 224, 224)
    frozen: dict[str, Any] = {"train_norm": "none"}
    cases: dict[str, tuple[str, dict[str, Any], float | None]] = {
        "lean-frozen-norms": ("exact-frozen-norms", {"lean_activations": True, **frozen}, 5.0),
        "frozen-norms": ("exact-frozen-norms", {"lean_activations": False, **frozen}, None),
        "lean-trained-norms": ("exact", {"lean_activations": True}, None),
        "trained-norms": ("exact", {"lean_activations": False}, None),
    }
    for model_name in _MODELS:
        for case, (baseline, options, target) in cases.items():
            ours = _kept(model_name, x, 2, **options)
            exact = _kept(
                model_name, x, None, lean_activations=False, norm_stats="update",
                **(frozen if baseline == "exact-frozen-norms" else {}), is_training=baseline == "exact",
            )  # fmt: skip
            yield BenchRow(
                id=f"memory-{model_name}-last4-r2-{case}", ratio=exact / ours, threads=1, dtype="float32",
                target=target if model_name == "resnet18" else None, shape="1x3x224x224",
                note=f"kept {ours / 1024:.1f} KiB, stock {exact / 1024:.1f} KiB",
            )  # fmt: skip
    layer = CompactConv2d(512, 512, 3)
    yield BenchRow(
        id="memory-optimizer-state-3x3-compact", ratio=layer.base.numel() / layer.offset.numel(), target=9.0, threads=1,
        dtype="float32", shape="512x512x3x3", note="elements of a buffer of momentum",
    )  # fmt: skip


def _kept(name: str, x: Tensor, radius: int | None, *, is_training: bool = True, **options: Any) -> int:
    model = getattr(torchvision.models, name)().train(is_training)
    convert(model, {"*": radius}, last_n=4, warns=False, **options)
    return saved_activation_bytes(lambda: model(x))
