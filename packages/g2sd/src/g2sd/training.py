"""Training by recipe: pre-training, generic distillation, classification."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from g2sd.generic import GenericDistiller
from g2sd.mae import MaskedAutoencoder, create_autoencoder
from g2sd.official import load_encoder, load_official, load_teacher
from g2sd.recipes import FinetuneRecipe, GenericRecipe, PretrainRecipe, check_teacher
from g2sd.recipes.base import autoencoder_record
from g2sd.specific import SpecificDistiller
from g2sd.targets import StoredTargets, store_targets
from g2sd.task import AutoencoderTask, ClassifierTask, GenericTask
from g2sd.teachers import TokenTeacher, token_teacher
from g2sd.vit import DistilledViT
from visionkernels.checks import InputError, check
from visionkernels.pictures.labelled import LabelledPictures
from visionkernels.pictures.transforms import LabelMixing
from visionkernels.tasks.classification import ClassificationRecipe, ClassificationSets, build_classifier
from visionkernels.tasks.teachers import Teacher, open_teacher
from visionkernels.training import FitResult
from visionkernels.weights import Trained, open_trained, read_checkpoint

__all__ = ["distil_generic", "finetune", "pretrain", "with_few_labels"]

_EXTRA = "g2sd-vision[train]"
_REMEMBERED_BYTES = 256 << 20


def pretrain(recipe: PretrainRecipe, data: str | Path | None, out: str | Path) -> FitResult:
    """Pre-train a masked autoencoder; rerun with the same arguments to resume the run in the folder `out`.

    `data` is as for `visionkernels.pictures.labelled.open_pictures`, by default the recipe's own; labels are ignored.
    `out`/weights.safetensors opens with `g2sd.official.load_official`. The metrics are `val_loss` on masks of the
    validation images that are always the same, and the baseline `val_flat_loss` of patches of one colour.
    """
    sets = _open(recipe, data)
    torch.manual_seed(recipe.fit.seed)
    trained = replace(recipe.record(), data=sets.source)
    model = _autoencoder(trained)
    task = AutoencoderTask(model, mask_ratio=recipe.mask_ratio, is_normalised=recipe.is_normalised)
    return _fit(task, sets, out, _with_heads(trained, model), evaluate=_unlabelled(task, sets))


def distil_generic(
    recipe: GenericRecipe,
    data: str | Path | None,
    out: str | Path,
    *,
    teacher: str | Path | nn.Module,
    teacher_checkpoint: str | Path | None = None,
    targets: str | Path | None = None,
) -> FitResult:
    """Distil a teacher into the recipe's students, without labels; rerun with the same arguments to resume.

    `out`/weights.safetensors holds the student, which `load_official` and `g2sd.official.load_encoder` open; of several
    students it holds all, and one student per file is in student-0.safetensors, ... The metrics are `val_loss` on
    masks that are always the same, and `val_zero_loss` and `val_position_loss`, which it must be below (see
    `GenericTask`).

    Args:
        recipe: the settings
        data: as for `visionkernels.pictures.labelled.open_pictures`; None takes the recipe's own
        out: folder of the run
        teacher: a file of MAE with its decoder, a ViT of timm by name ("timm:vit_small_patch14_dinov2.lvd142m"), or a
            module as `GenericDistiller` takes it
        teacher_checkpoint: weights of a teacher by name, instead of the published ones
        targets: folder for the teacher's targets under four masks of each image, computed once: for images that do not
            vary

    Raises CheckpointError for a teacher without decoder.
    """
    sets = _open(recipe, data)
    module = _masked_teacher(recipe, teacher, teacher_checkpoint)
    width = module.decoder_width if isinstance(module, MaskedAutoencoder) else cast(int, module.width)
    encoder_width = module.embed_dim if isinstance(module, MaskedAutoencoder) else None
    torch.manual_seed(recipe.fit.seed)
    widths = {"teacher_decoder_width": width, "teacher_width": encoder_width}
    records = [autoencoder_record(recipe, sizes, **widths) for sizes in recipe.students]
    students = [_autoencoder(record) for record in records]
    records = [
        _with_heads(replace(record, data=sets.source), student).with_details(
            teacher=_named(teacher), teacher_checkpoint=teacher_checkpoint
        )
        for record, student in zip(records, students, strict=True)
    ]
    distiller = GenericDistiller(cast(Any, module), students, **recipe.settings_of_loss())
    task = GenericTask(distiller)
    train: Dataset = sets.train
    if targets is not None:
        check(not _varies(recipe), "targets", str(targets), f"None: recipe {recipe.name} varies its images")
        train = _remembered(sets.train, recipe)
        train = StoredTargets(train, store_targets(distiller, train, targets, seed=recipe.fit.seed))
    is_single = len(students) == 1
    trained = records[0] if is_single else replace(records[0], kind="students", model=None, options={})
    result = _fit(task, sets, out, trained, train=train, evaluate=_unlabelled(task, sets))
    if not is_single and os.environ.get("RANK", "0") == "0":
        _part(result.weights, records)
    return result


def _masked_teacher(
    recipe: GenericRecipe, teacher: str | Path | nn.Module, checkpoint: str | Path | None
) -> MaskedAutoencoder | TokenTeacher | Any:
    if isinstance(teacher, nn.Module):
        return teacher
    size = recipe.pictures.size
    if _is_file(teacher, checkpoint):
        return load_teacher(teacher, img_size=(size, size))
    name = str(teacher)
    if Path(name).suffix in (".pth", ".safetensors"):
        raise FileNotFoundError(f"checkpoint {name} is not a file")
    patch = cast(
        Any, create_autoencoder(recipe.students[0].name, **recipe.students[0].options())
    ).patch_embed.patch_size
    grid = (size // patch[0], size // patch[1])
    return token_teacher(name, checkpoint, grid=grid, mean=recipe.pictures.mean, std=recipe.pictures.std)


def _part(weights: Path, records: Sequence[Trained]) -> None:
    """Write one file for each of several students, beside the file of all."""
    checkpoint = read_checkpoint(weights)
    assert checkpoint.trained is not None
    for place, record in enumerate(records):
        prefix = f"{place}."
        state = {key.removeprefix(prefix): value for key, value in checkpoint.state.items() if key.startswith(prefix)}
        finished = replace(checkpoint.trained, kind=record.kind, model=record.model, options=record.options)
        finished.save(weights.with_name(f"student-{place}.safetensors"), state, overwrite=True)


def finetune(
    recipe: FinetuneRecipe,
    data: str | Path | None,
    out: str | Path,
    *,
    init: str | Path | None = None,
    teacher: str | Path | nn.Module | None = None,
    teacher_checkpoint: str | Path | None = None,
) -> FitResult:
    """Train a classifier with labels, and with a teacher's logits where the recipe has a `mode`.

    Rerun with the same arguments to resume. `out`/weights.safetensors opens with
    `visionkernels.weights.open_trained`. The metrics are those of `visionkernels.tasks.classification`.

    Args:
        recipe: the settings
        data: as for `visionkernels.pictures.labelled.open_pictures`; None takes the recipe's own
        out: folder of the run
        init: file with the encoder to start from, of generic distillation, MAE or any other stage; the head begins at
            nearly 0 then
        teacher: classifier of the data's classes: a file of any package, a model by name, or a module
        teacher_checkpoint: weights of a teacher by name, instead of the published ones

    Raises InputError for a teacher that the recipe does not take, or none where it needs one.
    """
    check_teacher(recipe, teacher)
    sets = _open(recipe, data)
    train = sets.train
    if recipe.labels_per_class is not None:
        train = with_few_labels(train, recipe.labels_per_class, seed=recipe.fit.seed)
    torch.manual_seed(recipe.fit.seed)
    trained = sets.record(teacher=None if teacher is None else _named(teacher), teacher_checkpoint=teacher_checkpoint)
    model: Any = build_classifier(trained)
    trained = replace(trained, options={**trained.options, "num_heads": model.blocks[0].attn.num_heads})
    if init is not None:
        trained = trained.with_details(started_from=load_encoder(model, init))
        nn.init.trunc_normal_(model.head.weight, std=2e-5)
    distiller = None
    if teacher is not None and recipe.mode is not None:
        module = _classifying_teacher(recipe, teacher, teacher_checkpoint, sets.num_classes)
        options = {"temperature": recipe.temperature, "alpha": recipe.alpha}
        distiller = SpecificDistiller(model, module, mode=recipe.mode, **options)
    if isinstance(model, DistilledViT):
        # after NKD the other head is as it was drawn
        trained = trained.with_details(eval_head=model.eval_head)
    mixing = LabelMixing(recipe.augmentation, sets.num_classes)
    return _fit(ClassifierTask(model, distiller), sets, out, trained, train=train, batch_transform=mixing)


def _classifying_teacher(
    recipe: FinetuneRecipe, teacher: str | Path | nn.Module, checkpoint: str | Path | None, num_classes: int
) -> nn.Module:
    """Return a teacher of the student's images; positions of a file of this family are resized to them."""
    if isinstance(teacher, nn.Module):
        return teacher
    if _is_file(teacher, checkpoint):
        opened = read_checkpoint(teacher)
        if opened.trained is None or opened.trained.package == "g2sd":
            return load_official(opened, img_size=(recipe.pictures.size,) * 2)
        teacher = open_trained(opened).model
    model = open_teacher(teacher, checkpoint=checkpoint, num_classes=num_classes)
    wrapped = Teacher(model, mean=recipe.pictures.mean, std=recipe.pictures.std)
    wrapped.num_classes = num_classes  # type: ignore[assignment]
    return wrapped


