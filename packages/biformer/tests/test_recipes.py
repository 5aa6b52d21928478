"""The recipes: the paper's numbers, their checks, and the way through a run.json."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from biformer.recipes import (
    RECIPES,
    BiFormerRecipe,
    DistillationRecipe,
    TokenLabellingRecipe,
)
from visionkernels.cli import FitOptions
from visionkernels.pictures.recipes import PictureRecipe
from visionkernels.recipes import choose, settings
from visionkernels.training.optimization import LearningRate, create_optimizer

DROP_PATH = {"tiny": 0.1, "small": 0.15, "base": 0.4, "stl": 0.1, "stl_nchw": 0.1}


class TestImageNetRecipes:
    @pytest.mark.parametrize(("size", "drop_path"), DROP_PATH.items())
    def test_numbers(self, size, drop_path):
        recipe = RECIPES[f"biformer_{size}_in1k"]
        fit, optimizer, augmentation = recipe.fit, recipe.fit.optimizer, recipe.augmentation
        assert recipe.model == BiFormerRecipe(name=f"biformer_{size}", num_classes=1000, drop_path_rate=drop_path)
        assert (fit.epochs, fit.batch_size, fit.ema_decay) == (300, 1024, 0.99996)
        assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("adamw", 5e-4 * 1024 / 512, 0.05)
        assert (optimizer.betas, optimizer.eps, optimizer.clip_norm) == ((0.9, 0.999), 1e-8, None)
        assert (augmentation.rand_augment, augmentation.erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
        assert (augmentation.mixup, augmentation.cutmix, augmentation.mix_prob) == (0.8, 1.0, 1.0)
        assert (augmentation.mix_switch, augmentation.smoothing, augmentation.repeats) == (0.5, 0.1, 3)
        assert (recipe.pictures.size, recipe.pictures.resize, recipe.pictures.interpolation) == (224, 256, "bicubic")

    def test_learning_rate_of_each_epoch(self):
        fit = RECIPES["biformer_tiny_in1k"].fit
        optimizer = create_optimizer(torch.nn.Linear(2, 2), fit.optimizer)
        rate = LearningRate(optimizer, fit.schedule, updates_per_epoch=10, total_updates=3000)
        for epoch in (0, 1, 3, 5, 6, 7, 150, 299):
            rate.set(10 * epoch + 4)
            finished = max(epoch - 1, 0)
            cosine = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * finished / 300)) / 2
            wanted = 1e-6 + finished * (1e-3 - 1e-6) / 5 if finished < 5 else cosine
            assert optimizer.param_groups[0]["lr"] == pytest.approx(wanted), epoch

    @pytest.mark.parametrize("size", ["small", "base"])
    def test_token_labelling(self, size):
        recipe = RECIPES[f"biformer_{size}_in1k_token_labelling"]
        assert recipe.fit == RECIPES[f"biformer_{size}_in1k"].fit
        assert (recipe.token_labelling.cell_weight, recipe.token_labelling.teacher) == (0.5, "dm_nfnet_f6.dm_in1k")
        assert (recipe.augmentation.mixup, recipe.augmentation.cutmix) == (0, 0)


class TestWithBatchSize:
    def test_learning_rate_is_proportional(self):
        fit = FitOptions(batch_size=32).apply(RECIPES["biformer_small_in1k"].fit)
        assert (fit.batch_size, fit.optimizer.lr) == (32, pytest.approx(5e-4 * 32 / 512))
        assert fit.schedule == RECIPES["biformer_small_in1k"].fit.schedule

    def test_schedule_never_rises_to_its_end(self):
        fit = FitOptions(batch_size=4).apply(RECIPES["biformer_small_in1k"].fit)
        assert fit.schedule.min_lr == fit.optimizer.lr < 1e-5

    def test_errors(self):
        with pytest.raises(ValueError, match="batch_size=0"):
            FitOptions(batch_size=0).apply(RECIPES["biformer_small_in1k"].fit)


class TestFindRecipe:
    def test_unknown(self):
        with pytest.raises(ValueError, match=r"'biformer_smal_in1k'; did you mean 'biformer_small_in1k'\? known: "):
            choose("biformer_smal_in1k", RECIPES)

    @pytest.mark.parametrize("name", RECIPES)
    def test_names(self, name):
        assert RECIPES[name].name == name
        assert len(RECIPES[name].summary) < 100


class TestReadRecipe:
    @pytest.mark.parametrize("name", RECIPES)
    def test_round_trip(self, tmp_path, name):
        recipe = RECIPES[name]
        path = tmp_path / "run.json"
        path.write_text(json.dumps({"recipe": asdict(recipe.fit), "details": {"settings": settings(recipe)}}))
        assert choose(str(path), RECIPES) == recipe

    def test_distillation(self, save_recipe, micro):
        recipe = replace(micro, distillation=DistillationRecipe(teacher="resnet18", kind="soft", tau=2.0))
        assert choose(str(save_recipe(recipe)), RECIPES) == recipe

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"recipe": {}, "details": {"settings": {"name": "x"}}}', "\0"])
    def test_other_files(self, tmp_path, text):
        path = tmp_path / "run.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"run\.json|unknown recipe"):
            choose(str(path), RECIPES)

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            choose(str(tmp_path / "run.json"), RECIPES)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BiFormerRecipe(name="x", num_classes=0), "num_classes=0 must be at least 1"),
        (lambda: BiFormerRecipe(name="x", drop_path_rate=1.0), "drop_path_rate=1.0 must be in"),
        (
            lambda: replace(RECIPES["biformer_tiny_in1k"], pictures=PictureRecipe(size=16, resize=16)),
            "size=16 must be at least 32",
        ),
        (lambda: DistillationRecipe(teacher="x", kind="warm"), "kind='warm' must be none, soft or hard"),
        (lambda: DistillationRecipe(teacher="x", alpha=2), "alpha=2"),
        (lambda: DistillationRecipe(teacher="x", tau=0), "tau=0"),
        (lambda: TokenLabellingRecipe(labels="folder"), "exactly one"),
        (lambda: TokenLabellingRecipe(cell_weight=-1), "cell_weight=-1"),
        (
            lambda: replace(RECIPES["biformer_tiny_in1k"], token_labelling=TokenLabellingRecipe()),
            "0 with token labelling",
        ),
        (
            lambda: replace(
                RECIPES["biformer_small_in1k_token_labelling"], distillation=DistillationRecipe(teacher="x")
            ),
            "at most one",
        ),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
