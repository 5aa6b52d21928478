"""Training and validation images of a recipe, and the run on them: the same for every task on labels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from visionkernels.recipes import Recipe
from visionkernels.training import FitResult, TrainingData, fit
from visionkernels.training.task import Task
from visionkernels.weights import Trained

__all__ = ["LabelledSets"]


@dataclass(frozen=True)
class LabelledSets:
    """The training and validation images of a recipe."""

    recipe: Any
    source: str
    """As the function that opens these images takes it."""
    num_classes: int
    train: Any
    validation: Any

    def record(self, **details: Any) -> Trained:
        """Return the record of the recipe's model on these images; details that are None are left out."""
        return replace(self.recipe.record(), data=self.source).with_details(**details)

    def measure(self, model: nn.Module, *, workers: int = 0) -> Mapping[str, float]:
        """Return the metrics of a model on the validation images."""
        raise NotImplementedError

    def fit(
        self,
        task: Task,
        out: str | Path,
        trained: Trained,
        *,
        recipe: Recipe | None = None,
        train: Dataset | None = None,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
        measures: bool = True,
        **options: Any,
    ) -> FitResult:
        """Run `visionkernels.training.fit`.

        Args:
            task: loss and module
            out: folder of the run
            trained: record of the weights
            recipe: instead of the recipe whose images these are
            train: instead of the training images
            evaluate: instead of `measure`
            measures: whether to evaluate at all
            options: further arguments of `TrainingData`
        """
        fit_recipe = (self.recipe if recipe is None else recipe).fit
        if evaluate is None:
            evaluate = partial(self.measure, workers=fit_recipe.num_workers)
        train = self.train if train is None else train
        data = TrainingData(train=train, evaluate=evaluate if measures else None, **options)
        return fit(task, fit_recipe, data, out, trained=trained)
