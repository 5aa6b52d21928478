"""The recipes: the paper's numbers, the official schedule and layers, their checks, the way through a run.json."""

import json
from dataclasses import asdict, replace

import pytest
import timm
import torch

import g2sd.vit  # noqa: F401 - registers the models
from g2sd.recipes import (
    RECIPES,
    AutoencoderSizes,
    FinetuneRecipe,
    GenericRecipe,
    PretrainRecipe,
    ViTSizes,
)
from visionkernels.cli import FitOptions
from visionkernels.recipes import choose, settings
from visionkernels.training.optimization import LearningRate, create_optimizer


def fit_facts(recipe):
    fit, optimizer, schedule = recipe.fit, recipe.fit.optimizer, recipe.fit.schedule
    return {
        "epochs": fit.epochs, "batch": fit.batch_size, "lr": optimizer.lr, "betas": optimizer.betas,
        "weight_decay": optimizer.weight_decay, "layer_decay": optimizer.layer_decay, "clip": optimizer.clip_norm,
        "warmup": schedule.warmup_epochs, "warmup_lr": schedule.warmup_lr, "min_lr": schedule.min_lr,
    }  # fmt: skip


@pytest.mark.parametrize("size", ["tiny", "small"])
class TestImageNetRecipes:
    def test_generic(self, size):
        recipe = RECIPES[f"generic_{size}_in1k"]
        assert fit_facts(recipe) == {
            "epochs": 300, "batch": 4096, "lr": pytest.approx(1.5e-4 * 4096 / 256), "betas": (0.9, 0.95),
            "weight_decay": 0.05, "layer_decay": None, "clip": None, "warmup": 10, "warmup_lr": 0, "min_lr": 2.5e-6,
        }  # fmt: skip
        assert recipe.settings_of_loss() == {
            "teacher_layer": 4, "supervise": "all", "mask_ratio": 0.75, "beta": 2.0, "num_masks": 1
        }  # fmt: skip
        (student,) = recipe.students
        assert student.name == f"mae_vit_{size}_patch16"
        assert recipe.augmentation.crop_scale == (0.2, 1.0)
        assert recipe.augmentation.rand_augment is None
        assert recipe.augmentation.mixup == recipe.augmentation.cutmix == recipe.augmentation.erasing == 0

    def test_specific(self, size):
        recipe = RECIPES[f"specific_{size}_in1k"]
        assert fit_facts(recipe) == {
            "epochs": 200, "batch": 1024, "lr": pytest.approx(1e-3 * 1024 / 256), "betas": (0.9, 0.999),
            "weight_decay": 0.05, "layer_decay": 0.75, "clip": None, "warmup": 5, "warmup_lr": 0, "min_lr": 1e-6,
        }  # fmt: skip
        assert (recipe.mode, recipe.model.distilled, recipe.model.drop_path_rate) == ("hard", True, 0)
        augmentation = recipe.augmentation
        assert (augmentation.mixup, augmentation.cutmix, augmentation.mix_prob) == (0.8, 1.0, 1.0)
        assert (augmentation.mix_switch, augmentation.smoothing, augmentation.erasing) == (0.5, 0.1, 0.25)
        assert (augmentation.rand_augment, augmentation.repeats) == ("rand-m9-mstd0.5-inc1", 1)
        assert (recipe.pictures.size, recipe.pictures.resize, recipe.pictures.interpolation) == (224, 256, "bicubic")

    def test_finetune(self, size):
        recipe = RECIPES[f"finetune_{size}_in1k"]
        assert fit_facts(recipe) == fit_facts(RECIPES[f"specific_{size}_in1k"])
        assert (recipe.mode, recipe.model.distilled, recipe.model.drop_path_rate) == (None, False, 0.1)

    def test_pretrain(self, size):
        recipe = RECIPES[f"pretrain_{size}_in1k"]
        facts = fit_facts(recipe)
        assert (facts["epochs"], facts["warmup"], facts["min_lr"], facts["betas"]) == (400, 40, 0, (0.9, 0.95))
        assert (recipe.mask_ratio, recipe.is_normalised) == (0.75, True)


