"""Exported files agree with eager mode, and converted checkpoints keep their outputs."""

import sys

import numpy as np
import pytest
import timm
import torch

from biformer.conversion import convert_checkpoint
from biformer.official import convert_stl, load_model, load_official, official_rules
from visionkernels.tasks import export
from visionkernels.tasks.classification import as_classifier
from visionkernels.weights import CheckpointError, save_weights

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # float32 after some ten layers, in another order of sums


def export_model(model, path, **options):
    """Write a classifier as `biformer export` does."""
    opened = as_classifier(model, "biformer_tiny", model.num_classes, source="test")
    return export(opened, path, install="biformer[export]", **options)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"depth": (1,) * 4, "embed_dim": (32,) * 4, "topks": (1, 2, 4, -2), "n_win": 2, "num_classes": 5}
    return lively(timm.create_model("biformer_tiny", **sizes))


def lively(model):
    """Give the norms running statistics that an exporter cannot fold away."""
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return model.eval()


def onnx_logits(path, images):
    session = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed").InferenceSession(path)
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


class TestExportModel:
    @pytest.mark.parametrize(
        "size", [pytest.param((64, 64), marks=pytest.mark.slow), (72, 100)], ids=["divisible", "padded"]
    )
    def test_onnx(self, model, tmp_path, size):
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        export_model(model, tmp_path / "m.onnx", size=size)
        assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
        for batch in (1, 3):
            images = torch.randn(batch, 3, *size)
            torch.testing.assert_close(onnx_logits(tmp_path / "m.onnx", images), model(images).detach(), **TOLERANCE)

    def test_pt2(self, model, tmp_path):
        extra = {"model.json": ""}
        export_model(model, tmp_path / "m.pt2", size=(64, 64))
        program = torch.export.load(tmp_path / "m.pt2", extra_files=extra).module()
        assert '"model": "biformer_tiny"' in extra["model.json"]
        for batch in (1, 3):
            images = torch.randn(batch, 3, 64, 64)
            torch.testing.assert_close(program(images), model(images), **TOLERANCE)

    def test_errors(self, model, tmp_path):
        with pytest.raises(ValueError, match="format='bin' must be onnx or pt2"):
            export_model(model, tmp_path / "m.bin")
        with pytest.raises(ValueError, match=r"size=\(0, 64\)"):
            export_model(model, tmp_path / "m.pt2", size=(0, 64))
        (tmp_path / "m.pt2").touch()
        with pytest.raises(FileExistsError, match="--overwrite"):
            export_model(model, tmp_path / "m.pt2")

    def test_without_the_extra(self, model, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(ImportError, match=r"onnxscript is not installed; run: pip install 'biformer\[export\]'"):
            export_model(model, tmp_path / "m.onnx")
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    def test_tiny_at_224(self, tmp_path):
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        model = lively(timm.create_model("biformer_tiny"))
        images = torch.randn(1, 3, 224, 224)
        export_model(model, tmp_path / "m.onnx")
        torch.testing.assert_close(onnx_logits(tmp_path / "m.onnx", images), model(images).detach(), **TOLERANCE)


@pytest.mark.slow  # inductor compiles C++ for most of a minute; test_model.py tests the graph
def test_compiled_is_eager(model):
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), **TOLERANCE)


class TestHub:
    def test_folder_opens_by_name(self, model, tmp_path):
        """What `timm.models.push_to_hf_hub` uploads, and `hf-hub:` names load, is this folder."""
        timm.models.save_for_hf(
            model,
            tmp_path,
            model_args={"depth": (1,) * 4, "embed_dim": (32,) * 4, "topks": (1, 2, 4, -2), "n_win": 2},
            safe_serialization=True,
        )
        opened = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        images = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(opened(images), model(images))


@pytest.fixture(scope="module")
def stl(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model("biformer_stl", num_classes=2)
    path = tmp_path_factory.mktemp("stl") / "stl.pth"
    torch.save({"model": official_rules(model).inverse().rename(model.state_dict())}, path)
    return path


class TestConvertCheckpoint:
    def test_ours(self, stl, tmp_path):
        said = convert_checkpoint(stl, tmp_path / "ours.safetensors", to="ours")
        assert "biformer_stl, 2 classes, 201 tensors" in said
        torch.testing.assert_close(
            load_model(tmp_path / "ours.safetensors").state_dict(), load_official(stl).state_dict()
        )

    def test_there_and_back(self, stl, tmp_path):
        with pytest.raises(CheckpointError, match="--allow-inexact"):
            convert_checkpoint(stl, tmp_path / "nchw.safetensors", to="stl_nchw")
        convert_checkpoint(stl, tmp_path / "nchw.safetensors", to="stl_nchw", allow_inexact=True)
        nchw = load_official(tmp_path / "nchw.safetensors", "biformer_stl_nchw")
        convert_checkpoint(tmp_path / "nchw.safetensors", tmp_path / "back.safetensors", to="stl", allow_inexact=True)
        nhwc = load_official(tmp_path / "back.safetensors")
        torch.testing.assert_close(nhwc.state_dict(), load_official(stl).state_dict())
        images = torch.randn(1, 3, 224, 224)
        with torch.no_grad():
            ours, theirs = (
                form.forward_intermediates(images, indices=[2], intermediates_only=True)[0] for form in (nhwc, nchw)
            )
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)  # the three routed stages, in another layout

    def test_errors(self, stl, tmp_path):
        with pytest.raises(CheckpointError, match="no form other than biformer_stl to convert from"):
            convert_checkpoint(stl, tmp_path / "x.safetensors", to="stl", allow_inexact=True)
        save_weights(tmp_path / "other.safetensors", {"weight": torch.zeros(2)}, metadata={})
        with pytest.raises(CheckpointError, match="neither biformer_stl nor biformer_stl_nchw"):
            convert_checkpoint(tmp_path / "other.safetensors", tmp_path / "x.safetensors", to="stl_nchw")
        with pytest.raises(CheckpointError, match="fits none of biformer_tiny"):
            convert_checkpoint(tmp_path / "other.safetensors", tmp_path / "x.safetensors", to="ours")
        assert not (tmp_path / "x.safetensors").exists()

    def test_only_the_last_stage_is_inexact(self):
        state = {"stages.0.blocks.0.attn.qkv.qkv.weight": torch.arange(6.0).view(3, 2)}
        converted = convert_stl(state)
        assert np.shape(converted["stages.0.blocks.0.attn.qkv_linear.weight"]) == (3, 2, 1, 1)
