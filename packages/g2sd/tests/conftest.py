"""What the tests share: seeds, one thread, no network, small models, and runs of every stage on small pictures."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import g2sd.vit  # noqa: F401 - registers the models
from g2sd.generic import GenericDistiller
from g2sd.mae import MaskedAutoencoder
from g2sd.recipes import AutoencoderSizes, FinetuneRecipe, GenericRecipe, PretrainRecipe, Recipe, ViTSizes
from g2sd.segmentation_backbone import relative_index
from visionkernels.pictures.recipes import AugmentationRecipe, PictureRecipe
from visionkernels.recipes import settings
from visionkernels.testing.fixtures import reproducible  # noqa: F401 - every test uses it
from visionkernels.testing.golden import recipe_weights
from visionkernels.testing.pictures import write_colours
from visionkernels.training import FitRecipe, OptimizerRecipe

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def index() -> dict[str, Any]:
    """What was measured on the official code."""
    found: dict[str, Any] = json.loads((GOLDEN / "index.json").read_text())
    return found


@pytest.fixture(scope="session")
def layouts() -> dict[str, dict[str, list[int]]]:
    """Shapes by official name, of each official model."""
    found: dict[str, dict[str, list[int]]] = json.loads((GOLDEN / "state_layout.json").read_text())
    return found


@pytest.fixture(scope="session")
def official(layouts: Mapping[str, Mapping[str, list[int]]]) -> Callable[..., dict[str, Tensor]]:
    """Makes the state dict of an official model, under a prefix, each value a function of its key."""

    def make(name: str, prefix: str = "") -> dict[str, Tensor]:
        integers = {key for key in layouts[name] if key.endswith("relative_position_index")}
        empty = {
            key: torch.empty(shape, dtype=torch.int64 if key in integers else None)
            for key, shape in layouts[name].items()
        }
        weights = recipe_weights(empty)
        for key in integers:
            side = math.isqrt(len(weights[key]))
            weights[key] = relative_index((side, side))
        return {f"{prefix}{key}": value for key, value in weights.items()}

    return make


# 16 patches of 8 pixels, unless told otherwise
TEACHER = {
    "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "decoder_embed_dim": 24,
    "decoder_depth": 3, "decoder_num_heads": 3,
}  # fmt: skip
STUDENT = {
    **TEACHER, "embed_dim": 24, "num_heads": 3, "decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2
}  # fmt: skip


@pytest.fixture
def teacher() -> Callable[..., MaskedAutoencoder]:
    """Makes a small teacher; options replace its sizes."""
    return lambda **options: MaskedAutoencoder(**{**TEACHER, **options})


@pytest.fixture
def student() -> Callable[..., MaskedAutoencoder]:
    """Makes a student of that teacher, with both heads."""
    return lambda **options: MaskedAutoencoder(
        **{**STUDENT, "teacher_width": 32, "teacher_decoder_width": 24, **options}
    )


@pytest.fixture
def distiller(teacher: Any, student: Any) -> Callable[..., GenericDistiller]:
    """Makes a distiller of the small teacher, by default for one student; sizes are those of both models."""

    def make(*, num_students: int = 1, sizes: Mapping[str, Any] | None = None, **options: Any) -> GenericDistiller:
        students = [student(**(sizes or {}), depth=1 + place) for place in range(num_students)]
        return GenericDistiller(teacher(**(sizes or {})), students, **{"teacher_layer": 2, **options})

    return make


@pytest.fixture
def vit() -> Callable[..., Any]:
    """Makes a small classifier of five classes."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    return lambda **options: timm.create_model("g2sd_vit_tiny_patch16_224", **{**sizes, **options})


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three colours: 16 pictures each to train, 4 to validate, with noise."""
    return write_colours(tmp_path_factory.mktemp("pictures"))


def _micro() -> dict[str, Recipe]:
    fit = FitRecipe(epochs=2, batch_size=16, device="cpu", optimizer=OptimizerRecipe(lr=2e-3))
    plain = AugmentationRecipe(random_crop=False, rand_augment=None, erasing=0, repeats=1, mixup=0, cutmix=0)
    sizes = {name: TEACHER[name] for name in TEACHER if name != "img_size"}
    small = {name: STUDENT[name] for name in STUDENT if name != "img_size"}
    encoder = ("patch_size", "embed_dim", "depth", "num_heads")
    common: dict[str, Any] = {
        "summary": "of the tests", "fit": fit, "pictures": PictureRecipe(size=32, resize=36), "augmentation": plain
    }  # fmt: skip
    recipes: tuple[Recipe, ...] = (
        PretrainRecipe(name="pretrain_tiny_in1k", model=AutoencoderSizes(**sizes), **common),
        GenericRecipe(name="generic_tiny_in1k", students=(AutoencoderSizes(**small),), teacher_layer=2, **common),
        FinetuneRecipe(
            name="finetune_tiny_in1k", model=ViTSizes(**{name: sizes[name] for name in encoder}, distilled=False),
            **common,
        ),
        FinetuneRecipe(
            name="specific_tiny_in1k", model=ViTSizes(**{name: small[name] for name in encoder}), mode="hard", **common
        ),
    )  # fmt: skip
    return {recipe.name.partition("_")[0]: recipe for recipe in recipes}


@pytest.fixture(scope="session")
def micro() -> dict[str, Any]:
    """A recipe of each stage: 2 epochs of 3 updates on `pictures`."""
    return _micro()


@pytest.fixture
def longer(micro: Mapping[str, Any]) -> Callable[..., Any]:
    """Changes the length and other settings of the fit of one of these recipes."""
    return lambda stage, **changes: replace(micro[stage], fit=replace(micro[stage].fit, **changes))


@pytest.fixture
def save_recipe(tmp_path: Path) -> Callable[[Recipe], Path]:
    """Writes a recipe as the run.json that the command takes."""

    def save(recipe: Recipe) -> Path:
        path = tmp_path / f"{recipe.name}.json"
        path.write_text(json.dumps({"recipe": asdict(recipe.fit), "details": {"settings": settings(recipe)}}))
        return path

    return save


@pytest.fixture(scope="session")
def runs(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The weights that each stage wrote, each from the one before."""
    from g2sd.training import distil_generic, finetune, pretrain

    micro: dict[str, Any] = _micro()
    out = {stage: tmp_path_factory.mktemp(stage) for stage in micro}
    found = {"pretrain": pretrain(micro["pretrain"], pictures, out["pretrain"]).weights}
    found["generic"] = distil_generic(
        micro["generic"], pictures, out["generic"], teacher=found["pretrain"]
    ).weights  # fmt: skip
    found["finetune"] = finetune(micro["finetune"], pictures, out["finetune"], init=found["pretrain"]).weights
    found["specific"] = finetune(
        micro["specific"], pictures, out["specific"], init=found["generic"], teacher=found["finetune"]
    ).weights
    return found
