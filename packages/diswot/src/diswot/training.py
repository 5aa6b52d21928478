"""Distillation by a recipe, on the loop that all packages share, and comparisons of students."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from torchvision import transforms

from diswot.evaluation import build_network, load_network
from diswot.losses.registry import DISTILLERS
from diswot.recipes import DistillRecipe
from diswot.task import DistillationTask
from visionkernels import classification
from visionkernels.checkpoints import load_strict, read_state
from visionkernels.extras import require
from visionkernels.pictures.labelled import LabelledPictures, open_pictures
from visionkernels.pictures.transforms import evaluation_transform
from visionkernels.recipes import data_of, settings
from visionkernels.training import FitResult, ScheduleRecipe, TrainingData, fit

__all__ = ["IndexedPictures", "compare_students", "train", "training_transform"]


def train(
    recipe: DistillRecipe,
    data: str | Path | None,
    out: str | Path,
    *,
    teacher_checkpoint: str | Path | None = None,
) -> FitResult:
    """Train a student; a run that the folder `out` holds goes on where it stopped.

    `data` is as for `visionkernels.pictures.labelled.open_pictures`, by default the recipe's own. The teacher has the
    weights of `teacher_checkpoint` (of `diswot train`, or official ones, .pth or .safetensors), or is trained first, by
    the labels and the recipe's `fit`, in `out`/teacher. A pre-training has `out`/pretraining.
    `out`/weights.safetensors holds the student alone and opens with `diswot.evaluation.load_network`. The metrics are
    those of `visionkernels.classification`, after the last epoch. Raises ValueError for a teacher of other classes, and
    as `open_pictures`, `load_network`, `DistillationTask` and `visionkernels.training.fit` do.
    """
    course = _Course(recipe, data)
    teacher, origin = course.teacher(Path(out) / "teacher", teacher_checkpoint)
    torch.manual_seed(recipe.fit.seed)
    student = build_network(recipe.student, course.num_classes, recipe.pictures, course.class_names)
    return course.distil(student, teacher, Path(out), recipe, {"model_name": recipe.student, **origin})


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
    `train`, in `out`/teacher, trained once with the recipe's own seed. Each run has a folder in `out`; the same call
    goes on where it stopped. Errors as for `train`, and ValueError for no students or seeds.
    """
    if not students or not seeds:
        raise ValueError(f"{len(students)} students and {len(seeds)} seeds; give at least one of each")
    course = _Course(recipe, data)
    teacher, origin = course.teacher(Path(out) / "teacher", teacher_checkpoint)
    table: dict[str, tuple[float, ...]] = {}
    for name, build in students.items():
        accuracies = []
        for seed in seeds:
            torch.manual_seed(seed)
            own = replace(recipe, student=name, fit=replace(recipe.fit, seed=seed))
            folder = Path(out) / _folder_name(name) / f"seed-{seed}"
            result = course.distil(build(), teacher, folder, own, {"student": name, **origin})
            accuracies.append(result.metrics["top1"])
        table[name] = tuple(accuracies)
    return table


def training_transform(recipe: DistillRecipe) -> Callable[[Any], Any]:
    """Return what a training picture goes through: resized, padded and cropped at random, mirrored, normalised."""
    pictures = recipe.pictures
    mode = transforms.InterpolationMode(pictures.interpolation)
    steps: list[Any] = [transforms.Resize((pictures.size, pictures.size), mode)]
    if recipe.padding:
        steps.append(transforms.RandomCrop(pictures.size, padding=recipe.padding))
    if recipe.is_flipped:
        steps.append(transforms.RandomHorizontalFlip())
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(pictures.mean, pictures.std)])


