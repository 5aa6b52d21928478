"""Checks of recipes, and recipes of official YAML files."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from tinc.recipes import (
    RECIPES,
    Level,
    LossWeight,
    OfficialRecipe,
    Scheduler,
    expand_grid,
    find_recipe,
    from_options,
    read_yaml,
    to_options,
)
from visionkernels.checks import InputError

SINGLE = """
Reproduc: {seed: 7, benchmark: false, deterministic: true}
CompressFramwork:
  Path: data/test.tif
  Ratio: 32
  Train:
    batch_size: 4096
    epochs: 50
    device: cuda
    optimizer: {type: Adam, lr: 0.002}
    lr_scheduler: {name: StepLR, step_size: 10, gamma: 0.5}
    weight: [1, 2, 0.5]
  Eval: {batch_size: 1000, epochs: 5, device: cuda}
  Preprocess: {normal_min: -1, normal_max: 1}
  Network:
    input: 3
    output: 2
    w0: 20
    level_info: [[1.0, 2, Sine, euqal], [1.5, 3, LeakyReLU0.2, aoi]]
Log: {project_name: default}
"""


class TestRecipe:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"levels": ()}, "levels=.* must be 1 to 7 levels"),
            ({"levels": (Level(1, 2), Level(1, 1))}, "at least 2: a leaf of one layer"),
            ({"ratio": 0}, "ratio=0 must be above 0"),
            ({"normal_min": 100}, "rising"),
            ({"epochs": 0}, "epochs=0 must be at least 1"),
            ({"optimizer": "Lion"}, "optimizer='Lion' must be one of 'Adamax', 'Adam', 'SGD'"),
            ({"compat": "old"}, "compat='old'"),
        ],
    )
    def test_errors(self, change: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(RECIPES["default"], **change)

    def test_words(self) -> None:
        with pytest.raises(ValueError, match="allocation='euqal' must be one of 'equal', 'aoi', 'var'"):
            Level(1, 2, "Sine", "euqal")  # type: ignore[arg-type]
        for word in ("Sinus", "LeakyReLU", "LeakyReLU-1", "relu"):
            with pytest.raises(ValueError, match=f"activation='{word}' must be one of 'Sine', 'ReLU'"):
                Level(1, 2, word)
        with pytest.raises(ValueError, match="scheduler='Cosine' must be one of"):
            Scheduler(name="Cosine", arguments=())  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="scale=-1"):
            LossWeight(scale=-1)

    def test_names(self) -> None:
        assert list(RECIPES) == ["default", "multi0", "multi1", "multi2"]
        assert find_recipe("multi2").levels == (Level(1.0, 2), Level(1.0, 2), Level(1.5, 3))
        with pytest.raises(ValueError, match="did you mean 'multi1'"):
            find_recipe("multi_1")

    @pytest.mark.parametrize("name", RECIPES)
    def test_options_round_trip(self, name: str) -> None:
        options = json.loads(json.dumps(to_options(RECIPES[name])))
        assert from_options(options, name=name) == RECIPES[name]


class TestYaml:
    @pytest.fixture(autouse=True)
    def _needs_yaml(self) -> None:
        pytest.importorskip("yaml", reason="pyyaml is not installed")

    def write(self, folder: Path, text: str) -> Path:
        path = folder / "task.yaml"
        path.write_text(text)
        return path

    def test_single(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            recipe = read_yaml(self.write(tmp_path, SINGLE))
        assert recipe == OfficialRecipe(
            name="task", levels=(Level(1.0, 2), Level(1.5, 3, "LeakyReLU0.2", "aoi")), ratio=32, w0=20, output=2,
            normal_min=-1, normal_max=1, batch_size=4096, epochs=50, optimizer="Adam", lr=0.002,
            scheduler=Scheduler(name="StepLR", arguments=(("step_size", 10), ("gamma", 0.5))),
            weight=LossWeight(low=1, high=2, scale=0.5), eval_batch_size=1000, eval_epochs=5, seed=7,
        )  # fmt: skip
        assert "'euqal' is unknown and counts as 'equal'" in caplog.text

    def test_grid(self, tmp_path: Path) -> None:
        static = SINGLE.replace("\n", "\n  ")
        text = f"""
Static:
{static}
Dynamic:
  PRODUCT:
    - CONCAT:
        - CompressFramwork: {{Ratio: 4}}
        - CompressFramwork: {{Ratio: 16}}
    - CONCAT:
        - CompressFramwork: {{Network: {{w0: 10}}}}
        - CompressFramwork: {{Network: {{w0: 20}}}}
        - CompressFramwork: {{Network: {{w0: 30}}}}
