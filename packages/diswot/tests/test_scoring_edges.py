"""What scoring leaves as it was, what it refuses, and values at the edges."""

import math
import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn

from diswot.scoring import TERMS, TeacherCache, rankable, score

# name: what makes it, pixels a side
NETWORKS = {
    "s0": (lambda: timm.create_model("s0_131", num_classes=5), 16),
    "timm-resnet18": (lambda: timm.create_model("resnet18", channels=(16, 32, 64, 128), num_classes=5), 64),
    "torchvision-resnet18": (
        lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5),
        64,
    ),
}


def batch_of(size, count=6):
    return torch.randn(count, 3, size, size), torch.arange(count) % 5


class TestModelsComeOutAsTheyWentIn:
    def snapshot(self, model):
        return {
            "state": {name: (value.clone(), value.stride()) for name, value in model.state_dict().items()},
            "grads": [None if each.grad is None else each.grad.clone() for each in model.parameters()],
            "flags": [each.requires_grad for each in model.parameters()],
            "modes": [module.training for module in model.modules()],
            "hooks": [(len(each._forward_hooks), len(each._forward_pre_hooks)) for each in model.modules()],
            "attributes": len(vars(model)),
            "random": torch.random.get_rng_state(),
        }

    def prepared(self, model):
        model.train()
        first = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
        first.eval()
        next(model.parameters()).requires_grad_(False)
        list(model.parameters())[-1].grad = torch.ones_like(list(model.parameters())[-1])
        return model.to(memory_format=torch.channels_last)

    @pytest.mark.parametrize("name", NETWORKS)
    @pytest.mark.parametrize("init", ["gaussian", "keep"])
    def test_after_scoring(self, name, init):
        make, size = NETWORKS[name]
        teacher, student = self.prepared(make()), self.prepared(make())
        before = [self.snapshot(model) for model in (teacher, student)]
        images, labels = batch_of(size, count=4)
        torch.random.set_rng_state(before[0]["random"])
        pixels = images.clone()
        score(teacher, student, images, labels, init=init, seeds=1)
        torch.testing.assert_close([self.snapshot(model) for model in (teacher, student)], before, rtol=0, atol=0)
        torch.testing.assert_close(images, pixels, rtol=0, atol=0)

    def test_after_an_exception(self, s0, batch):
        student = self.prepared(s0("113"))
        cache = TeacherCache(s0(), [batch])
        calls = []

        def fail(*_):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("no more")

        student.layer3[1].register_forward_pre_hook(fail)
        before = self.snapshot(student)
        with pytest.raises(RuntimeError, match="no more"):
            cache.score(student)
        torch.testing.assert_close(self.snapshot(student), before, rtol=0, atol=0)

    def test_under_no_grad(self, s0, batch):
        expected = score(s0("131"), s0(), *batch)
        with torch.no_grad():
            assert score(s0("131"), s0(), *batch).by_seed == expected.by_seed


