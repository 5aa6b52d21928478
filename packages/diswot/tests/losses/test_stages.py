"""Losses between stages against loops over samples, neurons and vectors in float64."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from diswot import losses
from diswot.losses.stages import VariationalRegressor

LAYOUTS = json.loads((Path(__file__).parents[1] / "golden/state_layout.json").read_text(encoding="utf-8"))


def stages(*shapes):
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


@pytest.fixture
def pair():
    shapes = [(3, 4, 6, 6), (3, 6, 4, 3), (3, 5, 2, 2)]
    return stages(*shapes), stages(*shapes)


def checks_gradient(distiller, student, teacher):
    leaves = [each.requires_grad_() for each in student]
    return gradcheck(lambda *each: distiller(list(each), teacher), leaves, fast_mode=True)


def fsp(student, teacher):
    def flow(first, second):
        size = [min(pair) for pair in zip(first.shape[1:], second.shape[1:], strict=True)]
        a, b = F.adaptive_avg_pool2d(first, size), F.adaptive_avg_pool2d(second, size)
        return torch.stack([torch.stack([(x * y).mean() for y in b]) for x in a])

    total = 0.0
    for i in range(len(student) - 1):
        gaps = [
            flow(student[i][j], student[i + 1][j]) - flow(teacher[i][j], teacher[i + 1][j])
            for j in range(len(student[0]))
        ]
        total = total + torch.stack(gaps).square().mean()
    return total


def ab(student, teacher, margin=1.0):
    total = 0.0
    for i, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        weight = 2.0 ** (i - len(student) + 1) * 3 / 1000 / len(ours)
        for s, t in zip(ours.flatten().tolist(), theirs.flatten().tolist(), strict=True):
            if s > -margin and t <= 0:
                total += weight * (s + margin) ** 2
            if s <= margin and t > 0:
                total += weight * (s - margin) ** 2
    return torch.tensor(total, dtype=torch.float64)


def rmi(student, teacher):
    total = 0.0
    for maps in zip(student, teacher, strict=True):
        size = len(maps[0])
        centre = np.eye(size) - 1 / size
        k, m = (centre @ x @ x.T @ centre for x in (each.flatten(1).numpy() for each in maps))
        total += 1 - (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    return torch.tensor(total)


def kdsvd(student, teacher):
    """Differentiates through the decompositions."""
    total = 0.0
    for j in range(len(student[0])):
        vectors = []
        for maps, targets in zip(student, teacher, strict=True):
            target = torch.linalg.svd(targets.flatten(2).mT, full_matrices=False).Vh[j, 0]
            candidates = torch.linalg.svd(maps.flatten(2).mT, full_matrices=False).Vh[j, :4]
            cosines = candidates @ target
            best = int(cosines.abs().argmax())
            vectors.append((candidates[best] * cosines[best].detach().sign(), target))
        for (a, a_t), (b, b_t) in itertools.pairwise(vectors):
            ours, theirs = (torch.exp(-((x[:, None] - y[None]) ** 2) / 8) for x, y in ((a, b), (a_t, b_t)))
            total = total + (ours - theirs).square().sum() / len(student[0])
    return total


class TestFSP:
    def test_reference(self, pair):
        distiller = losses.create("fsp")
        torch.testing.assert_close(distiller(*pair), fsp(*pair), rtol=1e-10, atol=1e-12)
        assert checks_gradient(distiller, *pair)

    def test_sizes_of_student_and_teacher_may_differ(self):
        student, teacher = stages((2, 3, 8, 8), (2, 4, 4, 4)), stages((2, 3, 5, 5), (2, 4, 5, 5))
        torch.testing.assert_close(losses.create("fsp")(student, teacher), fsp(student, teacher))

    def test_adapters(self, pair):
        student = [each[:, :2].float() for each in pair[0]]
        teacher = [each.float() for each in pair[1]]
        distiller = losses.create("fsp", student=student, teacher=teacher)
        adapted = [adapter(each) for adapter, each in zip(distiller.adapters, student, strict=True)]
        torch.testing.assert_close(distiller(student, teacher), fsp(adapted, teacher))


class TestAB:
    @pytest.mark.parametrize("margin", [1.0, 0.25])
    def test_reference(self, pair, margin):
        distiller = losses.create("ab", margin=margin)
        torch.testing.assert_close(distiller(*pair), ab(*pair, margin), rtol=1e-10, atol=1e-12)
        assert checks_gradient(distiller, *pair)

    def test_the_right_side_of_the_margin_costs_nothing(self):
        teacher = stages((2, 3, 4, 4))
        assert losses.create("ab")([2 * teacher[0].sign()], teacher) == 0


class TestRMI:
    def test_reference(self, pair):
        distiller = losses.create("rmi")
        torch.testing.assert_close(distiller(*pair), rmi(*pair), rtol=1e-9, atol=1e-12)
        assert checks_gradient(distiller, *pair)

    def test_shift_scale_and_shape_do_not_matter(self, pair):
        student, teacher = pair
        moved = [3 * each.transpose(1, 2) + 2 for each in student]
        torch.testing.assert_close(losses.create("rmi")(moved, teacher), losses.create("rmi")(student, teacher))

    def test_constant_batches(self):
        constant, other = [torch.ones(3, 2, 2, 2)], [torch.randn(3, 2, 2, 2)]
        distiller = losses.create("rmi")
        assert distiller(constant, constant) == 0
        torch.testing.assert_close(distiller(constant, other), torch.tensor(0.5))


class TestVID:
    def test_reference(self, pair):
        distiller = losses.create("vid", student=pair[0], teacher=pair[1]).double()
        expected = 0.0
        for regressor, student, teacher in zip(distiller.regressors, *pair, strict=True):
            variance = (1 + regressor.log_scale.exp()).log() + 1e-5
            x = student
            for i in (0, 2, 4):
                x = torch.einsum("bchw,dc->bdhw", x, regressor.regressor[i].weight[:, :, 0, 0])
                x = x.clamp_min(0) if i < 4 else x
            for c in range(teacher.shape[1]):
                gap = ((x[:, c] - teacher[:, c]) ** 2 / variance[c] + variance[c].log()) / 2
                expected = expected + gap.mean() / teacher.shape[1]
        torch.testing.assert_close(distiller(*pair), expected, rtol=1e-10, atol=1e-12)
        assert checks_gradient(distiller, *pair)

    def test_variance_is_5_at_first(self):
        regressor = VariationalRegressor(3, 4)
        torch.testing.assert_close(F.softplus(regressor.log_scale) + 1e-5, torch.full((4,), 5.0))

    def test_official_keys(self):
        layout = {key.removeprefix("vid."): shape for key, shape in LAYOUTS["losses"].items() if key.startswith("vid.")}
        hidden, channels = layout["regressor.0.weight"][:2]
        state = VariationalRegressor(channels, hidden).state_dict()
        assert {key: list(value.shape) for key, value in state.items()} == layout

    def test_larger_map_is_pooled(self):
        student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 4, 4)
        regressor = VariationalRegressor(3, 4)
        torch.testing.assert_close(regressor(student, teacher), regressor(F.avg_pool2d(student, 2), teacher))


class TestKDSVD:
    def test_reference(self, pair):
        distiller = losses.create("kdsvd")
        torch.testing.assert_close(distiller(*pair), kdsvd(*pair), rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize(
        "shapes",
        [[(3, 4, 6, 6), (3, 6, 4, 3)], [(2, 9, 2, 2), (2, 7, 1, 2)], [(2, 3, 2, 2), (2, 8, 1, 1), (2, 2, 3, 3)]],
        ids=["square", "few-positions", "few-channels"],
    )
    def test_gradient_is_that_through_the_decomposition(self, shapes):
        student, teacher = stages(*shapes), stages(*shapes)
        leaves = [each.requires_grad_() for each in student]
        ours, expected = (
            torch.autograd.grad(loss(student, teacher), leaves) for loss in (losses.create("kdsvd"), kdsvd)
        )
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-10)
        assert checks_gradient(losses.create("kdsvd"), student, teacher)

    def test_equal_singular_values(self):
        """Where the gradient through a decomposition divides by zero."""
        student = [torch.eye(4).reshape(1, 4, 2, 2).requires_grad_(), torch.randn(1, 4, 2, 2).requires_grad_()]
        teacher = [torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)]
        grads = torch.autograd.grad(losses.create("kdsvd")(student, teacher), student)
        assert all(grad.isfinite().all() and grad.abs().max() < 10 for grad in grads)

    def test_scale_does_not_matter(self, pair):
        student, teacher = pair
        distiller = losses.create("kdsvd")
        torch.testing.assert_close(distiller([5 * each for each in student], teacher), distiller(student, teacher))
