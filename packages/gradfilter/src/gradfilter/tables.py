"""The paper's tables as data: memory to the digit, figures that cannot be measured here, and learning on digits."""

import atexit
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
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
_GRADIENTS = ("head", "exact", "r1", "r2", "r4", "r7")
_ONE_SEED = ("head", "exact", "r2", "r7")
"""What one seed shows without `--full`."""
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
_MCUNET = Need("MCUNet, which no maintained library has")
_DEVICE = Need("the paper's devices (Raspberry Pi 3, Jetson Nano)")
# model: {trained convolutions: (KiB exact, KiB with patches of 2)}
_MEMORY = {
    "mobilenet_v2": {2: (245.00, 80.00), 4: (459.38, 150.00)},
    "resnet18": {2: (196.00, 64.00), 4: (490.00, 112.00)},
    "resnet34": {2: (196.00, 64.00), 4: (392.00, 128.00)},
}


def tables() -> list[Table]:
    """Return all tables."""
    return [_memory(), _operations(), _accuracy(), _digits_once(), _digits(), _borders(), _shapes()]


def figures() -> list[Figure]:
    """Return the figures of `gradfilter reproduce`."""
    caption = (
        "Accuracy on rotated digits against memory kept for backward, when the last four of six convolutions are "
        f"trained: mean and standard deviation of {SEEDS} seeds under --full, otherwise one seed."
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
        "Inputs that the trained convolutions keep: float32, one image of 224 pixels, 1 KB = 1024 bytes. `gradfilter "
        "profile` and the bench also count what autograd keeps for norms and activations."
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
        "Backward of the trained convolutions; a multiply-add counts as 2, and the gradient of the first one's input, "
        "the averages and the kernel's sum are included. The paper's own count follows another convention."
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
    convention = "We do not have the paper's figures for these, so the column is empty."
    return Table("accuracy", "Accuracy, latency and energy", convention, tuple(cells))


def _digits_once() -> Table:
    cells = _digit_cells(4, _ONE_SEED, (SAMPLES,), _of_seed_0)
    convention = "The next table for seed 0 alone, which takes seconds."
    return Table("digits-seed0", "Learning on this machine: MNIST-5k, one seed", convention, tuple(cells))


def _digits() -> Table:
    cells = [
        cell
        for last_n in (4, 2)
        for cell in _digit_cells(last_n, _GRADIENTS, (SAMPLES, TIME), partial(_over_seeds, _transfers))
    ]
    convention = (
        "A network of six convolutions learns 2,500 upright digits, then 1,500 inverted and rotated ones in its last "
        f"layers, and is tested on 1,000 of these; {SEEDS} seeds, mean and standard deviation. Before fine-tuning it "
        "is at chance, 10 %. Kept: memory that a step with 64 images keeps for backward, norms in training mode. Times "
        "are of this machine, one step, batch 64."
    )
    return Table("digits", "Learning on this machine: MNIST-5k", convention, tuple(cells))


def _digit_cells(
    last_n: int, labels: Sequence[str], needs: tuple[Need, ...], measure: Callable[[str, str], Measured | float]
) -> list[Cell]:
    names = {label: f"tinyconv_mnist5k_last{last_n}_{label}" for label in labels}
    return [
        Cell(row=f"last {last_n}: {label}", column=column, paper=None, digits=digits, tolerance=0.0, needs=needs,
             command=f"gradfilter train {name} --out runs/{name}", measure=partial(measure, name, key))
        for label, name in names.items()
        for column, digits, key in (("top-1 %", 1, "top1"), ("kept KiB", 0, "kept_kib"), ("step ms", 1, "step_ms"))
    ]  # fmt: skip


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
        "and of 4, 4, 2, 2 pixels, where padding is 18 and 40, or 31 and 56 % of what taps read. plain counts padding "
        "as pixels, covered does not; r2 is plain and leaves the layers on maps of 2 pixels exact, as convert does "
        "unless they are named. Cosine and norm ratio compare filtered with exact gradients before fine-tuning, on 60 "
        "images, averaged over the filtered layers."
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
        f"then their negatives in the last five convolutions (150 updates); {_SHAPES_SEEDS} seeds, 32 test images. "
        "Trivial: always the background."
    )
    return Table("shapes", "Learning on this machine: segmentation of shapes", convention, tuple(cells))


