"""Reports on weights files of every kind."""

import argparse

import pytest
import torch

from g2sd.inspection import inspect_file
from visionkernels.weights import CheckpointError

HF = {
    "vit.embeddings.patch_embeddings.projection.weight": (24, 3, 8, 8),
    "vit.embeddings.position_embeddings": (1, 17, 24),
    "vit.encoder.layer.0.layernorm_before.weight": (24,),
}


def part(state, *left_out):
    return {key: value for key, value in state.items() if not key.startswith(left_out)}


@pytest.fixture(scope="module")
def states(official):
    """A state dict of every kind."""
    teacher = official("gd_tiny_all/teacher")
    encoder = part(teacher, "decoder", "mask_token")
    return {
        "mae": teacher,
        "generic": official("gd_tiny_all/student"),
        "encoder": encoder,
        "distilled": official("vit_distilled/model"),
        "average": official("vit_teacher_gap/model"),
        "class": encoder | {"head.weight": torch.zeros(10, 96)},
        "probe": encoder | {"head.1.weight": torch.zeros(10, 96)},
        "vitdet": official("vitdet_backbone/backbone", "backbone."),
        "mmseg": official("seg_model/model", "student."),
        "hf": {key: torch.zeros(shape) for key, shape in HF.items()},
    }


class TestInspectFile:
    @pytest.mark.parametrize(
        ("kind", "words"),
        [
            ("mae", ("encoder 96 channels, 3 blocks", "decoder 64 channels", "distill generic --teacher FILE")),
            ("generic", ("feature head for a teacher's decoder of 64", "lacks a head", "distill specific")),
            ("encoder", ("encoder alone", "lacks a decoder", "mae_pretrain_vit_base_full.pth", "finetune")),
            ("distilled", ("distillation token", "10 classes", "g2sd eval --checkpoint FILE")),
            ("average", ("mean of the patches", "10 classes", "distill specific --teacher FILE")),
            ("class", ("class token", "10 classes")),
            ("probe", ("linear probe", "10 classes")),
            ("vitdet", ("ViTDet", "48 channels, 4 blocks")),
            ("mmseg", ("UperNet", "6 classes")),
            ("hf", ("Hugging Face", "patches of 8x8 pixels")),
        ],
    )
    def test_every_kind(self, states, tmp_path, kind, words):
        torch.save({"model": states[kind], "args": argparse.Namespace(lr=1.0)}, tmp_path / "file.pth")
        found = inspect_file(tmp_path / "file.pth")
        assert found.contents.kind == kind
        report = "\n".join(found.lines())
        for each in words:
            assert each in report
        count = sum(value.numel() for value in states[kind].values())
        assert f"{len(states[kind])} tensors, {count / 1e6:.3f} M values, in entry 'model'" in report

    def test_bare(self, states, tmp_path):
        torch.save(states["mae"], tmp_path / "file.pth")
        assert "in the file itself" in "\n".join(inspect_file(tmp_path / "file.pth").lines())

    def test_entry(self, states, tmp_path):
        torch.save({"student": states["generic"], "teacher": states["mae"]}, tmp_path / "file.pth")
        assert inspect_file(tmp_path / "file.pth", entry="teacher").contents.kind == "mae"

    @pytest.mark.parametrize("stage", ["pretrain", "generic", "finetune", "specific"])
    def test_own_files(self, runs, stage):
        kinds = {"pretrain": "mae", "generic": "generic", "finetune": "average", "specific": "distilled"}
        assert inspect_file(runs[stage]).contents.kind == kinds[stage]

    def test_errors(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            inspect_file(tmp_path / "none.pth")
        (tmp_path / "text.pth").write_text("no weights")
        with pytest.raises(CheckpointError, match=r"text\.pth"):
            inspect_file(tmp_path / "text.pth")
        torch.save({"layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
        with pytest.raises(CheckpointError, match=r"first keys are layer1\.0\.conv1\.weight"):
            inspect_file(tmp_path / "resnet.pth")
