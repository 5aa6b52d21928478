"""The command `biformer`: what each sub-command reads, calls and prints."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from tyro.conf import Positional, arg

from visionkernels.cli import ReportOptions, choose_recipe, find_device, print_metrics, report_bench, report_fit, run
from visionkernels.files import refuse_existing, write_json
from visionkernels.recipes import check_known
from visionkernels.training import FitOptions
from visionkernels.training.options import Own

if TYPE_CHECKING:
    from biformer.model import BiFormer
    from biformer.recipes import Recipe
    from visionkernels.training import FitResult

__all__ = ["main"]

Size = tuple[int, int]


def train(
    recipe: Positional[str],
    *,
    out: Path,
    data: Own[str | None] = None,
    checkpoint: Own[Path | None] = None,
    teacher: Own[str | None] = None,
    distillation: Literal["soft", "hard"] = "hard",
    fit: FitOptions = FitOptions(),
) -> None:
    """Train a model by a recipe; the same command goes on where a run stopped.

    Args:
        recipe: a name from `biformer info`, or the run.json of a run
        out: folder of the run and its weights
        data: folder with train/CLASS and val/CLASS, wds/FOLDER, hfds/NAME or mnist5k
        checkpoint: weights to start from
        teacher: weights file or timm model
        distillation: from the teacher's probabilities or best class
    """
    from biformer.recipes import ClassificationRecipe, DistillationRecipe, find_recipe, read_recipe

    chosen = choose_recipe(recipe, find_recipe, read_recipe, fit)
    if teacher is not None:
        if not isinstance(chosen, ClassificationRecipe):
            raise ValueError(f"--teacher is for classification; {chosen.name} is a {type(chosen).__name__}")
        chosen = replace(chosen, distillation=DistillationRecipe(teacher=teacher, kind=distillation))
    result = _trainer(chosen)(chosen, data, out, checkpoint=checkpoint)
    report_fit(result.metrics, result.weights)


def evaluate(
    *,
    checkpoint: Path,
    data: str,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    json: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Measure trained weights on labelled pictures: a classifier, a segmentation model or a detector.

    Args:
        checkpoint: weights of `biformer train`, or an official .pth
        data: as for `biformer train`; a classifier also takes a folder of CLASS folders
        batch_size: pictures that a classifier computes together
        workers: data loading processes
        device: auto, cpu, cuda, ...
        json: write the result here as well
        overwrite: replace an existing output
    """
    from biformer.evaluation import evaluate_checkpoint

    refuse_existing(json, overwrite)
    metrics = evaluate_checkpoint(checkpoint, data, device=find_device(device), workers=workers, batch_size=batch_size)
    print_metrics(metrics)
    if json is not None:
        write_json(json, {"checkpoint": str(checkpoint), "data": data, **metrics}, overwrite=overwrite)


