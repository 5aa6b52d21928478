"""Complete trainings by name: what is filtered, how it is trained, on which data (sec. 4)."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from visionkernels.ops.filtered_conv import Border
from visionkernels.recipes import check, check_choice, find, read
from visionkernels.training import FitRecipe, OptimizerRecipe, ScheduleRecipe

__all__ = ["RECIPES", "FilterRecipe", "Recipe", "TransferRecipe", "all_recipes", "find_recipe", "read_recipe"]


@dataclass(frozen=True, kw_only=True)
class FilterRecipe:
    """Which layers are trained, and with which gradients: the arguments of `gradfilter.convert`."""

    gradients: Literal["filtered", "exact", "head"] = "filtered"
    """"head": the classifier alone is trained, linear layers or else the last convolution."""
    radius: int = 2
    """Outputs a side of a patch, for "filtered"."""
    last_n: int | None = 4
    """Convolutions from the last one back; None: all, or `layers`."""
    layers: tuple[str, ...] = ()
    """Names or patterns instead; these are filtered even where most taps read padding."""
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
class Recipe:
    """What every recipe has: a name, the layers that are trained, and a training run."""

    name: str
    summary: str
    """One line for listings."""
    filter: FilterRecipe
    fit: FitRecipe
    data: str | None = None
    """Data that needs no path of the user's; None: `--data` must tell."""

    def __post_init__(self) -> None:
        clips = self.fit.optimizer.clip_norm is not None
        check(not (self.filter.compact and clips), "clip_norm", self.fit.optimizer.clip_norm, "None with compact")


@dataclass(frozen=True, kw_only=True)
class TransferRecipe(Recipe):
    """Digits learnt upright, then inverted and turned: a network is pre-trained whole, and fine-tuned in part."""

    pretraining: FitRecipe
    widths: tuple[int, int, int] = (16, 32, 64)
    """Channels on the maps of 28, 14 and 7 pixels."""
    reduction: int = 1
    """Pixels a side that are averaged into one before the first map."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.reduction <= 7, "reduction", self.reduction, "in [1, 7]")


def all_recipes() -> dict[str, Recipe]:
    """Return the recipes by name: digits, classification and segmentation."""
    from gradfilter.picture_recipes import PICTURE_RECIPES  # which is built of what stands here

    return RECIPES | PICTURE_RECIPES


def find_recipe(name: str) -> Recipe:
    """Return the recipe of this name; ValueError names the nearest ones."""
    return find(name, all_recipes(), listing="`gradfilter info` tells their names")


def read_recipe(path: str | Path) -> Recipe:
    """Return the recipe that a run.json holds. Raises FileNotFoundError, and ValueError for other files."""
    return read(path, find_recipe, package="gradfilter")


_FIT = FitRecipe(
    epochs=4,
    batch_size=64,
    optimizer=OptimizerRecipe(name="sgd", lr=0.05, momentum=0.9, weight_decay=0.0, decay="all"),
    schedule=ScheduleRecipe(name="onecycle", unit="update"),
    evaluate_every_epochs=4,
)


def _digits() -> dict[str, TransferRecipe]:
    recipes = {}
    for last_n in (2, 4):
        variants: dict[str, tuple[str, FilterRecipe]] = {
            "head": ("the head alone", FilterRecipe(gradients="head", last_n=last_n, train_norm="none")),
            "exact": ("exact gradients", FilterRecipe(gradients="exact", last_n=last_n)),
        }
        for radius in (1, 2, 4, 7):
            text = f"gradients filtered over {radius} x {radius} outputs"
            variants[f"r{radius}"] = (text, FilterRecipe(radius=radius, last_n=last_n))
        for label, (text, filtered) in variants.items():
            name = f"tinyconv_mnist5k_last{last_n}_{label}"
            trained = "" if label == "head" else f" of the last {last_n} convolutions"
            recipes[name] = TransferRecipe(
                name=name, summary=f"digits upright, then turned: {text}{trained}", filter=filtered, pretraining=_FIT,
                fit=_FIT, data="mnist5k",
            )  # fmt: skip
    compact = recipes["tinyconv_mnist5k_last4_r2"]
    name = "tinyconv_mnist5k_last4_r2_compact"
    summary = f"{compact.summary}, one number a kernel"
    return recipes | {name: replace(compact, name=name, summary=summary, filter=replace(compact.filter, compact=True))}


def _small_maps() -> dict[str, TransferRecipe]:
    """Return twins on maps so small that what taps read beside them counts; `layers` filters the smallest too."""
    recipes = {}
    for reduction, side in ((2, 14), (3, 9)):
        for layers in (("features.7", "features.10", "features.14", "features.17"), ("features.14", "features.17")):
            plain = FilterRecipe(last_n=None, layers=layers)
            variants = {
                "exact": ("exact gradients", replace(plain, gradients="exact")),
                "r2_plain": ("filtered gradients that count padding", plain),
                "r2_covered": ("filtered gradients that leave padding out", replace(plain, border="covered")),
            }
            if side == 9 and len(layers) == 4:
                variants["r2"] = ("filtered gradients, exact on maps of 2 pixels,", FilterRecipe())
            for label, (text, filtered) in variants.items():
                name = f"tinyconv_mnist5k_{side}px_last{len(layers)}_{label}"
                summary = f"digits of {side} pixels: {text} of the last {len(layers)} convolutions"
                recipes[name] = TransferRecipe(
                    name=name,
                    summary=summary,
                    filter=filtered,
                    pretraining=_FIT,
                    fit=_FIT,
                    data="mnist5k",
                    reduction=reduction,
                )
    return recipes


RECIPES: dict[str, TransferRecipe] = _digits() | _small_maps()
