"""Weights of any origin open, tell their network, and are measured on validation data."""

from dataclasses import replace

import pytest
import timm
import torch

from diswot.cli import PACKAGE
from diswot.models import create_network
from diswot.recipes import RECIPES
from diswot.training import train
from visionkernels import tasks
from visionkernels.pictures.recipes import PictureRecipe
from visionkernels.tasks.classification import build_classifier
from visionkernels.testing.pictures import COLOURS, write_colours
from visionkernels.weights import CheckpointError, Trained, open_trained, save_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return write_colours(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="module")
def run(colours, tmp_path_factory):
    """Weights of `train`, and its last metrics."""
    recipe = RECIPES["mnist5k_plain"]
    fit = replace(recipe.fit, epochs=4, batch_size=16, device="cpu")
    recipe = replace(recipe, data=None, fit=fit, pictures=replace(recipe.pictures, size=16, resize=16))
    result = train(recipe, colours, tmp_path_factory.mktemp("run"))
    return result.weights, result.metrics


def store(path, name: str, num_classes: int = 3):
    """Weights with moved statistics, as plain files have them."""
    model = create_network(name, num_classes=num_classes)
    for key, buffer in model.named_buffers():
        if "running" in key:
            buffer.uniform_(0.5, 1.5)
    if path.suffix == ".pth":
        torch.save({"epoch": 1, "model": model.state_dict(), "best_acc": 1.0}, path)
    else:
        save_weights(path, model.state_dict(), metadata={})
    return model.eval()


def evaluate(path, data, *, model=None, **options):
    """Measure as `diswot eval` does."""
    return tasks.evaluate(open_trained(path, package=PACKAGE, model=model), data, device=CPU, **options)


class TestEvaluate:
    def test_of_a_run(self, run, colours):
        """Data and network are those of the run, and so are the metrics."""
        weights, logged = run
        measured = evaluate(weights, None, batch_size=5)
        assert measured["top1"] == logged["top1"]
        assert measured["loss"] == pytest.approx(logged["val_loss"], rel=1e-5)
        assert (measured["majority_top1"], measured["num_pictures"]) == (pytest.approx(100 / 3), 12)
        assert evaluate(weights, colours, model="s0_111", batch_size=5) == pytest.approx(measured)

    def test_plain_weights(self, colours, tmp_path):
        """CIFAR's size and statistics for our networks."""
        store(tmp_path / "plain.pth", "cifar_resnet8")
        measured = evaluate(tmp_path / "plain.pth", colours, model="cifar_resnet8")
        assert measured["num_pictures"] == 12

    def test_errors(self, run, colours, tmp_path):
        weights, _ = run
        store(tmp_path / "plain.safetensors", "s0_111")
        save_weights(tmp_path / "stray.safetensors", {"weight": torch.zeros(2)}, metadata={})
        with pytest.raises(ValueError, match=r"stray.safetensors fits none of .*--model NAME"):
            evaluate(tmp_path / "stray.safetensors", colours)
        with pytest.raises(ValueError, match=r"plain.safetensors does not say its data; give --data FOLDER"):
            evaluate(tmp_path / "plain.safetensors", None, model="s0_111")
        with pytest.raises(ValueError, match=r"holds the weights of s0_111, not of --model s0_113"):
            evaluate(weights, colours, model="s0_113")
        with pytest.raises(ValueError, match="batch_size=0"):
            evaluate(weights, colours, batch_size=0)
        with pytest.raises(FileNotFoundError, match=r"none.pth"):
            evaluate(tmp_path / "none.pth", colours)
        store(tmp_path / "two.pth", "s0_111", num_classes=2)
        with pytest.raises(ValueError, match="the data has class 2, the model 2 classes"):
            evaluate(tmp_path / "two.pth", colours, model="s0_111")


class TestOpenTrained:
    def test_of_a_run(self, run):
        network = open_trained(run[0])
        assert (network.trained.model, network.trained.class_names) == ("s0_111", COLOURS)
        assert not network.model.training
        assert network.model.pretrained_cfg["label_names"] == COLOURS

    @pytest.mark.parametrize(
        ("name", "suffix"),
        [("cifar_wrn_16_1", ".pth"), ("nb201_diswot", ".safetensors"), ("test_resnet", ".pth"),
         ("torchvision:resnet18", ".safetensors")],
    )  # fmt: skip
    def test_plain_weights(self, tmp_path, name, suffix):
        """The number of classes is the file's, and outputs are the same."""
        path = tmp_path / f"weights{suffix}"
        model = store(path, name)
        network = open_trained(path, package=PACKAGE, model=name)
        images = torch.randn(1, 3, 64, 64)
        assert network.trained.options["num_classes"] == 3
        torch.testing.assert_close(network.model(images), model(images))

    def test_pictures(self, tmp_path):
        """How each kind of network takes them."""
        found = {}
        for name in ("s0_111", "s0:111", "test_resnet", "torchvision:resnet18"):
            store(tmp_path / "weights.pth", name)
            opened = open_trained(tmp_path / "weights.pth", package=PACKAGE, model=name)
            found[name] = timm.data.resolve_model_data_config(opened.model)
        for name in ("s0_111", "s0:111"):
            assert (found[name]["input_size"], found[name]["mean"]) == ((3, 32, 32), (0.5071, 0.4867, 0.4408))
        assert found["test_resnet"]["input_size"] == timm.get_pretrained_cfg("test_resnet").input_size
        usual = PictureRecipe()
        assert found["torchvision:resnet18"]["input_size"] == (3, usual.size, usual.size)
        assert found["torchvision:resnet18"]["mean"] == usual.mean

    def test_misfits(self, tmp_path):
        store(tmp_path / "weights.pth", "cifar_resnet8")
        with pytest.raises(CheckpointError, match=r"does not fit CifarResNet.*it fits cifar_resnet8"):
            open_trained(tmp_path / "weights.pth", package=PACKAGE, model="cifar_resnet14")
        with pytest.raises(CheckpointError, match=r"does not fit nb201_diswot: it has no classifier 'classifier'"):
            open_trained(tmp_path / "weights.pth", package=PACKAGE, model="nb201_diswot")
        with pytest.raises(
            CheckpointError,
            match=r"does not fit torchvision:resnet18: it has no classifier 'fc'|does not fit ResNet: .* keys missing",
        ):
            open_trained(tmp_path / "weights.pth", package=PACKAGE, model="torchvision:resnet18")


class TestBuildNetwork:
    @pytest.mark.parametrize("name", ["s0_111", "test_resnet", "torchvision:resnet18"])
    def test_tells_how_it_takes_pictures(self, name):
        pictures = PictureRecipe(size=16, resize=20, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
        options = {"num_classes": 2}
        model = build_classifier(
            Trained(kind="classifier", package="diswot", model=name, options=options, inputs=pictures.inputs())
        )
        config = timm.data.resolve_model_data_config(model)
        assert (config["input_size"], config["crop_pct"]) == ((3, 16, 16), 0.8)
        assert (config["mean"], config["std"]) == (pictures.mean, pictures.std)
