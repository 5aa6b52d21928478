"""Losses of the maps of one stage against loops over samples and channels in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F

from diswot import losses
from diswot.losses.distiller import common_size, unit_vectors
from diswot.similarity import relation_loss, semantic_loss


def maps(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def pair():
    return maps(3, 6, 4, 5), maps(3, 6, 4, 5)


def attention(each):
    rows = [sum(channel.flatten() ** 2 for channel in sample) / len(sample) for sample in each]
    return torch.stack([row / row.norm() for row in rows])


def nst_of_a_stage(student, teacher):
    """Sum over pairs of channels of one sample after another."""
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        a = [channel.flatten() / channel.norm() for channel in ours]
        b = [channel.flatten() / channel.norm() for channel in theirs]

        def mean(left, right):
            return sum((x @ y) ** 2 for x in left for y in right) / (len(left) * len(right))

        total = total + mean(b, b) + mean(a, a) - 2 * mean(a, b)
    return total / len(student)


def checks_gradient(distiller, student, teacher):
    return gradcheck(lambda each: distiller(each, teacher), student.requires_grad_(), fast_mode=True)


class TestHint:
    def test_reference(self, pair):
        distiller = losses.create("hint")
        torch.testing.assert_close(distiller(*pair), sum((pair[0] - pair[1]).flatten() ** 2) / pair[0].numel())
        assert checks_gradient(distiller, *pair)

    @pytest.mark.parametrize("size", [(4, 5), (2, 2), (9, 10)], ids=["same", "smaller", "larger"])
    def test_regressor(self, size):
        student, teacher = torch.randn(3, 6, 4, 5), torch.randn(3, 8, *size)
        distiller = losses.create("hint", student=student, teacher=teacher)
        predicted = distiller.adapters[0](student)
        assert predicted.shape == teacher.shape
        torch.testing.assert_close(distiller(student, teacher), F.mse_loss(predicted, teacher))


class TestAttention:
    def test_at(self):
        student, teacher = [maps(3, 6, 4, 5), maps(3, 4, 2, 2)], [maps(3, 5, 4, 5), maps(3, 9, 2, 2)]
        expected = sum(F.mse_loss(attention(a), attention(b)) for a, b in zip(student, teacher, strict=True))
        distiller = losses.create("at")
        torch.testing.assert_close(distiller(student, teacher), expected, rtol=1e-10, atol=1e-12)
        leaves = [each.requires_grad_() for each in student]
        assert gradcheck(lambda *each: distiller(list(each), teacher), leaves, fast_mode=True)

    @pytest.mark.parametrize("larger", ["student", "teacher"])
    def test_larger_map_is_pooled(self, larger):
        large, small = maps(3, 6, 8, 8), maps(3, 4, 4, 4)
        pooled = F.avg_pool2d(large, 2)
        pairs = ([large], [small], [pooled], [small]) if larger == "student" else ([small], [large], [small], [pooled])
        distiller = losses.create("at")
        torch.testing.assert_close(distiller(*pairs[:2]), distiller(*pairs[2:]))

    @pytest.mark.parametrize("p", [1, 2])
    def test_ft(self, pair, p):
        distiller = losses.create("ft", p=p)
        expected = ((attention(pair[0]) - attention(pair[1])).abs() ** p).mean()
        torch.testing.assert_close(distiller(*pair), expected, rtol=1e-10, atol=1e-12)
        assert checks_gradient(distiller, *pair)

    def test_translator(self):
        student, teacher = torch.randn(3, 6, 4, 4), torch.randn(3, 8, 2, 2)
        distiller = losses.create("ft", student=student, teacher=teacher)
        assert [list(each.shape) for each in distiller.parameters()] == [[8, 6, 1, 1]]
        translated = F.adaptive_avg_pool2d(distiller.adapters[0](student), 2)
        torch.testing.assert_close(distiller(student, teacher), F.l1_loss(attention(translated), attention(teacher)))


class TestNST:
    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [((3, 6, 3, 3), (3, 5, 3, 3)), ((3, 11, 3, 3), (3, 5, 3, 3)), ((2, 4, 2, 1), (2, 9, 2, 1))],
        ids=["channels", "positions", "flat"],
    )
    def test_reference(self, ours, theirs):
        student, teacher = maps(*ours), maps(*theirs)
        distiller = losses.create("nst")
        leaf = student.requires_grad_()
        found, expected = distiller([leaf, leaf], [teacher, teacher]), 2 * nst_of_a_stage(leaf, teacher)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        grads, wanted = torch.autograd.grad(found, leaf), torch.autograd.grad(expected, leaf)
        torch.testing.assert_close(grads, wanted, rtol=1e-8, atol=1e-12)
        assert gradcheck(lambda each: distiller([each], [teacher]), leaf, fast_mode=True)

    @settings(max_examples=30, deadline=None)
    @given(st.permutations(range(5)), st.floats(0.1, 10), st.integers(1, 4), st.integers(1, 4))
    def test_order_and_scale_of_channels_do_not_matter(self, order, scale, height, width):
        torch.manual_seed(height)
        student, teacher = maps(2, 5, height, width), maps(2, 7, height, width)
        distiller = losses.create("nst")
        moved = distiller([scale * student[:, list(order)]], [teacher])
        torch.testing.assert_close(moved, distiller([student], [teacher]), rtol=1e-8, atol=1e-12)


class TestSimilarities:
    def test_sp_and_ickd(self):
        student, teacher = maps(3, 6, 4, 5), maps(3, 6, 2, 2)
        torch.testing.assert_close(losses.create("sp")(student, teacher), relation_loss(student, teacher))
        torch.testing.assert_close(losses.create("ickd")(student, teacher), semantic_loss(student, teacher))

    def test_ickd_with_other_channels(self):
        student, teacher = torch.randn(3, 4, 4, 5), torch.randn(3, 6, 2, 2)
        distiller = losses.create("ickd", student=student, teacher=teacher)
        expected = semantic_loss(distiller.adapters[0](student), teacher)
        torch.testing.assert_close(distiller(student, teacher), expected)


def rows(matrix):
    return matrix / matrix.norm(dim=1, keepdim=True)


def kl_over_axis(student, teacher, axis):
    p, q = teacher.flatten(2).softmax(axis), student.flatten(2).softmax(axis)
    return (p * (p / q).log()).sum() / (student.shape[0] * student.shape[1])


def channel_cross(student, teacher):
    total = 0.0
    for ours, theirs in zip(student.flatten(2), teacher.flatten(2), strict=True):
        total = total + (rows(ours @ ours.T) - rows(ours @ theirs.T)).square().sum()
    return total / (student.shape[0] * student.shape[1])


UNIFIED = {
    "batch_l2": relation_loss,
    "batch_kl": lambda student, teacher: kl_over_axis(student, teacher, 0),
    "channel_l2": semantic_loss,
    "channel_l2_cross": channel_cross,
    "channel_kl": lambda student, teacher: kl_over_axis(student, teacher, 2),
    "att_l2": lambda student, teacher: F.mse_loss(attention(student), attention(teacher)),
}


@pytest.mark.parametrize("mode", UNIFIED)
def test_unified(mode, pair):
    distiller = losses.create("unified", mode=mode)
    torch.testing.assert_close(distiller(*pair), UNIFIED[mode](*pair), rtol=1e-9, atol=1e-12)
    assert checks_gradient(distiller, *pair)


def test_common_size_takes_the_smaller_of_each_axis():
    student, teacher = common_size(maps(2, 3, 4, 9), maps(2, 5, 8, 3))
    assert (student.shape, teacher.shape) == ((2, 3, 4, 3), (2, 5, 4, 3))


def test_unit_vectors_have_no_direction_below_eps():
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-13, 0.0]], requires_grad=True)
    units = unit_vectors(vectors)
    torch.testing.assert_close(units, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.0]]))
    (grad,) = torch.autograd.grad(units.sum(), vectors)
    torch.testing.assert_close(grad, torch.tensor([[0.032, -0.024], [0.0, 0.0], [0.0, 0.0]]))
