"""Also a script, for runs in several processes: `torchrun --nproc_per_node=2 test_training.py RUN_DIR`."""

import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from visionkernels.cli import FitOptions
from visionkernels.training import FitRecipe, OptimizerRecipe, ScheduleRecipe, TrainingData, fit
from visionkernels.training import folder as folder_module
from visionkernels.training import run as run_module
from visionkernels.training.batches import EVALUATION, BatchPlan, seed_generators
from visionkernels.training.folder import RunFolder
from visionkernels.training.optimization import LearningRate, create_optimizer
from visionkernels.training.task import Task
from visionkernels.weights import Trained, read_checkpoint

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


class Classifier(Task):
    def __init__(self, module, criterion=nn.functional.cross_entropy):
        super().__init__(module)
        self.criterion = criterion

    def forward(self, inputs, labels):
        logits = self.trainable_module(inputs)
        return {"loss": self.criterion(logits, labels), "output": logits}


def build(norm=nn.BatchNorm1d, dropout=0.1):
    torch.manual_seed(7)
    width = 8
    layers = [nn.Linear(FEATURES, width), norm(width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, CLASSES)]
    return Classifier(nn.Sequential(*layers))


def accuracy(model):
    data = NoisySamples()
    return {"top1": (model(data.inputs).argmax(1) == data.labels).float().mean().item()}


def run(folder, recipe=RECIPE, *, task=None, **data):
    data = {"train": NoisySamples(), "evaluate": accuracy, **data}
    return fit(task or build(), recipe, TrainingData(**data), folder)


def assert_same(left, right, **tolerances):
    tolerances = tolerances or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(read_checkpoint(left).state, read_checkpoint(right).state, **tolerances)


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


def interrupt_group(*_):
    """As a terminal does: data workers get Ctrl-C as well."""
    os.killpg(os.getpgrp(), signal.SIGINT)


def call_in_child(function, *args, **kwargs):
    """Return the exit code of a process of its own group."""

    def target():
        os.setpgrp()
        function(*args, **kwargs)

    child = multiprocessing.get_context("fork").Process(target=target)
    child.start()
    child.join()
    return child.exitcode


def run_in_child(*args, **kwargs):
    return call_in_child(run, *args, **kwargs)


