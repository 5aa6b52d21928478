"""Specific distillation: the losses by their definitions, and the distiller's two models."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from g2sd.specific import SpecificDistiller, hard_distillation_loss, relation_loss, soft_distillation_loss
from visionkernels.ops.nkd_loss import nkd_loss


def log_softmax(rows):
    rows = rows - rows.max(-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def logits(batch=6, classes=5, dtype=torch.float64):
    return [(2 * torch.randn(batch, classes)).to(dtype) for _ in range(3)]


def targets(batch=6, classes=5):
    labels = torch.arange(batch) % classes
    return {"labels": labels, "mixed": (torch.rand(batch, classes) ** 4).softmax(1).double()}


def cross_entropy(rows, target):
    if target.ndim == 1:
        target = F.one_hot(target, rows.shape[1])
    return -(target.numpy() * log_softmax(rows.numpy())).sum(1).mean()


BAD = [
    # target, message
    (torch.tensor([0, 1, 5]), "target reaches from 0 to 5; there are 5 classes"),
    (torch.tensor([-1, 1, 2]), "target reaches from -1 to 2; there are 5 classes"),
    (torch.tensor([0.0, 1.0, 2.0]), r"target is torch.float32 \[3\]; it must be class indices \[3\], or probabilities"),
    (torch.tensor([0, 1]), r"target is torch.int64 \[2\]"),
    (torch.zeros(3, 4), r"target is torch.float32 \[3, 4\]"),
    (torch.zeros(3, 5, dtype=torch.int64), r"target is torch.int64 \[3, 5\]"),
]


@pytest.mark.parametrize("loss", [hard_distillation_loss, soft_distillation_loss])
class TestBothLosses:
    def test_gradcheck(self, loss):
        ours, distillation, teacher = logits()
        for target in targets().values():
            inputs = [each.clone().requires_grad_() for each in (ours, distillation)]
            assert torch.autograd.gradcheck(lambda *pair, target=target: loss(*pair, teacher, target), inputs)

    def test_teacher_has_no_gradient(self, loss):
        ours, distillation, teacher = (each.requires_grad_() for each in logits())
        loss(ours, distillation, teacher, targets()["mixed"]).backward()
        assert teacher.grad is None and ours.grad is not None and distillation.grad is not None

    def test_one_hot(self, loss):
        """A label is the mixed target that names it alone."""
        labels = targets()["labels"]
        triple = logits()
        torch.testing.assert_close(loss(*triple, labels), loss(*triple, F.one_hot(labels, 5).double()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_precision(self, loss, dtype):
        triple = logits(dtype=dtype)
        found = loss(*triple, targets()["labels"])
        assert found.dtype == torch.float32
        wanted = loss(*(each.double() for each in triple), targets()["labels"])
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(loss(*triple, targets()["labels"]), found)

    def test_far_apart(self, loss):
        """Loss and gradient stay finite however far logits lie apart."""
        ours = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
        found = loss(ours, ours, torch.tensor([[-1e4, 1e4, 0.0]]), torch.tensor([1]))
        found.backward()
        assert found.isfinite() and ours.grad.isfinite().all()

    def test_one_sample(self, loss):
        assert loss(*logits(1), torch.tensor([4])).isfinite()

    @pytest.mark.parametrize(("target", "message"), BAD)
    def test_errors(self, loss, target, message):
        with pytest.raises(ValueError, match=message):
            loss(*logits(3), target)

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_shapes(self, loss, place):
        triple = logits(3)
        triple[place] = triple[place][:, :4]
        with pytest.raises(
            ValueError, match=r"class_logits \[3, \d\], .*teacher_logits .* must all be \[batch, classes"
        ):
            loss(*triple, torch.tensor([0, 1, 2]))

    def test_not_two_axes(self, loss):
        with pytest.raises(ValueError, match=r"must all be \[batch, classes\]"):
            loss(*(each[0] for each in logits(3)), torch.tensor([0]))

    def test_empty(self, loss):
        with pytest.raises(ValueError, match="the batch is empty"):
            loss(*logits(0), torch.zeros(0, dtype=torch.int64))


class TestHardDistillationLoss:
    @pytest.mark.parametrize("kind", ["labels", "mixed"])
    def test_definition(self, kind):
        ours, distillation, teacher = logits()
        target = targets()[kind]
        wanted = (cross_entropy(ours, target) + cross_entropy(distillation, teacher.argmax(1))) / 2
        assert hard_distillation_loss(ours, distillation, teacher, target).item() == pytest.approx(wanted)

    @given(st.floats(0.1, 10), st.floats(-5, 5))
    def test_only_the_best_class_counts(self, scale, shift):
        ours, distillation, teacher = logits()
        losses = [
            hard_distillation_loss(ours, distillation, each, targets()["labels"])
            for each in (teacher, scale * teacher + shift)
        ]
        torch.testing.assert_close(*losses)


class TestSoftDistillationLoss:
    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    @pytest.mark.parametrize("kind", ["labels", "mixed"])
    def test_definition(self, kind, temperature):
        ours, distillation, teacher = logits()
        target = targets()[kind]
        told, said = (log_softmax(each.numpy() / temperature) for each in (teacher, distillation))
        divergence = temperature**2 * (np.exp(told) * (told - said)).sum(1).mean()
        found = soft_distillation_loss(ours, distillation, teacher, target, temperature=temperature)
        assert found.item() == pytest.approx((cross_entropy(ours, target) + divergence) / 2)

    def test_least_value(self):
        """A student that agrees loses the labels' part alone."""
        ours, _, teacher = logits()
        labels = targets()["labels"]
        found = soft_distillation_loss(ours, teacher + 1, teacher, labels)
        assert found.item() == pytest.approx(cross_entropy(ours, labels) / 2)

    @pytest.mark.parametrize("temperature", [0.0, -1.0])
    def test_temperature(self, temperature):
        with pytest.raises(ValueError, match=f"temperature={temperature} must be above 0"):
            soft_distillation_loss(*logits(), targets()["labels"], temperature=temperature)


