"""The score against its definition: dense float64 losses on gradients from autograd of the whole network."""

import copy
import math

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from diswot.initialisation import draws_of, initialise
from diswot.observation import Reading
from diswot.scoring import TeacherCache, score


def unit_rows(matrix):
    return matrix / torch.linalg.vector_norm(matrix, dim=-1, keepdim=True).clamp_min(1e-12)


def dense_relation(student, teacher):
    grams = [unit_rows(each.flatten(1) @ each.flatten(1).T) for each in (student, teacher)]
    return float((grams[0] - grams[1]).square().sum() / len(student) ** 2)


def dense_semantic(student, teacher):
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        f, g = ours.reshape(len(ours), -1), theirs.reshape(len(theirs), -1)
        total += float((unit_rows(f @ f.T) - unit_rows(g @ g.T)).square().sum())
    return total / (student.shape[0] * student.shape[1])


def centred(features):
    flat = features.flatten(2)
    return flat - flat.mean(2, keepdim=True)


def seen(model, images, labels, key, *, head, read, init="gaussian", seed=0):
    """Return the last map and the gradient of the classifier's weight, in float64."""
    model = copy.deepcopy(model).float()
    initialise(model, init, draws_of(seed, key, "own"))
    model.double().train()
    last_map = read(model, images.double())
    model.zero_grad()
    F.cross_entropy(model(images.double()), labels).backward()
    return last_map.detach(), model.get_submodule(head).weight.grad


def definition(teacher, student, images, labels, *, readers, has_maps=True, **options):
    (map_t, grad_t), (map_s, grad_s) = (
        seen(model, images, labels, key, head=head, read=read, **options)
        for model, key, (head, read) in zip((teacher, student), ("teacher", "student"), readers, strict=True)
    )
    expected = {"semantic": -dense_semantic(grad_s, grad_t), "relation": -dense_relation(map_s, map_t)}
    if has_maps:
        expected["channel"] = -dense_semantic(map_s, map_t)
        expected["correlation"] = -dense_semantic(centred(map_s), centred(map_t))
    return expected


def forward_features(model, images):
    found = model.forward_features(images)
    return found.mT if found.ndim == 3 else found


def resnet_map(model, images):
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        images = getattr(model, name)(images)
    return images


class HeadOnTokens(nn.Module):
    """A classifier of each position, whose logits are averaged."""

    def __init__(self, width=8):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, width, 5, stride=3), nn.LayerNorm(width), nn.Linear(width, 5)

    def tokens(self, x):
        return self.norm(self.conv(x).flatten(2).mT)

    def forward(self, x):
        return self.head(self.tokens(x)).mean(1)


class PlainVGG(nn.Module):
    """VGG-11 without norms, with one linear layer."""

    def __init__(self):
        super().__init__()
        self.features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"])
        self.classifier = nn.Linear(512, 5)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def timm_net(name, **options):
    return lambda: timm.create_model(name, num_classes=5, **options)


# name: what makes it, its classifier, what reads its map, pixels a side
NETWORKS = {
    "s0": (timm_net("s0_131"), "fc", forward_features, 16),
    "timm-resnet18": (timm_net("resnet18", channels=(16, 32, 64, 128)), "fc", forward_features, 64),
    "timm-vit_tiny": (timm_net("vit_tiny_patch16_224", img_size=64, depth=3), "head", forward_features, 64),
    "timm-mobilenetv3": (timm_net("mobilenetv3_small_050", drop_rate=0), "classifier", forward_features, 64),
    "timm-convnext": (timm_net("convnext_atto", depths=(1, 1, 1, 1)), "head.fc", forward_features, 64),
    "torchvision-resnet18": (
        lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5),
        "fc",
        resnet_map,
        64,
    ),
    "torchvision-densenet": (
        lambda: torchvision.models.DenseNet(8, (2, 2, 2), 16, num_classes=5),
        "classifier",
        lambda model, images: F.relu(model.features(images)),
        64,
    ),
    "user-tokens": (HeadOnTokens, "head", lambda model, images: model.tokens(images).mT, 16),
}


