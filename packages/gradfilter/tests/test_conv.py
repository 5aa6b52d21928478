"""The layer by itself: nn.Conv2d in values and state, the filter in its gradients."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from gradfilter import (
    CompactConv2d,
    FilteredConv2d,
    convert,
    filtered_conv2d,
    patch_mean,
    profile,
    restore,
    saved_input,
)
from visionkernels.testing.ops import TOLERANCES

few = settings(max_examples=30, deadline=None)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
dtypes, sides = st.sampled_from(DTYPES), st.integers(1, 12)


def gradients(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Return the output and the gradients of input and trained parameters."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = layer(x)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    results = torch.autograd.grad(out, [x, *trained.values()], grad)
    return {"output": out.detach(), **dict(zip(["input", *trained], results, strict=True))}


def same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Conv2d, FilteredConv2d, Tensor]:
    """A convolution of any geometry, its filtered twin with the same Parameters, and an input that it takes."""
    torch.manual_seed(draw(st.integers(0, 99)))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    padding = draw(st.sampled_from([0, 1, (2, 1), *(["same", "valid"] if stride == 1 else [])]))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    groups, dtype = draw(st.sampled_from([1, 2, 4])), draw(dtypes)
    conv = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups, draw(st.booleans()), mode, dtype=dtype)
    radius = draw(st.one_of(st.integers(1, 20), st.tuples(st.integers(1, 5), st.integers(1, 5))))
    size = [draw(st.integers(dilation * (k - 1) + 1, 15)) for k in kernel]
    # reflection needs a map larger than what it adds
    x = torch.randn(draw(st.integers(1, 3)), 4, max(size[0], 4), max(size[1], 4), dtype=dtype)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    return conv, FilteredConv2d.from_conv(conv, radius), x


class TestFilteredConv2d:
    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
    @few
    @given(layers())
    def test_is_a_convolution(self, drawn):
        """The values of `nn.Conv2d`, its state dict, the exact gradient of the bias, and one gradient for all taps."""
        conv, layer, x = drawn
        rtol, atol = TOLERANCES[x.dtype][1]
        torch.testing.assert_close(layer(x), conv(x), rtol=rtol, atol=atol)
        same(dict(layer.state_dict()), dict(conv.state_dict()))
        assert all(ours is theirs for ours, theirs in zip(layer.parameters(), conv.parameters(), strict=True))
        grad = torch.randn_like(conv(x))
        results = gradients(layer, x, grad)
        assert {name: (value.dtype, value.shape) for name, value in results.items()} == {
            name: (value.dtype, value.shape) for name, value in gradients(conv, x, grad).items()
        }
        torch.testing.assert_close(results["weight"], results["weight"][:, :, :1, :1].expand_as(results["weight"]))
        if conv.bias is not None:
            exact = grad.double().sum((0, 2, 3))
            scale = max(1.0, float(grad.double().abs().sum((0, 2, 3)).max()))
            torch.testing.assert_close(results["bias"].double(), exact, rtol=rtol, atol=atol * scale)

    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
    @few
    @given(layers())
    def test_gradients_are_those_of_the_surrogate(self, drawn):
        """Filtered gradients are those of ordinary operations on a map that is padded beforehand."""
        _, layer, x = drawn
        layer, x = copy.deepcopy(layer).double(), x.double()

        def surrogate(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            padding = layer.padding
            if layer.padding_mode != "zeros":
                x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
            geometry = (layer.stride, padding, layer.dilation, layer.groups, layer.radius)
            return filtered_conv2d(x, weight, bias, *geometry, straight_through=True)

        leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, *layer.parameters())]
        out = surrogate(*leaves)
        grad = torch.randn_like(out)
        ours = list(gradients(layer, x, grad).values())
        torch.testing.assert_close(ours, [out.detach(), *torch.autograd.grad(out, leaves, grad)])

    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
    @few
    @given(layers())
    def test_copies_and_loads(self, drawn):
        """A copy, and a new layer that loads the state, give the same bits; an image alone is a batch of one."""
        _, layer, x = drawn
        grad = torch.randn_like(layer(x))
        expected = gradients(layer, x, grad)
        same(gradients(copy.deepcopy(layer), x, grad), expected)
        other = FilteredConv2d(
            4, 8, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.bias is not None,
            layer.padding_mode, radius=layer.radius, dtype=x.dtype,
        )  # fmt: skip
        other.load_state_dict(layer.state_dict())
        same(gradients(other, x, grad), expected)
        alone = gradients(layer, x[0], grad[0])
        rtol, atol = TOLERANCES[x.dtype][1]
        for name, value in gradients(layer, x[:1], grad[:1]).items():
            value = value[0] if name in ("output", "input") else value
            torch.testing.assert_close(alone[name], value, rtol=rtol, atol=atol * max(1.0, float(value.abs().max())))

    @few
    @given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 2), sides, sides)
    def test_same_padding_of_timm(self, kernel, stride, dilation, height, width):
        """timm's same padding is kept, also by a layer that was converted before."""
        conv = Conv2dSame(3, 4, kernel, stride=stride, dilation=dilation)
        x = torch.randn(2, 3, height + 8, width + 8)
        expected = conv(x)
        torch.testing.assert_close(FilteredConv2d.from_conv(conv, 2)(x), expected)
        model = nn.Sequential(conv)
        convert(model, layers=["0"], example_input=x)
        again = FilteredConv2d.from_conv(conv, 3)
        torch.testing.assert_close([conv(x), again(x)], [expected, expected])
        assert (conv.radius, again.radius) == ((2, 2), (3, 3))
        restore(again)
        assert type(again) is FilteredConv2d

    def test_compiles_with_same_padding(self):
        layer, x = FilteredConv2d.from_conv(Conv2dSame(3, 4, 3, stride=2)), torch.randn(2, 3, 9, 10)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))

    @pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
    @pytest.mark.parametrize(
        ("conv", "name"),
        [
            (lambda: ScaledStdConv2d(3, 4, 3), "ScaledStdConv2d"),
            (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), "ParametrizedConv2d"),
            (lambda: nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), "Conv2d"),
            (lambda: prune.random_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5), "Conv2d"),
            (lambda: CompactConv2d(3, 4, 3), "CompactConv2d"),
        ],
        ids=["standardised", "parametrised", "weight-norm", "pruned", "compact"],
    )
    def test_other_convolutions(self, conv, name):
        """A layer that computes its weight at each call is refused."""
        with pytest.raises(TypeError, match=f"^{name} computes its weight at each call"):
            FilteredConv2d.from_conv(conv())

    def test_has_its_own_hooks(self):
        conv, x, calls = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8), []
        layer = FilteredConv2d.from_conv(conv)
        layer.register_forward_hook(lambda *_: calls.append("layer"))
        layer.register_buffer("extra", torch.ones(1))
        conv(x)
        assert calls == [] and "extra" not in dict(conv.named_buffers())
        layer(x)
        assert calls == ["layer"]
        shared = [name for name, value in vars(conv).items()
                  if isinstance(value, dict | list | set) and value is vars(layer)[name]]  # fmt: skip
        assert shared == []

    def test_border(self):
        assert FilteredConv2d.from_conv(nn.Conv2d(3, 4, 3), border="covered").border == "covered"
        for make in (partial(FilteredConv2d, 3, 4, 3), partial(FilteredConv2d.from_conv, nn.Conv2d(3, 4, 3)),
                     partial(CompactConv2d, 3, 4, 3)):  # fmt: skip
            with pytest.raises(ValueError, match="border='x' must be 'plain' or 'covered'"):
                make(border="x")

    def test_exportable_has_a_second_derivative(self):
        """An exportable layer is an ordinary expression; its value equals that of the convolution to the bit."""
        conv, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 6, 6, requires_grad=True)
        layer = FilteredConv2d.from_conv(conv)
        layer.exportable = True
        assert torch.equal(layer(x), conv(x))
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        grad.sum().backward()
        assert x.grad.isfinite().all()

    @pytest.mark.parametrize("name", ["stride", "dilation"])
    def test_wrong_geometry(self, name):
        with pytest.raises(ValueError, match=rf"{name}=\(1.5, 1.5\) must be an integer of at least 1"):
            FilteredConv2d(3, 4, 3, **{name: 1.5})(torch.ones(1, 3, 8, 8))

    def test_stands_alone(self):
        """Built as any layer, from a convolution that stays what it is, and printed."""
        layer = FilteredConv2d(3, 4, 3, padding=1, radius=(2, 4))
        assert "radius=(2, 4)" in repr(layer)
        conv = nn.Conv2d(3, 4, 3)
        shared = FilteredConv2d.from_conv(conv, 2)
        assert shared.weight is conv.weight and type(conv) is nn.Conv2d
        assert isinstance(CompactConv2d(3, 4, 3), FilteredConv2d)

    def test_called_twice(self):
        """Gradients of a layer on two maps add up, also in a converted network."""
        first, second = torch.randn(1, 3, 8, 8), torch.randn(2, 3, 5, 7)
        layer = FilteredConv2d(3, 3, 3, padding=1)
        grads = []
        for calls in ((first,), (second,), (first, second)):
            loss = sum(layer(x).square().sum() for x in calls)
            grads.append(torch.autograd.grad(loss, layer.weight)[0])
        torch.testing.assert_close(grads[2], grads[0] + grads[1])
        conv = nn.Conv2d(3, 3, 3, padding=1)
        network = nn.Sequential(conv, nn.Tanh(), conv)
        assert convert(network, example_input=first).filtered == ("0",)
        network(first).square().sum().backward()
        twin = conv.weight.detach().clone().requires_grad_()
        middle = filtered_conv2d(first, twin, conv.bias, padding=1).tanh()
        filtered_conv2d(middle, twin, conv.bias, padding=1).square().sum().backward()
        torch.testing.assert_close(conv.weight.grad, twin.grad)

    @pytest.mark.parametrize("kind", [FilteredConv2d, CompactConv2d])
    def test_deterministic_mode(self, kind):
        """Runs under torch's deterministic algorithms, and twice to the same bits."""
        layer, x = kind(4, 6, 3, padding=1, groups=2, radius=(2, 3)), torch.randn(2, 4, 9, 8)
        grad = torch.randn_like(layer(x))
        torch.use_deterministic_algorithms(True)
        try:
            same(gradients(layer, x, grad), gradients(layer, x, grad))
        finally:
            torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("kind", [FilteredConv2d, CompactConv2d])
    def test_empty_batch(self, kind):
        layer = kind(3, 4, 3, padding=1)
        results = gradients(layer, torch.ones(0, 3, 6, 5), torch.ones(0, 4, 6, 5))
        assert results["output"].shape == (0, 4, 6, 5) and results["input"].shape == (0, 3, 6, 5)
        assert not any(grad.any() for grad in results.values())

    @pytest.mark.parametrize("kind", [FilteredConv2d, CompactConv2d])
    def test_one_output_and_wide_patches(self, kind):
        """A map that one window covers, and patches larger than any map: a single cell for each."""
        layer = kind(3, 4, (5, 6), radius=9)
        results = gradients(layer, torch.randn(2, 3, 5, 6), torch.ones(2, 4, 1, 1))
        assert results["output"].shape == (2, 4, 1, 1)
        wide, all_of_it = kind(3, 4, 3, padding=1, radius=100), kind(3, 4, 3, padding=1, radius=(7, 8))
        all_of_it.load_state_dict(wide.state_dict())
        x, grad = torch.randn(2, 3, 7, 8), torch.randn(2, 4, 7, 8)
        same(gradients(wide, x, grad), gradients(all_of_it, x, grad))

    def test_unused_rows(self):
        """A stride that leaves the last row and column unread: they get no gradient."""
        layer = FilteredConv2d(2, 3, 2, stride=2)
        results = gradients(layer, torch.randn(1, 2, 7, 9), torch.randn(1, 3, 3, 4))
        assert not results["input"][:, :, 6:].any() and not results["input"][:, :, :, 8:].any()
        assert results["input"][:, :, :6, :8].all()

    def test_infinity_spoils_its_image_alone(self):
        x, grad = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)
        grad[0, 0, 3, 4] = torch.inf
        results = gradients(FilteredConv2d(3, 4, 3, padding=1), x, grad)
        assert not results["input"][0, :, 2:4, 4:6].isfinite().any() and results["input"][1].isfinite().all()

    @pytest.mark.parametrize("kind", [FilteredConv2d, CompactConv2d])
    def test_no_second_derivative(self, kind):
        layer, x = kind(3, 4, 3), torch.randn(1, 3, 6, 6, requires_grad=True)
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="filtered_conv2d has no second derivative"):
            grad.sum().backward()

    # forward-mode AD compiles its decompositions with TorchScript
    @pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
    def test_no_forward_derivative(self):
        layer, x = FilteredConv2d(3, 4, 3), torch.randn(1, 3, 6, 6)
        with pytest.raises(NotImplementedError), torch.autograd.forward_ad.dual_level():
            layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))

    @pytest.mark.parametrize("kind", [FilteredConv2d, CompactConv2d])
    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (torch.ones(4, 4), ValueError, r"x has shape \[4, 4\]"),
            (torch.ones(1, 1, 2, 4, 4), ValueError, r"x has shape \[1, 1, 2, 4, 4\]"),
            (torch.ones(1, 3, 4, 4), ValueError, r"x has 3 channels; weight \[4, 1, 3, 3\] with groups=2 takes 2"),
            (torch.ones(1, 2, 2, 4), RuntimeError, "kernel spans 3 pixels of height; the padded input has 2"),
            (torch.ones(1, 2, 4, 2), RuntimeError, "kernel spans 3 pixels of width; the padded input has 2"),
            (torch.ones(1, 2, 4, 4, dtype=torch.int64), TypeError, "x is torch.int64; .* takes floating-point"),
            (torch.ones(1, 2, 4, 4, dtype=torch.complex64), TypeError, "x is torch.complex64; .* takes floating-point"),
            (torch.ones(1, 2, 4, 4).double(), TypeError, "x is torch.float64 and weight is torch.float32"),
            (torch.ones(1, 2, 4, 4, device="meta"), TypeError, "x is on meta and weight on cpu"),
        ],
        ids=["2-D", "5-D", "channels", "height", "width", "integer", "complex", "dtype", "device"],
    )
    def test_wrong_inputs(self, kind, x, error, message):
        """The op's own sentences reach who calls the layer."""
        with pytest.raises(error, match=message):
            kind(2, 4, 3, groups=2)(x)

    def test_groups_that_do_not_divide(self):
        with pytest.raises(ValueError, match="must be divisible by groups"):
            FilteredConv2d(3, 4, 3, groups=2)
        with pytest.raises(ValueError, match=r"groups=3 .* must divide the 4 outputs"):
            filtered_conv2d(torch.ones(1, 3, 4, 4), torch.ones(4, 1, 3, 3), groups=3)