class IndexedPictures(Dataset):
    """Pictures with their class and their place: item i is (picture, class, i)."""

    def __init__(self, pictures: LabelledPictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        return *self.pictures[index], index


class _Course:
    """The data of a recipe, and how networks are trained on it."""

    def __init__(self, recipe: DistillRecipe, data: str | Path | None) -> None:
        for module in ("accelerate", "torchmetrics"):
            require(module, "diswot[train]")
        self.recipe, self.data = recipe, data_of(recipe, data)
        self.train_set = open_pictures(self.data, "train", training_transform(recipe))
        self.class_names = self.train_set.class_names
        self.num_classes = len(self.class_names)
        transform = evaluation_transform(recipe.pictures)
        self.val_set = open_pictures(self.data, "validation", transform, class_names=self.class_names)

    def teacher(self, folder: Path, checkpoint: str | Path | None) -> tuple[nn.Module | None, dict[str, str]]:
        """Return the teacher with its weights, and what run.json says of their origin."""
        recipe = self.recipe
        if recipe.teacher is None:
            if checkpoint is not None:
                raise ValueError(f"recipe {recipe.name} has no teacher for --teacher-checkpoint {checkpoint}")
            return None, {}
        if checkpoint is None:
            plain = replace(recipe, teacher=None, distiller="none", student=recipe.teacher)
            torch.manual_seed(recipe.fit.seed)
            model = build_network(recipe.teacher, self.num_classes, recipe.pictures, self.class_names)
            trained = self._fit(model, None, folder, plain, {"model_name": recipe.teacher})
            load_strict(model, read_state(trained.weights).state, source=trained.weights)
            return model, {"teacher_weights": "trained first"}
        network = load_network(checkpoint, recipe.teacher)
        if network.num_classes != self.num_classes:
            raise ValueError(
                f"teacher {recipe.teacher} of {checkpoint} has {network.num_classes} classes, "
                f"the data and student {recipe.student} {self.num_classes}"
            )
        return network.model, {"teacher_weights": str(checkpoint)}

    def distil(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        folder: Path,
        recipe: DistillRecipe,
        details: Mapping[str, str],
    ) -> FitResult:
        """Train `student` in `folder` as `recipe` says, on the data of this course; the weights hold it alone."""
        told = {**details, "settings": settings(recipe)}
        if recipe.pretraining_epochs:
            schedule = ScheduleRecipe(name="constant")
            first = replace(recipe.fit, epochs=recipe.pretraining_epochs, updates=None, schedule=schedule)
            alone = replace(recipe, fit=first, ce_weight=0.0, kd_weight=0.0)
            before = self._fit(student, teacher, folder / "pretraining", alone, told, measures=False)
            load_strict(student, read_state(before.weights).state, source=before.weights)
            recipe = replace(recipe, distiller="none", pretraining_epochs=0)
        return self._fit(student, teacher, folder, recipe, told)

    def _fit(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        folder: Path,
        recipe: DistillRecipe,
        details: Mapping[str, Any],
        *,
        measures: bool = True,
    ) -> FitResult:
        pictures = recipe.pictures
        evaluate = partial(_metrics, pictures=self.val_set, workers=recipe.fit.num_workers)
        task = DistillationTask(
            student,
            teacher,
            num_samples=len(self.train_set),
            image_size=(pictures.size, pictures.size),
            mean=pictures.mean,
            std=pictures.std,
            **recipe.losses(),
        )
        is_indexed = recipe.distiller in DISTILLERS and DISTILLERS[recipe.distiller].is_indexed
        return fit(
            task,
            recipe.fit,
            TrainingData(
                train=IndexedPictures(self.train_set) if is_indexed else self.train_set,
                evaluate=evaluate if measures else None,
            ),
            folder,
            details={
                "settings": settings(recipe),
                **details,
                "model_options": {"num_classes": self.num_classes},
                "class_names": self.class_names,
                "pictures": asdict(pictures),
                "data": str(self.data),
                "diswot": version("diswot"),
            },
        )


def _metrics(model: nn.Module, pictures: LabelledPictures, workers: int) -> Mapping[str, float]:
    num_classes = len(pictures.class_names)
    return classification.evaluate(model, pictures, num_classes=num_classes, workers=workers).metrics()


def _folder_name(name: str) -> str:
    """Return a name that every file system takes: keys of search spaces are long and full of signs."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
    if plain == name and len(name) <= 60 and not name.startswith("."):
        return name
    return f"{plain[:40].strip('.-')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
