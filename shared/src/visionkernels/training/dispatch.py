"""From a recipe to the function that trains by it."""

import inspect
from pathlib import Path
from typing import Any

from visionkernels.checks import InputError
from visionkernels.package import resolve
from visionkernels.recipes import Recipe
from visionkernels.training.result import FitResult

__all__ = ["train_by_recipe"]


def train_by_recipe(recipe: Recipe, data: str | Path | None, out: str | Path, **given: Any) -> FitResult:
    """Train as `recipe` says; rerun with the same arguments to resume the run that the folder `out` holds.

    `given` are the further arguments of the recipe's trainer, such as `init` (weights to start from) and `teacher`;
    None leaves one out. Raises InputError for what the trainer does not take, for what it needs and is not given, and
    what the trainer raises.
    """
    trainer = resolve(recipe.trainer)
    parameters = inspect.signature(trainer).parameters
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in parameters:
            raise InputError(f"recipe {recipe.name} does not take {_flag(name)}")
    for name, parameter in parameters.items():
        is_required = parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        if is_required and name not in given:
            raise InputError(f"recipe {recipe.name} needs {_flag(name)}")
    result: FitResult = trainer(recipe, data, out, **given)
    return result


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
