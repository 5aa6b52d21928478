"""Fine-tuning on pictures: what moves, what is stored, from which weights it starts, and what is refused."""

import json
import re
from dataclasses import asdict, replace
from itertools import product

import pytest
import torch
from torch import nn

from gradfilter.cli import PACKAGE
from gradfilter.evaluation import evaluate
from gradfilter.models import create_segmenter
from gradfilter.official import load_into
from gradfilter.recipes import FAMILIES, RECIPES, ClassificationRecipe, SegmentationRecipe
from gradfilter.training import load_segmenter, prepare, train_classifier, train_segmenter
from visionkernels import models
from visionkernels.pictures.recipes import PictureRecipe, SceneRecipe
from visionkernels.recipes import choose, settings
from visionkernels.testing.pictures import COLOURS, write_colours
from visionkernels.weights import CheckpointError, open_trained, read_checkpoint, save_weights

CPU = torch.device("cpu")


def classifier_recipe(**changes) -> ClassificationRecipe:
    """Return a recipe for timm's smallest network, on 128 pixels, so that no map is too small to filter."""
    recipe = RECIPES["resnet18_in1k_last4_r2"]
    fit = replace(recipe.fit, epochs=4, batch_size=16, num_workers=0)
    pictures = PictureRecipe(size=128, resize=128, interpolation="bilinear")
    return replace(recipe, model="test_resnet", fit=fit, pictures=pictures, **changes)


