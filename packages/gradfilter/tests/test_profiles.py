"""Profiles, budgets, and diagnosis of filtered gradients."""

import copy
from statistics import median

import pytest
import timm
import torch
import torchvision
from timm.layers import create_conv2d, pad_same
from torch import nn
from torch.nn import functional as F

import gradfilter
from gradfilter.cost import layer_coverage
from gradfilter.diagnosis import diagnose
from gradfilter.profiles import example_images, profile
from gradfilter.timing import wins_time
from gradfilter.trace import trace
from visionkernels.profiling import Timing, saved_activation_bytes


@pytest.fixture(scope="module")
def resnet():
    return profile(torchvision.models.resnet18(), last_n=4, radii=(7, 2, 4), measures_memory=False)


class TestProfile:
    def test_paper_cells(self, resnet):
        """490 -> 112 KiB: 77.1 % saved."""
        kept = [resnet.total(name, "saved_bytes") / 1024 for name in ("exact", "2x2", "4x4", "7x7")]
        assert kept == [490, 112, 28, 7]
        assert round(100 * (1 - kept[1] / kept[0]), 1) == 77.1

    def test_radii_are_sorted(self, resnet):
        assert resnet.radii == ("2x2", "4x4", "7x7")

    def test_scales_with_batch(self, net):
        one, four = (profile(net, torch.empty(n, 3, 16, 12), last_n=2, measures_memory=False) for n in (1, 4))
        assert four.total("exact", "saved_bytes") == 4 * one.total("exact", "saved_bytes")

    @pytest.mark.parametrize("train_norm", ["none", "after", "all"])
    def test_autograd_bytes(self, net, images, train_norm):
        """Columns differ by the filters alone, or by lean layers alone."""
        costs = profile(net, images, last_n=2, radii=[2], train_norm=train_norm).autograd_bytes
        expected = {}
        for name, radius in (("exact", None), ("2x2", 2)):
            for suffix, is_lean, statistics in (("", False, "update"), (" lean", True, "frozen")):
                twin = copy.deepcopy(net).train()
                gradfilter.convert(twin, radius, last_n=2, example_input=images, train_norm=train_norm, warns=False,
                                   norm_stats=statistics, lean_activations=is_lean)  # fmt: skip
                expected[name + suffix] = saved_activation_bytes(lambda twin=twin: twin(images))
        assert list(costs) == ["exact", "exact lean", "2x2", "2x2 lean"] and costs == expected
        assert costs["exact"] > costs["2x2"] > costs["2x2 lean"]
        assert type(net.last) is nn.Conv2d and net.last.weight.requires_grad

    def test_trained_norms_keep_more(self, net, images):
        kept = {norms: profile(net, images, last_n=2, radii=[2], train_norm=norms).autograd_bytes["2x2 lean"]
                for norms in ("none", "after", "all")}  # fmt: skip
        assert kept["none"] < kept["after"] < kept["all"]
        with pytest.raises(ValueError, match="train_norm='before' must be one of 'after', 'none', 'all'"):
            profile(net, images, train_norm="before")

    def test_shared_head(self):
        """A layer that runs on maps of several sizes costs the sum over its calls."""
        torch.manual_seed(0)
        head = nn.Conv2d(4, 4, 3, padding=1)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), head, nn.MaxPool2d(2), head)
        options = {"radii": [2, 4], "measures_memory": False, "measures_time": True}
        costs = profile(model, torch.randn(2, 3, 16, 12), last_n=1, **options)
        (shared,) = costs.layers
        single = [profile(nn.Sequential(head), torch.randn(2, 4, *size), **options).layers[0]
                  for size in ((16, 12), (8, 6))]  # fmt: skip
        assert (shared.num_calls, single[0].num_calls) == (2, 1)
        for cost in ("saved_bytes", "flops"):
            for name in ("exact", "2x2", "4x4"):
                assert getattr(shared, cost)[name] == sum(getattr(layer, cost)[name] for layer in single)
        assert shared.predicted_seconds["exact"] == pytest.approx(
            sum(layer.predicted_seconds["exact"] for layer in single)
        )
        assert shared.input_size == (2, 4, 16, 12) and set(shared.measured_seconds) == {"exact", "2x2", "4x4"}
        assert "1 runs 2 times; its figures are sums" in str(costs)

    def test_measures_each_call(self, monkeypatch):
        """A later call of the first layer has a trained one before it, so it makes the gradient of its input."""
        calls = []

        def seconds(call, radii, *, needs_input_gradient):
            calls.append((call.input_size[2], needs_input_gradient))
            return [float(call.input_size[2])] * len(radii)

        monkeypatch.setattr("gradfilter.profiles.step_seconds", seconds)
        head = nn.Conv2d(3, 3, 3, padding=1)
        (layer,) = profile(nn.Sequential(head, nn.MaxPool2d(2), head), torch.empty(1, 3, 16, 16), radii=[2],
                           measures_memory=False, measures_time=True).layers  # fmt: skip
        assert calls == [(16, False), (8, True)] and layer.measured_seconds == {"exact": 24, "2x2": 24}

    def test_measured_time(self, net, images):
        costs = profile(net, images, last_n=2, radii=[2], measures_time=True, measures_memory=False)
        assert all(set(layer.measured_seconds) == {"exact", "2x2"} for layer in costs.layers)
        assert "ms exact" in str(costs)
        assert all(min(layer.predicted_seconds.values()) > 0 for layer in costs.layers)

    def test_errors(self, net):
        with pytest.raises(ValueError, match=r"radii=\(\) must be one or more radii"):
            profile(net, last_n=1, radii=())
        with pytest.raises(ValueError, match=r"last_n=9 must be in \[1, 4\]"):
            profile(net, last_n=9)


