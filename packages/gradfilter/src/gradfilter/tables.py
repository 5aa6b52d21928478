"""The paper's tables as data: memory to the digit, what cannot be measured here and why, and digits that learn."""

import atexit
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
import torchvision

from gradfilter.profiles import Profile, profile
from gradfilter.recipes import DIGITS, RECIPES, SegmentationRecipe
from visionkernels.profiling import torch_threads
from visionkernels.tables import CHECKPOINT, DATASET, SAMPLES, TIME, Cell, Figure, Measured, Need, Table, installed

__all__ = ["figures", "tables"]

SEEDS = 5
_START = "--out RUN --data DIR --checkpoint FILE"
_ON_DATA = {
    "resnet18_in1k_last4_r2": "top-1 %",
    "mobilenetv2_cifar10_last4_r2": "top-1 %",
    "mobilenetv2_cifar100_last4_r2": "top-1 %",
    "pspnet_mobilenetv2_voc12_last5_r2": "mIoU %",
    "pspnet_resnet18_cityscapes_last5_r2": "mIoU %",
}
_SHAPES_SEEDS = 3
_DENSE = installed("segmentation_models_pytorch", pip="gradfilter[dense]")
_MCUNET = Need("MCUNet, which no kept library has")
_DEVICE = Need("the paper's devices (Raspberry Pi 3, Jetson Nano)")
# model: {trained convolutions: (KiB exact, KiB with patches of 2)}
_MEMORY = {
    "mobilenet_v2": {2: (245.00, 80.00), 4: (459.38, 150.00)},
    "resnet18": {2: (196.00, 64.00), 4: (490.00, 112.00)},
    "resnet34": {2: (196.00, 64.00), 4: (392.00, 128.00)},
}


def tables() -> list[Table]:
    """Return all tables."""
    return [_memory(), _operations(), _accuracy(), _digits(), _borders(), _shapes()]


def figures() -> list[Figure]:
    """Return what `gradfilter reproduce` draws."""
    caption = (
        "Accuracy on turned digits against what a step keeps for backward: mean and spread of five seeds, the last "
        "four convolutions of six trained."
    )
    return [Figure("digits", "Accuracy and memory on MNIST-5k", caption, _draw_digits, format="svg")]


def _memory() -> Table:
    cells = []
    for model, rows in _MEMORY.items():
        for last_n, kept in rows.items():
            command = f"gradfilter profile torchvision:{model} --last-n {last_n} --radius 2"
            for column, paper, name in zip(("KB", "KB, patches of 2"), kept, ("exact", "2x2"), strict=True):
                cells.append(
                    Cell(row=f"{model} last {last_n}", column=column, paper=paper, digits=2, tolerance=0.005,
                         command=command, measure=partial(_kept, model, last_n, name))
                )  # fmt: skip
    cells.append(
        Cell(row="resnet18 last 4", column="saved %", paper=77.1, digits=1, tolerance=0.05,
             command="gradfilter profile torchvision:resnet18 --last-n 4 --radius 2", measure=_saved)
    )  # fmt: skip
    cells += [
        Cell(row=f"mcunet last {last_n}", column=column, paper=paper, digits=2, tolerance=0.005, source="recalled",
             needs=(_MCUNET,), command="gradfilter profile MODULE:CALLABLE --last-n N --radius 2")
        for last_n, column, paper in (
            (2, "KB", 220.5), (2, "KB, patches of 2", 72.0), (4, "KB", 312.38), (4, "KB, patches of 2", 102.0),
        )
    ]  # fmt: skip
    convention = (
        "What the trained convolutions keep of their inputs: float32, one image of 224 pixels, 1 KB = 1024 bytes. What "
        "autograd keeps besides (norms, activations) is in `gradfilter profile` and in the bench."
    )
    return Table("memory", "Activation memory (ImageNet table)", convention, tuple(cells))


