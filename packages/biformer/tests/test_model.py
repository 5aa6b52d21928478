import re

import pytest
import timm
import torch
from torch import nn

import biformer
from biformer.model import BiFormerBackbone, BiFormerBlock
from visionkernels.testing.tracing import check_traced

NAMES = timm.list_models("biformer_*")
MICRO = {"depth": (1, 1, 1, 1), "embed_dim": (16, 16, 32, 32), "topks": (1, 2, 4, -2), "head_dim": 16, "n_win": 2}


def micro(name="biformer_tiny", **options):
    topks = (1, 2, 4, -1) if name.endswith("nchw") else MICRO["topks"]
    return timm.create_model(name, **(MICRO | {"topks": topks, "num_classes": 5} | options))


def test_registered():
    assert NAMES == ["biformer_base", "biformer_small", "biformer_stl", "biformer_stl_nchw", "biformer_tiny"]


@pytest.mark.parametrize("name", NAMES)
class TestEveryModel:
    """timm's requirements of a model, on small versions of all."""

    def test_forward_backward(self, name):
        model = micro(name, drop_path_rate=0.1)
        model(torch.randn(2, 3, 64, 64)).square().sum().backward()
        assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []

    def test_default_cfg(self, name):
        model = micro(name)
        assert model.default_cfg["input_size"] == (3, 224, 224)
        assert model.default_cfg["crop_pct"] == 0.875
        assert model.default_cfg["interpolation"] == "bicubic"
        state = model.state_dict()
        assert f"{model.default_cfg['classifier']}.weight" in state
        assert f"{model.default_cfg['first_conv']}.weight" in state
        assert micro(name, img_size=(96, 128)).default_cfg["input_size"] == (3, 96, 128)

    def test_classifier(self, name):
        model = micro(name).eval()
        x = torch.randn(2, 3, 64, 64)
        features = model.forward_features(x)
        assert features.shape == (2, 32, 2, 2)
        assert model.forward_head(features, pre_logits=True).shape == (2, 32)
        torch.testing.assert_close(model(x), model.forward_head(features))
        assert model.get_classifier() is model.head.fc
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)
        model.reset_classifier(0)
        assert model(x).shape == (2, 32)
        assert micro(name, num_classes=0, global_pool="")(x).shape == (2, 32, 2, 2)
        assert micro(name, in_chans=1)(x[:, :1]).shape == (2, 5)

    def test_features(self, name):
        model = micro(name, features_only=True)
        maps = model(torch.randn(1, 3, 96, 128))
        assert [tuple(m.shape) for m in maps] == [(1, 16, 24, 32), (1, 16, 12, 16), (1, 32, 6, 8), (1, 32, 3, 4)]
        assert model.feature_info.reduction() == [4, 8, 16, 32]
        assert model.feature_info.channels() == [16, 16, 32, 32]
        chosen = micro(name, features_only=True, out_indices=(1, 2))(torch.randn(1, 3, 96, 128))
        assert [m.shape[1:] for m in chosen] == [maps[1].shape[1:], maps[2].shape[1:]]

    def test_checkpointing(self, name):
        model, x = micro(name), torch.randn(1, 3, 64, 64)
        gradients = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            model.zero_grad()
            model.train()(x.clone()).sum().backward()
            gradients.append(model.stages[0][0].mlp.fc1.weight.grad.clone())
        torch.testing.assert_close(*gradients)

    def test_state(self, name):
        one, two = micro(name).eval(), micro(name).eval()
        two.load_state_dict(one.state_dict())
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(one(x), two(x))

    def test_sizes(self, name):
        """Any size works; the NCHW form needs a pixel per region in every stage."""
        model = micro(name).eval()
        sizes = [(64, 96), (61, 83)] + ([] if name.endswith("nchw") else [(32, 32)])
        for size in sizes:
            assert model(torch.randn(1, 3, *size)).isfinite().all()

    def test_layouts(self, name):
        model, x = micro(name).eval(), torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), model(x))
        assert model(x[:0]).shape == (0, 5)

    def test_group_matcher(self, name):
        model = micro(name)
        groups = timm.models.group_parameters(model, model.group_matcher())
        grouped = [key for keys in groups.values() for key in keys]
        assert sorted(grouped) == sorted(key for key, _ in model.named_parameters())


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"])
def test_traced(name):
    check_traced(micro(name), torch.randn(1, 3, 64, 96))