class TestFit:
    def test_all_fit(self, resnet):
        plan = resnet.fit(memory_kib=112)
        assert len(plan.layers) == 4 and set(plan.radius.values()) == {(2, 2)}
        assert plan.saved_bytes == 112 * 1024

    def test_last_layers_are_finest(self, resnet):
        plan = resnet.fit(memory_kib=60)
        areas = [rows * columns for rows, columns in plan.radius.values()]
        assert plan.saved_bytes <= 60 * 1024
        assert areas[-1] == 4 and areas[0] == max(areas)

    def test_fewer_layers(self, resnet):
        plan = resnet.fit(memory_kib=5)
        assert plan.layers == ("layer4.0.downsample.0", "layer4.1.conv1", "layer4.1.conv2")

    def test_flops(self, resnet):
        assert resnet.fit(flops=30e6).flops <= 30e6

    def test_plan_converts(self, resnet):
        model = torchvision.models.resnet18()
        plan = resnet.fit(memory_kib=60)
        report = gradfilter.convert(model, plan.radius, layers=plan.layers)
        assert {layer.name: layer.radius for layer in report.layers if layer.radius} == plan.radius

    def test_error(self, resnet):
        with pytest.raises(
            ValueError, match=r"memory_kib=1, .* fit no layer; layer4.1.conv2 at radius 7x7 needs 2.0 KiB"
        ):
            resnet.fit(memory_kib=1)


@pytest.mark.parametrize(
    ("filtered", "wins"),
    [
        ((1, 2, 3, 4, 5), True),
        ((8, 9, 10, 11, 12), False),
        ((1, 2, 3, 40, 50), False),
        ((9.7, 9.7, 9.7, 9.7, 9.7), False),
    ],
    ids=["fast", "slow", "noisy", "hardly"],
)
def test_wins_time(monkeypatch, filtered, wins):
    """Filtering wins if most filtered steps are faster by a margin than most exact ones, which take 10 here."""

    def compare(candidates, **_):
        for step in candidates.values():
            step()
        return {"0": Timing(10, 0, (10.0,) * 5), "1": Timing(median(filtered), 1, filtered)}

    monkeypatch.setattr("gradfilter.timing.compare", compare)
    (call,) = trace(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)), torch.empty(2, 4, 8, 8)).convolutions
    assert wins_time(call, 4) is wins


