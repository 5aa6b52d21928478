"""Settings that say which layers are trained, and with which gradients."""

from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from visionkernels.checks import check, check_choice
from visionkernels.ops.filtered_conv import Border
from visionkernels.recipes import FitRecipe, OptimizerRecipe, Recipe, ScheduleRecipe

__all__ = ["GRADIENTS", "FilterRecipe", "FilteredRecipe", "filters", "sgd_fit"]


@dataclass(frozen=True, kw_only=True)
class FilterRecipe:
    """Arguments of `gradfilter.convert`: which layers are trained, and with which gradients."""

    gradients: Literal["filtered", "exact", "head"] = "filtered"
    """"head" trains the classifier alone: linear layers, or the last convolution if there are none."""
    radius: int = 2
    """Side of a patch in outputs, for "filtered"."""
    last_n: int | None = 4
    """Number of convolutions, counted from the end; None: all, or `layers`."""
    layers: tuple[str, ...] = ()
    """Names or patterns instead of `last_n`; these layers are filtered even where most taps read padding."""
    border: Border = "plain"
    train_norm: Literal["after", "none", "all"] = "after"
    lean_activations: bool = True
    compact: bool = False

    def __post_init__(self) -> None:
        check_choice("gradients", self.gradients, Literal["filtered", "exact", "head"])
        check(self.radius >= 1, "radius", self.radius, "at least 1")
        check(self.last_n is None or self.last_n >= 1, "last_n", self.last_n, "at least 1, or None for all")
        check(not self.layers or self.last_n is None, "last_n", self.last_n, "None with layers")
        check_choice("border", self.border, Border)
        check(not self.compact or self.border == "plain", "border", self.border, "plain with compact")
        check(not self.compact or self.gradients == "filtered", "compact", self.compact, "False unless filtered")

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of `gradfilter.convert`."""
        return {
            "radius": self.radius if self.gradients == "filtered" else {"*": None},
            "last_n": self.last_n,
            "layers": self.layers or None,
            "border": self.border,
            "train_norm": self.train_norm,
            "lean_activations": self.lean_activations and self.gradients == "filtered",
            "compact": self.compact,
        }


@dataclass(frozen=True, kw_only=True)
class FilteredRecipe(Recipe):
    """Fine-tuning of the last layers."""

    filter: FilterRecipe

    def __post_init__(self) -> None:
        clips = self.fit.optimizer.clip_norm is not None
        check(not (self.filter.compact and clips), "clip_norm", self.fit.optimizer.clip_norm, "None with compact")


# label: (description, arguments of FilterRecipe)
GRADIENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "exact": ("exact gradients", {"gradients": "exact"}),
    "head": ("the classifier alone", {"gradients": "head", "train_norm": "none"}),
    "r2": ("gradients filtered over 2 x 2 outputs", {"radius": 2}),
    "r4": ("gradients filtered over 4 x 4 outputs", {"radius": 4}),
    "r7": ("gradients filtered over 7 x 7 outputs", {"radius": 7}),
}


def filters(counts: tuple[int | None, ...]) -> dict[str, tuple[str, FilterRecipe]]:
    """Return summaries and filter recipes by the ending of a recipe's name, such as `last4_r2` or `all_exact`."""
    variants = {}
    for last_n, (label, (text, options)) in product(counts, GRADIENTS.items()):
        place = "all" if last_n is None else f"last{last_n}"
        where = "in all convolutions" if last_n is None else f"in the last {last_n} convolutions"
        summary = text if label == "head" else f"{text} {where}"
        variants[f"{place}_{label}"] = (summary, FilterRecipe(last_n=last_n, **options))
    return variants


def sgd_fit(lr: float, batch_size: int, **length: Any) -> FitRecipe:
    """Return the paper's training as recalled, SGD with a cosine schedule; `length` is `epochs` or `updates`."""
    optimizer = OptimizerRecipe(name="sgd", lr=lr, momentum=0.9, weight_decay=1e-4, decay="all", clip_norm=2.0)
    return FitRecipe(
        batch_size=batch_size,
        optimizer=optimizer,
        schedule=ScheduleRecipe(name="cosine", unit="update"),
        num_workers=4,
        **length,
    )