class TestSchedule:
    def test_golden(self, index):
        """The official rate at fractions of epochs."""
        facts = index["lr_schedule"]["args"]
        recipe = RECIPES["specific_small_in1k"]
        assert (facts["lr"], facts["epochs"]) == (pytest.approx(recipe.fit.optimizer.lr), recipe.fit.epochs)
        assert (facts["warmup_epochs"], facts["min_lr"]) == (
            recipe.fit.schedule.warmup_epochs,
            recipe.fit.schedule.min_lr,
        )
        optimizer = create_optimizer(torch.nn.Linear(2, 2), recipe.fit.optimizer)
        per_epoch = 20
        rate = LearningRate(
            optimizer, recipe.fit.schedule, updates_per_epoch=per_epoch, total_updates=per_epoch * facts["epochs"]
        )
        for epoch, wanted in index["lr_schedule"]["points"]:
            rate.set(round(epoch * per_epoch))
            assert optimizer.param_groups[-1]["lr"] == pytest.approx(wanted, rel=1e-6), epoch

    def test_generic(self):
        """Linear from 0 to the peak in ten epochs, then a cosine to its end."""
        fit = RECIPES["generic_tiny_in1k"].fit
        optimizer = create_optimizer(torch.nn.Linear(2, 2), fit.optimizer)
        rate = LearningRate(optimizer, fit.schedule, updates_per_epoch=4, total_updates=1200)
        found = []
        for update in (0, 20, 40, 620, 1199):
            rate.set(update)
            found.append(optimizer.param_groups[0]["lr"])
        assert found[:4] == pytest.approx([0, 1.2e-3, 2.4e-3, (2.4e-3 + 2.5e-6) / 2])
        assert 2.5e-6 < found[4] < 2.6e-6


class TestLayerDecay:
    def test_golden(self, index, official):
        """Rates and decay of every parameter of the distilled ViT, as the shared optimiser groups them."""
        config = next(case["config"]["model"] for case in index["cases"] if case["name"] == "vit_distilled")
        model = timm.create_model("g2sd_vit_tiny_patch16_224", **config)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        optimizer = create_optimizer(model, RECIPES["specific_tiny_in1k"].fit.optimizer)
        found = {
            names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        wanted = {
            name: (group["lr_scale"], group["weight_decay"])
            for group in index["layer_decay_groups"]["groups"]
            for name in group["params"]
        }
        assert found == {name: pytest.approx(pair) for name, pair in wanted.items()}

    def test_average(self, vit):
        """Without the token: the norm before the head learns at the full rate, as the head does."""
        model = vit(distilled=False)
        optimizer = create_optimizer(model, RECIPES["finetune_tiny_in1k"].fit.optimizer)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        scales = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
        assert scales["fc_norm.weight"] == scales["head.weight"] == 1
        assert scales["blocks.2.mlp.fc1.weight"] == 0.75 and scales["cls_token"] == pytest.approx(0.75**4)

    def test_decay_of_students(self, distiller, teacher):
        """In pre-training and generic distillation all but vectors and biases decay, tokens too."""
        for module, recipe in ((distiller().students, "generic_tiny_in1k"), (teacher(), "pretrain_tiny_in1k")):
            optimizer = create_optimizer(module, RECIPES[recipe].fit.optimizer)
            names = {id(parameter): name for name, parameter in module.named_parameters()}
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    decays = parameter.ndim > 1 and not names[id(parameter)].endswith("bias")
                    assert group["weight_decay"] == (0.05 if decays else 0), names[id(parameter)]


class TestFindRecipe:
    @pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith(("in1k", "mnist5k"))])
    def test_names(self, name):
        recipe = RECIPES[name]
        assert recipe.name == name
        assert len(recipe.summary) < 100
        assert (recipe.data == "mnist5k") == name.endswith("mnist5k")

    def test_stages(self):
        for stage in ("pretrain", "generic", "finetune", "specific"):
            assert all(f"{stage}_{size}_in1k" in RECIPES for size in ("tiny", "small"))

    def test_unknown(self):
        with pytest.raises(ValueError, match=r"unknown recipe 'generic_tinny_in1k'; did you mean 'generic_tiny_in1k'"):
            choose("generic_tinny_in1k", RECIPES)


