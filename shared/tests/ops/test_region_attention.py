from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from visionkernels.ops import use_backend
from visionkernels.ops.region_attention import (
    eager,
    region_attention,
    region_attention_packed,
    region_attention_weights,
)
from visionkernels.testing.ops import BACKENDS, DEVICE, check_backend, check_compiled, gradients, over_backends

# Triton 3.8's interpreter multiplies the bits of bfloat16
HALF_DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]


def make(
    batch=2, size=(6, 8), key_size=None, grid=(3, 2), key_grid=None, heads=2, dims=(8, 8), topk=3, dtype=torch.float32
):
    """Return query, key, value and index, and the options that describe them."""
    key_size, key_grid = key_size or size, key_grid or grid
    query = torch.randn(batch, *size, heads * dims[0], dtype=dtype)
    key = torch.randn(batch, *key_size, heads * dims[0], dtype=dtype)
    value = torch.randn(batch, *key_size, heads * dims[1], dtype=dtype)
    regions, key_regions = grid[0] * grid[1], key_grid[0] * key_grid[1]
    index = torch.rand(batch, regions, key_regions).topk(topk, -1).indices
    options = {"num_heads": heads, "query_grid": grid, "key_grid": key_grid}
    return [x.to(DEVICE) for x in (query, key, value)], index.to(DEVICE), options


CASES = {
    "plain": {},
    "prime-regions": {"size": (5, 15), "grid": (5, 3), "topk": 3, "batch": 1, "heads": 1},
    "one-token": {"size": (2, 3), "grid": (2, 3), "topk": 4, "batch": 1},
    "one-region": {"grid": (1, 1), "topk": 1},
    "all-regions": {"topk": 6, "batch": 1},
    "other-key-map": {"key_size": (4, 9), "key_grid": (2, 3), "topk": 4, "dims": (12, 20), "heads": 1},
    "many-tokens": {"size": (10, 14), "grid": (2, 2), "topk": 2, "batch": 1, "heads": 1, "dims": (16, 16)},
    "sparse": {"size": (8, 8), "grid": (4, 4), "topk": 2, "batch": 1, "heads": 1},
}