class CentredTask(Task):
    """Keeps a running mean of logits as a buffer, and a teacher that follows; both are part of the loss."""

    def __init__(self):
        super().__init__(build().trainable_module, teacher=build().trainable_module)
        self.register_buffer("center", torch.zeros(CLASSES))
        self.begun = []

    def begin_update(self, update, total_updates):
        self.begun.append((update, total_updates))
        with torch.no_grad():
            for teacher, student in zip(self.teacher.parameters(), self.trainable_module.parameters(), strict=True):
                teacher.lerp_(student, 0.5 * update / total_updates)

    def get_task_state(self, module=None, ema=False):
        return {"teacher": self.teacher.state_dict()}

    def load_task_state(self, state, strict=True, module=None, ema=False):
        self.teacher.load_state_dict(state["teacher"])

    def forward(self, inputs, labels):
        logits = self.trainable_module(inputs)
        with torch.no_grad():
            self.center = 0.9 * self.center + 0.1 * logits.mean(0)
            target = (self.teacher(inputs) - self.center).softmax(-1)
        return {"loss": nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits, target)}


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

    @pytest.mark.parametrize("moment", ["publish", "append", "claim"])
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

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
    def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(self, tmp_path, number):
        """Slurm and Kubernetes send SIGTERM before they kill."""
        recipe = replace(RECIPE, num_workers=2, accumulation_steps=2)
        whole = run(tmp_path / "whole", recipe)
        handler = signal.getsignal(number)
        with pytest.raises(KeyboardInterrupt, match=r"saved after update 8 of 18; rerun the same command to resume"):
            run(tmp_path / "cut", recipe, batch_transform=At(2 * 7, lambda *_: os.kill(os.getpid(), number)))
        assert signal.getsignal(number) is handler
        assert_same(run(tmp_path / "cut", recipe).weights, whole.weights)

    def test_ctrl_c_reaches_data_workers_too(self, tmp_path, capfd):
        recipe = replace(RECIPE, num_workers=1, accumulation_steps=8)  # more batches than are fetched ahead
        whole = run(tmp_path / "whole", recipe, task=build(nn.LayerNorm))
        transform = At(8 * 7, interrupt_group)
        assert run_in_child(tmp_path / "cut", recipe, task=build(nn.LayerNorm), batch_transform=transform) == 1
        assert "KeyboardInterrupt: stopped and saved after update 8 of 18" in capfd.readouterr().err
        assert_same(run(tmp_path / "cut", recipe, task=build(nn.LayerNorm)).weights, whole.weights)

    def test_task_with_state(self, tmp_path):
        recipe = replace(RECIPE, accumulation_steps=2, save_every_updates=1)
        whole = run(tmp_path / "whole", recipe, task=(task := CentredTask()))
        assert task.begun == [(update, 18) for update in range(18)]
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", recipe, task=CentredTask(), batch_transform=At(2 * 8, interrupt))
        resumed = run(tmp_path / "cut", recipe, task=(task := CentredTask()))
        assert task.begun[0] == (9, 18)
        assert resumed.history == whole.history
        assert_same(resumed.weights, whole.weights)

    @pytest.mark.parametrize("save_every_epochs", [1, 2, 10])
    def test_killed_while_measuring(self, tmp_path, save_every_epochs):
        def random_metric(model):
            return {"noise": torch.rand(1).item()}

        def killed(model):
            if (folder / "log.jsonl").read_text().count("\n") == 1:
                kill()
            return random_metric(model)

        recipe = replace(RECIPE, save_every_epochs=save_every_epochs, ema_decay=0.9)
        recipe = replace(recipe, best_metric="noise", best="min")  # which is that of the first epoch
        whole, folder = run(tmp_path / "whole", recipe, evaluate=random_metric), tmp_path / "cut"
        folder.mkdir()
        (folder / "log.jsonl").touch()
        assert run_in_child(folder, recipe, evaluate=killed) == -signal.SIGKILL
        with (folder / "log.jsonl").open("a") as log:
            log.write('{"epoch": 2, "up')
        kept = 0 if save_every_epochs == 10 else 2
        assert [path.name[:11] for path in (folder / "checkpoints").glob("*")][-1:] == ["epoch-00002"] * (kept > 0)
        resumed = run(folder, recipe, evaluate=random_metric)
        assert resumed.history == whole.history
        assert len((folder / "log.jsonl").read_text().splitlines()) == 3
        assert min(resumed.history, key=lambda entry: entry["noise"])["epoch"] == 1
        for name in ("weights", "ema", "best"):
            assert_same(folder / f"{name}.safetensors", tmp_path / f"whole/{name}.safetensors")

    def test_ctrl_c_in_the_last_update_of_an_epoch(self, tmp_path):
        whole = run(tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt, match="after update 6"):
            run(tmp_path / "cut", batch_transform=At(5, interrupt))
        resumed = run(tmp_path / "cut")
        assert_same(resumed.weights, whole.weights)
        assert resumed.history == whole.history

    def test_finished_run_is_only_read(self, tmp_path, monkeypatch):
        recipe = replace(RECIPE, ema_decay=0.9, best_metric="top1")
        first = run(tmp_path, recipe)
        files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.name != ".lock"}
        monkeypatch.setattr(sys, "argv", ["another"])
        again = run(tmp_path, recipe, batch_transform=At(0, lambda batch: pytest.fail("must not train")))
        assert again == first
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.name != ".lock"} == files

    def test_another_command_goes_on(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["first"])
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, batch_transform=At(3, interrupt))
        monkeypatch.setattr(sys, "argv", ["second"])
        run(tmp_path, replace(RECIPE, num_workers=1))
        described = json.loads((tmp_path / "run.json").read_text())
        assert (described["command"], described["recipe"]["num_workers"]) == (["first"], 0)
        (resumed,) = described["resumed"]
        assert resumed["command"] == ["second"]
        assert resumed.keys() == {"versions", "git", "command", "device", "processes"}

    def test_folder_in_use(self, tmp_path, monkeypatch):
        monkeypatch.setattr(folder_module, "LOCK_SECONDS", 0)
        partial = tmp_path / "checkpoints/.partial"

        def intrude(batch):
            partial.mkdir(parents=True)
            with pytest.raises(ValueError, match=f"{tmp_path} is in use by another process"):
                run(tmp_path)
            assert partial.exists()

        run(tmp_path, replace(RECIPE, epochs=1), batch_transform=At(2, intrude))
        run(tmp_path, replace(RECIPE, epochs=1))

    def test_another_recipe_is_refused(self, tmp_path):
        run(tmp_path, replace(RECIPE, epochs=1))
        other = replace(RECIPE, epochs=2, optimizer=replace(RECIPE.optimizer, lr=0.5), num_workers=1)
        with pytest.raises(ValueError, match=r"another run: epochs was 1, now 2, optimizer\.lr was 0\.02, now 0\.5;"):
            run(tmp_path, other)

    def test_another_model_is_refused(self, tmp_path):
        run(tmp_path, replace(RECIPE, epochs=1))
        with pytest.raises(ValueError, match=rf"^{tmp_path} holds a run of another model: .*1\.running_mean.*$"):
            run(tmp_path, replace(RECIPE, epochs=1), task=build(nn.LayerNorm))

    def test_trainable_parameters_outside_the_module(self, tmp_path):
        task = build()
        task.temperature = nn.Parameter(torch.ones(1))
        task.teacher = nn.Linear(2, 2).requires_grad_(False)
        with pytest.raises(TypeError, match=r"outside trainable_module would not be trained: temperature; move"):
            run(tmp_path, task=task)

    def test_task_without_trainable_module(self, tmp_path):
        task = build()
        task.trainable_module = None
        with pytest.raises(TypeError, match="Classifier must have trainable_module"):
            run(tmp_path, task=task)
        with pytest.raises(TypeError, match=r"task is a Linear; expected a visionkernels\.training\.task\.Task"):
            run(tmp_path, task=nn.Linear(1, 1))

    def test_teacher_stays_frozen_and_in_evaluation(self):
        teacher = build().trainable_module
        task = Task(build().trainable_module, teacher=teacher).train()
        assert task.trainable_module.training and not teacher.training
        assert not any(parameter.requires_grad for parameter in teacher.parameters())


