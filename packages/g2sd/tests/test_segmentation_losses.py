"""Losses between logits of segmentation models, by their definitions."""

import numpy as np
import pytest
import torch

from g2sd.baselines import plain_channel_wise, two_softmax_channel_wise
from g2sd.segmentation_losses import channel_wise_loss, pixel_kl_loss


def maps(dtype=torch.float64, shape=(2, 3, 4, 5)):
    return [(2 * torch.randn(shape)).to(dtype) for _ in range(2)]


def log_softmax(values, axis):
    values = values - values.max(axis, keepdims=True)
    return values - np.log(np.exp(values).sum(axis, keepdims=True))


class TestChannelWiseLoss:
    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_definition(self, temperature):
        student, teacher = maps()
        said, told = (log_softmax(each.numpy().reshape(2, 3, -1) / temperature, 2) for each in (student, teacher))
        wanted = -(temperature**2) * (np.exp(told) * said).sum() / 6
        assert channel_wise_loss(student, teacher, temperature=temperature).item() == pytest.approx(wanted)

    @pytest.mark.parametrize("baseline", [plain_channel_wise, two_softmax_channel_wise])
    def test_baselines(self, baseline):
        """What the bench compares with computes the same, gradient too."""
        student, teacher = maps(torch.float32)
        losses, gradients = [], []
        for loss in (channel_wise_loss, baseline):
            leaf = student.clone().requires_grad_()
            losses.append(loss(leaf, teacher, temperature=2.0))
            losses[-1].backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*gradients)

    def test_least_value(self):
        """The teacher's entropy, not 0; the gradient vanishes there."""
        _, teacher = maps()
        student = teacher.clone().requires_grad_()
        loss = channel_wise_loss(student, teacher)
        loss.backward()
        told = log_softmax(teacher.numpy().reshape(2, 3, -1), 2)
        assert loss.item() == pytest.approx(-(np.exp(told) * told).sum() / 6)
        torch.testing.assert_close(student.grad, torch.zeros_like(student.grad))

    def test_gradcheck(self):
        student, teacher = maps()
        assert torch.autograd.gradcheck(
            lambda x: channel_wise_loss(x, teacher, temperature=2.0), student.requires_grad_()
        )

    def test_errors(self):
        student, teacher = maps()
        with pytest.raises(ValueError, match=r"teacher has shape \[2, 3, 4, 4\]; expected \[2, 3, 4, 5\]"):
            channel_wise_loss(student, teacher[..., :4])
        with pytest.raises(ValueError, match="temperature=0"):
            channel_wise_loss(student, teacher, temperature=0.0)
        with pytest.raises(ValueError, match=r"student has shape \[0, 3, 4, 5\]"):
            channel_wise_loss(student[:0], teacher[:0])


class TestPixelKlLoss:
    @pytest.mark.parametrize(("reduction", "divisor"), [("sum", 1), ("batchmean", 2), ("mean", 120)])
    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_definition(self, temperature, reduction, divisor):
        student, teacher = maps()
        said, told = (log_softmax(each.numpy() / temperature, 1) for each in (student, teacher))
        wanted = temperature**2 * (np.exp(told) * (told - said)).sum() / divisor
        found = pixel_kl_loss(student, teacher, temperature=temperature, reduction=reduction)
        assert found.item() == pytest.approx(wanted)

    def test_gradcheck(self):
        student, teacher = maps()
        assert torch.autograd.gradcheck(lambda x: pixel_kl_loss(x, teacher), student.requires_grad_())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_precision(self, dtype):
        student, teacher = maps(dtype)
        found = pixel_kl_loss(student, teacher)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, pixel_kl_loss(student.float(), teacher.float()))

    def test_far_apart(self):
        student = torch.tensor([1e4, -1e4]).view(1, 2, 1, 1).requires_grad_()
        loss = pixel_kl_loss(student, -student.detach())
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all()

    def test_errors(self):
        student, teacher = maps()
        with pytest.raises(ValueError, match=r"student \[2, 3, 4, 5\] and teacher \[2, 3, 4, 4\] must be equal"):
            pixel_kl_loss(student, teacher[..., :4])
        with pytest.raises(ValueError, match="and not empty"):
            pixel_kl_loss(student[:0], teacher[:0])
        with pytest.raises(ValueError, match="temperature=-1 must be above 0"):
            pixel_kl_loss(student, teacher, temperature=-1)
        with pytest.raises(ValueError, match="reduction='none' must be one of 'mean', 'batchmean', 'sum'"):
            pixel_kl_loss(student, teacher, reduction="none")
