"""Recipes: found by name, written into a run.json and read back."""

import json
from dataclasses import asdict, dataclass, replace

import pytest

from visionkernels.recipes import check_known, data_of, find, read, settings
from visionkernels.training import FitRecipe, OptimizerRecipe


@dataclass(frozen=True)
class Layers:
    widths: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    fit: FitRecipe
    layers: Layers | None = None
    networks: tuple[Layers, ...] = ()
    pairs: tuple[tuple[str, Layers], ...] | None = None
    data: str | None = None


PLAIN = Recipe(name="plain", fit=FitRecipe(epochs=1, batch_size=2))
RECIPES = {
    "plain": PLAIN,
    "deep": Recipe(
        name="deep",
        fit=FitRecipe(updates=3, batch_size=2, optimizer=OptimizerRecipe(lr_scale=(("head.*", 10.0),))),
        layers=Layers(widths=((1, 2), (3,))),
        data="mnist5k",
    ),
    "several": Recipe(
        name="several",
        fit=FitRecipe(epochs=1, batch_size=2),
        networks=(Layers(widths=((1,),)), Layers(widths=())),
        pairs=(("first", Layers(widths=((2, 3),))),),
    ),
}


def find_recipe(name):
    return find(name, RECIPES)


def run_of(recipe):
    return {"recipe": asdict(recipe.fit), "details": {"settings": settings(recipe)}}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_round_trip(tmp_path, recipe):
    (tmp_path / "run.json").write_text(json.dumps(run_of(recipe)))
    assert read(tmp_path / "run.json", find_recipe, package="demo") == recipe


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "\0",
        json.dumps(run_of(PLAIN)).replace("layers", "layer"),
        json.dumps(run_of(PLAIN)).replace('"data": null', '"data": {"folder": "x"}'),
        json.dumps(run_of(RECIPES["several"])).replace("widths", "width"),
    ],
)
def test_other_files(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is no run\.json of demo train: "):
        read(tmp_path / "run.json", find_recipe, package="demo")


def test_unknown_names():
    with pytest.raises(
        ValueError, match=r"^unknown recipe 'plan'; did you mean 'plain'\? known: plain, deep, several$"
    ):
        find_recipe("plan")
    with pytest.raises(ValueError, match=r"^unknown model 'net7'; did you mean 'net97' or .*\? there are 99$"):
        check_known("model", "net7", [f"net{number}" for number in range(60, 159)])
    with pytest.raises(ValueError, match=r"there are 99; `demo info` lists them$"):
        check_known("model", "x", [f"net{number}" for number in range(99)], listing="`demo info` lists them")
    with pytest.raises(ValueError, match=r"^unknown model 'x'; known: net$"):
        check_known("model", "x", ["net"])


def test_data():
    assert data_of(RECIPES["deep"], None) == "mnist5k"
    assert data_of(RECIPES["deep"], "elsewhere") == "elsewhere"
    with pytest.raises(ValueError, match="recipe plain has no data of its own; give --data FOLDER"):
        data_of(PLAIN, None)
    assert data_of(replace(PLAIN, data="here"), None) == "here"
