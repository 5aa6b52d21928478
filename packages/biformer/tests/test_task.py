"""What a training step computes: labels, teachers, cells."""

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from biformer.losses import distillation_loss, soft_cross_entropy
from biformer.recipes import DistillationRecipe, TokenLabellingRecipe
from biformer.task import CellClassifier, CellTeacher, ClassifierTask, TokenLabellingTask, mix_cells

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@pytest.fixture
def model(micro):
    return timm.create_model(micro.model.name, **micro.model.options())


def images(count=4, size=64):
    return torch.randn(count, 3, size, size)


class TestClassifierTask:
    def test_loss(self, model):
        task, x, target = ClassifierTask(model.eval()), images(), torch.rand(4, 3).softmax(-1)
        result = task(x, target)
        torch.testing.assert_close(result["output"], model(x))
        torch.testing.assert_close(result["loss"], soft_cross_entropy(model(x), target))

    @pytest.mark.parametrize("kind", ["soft", "hard"])
    def test_distillation(self, model, micro, kind):
        torch.manual_seed(5)
        teacher = CellTeacher(
            timm.create_model(micro.model.name, **micro.model.options()),
            mean=micro.pictures.mean,
            std=micro.pictures.std,
        )
        recipe = DistillationRecipe(teacher="teacher", kind=kind, alpha=0.3, tau=2.0)
        task = ClassifierTask(model.eval(), teacher=teacher, distillation=recipe)
        x, target = images(), torch.tensor([0, 1, 2, 0])
        wanted = distillation_loss(
            soft_cross_entropy(model(x), target), model(x), teacher.model(x), kind=kind, alpha=0.3, tau=2.0
        )
        result = task(x, target)
        torch.testing.assert_close(result["loss"], wanted)
        result["loss"].backward()
        assert all(parameter.grad is None for parameter in teacher.parameters())

    def test_teacher_stays_frozen(self, model, micro):
        teacher = CellTeacher(timm.create_model(micro.model.name, **micro.model.options()), mean=MEAN, std=STD)
        task = ClassifierTask(model, teacher=teacher, distillation=DistillationRecipe(teacher="teacher")).train()
        before = {key: value.clone() for key, value in teacher.state_dict().items()}
        task(images(), torch.tensor([0, 1, 2, 0]))["loss"].backward()
        assert not teacher.model.training
        torch.testing.assert_close(teacher.state_dict(), before)

    def test_teacher_without_distillation(self, model):
        with pytest.raises(ValueError, match="belong together"):
            ClassifierTask(model, teacher=CellTeacher(nn.Identity(), mean=MEAN, std=STD))


class TestTeacher:
    def test_normalises_anew(self):
        model = nn.Identity()
        model.pretrained_cfg = {"mean": (0.0, 0.1, 0.2), "std": (1.0, 2.0, 4.0)}
        pixels = torch.rand(2, 3, 4, 4)
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        own_mean, own_std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
        seen = CellTeacher(model, mean=MEAN, std=STD)((pixels - mean) / std)
        torch.testing.assert_close(seen, (pixels - own_mean) / own_std)

    def test_labels_of_cells(self, model, micro):
        teacher = CellTeacher(model, mean=micro.pictures.mean, std=micro.pictures.std)
        x = images(size=64)
        cells = teacher.label_cells(x, (2, 2))
        assert cells.shape == (4, 2, 2, 3)
        # the classifier is linear and pools by a mean, so the mean of the cells' logits is the image's
        logits = model.get_classifier()(model.forward_features(x).permute(0, 2, 3, 1))
        torch.testing.assert_close(cells, logits.softmax(-1))
        torch.testing.assert_close(logits.mean((1, 2)), model(x))
        assert teacher.label_cells(x, (4, 3)).shape == (4, 4, 3, 3)

    def test_features_without_map(self):
        vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64, depth=1)
        with pytest.raises(ValueError, match=r"teacher VisionTransformer has features \[4, 17, 192\]"):
            CellTeacher(vit, mean=MEAN, std=STD).label_cells(images(), (2, 2))


class TestMixCells:
    @pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
    def test_pixels_agree_with_cells(self, share):
        np.random.seed(1)  # noqa: NPY002
        numbers = torch.arange(4.0)
        x = numbers[:, None, None, None].expand(4, 3, 96, 64).clone()
        cells = F.one_hot(torch.arange(4), 4).float()[:, None, None].expand(4, 3, 2, 4).clone()
        mixed, labels, kept = mix_cells(x, cells, share)
        wanted = labels @ numbers
        torch.testing.assert_close(mixed[:, 0], wanted.repeat_interleave(32, 1).repeat_interleave(32, 2))
        assert kept == pytest.approx(labels[0, ..., 0].mean().item())
        assert x[3].eq(3).all()


class TestTokenLabelling:
    def test_every_parameter_learns(self, model, micro):
        teacher = CellTeacher(
            timm.create_model(micro.model.name, **micro.model.options()),
            mean=micro.pictures.mean,
            std=micro.pictures.std,
        )
        module = CellClassifier(model)
        task = TokenLabellingTask(module.train(), TokenLabellingRecipe(), smoothing=0.1, teacher=teacher)
        loss = task(images(size=64), torch.tensor([0, 1, 2, 0]))["loss"]
        assert loss.dtype == torch.float32
        loss.backward()
        without = [name for name, parameter in module.named_parameters() if parameter.grad is None]
        assert without == []

    def test_given_cells(self, model):
        module = CellClassifier(model).train()
        recipe = TokenLabellingRecipe(mix=0, cell_weight=0.25)
        task = TokenLabellingTask(module, recipe, smoothing=0.0)
        x, labels, cells = images(size=64), torch.tensor([0, 1, 2, 0]), torch.rand(4, 2, 2, 3).softmax(-1)
        logits, cell_logits = module(x)
        wanted = F.cross_entropy(logits, labels) + 0.25 * soft_cross_entropy(cell_logits, cells)
        torch.testing.assert_close(task(x, labels, cells)["loss"], wanted)
        with pytest.raises(ValueError, match="needs a teacher"):
            task(x, labels)

    def test_evaluation_is_the_model(self, model):
        x = images()
        module = CellClassifier(model).eval()
        torch.testing.assert_close(module(x), model(x))