def _is_file(teacher: str | Path, checkpoint: str | Path | None) -> bool:
    """Tell whether a teacher is a weights file. Raises InputError for one with a `checkpoint`."""
    is_file = Path(teacher).is_file()
    if is_file and checkpoint is not None:
        raise InputError(f"--teacher {teacher} is a file; --teacher-checkpoint is for a teacher by name")
    return is_file


def with_few_labels(pictures: LabelledPictures, per_class: int, *, seed: int = 0) -> LabelledPictures:
    """Return `per_class` random images of each class. Raises ValueError for a class that has fewer."""
    check(per_class >= 1, "per_class", per_class, "at least 1")
    labels, rng = np.asarray(pictures.labels), np.random.default_rng(seed)
    chosen: list[int] = []
    for number, name in enumerate(pictures.class_names):
        places = np.flatnonzero(labels == number)
        if len(places) < per_class:
            raise InputError(f"class {name} has {len(places)} images, fewer than labels_per_class={per_class}")
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
    """Cache of prepared small images that do not vary."""

    known: dict[int, tuple[Any, int]] = field(default_factory=dict, init=False)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index not in self.known:
            self.known[index] = super().__getitem__(index)
        return self.known[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int]]:
        # for a whole batch: no image draws random numbers here, so none has to be seeded
        return [self[index] for index in indices]


