"""Patch means, saved inputs and kernel sums for any shape and type."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gradfilter import kernel_sum, patch_mean, saved_input
from visionkernels.testing.ops import TOLERANCES

few = settings(max_examples=30, deadline=None)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
dtypes, sides = st.sampled_from(DTYPES), st.integers(1, 12)


@pytest.mark.parametrize(
    ("take", "name"),
    [
        (lambda x: patch_mean(x, 2), "grad"),
        (lambda x: saved_input(x, 3), "x"),
        (kernel_sum, "weight"),
    ],
    ids=["mean", "input", "sum"],
)
def test_wrong_tensors(take, name):
    """Other numbers of axes and types without a mean are refused."""
    for shape in ((3, 4), (3, 4, 4), (1, 1, 3, 4, 4)):
        with pytest.raises(ValueError, match=rf"{name} has shape \[{', '.join(map(str, shape))}\]; .* takes \["):
            take(torch.ones(shape))
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"{name} is {dtype}; .* takes floating-point tensors"):
            take(torch.ones(1, 3, 4, 4, dtype=dtype))


class TestPatchMean:
    @few
    @given(sides, sides, st.tuples(sides, sides), dtypes)
    def test_is_the_mean_of_each_patch(self, height, width, radius, dtype):
        """The mean is over the pixels of the patch, at least in float32."""
        grad = torch.randn(2, 3, height, width, dtype=dtype)
        expected = torch.stack(
            [torch.stack([part.mean((2, 3)) for part in rows.split(radius[1], 3)], 2)
             for rows in grad.double().split(radius[0], 2)], 2
        )  # fmt: skip
        ours = patch_mean(grad, radius)
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        rtol, atol = TOLERANCES[ours.dtype][1]
        torch.testing.assert_close(ours.double(), expected, rtol=rtol, atol=atol)

    @few
    @given(sides, sides, st.integers(1, 5))
    def test_is_a_projection(self, height, width, radius):
        """Spread over its patches, the mean has itself as mean, the same total, and no more energy than the map."""
        grad = torch.randn(1, 2, height, width, dtype=torch.float64)
        means = patch_mean(grad, radius)
        spread = means.repeat_interleave(radius, 2)[:, :, :height].repeat_interleave(radius, 3)[..., :width]
        torch.testing.assert_close(patch_mean(spread, radius), means)
        torch.testing.assert_close(spread.sum((2, 3)), grad.sum((2, 3)))
        torch.testing.assert_close(spread.square().sum() + (grad - spread).square().sum(), grad.square().sum())


class TestSavedInput:
    @few
    @given(st.data())
    def test_is_the_sum_of_what_is_sampled(self, data):
        """Output by output: the mean of a box in the middle of the window, zero outside the image, added by patches."""
        height, width = data.draw(sides), data.draw(sides)
        kernel, stride, padding, dilation, radius = (
            data.draw(st.tuples(st.integers(least, most), st.integers(least, most)))
            for least, most in ((1, 4), (1, 4), (0, 3), (1, 2), (1, 9))
        )
        spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        if height + 2 * padding[0] < spans[0] or width + 2 * padding[1] < spans[1]:
            with pytest.raises(RuntimeError, match="the kernel spans"):
                saved_input(x, kernel, radius=radius, **geometry)
            return
        padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        boxes = [min(s, span) for s, span in zip(stride, spans, strict=True)]
        # rounded up, so that an even remainder is shared and an odd one is larger before the box
        first = [-(-(span - box) // 2) for span, box in zip(spans, boxes, strict=True)]
        means = F.avg_pool2d(padded[:, :, first[0] :, first[1] :], boxes, stride)
        rows, columns = ((n + 2 * p - span) // s + 1 for n, p, span, s in
                         zip((height, width), padding, spans, stride, strict=True))  # fmt: skip
        means = means[:, :, :rows, :columns]
        expected = patch_mean(means, radius)
        for axis, (count, side) in enumerate(zip((rows, columns), radius, strict=True), 2):
            lengths = torch.tensor([min(side, count - start) for start in range(0, count, side)])
            expected = expected * lengths.view([-1 if other == axis else 1 for other in range(4)])
        torch.testing.assert_close(saved_input(x, kernel, radius=radius, **geometry), expected)

    @few
    @given(sides, sides, st.sampled_from([1, 3, 5]), st.integers(1, 4), dtypes)
    def test_is_the_plain_sum_for_same_padding(self, height, width, kernel, radius, dtype):
        x = torch.randn(2, 3, height, width, dtype=dtype)
        ours = saved_input(x, kernel, padding=kernel // 2, radius=radius)
        sums = [[part.sum((2, 3)) for part in rows.split(radius, 3)] for rows in x.double().split(radius, 2)]
        rtol, atol = TOLERANCES[ours.dtype][1]
        expected = torch.stack([torch.stack(row, 2) for row in sums], 2)
        torch.testing.assert_close(ours.double(), expected, rtol=rtol, atol=10 * atol)


class TestKernelSum:
    @few
    @given(st.lists(st.integers(1, 6), min_size=4, max_size=4), dtypes, st.booleans())
    def test_is_the_sum_over_taps(self, shape, dtype, is_channels_last):
        """The sum takes any layout, is the identity for one tap, and is linear in the kernel."""
        weight = torch.randn(shape, dtype=dtype)
        if is_channels_last:
            weight = weight.contiguous(memory_format=torch.channels_last)
        expected = weight.double().sum((2, 3))
        rtol, atol = TOLERANCES[dtype][1]
        scale = max(1.0, float(weight.double().abs().sum((2, 3)).max()))
        torch.testing.assert_close(kernel_sum(weight).double(), expected, rtol=rtol, atol=atol * scale)
        torch.testing.assert_close(kernel_sum(weight[:, :, :1, :1]).double(), weight[:, :, 0, 0].double())
        torch.testing.assert_close(kernel_sum(2 * weight).double(), 2 * kernel_sum(weight).double())
