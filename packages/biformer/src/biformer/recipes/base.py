"""Settings of the model, shared by the recipes of all tasks."""

from dataclasses import dataclass

from visionkernels.checks import check
from visionkernels.recipes import ModelRecipe

__all__ = ["BiFormerRecipe", "micro_model"]


@dataclass(frozen=True, kw_only=True)
class BiFormerRecipe(ModelRecipe):
    """A registered BiFormer; None keeps the model's default."""

    num_classes: int = 1000
    drop_path_rate: float = 0.0
    """Rate of the last block; it grows linearly from 0 at the first."""
    n_win: int | None = None
    """Regions per side."""
    depth: tuple[int, ...] | None = None
    """Blocks of each stage."""
    embed_dim: tuple[int, ...] | None = None
    """Channels of each stage."""
    mlp_ratios: tuple[float, ...] | None = None
    topks: tuple[int, ...] | None = None
    """Regions that a region attends to, by stage."""

    def __post_init__(self) -> None:
        check(self.num_classes >= 1, "num_classes", self.num_classes, "at least 1")
        check(0 <= self.drop_path_rate < 1, "drop_path_rate", self.drop_path_rate, "in [0, 1)")


def micro_model(num_classes: int) -> BiFormerRecipe:
    """Return a model that learns to segment or detect in minutes on a CPU."""
    return BiFormerRecipe(
        name="biformer_tiny",
        num_classes=num_classes,
        n_win=4,
        depth=(1, 1, 1, 1),
        embed_dim=(32, 64, 96, 128),
        topks=(1, 4, 4, -2),
    )
