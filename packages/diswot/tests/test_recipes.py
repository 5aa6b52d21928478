"""The recipes hold the published figures, and can be given back."""

import json
from dataclasses import asdict, replace

import pytest

from diswot.losses import names
from diswot.models import create_network
from diswot.recipes import RECIPES
from visionkernels.recipes import choose, settings


class TestRecipes:
    def test_names(self):
        wanted = {"cifar100_kd", "cifar100_plain", "nb201_cifar100_kd", "imagenet16_kd", "mnist5k_kd", "mnist5k_plain"}
        assert set(RECIPES) >= wanted
        assert all(name == recipe.name and len(recipe.summary) < 100 for name, recipe in RECIPES.items())

    def test_cifar100(self):
        recipe = RECIPES["cifar100_kd"]
        optimizer, schedule = recipe.fit.optimizer, recipe.fit.schedule
        assert (optimizer.name, optimizer.lr, optimizer.momentum) == ("momentum", 0.05, 0.9)
        assert (optimizer.weight_decay, optimizer.decay) == (5e-4, "all")
        assert (recipe.fit.batch_size, recipe.fit.epochs, recipe.fit.ema_decay) == (64, 240, None)
        assert (schedule.milestones, schedule.decay_rate) == ((150, 180, 210), 0.1)
        assert (recipe.ce_weight, recipe.kd_weight, recipe.temperature) == (0.1, 0.9, 4.0)
        assert (recipe.padding, recipe.is_flipped, recipe.pictures.size) == (4, True, 32)
        assert recipe.pictures.mean == (0.5071, 0.4867, 0.4408)
        light = RECIPES["cifar100_kd_light"]
        assert (light.student, light.fit.optimizer.lr) == ("cifar_mobilenetv2", 0.01)

    def test_benchmark_networks(self):
        for name, size in {"nb201_cifar100_kd": 32, "imagenet16_kd": 16}.items():
            recipe = RECIPES[name]
            assert (recipe.fit.batch_size, recipe.fit.optimizer.lr, recipe.fit.epochs) == (256, 0.1, 90)
            assert (recipe.pictures.size, recipe.pictures.resize) == (size, size)

    def test_plain_is_the_same_without_teacher(self):
        for data in ("cifar100", "mnist5k"):
            plain, distilled = RECIPES[f"{data}_plain"], RECIPES[f"{data}_kd"]
            assert plain.teacher is None
            same = replace(plain, teacher=distilled.teacher, name=distilled.name, summary=distilled.summary)
            assert same == distilled

    def test_pretraining(self):
        for distiller in ("fsp", "ab"):
            recipe = RECIPES[f"cifar100_kd_{distiller}"]
            assert (recipe.distiller, recipe.pretraining_epochs) == (distiller, 30)

    def test_networks_exist(self):
        for name in {name for recipe in RECIPES.values() for name in (recipe.student, recipe.teacher) if name}:
            create_network(name)

    def test_round_trip(self, tmp_path):
        path = tmp_path / "run.json"
        named = replace(RECIPES["mnist5k_kd"], student_layers=("layer1", "layer3"), distiller="at", beta=0.5)
        for recipe in (*RECIPES.values(), named):
            path.write_text(json.dumps({"recipe": asdict(recipe.fit), "details": {"settings": settings(recipe)}}))
            assert choose(str(path), RECIPES) == recipe

    @pytest.mark.parametrize("name", ["none", *names()])
    def test_distillers(self, name):
        recipe = replace(RECIPES["cifar100_kd"], distiller=name)
        assert recipe.losses()["distiller"] == name

    def test_errors(self, tmp_path):
        recipe = RECIPES["mnist5k_kd"]
        with pytest.raises(ValueError, match="unknown recipe 'mnist5k'; did you mean 'mnist5k_"):
            choose("mnist5k", RECIPES)
        with pytest.raises(ValueError, match="unknown distiller 'pk'; did you mean 'pkt'"):
            replace(recipe, distiller="pk")
        with pytest.raises(ValueError, match="distiller='sp' must be 'none' without a teacher"):
            replace(RECIPES["mnist5k_plain"], distiller="sp")
        with pytest.raises(ValueError, match=r"beta=-0.5 must be at least 0"):
            replace(recipe, beta=-0.5)
        with pytest.raises(ValueError, match=r"temperature=0 must be above 0"):
            replace(recipe, temperature=0)
        with pytest.raises(ValueError, match=r"pretraining_epochs=3 must be 0 for distiller='none'"):
            replace(recipe, pretraining_epochs=3)
        with pytest.raises(ValueError, match=r"padding=-1 must be at least 0"):
            replace(recipe, padding=-1)
        (tmp_path / "other.json").write_text("{}")
        with pytest.raises(ValueError, match=r"other.json is not the run.json of a training"):
            choose(str(tmp_path / "other.json"), RECIPES)
