"""Official weights: every layout loads, and what does not fit says how."""

import argparse
import json
from pathlib import Path

import pytest
import timm
import torch

from biformer.cli import PACKAGE
from biformer.official import MODEL_NAMES, load_model, load_official, official_rules
from visionkernels.weights import CheckpointError, open_trained, save_weights

LAYOUTS = json.loads((Path(__file__).parent / "golden" / "state_layout.json").read_text())


def official_state(name, seed=0):
    """Random tensors under the keys and shapes that were read off the official model."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.rand(shape, generator=generator) for key, shape in LAYOUTS[f"{name}_224"].items()}


@pytest.fixture(scope="module")
def tiny():
    return official_state("biformer_tiny")


def save(path, content):
    torch.save(content, path)
    return path


class TestLoadOfficial:
    @pytest.mark.parametrize("name", MODEL_NAMES)
    def test_every_layout(self, tmp_path, name):
        state = official_state(name)
        model = load_official(save(tmp_path / "weights.pth", {"model": state}))
        assert not model.training
        assert model.pretrained_cfg["architecture"] == name
        back = official_rules(model).inverse().rename(model.state_dict())
        assert back.keys() == state.keys()
        # BatchNorm counts batches in whole numbers
        torch.testing.assert_close(back, {key: value.to(back[key].dtype) for key, value in state.items()})

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            lambda state: {"model": state},
            lambda state: {"model_ema": state},
            lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
            lambda state: {"model": state, "args": argparse.Namespace(lr=1e-3), "epoch": 3, "max_accuracy": 81.4},
        ],
        ids=["bare", "model", "ema", "module", "training"],
    )
    def test_wrappings(self, tiny, tmp_path, wrap):
        model = load_official(save(tmp_path / "weights.pth", wrap(tiny)))
        torch.testing.assert_close(model.head.fc.weight.detach(), tiny["head.weight"])

    def test_chosen_weights(self, tiny, tmp_path):
        averaged = official_state("biformer_tiny", seed=1)
        path = save(tmp_path / "weights.pth", {"model": tiny, "model_ema": averaged})
        for weights, wanted in (("auto", tiny), ("model", tiny), ("ema", averaged)):
            model = load_official(path, weights=weights)
            torch.testing.assert_close(model.head.fc.bias.detach(), wanted["head.bias"])

    def test_safetensors(self, tiny, tmp_path):
        save_weights(tmp_path / "weights.safetensors", tiny, metadata={})
        model = load_official(tmp_path / "weights.safetensors")
        torch.testing.assert_close(model.head.fc.weight.detach(), tiny["head.weight"])

    def test_other_head(self, tiny, tmp_path):
        state = {**tiny, "head.weight": torch.rand(7, 512), "head.bias": torch.rand(7)}
        path = save(tmp_path / "weights.pth", state)
        assert load_official(path).num_classes == 7
        with pytest.raises(
            CheckpointError, match=r"classifier 'head\.fc' has 7 classes, the model 1000; .*drop the head"
        ):
            load_official(path, num_classes=1000)
        features = load_official(path, num_classes=0)
        assert features(torch.zeros(1, 3, 64, 64)).shape == (1, 512)

    def test_missing_keys(self, tiny, tmp_path):
        gone = [key for key in tiny if key.startswith("stages.2.4.")][:7]
        path = save(tmp_path / "weights.pth", {key: value for key, value in tiny.items() if key not in gone})
        with pytest.raises(CheckpointError, match="fits none of biformer_tiny"):
            load_official(path)
        with pytest.raises(CheckpointError) as caught:
            load_official(path, "biformer_tiny")
        assert f"7 keys missing (first: {', '.join(gone[:4])}" in str(caught.value)

    def test_extra_keys(self, tiny, tmp_path):
        extra = {f"stages.0.0.strange{number}": torch.zeros(1) for number in range(6)}
        with pytest.raises(CheckpointError) as caught:
            load_official(save(tmp_path / "weights.pth", {**tiny, **extra}), "biformer_tiny")
        assert f"6 keys unexpected (first: {', '.join(list(extra)[:5])})" in str(caught.value)

    def test_wrong_shapes(self, tiny, tmp_path):
        bad = {"stages.1.0.attn.qkv.qkv.weight": torch.zeros(3, 4)}
        with pytest.raises(
            CheckpointError, match=r"1 keys misshapen \(first: .*qkv\.weight \[3, 4\] instead of \[384, 128\]"
        ):
            load_official(save(tmp_path / "weights.pth", {**tiny, **bad}), "biformer_tiny")

    def test_other_model(self, tiny, tmp_path):
        with pytest.raises(CheckpointError, match="it fits biformer_tiny"):
            load_official(save(tmp_path / "weights.pth", tiny), "biformer_small")

    def test_damaged(self, tiny, tmp_path):
        path = save(tmp_path / "weights.pth", tiny)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(CheckpointError, match=r"weights\.pth is damaged"):
            load_official(path)

    def test_code_is_not_run(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return exec, ("raise SystemExit('ran')",)

        with pytest.raises(CheckpointError, match="could run code"):
            load_official(save(tmp_path / "weights.pth", {"model": {}, "trap": Trap()}))

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.pth is not a file"):
            load_official(tmp_path / "none.pth")


class TestLoadModel:
    def test_takes_official_files_too(self, tiny, tmp_path):
        model = load_model(save(tmp_path / "weights.pth", tiny))
        torch.testing.assert_close(model.head.fc.weight.detach(), tiny["head.weight"])

    def test_options_are_stored(self, tmp_path):
        options = {"depth": [1, 1, 1, 1], "embed_dim": [32] * 4, "topks": [1, 2, 4, -2], "n_win": 2, "num_classes": 4}
        model = timm.create_model("biformer_tiny", **options)
        metadata = {"model_name": "biformer_tiny", "model_options": json.dumps(options)}
        save_weights(tmp_path / "ours.safetensors", model.state_dict(), metadata=metadata)
        torch.testing.assert_close(load_model(tmp_path / "ours.safetensors").state_dict(), model.state_dict())

    def test_unnamed(self, tmp_path):
        state = timm.create_model("biformer_tiny", num_classes=2).state_dict()
        save_weights(tmp_path / "ours.safetensors", state, metadata={})
        with pytest.raises(CheckpointError, match=r"fits none of biformer_tiny, .*--model NAME"):
            load_model(tmp_path / "ours.safetensors")
        opened = open_trained(tmp_path / "ours.safetensors", package=PACKAGE, model="biformer_tiny")
        assert opened.model.num_classes == 2