class TestNumbers:
    def test_accumulation_is_one_large_batch(self, tmp_path):
        task = {"norm": nn.LayerNorm, "dropout": 0.0}
        one = run(tmp_path / "1", task=build(**task))
        two = run(tmp_path / "2", replace(RECIPE, accumulation_steps=2), task=build(**task))
        assert_same(one.weights, two.weights, rtol=1e-5, atol=1e-6)

    def test_clipping(self, tmp_path):
        task = build()
        before = torch.cat([value.detach().flatten().clone() for value in task.trainable_module.parameters()])
        optimizer = OptimizerRecipe(name="momentum", lr=1.0, momentum=0.0, weight_decay=0.0, clip_norm=1e-2)
        constant = ScheduleRecipe(name="constant")
        run(tmp_path, replace(RECIPE, epochs=None, updates=1, optimizer=optimizer, schedule=constant), task=task)
        after = torch.cat([value.detach().flatten() for value in task.trainable_module.parameters()])
        assert (after - before).norm().item() == pytest.approx(1e-2, rel=1e-3)

    def test_metric_of_some_batches(self, tmp_path):
        class Rarely(Classifier):
            calls = 0

            def forward(self, *batch):
                self.calls += 1
                rare = {"rare": torch.tensor(3.0)} if self.calls % 4 == 1 else {}
                return super().forward(*batch) | rare | {"bad": torch.tensor(math.nan)}

        task = Rarely(build().trainable_module)
        recipe = replace(RECIPE, epochs=1, save_every_updates=1)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, recipe, task=task, batch_transform=At(2, interrupt))
        result = run(tmp_path, recipe, task=task)
        assert result.metrics["rare"] == 3.0
        assert math.isnan(result.metrics["bad"])

    @pytest.mark.parametrize(("best", "update"), [("max", 24), ("min", 18)])
    def test_best_of_finite_metrics(self, tmp_path, best, update):
        scores = [math.nan, math.inf, 1.0, 3.0, 2.0, -math.inf]
        left = iter(scores)
        recipe = replace(RECIPE, epochs=6, best_metric="score", best=best)
        result = run(tmp_path, recipe, evaluate=lambda model: {"score": next(left)})
        logged = [json.loads(line)["score"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert logged == [score if math.isfinite(score) else None for score in scores]
        assert read_checkpoint(tmp_path / "best.safetensors").trained.update == update
        assert [math.isnan(entry["score"]) for entry in result.history] == [score is None for score in logged]

    def test_measured_every_second_epoch_with_its_own_seed(self, tmp_path):
        recipe = replace(RECIPE, evaluate_every_epochs=2)
        history = run(tmp_path, recipe, evaluate=lambda model: {"noise": torch.rand(1).item()}).history
        expected = []
        for update in (12, 18):
            seed_generators(recipe.seed, EVALUATION, update)
            expected.append(torch.rand(1).item())
        assert [entry.get("noise") for entry in history] == [None, *expected]

    def test_ema(self, tmp_path):
        seen = []
        task = build()
        recipe = replace(RECIPE, ema_decay=0.75)

        def note(module, args):
            if module.training:
                seen.append(module[0].weight.detach().clone())

        task.trainable_module.register_forward_pre_hook(note)
        result = run(tmp_path, recipe, task=task)
        states = [*seen[1:], read_checkpoint(result.weights).state["0.weight"]]  # the first forward sees the start
        average = seen[0]
        for state in states:
            average = 0.75 * average + 0.25 * state
        torch.testing.assert_close(read_checkpoint(result.ema_weights).state["0.weight"], average)

    @pytest.mark.parametrize("precision", ["no", "bf16"])
    def test_learns_and_losses_are_float32(self, tmp_path, precision):
        seen = set()

        def loss(logits, labels):
            seen.add((logits.dtype, nn.functional.cross_entropy(logits, labels).dtype))
            return nn.functional.cross_entropy(logits, labels)

        task = Classifier(build().trainable_module, loss)
        result = run(tmp_path, replace(RECIPE, epochs=8, precision=precision), task=task)
        assert result.metrics["top1"] > 0.6  # chance is 0.35
        assert result.history[0]["loss"] > result.history[-1]["loss"]
        assert seen == {(torch.float32, torch.float32)}

    def test_fp16_on_a_cpu(self, tmp_path):
        """Nothing is computed in fp16 there, so that a run folder must not say so."""
        with pytest.raises(ValueError, match="precision='fp16' is not computed on cpu, where training would run"):
            run(tmp_path, replace(RECIPE, precision="fp16"))
        assert not (tmp_path / "run.json").exists()

    @pytest.mark.parametrize(("has_bf16", "precision", "warns"), [(0, "bf16", 1), (1, "bf16", 0), (0, "no", 0)])
    def test_emulated_bf16(self, tmp_path, monkeypatch, caplog, has_bf16, precision, warns):
        capabilities = {"avx2": True, "avx512_bf16": bool(has_bf16)}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        run(tmp_path, replace(RECIPE, epochs=1, precision=precision))
        assert ("this CPU has no bf16 instructions" in caplog.text) == bool(warns)

    def test_bf16_computes_in_bf16(self, tmp_path):
        task, seen = build(), []
        task.trainable_module[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        run(tmp_path, replace(RECIPE, epochs=1, precision="bf16"), task=task)
        assert set(seen) == {torch.bfloat16}
        assert read_checkpoint(tmp_path / "weights.safetensors").state["0.weight"].dtype == torch.float32

    def test_a_task_says_what_the_weights_hold(self, tmp_path):
        """Checkpoints hold all that is trained; files for users what `final_state` keeps, the averaged one as well."""
        task = build()
        task.final_state = lambda state: {"w": state["0.weight"]}
        result = run(tmp_path, replace(RECIPE, epochs=1, ema_decay=0.9), task=task)
        for path in (result.weights, result.ema_weights):
            assert set(read_checkpoint(path).state) == {"w"}
        assert "0.weight" in task.trainable_module.state_dict()

    def test_norm_eval(self, tmp_path):
        result = run(tmp_path, replace(RECIPE, norm_eval=True))
        state = read_checkpoint(result.weights).state
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

    @pytest.mark.parametrize("updates", [1, 2])
    def test_not_finite_loss_is_never_saved(self, tmp_path, monkeypatch, updates):
        monkeypatch.setitem(run_module.CHECK_EVERY_UPDATES, "cpu", 50)  # as on an accelerator

        def spoil(batch):
            return batch[0] * math.nan, batch[1]

        with pytest.raises(
            FloatingPointError, match=rf"not finite at update {updates} .*last good checkpoint is .*{updates}$"
        ):
            run(tmp_path, replace(RECIPE, save_every_updates=1), batch_transform=At(updates, spoil))

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
        first, second = ((tmp_path / f"2/random-{rank}").read_text() for rank in range(2))
        assert first == (tmp_path / "1/random-0").read_text() != second

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
    task = build(nn.LayerNorm, dropout=0.0)

    def note(batch):
        (folder / f"random-{os.environ.get('RANK', 0)}").write_text(str(torch.rand(1).item()))

    return run(folder, recipe, task=task, train=CleanSamples(), batch_transform=At(3, note))


class TestRunFolder:
    def test_files(self, tmp_path):
        recipe = replace(RECIPE, ema_decay=0.9, keep_checkpoints=1, best_metric="top1", trackers=("tensorboard",))
        pytest.importorskip("tensorboard", reason="tensorboard is not installed")
        trained = Trained(kind="demo", package="", options={"a": (1, 2)}, details={"b": {"x": None, "y": True}})
        result = fit(build(), recipe, TrainingData(train=NoisySamples(), evaluate=accuracy), tmp_path, trained=trained)
        assert len(list((tmp_path / "checkpoints").iterdir())) == 1
        assert list(tmp_path.rglob("events.out.tfevents*"))
        described = json.loads((tmp_path / "run.json").read_text())
        assert described["recipe"]["optimizer"]["lr"] == 0.02
        assert described["trained"]["options"] == {"a": [1, 2]}
        assert {"versions", "git", "device", "command", "processes"} <= described.keys()
        kept = read_checkpoint(result.weights).trained
        assert (kept.kind, kept.options, kept.details) == (trained.kind, trained.options, trained.details)
        assert (kept.update, kept.fit, kept.versions) == (18, asdict(recipe), described["versions"])
        best = max(result.history, key=lambda entry: entry["top1"])
        assert read_checkpoint(tmp_path / "best.safetensors").trained.update == best["update"]
        assert {"loss", "lr", "top1", "ema_top1"} <= result.metrics.keys()

    def test_a_record_that_is_no_json(self, tmp_path):
        trained = Trained(kind="demo", package="", options={"a": 1j})
        with pytest.raises(TypeError, match=r"the record holds .*, a complex; JSON has"):
            fit(build(), RECIPE, TrainingData(train=NoisySamples()), tmp_path, trained=trained)

    def test_data_may_be_named_another_way(self, tmp_path):
        data = TrainingData(train=NoisySamples())
        for name in ("pictures", "/data/pictures"):
            fit(build(), RECIPE, data, tmp_path, trained=Trained(kind="demo", package="", data=name))
        with pytest.raises(ValueError, match=r"holds another run: trained\.kind was 'demo', now 'other'"):
            fit(build(), RECIPE, data, tmp_path, trained=Trained(kind="other", package=""))

    def test_many_short_epochs(self, tmp_path):
        recipe = replace(RECIPE, epochs=40, batch_size=52, save_every_epochs=30, evaluate_every_epochs=40)
        saved, measured = [], []

        def evaluate(model):
            saved.extend(path.name[:11] for path in sorted((tmp_path / "checkpoints").iterdir()))
            measured.append(model)
            return {}

        assert len(run(tmp_path, recipe, evaluate=evaluate).history) == 40
        assert saved == ["epoch-00030", "epoch-00040"]
        assert len(measured) == 1

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
        sizes = {"batch_size": 12, "accumulation_steps": accumulation_steps, "num_processes": processes}
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

    def test_workers_outlive_ctrl_c(self):
        def read():
            batches = iter(self.plans(1, 12)[0].loader(0, 0, workers=1, pin_memory=False))
            next(batches)  # the worker has started, with the handler that a program starts with
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            interrupt_group()
            assert len(list(batches)) == 47

        assert call_in_child(read) == 0

    @pytest.mark.parametrize("workers", [0, 1])
    def test_whole_micro_batches_at_once(self, workers):
        class Rays(TensorDataset):
            def __getitems__(self, indices):
                assert all(type(index) is int for index in indices)
                return self.tensors[0][indices], torch.rand(len(indices))

        data = TrainingData(train=Rays(torch.arange(50)), collate=lambda batch: batch)
        sizes = {"batch_size": 12, "accumulation_steps": 2, "rank": 0, "num_processes": 1}
        (plain,), plan = self.plans(1, 2), BatchPlan(data, seed=3, **sizes)
        batches = list(plan.loader(1, 1, workers=workers, pin_memory=False))
        for step, (batch, (indices,)) in enumerate(
            zip(batches, plain.loader(1, 1, workers=0, pin_memory=False), strict=True), start=2
        ):
            seed_generators(3, 0, 1, 6 * step)
            torch.testing.assert_close(batch, (indices, torch.rand(6)), rtol=0, atol=0)

    def test_errors(self):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter([])

        sizes = {"batch_size": 4, "accumulation_steps": 1, "seed": 0, "rank": 0, "num_processes": 1}
        with pytest.raises(TypeError, match="train is an IterableDataset"):
            BatchPlan(TrainingData(train=Stream()), **sizes)
        data = TrainingData(train=TensorDataset(torch.arange(3)))
        with pytest.raises(ValueError, match="batch_size=4 exceeds the 3 samples"):
            BatchPlan(data, **sizes)
        with pytest.raises(ValueError, match=r"batch_size=4 must be a multiple .* the 3 processes"):
            BatchPlan(data, **{**sizes, "num_processes": 3})


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

    def test_the_curve_may_count_from_the_end_of_the_warm_up(self):
        """Two epochs of four updates up, four epochs of a whole half cosine down."""
        schedule = ScheduleRecipe(unit="update", warmup_epochs=2, warmup_lr=0.0, min_lr=0.1, after_warmup=True)
        curve = [0.1 + 0.9 * (1 + math.cos(math.pi * update / 16)) / 2 for update in range(16)]
        assert rates(schedule) == pytest.approx([update / 8 for update in range(8)] + curve)
        per_epoch = ScheduleRecipe(unit="epoch", warmup_epochs=2, warmup_lr=0.0, min_lr=0.1, after_warmup=True)
        assert rates(per_epoch)[::4] == pytest.approx([0, 0.5, *curve[::4]])
        with pytest.raises(ValueError, match="warmup_epochs=2 must be above 0 with warmup=0"):
            ScheduleRecipe(warmup=1, warmup_epochs=2)
        with pytest.raises(ValueError, match="after_warmup=True must be False for name='constant'"):
            ScheduleRecipe(name="constant", after_warmup=True)

    def test_by_update(self):
        expected = [(1 + math.cos(math.pi * update / 24)) / 2 for update in range(24)]
        assert rates(ScheduleRecipe(unit="update")) == pytest.approx(expected)

    @pytest.mark.parametrize("unit", ["epoch", "update"])
    def test_milestones_are_epochs(self, unit):
        schedule = ScheduleRecipe(name="multistep", unit=unit, milestones=(2, 5))
        assert rates(schedule) == pytest.approx([1] * 8 + [0.1] * 12 + [0.01] * 4)

    def test_milestones_in_updates(self):
        schedule = ScheduleRecipe(
            name="multistep", unit="update", milestones=(7, 21), milestone_unit="update", warmup=4
        )
        warmup = [1e-6 + (1 - 1e-6) * update / 4 for update in range(4)]
        assert rates(schedule) == pytest.approx([*warmup, 1, 1, 1, *[0.1] * 14, *[0.01] * 3])
        with pytest.raises(ValueError, match="milestone_unit='update' must be 'epoch' for unit='epoch'"):
            ScheduleRecipe(name="multistep", milestones=(7,), milestone_unit="update")

    def test_poly(self):
        schedule = ScheduleRecipe(name="poly", unit="update", power=2)
        assert rates(schedule) == pytest.approx([(1 - update / 24) ** 2 for update in range(24)])

    def test_loglinear(self):
        schedule = ScheduleRecipe(name="loglinear", unit="update", warmup=6, warmup_lr=0.01, min_lr=1e-3)
        expected = [1e-3 ** (t / 24) * (0.01 + 0.99 * math.sin(math.pi / 2 * min(t / 6, 1))) for t in range(24)]
        assert rates(schedule) == pytest.approx(expected)

    def test_step_and_constant(self):
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

    def test_class_of_another_module(self):
        net = build().trainable_module
        recipe = OptimizerRecipe(name="torch.optim:SGD", lr=0.3, momentum=0.7, weight_decay=0.1)
        optimizer = create_optimizer(net, recipe)
        assert type(optimizer) is torch.optim.SGD
        assert {(group["lr"], group["momentum"]) for group in optimizer.param_groups} == {(0.3, 0.7)}
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
        for name, message in {
            "nowhere:SGD": "optimizer 'nowhere:SGD' cannot be found",
            "torch.optim:SDG": "optimizer 'torch.optim:SDG' cannot be found",
            "torch.nn:Linear": "is no torch.optim.Optimizer",
        }.items():
            with pytest.raises(ValueError, match=message):
                create_optimizer(net, replace(recipe, name=name))

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


class TestFitOptions:
    def test_nothing_given(self):
        assert FitOptions().apply(RECIPE) == RECIPE

    def test_given(self):
        options = FitOptions(
            epochs=2, accumulation_steps=4, precision="bf16", seed=3, workers=1, trackers=("tensorboard",)
        )
        changed = {"accumulation_steps": 4, "precision": "bf16", "seed": 3, "trackers": ("tensorboard",)}
        expected = replace(RECIPE, epochs=2, num_workers=1, **changed)
        assert options.apply(RECIPE) == expected
        assert options.apply(replace(RECIPE, epochs=None, updates=7)) == expected

    def test_learning_rate_follows_the_batch(self):
        schedule = ScheduleRecipe(warmup_lr=0.01, min_lr=0.004)
        fit_recipe = FitOptions(batch_size=2).apply(replace(RECIPE, schedule=schedule))
        assert (fit_recipe.batch_size, fit_recipe.optimizer.lr) == (2, 0.02 / 4)
        assert fit_recipe.schedule == replace(schedule, warmup_lr=0.005)
        assert FitOptions(batch_size=2, lr=0.1).apply(RECIPE).optimizer.lr == 0.1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 0}, "batch_size=0 must be at least 1"),
            ({"lr": -1.0}, r"lr=-1\.0 must be above 0"),
            ({"lr": math.nan}, "lr=nan must be above 0"),
            ({"lr": math.inf}, "lr=inf must be a number"),
        ],
    )
    def test_errors(self, options, message):
        """In the name of the option that is wrong."""
        with pytest.raises(ValueError, match=f"^{message}"):
            FitOptions(**options).apply(RECIPE)


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
            (FitRecipe, {"epochs": 1, "save_every_epochs": 0}, "save_every_epochs=0 must be at least 1"),
            (ScheduleRecipe, {"name": "loglinear"}, r"min_lr=0\.0 must be above 0 for name='loglinear'"),
            (OptimizerRecipe, {"lr": 0.0}, r"lr=0\.0 must be above 0"),
            (OptimizerRecipe, {"clip_norm": -1.0}, "clip_norm=-1"),
            (OptimizerRecipe, {"weight_decay": math.inf}, "weight_decay=inf must be at least 0"),
            (OptimizerRecipe, {"momentum": 1.0}, r"momentum=1\.0 must be in \[0, 1\)"),
            (OptimizerRecipe, {"betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\) must be two numbers in"),
            (OptimizerRecipe, {"eps": -5.0}, r"eps=-5\.0 must be at least 0"),
            (ScheduleRecipe, {"warmup_lr": -1.0}, r"warmup_lr=-1\.0 must be at least 0"),
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
    script(Path(sys.argv[1]), *sys.argv[2:])