class TestDiagnose:
    def test_smooth_is_near(self):
        """Map and gradient constant over patches: all energy is kept, and one tap has its exact gradient."""
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())
        x = torch.randn(2, 3, 3, 3).repeat_interleave(2, 2).repeat_interleave(2, 3)
        target = torch.randn(2, 4, 3, 3).repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(1)
        (layer,) = diagnose(model, (x, target), lambda out, target: (out * target).sum(), last_n=1).layers
        assert (layer.gradient_energy, layer.input_energy) == (pytest.approx(1), pytest.approx(1))
        assert (layer.weight_cosine, layer.input_cosine) == (pytest.approx(1), pytest.approx(1))
        assert layer.weight_error == pytest.approx(0, abs=1e-9) and layer.weight_error_bound == pytest.approx(
            0, abs=1e-6
        )

    @pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 2}, {"groups": 4}, {"padding": 0}])
    @pytest.mark.parametrize("kernel", [1, 3, 5])
    def test_bound_holds(self, kernel, options):
        options = {"padding": kernel // 2} | options
        model = nn.Sequential(nn.Conv2d(4, 8, kernel, **options), nn.Tanh(), nn.Flatten())
        batch = (torch.randn(3, 4, 13, 10), None)
        (layer,) = diagnose(model, batch, lambda out, _: out.square().sum(), radius=(2, 3), last_n=1).layers
        assert 0 < layer.weight_error <= layer.weight_error_bound
        assert 0 <= layer.gradient_energy <= 1 and 0 <= layer.input_energy <= 1

    def test_single_tap_bound_is_a_product(self):
        """For one tap the whole error is the product of the residuals: a smooth input alone makes it exact."""
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Flatten())
        x = torch.randn(2, 3, 3, 3).repeat_interleave(2, 2).repeat_interleave(2, 3)
        (layer,) = diagnose(model, (x + 0, None), lambda out, _: (out * torch.randn_like(out)).sum(), last_n=1).layers
        assert layer.gradient_energy < 0.6 and layer.weight_error == pytest.approx(0, abs=1e-9)

    def test_converted_model(self, net, images):
        gradfilter.convert(net, {"middle": 2, "last": 4}, last_n=2, example_input=images)
        diagnosis = diagnose(net, (images, torch.arange(4)))
        assert [(layer.name, layer.radius) for layer in diagnosis.layers] == [("middle", (2, 2)), ("last", (4, 4))]
        assert "weight" in str(diagnosis)
        assert type(net.last).__name__ == "FilteredConv2d" and net.last.weight.grad is None

    def test_is_the_gradient_of_the_converted_model(self, net, images):
        """For the last layer, whose output gradient no filter has touched."""
        targets = torch.arange(4)
        net.eval()
        F.cross_entropy(net(images), targets).backward()
        exact = net.last.weight.grad.clone()
        net.zero_grad()
        gradfilter.convert(net, 2, last_n=1, example_input=images)
        F.cross_entropy(net(images), targets).backward()
        (layer,) = diagnose(net, (images, targets)).layers
        cosine = F.cosine_similarity(net.last.weight.grad.flatten(), exact.flatten(), dim=0)
        assert layer.weight_cosine == pytest.approx(float(cosine), abs=1e-5)

    def test_unreached(self, net, images):
        with pytest.raises(ValueError, match="the loss does not depend on 'last'"):
            diagnose(net, (images, None), lambda out, _: torch.zeros((), requires_grad=True), last_n=1)


class TestSamePadding:
    """timm's Conv2dSame pads by the size of its map."""

    def net(self):
        return nn.Sequential(
            create_conv2d(3, 8, 3, stride=2, padding="same"),
            nn.ReLU(),
            create_conv2d(8, 8, 3, stride=2, padding="same"),
        )

    @pytest.mark.parametrize("size", [2, 7, 16])
    def test_coverage(self, size):
        """Coverage equals a count on a padded map of ones."""
        net, x = self.net(), torch.ones(1, 3, size, size)
        for call in trace(net, x).convolutions:
            ones = torch.ones(call.input_size)[:, :1]
            read = nn.functional.conv2d(pad_same(ones, [3, 3], [2, 2]), torch.ones(1, 1, 3, 3), stride=2)
            assert layer_coverage(call) == pytest.approx(float(read.mean()) / 9)

    def test_decides_by_time(self):
        report = gradfilter.convert(
            self.net(), 4, example_input=torch.randn(2, 3, 16, 16), objective="time", warns=False
        )
        assert {layer.status for layer in report.layers} <= {"filtered", "exact"}


