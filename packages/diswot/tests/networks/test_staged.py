"""What timm asks of a model, on a small network of every family."""

import pytest
import timm
import torch
from torch import nn

from diswot.networks import variant_names
from visionkernels.testing.tracing import check_traced

CELL = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|nor_conv_1x1~0|avg_pool_3x3~1|nor_conv_3x3~2|"
STRUCTURE = "SuperConvK3BNRELU(3,8,1,1)SuperResK3K3(8,16,2,8,2)SuperResK1K5K1(16,24,2,8,1)SuperConvK1BNRELU(24,32,1,1)"
SMALL = {
    "s0_131": {},
    "cifar_wrn_16_1": {},
    "cifar_vgg11": {"widths": (8, 8, 16, 16, 24)},
    "cifar_mobilenetv2": {"width": 0.25},
    "cifar_shufflenetv1": {"depths": (2, 1, 2), "widths": (48, 96, 192)},
    "cifar_shufflenetv2": {"depths": (1, 2, 1), "widths": (24, 48, 96)},
    "cifar_resnet50": {"depths": (1, 2, 1, 1), "width": 8},
    "nb201": {"arch": CELL, "width": 4, "cells": 1},
    "nb101": {"stem_channels": 8, "stacks": 2, "cells": 1},
    "structure_net": {"structure": STRUCTURE},
}


def small(name, **options):
    return timm.create_model(name, **({"num_classes": 5} | SMALL[name] | options))


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SMALL)
class TestEveryFamily:
    def test_traced(self, name):
        check_traced(small(name), images(2, 3, 32, 32))

    def test_forward_backward(self, name):
        model = small(name)
        logits = model(images(2, 3, 32, 32))
        assert logits.shape == (2, 5)
        logits.square().sum().backward()
        assert [key for key, value in model.named_parameters() if value.grad is None] == []

    def test_default_cfg(self, name):
        model = small(name)
        assert model.default_cfg["input_size"] == (3, 32, 32)
        assert model.default_cfg["mean"] == (0.5071, 0.4867, 0.4408)
        state = model.state_dict()
        assert state[f"{model.default_cfg['classifier']}.weight"].shape == (5, model.num_features)
        assert f"{model.default_cfg['first_conv']}.weight" in state
        assert small(name, img_size=64).default_cfg["input_size"] == (3, 64, 64)

    def test_classifier(self, name):
        model = small(name).eval()
        x = images(2, 3, 32, 32)
        features = model.forward_features(x)
        assert features.shape[:2] == (2, model.num_features)
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, features.mean((2, 3)))
        assert isinstance(model.get_classifier(), nn.Linear)
        torch.testing.assert_close(model(x), model.get_classifier()(pooled))
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)
        assert isinstance(model.get_submodule(model.default_cfg["classifier"]), nn.Linear)
        model.double().reset_classifier(7)
        assert model.get_classifier().weight.dtype == torch.float64
        model.float()
        model.reset_classifier(0)
        assert torch.equal(model(x), pooled)
        assert small(name, num_classes=0, global_pool="").eval()(x).shape == features.shape
        model.reset_classifier(0, "")
        assert torch.equal(model(x), features)
        assert small(name, in_chans=1)(x[:, :1]).shape == (2, 5)

    def test_dropout(self, name):
        model = small(name, num_classes=0, drop_rate=0.5).train()
        assert (model.forward_head(torch.ones(1, model.num_features, 2, 2)) == 0).any()

    def test_stage_modules(self, name):
        """Hooks on the modules of `feature_info` find the maps of the stages."""
        model = small(name).eval()
        seen = {}
        for info in model.feature_info:
            module = model.get_submodule(info["module"])
            module.register_forward_hook(lambda module, inputs, output, key=info["module"]: seen.update({key: output}))
        x = images(2, 3, 32, 32)
        final, maps = model.forward_intermediates(x)
        assert len(maps) == len(model.feature_info)
        for info, value in zip(model.feature_info, maps, strict=True):
            assert torch.equal(seen[info["module"]], value)
            assert value.shape == (2, info["num_chs"], 32 // info["reduction"], 32 // info["reduction"])
        assert torch.equal(final, model.forward_features(x))

    def test_maps(self, name):
        model = small(name).eval()
        x = images(2, 3, 32, 32)
        maps, logits = model.forward_maps(x)
        stages = model.forward_intermediates(x, intermediates_only=True)
        assert torch.equal(maps[0], stages[0])
        assert torch.equal(maps[-2], stages[-1])
        assert torch.equal(maps[-1], model.forward_features(x).mean((2, 3)))
        assert torch.equal(logits, model(x))

    def test_preact(self, name):
        """The same list, and where a stage ends in an activation, the map before it."""
        model = small(name)
        x = images(2, 3, 32, 32)
        start = {key: value.clone() for key, value in model.state_dict().items()}
        maps, logits = model.forward_maps(x)
        once = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(start)
        before, same = model.forward_maps(x, preact=True)
        # a norm that is read twice counts the batch once
        torch.testing.assert_close(model.state_dict(), once)
        torch.testing.assert_close(same, logits)
        assert torch.equal(before[0], maps[0])
        assert torch.equal(before[-1], maps[-1])
        ends_activated = name not in ("cifar_wrn_16_1", "cifar_mobilenetv2", "nb201", "nb101")
        for one, other in zip(before[1:-1], maps[1:-1], strict=True):
            if ends_activated and name != "cifar_shufflenetv2":
                torch.testing.assert_close(one.relu(), other)
                assert (one < 0).any()
            assert one.shape == other.shape

    def test_features_only(self, name):
        model = small(name, features_only=True)
        x = images(1, 3, 32, 32)
        maps = model(x)
        assert [value.shape[1] for value in maps] == model.feature_info.channels()
        chosen = small(name, features_only=True, out_indices=(1, 2))
        assert [value.shape for value in chosen(x)] == [value.shape for value in maps[1:3]]
        few = sum(value.numel() for value in small(name, features_only=True, out_indices=(0,)).parameters())
        assert (
            few < sum(value.numel() for value in chosen.parameters()) < sum(p.numel() for p in small(name).parameters())
        )

    def test_state(self, name):
        one, two = small(name).eval(), small(name).eval()
        two.load_state_dict(one.state_dict())
        x = images(1, 3, 32, 32)
        assert torch.equal(one(x), two(x))

    def test_sizes(self, name):
        model = small(name).eval()
        for shape in ((2, 3, 64, 64), (1, 3, 28, 36), (1, 3, 33, 47)):
            assert model(images(*shape)).isfinite().all()
        x = images(2, 3, 32, 32)
        torch.testing.assert_close(
            model(x.contiguous(memory_format=torch.channels_last)), model(x), rtol=1e-4, atol=1e-5
        )
        assert model(x[:0]).shape == (0, 5)
        with pytest.raises(ValueError, match=r"shape \[3, 32, 32\]; expected images"):
            model(x[0])
        with pytest.raises(ValueError, match=r"shape \[3, 32, 32\]; expected images"):
            model.forward_maps(x[0])

    def test_meta(self, name):
        with torch.device("meta"):
            model = small(name)
        assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 5)

    def test_errors(self, name):
        with pytest.raises(ValueError, match=r"enable=True .* statistics twice"):
            small(name).set_grad_checkpointing()
        small(name).set_grad_checkpointing(False)
        with pytest.raises(ValueError, match="global_pool='max' must be 'avg'"):
            small(name, global_pool="max")
        with pytest.raises(ValueError, match="global_pool='' must be 'avg' where num_classes is not 0"):
            small(name, global_pool="")
        with pytest.raises(ValueError, match=r"num_classes=-1"):
            small(name, num_classes=-1)
        with pytest.raises(ValueError, match=r"drop_rate=1\.0"):
            small(name, drop_rate=1.0)
        with pytest.raises(ValueError, match="output_fmt='NLC'"):
            small(name).forward_intermediates(images(1, 3, 32, 32), output_fmt="NLC")


