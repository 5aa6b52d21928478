"""Reports on weights files of every kind."""

import argparse
import re
from functools import partial

import pytest
import timm
import torch

from g2sd.conversion import convert_file
from g2sd.huggingface import to_huggingface
from g2sd.inspection import inspect_file
from g2sd.official import load_classifier, load_encoder, load_official, load_teacher
from visionkernels.weights import CheckpointError


def part(state, *left_out):
    return {key: value for key, value in state.items() if not key.startswith(left_out)}


@pytest.fixture(scope="module")
def states(official):
    """A state dict of every kind."""
    teacher = official("gd_tiny_all/teacher")
    encoder = part(teacher, "decoder", "mask_token")
    classifier = encoder | {"head.weight": torch.zeros(10, 96), "head.bias": torch.zeros(10)}
    return {
        "mae": teacher,
        "generic": official("gd_tiny_all/student"),
        "encoder": encoder,
        "distilled": official("vit_distilled/model"),
        "average": official("vit_teacher_gap/model"),
        "class": classifier,
        "probe": encoder | {"head.1.weight": torch.zeros(10, 96)},
        "vitdet": official("vitdet_backbone/backbone", "backbone."),
        "mmseg": official("seg_model/model", "student."),
        "hf": to_huggingface(classifier, "the file", heads=(2, None))[0],
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
            ("hf", ("Hugging Face", "10 classes")),
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

    def test_bad_values(self, states, tmp_path):
        """NaN and infinity, by the first tensor that has them; and the other sets of weights in the file."""
        broken = dict(states["average"])
        for key, value in {"norm1.weight": float("nan"), "norm1.bias": float("inf")}.items():
            broken[f"blocks.1.{key}"] = torch.full_like(broken[f"blocks.1.{key}"], value)
        torch.save({"model": broken, "model_ema": states["average"], "epoch": 3}, tmp_path / "file.pth")
        report = "\n".join(inspect_file(tmp_path / "file.pth").lines())
        assert "2 tensors have NaN or infinite values (first: blocks.1.norm1." in report
        assert "other entries with weights: model_ema (--entry NAME)" in report
        clean = "\n".join(inspect_file(tmp_path / "file.pth", entry="model_ema").lines())
        assert "NaN" not in clean and "other entries with weights: model (" in clean

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


FOREIGN = {
    "deit_tiny_distilled_patch16_224": "has a position for its distillation token, as in timm's and DeiT's files",
    "deit3_small_patch16_224": r"keys unexpected \(first: blocks\.0\.ls1\.gamma",
    "vit_small_patch14_reg4_dinov2": r"keys unexpected \(first: reg_token",
    "vit_small_patch14_dinov2": r"keys unexpected \(first: blocks\.0\.ls1\.gamma",
    "vit_base_patch16_siglip_224": r"keys unexpected \(first: attn_pool|keys missing \(first: cls_token",
    "eva02_tiny_patch14_224": r"keys unexpected \(first: blocks\.0\.attn\.",
    "beit_base_patch16_224": r"keys unexpected \(first: blocks\.0\.gamma_1",
    "swin_tiny_patch4_window7_224": "holds no vision transformer of MAE's family",
    "resnet18": "holds no vision transformer of MAE's family",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign(name, tmp_path):
    """A key, or a row of the positions, gives other transformers away; no report is made, and no file written."""
    options = {"depth": 1} if "patch" in name and "swin" not in name else {}
    state = timm.create_model(name, **options).state_dict()
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=FOREIGN[name]):
        inspect_file(tmp_path / "file.pth")
    for to in ("mae", "timm", "hf", "vitdet", "mmseg"):
        with pytest.raises(CheckpointError):
            convert_file(tmp_path / "file.pth", tmp_path / ("out" if to == "hf" else "out.pth"), to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["file.pth"]
    model = timm.create_model("g2sd_vit_tiny_patch16_224", depth=1)
    for load in (load_official, load_teacher, load_classifier, partial(load_encoder, model)):
        with pytest.raises(CheckpointError):
            load(tmp_path / "file.pth")


@pytest.mark.parametrize(("distilled", "grid"), [(False, (6, 8)), (False, (3, 5)), (True, (5, 10)), (True, (13, 5))])
def test_rectangular(tmp_path, distilled, grid):
    """Images that are no squares, by whoever trained on them: a count of patches beside a square proves nothing."""
    size = (16 * grid[0], 16 * grid[1])
    model = timm.create_model("g2sd_vit_tiny_patch16_224", distilled=distilled, img_size=size, depth=1)
    torch.save(model.state_dict(), tmp_path / "file.pth")
    assert inspect_file(tmp_path / "file.pth").contents.num_positions == grid[0] * grid[1]
    convert_file(tmp_path / "file.pth", tmp_path / "out.pth", to="timm")
    load_official(tmp_path / "file.pth", img_size=size)


def test_probe_with_foreign_keys(states, tmp_path):
    torch.save(states["probe"] | {"head.foreign": torch.zeros(1)}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"'probe', .*keys unexpected \(first: head\.foreign"):
        inspect_file(tmp_path / "file.pth")


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("vitdet", "backbone.net.blocks.0.ls1.gamma"),
        ("vitdet", "backbone.net.reg_token"),
        ("vitdet", "roi_heads.box_predictor.cls_score.weight"),
        ("vitdet", "neck.weight"),
        ("mmseg", "backbone.blocks.0.ls1.gamma"),
        ("mmseg", "decode_head.strange.weight"),
        ("hf", "vit.encoder.layer.0.layer_scale1.lambda1"),
        ("hf", "vit.embeddings.register_tokens"),
    ],
)
@pytest.mark.parametrize("to", ["vitdet", "mmseg", "mae"])
def test_other_layouts_with_foreign_keys(states, tmp_path, kind, key, to):
    """Files of detectors, segmentation models and transformers are compared whole, also where they would be copied."""
    torch.save(states[kind] | {key: torch.zeros(1)}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=re.escape(key.removeprefix("vit.")) + "|no whole detector: roi_heads"):
        inspect_file(tmp_path / "file.pth")
    with pytest.raises(CheckpointError):
        convert_file(tmp_path / "file.pth", tmp_path / "out.pth", to=to)
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("kind", ["vitdet", "mmseg", "hf"])
def test_other_layouts_without_a_key(states, tmp_path, kind):
    missing = next(key for key in states[kind] if key.endswith(("1.mlp.fc1.bias", "1.output.dense.bias")))
    torch.save(part(states[kind], missing), tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="1 keys missing"):
        inspect_file(tmp_path / "file.pth")


