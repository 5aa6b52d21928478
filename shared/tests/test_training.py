"""Also a script, for runs in several processes: `torchrun --nproc_per_node=2 test_training.py RUN_DIR`."""

import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.task import ClassificationTask, TrainingTask
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from visionkernels.checkpoints import read_state
from visionkernels.training import FitRecipe, OptimizerRecipe, ScheduleRecipe, TrainingData, fit
from visionkernels.training.batches import BatchPlan
from visionkernels.training.folder import RunFolder
from visionkernels.training.optimization import LearningRate, create_optimizer

SAMPLES, FEATURES, CLASSES = 52, 6, 3
RECIPE = FitRecipe(
    epochs=3,  # of 6 updates
    batch_size=8,
    optimizer=OptimizerRecipe(lr=0.02, clip_norm=1.0),
    schedule=ScheduleRecipe(unit="update", warmup=4),
    device="cpu",
)


class NoisySamples(Dataset):
    """Augmented by all three generators."""

    def __init__(self):
        generator = np.random.default_rng(0)
        self.labels = torch.arange(SAMPLES) % CLASSES
        noise = torch.tensor(generator.normal(size=(SAMPLES, FEATURES)), dtype=torch.float32)
        self.inputs = noise + self.labels[:, None]

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(FEATURES)  # noqa: NPY002 - as augmentations do
        return self.inputs[index] + 0.1 * noise, self.labels[index]


def build(norm=nn.BatchNorm1d, dropout=0.1):
    torch.manual_seed(7)
    width = 8
    layers = [nn.Linear(FEATURES, width), norm(width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, CLASSES)]
    return ClassificationTask(nn.Sequential(*layers), verbose=False)


def accuracy(model):
    data = NoisySamples()
    return {"top1": (model(data.inputs).argmax(1) == data.labels).float().mean().item()}


def run(folder, recipe=RECIPE, *, task=None, **data):
    data = {"train": NoisySamples(), "evaluate": accuracy, **data}
    return fit(task or build(), recipe, TrainingData(**data), folder)


def assert_same(left, right, **tolerances):
    tolerances = tolerances or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(read_state(left).state, read_state(right).state, **tolerances)


class At:
    """A batch_transform that acts at one micro-step of the process."""

    def __init__(self, micro_step, action):
        self.left, self.action = micro_step, action

    def __call__(self, batch):
        self.left -= 1
        return (self.action(batch) or batch) if self.left == -1 else batch


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)


def run_in_child(*args, **kwargs):
    child = multiprocessing.get_context("fork").Process(target=run, args=args, kwargs=kwargs)
    child.start()
    child.join()
    return child.exitcode


# what could disturb a resumed run: (changes of the recipe, micro-steps before the kill)
HARD = replace(RECIPE, num_workers=2, accumulation_steps=2, ema_decay=0.9, save_every_updates=2, precision="bf16")
KILLS = {
    "first-epoch": (replace(RECIPE, save_every_updates=1), 4),
    "before-any-checkpoint": (RECIPE, 3),
    "second-epoch-workers-accumulation-ema-bf16": (HARD, 2 * 9 + 1),
    "after-an-epoch": (replace(RECIPE, ema_decay=0.9), 12),
}


