"""What is read of networks is what they compute, and they stay as they are."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from diswot.features import find_classifier, find_stages, plan_features, read_features
from diswot.models import create_network

# ours whose stages end in a ReLU, so that there is a map before it
WITH_LAST_RELU = ("s0_111", "cifar_resnet8x4", "cifar_vgg8", "cifar_shufflenetv1", "cifar_resnet50")
STAGED = (*WITH_LAST_RELU, "cifar_wrn_16_1", "cifar_mobilenetv2", "cifar_shufflenetv2")


def read(model: nn.Module, source: str, size: int = 32, **options):
    images = torch.randn(2, 3, size, size)
    return read_features(model, images, plan_features(model, source, **options)), images


@pytest.fixture(scope="module")
def network() -> Callable[[str], nn.Module]:
    made = {}

    def make(name: str) -> nn.Module:
        if name not in made:
            made[name] = create_network(name, num_classes=5).eval()
        return made[name]

    return make


class TestOurNetworks:
    @pytest.mark.parametrize("name", STAGED)
    def test_maps(self, network, name):
        (logits, maps), images = read(network(name), "all_maps")
        [*wanted, pooled], wanted_logits = network(name).forward_maps(images)
        torch.testing.assert_close(list(maps), wanted, rtol=0, atol=0)
        torch.testing.assert_close(logits, wanted_logits)
        plan = plan_features(network(name), "pooled")
        torch.testing.assert_close(read_features(network(name), images, plan)[1], pooled)

    @pytest.mark.parametrize("name", WITH_LAST_RELU)
    def test_preactivations(self, network, name):
        (_, found), images = read(network(name), "preactivations")
        maps, _ = network(name).forward_maps(images, preact=True)
        torch.testing.assert_close(list(found), maps[1:-1], rtol=0, atol=0)
        assert all(each.min() < 0 for each in found)

    def test_stages_that_end_without_activation(self, network):
        """They give their output: the inputs of their activations are of other widths."""
        (_, found), images = read(network("cifar_mobilenetv2"), "preactivations")
        plan = plan_features(network("cifar_mobilenetv2"), "stage_maps")
        torch.testing.assert_close(found, read_features(network("cifar_mobilenetv2"), images, plan)[1])

    def test_benchmark_network(self, network):
        """Stages are the groups of cells, and the stem has parts."""
        assert find_stages(network("nb201_diswot")) == ("stem", ("cells.4", "cells.10", "cells.16"))
        (_, maps), _ = read(network("nb201_diswot"), "stage_maps", size=16)
        assert [list(each.shape[1:]) for each in maps] == [[16, 16, 16], [32, 8, 8], [64, 4, 4]]

    def test_single_maps(self, network):
        (_, stages), images = read(network("s0_111"), "stage_maps")
        for source, wanted in {"middle_map": stages[1], "last_map": stages[2]}.items():
            plan = plan_features(network("s0_111"), source)
            torch.testing.assert_close(read_features(network("s0_111"), images, plan)[1], wanted)
        # of four stages the second, as in RepDistiller's list with the stem in front
        assert plan_features(network("cifar_vgg8"), "middle_map").modules == ("relu2",)

    def test_logits(self, network):
        (logits, features), images = read(network("s0_111"), "logits")
        torch.testing.assert_close(features, network("s0_111")(images))
        assert features is logits


class TestOtherNetworks:
    @pytest.mark.parametrize("name", ["test_resnet", "resnet10t"])
    def test_timm(self, network, name):
        (logits, maps), images = read(network(name), "all_maps", size=64)
        wanted = network(name).forward_intermediates(images, intermediates_only=True)
        torch.testing.assert_close(list(maps), wanted)
        torch.testing.assert_close(logits, network(name)(images))
        assert find_stages(network(name)) == ("act1", ("layer1", "layer2", "layer3", "layer4"))

    @pytest.mark.parametrize("name", ["resnet18", "resnet50"])
    def test_torchvision(self, name):
        """One ReLU in place is called in each block two or three times; the last call counts."""
        model = torchvision.models.get_model(name, num_classes=5).eval()
        (_, before), images = read(model, "preactivations")
        _, maps = read_features(model, images, plan_features(model, "stage_maps"))
        assert len(maps) == 4
        for ours, after in zip(before, maps, strict=True):
            torch.testing.assert_close(F.relu(ours), after)
            assert ours.min() < 0
        assert plan_features(model, "all_maps").modules[0] == "relu"

    def test_in_place(self):
        """The gradient passes through what was kept before an activation overwrote it."""
        model = torchvision.models.resnet18(num_classes=5)
        (logits, before), _ = read(model, "preactivations")
        (logits.sum() + sum(each.square().sum() for each in before)).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_channels_last(self):
        model = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=32, embed_dim=24, depths=(1, 1), num_heads=(1, 2), window_size=4
        ).eval()
        (_, maps), _ = read(model, "stage_maps")
        assert [list(each.shape) for each in maps] == [[2, 24, 8, 8], [2, 48, 4, 4]]

    def test_named_layers(self, network):
        model = torchvision.models.mobilenet_v3_small(num_classes=5).eval()
        (_, maps), images = read(model, "all_maps", layers=("features.0", "features.3"))
        torch.testing.assert_close(maps[0], model.features[0](images))
        torch.testing.assert_close(maps[1], model.features[:4](images))
        assert plan_features(model, "last_map", ("features.0", "features.3")).modules == ("features.3",)

    def test_classifiers(self, network):
        assert find_classifier(network("nb201_diswot"))[0] == "classifier"
        assert find_classifier(torchvision.models.mobilenet_v3_small(num_classes=2))[0] == "classifier.3"


class TestReadFeatures:
    def test_leaves_no_hooks(self, network):
        model = network("s0_111")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        read(model, "preactivations")
        with pytest.raises(ValueError, match="expected images"):
            read_features(model, torch.zeros(3, 8, 8), plan_features(model, "pooled"))
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        torch.testing.assert_close(model.state_dict(), before)

    def test_plan_fits_copies(self, network):
        plan = plan_features(network("s0_111"), "stage_maps")
        copied = copy.deepcopy(network("s0_111"))
        nn.init.zeros_(copied.layer3[-1].bn2.weight)
        _, maps = read_features(copied, torch.randn(2, 3, 32, 32), plan)
        torch.testing.assert_close(maps[2], F.relu(copied.layer3[-1].downsample(maps[1])))

    def test_errors(self, network):
        model = network("s0_111")
        with pytest.raises(ValueError, match="source='maps' must be one of 'logits', 'pooled'"):
            plan_features(model, "maps")
        with pytest.raises(ValueError, match=r"layers has 'layer4', no module of CifarResNet; its children are conv1"):
            plan_features(model, "stage_maps", ("layer1", "layer4"))
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
        with pytest.raises(
            ValueError, match=r"stages of Sequential are not known; name them by layers: its children .*0, 1"
        ):
            plan_features(plain, "last_map")
        with pytest.raises(ValueError, match="Sequential has no linear classifier"):
            plan_features(plain, "pooled")
        vit = timm.create_model("test_vit", img_size=32).eval()
        with pytest.raises(ValueError, match=r"module 'blocks.0' of VisionTransformer gives \[2, 5, 64\], no map"):
            read(vit, "stage_maps")

    def test_module_that_does_not_run(self):
        class Lazy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.used(x.mean((2, 3)))

        with pytest.raises(ValueError, match="module 'spare' of Lazy took no part in its forward pass"):
            read(Lazy(), "pooled")
