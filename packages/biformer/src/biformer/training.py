"""Training of a classifier by a recipe, with labels and optionally a teacher's logits or labels of cells."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils.data import Dataset

from biformer.cell_labels import CellLabelledPictures
from biformer.model import BiFormer
from biformer.official import load_official
from biformer.recipes import ClassificationRecipe, DistillationRecipe
from biformer.task import CellClassifier, CellTeacher, ClassifierTask, TokenLabellingTask
from visionkernels.pictures.transforms import LabelMixing, repeated_augmentation_order
from visionkernels.tasks.classification import ClassificationSets, build_classifier
from visionkernels.tasks.teachers import open_teacher
from visionkernels.training import FitResult
from visionkernels.training.task import Task
from visionkernels.weights import load_strict, read_checkpoint

__all__ = ["train"]


def train(
    recipe: ClassificationRecipe,
    data: str | Path | None,
    out: str | Path,
    *,
    init: str | Path | None = None,
    teacher: str | Path | None = None,
    teacher_checkpoint: str | Path | None = None,
    distillation: Literal["soft", "hard"] = "hard",
) -> FitResult:
    """Train a classifier; rerun with the same arguments to resume the run in `out`.

    The model gets as many classes as the data has. The metrics are those of `visionkernels.tasks.classification`.

    Args:
        recipe: the settings
        data: as for `visionkernels.pictures.labelled.open_pictures`; None takes the recipe's own
        out: folder of the run; its weights.safetensors opens with `visionkernels.weights.open_trained`
        init: weights to start from; a classifier for other classes is ignored
        teacher: as for `visionkernels.tasks.teachers.open_teacher`, instead of the recipe's own
        teacher_checkpoint: weights of a teacher that is named
        distillation: learn from the probabilities of `teacher`, or from its best class

    Raises InputError for a teacher of other classes, and as `open_pictures`, `read_checkpoint` and
    `visionkernels.training.fit` do.
    """
    if teacher is not None:
        recipe = replace(recipe, distillation=DistillationRecipe(teacher=str(teacher), kind=distillation))
    sets = ClassificationSets.open(recipe, data, install="biformer[train]")
    recipe = replace(recipe, model=replace(recipe.model, num_classes=sets.num_classes))
    sets = replace(sets, recipe=recipe)
    torch.manual_seed(recipe.fit.seed)
    trained = sets.record(started_from=init)
    model = cast(BiFormer, build_classifier(trained))
    if init is not None:
        _start_from(model, init, recipe)
    task, samples, transform = _task(recipe, model, sets, teacher_checkpoint)
    order: Callable[[int], Any] | None = None
    # the sampler shortens an epoch to whole groups of 256 images
    if recipe.augmentation.repeats > 1 and len(sets.train) >= 256:
        order = partial(repeated_augmentation_order, len(sets.train), repeats=recipe.augmentation.repeats)
    evaluate = partial(_metrics, sets=sets, workers=recipe.fit.num_workers)
    return sets.fit(task, out, trained, train=samples, evaluate=evaluate, batch_transform=transform, order=order)


def _start_from(model: BiFormer, init: str | Path, recipe: ClassificationRecipe) -> None:
    checkpoint = read_checkpoint(init)
    state = checkpoint.state
    if checkpoint.trained is None and "head.fc.weight" not in state:
        options = {key: value for key, value in recipe.model.options().items() if key != "num_classes"}
        state = load_official(checkpoint, recipe.model.name, **options).state_dict()
    head = state.get("head.fc.weight")
    keep = [] if head is not None and len(head) == model.num_classes else ["head.fc"]
    load_strict(model, state, source=init, keep=keep)


def _task(
    recipe: ClassificationRecipe, model: BiFormer, sets: ClassificationSets, teacher_checkpoint: str | Path | None
) -> tuple[Task, Dataset, Callable[[Any], Any] | None]:
    """Return the task, its training data, and the transform of batches."""
    augmentation = recipe.augmentation

    def teach(name: str) -> CellTeacher:
        opened = open_teacher(name, checkpoint=teacher_checkpoint, package="biformer", num_classes=sets.num_classes)
        return CellTeacher(opened, mean=recipe.pictures.mean, std=recipe.pictures.std)

    if (tokens := recipe.token_labelling) is not None:
        teacher = None if tokens.teacher is None else teach(tokens.teacher)
        task = TokenLabellingTask(CellClassifier(model), tokens, smoothing=augmentation.smoothing, teacher=teacher)
        if tokens.labels is None:
            return task, sets.train, None
        return task, CellLabelledPictures(sets.train, Path(tokens.labels), recipe.pictures, augmentation), None
    distillation = recipe.distillation
    if distillation is not None and distillation.kind == "none":
        distillation = None
    teacher = None if distillation is None else teach(distillation.teacher)
    mixing = LabelMixing(augmentation, sets.num_classes)
    return ClassifierTask(model, teacher=teacher, distillation=distillation), sets.train, mixing


def _metrics(model: nn.Module, sets: ClassificationSets, workers: int) -> Mapping[str, float]:
    # without the classifier of cells
    model = model.model.eval() if isinstance(model, CellClassifier) else model
    return sets.measure(model, workers=workers)
