from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from visionkernels.ops.feature_smooth_l1 import feature_smooth_l1
from visionkernels.testing.ops import check_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["eager", "triton"]
CASES = {
    # shape of both, options
    "tokens": ((2, 5, 24), {}),
    "sharp": ((2, 5, 24), {"beta": 0.3}),
    "eps": ((3, 7), {"eps": 0.5}),
    "one-channel": ((4, 1), {}),
    "one-row": ((37,), {"beta": 1.0}),
    "many-rows": ((73, 63), {}),
    "wide": ((2, 4099), {}),
}


def make(case, dtype=torch.float32):
    shape, options = CASES[case]
    prediction = 2 * torch.randn(shape, dtype=torch.float64)
    hidden = 3 * torch.randn(shape, dtype=torch.float64) + 1
    return [each.to(DEVICE, dtype) for each in (prediction, hidden)], options


def run(prediction: Tensor, hidden: Tensor, **options: object) -> Tensor:
    """Return the loss times up to 256, so that gradients are not far below one, in the dtype of the prediction."""
    loss = feature_smooth_l1(prediction, hidden.to(prediction.dtype), **options)
    return (loss * min(prediction.numel(), 256)).to(prediction.dtype)


def gradient(prediction: Tensor, hidden: Tensor, **options: object) -> Tensor:
    leaf = prediction.detach().requires_grad_()
    return torch.autograd.grad(feature_smooth_l1(leaf, hidden, **options), leaf)[0]