def layers(count, channels, dtype=torch.float64):
    return [tuple(torch.randn(2, 4, channels).to(dtype) for _ in range(3)) for _ in range(count)]


class TestRelationLoss:
    @pytest.mark.parametrize("num_heads", [1, 2])
    def test_definition(self, num_heads):
        """By loops over layers, pairs, samples, heads and queries."""
        student, teacher = layers(2, 6, torch.float32), layers(2, 8, torch.float32)
        values = []
        for ours, theirs in zip(student, teacher, strict=True):
            for i in range(3):
                for j in range(3):
                    for sample in range(2):
                        for head in range(num_heads):
                            rows = []
                            for layer in (theirs, ours):
                                size = layer[0].shape[2] // num_heads
                                left, right = (layer[k][sample, :, head * size : (head + 1) * size] for k in (i, j))
                                rows.append(log_softmax((left @ right.T).numpy().astype(float) / size**0.5))
                            values += (np.exp(rows[0]) * (rows[0] - rows[1])).sum(1).tolist()
        found = relation_loss(student, teacher, num_heads=num_heads)
        assert found.item() == pytest.approx(np.mean(values), rel=1e-5)

    def test_gradients(self):
        student, teacher = layers(1, 6, torch.float32), layers(1, 6, torch.float32)
        for each in (*student[0], *teacher[0]):
            each.requires_grad_()
        relation_loss(student, teacher, num_heads=3).backward()
        assert all(each.grad.norm() > 0 for each in student[0])
        assert all(each.grad is None for each in teacher[0])

    def test_equal(self):
        layer = layers(1, 6)
        assert relation_loss(layer, layer, num_heads=2).item() == pytest.approx(0, abs=1e-6)

    def test_autocast(self):
        student, teacher = layers(1, 6, torch.float32), layers(1, 8, torch.float32)
        wanted = relation_loss(student, teacher, num_heads=2)
        with torch.autocast("cpu", torch.bfloat16):
            found = relation_loss(student, teacher, num_heads=2)
        torch.testing.assert_close(found, wanted)

    def test_errors(self):
        with pytest.raises(ValueError, match="student has 1 layers and teacher 2"):
            relation_loss(layers(1, 6), layers(2, 6), num_heads=1)
        with pytest.raises(ValueError, match="student has 0 layers"):
            relation_loss([], [], num_heads=1)
        with pytest.raises(ValueError, match="num_heads=4 must be a divisor of 6 channels"):
            relation_loss(layers(1, 6), layers(1, 8), num_heads=4)
        with pytest.raises(ValueError, match="num_heads=0 must be a divisor"):
            relation_loss(layers(1, 6), layers(1, 6), num_heads=0)
        fewer = [tuple(each[:, :3] for each in layers(1, 6)[0])]
        with pytest.raises(ValueError, match="student has 4 tokens, the teacher 3"):
            relation_loss(layers(1, 6), fewer, num_heads=1)


