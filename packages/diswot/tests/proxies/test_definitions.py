"""Each proxy against a short definition of its own in float64."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from diswot import proxies
from diswot.initialisation import draws_of, generator_for, initialise


class Net(nn.Module):
    """Three convolutions, one of them grouped; activations in place and as functions; a linear layer of tokens."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6)
        self.b, self.c = nn.Conv2d(6, 6, 3, groups=2), nn.Conv2d(6, 8, 1, bias=False)
        self.relu, self.last = nn.ReLU(inplace=True), nn.BatchNorm2d(8)
        self.silu = nn.SiLU(inplace=True)
        self.tokens, self.head = nn.Linear(8, 8), nn.Linear(8, num_classes)

    def maps(self, x):
        x = self.relu(self.norm(self.a(x)))
        return self.last(self.c(self.silu(self.b(x))))

    def forward(self, x):
        x = F.relu(self.maps(x))
        return self.head(self.tokens(x.flatten(2).mT).mean(1))


@pytest.fixture
def net():
    return Net().double()


@pytest.fixture
def batch():
    return torch.randn(6, 3, 11, 9, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])


def layers(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def gradients(model, batch):
    """Return the weights and their gradients."""
    model = copy.deepcopy(model).train()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    return [(layer.weight.detach(), layer.weight.grad) for layer in layers(model)], model


def close(name, model, batch, expected, rtol=1e-9):
    assert proxies.compute(name, model, *batch)[name] == pytest.approx(float(expected), rel=rtol)


class TestBackward:
    def test_sums_over_layers(self, net, batch):
        pairs, model = gradients(net, batch)
        close("grad_norm", net, batch, sum(float(g.square().sum().sqrt()) for _, g in pairs))
        close("snip", net, batch, sum(float((w * g).abs().sum()) for w, g in pairs))
        close("plain", net, batch, sum(float((w * g).sum()) for w, g in pairs))
        close("snip_mean", net, batch, -sum(float((w * g).abs().sum()) / len(w) for w, g in pairs))
        whole = torch.cat([each.grad.flatten() for each in model.parameters()])
        close("grad_norm_all", net, batch, whole.norm())

    def test_snip_is_the_gradient_of_a_mask(self, net, batch):
        model = copy.deepcopy(net).train()
        masks = {name + ".weight": torch.ones_like(layer.weight, requires_grad=True)
                 for name, layer in model.named_modules() if layer in layers(model)}  # fmt: skip
        weights = {name: dict(model.named_parameters())[name].detach() * mask for name, mask in masks.items()}
        loss = F.cross_entropy(torch.func.functional_call(model, weights, batch[0]), batch[1])
        close("snip", net, batch, sum(float(g.abs().sum()) for g in torch.autograd.grad(loss, list(masks.values()))))

    def test_fisher(self, net, batch):
        """Activations in place do not change what is summed: outputs of layers, as they left them."""
        model = copy.deepcopy(net).train()
        for name in ("relu", "silu"):
            getattr(model, name).inplace = False
        kept = []
        for layer in layers(model):
            layer.register_forward_hook(
                lambda layer, _, output: (output.retain_grad(), kept.append((layer, output)))[1]
            )
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        total = 0.0
        for layer, output in kept:
            product = output.detach() * output.grad
            if isinstance(layer, nn.Linear):
                product = product.movedim(-1, 1)
            for channel in range(product.shape[1]):
                by_sample = product[:, channel].reshape(len(product), -1).sum(1)
                total += 0.5 * float(by_sample.square().mean()) * layer.weight[0].numel()
        close("fisher", net, batch, total)


class TestGrasp:
    def test_finite_differences(self, net, batch):
        """H g is the change of the gradient along g."""
        for name in ("relu", "silu"):
            setattr(net, name, nn.SiLU())
        step, pairs = 1e-4, gradients(net, batch)[0]

        def moved(sign):
            model = copy.deepcopy(net)
            with torch.no_grad():
                for layer, (_, gradient) in zip(layers(model), pairs, strict=True):
                    layer.weight += sign * step * gradient
            return [gradient for _, gradient in gradients(model, batch)[0]]

        curved = [(up - down) / (2 * step) for up, down in zip(moved(1), moved(-1), strict=True)]
        close("grasp", net, batch, -sum(float((w * h).sum()) for (w, _), h in zip(pairs, curved, strict=True)), 1e-5)


class TestSynflow:
    @pytest.mark.parametrize("with_norms", [False, True])
    def test_reference(self, net, batch, with_norms):
        model = copy.deepcopy(net).train()
        for tensor in (*model.parameters(), *(each for each in model.buffers() if each.is_floating_point())):
            tensor.data = tensor.data.abs()
        if not with_norms:
            model.norm = model.last = nn.Identity()
        model(torch.ones(1, 3, 11, 9, dtype=torch.float64)).sum().backward()
        expected = sum(float((layer.weight * layer.weight.grad).detach().abs().sum()) for layer in layers(model))
        close("synflow_bn" if with_norms else "synflow", net, batch, expected)

    def test_activations_of_timm_norms_stay(self, batch):
        """A norm with an activation in it is bypassed without the activation."""
        ours = nn.Sequential(nn.Conv2d(3, 4, 3), timm.layers.BatchNormAct2d(4, act_layer=nn.Tanh), nn.Flatten(),
                             nn.Linear(252, 5)).double()  # fmt: skip
        plain = copy.deepcopy(ours)
        plain[1] = nn.Sequential(nn.BatchNorm2d(4), nn.Tanh()).double()
        close("synflow", ours, batch, proxies.compute("synflow", plain, *batch)["synflow"])


class TestL2Norm:
    def test_reference(self, net, batch):
        close("l2_norm", net, batch, sum(layer.weight.square().sum().sqrt().item() for layer in layers(net)))


def jacobian(model, images):
    leaf = images.clone().requires_grad_()
    copy.deepcopy(model).train()(leaf).sum().backward()
    return leaf.grad.flatten(1).numpy()


class TestJacobian:
    def test_jacov(self, net, batch):
        rows = jacobian(net, batch[0])
        values = np.linalg.eigvals(np.corrcoef(rows)).real
        close("jacov", net, batch, -sum(math.log(v + 1e-5) + 1 / (v + 1e-5) for v in values), 1e-6)

    @pytest.mark.parametrize("num_classes", [5, 100, 101])
    def test_epe_nas(self, batch, num_classes):
        net, (images, _) = Net(num_classes).double(), batch
        labels = torch.tensor([0, 0, 2, 2, 2, 4])
        rows = jacobian(net, images)
        sums = {}
        for label in (0, 2, 4):
            chosen = rows[labels.numpy() == label]
            correlations = np.array([[np.corrcoef(a, b)[0, 1] for b in chosen] for a in chosen])
            sums[label] = np.log(np.abs(correlations) + 1e-5).sum() / (len(chosen) ** 2 if num_classes > 100 else 1)
        if num_classes <= 100:
            expected = sum(abs(each) for each in sums.values())
        else:
            expected = np.mean([abs(sums[a] - sums[b]) for a, b in ((0, 2), (0, 4), (2, 4))])
        close("epe_nas", net, (images, labels), expected, 1e-7)

    def test_epe_nas_of_one_class(self, batch):
        assert proxies.compute("epe_nas", Net(101).double(), batch[0], batch[1] * 0)["epe_nas"] == 0


class TestActivations:
    def patterns(self, net, images):
        model, found = copy.deepcopy(net).train(), []
        model.relu.register_forward_pre_hook(lambda _, inputs: found.append((inputs[0] > 0).flatten(1).double()))
        model(images)
        return found

    def test_nwot(self, net, batch):
        (code,) = self.patterns(net, batch[0])
        kernel = sum((code[:, [i]] == code[:, i]).double() for i in range(code.shape[1]))
        close("nwot", net, batch, kernel.det().abs().log(), 1e-7)

    def test_every_call_counts(self, batch):
        one = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(252, 5)).double()
        twice = nn.Sequential(one[0], one[1], one[1], *one[2:])
        # the second call sees what is above zero already: the same pattern, so that the kernel doubles
        expected = proxies.compute("nwot", one, *batch)["nwot"] + 6 * math.log(2)
        close("nwot", twice, batch, expected)

    def test_linear_regions(self, net, batch):
        images = batch[0][[0, 1, 0, 2, 1, 0]]
        net.norm = nn.Identity()
        close("linear_regions", net, (images, batch[1]), 3)


