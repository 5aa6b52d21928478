"""Detectors in detectron2's layout, both ways, and encoders of other stages in a detector."""

import pickle
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from g2sd.detection_checkpoint import detector_rules, load_detection_encoder, load_official_detection
from g2sd.mask_rcnn import detection_model
from g2sd.positions import interpolate_positions
from g2sd.vitdet import ViTDetBackbone
from visionkernels.weights import CheckpointError, read_checkpoint

SIZES = {
    "num_classes": 4, "img_size": 64, "embed_dim": 24, "depth": 3, "num_heads": 3, "window_size": 2,
    "window_blocks": (0, 2), "pretrain_size": 48, "pyramid_channels": 16, "head_width": 32,
}  # fmt: skip


@pytest.fixture
def official():
    """A detector's state under detectron2's names."""
    model = detection_model("tiny", **SIZES)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return detector_rules().inverse().rename(model.state_dict())


def saved(tmp_path, state) -> Path:
    torch.save({"model": state, "iteration": 7}, tmp_path / "detector.pth")
    return tmp_path / "detector.pth"


class TestLoadOfficialDetection:
    def test_there_and_back(self, tmp_path, official):
        """Every tensor comes back, and the sizes are those of the file."""
        model = load_official_detection(saved(tmp_path, official))
        assert not model.training
        assert_close(detector_rules().inverse().rename(model.state_dict()), official, rtol=0, atol=0)
        net = model.backbone.net
        assert (model.num_classes, model.img_size, net.patch_size, net.pretrain_grid) == (4, 64, 16, 3)
        assert [block.window_size for block in net.blocks] == [2, 0, 2]
        assert {block.attn.num_heads for block in net.blocks} == {3}

    def test_the_background_is_last_there(self, tmp_path, official):
        bias = torch.tensor([10.0, 20.0, 30.0, 90.0])
        official["roi_heads.box_predictor.cls_score.bias"] = bias
        official["roi_heads.box_predictor.bbox_pred.bias"] = torch.arange(12.0)
        official["roi_heads.mask_head.predictor.bias"] = torch.tensor([1.0, 2.0, 3.0])
        heads = load_official_detection(saved(tmp_path, official)).roi_heads
        assert heads.box_predictor.cls_score.bias.tolist() == [90, 10, 20, 30]
        assert heads.box_predictor.bbox_pred.bias.tolist() == [0, 0, 0, 0, *range(12)]
        assert heads.mask_predictor.mask_fcn_logits.bias.tolist() == [0, 1, 2, 3]

    def test_official_names(self, official):
        """Those that the specification lists, with their shapes."""
        shapes = {key: list(value.shape) for key, value in official.items()}
        wanted = {
            "backbone.net.pos_embed": [1, 10, 24], "backbone.net.blocks.1.attn.rel_pos_h": [7, 8],
            "backbone.net.blocks.0.attn.rel_pos_w": [3, 8], "backbone.simfp_2.3.weight": [12, 6, 2, 2],
            "backbone.simfp_3.1.norm.weight": [16], "backbone.simfp_5.2.weight": [16, 16, 3, 3],
            "proposal_generator.rpn_head.conv.conv1.weight": [16, 16, 3, 3],
            "proposal_generator.rpn_head.objectness_logits.weight": [3, 16, 1, 1],
            "proposal_generator.rpn_head.anchor_deltas.weight": [12, 16, 1, 1],
            "roi_heads.box_head.conv4.norm.bias": [16], "roi_heads.box_head.fc1.weight": [32, 16 * 49],
            "roi_heads.box_predictor.cls_score.weight": [4, 32], "roi_heads.box_predictor.bbox_pred.weight": [12, 32],
            "roi_heads.mask_head.mask_fcn4.weight": [16, 16, 3, 3], "roi_heads.mask_head.mask_fcn1.norm.weight": [16],
            "roi_heads.mask_head.deconv.weight": [16, 16, 2, 2], "roi_heads.mask_head.predictor.weight": [3, 16, 1, 1],
        }  # fmt: skip
        assert {key: shapes.get(key) for key in wanted} == wanted
        assert not any(key.endswith(("box_head.conv1.bias", "mask_fcn1.bias", "simfp_2.4.bias")) for key in shapes)

    def test_what_is_not_the_detector(self, tmp_path, official):
        """The adapter of a distilled student, and constants of older files."""
        more = {"stu_adapter.conv.4.weight": torch.zeros(3), "pixel_mean": torch.zeros(3, 1, 1)}
        more |= {"proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4)}
        model = load_official_detection(saved(tmp_path, official | more))
        assert_close(model.backbone.net.pos_embed.data, official["backbone.net.pos_embed"])

    def test_model_zoo(self, tmp_path, official):
        """A pickle of arrays, as detectron2 publishes its models."""
        content = {"model": {key: value.numpy() for key, value in official.items()}, "__author__": "detectron2"}
        (tmp_path / "model_final.pkl").write_bytes(pickle.dumps(content))
        model = load_official_detection(tmp_path / "model_final.pkl")
        assert_close(detector_rules().inverse().rename(model.state_dict()), official, rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"roi_heads.box_head.fc1.weight": None}, "is no whole detector: roi_heads.box_head.fc1.weight missing"),
            (
                {"roi_heads.mask_head.deconv.weight": None},
                r"1 keys missing \(first: roi_heads.mask_predictor.conv5_mask",
            ),
            ({"backbone.net.extra.weight": torch.zeros(2)}, r"1 keys unexpected \(first: backbone.net.extra.weight"),
            ({"roi_heads.strange.weight": torch.zeros(2)}, r"is damaged or no Mask R-CNN of ViTDet: 1 keys are in no"),
            ({"backbone.net.blocks.0.attn.rel_pos_h": None}, "is damaged or no Mask R-CNN of ViTDet"),
            ({"backbone.net.pos_embed": torch.zeros(1, 12, 24)}, "keys misshapen"),
            ({"roi_heads.box_predictor.bbox_pred.bias": torch.zeros(4)}, "1 keys misshapen"),
            ({"roi_heads.box_predictor.bbox_pred.bias": torch.tensor(1.0)}, "is damaged or no Mask R-CNN of ViTDet"),
            ({"roi_heads.box_predictor.cls_score.bias": torch.tensor(1.0)}, "is damaged or no Mask R-CNN of ViTDet"),
            ({"roi_heads.box_head.conv1.weight": torch.tensor(1.0)}, "1 keys misshapen"),
            (
                {"backbone.net.patch_embed.proj.weight": torch.zeros(0, 3, 16, 16)},
                "is damaged: backbone.net.patch_embed",
            ),
            ({"backbone.net.blocks.0.attn.rel_pos_h": torch.zeros(0, 0)}, "is damaged or no Mask R-CNN of ViTDet"),
            ({"backbone.net.blocks.0.attn.rel_pos_h": torch.tensor(1.0)}, "is damaged or no Mask R-CNN of ViTDet"),
        ],
    )
    def test_damaged(self, tmp_path, official, change, message):
        state = {key: value for key, value in (official | change).items() if value is not None}
        with pytest.raises(CheckpointError, match=message):
            load_official_detection(saved(tmp_path, state))

    def test_other_kinds(self, runs):
        with pytest.raises(CheckpointError, match=r"holds 'generic', not a detector; run `g2sd inspect"):
            load_official_detection(runs["generic"])


