from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from visionkernels.ops.siren_mlp import integer_siren_mlp, siren_mlp
from visionkernels.testing.ops import BACKENDS, DEVICE, check_backend, check_compiled, gradients, over_backends

CASES = {
    # points, (nodes, inputs, outputs) of each layer, parents of some layers
    "one-layer": (5, [(1, 3, 1)], {}),
    "one-point": (1, [(1, 3, 11), (2, 11, 5)], {}),
    "two-nodes": (17, [(1, 3, 11), (2, 11, 5)], {}),
    "tree": (40, [(1, 3, 36), (1, 36, 28), (4, 28, 20), (4, 20, 14), (4, 14, 1)], {}),
    "three-levels": (19, [(1, 2, 7), (3, 7, 8), (6, 8, 5), (6, 5, 2)], {2: [2, 0, 2, 0, 0, 2]}),
    "reordered": (17, [(3, 2, 5), (3, 5, 4), (3, 4, 1)], {1: [2, 0, 1]}),
    "narrowing": (17, [(4, 1, 5), (2, 5, 4), (1, 4, 3), (2, 3, 1)], {1: [3, 1], 2: [1]}),
    "first-parents": (13, [(3, 4, 6), (3, 6, 1)], {0: [0, 0, 0]}),
    "widest": (33, [(2, 64, 64), (2, 64, 61)], {}),
    "deep": (31, [(2, 3, 16), *[(2, 16, 16)] * 8, (2, 16, 1)], {}),
}


def make(case, dtype=torch.float32):
    points, shapes, named = CASES[case]
    coordinates = 2 * torch.rand(points, shapes[0][1]) - 1
    weights = [2 * torch.randn(nodes, inputs + 1, outputs) / inputs**0.5 for nodes, inputs, outputs in shapes]
    return [each.to(DEVICE, dtype) for each in (coordinates, *weights)], parents_of(shapes, named)


def parents_of(shapes, named):
    return [torch.tensor(named[layer]) if layer in named else None for layer in range(len(shapes))]


def run(*inputs, parents=None, backend="auto"):
    return siren_mlp(inputs[0], inputs[1:], parents, backend=backend)


