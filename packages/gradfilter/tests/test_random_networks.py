"""Properties of any small network: convert changes no value, restore undoes it, a delta holds all changes."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradfilter import convert, restore
from gradfilter.conv import CompactConv2d
from gradfilter.delta import apply_delta, compute_delta, trainable_delta

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# torch says so of even kernels, which pad one side more than the other
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

ACTIVATIONS = (nn.Identity, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.Dropout)


@st.composite
def convolutions(draw: st.DrawFn, in_channels: int, out_channels: int) -> nn.Conv2d:
    """Any geometry that fits a map of 5 pixels; three of them fit one of 29."""
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    padding = draw(st.sampled_from([0, 1, (2, 1), *(["same", "valid"] if stride == 1 else [])]))
    return nn.Conv2d(
        in_channels, out_channels, kernel, stride=stride, padding=padding, dilation=dilation,
        groups=draw(st.sampled_from([1, 2, 4])), bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "zeros", "reflect", "circular"])),
    )  # fmt: skip


@st.composite
def networks(draw: st.DrawFn, *, has_norms: bool = False) -> nn.Sequential:
    """One to three convolutions, each with an activation and perhaps a norm, and a linear layer behind them."""
    torch.manual_seed(draw(st.integers(0, 99)))
    widths = [4, *draw(st.lists(st.sampled_from([4, 8]), min_size=1, max_size=3))]
    layers: list[nn.Module] = []
    for channels in pairwise(widths):
        layers += [draw(convolutions(*channels)), draw(st.sampled_from(ACTIVATIONS))()]
        if has_norms:
            layers.insert(-1, nn.BatchNorm2d(channels[1], affine=draw(st.booleans())))
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 3))
    for parameter in network.parameters():
        parameter.requires_grad_(draw(st.booleans()))
    return network.train(draw(st.booleans()))


def arguments(network: nn.Sequential) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of `convert` that this network takes."""
    count = sum(isinstance(module, nn.Conv2d) for module in network)
    sides = st.integers(1, 9)
    return st.fixed_dictionaries(
        {
            "radius": st.one_of(sides, st.tuples(sides, sides), st.none()),
            "last_n": st.one_of(st.none(), st.integers(1, count)),
            "lean_activations": st.sampled_from([False, True, "all"]),
            "train_norm": st.sampled_from(["after", "none", "all"]),
            "norm_stats": st.sampled_from(["frozen", "update"]),
            "freeze_rest": st.booleans(),
        }
    ).flatmap(
        lambda chosen: st.sampled_from(
            [{}, {"border": "covered"}, {"compact": True}, {"exportable": True, "lean_activations": False}]
        ).map(lambda form: chosen | form)
    )


def images() -> Tensor:
    return torch.randn(2, 4, 29, 31, generator=torch.Generator().manual_seed(0))


