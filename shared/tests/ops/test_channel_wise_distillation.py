from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from visionkernels.ops.channel_wise_distillation import channel_wise_distillation, eager
from visionkernels.testing.ops import BACKENDS, DEVICE, check_backend, gradients


def make():
    return [2 * torch.randn(2, 3, 6, 7, device=DEVICE) for _ in range(2)]


def enlarged(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    """Return the loss times 256, so that gradients are not far below one."""
    return 256 * channel_wise_distillation(student, teacher.to(student.dtype), **options)


def gradient(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    return gradients(partial(channel_wise_distillation, teacher=teacher, **options), [student])[0]


class TestChannelWiseDistillation:
    def test_definition(self):
        """Two positions by hand: a teacher of 1/4 and 3/4, a student of 1/2 each."""
        student, teacher = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 3.0]]]).log()
        torch.testing.assert_close(channel_wise_distillation(student, teacher), torch.tensor(2.0).log())
        torch.testing.assert_close(gradient(student, teacher), torch.tensor([[[0.25, -0.25]]]))

    @pytest.mark.parametrize("chunk", [1, 84, 1 << 20])
    def test_chunks(self, monkeypatch, chunk):
        """Any number of rows at a time, the last fewer, gives the same."""
        monkeypatch.setattr(eager, "_CHUNK_ELEMENTS", chunk)
        student, teacher = (torch.randn(1, 5, 6, 7).to(DEVICE) for _ in range(2))
        loss = partial(enlarged, teacher=teacher)
        check_backend(partial(loss, backend="eager"), partial(loss, backend="reference"), [student])

    @pytest.mark.parametrize("programs", [1, 6, 100])
    def test_splits(self, monkeypatch, programs):
        """A row in one program of several blocks, in sections of several, and in one program a block."""
        from visionkernels.ops.channel_wise_distillation import triton

        monkeypatch.setattr(triton, "_BLOCK", 16)
        monkeypatch.setattr(triton, "_PROGRAMS", programs)
        student, teacher = (3 * torch.randn(1, 2, 151).to(DEVICE) for _ in range(2))
        # the largest logits in the middle, first and last section
        student[..., 70], teacher[..., 3], teacher[:, 1, 150] = 9, 12, 14
        loss = partial(enlarged, teacher=teacher, temperature=0.7)
        check_backend(partial(loss, backend="triton"), partial(loss, backend="reference"), [student])

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_channels_last(self, backend):
        """Channels-last maps of two samples, and of one, have the gradients of contiguous ones."""
        student, teacher = make()
        expected = gradient(student, teacher, backend=backend)
        last = [x.contiguous(memory_format=torch.channels_last) for x in (student, teacher)]
        torch.testing.assert_close(gradient(*last, backend=backend), expected)
        torch.testing.assert_close(gradient(last[0][:1], last[1][:1], backend=backend), 2 * expected[:1])

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_offset(self, backend):
        """Adding a large number to a channel changes neither the loss nor the gradient."""
        student, teacher = (torch.randint(-4, 5, (2, 3, 50), device=DEVICE).float() for _ in range(2))
        loss, grad = (f(student, teacher, backend=backend) for f in (channel_wise_distillation, gradient))
        shifted = (student + 2**19, teacher - 2**19)
        torch.testing.assert_close(channel_wise_distillation(*shifted, backend=backend), loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient(*shifted, backend=backend), grad, rtol=1e-5, atol=1e-8)

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_large_gaps(self, backend):
        student = torch.tensor([[[0.0, 1e4, -1e4]]], device=DEVICE)
        teacher = torch.tensor([[[1e4, 0.0, -1e4]]], device=DEVICE)
        loss = channel_wise_distillation(student, teacher, backend=backend)
        torch.testing.assert_close(loss, torch.tensor(1e4, device=DEVICE))
        grad = gradient(student, teacher, backend=backend)
        torch.testing.assert_close(grad, torch.tensor([[[-1.0, 1.0, 0.0]]], device=DEVICE))

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_nan(self, backend):
        """A NaN makes the loss NaN, and the gradients of its own row only."""
        for position in (0, 1):
            inputs = make()
            inputs[position][0, 1, 2, 3] = torch.nan
            assert channel_wise_distillation(*inputs, backend=backend).isnan()
            grad = gradient(*inputs, backend=backend)
            assert grad[0, 1].isnan().all() and grad.isnan().sum() == 42

    @settings(max_examples=30, deadline=None)
    @given(st.data())
    def test_properties(self, data):
        """The teacher's entropy plus the KL divergence, whatever the order of positions; least for equal maps."""
        batch, channels, positions = (data.draw(st.integers(1, 6)) for _ in range(3))
        temperature = data.draw(st.floats(0.2, 5))
        student, teacher = (torch.randn(batch, channels, positions, dtype=torch.float64) for _ in range(2))
        function = partial(channel_wise_distillation, temperature=temperature)
        loss, least = function(student, teacher), function(teacher, teacher)
        log_student, log_teacher = ((each / temperature).log_softmax(-1) for each in (student, teacher))
        divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) / (batch * channels)
        torch.testing.assert_close(loss - least, temperature**2 * divergence)
        order = torch.randperm(positions)
        torch.testing.assert_close(function(student[..., order], teacher[..., order]), loss)
        assert gradient(teacher, teacher, temperature=temperature).abs().max() < 1e-12

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"student": torch.ones(2, 3, 4).long()}, TypeError, "student is torch.int64; channel_wise_distillation t"),
            ({"teacher": torch.ones(2, 3, 4).bool()}, TypeError, "teacher is torch.bool"),
            (
                {"teacher": torch.ones(2, 3, 4, device="meta")},
                TypeError,
                "teacher is on meta; expected cpu, as student",
            ),
            (
                {"student": torch.ones(2, 3)},
                ValueError,
                r"student has shape \[2, 3\]; expected \[batch, channels, \*sp",
            ),
            ({"student": torch.ones(0, 3, 4)}, ValueError, r"student has shape \[0, 3, 4\].*, at least one of each"),
            ({"student": torch.ones(2, 3, 4, 0)}, ValueError, r"student has shape \[2, 3, 4, 0\]"),
            ({"teacher": torch.ones(2, 3, 5)}, ValueError, r"teacher has shape \[2, 3, 5\]; expected \[2, 3, 4\]"),
            ({"temperature": 0.0}, ValueError, "temperature=0.0 must be a positive number"),
            ({"temperature": float("nan")}, ValueError, "temperature=nan"),
            ({"backend": "cuda"}, ValueError, "backend='cuda' is not a backend"),
            ({"backend": "triton", "teacher": torch.ones(2, 3, 4).double()}, RuntimeError, "not float64"),
        ],
    )
    def test_errors(self, change, error, message):
        arguments = {"student": torch.ones(2, 3, 4), "teacher": torch.ones(2, 3, 4)} | change
        with pytest.raises(error, match=message):
            channel_wise_distillation(**arguments)
