"""How good a weights file is, by the pictures that it was trained for."""

import pytest
import torch
from torch.nn import functional as F

from g2sd.cli import PACKAGE
from g2sd.official import load_classifier
from visionkernels import tasks
from visionkernels.pictures.labelled import open_pictures
from visionkernels.pictures.transforms import evaluation_transform
from visionkernels.weights import CheckpointError, Trained, open_trained

CPU = torch.device("cpu")


class TestLoadClassifier:
    def test_own_file(self, runs):
        """It takes pictures as in training, and knows the names of its classes."""
        model = load_classifier(runs["specific"])
        config = model.pretrained_cfg
        assert not model.training and model.num_classes == 3
        assert list(config["label_names"]) == ["blue", "green", "red"]
        assert tuple(config["input_size"]) == (3, 32, 32) and config["crop_pct"] == pytest.approx(32 / 36)
        assert config["interpolation"] == "bicubic"

    @pytest.mark.parametrize("layout", ["vit_tiny_patch16_distilled/model"])
    def test_official_file(self, official, tmp_path, layout):
        torch.save({"model": official(layout)}, tmp_path / "file.pth")
        config = load_classifier(tmp_path / "file.pth").pretrained_cfg
        assert (config["input_size"], config["crop_pct"]) == ((3, 224, 224), 0.875)
        assert config["interpolation"] == "bicubic" and config["mean"] == (0.485, 0.456, 0.406)

    def test_other_channels(self, vit, tmp_path):
        trained = Trained(kind="classifier", package="g2sd", options={"num_heads": 3})
        trained.save(tmp_path / "grey.safetensors", vit(in_chans=1).state_dict())
        assert load_classifier(tmp_path / "grey.safetensors").pretrained_cfg["input_size"] == (1, 32, 32)

    @pytest.mark.parametrize("stage", ["pretrain", "generic"])
    def test_no_classifier(self, runs, stage):
        with pytest.raises(CheckpointError, match=r"has no classification head; run `g2sd inspect"):
            load_classifier(runs[stage])

    def test_encoder_alone(self, official, tmp_path):
        state = {k: v for k, v in official("gd_tiny_all/teacher").items() if not k.startswith(("decoder", "mask"))}
        torch.save(state, tmp_path / "file.pth")
        with pytest.raises(CheckpointError, match="holds 'encoder'; run `g2sd inspect"):
            load_classifier(tmp_path / "file.pth")


def evaluate(path, data, **options):
    """Measure as `g2sd eval` does."""
    return tasks.evaluate(open_trained(path, package=PACKAGE), data, device=CPU, **options)


class TestEvaluate:
    @pytest.mark.parametrize("stage", ["finetune", "specific"])
    def test_definition(self, runs, micro, pictures, stage):
        found = evaluate(runs[stage], str(pictures), batch_size=5)
        model = load_classifier(runs[stage])
        samples = list(open_pictures(pictures, "validation", evaluation_transform(micro[stage].pictures)))
        with torch.no_grad():
            logits = model(torch.stack([image for image, _ in samples]))
        labels = torch.tensor([label for _, label in samples])
        assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        assert found["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item(), abs=1e-3)
        assert (found["num_pictures"], found["majority_top1"]) == (12, pytest.approx(100 / 3))

    def test_other_classes(self, runs, pictures, tmp_path):
        (tmp_path / "val" / "pink").mkdir(parents=True)
        (tmp_path / "val" / "pink" / "0.png").write_bytes((pictures / "val" / "red" / "0.png").read_bytes())
        with pytest.raises(ValueError, match="classes that training does not know: pink"):
            evaluate(runs["specific"], str(tmp_path))

    @pytest.mark.parametrize("options", [{"batch_size": 0}, {"workers": -1}])
    def test_errors(self, runs, pictures, options):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"{name}={value} must be at least"):
            evaluate(runs["specific"], str(pictures), **options)