def outline(network: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Return class, mode, settings and trained parameters of every module."""
    return {
        name: (
            type(module),
            module.training,
            {key: value for key, value in vars(module).items() if key in ("radius", "border", "exportable")},
            {key: parameter.requires_grad for key, parameter in module.named_parameters(recurse=False)},
        )
        for name, module in network.named_modules()
    }


def gradients(network: nn.Module) -> dict[str, Tensor]:
    network.zero_grad()
    torch.manual_seed(0)
    loss = network(images()).square().sum()
    if loss.requires_grad:
        loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def output(network: nn.Module) -> Tensor:
    """Return the output of a copy in evaluation mode, where dropout and batch statistics do not matter."""
    return copy.deepcopy(network).eval()(images()).detach()


class TestConvert:
    @few
    @given(st.data())
    def test_changes_no_value(self, data):
        """Keys, Parameters and outputs, the outputs with and without gradients."""
        network = data.draw(networks())
        state, parameters, expected = copy.deepcopy(network.state_dict()), set(network.parameters()), output(network)
        options = data.draw(arguments(network)) | {"compact": False}
        convert(network, **options, example_input=images(), warns=False)
        assert list(network.state_dict()) == list(state) and set(network.parameters()) == parameters
        for key, value in network.state_dict().items():
            torch.testing.assert_close(value, state[key], rtol=0, atol=0, msg=key)
        torch.testing.assert_close(output(network), expected, rtol=0, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(output(network), expected, rtol=0, atol=0)

    @few
    @given(st.data())
    def test_changes_outputs_by_rounding_at_most(self, data):
        """With norms, which are one multiplication and one addition once they are frozen, and any arguments."""
        network = data.draw(networks(has_norms=True))
        expected = output(network)
        convert(network, **data.draw(arguments(network)), example_input=images(), warns=False)
        torch.testing.assert_close(output(network), expected)

    @few
    @given(st.data())
    def test_trained_parameters_get_gradients(self, data):
        """Finite ones, alike for all taps of a kernel unless the border weights them; what is frozen gets none."""
        network = data.draw(networks(has_norms=True))
        options = data.draw(arguments(network))
        report = convert(network, **options, example_input=images(), warns=False)
        grads = gradients(network)
        assert set(grads) == {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        assert all(grad.isfinite().all() for grad in grads.values())
        if options.get("border") == "covered":
            return
        for name in report.filtered:
            if (grad := grads.get(f"{name}.weight")) is not None:
                torch.testing.assert_close(grad, grad[:, :, :1, :1].expand_as(grad), rtol=0, atol=0)

    @few
    @given(st.data())
    def test_the_last_call_counts(self, data):
        """Converting with one set of arguments and then with another is converting with the other."""
        network = data.draw(networks(has_norms=True))
        twin = copy.deepcopy(network)
        first, second = (data.draw(arguments(network)) for _ in range(2))
        convert(network, **first, example_input=images(), warns=False)
        reports = [convert(model, **second, example_input=images(), warns=False) for model in (network, twin)]
        assert reports[0] == reports[1] and outline(network) == outline(twin)
        ours, expected = gradients(network), gradients(twin)
        assert ours.keys() == expected.keys()
        for name, grad in ours.items():
            torch.testing.assert_close(grad, expected[name], rtol=0, atol=0, msg=name)


class TestRestore:
    @few
    @given(st.data())
    def test_leaves_no_trace(self, data):
        """Classes, Parameters, what is trained, and outputs to the bit; once more changes nothing."""
        network = data.draw(networks(has_norms=True))
        before, parameters, expected = outline(network), dict(network.named_parameters()), output(network)
        attributes = {name: set(vars(module)) for name, module in network.named_modules()}
        for _ in range(data.draw(st.integers(1, 2))):
            convert(network, **data.draw(arguments(network)), example_input=images(), warns=False)
        for _ in range(2):
            restore(network)
            assert outline(network) == before
            assert {name: set(vars(module)) for name, module in network.named_modules()} == attributes
            restored = dict(network.named_parameters())
            assert restored.keys() == parameters.keys()
            assert all(restored[name] is parameters[name] for name in restored)
            torch.testing.assert_close(output(network), expected, rtol=0, atol=0)

    @few
    @given(st.data())
    def test_order_of_parameters(self, data):
        """By which optimisers load their state: the compact parts stand where the weight stood."""
        network = data.draw(networks(has_norms=True))
        before = list(network.parameters())
        convert(network, **data.draw(arguments(network)), example_input=images(), warns=False)
        assert [new for new in network.parameters() if any(new is old for old in before)] == before
        for module in network.modules():
            if isinstance(module, CompactConv2d):
                assert list(module._parameters) == ["base", "scale", "offset", "bias"]
        restore(network)
        assert all(ours is old for ours, old in zip(network.parameters(), before, strict=True))

    @few
    @given(st.data())
    def test_of_a_part(self, data):
        """Converting a part and restoring the whole, or the other way, leaves no trace in what both hold."""
        part = data.draw(networks(has_norms=True))
        whole, expected = nn.Sequential(part, nn.Linear(3, 2)), outline(part)
        converted, restored = (whole, part) if data.draw(st.booleans()) else (part, whole)
        convert(converted, **data.draw(arguments(part)), example_input=images(), warns=False)
        restore(restored)
        assert outline(part) == expected


class TestDelta:
    @few
    @given(st.data())
    def test_round_trip(self, data):
        """The delta of the model, and that of two states, lead from the base to the trained weights."""
        network = data.draw(networks(has_norms=True))
        base = copy.deepcopy(network.state_dict())
        options = data.draw(arguments(network)) | {"freeze_rest": True}
        convert(network, **options, example_input=images(), warns=False)
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.01, weight_decay=1e-2)
        for _ in range(2):
            gradients(network)
            optimizer.step()
        delta = trainable_delta(network)
        is_compact = any(isinstance(module, CompactConv2d) for module in network.modules())
        restore(network)
        tuned = network.state_dict()
        for changes in (delta, compute_delta(base, tuned)):
            ours = apply_delta(base, changes)
            assert ours.keys() == base.keys()
            for key, value in tuned.items():
                assert ours[key].dtype == value.dtype
                torch.testing.assert_close(ours[key], value, msg=key)
        # only composed kernels are rounded
        if not is_compact:
            assert all(torch.equal(apply_delta(base, delta)[key], value) for key, value in tuned.items())

    @few
    @given(
        st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
        st.lists(st.integers(0, 4), max_size=4),
    )
    def test_any_tensor(self, dtype, shape):
        """Equal ones are left out, changed ones stand whole whatever their shape, and nothing else is touched."""
        before = torch.randn(shape).to(dtype)
        base = {"changed": before, "same": before, "count": torch.tensor(3)}
        tuned = base | {"changed": torch.randn(shape).to(dtype)}
        delta = compute_delta(base, tuned)
        assert not {"same", "count"} & {name.partition(".")[0] for name in delta}
        for key, value in apply_delta(base, delta).items():
            torch.testing.assert_close(value, tuned[key], msg=key)
