import argparse
import json
from pathlib import Path

import pytest
import timm
import torch

from diswot.networks import load_into
from diswot.official import load_official
from visionkernels.weights import CheckpointError, save_weights

GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUTS = json.loads((GOLDEN / "state_layout.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in json.loads((GOLDEN / "index.json").read_text(encoding="utf-8"))["cases"]}


def model_of(name):
    config = CASES[name]["config"]
    classes = {"num_classes": config["num_classes"]}
    match CASES[name]["kind"]:
        case "resnet_s0":
            return timm.create_model("s0_111", depths=config["depths"], **classes)
        case "nb201":
            sizes = {"width": config["C"], "cells": config["N"]}
            return timm.create_model("nb201", arch=config["arch_str"], **sizes, **classes)
        case "nb101":
            sizes = {"stem_channels": config["stem_out_channels"], "stacks": config["num_stacks"]}
            cell = {"matrix": config["matrix"], "ops": config["ops"], "cells": config["num_modules_per_stack"]}
            return timm.create_model("nb101", **cell, **sizes, **classes)
        case "masternet":
            return timm.create_model("structure_net", structure=config["struct"], **classes)


NETWORKS = [name for name, case in CASES.items() if case["kind"] in ("resnet_s0", "nb201", "nb101", "masternet")]


def official_state(name):
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.tensor(3) if key.endswith("num_batches_tracked") else torch.rand(shape, generator=generator)
        for key, shape in LAYOUTS[name].items()
    }


@pytest.mark.parametrize("name", NETWORKS)
class TestLayouts:
    def test_keys(self, name):
        """Official keys and shapes, in the official order."""
        state = {key: list(value.shape) for key, value in model_of(name).state_dict().items()}
        assert list(state.items()) == list(LAYOUTS[name].items())

    def test_training_checkpoint(self, name, tmp_path):
        """With the namespace of the options, which a safe reader refuses unless it is allowed."""
        state = official_state(name)
        path = tmp_path / "ckpt_epoch_240.pth"
        options = argparse.Namespace(model="resnet56", learning_rate=0.05)
        torch.save({"opt": options, "model": state, "epoch": 240, "best_acc": 72.3}, path)
        model = model_of(name)
        checkpoint = load_into(model, path)
        assert checkpoint.taken_from == "model"
        assert checkpoint.metadata["epoch"] == "240"
        expected = {key: value for key, value in state.items() if "input_op.6." not in key}
        # of two names for one tensor, the later one counts
        expected |= {
            key.replace("last_inop", "input_op.6"): value for key, value in state.items() if "last_inop" in key
        }
        torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)


class TestLoadInto:
    def test_safetensors(self, tmp_path):
        one, two = timm.create_model("s0_131"), timm.create_model("s0_131")
        save_weights(tmp_path / "one.safetensors", one.state_dict(), metadata={})
        load_into(two, tmp_path / "one.safetensors")
        torch.testing.assert_close(two.state_dict(), one.state_dict())

    def test_alias(self, tmp_path):
        """A file that stores a shared tensor once loads too; where it has both names, the later one counts."""
        state = {key: value for key, value in official_state("nb101_tiny").items() if "last_inop" not in key}
        torch.save(state, tmp_path / "once.pth")
        model = model_of("nb101_tiny")
        load_into(model, tmp_path / "once.pth")
        key = "layers.1.{}.conv_bn_relu.0.weight"
        assert torch.equal(model.state_dict()[key.format("last_inop")], state[key.format("input_op.6")])
        both = state | {key: value for key, value in official_state("nb101_tiny").items() if "last_inop" in key}
        both[key.format("last_inop")] = torch.full_like(both[key.format("last_inop")], 7.0)
        torch.save(both, tmp_path / "both.pth")
        load_into(model, tmp_path / "both.pth")
        assert (model.state_dict()[key.format("input_op.6")] == 7).all()

    @pytest.mark.parametrize(
        ("held", "other"), [("s0_713", "s0_333"), ("cifar_vgg8", "cifar_vgg11"), ("nb201_ea", "nb201_diswot")]
    )
    def test_names_what_fits(self, held, other, tmp_path):
        torch.save({"model": timm.create_model(held, num_classes=10).state_dict()}, tmp_path / "file.pth")
        with pytest.raises(CheckpointError, match=rf"does not fit .*first: .*; it fits {held}"):
            load_into(timm.create_model(other, num_classes=10), tmp_path / "file.pth")

    def test_other_classes(self, tmp_path):
        torch.save(timm.create_model("s0_111", num_classes=100).state_dict(), tmp_path / "file.pth")
        with pytest.raises(CheckpointError, match="has 100 classes, the model 10"):
            load_into(timm.create_model("s0_111", num_classes=10), tmp_path / "file.pth")
        load_into(timm.create_model("s0_111", num_classes=0), tmp_path / "file.pth")

    def test_bad_files(self, tmp_path):
        model = timm.create_model("s0_111")
        with pytest.raises(FileNotFoundError, match=r"none\.pth"):
            load_into(model, tmp_path / "none.pth")
        (tmp_path / "bad.pth").write_bytes(b"PK\x03\x04 nothing")
        with pytest.raises(CheckpointError, match=r"bad\.pth"):
            load_into(model, tmp_path / "bad.pth")
        torch.save({"model": model.state_dict(), "other": model.state_dict()}, tmp_path / "two.pth")
        assert load_into(model, tmp_path / "two.pth", entry="other").taken_from == "other"


class TestLoadOfficial:
    @pytest.mark.parametrize("name", ["s0_713", "cifar_vgg8", "nb201_ea"])
    def test_finds_the_network(self, name, tmp_path):
        source = timm.create_model(name, num_classes=10)
        torch.save({"model": source.state_dict()}, tmp_path / "file.pth")
        model = load_official(tmp_path / "file.pth")
        assert (type(model), model.num_classes, model.training) == (type(source), 10, False)
        torch.testing.assert_close(model.state_dict(), source.state_dict())
        assert load_official(tmp_path / "file.pth", name, num_classes=0).num_classes == 0

    def test_no_network(self, tmp_path):
        torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "file.pth")
        with pytest.raises(CheckpointError, match=r"fits none of this package's networks; name its model"):
            load_official(tmp_path / "file.pth")
