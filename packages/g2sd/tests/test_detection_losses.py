"""Imitation of a teacher detector, beside its definition, and where there is nothing to imitate."""

import pytest
import torch
from torch.nn import functional as F

from g2sd.detection_losses import FeatureAdapter, objectness_weighted_losses


def pyramids(channels, sizes=(6, 3), batch=2, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, size, size, generator=generator, **options) for size in sizes]


def definition(student, teacher, logits, teacher_logits):
    features = objectness = 0.0
    for ours, theirs, our_logits, their_logits in zip(student, teacher, logits, teacher_logits, strict=True):
        told = their_logits.sigmoid()
        weight = told.max(1).values[:, None]
        features += (weight * (theirs - ours) ** 2).sum() / weight.sum()
        entropy = F.binary_cross_entropy(our_logits.sigmoid(), told, reduction="none")
        objectness += (weight * entropy).sum() / weight.sum()
    return features, objectness


class TestObjectnessWeightedLosses:
    def test_definition(self):
        arguments = [pyramids(8, seed=0), pyramids(8, seed=1), pyramids(3, seed=2), pyramids(3, seed=3)]
        arguments = [[each.double() for each in pyramid] for pyramid in arguments]
        found = objectness_weighted_losses(*arguments)
        for ours, expected in zip(found, definition(*arguments), strict=True):
            torch.testing.assert_close(ours, expected)

    def test_gradcheck(self):
        student, logits = pyramids(2, (2,), dtype=torch.float64), pyramids(3, (2,), seed=1, dtype=torch.float64)
        teacher, told = pyramids(2, (2,), seed=2, dtype=torch.float64), pyramids(3, (2,), seed=3, dtype=torch.float64)
        inputs = [student[0].requires_grad_(), logits[0].requires_grad_()]
        assert torch.autograd.gradcheck(
            lambda a, b: objectness_weighted_losses([a], teacher, [b], told), inputs, fast_mode=True
        )

    def test_no_gradient_of_the_teacher(self):
        teacher, told = pyramids(4, requires_grad=True), pyramids(3, requires_grad=True)
        student, logits = pyramids(4, seed=1, requires_grad=True), pyramids(3, seed=1, requires_grad=True)
        sum(objectness_weighted_losses(student, teacher, logits, told)).backward()
        assert all(each.grad is None for each in (*teacher, *told))
        assert all(each.grad is not None for each in (*student, *logits))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_nothing_seen(self, dtype):
        """Where the teacher sees no object at all, losses are 0 and finite, with their gradients."""
        student = pyramids(4, requires_grad=True)
        logits = pyramids(3, requires_grad=True)
        told = [torch.full_like(each, -1e4) for each in logits]
        found = objectness_weighted_losses(
            [each.to(dtype) for each in student], pyramids(4, seed=1), [each.to(dtype) for each in logits], told
        )
        assert [float(each.detach()) for each in found] == [0, 0]
        sum(found).backward()
        assert all(each.grad.isfinite().all() for each in (*student, *logits))

    def test_saturated_logits(self):
        logits = [torch.full((1, 3, 2, 2), 1e4, requires_grad=True)]
        told = [torch.full((1, 3, 2, 2), -20.0)]
        found = objectness_weighted_losses(pyramids(4, (2,), 1), pyramids(4, (2,), 1), logits, told)
        found.objectness.backward()
        assert found.objectness.isfinite() and logits[0].grad.isfinite().all()

    def test_errors(self):
        good = [pyramids(4), pyramids(4), pyramids(3), pyramids(3)]
        with pytest.raises(ValueError, match=r"have \[2, 1, 2, 2\] levels"):
            objectness_weighted_losses(good[0], good[1][:1], good[2], good[3])
        with pytest.raises(ValueError, match=r"level 0 has features \[2, 4, 6, 6\] and \[2, 5, 6, 6\]"):
            objectness_weighted_losses(good[0], pyramids(5), good[2], good[3])
        with pytest.raises(ValueError, match=r"level 0 has features \[2, 4, 6, 6\] but objectness \[2, 3, 5, 5\]"):
            objectness_weighted_losses(good[0], good[1], pyramids(3, (5, 3)), pyramids(3, (5, 3)))


class TestFeatureAdapter:
    def test_levels(self):
        adapter = FeatureAdapter(4, 2, teacher_channels=6)
        assert [each.shape[1] for each in adapter(pyramids(4))] == [6, 6]
        with pytest.raises(ValueError, match="features have 1 levels; the adapter is for 2"):
            adapter(pyramids(4)[:1])

    def test_size_of_the_paper(self):
        """Five convolutions of 256 channels: 2.950 million parameters."""
        assert sum(parameter.numel() for parameter in FeatureAdapter().parameters()) == 2_950_400
