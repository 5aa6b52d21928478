"""The losses against their formulas in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from biformer.losses import distillation_loss, soft_cross_entropy, token_labelling_loss

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def logits(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


class TestSoftCrossEntropy:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_reference(self, dtype):
        x, target = logits(4, 7, dtype=dtype), torch.rand(4, 7).softmax(-1)
        wanted = -(target.double() * x.double().log_softmax(-1)).sum(-1).mean()
        loss = soft_cross_entropy(x, target)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, wanted.float())

    def test_indices(self):
        x, target = logits(2, 3, 5), torch.randint(5, (2, 3))
        one_hot = F.one_hot(target, 5).float()
        torch.testing.assert_close(soft_cross_entropy(x, target), soft_cross_entropy(x, one_hot))

    @given(st.floats(-50, 50))
    def test_shift_of_logits_does_not_matter(self, shift):
        generator = torch.Generator().manual_seed(1)
        x, target = torch.randn(3, 4, generator=generator), torch.rand(3, 4, generator=generator).softmax(-1)
        torch.testing.assert_close(
            soft_cross_entropy(x + shift, target), soft_cross_entropy(x, target), rtol=0, atol=1e-4
        )


class TestDistillationLoss:
    def test_soft(self):
        student, teacher = logits(4, 7), logits(4, 7)
        p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
        wanted = 0.75 * 2.0 + 0.25 * (p * (p / q).log()).sum() * 9 / 28
        loss = distillation_loss(torch.tensor(2.0), student, teacher, kind="soft", alpha=0.25, tau=3.0)
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)

    def test_hard_and_none(self):
        student, teacher, base = logits(4, 7), logits(4, 7), torch.tensor(2.0)
        wanted = 0.5 * base + 0.5 * F.cross_entropy(student, teacher.argmax(-1)).float()
        torch.testing.assert_close(distillation_loss(base, student, teacher, kind="hard"), wanted)
        assert distillation_loss(base, student, teacher, kind="none") is base

    def test_teacher_gets_no_gradient(self):
        student, teacher = logits(4, 7).requires_grad_(), logits(4, 7).requires_grad_()
        distillation_loss(torch.tensor(0.0), student, teacher, kind="soft").backward()
        assert teacher.grad is None
        assert student.grad.abs().sum() > 0

    def test_same_logits_cost_nothing(self):
        x = logits(4, 7)
        loss = distillation_loss(torch.tensor(0.0), x, x, kind="soft", alpha=1.0, tau=2.0)
        torch.testing.assert_close(loss, torch.tensor(0.0), rtol=0, atol=1e-7)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"kind": "warm"}, "kind='warm' is unknown; use none, soft or hard"),
            ({"alpha": 1.5}, "alpha=1.5"),
            ({"tau": 0.0}, "tau=0.0"),
        ],
    )
    def test_errors(self, change, message):
        with pytest.raises(ValueError, match=message):
            distillation_loss(torch.tensor(0.0), logits(2, 3), logits(2, 3), **{"kind": "soft", **change})

    def test_shapes_differ(self):
        with pytest.raises(ValueError, match=r"\[2, 3\] and teacher \[2, 4\]"):
            distillation_loss(torch.tensor(0.0), logits(2, 3), logits(2, 4), kind="soft")


class TestTokenLabellingLoss:
    def test_is_the_sum(self):
        image, cells = logits(2, 5), logits(2, 3, 4, 5)
        label, cell_labels = torch.tensor([1, 4]), torch.rand(2, 3, 4, 5).softmax(-1)
        wanted = F.cross_entropy(image, label) - 0.5 * (cell_labels * cells.log_softmax(-1)).sum(-1).mean()
        torch.testing.assert_close(
            token_labelling_loss(image, cells, label, cell_labels).double(), wanted, rtol=1e-5, atol=1e-6
        )

    def test_errors(self):
        with pytest.raises(ValueError, match=r"cell_logits \[2, 3, 4, 5\] and cell_target \[2, 4, 3, 5\]"):
            token_labelling_loss(logits(2, 5), logits(2, 3, 4, 5), torch.tensor([0, 1]), logits(2, 4, 3, 5))
