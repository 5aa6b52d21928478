from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionkernels.ops.restore_tokens import restore_tokens
from visionkernels.testing.ops import BACKENDS, DEVICE, check_backend, check_compiled, gradients, over_backends

CASES = {
    # batch, visible patches, patches, channels
    "quarter": (3, 4, 16, 12),
    "one-image": (1, 9, 36, 7),
    "one-visible": (2, 1, 15, 8),
    "all-visible": (2, 6, 6, 5),
    "one-patch": (2, 1, 1, 3),
    "wide": (2, 5, 33, 131),
}


def make(case, dtype=torch.float32):
    """Return the visible tokens, the mask token, the positions and the permutations."""
    batch, kept, patches, channels = CASES[case]
    shapes = ((batch, 1 + kept, channels), (channels,), (1 + patches, channels))
    inputs = [torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]
    return inputs, torch.rand(batch, patches, device=DEVICE).argsort(1)


class TestRestoreTokens:
    @over_backends(CASES, half=["quarter", "one-image"])
    def test_reference(self, backend, case, dtype):
        inputs, ids = make(case, dtype)
        function = partial(restore_tokens, ids_restore=ids)
        check_backend(partial(function, backend=backend), partial(function, backend="reference"), inputs)

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_official_order(self, backend):
        """The result is that of masking by noise, mask tokens at the end and a gather by argsort of argsort."""
        (visible, mask_token, positions), _ = make("quarter")
        noise = torch.rand(3, 16, device=DEVICE)
        ids_shuffle = noise.argsort(1)
        ids_restore = ids_shuffle.argsort(1)
        shuffled = torch.cat([visible[:, 1:], mask_token.expand(3, 12, -1)], 1)
        patches = shuffled.gather(1, ids_restore[..., None].expand(-1, -1, 12))
        out = restore_tokens(visible, mask_token, positions, ids_restore, backend=backend)
        torch.testing.assert_close(out, torch.cat([visible[:, :1], patches], 1) + positions)
        # the k-th visible token lies at patch ids_shuffle[k]
        kept = (out - positions)[:, 1:].gather(1, ids_shuffle[:, :4, None].expand(-1, -1, 12))
        torch.testing.assert_close(kept, visible[:, 1:])

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_empty_batch(self, backend):
        (visible, *rest), ids = make("quarter")
        leaves = [each.requires_grad_() for each in (visible[:0].detach(), *rest)]
        out = restore_tokens(*leaves, ids[:0], backend=backend)
        assert out.shape == (0, 17, 12)
        grads = torch.autograd.grad(out.sum(), leaves)
        assert grads[0].shape == (0, 5, 12) and not grads[1].any() and not grads[2].any()

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_strides(self, backend):
        """Tokens of longer sequences, transposed and expanded ones, expanded output gradients, int32."""
        inputs, ids = make("quarter")
        visible, mask_token, positions = inputs
        function = partial(restore_tokens, ids_restore=ids, backend=backend)
        expected, out = gradients(function, inputs), function(*inputs)
        strided = (
            torch.cat([visible, visible], 1)[:, :5],
            torch.stack([mask_token, mask_token], 1)[:, 0],
            positions.mT.contiguous().mT,
        )
        torch.testing.assert_close(gradients(function, strided), expected)
        torch.testing.assert_close(function(*strided), out)
        one = torch.ones(1, 1, 1, device=DEVICE).expand(3, 17, 12)
        torch.testing.assert_close(gradients(function, inputs, one), expected)
        for other in (ids.int(), ids.mT.contiguous().mT):
            torch.testing.assert_close(function(*inputs, ids_restore=other), out)

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_mixed_dtypes(self, backend):
        """As under autocast: visible tokens in bfloat16, parameters in float32, and so is the output."""
        (visible, *rest), ids = make("quarter")
        leaves = [visible.bfloat16().requires_grad_(), *(each.requires_grad_() for each in rest)]
        with torch.autocast(DEVICE, torch.bfloat16):
            out = restore_tokens(*leaves, ids, backend=backend)
        assert out.dtype == torch.float32
        out.square().sum().backward()
        assert [leaf.grad.dtype for leaf in leaves] == [torch.bfloat16, torch.float32, torch.float32]
        expected = restore_tokens(leaves[0].float(), *rest, ids, backend="reference")
        torch.testing.assert_close(out, expected)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_frozen(self, backend):
        """Frozen inputs get no gradient, and the others the usual one."""
        inputs, ids = make("quarter")
        whole = [each.clone().requires_grad_() for each in inputs]
        restore_tokens(*whole, ids, backend="reference").square().sum().backward()
        for trained in range(3):
            leaves = [each.clone().requires_grad_(i == trained) for i, each in enumerate(inputs)]
            restore_tokens(*leaves, ids, backend=backend).square().sum().backward()
            torch.testing.assert_close(leaves[trained].grad, whole[trained].grad)
            assert sum(leaf.grad is not None for leaf in leaves) == 1

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_many_half_gradients(self, backend):
        """The gradients of 510 masked patches, one each, are summed exactly, which bfloat16 cannot."""
        visible = torch.zeros(2, 2, 4, dtype=torch.bfloat16, device=DEVICE)
        mask_token = torch.zeros(4, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        ids = torch.rand(2, 256, device=DEVICE).argsort(1)
        positions = torch.zeros(257, 4, dtype=torch.bfloat16, device=DEVICE)
        restore_tokens(visible, mask_token, positions, ids, backend=backend).sum().backward()
        torch.testing.assert_close(mask_token.grad, torch.full_like(mask_token, 510))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_deterministic(self, backend):
        inputs, ids = make("one-image")
        function = partial(restore_tokens, ids_restore=ids, backend=backend)
        for first, second in zip(gradients(function, inputs), gradients(function, inputs), strict=True):
            assert torch.equal(first, second)

    @pytest.mark.parametrize("backend", ["reference", "eager"])
    def test_gradcheck(self, backend):
        inputs, ids = make("one-visible", torch.float64)
        function = partial(restore_tokens, ids_restore=ids, backend=backend)
        assert torch.autograd.gradcheck(function, [each.requires_grad_() for each in inputs], fast_mode=True)

    @settings(max_examples=30, deadline=None)
    @given(st.data())
    def test_properties(self, data):
        """Any sizes: eager and Triton are the reference; the op is linear, and masked patches commute."""
        patches = data.draw(st.integers(1, 40))
        kept = data.draw(st.integers(1, patches))
        batch, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
        shapes = ((batch, 1 + kept, channels), (channels,), (1 + patches, channels))
        first, second = ([torch.randn(shape, device=DEVICE) for shape in shapes] for _ in range(2))
        ids = torch.rand(batch, patches, device=DEVICE).argsort(1)
        out = restore_tokens(*first, ids, backend="reference")
        for backend in BACKENDS:
            torch.testing.assert_close(restore_tokens(*first, ids, backend=backend), out)
        total = restore_tokens(*(one + two for one, two in zip(first, second, strict=True)), ids)
        torch.testing.assert_close(total, out + restore_tokens(*second, ids))
        mirrored = torch.where(ids < kept, ids, kept + patches - 1 - ids)
        torch.testing.assert_close(restore_tokens(*first, mirrored), out)

    def test_compile_export(self):
        inputs, ids = make("quarter")
        check_compiled(restore_tokens, [*inputs, ids])

    # opcheck itself reads .grad of tensors that are no leaves
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    def test_opcheck(self):
        from visionkernels.ops.restore_tokens.triton import _backward_op, _forward_op

        inputs, ids = make("quarter")
        torch.library.opcheck(_forward_op, (*(each.requires_grad_() for each in inputs), ids))
        grad = torch.randn(3, 17, 12, device=DEVICE)
        torch.library.opcheck(_backward_op, (grad, ids, 5, torch.bfloat16))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                {"visible": torch.ones(2, 3, 4).long()},
                TypeError,
                "visible is torch.int64; restore_tokens takes floatin",
            ),
            ({"mask_token": torch.ones(4).int()}, TypeError, "mask_token is torch.int32"),
            ({"positions": torch.ones(6, 4, device="meta")}, TypeError, "positions is on meta; expected cpu, as visib"),
            ({"visible": torch.ones(3, 4)}, ValueError, r"visible has shape \[3, 4\]; expected \[batch, 1 \+ visible"),
            ({"mask_token": torch.ones(1, 1, 4)}, ValueError, r"mask_token has shape \[1, 1, 4\]; expected \[4\]"),
            (
                {"positions": torch.ones(6, 5)},
                ValueError,
                r"positions has shape \[6, 5\]; expected \[1 \+ patches, 4\]",
            ),
            (
                {"visible": torch.ones(2, 1, 4)},
                ValueError,
                "visible has 0 patches after the class token, and positions 5",
            ),
            ({"visible": torch.ones(2, 7, 4)}, ValueError, "visible has 6 patches .*; expected 1 to 5"),
            ({"ids_restore": torch.ones(2, 5)}, TypeError, "ids_restore is torch.float32; expected int64 or int32"),
            ({"ids_restore": torch.ones(2, 5, device="meta").int()}, TypeError, "ids_restore is on meta; expected cpu"),
            ({"ids_restore": torch.ones(2, 6).int()}, ValueError, r"ids_restore has shape \[2, 6\]; expected \[2, 5\]"),
            ({"ids_restore": torch.arange(1, 6).expand(2, 5)}, ValueError, r"spans \[1, 5\]; allowed is \[0, 4\]"),
            ({"ids_restore": torch.arange(-1, 4).expand(2, 5)}, ValueError, r"ids_restore spans \[-1, 3\]"),
            ({"ids_restore": torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 2, 4]])}, ValueError, "names a patch twice"),
            ({"backend": "cuda"}, ValueError, "backend='cuda' is not a backend"),
            ({"backend": "triton", "positions": torch.ones(6, 4).double()}, RuntimeError, "not float64"),
        ],
    )
    def test_errors(self, change, error, message):
        arguments = {
            "visible": torch.ones(2, 3, 4), "mask_token": torch.ones(4), "positions": torch.ones(6, 4),
            "ids_restore": torch.arange(5).expand(2, 5),
        } | change  # fmt: skip
        with pytest.raises(error, match=message):
            restore_tokens(**arguments)