class TestSpecificDistiller:
    @pytest.fixture
    def models(self, vit):
        student, teacher = vit(), vit(distilled=False, drop_path_rate=0.5)
        for head in student.get_classifier():
            torch.nn.init.normal_(head.weight)
        return student, teacher

    @pytest.mark.parametrize("kind", ["labels", "mixed"])
    @pytest.mark.parametrize("mode", ["hard", "soft", "nkd"])
    def test_definition(self, models, mode, kind):
        student, teacher = models
        distiller = SpecificDistiller(student, teacher, mode=mode, temperature=2.0, alpha=1.5).train()
        images, target = torch.randn(6, 3, 32, 32), targets()[kind]
        loss, found = distiller(images, target)
        class_logits, distillation_logits = student(images)
        told = teacher(images)
        wanted = {
            "hard": lambda: hard_distillation_loss(class_logits, distillation_logits, told, target),
            "soft": lambda: soft_distillation_loss(class_logits, distillation_logits, told, target, temperature=2.0),
            "nkd": lambda: nkd_loss(
                class_logits, told, target.argmax(1) if kind == "mixed" else target, alpha=1.5, temperature=2.0
            ),
        }[mode]()
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(found, class_logits)

    @pytest.mark.parametrize("mode", ["hard", "soft", "nkd"])
    def test_gradients(self, models, mode):
        """The teacher gets none; with NKD neither does the other head, which is frozen then."""
        student, teacher = models
        distiller = SpecificDistiller(student, teacher, mode=mode).train()
        distiller(torch.randn(6, 3, 32, 32), targets()["labels"])[0].backward()
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
        without = {name for name, parameter in student.named_parameters() if parameter.grad is None}
        assert without == ({"head_dist.weight", "head_dist.bias"} if mode == "nkd" else set())
        assert all(student.get_parameter(name).requires_grad != (name in without) for name in without)

    def test_teacher_stays(self, models):
        student, teacher = models
        distiller = SpecificDistiller(student, teacher).train()
        assert student.training and not any(module.training for module in teacher.modules())
        images = torch.randn(2, 3, 32, 32)
        losses = [distiller(images, torch.tensor([0, 1]))[0] for _ in range(2)]
        torch.testing.assert_close(*losses)  # a teacher in training would drop half of its blocks

    @pytest.mark.parametrize(("mode", "head"), [("hard", "mean"), ("soft", "mean"), ("nkd", "class")])
    def test_evaluation(self, models, mode, head):
        student, teacher = models
        SpecificDistiller(student, teacher, mode=mode)
        images = torch.randn(2, 3, 32, 32)
        tokens = student.eval().forward_features(images)
        pair = student.head(tokens[:, 0]), student.head_dist(tokens[:, 1])
        torch.testing.assert_close(student(images), pair[0] if head == "class" else sum(pair) / 2)

    def test_student_without_heads(self, vit, models):
        """NKD teaches any classifier."""
        student = vit(distilled=False)
        distiller = SpecificDistiller(student, models[1], mode="nkd").train()
        loss, found = distiller(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
        loss.backward()
        assert found.shape == (2, 5) and student.head.weight.grad.norm() > 0

    def test_autocast(self, models):
        student, teacher = models
        distiller = SpecificDistiller(student, teacher).train()
        images, target = torch.randn(6, 3, 32, 32), targets()["labels"]
        wanted = distiller(images, target)[0]
        with torch.autocast("cpu", torch.bfloat16):
            found = distiller(images, target)[0]
        assert found.dtype == torch.float32
        # a class of the teacher may change places where two are nearly as good, the loss with it
        torch.testing.assert_close(found, wanted, rtol=0.1, atol=0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "warm"}, "mode='warm' must be one of 'hard', 'soft', 'nkd'"),
            ({"temperature": 0}, "temperature=0 must be above 0"),
            ({"alpha": -1}, "alpha=-1 must be at least 0"),
        ],
    )
    def test_errors(self, models, options, message):
        with pytest.raises(ValueError, match=message):
            SpecificDistiller(*models, **options)

    def test_other_classes(self, vit, models):
        with pytest.raises(ValueError, match="the student has 5 classes, the teacher 7; they must have the same"):
            SpecificDistiller(models[0], vit(distilled=False, num_classes=7))

    @pytest.mark.parametrize("mode", ["hard", "soft"])
    def test_needs_a_head(self, vit, models, mode):
        with pytest.raises(ValueError, match=f"mode='{mode}' needs a student with a distillation head"):
            SpecificDistiller(vit(distilled=False), models[1], mode=mode)

    @pytest.mark.parametrize("target", [torch.tensor([0, 9]), torch.tensor([-1, 0])])
    def test_labels_outside(self, models, target):
        for mode in ("hard", "soft", "nkd"):
            with pytest.raises(ValueError, match=r"9|-1"):
                SpecificDistiller(*models, mode=mode).train()(torch.randn(2, 3, 32, 32), target)

    def test_one_class(self, vit):
        distiller = SpecificDistiller(vit(num_classes=1), vit(num_classes=1, distilled=False), mode="nkd").train()
        with pytest.raises(ValueError, match="classes >= 2"):
            distiller(torch.randn(2, 3, 32, 32), torch.tensor([0, 0]))