class TestErrors:
    @pytest.mark.parametrize("combine", ["rank", "zscore"])
    def test_combine(self, s0, batch, combine):
        with pytest.raises(ValueError, match=f"combine='{combine}' is defined over a set of students; use diswot.rank"):
            score(s0(), s0(), *batch, combine=combine)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"terms": ["semantics"]}, "unknown term 'semantics'; did you mean 'semantic'"),
            ({"terms": ()}, "terms are none; give one or more of semantic"),
            ({"init": "zeros"}, "init='zeros' must be one of 'gaussian', 'kaiming', 'keep'"),
            ({"init": "keep"}, "seeds=3 must be 1 with init='keep'"),
            ({"seeds": 0}, "seeds=0 must be at least 1"),
            ({"mode": "test"}, "mode='test' must be 'train' or 'eval'"),
            ({"project": "crop"}, "project='crop' must be one of 'none', 'pad', 'class_gram'"),
            ({"head": "classifier"}, "head='classifier' is no linear layer; linear layers: fc"),
            ({"feature": "layer9"}, "feature='layer9' is no module of CifarResNet; near: layer3"),
        ],
    )
    def test_options(self, s0, batch, options, message):
        with pytest.raises(ValueError, match=message):
            score(s0(), s0(), *batch, **options)

    def test_batch(self, s0, batch):
        images, labels = batch
        with pytest.raises(ValueError, match=r"labels are torch.int64 \[5\]; they must be int64 \[6\]"):
            score(s0(), s0(), images, labels[:5])
        with pytest.raises(ValueError, match="labels reach from 1 to 5; the network has 5 classes"):
            score(s0(), s0(), images, labels + 1)
        with pytest.raises(ValueError, match=r"labels are torch.float32"):
            score(s0(), s0(), images, labels.float())
        with pytest.raises(ValueError, match="images are a batch of 1"):
            score(s0(), s0(), images[:1], labels[:1])
        with pytest.raises(ValueError, match="images and labels are missing"):
            score(s0(), s0(), images)
        with pytest.raises(ValueError, match="images and labels are those of the teacher's cache"):
            score(TeacherCache(s0(), [batch]), s0(), images, labels)
        with pytest.raises(ValueError, match=r"batches are 2; give one, or one for each of the 3 seeds"):
            TeacherCache(s0(), [batch, batch])
        with pytest.raises(ValueError, match=r"draws='mine' must be one of 'own', 'shared'"):
            TeacherCache(s0(), [batch], draws="mine")

    def test_class_counts(self, s0, batch):
        six = timm.create_model("s0_111", num_classes=6)
        for project in ("none", "pad"):
            with pytest.raises(ValueError, match="have 6 and 5 items"):
                score(s0(), six, *batch, project=project)
        with pytest.raises(ValueError, match="the student has 6 classes, the teacher 5"):
            score(s0(), six, *batch, project="class_gram")
        with pytest.raises(ValueError, match="the network has 3 classes"):
            score(s0(), timm.create_model("s0_111", num_classes=3), *batch)

    def test_sizes_that_a_network_does_not_take(self, batch):
        vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5)
        with pytest.raises(ValueError, match=r"images are \[6, 3, 16, 16\], which VisionTransformer does not take"):
            score(vit, vit, *batch)

    def test_networks(self, s0, batch):
        with pytest.raises(ValueError, match="Flatten has no parameters"):
            score(s0(), nn.Flatten(), *batch)
        with pytest.raises(ValueError, match="has no linear classifier"):
            score(s0(), nn.Sequential(nn.Conv2d(3, 5, 16), nn.Flatten()), *batch)
        pooled = nn.Sequential(nn.Conv2d(3, 8, 16), nn.Flatten(), nn.Linear(8, 5))
        with pytest.raises(ValueError, match=r"no module of Sequential before the classifier with positions"):
            score(s0(), pooled, *batch)

    def test_correlation_needs_positions(self, s0):
        with pytest.raises(ValueError, match=r"correlation: the last map of the student is \[6, 64, 1, 1\]"):
            score(s0(), s0(), *batch_of(4), terms=["correlation"])


class TestEdges:
    @pytest.mark.parametrize("init", ["gaussian", "kaiming"])
    def test_cell_without_operations(self, batch, init):
        from diswot.spaces import create

        space, cell = create("nasbench201", width=8, cells=1), "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"
        empty = space.build(cell, num_classes=5)
        full = space.build(cell.replace("none", "nor_conv_3x3"), num_classes=5)
        found = score(full, empty, *batch, init=init, terms=tuple(TERMS))
        assert all(math.isfinite(value) and value < 0 for value in found.terms.values())
        # every sample has the teacher's row of length one against zero
        assert found.relation == pytest.approx(-1 / 6, rel=1e-4)

    def test_in_inference_mode(self, s0, batch):
        for draws in ("own", "shared"):
            cache = TeacherCache(s0("131"), [batch], 1, draws=draws)
            student = s0()
            expected = cache.score(student).by_seed
            with torch.inference_mode():
                assert cache.score(student).by_seed == expected

    def test_single_class(self, s0, batch):
        images, labels = batch
        found = score(s0("131"), s0(), images, torch.zeros_like(labels))
        assert math.isfinite(found.total)

    def test_nan_weights(self, s0, batch):
        broken = s0()
        broken.conv1.weight.data[0] = math.nan
        with pytest.warns(RuntimeWarning, match="is nan; it counts as NaN and ranks last"):
            found = score(s0(), broken, *batch, init="keep", seeds=1)
        assert math.isnan(found.total)
        assert broken.conv1.weight[0].isnan().all()
        # drawn anew they are like any other
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert math.isfinite(score(s0(), broken, *batch).total)

    def test_terms_that_were_not_asked_for(self, s0, batch):
        found = score(s0(), s0(), *batch, terms=["relation"])
        assert found.total == found.relation
        with pytest.raises(KeyError, match="semantic"):
            _ = found.semantic


class TestRankable:
    def test_values(self):
        assert rankable("x", -math.inf) == -math.inf
        for value in (math.nan, math.inf):
            with pytest.warns(RuntimeWarning, match=f"x is {value}; it counts as NaN"):
                assert math.isnan(rankable("x", value))