def batch_of(size, count=6):
    return torch.randn(count, 3, size, size), torch.arange(count) % 5


def close(value, expected, rtol=1e-4):
    assert value == pytest.approx(expected, rel=rtol, abs=1e-7)


class TestScoreEqualsTheDefinition:
    @pytest.mark.parametrize(
        ("name", "init"), [*((name, "kaiming") for name in NETWORKS), ("s0", "gaussian"), ("user-tokens", "gaussian")]
    )
    def test_float64(self, name, init):
        make, head, read, size = NETWORKS[name]
        teacher, student = make().double(), make().double()
        images, labels = batch_of(size)
        expected = definition(teacher, student, images, labels, readers=[(head, read)] * 2, init=init)
        found = score(teacher, student, images, labels, terms=tuple(expected), init=init, seeds=1)
        for term, value in expected.items():
            close(found.terms[term], value, rtol=1e-6)
        close(found.total, sum(expected.values()), rtol=1e-6)

    @pytest.mark.parametrize(("key", "init"), [("111", "kaiming"), ("131", "gaussian"), ("313", "kaiming")])
    def test_float32(self, s0, key, init):
        images, labels = batch_of(32, count=16)
        readers = [("fc", forward_features)] * 2
        expected = definition(s0("331"), s0(key), images, labels, readers=readers, init=init)
        found = score(s0("331"), s0(key), images, labels, terms=tuple(expected), init=init, seeds=1)
        for term, value in expected.items():
            close(found.terms[term], value)

    @pytest.mark.parametrize("name", ["timm-resnet18", "timm-vit_tiny", "torchvision-resnet18"])
    def test_float32_of_others(self, name):
        make, head, read, size = NETWORKS[name]
        images, labels = batch_of(size, count=12)
        teacher, student = make(), make()
        readers = [(head, read)] * 2
        expected = definition(teacher, student, images, labels, readers=readers, init="kaiming", has_maps=False)
        found = score(teacher, student, images, labels, init="kaiming", seeds=1)
        close(found.semantic, expected["semantic"])
        close(found.relation, expected["relation"])

    def test_activations_beyond_what_float32_can_square(self):
        """Without norms, weights from N(0, 1) give maps of 1e13, whose Gram matrices have rows of infinite norm."""
        student, teacher = PlainVGG(), PlainVGG()
        images, labels = batch_of(64, count=2)
        readers = [("classifier", lambda model, images: model.features(images))] * 2
        expected = definition(teacher, student, images, labels, readers=readers, has_maps=False)
        assert expected["relation"] < -1e-6
        found = score(teacher, student, images, labels, seeds=1)
        close(found.semantic, expected["semantic"])
        close(found.relation, expected["relation"])

    def test_saturated_softmax(self, batch):
        """Logits hundreds apart give gradient rows of exactly zero."""
        student, teacher = timm.create_model("test_vit", num_classes=5, img_size=16), HeadOnTokens(64)
        found = score(teacher, student, *batch)
        assert all(math.isfinite(value) and value < 0 for value in found.terms.values())

    def test_bfloat16(self, s0, batch):
        """The losses are float32's; what is rounded is the network."""
        images, labels = batch
        exact = score(s0("131"), s0(), images, labels, init="kaiming")
        rounded = score(s0("131"), s0().bfloat16(), images, labels, init="kaiming")
        close(rounded.total, exact.total, rtol=0.1)
        assert rounded.total != exact.total

    def test_means_over_seeds(self, s0, batch):
        images, labels = batch
        readers = [("fc", forward_features)] * 2
        singles = [definition(s0("131"), s0(), images, labels, readers=readers, seed=seed) for seed in range(3)]
        found = score(s0("131"), s0(), images, labels)
        totals = torch.tensor([each["semantic"] + each["relation"] for each in singles], dtype=torch.float64)
        for term in ("semantic", "relation"):
            close(found.terms[term], sum(each[term] for each in singles) / 3)
            assert found.by_seed[term] == pytest.approx([each[term] for each in singles], rel=1e-4)
        close(found.total, float(totals.mean()))
        close(found.stderr, float(totals.std() / math.sqrt(3)), rtol=1e-3)
        assert math.isnan(score(s0(), s0(), images, labels, seeds=1).stderr)

    def test_eval_mode(self, s0, batch):
        images, labels = batch
        train, evaluation = (score(s0("131"), s0(), images, labels, mode=mode) for mode in ("train", "eval"))
        assert train.total != evaluation.total
        single = score(s0("131"), s0(), images[:1], labels[:1], mode="eval", seeds=1)
        assert single.relation == 0

    def test_named_feature(self, s0, batch):
        images, labels = batch
        by_name = score(s0("131"), s0(), images, labels, feature="layer3.0", terms=["relation"])
        assert by_name.relation == score(s0("131"), s0(), images, labels, terms=["relation"]).relation
        earlier = score(s0("131"), s0(), images, labels, feature="layer1", terms=["relation"])
        assert earlier.relation != by_name.relation


