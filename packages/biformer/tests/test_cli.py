"""The command as a user gives it: results, exit codes, one-line errors, and a run that survives a kill."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from biformer.cli import main
from biformer.official import load_model
from biformer.recipes import RECIPES
from visionkernels.weights import read_checkpoint


def biformer(*argv):
    return main([str(argument) for argument in argv])


def fails(capsys, *argv):
    """Run a command with wrong input and return its single line on stderr."""
    code = biformer(*argv)
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    assert err.startswith("biformer: error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "red.png"
    Image.fromarray(np.full((50, 40, 3), (200, 60, 60), dtype=np.uint8)).save(path)
    return path


class TestHelp:
    @pytest.mark.parametrize(
        "command", ["train", "eval", "classify", "attend", "info", "reproduce", "bench", "export", "convert"]
    )
    def test_fits_a_screen(self, capsys, monkeypatch, command):
        monkeypatch.setenv("COLUMNS", "80")
        assert biformer(command, "--help") == 0
        assert len(capsys.readouterr().out.splitlines()) <= 40

    def test_version(self, capsys):
        assert biformer("--version") == 0
        assert capsys.readouterr().out == f"biformer {version('biformer')}\n"

    @pytest.mark.slow
    def test_as_a_module(self):
        ran = subprocess.run([sys.executable, "-m", "biformer", "--help"], capture_output=True, text=True)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert "  train " in ran.stdout


class TestTrain:
    def test_prints_metrics_beside_the_trivial(self, capsys, pictures, micro, save_recipe, tmp_path):
        recipe = save_recipe(micro)
        assert biformer("train", recipe, "--data", pictures, "--out", tmp_path / "run", "--epochs", 1) == 0
        out = capsys.readouterr().out
        assert "\ntop-1 " in out
        assert "always the most frequent class: top-1 33.33 %" in out
        assert f"weights: {tmp_path}/run/weights.safetensors" in out
        run = json.loads((tmp_path / "run" / "run.json").read_text())
        assert run["recipe"]["epochs"] == 1
        assert run["trained"]["settings"]["pictures"]["size"] == 32

    def test_flags(self, pictures, micro, save_recipe, tmp_path):
        flags = ["--batch-size", 8, "--epochs", 1, "--accumulation-steps", 2, "--precision", "bf16", "--seed", 3]
        assert biformer("train", save_recipe(micro), "--data", pictures, "--out", tmp_path / "run", *flags) == 0
        recipe = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]
        assert (recipe["batch_size"], recipe["accumulation_steps"], recipe["precision"]) == (8, 2, "bf16")
        assert recipe["seed"] == 3
        assert recipe["optimizer"]["lr"] == micro.fit.optimizer.lr / 2

    def test_teacher(self, pictures, micro, weights, save_recipe, tmp_path):
        teacher = ["--teacher", weights, "--distillation", "soft", "--epochs", 1]
        assert biformer("train", save_recipe(micro), "--data", pictures, "--out", tmp_path / "run", *teacher) == 0
        run = json.loads((tmp_path / "run" / "run.json").read_text())
        assert run["trained"]["settings"]["distillation"]["kind"] == "soft"

    @pytest.mark.slow  # shared/tests/test_training.py kills the same loop
    def test_killed_run_ends_the_same(self, pictures, micro, save_recipe, tmp_path):
        recipe = replace(micro, fit=replace(micro.fit, epochs=3, save_every_updates=2, ema_decay=0.9))
        command = ["train", save_recipe(recipe), "--data", pictures, "--out"]
        assert biformer(*command, tmp_path / "whole") == 0
        child = multiprocessing.get_context("fork").Process(
            target=killed_at_update, args=(5, *command, tmp_path / "cut")
        )
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert not (tmp_path / "cut" / "weights.safetensors").exists()
        assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] != []
        assert biformer(*command, tmp_path / "cut") == 0
        for name in ("weights.safetensors", "ema.safetensors"):
            ours, whole = (read_checkpoint(tmp_path / run / name).state for run in ("cut", "whole"))
            torch.testing.assert_close(ours, whole, rtol=0, atol=0)

    def test_another_run(self, capsys, pictures, micro, save_recipe, weights):
        options = ["--data", pictures, "--out", weights.parent, "--seed", 5]
        assert "holds another run: seed was 0, now 5" in fails(capsys, "train", save_recipe(micro), *options)

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["biformer_tiny_in1"], "unknown recipe 'biformer_tiny_in1'; did you mean 'biformer_tiny_in1k'? known: "),
            (["biformer_tiny_in1k"], "has no built-in data; give --data FOLDER"),
            (["biformer_tiny_in1k", "--data", "/nowhere"], "--data /nowhere does not exist; it must hold train/CLASS"),
            (["biformer_tiny_in1k", "--data", "tfds/x"], "--data tfds/x is a stream"),
            (["biformer_tiny_in1k", "--data", "wds/nowhere"], "nowhere is not a folder of WebDataset shards"),
            (["nowhere/run.json"], "nowhere/run.json: No such file or directory"),
            (["biformer_tiny_in1k", "--batch-size", "0"], "batch_size=0 must be at least 1"),
            (["biformer_tiny_in1k", "--epochs", "0"], "epochs=0 must be at least 1"),
            (["biformer_tiny_in1k", "--epochs", "many"], "--epochs"),
            (["biformer_tiny_in1k", "--precision", "fp8"], "fp8"),
            (["biformer_tiny_in1k", "--seed", "-1"], "seed=-1 must be at least 0"),
            (["biformer_micro_mnist5k", "--init", "nowhere.pth"], "nowhere.pth is not a file"),
            (["biformer_micro_mnist5k", "--teacher", "nowhere"], "unknown model 'nowhere'"),
        ],
    )
    def test_errors(self, capsys, tmp_path, argv, message):
        assert message in fails(capsys, "train", *argv, "--out", tmp_path)

    def test_broken_picture(self, capsys, pictures, micro, save_recipe, tmp_path):
        for split in ("train", "val"):
            (tmp_path / "data").mkdir(exist_ok=True)
            (tmp_path / "data" / split).symlink_to(pictures / split)
        (tmp_path / "data" / "train").unlink()
        for name in ("blue", "green", "red"):
            (tmp_path / "data" / "train" / name).mkdir(parents=True)
            for number in range(8):
                (tmp_path / "data" / "train" / name / f"{number}.png").write_bytes(b"broken")
        options = ["--data", tmp_path / "data", "--out", tmp_path / "run", "--workers", 1]
        assert "train/" in fails(capsys, "train", save_recipe(micro), *options)

    def test_without_the_extra(self, capsys, monkeypatch, pictures, micro, save_recipe, tmp_path):
        monkeypatch.setitem(sys.modules, "torchmetrics", None)
        said = fails(capsys, "train", save_recipe(micro), "--data", pictures, "--out", tmp_path / "run")
        assert "torchmetrics is not installed; run: pip install 'biformer[train]'" in said


def killed_at_update(update, *command):
    """Train in a process that kills itself when it begins this update."""
    from biformer.task import ClassifierTask

    forward, left = ClassifierTask.forward, [update]

    def die(self, *arguments):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return forward(self, *arguments)

    ClassifierTask.forward = die
    biformer(*command)


class TestEval:
    def test_agrees_with_training(self, capsys, weights, pictures, tmp_path):
        assert biformer("eval", "--checkpoint", weights, "--data", pictures, "--json", tmp_path / "eval.json") == 0
        out = capsys.readouterr().out
        assert "\n12 images\n" in out
        assert "always the most frequent class: top-1 33.33 %" in out
        measured = json.loads((tmp_path / "eval.json").read_text())
        logged = json.loads((weights.parent / "log.jsonl").read_text().splitlines()[-1])
        assert (measured["top1"], measured["loss"]) == (logged["top1"], pytest.approx(logged["val_loss"], rel=1e-5))

    def test_errors(self, capsys, weights, pictures, tmp_path):
        assert "nowhere.pth is not a file" in fails(capsys, "eval", "--checkpoint", "nowhere.pth", "--data", pictures)
        assert "--data /nowhere does not exist" in fails(capsys, "eval", "--checkpoint", weights, "--data", "/nowhere")
        strange = ["eval", "--checkpoint", weights, "--data", pictures, "--device", "toaster"]
        assert "device='toaster' cannot be used" in fails(capsys, *strange)
        (tmp_path / "eval.json").touch()
        kept = ["eval", "--checkpoint", weights, "--data", pictures, "--json", tmp_path / "eval.json"]
        assert "eval.json exists; pass --overwrite" in fails(capsys, *kept)
        assert (tmp_path / "eval.json").read_text() == ""


class TestClassify:
    def test_names(self, capsys, weights, picture, tmp_path):
        assert biformer("classify", picture, picture, "--checkpoint", weights, "--json", tmp_path / "classes.json") == 0
        out = capsys.readouterr().out
        assert out.count(f"{picture}\n") == 2
        ranked = json.loads((tmp_path / "classes.json").read_text())[str(picture)]
        assert sorted(prediction["name"] for prediction in ranked) == ["blue", "green", "red"]
        assert sum(prediction["probability"] for prediction in ranked) == pytest.approx(1)

    def test_imagenet_names(self, capsys, picture, tmp_path):
        from visionkernels.weights import save_weights

        model = load_random(num_classes=1000)
        metadata = {"model_name": "biformer_tiny", "model_options": json.dumps(MICRO | {"num_classes": 1000})}
        save_weights(tmp_path / "w.safetensors", model.state_dict(), metadata=metadata)
        with torch.no_grad():
            model.head.fc.bias[1] += 50
        save_weights(tmp_path / "w.safetensors", model.state_dict(), metadata=metadata, overwrite=True)
        assert biformer("classify", picture, "--checkpoint", tmp_path / "w.safetensors", "--top", 1) == 0
        assert "goldfish" in capsys.readouterr().out

    def test_errors(self, capsys, weights, picture, tmp_path):
        assert "no weights are published any more" in fails(capsys, "classify", picture)
        assert "IMAGE is missing" in fails(capsys, "classify", "--checkpoint", weights)
        assert "none.png is not a file" in fails(capsys, "classify", tmp_path / "none.png", "--checkpoint", weights)
        (tmp_path / "bad.png").write_bytes(picture.read_bytes()[:60])
        said = fails(capsys, "classify", tmp_path / "bad.png", "--checkpoint", weights)
        assert f"picture {tmp_path}/bad.png cannot be read" in said
        assert "top=0 must be at least 1" in fails(capsys, "classify", picture, "--checkpoint", weights, "--top", 0)


MICRO = {"depth": [1] * 4, "embed_dim": [32] * 4, "topks": [1, 2, 4, -2], "n_win": 2}


def load_random(**options):
    import timm

    return timm.create_model("biformer_tiny", **MICRO, **options).eval()


class TestAttend:
    @pytest.fixture(autouse=True)
    def plots(self):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")

    def test_draws(self, capsys, weights, picture, tmp_path):
        out = tmp_path / "attention.png"
        query = ["--query", 20, 10, "--layer", "stages.2.0", "--checkpoint", weights, "--out", out]
        assert biformer("attend", picture, *query) == 0
        assert capsys.readouterr().out == f"{out}\n"
        with Image.open(out) as drawn:
            assert drawn.width > 100

    def test_errors(self, capsys, weights, picture, tmp_path):
        common = [picture, "--query", 20, 10, "--out", tmp_path / "a.png"]
        assert "--random-weights to draw an untrained model" in fails(capsys, "attend", *common)
        odd = [picture, "--query", 20, 10, "--checkpoint", weights, "--out", tmp_path / "a.xyz"]
        assert "a.xyz' must be a name that ends in .png or .svg or .pdf" in fails(capsys, "attend", *odd)
        both = ["--checkpoint", weights, "--random-weights"]
        assert "exclude each other" in fails(capsys, "attend", *common, *both)
        unknown = ["--random-weights", "--model", "biformer_tin"]
        assert "did you mean 'biformer_tiny'?" in fails(capsys, "attend", *common, *unknown)
        outside = [picture, "--query", 50, 10, "--out", tmp_path / "a.png", "--checkpoint", weights]
        assert "query=50 10 is outside" in fails(capsys, "attend", *outside)
        assert not list(tmp_path.glob("*.png"))


class TestInfo:
    def test_all(self, capsys, tmp_path, monkeypatch):
        names = ("biformer_tiny", "biformer_stl")
        monkeypatch.setattr("biformer.official.MODEL_NAMES", names)
        assert biformer("info", "--json", tmp_path / "info.json") == 0
        out = capsys.readouterr().out
        assert all(name in out for name in (*names, *RECIPES))
        models = {model["name"]: model for model in json.loads((tmp_path / "info.json").read_text())}
        assert models["biformer_tiny"]["parameters"] == 13_142_760
        assert models["biformer_tiny"]["flops"] / 1e9 == pytest.approx(2.22804, abs=1e-5)

    def test_one_at_a_size(self, capsys):
        assert biformer("info", "biformer_small", "--size", 448, 224) == 0
        out = capsys.readouterr().out
        assert "448 x 224" in out and "25,536,232 parameters" in out
        assert "stride 16  18 blocks   256 channels  7 x 7 regions, each attends to 16" in out
        assert "none are published any more" in out

    def test_recipe_at_its_own_size(self, capsys):
        assert biformer("info", "biformer_micro_mnist5k") == 0
        assert "1,459,338 parameters, 0.020 G operations at 64 x 64" in capsys.readouterr().out

    def test_errors(self, capsys):
        assert "did you mean 'biformer_small'?" in fails(capsys, "info", "biformer_smal")
        assert "size=(0, 224) must be at least 1 x 1" in fails(capsys, "info", "--size", 0, 224)


class TestExport:
    @pytest.mark.slow
    def test_program(self, capsys, weights, tmp_path):
        assert biformer("export", "--checkpoint", weights, "--out", tmp_path / "m.pt2") == 0
        assert "images [batch, 3, 32, 32]" in capsys.readouterr().out
        images = torch.randn(2, 3, 32, 32)
        program = torch.export.load(tmp_path / "m.pt2").module()
        torch.testing.assert_close(program(images), load_model(weights)(images), rtol=1e-4, atol=1e-5)

    def test_errors(self, capsys, weights, tmp_path):
        assert "must be onnx or pt2" in fails(capsys, "export", "--checkpoint", weights, "--out", tmp_path / "m.bin")
        (tmp_path / "m.onnx").touch()
        assert "--overwrite" in fails(capsys, "export", "--checkpoint", weights, "--out", tmp_path / "m.onnx")


class TestConvert:
    def test_errors(self, capsys, weights, tmp_path):
        assert "none.pth is not a file" in fails(capsys, "convert", "none.pth", tmp_path / "x.safetensors")
        (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04 damaged")
        said = fails(capsys, "convert", tmp_path / "damaged.pth", tmp_path / "x.safetensors")
        assert "damaged.pth is damaged or no checkpoint" in said
        (tmp_path / "x.safetensors").touch()
        assert "--overwrite" in fails(capsys, "convert", Path("none.pth"), tmp_path / "x.safetensors")