@cache
def _profile(model: str, last_n: int) -> Profile:
    with torch.device("meta"):
        network = getattr(torchvision.models, model)()
    return profile(network, torch.empty(1, 3, 224, 224), last_n=last_n, radii=[2], measures_memory=False)


def _kept(model: str, last_n: int, name: str) -> float:
    return _profile(model, last_n).total(name, "saved_bytes") / 1024


def _saved() -> float:
    return 100 * (1 - _kept("resnet18", 4, "2x2") / _kept("resnet18", 4, "exact"))


def _mflops(model: str, last_n: int, name: str) -> float:
    return _profile(model, last_n).total(name, "flops") / 1e6


_transferred: dict[tuple[str, int], dict[str, float]] = {}


def _transfer(name: str, seed: int) -> dict[str, float]:
    from gradfilter.digits import transfer

    if (name, seed) not in _transferred:
        with torch_threads(1):  # faster for such small networks, and reproducible on machines of one kind
            _transferred[name, seed] = transfer(DIGITS[name], seed)
    return _transferred[name, seed]


def _transfers(name: str) -> list[dict[str, float]]:
    return [_transfer(name, seed) for seed in range(SEEDS)]


@cache
def _gradients(name: str) -> list[dict[str, float]]:
    from gradfilter.digits import compare_gradients

    with torch_threads(1):
        return [compare_gradients(DIGITS[name], seed) for seed in range(SEEDS)]


@cache
def _segmentations(label: str) -> list[dict[str, float]]:
    from gradfilter.training import train_segmenter

    metrics = []
    recipe = RECIPES[f"pspnet_resnet18_shapes_last5_{label}"]
    assert isinstance(recipe, SegmentationRecipe) and recipe.pretraining is not None
    for seed in range(_SHAPES_SEEDS):
        pretraining = replace(recipe.pretraining, seed=seed)
        seeded = replace(recipe, fit=replace(recipe.fit, seed=seed), pretraining=pretraining)
        run, first = _folder() / f"{label}-{seed}" / "pretraining", _folder() / f"head-{seed}" / "pretraining"
        if first.is_dir() and run != first:
            shutil.copytree(first, run)
        metrics.append(dict(train_segmenter(seeded, None, run.parent).metrics))
    return metrics


@cache
def _folder() -> Path:
    """Return a folder that is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="gradfilter-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _of_seed_0(name: str, key: str) -> float:
    return _transfer(name, 0)[key]


def _over_seeds(runs: Callable[[str], list[dict[str, float]]], name: str, key: str) -> Measured:
    values = [run[key] for run in runs(name)]
    return Measured(statistics.mean(values), statistics.stdev(values))


def _draw_digits(path: Path) -> None:
    from visionkernels.extras import require

    pyplot = require("matplotlib.pyplot", "gradfilter[plots]")
    axes_of: Callable[..., tuple[object, object]] = pyplot.subplots
    figure, axes = axes_of(figsize=(6, 4), layout="constrained")
    for label in _GRADIENTS:
        name = f"tinyconv_mnist5k_last4_{label}"
        if label in _ONE_SEED:
            _transfer(name, 0)
        # the figure takes what the tables have measured: all seeds under --full
        if not (runs := [run for (other, _), run in _transferred.items() if other == name]):
            continue
        accuracies = [run["top1"] for run in runs]
        place = (runs[0]["kept_kib"], statistics.mean(accuracies))
        spread = statistics.stdev(accuracies) if len(runs) > 1 else 0.0
        axes.errorbar(*place, spread, marker="o", capsize=3)  # type: ignore[attr-defined]
        axes.annotate(label, place, xytext=(6, 6), textcoords="offset points")  # type: ignore[attr-defined]
    axes.set(xlabel="kept for backward, KiB", ylabel="top-1, %", xmargin=0.15, ymargin=0.1)  # type: ignore[attr-defined]
    figure.savefig(path, format=path.suffix.lstrip(".") or "svg")  # type: ignore[attr-defined]
    pyplot.close(figure)