class TestUnequalWidths:
    def test_error_names_the_widths_and_the_ways_out(self, s0, batch):
        with pytest.raises(ValueError) as error:
            score(timm.create_model("cifar_resnet8x4", num_classes=5), s0(), *batch, seeds=1)
        for text in ("64", "256", "relation", 'project="pad"', 'project="class_gram"'):
            assert text in str(error.value)

    def test_relation_needs_no_width(self, s0, batch):
        score(timm.create_model("cifar_resnet8x4", num_classes=5), s0(), *batch, seeds=1, terms=["relation"])

    @pytest.mark.parametrize("swapped", [False, True])
    def test_pad(self, batch, swapped):
        images, labels = batch
        pair = [HeadOnTokens(12).double(), HeadOnTokens(8).double()]
        teacher, student = reversed(pair) if swapped else pair
        maps, gradients = zip(
            *(
                seen(model, images, labels, key, head="head", read=lambda model, images: model.tokens(images).mT)
                for model, key in ((student, "student"), (teacher, "teacher"))
            ),
            strict=True,
        )
        gradients = [F.pad(each, (0, 12 - each.shape[1])) for each in gradients]
        maps = [F.pad(each, (0, 0, 0, 12 - each.shape[1])) for each in maps]
        found = score(teacher, student, images, labels, project="pad", seeds=1, terms=("semantic", "channel"))
        close(found.semantic, -dense_semantic(*gradients))
        close(found.terms["channel"], -dense_semantic(*maps))

    def test_class_gram(self, batch):
        images, labels = batch
        teacher, student = HeadOnTokens(12).double(), HeadOnTokens(8).double()
        gradients = [
            seen(model, images, labels, key, head="head", read=lambda *_: torch.zeros(()))[1]
            for model, key in ((student, "student"), (teacher, "teacher"))
        ]
        found = score(teacher, student, images, labels, project="class_gram", seeds=1, terms=["semantic"])
        close(found.semantic, -dense_relation(*gradients))


