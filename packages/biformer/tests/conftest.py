"""Shared fixtures: seeds, one thread, no network, small image folders, a recipe that trains in seconds."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from biformer.recipes import RECIPES, BiFormerRecipe, ClassificationRecipe
from visionkernels.pictures.recipes import PictureRecipe
from visionkernels.recipes import settings
from visionkernels.testing.fixtures import reproducible  # noqa: F401 - every test uses it
from visionkernels.testing.pictures import write_colours


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of three noisy colours as classes, with 16 training and 4 validation images of each."""
    return write_colours(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def micro() -> ClassificationRecipe:
    """Recipe of one block per stage, 32 pixels, 2 epochs of 3 updates on `pictures`."""
    recipe = RECIPES["biformer_micro_mnist5k"]
    assert isinstance(recipe, ClassificationRecipe)
    model = BiFormerRecipe(
        name="biformer_tiny", num_classes=3, n_win=2, depth=(1,) * 4, embed_dim=(32,) * 4, topks=(1, 2, 4, -2)
    )
    fit = replace(recipe.fit, epochs=2, batch_size=16, device="cpu")
    return replace(recipe, model=model, fit=fit, pictures=PictureRecipe(size=32, resize=36), data=None)


SaveRecipe = Callable[[ClassificationRecipe], Path]


@pytest.fixture
def save_recipe(tmp_path: Path) -> SaveRecipe:
    """Write a recipe as the run.json that the command takes."""

    def save(recipe: ClassificationRecipe) -> Path:
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps({"recipe": asdict(recipe.fit), "trained": {"settings": settings(recipe)}}))
        return path

    return save


@pytest.fixture(scope="session")
def weights(pictures: Path, micro: ClassificationRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights file written by `train`."""
    from biformer.training import train

    return train(micro, pictures, tmp_path_factory.mktemp("run")).weights
