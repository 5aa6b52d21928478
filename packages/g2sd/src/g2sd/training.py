"""The stages by recipes, on the loop that all packages share: pre-training, generic distillation, classification."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from g2sd.checkpoint import load_encoder, load_official, load_teacher
from g2sd.generic import GenericDistiller
from g2sd.mae import MaskedAutoencoder, create_autoencoder
from g2sd.recipes import (
    AutoencoderSizes,
    FinetuneRecipe,
    GenericRecipe,
    PictureStage,
    PretrainRecipe,
    check_teacher,
)
from g2sd.specific import SpecificDistiller
from g2sd.targets import StoredTargets, store_targets
from g2sd.task import AutoencoderTask, ClassifierTask, GenericTask
from g2sd.vit import DistilledViT
from visionkernels import classification
from visionkernels.checkpoints import read_state, save_weights
from visionkernels.extras import require
from visionkernels.pictures.labelled import LabelledPictures, open_pictures
from visionkernels.pictures.transforms import LabelMixing, evaluation_transform, training_transform
from visionkernels.recipes import check, data_of, settings
from visionkernels.training import FitResult, TrainingData, fit

__all__ = ["distil_generic", "finetune", "pretrain", "with_few_labels"]

_REMEMBERED_BYTES = 256 << 20


def pretrain(recipe: PretrainRecipe, data: str | Path | None, out: str | Path) -> FitResult:
    """Pre-train a masked autoencoder; a run that the folder `out` holds goes on where it stopped.

    `data` is as for `visionkernels.pictures.labelled.open_pictures`, by default the recipe's own; labels are not used.
    `out`/weights.safetensors opens with `g2sd.checkpoint.load_official`. The metrics are `val_loss` on masks of the
    validation pictures that are always the same, and `val_flat_loss`, that of patches of one colour.
    """
    train_set, val_set = _pictures(recipe, data)
    torch.manual_seed(recipe.fit.seed)
    task = AutoencoderTask(
        _autoencoder(recipe.model, recipe), mask_ratio=recipe.mask_ratio, is_normalised=recipe.is_normalised
    )
    details = _heads(cast(MaskedAutoencoder, task.trainable_module))
    return _fit(task, recipe, train_set, partial(_unlabelled_metrics, task=task, pictures=val_set), out, details)


def distil_generic(
    recipe: GenericRecipe,
    data: str | Path | None,
    out: str | Path,
    *,
    teacher: str | Path | nn.Module,
    targets: str | Path | None = None,
) -> FitResult:
    """Distil a masked autoencoder into the recipe's students, without labels; a run in `out` goes on where it stopped.

    `teacher` is a file of MAE with its decoder, or a module as `GenericDistiller` takes it. `out`/weights.safetensors
    holds the student, which `load_official` and `g2sd.checkpoint.load_encoder` open; of several students it holds all,
    and each has a file of its own, student-0.safetensors, ... `targets` is a folder for the teacher's targets under
    four masks of each picture, computed once: for pictures that do not vary. The metrics are `val_loss` on masks that
    are always the same, and `val_zero_loss` and `val_position_loss`, which it must be below (see `GenericTask`). Raises
    CheckpointError for a teacher without decoder.
    """
    train_set, val_set = _pictures(recipe, data)
    size = (recipe.pictures.size,) * 2
    module = teacher if isinstance(teacher, nn.Module) else load_teacher(teacher, img_size=size)
    width = module.decoder_width if isinstance(module, MaskedAutoencoder) else cast(int, module.width)
    encoder_width = module.embed_dim if isinstance(module, MaskedAutoencoder) else None
    torch.manual_seed(recipe.fit.seed)
    widths = {"teacher_decoder_width": width, "teacher_width": encoder_width}
    students = [_autoencoder(sizes, recipe, **widths) for sizes in recipe.students]
    distiller = GenericDistiller(cast(Any, module), students, **recipe.settings_of_loss())
    task = GenericTask(distiller)
    samples: Dataset = train_set
    if targets is not None:
        check(not _varies(recipe), "targets", str(targets), f"None: recipe {recipe.name} varies its pictures")
        train_set = _remembered(train_set, recipe)
        samples = StoredTargets(train_set, store_targets(distiller, train_set, targets, seed=recipe.fit.seed))
    told = {"teacher": _named(teacher), **(_heads(students[0]) if len(students) == 1 else {})}
    result = _fit(task, recipe, samples, partial(_unlabelled_metrics, task=task, pictures=val_set), out, told)
    if len(students) > 1 and os.environ.get("RANK", "0") == "0":
        _part(result.weights, students)
    return result


def _part(weights: Path, students: Sequence[MaskedAutoencoder]) -> None:
    """Write each of several students into a file of its own, beside that of all."""
    checkpoint = read_state(weights)
    for place, student in enumerate(students):
        prefix = f"{place}."
        state = {key.removeprefix(prefix): value for key, value in checkpoint.state.items() if key.startswith(prefix)}
        told = {**checkpoint.metadata, **_heads(student)}
        save_weights(weights.with_name(f"student-{place}.safetensors"), state, metadata=told, overwrite=True)


def finetune(
    recipe: FinetuneRecipe,
    data: str | Path | None,
    out: str | Path,
    *,
    start: str | Path | None = None,
    teacher: str | Path | nn.Module | None = None,
) -> FitResult:
    """Train a classifier with labels, and with a teacher's logits where the recipe has a `mode`.

    `start` is a file with the encoder to start from, of generic distillation, MAE or any other stage; the head begins
    at nearly 0 then. `teacher` is a classifier of the data's classes: a file, or a module. `out`/weights.safetensors
    opens with `load_official`. The metrics are those of `visionkernels.classification`. Raises ValueError for a teacher
    that the recipe has no use for, or none where it needs one.
    """
    check_teacher(recipe, teacher)
    train_set, val_set = _pictures(recipe, data)
    names = train_set.class_names
    if recipe.labels_per_class is not None:
        train_set = with_few_labels(train_set, recipe.labels_per_class, seed=recipe.fit.seed)
    torch.manual_seed(recipe.fit.seed)
    model = _classifier(recipe, names)
    heads = model.blocks[0].attn.num_heads
    details: dict[str, Any] = {"model_name": recipe.model.name, "class_names": names, "num_heads": str(heads)}
    if start is not None:
        details["started_from"] = load_encoder(model, start)
        nn.init.trunc_normal_(model.head.weight, std=2e-5)
    distiller = None
    if teacher is not None and recipe.mode is not None:
        size = (recipe.pictures.size,) * 2
        module = teacher if isinstance(teacher, nn.Module) else load_official(teacher, img_size=size)
        options = {"temperature": recipe.temperature, "alpha": recipe.alpha}
        distiller = SpecificDistiller(model, module, mode=recipe.mode, **options)
        details["teacher"] = _named(teacher)
    if isinstance(model, DistilledViT):
        # after NKD the other head is as it was drawn
        details["eval_head"] = model.eval_head
    mixing = LabelMixing(recipe.augmentation, len(names))
    evaluate = partial(_accuracy, pictures=val_set, workers=recipe.fit.num_workers)
    return _fit(ClassifierTask(model, distiller), recipe, train_set, evaluate, out, details, batch_transform=mixing)


def with_few_labels(pictures: LabelledPictures, per_class: int, *, seed: int = 0) -> LabelledPictures:
    """Return `per_class` random pictures of each class. Raises ValueError for a class that has fewer."""
    check(per_class >= 1, "per_class", per_class, "at least 1")
    labels, rng = np.asarray(pictures.labels), np.random.default_rng(seed)
    chosen: list[int] = []
    for number, name in enumerate(pictures.class_names):
        places = np.flatnonzero(labels == number)
        if len(places) < per_class:
            raise ValueError(f"class {name} has {len(places)} pictures, fewer than labels_per_class={per_class}")
        chosen += rng.permutation(places)[:per_class].tolist()
    files, describe = pictures.files, pictures.describe
    return replace(
        pictures,
        files=partial(_at, files, chosen),
        labels=[pictures.labels[place] for place in chosen],
        describe=partial(_at, describe, chosen),
    )


def _at(function: Any, places: list[int], index: int) -> Any:
    return function(places[index])


@dataclass(frozen=True)
class _Remembered(LabelledPictures):
    """Small pictures that do not vary, prepared once."""

    known: dict[int, tuple[Any, int]] = field(default_factory=dict, init=False)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index not in self.known:
            self.known[index] = super().__getitem__(index)
        return self.known[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int]]:
        # of a batch at once: random numbers, which no picture draws here, are then not seeded for each
        return [self[index] for index in indices]


def _remembered(pictures: LabelledPictures, recipe: PictureStage) -> LabelledPictures:
    bytes_of_all = len(pictures) * 3 * recipe.pictures.size**2 * 4
    if bytes_of_all > _REMEMBERED_BYTES:
        return pictures
    return _Remembered(**{each.name: getattr(pictures, each.name) for each in fields(pictures)})


def _varies(recipe: PictureStage) -> bool:
    """Tell whether a training picture is another one each time."""
    changes = recipe.augmentation
    return changes.random_crop or changes.rand_augment is not None or changes.erasing > 0


def _pictures(recipe: PictureStage, data: str | Path | None) -> tuple[LabelledPictures, LabelledPictures]:
    for module in ("accelerate", "torchmetrics"):
        require(module, "g2sd-vision[train]")
    source = data_of(recipe, data)
    train_set = open_pictures(source, "train", training_transform(recipe.pictures, recipe.augmentation))
    transform = evaluation_transform(recipe.pictures)
    val_set = open_pictures(source, "validation", transform, class_names=train_set.class_names)
    return train_set, _remembered(val_set, recipe)


def _autoencoder(sizes: AutoencoderSizes, recipe: PictureStage, **widths: int | None) -> MaskedAutoencoder:
    size = recipe.pictures.size
    return create_autoencoder(sizes.name, img_size=size, **sizes.options(), **widths)


def _classifier(recipe: FinetuneRecipe, class_names: tuple[str, ...]) -> Any:
    pictures = recipe.pictures
    overlay = {
        "input_size": (3, pictures.size, pictures.size),
        "crop_pct": pictures.size / pictures.resize,
        "interpolation": pictures.interpolation,
        "mean": pictures.mean,
        "std": pictures.std,
        "label_names": class_names,
    }
    options = {"img_size": pictures.size, "num_classes": len(class_names), **recipe.model.options()}
    return timm.create_model(recipe.model.name, **options, pretrained_cfg_overlay=overlay)


def _heads(model: MaskedAutoencoder) -> dict[str, str]:
    """What weights do not show of a model."""
    blocks = {"num_heads": model.blocks[0], "decoder_num_heads": model.decoder_blocks[0]}
    return {name: str(cast(Any, block).attn.num_heads) for name, block in blocks.items()}


def _named(teacher: str | Path | nn.Module) -> str:
    return type(teacher).__name__ if isinstance(teacher, nn.Module) else str(teacher)


def _fit(
    task: Any,
    recipe: PictureStage,
    train_set: Dataset,
    evaluate: Any,
    out: str | Path,
    details: Mapping[str, Any],
    **options: Any,
) -> FitResult:
    described = {
        "settings": settings(recipe), "pictures": asdict(recipe.pictures), "g2sd": version("g2sd-vision"), **details
    }  # fmt: skip
    if isinstance(train_set, LabelledPictures) and not _varies(recipe):
        train_set = _remembered(train_set, recipe)
    data = TrainingData(train=train_set, evaluate=evaluate, **options)
    return fit(task, recipe.fit, data, out, details=described)


def _accuracy(model: nn.Module, pictures: LabelledPictures, workers: int) -> Mapping[str, float]:
    return classification.evaluate(model, pictures, workers=workers).metrics()


@torch.no_grad()
def _unlabelled_metrics(model: nn.Module, *, task: Any, pictures: LabelledPictures) -> Mapping[str, float]:
    """Return the losses of the task on validation pictures, each under the same mask at every call."""
    trained, task.trainable_module = task.trainable_module, model
    kept = {name: buffer.clone() for name, buffer in task.named_buffers()}
    totals: dict[str, float] = {}
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for images, labels in DataLoader(pictures, batch_size=64):
                for name, value in task(images.to(device), labels).items():
                    totals[name] = totals.get(name, 0.0) + float(value) * len(images)
    finally:
        task.trainable_module = trained
        for name, buffer in task.named_buffers():
            buffer.copy_(kept[name])
    return {f"val_{name}": total / len(pictures) for name, total in totals.items()}
