"""Weights of any origin open, tell their network, and are measured on validation data."""

from dataclasses import replace

import pytest
import timm
import torch

from diswot.evaluation import build_network, evaluate_checkpoint, load_network
from diswot.models import create_network
from diswot.recipes import find_recipe
from diswot.training import train
from visionkernels.checkpoints import CheckpointError, save_weights
from visionkernels.pictures.recipes import PictureRecipe
from visionkernels.testing.pictures import COLOURS, write_colours

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return write_colours(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="module")
def run(colours, tmp_path_factory):
    """Weights of `train`, and its last metrics."""
    recipe = find_recipe("mnist5k_plain")
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


class TestEvaluateCheckpoint:
    def test_of_a_run(self, run, colours):
        """Data and network are those of the run, and so are the metrics."""
        weights, logged = run
        measured = evaluate_checkpoint(weights, None, device=CPU, batch_size=5)
        assert measured["top1"] == logged["top1"]
        assert measured["loss"] == pytest.approx(logged["val_loss"], rel=1e-5)
        assert (measured["majority_top1"], measured["num_pictures"]) == (pytest.approx(100 / 3), 12)
        assert evaluate_checkpoint(weights, colours, device=CPU, model="s0_111") == pytest.approx(measured)

    def test_plain_weights(self, colours, tmp_path):
        """CIFAR's size and statistics for our networks."""
        store(tmp_path / "plain.pth", "cifar_resnet8")
        measured = evaluate_checkpoint(tmp_path / "plain.pth", colours, model="cifar_resnet8", device=CPU)
        assert measured["num_pictures"] == 12

    def test_errors(self, run, colours, tmp_path):
        weights, _ = run
        store(tmp_path / "plain.safetensors", "s0_111")
        with pytest.raises(ValueError, match=r"plain.safetensors does not tell its network; give --model NAME"):
            evaluate_checkpoint(tmp_path / "plain.safetensors", colours, device=CPU)
        with pytest.raises(ValueError, match=r"plain.safetensors does not tell its data; give --data FOLDER"):
            evaluate_checkpoint(tmp_path / "plain.safetensors", None, model="s0_111", device=CPU)
        with pytest.raises(ValueError, match=r"holds the weights of s0_111, not of s0_113"):
            evaluate_checkpoint(weights, colours, model="s0_113", device=CPU)
        with pytest.raises(ValueError, match="batch_size=0"):
            evaluate_checkpoint(weights, colours, device=CPU, batch_size=0)
        with pytest.raises(FileNotFoundError, match=r"none.pth"):
            evaluate_checkpoint(tmp_path / "none.pth", colours, device=CPU)
        store(tmp_path / "two.pth", "s0_111", num_classes=2)
        with pytest.raises(ValueError, match="the data has class 2, the model 2 classes"):
            evaluate_checkpoint(tmp_path / "two.pth", colours, model="s0_111", device=CPU)


class TestLoadNetwork:
    def test_of_a_run(self, run):
        network = load_network(run[0])
        assert (network.name, network.num_classes, network.class_names) == ("s0_111", 3, COLOURS)
        assert not network.model.training
        assert network.model.pretrained_cfg["label_names"] == COLOURS

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    @pytest.mark.parametrize("name", ["cifar_wrn_16_1", "nb201_diswot", "test_resnet", "torchvision:resnet18"])
    def test_plain_weights(self, tmp_path, name, suffix):
        """The number of classes is the file's, and outputs are the same."""
        path = tmp_path / f"weights{suffix}"
        model = store(path, name)
        network = load_network(path, name)
        images = torch.randn(1, 3, 64, 64)
        assert network.num_classes == 3
        torch.testing.assert_close(network.model(images), model(images))

    def test_pictures(self, tmp_path):
        """How each kind of network takes them."""
        found = {}
        for name in ("s0_111", "s0:111", "test_resnet", "torchvision:resnet18"):
            store(tmp_path / "weights.pth", name)
            found[name] = load_network(tmp_path / "weights.pth", name).pictures
        assert (found["s0_111"].size, found["s0_111"].mean) == (32, (0.5071, 0.4867, 0.4408))
        assert (found["s0:111"].size, found["s0:111"].mean) == (32, (0.5071, 0.4867, 0.4408))
        assert found["test_resnet"].size == timm.get_pretrained_cfg("test_resnet").input_size[1]
        assert found["torchvision:resnet18"] == PictureRecipe()

    def test_misfits(self, tmp_path):
        store(tmp_path / "weights.pth", "cifar_resnet8")
        with pytest.raises(CheckpointError, match=r"does not fit CifarResNet.*it fits cifar_resnet8"):
            load_network(tmp_path / "weights.pth", "cifar_resnet14")
        with pytest.raises(CheckpointError, match=r"does not fit nb201_diswot: it has no classifier 'classifier'"):
            load_network(tmp_path / "weights.pth", "nb201_diswot")
        with pytest.raises(CheckpointError, match=r"does not fit ResNet: .* keys missing"):
            load_network(tmp_path / "weights.pth", "torchvision:resnet18")


class TestBuildNetwork:
    @pytest.mark.parametrize("name", ["s0_111", "test_resnet", "torchvision:resnet18"])
    def test_tells_how_it_takes_pictures(self, name):
        pictures = PictureRecipe(size=16, resize=20, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
        model = build_network(name, 2, pictures, ("a", "b"))
        config = timm.data.resolve_model_data_config(model)
        assert (config["input_size"], config["crop_pct"]) == ((3, 16, 16), 0.8)
        assert (config["mean"], config["std"]) == (pictures.mean, pictures.std)
