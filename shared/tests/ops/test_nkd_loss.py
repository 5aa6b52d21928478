from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from visionkernels.ops.nkd_loss import nkd_loss
from visionkernels.testing.ops import BACKENDS, DEVICE, gradients


def make():
    student, teacher = (scale * torch.randn(6, 12, device=DEVICE) for scale in (2, 3))
    return student, teacher, torch.randint(12, (6,), device=DEVICE)


def gradient(student: Tensor, teacher: Tensor, labels: Tensor, **options: object) -> Tensor:
    return gradients(partial(nkd_loss, teacher_logits=teacher, labels=labels, **options), [student])[0]


class TestNkdLoss:
    def test_definition(self):
        """Three classes by hand: p_T = (1/2, 1/4, 1/4) and p_S = (1/4, 1/4, 1/2), label 0."""
        student, teacher = torch.tensor([[1.0, 1.0, 2.0]]).log(), torch.tensor([[2.0, 1.0, 1.0]]).log()
        loss = nkd_loss(student, teacher, torch.tensor([0]), alpha=10.0)
        # q_T = (1/2, 1/2), q_S = (1/3, 2/3)
        expected = 0.5 * torch.tensor(4.0).log() + 10 * 0.5 * (torch.tensor(3.0).log() + torch.tensor(1.5).log())
        torch.testing.assert_close(loss, expected)

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    @pytest.mark.parametrize("gap", [200.0, 1e4])
    def test_large_gaps(self, gap, temperature, backend):
        """Each of student and teacher far above or below in the label or in another class: what float64 gives."""
        rows = [[gap, 0.0, -1.0, 0.5], [-gap, 0.0, 1.0, 0.5], [0.0, gap, 1.0, 0.5], [0.0, -gap, 1.0, gap]]
        pairs = [(student, teacher) for student in rows for teacher in rows]
        student, teacher = (torch.tensor(each, device=DEVICE) for each in zip(*pairs, strict=True))
        labels = torch.zeros(len(pairs), dtype=torch.int64, device=DEVICE)
        inputs, options = (student, teacher, labels), {"temperature": temperature}
        exact = (student.double(), teacher.double(), labels)
        loss, grad = (f(*inputs, backend=backend, **options) for f in (nkd_loss, gradient))
        assert grad.isfinite().all()
        expected = [f(*exact, backend="reference", **options) for f in (nkd_loss, gradient)]
        torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.double(), expected[1], rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_excluded_class(self, backend):
        """A logit of -inf in both takes the class out; in the teacher alone, the gradient there is q_S + p_T[y] p_S."""
        student, teacher, labels = make()
        labels = labels % 9
        without = [torch.cat([each[:, :9], each[:, 10:]], 1) for each in (student, teacher)]
        student[:, 9] = teacher[:, 9] = -torch.inf
        out = nkd_loss(student, teacher, labels, backend=backend)
        torch.testing.assert_close(out, nkd_loss(*without, labels, backend=backend))
        grad = gradient(student, teacher, labels, backend=backend)
        expected = gradient(*without, labels, backend=backend)
        torch.testing.assert_close(torch.cat([grad[:, :9], grad[:, 10:]], 1), expected)
        assert not grad[:, 9].any()
        student[:, 9] = 1
        grad = gradient(student, teacher, labels, backend=backend)
        own = labels[:, None]
        q_student = student.scatter(1, own, -torch.inf).softmax(1)[:, 9]
        p_teacher = teacher.softmax(1).gather(1, own)[:, 0]
        torch.testing.assert_close(grad[:, 9], (q_student + p_teacher * student.softmax(1)[:, 9]) / len(labels))

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_offset(self, backend):
        """Adding a large number to all logits of a sample changes neither the loss nor the gradient."""
        student, teacher = (torch.randint(-4, 5, (3, 20), device=DEVICE).float() for _ in range(2))
        labels = torch.tensor([0, 7, 19], device=DEVICE)
        loss, grad = (f(student, teacher, labels, backend=backend) for f in (nkd_loss, gradient))
        shifted = (student + 2**19, teacher - 2**19, labels)
        torch.testing.assert_close(nkd_loss(*shifted, backend=backend), loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient(*shifted, backend=backend), grad, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_nan(self, backend):
        """A NaN makes the loss NaN, and the gradients of its own sample only."""
        for position in (0, 1):
            *logits, labels = make()
            logits[position][2, 5] = torch.nan
            assert nkd_loss(*logits, labels, backend=backend).isnan()
            is_nan = gradient(*logits, labels, backend=backend).isnan()
            assert is_nan[2].any() and not is_nan[[0, 1, 3, 4, 5]].any()

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_int32_labels(self, backend):
        student, teacher, labels = make()
        out, expected = (gradient(student, teacher, each, backend=backend) for each in (labels.int(), labels))
        assert torch.equal(out, expected)

    @settings(max_examples=30, deadline=None)
    @given(st.data())
    def test_properties(self, data):
        """Classes can be permuted; with p_T[y] as weight of the others it is the cross entropy of all classes."""
        batch, classes = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 9))
        student, teacher = (torch.randn(batch, classes, dtype=torch.float64) for _ in range(2))
        labels = torch.randint(classes, (batch,))
        loss = nkd_loss(student, teacher, labels)
        order = torch.randperm(classes)
        permuted = (student[:, order], teacher[:, order], order.argsort()[labels])
        torch.testing.assert_close(nkd_loss(*permuted), loss)
        # p[c] = (1 - p[y]) q[c] for the other classes
        own = labels[:, None]
        p_student, p_teacher = student.softmax(1).gather(1, own), teacher.softmax(1).gather(1, own)
        parts = [nkd_loss(student[i : i + 1], teacher[i : i + 1], labels[i : i + 1], alpha=0.0) for i in range(batch)]
        others = [nkd_loss(student[i : i + 1], teacher[i : i + 1], labels[i : i + 1]) for i in range(batch)]
        rest = 1 - p_teacher[:, 0]
        whole = torch.stack(parts) + rest * (torch.stack(others) - torch.stack(parts) - (1 - p_student[:, 0]).log())
        torch.testing.assert_close(whole.mean(), F.cross_entropy(student, teacher.softmax(1)))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                {"student_logits": torch.ones(2, 4).long()},
                TypeError,
                "student_logits is torch.int64; nkd_loss takes fl",
            ),
            ({"teacher_logits": torch.ones(2, 4).int()}, TypeError, "teacher_logits is torch.int32"),
            ({"teacher_logits": torch.ones(2, 4, device="meta")}, TypeError, "teacher_logits is on meta; expected cpu"),
            (
                {"student_logits": torch.ones(4)},
                ValueError,
                r"student_logits has shape \[4\]; expected \[batch >= 1, c",
            ),
            ({"student_logits": torch.ones(0, 4)}, ValueError, r"student_logits has shape \[0, 4\]"),
            ({"student_logits": torch.ones(2, 1)}, ValueError, r"student_logits has shape \[2, 1\]; .*classes >= 2"),
            ({"teacher_logits": torch.ones(2, 5)}, ValueError, r"teacher_logits has shape \[2, 5\]; expected \[2, 4\]"),
            ({"labels": torch.ones(2)}, TypeError, "labels is torch.float32; expected int64 or int32"),
            ({"labels": torch.ones(2, device="meta").long()}, TypeError, "labels is on meta; expected cpu"),
            ({"labels": torch.ones(2, 4).long()}, ValueError, r"labels has shape \[2, 4\]; expected \[2\]"),
            ({"labels": torch.tensor([0, 4])}, ValueError, r"labels spans \[0, 4\]; allowed is \[0, 3\]"),
            ({"labels": torch.tensor([-1, 3])}, ValueError, r"labels spans \[-1, 3\]"),
            ({"alpha": float("nan")}, ValueError, "alpha=nan must be a number of at least 0"),
            ({"temperature": -1.0}, ValueError, "temperature=-1.0 must be a positive number"),
            ({"backend": "cuda"}, ValueError, "backend='cuda' is not a backend"),
            ({"backend": "triton", "teacher_logits": torch.ones(2, 4).double()}, RuntimeError, "not float64"),
        ],
    )
    def test_errors(self, change, error, message):
        arguments = {
            "student_logits": torch.ones(2, 4), "teacher_logits": torch.ones(2, 4), "labels": torch.tensor([0, 3])
        } | change  # fmt: skip
        with pytest.raises(error, match=message):
            nkd_loss(**arguments)