def classify(
    images: Positional[Annotated[tuple[Path, ...], arg(metavar="IMAGE [IMAGE ...]")]],
    *,
    checkpoint: Path | None = None,
    top: int = 5,
    json: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Name what is in pictures.

    Args:
        images: files in any format that Pillow reads
        checkpoint: weights of `biformer train`, or an official .pth
        top: classes to name
        json: write the result here as well
        overwrite: replace an existing output
    """
    from biformer.checkpoint import load_model
    from visionkernels.classification import classify as name_pictures

    if not images:
        raise ValueError("IMAGE is missing; give one or more picture files")
    if checkpoint is None:
        raise ValueError(
            "--checkpoint is missing: no weights are published any more, so give a file of `biformer train` or an "
            "official .pth"
        )
    refuse_existing(json, overwrite)
    predictions = name_pictures(images, load_model(checkpoint), top=top)
    for image, found in zip(images, predictions, strict=True):
        print(image)
        for prediction in found:
            print(f"  {100 * prediction.probability:6.2f} %  {prediction.name}")
    if json is not None:
        listed = {str(image): [each._asdict() for each in row] for image, row in zip(images, predictions, strict=True)}
        write_json(json, listed, overwrite=overwrite)


def attend(
    image: Positional[Path],
    *,
    query: Size,
    out: Path,
    layer: str | None = None,
    model: str = "biformer_tiny",
    checkpoint: Path | None = None,
    random_weights: bool = False,
    overwrite: bool = False,
) -> None:
    """Draw which regions a place of a picture attends to.

    Args:
        image: the picture
        query: the place, row and column in pixels of the picture
        out: where the drawing goes, .png or .svg
        layer: a block, e.g. stages.2.7; default: the last routed one of each stage
        model: whose weights are drawn at random, without a checkpoint
        checkpoint: weights of `biformer train`, or an official .pth
        random_weights: draw an untrained model
        overwrite: replace an existing output
    """
    from biformer.attend import attend as draw
    from visionkernels.files import replace_file

    if checkpoint is None and not random_weights:
        raise ValueError(
            "--checkpoint is missing: no weights are published any more; give a file of `biformer train`, or "
            "--random-weights to draw an untrained model"
        )
    if checkpoint is not None and random_weights:
        raise ValueError("--checkpoint and --random-weights exclude each other")
    with replace_file(out, overwrite=overwrite) as temporary:
        draw(image, _model(model, checkpoint), layer, query, temporary)
    print(out)


def info(
    name: Positional[str | None] = None, *, size: Size | None = None, json: Path | None = None, overwrite: bool = False
) -> None:
    """Print parameters, operations, stages and weights of the models, and list the recipes.

    Args:
        name: a model or a recipe; default: all
        size: height and width of the image in pixels; default: as trained
        json: write the figures of the models here as well
        overwrite: replace an existing output
    """
    from biformer.checkpoint import MODEL_NAMES
    from biformer.recipes import all_recipes
    from biformer.summary import summarise

    refuse_existing(json, overwrite)
    recipes = all_recipes()
    if size is not None and min(size) < 1:
        raise ValueError(f"size={size} must be at least 1 x 1")
    names = [name] if name else list(MODEL_NAMES)
    if name is not None:
        check_known("model or recipe", name, [*MODEL_NAMES, *recipes])
    summaries = [summarise(each, size) for each in names]
    print(f"biformer {version('biformer')}; a multiply-add counts as 1 operation")
    for each in summaries:
        height, width = each.size
        print(
            f"\n{each.name}: {each.parameters:,} parameters, {each.flops / 1e9:.3f} G operations at {height} x {width}"
        )
        for stage in each.stages:
            print(f"  stride {stage.stride:2}  {stage.blocks:2} blocks  {stage.channels:4} channels  {stage.attention}")
    print("\nweights: none are published any more (the official links are dead); train, or give an official .pth")
    if name is None:
        print("\nrecipes for `biformer train`:")
        for recipe in recipes.values():
            print(f"  {recipe.name}: {recipe.summary}")
    if json is not None:
        write_json(json, [asdict(each) for each in summaries], overwrite=overwrite)


def export(
    *,
    checkpoint: Path,
    out: Path,
    format: Literal["onnx", "pt2"] | None = None,
    size: Size | None = None,
    overwrite: bool = False,
) -> None:
    """Write a trained model for other runtimes: ONNX, or a program of torch.export.

    Args:
        checkpoint: weights of `biformer train`, or an official .pth
        out: the file to write
        format: default: what the suffix of the file says
        size: height and width of the image in pixels; default: the model's own
        overwrite: replace an existing output
    """
    from biformer.checkpoint import load_model
    from biformer.export import export_model

    refuse_existing(out, overwrite)
    model = load_model(checkpoint)
    height, width = size or cast(dict[str, Any], model.pretrained_cfg)["input_size"][1:]
    export_model(model, out, format=format, size=(height, width), overwrite=overwrite)
    print(f"{out}: images [batch, 3, {height}, {width}], {out.stat().st_size / 1e6:.1f} MB")


def convert(
    source: Positional[Path],
    target: Positional[Path],
    *,
    to: Literal["ours", "stl", "stl_nchw"] = "ours",
    allow_inexact: bool = False,
    overwrite: bool = False,
) -> None:
    """Turn an official checkpoint into a safetensors file of ours, or one STL form into the other.

    Args:
        source: an official .pth or .safetensors
        target: the .safetensors to write
        to: ours, or official keys of biformer_stl or biformer_stl_nchw
        allow_inexact: convert the last stage of an STL model too, whose outputs then differ
        overwrite: replace an existing output
    """
    from biformer.export import convert_checkpoint

    refuse_existing(target, overwrite)
    print(convert_checkpoint(source, target, to=to, allow_inexact=allow_inexact, overwrite=overwrite))


def reproduce(*, report: ReportOptions = ReportOptions()) -> int:
    """Measure the paper's tables: what this machine can, and for the rest the command that would."""
    from biformer.tables import figures, tables

    return report.measure("biformer", tables(), figures())


def bench(*, full: bool = False, json: Path | None = None, overwrite: bool = False) -> None:
    """Time attention and models beside the official algorithm and beside a well written gather.

    Args:
        full: also the shapes that take gigabytes and minutes
        json: write the rows here as well
        overwrite: replace an existing output
    """
    from biformer.bench import measure

    report_bench(measure(full=full), json=json, overwrite=overwrite)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv`, by default the process's arguments; returns the exit code."""
    commands: dict[str, Callable[..., int | None]] = {
        "train": train,
        "eval": evaluate,
        "classify": classify,
        "attend": attend,
        "info": info,
        "reproduce": reproduce,
        "bench": bench,
        "export": export,
        "convert": convert,
    }
    return run(
        "biformer",
        commands,
        description="BiFormer (CVPR 2023): vision transformers with bi-level routing attention.",
        version=version("biformer"),
        argv=argv,
    )


def _trainer(recipe: "Recipe") -> Callable[..., "FitResult"]:
    """The function that trains by this kind of recipe."""
    from biformer.dense_recipes import DetectionRecipe, SegmentationRecipe

    match recipe:
        case SegmentationRecipe():
            from biformer import segmentation

            return segmentation.train
        case DetectionRecipe():
            from biformer import detection

            return detection.train
        case _:
            from biformer import training

            return training.train


def _model(name: str, checkpoint: Path | None) -> "BiFormer":
    import timm
    import torch

    from biformer.checkpoint import MODEL_NAMES, load_model

    if checkpoint is not None:
        return load_model(checkpoint)
    check_known("model", name, MODEL_NAMES)
    torch.manual_seed(0)
    return cast("BiFormer", timm.create_model(name).eval())


if __name__ == "__main__":
    sys.exit(main())
