"""Distillation by a recipe, and comparisons of students."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from torchvision import transforms

from diswot.losses.registry import DISTILLERS
from diswot.recipes import DistillRecipe
from diswot.task import DistillationTask
from visionkernels.checks import InputError
from visionkernels.pictures.labelled import LabelledPictures
from visionkernels.recipes import ScheduleRecipe
from visionkernels.tasks.classification import ClassificationSets, build_classifier
from visionkernels.tasks.teachers import open_teacher
from visionkernels.training import FitResult
from visionkernels.weights import Trained, load_strict, open_trained, read_checkpoint

__all__ = ["IndexedPictures", "compare_students", "train", "training_transform"]


def train(
    recipe: DistillRecipe,
    data: str | Path | None,
    out: str | Path,
    *,
    teacher: str | Path | None = None,
    teacher_checkpoint: str | Path | None = None,
    student: str | None = None,
    distiller: str | None = None,
) -> FitResult:
    """Train a student; rerun with the same arguments to resume the run in `out`.

    `out`/weights.safetensors holds the student alone and opens with `visionkernels.weights.open_trained`. The metrics
    are those of `visionkernels.tasks.classification`, after the last epoch.

    Args:
        recipe: the settings
        data: as for `visionkernels.pictures.labelled.open_pictures`; None takes the recipe's own
        out: folder of the run; a pre-training has `out`/pretraining
        teacher: a weights file of any package, or a network by name, instead of the recipe's own
        teacher_checkpoint: weights of a teacher by name; without them it is trained first, by the labels and the
            recipe's `fit`, in `out`/teacher
        student: network by name, instead of the recipe's own
        distiller: loss added to KD, a name of `diswot.losses`, instead of the recipe's own

    Raises InputError for a teacher of other classes, and as `open_pictures`, `open_trained`, `DistillationTask` and
    `visionkernels.training.fit` do.
    """
    changes: dict[str, Any] = {"student": student, "distiller": distiller}
    changes["teacher"] = None if teacher is None else str(teacher)
    recipe = replace(recipe, **{name: value for name, value in changes.items() if value is not None})
    course = _Course(recipe, data)
    model, origin = course.teacher(Path(out) / "teacher", teacher_checkpoint)
    torch.manual_seed(recipe.fit.seed)
    trained = course.sets.record(**origin)
    return course.distil(build_classifier(trained), model, Path(out), recipe, trained)


def compare_students(
    students: Mapping[str, Callable[[], nn.Module]],
    recipe: DistillRecipe,
    seeds: Sequence[int],
    out: str | Path,
    *,
    data: str | Path | None = None,
    teacher_checkpoint: str | Path | None = None,
) -> dict[str, tuple[float, ...]]:
    """Distil one teacher into each student, once for each seed, and return their top-1 in percent, in order of `seeds`.

    `students` build networks by name, seeded by each seed; the recipe's own student is not used. The teacher is as for
    `train`, in `out`/teacher, trained once with the recipe's own seed. Each run has a folder in `out`; call again
    with the same arguments to resume. Errors as for `train`, and ValueError for no students or seeds.
    """
    if not students or not seeds:
        raise InputError(f"{len(students)} students and {len(seeds)} seeds; give at least one of each")
    course = _Course(recipe, data)
    teacher, origin = course.teacher(Path(out) / "teacher", teacher_checkpoint)
    table: dict[str, tuple[float, ...]] = {}
    for name, build in students.items():
        accuracies = []
        for seed in seeds:
            torch.manual_seed(seed)
            own = replace(recipe, student=name, fit=replace(recipe.fit, seed=seed))
            folder = Path(out) / _folder_name(name) / f"seed-{seed}"
            trained = replace(course.sets, recipe=own).record(**origin)
            result = course.distil(build(), teacher, folder, own, trained)
            accuracies.append(result.metrics["top1"])
        table[name] = tuple(accuracies)
    return table


def training_transform(recipe: DistillRecipe) -> Callable[[Any], Any]:
    """Return the transform of training images: resize, pad and crop at random, mirror, normalise."""
    pictures = recipe.pictures
    mode = transforms.InterpolationMode(pictures.interpolation)
    steps: list[Any] = [transforms.Resize((pictures.size, pictures.size), mode)]
    if recipe.padding:
        steps.append(transforms.RandomCrop(pictures.size, padding=recipe.padding))
    if recipe.is_flipped:
        steps.append(transforms.RandomHorizontalFlip())
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(pictures.mean, pictures.std)])


class IndexedPictures(Dataset):
    """Images with their class and index: item i is (image, class, i)."""

    def __init__(self, pictures: LabelledPictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        return *self.pictures[index], index


class _Course:
    """The data of a recipe, and trainings on it."""

    def __init__(self, recipe: DistillRecipe, data: str | Path | None) -> None:
        self.recipe = recipe
        self.sets = ClassificationSets.open(recipe, data, install="diswot[train]", transform=training_transform(recipe))

    def teacher(self, folder: Path, checkpoint: str | Path | None) -> tuple[nn.Module | None, dict[str, str]]:
        """Return the teacher with its weights, and the details of their origin for the record."""
        recipe = self.recipe
        if recipe.teacher is None:
            if checkpoint is not None:
                raise InputError(f"recipe {recipe.name} has no teacher for --teacher-checkpoint {checkpoint}")
            return None, {}
        if Path(recipe.teacher).is_file():
            num_classes = self.sets.num_classes
            model = open_teacher(recipe.teacher, checkpoint=checkpoint, package="diswot", num_classes=num_classes)
            return model, {"teacher_weights": recipe.teacher}
        if checkpoint is None:
            plain = replace(recipe, teacher=None, distiller="none", student=recipe.teacher)
            torch.manual_seed(recipe.fit.seed)
            trained = replace(self.sets, recipe=plain).record()
            model = build_classifier(trained)
            result = self._fit(model, None, folder, plain, trained)
            load_strict(model, read_checkpoint(result.weights).state, source=result.weights)
            return model, {"teacher_weights": "trained first"}
        opened = open_trained(checkpoint, package="diswot", model=recipe.teacher)
        num_classes = opened.trained.options["num_classes"]
        if num_classes != self.sets.num_classes:
            raise InputError(
                f"teacher {recipe.teacher} of {checkpoint} has {num_classes} classes, "
                f"the data and student {recipe.student} {self.sets.num_classes}"
            )
        return opened.model, {"teacher_weights": str(checkpoint)}

    def distil(
        self, student: nn.Module, teacher: nn.Module | None, folder: Path, recipe: DistillRecipe, trained: Trained
    ) -> FitResult:
        """Train `student` in `folder` as `recipe` says, on the data of this course; the weights file holds it alone."""
        if recipe.pretraining_epochs:
            schedule = ScheduleRecipe(name="constant")
            first = replace(recipe.fit, epochs=recipe.pretraining_epochs, updates=None, schedule=schedule)
            alone = replace(recipe, fit=first, ce_weight=0.0, kd_weight=0.0)
            before = self._fit(student, teacher, folder / "pretraining", alone, trained, measures=False)
            load_strict(student, read_checkpoint(before.weights).state, source=before.weights)
            recipe = replace(recipe, distiller="none", pretraining_epochs=0)
        return self._fit(student, teacher, folder, recipe, trained)

    def _fit(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        folder: Path,
        recipe: DistillRecipe,
        trained: Trained,
        *,
        measures: bool = True,
    ) -> FitResult:
        pictures = recipe.pictures
        task = DistillationTask(
            student,
            teacher,
            num_samples=len(self.sets.train),
            image_size=(pictures.size, pictures.size),
            mean=pictures.mean,
            std=pictures.std,
            **recipe.losses(),
        )
        is_indexed = recipe.distiller in DISTILLERS and DISTILLERS[recipe.distiller].is_indexed
        train = IndexedPictures(self.sets.train) if is_indexed else self.sets.train
        return self.sets.fit(task, folder, trained, recipe=recipe, train=train, measures=measures)


def _folder_name(name: str) -> str:
    """Return a name for any file system: keys of search spaces are long and contain special characters."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
    if plain == name and len(name) <= 60 and not name.startswith("."):
        return name
    return f"{plain[:40].strip('.-')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
