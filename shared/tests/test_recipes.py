"""Recipes: found by name, written into a run.json and read back."""

import json
from dataclasses import asdict, dataclass, replace

import pytest

from visionkernels.checks import check_known
from visionkernels.recipes import Recipe, choose, data_of, settings
from visionkernels.training import FitRecipe, OptimizerRecipe


@dataclass(frozen=True)
class Layers:
    widths: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Demo(Recipe):
    summary: str = ""
    layers: Layers | None = None
    networks: tuple[Layers, ...] = ()
    pairs: tuple[tuple[str, Layers], ...] | None = None


PLAIN = Demo(name="plain", fit=FitRecipe(epochs=1, batch_size=2))
RECIPES = {
    "plain": PLAIN,
    "deep": Demo(
        name="deep",
        fit=FitRecipe(updates=3, batch_size=2, optimizer=OptimizerRecipe(betas=(0.5, 0.9))),
        layers=Layers(widths=((1, 2), (3,))),
        data="mnist5k",
    ),
    "several": Demo(
        name="several",
        fit=FitRecipe(epochs=1, batch_size=2),
        networks=(Layers(widths=((1,),)), Layers(widths=())),
        pairs=(("first", Layers(widths=((2, 3),))),),
    ),
}


def run_of(recipe):
    return {"recipe": asdict(recipe.fit), "trained": {"settings": settings(recipe)}}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_round_trip(tmp_path, recipe):
    (tmp_path / "run.json").write_text(json.dumps(run_of(recipe)))
    assert choose(str(tmp_path / "run.json"), RECIPES) == recipe


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
    with pytest.raises(ValueError, match=r"run\.json is not the run\.json of a training: "):
        choose(str(tmp_path / "run.json"), RECIPES)


def test_unknown_names():
    with pytest.raises(
        ValueError, match=r"^unknown recipe 'plan'; did you mean 'plain'\? known: plain, deep, several$"
    ):
        choose("plan", RECIPES)
    with pytest.raises(ValueError, match=r"^unknown model 'net7'; did you mean 'net97' or .*\? there are 99$"):
        check_known("model", "net7", [f"net{number}" for number in range(60, 159)])
    with pytest.raises(ValueError, match=r"there are 99; `demo info` lists them$"):
        check_known("model", "x", [f"net{number}" for number in range(99)], listing="`demo info` lists them")
    with pytest.raises(ValueError, match=r"^unknown model 'x'; known: net$"):
        check_known("model", "x", ["net"])


def test_data():
    assert data_of(RECIPES["deep"], None) == "mnist5k"
    assert data_of(RECIPES["deep"], "elsewhere") == "elsewhere"
    with pytest.raises(ValueError, match="recipe plain has no built-in data; give --data FOLDER"):
        data_of(PLAIN, None)
    assert data_of(replace(PLAIN, data="here"), None) == "here"
    for empty in ("", " "):
        with pytest.raises(ValueError, match="data='' is empty; give --data FOLDER, or leave it out"):
            data_of(RECIPES["deep"], empty)


def test_runs_of_before_records(tmp_path):
    run = run_of(RECIPES["deep"])
    (tmp_path / "run.json").write_text(json.dumps({"recipe": run["recipe"], "details": run["trained"]}))
    assert choose(str(tmp_path / "run.json"), RECIPES) == RECIPES["deep"]


def test_no_model():
    with pytest.raises(ValueError, match="recipe plain does not name a model"):
        PLAIN.record()
