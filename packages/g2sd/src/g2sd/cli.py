"""The command `g2sd`: what each sub-command reads, calls and prints."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from visionkernels.cli import ReportOptions, choose_recipe, find_device, print_metrics, report_bench, run
from visionkernels.files import refuse_existing, write_json
from visionkernels.training import FitOptions, FitResult
from visionkernels.training.options import Own

__all__ = ["main"]

_VERSION = version("g2sd-vision")


def train(
    recipe: Positional[str],
    *,
    out: Path,
    data: Own[str | None] = None,
    teacher: Own[Path | None] = None,
    encoder: Own[Path | None] = None,
    fit: FitOptions = FitOptions(),
) -> None:
    """Run a recipe of any stage; the same command goes on where a run stopped.

    Args:
        recipe: a name of `g2sd info`, or the run.json of a run
        out: folder of the run and its weights
        data: folder with train/CLASS and val/CLASS, or of ADE20K's or COCO's layout; wds/FOLDER, hfds/NAME
        teacher: of distillation: MAE's file with its decoder, or a fine-tuned model
        encoder: of stages with labels: the file to start from
    """
    from g2sd.recipes import Recipe
    from g2sd.stages import run_recipe

    _report(run_recipe(_recipe(recipe, Recipe, fit), data, out, start=encoder, teacher=teacher))


def distill(
    stage: Positional[Literal["generic", "specific"]],
    recipe: Positional[str],
    *,
    teacher: Path,
    out: Path,
    data: Own[str | None] = None,
    encoder: Own[Path | None] = None,
    loss: Own[Literal["hard", "soft", "nkd", "channel_wise", "pixel_kl"] | None] = None,
    targets: Own[Path | None] = None,
    fit: FitOptions = FitOptions(),
) -> None:
    """Distil a teacher into a student; the same command goes on where a run stopped.

    Args:
        stage: generic, without labels; specific, with labels, after it
        recipe: a name of `g2sd info`, or the run.json of a run
        teacher: generic: MAE's file with its decoder; specific: a fine-tuned model
        out: folder of the run and its weights
        data: folder with train/CLASS and val/CLASS, or of ADE20K's or COCO's layout; wds/FOLDER, hfds/NAME
        encoder: specific: the file of the generic stage
        loss: specific: how the teacher counts; the last two are for segmentation
        targets: generic: folder for the teacher's targets, computed once, where pictures do not vary
    """
    from g2sd.recipes import GenericRecipe
    from g2sd.stages import LABELLED, run_recipe

    elsewhere = {"encoder": encoder, "loss": loss} if stage == "generic" else {"targets": targets}
    for name, value in elsewhere.items():
        if value is not None:
            other = "specific" if stage == "generic" else "generic"
            raise ValueError(f"{name}={value} is for `g2sd distill {other}`")
    chosen = _recipe(recipe, GenericRecipe if stage == "generic" else LABELLED, fit)
    chosen = chosen if loss is None else replace(chosen, mode=loss)
    _report(run_recipe(chosen, data, out, start=encoder, teacher=teacher, targets=targets))


def pretrain(
    recipe: Positional[str], *, out: Path, data: Own[str | None] = None, fit: FitOptions = FitOptions()
) -> None:
    """Pre-train a masked autoencoder without labels; the same command goes on where a run stopped.

    Args:
        recipe: a name of `g2sd info`, or the run.json of a run
        out: folder of the run and its weights
        data: folder with train/CLASS and val/CLASS, wds/FOLDER or hfds/NAME
    """
    from g2sd.recipes import PretrainRecipe
    from g2sd.stages import run_recipe

    _report(run_recipe(_recipe(recipe, PretrainRecipe, fit), data, out))


def finetune(
    recipe: Positional[str],
    *,
    out: Path,
    data: Own[str | None] = None,
    encoder: Own[Path | None] = None,
    fit: FitOptions = FitOptions(),
) -> None:
    """Train a classifier, segmentation model or detector with labels; the same command goes on where a run stopped.

    Args:
        recipe: a name of `g2sd info`, or the run.json of a run
        out: folder of the run and its weights
        data: folder with train/CLASS and val/CLASS, or of ADE20K's or COCO's layout; wds/FOLDER, hfds/NAME
        encoder: file with the encoder to start from; without it, weights are random
    """
    from g2sd.stages import LABELLED, run_recipe

    chosen = _recipe(recipe, LABELLED, fit)
    if chosen.mode is not None:
        raise ValueError(f"recipe {recipe} needs a teacher; run `g2sd distill specific {recipe} --teacher FILE`")
    _report(run_recipe(chosen, data, out, start=encoder))


def probe(
    kind: Positional[Literal["linear", "knn"]],
    file: Positional[Path],
    *,
    data: Own[str | None] = None,
    recipe: Own[str | None] = None,
    out: Own[Path | None] = None,
    pool: Literal["class", "mean"] = "class",
    neighbours: int = 20,
    fit: FitOptions = FitOptions(),
) -> None:
    """Tell how good the features of an encoder are, without fine-tuning it.

    Args:
        kind: linear: a classifier is trained on frozen features; knn: votes of nearest neighbours
        file: weights of any stage
        data: folder with train/CLASS and val/CLASS, wds/FOLDER or hfds/NAME; default: those that the file names
        recipe: linear probe of `g2sd info`; default: ImageNet's, with pictures prepared as the file's were
        out: linear: folder of the run
        pool: features: the class token, or the mean of the patches
        neighbours: of knn, which of the training options needs batch size, device and workers alone
    """
    from g2sd.probe import encoder_of, linear_probe, nearest_neighbours, recipe_for
    from g2sd.recipes import ProbeRecipe
    from visionkernels.recipes import data_of

    if recipe is None:
        chosen = recipe_for(file)
        chosen = replace(chosen, fit=fit.apply(chosen.fit), pool=pool)
    else:
        chosen = replace(_recipe(recipe, ProbeRecipe, fit), pool=pool)
    if kind == "linear":
        if out is None:
            raise ValueError("out is missing; give --out FOLDER for the run of a linear probe")
        _report(linear_probe(chosen, data, out, start=file))
        return
    encoder = encoder_of(file, img_size=chosen.pictures.size, pool=pool)
    found = nearest_neighbours(
        encoder, data_of(chosen, data), chosen.pictures, num_neighbours=neighbours,
        batch_size=fit.batch_size or 64, workers=fit.workers or 0, device=find_device(fit.device or "auto"),
    )  # fmt: skip
    print(f"top-1 {found.top1:.2f} %, majority class {found.majority_top1:.2f} %, {found.count} pictures")


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
    """Measure a classifier, a segmentation model or a detector on validation data.

    Args:
        checkpoint: weights of `g2sd distill specific` or `finetune`, or official ones
        data: as for training
        batch_size: pictures that a classifier computes together; other models take one by one
        workers: data loading processes
        device: auto, cpu, cuda, ...
        json: write the result here as well
        overwrite: replace an existing output
    """
    from g2sd.evaluation import evaluate_checkpoint

    refuse_existing(json, overwrite)
    metrics = evaluate_checkpoint(checkpoint, data, device=find_device(device), batch_size=batch_size, workers=workers)
    print_metrics(metrics)
    if json is not None:
        write_json(json, {"checkpoint": str(checkpoint), "data": data, **metrics}, overwrite=overwrite)


def inspect(
    file: Positional[Path], *, entry: str | None = None, json: Path | None = None, overwrite: bool = False
) -> None:
    """Tell what a weights file is, what it lacks, and which command takes it.

    Args:
        file: .pth or .safetensors
        entry: which weights, where the file has several
        json: write the findings here as well
        overwrite: replace an existing output
    """
    from g2sd.inspection import inspect_file

    refuse_existing(json, overwrite)
    found = inspect_file(file, entry=entry)
    print(f"{file}: " + "\n  ".join(found.lines()))
    if json is not None:
        write_json(json, {"file": str(file), **asdict(found)}, overwrite=overwrite)


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


def export(
    file: Positional[Path], *, out: Path, head: Own[Literal["mean", "class"] | None] = None, overwrite: bool = False
) -> None:
    """Write a classifier or segmentation model as ONNX (.onnx) or as a program of torch.export (.pt2).

    Args:
        file: its weights
        out: the file to write
        head: logits of a classifier with a distillation token: mean of both heads, or class alone
        overwrite: replace an existing output
    """
    from g2sd.export import export_model

    refuse_existing(out, overwrite)
    print(f"{out}: {export_model(file, out, head=head, overwrite=overwrite)}")


def info() -> None:
    """Print the version, the models and the recipes."""
    import timm

    import g2sd.mae
    import g2sd.vit  # noqa: F401 - registers the models
    from g2sd.recipes import all_recipes

    print(f"g2sd-vision {_VERSION}")
    print(f"models: {', '.join(timm.list_models('mae_vit_*') + timm.list_models('g2sd_vit_*'))}")
    print("recipes:")
    for recipe in all_recipes().values():
        print(f"  {recipe.name}: {recipe.summary}")


def reproduce(*, report: ReportOptions = ReportOptions()) -> int:
    """Measure the paper's tables: what this machine can, and for the rest what it would take."""
    from g2sd.tables import tables

    return report.measure("g2sd-vision", tables())


