"""Sweeps of official grids, and exported trees."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tinc.cli import main
from tinc.official import find_recipe, normalise, open_official, plan_tree, save_official
from tinc.official.export import export_tree
from tinc.official.folder import official_state
from tinc.official.model import OctreeMLP
from tinc.official.sweep import run_sweep

GRID = """
Static:
  CompressFramwork:
    Ratio: 1
    Train: {batch_size: 5000, epochs: 2, optimizer: {type: Adamax, lr: 0.001}, weight: [2001, 65535, 0.01]}
    Eval: {batch_size: 4096, epochs: 5}
    Network: {level_info: [[1.0, 3, Sine, equal]], w0: 30, input: 3, output: 1}
Dynamic:
  CONCAT:
    - CompressFramwork: {Ratio: 1}
    - CompressFramwork: {Ratio: 2}
"""


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 60000, (4, 16, 16)).astype(np.uint16)
    np.save(tmp_path / "volume.npy", values)
    return tmp_path / "volume.npy"


def test_sweep(tmp_path: Path, volume: Path) -> None:
    (tmp_path / "grid.yaml").write_text(GRID)
    results = dict(run_sweep(tmp_path / "grid.yaml", volume, tmp_path / "out"))
    assert sorted(results) == ["000", "001"]
    assert results["000"]["parameters"] > results["001"]["parameters"]
    assert open_official(tmp_path / "out" / "001" / "last").side_info.shape == (4, 16, 16, 1)
    kept = (tmp_path / "out" / "results.jsonl").read_text()
    # the second call reads the finished results
    assert dict(run_sweep(tmp_path / "grid.yaml", volume, tmp_path / "out")) == results
    assert (tmp_path / "out" / "results.jsonl").read_text() == kept


def test_onnx(tmp_path: Path, volume: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    normalised, side_info = normalise(np.load(volume)[..., None])
    recipe = find_recipe("multi1")
    model = OctreeMLP(plan_tree(recipe, normalised, 100_000))
    save_official(tmp_path / "folder", model, recipe, side_info=side_info)
    model = open_official(tmp_path / "folder").model
    export_tree(model, tmp_path / "tree.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "tree.onnx"), providers=["CPUExecutionProvider"])
    for count in (5, 32):
        points = torch.arange(count)
        (result,) = session.run(None, {"points": points.numpy()})
        torch.testing.assert_close(torch.from_numpy(result), model(points).detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(FileExistsError, match="--overwrite"):
        export_tree(model, tmp_path / "tree.onnx")


def test_eval(tmp_path: Path, volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder and a file of the same weights have the same PSNR, and ratios count all their bytes."""
    normalised, side_info = normalise(np.load(volume)[..., None])
    recipe = find_recipe("default")
    model = OctreeMLP(plan_tree(recipe, normalised, 100_000))
    save_official(tmp_path / "folder", model, recipe, side_info=side_info)
    save_file(official_state(model), tmp_path / "weights.safetensors")
    result = []
    for name in ("folder", "weights.safetensors"):
        report = tmp_path / f"{name}.json"
        assert main(["eval", str(volume), "--checkpoint", str(tmp_path / name), "--json", str(report)]) == 0
        result.append(json.loads(report.read_text()))
    assert result[0]["psnr"] == result[1]["psnr"]
    size = (tmp_path / "weights.safetensors").stat().st_size
    assert result[1]["ratio"] == pytest.approx(np.load(volume).nbytes / size)
    assert 0 < result[0]["ratio"] < np.load(volume).nbytes / 4 / plan_tree(recipe, normalised, 100_000).num_parameters
