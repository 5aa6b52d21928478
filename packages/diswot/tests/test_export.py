"""Files for other runtimes agree with eager."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from diswot.cli import PACKAGE
from diswot.models import create_network
from diswot.recipes import RECIPES
from diswot.training import train
from visionkernels.tasks import export
from visionkernels.tasks.classification import untrained
from visionkernels.testing.pictures import write_colours
from visionkernels.weights import open_trained, save_weights

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # float32 after some ten layers, in another order of sums


def stored(path, name: str, num_classes: int = 5):
    """Weights with running statistics that an exporter cannot mistake for none."""
    model = create_network(name, num_classes=num_classes)
    for key, buffer in model.named_buffers():
        if "running" in key:
            buffer.uniform_(0.5, 1.5)
    save_weights(path, model.state_dict(), metadata={})
    return model.eval()


def export_model(name, path, *, checkpoint=None, num_classes=None, **options):
    """Write a network as `diswot export` does."""
    if checkpoint is None:
        opened = untrained(name, num_classes, package="diswot")
    else:
        opened = open_trained(checkpoint, package=PACKAGE, model=name)
    return export(opened, path, install="diswot[export]", **options)


def onnx_logits(path, images):
    session = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed").InferenceSession(path)
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def those(fast: tuple[str, ...], slow: tuple[str, ...]) -> list:
    return [*fast, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


OTHERS = (
    "cifar_wrn_16_1", "cifar_mobilenetv2", "cifar_shufflenetv1", "cifar_shufflenetv2", "nb201_diswot", "nb101",
    "zen_cifar_res32_05m", "torchvision:resnet18",
)  # fmt: skip


RES18 = "SuperConvK3BNRELU(3,8,2,1)SuperResK3K3(8,8,2,8,1)"


class TestExportModel:
    @pytest.mark.parametrize("name", those(("s0_111",), (*OTHERS, "test_resnet", "s0:113")))
    def test_onnx(self, tmp_path, name):
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        model = stored(tmp_path / "weights.safetensors", name)
        said = export_model(name, tmp_path / "m.onnx", checkpoint=tmp_path / "weights.safetensors", size=(32, 32))
        assert said == "images [batch, 3, 32, 32] to logits [batch, 5]"
        assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "weights.safetensors"}
        for batch in (1, 3):
            images = torch.randn(batch, 3, 32, 32)
            torch.testing.assert_close(onnx_logits(tmp_path / "m.onnx", images), model(images).detach(), **TOLERANCE)

    @pytest.mark.parametrize("name", those(("s0:113",), (*OTHERS, "test_resnet")))
    def test_pt2(self, tmp_path, name):
        model = stored(tmp_path / "weights.safetensors", name)
        export_model(name, tmp_path / "m.pt2", checkpoint=tmp_path / "weights.safetensors", size=(32, 32))
        extra = {"model.json": ""}
        program = torch.export.load(tmp_path / "m.pt2", extra_files=extra).module()
        described = json.loads(extra["model.json"])
        assert (described["model"], described["num_classes"], described["size"]) == (name, 5, [32, 32])
        for batch in (1, 3):
            images = torch.randn(batch, 3, 32, 32)
            torch.testing.assert_close(program(images), model(images), **TOLERANCE)

    def test_sizes(self, tmp_path, monkeypatch):
        """By default a network's own; `num_classes` sets the number of classes."""
        monkeypatch.setattr("visionkernels.tasks.classification.export_program", lambda *_, **__: None)
        sizes = {"s0:113": 32, "test_resnet": 160, "timm:test_resnet": 160, f"res18:{RES18}": 224}
        for name, size in sizes.items():
            said = export_model(name, tmp_path / "m.pt2", num_classes=4, overwrite=True)
            assert said == f"images [batch, 3, {size}, {size}] to logits [batch, 4]"

    def test_of_a_run(self, tmp_path):
        recipe = RECIPES["mnist5k_plain"]
        fit = replace(recipe.fit, epochs=1, batch_size=16, device="cpu")
        recipe = replace(recipe, data=None, fit=fit, pictures=replace(recipe.pictures, size=16, resize=16))
        result = train(recipe, write_colours(tmp_path / "colours"), tmp_path / "run")
        said = export_model("s0_111", tmp_path / "m.pt2", checkpoint=result.weights)
        assert said == "images [batch, 3, 16, 16] to logits [batch, 3]"

    def test_errors(self, tmp_path):
        with pytest.raises(ValueError, match="format='bin' must be onnx or pt2"):
            export_model("s0_111", tmp_path / "m.bin")
        with pytest.raises(ValueError, match=r"size=\(0, 64\)"):
            export_model("s0_111", tmp_path / "m.pt2", size=(0, 64))
        with pytest.raises(ValueError, match="unknown model 's0_112'"):
            export_model("s0_112", tmp_path / "m.pt2")
        with pytest.raises(ValueError, match="num_classes=0 must be at least 1"):
            export_model("s0_111", tmp_path / "m.pt2", num_classes=0)
        (tmp_path / "m.pt2").touch()
        with pytest.raises(FileExistsError, match="--overwrite"):
            export_model("s0_111", tmp_path / "m.pt2")

    def test_without_the_extra(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(ImportError, match=r"onnxscript is not installed; run: pip install 'diswot\[export\]'"):
            export_model("s0_111", tmp_path / "m.onnx")
        assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s0_111", "nb201_diswot", "cifar_shufflenetv2"])
def test_compiled_is_eager(name):
    model = create_network(name, num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
        torch.testing.assert_close(compiled, model(images), **TOLERANCE)
