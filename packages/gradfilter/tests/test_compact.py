"""Compact training is filtered training, to rounding, with stock optimisers."""

import copy

import pytest
import timm.optim
import torch
from torch import nn
from torch.nn import functional as F

from gradfilter import CompactConv2d, compact, convert, restore
from gradfilter.compact import check_optimizer

# large enough to see the weights move in 20 steps
RATES = {"RMSpropTF": 0.05, "SGD": 0.05, "SGDW": 0.05, "ASGD": 0.05, "Adagrad": 0.01, "Adadelta": 10.0}


def known(name, decay):
    """Make an optimiser of the allow-list."""
    kind = getattr(timm.optim if not hasattr(torch.optim, name) else torch.optim, name)
    options = {} if name == "Rprop" else {"weight_decay": decay}
    return lambda p: kind(p, lr=RATES.get(name, 1e-3), **options)


OPTIMIZERS = {
    **{f"{name} with decay": known(name, 0.01) for name in sorted(compact._WITH_ANY_DECAY)},
    **{name: known(name, 0) for name in sorted(compact._WITHOUT_COUPLED_DECAY)},
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "decoupled": lambda p: timm.optim.create_optimizer_v2(p, opt="adoptw", lr=1e-3, weight_decay=0.1),
    "cautious": lambda p: timm.optim.create_optimizer_v2(p, opt="cadamw", lr=1e-3, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
}


def train(net, images, optimizer, steps=20):
    for step in range(steps):
        loss = F.cross_entropy(net(images), (torch.arange(len(images)) + step) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_ordinary_training(net, images, name):
    """Weights after 20 steps in float64, moved by a visible amount."""
    # in evaluation mode, for norms would leave the biases before them gradients of rounding alone, which Adam enlarges
    net, images = net.double().eval(), images.double()
    start = copy.deepcopy(net.state_dict())
    twin = copy.deepcopy(net)
    for model, is_compact in ((net, False), (twin, True)):
        convert(model, last_n=3, example_input=images, compact=is_compact)
        optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
        train(model, images, optimizer)
        restore(model)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value, rtol=0, atol=1e-12, msg=key)
    assert (net.last.weight - start["last.weight"]).norm() > 1e-3 * start["last.weight"].norm()


def test_state_is_nine_times_smaller(net, images):
    convert(net, last_n=1, example_input=images, compact=True)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad and name.startswith("last")}
    assert {name: tuple(p.shape) for name, p in trained.items()} == {
        "last.scale": (), "last.offset": (16, 12), "last.bias": (16,),
    }  # fmt: skip
    optimizer = torch.optim.AdamW([trained["last.offset"]])
    train(net, images, optimizer, steps=1)
    state = optimizer.state[trained["last.offset"]]
    assert 9 * state["exp_avg"].numel() == net.last.base.numel()
    assert net.last.base.grad is None and not net.last.base.requires_grad
    assert net.last.scale.grad == 0


def test_single_taps_stay_plain(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1))
    convert(model, example_input=images, compact=True)
    assert [type(layer) is CompactConv2d for layer in model] == [False, True]


def test_order_of_parameters(net, images):
    """An optimiser's state goes by position: one saved before converting loads after restoring."""
    names = list(dict(net.named_parameters()))
    convert(net, last_n=1, example_input=images, compact=True)
    place = names.index("last.weight")
    parts = ["last.base", "last.scale", "last.offset"]
    assert list(dict(net.named_parameters())) == [*names[:place], *parts, *names[place + 1 :]]
    restore(net)
    assert list(dict(net.named_parameters())) == names


def test_frozen_weight_stays_frozen(net, images):
    """Where convert is not to change what is trained."""
    net.last.weight.requires_grad_(False)
    convert(net, last_n=2, example_input=images, compact=True, freeze_rest=False)
    assert not net.last.offset.requires_grad and net.middle.offset.requires_grad
    net(images).sum().backward()
    assert net.last.offset.grad is None and net.middle.offset.grad.any()


def test_covered_border_is_refused():
    with pytest.raises(ValueError, match="border='covered' is not exact for a compact layer; it takes 'plain'"):
        CompactConv2d(3, 4, 3, border="covered")
    with pytest.raises(ValueError, match="border='covered' is not exact for a compact layer"):
        CompactConv2d.from_conv(nn.Conv2d(3, 4, 3), border="covered")
    model = nn.Sequential(CompactConv2d(3, 4, 3))
    with pytest.raises(ValueError, match="border='covered' is not exact for 0, a compact layer"):
        convert(model, example_input=torch.ones(1, 3, 9, 9), border="covered")


def test_from_conv():
    conv, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(1, 3, 8, 8)
    layer = CompactConv2d.from_conv(conv, 4)
    torch.testing.assert_close(layer(x), conv(x))
    assert layer.base is conv.weight and layer.radius == (4, 4)


def test_state_dict_resumes(net, images):
    """Saved and loaded in the middle: the weight is composed anew."""
    convert(net, last_n=2, example_input=images, compact=True)
    train(net, images, torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1), steps=2)
    twin = type(net)()
    convert(twin, last_n=2, example_input=images, compact=True)
    twin(images)  # composes its own weight first
    twin.load_state_dict(net.state_dict())
    torch.testing.assert_close(twin.eval()(images), net.eval()(images))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, weight_decay=0.1),
        lambda p: torch.optim.NAdam(p, weight_decay=0.1),
    ],
)
def test_coupled_decay_is_refused(net, images, make):
    """At the first step, whoever takes it; named with the way out."""
    convert(net, last_n=1, example_input=images, compact=True)
    optimizer = make([p for p in net.parameters() if p.requires_grad])
    net(images).sum().backward()
    with pytest.raises(ValueError, match=r"weight_decay=0.1 does not keep a compact layer .*; use AdamW, SGD"):
        optimizer.step()
    with pytest.raises(ValueError, match=type(optimizer).__name__):
        check_optimizer(optimizer)


