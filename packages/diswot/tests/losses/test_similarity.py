"""Relation and semantic loss against their dense definitions in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from diswot.similarity import relation_loss, semantic_loss
from visionkernels.testing.ops import TOLERANCES

few = settings(max_examples=40, deadline=None)
# from rows far above the clamp of 1e-12 to rows far below
scales = st.sampled_from([30.0, 1.0, 1e-3, 1e-5, 1e-6, 3e-7, 1e-7, 1e-9, 0.0])


def unit_rows(matrix):
    return matrix / torch.linalg.vector_norm(matrix, dim=-1, keepdim=True).clamp_min(1e-12)


def dense_semantic(student, teacher):
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        f, g = ours.reshape(len(ours), -1), theirs.reshape(len(theirs), -1)
        total = total + (unit_rows(f @ f.T) - unit_rows(g @ g.T)).square().sum()
    return total / (student.shape[0] * student.shape[1])


def dense_relation(student, teacher):
    f, g = (each.reshape(len(each), -1) for each in (student, teacher))
    return (unit_rows(f @ f.T) - unit_rows(g @ g.T)).square().sum() / len(f) ** 2


def with_gradients(loss, *features):
    """Return the loss, and each gradient times its feature: what is relative of it has no rounding of 1 / feature."""
    leaves = [each.detach().clone().requires_grad_() for each in features]
    value = loss(*leaves)
    grads = torch.autograd.grad(value, leaves)
    return value.detach(), [
        grad * torch.where(leaf == 0, 1.0, leaf.detach()) for grad, leaf in zip(grads, leaves, strict=True)
    ]


def assert_same(ours, expected, *, rtol, atol):
    torch.testing.assert_close(ours[0], expected[0], rtol=rtol, atol=atol)
    for grad, wanted in zip(ours[1], expected[1], strict=True):
        # small elements are sums of large ones
        torch.testing.assert_close(grad, wanted, rtol=rtol, atol=atol * max(1.0, float(wanted.abs().max())))


@st.composite
def pairs(draw, same_positions=False):
    """Features [n, C, P] of a student and a teacher, with rows, channels and items of very different length."""
    torch.manual_seed(draw(st.integers(0, 999)))
    items, channels = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    positions = draw(st.sampled_from([1, 1, 2, 3, 8, 30]))
    others = positions if same_positions else draw(st.sampled_from([positions, positions, 1, 2, 5]))
    both = []
    for count in (positions, others):
        features = torch.randn(items, channels, count, dtype=torch.float64) * draw(scales)
        features[draw(st.integers(0, items - 1))] *= draw(scales)
        features[:, draw(st.integers(0, channels - 1))] *= draw(scales)
        both.append(features)
    return both


SHAPES = {
    "P1": ((7, 13), (7, 13)),
    "P1-trailing": ((5, 16, 1, 1), (5, 16, 1, 1)),
    "thin": ((3, 31, 2, 3), (3, 31, 2, 3)),
    "thin-unequal": ((3, 31, 2, 2), (3, 31, 3)),
    "P1-and-map": ((3, 17), (3, 17, 2, 2)),
    "square": ((3, 9, 3, 3), (3, 9, 3, 3)),
    "wide": ((2, 5, 4, 7), (2, 5, 3, 3)),
    "one-channel": ((4, 1), (4, 1)),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def features(request):
    return [torch.randn(*shape, dtype=torch.float64) for shape in request.param]


class TestSemanticLoss:
    def test_reference(self, features):
        assert_same(
            with_gradients(semantic_loss, *features), with_gradients(dense_semantic, *features), rtol=1e-10, atol=1e-12
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_lower_precision(self, features, dtype):
        rounded = [each.to(dtype) for each in features]
        loss = semantic_loss(*rounded)
        assert loss.dtype == torch.float32
        rtol, atol = TOLERANCES[torch.float32][1]
        torch.testing.assert_close(
            loss.double(), dense_semantic(*(each.double() for each in rounded)), rtol=rtol, atol=atol
        )

    @few
    @given(pairs())
    def test_any_length_of_rows(self, both):
        assert_same(with_gradients(semantic_loss, *both), with_gradients(dense_semantic, *both), rtol=1e-8, atol=1e-11)

    @few
    @given(pairs())
    def test_float32_is_finite_and_in_range(self, both):
        value, grads = with_gradients(semantic_loss, *(each.float() for each in both))
        assert -1e-6 <= value <= 4 + 1e-5
        assert all(grad.isfinite().all() for grad in grads)

    @few
    @given(pairs(same_positions=True), st.randoms(use_true_random=False))
    def test_order_of_channels_does_not_matter(self, both, random):
        order = random.sample(range(both[0].shape[1]), both[0].shape[1])
        permuted = semantic_loss(*(each[:, order] for each in both))
        torch.testing.assert_close(permuted, semantic_loss(*both), rtol=1e-8, atol=1e-11)

    def test_length_and_sign_of_a_vector_do_not_matter(self):
        student, teacher = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
        torch.testing.assert_close(semantic_loss(-3 * student, teacher), semantic_loss(student, teacher))

    def test_vectors_that_are_nearly_the_same(self):
        student = torch.randn(6, 40)
        teacher = student + 1e-4 * torch.randn(6, 40)
        exact = dense_semantic(student.double(), teacher.double())
        assert exact < 1e-6
        torch.testing.assert_close(semantic_loss(student, teacher).double(), exact, rtol=1e-3, atol=0)
        assert semantic_loss(student, student) == 0

    def test_saturated_gradient(self):
        """Rows of a classifier gradient that fell under the clamp, as 6 to 48 % do with normal weights."""
        student, teacher = (torch.randn(100, 64) * 10.0 ** -torch.arange(100)[:, None].clamp_max(30) for _ in range(2))
        exact = dense_semantic(student.double(), teacher.double())
        torch.testing.assert_close(semantic_loss(student, teacher).double(), exact, rtol=1e-5, atol=1e-7)

    def test_gradcheck(self, features):
        leaves = [each.requires_grad_() for each in features]
        assert gradcheck(semantic_loss, leaves, fast_mode=True)

    @pytest.mark.parametrize("shape", [(3, 8), (3, 16, 2, 2), (3, 4, 3, 3)], ids=["vectors", "thin", "dense"])
    @pytest.mark.parametrize("zero", ["student", "teacher", "both"])
    def test_zero(self, shape, zero):
        student = torch.zeros(shape) if zero != "teacher" else torch.randn(shape)
        teacher = torch.zeros(shape) if zero != "student" else torch.randn(shape)
        value, grads = with_gradients(semantic_loss, student, teacher)
        assert value == pytest.approx(0.0 if zero == "both" else 1.0)
        assert all(grad.isfinite().all() for grad in grads)
        assert grads[zero == "teacher"].abs().max() == 0

    def test_autocast(self):
        student, teacher = torch.randn(3, 16, 2, 2), torch.randn(3, 16, 2, 2)
        with torch.autocast("cpu", torch.bfloat16):
            loss = semantic_loss(student, teacher)
        torch.testing.assert_close(loss, semantic_loss(student, teacher), rtol=0, atol=0)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"have 64 and 256 channels.*relation.*project=\"pad\".*\"class_gram\""):
            semantic_loss(torch.zeros(10, 64), torch.zeros(10, 256))
        with pytest.raises(ValueError, match=r"\[10, 64\].*\[100, 64\] have 10 and 100 items \(classes or samples\)"):
            semantic_loss(torch.zeros(10, 64), torch.zeros(100, 64))
        with pytest.raises(ValueError, match=r"student \[4\] and teacher \[4\] must be \[items, channels"):
            semantic_loss(torch.zeros(4), torch.zeros(4))


class TestRelationLoss:
    @pytest.mark.parametrize("shapes", [((6, 8, 3, 3), (6, 4, 5, 5)), ((5, 7), (5, 3)), ((1, 4), (1, 9))], ids=str)
    def test_reference(self, shapes):
        both = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
        assert_same(with_gradients(relation_loss, *both), with_gradients(dense_relation, *both), rtol=1e-10, atol=1e-12)
        assert gradcheck(relation_loss, [each.requires_grad_() for each in both], fast_mode=True)

    @few
    @given(pairs())
    def test_any_length_of_rows(self, both):
        assert_same(with_gradients(relation_loss, *both), with_gradients(dense_relation, *both), rtol=1e-8, atol=1e-11)

    @few
    @given(pairs(same_positions=True), st.randoms(use_true_random=False))
    def test_order_of_samples_and_of_features_does_not_matter(self, both, random):
        samples, channels = (random.sample(range(size), size) for size in both[0].shape[:2])
        permuted = relation_loss(both[0][samples][:, channels], both[1][samples])
        torch.testing.assert_close(permuted, relation_loss(*both), rtol=1e-8, atol=1e-11)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_lower_precision(self, dtype):
        rounded = [torch.randn(8, 16, 4, 4).to(dtype) for _ in range(2)]
        exact = dense_relation(*(each.double() for each in rounded))
        torch.testing.assert_close(relation_loss(*rounded).double(), exact, rtol=1e-4, atol=1e-7)

    def test_rotation_and_scale_do_not_matter(self):
        student, teacher = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
        rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
        torch.testing.assert_close(relation_loss(7 * student @ rotation, teacher), relation_loss(student, teacher))

    def test_one_sample_and_zeros(self):
        assert relation_loss(torch.randn(1, 4), torch.randn(1, 9)) == pytest.approx(0, abs=1e-12)
        value, grads = with_gradients(relation_loss, torch.zeros(4, 3), torch.randn(4, 3))
        assert value == pytest.approx(0.25)
        assert grads[0].abs().max() == 0

    def test_errors(self):
        with pytest.raises(ValueError, match=r"student \[4, 2\] and teacher \[5, 2\] must be features of the same"):
            relation_loss(torch.zeros(4, 2), torch.zeros(5, 2))
        with pytest.raises(ValueError, match=r"student \[4\]"):
            relation_loss(torch.zeros(4), torch.zeros(4))


@pytest.mark.parametrize("loss", [relation_loss, semantic_loss])
@pytest.mark.parametrize("shape", [(4, 8), (4, 16, 2, 2), (4, 4, 3, 3)], ids=["vectors", "thin", "dense"])
def test_compile(loss, shape):
    both = [torch.randn(shape) for _ in range(2)]
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert_same(with_gradients(compiled, *both), with_gradients(loss, *both), rtol=1e-5, atol=1e-7)
