"""The command `biformer`: its package record and its own verbs."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from visionkernels.checks import InputError, check, check_known, check_size, check_suffix
from visionkernels.cli import RecipeDefault, run_package, write_result
from visionkernels.files import refuse_existing
from visionkernels.package import Package

__all__ = ["PACKAGE", "main"]

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Distillation in classification."""

    distillation: RecipeDefault[Literal["soft", "hard"] | None] = None
    """learn from the teacher's probabilities or best class (default: hard)"""


def classify(
    images: Positional[Annotated[tuple[Path, ...], arg(metavar="IMAGE [IMAGE ...]")]],
    *,
    checkpoint: Path | None = None,
    model: str | None = None,
    num_classes: int | None = None,
    top: int = 5,
    json: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Name what images show.

    Args:
        images: files in any format that Pillow reads
        checkpoint: weights of `biformer train` or of another package, official ones, or a bare state dict
        model: model of weights that do not name it
        num_classes: outputs of that model; default: those of the weights
        top: number of classes to name
        json: also write the result to this file
        overwrite: replace an existing output
    """
    from visionkernels.tasks import classification
    from visionkernels.weights import open_trained

    if not images:
        raise InputError("IMAGE is missing; give one or more image files")
    if checkpoint is None:
        raise InputError(
            "--checkpoint is missing: no weights are published any more, so give a file of `biformer train` or an "
            "official .pth"
        )
    refuse_existing(json, overwrite)
    opened = open_trained(checkpoint, package=PACKAGE, model=model, num_classes=num_classes)
    check(opened.trained.kind == "classifier", "checkpoint", str(checkpoint), "a classifier")
    predictions = classification.classify(images, opened.model, top=top)
    listed = {
        str(image): [prediction._asdict() for prediction in row] for image, row in zip(images, predictions, strict=True)
    }
    write_result(json, listed, overwrite=overwrite)
    for image, ranked in zip(images, predictions, strict=True):
        print(image)
        for prediction in ranked:
            print(f"  {100 * prediction.probability:6.2f} %  {prediction.name}")


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
    """Draw the regions that a place of an image attends to.

    Args:
        image: the image file
        query: row and column of the place, in pixels of the image
        out: the drawing to write, .png, .svg or .pdf
        layer: a block, e.g. stages.2.7; default: the last routed block of every stage
        model: model of --random-weights
        checkpoint: weights of `biformer train`, or an official .pth
        random_weights: draw an untrained model
        overwrite: replace an existing output
    """
    from biformer.attend import attend as draw
    from biformer.official import MODEL_NAMES
    from visionkernels.files import replace_file
    from visionkernels.tasks.classification import untrained
    from visionkernels.weights import open_trained

    check_suffix("out", out, ".png", ".svg", ".pdf")
    if checkpoint is None and not random_weights:
        raise InputError(
            "--checkpoint is missing: no weights are published any more; give a file of `biformer train`, or "
            "--random-weights to draw an untrained model"
        )
    if checkpoint is not None and random_weights:
        raise InputError("--checkpoint and --random-weights exclude each other")
    with replace_file(out, overwrite=overwrite) as temporary:
        if checkpoint is None:
            import torch

            import biformer.model  # noqa: F401 - registers the models

            check_known("model", model, MODEL_NAMES)
            torch.manual_seed(0)
            opened = untrained(model)
        else:
            opened = open_trained(checkpoint, package=PACKAGE)
        draw(image, opened.model, layer, query, temporary)  # type: ignore[arg-type]
    print(out)


def info(
    name: Positional[str | None] = None, *, size: Size | None = None, json: Path | None = None, overwrite: bool = False
) -> None:
    """Print parameters, operations, stages and weights of the models, and list the recipes.

    Args:
        name: a model or a recipe; default: all
        size: height and width of the image in pixels; default: as trained
        json: also write the figures of the models to this file
        overwrite: replace an existing output
    """
    from biformer.official import MODEL_NAMES
    from biformer.recipes import RECIPES
    from biformer.summary import lines, summarise

    refuse_existing(json, overwrite)
    check_size(size)
    if name is not None:
        check_known("model or recipe", name, [*MODEL_NAMES, *RECIPES])
    summaries = [summarise(model, size) for model in (MODEL_NAMES if name is None else [name])]
    write_result(json, [asdict(summary) for summary in summaries], overwrite=overwrite)
    print(f"biformer {version('biformer')}; a multiply-add counts as 1 operation")
    for summary in summaries:
        print("\n".join(["", *lines(summary)]))
    print("\nweights: none are published any more (the official links are dead); train, or give an official .pth")
    if name is None:
        print("\nrecipes for `biformer train`:")
        for recipe in RECIPES.values():
            print(f"  {recipe.name}: {recipe.summary}")


def convert(
    source: Positional[Path],
    target: Positional[Path],
    *,
    to: Literal["ours", "stl", "stl_nchw"] = "ours",
    allow_inexact: bool = False,
    overwrite: bool = False,
) -> None:
    """Convert an official checkpoint to our safetensors file, or one STL form to the other.

    Args:
        source: an official .pth or .safetensors
        target: the .safetensors to write
        to: ours, or official keys of biformer_stl or biformer_stl_nchw
        allow_inexact: also convert the last stage of an STL model, whose outputs then differ
        overwrite: replace an existing output
    """
    from biformer.conversion import convert_checkpoint

    refuse_existing(target, overwrite)
    print(convert_checkpoint(source, target, to=to, allow_inexact=allow_inexact, overwrite=overwrite))


PACKAGE = Package(
    name="biformer",
    distribution="biformer",
    summary="BiFormer (CVPR 2023): vision transformers with bi-level routing attention.",
    models=("biformer.model",),
    openers={
        "classifier": "visionkernels.tasks.classification:open_classifier",
        "segmenter": "biformer.segmentation:open_segmenter",
        "detector": "biformer.detection:open_detector",
    },
    upgrade="biformer.official:upgrade",
    figures="biformer.tables:figures",
    train_options=TrainOptions,
    verbs={"classify": classify, "attend": attend, "convert": convert, "info": info},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv`, by default the process's arguments; return the exit code."""
    return run_package(PACKAGE, argv)


if __name__ == "__main__":
    sys.exit(main())
