"""Classifiers as files for others agree with the models that they are of."""

import sys

import pytest
import torch

from g2sd.cli import PACKAGE, export
from g2sd.upernet import segmentation_model
from visionkernels.testing.golden import recipe_weights
from visionkernels.weights import Trained, open_trained

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # float32 after some layers, in another order of sums


def export_model(path, out, **options):
    """Write the model of a file as `g2sd export` does."""
    return export(open_trained(path, package=PACKAGE), out, install="g2sd-vision[export]", **options)


@pytest.fixture
def file(vit, tmp_path):
    """Writes a lively classifier and returns it with its file."""

    def write(**options):
        model = vit(**{"depth": 1, **options})
        model.load_state_dict(recipe_weights(model.state_dict()))
        path = tmp_path / "weights.safetensors"
        trained = Trained(kind="classifier", package="g2sd", options={"num_heads": 3})
        trained.save(path, model.state_dict(), overwrite=True)
        return model.eval(), path

    return write


def reopened(path, images):
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    session = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed").InferenceSession(path)
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


class TestExportModel:
    @pytest.mark.parametrize(("suffix", "head"), [("pt2", "class"), ("onnx", None)])
    def test_agrees(self, file, tmp_path, suffix, head):
        if suffix == "onnx":
            pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        model, path = file()
        model.eval_head = head or "mean"
        out = tmp_path / f"m.{suffix}"
        assert export_model(path, out, head=head) == "images [batch, 3, 32, 32] to logits [batch, 5]"
        for batch in (1, 3):
            images = torch.randn(batch, 3, 32, 32)
            with torch.no_grad():
                torch.testing.assert_close(reopened(out, images).detach(), model(images), **TOLERANCE)

    def test_one_head_and_grey_images(self, file, tmp_path):
        model, path = file(distilled=False, in_chans=1)
        export_model(path, tmp_path / "m.pt2")
        images = torch.randn(2, 1, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(reopened(tmp_path / "m.pt2", images).detach(), model(images), **TOLERANCE)

    @pytest.mark.parametrize("suffix", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
    def test_segmentation(self, tmp_path, suffix):
        if suffix == "onnx":
            pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        sizes = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "out_indices": (0, 1, 2, 3)}
        model = segmentation_model(
            "tiny", num_classes=4, img_size=32, decoder_channels=8, auxiliary_channels=8, **sizes
        )
        model.load_state_dict(recipe_weights(model.state_dict()))
        path, out = tmp_path / "weights.safetensors", tmp_path / f"m.{suffix}"
        options = {"out_indices": (0, 1, 2, 3), "num_classes": 4}
        Trained(kind="segmenter", package="g2sd", options=options).save(path, model.state_dict())
        assert export_model(path, out) == "images [batch, 3, 32, 32] to logits [batch, 4, 32, 32]"
        for batch in (1, 3):
            images = torch.randn(batch, 3, 32, 32)
            with torch.no_grad():
                expected = model.eval()(images)
                torch.testing.assert_close(reopened(out, images).detach(), expected, rtol=1e-3, atol=1e-4)
        with pytest.raises(ValueError, match="head='class' is for models with a distillation token"):
            export_model(path, out, head="class", overwrite=True)

    def test_errors(self, file, runs, tmp_path):
        _, path = file(distilled=False)
        with pytest.raises(ValueError, match="head='class' is for models with a distillation token"):
            export_model(path, tmp_path / "m.pt2", head="class")
        with pytest.raises(ValueError, match="must be onnx or pt2"):
            export_model(path, tmp_path / "m.bin")
        with pytest.raises(ValueError, match="holds an autoencoder, which is not exported; fine-tune it first"):
            export_model(runs["generic"], tmp_path / "m.pt2")
        (tmp_path / "m.pt2").touch()
        with pytest.raises(FileExistsError, match="--overwrite"):
            export_model(path, tmp_path / "m.pt2")
        assert (tmp_path / "m.pt2").read_bytes() == b""

    def test_without_the_extra(self, file, tmp_path, monkeypatch):
        _, path = file()
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(ImportError, match=r"pip install 'g2sd-vision\[export\]'"):
            export_model(path, tmp_path / "m.onnx")
        assert not (tmp_path / "m.onnx").exists()


# inductor writes and compiles C++ for most of a minute; what our code can break is the graph
@pytest.mark.slow
def test_inductor(vit):
    model, images = vit().eval(), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), **TOLERANCE)