class TestFeatureSmoothL1:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_reference(self, backend, case, dtype):
        if backend == "triton" and dtype == torch.float64:
            pytest.skip("the kernels take at most float32")
        (prediction, hidden), options = make(case, dtype)
        function = partial(run, hidden=hidden, **options)
        check_backend(partial(function, backend=backend), partial(function, backend="reference"), [prediction])

    def test_definition(self):
        """Two channels by hand: the target is (-1, 1), the errors are 3 and 1."""
        loss = feature_smooth_l1(torch.tensor([2.0, 2.0]), torch.tensor([5.0, 9.0]), beta=2.0, eps=0.0)
        torch.testing.assert_close(loss, torch.tensor((3 - 1 + 1 / 4) / 2))

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_constant_hidden(self, backend):
        """A row without variance has zeros as its target."""
        prediction = torch.randn(3, 8, device=DEVICE)
        loss = feature_smooth_l1(prediction, torch.full_like(prediction, 3.0), backend=backend)
        expected = F.smooth_l1_loss(prediction, torch.zeros_like(prediction), beta=2.0)
        torch.testing.assert_close(loss, expected)

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_large_hidden(self, backend):
        """Statistics are float32: hidden states near float16's limit neither overflow nor lose their variance."""
        hidden = (60000 + 100 * torch.randint(-9, 9, (3, 40), device=DEVICE)).half()
        loss = feature_smooth_l1(torch.zeros_like(hidden), hidden, backend=backend)
        expected = F.smooth_l1_loss(torch.zeros(3, 40, device=DEVICE), F.layer_norm(hidden.float(), [40]), beta=2.0)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_mixed_dtypes(self, backend):
        """The loss is float32, the gradient of the prediction's dtype, and the teacher has none."""
        (prediction, hidden), _ = make("tokens")
        for ours, theirs in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
            leaf = prediction.detach().to(ours).requires_grad_()
            target = hidden.detach().to(theirs).requires_grad_()
            loss = feature_smooth_l1(leaf, target, backend=backend)
            loss.backward()
            assert loss.dtype == torch.float32 and leaf.grad.dtype == ours and target.grad is None
            expected = feature_smooth_l1(leaf.float(), target.float(), backend="reference")
            torch.testing.assert_close(loss, expected)
        if backend != "triton":
            assert feature_smooth_l1(prediction, hidden.double(), backend=backend).dtype == torch.float64

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_autocast(self, backend):
        inputs, _ = make("tokens")
        expected = gradient(*inputs, backend=backend)
        with torch.autocast(DEVICE, torch.bfloat16):
            torch.testing.assert_close(gradient(*inputs, backend=backend), expected)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_strides(self, backend):
        """Patch tokens of longer sequences, and transposed features."""
        (prediction, hidden), _ = make("tokens")
        expected = gradient(prediction, hidden, backend=backend)
        longer = [torch.cat([each[:, :1], each], 1)[:, 1:] for each in (prediction, hidden)]
        torch.testing.assert_close(gradient(*longer, backend=backend), expected)
        transposed = [each.mT.contiguous().mT for each in (prediction, hidden)]
        torch.testing.assert_close(gradient(*transposed, backend=backend), expected)

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_nan(self, backend):
        """Of the prediction stays in its element, of the teacher in its row."""
        (prediction, hidden), _ = make("tokens")
        prediction[0, 1, 2] = torch.nan
        hidden[1, 3, 4] = torch.nan
        assert feature_smooth_l1(prediction, hidden, backend=backend).isnan()
        is_nan = gradient(prediction, hidden, backend=backend).isnan()
        assert is_nan[0, 1, 2] and is_nan[1, 3].all() and is_nan.sum() == 25

    @pytest.mark.parametrize("backend", ["reference", "eager"])
    @pytest.mark.parametrize("case", ["tokens", "sharp", "eps"])
    def test_gradcheck(self, case, backend):
        (prediction, hidden), options = make(case, torch.float64)
        function = partial(feature_smooth_l1, hidden=hidden, backend=backend, **options)
        assert torch.autograd.gradcheck(function, [prediction.requires_grad_()], fast_mode=True)

    def test_triton_has_no_second_derivative(self):
        (prediction, hidden), _ = make("tokens")
        loss = feature_smooth_l1(prediction.requires_grad_(), hidden, backend="triton")
        (grad,) = torch.autograd.grad(loss, prediction, create_graph=True)
        with pytest.raises(RuntimeError):
            grad.sum().backward()

    @settings(max_examples=30, deadline=None)
    @given(st.data())
    def test_properties(self, data):
        """Blind to scale and offset of the teacher's rows; half the squared error for a large beta; rows commute."""
        rows, channels = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 9))
        prediction, hidden = (torch.randn(rows, channels, dtype=torch.float64) for _ in range(2))
        function = partial(feature_smooth_l1, beta=data.draw(st.floats(0.1, 3)), eps=0.0)
        loss = function(prediction, hidden)
        scale, offset = 0.1 + torch.rand(rows, 1).double(), torch.randn(rows, 1).double()
        torch.testing.assert_close(function(prediction, hidden * scale + offset), loss)
        order = torch.randperm(rows)
        torch.testing.assert_close(function(prediction[order], hidden[order]), loss)
        squared = F.mse_loss(prediction, F.layer_norm(hidden, [channels], eps=1e-6)) / 2
        torch.testing.assert_close(100 * feature_smooth_l1(prediction, hidden, beta=100.0), squared)

    def test_compile_export(self):
        inputs, options = make("sharp")

        class Loss(torch.nn.Module):
            def forward(self, prediction: Tensor, hidden: Tensor) -> Tensor:
                return feature_smooth_l1(prediction, hidden, **options)

        expected = feature_smooth_l1(*inputs, **options)
        compiled = torch.compile(Loss(), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), expected)
        leaf = inputs[0].clone().requires_grad_()
        (ours,) = torch.autograd.grad(compiled(leaf, inputs[1]), leaf)
        torch.testing.assert_close(ours, gradient(*inputs, **options))
        torch.testing.assert_close(torch.export.export(Loss(), (*inputs,)).module()(*inputs), expected)

    # opcheck itself reads .grad of tensors that are no leaves
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    def test_opcheck(self):
        from visionkernels.ops.feature_smooth_l1.triton import _backward_op, _forward_op

        (prediction, hidden), _ = make("eps")
        torch.library.opcheck(_forward_op, (prediction.requires_grad_(), hidden, 2.0, 1e-6))
        grad = torch.ones((), device=DEVICE)
        torch.library.opcheck(_backward_op, (grad, prediction.detach(), hidden, 2.0, 1e-6))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                {"prediction": torch.ones(2, 4).long()},
                TypeError,
                "prediction is torch.int64; feature_smooth_l1 takes f",
            ),
            ({"hidden": torch.ones(2, 4).int()}, TypeError, "hidden is torch.int32"),
            ({"hidden": torch.ones(2, 4, device="meta")}, TypeError, "hidden is on meta; expected cpu, as prediction"),
            ({"prediction": torch.ones(())}, ValueError, r"prediction has shape \[\]; expected \[\*batch, channels\]"),
            ({"prediction": torch.ones(0, 4)}, ValueError, r"prediction has shape \[0, 4\]"),
            ({"prediction": torch.ones(2, 0)}, ValueError, r"prediction has shape \[2, 0\]"),
            ({"hidden": torch.ones(1, 4)}, ValueError, r"hidden has shape \[1, 4\]; expected \[2, 4\]"),
            ({"beta": 0.0}, ValueError, "beta=0.0 must be a positive number"),
            ({"beta": -2.0}, ValueError, "beta=-2.0"),
            ({"backend": "cuda"}, ValueError, "backend='cuda' is not a backend"),
            ({"backend": "triton", "hidden": torch.ones(2, 4).double()}, RuntimeError, "not float64"),
        ],
    )
    def test_errors(self, change, error, message):
        arguments = {"prediction": torch.ones(2, 4), "hidden": torch.ones(2, 4)} | change
        with pytest.raises(error, match=message):
            feature_smooth_l1(**arguments)

    def test_limits_of_the_kernels(self):
        wide = torch.ones(1, 8193, device=DEVICE)
        with pytest.raises(RuntimeError, match="rows of 8193 channels exceed the kernels' 8192"):
            feature_smooth_l1(wide, wide, backend="triton")
