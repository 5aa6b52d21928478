"""The recipes of segmentation and detection: the paper's numbers, the learning rates they give, and their checks."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from biformer.detection import detection_model
from biformer.recipes import RECIPES, BiFormerRecipe, DetectionRecipe, SegmentationRecipe
from biformer.segmentation import segmentation_model
from visionkernels.cli import FitOptions
from visionkernels.pictures.recipes import SceneRecipe
from visionkernels.training.optimization import LearningRate, create_optimizer

SEGMENTATION = {
    "fpn": (80_000, 32, 2e-4, 1e-4, ()),
    "upernet": (160_000, 16, 6e-5, 0.01, ("*norm*",)),
}
DETECTION = {
    "retinanet": (1e-4, ()),
    "maskrcnn": (0.05, ("*norm*",)),
}
DROP_PATH = {
    "small_ade20k_fpn": 0.15,
    "base_ade20k_fpn": 0.3,
    "small_ade20k_upernet": 0.3,
    "base_ade20k_upernet": 0.4,
    "small_coco_retinanet": 0.2,
    "base_coco_retinanet": 0.3,
    "small_coco_maskrcnn": 0.2,
    "base_coco_maskrcnn": 0.3,
}
MICRO = {"depth": (1,) * 4, "embed_dim": (32, 32, 64, 64), "topks": (1, 4, 4, -2), "n_win": 4}


def learning_rate(name: str, updates_per_epoch: int):
    """From an update to its learning rate."""
    fit = RECIPES[name].fit
    optimizer = create_optimizer(nn.Linear(2, 2), fit.optimizer)
    total = fit.updates or fit.epochs * updates_per_epoch
    schedule = LearningRate(optimizer, fit.schedule, updates_per_epoch=updates_per_epoch, total_updates=total)

    def at(update: int) -> float:
        schedule.set(update)
        return optimizer.param_groups[0]["lr"]

    return at


class TestPaperRecipes:
    @pytest.mark.parametrize(("name", "drop_path"), DROP_PATH.items())
    def test_models(self, name, drop_path):
        size, data, _ = name.split("_")
        num_classes, n_win = {"ade20k": (150, 8), "coco": (91, 16)}[data]
        expected = BiFormerRecipe(
            name=f"biformer_{size}", num_classes=num_classes, drop_path_rate=drop_path, n_win=n_win
        )
        recipe = RECIPES[f"biformer_{name}"]
        assert recipe.model == expected
        assert recipe.name == f"biformer_{name}"
        assert recipe.data is None

    @pytest.mark.parametrize("size", ["small", "base"])
    @pytest.mark.parametrize("head", SEGMENTATION)
    def test_segmentation(self, head, size):
        updates, batch_size, lr, weight_decay, no_decay = SEGMENTATION[head]
        recipe = RECIPES[f"biformer_{size}_ade20k_{head}"]
        fit, optimizer = recipe.fit, recipe.fit.optimizer
        assert isinstance(recipe, SegmentationRecipe)
        assert (fit.updates, fit.epochs, fit.batch_size, fit.precision) == (updates, None, batch_size, "no")
        assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("adamw", lr, weight_decay)
        assert (optimizer.decay, optimizer.no_decay) == ("all", no_decay)
        assert (recipe.head, recipe.auxiliary_weight) == (head, 0.4 if head == "upernet" else 0.0)
        assert (recipe.dropout, recipe.decoder_channels, recipe.sync_norm) == (0.1, None, True)
        scene = recipe.scene
        assert (scene.short_side, scene.long_side, scene.scale_range) == (512, 2048, (0.5, 2.0))
        assert (scene.crop, scene.multiple, scene.inference) == (512, 32, "whole")

    @pytest.mark.parametrize("size", ["small", "base"])
    @pytest.mark.parametrize("head", DETECTION)
    def test_detection(self, head, size):
        weight_decay, no_decay = DETECTION[head]
        recipe = RECIPES[f"biformer_{size}_coco_{head}"]
        fit, optimizer = recipe.fit, recipe.fit.optimizer
        assert isinstance(recipe, DetectionRecipe)
        assert (fit.epochs, fit.updates, fit.batch_size, fit.norm_eval) == (12, None, 16, True)
        assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("adamw", 1e-4, weight_decay)
        assert (optimizer.decay, optimizer.no_decay) == ("all", no_decay)
        assert (recipe.head, recipe.min_size, recipe.max_size, recipe.pyramid_channels) == (head, 800, 1333, 256)

    def test_fpn_learning_rate(self):
        at = learning_rate("biformer_small_ade20k_fpn", 631)
        assert [at(0), at(500)] == pytest.approx([2e-5, 1.1e-4])
        assert at(1000) == pytest.approx(2e-4, rel=1e-3)
        assert at(40_000) == pytest.approx(1e-4)
        assert at(79_999) < 1e-12

    def test_upernet_learning_rate(self):
        at = learning_rate("biformer_small_ade20k_upernet", 1263)
        assert at(0) == pytest.approx(6e-11)
        assert at(750) == pytest.approx(3e-5, rel=1e-3)
        assert [at(update) for update in (16_000, 80_000, 159_999)] == pytest.approx([5.4e-5, 3e-5, 6e-5 / 160_000])

    @pytest.mark.parametrize("head", DETECTION)
    def test_coco_learning_rate(self, head):
        at = learning_rate(f"biformer_small_coco_{head}", 7000)
        assert [at(0), at(250), at(500)] == pytest.approx([1e-7, 5e-5, 1e-4], rel=2e-3)
        ends = [8 * 7000 - 1, 8 * 7000, 11 * 7000 - 1, 11 * 7000, 12 * 7000 - 1]
        assert [at(update) for update in ends] == pytest.approx([1e-4, 1e-5, 1e-5, 1e-6, 1e-6])

    @pytest.mark.parametrize("name", [name for name in RECIPES if "small" in name and "in1k" not in name])
    def test_weight_decay(self, name):
        recipe = RECIPES[name]
        make = segmentation_model if isinstance(recipe, SegmentationRecipe) else detection_model
        with torch.device("meta"):
            model = make("biformer_tiny", recipe.head, num_classes=4, **MICRO)
        groups = create_optimizer(model, recipe.fit.optimizer).param_groups
        decayed = {id(parameter) for group in groups if group["weight_decay"] > 0 for parameter in group["params"]}
        spared = {key for key, parameter in model.named_parameters() if id(parameter) not in decayed}
        named_norm = {key for key, _ in model.named_parameters() if "norm" in key}
        assert spared == (named_norm if recipe.fit.optimizer.no_decay else set())
        # norms of blocks and of the stages' outputs, none of the heads'
        assert {key.split(".")[-2].rstrip("0123") for key in named_norm} == {"norm", ""}

    def test_batch_size(self):
        recipe = RECIPES["biformer_small_coco_maskrcnn"]
        fit = FitOptions(batch_size=4).apply(recipe.fit)
        assert (fit.batch_size, fit.optimizer.lr) == (4, pytest.approx(2.5e-5))


class TestChecks:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"crop": 0}, "crop=0 must be at least 1"),
            ({"long_side": 100}, "long_side=100 must be at least 512"),
            ({"scale_range": (2.0, 0.5)}, "scale_range="),
            ({"max_class_share": 0.0}, r"max_class_share=0.0 must be in \(0, 1\]"),
            ({"inference": "tiles"}, "inference='tiles' must be 'whole' or 'slide'"),
            ({"stride": 600}, "stride=600 must be at most crop=512"),
            ({"test_scales": ()}, r"test_scales=\(\)"),
        ],
    )
    def test_scene(self, changes, message):
        with pytest.raises(ValueError, match=message):
            SceneRecipe(**changes)

    @pytest.mark.parametrize(
        ("name", "changes", "message"),
        [
            ("biformer_small_ade20k_fpn", {"head": "deeplab"}, "head='deeplab' must be one of 'upernet', 'fpn'"),
            ("biformer_small_ade20k_fpn", {"auxiliary_weight": -1.0}, "auxiliary_weight=-1.0 must be at least 0"),
            ("biformer_small_ade20k_fpn", {"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
            ("biformer_small_coco_maskrcnn", {"head": "yolo"}, "head='yolo' must be one of 'retinanet', 'maskrcnn'"),
            ("biformer_small_coco_maskrcnn", {"min_size": 8}, "min_size=8 must be at least 32"),
            ("biformer_small_coco_maskrcnn", {"max_size": 300}, "max_size=300 must be at least min_size=800"),
            ("biformer_small_coco_maskrcnn", {"regions_per_image": 0}, "regions_per_image=0 must be at least 1"),
        ],
    )
    def test_recipe(self, name, changes, message):
        with pytest.raises(ValueError, match=message):
            replace(RECIPES[name], **changes)
