from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from visionkernels.ops.feature_smooth_l1 import feature_smooth_l1
from visionkernels.testing.ops import BACKENDS, DEVICE, gradients


class TestFeatureSmoothL1:
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
    def test_nan(self, backend):
        """A NaN of the prediction stays in its element, one of the teacher in its row."""
        prediction, hidden = (torch.randn(2, 5, 24, device=DEVICE) for _ in range(2))
        prediction[0, 1, 2] = torch.nan
        hidden[1, 3, 4] = torch.nan
        assert feature_smooth_l1(prediction, hidden, backend=backend).isnan()
        (grad,) = gradients(partial(feature_smooth_l1, hidden=hidden, backend=backend), [prediction])
        is_nan = grad.isnan()
        assert is_nan[0, 1, 2] and is_nan[1, 3].all() and is_nan.sum() == 25

    @settings(max_examples=30, deadline=None)
    @given(st.data())
    def test_properties(self, data):
        """The teacher's rows may be scaled and shifted, rows permuted; a large beta gives half the squared error."""
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
            ({"eps": -5.0}, ValueError, "eps=-5.0 must be a number of at least 0"),
            ({"eps": float("nan")}, ValueError, "eps=nan must be a number of at least 0"),
            ({"backend": "cuda"}, ValueError, "backend='cuda' is not a backend"),
            ({"backend": "triton", "hidden": torch.ones(2, 4).double()}, RuntimeError, "not float64"),
        ],
    )
    def test_errors(self, change, error, message):
        arguments = {"prediction": torch.ones(2, 4), "hidden": torch.ones(2, 4)} | change
        with pytest.raises(error, match=message):
            feature_smooth_l1(**arguments)

    @pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
    @pytest.mark.parametrize("scale", [1e-30, 1e12, 1e19, 1e30])
    def test_scale_of_the_teacher(self, backend, scale):
        """Squares of hidden states overflow from 1e19 on; their norm does not."""
        prediction, hidden = torch.randn(3, 8, device=DEVICE), torch.randn(3, 8, device=DEVICE)
        hidden[1:] *= scale
        (ours,) = gradients(lambda x: feature_smooth_l1(x, hidden, backend=backend), [prediction])
        exact = hidden.double()
        (expected,) = gradients(lambda x: feature_smooth_l1(x, exact, backend="reference"), [prediction.double()])
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-6)

    def test_batched(self):
        """vmap over both inputs."""
        prediction, hidden = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
        ours = torch.vmap(feature_smooth_l1)(prediction, hidden)
        expected = [feature_smooth_l1(*pair) for pair in zip(prediction, hidden, strict=True)]
        torch.testing.assert_close(ours, torch.stack(expected))

    def test_limits_of_the_kernels(self):
        wide = torch.ones(1, 8193, device=DEVICE)
        with pytest.raises(RuntimeError, match="rows of 8193 channels exceed the kernels' 8192"):
            feature_smooth_l1(wide, wide, backend="triton")
