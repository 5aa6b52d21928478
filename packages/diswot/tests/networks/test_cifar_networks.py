"""CIFAR networks: parameter counts of section 3.1, and the blocks against their formulas."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from diswot.networks.cifar_resnet import BasicBlock, CifarResNet
from diswot.networks.cifar_resnet50 import Bottleneck
from diswot.networks.cifar_shufflenet import DownUnit, ShuffleUnit, SplitUnit
from diswot.networks.cifar_wrn import PreActivationBlock
from diswot.networks.staged import BlockReLU
from visionkernels.profiling import count_parameters

COUNTS = {
    "s0_111": 83_892,
    "s0_333": 278_324,
    "s0_713": 259_892,
    "s0_555": 472_756,
    "s0_777": 667_188,
    "cifar_resnet56": 861_620,
    "cifar_resnet110": 1_736_564,
    "cifar_resnet8x4": 1_233_540,
    "cifar_resnet32x4": 7_433_860,
    "cifar_wrn_16_2": 703_284,
    "cifar_vgg8": 3_965_028,
    "cifar_mobilenetv2": 812_836,
    "cifar_shufflenetv1": 949_258,
    "cifar_shufflenetv2": 1_355_528,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    with torch.device("meta"):
        assert count_parameters(timm.create_model(name, num_classes=100)) == COUNTS[name]


def shaken(module):
    """Norms far from the identity, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(1)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for value in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return module.eval()


def normed(norm, x):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)


class TestResNet:
    def test_basic_block(self):
        block, x = shaken(BasicBlock(4, 6, 2)), torch.randn(2, 4, 9, 9)
        y = normed(block.bn1, F.conv2d(x, block.conv1.weight, stride=2, padding=1)).relu()
        y = normed(block.bn2, F.conv2d(y, block.conv2.weight, padding=1))
        shortcut = normed(block.downsample[1], F.conv2d(x, block.downsample[0].weight, stride=2))
        torch.testing.assert_close(block(x), (y + shortcut).relu())
        torch.testing.assert_close(block.preactivate(x), y + shortcut)

    def test_zen_block(self):
        """No shortcut is added, though its modules are there."""
        model = timm.create_model("s0_131", block="zen")
        assert set(model.state_dict()) == set(timm.create_model("s0_131").state_dict())
        block, x = shaken(BasicBlock(4, 6, 2, kind="zen")), torch.randn(2, 4, 8, 8)
        y = normed(block.bn1, F.conv2d(x, block.conv1.weight, stride=2, padding=1)).relu()
        y = normed(block.bn2, F.conv2d(y, block.conv2.weight, padding=1))
        torch.testing.assert_close(block(x), y.relu())

    def test_bottleneck(self):
        block, x = shaken(Bottleneck(8, 3, 2)), torch.randn(2, 8, 8, 8)
        y = normed(block.bn1, block.conv1(x)).relu()
        y = normed(block.bn2, F.conv2d(y, block.conv2.weight, stride=2, padding=1)).relu()
        y = normed(block.bn3, block.conv3(y))
        shortcut = normed(block.shortcut[1], F.conv2d(x, block.shortcut[0].weight, stride=2))
        torch.testing.assert_close(block(x), (y + shortcut).relu())

    def test_relu_modules(self):
        """The stem and the first ReLU of each block are `nn.ReLU`, which proxies count; the last ones are not."""
        model = timm.create_model("s0_713")
        assert sum(isinstance(module, nn.ReLU) for module in model.modules()) == 1 + 7 + 1 + 3
        last = [module for module in model.modules() if isinstance(module, BlockReLU)]
        assert len(last) == 11
        assert not any(True for module in last for _ in module.parameters())

    def test_init(self):
        """Convolutions are drawn by fan-out, the rest are PyTorch's defaults."""
        weight = timm.create_model("s0_111").layer3[0].conv2.weight
        assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"depths": (1, 3)}, r"depths=\(1, 3\) must be 3 whole numbers from 1 to 256"),
            ({"depths": (1, 3, 0)}, r"depths=\(1, 3, 0\)"),
            ({"depths": (1, 1, 10**9)}, "depths"),
            ({"widths": (16, 16, 32, 10**6)}, "widths"),
            (
                {"depths": (1, 1, 256), "widths": (16, 16, 32, 4096)},
                "depths=.* of at most 250000000 weights, not about",
            ),
            ({"block": "plain"}, "block='plain' must be one of 'basic', 'zen'"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(ValueError, match=message):
            CifarResNet(**options)


class TestWideResNet:
    @pytest.mark.parametrize("channels", [4, 6])
    def test_block(self, channels):
        """Norm and ReLU come before the shortcut's convolution, but not before an identity."""
        block, x = shaken(PreActivationBlock(4, channels, 1)), torch.randn(2, 4, 8, 8)
        activated = normed(block.bn1, x).relu()
        y = F.conv2d(activated, block.conv1.weight, padding=1)
        y = F.conv2d(normed(block.bn2, y).relu(), block.conv2.weight, padding=1)
        shortcut = x if channels == 4 else F.conv2d(activated, block.convShortcut.weight)
        torch.testing.assert_close(block(x), y + shortcut)

    def test_preact(self):
        """A stage's map under the norm that follows it."""
        model = shaken(timm.create_model("cifar_wrn_16_1"))
        x = torch.randn(2, 3, 32, 32)
        (_, one, two, three, _), _ = model.forward_maps(x)
        (_, *before, _), _ = model.forward_maps(x, preact=True)
        norms = (model.block2.layer[0].bn1, model.block3.layer[0].bn1, model.bn1)
        for value, norm, expected in zip((one, two, three), norms, before, strict=True):
            torch.testing.assert_close(normed(norm, value), expected)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"depth=15 must be 6n \+ 4"):
            timm.create_model("cifar_wrn_16_1", depth=15)


