"""What a state dict holds, told from names and shapes."""

import pytest
import torch

from g2sd.layouts import contents_of, decoder_heads, encoder_heads
from visionkernels.weights import CheckpointError

HF = {
    "embeddings.patch_embeddings.projection.weight": (24, 3, 8, 8), "embeddings.position_embeddings": (1, 17, 24),
    "encoder.layer.0.layernorm_before.weight": (24,), "encoder.layer.1.layernorm_before.weight": (24,),
    "classifier.weight": (5, 24),
}  # fmt: skip


def zeros(shapes):
    return {key: torch.zeros(shape) for key, shape in shapes.items()}


class TestContentsOf:
    @pytest.mark.parametrize(
        ("layout", "wanted"),
        [
            ("gd_named_tiny/teacher", ("mae", 768, 12, 16, 196, 512, 8, None, None)),
            ("gd_named_tiny/student", ("generic", 192, 12, 16, 196, 128, 4, 768, 512)),
            ("gd_named_small/student", ("generic", 384, 12, 16, 196, 256, 4, 768, 512)),
            ("gd_tiny_all/teacher", ("mae", 96, 3, 16, 16, 64, None, None, None)),
            ("vit_distilled/model", ("distilled", 48, 3, 16, 16, None, None, None, None)),
            ("vit_teacher_gap/model", ("average", 48, 3, 16, 16, None, None, None, None)),
            ("vit_tiny_patch16_distilled/model", ("distilled", 192, 12, 16, 196, None, None, None, None)),
        ],
    )
    def test_official(self, layouts, layout, wanted):
        state = {key: torch.empty(shape, device="meta") for key, shape in layouts[layout].items()}
        found = contents_of(state, "file.pth")
        kind, width, depth, patch, positions, decoder, blocks, teacher, teacher_decoder = wanted
        assert (found.kind, found.width, found.depth) == (kind, width, depth)
        assert (found.patch_size, found.in_chans, found.num_positions) == ((patch, patch), 3, positions)
        assert found.decoder_width == decoder and blocks in (None, found.decoder_depth)
        assert (found.teacher_width, found.teacher_decoder_width) == (teacher, teacher_decoder)
        classes = layouts[layout].get("head.weight", [None])[0]
        assert found.num_classes == classes

    def test_detector(self, official):
        found = contents_of(official("vitdet_backbone/backbone", "backbone."), "file.pth")
        assert (found.kind, found.width, found.depth, found.num_positions) == ("vitdet", 48, 4, 16)

    @pytest.mark.parametrize("prefix", ["", "student."])
    def test_segmentation(self, official, prefix):
        state = official("seg_model/model", prefix) | (official("seg_model/model", "teacher.") if prefix else {})
        found = contents_of(state, "file.pth")
        assert (found.kind, found.width, found.depth, found.num_classes) == ("mmseg", 32, 4, 6)

    @pytest.mark.parametrize("prefix", ["", "vit."])
    def test_transformers(self, prefix):
        shapes = {(key if key == "classifier.weight" else prefix + key): shape for key, shape in HF.items()}
        found = contents_of(zeros(shapes), "file.pth")
        assert (found.kind, found.width, found.depth, found.patch_size) == ("hf", 24, 2, (8, 8))
        assert (found.num_positions, found.num_classes) == (16, 5)

    def test_parts_of_an_autoencoder(self, official):
        """The encoder of a file alone, with a head, and with the head of a linear probe."""
        state = official("gd_tiny_all/teacher")
        encoder = {key: value for key, value in state.items() if not key.startswith(("decoder", "mask_token"))}
        kinds = {
            "encoder": {},
            "class": {"head.weight": torch.zeros(10, 96)},
            "probe": {"head.0.running_mean": torch.zeros(96), "head.1.weight": torch.zeros(10, 96)},
        }
        for kind, more in kinds.items():
            found = contents_of(encoder | more, "file.pth")
            assert (found.kind, found.num_classes) == (kind, 10 if more else None)

    def test_without_positions(self, official):
        state = official("gd_tiny_all/teacher")
        del state["pos_embed"]
        assert contents_of(state, "file.pth").num_positions is None

    @pytest.mark.parametrize(
        "keys", [(), ("weight",), ("patch_embed.proj.weight",), ("blocks.0.norm1.weight",)], ids=str
    )
    def test_other_files(self, keys):
        state = {key: torch.zeros(2, 3, 4, 4) for key in keys}
        with pytest.raises(CheckpointError, match=r"file.pth holds no vision transformer of MAE's family"):
            contents_of(state, "file.pth")

    @pytest.mark.parametrize(
        ("layout", "prefix", "key", "shape"),
        [
            ("gd_tiny_all/student", "", "patch_embed.proj.weight", (48, 768)),
            ("gd_tiny_all/student", "", "pos_embed", (17, 48)),
            ("gd_tiny_all/student", "", "decoder_embed.weight", ()),
            ("gd_tiny_all/student", "", "decoderfeature_pred.fc2.weight", (64,)),
            ("vit_distilled/model", "", "head.weight", ()),
            ("seg_model/model", "", "decode_head.conv_seg.weight", (6,)),
            ("vitdet_backbone/backbone", "backbone.", "backbone.net.pos_embed", (17,)),
        ],
    )
    def test_damaged(self, official, layout, prefix, key, shape):
        """Sizes that cannot be told are an error of the file."""
        state = official(layout, prefix) | {key: torch.zeros(shape)}
        with pytest.raises(CheckpointError, match=rf"file.pth is damaged: {key} has shape .* must have \d axes"):
            contents_of(state, "file.pth")

    def test_head_without_backbone(self):
        with pytest.raises(CheckpointError, match=r"first keys are decode_head\.conv_seg\.weight"):
            contents_of({"decode_head.conv_seg.weight": torch.zeros(6, 3, 1, 1)}, "file.pth")


class TestHeads:
    @pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)])
    def test_encoder(self, width, heads):
        assert encoder_heads(width) == heads
        assert encoder_heads(width, 2) == 2

    @pytest.mark.parametrize(("width", "heads"), [(64, 4), (128, 4), (192, 8), (256, 8), (512, 16)])
    def test_decoder(self, width, heads):
        assert decoder_heads(width) == heads

    def test_unusual(self):
        with pytest.raises(
            ValueError, match=r"width 48 has no known number of heads \(known widths: \[192, .*give num_heads"
        ):
            encoder_heads(48)
        with pytest.raises(ValueError, match="give decoder_num_heads"):
            decoder_heads(48)
        assert encoder_heads(48, 3) == 3