# chains of layers without code that others lack wait for the night
_SLOW = (
    "cifar_wrn_16_1", "cifar_vgg11", "cifar_mobilenetv2", "cifar_shufflenetv1", "cifar_shufflenetv2", "cifar_resnet50"
)  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in _SLOW)) for name in SMALL])
def test_compile_export(name):
    torch.compiler.reset()  # the families share `forward`, of which torch keeps eight versions
    model, x = small(name).eval(), images(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_names():
    """All networks of the specification are there."""
    names = variant_names()
    assert len([name for name in names if name.startswith("s0_")]) == 64
    assert {f"cifar_resnet{n}" for n in ("8", "14", "20", "32", "44", "56", "110", "8x4", "32x4", "50")} < set(names)
    assert {f"cifar_wrn_{n}" for n in ("16_1", "16_2", "40_1", "40_2")} < set(names)
    assert {f"cifar_vgg{n}" for n in (8, 11, 13, 16, 19)} < set(names)
    assert {"nb201", "nb201_diswot", "nb201_gdas", "nb101", "structure_net"} < set(names)
    assert {"zen_cifar_res32_05m", "diswot_imagenet_res18_11_6m", "diswot_imagenet_res18_13m"} < set(names)
    assert len(names) == len(set(names)) == 64 + 9 + 4 + 5 + 1 + 2 + 1 + 11 + 1 + 9


@pytest.mark.parametrize("name", ["diswot_imagenet_res18_7m", "diswot_imagenet_res18_8m"])
def test_imagenet(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert model.default_cfg["input_size"] == (3, 224, 224)
    assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
