import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import conv2d

from visionkernels.ops.filtered_conv import (
    eager,
    filtered_conv2d,
    kernel_sum,
    patch_mean,
    reference,
    saved_input,
)
from visionkernels.ops.filtered_conv.geometry import Axis
from visionkernels.testing.ops import BACKENDS, DEVICE, TOLERANCES, check_backend, check_compiled, gradients

CONFIGS = {
    # batch, in, out, size, kernel, options
    "same": (2, 6, 8, (8, 8), 3, {"padding": 1}),
    "ragged": (2, 5, 7, (7, 10), 3, {"padding": 1, "radius": 4}),
    "one-cell": (1, 4, 4, (5, 5), 3, {"padding": 1, "radius": 7}),
    "stride": (2, 6, 8, (10, 9), 3, {"padding": 1, "stride": 2}),
    "stride-above-kernel": (2, 4, 4, (11, 13), 2, {"stride": 3, "radius": (1, 2)}),
    "shortcut": (2, 6, 9, (8, 8), 1, {"stride": 2}),
    "pointwise": (2, 6, 9, (7, 7), 1, {"radius": 2}),
    "depthwise": (3, 10, 10, (7, 7), 3, {"padding": 1, "groups": 10}),
    "depthwise-twice": (2, 4, 8, (6, 6), 3, {"padding": 1, "groups": 4}),
    "grouped-dilated": (2, 8, 12, (9, 12), 3, {"padding": 2, "dilation": 2, "groups": 4, "radius": (2, 4)}),
    "valid": (2, 4, 6, (12, 11), 5, {"radius": 2}),
    "full": (1, 3, 4, (6, 5), 3, {"padding": 2}),
    "patches": (2, 3, 8, (12, 12), 3, {"stride": 3, "radius": 2}),
    "one-pixel": (2, 3, 4, (1, 1), 1, {"radius": 1}),
    "prime": (1, 3, 5, (31, 13), 3, {"padding": 1, "radius": 3}),
}
# sums of ordinary operations round each step in half precision; Triton 3.8's interpreter multiplies bfloat16's bits
HALF = ["same", "ragged", "depthwise"]
TRITON_HALF = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
COMBINATIONS = [
    *((form, name, dtype) for form in ("eager", "channels-last") for name in CONFIGS for dtype in TOLERANCES),
    *(("straight-through", name, dtype) for name in CONFIGS for dtype in (torch.float64, torch.float32)),
    *(("triton", name, torch.float32) for name in CONFIGS),
    *(("triton", name, dtype) for name in HALF for dtype in TRITON_HALF),
]