def _remembered(pictures: LabelledPictures, recipe: ClassificationRecipe) -> LabelledPictures:
    bytes_of_all = len(pictures) * 3 * recipe.pictures.size**2 * 4
    if bytes_of_all > _REMEMBERED_BYTES:
        return pictures
    return _Remembered(**{field_.name: getattr(pictures, field_.name) for field_ in fields(pictures)})


def _varies(recipe: ClassificationRecipe) -> bool:
    """Return whether training images are augmented at random."""
    changes = recipe.augmentation
    return changes.random_crop or changes.rand_augment is not None or changes.erasing > 0


def _open(recipe: ClassificationRecipe, data: str | Path | None) -> ClassificationSets:
    sets = ClassificationSets.open(recipe, data, install=_EXTRA)
    return replace(sets, validation=_remembered(sets.validation, recipe))


def _autoencoder(trained: Trained) -> MaskedAutoencoder:
    return create_autoencoder(cast(str, trained.model), **trained.options)


def _with_heads(trained: Trained, model: MaskedAutoencoder) -> Trained:
    """Return the record with numbers of attention heads, which weights do not show."""
    blocks = {"num_heads": model.blocks[0], "decoder_num_heads": model.decoder_blocks[0]}
    heads = {name: cast(Any, block).attn.num_heads for name, block in blocks.items()}
    return replace(trained, options={**trained.options, **heads})


def _named(teacher: str | Path | nn.Module) -> str:
    return type(teacher).__name__ if isinstance(teacher, nn.Module) else str(teacher)


def _fit(
    task: Any,
    sets: ClassificationSets,
    out: str | Path,
    trained: Trained,
    *,
    train: Dataset | None = None,
    **options: Any,
) -> FitResult:
    recipe = cast(ClassificationRecipe, sets.recipe)
    train = sets.train if train is None else train
    if isinstance(train, LabelledPictures) and not _varies(recipe):
        train = _remembered(train, recipe)
    return sets.fit(task, out, trained, train=train, **options)


def _unlabelled(task: Any, sets: ClassificationSets) -> Any:
    return partial(_unlabelled_metrics, task=task, pictures=sets.validation)


@torch.no_grad()
def _unlabelled_metrics(model: nn.Module, *, task: Any, pictures: LabelledPictures) -> Mapping[str, float]:
    """Return the losses of the task on validation images, under the same masks at every call."""
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