# small and base differ from tiny in their sizes alone
@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"])
def test_compile_export(name):
    model, x = micro(name).eval(), torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    if name != "biformer_tiny":  # test_export.py exports it
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl_nchw"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_peft(name, use_dora):
    """Adapters of peft on any layer, beside and merged into the weights, are one model."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=["qkv", "proj", "fc1"], r=4, use_dora=use_dora)
    adapted, images = peft.get_peft_model(micro(name), config).eval(), torch.randn(2, 3, 64, 64)
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        beside = adapted(images)
        merged = adapted.merge_and_unload().eval()(images)
    torch.testing.assert_close(beside, merged, rtol=1e-4, atol=1e-5)


class TestBiFormer:
    def test_drop_path_rates(self):
        """Rates grow linearly from 0 over all blocks."""
        model = timm.create_model("biformer_tiny", drop_path_rate=0.13, num_classes=1)
        rates = [
            getattr(block.drop_path, "drop_prob", 0.0) for block in model.modules() if isinstance(block, BiFormerBlock)
        ]
        torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.13, 14))

    def test_init(self):
        model = micro()
        assert 0.015 < model.stages[0][0].attn.qkv.weight.std() < 0.025
        assert not model.stages[0][0].attn.qkv.bias.any()

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"depth": (1, 1)}, ValueError, r"depth=\(1, 1\) has 2 values; give one for each of the 4 stages"),
            ({"qk_dims": ()}, ValueError, r"qk_dims=\(\) has 0 values; give one for each of the 4 stages"),
            ({"head_dim": 24}, ValueError, r"qk_dims\[0\]=16 is not divisible by head_dim=24"),
            ({"topks": (1, 2, 5, -2)}, ValueError, r"topk=5 is outside \[1, 4\]"),
            ({"topks": (1, 2, 4, -3)}, ValueError, "topk=-3 is unknown"),
            ({"topks": (1, 2, 4, -2), "data_format": "NCHW"}, ValueError, "topk=-2 is unknown to the NCHW form"),
            ({"pos_conv": 5}, ValueError, "pos_conv=5 must be 3, or 0 for none"),
            ({"output_stride": 4}, ValueError, "output_stride=4 must be one of 8, 16, 32"),
            ({"name": "biformer_stl", "output_stride": 16}, ValueError, "output_stride=16 needs patches that overlap"),
        ],
    )
    def test_errors(self, options, error, message):
        with pytest.raises(error, match=message):
            micro(**options)

    @pytest.mark.parametrize("output_stride", [8, 16])
    def test_output_stride(self, output_stride):
        """The denser map of the dilated model holds the values of the ordinary one (with convolutions for mixers)."""
        ordinary = micro(topks=(0, 0, 0, 0)).eval()
        dilated = micro(topks=(0, 0, 0, 0), output_stride=output_stride).eval()
        dilated.load_state_dict(ordinary.state_dict())
        images, step = torch.randn(1, 3, 64, 96), 32 // output_stride
        with torch.no_grad():
            coarse, dense = ordinary.forward_features(images), dilated.forward_features(images)
        assert dense.shape[2:] == (64 // output_stride, 96 // output_stride)
        torch.testing.assert_close(dense[..., ::step, ::step], coarse, rtol=1e-5, atol=1e-5)
        assert [info["reduction"] for info in dilated.feature_info] == [min(x, output_stride) for x in (4, 8, 16, 32)]

    def test_input_errors(self):
        with pytest.raises(ValueError, match=r"input has shape \[3, 64, 64\]; expected images"):
            micro()(torch.randn(3, 64, 64))
        with pytest.raises(ValueError, match="set auto_pad=True"):
            micro(auto_pad=False)(torch.randn(1, 3, 36, 36))

    def test_no_weights(self):
        with pytest.raises(RuntimeError, match="No pretrained weights exist"):
            timm.create_model("biformer_tiny", pretrained=True)

    def test_bfloat16(self):
        model, x = micro().eval(), torch.randn(2, 3, 64, 64)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        torch.testing.assert_close(out.float(), model(x), rtol=5e-2, atol=5e-2)
        assert micro().bfloat16()(x.bfloat16()).isfinite().all()


class TestBiFormerBackbone:
    def test_norms_are_not_fed_forward(self):
        """The next stage takes the map from before the norm."""
        model = micro()
        x = torch.randn(1, 3, 64, 64)
        raw = model.eval().forward_intermediates(x, intermediates_only=True)
        backbone = BiFormerBackbone(model).eval()
        for stage, (feature, plain) in enumerate(zip(backbone(x), raw, strict=True)):
            torch.testing.assert_close(feature, backbone.extra_norms[str(stage)](plain))

    def test_out_indices(self):
        backbone = BiFormerBackbone(micro(), out_indices=(1, 2))
        assert [m.shape[1:] for m in backbone(torch.randn(1, 3, 64, 64))] == [(16, 8, 8), (32, 4, 4)]
        assert [info["reduction"] for info in backbone.feature_info] == [8, 16]
        for indices in ((4,), (3, 1), (1, 1), ()):
            with pytest.raises(
                ValueError, match=rf"out_indices={re.escape(str(indices))} must name stages .* in rising"
            ):
                BiFormerBackbone(micro(), out_indices=indices)

    def test_norm_eval(self):
        backbone = BiFormerBackbone(micro(), norm_eval=True).train()
        norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
        assert norms and not any(norm.training for norm in norms)
        assert backbone.training

    def test_no_parameter_without_gradient(self):
        backbone = BiFormerBackbone(micro())
        sum(feature.sum() for feature in backbone(torch.randn(1, 3, 64, 64))).backward()
        assert [key for key, parameter in backbone.named_parameters() if parameter.grad is None] == []


def test_public_names():
    assert all(hasattr(biformer, name) for name in biformer.__all__)
