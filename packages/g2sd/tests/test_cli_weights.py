"""Flags that name weights: teachers by name, and files that are read once each."""

import json
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

from g2sd.cli import main
from visionkernels.testing.weights import count_reads
from visionkernels.weights import Trained, read_checkpoint


def g2sd(*argv):
    return main([str(argument) for argument in argv])


def fails(capsys, *argv):
    """Run a command whose input is wrong and return its one line on stderr."""
    assert g2sd(*argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("g2sd: error: ") and err.count("\n") == 1
    return err


class _Names(list):
    num_classes = 1000


@pytest.fixture
def published(monkeypatch):
    """Replaces timm's published weights, which tests cannot download; returns the names that were asked for."""
    create, asked = timm.create_model, _Names()

    def without_download(name, pretrained=False, **options):
        if pretrained:
            asked.append(name)
            options = {"num_classes": asked.num_classes, **options}
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", without_download)
    return asked


def save_timm(name, path, **options):
    """Write a bare state dict of a model of timm."""
    model = timm.create_model(name, **options)
    save_file(model.state_dict(), path)
    return path


class TestGenericTeacher:
    def test_published_weights(self, published, pictures, micro, save_recipe, tmp_path):
        command = ["distill", "generic", save_recipe(micro["generic"]), "--teacher", "timm:test_vit"]
        assert g2sd(*command, "--data", pictures, "--out", tmp_path / "run", "--epochs", 1) == 0
        assert published == ["test_vit"]
        assert read_checkpoint(tmp_path / "run/weights.safetensors").trained.details["teacher"] == "timm:test_vit"

    def test_checkpoint(self, published, pictures, micro, save_recipe, tmp_path):
        weights = save_timm("test_vit", tmp_path / "vit.safetensors")
        command = ["distill", "generic", save_recipe(micro["generic"]), "--teacher", "timm:test_vit"]
        flags = ["--teacher-checkpoint", weights, "--data", pictures, "--epochs", 1]
        assert g2sd(*command, *flags, "--out", tmp_path / "run") == 0
        assert published == []
        details = json.loads((tmp_path / "run/run.json").read_text())["trained"]["details"]
        assert details["teacher_checkpoint"] == str(weights)

    def test_errors(self, capsys, runs, pictures, micro, save_recipe, tmp_path):
        command = ["distill", "generic", save_recipe(micro["generic"]), "--data", pictures, "--out", tmp_path / "run"]
        assert "is no ViT of timm" in fails(capsys, *command, "--teacher", "timm:test_resnet")
        assert "did you mean" in fails(capsys, *command, "--teacher", "timm:test_vitt")
        both = ["--teacher", runs["pretrain"], "--teacher-checkpoint", runs["pretrain"]]
        assert "is a file; --teacher-checkpoint is for a teacher by name" in fails(capsys, *command, *both)


class TestSpecificTeacher:
    @pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
    def test_published_weights(self, published, pictures, micro, save_recipe, tmp_path, name):
        """Any classifier of timm whose classes are those of the data."""
        published.num_classes = 3
        command = ["distill", "specific", save_recipe(micro["specific"]), "--teacher", f"timm:{name}"]
        assert g2sd(*command, "--data", pictures, "--out", tmp_path / "run", "--epochs", 1) == 0
        assert published == [name]

    def test_checkpoint(self, published, pictures, micro, save_recipe, tmp_path):
        weights = save_timm("test_resnet", tmp_path / "resnet.safetensors", num_classes=3)
        command = ["distill", "specific", save_recipe(micro["specific"]), "--teacher", "timm:test_resnet"]
        flags = ["--teacher-checkpoint", weights, "--data", pictures, "--epochs", 1]
        assert g2sd(*command, *flags, "--out", tmp_path / "run") == 0
        assert published == []
        details = json.loads((tmp_path / "run/run.json").read_text())["trained"]["details"]
        assert (details["teacher"], details["teacher_checkpoint"]) == ("timm:test_resnet", str(weights))

    def test_errors(self, capsys, published, runs, pictures, micro, save_recipe, tmp_path):
        recipe = save_recipe(micro["specific"])
        command = ["distill", "specific", recipe, "--data", pictures, "--out", tmp_path / "run"]
        said = fails(capsys, *command, "--teacher", "timm:test_vit")
        assert "teacher timm:test_vit has 1000 classes, the data 3" in said
        both = ["--teacher", runs["finetune"], "--teacher-checkpoint", runs["finetune"]]
        assert "is a file; --teacher-checkpoint is for a teacher by name" in fails(capsys, *command, *both)
        assert not (tmp_path / "run").exists()


class TestReads:
    """Large files are read once."""

    def test_train(self, monkeypatch, runs, pictures, micro, save_recipe, tmp_path):
        for stage, files in (
            ("generic", {"--teacher": "pretrain"}),
            ("finetune", {"--init": "pretrain"}),
            ("specific", {"--init": "generic", "--teacher": "finetune"}),
        ):
            copies = {flag: tmp_path / f"{stage}-{source}.safetensors" for flag, source in files.items()}
            for flag, source in files.items():
                copies[flag].write_bytes(runs[source].read_bytes())
            flags = [part for pair in copies.items() for part in pair]
            with monkeypatch.context() as patch:
                reads = count_reads(patch)
                command = ["train", save_recipe(micro[stage]), *flags, "--data", pictures, "--epochs", 1]
                assert g2sd(*command, "--out", tmp_path / stage) == 0
            assert {path.name: reads[path.name] for path in copies.values()} == {
                path.name: 1 for path in copies.values()
            }

    def test_teacher_of_another_package(self, monkeypatch, pictures, micro, save_recipe, tmp_path):
        model = timm.create_model("test_resnet", num_classes=3)
        trained = Trained(kind="classifier", package="biformer", model="test_resnet", options={"num_classes": 3})
        trained.save(tmp_path / "teacher.safetensors", model.state_dict())
        reads = count_reads(monkeypatch)
        command = ["train", save_recipe(micro["specific"]), "--teacher", tmp_path / "teacher.safetensors"]
        assert g2sd(*command, "--data", pictures, "--epochs", 1, "--out", tmp_path / "run") == 0
        assert reads["teacher.safetensors"] == 1

    @pytest.mark.parametrize(
        "command",
        [
            ("eval", "--checkpoint", "FILE"),
            ("export", "--checkpoint", "FILE", "--out", "model.pt2"),
            ("probe", "knn", "FILE", "--neighbours", 3),
            ("probe", "linear", "FILE", "--epochs", 1, "--batch-size", 16, "--workers", 0, "--out", "run"),
        ],
        ids=lambda command: " ".join(command[:2]),
    )
    def test_use(self, monkeypatch, runs, tmp_path, command):
        monkeypatch.chdir(tmp_path)
        Path("student.safetensors").write_bytes(runs["specific"].read_bytes())
        reads = count_reads(monkeypatch)
        assert g2sd(*("student.safetensors" if part == "FILE" else part for part in command)) == 0
        assert reads["student.safetensors"] == 1