def make(name, dtype=torch.float32, has_bias=True):
    batch, channels, outputs, size, kernel, options = CONFIGS[name]
    inputs = [
        torch.randn(batch, channels, *size, dtype=dtype),
        torch.randn(outputs, channels // options.get("groups", 1), kernel, kernel, dtype=dtype) / kernel,
    ]
    if has_bias:
        inputs.append(torch.randn(outputs, dtype=dtype))
    return [each.to(DEVICE) for each in inputs], options


class TestFilteredConv2d:
    @pytest.mark.parametrize(("form", "name", "dtype"), COMBINATIONS, ids=str)
    def test_reference(self, form, name, dtype):
        inputs, options = make(name, dtype)
        if form == "channels-last":
            inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)
        backend = form if form == "triton" else "eager"
        run = partial(filtered_conv2d, **options, backend=backend, straight_through=form == "straight-through")
        check_backend(run, partial(filtered_conv2d, **options, backend="reference"), inputs)

    @pytest.mark.parametrize("form", ["eager", "straight-through", "triton"])
    def test_covered_border(self, form):
        inputs, options = make("ragged")
        run = partial(filtered_conv2d, border="covered", **options)
        ours = partial(run, backend="triton" if form == "triton" else "eager", straight_through=form[0] == "s")
        check_backend(ours, partial(run, backend="reference"), inputs)

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_covered_border_is_exact_on_one_pixel(self, backend):
        x, weight = torch.randn(3, 4, 1, 1, device=DEVICE), torch.randn(5, 4, 3, 3, device=DEVICE)
        check_backend(
            lambda x, w: filtered_conv2d(x, w, padding=1, border="covered", backend=backend),
            lambda x, w: conv2d(x, w, padding=1),
            [x, weight],
        )

    @pytest.mark.parametrize("stride", [1, 2, 3])
    @pytest.mark.parametrize("backend", ["eager", "reference"])
    def test_one_tap_and_radius_one_is_exact(self, backend, stride):
        inputs = [torch.randn(2, 4, 7, 9).double(), torch.randn(6, 2, 1, 1).double(), torch.randn(6).double()]
        options = {"stride": stride, "groups": 2}
        check_backend(
            partial(filtered_conv2d, **options, radius=1, backend=backend), partial(conv2d, **options), inputs
        )

    def test_radius_one_is_not_exact_for_a_kernel(self):
        x, weight = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3, requires_grad=True)
        filtered_conv2d(x, weight, padding=1, radius=1).square().sum().backward()
        (exact,) = torch.autograd.grad(conv2d(x, weight, padding=1).square().sum(), weight)
        assert (weight.grad - exact).norm() > 0.1 * exact.norm()

    def test_constant_input_and_gradient_are_exact(self):
        """Without padding, dW of a constant map under a constant gradient is what every tap really gets."""
        x, weight = torch.full((2, 3, 8, 8), 0.7), torch.randn(4, 3, 3, 3)
        ours, exact = (weight.clone().requires_grad_() for _ in range(2))
        filtered_conv2d(x, ours, radius=2).sum().backward()
        conv2d(x, exact).sum().backward()
        torch.testing.assert_close(ours.grad, exact.grad)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_frozen(self, backend):
        """A frozen weight keeps nothing of the input, an input without gradient gets none."""
        (x, weight, _), options = make("same")
        weight.requires_grad_()
        filtered_conv2d(x, weight, backend=backend, **options).sum().backward()
        assert x.grad is None and weight.grad is not None
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            filtered_conv2d(x.requires_grad_(), weight.detach(), backend=backend, **options).sum().backward()
        assert x.numel() not in saved and x.grad is not None

    def test_keeps_the_means_alone(self):
        (x, weight, _), options = make("same")
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
            filtered_conv2d(x.requires_grad_(), weight.requires_grad_(), **options)
        assert sorted(map(tuple, saved)) == [(2, 6, 4, 4), (8, 6, 3, 3)]

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_empty_batch(self, backend):
        (x, weight, bias), options = make("same")
        leaves = [each.requires_grad_() for each in (x[:0].detach(), weight, bias)]
        out = filtered_conv2d(*leaves, backend=backend, **options)
        out.sum().backward()
        assert out.shape == (0, 8, 8, 8)
        assert leaves[0].grad.shape == (0, 6, 8, 8) and not leaves[1].grad.any() and not leaves[2].grad.any()

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_strides(self, backend):
        """Expanded and transposed gradients, channels-last ones, and an image without a batch axis."""
        (x, weight, bias), options = make("same")
        run = partial(filtered_conv2d, weight=weight, bias=bias, backend=backend, **options)
        x.requires_grad_()
        for grad in (
            torch.randn(2, 8, 1, 1).expand(-1, -1, 8, 8),
            torch.randn(2, 8, 8, 8).mT,
            torch.randn(2, 8, 8, 8).contiguous(memory_format=torch.channels_last),
        ):
            grad = grad.to(DEVICE)
            (ours,) = torch.autograd.grad(run(x), x, grad)
            (expected,) = torch.autograd.grad(run(x), x, grad.contiguous())
            torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(run(x[0]), run(x)[0])

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_memory_format(self, backend):
        (x, weight, _), options = make("same")
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        filtered_conv2d(x, weight, backend=backend, **options).sum().backward()
        assert x.grad.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
    @pytest.mark.parametrize("padding", ["same", "valid"])
    @pytest.mark.parametrize("kernel", [3, 4])
    def test_named_padding(self, padding, kernel):
        x, weight = torch.randn(2, 3, 9, 8), torch.randn(4, 3, kernel, 3)
        out = filtered_conv2d(x.requires_grad_(), weight, padding=padding)
        expected = conv2d(x, weight, padding=padding)
        torch.testing.assert_close(out, expected)
        # the total over a map is kept, but for the taps that fall into the padding
        out.sum().backward()
        assert x.grad.shape == x.shape

    def test_autocast(self):
        """Computes and keeps in bfloat16, gives gradients in float32."""
        inputs, options = make("same")
        leaves = [each.requires_grad_() for each in inputs]
        with torch.autocast(DEVICE, torch.bfloat16):
            out = filtered_conv2d(*leaves, **options)
            torch.testing.assert_close(out, conv2d(*leaves, padding=1))
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        assert {leaf.grad.dtype for leaf in leaves} == {torch.float32}
        full = [each.detach().requires_grad_() for each in inputs]
        filtered_conv2d(*full, **options).sum().backward()
        for half, whole in zip(leaves, full, strict=True):
            assert (half.grad - whole.grad).norm() < 0.02 * whole.grad.norm()

    def test_gradcheck_of_the_surrogate(self):
        """The function that has the filtered gradients as its own; the convolution itself must fail the check."""
        inputs, _ = make("ragged", torch.float64)
        x, weight, _ = (each.requires_grad_() for each in inputs)
        axes = tuple(Axis(size, 3, 1, 1, 1, 4) for size in (7, 10))
        outputs = tuple(Axis(size, 1, 1, 0, 1, 4) for size in (7, 10))

        def surrogate(x: Tensor, weight: Tensor) -> Tensor:
            mixed = conv2d(eager.mean_over_cells(x, axes), kernel_sum(weight)[:, :, None, None])
            return eager.spread_over_cells(mixed, outputs)

        assert torch.autograd.gradcheck(surrogate, (x, weight), fast_mode=True)
        run = partial(filtered_conv2d, padding=1, radius=4)
        assert not torch.autograd.gradcheck(run, (x, weight), fast_mode=True, raise_exception=False)
        grad = torch.randn(2, 7, 7, 10).double()
        ours = torch.autograd.grad(run(x, weight), (x, weight), grad)
        torch.testing.assert_close(ours, torch.autograd.grad(surrogate(x, weight), (x, weight), grad))

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_properties(self, data):
        """Any geometry: eager is the reference, the backward is linear, and the total gradient of the bias exact."""
        kernel, stride, padding, dilation = (data.draw(st.integers(low, 4)) for low in (1, 1, 0, 1))
        span = dilation * (kernel - 1) + 1
        size = [data.draw(st.integers(max(1, span - 2 * padding), 15)) for _ in range(2)]
        radius = (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
        groups = data.draw(st.sampled_from([1, 2, 4]))
        x = torch.randn(2, 4, *size, dtype=torch.float64)
        weight = torch.randn(4, 4 // groups, kernel, kernel, dtype=torch.float64)
        bias = torch.randn(4, dtype=torch.float64)
        run = partial(filtered_conv2d, stride=stride, padding=padding, dilation=dilation, groups=groups, radius=radius)
        check_backend(run, partial(run, backend="reference"), [x, weight, bias])
        leaves = [each.requires_grad_() for each in (x, weight, bias)]
        out = run(*leaves)
        first, second = (torch.randn(out.shape, dtype=torch.float64) for _ in range(2))
        grads = [torch.autograd.grad(out, leaves, each, retain_graph=True) for each in (first, second, first + second)]
        for one, other, both in zip(*grads, strict=True):
            torch.testing.assert_close(one + other, both)
        torch.testing.assert_close(grads[0][2], first.sum((0, 2, 3)))

    @pytest.mark.parametrize("name", ["same", "stride", "depthwise", "grouped-dilated"])
    def test_compile_export(self, name):
        inputs, options = make(name)
        check_compiled(lambda *leaves: filtered_conv2d(*leaves, **options).square(), inputs)

    def test_compile_of_other_sizes(self):
        """A second size, which makes all sizes symbols."""
        torch._dynamo.reset()
        compiled = torch.compile(filtered_conv2d, fullgraph=True, backend="aot_eager")
        weight = torch.randn(5, 3, 1, 1, device=DEVICE)
        for shape in ((2, 3, 7, 7), (1, 3, 8, 5)):
            x = torch.randn(shape, device=DEVICE)
            ours, expected = (gradients(function, [x, weight]) for function in (compiled, filtered_conv2d))
            torch.testing.assert_close(ours, expected)

    def test_export_has_the_filtered_gradients(self):
        """In the graph that training exports, an inlined custom function would have left the exact ones."""
        from torch.export.experimental import _export_forward_backward

        class Loss(nn.Module):
            def __init__(self, weight: Tensor) -> None:
                super().__init__()
                self.weight = nn.Parameter(weight)

            def forward(self, x: Tensor) -> tuple[Tensor]:
                return (filtered_conv2d(x, self.weight, **options).square().sum(),)

        (x, weight, _), options = make("same", torch.float64)
        joint = _export_forward_backward(torch.export.export(Loss(weight), (x,), strict=True))
        loss, grad = joint.graph_module(weight, x)
        leaf = weight.clone().requires_grad_()
        expected = filtered_conv2d(x, leaf, **options).square().sum()
        torch.testing.assert_close((loss, grad), (expected, *torch.autograd.grad(expected, leaf)))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", CONFIGS)
    def test_straight_through_value(self, name, dtype):
        """The value is the convolution's to the bit, the bias included."""
        inputs, options = make(name, dtype)
        leaves = [each.requires_grad_() for each in inputs]
        ours = filtered_conv2d(*leaves, straight_through=True, **options)
        options.pop("radius", None)
        torch.testing.assert_close(ours, conv2d(*leaves, **options), rtol=0, atol=0)

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_known_kernel_sum(self, backend):
        (x, weight, _), options = make("grouped-dilated")
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        grads = [
            torch.autograd.grad(filtered_conv2d(*leaves, kernel=kernel, backend=backend, **options).sum(), leaves)
            for kernel in (None, weight.detach().sum((2, 3)))
        ]
        torch.testing.assert_close(grads[0], grads[1])
        assert backend != "eager" or grads[1][1].stride()[2:] == (0, 0)
        with pytest.raises(ValueError, match=r"kernel has shape \[12, 2\] with border='covered'"):
            filtered_conv2d(*leaves, kernel=weight.detach().sum((2, 3)), border="covered", **options)

    def test_no_grad(self):
        (x, weight, _), options = make("same")
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(filtered_conv2d(x, weight, **options), conv2d(x, weight, padding=1))
        # constants made in inference mode serve training as well
        filtered_conv2d(x.requires_grad_(), weight.requires_grad_(), **options).sum().backward()

    # forward-mode AD compiles its decompositions with TorchScript
    @pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
    def test_no_second_derivative(self):
        (x, weight, _), options = make("same")
        out = filtered_conv2d(x.requires_grad_(), weight.requires_grad_(), **options)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="filtered_conv2d has no second derivative"):
            grad.sum().backward()
        with pytest.raises(NotImplementedError), torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
            filtered_conv2d(dual, weight, **options)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_nan(self, layout):
        """A NaN spoils its patch, or its image where constant matrices multiply the map, and never another image."""
        (x, weight, _), options = make("same")
        x = x.contiguous(memory_format=layout).requires_grad_()
        out = filtered_conv2d(x, weight, **options)
        grad = torch.zeros_like(out, memory_format=layout)
        grad[0, 0, 3, 4] = torch.nan
        (ours,) = torch.autograd.grad(out, x, grad)
        is_spoiled = ours.isnan().any(1)
        assert is_spoiled[0, 2:4, 4:6].all() and not is_spoiled[1].any()
        assert layout == torch.contiguous_format or is_spoiled.sum() == 4

    def test_large_float16_does_not_overflow(self):
        x = torch.full((1, 2, 14, 14), 4000.0, dtype=torch.float16)
        weight = torch.zeros(2, 2, 1, 1, dtype=torch.float16, requires_grad=True)
        filtered_conv2d(x, weight, radius=7).backward(torch.full((1, 2, 14, 14), 1e-3, dtype=torch.float16))
        # 196 pixels of 4000 times the gradient
        torch.testing.assert_close(weight.grad, torch.full_like(weight, 784.0))

    # opcheck itself reads .grad of tensors that are no leaves
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    def test_opcheck(self):
        from visionkernels.ops.filtered_conv.triton import _forward_op

        inputs, _ = make("one-cell")
        leaves = [each.requires_grad_() for each in inputs]
        taps = torch.ones(3, 3, device=DEVICE)
        torch.library.opcheck(_forward_op, (*leaves, taps, [1, 1, 1, 1, 1, 1, 3, 3, 1], True))

    @pytest.mark.parametrize("radius", [0, -1, 2.0, True, (2,), (2, 2, 2), (2, 0), "2", None])
    def test_radius_errors(self, radius):
        x, weight = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 1, 1)
        with pytest.raises(ValueError, match=r"radius=.* must be a positive integer or pair"):
            filtered_conv2d(x, weight, radius=radius)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"x": torch.ones(1, 2, 4, 4, dtype=torch.int64)}, TypeError, "x is torch.int64; filtered_conv2d takes fl"),
            ({"x": torch.ones(1, 2, 4, 4, dtype=torch.complex64)}, TypeError, "x is torch.complex64"),
            ({"x": torch.ones(1, 2, 4, 4).double()}, TypeError, "x is torch.float64 and weight is torch.float32"),
            ({"x": torch.ones(1, 2, 4, 4, device="meta")}, TypeError, "x is on meta and weight on cpu"),
            ({"x": torch.ones(2, 4)}, ValueError, r"x has shape \[2, 4\]"),
            ({"x": torch.ones(1, 3, 4, 4)}, ValueError, "x has 3 channels; weight .* with groups=1 takes 2"),
            ({"stride": 1.5}, ValueError, "stride=1.5 must be an integer of at least 1, or a pair of them"),
            ({"stride": (1, 2.0)}, ValueError, r"stride=\(1, 2.0\) must be an integer"),
            ({"stride": True}, ValueError, "stride=True must be an integer"),
            ({"padding": None}, ValueError, "padding=None must be an integer of at least 0, or a pair of them"),
            ({"padding": 0.5}, ValueError, "padding=0.5 must be an integer of at least 0"),
            ({"dilation": 1.0}, ValueError, "dilation=1.0 must be an integer of at least 1"),
            ({"groups": 1.0}, ValueError, "groups=1.0 must be a positive integer"),
            ({"groups": 3}, ValueError, "groups=3 takes 6, and groups must divide the 2 outputs"),
            ({"bias": torch.ones(2).double()}, TypeError, r"bias is torch\.float64 and x is torch\.float32"),
            ({"bias": torch.ones(2).int()}, TypeError, r"bias is torch\.int32; filtered_conv2d takes floating"),
            ({"bias": torch.ones(2, device="meta")}, TypeError, "bias is on meta; expected cpu, as x"),
            ({"bias": torch.ones(3)}, ValueError, r"bias has shape \[3\]; expected \[2\]"),
            ({"stride": 0}, ValueError, "stride=0 must be an integer of at least 1"),
            ({"padding": -1}, ValueError, "padding=-1 must be an integer of at least 0"),
            ({"padding": "full"}, ValueError, "padding='full'"),
            ({"padding": "same", "stride": 2}, ValueError, "or 'same' with stride 1"),
            ({"dilation": (1, 2, 3)}, ValueError, r"dilation=\(1, 2, 3\)"),
            ({"dilation": 3}, RuntimeError, "the kernel spans 7 pixels of height; the padded input has 4"),
            ({"border": "valid"}, ValueError, "border='valid' must be 'plain' or 'covered'"),
            ({"backend": "cuda"}, ValueError, "backend='cuda' is not a backend"),
        ],
    )
    def test_errors(self, change, error, message):
        arguments = {"x": torch.ones(1, 2, 4, 4), "weight": torch.ones(2, 2, 3, 3)} | change
        with pytest.raises(error, match=message):
            filtered_conv2d(**arguments)