@pytest.mark.parametrize("radius", [0, -1, 2.0, True, (2,), (2, 2, 2), (2, 0), (2, True), "2"], ids=repr)
@pytest.mark.parametrize(
    "take",
    [
        lambda radius: FilteredConv2d(2, 2, 3, radius=radius),
        lambda radius: CompactConv2d(2, 2, 3, radius=radius),
        lambda radius: FilteredConv2d.from_conv(nn.Conv2d(2, 2, 3), radius),
        lambda radius: convert(nn.Sequential(nn.Conv2d(2, 2, 3)), radius),
        lambda radius: convert(nn.Sequential(nn.Conv2d(2, 2, 3)), {"*": radius}),
        lambda radius: profile(nn.Sequential(nn.Conv2d(2, 2, 3)), radii=[radius], measures_memory=False),
        lambda radius: filtered_conv2d(torch.ones(1, 2, 4, 4), torch.ones(2, 2, 3, 3), radius=radius),
        lambda radius: patch_mean(torch.ones(1, 2, 4, 4), radius),
        lambda radius: saved_input(torch.ones(1, 2, 4, 4), 3, radius=radius),
    ],
    ids=["layer", "compact", "from-conv", "convert", "convert-dict", "profile", "function", "mean", "input"],
)
def test_wrong_radius(take, radius):
    """Whoever takes a radius names it, its value and what is allowed."""
    with pytest.raises(ValueError, match=r"radius=.* must be a positive integer or pair") as caught:
        take(radius)
    assert f"radius={radius!r}" in str(caught.value)