"""
        recipes = expand_grid(self.write(tmp_path, text))
        assert [(recipe.ratio, recipe.w0) for recipe in recipes] == [
            (ratio, w0) for ratio in (4, 16) for w0 in (10, 20, 30)
        ]
        assert len({recipe.name for recipe in recipes}) == 6
        assert {recipe.batch_size for recipe in recipes} == {4096}

    def test_grid_of_tables(self, tmp_path: Path) -> None:
        """Alternatives may have names, and be inside of the options that they vary."""
        static = SINGLE.replace("\n", "\n  ")
        text = f"""
Static:
{static}
Dynamic:
  CompressFramwork:
    CONCAT: {{a: {{Ratio: 4}}, b: {{Ratio: 8, Train: {{epochs: 9}}}}}}
"""
        recipes = expand_grid(self.write(tmp_path, text))
        assert [(recipe.ratio, recipe.epochs) for recipe in recipes] == [(4, 50), (8, 9)]

    @pytest.mark.parametrize("line", ["", "Dynamic:"])
    def test_no_variations(self, tmp_path: Path, line: str) -> None:
        static = SINGLE.replace("\n", "\n  ")
        assert len(expand_grid(self.write(tmp_path, f"Static:\n{static}\n{line}"))) == 1

    @pytest.mark.parametrize(
        ("value", "message"),
        [("0", "Dynamic holds 0"), ("''", "Dynamic holds ''"), ("{PRODUCT: 1}", "Dynamic: PRODUCT=1 must be a mapping"),
         ("[]", r"no combinations: Dynamic=\[\]")],
    )  # fmt: skip
    def test_empty_variations(self, tmp_path: Path, value: str, message: str) -> None:
        static = SINGLE.replace("\n", "\n  ")
        with pytest.raises(ValueError, match=message):
            expand_grid(self.write(tmp_path, f"Static:\n{static}\nDynamic: {value}"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [("Network: {level_info: [[1.0]]}", r"level_info\[0\]=\[1.0\] must be \[ratio, layers"),
         ("Network: {level_info: [[1.0, 2.5]]}", "layers=2.5 must be an integer"),
         ("Network: {level_info: [[1, 3]], w0: [20]}", r"w0=\[20\] must be a finite number"),
         ("{Network: {level_info: [[1, 3]]}, Train: {weight: [1]}}", r"weight=\[1\] must be \[low, high, scale\]"),
         ("{Network: {level_info: [[1, 3]]}, Train: {epochs: 2.5}}", "epochs=2.5 must be an integer")],
    )  # fmt: skip
    def test_types(self, tmp_path: Path, options: str, message: str) -> None:
        options = options if options.startswith("{") else f"{{{options}}}"
        with pytest.raises(InputError, match=message):
            read_yaml(self.write(tmp_path, f"CompressFramwork: {options}"))

    def test_errors(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"none\.yaml is not a file"):
            read_yaml(tmp_path / "none.yaml")
        with pytest.raises(ValueError, match="is not valid YAML"):
            read_yaml(self.write(tmp_path, "a: [1"))
        with pytest.raises(ValueError, match="holds a list"):
            read_yaml(self.write(tmp_path, "- 1"))
        with pytest.raises(ValueError, match="has no 'CompressFramwork'"):
            read_yaml(self.write(tmp_path, "Static: {}"))
        with pytest.raises(ValueError, match="has no 'Static'"):
            expand_grid(self.write(tmp_path, SINGLE))
        with pytest.raises(ValueError, match="are not official ones"):
            read_yaml(self.write(tmp_path, "CompressFramwork: {Ratio: 3}"))
        with pytest.raises(ValueError, match="Sinus"):
            read_yaml(self.write(tmp_path, SINGLE.replace("Sine", "Sinus")))
        with pytest.raises(ValueError, match="is not valid YAML"):  # which would call a function
            read_yaml(self.write(tmp_path, "CompressFramwork: !!python/object/apply:os.getpid []"))
        many = ", ".join("{Ratio: 1}" for _ in range(101))
        with pytest.raises(ValueError, match="Dynamic='10201 combinations' must be at most 10000"):
            grid = f"Dynamic: {{PRODUCT: [{{CONCAT: [{many}]}}, {{CONCAT: [{many}]}}]}}"
            expand_grid(self.write(tmp_path, f"Static: {{a: 1}}\n{grid}"))
        with pytest.raises(ValueError, match="1048577 bytes; at most"):
            read_yaml(self.write(tmp_path, "#" * ((1 << 20) + 1)))
