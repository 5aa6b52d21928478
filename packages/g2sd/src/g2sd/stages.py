"""The training of every stage and task, by its recipe."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from g2sd import detection, probe, segmentation, training
from g2sd.detection_recipes import DetectionRecipe
from g2sd.recipes import FinetuneRecipe, GenericRecipe, PretrainRecipe, ProbeRecipe, Recipe
from g2sd.segmentation_recipes import SegmentationRecipe
from visionkernels.training import FitResult

__all__ = ["LABELLED", "run_recipe"]

LABELLED = (FinetuneRecipe, SegmentationRecipe, DetectionRecipe)
"""The kinds of recipes that train with labels, with a teacher or without."""


class _Stage(NamedTuple):
    train: Callable[..., FitResult]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


_STAGES: dict[type[Recipe], _Stage] = {
    PretrainRecipe: _Stage(training.pretrain),
    GenericRecipe: _Stage(training.distil_generic, needs=("teacher",), takes=("targets",)),
    ProbeRecipe: _Stage(probe.linear_probe, needs=("start",)),
    FinetuneRecipe: _Stage(training.finetune, takes=("start", "teacher")),
    SegmentationRecipe: _Stage(segmentation.train, takes=("start", "teacher")),
    DetectionRecipe: _Stage(detection.train, takes=("start", "teacher")),
}
# as the commands call them
_FLAGS = {"start": "encoder"}


def run_recipe(
    recipe: Recipe,
    data: str | Path | None,
    out: str | Path,
    *,
    start: str | Path | None = None,
    teacher: str | Path | None = None,
    targets: str | Path | None = None,
) -> FitResult:
    """Train as a recipe says; a run in `out` goes on where it stopped.

    `start` is a file with the encoder to start from, `teacher` the teacher's, and `targets` a folder for what the
    teacher of generic distillation computes; see the functions of each stage. Raises ValueError for what a recipe has
    no use for and for what it needs, and what these functions raise.
    """
    stage = _STAGES[type(recipe)]
    given: dict[str, Any] = {"start": start, "teacher": teacher, "targets": targets}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name not in (*stage.needs, *stage.takes):
            raise ValueError(f"{_FLAGS.get(name, name)}={value}: recipe {recipe.name} has no use for one")
    for name in stage.needs:
        if name not in given:
            raise ValueError(f"recipe {recipe.name} needs one more file: --{_FLAGS.get(name, name)} FILE")
    return stage.train(recipe, data, out, **given)