def segmenter_recipe(label: str = "r2", **changes) -> SegmentationRecipe:
    """Return a recipe of a few updates on crops of 128 pixels, with the smallest encoder and torchvision's head."""
    recipe = RECIPES[f"pspnet_resnet18_shapes_last5_{label}"]
    scenes = {name: replace(getattr(recipe, name), crop=128, stride=64) for name in ("scene", "pretraining_scene")}
    fit = replace(recipe.fit, updates=2, batch_size=2)
    return replace(recipe, head="fcn", encoder="test_resnet", fit=fit, pretraining=fit, **scenes, **changes)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return write_colours(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Weights of the small network with five classes, as trainers store them."""
    torch.manual_seed(0)
    state = models.create("test_resnet", num_classes=5).state_dict()
    path = tmp_path_factory.mktemp("start") / "start.pth"
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    return path


@pytest.fixture(scope="module")
def tuned(colours, start, tmp_path_factory):
    return train_classifier(classifier_recipe(), colours, tmp_path_factory.mktemp("run"), init=start)


@pytest.fixture(scope="module")
def segmented(tmp_path_factory):
    return train_segmenter(segmenter_recipe(), None, tmp_path_factory.mktemp("run"))


class TestRecipes:
    def test_families_name_them_all(self):
        names = set()
        for family in FAMILIES:
            parts = [part.split("|") for part in re.findall("<(.*?)>", family)]
            names |= {"_".join(parts) for parts in product(*parts)}
        assert names == {name for name, recipe in RECIPES.items() if recipe.data is None}

    @pytest.mark.parametrize("name", ["resnet18_in1k_last4_r2", "mobilenetv2_cifar100_last2_r2"])
    def test_classification(self, name):
        """The recalled settings of the paper."""
        recipe = RECIPES[name]
        optimizer, is_imagenet = recipe.fit.optimizer, "in1k" in name
        assert (optimizer.name, optimizer.momentum, optimizer.lr) == ("sgd", 0.9, 0.05)
        assert (optimizer.weight_decay, optimizer.decay, optimizer.clip_norm) == (1e-4, "all", 2.0)
        assert (recipe.fit.epochs, recipe.fit.batch_size) == ((90, 64) if is_imagenet else (50, 128))
        assert recipe.fit.schedule.name == "cosine"
        assert (recipe.filter.last_n, recipe.filter.radius) == (4 if is_imagenet else 2, 2)

    def test_segmentation(self):
        recipe = RECIPES["pspnet_resnet18_voc12_last5_r2"]
        assert (recipe.head, recipe.encoder, recipe.num_classes) == ("pspnet", "resnet18", 21)
        assert (recipe.fit.updates, recipe.fit.batch_size, recipe.fit.optimizer.lr) == (20_000, 8, 0.01)
        assert RECIPES["upernet_resnet18_cityscapes_all_exact"].filter.last_n is None

    def test_round_trip(self, tmp_path):
        for recipe in RECIPES.values():
            (tmp_path / "run.json").write_text(
                json.dumps({"recipe": asdict(recipe.fit), "trained": {"settings": settings(recipe)}})
            )
            assert choose(str(tmp_path / "run.json"), RECIPES) == recipe
            assert len(recipe.summary) < 120

    def test_errors(self):
        with pytest.raises(ValueError, match=r"unknown recipe 'resnet18_in1k_last4_r3'; did you mean 'resnet18_in1k_"):
            choose("resnet18_in1k_last4_r3", RECIPES)
        recipe = classifier_recipe()
        with pytest.raises(ValueError, match=r"mixup, cutmix, smoothing=.* since labels are single classes"):
            replace(recipe, augmentation=replace(recipe.augmentation, mixup=0.8))
        with pytest.raises(ValueError, match="repeats=3 must be 1"):
            replace(recipe, augmentation=replace(recipe.augmentation, repeats=3))
        with pytest.raises(ValueError, match=r"clip_norm=2.0 must be None with compact"):
            replace(recipe, filter=replace(recipe.filter, compact=True))
        with pytest.raises(ValueError, match="both or neither"):
            replace(segmenter_recipe(), pretraining=None)


class TestPrepare:
    def test_head_of_a_segmenter_is_its_last_convolution(self):
        model = create_segmenter("fcn", "resnet18", num_classes=4)
        prepare(model, segmenter_recipe("head").filter, torch.zeros(1, 3, 64, 64))
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.4.weight", "head.4.bias"}

    def test_head_of_a_classifier(self):
        model = models.create("test_resnet")
        prepare(model, RECIPES["resnet18_in1k_last4_head"].filter, torch.zeros(1, 3, 64, 64))
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {"fc.weight", "fc.bias"}


class TestClassifier:
    def test_learns(self, tuned):
        """Random features suffice for colours; the trivial answer is right for a third."""
        assert tuned.metrics["majority_top1"] == pytest.approx(100 / 3)
        assert tuned.metrics["top1"] > 60

    def test_only_the_last_layers_move(self, tuned, start):
        before = {key.removeprefix("module."): value for key, value in read_checkpoint(start).state.items()}
        after = read_checkpoint(tuned.weights).state
        assert set(after) == set(before)
        moved = {key for key in after if not torch.equal(after[key], before[key]) and before[key].ndim == 4}
        model = models.create("test_resnet")
        order = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        assert len(moved) == 4
        assert {key.removesuffix(".weight") for key in moved} <= set(order[-6:])

    def test_weights_open_again(self, tuned, colours):
        opened = open_trained(tuned.weights)
        assert (opened.trained.class_names, opened.model.training) == (COLOURS, False)
        assert PictureRecipe.of_inputs(opened.trained.inputs) == classifier_recipe().pictures
        assert evaluate(opened, None, device=CPU)["top1"] == tuned.metrics["top1"]

    def test_bare_weights_by_recipe(self, tuned, colours, tmp_path, monkeypatch):
        recipe = classifier_recipe()
        monkeypatch.setitem(RECIPES, recipe.name, recipe)
        torch.save(read_checkpoint(tuned.weights).state, tmp_path / "bare.pth")
        opened = open_trained(tmp_path / "bare.pth", package=PACKAGE, model=recipe.name)
        assert evaluate(opened, colours, device=CPU)["top1"] == tuned.metrics["top1"]

    def test_recipe_can_be_given_back(self, tuned):
        assert choose(str(tuned.weights.parent / "run.json"), RECIPES) == classifier_recipe()

    def test_compact_weights_are_plain(self, colours, start, tmp_path):
        """After two epochs, with an evaluation between them."""
        recipe = classifier_recipe()
        optimizer = replace(recipe.fit.optimizer, clip_norm=None)
        recipe = replace(recipe, fit=replace(recipe.fit, epochs=2, optimizer=optimizer))
        recipe = replace(recipe, filter=replace(recipe.filter, compact=True))
        result = train_classifier(recipe, colours, tmp_path, init=start)
        assert evaluate(open_trained(result.weights), colours, device=CPU)["top1"] == result.metrics["top1"]

    def test_errors(self, colours, start, tmp_path):
        recipe = classifier_recipe()
        with pytest.raises(ValueError, match="give --init FILE or --pretrained, not neither"):
            train_classifier(recipe, colours, tmp_path)
        with pytest.raises(ValueError, match="give --init FILE or --pretrained, not both"):
            train_classifier(recipe, colours, tmp_path, init=start, pretrained=True)
        with pytest.raises(ValueError, match="has no built-in data; give --data FOLDER"):
            train_classifier(recipe, None, tmp_path, init=start)
        with pytest.raises(CheckpointError, match="differs from the model in more than its classifier"):
            train_classifier(replace(recipe, model="test_efficientnet"), colours, tmp_path, init=start)
        assert list(tmp_path.iterdir()) == []


class TestSegmenter:
    def test_starts_from_its_own_pretraining(self, segmented):
        folder = segmented.weights.parent
        before = read_checkpoint(folder / "pretraining" / "weights.safetensors").state
        after = read_checkpoint(segmented.weights).state
        moved = {key for key in after if not torch.equal(after[key], before[key]) and before[key].ndim == 4}
        assert {key.split(".")[0] for key in moved} == {"encoder", "head"}
        assert len(moved) == 5
        assert {"miou", "miou_before", "majority_miou"} <= set(segmented.metrics)

    def test_weights_open_again(self, segmented):
        opened = open_trained(segmented.weights)
        assert (opened.model.scene, opened.trained.options["num_classes"]) == (segmenter_recipe().scene, 4)
        measured = evaluate(opened, None, device=CPU)
        assert measured["miou"] == pytest.approx(segmented.metrics["miou"])

    def test_pretraining_serves_all_gradients(self, segmented, tmp_path):
        """By its folder, or as a checkpoint."""
        folder = segmented.weights.parent / "pretraining"
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "pretraining").symlink_to(folder)
        exact = train_segmenter(segmenter_recipe("exact"), None, tmp_path / "run")
        assert exact.metrics["miou_before"] == segmented.metrics["miou_before"]
        given = train_segmenter(
            segmenter_recipe("exact"), None, tmp_path / "other", init=folder / "weights.safetensors"
        )
        assert given.metrics["miou"] == pytest.approx(exact.metrics["miou"])

    def test_negatives_are_negatives(self):
        """A picture x under the recipe's statistics is what 1 - x is under ImageNet's."""
        recipe = RECIPES["pspnet_resnet18_shapes_last5_r2"]
        pixels = torch.rand(3)
        mean, std, usual_mean, usual_std = (
            torch.tensor(values) for scene in (recipe.scene, SceneRecipe()) for values in (scene.mean, scene.std)
        )
        torch.testing.assert_close((pixels - mean) / std, (1 - pixels - usual_mean) / usual_std)

    def test_encoder_alone(self, tmp_path):
        torch.manual_seed(1)
        classifier = models.create("torchvision:resnet18")
        save_weights(tmp_path / "backbone.safetensors", classifier.state_dict(), metadata={})
        for head in ("fcn", "pspnet"):
            model = create_segmenter(head, "resnet18", num_classes=4)
            load_segmenter(model, tmp_path / "backbone.safetensors", num_classes=4)
            assert torch.equal(model.encoder.layer2[0].conv1.weight, classifier.layer2[0].conv1.weight)

    def test_other_heads_are_refused(self, tmp_path):
        state = {f"backbone.{key}": value for key, value in models.create("resnet18").state_dict().items()}
        state = {key: value for key, value in state.items() if ".fc." not in key}
        torch.save({"state_dict": state | {"decode_head.conv_seg.weight": torch.zeros(4, 8, 1, 1)}}, tmp_path / "m.pth")
        model = create_segmenter("fcn", "resnet18", num_classes=4)
        with pytest.raises(CheckpointError, match="decode_head"):
            load_segmenter(model, tmp_path / "m.pth", num_classes=4)

    def test_errors(self, tmp_path):
        recipe = replace(segmenter_recipe(), pretraining=None, pretraining_scene=None)
        with pytest.raises(ValueError, match="give --init FILE or --pretrained, not neither"):
            train_segmenter(recipe, None, tmp_path)
        with pytest.raises(ValueError, match="give --init FILE or --pretrained, not both"):
            train_segmenter(segmenter_recipe(), None, tmp_path, init="weights.pth", pretrained=True)
        with pytest.raises(ValueError, match="has no built-in data"):
            train_segmenter(replace(recipe, data=None), None, tmp_path, pretrained=True)

    @pytest.mark.slow
    @pytest.mark.parametrize("label", ["exact", "r2"])
    def test_learns(self, label, tmp_path):
        metrics = train_segmenter(RECIPES[f"pspnet_resnet18_shapes_last5_{label}"], None, tmp_path).metrics
        assert metrics["miou"] > metrics["miou_before"] + 25
        assert metrics["miou"] > metrics["majority_miou"] + 20


class TestEvaluate:
    def test_errors(self, tuned, tmp_path):
        model = models.create("test_resnet", num_classes=3)
        save_weights(tmp_path / "plain.safetensors", model.state_dict(), metadata={})
        with pytest.raises(CheckpointError, match=r"does not name its model; give --model NAME \[--num-classes N\]"):
            open_trained(tmp_path / "plain.safetensors", package=PACKAGE)
        opened = open_trained(tmp_path / "plain.safetensors", package=PACKAGE, model="test_resnet")
        with pytest.raises(ValueError, match="does not say its data; give --data FOLDER"):
            evaluate(opened, None, device=CPU)

    def test_only_the_classifier_may_differ(self, tmp_path):
        """Not another layer that happens to be the only one of another shape."""
        model = models.create("resnet18", num_classes=10)
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        save_weights(tmp_path / "stem.safetensors", model.state_dict(), metadata={})
        with pytest.raises(CheckpointError, match="differs from the model in more than its classifier: conv1"):
            load_into(models.create("resnet18", num_classes=10), tmp_path / "stem.safetensors", num_classes=10)

    def test_official(self, tuned, tmp_path):
        """A classifier's part can be left out where the model is a part of what was trained."""
        model = models.create("test_resnet", num_classes=0)
        load_into(model, tuned.weights, without=("fc.",))
        with pytest.raises(CheckpointError, match=r"fc\."):
            load_into(model, tuned.weights)