class TestReadRecipe:
    @pytest.mark.parametrize("name", RECIPES)
    def test_round_trip(self, save_recipe, name):
        assert choose(str(save_recipe(RECIPES[name])), RECIPES) == RECIPES[name]

    def test_several_students(self, save_recipe):
        recipe = RECIPES["generic_mnist5k"]
        recipe = replace(recipe, students=(*recipe.students, AutoencoderSizes(name="mae_vit_tiny_patch16", depth=2)))
        assert choose(str(save_recipe(recipe)), RECIPES) == recipe

    @pytest.mark.parametrize("stage", ["pretrain", "generic", "finetune", "specific"])
    def test_of_a_run(self, runs, micro, stage):
        assert choose(str(runs[stage].parent / "run.json"), RECIPES) == micro[stage]

    @pytest.mark.parametrize(
        "change",
        [{"students": [{"name": "x", "strange": 1}]}, {"strange": 1}, {"model": {}}, {"students": [7]}],
        ids=str,
    )
    def test_other_settings(self, tmp_path, change):
        recipe = RECIPES["generic_mnist5k"]
        content = {"recipe": asdict(recipe.fit), "details": {"settings": settings(recipe) | change}}
        (tmp_path / "run.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"run\.json is not the run\.json of a training|students="):
            choose(str(tmp_path / "run.json"), RECIPES)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"recipe": {}, "details": {"settings": {"name": "x"}}}', "\0"])
    def test_other_files(self, tmp_path, text):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match=r"run\.json|unknown recipe"):
            choose(str(tmp_path / "run.json"), RECIPES)

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            choose(str(tmp_path / "run.json"), RECIPES)


class TestBatchSize:
    def test_rate_follows(self):
        """The base rates of the paper are per 256 pictures."""
        fit = FitOptions(batch_size=512).apply(RECIPES["generic_small_in1k"].fit)
        assert fit.optimizer.lr == pytest.approx(1.5e-4 * 512 / 256)


FIT = RECIPES["generic_mnist5k"].fit


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ViTSizes(drop_path_rate=1.0), r"drop_path_rate=1.0 must be in \[0, 1\)"),
        (
            lambda: PretrainRecipe(name="x", summary="", fit=FIT, model=AutoencoderSizes(), mask_ratio=0.0),
            r"mask_ratio=0.0 must be in \(0, 1\)",
        ),
        (
            lambda: GenericRecipe(name="x", summary="", fit=FIT, students=()),
            r"students=\(\) must be one or more",
        ),
        (
            lambda: GenericRecipe(name="x", summary="", fit=FIT, students=(AutoencoderSizes(),), supervise="class"),
            "supervise='class' must be one of 'all', 'masked'",
        ),
        (
            lambda: FinetuneRecipe(name="x", summary="", fit=FIT, model=ViTSizes(), mode="warm"),
            "mode='warm' must be hard, soft, nkd or None",
        ),
        (
            lambda: FinetuneRecipe(name="x", summary="", fit=FIT, model=ViTSizes(), temperature=0),
            "temperature=0 must be above 0",
        ),
        (
            lambda: FinetuneRecipe(name="x", summary="", fit=FIT, model=ViTSizes(), labels_per_class=0),
            "labels_per_class=0 must be at least 1 or None",
        ),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