@pytest.mark.parametrize("name", CONFIGS)
class TestPieces:
    def test_patch_mean(self, name):
        _, _, outputs, size, _, options = CONFIGS[name]
        radius = options.get("radius", 2)
        rows, columns = (radius, radius) if isinstance(radius, int) else radius
        grad = torch.randn(2, outputs, *size).double()
        axes = (Axis(size[0], 1, 1, 0, 1, rows), Axis(size[1], 1, 1, 0, 1, columns))
        torch.testing.assert_close(patch_mean(grad, radius), reference.patch_mean(grad, axes))

    def test_saved_input(self, name):
        (x, weight, _), options = make(name, torch.float64)
        radius, groups = options.pop("radius", 2), options.pop("groups", 1)
        pair = (radius, radius) if isinstance(radius, int) else radius
        assert groups
        axes = tuple(
            Axis(size, weight.shape[-1], options.get("stride", 1), options.get("padding", 0),
                 options.get("dilation", 1), side)
            for size, side in zip(x.shape[2:], pair, strict=True)
        )  # fmt: skip
        ours = saved_input(x, weight.shape[-1], radius=radius, **options)
        torch.testing.assert_close(ours, reference.saved_input(x, axes))

    def test_kernel_sum(self, name):
        (_, weight, _), _ = make(name, torch.float64)
        torch.testing.assert_close(kernel_sum(weight), weight.sum((2, 3)))


@pytest.mark.parametrize("take", [lambda x: patch_mean(x, 2), lambda x: saved_input(x, 1), kernel_sum])
def test_errors_of_pieces(take):
    with pytest.raises(ValueError, match=r"has shape \[.*\]; .* takes \["):
        take(torch.ones(2, 4, 4))
    with pytest.raises(TypeError, match=r"is torch.int64; .* takes floating-point tensors"):
        take(torch.ones(1, 2, 4, 4).long())


def test_module_copies():
    """A module that calls the op can be copied and pickled with its cached constants."""

    class Layer(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return filtered_conv2d(x, self.weight, self.bias, padding=1)

    layer = Layer(2, 3, 3)
    x = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))
