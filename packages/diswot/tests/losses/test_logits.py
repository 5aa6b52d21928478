"""Losses of logits against their formulas in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from diswot import losses

few = settings(max_examples=30, deadline=None)


@pytest.fixture
def logits():
    return [3 * torch.randn(5, 7, dtype=torch.float64) for _ in range(2)]


def divergence(student, teacher, temperature):
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        q, p = (each.div(temperature).exp() / each.div(temperature).exp().sum() for each in (ours, theirs))
        total = total + (p * (p / q).log()).sum()
    return total * temperature**2 / len(student)


class TestKD:
    @pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
    def test_reference(self, logits, temperature):
        loss = losses.create("kd", temperature=temperature)(*logits)
        torch.testing.assert_close(loss, divergence(*logits, temperature), rtol=1e-10, atol=1e-12)

    def test_gradcheck(self, logits):
        student, teacher = logits
        assert gradcheck(lambda each: losses.create("kd")(each, teacher), student.requires_grad_(), fast_mode=True)

    @few
    @given(st.floats(-100, 100), st.floats(-100, 100))
    def test_shift_of_logits_does_not_matter(self, shift, other):
        student, teacher = (torch.from_numpy(np.random.RandomState(i).standard_normal((4, 6))) for i in range(2))
        loss = losses.create("kd")
        torch.testing.assert_close(loss(student + shift, teacher + other), loss(student, teacher))

    def test_large_temperature_compares_centred_logits(self, logits):
        """T^2 KL tends to the squared difference of the centred logits / 2K."""
        student, teacher = (each - each.mean(1, keepdim=True) for each in logits)
        limit = (student - teacher).square().sum() / (2 * 7 * 5)
        torch.testing.assert_close(losses.create("kd", temperature=1e4)(*logits), limit, rtol=1e-3, atol=0)

    def test_saturated(self):
        """A gap of 1e4: the teacher is sure of class 1, to which the student gives exp(-1e4 / 4)."""
        student, teacher = torch.zeros(1, 3), torch.zeros(1, 3)
        student[0, 0], teacher[0, 1] = 1e4, 1e4
        torch.testing.assert_close(losses.create("kd")(student, teacher), torch.tensor(16 * 1e4 / 4))


class TestPearsonInterclass:
    def test_reference(self, logits):
        expected = 1 - np.mean(
            [np.corrcoef(*rows)[0, 1] for rows in zip(*(each.numpy() for each in logits), strict=True)]
        )
        loss = losses.create("pearson_interclass")(*logits)
        torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-10, atol=1e-12)

    def test_gradcheck(self, logits):
        student, teacher = logits
        distiller = losses.create("pearson_interclass")
        assert gradcheck(lambda each: distiller(each, teacher), student.requires_grad_(), fast_mode=True)

    @few
    @given(st.floats(1e-3, 1e3), st.floats(-100, 100))
    def test_scale_and_shift_do_not_matter(self, scale, shift):
        student, teacher = (torch.from_numpy(np.random.RandomState(i).standard_normal((4, 6))) for i in range(2))
        loss = losses.create("pearson_interclass")
        torch.testing.assert_close(loss(scale * student + shift, teacher), loss(student, teacher))
        torch.testing.assert_close(loss(-scale * student, teacher), 2 - loss(student, teacher))