class TestRegionAttention:
    @over_backends(CASES, half=["plain", "many-tokens"], half_dtypes=HALF_DTYPES)
    def test_reference(self, backend, case, dtype):
        inputs, index, options = make(**CASES[case], dtype=dtype)
        run = partial(region_attention, region_index=index, **options)
        check_backend(partial(run, backend=backend), partial(run, backend="reference"), inputs)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_valid_size(self, backend):
        """Invalid keys get no weight, and a query whose whole choice of regions is invalid gets zeros."""
        inputs, index, options = make(size=(6, 9), grid=(3, 3), topk=2, batch=1, heads=1)
        index[0, 0] = torch.tensor([6, 8])
        run = partial(region_attention, region_index=index, valid_size=(4, 7), **options)
        check_backend(partial(run, backend=backend), partial(run, backend="reference"), inputs)
        assert not run(*inputs, backend=backend)[0, :2, :3].any()

    def test_slot_weight(self):
        inputs, index, options = make(dtype=torch.float64)
        weight = torch.rand(index.shape, dtype=torch.float64, device=DEVICE)

        def run(*inputs: Tensor, backend: str) -> Tensor:
            return region_attention(*inputs[:3], index, slot_weight=inputs[3], backend=backend, **options)

        check_backend(partial(run, backend="eager"), partial(run, backend="reference"), [*inputs, weight])

    @pytest.mark.parametrize("case", ["plain", "sparse"])
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    @pytest.mark.parametrize("poisoned", range(3))
    def test_nonfinite(self, poisoned, bad, case):
        """A value that is not finite reaches the outputs and gradients that it reaches by the definition."""
        inputs, index, options = make(**CASES[case])
        inputs[poisoned][0, 0, 0, 0] = bad
        run = partial(region_attention, region_index=index, **options)
        runs = [partial(run, backend=backend) for backend in ("eager", "reference")]
        results = [[run(*inputs), *gradients(run, inputs)] for run in runs]
        assert any(not x.isfinite().all() for x in results[1])
        for ours, reference in zip(*results, strict=True):
            assert torch.equal(ours.isfinite(), reference.isfinite())

    @pytest.mark.parametrize("case", ["plain", "other-key-map", "sparse"])
    def test_kept_weights(self, monkeypatch, case):
        """Weights that are kept for backward, and weights that are computed again, give the same bits."""
        monkeypatch.setattr(eager, "_prefers_dense", lambda *_: False)
        inputs, index, options = make(**CASES[case])
        run = partial(region_attention, region_index=index, backend="eager", **options)
        kept = gradients(run, inputs)
        monkeypatch.setattr(eager, "_room_for_weights", lambda *_: None)
        assert all(torch.equal(ours, again) for ours, again in zip(kept, gradients(run, inputs), strict=True))

    @pytest.mark.parametrize("elements", [1, 300, 1500, 1 << 20])
    def test_workspace(self, monkeypatch, elements):
        """Any size of chunk, down to one region, gives the same."""
        monkeypatch.setattr(eager, "WORKSPACE_ELEMENTS", elements)
        monkeypatch.setattr(eager, "_prefers_dense", lambda *_: False)
        inputs, index, options = make(size=(6, 15), grid=(3, 5))
        run = partial(region_attention, region_index=index, **options)
        check_backend(partial(run, backend="eager"), partial(run, backend="reference"), inputs)

    def test_dense(self, monkeypatch):
        monkeypatch.setattr(eager, "_prefers_dense", lambda *_: True)
        inputs, index, options = make(size=(6, 15), grid=(3, 5), key_size=(4, 6), key_grid=(2, 3))
        run = partial(region_attention, region_index=index, **options)
        check_backend(partial(run, backend="eager"), partial(run, backend="reference"), inputs)

    @pytest.mark.parametrize("form", ["dense", "chunked", "triton"])
    def test_repeated_region(self, monkeypatch, form):
        """A region named twice counts twice."""
        monkeypatch.setattr(eager, "_prefers_dense", lambda *_: form == "dense")
        inputs, index, options = make(topk=4, batch=1)
        index[:, ::2, 1:3] = index[:, ::2, :1]
        run = partial(region_attention, region_index=index, **options)
        backend = "triton" if form == "triton" else "eager"
        check_backend(partial(run, backend=backend), partial(run, backend="reference"), inputs)

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_shapes(self, backend, monkeypatch):
        monkeypatch.setattr(eager, "_prefers_dense", lambda *_: False)
        inputs, index, options = make(batch=0)
        leaves = [x.requires_grad_() for x in inputs]
        out = region_attention(*leaves, index, backend=backend, **options)
        assert out.shape == (0, 6, 8, 16)
        out.sum().backward()
        assert leaves[1].grad.shape == leaves[1].shape

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_strides(self, backend):
        """Slices of a wider map, and a channels-first map seen as channels-last."""
        inputs, index, options = make(batch=1)
        run = partial(region_attention, region_index=index, backend=backend, **options)
        expected = run(*inputs)
        wide = [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in inputs]
        torch.testing.assert_close(run(*wide), expected)
        channels_first = [x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for x in inputs]
        torch.testing.assert_close(run(*channels_first), expected)
        torch.testing.assert_close(run(*inputs, region_index=index.int()), expected)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_packed(self, backend):
        (query, key, value), index, options = make(dims=(8, 12), batch=1)
        options = {"num_heads": options["num_heads"], "grid": options["query_grid"]}
        run = partial(region_attention_packed, region_index=index, value_size=24, **options)
        check_backend(
            partial(run, backend=backend), partial(run, backend="reference"), [torch.cat([query, key, value], -1)]
        )

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_large_logits(self, backend):
        """Softmax is computed in float32: logits beyond the range of float16 stay finite."""
        (query, key, value), index, options = make(dtype=torch.float16, batch=1)
        out = region_attention(query * 200, key * 200, value, index, backend=backend, **options)
        assert out.isfinite().all()

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_nan(self, backend):
        """A NaN stays where attention carries it: in the query's own token."""
        (query, key, value), index, options = make(size=(2, 4), grid=(1, 2), topk=1)
        query[0, 0, 0, 0] = torch.nan
        out = region_attention(query, key, value, index, backend=backend, **options)
        assert out[0, 0, 0, :8].isnan().all()
        assert out[0, 0, 0, 8:].isfinite().all()
        assert out[1].isfinite().all()

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_deterministic(self, backend):
        inputs, index, options = make(batch=1, heads=1)
        function = partial(region_attention, region_index=index, backend=backend, **options)
        for first, second in zip(gradients(function, inputs), gradients(function, inputs), strict=True):
            assert torch.equal(first, second)

    def test_gradcheck(self, monkeypatch):
        inputs, index, options = make(
            batch=1, size=(4, 4), grid=(2, 2), heads=1, dims=(3, 2), topk=2, dtype=torch.float64
        )
        leaves = [x.requires_grad_() for x in inputs]
        for is_dense in (False, True):
            monkeypatch.setattr(eager, "_prefers_dense", lambda *_, is_dense=is_dense: is_dense)
            run = partial(region_attention, region_index=index, backend="eager", **options)
            torch.autograd.gradcheck(run, leaves, fast_mode=True)

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 10_000), grid=st.tuples(st.integers(1, 4), st.integers(1, 4)), data=st.data())
    def test_properties(self, seed, grid, data):
        """The order of a region's routes changes nothing; routes to all regions are dense attention."""
        torch.manual_seed(seed)
        regions = grid[0] * grid[1]
        topk = data.draw(st.integers(1, regions))
        size = (grid[0] * data.draw(st.integers(1, 3)), grid[1] * data.draw(st.integers(1, 3)))
        inputs, index, options = make(size=size, grid=grid, topk=topk, dtype=torch.float64)
        out = region_attention(*inputs, index, **options)
        torch.testing.assert_close(region_attention(*inputs, index.flip(-1), **options), out)
        everything = torch.arange(regions, device=DEVICE).expand(2, regions, regions)
        dense = [x.flatten(1, 2).unflatten(-1, (2, -1)).transpose(1, 2) for x in inputs]
        expected = scaled_dot_product_attention(*dense).transpose(1, 2).reshape(inputs[0].shape)
        torch.testing.assert_close(region_attention(*inputs, everything, **options), expected)

    def test_compile_export(self):
        inputs, index, options = make()
        check_compiled(partial(region_attention, **options), [*inputs, index])

    # opcheck itself reads .grad of tensors that are no leaves
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    def test_opcheck(self):
        from visionkernels.ops.region_attention.triton import _forward_op

        inputs, index, _ = make(batch=1, size=(2, 4), grid=(1, 2), topk=2, heads=2)
        leaves = [x.requires_grad_() for x in inputs]
        torch.library.opcheck(_forward_op, (*leaves, index.int(), [2, 1, 2, 1, 2, 2, 4], 0.5))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"num_heads": 3}, ValueError, "num_heads=3 does not divide the 16 channels"),
            ({"valid_size": (-1, 5)}, ValueError, r"valid_size=\(-1, 5\) must be rows in \[0, "),
            ({"valid_size": (1, 99)}, ValueError, r"valid_size=\(1, 99\) must be rows in \[0, "),
            ({"query_grid": (4, 2), "key_grid": (3, 2)}, ValueError, "query height 6 does not divide into 4 regions"),
            ({"query_grid": (3, 0)}, ValueError, "query width 8 does not divide into 0 regions"),
            ({"backend": "cuda"}, ValueError, "backend='cuda' is not a backend; use one of auto, triton, eager"),
            ({"slot_weight": torch.ones(1, 6, 3)}, ValueError, r"slot_weight has shape \[1, 6, 3\]"),
        ],
    )
    def test_option_errors(self, change, error, message):
        inputs, index, options = make()
        with pytest.raises(error, match=message):
            region_attention(*inputs, index, **(options | change))

    @pytest.mark.parametrize(
        ("position", "change", "error", "message"),
        [
            (0, lambda x: x.int(), TypeError, "query is torch.int32"),
            (0, lambda x: x[0], ValueError, r"query has shape \[6, 8, 16\]; expected \[batch, height"),
            (1, lambda x: x.double(), ValueError, "must agree in batch, channels and dtype"),
            (1, lambda x: x[:1], ValueError, "must agree in batch"),
            (2, lambda x: x[:, :3], ValueError, "value .* must have the batch, height, width and dtype of key"),
            (2, lambda x: x[..., :5], ValueError, "num_heads=2 does not divide the 5 channels of value"),
            (3, lambda x: x.float(), TypeError, "region_index is torch.float32; expected int64 or int32"),
            (3, lambda x: x[:, :5], ValueError, r"region_index has shape \[2, 5, 3\]; expected \[2, 6, topk >= 1\]"),
            (3, lambda x: x[..., :0], ValueError, "topk >= 1"),
            (3, lambda x: x + 1, ValueError, r"region_index spans \[1, 6\]; allowed is \[0, 5\]"),
            (3, lambda x: x - 1, ValueError, r"region_index spans \[-1, 4\]"),
        ],
    )
    def test_errors(self, position, change, error, message):
        inputs, index, options = make()
        arguments = [*inputs, index]
        arguments[position] = change(arguments[position])
        with pytest.raises(error, match=message):
            region_attention(*arguments, **options)

    def test_backend_errors(self, monkeypatch):
        inputs, index, options = make()
        weight = torch.ones(index.shape, device=DEVICE)
        with pytest.raises(RuntimeError, match="slot_weight has no kernel; use backend='auto' or 'eager'"):
            region_attention(*inputs, index, slot_weight=weight, backend="triton", **options)
        wide, index, options = make(heads=1, dims=(160, 8))
        with pytest.raises(RuntimeError, match="a head of 160 channels exceeds the kernels' 128"):
            region_attention(*wide, index, backend="triton", **options)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        if DEVICE == "cpu":
            with pytest.raises(RuntimeError, match="the tensors are on cpu, and Triton needs a GPU"):
                region_attention(*inputs, index, backend="triton", **options)
        with use_backend("reference"), pytest.raises(ValueError, match="backend='fast' is not a backend"):
            use_backend("fast").__enter__()


class TestRegionAttentionWeights:
    def test_reference(self):
        """The weights sum to one, and weight the gathered values to the output."""
        (query, key, value), index, options = make(dtype=torch.float64)
        weights = region_attention_weights(query, key, index, **options)
        assert weights.shape == (2, 6, 2, 8, 24)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        regions = value.unflatten(1, (3, 2)).unflatten(3, (2, 4)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        gathered = torch.stack([regions[image][index[image]].flatten(1, 2) for image in range(2)])
        out = torch.einsum("bgmtk,bgkmd->bgtmd", weights, gathered.unflatten(-1, (2, -1)))
        ours = region_attention(query, key, value, index, **options)
        blocks = ours.unflatten(1, (3, 2)).unflatten(3, (2, 4)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        torch.testing.assert_close(out.flatten(3), blocks)
