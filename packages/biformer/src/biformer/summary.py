"""Summary of a model: parameters, operations, stages."""

from dataclasses import dataclass
from typing import Any

import timm
import torch

from biformer.recipes import RECIPES, ClassificationRecipe
from visionkernels.profiling import count_flops, count_parameters

__all__ = ["ModelSummary", "StageSummary", "lines", "summarise"]


@dataclass(frozen=True)
class StageSummary:
    """One of the four stages."""

    stride: int
    """Side in pixels of the image patch of a token."""
    blocks: int
    channels: int
    topk: int | None
    """Regions that a region attends to; None for full attention."""
    attention: str


@dataclass(frozen=True)
class ModelSummary:
    """A model at an image size, height and width in pixels; `flops` counts a multiply-add as one."""

    name: str
    parameters: int
    flops: int
    size: tuple[int, int]
    stages: tuple[StageSummary, ...]


def summarise(name: str, size: tuple[int, int] | None = None) -> ModelSummary:
    """Describe a registered model, or the model of a recipe; for segmentation and detection, its backbone.

    `size` is by default the recipe's, or 224 x 224.
    """
    recipe: Any = RECIPES.get(name)
    options = recipe.model.options() if recipe else {}
    if recipe and not isinstance(recipe, ClassificationRecipe):
        options["num_classes"] = 0
    if size is None:
        side = recipe.pictures.size if isinstance(recipe, ClassificationRecipe) else 224
        size = (side, side)
    with torch.device("meta"):
        model: Any = timm.create_model(recipe.model.name if recipe else name, **options)
        flops = count_flops(model, torch.empty(1, 3, *size)).total
    stages = tuple(
        _summarise_stage(blocks, stage) for blocks, stage in zip(model.stages, model.feature_info, strict=True)
    )
    return ModelSummary(name, count_parameters(model), flops, size, stages)


def lines(summary: ModelSummary) -> list[str]:
    """Return a summary as lines of text, one for the model and one for each stage."""
    height, width = summary.size
    figures = f"{summary.parameters:,} parameters, {summary.flops / 1e9:.3f} G operations at {height} x {width}"
    stages = [
        f"  stride {stage.stride:2}  {stage.blocks:2} blocks  {stage.channels:4} channels  {stage.attention}"
        for stage in summary.stages
    ]
    return [f"{summary.name}: {figures}", *stages]


def _summarise_stage(blocks: Any, stage: dict[str, Any]) -> StageSummary:
    layer = blocks[0].attn
    topk = getattr(layer, "topk", None)
    attention = "full attention" if topk is None else f"{layer.n_win} x {layer.n_win} regions, each attends to {topk}"
    return StageSummary(stage["reduction"], len(blocks), stage["num_chs"], topk, attention)