class TestVGG:
    def test_pooling(self):
        """64 pixels are pooled once more, so that both sizes end in 4 x 4."""
        model = timm.create_model("cifar_vgg8", widths=(4,) * 5)
        assert model.forward_features(torch.randn(2, 3, 32, 32)).shape[2:] == (4, 4)
        assert model.forward_features(torch.randn(2, 3, 64, 64)).shape[2:] == (4, 4)
        assert model.block0[0].bias is not None

    def test_keys(self):
        keys = timm.create_model("cifar_vgg13", widths=(4,) * 5).state_dict()
        assert {"block0.0.weight", "block0.0.bias", "block0.1.weight", "block0.3.weight", "block4.4.bias"} < set(keys)


class TestShuffleNet:
    @pytest.mark.parametrize(("channels_in", "channels_out", "stride"), [(24, 48, 2), (48, 48, 1), (48, 96, 2)])
    def test_v1_unit(self, channels_in, channels_out, stride):
        unit, x = shaken(ShuffleUnit(channels_in, channels_out, stride, 3)), torch.randn(2, channels_in, 8, 8)
        groups = 1 if channels_in == 24 else 3
        assert unit.conv1.groups == groups
        y = normed(unit.bn1, unit.conv1(x)).relu()
        hidden = y.shape[1]
        order = [index for start in range(hidden // groups) for index in range(start, hidden, hidden // groups)]
        y = normed(unit.bn2, unit.conv2(y[:, order])).relu()
        y = normed(unit.bn3, unit.conv3(y))
        expected = torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1) if stride == 2 else y + x
        torch.testing.assert_close(unit(x), expected.relu())

    def test_v2_split_unit(self):
        unit, x = shaken(SplitUnit(8)), torch.randn(2, 8, 6, 6)
        y = normed(unit.bn1, unit.conv1(x[:, 4:])).relu()
        y = normed(unit.bn3, unit.conv3(normed(unit.bn2, unit.conv2(y))))
        before, after = unit.forward_pair(x)
        order = [0, 4, 1, 5, 2, 6, 3, 7]
        torch.testing.assert_close(after, torch.cat([x[:, :4], y.relu()], 1)[:, order])
        torch.testing.assert_close(before, torch.cat([x[:, :4], y], 1)[:, order])

    def test_v2_down_unit(self):
        unit, x = shaken(DownUnit(6, 8)), torch.randn(2, 6, 8, 8)
        left = normed(unit.bn2, unit.conv2(normed(unit.bn1, unit.conv1(x))))
        right = normed(unit.bn4, unit.conv4(normed(unit.bn3, unit.conv3(x)).relu()))
        both = torch.cat([left, normed(unit.bn5, unit.conv5(right))], 1)[:, [0, 4, 1, 5, 2, 6, 3, 7]]
        before, after = unit.forward_pair(x)
        torch.testing.assert_close(before, both)
        torch.testing.assert_close(after, both.relu())

    def test_errors(self):
        with pytest.raises(ValueError, match=r"widths=.* multiples of 12"):
            timm.create_model("cifar_shufflenetv1", widths=(50, 100, 200))
        with pytest.raises(ValueError, match=r"widths=.* must be even"):
            timm.create_model("cifar_shufflenetv2", widths=(115, 232, 464))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cifar_wrn_16_2", {"depth": 1000, "widen": 64}),
        ("cifar_vgg8", {"depths": (64,) * 5, "widths": (4096,) * 5}),
        ("cifar_mobilenetv2", {"width": 16}),
        ("cifar_shufflenetv1", {"depths": (64, 64, 64), "widths": (1020, 2040, 4080)}),
        ("cifar_shufflenetv2", {"depths": (64, 64, 64), "widths": (1020, 2040, 4080)}),
        ("cifar_resnet50", {"depths": (256,) * 4, "width": 512}),
        ("nb201", {"width": 512, "cells": 64}),
        ("nb101", {"stem_channels": 512, "stacks": 5, "cells": 32}),
    ],
)
def test_absurd_sizes(name, options):
    """No memory is asked for."""
    with pytest.raises(ValueError, match=r"must be (of at most 250000000 weights, not about|above 0, up to 4)"):
        timm.create_model(name, **options)
