"""The command `gradfilter`: what each sub-command reads, calls and prints."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from visionkernels.cli import ReportOptions, choose_recipe, find_device, print_metrics, report_bench, report_fit, run
from visionkernels.files import refuse_existing, write_json
from visionkernels.training import FitOptions
from visionkernels.training.options import Own

if TYPE_CHECKING:
    from gradfilter.recipes import Recipe
    from visionkernels.training import FitResult

__all__ = ["main"]

Radii = Annotated[tuple[int, ...], arg(metavar="R [R ...]")]


def train(
    recipe: Positional[str],
    *,
    out: Path,
    data: Own[str | None] = None,
    checkpoint: Own[Path | None] = None,
    pretrained: bool = False,
    fit: FitOptions = FitOptions(),
) -> None:
    """Train by a recipe; the same command goes on where a run stopped.

    Args:
        recipe: a name from `gradfilter info`, or the run.json of a run
        out: folder of the run and its weights
        data: pictures: folder with train/CLASS and val/CLASS, CIFAR's, wds/FOLDER or hfds/NAME; scenes: folder like
            ADE20K, VOC2012 or Cityscapes
        checkpoint: weights to start from
        pretrained: start from published weights
    """
    from gradfilter.recipes import find_recipe, read_recipe

    chosen = choose_recipe(recipe, find_recipe, read_recipe, fit)
    result = _train(chosen, out, data=data, checkpoint=checkpoint, pretrained=pretrained)
    report_fit(result.metrics, result.weights)


def evaluate(
    *,
    checkpoint: Path,
    data: str | None = None,
    recipe: str | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    json: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Measure trained weights on validation data: digits, labelled pictures or scenes.

    Args:
        checkpoint: weights of `gradfilter train`, or official ones
        data: as for `gradfilter train`; digits need none
        recipe: whose network plain weights are of; those of `gradfilter train` tell it themselves
        batch_size: pictures that a classifier computes together
        workers: data loading processes
        device: auto, cpu, cuda, ...
        json: write the result here as well
        overwrite: replace an existing output
    """
    from gradfilter.evaluation import evaluate_checkpoint
    from gradfilter.recipes import find_recipe, read_recipe

    refuse_existing(json, overwrite)
    chosen = None if recipe is None else choose_recipe(recipe, find_recipe, read_recipe)
    metrics = evaluate_checkpoint(
        checkpoint, data, recipe=chosen, device=find_device(device), workers=workers, batch_size=batch_size
    )
    print_metrics(metrics)
    if json is not None:
        write_json(json, {"checkpoint": str(checkpoint), "data": data, **metrics}, overwrite=overwrite)


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
    """Tell what training the last convolutions of a model costs, exact and filtered, before it is trained.

    Args:
        model: of timm, torchvision:NAME, or module:callable
        last_n: convolutions from the last one back; default: all
        layers: names or patterns instead
        radius: outputs a side of a patch, one or more
        input_size: height and width in pixels; default: the model's own
        batch_size: images a step
        time: also measure forward and backward of each layer here
        train_norm: norms trained as well: none, those from the first chosen convolution on (after), or all
        memory_kib: show which layers and radii fit this many KiB of kept inputs
        flops: the same for operations of backward
        json: write the figures here as well
        overwrite: replace an existing output
    """
    from gradfilter.models import create_classifier
    from gradfilter.profiles import example_images
    from gradfilter.profiles import profile as measure

    refuse_existing(json, overwrite)
    network = create_classifier(model)
    found = measure(
        network, example_images(network, batch_size, input_size), last_n=last_n, layers=layers or None, radii=radius,
        measures_time=time, train_norm=train_norm,
    )  # fmt: skip
    print(found)
    plan = None
    if memory_kib is not None or flops is not None:
        plan = found.fit(memory_kib=memory_kib, flops=flops)
        print(f"\nfits: {plan.saved_bytes / 1024:.1f} KiB, {plan.flops / 1e6:.2f} MFLOPs")
        for name, pair in plan.radius.items():
            print(f"  {name}: " + ("exact" if pair is None else f"radius {pair[0]} x {pair[1]}"))
    if json is not None:
        write_json(json, asdict(found) | ({} if plan is None else {"plan": asdict(plan)}), overwrite=overwrite)


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
    """Compare filtered with exact gradients on pictures, layer by layer; the target is the model's own best class.

    Args:
        model: of timm, torchvision:NAME, or module:callable
        images: files in any format that Pillow reads
        last_n: convolutions from the last one back
        radius: outputs a side of a patch
        pretrained: published weights of timm or torchvision
        checkpoint: weights of the model
        num_classes: outputs of the model; a classifier of another size in the checkpoint is left out
        input_size: height and width in pixels; default: the model's own
        json: write the figures here as well
        overwrite: replace an existing output
    """
    import torch

    from gradfilter.checkpoint import load_official
    from gradfilter.diagnosis import diagnose as compare
    from gradfilter.models import create_classifier
    from gradfilter.pictures import read_batch
    from gradfilter.profiles import example_images

    if not images:
        raise ValueError("IMAGE is missing; give one or more picture files")
    refuse_existing(json, overwrite)
    network = create_classifier(model, num_classes=num_classes, pretrained=pretrained)
    if checkpoint is not None:
        load_official(network, checkpoint, num_classes=num_classes)
    _, channels, *size = example_images(network, 1, input_size).shape
    if channels != 3:
        raise ValueError(f"model {model} takes {channels} channels; pictures have 3")
    batch = read_batch(images, (size[0], size[1]), network)
    with torch.no_grad():
        targets = network.eval()(batch).argmax(1)
    found = compare(network, (batch, targets), radius=radius, last_n=last_n)
    print(found)
    if json is not None:
        write_json(json, asdict(found), overwrite=overwrite)


