"""Contrastive distillation against a loop over samples and candidates in float64."""

import json
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from diswot import losses
from diswot.losses.contrastive import CRD, ContrastMemory, contrastive_loss

LAYOUT = json.loads((Path(__file__).parents[1] / "golden/state_layout.json").read_text(encoding="utf-8"))["crd_full"]


class Definition:
    """The formula, its memories as lists of rows."""

    def __init__(self, distiller, num_samples, temperature=0.07, momentum=0.5):
        self.embed = distiller.embed_s.linear, distiller.embed_t.linear
        self.memories = [
            list(memory.clone()) for memory in (distiller.contrast.memory_v1, distiller.contrast.memory_v2)
        ]
        self.z = [None, None]
        self.num_samples, self.temperature, self.momentum = num_samples, temperature, momentum

    def __call__(self, student, teacher, contrast_index):
        v = [
            [unit(row) for row in embed(features)]
            for embed, features in zip(self.embed, (student, teacher), strict=True)
        ]
        loss = 0.0
        for i in range(2):
            memory = self.memories[1 - i]
            o = torch.stack([
                torch.stack([(memory[j] @ v[i][b] / self.temperature).exp() for j in row])
                for b, row in enumerate(contrast_index.tolist())
            ])  # fmt: skip
            if self.z[i] is None:
                self.z[i] = o.mean().detach() * self.num_samples
            o = o / self.z[i]
            p = (o.shape[1] - 1) / self.num_samples
            loss = loss - (o[:, 0] / (o[:, 0] + p + 1e-7)).log().sum() / len(o)
            loss = loss - (p / (o[:, 1:] + p + 1e-7)).log().sum() / len(o)
        for b, j in enumerate(contrast_index[:, 0].tolist()):
            for i in range(2):
                row = self.momentum * self.memories[i][j] + (1 - self.momentum) * v[i][b].detach()
                self.memories[i][j] = unit(row)
        return loss


def unit(row):
    return row / row.norm()


def build(num_samples=20, num_negatives=6, **options):
    student, teacher = torch.zeros(5, 4), torch.zeros(5, 7)
    return losses.create(
        "crd", student=student, teacher=teacher, num_samples=num_samples, width=3, num_negatives=num_negatives,
        **options,
    )  # fmt: skip


def inputs(num_samples=20, num_negatives=6, dtype=torch.float64):
    student, teacher = torch.randn(5, 4, dtype=dtype), torch.randn(5, 7, dtype=dtype)
    index = torch.randperm(num_samples)[:5]
    drawn = torch.randint(num_samples, (5, num_negatives))
    return student, teacher, index, torch.cat([index[:, None], drawn], 1)