class TestDraws:
    def test_order_of_candidates_does_not_matter(self, s0, batch):
        cache = TeacherCache(s0("331"), [batch])
        forward = {key: cache.score(s0(key), key=key).total for key in ("111", "113", "131")}
        torch.rand(17)
        backward = {key: cache.score(s0(key), key=key).total for key in ("131", "113", "111")}
        assert forward == backward

    def test_key_decides(self, s0, batch):
        cache = TeacherCache(s0("331"), [batch])
        assert cache.score(s0(), key="a").total != cache.score(s0(), key="b").total

    def test_one_network_in_both_roles(self, s0, batch):
        model = s0()
        own = score(model, model, *batch)
        assert own.total < 0
        assert own.total == score(s0(), s0(), *batch).total
        same = TeacherCache(model, [batch]).score(model, key="teacher")
        assert (same.total, math.copysign(1, same.total)) == (0, 1)

    def test_shared(self, s0, batch):
        """With common weights a deeper network is the same up to where it goes deeper."""
        kept = {}

        def keep(name):
            return lambda _, __, output: kept.setdefault(name, []).append(output.detach())

        for key in ("111", "113"):
            model = s0(key)
            model.layer2.register_forward_hook(keep(key))
            for draws in ("shared", "own"):
                TeacherCache(s0(), [batch], 1, draws=draws).score(model, key=key)
        torch.testing.assert_close(kept["111"][0], kept["113"][0])
        assert not torch.allclose(kept["111"][1], kept["113"][1])

    def test_seeds_with_a_batch_each(self, s0):
        batches = [batch_of(16) for _ in range(3)]
        found = TeacherCache(s0("131"), batches).score(s0())
        for seed in range(3):
            alone = TeacherCache(s0("131"), [batches[seed]]).score(s0())
            assert alone.by_seed["semantic"][seed] == pytest.approx(found.by_seed["semantic"][seed])

    def test_dropout_draws_from_seed_and_key(self, batch):
        def make():
            return nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
            )

        torch.rand(3)
        first = score(make(), make(), *batch).total
        torch.rand(5)
        assert score(make(), make(), *batch).total == first

    def test_keep(self, s0, batch):
        teacher, student = s0("131"), s0()
        found = score(teacher, student, *batch, init="keep", seeds=1)
        assert found.total == score(teacher, student, *batch, init="keep", seeds=1, key="other").total
        assert found.total != score(teacher, s0(), *batch, init="keep", seeds=1).total


class TestTeacherCache:
    def test_equals_uncached(self, s0, batch):
        cache = TeacherCache(s0("131"), [batch], seeds=2, init="kaiming")
        cached = [score(cache, s0(key), key=key) for key in ("111", "113")]
        plain = [score(s0("131"), s0(key), *batch, seeds=2, init="kaiming", key=key) for key in ("111", "113")]
        assert [each.by_seed for each in cached] == [each.by_seed for each in plain]

    def test_keeps_its_mode(self, s0, batch):
        cache = TeacherCache(s0("131"), [batch], reading=Reading(mode="eval"))
        assert score(cache, s0()).by_seed == score(s0("131"), s0(), *batch, mode="eval").by_seed

    def test_digest(self, s0, batch):
        images, labels = batch
        digest = TeacherCache(s0("131"), [batch]).digest()
        # neither the drawn-over weights nor the last digits of pixels
        assert TeacherCache(s0("131"), [(images + 1e-7, labels)]).digest() == digest
        others = [
            TeacherCache(s0("113"), [batch]),
            TeacherCache(s0("131"), [batch], key="other"),
            TeacherCache(s0("131"), [batch], seeds=2),
            TeacherCache(s0("131"), [batch], init="kaiming"),
            TeacherCache(s0("131"), [batch], draws="shared"),
            TeacherCache(s0("131"), [batch], reading=Reading(mode="eval")),
            TeacherCache(s0("131"), [(images.flip(0), labels)]),
            TeacherCache(s0("131"), [(images, labels.flip(0))]),
        ]
        assert len({digest, *(each.digest() for each in others)}) == 9

    def test_digest_of_kept_weights(self, s0, batch):
        model = s0()
        digests = [TeacherCache(each, [batch], 1, "keep").digest() for each in (model, copy.deepcopy(model), s0())]
        assert digests[0] == digests[1] != digests[2]

    def test_digest_of_parameters_that_are_not_drawn(self, batch):
        def vit(seed):
            torch.manual_seed(seed)
            return timm.create_model("test_vit", img_size=16, num_classes=5)

        digests = [TeacherCache(vit(seed), [batch], 1).digest() for seed in (0, 0, 1)]
        assert digests[0] == digests[1] != digests[2]

    def test_digest_with_other_threads(self, s0):
        found = set()
        batch = batch_of(16, count=16)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(TeacherCache(s0("131"), [batch], 1).digest())
        assert len(found) == 1
