"""Small recipes that show what filtering costs: digits learnt upright, then inverted and rotated."""

from dataclasses import dataclass, replace
from typing import ClassVar

from gradfilter.recipes.base import FilteredRecipe, FilterRecipe
from visionkernels.checks import check
from visionkernels.recipes import FitRecipe, OptimizerRecipe, ScheduleRecipe, settings
from visionkernels.weights import Trained

__all__ = ["DIGITS", "TransferRecipe"]


@dataclass(frozen=True, kw_only=True)
class TransferRecipe(FilteredRecipe):
    """Pre-training of a whole network on upright digits, then fine-tuning of its last layers on rotated ones."""

    trainer: ClassVar[str] = "gradfilter.digits:train"

    pretraining: FitRecipe
    widths: tuple[int, int, int] = (16, 32, 64)
    """Channels on the maps of 28, 14 and 7 pixels."""
    reduction: int = 1
    """Side of the squares of pixels that are averaged before the first map."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.reduction <= 7, "reduction", self.reduction, "in [1, 7]")

    def record(self, num_classes: int | None = None) -> Trained:
        """Return the record for weights files."""
        options = {"widths": self.widths, "reduction": self.reduction}
        return Trained(
            kind="digits", package="gradfilter", model="tinyconv", options=options, data="mnist5k",
            settings=settings(self),
        )  # fmt: skip


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
    summary = f"{compact.summary}, one number per kernel"
    return recipes | {name: replace(compact, name=name, summary=summary, filter=replace(compact.filter, compact=True))}


def _small_maps() -> dict[str, TransferRecipe]:
    """Return variants on maps so small that padding matters; naming `layers` filters the smallest maps too."""
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


DIGITS: dict[str, TransferRecipe] = _digits() | _small_maps()