class TestCRD:
    # of 20 samples all products are taken, of 200 only those with the drawn
    @pytest.mark.parametrize("num_samples", [20, 200])
    @pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "momentum": 0.9}], ids=["default", "other"])
    def test_reference(self, num_samples, options):
        distiller = build(num_samples, **options).double()
        definition = Definition(distiller, num_samples, **options)
        for _ in range(3):
            student, teacher, index, contrast_index = inputs(num_samples)
            leaf = student.requires_grad_()
            leaves = [leaf, *distiller.parameters()]
            loss, expected = distiller(leaf, teacher, index, contrast_index), definition(leaf, teacher, contrast_index)
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(
                torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), rtol=1e-6, atol=1e-9
            )
        memories = [torch.stack(rows) for rows in definition.memories]
        torch.testing.assert_close([distiller.contrast.memory_v1, distiller.contrast.memory_v2], memories)
        torch.testing.assert_close(distiller.contrast.params[2:4], torch.stack(definition.z))

    def test_gradcheck(self):
        distiller = build().double().eval()
        student, teacher, index, contrast_index = inputs()
        distiller(student, teacher, index, contrast_index)
        assert gradcheck(
            lambda each: distiller(each, teacher, index, contrast_index), student.requires_grad_(), fast_mode=True
        )

    def test_official_keys(self):
        width, student_width = LAYOUT["embed_s.linear.weight"]
        _, teacher_width = LAYOUT["embed_t.linear.weight"]
        num_samples = LAYOUT["contrast.memory_v1"][0]
        state = CRD(student_width, teacher_width, num_samples, width=width).state_dict()
        assert {key: list(value.shape) for key, value in state.items()} == LAYOUT

    def test_params_as_initialised(self):
        distiller = losses.create("crd", student=torch.zeros(5, 4), teacher=torch.zeros(5, 7), num_samples=20)
        torch.testing.assert_close(distiller.contrast.params, torch.tensor([16384, 0.07, -1, -1, 0.5]))
        assert distiller.embed_s.linear.weight.shape == (128, 4)
        # uniform rows of length 1 on average
        assert distiller.contrast.memory_v1.square().sum(1).mean() == pytest.approx(1, abs=0.05)

    def test_evaluation_leaves_the_memory(self):
        distiller = build().double().eval()
        before = distiller.contrast.memory_v1.clone()
        distiller(*inputs())
        torch.testing.assert_close(distiller.contrast.memory_v1, before, rtol=0, atol=0)

    def test_training_moves_the_rows_of_the_batch_only(self):
        distiller = build().double()
        before = distiller.contrast.memory_v2.clone()
        student, teacher, index, contrast_index = inputs()
        distiller(student, teacher, index, contrast_index)
        moved = (distiller.contrast.memory_v2 != before).any(1).nonzero().flatten()
        assert set(moved.tolist()) == set(index.tolist())
        torch.testing.assert_close(distiller.contrast.memory_v2[index].norm(dim=1), torch.ones(5, dtype=torch.float64))

    def test_draws(self):
        memory = ContrastMemory(50, 4, num_negatives=4000, temperature=0.07, momentum=0.5)
        index = torch.tensor([3, 49])
        places = memory.draw(index)
        assert places.shape == (2, 4001)
        assert places[:, 0].tolist() == [3, 49]
        counts = torch.bincount(places[:, 1:].flatten(), minlength=50)
        # 160 expected of each, with a standard deviation of 12.5
        assert counts.shape == (50,)
        assert counts.min() > 100
        assert counts.max() < 220

    def test_compile(self):
        distiller = build().float()
        student, teacher, index, contrast_index = inputs(dtype=torch.float32)
        distiller(student, teacher, index, contrast_index)
        distiller.eval()
        expected = distiller(student, teacher, index, contrast_index)
        compiled = torch.compile(distiller, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(student, teacher, index, contrast_index), expected)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"index": torch.arange(4)}, r"index \[4\] must have the 5 samples"),
            ({"index": torch.arange(16, 21)}, "index from 16 to 20 must be in 0 to 19, num_samples - 1"),
            ({"contrast_index": torch.full((5, 3), -1)}, "contrast_index from -1 to -1 must be in 0 to 19"),
            ({"contrast_index": torch.zeros(4, 3, dtype=torch.long)}, r"contrast_index \[4, 3\] must be \[5, 1 \+ neg"),
            ({"contrast_index": torch.zeros(5, 1, dtype=torch.long)}, r"contrast_index \[5, 1\] must be \[5, 1 \+ neg"),
        ],
    )
    def test_errors(self, change, message):
        given = dict(zip(("student", "teacher", "index", "contrast_index"), inputs(), strict=True))
        with pytest.raises(ValueError, match=message):
            build().double()(**{**given, **change})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
            ({"momentum": 1.5}, r"momentum=1.5 in \[0, 1\]"),
            ({"num_negatives": 0}, "num_negatives=0 must be at least 1"),
            ({"num_samples": 0}, "num_samples=0 and"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            build(**options)


def test_contrastive_loss_of_known_scores():
    scores = torch.tensor([[0.5, 0.1, 0.2]], dtype=torch.float64)
    c = 2 / 10
    expected = -torch.log(torch.tensor([0.5 / (0.5 + c), c / (0.1 + c), c / (0.2 + c)], dtype=torch.float64)).sum()
    torch.testing.assert_close(contrastive_loss(scores, 10), expected, rtol=1e-6, atol=0)


def test_unit_embeddings():
    """The scale of the embedding's output does not matter."""
    distiller = build().double().eval()
    student, teacher, index, contrast_index = inputs()
    first = distiller(student, teacher, index, contrast_index)
    with torch.no_grad():
        for parameter in distiller.embed_s.parameters():
            parameter.mul_(3)
    torch.testing.assert_close(distiller(student, teacher, index, contrast_index), first)
    assert F.normalize(distiller.embed_s(student)).norm(dim=1).allclose(torch.ones(5, dtype=torch.float64))