def test_plain_transformer(tmp_path):
    """timm's own, which are of the family."""
    torch.save(timm.create_model("vit_tiny_patch16_224", depth=2).state_dict(), tmp_path / "file.pth")
    assert inspect_file(tmp_path / "file.pth").contents.kind == "class"
    assert "in the layout of vitdet" in convert_file(tmp_path / "file.pth", tmp_path / "out.pth", to="vitdet")
    load_classifier(tmp_path / "file.pth")


@pytest.mark.parametrize("change", ["more", "less", "other"])
def test_not_whole(states, tmp_path, change):
    """A key more or less, or one of another shape, is named; nothing is written."""
    state = dict(states["mae"])
    key = "blocks.1.attn.proj.bias"
    value = state.pop(key)
    state |= {"more": {key: value, "blocks.1.attn.gate": value}, "less": {}, "other": {key: value[:-1]}}[change]
    torch.save(state, tmp_path / "file.pth")
    named = "blocks.1.attn.gate" if change == "more" else key
    load = partial(load_official, num_heads=3, decoder_num_heads=4)
    for call in (inspect_file, lambda file: convert_file(file, tmp_path / "out.pth", to="timm"), load):
        with pytest.raises(CheckpointError, match=rf"first: {named}"):
            call(tmp_path / "file.pth")
    assert not (tmp_path / "out.pth").exists()