class TestSirenMlp:
    @over_backends(CASES, half=["one-point", "reordered"])
    def test_reference(self, backend, case, dtype):
        inputs, parents = make(case, dtype)
        ours = partial(run, parents=parents, backend=backend)
        check_backend(ours, partial(run, parents=parents, backend="reference"), inputs)

    def test_composes_the_path_of_each_leaf(self):
        """Written out for one leaf, without the tree."""
        (x, *weights), parents = make("three-levels", torch.float64)
        out = siren_mlp(x, weights, parents)
        hidden = x
        for weight, node in zip(weights, (0, 2, 5, 5), strict=True):
            phase = hidden @ weight[node, :-1] + weight[node, -1]
            hidden = phase.sin()
        torch.testing.assert_close(out[5], phase)

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_no_points(self, backend):
        (x, *weights), parents = make("three-levels")
        leaves = [each.requires_grad_() for each in (x[:0].detach(), *weights)]
        out = run(*leaves, parents=parents, backend=backend)
        assert out.shape == (6, 0, 2)
        grads = torch.autograd.grad(out.sum(), leaves)
        assert grads[0].shape == (0, 2) and not any(each.any() for each in grads)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_strides(self, backend):
        """Coordinates by columns and every other row, weights as views of one buffer, transposed and expanded grads."""
        (x, *weights), parents = make("two-nodes")
        function = partial(run, parents=parents, backend=backend)
        expected = gradients(function, [x, *weights])
        flat = torch.cat([each.flatten() for each in weights])
        views = [
            part.view_as(each) for part, each in zip(flat.split([w.numel() for w in weights]), weights, strict=True)
        ]
        columns = x.mT.contiguous().mT
        every_other = torch.stack([x, x.neg()], 1).flatten(0, 1)[::2]
        for points in (columns, every_other):
            torch.testing.assert_close(gradients(function, [points, *views]), expected)
        transposed = [each.mT.contiguous().mT for each in weights]
        torch.testing.assert_close(gradients(function, [x, *transposed]), expected)
        one = torch.ones(1, 1, 1, device=DEVICE).expand(2, 17, 5)
        torch.testing.assert_close(gradients(function, [x, *weights], one), expected)
        grad = torch.randn(5, 2, 17, device=DEVICE).permute(1, 2, 0)
        expected = gradients(function, [x, *weights], grad.contiguous())
        torch.testing.assert_close(gradients(function, [x, *weights], grad), expected)

    def test_many_points_in_passes(self):
        """Eager cuts points into passes; values and gradients are those of all at once."""
        x = torch.rand(700, 2, dtype=torch.float64)
        weights = [torch.randn(*shape, dtype=torch.float64) for shape in ((1, 3, 6), (64, 7, 3), (64, 4, 1))]
        check_backend(partial(run, backend="eager"), partial(run, backend="reference"), [x, *weights])
        with torch.no_grad():
            torch.testing.assert_close(run(x, *weights), run(x, *weights, backend="reference"))

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_frozen(self, backend):
        """Coordinates without a gradient, and a frozen layer among trained ones."""
        (x, *weights), parents = make("reordered")
        expected = gradients(partial(run, parents=parents, backend="reference"), [x, *weights])
        for frozen in range(3):
            leaves = [each.detach().requires_grad_(layer != frozen) for layer, each in enumerate(weights)]
            run(x, *leaves, parents=parents, backend=backend).sum().backward()
            assert x.grad is None and leaves[frozen].grad is None
            for layer, leaf in enumerate(leaves):
                if layer != frozen:
                    torch.testing.assert_close(leaf.grad, expected[layer + 1], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_no_grad(self, backend):
        (x, *weights), parents = make("tree")
        expected = run(x, *[each.requires_grad_() for each in weights], parents=parents, backend=backend).detach()
        before = [x.clone(), *(each.clone() for each in weights)]
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(run(x, *weights, parents=parents, backend=backend), expected)
        for each, copy in zip((x, *weights), before, strict=True):
            assert torch.equal(each, copy)

    def test_triton_is_deterministic(self):
        inputs, parents = make("reordered")
        function = partial(run, parents=parents, backend="triton")
        for first, second in zip(gradients(function, inputs), gradients(function, inputs), strict=True):
            assert torch.equal(first, second)

    def test_triton_keeps_coordinates_weights_and_few_phases(self):
        """Of a tree whose leaves are one run, no activation of a leaf is saved."""
        (x, *weights), parents = make("tree")
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
            run(x, *[each.requires_grad_() for each in weights], parents=parents, backend="triton")
        phases = [shape for shape in saved if len(shape) == 3 and shape[1] == 40]
        assert sorted(phases) == [(1, 40, 3), (1, 40, 28), (1, 40, 36)]

    def test_triton_sine_of_large_phases(self):
        """Through layers that multiply by one, out = sin(x): float32 accurate up to 50000."""
        x = torch.cat([torch.linspace(-50000, 50000, 643), torch.arange(-64, 65) * (torch.pi / 2)]).to(DEVICE)[:, None]
        one = torch.tensor([[[1.0], [0.0]]], device=DEVICE)
        out = run(x.requires_grad_(), one, one, backend="triton")
        torch.testing.assert_close(out[0].double(), x.double().sin(), rtol=0, atol=2e-7)
        (slope,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(slope.double(), x.double().cos(), rtol=0, atol=2e-7)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_nan_stays_at_its_point_and_node(self, backend):
        (x, *weights), parents = make("tree")
        x[7, 1] = torch.nan
        out = run(x, *weights, parents=parents, backend=backend)
        assert out[:, 7].isnan().all() and out.isnan().sum() == 4
        weights[2][1, 0, 0] = torch.inf
        out = run(x, *weights, parents=parents, backend=backend)
        assert not out[1].isfinite().any() and out[[0, 2, 3]].isnan().sum() == 3

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_autocast(self, backend):
        """Phases stay float32."""
        inputs, parents = make("tree")
        expected = run(*inputs, parents=parents, backend=backend)
        with torch.autocast(DEVICE, torch.bfloat16):
            torch.testing.assert_close(run(*inputs, parents=parents, backend=backend), expected)

    @pytest.mark.parametrize("backend", ["reference", "eager"])
    @pytest.mark.parametrize("case", ["three-levels", "reordered", "narrowing"])
    def test_gradcheck(self, case, backend):
        inputs, parents = make(case, torch.float64)
        function = partial(run, parents=parents, backend=backend)
        assert torch.autograd.gradcheck(function, [each.requires_grad_() for each in inputs], fast_mode=True)

    def test_second_derivative(self):
        """Eager has one; Triton's raises."""
        inputs, parents = make("three-levels", torch.float64)
        function = partial(run, parents=parents, backend="eager")
        assert torch.autograd.gradgradcheck(function, [each.requires_grad_() for each in inputs], fast_mode=True)
        leaves = [each.detach().float().requires_grad_() for each in inputs]
        out = run(*leaves, parents=parents, backend="triton")
        with pytest.raises(RuntimeError):
            torch.autograd.grad(torch.autograd.grad(out.sum(), leaves[0], create_graph=True)[0].sum(), leaves[0])

    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def test_properties(self, data):
        """Any tree: eager is the reference; nodes, points and units can be permuted; leaves are independent."""
        (x, weights, parents) = draw_tree(data)
        check_backend(
            partial(run, parents=parents, backend="eager"), partial(run, parents=parents, backend="reference"),
            [x, *weights],
        )  # fmt: skip
        out = siren_mlp(x, weights, parents)
        order = torch.randperm(len(x))
        torch.testing.assert_close(siren_mlp(x[order], weights, parents), out[:, order])
        leaves = torch.randperm(len(out))
        last = parents[-1]
        if last is None:
            last = torch.arange(len(out)) if len(weights) > 1 and len(weights[-2]) > 1 else torch.zeros_like(leaves)
        permuted = [*parents[:-1], last[leaves]]
        torch.testing.assert_close(siren_mlp(x, [*weights[:-1], weights[-1][leaves]], permuted), out[leaves])
        if len(weights) > 1:
            units = torch.randperm(weights[0].shape[2])
            rows = torch.cat([units, torch.tensor([len(units)])])
            shuffled = [weights[0][:, :, units], weights[1][:, rows], *weights[2:]]
            torch.testing.assert_close(siren_mlp(x, shuffled, parents), out)

    @settings(max_examples=8, deadline=None)
    @given(st.data())
    def test_triton_properties(self, data):
        x, weights, parents = draw_tree(data)
        inputs = [each.float().to(DEVICE) for each in (x, *weights)]
        check_backend(
            partial(run, parents=parents, backend="triton"), partial(run, parents=parents, backend="reference"), inputs
        )

    @pytest.mark.parametrize("case", ["tree", "reordered"])
    def test_compile_export(self, case):
        inputs, parents = make(case)
        check_compiled(partial(run, parents=parents), inputs)

    def test_export_of_any_number_of_points(self):
        class Tree(nn.Module):
            def __init__(self, weights: list[Tensor]) -> None:
                super().__init__()
                self.weights = nn.ParameterList(weights)

            def forward(self, x: Tensor) -> Tensor:
                return siren_mlp(x, list(self.weights), parents)

        (x, *weights), parents = make("tree")
        points = torch.export.Dim("points", min=2)
        exported = torch.export.export(Tree(weights), (x,), dynamic_shapes={"x": {0: points}})
        for chosen in (x, x[:9]):
            torch.testing.assert_close(exported.module()(chosen), siren_mlp(chosen, weights, parents))

    # opcheck itself reads .grad of tensors that are no leaves
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    def test_opcheck(self):
        from visionkernels.ops.siren_mlp.triton import _backward_op, _forward_op

        x, packed = torch.randn(2, 5, 3, device=DEVICE), torch.randn(3, 4 * 5 + 6 * 2, device=DEVICE)
        sources = torch.tensor([1, 0, 1], device=DEVICE)
        for is_phase in (False, True):
            arguments = (sources, [3, 5, 2], is_phase)
            torch.library.opcheck(_forward_op, (x.requires_grad_(), packed.requires_grad_(), *arguments))
            for needs_x in (False, True):
                grad = torch.randn(3, 5, 2, device=DEVICE)
                torch.library.opcheck(_backward_op, (grad, x.detach(), packed.detach(), *arguments, needs_x))

    def test_flops(self):
        """The kernels count what the products of eager count, and backward the recomputed phases too."""
        (x, *weights), parents = make("tree")
        counts = {}
        for backend in BACKENDS:
            leaves = [each.detach().requires_grad_() for each in weights]
            with FlopCounterMode(display=False) as forward:
                out = run(x, *leaves, parents=parents, backend=backend)
            with FlopCounterMode(display=False) as backward:
                out.sum().backward()
            counts[backend] = forward.get_total_flops(), backward.get_total_flops()
        assert counts["eager"][0] == counts["triton"][0] > 0
        # of the leaves' run alone, since the trunk's layers are runs of one
        assert counts["triton"][1] - counts["eager"][1] == 2 * 4 * 40 * (28 * 20 + 20 * 14)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"coordinates": torch.ones(5, 3).long()}, TypeError, "coordinates is torch.int64; siren_mlp takes"),
            ({"coordinates": torch.ones(5, 3).cfloat()}, TypeError, "coordinates is torch.complex64"),
            ({"coordinates": torch.ones(3)}, ValueError, r"coordinates has shape \[3\]; expected \[points, axes"),
            ({"coordinates": torch.ones(5, 0)}, ValueError, r"coordinates has shape \[5, 0\]"),
            ({"coordinates": torch.ones(5, 2)}, ValueError, r"weights\[0\] has shape \[1, 4, 6\]; .* 3, outputs >= 1"),
            ({"coordinates": torch.ones(5, 3).double()}, TypeError, r"weights\[0\] is torch.float32 on cpu; .*float64"),
            ({"coordinates": torch.ones(5, 3, device="meta")}, TypeError, r"weights\[0\] is .* on cpu; .* on meta"),
            ({"weights": []}, ValueError, "weights is empty"),
            ({"weights": [torch.ones(4, 6)]}, ValueError, r"weights\[0\] has shape \[4, 6\]"),
            ({"weights": [torch.ones(0, 4, 6)], "parents": None}, ValueError, r"weights\[0\] has shape \[0, 4, 6\]"),
            ({"weights": [torch.ones(1, 4, 0)], "parents": None}, ValueError, r"weights\[0\] has shape \[1, 4, 0\]"),
            ({"weights": [torch.ones(2, 4, 6), torch.ones(3, 7, 1)]}, ValueError,
             r"weights\[1\] has 3 nodes and weights\[0\] 2; name in parents\[1\]"),
            ({"parents": [None]}, ValueError, "parents has 1 entries; weights has 2 layers"),
            ({"parents": [None, torch.zeros(3).int()]}, TypeError, r"parents\[1\] is torch.int32; expected int64"),
            ({"parents": [None, torch.zeros(2).long()]}, ValueError, r"parents\[1\] has shape \[2\]; expected \[3\]"),
            ({"parents": [None, torch.tensor([0, 1, 0])]}, ValueError, r"parents\[1\] spans \[0, 1\]; .* \[0, 0\]"),
            ({"parents": [torch.tensor([-1]), None]}, ValueError, r"parents\[0\] spans \[-1, -1\]"),
            ({"backend": "cuda"}, ValueError, "backend='cuda' is not a backend"),
        ],
    )  # fmt: skip
    def test_errors(self, change, error, message):
        arguments = {"coordinates": torch.ones(5, 3), "weights": [torch.ones(1, 4, 6), torch.ones(3, 7, 1)]} | change
        with pytest.raises(error, match=message):
            siren_mlp(**arguments)

    def test_limits_of_the_kernels(self):
        x, weights = torch.ones(2, 3, device=DEVICE), torch.ones(1, 4, 65, device=DEVICE)
        with pytest.raises(RuntimeError, match="layer of 65 inputs or outputs exceeds the kernels' 64"):
            siren_mlp(x, [weights], backend="triton")
        assert siren_mlp(x, [weights]).shape == (1, 2, 65)
        with pytest.raises(RuntimeError, match="not float64"):
            siren_mlp(x.double(), [weights[:, :, :64].double()], backend="triton")