@pytest.mark.parametrize("compact", [False, True])
def test_converted_model(net, images, compact):
    """The costs of a converted model are those of the original."""
    before = profile(net, images, last_n=2, radii=[2])
    gradfilter.convert(net, 2, last_n=2, compact=compact, example_input=images, warns=False)
    after = profile(net, images, last_n=2, radii=[2])
    assert (after.layers[0].saved_bytes, after.autograd_bytes) == (before.layers[0].saved_bytes, before.autograd_bytes)


class TestStaysExact:
    """Layers that convert would leave exact are counted and reported as exact."""

    def test_small_maps(self):
        model = torchvision.models.resnet18(num_classes=5)
        costs = profile(model, torch.randn(2, 3, 32, 32), last_n=2, radii=[2], measures_memory=False)
        for layer in costs.layers:
            assert "coverage 0.11" in layer.stays_exact
            assert (layer.flops["2x2"], layer.saved_bytes["2x2"]) == (layer.flops["exact"], layer.saved_bytes["exact"])
        assert "layer4.1.conv2 stays exact: gradient overestimated" in str(costs)
        plan = costs.fit(memory_kib=1e6)
        report = gradfilter.convert(
            model, plan.radius, layers=plan.layers, example_input=torch.randn(2, 3, 32, 32), warns=False
        )
        assert report.filtered == ()

    def test_named_layers_are_filtered(self):
        model = torchvision.models.resnet18(num_classes=5)
        options = {"layers": ["layer4.1.conv2"], "radii": [2], "measures_memory": False}
        (layer,) = profile(model, torch.randn(2, 3, 32, 32), **options).layers
        assert layer.stays_exact == "" and layer.flops["2x2"] < layer.flops["exact"]

    def test_weights_computed_anew(self):
        layers = profile(timm.create_model("resnetv2_50x1_bit"), torch.randn(1, 3, 64, 64), last_n=2, radii=[2],
                         measures_memory=False).layers  # fmt: skip
        assert "computes its weight at each call" in layers[0].stays_exact

    def test_training_mode_that_fails(self):
        costs = profile(torchvision.models.resnet18(), torch.randn(1, 3, 32, 32), last_n=1, radii=[2])
        assert costs.autograd_bytes == {}
        assert "training mode fails on this example: Expected more than 1 value per channel" in str(costs)

    def test_errors(self):
        with pytest.raises(ValueError, match="radii=2 must be one or more radii"):
            profile(torchvision.models.resnet18(), radii=2)
        with pytest.raises(ValueError, match=r"runs no nn\.Conv2d"):
            example_images(nn.Identity(), 1)
        with pytest.raises(ValueError, match="batch=0 must be at least 1"):
            example_images(torchvision.models.resnet18(), 0)


@pytest.mark.parametrize(
    ("size", "options", "share"),
    [(1, {"padding": 1}, 1 / 9), (2, {"padding": 1}, 4 / 9), (3, {"padding": 1}, 0.605), (7, {"padding": 1}, 0.819),
     (64, {"padding": 36, "dilation": 36}, 0.391), (7, {"padding": "same"}, 0.819), (9, {}, 1.0),
     (2, {"padding": 1, "padding_mode": "replicate"}, 1.0)],
)  # fmt: skip
def test_coverage(size, options, share):
    (call,) = trace(nn.Sequential(nn.Conv2d(2, 3, 3, **options)), torch.empty(1, 2, size, size)).convolutions
    assert layer_coverage(call) == pytest.approx(share, abs=5e-4)