def delta(
    action: Positional[Literal["save", "apply"]],
    base: Positional[Path],
    source: Positional[Path],
    out: Positional[Path],
    *,
    overwrite: bool = False,
) -> None:
    """Keep what fine-tuning changed as a small task file, or make weights of a base and such a file.

    Args:
        action: save: BASE TUNED OUT; apply: BASE DELTA OUT
        base: weights before fine-tuning, .pth or .safetensors
        source: the tuned weights, or the delta
        out: the .safetensors to write
        overwrite: replace an existing output
    """
    from gradfilter.delta import apply_delta, compute_delta, read_delta, save_delta
    from visionkernels.checkpoints import read_state, save_weights

    refuse_existing(out, overwrite)
    start = read_state(base).state
    if action == "save":
        tuned = read_state(source).state
        save_delta(out, start, compute_delta(start, tuned), overwrite=overwrite)
        share = 100 * out.stat().st_size / max(1, sum(each.numel() * each.element_size() for each in tuned.values()))
        print(f"{out}: {out.stat().st_size / 1024:.1f} KiB, {share:.1f} % of the weights")
    else:
        save_weights(out, apply_delta(start, read_delta(source, start)), metadata={}, overwrite=overwrite)
        print(out)


def export(
    model: Positional[str],
    *,
    out: Path,
    last_n: int = 4,
    radius: int = 2,
    input_size: tuple[int, int] | None = None,
    batch_size: int = 1,
    overwrite: bool = False,
) -> None:
    """Write the training graph of a model, loss and filtered gradients, as a program of torch.export.

    Args:
        model: of timm, torchvision:NAME, or module:callable
        out: the .pt2 to write
        last_n: convolutions from the last one back
        radius: outputs a side of a patch
        input_size: height and width in pixels; default: the model's own
        batch_size: images a step
        overwrite: replace an existing output
    """
    from gradfilter.export import export_training_graph
    from gradfilter.models import create_classifier
    from gradfilter.profiles import example_images

    refuse_existing(out, overwrite)
    network = create_classifier(model)
    images = example_images(network, batch_size, input_size)
    names = export_training_graph(network, images, out, last_n=last_n, radius=radius, overwrite=overwrite)
    print(f"{out}: images {list(images.shape)} and labels to loss and gradients of {', '.join(names)}")


def info() -> None:
    """Print the version, the models and the recipes."""
    from gradfilter.models import SEGMENTATION_HEADS
    from gradfilter.picture_recipes import FAMILIES
    from gradfilter.recipes import all_recipes

    print(f"gradfilter {version('gradfilter')}")
    print("models: any of timm, torchvision:NAME, module:callable, tinyconv")
    print(f"segmentation heads on encoders: {', '.join(SEGMENTATION_HEADS)}")
    print("weights: plain checkpoints of the model, official ones too; filtering adds no parameters")
    print("recipes for `gradfilter train`, with data of their own:")
    for recipe in all_recipes().values():
        if recipe.data is not None:
            print(f"  {recipe.name}: {recipe.summary}")
    print("on your data, from --checkpoint or --pretrained:")
    for family in FAMILIES:
        print(f"  {family}")


def reproduce(*, report: ReportOptions = ReportOptions()) -> int:
    """Measure the paper's tables: what this machine can, and for the rest what it would take."""
    from gradfilter.tables import figures, tables

    return report.measure("gradfilter", tables(), figures())


def bench(*, full: bool = False, json: Path | None = None, overwrite: bool = False) -> None:
    """Time filtered backward passes beside PyTorch's exact ones, and count what is kept for backward.

    Args:
        full: also with two threads, and more repeats
        json: write the rows here as well
        overwrite: replace an existing output
    """
    from gradfilter.bench import measure

    report_bench(measure(full=full), json=json, overwrite=overwrite)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv`, by default the process's arguments; returns the exit code."""
    commands: dict[str, Any] = {
        "train": train,
        "eval": evaluate,
        "profile": profile,
        "diagnose": diagnose,
        "delta": delta,
        "export": export,
        "info": info,
        "reproduce": reproduce,
        "bench": bench,
    }
    return run(
        "gradfilter",
        commands,
        description="Gradient filtering (CVPR 2023): fine-tune a CNN with a backward pass at a fraction of its cost.",
        version=version("gradfilter"),
        argv=argv,
    )


def _train(recipe: "Recipe", out: Path, *, data: str | None, checkpoint: Path | None, pretrained: bool) -> "FitResult":
    from gradfilter import digits, training
    from gradfilter.picture_recipes import ClassificationRecipe, SegmentationRecipe
    from gradfilter.recipes import TransferRecipe

    start: dict[str, Any] = {"checkpoint": checkpoint, "pretrained": pretrained}
    match recipe:
        case ClassificationRecipe():
            return training.train_classifier(recipe, data, out, **start)
        case SegmentationRecipe():
            return training.train_segmenter(recipe, data, out, **start)
        case TransferRecipe():
            given = [f"--{name}" for name, value in {"data": data, **start}.items() if value]
            if given:
                raise ValueError(f"{', '.join(given)} cannot be given: {recipe.name} has its own digits and weights")
            return digits.train(recipe, out)
        case _:
            raise AssertionError(type(recipe))


if __name__ == "__main__":
    sys.exit(main())
