"""The command `gradfilter`: its package record and its own verbs."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from visionkernels.checks import InputError
from visionkernels.cli import run_package, write_result
from visionkernels.files import refuse_existing
from visionkernels.package import Package

__all__ = ["PACKAGE", "main"]

Radii = Annotated[tuple[int, ...], arg(metavar="R [R ...]")]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Where training starts."""

    pretrained: bool = False
    """start from published weights"""


def profile(
    model: Positional[str],
    *,
    last_n: int | None = None,
    layers: tuple[str, ...] = (),
    radius: Radii = (2, 4, 7),
    input_size: tuple[int, int] | None = None,
    batch_size: int = 1,
    time: bool = False,
    train_norm: Literal["none", "after", "all"] = "none",
    memory_kib: float | None = None,
    flops: float | None = None,
    json: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Report what training the last convolutions of a model would cost, exact and filtered.

    Args:
        model: timm name, torchvision:NAME, or module:callable
        last_n: number of convolutions, counted from the end; default: all
        layers: names or patterns, instead of last_n
        radius: side of a patch in outputs, one or more
        input_size: height and width in pixels; default: the model's own
        batch_size: images per step
        time: also time forward and backward of each layer on this machine
        train_norm: norms to train as well: none, those after the first chosen convolution, or all
        memory_kib: find the layers and radii whose kept inputs fit this many KiB
        flops: find the layers and radii whose backward pass fits this many operations
        json: also write the figures to this file
        overwrite: replace an existing output
    """
    import gradfilter.models  # noqa: F401 - registers tinyconv
    from gradfilter.profiles import example_images
    from gradfilter.profiles import profile as measure
    from visionkernels import models

    refuse_existing(json, overwrite)
    network = models.create(model)
    costs = measure(
        network, example_images(network, batch_size, input_size), last_n=last_n, layers=layers or None, radii=radius,
        measures_time=time, train_norm=train_norm,
    )  # fmt: skip
    plan = None if memory_kib is None and flops is None else costs.fit(memory_kib=memory_kib, flops=flops)
    write_result(json, asdict(costs) | ({} if plan is None else {"plan": asdict(plan)}), overwrite=overwrite)
    print(costs)
    if plan is not None:
        print(f"\nfits: {plan.saved_bytes / 1024:.1f} KiB, {plan.flops / 1e6:.2f} MFLOPs")
        for name, pair in plan.radius.items():
            print(f"  {name}: " + ("exact" if pair is None else f"radius {pair[0]} x {pair[1]}"))


def diagnose(
    model: Positional[str],
    images: Positional[Annotated[tuple[Path, ...], arg(metavar="IMAGE [IMAGE ...]")]],
    *,
    last_n: int = 4,
    radius: int = 2,
    pretrained: bool = False,
    checkpoint: Path | None = None,
    num_classes: int | None = None,
    input_size: tuple[int, int] | None = None,
    json: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Compare filtered with exact gradients on images, layer by layer; the target is the class that the model predicts.

    Args:
        model: timm name, torchvision:NAME, or module:callable
        images: files in any format that Pillow reads
        last_n: number of convolutions, counted from the end
        radius: side of a patch in outputs
        pretrained: load the published weights of timm or torchvision
        checkpoint: weights file of the model
        num_classes: outputs of the model; a classifier of another size in the checkpoint is left out
        input_size: height and width in pixels; default: the model's own
        json: also write the figures to this file
        overwrite: replace an existing output
    """
    import torch

    import gradfilter.models  # noqa: F401 - registers tinyconv
    from gradfilter.diagnosis import diagnose as compare
    from gradfilter.official import load_into
    from gradfilter.pictures import read_batch
    from gradfilter.profiles import example_images
    from visionkernels import models

    if not images:
        raise InputError("IMAGE is missing; give one or more image files")
    refuse_existing(json, overwrite)
    network = models.create(model, num_classes=num_classes, pretrained=pretrained)
    if checkpoint is not None:
        load_into(network, checkpoint, num_classes=num_classes)
    _, channels, *size = example_images(network, 1, input_size).shape
    if channels != 3:
        raise InputError(f"model {model} takes {channels} channels; images have 3")
    batch = read_batch(images, (size[0], size[1]), network)
    with torch.no_grad():
        targets = network.eval()(batch).argmax(1)
    diagnosis = compare(network, (batch, targets), radius=radius, last_n=last_n)
    write_result(json, asdict(diagnosis), overwrite=overwrite)
    print(diagnosis)


def delta(
    action: Positional[Literal["save", "apply"]],
    base: Positional[Path],
    source: Positional[Path],
    out: Positional[Path],
    *,
    overwrite: bool = False,
) -> None:
    """Save what fine-tuning changed as a small task file, or apply such a file to base weights.

    Args:
        action: save: BASE TUNED OUT; apply: BASE DELTA OUT
        base: weights before fine-tuning, .pth or .safetensors
        source: the tuned weights, or the delta
        out: the .safetensors to write
        overwrite: replace an existing output
    """
    from gradfilter.delta import apply_delta, compute_delta, read_delta, save_delta
    from visionkernels.weights import read_checkpoint, save_weights

    refuse_existing(out, overwrite)
    start = read_checkpoint(base).state
    if action == "save":
        tuned = read_checkpoint(source).state
        save_delta(out, start, compute_delta(start, tuned), overwrite=overwrite)
        share = 100 * out.stat().st_size / max(1, sum(tensor.nbytes for tensor in tuned.values()))
        print(f"{out}: {out.stat().st_size / 1024:.1f} KiB, {share:.1f} % of the weights")
    else:
        save_weights(out, apply_delta(start, read_delta(source, start)), metadata={}, overwrite=overwrite)
        print(out)


def export_step(
    model: Positional[str],
    *,
    out: Path,
    last_n: int = 4,
    radius: int = 2,
    input_size: tuple[int, int] | None = None,
    batch_size: int = 1,
    overwrite: bool = False,
) -> None:
    """Write a training step of a model, loss and filtered gradients, as a program of torch.export.

    Args:
        model: timm name, torchvision:NAME, or module:callable
        out: the .pt2 to write
        last_n: number of convolutions, counted from the end
        radius: side of a patch in outputs
        input_size: height and width in pixels; default: the model's own
        batch_size: images per step
        overwrite: replace an existing output
    """
    import gradfilter.models  # noqa: F401 - registers tinyconv
    from gradfilter.export import export_training_graph
    from gradfilter.profiles import example_images
    from visionkernels import models

    refuse_existing(out, overwrite)
    network = models.create(model)
    images = example_images(network, batch_size, input_size)
    names = export_training_graph(network, images, out, last_n=last_n, radius=radius, overwrite=overwrite)
    print(f"{out}: images {list(images.shape)} and labels to loss and gradients of {', '.join(names)}")


def facts() -> list[str]:
    """Return the lines of `info` on models and recipe names."""
    from gradfilter.models import SEGMENTATION_HEADS
    from gradfilter.recipes import FAMILIES

    return [
        "models: any of timm, torchvision:NAME, module:callable, tinyconv",
        f"segmentation heads on encoders: {', '.join(SEGMENTATION_HEADS)}",
        "weights: any checkpoint of the model, official ones too; filtering adds no parameters",
        "recipes for your data, starting from --init or --pretrained:",
        *(f"  {family}" for family in FAMILIES),
    ]


PACKAGE = Package(
    name="gradfilter",
    distribution="gradfilter",
    summary="Gradient filtering (CVPR 2023): fine-tune a CNN with a backward pass at a fraction of its cost.",
    models=("gradfilter.models",),
    openers={
        "classifier": "visionkernels.tasks.classification:open_classifier",
        "segmenter": "gradfilter.training:open_segmenter",
        "digits": "gradfilter.digits:open_digits",
    },
    official=None,
    upgrade="gradfilter.evaluation:upgrade",
    evaluate="gradfilter.evaluation:evaluate",
    figures="gradfilter.tables:figures",
    facts="gradfilter.cli:facts",
    train_options=TrainOptions,
    verbs={"profile": profile, "diagnose": diagnose, "delta": delta, "export-step": export_step},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv`, by default the process's arguments; return the exit code."""
    return run_package(PACKAGE, argv)


if __name__ == "__main__":
    sys.exit(main())