def draw_tree(data):
    """Return coordinates, weights and parents, in float64 on the CPU."""
    width = data.draw(st.integers(1, 4), "axes")
    x = torch.randn(data.draw(st.integers(1, 40), "points"), width, dtype=torch.float64)
    weights, parents, sources = [], [], 1
    for _ in range(data.draw(st.integers(1, 5), "layers")):
        taken, nodes = None, sources
        if data.draw(st.booleans(), "branches"):
            nodes = data.draw(st.integers(1, 6), "nodes")
            taken = torch.randint(sources, (nodes,)) if sources > 1 or data.draw(st.booleans()) else None
        outputs = data.draw(st.integers(1, 20), "width")
        weights.append(torch.randn(nodes, width + 1, outputs, dtype=torch.float64) / width**0.5)
        parents.append(taken)
        sources, width = nodes, outputs
    return x, weights, parents


SINE = torch.round(1024 * torch.sin(torch.arange(4096, dtype=torch.float64) * (2 * torch.pi / 4096))).float()
INTEGER_CASES = {
    # inputs [N, P, K], (nodes, inputs, outputs) of each layer, parents, size of weights
    "leaf": ((1, 40, 28), [(4, 28, 20), (4, 20, 14), (4, 14, 1)], {}, 40),
    "trunk-and-leaves": ((1, 50, 36), [(1, 36, 28), (4, 28, 9), (4, 9, 2)], {}, 100),
    "large-weights": ((2, 19, 64), [(2, 64, 30), (3, 30, 7)], {1: [1, 1, 0]}, 4095),
    "own-inputs": ((3, 1, 5), [(3, 5, 4)], {}, 7),
    "chosen-inputs": ((3, 13, 5), [(2, 5, 4), (3, 4, 3)], {0: [2, 0], 1: [1, 0, 1]}, 7),
}


