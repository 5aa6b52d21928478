"""What was computed for one student serves the next, and no score changes by it."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from timm.models import resnet
from torch import nn

from diswot import spaces
from diswot.initialisation import draws_of, initialise
from diswot.networks.cifar_resnet import CifarResNet
from diswot.observation import Reading
from diswot.prefixes import KnownPrefixes
from diswot.scoring import TeacherCache

SIZE, CLASSES = 32, 5


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, SIZE, SIZE, generator=generator), torch.arange(4)) for _ in range(2)]


def drawn(name, seed=0, **options):
    if name in ("resnet18", "resnet34"):
        options = {"channels": (64, 64, 64, 64), **options}
    model = timm.create_model(name, num_classes=CLASSES, **options)
    initialise(model, "kaiming", draws_of(seed, "", "shared"))
    return model


class Loud(nn.Conv2d):
    """Gives twice what its class gives."""

    def forward(self, x):
        return 2 * super().forward(x)


class LoudBlock(resnet.BasicBlock):
    """The same."""

    def forward(self, x):
        return 2 * super().forward(x)


class Between(CifarResNet):
    """Doubles the map of its first stage."""

    def forward_stage(self, x, stage):
        return super().forward_stage(x, stage) * (2 if stage == 1 else 1)


class Forgetful(KnownPrefixes):
    """Knows nothing."""

    def __init__(self):
        super().__init__(limit_bytes=0)


def scored(cache, networks, **options):
    options = {"project": "pad", "terms": ("semantic", "relation", "channel"), **options}
    return {key: cache.score(model, key=key, **options).by_seed for key, model in networks.items()}


def s0():
    return spaces.create("s0"), ["113", "131", "133", "111"]


def resnets():
    choices = {"layers": spaces.Choice((1, 2), 4), "channels": spaces.Choice((32, 64, 128, 256), 4)}
    space = spaces.TimmSpace("resnet18", choices)
    ends = ("1,1,1,1&channels=32,64,64,128", "1,1,2,1&channels=32,64,64,128", "1,1,2,1&channels=32,64,128,128")
    return space, [f"resnet18?layers={end}" for end in ends]


def structures():
    space = spaces.create("xxbl")
    mutants = (space.mutate(space.initial, np.random.default_rng(seed)) for seed in range(1))
    return space, [space.initial, *mutants]


class TestScores:
    @pytest.mark.parametrize(
        ("students", "mode"),
        [(s0, "train"), (s0, "eval"), (structures, "train"), (resnets, "eval")],
        ids=["s0-train", "s0-eval", "structures-train", "timm-eval"],
    )
    def test_equal_those_without(self, batches, students, mode):
        space, keys = students()
        networks = {key: space.build(key, num_classes=CLASSES) for key in keys}
        teacher = timm.create_model("cifar_resnet20", num_classes=CLASSES)
        cache = TeacherCache(teacher, batches, 2, "kaiming", Reading(mode=mode), draws="shared")
        plain = replace(cache)
        plain.known = Forgetful()
        found = scored(cache, networks)
        assert cache.known.size_bytes > 0
        assert plain.known.size_bytes == 0
        assert found == scored(plain, networks)
        assert found == scored(cache, networks)

    def test_own_draws_and_named_maps_go_without(self, batches):
        networks = {"113": timm.create_model("s0_113", num_classes=CLASSES)}
        teacher = timm.create_model("s0_133", num_classes=CLASSES)
        for draws, feature in (("own", "auto"), ("shared", "layer3")):
            cache = TeacherCache(teacher, batches, 2, "kaiming", Reading(feature), draws=draws)
            scored(cache, networks, reading=Reading(feature))
            assert cache.known.size_bytes == 0

    def test_in_modes_that_differ(self, batches):
        """Running statistics count where a reading is of them, whatever the mode that a student comes in."""
        plain, moved = (timm.create_model("s0_113", num_classes=CLASSES) for _ in range(2))
        for norm in (module for module in moved.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.running_var.fill_(3)
        teacher = timm.create_model("cifar_resnet20", num_classes=CLASSES)
        cache = TeacherCache(teacher, batches, 2, "kaiming", draws="shared")
        for model, mode in ((plain, "train"), (plain, "eval"), (moved, "eval")):
            found = cache.score(model, reading=Reading(mode=mode)).by_seed
            assert found == replace(cache).score(model, reading=Reading(mode=mode)).by_seed

    def test_under_autocast(self, batches):
        model = timm.create_model("s0_113", num_classes=CLASSES)
        teacher = timm.create_model("cifar_resnet20", num_classes=CLASSES)
        cache = TeacherCache(teacher, batches, 2, "kaiming", draws="shared")
        with torch.autocast("cpu", torch.bfloat16):
            rounded = cache.score(model).by_seed
        expected = replace(cache).score(model).by_seed
        assert cache.score(model).by_seed == expected != rounded

    def test_models_come_out_as_they_went_in(self, batches):
        model = drawn("s0_113")
        known = KnownPrefixes()
        for _ in range(2):
            with known.used(model, batches[0][0]):
                model(batches[0][0])
        assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())


class TestUsed:
    @pytest.mark.parametrize(
        ("first", "second", "expected"),
        [
            ("s0_333", "s0_333", 12),
            ("s0_333", "s0_335", 12),
            ("s0_353", "s0_333", 9),
            ("s0_711", "s0_111", 4),
            ("zen_cifar_res32_05m", "zen_cifar_res32_05m", 7),
            ("resnet18", "resnet34", 6),
            ("nb201", "nb201", 0),
        ],
    )
    def test_blocks_known(self, batches, first, second, expected):
        known, images = KnownPrefixes(), batches[0][0]
        for name in (first, second):
            model = drawn(name)
            with torch.no_grad(), known.used(model, images) as count:
                found = model(images)
            torch.testing.assert_close(found, drawn(name)(images), rtol=0, atol=0)
        assert count == expected

    @pytest.mark.parametrize("change", ["images", "weights", "stride", "mode", "kind"])
    def test_other_networks_are_told_apart(self, batches, change):
        known, images, model = KnownPrefixes(), batches[0][0], drawn("s0_111")
        with known.used(model, images):
            model(images)
        other = copy.deepcopy(model)
        if change == "images":
            images = images + 1e-3
        elif change == "weights":
            other.conv1.weight.data[0, 0, 0, 0] += 1e-3
        elif change == "stride":
            other.conv1.stride = (2, 2)
        elif change == "mode":
            other.eval()
        else:
            other.layer1[0].adds_shortcut = False
        with known.used(other, images) as count:
            other(images)
        assert count == (3 if change == "kind" else 0)

    @pytest.mark.parametrize("change", ["hook", "pre-hook", "forward", "features", "convolution", "block", "twice"])
    def test_networks_that_do_otherwise_run_as_they_are(self, batches, change):
        """What a class says of a network is not so: nothing known is used, nothing is kept, nothing is taken away."""
        known, images, plain, other = KnownPrefixes(), batches[0][0], drawn("resnet18"), drawn("resnet18")
        if change == "hook":
            other.layer1.register_forward_hook(lambda _, __, output: 2 * output)
        elif change == "pre-hook":
            other.layer1[1].conv1.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
        elif change == "forward":
            other.conv1.forward = lambda x: 2 * nn.Conv2d.forward(other.conv1, x)
        elif change == "features":
            other.forward_features = lambda x: type(other).forward_features(other, 2 * x)
        elif change == "convolution":
            other.conv1.__class__ = Loud
        elif change == "block":
            other.layer1[0].__class__ = LoudBlock
        else:
            other.layer1[1] = other.layer1[0]
        with torch.no_grad():
            expected = other(images)
            for model in (plain, other, other, plain):
                with known.used(model, images) as count:
                    found = model(images)
                assert model is plain or count == (4 if change == "block" and known.size_bytes else 0)
                torch.testing.assert_close(found, expected if model is other else plain(images), rtol=0, atol=0)
            torch.testing.assert_close(other(images), expected, rtol=0, atol=0)

    def test_a_subclass_may_put_something_between(self, batches):
        known, images = KnownPrefixes(), batches[0][0]
        plain, other = drawn("s0_111"), drawn("s0_111")
        other.__class__ = Between
        for model in (plain, other):
            with torch.no_grad(), known.used(model, images):
                found = model(images)
            torch.testing.assert_close(found, model(images), rtol=0, atol=0)

    def test_layers_in_place_on_what_is_known(self, batches):
        """A second pass inside finds the map as it was, though the activation that follows overwrites what it gets."""
        known, images = KnownPrefixes(), batches[0][0]
        for is_in_place in (False, True):
            model = drawn("resnet18")
            model.act1 = nn.SiLU(inplace=is_in_place)
            with torch.no_grad(), known.used(model, images) as count:
                found = [model(images) for _ in range(2)]
            assert count == (2 if is_in_place else 0)
            torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)

    def test_layers_in_place(self, batches):
        """The norm of timm's stem is overwritten by its activation, and so is not used again."""
        known, images, model = KnownPrefixes(), batches[0][0], drawn("resnet18")
        assert model.act1.inplace
        with torch.no_grad(), known.used(model, images):
            model(images)
        other = drawn("resnet18")
        other.maxpool = nn.MaxPool2d(2)
        other.act1 = nn.Identity()
        with torch.no_grad(), known.used(other, images) as count:
            found = other(images)
        assert count == 1
        with torch.no_grad():
            torch.testing.assert_close(found, other(images), rtol=0, atol=0)

    def test_random_layers_end_the_chain(self, batches):
        model, images, known = drawn("resnet18", drop_path_rate=0.5), batches[0][0], KnownPrefixes()
        for expected in (0, 5):  # the first block drops with probability 0
            with torch.no_grad(), known.used(model, images) as count:
                model(images)
            assert count == expected

    def test_limit(self, batches):
        images = batches[0][0]
        one_map = 4 * 16 * SIZE * SIZE * 4
        known = KnownPrefixes(limit_bytes=3 * one_map)
        for name in ("s0_111", "s0_333"):
            model = drawn(name)
            with torch.no_grad(), known.used(model, images):
                model(images)
            assert known.size_bytes == sum(kept.nbytes for kept, _ in known._maps.values()) <= 3 * one_map

    def test_a_pickle_is_empty(self, batches):
        known, model = KnownPrefixes(limit_bytes=1 << 20), drawn("s0_111")
        with torch.no_grad(), known.used(model, batches[0][0]):
            model(batches[0][0])
        again = pickle.loads(pickle.dumps(known))
        assert (again.size_bytes, again.limit_bytes) == (0, 1 << 20)