def test_other_optimisers_are_let_through(net, images):
    convert(net, last_n=1, example_input=images, compact=True)
    parameters = [p for p in net.parameters() if p.requires_grad]
    for optimizer in (
        torch.optim.NAdam(parameters, weight_decay=0.1, decoupled_weight_decay=True),
        torch.optim.Adam(nn.Linear(2, 2).parameters(), weight_decay=0.1),
        timm.optim.create_optimizer_v2(parameters, opt="adamw", weight_decay=0.1),
    ):
        check_optimizer(optimizer)


def test_step_after_an_evaluation():
    """A tensor that the layer keeps from a forward pass without autograd serves the next step."""
    layer = CompactConv2d(3, 4, 3, padding=1)
    optimizer, x = torch.optim.SGD(layer.parameters(), 0.1), torch.randn(2, 3, 6, 6)
    layer(x).sum().backward()
    optimizer.step()
    with torch.inference_mode():
        evaluated = layer(x)
    optimizer.zero_grad()
    out = layer(x)
    torch.testing.assert_close(out, evaluated.clone(), rtol=0, atol=0)
    out.sum().backward()
    assert layer.offset.grad.abs().sum() > 0


def test_layer_by_itself_is_guarded():
    layer = CompactConv2d(3, 4, 3)
    optimizer = torch.optim.Adam(layer.parameters(), weight_decay=0.1)
    layer(torch.randn(1, 3, 6, 6)).sum().backward()
    with pytest.raises(ValueError, match="use AdamW, SGD, or weight_decay=0"):
        optimizer.step()


class TestGuard:
    def optimizer(self, kind=torch.optim.Adam, **options):
        layer = CompactConv2d(3, 4, 3)
        layer(torch.randn(1, 3, 6, 6)).sum().backward()
        return kind(layer.parameters(), **options)

    def test_decay_that_comes_later(self):
        optimizer = self.optimizer()
        optimizer.step()
        optimizer.param_groups[0]["weight_decay"] = 0.1
        with pytest.raises(ValueError, match=r"Adam with weight_decay=0.1 does not keep a compact layer in its form"):
            optimizer.step()

    def test_group_that_comes_later(self):
        optimizer = torch.optim.Adam([nn.Parameter(torch.ones(1))])
        optimizer.step()
        optimizer.add_param_group({**self.optimizer().param_groups[0], "weight_decay": 0.1})
        with pytest.raises(ValueError, match=r"Adam with weight_decay=0.1"):
            optimizer.step()

    @pytest.mark.parametrize(
        "name", ["adafactor", "adafactorbv", "adamp", "lamb", "lars", "mars", "muon", "novograd", "sgdp"]
    )
    def test_whole_tensors(self, name):
        """Norms, projections and products of what is one offset for many taps are other than the weight's."""
        optimizer = self.optimizer(lambda p: timm.optim.create_optimizer_v2([*p], opt=name, lr=0.1))
        with pytest.raises(ValueError, match=f"{type(optimizer).__name__} does not move each element .*compact=False"):
            optimizer.step()

    @pytest.mark.parametrize("name", ["LBFGS", "Adafactor"])
    def test_whole_tensors_of_torch(self, name):
        with pytest.raises(ValueError, match=f"{name} does not move each element"):
            self.optimizer(getattr(torch.optim, name)).step(lambda: torch.zeros(()))

    def test_without_compact_layers(self):
        """Any optimiser, at any decay, in silence."""
        for parameters in (nn.Linear(2, 2).parameters(), nn.Conv2d(3, 4, 3).parameters()):
            timm.optim.create_optimizer_v2([*parameters], opt="lamb").step()

    def test_unknown(self):
        """Said once, also of one that calls itself like a known one."""
        optimizer = self.optimizer(type("SGD", (torch.optim.SGD,), {"__module__": "mine"}), lr=0.1)
        with pytest.warns(UserWarning, match="mine.SGD is not known to train a compact layer") as caught:
            optimizer.step()
        optimizer.step()
        assert len(caught) == 1

    def test_copies_are_guarded(self):
        layer = copy.deepcopy(CompactConv2d(3, 4, 3))
        layer(torch.randn(1, 3, 6, 6)).sum().backward()
        with pytest.raises(ValueError, match="use AdamW, SGD, or weight_decay=0"):
            torch.optim.Adam(layer.parameters(), weight_decay=0.1).step()


@pytest.mark.parametrize("name", ["scale", "offset"])
def test_writes_past_autograd(name):
    """Averages and fused optimisers write to `.data`, which no version counts."""
    layer, x = CompactConv2d(3, 4, 3), torch.randn(1, 3, 6, 6)
    layer(x)
    getattr(layer, name).data.add_(0.5)
    expected = F.conv2d(x, layer.scale * layer.base + layer.offset[:, :, None, None], layer.bias)
    torch.testing.assert_close(layer(x), expected)
    grad = torch.autograd.grad(layer(x.requires_grad_()).sum(), x)[0]
    twin = copy.deepcopy(layer)
    twin.fold()
    torch.testing.assert_close(torch.autograd.grad(twin(x).sum(), x)[0], grad)