class TestNtk:
    def test_reference(self, net, batch):
        model = copy.deepcopy(net).train()
        outputs = model(batch[0])
        rows = []
        for output in outputs:
            model.zero_grad()
            output.sum().backward(retain_graph=True)
            rows.append(torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "weight" in name]))
        values = np.linalg.eigvalsh((torch.stack(rows) @ torch.stack(rows).T).numpy())
        close("ntk", net, batch, -values[-1] / values[0], 1e-6)


class TestZen:
    def drawn(self, net):
        model = copy.deepcopy(net).train()
        initialise(model, "gaussian", draws_of(3, "key", "own"))
        return model, generator_for(3, "noise/key")

    def deviations(self, model):
        return sum(0.5 * math.log(float(norm.running_var.mean())) for norm in (model.norm, model.last))

    def test_zen(self, net, batch):
        """The last module with positions is here the linear layer of tokens."""
        model, generator = self.drawn(net)
        x, noise = (torch.randn(batch[0].shape, generator=generator).double() for _ in range(2))
        first, second = (model.tokens(F.relu(model.maps(each)).flatten(2).mT) for each in (x, x + 1e-2 * noise))
        expected = math.log((first - second).abs().sum((1, 2)).mean().item()) + self.deviations(model)
        for init in ("kaiming", "gaussian"):
            found = proxies.compute("zen", net, *batch, init=init, seed=3, key="key")["zen"]
            assert found == pytest.approx(expected, rel=1e-9)

    def test_bn_logvar(self, net, batch):
        model, generator = self.drawn(net)
        model(torch.randn(batch[0].shape, generator=generator).double())
        found = proxies.compute("bn_logvar", net, *batch, init="gaussian", seed=3, key="key")["bn_logvar"]
        assert found == pytest.approx(self.deviations(model), rel=1e-9)

    def test_keep(self, net, batch):
        model = copy.deepcopy(net).train()
        model(torch.randn(batch[0].shape, generator=generator_for(3, "noise/key")).double())
        found = proxies.compute("bn_logvar", net, *batch, seed=3, key="key")["bn_logvar"]
        assert found == pytest.approx(self.deviations(model), rel=1e-9)
