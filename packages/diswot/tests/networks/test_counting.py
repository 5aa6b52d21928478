import copy

import pytest
import timm
import torch
from torch import nn

import diswot.networks
from diswot.networks.counting import count_macs
from visionkernels.profiling import count_flops


class TestCountMacs:
    def test_by_hand(self):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=4, padding="same"),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
        by_hand = 8 * 4 * 4 * 27 + 8 * 4 * 4 * (2 * 9 + 1) + 5 * (8 + 1)
        assert count_macs(model, (3, 8, 8)) == by_hand

    @pytest.mark.parametrize(
        "name", ["s0_131", "cifar_vgg8", "cifar_shufflenetv1", "nb201_enas", "resnet18", "vit_tiny_patch16_224"]
    )
    def test_beside_the_profiler(self, name):
        """The profiler counts no biases."""
        assert diswot.networks
        model = timm.create_model(name, num_classes=10)
        size = model.default_cfg["input_size"]
        images = torch.empty(1, *size, device="meta")
        biases = 0

        def add(layer, inputs, output):
            nonlocal biases
            biases += output.numel() if layer.bias is not None else 0

        expected = count_flops(model, images)
        onmeta = copy.deepcopy(model).to("meta")
        for layer in onmeta.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_hook(add)
        onmeta(images)
        assert count_macs(model, size) == expected.conv + expected.linear + biases

    def test_leaves_the_model_alone(self):
        model = timm.create_model("s0_111").train()
        model.layer2.eval()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        count_macs(model, (3, 32, 32))
        assert [module.training for module in model.modules()] == modes
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
        assert all(not value.is_meta for value in model.state_dict().values())
        assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())

    def test_failure_leaves_the_model_alone(self):
        model = timm.create_model("s0_111")
        with pytest.raises(ValueError, match=r"a convolution of 3 channels got an input of shape \[1, 4, 32, 32\]"):
            count_macs(model, (4, 32, 32))
        assert model.training
        assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())

    def test_subclass_computes_itself(self):
        """A convolution that overrides `forward` is asked, and not guessed."""

        class Doubled(nn.Conv2d):
            def forward(self, x):
                return super().forward(nn.functional.interpolate(x, scale_factor=2.0))

        assert count_macs(Doubled(3, 4, 1, bias=False), (3, 4, 4)) == 4 * 8 * 8 * 3

    def test_errors(self):
        model = timm.create_model("s0_111")
        with pytest.raises(ValueError, match=r"input_size=\(3, 32\) must be channels, height and width"):
            count_macs(model, (3, 32))
        with pytest.raises(ValueError, match="smaller than the kernel"):
            count_macs(nn.Conv2d(3, 4, 5), (3, 4, 4))