def bench(*, full: bool = False, json: Path | None = None, overwrite: bool = False) -> None:
    """Time distillation beside the official algorithm.

    Args:
        full: also with two threads, and more repeats
        json: write the rows here as well
        overwrite: replace an existing output
    """
    from g2sd.bench import measure

    report_bench(measure(full=full), json=json, overwrite=overwrite)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv`, by default the process's arguments; returns the exit code."""
    commands: dict[str, Any] = {
        "train": train,
        "distill": distill,
        "pretrain": pretrain,
        "finetune": finetune,
        "probe": probe,
        "eval": evaluate,
        "inspect": inspect,
        "convert": convert,
        "export": export,
        "info": info,
        "reproduce": reproduce,
        "bench": bench,
    }
    return run(
        "g2sd",
        commands,
        description="G2SD (CVPR 2023): small vision transformers from masked autoencoders, by two distillations.",
        version=_VERSION,
        argv=argv,
    )


def _recipe(name: str, kind: Any, fit: FitOptions) -> Any:
    from g2sd.recipes import all_recipes, find_recipe, read_recipe

    chosen = choose_recipe(name, find_recipe, read_recipe, fit)
    if not isinstance(chosen, kind):
        known = ", ".join(recipe.name for recipe in all_recipes().values() if isinstance(recipe, kind))
        raise ValueError(f"recipe {name} is of another stage; this one has {known}")
    return chosen


def _report(result: FitResult) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    print_metrics(result.metrics)
    _judge(result.metrics)
    print(f"weights: {result.weights}")


def _judge(metrics: Mapping[str, float]) -> None:
    """Say whether a loss without labels is below those that need no model."""
    baselines = {
        "val_zero_loss": "always 0", "val_position_loss": "the mean of each position", "val_flat_loss": "flat patches"
    }  # fmt: skip
    found = {words: metrics[name] for name, words in baselines.items() if name in metrics}
    if found:
        loss = metrics["val_loss"]
        above = [words for words, value in found.items() if loss >= value]
        beside = " and ".join(f"{value:.4g} ({words})" for words, value in found.items())
        verdict = f"NOT below {' and '.join(above)}: nothing of use is learnt yet" if above else "below, as it must be"
        print(f"loss {loss:.4g} beside {beside}: {verdict}")


if __name__ == "__main__":
    sys.exit(main())