def _operations() -> Table:
    cells = [
        Cell(row=f"{model} last {last_n}", column=column, paper=None, digits=2, tolerance=0.0,
             command=f"gradfilter profile torchvision:{model} --last-n {last_n} --radius 2",
             measure=partial(_mflops, model, last_n, name))
        for model in _MEMORY
        for last_n in (2, 4)
        for column, name in (("MFLOPs", "exact"), ("MFLOPs, patches of 2", "2x2"))
    ]  # fmt: skip
    convention = (
        "Backward of the trained convolutions, a multiply-add counting as 2, the gradient of the first one's input "
        "included, the averages and the kernel's sum too. The paper's own count follows another convention."
    )
    return Table("operations", "Operations of backward (ImageNet table)", convention, tuple(cells))


def _accuracy() -> Table:
    cells = [
        Cell(row=row, column="patches of 2", paper=None, digits=1, tolerance=0.0, needs=needs, command=command)
        for row, needs, command in (
            *(
                (f"{name}: {metric}", (DATASET, CHECKPOINT), f"gradfilter train {name} {_START}")
                for name, metric in _ON_DATA.items()
            ),
            ("latency, energy on devices", (_DEVICE,), "gradfilter bench"),
        )
    ]
    convention = "The paper's figures for these are not available to us, so the column is empty."
    return Table("accuracy", "Accuracy, latency and energy", convention, tuple(cells))


def _digits() -> Table:
    cells = []
    for last_n in (4, 2):
        for label in ("head", "exact", "r1", "r2", "r4", "r7"):
            name = f"tinyconv_mnist5k_last{last_n}_{label}"
            # the two layers' table takes as long again
            needs = (SAMPLES,) if last_n == 4 else (SAMPLES, TIME)
            for column, digits, key in (("top-1 %", 1, "top1"), ("kept KiB", 0, "kept_kib"), ("step ms", 1, "step_ms")):
                cells.append(
                    Cell(row=f"last {last_n}: {label}", column=column, paper=None, digits=digits, tolerance=0.0,
                         command=f"gradfilter train {name} --out runs/{name}", needs=needs,
                         measure=partial(_over_seeds, _transfers, name, key))
                )  # fmt: skip
    convention = (
        f"A network of six convolutions learns 2,500 upright digits, then 1,500 inverted and turned ones in its last "
        f"layers, and is tested on 1,000 of these; {SEEDS} seeds, mean and standard deviation. Before fine-tuning it "
        "is at chance, 10 %. Kept: what a step with 64 images keeps for backward, norms in training mode. Times are "
        "of this machine, one step, batch 64."
    )
    return Table("digits", "Learning here and now: MNIST-5k", convention, tuple(cells))


def _borders() -> Table:
    gradients = ("weight_cosine", "weight_norm_ratio", "input_cosine", "input_norm_ratio")
    cells = []
    for side, last_n in ((14, 4), (9, 4), (14, 2), (9, 2)):
        for label in ("exact", "r2", "r2_plain", "r2_covered"):
            name = f"tinyconv_mnist5k_{side}px_last{last_n}_{label}"
            if name not in DIGITS:
                continue
            figures = [("top-1 %", 1, _transfers, "top1"), ("kept KiB", 0, _transfers, "kept_kib")]
            if label != "exact":
                figures += [(key.replace("_", " "), 2, _gradients, key) for key in gradients]
            cells += [
                Cell(row=f"{side} px, last {last_n}: {label}", column=column, paper=None, digits=digits, tolerance=0.0,
                     command=f"gradfilter train {name} --out runs/{name}", needs=(SAMPLES, TIME),
                     measure=partial(_over_seeds, runs, name, key))
                for column, digits, runs, key in figures
            ]  # fmt: skip
    convention = (
        "As above, on images reduced to 14 and 9 pixels a side: the last four convolutions run on maps of 7, 7, 3, 3 "
        "and of 4, 4, 2, 2 pixels, where 18 and 40, or 31 and 56 % of what taps read is padding. plain counts it as "
        "pixels, covered does not; r2 is plain and leaves the maps of 2 pixels exact, as convert does unless they are "
        "named. Cosine and norm ratio of filtered gradients to exact ones: means over the filtered layers before "
        "fine-tuning, on 60 images."
    )
    return Table("borders", "Borders of small maps: MNIST-5k at 14 and 9 pixels", convention, tuple(cells))


