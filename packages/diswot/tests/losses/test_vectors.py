"""Losses of pooled vectors against loops over pairs and triples in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from diswot import losses

few = settings(max_examples=30, deadline=None)


@pytest.fixture
def vectors():
    return torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)


def smooth_l1(a, b):
    gap = (a - b).abs()
    return torch.where(gap < 1, gap**2 / 2, gap - 0.5)


def rkd(student, teacher):
    def relations(x):
        size, zero = len(x), x[0].new_zeros(())
        distances = torch.stack([(a - b).norm() if a is not b else zero for a in x for b in x])
        cosines = []
        for i, j, k in itertools.product(range(size), repeat=3):
            a, b = x[j] - x[i], x[k] - x[i]
            cosines.append(a @ b / (a.norm() * b.norm()) if i not in (j, k) else zero)
        return distances / distances[distances > 0].mean(), torch.stack(cosines)

    (distances, cosines), (their_distances, their_cosines) = relations(list(student)), relations(list(teacher))
    return 25 * smooth_l1(distances, their_distances).mean() + 50 * smooth_l1(cosines, their_cosines).mean()


def pkt(student, teacher):
    def probabilities(x):
        kernel = torch.stack([torch.stack([(a @ b / (a.norm() * b.norm()) + 1) / 2 for b in x]) for a in x])
        return kernel / kernel.sum(1, keepdim=True)

    ours, theirs = probabilities(student), probabilities(teacher)
    return (theirs * ((theirs + 1e-7) / (ours + 1e-7)).log()).mean()


def cc(student, teacher):
    delta = (student - teacher).abs()
    return torch.stack([delta[i] @ delta[i + 1] for i in range(len(delta) - 1)]).mean()


DEFINITIONS = {"rkd": rkd, "pkt": pkt}


@pytest.mark.parametrize("name", DEFINITIONS)
class TestRelations:
    def test_reference(self, name, vectors):
        torch.testing.assert_close(losses.create(name)(*vectors), DEFINITIONS[name](*vectors), rtol=1e-8, atol=1e-12)

    def test_gradcheck(self, name, vectors):
        student, teacher = vectors
        distiller = losses.create(name)
        assert gradcheck(lambda each: distiller(each, teacher), student.requires_grad_(), fast_mode=True)

    @few
    @given(st.integers(0, 99), st.permutations(range(5)), st.floats(0.1, 10))
    def test_order_rotation_and_scale_do_not_matter(self, name, seed, order, scale):
        generator = torch.Generator().manual_seed(seed)
        student, teacher = (torch.randn(5, 6, dtype=torch.float64, generator=generator) for _ in range(2))
        rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator)).Q
        distiller = losses.create(name)
        moved = distiller((scale * student @ rotation)[list(order)], teacher[list(order)])
        torch.testing.assert_close(moved, distiller(student, teacher), rtol=1e-8, atol=1e-12)


class TestRKD:
    def test_shift_does_not_matter(self, vectors):
        student, teacher = vectors
        distiller = losses.create("rkd")
        torch.testing.assert_close(distiller(student + 3, teacher - 5), distiller(student, teacher))

    def test_weights(self, vectors):
        parts = [losses.create("rkd", distance_weight=1.0 - i, angle_weight=float(i))(*vectors) for i in range(2)]
        torch.testing.assert_close(losses.create("rkd")(*vectors), 25 * parts[0] + 50 * parts[1])

    def test_all_samples_the_same(self):
        student = torch.ones(4, 3, requires_grad=True)
        loss = losses.create("rkd")(student, torch.randn(4, 3))
        (grad,) = torch.autograd.grad(loss, student)
        assert loss.isfinite()
        assert grad.abs().max() < 1e-3


class TestCC:
    def test_reference(self):
        student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
        distiller = losses.create("cc")
        torch.testing.assert_close(distiller(student, teacher), cc(student, teacher), rtol=1e-10, atol=1e-12)
        assert gradcheck(lambda each: distiller(each, teacher), student.requires_grad_(), fast_mode=True)

    def test_embeddings(self, vectors):
        distiller = losses.create("cc", student=vectors[0], teacher=vectors[1], width=3).double()
        embedded = [distiller.embed_s.linear(vectors[0]), distiller.embed_t.linear(vectors[1])]
        torch.testing.assert_close(distiller(*vectors), cc(*embedded))
        assert [name for name, _ in distiller.named_parameters()] == [
            "embed_s.linear.weight", "embed_s.linear.bias", "embed_t.linear.weight", "embed_t.linear.bias",
        ]  # fmt: skip
        assert losses.create("cc", student=vectors[0], teacher=vectors[1]).embed_t.linear.weight.shape == (128, 4)

    def test_widths_differ(self, vectors):
        with pytest.raises(ValueError, match=r"student \[5, 7\] and teacher \[5, 4\] have 7 and 4 features"):
            losses.create("cc")(*vectors)
