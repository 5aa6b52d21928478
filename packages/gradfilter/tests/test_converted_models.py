"""Converted models at work: known networks, compilation, layouts, autocast, checkpoints, and what exports."""

import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradfilter import convert
from gradfilter.lean import FrozenBatchNorm2d, LeanReLU
from visionkernels.profiling import saved_activation_bytes


class TestKnownModels:
    @pytest.mark.parametrize(
        ("name", "last"),
        [
            ("resnet18", ("layer4.0.conv2", "layer4.0.downsample.0", "layer4.1.conv1", "layer4.1.conv2")),
            ("mobilenet_v2", ("features.17.conv.0.0", "features.17.conv.1.0", "features.17.conv.2", "features.18.0")),
        ],
    )
    def test_torchvision(self, name, last):
        model = getattr(torchvision.models, name)()
        assert convert(model, last_n=4).filtered == last

    @pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "efficientnet_b0", "convnext_atto", "regnetx_002"])
    def test_timm(self, name):
        model = timm.create_model(name, num_classes=5)
        x = torch.randn(2, 3, 96, 96)
        expected = model.eval()(x)
        report = convert(model, layers=["*"], example_input=x, lean_activations="all")
        assert report.filtered
        torch.testing.assert_close(model.eval()(x), expected)
        F.cross_entropy(model.train()(x), torch.tensor([0, 1])).backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []

    def test_memory(self):
        """Training the last four convolutions of ResNet-18 keeps 13 % of the stock model's memory, at 224 pixels."""
        x, model = torch.randn(1, 3, 224, 224), torchvision.models.resnet18()
        convert(
            model, {"*": None}, last_n=4, lean_activations=False, train_norm="none", norm_stats="update", warns=False
        )
        exact = saved_activation_bytes(lambda: model.eval()(x))
        convert(model, 2, last_n=4, train_norm="none")
        ours = saved_activation_bytes(lambda: model.train()(x))
        assert (exact, ours) == (pytest.approx(982 * 1024, rel=0.05), pytest.approx(131 * 1024, rel=0.01))
        assert ours <= 0.2 * exact
        assert isinstance(model.layer4[1].relu, LeanReLU) and isinstance(model.bn1, FrozenBatchNorm2d)


class TestRunsElsewhere:
    @pytest.mark.parametrize("compact", [False, True])
    def test_compile(self, net, images, compact):
        convert(net, last_n=3, example_input=images, compact=compact)
        loss = net(images).square().sum()
        loss.backward()
        expected = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        net.zero_grad()
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        compiled(images).square().sum().backward()
        for name, grad in expected.items():
            torch.testing.assert_close(dict(net.named_parameters())[name].grad, grad, msg=name)

    def test_channels_last(self, net, images):
        convert(net, last_n=3, example_input=images)
        net(images).square().sum().backward()
        expected = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        net.zero_grad()
        net.to(memory_format=torch.channels_last)
        net(images.contiguous(memory_format=torch.channels_last)).square().sum().backward()
        for name, grad in expected.items():
            torch.testing.assert_close(dict(net.named_parameters())[name].grad, grad, rtol=1e-4, atol=1e-4, msg=name)

    def test_autocast(self, net, images):
        convert(net, last_n=3, example_input=images)
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(images).float().square().mean()
        loss.backward()
        assert all(
            p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in net.parameters() if p.requires_grad
        )

    def test_checkpointing(self, net, images):
        convert(net, last_n=4, example_input=images)
        net.eval()
        net(images).square().sum().backward()
        expected = net.last.weight.grad.clone()
        net.zero_grad()
        checkpoint(net, images, use_reentrant=False).square().sum().backward()
        torch.testing.assert_close(net.last.weight.grad, expected)

    def test_weight_of_a_hook_is_left_exact(self):
        model = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 3))
        assert convert(model, example_input=torch.ones(1, 3, 9, 8), compact=True).filtered == ("1",)

    def test_parametrized_is_left_exact(self):
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.Conv2d(4, 4, 1))
        report = convert(model, example_input=torch.ones(1, 3, 4, 4))
        assert report.filtered == ("1",)

    def test_no_warning_by_default(self, net, images):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            convert(net, last_n=2, example_input=images)


def small_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, bias=False))


class TestExportable:
    def test_is_not_lean_by_itself(self):
        report = convert(small_net(), 2, last_n=2, example_input=torch.randn(2, 3, 16, 12), exportable=True)
        assert report.lean_activations == ()

    @pytest.mark.parametrize("other", [{"compact": True}, {"lean_activations": True}, {"lean_activations": "all"}])
    def test_excludes_what_a_graph_would_lose(self, other):
        with pytest.raises(ValueError, match="a graph would lose its gradients"):
            convert(small_net(), 2, last_n=2, example_input=torch.randn(2, 3, 16, 12), exportable=True, **other)

    def test_step_after_an_evaluation(self):
        net, x = small_net(), torch.randn(2, 3, 16, 12)
        convert(net, 3, last_n=2, example_input=x, exportable=True)
        with torch.inference_mode():
            net(x)
        net(x).sum().backward()