def _shapes() -> Table:
    cells = [
        Cell(row=label, column=column, paper=None, digits=1, tolerance=0.0, needs=(SAMPLES, _DENSE, TIME),
             command=f"gradfilter train pspnet_resnet18_shapes_last5_{label} --out RUN",
             measure=partial(_over_seeds, _segmentations, label, key))
        for label in ("head", "exact", "r2", "r4", "r7")
        for column, key in (("mIoU %", "miou"), ("before %", "miou_before"), ("trivial %", "majority_miou"))
    ]  # fmt: skip
    convention = (
        "PSPNet on ResNet-18, from random weights, learns shapes drawn on photographs in all layers (300 updates), "
        f"then their negatives in the last five convolutions (150 updates); {_SHAPES_SEEDS} seeds, 32 pictures to test "
        "on. Trivial: the background everywhere."
    )
    return Table("shapes", "Learning here and now: segmentation of shapes", convention, tuple(cells))


@cache
def _profile(model: str, last_n: int) -> Profile:
    network = getattr(torchvision.models, model)()
    return profile(network, torch.empty(1, 3, 224, 224), last_n=last_n, radii=[2], measures_memory=False)


def _kept(model: str, last_n: int, name: str) -> float:
    return _profile(model, last_n).total(name, "saved_bytes") / 1024


def _saved() -> float:
    return 100 * (1 - _kept("resnet18", 4, "2x2") / _kept("resnet18", 4, "exact"))


def _mflops(model: str, last_n: int, name: str) -> float:
    return _profile(model, last_n).total(name, "flops") / 1e6


@cache
def _transfers(name: str) -> list[dict[str, float]]:
    from gradfilter.digits import transfer

    with torch_threads(1):  # faster for networks so small, and the same figures on every machine of a kind
        return [transfer(DIGITS[name], seed) for seed in range(SEEDS)]


@cache
def _gradients(name: str) -> list[dict[str, float]]:
    from gradfilter.digits import compare_gradients

    with torch_threads(1):
        return [compare_gradients(DIGITS[name], seed) for seed in range(SEEDS)]


@cache
def _segmentations(label: str) -> list[dict[str, float]]:
    from gradfilter.training import train_segmenter

    found = []
    recipe = RECIPES[f"pspnet_resnet18_shapes_last5_{label}"]
    assert isinstance(recipe, SegmentationRecipe) and recipe.pretraining is not None
    for seed in range(_SHAPES_SEEDS):
        pretraining = replace(recipe.pretraining, seed=seed)
        seeded = replace(recipe, fit=replace(recipe.fit, seed=seed), pretraining=pretraining)
        run, first = _folder() / f"{label}-{seed}" / "pretraining", _folder() / f"head-{seed}" / "pretraining"
        if first.is_dir() and run != first:
            shutil.copytree(first, run)
        found.append(dict(train_segmenter(seeded, None, run.parent).metrics))
    return found


@cache
def _folder() -> Path:
    """A folder that is gone with the process."""
    folder = tempfile.TemporaryDirectory(prefix="gradfilter-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _over_seeds(runs: Callable[[str], list[dict[str, float]]], name: str, key: str) -> Measured:
    values = [found[key] for found in runs(name)]
    return Measured(statistics.mean(values), statistics.stdev(values))


def _draw_digits(path: Path) -> None:
    from visionkernels.extras import require

    pyplot = require("matplotlib.pyplot", "gradfilter[plots]")
    axes_of: Callable[..., tuple[object, object]] = pyplot.subplots
    figure, axes = axes_of(figsize=(6, 4), layout="constrained")
    for label in ("head", "exact", "r1", "r2", "r4", "r7"):
        name = f"tinyconv_mnist5k_last4_{label}"
        accuracy, memory = (_over_seeds(_transfers, name, key) for key in ("top1", "kept_kib"))
        axes.errorbar(memory.value, accuracy.value, accuracy.spread, marker="o", capsize=3)  # type: ignore[attr-defined]
        axes.annotate(label, (memory.value, accuracy.value), xytext=(6, 6), textcoords="offset points")  # type: ignore[attr-defined]
    axes.set(xlabel="kept for backward, KiB", ylabel="top-1, %", xmargin=0.15, ymargin=0.1)  # type: ignore[attr-defined]
    figure.savefig(path, format=path.suffix.lstrip(".") or "svg")  # type: ignore[attr-defined]
    pyplot.close(figure)