class TestResume:
    @pytest.mark.parametrize(("recipe", "micro_steps"), KILLS.values(), ids=KILLS)
    def test_killed_run_ends_the_same(self, tmp_path, recipe, micro_steps):
        whole = run(tmp_path / "whole", recipe)
        assert run_in_child(tmp_path / "cut", recipe, batch_transform=At(micro_steps, kill)) == -signal.SIGKILL
        assert not (tmp_path / "cut/weights.safetensors").exists()
        resumed = run(tmp_path / "cut", recipe)
        assert_same(resumed.weights, whole.weights)
        if recipe.ema_decay:
            assert_same(resumed.ema_weights, whole.ema_weights)
        assert resumed.history == whole.history
        assert [entry["epoch"] for entry in resumed.history] == [1, 2, 3]

    @pytest.mark.parametrize("moment", ["publish", "write_history", "claim"])
    def test_killed_while_writing(self, tmp_path, monkeypatch, moment):
        whole = run(tmp_path / "whole")
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, moment, kill)
            assert run_in_child(tmp_path / "cut") == -signal.SIGKILL
        resumed = run(tmp_path / "cut")
        assert_same(resumed.weights, whole.weights)
        assert resumed.history == whole.history
        assert not list((tmp_path / "cut/checkpoints").glob(".*"))

    @pytest.mark.slow
    def test_killed_at_any_time(self, tmp_path):
        recipe = replace(HARD, epochs=20, save_every_updates=1)
        whole = run(tmp_path / "whole", recipe)
        moments = random.Random(0)
        context = multiprocessing.get_context("fork")
        for _ in range(12):
            child = context.Process(target=run, args=(tmp_path / "cut", recipe))
            child.start()
            child.join(moments.uniform(0.2, 1.5))
            child.kill()
            child.join()
        assert_same(run(tmp_path / "cut", recipe).weights, whole.weights)

    def test_number_of_workers_does_not_matter(self, tmp_path):
        one = run(tmp_path / "0", RECIPE)
        two = run(tmp_path / "2", replace(RECIPE, num_workers=2))
        assert_same(one.weights, two.weights)

    def test_ctrl_c_saves_and_says_how_to_go_on(self, tmp_path):
        recipe = replace(RECIPE, num_workers=2, accumulation_steps=2)
        whole = run(tmp_path / "whole", recipe)
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt, match=r"saved after update 8 of 18; the same command goes on"):
            run(tmp_path / "cut", recipe, batch_transform=At(2 * 7, interrupt))
        assert signal.getsignal(signal.SIGINT) is handler
        assert_same(run(tmp_path / "cut", recipe).weights, whole.weights)

    def test_ctrl_c_in_the_last_update_of_an_epoch(self, tmp_path):
        whole = run(tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt, match="after update 6"):
            run(tmp_path / "cut", batch_transform=At(5, interrupt))
        resumed = run(tmp_path / "cut")
        assert_same(resumed.weights, whole.weights)
        assert resumed.history == whole.history

    def test_finished_run_is_only_read(self, tmp_path):
        first = run(tmp_path)
        again = run(tmp_path, batch_transform=At(0, lambda batch: pytest.fail("must not train")))
        assert again == first

    def test_another_recipe_is_refused(self, tmp_path):
        run(tmp_path, replace(RECIPE, epochs=1))
        other = replace(RECIPE, epochs=2, optimizer=replace(RECIPE.optimizer, lr=0.5), num_workers=1)
        with pytest.raises(ValueError, match=r"another run: epochs was 1, now 2, optimizer\.lr was 0\.02, now 0\.5;"):
            run(tmp_path, other)

    def test_task_without_trainable_module(self, tmp_path):
        with pytest.raises(TypeError, match="TrainingTask must have trainable_module"):
            run(tmp_path, task=TrainingTask())