def make_integers(case):
    """Return the arguments but the table: phases of any size, and weights of one."""
    shape, layers, named, size = INTEGER_CASES[case]
    inputs = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=DEVICE)
    weights = [torch.randint(-size, size + 1, (n, k + 1, m)).float().to(DEVICE) for n, k, m in layers]
    multipliers, shifts = [97, 3, 127][: len(layers)], [11, 0, 20][: len(layers)]
    return inputs, weights, multipliers, shifts, parents_of(layers, named)


class TestIntegerSirenMlp:
    @pytest.mark.parametrize("case", INTEGER_CASES)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_reference(self, backend, case):
        arguments = make_integers(case)
        function = partial(integer_siren_mlp, *arguments, table=SINE.to(DEVICE))
        out = function(backend=backend)
        assert out.dtype == torch.int64 and not out.requires_grad
        assert torch.equal(out, function(backend="reference"))

    def test_definition(self):
        """One number by hand: a sine of a quarter turn, two weights and a bias, rounded half up."""
        inputs = torch.tensor([[[1024, 1024 - 3 * 4096]]], dtype=torch.int32)
        weights = torch.tensor([[[3.0], [-5.0], [-1.0]]])
        out = integer_siren_mlp(inputs, [weights], [5], [11], table=SINE)
        # (3 - 5 - 1) * 1024 * 5 / 2048 = -7.5
        assert out.tolist() == [[[-7]]]

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    @pytest.mark.parametrize("size", [255, 256, 257, 4095], ids=str)
    def test_exact_where_float32_is_not(self, size, backend):
        """All products of one sign and odd sums, on both sides of 2**24."""
        table = torch.full((4096,), 1023.0, device=DEVICE)
        weights = torch.full((1, 65, 3), float(size), device=DEVICE)
        weights[:, -1] = 0
        weights[:, 0, 1] -= 1
        inputs = torch.zeros(1, 2, 64, dtype=torch.int32, device=DEVICE)
        out = integer_siren_mlp(inputs, [weights], [127], [0], table=table, backend=backend)
        expected = [(64 * size - column) * 1023 * 127 for column in (0, 1, 0)]
        assert out.tolist() == [[expected, expected]]

    @pytest.mark.parametrize("bits", [1, 4, 12, 23])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_bits(self, backend, bits):
        inputs, weights, *rest = make_integers("own-inputs")
        table = torch.round(SINE / 1024 * 2**bits).to(DEVICE)
        function = partial(integer_siren_mlp, inputs, weights, *rest, table=table, bits=bits)
        if backend == "triton" and bits == 23:
            weights[0][0, 0, 0] = 999
            with pytest.raises(RuntimeError, match="exceed what two float32 products hold"):
                function(backend=backend)
            assert torch.equal(function(), function(backend="reference"))
            return
        assert torch.equal(function(backend=backend), function(backend="reference"))

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_shapes(self, backend):
        """No points, and strided phases, weights and table; the caller's phases are left alone."""
        inputs, weights, *rest = make_integers("leaf")
        table = SINE.to(DEVICE)
        empty = integer_siren_mlp(inputs[:, :0], weights, *rest, table=table, backend=backend)
        assert empty.shape == (4, 0, 1) and empty.dtype == torch.int64
        expected = integer_siren_mlp(inputs, weights, *rest, table=table, backend=backend)
        strided = inputs.mT.contiguous().mT
        before = strided.clone()
        out = integer_siren_mlp(
            strided, [each.mT.contiguous().mT.requires_grad_() for each in weights], *rest,
            table=torch.stack([table, table], 1)[:, 0], backend=backend,
        )  # fmt: skip
        assert torch.equal(out, expected) and torch.equal(strided, before)

    def test_many_points_in_passes(self):
        inputs, weights, *rest = make_integers("leaf")
        inputs = inputs.repeat(1, 110, 1)
        out = integer_siren_mlp(inputs, weights, *rest, table=SINE.to(DEVICE), backend="eager")
        assert out.shape[1] > 16384 // 4
        assert torch.equal(out[:, :40], out[:, -40:])

    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def test_properties(self, data):
        """Any tree and scale: eager is the reference; points can be permuted; full turns change nothing."""
        _, weights, parents = draw_tree(data)
        size = data.draw(st.sampled_from([1, 50, 4095, 2**20]), "size")
        weights = [torch.round(size * each.clamp(-1, 1)).float() for each in weights]
        multipliers = [data.draw(st.integers(1, 127)) for _ in weights]
        shifts = [data.draw(st.integers(0, 40)) for _ in weights]
        inputs = torch.randint(-(2**30), 2**30, (1, 9, weights[0].shape[1] - 1), dtype=torch.int32)
        function = partial(
            integer_siren_mlp, weights=weights, multipliers=multipliers, shifts=shifts, parents=parents, table=SINE
        )
        out = function(inputs)
        assert torch.equal(out, function(inputs, backend="reference"))
        order = torch.randperm(9)
        assert torch.equal(function(inputs[:, order]), out[:, order])
        assert torch.equal(function(inputs + 4096 * torch.randint_like(inputs, -9, 9)), out)

    def test_is_the_float_network(self):
        """With small steps, the integers are the sine network of the weights they stand for."""
        (x, *weights), parents = make("tree", torch.float64)
        x, weights = x.cpu(), [each.cpu() for each in weights]
        steps = 2.0**-9
        integers = [torch.round(each / steps) for each in weights]
        exact = siren_mlp(x, [each * steps for each in integers], parents)
        first = torch.round((x @ integers[0][0, :-1] + integers[0][0, -1]) * steps * 4096 / (2 * np.pi))
        # a step of a weight times 2**-10 of a sine, in phases of 2**-12 turns; for the last layer in 2**-12
        multipliers = [round(steps / 1024 * 4096 / (2 * np.pi) * 2**20)] * 3 + [round(steps * 4 * 2**20)]
        out = integer_siren_mlp(
            first.to(torch.int32)[None], [each.float() for each in integers[1:]], multipliers, [20] * 4, table=SINE
        )
        difference = out / 4096 - exact
        assert difference.abs().max() < 0.03 and difference.square().mean().sqrt() < 0.008

    def test_compile(self):
        """Without a look at the weights: float64 and int64, the same integers."""
        inputs, weights, *rest = make_integers("leaf")
        function = partial(integer_siren_mlp, multipliers=rest[0], shifts=rest[1], table=SINE.to(DEVICE))
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(inputs, weights), function(inputs, weights))

    def test_opcheck(self):
        from visionkernels.ops.siren_mlp.triton import _integer_op

        inputs = torch.randint(-9999, 9999, (2, 5, 3), dtype=torch.int32, device=DEVICE)
        packed = torch.randint(-99, 99, (3, 4 * 5 + 6 * 2), device=DEVICE).float()
        sources = torch.tensor([1, 0, 1], device=DEVICE)
        scales = torch.tensor([[3, 2], [9, 11]], device=DEVICE)
        for is_last in (False, True):
            arguments = (inputs, packed, scales, SINE.to(DEVICE), sources, [3, 5, 2], [0, 2], 10, is_last)
            torch.library.opcheck(_integer_op, arguments)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"inputs": torch.zeros(1, 5, 3)}, TypeError, "inputs is torch.float32; integer_siren_mlp takes int32"),
            ({"inputs": torch.zeros(5, 3).int()}, ValueError, r"inputs has shape \[5, 3\]; expected \[nodes >= 1"),
            ({"inputs": torch.zeros(0, 5, 3).int()}, ValueError, r"inputs has shape \[0, 5, 3\]"),
            ({"inputs": torch.zeros(1, 5, 2).int()}, ValueError, r"weights\[0\] has shape \[2, 4, 1\]; .* 3, outputs"),
            ({"inputs": torch.zeros(3, 5, 3).int()}, ValueError, r"weights\[0\] has 2 nodes and inputs 3; name in par"),
            ({"weights": [torch.ones(2, 4, 1).double()]}, TypeError, r"weights\[0\] is torch.float64"),
            ({"weights": [torch.full((2, 4, 1), 0.25)]}, ValueError, r"weights\[0\] holds a number that is 0.25 off"),
            ({"weights": [torch.full((2, 4, 1), torch.inf)]}, ValueError, r"weights\[0\] holds a number that is nan"),
            (
                {"weights": [torch.full((2, 4, 1), 2.0**42)]},
                ValueError,
                r"sum up to 1.75922e\+13 in a column; with bit",
            ),
            ({"weights": [torch.full((2, 4, 1), 2.0**34)], "multipliers": [2**20]}, ValueError, "exceeds 2..63"),
            ({"multipliers": []}, ValueError, r"multipliers=\[\] must be 1 integers in \[1, 2147483647\]"),
            ({"multipliers": [0]}, ValueError, r"multipliers=\[0\]"),
            ({"multipliers": [1.5]}, ValueError, r"multipliers=\[1.5\]"),
            ({"shifts": [63]}, ValueError, r"shifts=\[63\] must be 1 integers in \[0, 62\]"),
            ({"parents": [torch.tensor([0, 1])]}, ValueError, r"parents\[0\] spans \[0, 1\]; allowed is \[0, 0\]"),
            ({"table": SINE.double()}, TypeError, "table is torch.float64 on cpu; expected torch.float32 on cpu"),
            ({"table": SINE[:99]}, ValueError, r"table has shape \[99\]; expected \[4096\]"),
            ({"table": SINE * 2}, ValueError, "table reaches 2048; with bits=10, allowed is 1024"),
            ({"table": SINE + 0.25}, ValueError, "table holds a number that is 0.25 off an integer"),
            ({"bits": 0}, ValueError, r"bits=0 must be in \[1, 23\]"),
            ({"bits": 24}, ValueError, "bits=24"),
            ({"backend": "cuda"}, ValueError, "backend='cuda' is not a backend"),
        ],
    )
    def test_errors(self, change, error, message):
        arguments = {
            "inputs": torch.zeros(1, 5, 3, dtype=torch.int32), "weights": [torch.ones(2, 4, 1)], "multipliers": [1],
            "shifts": [0], "table": SINE,
        } | change  # fmt: skip
        with pytest.raises(error, match=message):
            integer_siren_mlp(**arguments)

    def test_limits_of_the_kernels(self):
        inputs, weights = torch.zeros(1, 2, 65, dtype=torch.int32, device=DEVICE), torch.ones(1, 66, 1, device=DEVICE)
        with pytest.raises(RuntimeError, match="layer of 65 inputs or outputs exceeds the kernels' 64"):
            integer_siren_mlp(inputs, [weights], [1], [0], table=SINE.to(DEVICE), backend="triton")
