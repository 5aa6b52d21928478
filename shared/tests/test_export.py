"""Files for other runtimes give what the model gives, for any number of items."""

import json
import sys

import pytest
import torch
from torch import nn

from visionkernels.export import export_program

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 5))


def batches():
    return [torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count)) for count in (1, 3)]


class TestExportProgram:
    def test_onnx(self, model, tmp_path):
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        export_program(model, torch.zeros(2, 3, 8, 8), tmp_path / "m.onnx", install="x[export]", names=("in", "out"))
        assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
        session = runtime.InferenceSession(tmp_path / "m.onnx")
        assert [each.name for each in session.get_outputs()] == ["out"]
        for images in batches():
            found = torch.from_numpy(session.run(None, {"in": images.numpy()})[0])
            torch.testing.assert_close(found, model(images).detach(), **TOLERANCE)

    def test_pt2(self, model, tmp_path):
        export_program(
            model, torch.zeros(2, 3, 8, 8), tmp_path / "m.bin", install="", format="pt2", description={"a": 1}
        )
        extra = {"model.json": ""}
        program = torch.export.load(tmp_path / "m.bin", extra_files=extra).module()
        assert json.loads(extra["model.json"]) == {"a": 1}
        for images in batches():
            torch.testing.assert_close(program(images), model(images), **TOLERANCE)

    def test_errors(self, model, tmp_path, monkeypatch):
        example = torch.zeros(2, 3, 8, 8)
        with pytest.raises(ValueError, match="format='bin' must be onnx or pt2"):
            export_program(model, example, tmp_path / "m.bin", install="")
        with pytest.raises(ValueError, match=r"example has shape \[1, 3, 8, 8\]"):
            export_program(model, example[:1], tmp_path / "m.pt2", install="")
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(ImportError, match=r"onnxscript is not installed; run: pip install 'x\[export\]'"):
            export_program(model, example, tmp_path / "m.onnx", install="x[export]")
        assert not list(tmp_path.iterdir())
        (tmp_path / "m.pt2").touch()
        with pytest.raises(FileExistsError, match="--overwrite"):
            export_program(model, example, tmp_path / "m.pt2", install="")