class TestNumbers:
    def test_accumulation_is_one_large_batch(self, tmp_path):
        task = {"norm": nn.LayerNorm, "dropout": 0.0}
        one = run(tmp_path / "1", task=build(**task))
        two = run(tmp_path / "2", replace(RECIPE, accumulation_steps=2), task=build(**task))
        assert_same(one.weights, two.weights, rtol=1e-5, atol=1e-6)

    def test_ema(self, tmp_path):
        seen = []
        task = build()
        recipe = replace(RECIPE, ema_decay=0.75)

        def note(module, args):
            if module.training:
                seen.append(module[0].weight.detach().clone())

        task.trainable_module.register_forward_pre_hook(note)
        result = run(tmp_path, recipe, task=task)
        states = [*seen[1:], read_state(result.weights).state["0.weight"]]  # the first forward sees the start
        average = seen[0]
        for state in states:
            average = 0.75 * average + 0.25 * state
        torch.testing.assert_close(read_state(result.ema_weights).state["0.weight"], average)

    @pytest.mark.parametrize("precision", ["no", "bf16"])
    def test_learns_and_losses_are_float32(self, tmp_path, precision):
        seen = set()

        def loss(logits, labels):
            seen.add((logits.dtype, nn.functional.cross_entropy(logits, labels).dtype))
            return nn.functional.cross_entropy(logits, labels)

        task = ClassificationTask(build().trainable_module, loss, verbose=False)
        result = run(tmp_path, replace(RECIPE, epochs=8, precision=precision), task=task)
        assert result.metrics["top1"] > 0.6  # chance is 0.35
        assert result.history[0]["loss"] > result.history[-1]["loss"]
        assert seen == {(torch.float32, torch.float32)}

    def test_bf16_computes_in_bf16(self, tmp_path):
        task, seen = build(), []
        task.trainable_module[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        run(tmp_path, replace(RECIPE, epochs=1, precision="bf16"), task=task)
        assert set(seen) == {torch.bfloat16}
        assert read_state(tmp_path / "weights.safetensors").state["0.weight"].dtype == torch.float32

    def test_norm_eval(self, tmp_path):
        result = run(tmp_path, replace(RECIPE, norm_eval=True))
        state = read_state(result.weights).state
        assert int(state["1.num_batches_tracked"]) == 0
        torch.testing.assert_close(state["1.running_mean"], torch.zeros(8))

    def test_updates_end_in_mid_epoch(self, tmp_path):
        result = run(tmp_path, replace(RECIPE, epochs=None, updates=8))
        assert [entry["update"] for entry in result.history] == [6, 8]

    def test_order_is_a_function_of_the_epoch(self, tmp_path):
        class Indices(NoisySamples):
            def __getitem__(self, index):
                return (index, *super().__getitem__(index))

        seen = []

        def split(batch):
            seen.extend(batch[0].tolist())
            return batch[1:]

        def order(epoch):
            return [index // 3 + epoch for index in range(16)]

        run(tmp_path, replace(RECIPE, epochs=2), train=Indices(), order=order, batch_transform=split)
        assert seen == order(0) + order(1)

    def test_not_finite_loss_names_update_and_samples(self, tmp_path):
        class Broken(NoisySamples):
            def __getitem__(self, index):
                value, label = super().__getitem__(index)
                return (value * math.nan if index == 11 else value), label

        with pytest.raises(
            FloatingPointError, match=r"not finite at update 7 \(epoch 2\), samples \[8, 9, 10, 11, .*epoch-00001"
        ):
            run(
                tmp_path, train=Broken(), order=lambda epoch: [index % 52 for index in range(52)] if epoch else [0] * 52
            )

    @pytest.mark.parametrize(
        ("launcher", "variables"),
        [
            (["torch.distributed.run", "--nproc_per_node=2"], {}),
            pytest.param(
                ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"],
                {"ACCELERATE_USE_CPU": "1"},
                marks=pytest.mark.slow,
            ),
        ],
        ids=["torchrun", "accelerate"],
    )
    def test_two_processes_end_like_one(self, tmp_path, launcher, variables):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        command = [sys.executable, "-m", *launcher, __file__, tmp_path / "2"]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        one = script(tmp_path / "1")
        assert json.loads((tmp_path / "2/run.json").read_text())["processes"] == 2
        assert_same(tmp_path / "2/weights.safetensors", one.weights, rtol=0, atol=1e-6)
        assert_same(tmp_path / "2/ema.safetensors", one.ema_weights, rtol=0, atol=1e-6)
        two = RunFolder(tmp_path / "2").history()
        for ours, theirs in zip(one.history, two, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)

    def test_launch_that_starts_one_process_only(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        run(tmp_path, replace(RECIPE, epochs=1))
        assert "use torchrun" in caplog.text


class CleanSamples(NoisySamples):
    def __getitem__(self, index):
        return self.inputs[index], self.labels[index]


def script(folder):
    """What both one and two processes run: no BatchNorm and no dropout, which see the batch or the rank."""
    torch.set_num_threads(1)
    recipe = replace(RECIPE, accumulation_steps=2, ema_decay=0.9, save_every_updates=4)
    return run(folder, recipe, task=build(nn.LayerNorm, dropout=0.0), train=CleanSamples())


class TestRunFolder:
    def test_files(self, tmp_path):
        recipe = replace(RECIPE, ema_decay=0.9, keep_checkpoints=1, best_metric="top1", trackers=("tensorboard",))
        pytest.importorskip("tensorboard", reason="tensorboard is not installed")
        result = fit(build(), recipe, TrainingData(train=NoisySamples(), evaluate=accuracy), tmp_path, details={"a": 1})
        assert len(list((tmp_path / "checkpoints").iterdir())) == 1
        assert list(tmp_path.rglob("events.out.tfevents*"))
        described = json.loads((tmp_path / "run.json").read_text())
        assert described["recipe"]["optimizer"]["lr"] == 0.02
        assert described["details"] == {"a": 1}
        assert {"versions", "git", "device", "command", "processes"} <= described.keys()
        metadata = read_state(result.weights).metadata
        assert (metadata["a"], metadata["update"]) == ("1", "18")
        best = max(result.history, key=lambda entry: entry["top1"])
        assert read_state(tmp_path / "best.safetensors").metadata["update"] == str(best["update"])
        assert {"loss", "lr", "top1", "ema_top1"} <= result.metrics.keys()

    def test_task_is_given_back_unwrapped(self, tmp_path):
        task = build()
        module = task.trainable_module
        run(tmp_path, replace(RECIPE, precision="bf16"), task=task)
        assert task.trainable_module is module
        assert module(torch.zeros(2, FEATURES)).dtype == torch.float32


class TestBatchPlan:
    @staticmethod
    def plans(processes, accumulation_steps):
        data = TrainingData(train=TensorDataset(torch.arange(50)))
        sizes = {"batch_size": 12, "accumulation_steps": accumulation_steps, "processes": processes}
        return [BatchPlan(data, seed=3, rank=rank, **sizes) for rank in range(processes)]

    @pytest.mark.parametrize(("processes", "accumulation_steps"), [(1, 2), (2, 1), (3, 2), (2, 3)])
    def test_processes_share_the_same_updates(self, processes, accumulation_steps):
        (whole,) = self.plans(1, 1)
        expected = [set(batch[0].tolist()) for batch in whole.loader(1, 0, workers=0, pin_memory=False)]
        assert len(expected) == 4
        assert len(set.union(*expected)) == 48
        parts = [set() for _ in expected]
        for plan in self.plans(processes, accumulation_steps):
            for index, batch in enumerate(plan.loader(1, 0, workers=0, pin_memory=False)):
                parts[index // accumulation_steps] |= set(batch[0].tolist())
        assert parts == expected

    def test_errors(self):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter([])

        sizes = {"batch_size": 4, "accumulation_steps": 1, "seed": 0, "rank": 0, "processes": 1}
        with pytest.raises(TypeError, match="train is an IterableDataset"):
            BatchPlan(TrainingData(train=Stream()), **sizes)
        data = TrainingData(train=TensorDataset(torch.arange(3)))
        with pytest.raises(ValueError, match="batch_size=4 exceeds the 3 samples"):
            BatchPlan(data, **sizes)
        with pytest.raises(ValueError, match=r"batch_size=4 must be a multiple .* the 3 processes"):
            BatchPlan(data, **{**sizes, "processes": 3})


def rates(schedule, updates_per_epoch=4, total_updates=24, lr=1.0):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    learning_rate = LearningRate(optimizer, schedule, updates_per_epoch=updates_per_epoch, total_updates=total_updates)
    values = []
    for update in range(total_updates):
        learning_rate.set(update)
        values.append(optimizer.param_groups[0]["lr"])
    return values


class TestLearningRate:
    def test_cosine_with_warmup_and_lag(self):
        schedule = ScheduleRecipe(warmup=2, warmup_lr=0.1, min_lr=0.01, lag_epochs=1)
        cosine = [0.01 + 0.99 * (1 + math.cos(math.pi * epoch / 6)) / 2 for epoch in range(6)]
        expected = [0.1, 0.1, 0.1 + 0.9 / 2, *cosine[2:5]]
        assert rates(schedule)[::4] == pytest.approx(expected)
        assert rates(schedule) == [rate for rate in rates(schedule)[::4] for _ in range(4)]

    def test_by_update(self):
        expected = [(1 + math.cos(math.pi * update / 24)) / 2 for update in range(24)]
        assert rates(ScheduleRecipe(unit="update")) == pytest.approx(expected)

    @pytest.mark.parametrize("unit", ["epoch", "update"])
    def test_milestones_are_epochs(self, unit):
        schedule = ScheduleRecipe(name="multistep", unit=unit, milestones=(2, 5))
        assert rates(schedule) == pytest.approx([1] * 8 + [0.1] * 12 + [0.01] * 4)

    def test_poly(self):
        schedule = ScheduleRecipe(name="poly", unit="update", power=2)
        assert rates(schedule) == pytest.approx([(1 - update / 24) ** 2 for update in range(24)])

    def test_step_and_constant(self):
        assert rates(ScheduleRecipe(name="step", decay_epochs=3, decay_rate=0.5)) == [1] * 12 + [0.5] * 12
        assert rates(ScheduleRecipe(name="constant")) == [1] * 24

    @pytest.mark.parametrize("total", [2, 10, 24])
    def test_onecycle_is_that_of_torch(self, total):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=total, cycle_momentum=False)
        expected = []
        for _ in range(total):
            expected.append(reference.get_last_lr()[0])
            optimizer.step()
            if len(expected) < total:
                reference.step()
        assert rates(ScheduleRecipe(name="onecycle", unit="update"), total_updates=total) == pytest.approx(expected)


class TestCreateOptimizer:
    @staticmethod
    def decayed(recipe):
        net = build(nn.LayerNorm).trainable_module
        names = {id(parameter): name for name, parameter in net.named_parameters()}
        groups = create_optimizer(net, recipe).param_groups
        return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}

    def test_decay(self):
        assert self.decayed(OptimizerRecipe()) == {"0.weight", "4.weight"}
        assert self.decayed(OptimizerRecipe(decay="all", no_decay=("1.*",))) == {
            f"{layer}.{kind}" for layer in (0, 4) for kind in ("weight", "bias")
        }

    def test_settings(self):
        optimizer = create_optimizer(build().trainable_module, OptimizerRecipe(betas=(0.8, 0.9), eps=1e-3, lr=0.3))
        assert isinstance(optimizer, torch.optim.AdamW)
        assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
        assert (optimizer.defaults["eps"], optimizer.defaults["lr"]) == (1e-3, 0.3)

    def test_layer_decay_scales_the_rate(self):
        from timm.models import create_model

        net = create_model("vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=2, num_heads=2)
        optimizer = create_optimizer(net, OptimizerRecipe(layer_decay=0.5))
        assert {group["lr_scale"] for group in optimizer.param_groups} == {0.125, 0.25, 0.5, 1.0}


class TestRecipes:
    @pytest.mark.parametrize(
        ("recipe", "changes", "message"),
        [
            (FitRecipe, {}, r"epochs, updates=\(None, None\) must be exactly one"),
            (FitRecipe, {"epochs": 0}, "epochs=0 must be at least 1"),
            (FitRecipe, {"epochs": 1, "accumulation_steps": 3}, "batch_size=8 must be a multiple of"),
            (FitRecipe, {"epochs": 1, "precision": "fp8"}, "precision='fp8' must be one of 'no', 'bf16', 'fp16'"),
            (FitRecipe, {"epochs": 1, "ema_decay": 1.0}, r"ema_decay=1\.0 must be in"),
            (FitRecipe, {"epochs": 1, "trackers": ("excel",)}, "trackers='excel' must be one of"),
            (OptimizerRecipe, {"lr": 0.0}, r"lr=0\.0 must be above 0"),
            (OptimizerRecipe, {"clip_norm": -1.0}, "clip_norm=-1"),
            (ScheduleRecipe, {"name": "linear"}, "name='linear' must be one of 'cosine'"),
            (ScheduleRecipe, {"name": "multistep"}, r"milestones=\(\) must be given"),
            (ScheduleRecipe, {"milestones": (3,)}, "given for name='multistep' and for no other"),
        ],
    )
    def test_errors(self, recipe, changes, message):
        needed = {"batch_size": 8} if recipe is FitRecipe else {}
        with pytest.raises(ValueError, match=message):
            recipe(**needed, **changes)


if __name__ == "__main__":
    script(Path(sys.argv[1]))
