"""Training on a small volume: quality and resuming; test_processes kills a run."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tinc.metrics import psnr
from tinc.official import RECIPES, OfficialRecipe, decode, open_official, train
from tinc.official.training import TrainResult
from tinc.recipes import Scheduler

pytest.importorskip("accelerate", reason="the folder of a run names its version")

RECIPE = replace(
    RECIPES["multi1"], ratio=1.0, batch_size=8 * 520, epochs=30, eval_epochs=7, lr=1e-2,
    scheduler=Scheduler(arguments=(("milestones", (12, 20)), ("gamma", 0.5))),
)  # fmt: skip


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "volume.npy"
    axes = np.meshgrid(*(np.linspace(0, 3, size) for size in (8, 16, 16)), indexing="ij")
    np.save(path, (1000 + 800 * np.sin(axes[0]) * np.cos(axes[1] + axes[2])).astype(np.uint16))
    return path


@pytest.fixture(scope="module")
def undisturbed(volume: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(RECIPE, volume, tmp_path_factory.mktemp("runs") / "whole", save_every_steps=4)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*-[WB]")}


class TestTrain:
    def test_result(self, undisturbed: TrainResult, volume: Path) -> None:
        assert [(entry["step"], entry["epoch"]) for entry in undisturbed.history] == [
            (8, 7), (15, 14), (22, 21), (29, 28), (30, 30)
        ]  # fmt: skip
        loaded = open_official(undisturbed.last)
        original = np.load(volume)[..., None]
        assert psnr(original, decode(loaded.model, loaded.side_info)) == undisturbed.psnr
        assert undisturbed.best_psnr == max(entry["psnr"] for entry in undisturbed.history)
        best = open_official(undisturbed.best)
        assert psnr(original, decode(best.model, best.side_info)) == undisturbed.best_psnr
        assert undisturbed.parameters == sum(item.numel() for item in loaded.model.parameters())
        assert undisturbed.ratio == volume.stat().st_size / (4 * undisturbed.parameters) > undisturbed.folder_ratio
        assert undisturbed.psnr > undisturbed.psnr_values

    def test_description(self, undisturbed: TrainResult) -> None:
        run = json.loads((undisturbed.last.parent / "run.json").read_text())
        assert run["recipe"]["levels"][1]["layers"] == 3 and run["trained"]["details"]["volume"]["shape"] == [
            8,
            16,
            16,
            1,
        ]

    def test_learns(self, volume: Path, tmp_path: Path) -> None:
        """The tree is clearly better than the mean, with fewer parameters than voxels."""
        recipe = replace(RECIPES["multi0"], ratio=4.0, batch_size=2048, epochs=400, lr=1e-2, normal_max=1.0, w0=5.0)
        result = train(recipe, volume, tmp_path / "run")
        original = np.load(volume)
        baseline = psnr(original, np.full_like(original, original.mean()))
        assert result.psnr > baseline + 10

    def test_mended(self, volume: Path, tmp_path: Path) -> None:
        result = train(replace(RECIPE, compat="none", batch_size=64, epochs=1), volume, tmp_path / "run")
        assert len(result.history) == 1 and result.history[0]["step"] == 32

    def test_bf16(self, undisturbed: TrainResult, volume: Path, tmp_path: Path) -> None:
        result = train(RECIPE, volume, tmp_path / "run", precision="bf16")
        assert result.psnr == pytest.approx(undisturbed.psnr, abs=1)
        assert weights(result.last) != weights(undisturbed.last)

    def test_other_types(self, tmp_path: Path) -> None:
        np.save(tmp_path / "volume.npy", np.arange(8 * 8 * 8, dtype=np.int32).reshape(8, 8, 8))
        result = train(replace(RECIPE, epochs=1), tmp_path / "volume.npy", tmp_path / "run")
        assert result.psnr == result.psnr_values


class TestResume:
    def test_finished(self, undisturbed: TrainResult, volume: Path) -> None:
        before = weights(undisturbed.last)
        assert train(RECIPE, volume, undisturbed.last.parent) == undisturbed
        assert weights(undisturbed.last) == before

    def test_another_run(self, undisturbed: TrainResult, volume: Path) -> None:
        with pytest.raises(ValueError, match=r"holds another run: ratio was 1.0, now 2.0"):
            train(replace(RECIPE, ratio=2.0), volume, undisturbed.last.parent)

    def test_interrupt(self, volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from tinc.official import training

        draw, drawn = training.draw_points, []

        def interrupted(*args, **kwargs) -> torch.Tensor:
            drawn.append(1)
            if len(drawn) == 10:
                signal.raise_signal(signal.SIGINT)
            return draw(*args, **kwargs)

        monkeypatch.setattr(training, "draw_points", interrupted)
        with pytest.raises(KeyboardInterrupt, match="stopped at step 10"):
            train(RECIPE, volume, tmp_path / "run")
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()][-1].endswith("10")
        train(RECIPE, volume, tmp_path / "run")
        assert len(drawn) == 30


@pytest.mark.slow
def test_two_processes_end_like_one(volume: Path, tmp_path: Path) -> None:
    """Plain gradient descent shows a wrong scale of the gradients."""
    recipe = replace(
        RECIPE, optimizer="SGD", lr=1e-6, epochs=8, eval_epochs=2, scheduler=Scheduler(name="none", arguments=())
    )
    (tmp_path / "child.py").write_text(
        "import sys\nfrom tinc.recipes import *\nfrom tinc.official import train\n"
        f"train({recipe!r}, sys.argv[1], sys.argv[2], save_every_steps=4)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    command = [*launch, tmp_path / "child.py", volume, tmp_path / "run"]
    ran = subprocess.run(command, env=variables, timeout=120, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    single = train(recipe, volume, tmp_path / "single")
    one, two = (dict(open_official(item).model.node_parameters()) for item in (single.last, tmp_path / "run" / "last"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    logged = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in single.history]
    assert logged == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [({"batch_size": 4096}, "gives each of the 8 leaves 512 points"), ({"output": 2}, "output=2 must be 1"),
         ({"ratio": 1e5, "compat": "none"}, "largest reachable ratio")],
    )  # fmt: skip
    def test_recipe(self, volume: Path, tmp_path: Path, change: dict, message: str) -> None:
        recipe: OfficialRecipe = replace(RECIPE, **change)
        with pytest.raises(ValueError, match=message):
            train(recipe, volume, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_arguments(self, volume: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="precision='fp8' must be one of 'no', 'bf16'"):
            train(RECIPE, volume, tmp_path / "run", precision="fp8")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="save_every_steps=0"):
            train(RECIPE, volume, tmp_path / "run", save_every_steps=0)

    def test_volume(self, tmp_path: Path) -> None:
        np.save(tmp_path / "constant.npy", np.ones((8, 8, 8), np.uint8))
        with pytest.raises(ValueError, match="constant"):
            train(RECIPE, tmp_path / "constant.npy", tmp_path / "run")

    def test_divergence(self, volume: Path, tmp_path: Path) -> None:
        recipe = replace(RECIPE, optimizer="SGD", lr=1e30, scheduler=Scheduler(name="none", arguments=()))
        with pytest.raises(FloatingPointError, match=r"the loss of step \d+ is (nan|inf)"):
            train(recipe, volume, tmp_path / "run")
