"""Weights files of every stage: they load strictly, and what does not fit says how."""

import argparse

import pytest
import timm
import torch

from g2sd.mae import MaskedAutoencoder
from g2sd.official import load_encoder, load_official, load_teacher
from g2sd.positions import interpolate_positions, sincos_positions
from g2sd.vit import DistilledViT
from visionkernels.weights import CheckpointError, Trained

HEADS = {"num_heads": 3, "decoder_num_heads": 4}


def heads(number):
    """A record that says the number of heads, which shapes do not show."""
    return Trained(kind="classifier", package="g2sd", options={"num_heads": number})


def save(path, state):
    torch.save(state, path)
    return path


@pytest.fixture
def mae(official, tmp_path):
    """The official layout of a small teacher."""
    return save(tmp_path / "mae.pth", {"model": official("gd_tiny_all/teacher")})


@pytest.fixture
def generic(official, tmp_path):
    return save(tmp_path / "checkpoint-299.pth", {"model": official("gd_tiny_all/student"), "epoch": 299})


@pytest.fixture
def classifier(official, tmp_path):
    return save(tmp_path / "distilled.pth", {"model": official("vit_distilled/model")})


class TestLoadOfficial:
    @pytest.mark.parametrize(
        ("layout", "kind", "heads"),
        [
            ("gd_tiny_all/teacher", MaskedAutoencoder, HEADS),
            ("gd_tiny_all/student", MaskedAutoencoder, HEADS),
            ("vit_distilled/model", DistilledViT, {"num_heads": 3}),
            ("vit_teacher_gap/model", timm.models.VisionTransformer, {"num_heads": 3}),
            ("vit_tiny_patch16_distilled/model", DistilledViT, {}),
            ("gd_named_tiny/student", MaskedAutoencoder, {}),
        ],
    )
    def test_every_layout(self, official, tmp_path, layout, kind, heads):
        state = official(layout)
        model = load_official(save(tmp_path / "file.pth", {"model": state}), **heads)
        assert type(model) is kind and not model.training
        torch.testing.assert_close(dict(model.state_dict()), state)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            lambda state: {"model": state},
            lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
            lambda state: {"model": state, "args": argparse.Namespace(lr=1e-3, model="x"), "epoch": 3, "scaler": {}},
        ],
        ids=["bare", "model", "module", "namespace"],
    )
    def test_wrappings(self, official, tmp_path, wrap):
        state = official("gd_tiny_all/student")
        model = load_official(save(tmp_path / "file.pth", wrap(state)), **HEADS)
        torch.testing.assert_close(dict(model.state_dict()), state)

    def test_safetensors(self, official, tmp_path):
        state = official("vit_distilled/model")
        heads(3).save(tmp_path / "file.safetensors", state)
        model = load_official(tmp_path / "file.safetensors")
        torch.testing.assert_close(dict(model.state_dict()), state)
        assert model.eval_head == "mean"

    def test_told_head(self, official, tmp_path):
        """Files of NKD, which trains one head, say which one counts."""
        trained = heads(3).with_details(eval_head="class")
        trained.save(tmp_path / "file.safetensors", official("vit_distilled/model"))
        model, images = load_official(tmp_path / "file.safetensors"), torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(model(images), model.head(model.forward_features(images)[:, 0]))

    def test_code_is_not_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (eval, ("1/0",))

        with pytest.raises(CheckpointError):
            load_official(save(tmp_path / "evil.pth", {"model": {"weight": torch.zeros(1)}, "args": Evil()}))

    @pytest.mark.parametrize("img_size", [96, (32, 80)], ids=str)
    def test_learned_positions(self, classifier, official, img_size):
        model = load_official(classifier, num_heads=3, img_size=img_size)
        wanted = interpolate_positions(official("vit_distilled/model")["pos_embed"], model.patch_embed.grid_size)
        torch.testing.assert_close(model.pos_embed.detach(), wanted)
        size = (img_size,) * 2 if isinstance(img_size, int) else img_size
        assert model(torch.randn(1, 3, *size)).shape == (1, 10)

    def test_fixed_positions(self, mae):
        """Those of an autoencoder are computed for the new grid."""
        model = load_official(mae, img_size=(32, 80), **HEADS)
        torch.testing.assert_close(model.pos_embed.detach(), sincos_positions(96, (2, 5)))
        torch.testing.assert_close(model.decoder_pos_embed.detach(), sincos_positions(64, (2, 5)))
        assert model(torch.randn(1, 3, 32, 80))[0].shape == (1, 10, 768)

    def test_entry(self, official, tmp_path):
        states = [official("gd_tiny_all/teacher"), official("gd_tiny_all/student")]
        path = save(tmp_path / "file.pth", {"teacher": states[0], "student": states[1]})
        for entry, state in zip(("teacher", "student"), states, strict=True):
            torch.testing.assert_close(dict(load_official(path, entry=entry, **HEADS).state_dict()), state)

    def test_kind(self, mae):
        assert load_official(mae, kind="mae", **HEADS)
        with pytest.raises(CheckpointError, match=r"mae\.pth holds 'mae', not 'distilled'; run `g2sd inspect"):
            load_official(mae, kind="distilled")

    def test_no_size(self, mae):
        """0 is a wrong size, and not one that was left out."""
        with pytest.raises(ValueError, match="img_size=0x0 must be a multiple of"):
            load_official(mae, img_size=0, **HEADS)

    def test_unusual_width_needs_heads(self, mae):
        with pytest.raises(ValueError, match=r"width 96 has no known number of heads .* give num_heads"):
            load_official(mae)
        with pytest.raises(ValueError, match="embed_dim=96 must be a multiple of num_heads=5"):
            load_official(mae, num_heads=5)

    def test_not_square(self, official, tmp_path):
        state = official("vit_distilled/model")
        state["pos_embed"] = state["pos_embed"][:, :13]
        path = save(tmp_path / "file.pth", state)
        with pytest.raises(ValueError, match=r"positions for 12 patches, which are no square; give img_size as"):
            load_official(path, num_heads=3)
        model = load_official(path, num_heads=3, img_size=(48, 64))
        torch.testing.assert_close(model.pos_embed.detach(), state["pos_embed"])

    def test_missing_unexpected_misshapen(self, official, tmp_path):
        state = official("gd_tiny_all/student")
        gone = [key for key in state if key.startswith("blocks.1.")][:7]
        less = {key: value for key, value in state.items() if key not in gone}
        with pytest.raises(CheckpointError, match=rf"7 keys missing \(first: {', '.join(gone[:4])}"):
            load_official(save(tmp_path / "less.pth", less), **HEADS)
        more = {**state, **{f"strange{number}": torch.zeros(1) for number in range(6)}}
        with pytest.raises(CheckpointError, match=r"6 keys unexpected \(first: strange0, strange1"):
            load_official(save(tmp_path / "more.pth", more), **HEADS)
        bad = {**state, "norm.weight": torch.zeros(3)}
        with pytest.raises(CheckpointError, match=r"1 keys misshapen \(first: norm.weight \[3\] instead of \[48\]"):
            load_official(save(tmp_path / "bad.pth", bad), **HEADS)

    @pytest.mark.parametrize(("layout", "prefix"), [("vitdet_backbone/backbone", "backbone."), ("seg_model/model", "")])
    def test_other_kinds(self, official, tmp_path, layout, prefix):
        with pytest.raises(CheckpointError, match=r"holds '(vitdet|mmseg)'; run `g2sd inspect"):
            load_official(save(tmp_path / "file.pth", official(layout, prefix)))

    def test_damaged(self, mae, tmp_path):
        """Truncated anywhere: one kind of error, that names the file."""
        content = mae.read_bytes()
        for length in (0, 1, 7, 9, 100, len(content) // 2, len(content) - 1):
            path = tmp_path / "cut.pth"
            path.write_bytes(content[:length])
            with pytest.raises(CheckpointError, match=r"cut\.pth"):
                load_official(path, **HEADS)

    def test_damaged_safetensors(self, official, tmp_path):
        heads(3).save(tmp_path / "whole.safetensors", official("vit_distilled/model"))
        content = (tmp_path / "whole.safetensors").read_bytes()
        for length in (9, 50, len(content) // 2, len(content) - 1):
            (tmp_path / "cut.safetensors").write_bytes(content[:length])
            with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
                load_official(tmp_path / "cut.safetensors")

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.pth is not a file"):
            load_official(tmp_path / "none.pth")

    @pytest.mark.parametrize("stage", ["pretrain", "generic", "finetune", "specific"])
    def test_own_files(self, runs, stage):
        """Files of `g2sd train` tell their heads and open as they were."""
        from visionkernels.weights import read_checkpoint

        model = load_official(runs[stage])
        torch.testing.assert_close(dict(model.state_dict()), read_checkpoint(runs[stage]).state)
        heads = {"pretrain": (4, 3), "generic": (3, 2), "finetune": (4, None), "specific": (3, None)}[stage]
        assert model.blocks[0].attn.num_heads == heads[0]
        if heads[1] is not None:
            assert model.decoder_blocks[0].attn.num_heads == heads[1]


class TestLoadTeacher:
    def test_whole(self, mae, official):
        model = load_teacher(mae, img_size=(32, 64), **HEADS)
        torch.testing.assert_close(
            model.decoder_norm.weight.detach(), official("gd_tiny_all/teacher")["decoder_norm.weight"]
        )
        assert model.grid == (2, 4)

    def test_student_as_teacher(self, generic):
        assert load_teacher(generic, **HEADS).decoder_width == 32

    def test_encoder_alone(self, official, tmp_path):
        """Training against a decoder of random weights would end with a useless student."""
        state = official("gd_tiny_all/teacher")
        encoder = {key: value for key, value in state.items() if not key.startswith(("decoder", "mask_token"))}
        path = save(tmp_path / "mae_pretrain_vit_base.pth", {"model": encoder})
        with pytest.raises(
            CheckpointError, match=r"an encoder without its decoder; .*as in mae_pretrain_vit_base_full\.pth .*issue 8"
        ):
            load_teacher(path)

    @pytest.mark.parametrize("part", ["decoder_blocks.1.", "decoder_pos_embed", "decoder_embed.bias", "mask_token"])
    def test_part_of_the_decoder(self, official, tmp_path, part):
        """A decoder with a hole is refused too."""
        state = {key: value for key, value in official("gd_tiny_all/teacher").items() if not key.startswith(part)}
        with pytest.raises(CheckpointError, match=r"keys missing"):
            load_teacher(save(tmp_path / "file.pth", state), **HEADS)

    def test_classifier(self, classifier):
        with pytest.raises(CheckpointError, match=r"holds 'distilled'; generic distillation needs encoder and decoder"):
            load_teacher(classifier)


class TestLoadEncoder:
    @pytest.mark.parametrize("source", ["mae", "generic"])
    def test_distilled(self, request, official, source):
        """Fresh are exactly the heads and the token of one; everything else is the file's."""
        width = {"mae": 96, "generic": 48}[source]
        model = timm.create_model("g2sd_vit_tiny_patch16_224", img_size=64, embed_dim=width, depth=3, num_classes=10)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        state = official({"mae": "gd_tiny_all/teacher", "generic": "gd_tiny_all/student"}[source])
        said = load_encoder(model, request.getfixturevalue(source))
        assert said.endswith(f"({source}); fresh: head, head_dist, dist_token")
        fresh = {key for key in before if key not in state}
        assert fresh == {"dist_token", "head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, before[key] if key in fresh else state[key])

    def test_average(self, generic, official):
        """A classifier of patches norms their mean: that norm is fresh, and the file's has no place."""
        model = timm.create_model(
            "g2sd_vit_tiny_patch16_224", distilled=False, img_size=64, embed_dim=48, depth=3, num_classes=10
        )
        assert load_encoder(model, generic).endswith("fresh: head, fc_norm")
        state = official("gd_tiny_all/student")
        for key, value in model.state_dict().items():
            if key.startswith(("head.", "fc_norm.")):
                assert key not in state
            else:
                torch.testing.assert_close(value, state[key])

    def test_between_classifiers(self, official, tmp_path):
        """The norm of the mean of the patches becomes that of all tokens."""
        state = official("vit_teacher_gap/model")
        model = timm.create_model("g2sd_vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=3, num_classes=10)
        load_encoder(model, save(tmp_path / "file.pth", state))
        torch.testing.assert_close(model.norm.weight.detach(), state["fc_norm.weight"])

    def test_classes_of_a_probe(self, official, tmp_path):
        state = official("gd_tiny_all/teacher") | {"head.1.weight": torch.zeros(10, 96), "head.1.bias": torch.zeros(10)}
        state = {key: value for key, value in state.items() if not key.startswith(("decoder", "mask_token"))}
        model = timm.create_model("g2sd_vit_tiny_patch16_224", img_size=64, embed_dim=96, depth=3, num_classes=4)
        assert "(probe); fresh: head, head_dist, dist_token" in load_encoder(model, save(tmp_path / "file.pth", state))

    def test_positions(self, generic, official):
        model = timm.create_model("g2sd_vit_tiny_patch16_224", img_size=(96, 48), embed_dim=48, depth=3)
        load_encoder(model, generic)
        wanted = interpolate_positions(official("gd_tiny_all/student")["pos_embed"], (6, 3))
        torch.testing.assert_close(model.pos_embed.detach(), wanted)

    def test_wrong_width(self, generic):
        model = timm.create_model("g2sd_vit_tiny_patch16_224", img_size=64, embed_dim=96, depth=3)
        with pytest.raises(
            CheckpointError, match=r"misshapen \(first: .*cls_token \[1, 1, 48\] instead of \[1, 1, 96\]"
        ):
            load_encoder(model, generic)

    @pytest.mark.parametrize(("depth", "words"), [(4, "missing"), (2, "unexpected")])
    def test_wrong_depth(self, generic, depth, words):
        model = timm.create_model("g2sd_vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=depth)
        with pytest.raises(CheckpointError, match=rf"12 keys {words}"):
            load_encoder(model, generic)

    def test_wrong_heads(self, runs):
        """Files of ours tell what shapes do not: a model of other heads would compute something else."""
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2}
        with pytest.raises(CheckpointError, match="is of num_heads=3, the model of 6; they must agree"):
            load_encoder(timm.create_model("g2sd_vit_tiny_patch16_224", num_heads=6, **sizes), runs["generic"])
        load_encoder(timm.create_model("g2sd_vit_tiny_patch16_224", num_heads=3, **sizes), runs["generic"])

    @pytest.mark.parametrize(("layout", "prefix"), [("vitdet_backbone/backbone", "backbone."), ("seg_model/model", "")])
    def test_other_kinds(self, vit, official, tmp_path, layout, prefix):
        path = save(tmp_path / "file.pth", official(layout, prefix))
        with pytest.raises(CheckpointError, match="whose encoder starts no other kind of model"):
            load_encoder(vit(), path)

    def test_other_files(self, vit, tmp_path):
        with pytest.raises(CheckpointError, match="no vision transformer of MAE's family"):
            load_encoder(vit(), save(tmp_path / "file.pth", {"conv1.weight": torch.zeros(2, 3, 3, 3)}))