# of the runs of every stage
ENCODER = {"img_size": 64, "patch_size": 8, "depth": 2, "window_size": 3, "window_blocks": (0,), "pretrain_size": 32}


class TestLoadDetectionEncoder:
    @pytest.mark.parametrize(
        ("stage", "width", "heads"), [("pretrain", 32, 4), ("generic", 24, 3), ("finetune", 32, 4), ("specific", 24, 3)]
    )
    def test_other_stages(self, runs, stage, width, heads):
        backbone = ViTDetBackbone(**ENCODER, embed_dim=width, num_heads=heads)
        told = load_detection_encoder(backbone, runs[stage])
        assert told.startswith(f"encoder of {runs[stage]}") and told.endswith(
            "fresh: relative positions, pyramid, heads"
        )
        state, own = read_checkpoint(runs[stage]).state, backbone.state_dict()
        for key in ("pos_embed", "patch_embed.proj.weight", "blocks.1.attn.qkv.weight", "blocks.0.mlp.fc2.bias"):
            assert_close(own[key], state[key], rtol=0, atol=0)
        assert not any(value.any() for key, value in own.items() if "rel_pos" in key)

    def test_another_grid(self, runs):
        backbone = ViTDetBackbone(**(ENCODER | {"pretrain_size": 48}), embed_dim=24, num_heads=3)
        load_detection_encoder(backbone, runs["generic"])
        table = read_checkpoint(runs["generic"]).state["pos_embed"]
        assert_close(backbone.pos_embed.data, interpolate_positions(table, (6, 6)))

    def test_a_detector(self, tmp_path, official):
        """Relative positions come along, interpolated where the pictures are of another size."""
        path = saved(tmp_path, official)
        sizes = {"embed_dim": 24, "depth": 3, "num_heads": 3, "window_blocks": (0, 2), "pretrain_size": 48}
        same = ViTDetBackbone(64, **sizes, window_size=2)
        assert load_detection_encoder(same, path) == f"encoder of {path} (vitdet); fresh: pyramid, heads"
        for key, value in same.state_dict().items():
            assert_close(value, official[f"backbone.net.{key}"], rtol=0, atol=0)
        larger = ViTDetBackbone(128, **sizes, window_size=2)
        load_detection_encoder(larger, path)
        table, wide = official["backbone.net.blocks.1.attn.rel_pos_h"], larger.blocks[1].attn.rel_pos_h.data
        assert (len(table), len(wide)) == (7, 15)
        assert_close(wide[7], table[3])  # the distance 0

    def test_errors(self, tmp_path, runs):
        wide = ViTDetBackbone(**ENCODER, embed_dim=48, num_heads=3)
        with pytest.raises(CheckpointError, match="does not fit ViTDetBackbone"):
            load_detection_encoder(wide, runs["generic"])
        deep = ViTDetBackbone(**(ENCODER | {"depth": 3}), embed_dim=24, num_heads=3)
        with pytest.raises(CheckpointError, match=r"12 keys missing \(first: blocks.2"):
            load_detection_encoder(deep, runs["generic"])
