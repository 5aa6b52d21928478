"""The command `g2sd`: its record, and the verbs that are G2SD's own."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from visionkernels.checks import InputError, check_choice
from visionkernels.cli import FitOptions, RecipeDefault, find_device, report_fit, run_package, write_result
from visionkernels.files import refuse_existing
from visionkernels.package import Package

__all__ = ["PACKAGE", "main"]

Heads = Literal["mean", "class"]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Generic distillation."""

    targets: RecipeDefault[Path | None] = None
    """generic: folder to cache the teacher's targets in"""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Classifiers with a distillation token."""

    head: RecipeDefault[Heads | None] = None
    """logits of a classifier with a distillation token: mean of both heads, or class alone"""


def distill(
    stage: Positional[Literal["generic", "specific"]],
    recipe: Positional[str],
    *,
    teacher: str,
    out: Path,
    data: RecipeDefault[str | None] = None,
    init: RecipeDefault[Path | None] = None,
    teacher_checkpoint: RecipeDefault[Path | None] = None,
    loss: RecipeDefault[Literal["hard", "soft", "nkd", "channel_wise", "pixel_kl"] | None] = None,
    targets: RecipeDefault[Path | None] = None,
    fit: FitOptions = FitOptions(),
) -> None:
    """Distil a teacher into a student; rerun the same command to resume.

    Args:
        stage: generic, without labels; specific, with labels, after it
        recipe: name (see `g2sd info`), or a run.json
        teacher: file, or timm:NAME
        out: folder of the run and its weights
        data: folder of images, wds/FOLDER or hfds/NAME
        init: specific: the file of the generic stage
        teacher_checkpoint: weights of a teacher by name
        loss: specific: distillation loss
        targets: generic: folder to cache the teacher's targets in
    """
    from g2sd.recipes import GenericRecipe

    other = {"init": init, "loss": loss} if stage == "generic" else {"targets": targets}
    for name, value in other.items():
        if value is not None:
            raise InputError(f"{name}={value} is for `g2sd distill {'specific' if stage == 'generic' else 'generic'}`")
    chosen = _recipe(recipe, (GenericRecipe,) if stage == "generic" else _labelled(), fit)
    chosen = chosen if loss is None else replace(chosen, mode=loss)
    _train(chosen, data, out, init=init, teacher=teacher, teacher_checkpoint=teacher_checkpoint, targets=targets)


def pretrain(
    recipe: Positional[str], *, out: Path, data: RecipeDefault[str | None] = None, fit: FitOptions = FitOptions()
) -> None:
    """Pre-train a masked autoencoder without labels; rerun the same command to resume.

    Args:
        recipe: name (see `g2sd info`), or a run.json
        out: folder of the run and its weights
        data: folder with train/CLASS and val/CLASS, wds/FOLDER or hfds/NAME
    """
    from g2sd.recipes import PretrainRecipe

    _train(_recipe(recipe, (PretrainRecipe,), fit), data, out)


def finetune(
    recipe: Positional[str],
    *,
    out: Path,
    data: RecipeDefault[str | None] = None,
    init: RecipeDefault[Path | None] = None,
    fit: FitOptions = FitOptions(),
) -> None:
    """Train a classifier, segmentation model or detector with labels; rerun the same command to resume.

    Args:
        recipe: name (see `g2sd info`), or a run.json
        out: folder of the run and its weights
        data: folder of images, wds/FOLDER or hfds/NAME
        init: file with the encoder to start from; without it, weights are random
    """
    chosen = _recipe(recipe, _labelled(), fit)
    if chosen.mode is not None:
        raise InputError(f"recipe {recipe} needs a teacher; run `g2sd distill specific {recipe} --teacher FILE`")
    _train(chosen, data, out, init=init)


def probe(
    kind: Positional[Literal["linear", "knn"]],
    file: Positional[Path],
    *,
    data: RecipeDefault[str | None] = None,
    recipe: RecipeDefault[str | None] = None,
    out: RecipeDefault[Path | None] = None,
    pool: Literal["class", "mean"] = "class",
    neighbours: int = 20,
    fit: FitOptions = FitOptions(),
) -> None:
    """Measure the features of an encoder without fine-tuning it.

    Args:
        kind: linear: a classifier trained on frozen features; knn: votes of the nearest neighbours
        file: weights of any stage
        data: folder with train/CLASS and val/CLASS, wds/FOLDER or hfds/NAME; default: those that the file names
        recipe: linear probe of `g2sd info`; default: ImageNet's, with images prepared as the file's were
        out: linear: folder of the run
        pool: features: the class token, or the mean of the patches
        neighbours: knn: number of neighbours; of the training options, knn uses batch size, device and workers alone
    """
    from g2sd.probe import encoder_of, nearest_neighbours, recipe_for
    from g2sd.recipes import ProbeRecipe
    from visionkernels.recipes import data_of
    from visionkernels.weights import read_checkpoint

    if kind == "linear" and out is None:
        raise InputError("out is missing; give --out FOLDER for the run of a linear probe")
    checkpoint = read_checkpoint(file)
    if recipe is None:
        chosen = recipe_for(checkpoint)
        chosen = replace(chosen, fit=fit.apply(chosen.fit), pool=pool)
    else:
        chosen = replace(_recipe(recipe, (ProbeRecipe,), fit), pool=pool)
    if out is not None and kind == "linear":
        _train(chosen, data, out, init=checkpoint)
        return
    encoder = encoder_of(checkpoint, img_size=chosen.pictures.size, pool=pool)
    result = nearest_neighbours(
        encoder, data_of(chosen, data), chosen.pictures, num_neighbours=neighbours,
        batch_size=64 if fit.batch_size is None else fit.batch_size, workers=0 if fit.workers is None else fit.workers,
        device=find_device("auto" if fit.device is None else fit.device),
    )  # fmt: skip
    print(f"top-1 {result.top1:.2f} %, majority class {result.majority_top1:.2f} %, {result.count} images")


def inspect(
    file: Positional[Path], *, entry: str | None = None, json: Path | None = None, overwrite: bool = False
) -> None:
    """Report the contents of a weights file, what is missing, and which command takes it.

    Args:
        file: .pth or .safetensors
        entry: name of the weights in a file with several
        json: write the report here as well
        overwrite: replace an existing output
    """
    from g2sd.inspection import inspect_file

    refuse_existing(json, overwrite)
    inspection = inspect_file(file, entry=entry)
    write_result(json, {"file": str(file), **asdict(inspection)}, overwrite=overwrite)
    print(f"{file}: " + "\n  ".join(inspection.lines()))


def convert(
    file: Positional[Path], *, to: Literal["mae", "timm", "hf", "vitdet", "mmseg"], out: Path, overwrite: bool = False
) -> None:
    """Write weights in another project's layout.

    Args:
        file: of MAE, of any stage of G2SD, or of Hugging Face transformers
        to: mae (and G2SD's scripts), timm, hf (transformers), vitdet (detectron2), mmseg
        out: .pth or .safetensors; for hf, a folder
        overwrite: replace existing outputs
    """
    from g2sd.conversion import convert_file

    print(convert_file(file, out, to=to, overwrite=overwrite))


def export(opened: Any, path: Path, *, head: Heads | None = None, **options: Any) -> str:
    """Write a model as `visionkernels.tasks.export` does; `head` picks the logits of one with a distillation token."""
    from g2sd.vit import DistilledViT
    from visionkernels import tasks

    if head is not None:
        check_choice("head", head, Heads)
        if not isinstance(opened.model, DistilledViT):
            raise InputError(f"head={head!r} is for models with a distillation token; {opened.source} has one head")
        opened.model.eval_head = head
    return tasks.export(opened, path, **options)


def verdict(metrics: Mapping[str, float]) -> str | None:
    """Return a sentence that compares a loss without labels with trivial baselines; None where there are none."""
    baselines = {
        "val_zero_loss": "always 0", "val_position_loss": "the mean of each position", "val_flat_loss": "flat patches"
    }  # fmt: skip
    known = {words: metrics[name] for name, words in baselines.items() if name in metrics}
    if not known:
        return None
    loss = metrics["val_loss"]
    above = [words for words, value in known.items() if loss >= value]
    beside = " and ".join(f"{value:.4g} ({words})" for words, value in known.items())
    judged = f"NOT below {' and '.join(above)}: nothing of use is learnt yet" if above else "below, as it must be"
    return f"loss {loss:.4g} beside {beside}: {judged}"


def facts() -> list[str]:
    """Return the line of `info` on models."""
    import timm

    import g2sd.mae
    import g2sd.vit  # noqa: F401 - registers the models

    return [f"models: {', '.join(timm.list_models('mae_vit_*') + timm.list_models('g2sd_vit_*'))}"]


PACKAGE = Package(
    name="g2sd",
    distribution="g2sd-vision",
    summary="G2SD (CVPR 2023): small vision transformers from masked autoencoders, by two distillations.",
    models=("g2sd.mae", "g2sd.vit"),
    openers={
        "autoencoder": "g2sd.official:load_official",
        "students": "g2sd.opening:open_students",
        "encoder": "g2sd.opening:open_converted",
        "classifier": "g2sd.official:load_classifier",
        "probe": "g2sd.probe:open_probe",
        "segmenter": "g2sd.segmentation_checkpoint:load_official_segmentation",
        "detector": "g2sd.detection_checkpoint:load_official_detection",
    },
    official="g2sd.opening:open_official",
    upgrade="g2sd.opening:upgrade",
    export="g2sd.cli:export",
    facts="g2sd.cli:facts",
    verdict="g2sd.cli:verdict",
    train_options=TrainOptions,
    export_options=ExportOptions,
    verbs={
        "distill": distill, "pretrain": pretrain, "finetune": finetune, "probe": probe, "inspect": inspect,
        "convert": convert,
    },
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv`, by default the process's arguments; return the exit code."""
    return run_package(PACKAGE, argv)


def _labelled() -> tuple[type, ...]:
    """Return the classes of recipes that train with labels, with a teacher or without."""
    from g2sd.recipes import DetectionRecipe, FinetuneRecipe, SegmentationRecipe

    return FinetuneRecipe, SegmentationRecipe, DetectionRecipe


def _recipe(name: str, kinds: tuple[type, ...], fit: FitOptions) -> Any:
    from g2sd.recipes import RECIPES
    from visionkernels.recipes import choose

    chosen = choose(name, RECIPES)
    if not isinstance(chosen, kinds):
        known = ", ".join(recipe.name for recipe in RECIPES.values() if isinstance(recipe, kinds))
        raise InputError(f"recipe {name} is for another stage; recipes of this stage: {known}")
    return replace(chosen, fit=fit.apply(chosen.fit))


def _train(recipe: Any, data: str | None, out: Path, **given: Any) -> None:
    from visionkernels.training import train_by_recipe

    result = train_by_recipe(recipe, data, out, **given)
    report_fit(result.metrics, result.weights, verdict(result.metrics))


if __name__ == "__main__":
    sys.exit(main())
