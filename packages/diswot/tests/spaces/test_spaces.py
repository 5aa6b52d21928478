"""What every space promises, by hypothesis."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diswot.spaces import SPACES, Space, create, kin_of

SEEDS = st.integers(0, 2**32 - 1)
NAMES = ("s0", "nasbench201", "nasbench101", "xxbl", "res18", *(name for name in SPACES if name.startswith("timm_")))
SPACE = {name: create(name) for name in NAMES}


def rng(seed):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", NAMES)
class TestEverySpace:
    def test_protocol(self, name):
        space = SPACE[name]
        assert isinstance(space, Space)
        assert space.name == name
        assert len(space.input_size) == 3

    @settings(max_examples=20, deadline=None)
    @given(seed=SEEDS)
    def test_sample(self, name, seed):
        """Keys are canonical, and a function of the generator alone."""
        key = SPACE[name].sample(rng(seed))
        assert SPACE[name].parse(key) == key
        assert SPACE[name].parse(f"  {key}\n") == key
        assert create(name).sample(rng(seed)) == key

    @settings(max_examples=20, deadline=None)
    @given(seed=SEEDS)
    def test_mutate(self, name, seed):
        """A neighbour is another architecture of the space."""
        space, generator = SPACE[name], rng(seed)
        parent = space.sample(generator)
        child = space.mutate(parent, rng(seed))
        assert child != parent
        assert space.parse(child) == child
        assert space.mutate(parent, rng(seed)) == child

    @settings(max_examples=20, deadline=None)
    @given(seed=SEEDS, text=st.text("0123456789abcmx|~+/.,?&=()- ", max_size=12))
    def test_damaged(self, name, seed, text):
        """A damaged key is another key of the space or a ValueError."""
        space, generator = SPACE[name], rng(seed)
        key = space.sample(generator)
        start, end = sorted(generator.integers(0, len(key) + 1, 2).tolist())
        try:
            found = space.parse(key[:start] + text + key[end:])
        except ValueError as error:
            assert len(str(error)) > 10
        else:
            assert space.parse(found) == found

    def test_enumerate(self, name):
        space = SPACE[name]
        if space.size is None:
            with pytest.raises(ValueError, match=f"space {name} has no list"):
                space.enumerate()
            return
        keys = set()
        for count, key in enumerate(space.enumerate()):
            if count == 2000:
                break
            keys.add(key)
            if count % 100 == 0:
                assert space.parse(key) == key
        assert len(keys) == min(space.size, 2000)

    def test_walk(self, name):
        """A walk of mutations reaches many architectures."""
        space, generator = SPACE[name], rng(0)
        key, seen = space.sample(generator), set()
        for _ in range(30):
            key = space.mutate(key, generator)
            seen.add(key)
        assert len(seen) >= min(space.size or 9, 9) // 2


class TestCreate:
    def test_options(self):
        assert create("nasbench201", width=8, cells=1).width == 8
        assert create("timm", models="resnet18", choices={"layers": [(1, 1, 1, 1), (2, 2, 2, 2)]}).size == 2

    def test_errors(self):
        with pytest.raises(ValueError, match="unknown space 'nasbench2O1'; did you mean 'nasbench201'"):
            create("nasbench2O1")
        with pytest.raises(ValueError, match=r"space s0 cannot be made with the options width"):
            create("s0", width=3)
        for name in ("nasbench201", "nasbench101", "res18", "timm_vit"):
            with pytest.raises(ValueError, match="image_size=4 must be"):
                create(name, image_size=4)


@pytest.mark.parametrize(
    ("teacher", "space"),
    [
        ("cifar_resnet56", "s0"),
        ("s0:713", "s0"),
        ("resnet50", "timm_resnet"),
        ("torchvision:resnet18", "timm_resnet"),
        ("torchvision:vit_b_16", "timm_vit"),
        ("timm:convnext_base", "timm_convnext"),
        ("timm:cifar_resnet56", "s0"),
        ("nasbench201:|none~0|", "nasbench201"),
        ("convnext_base", "timm_convnext"),
        ("vit_base_patch16_224", "timm_vit"),
        ("mobilenetv3_large_100", "timm_mobilenet"),
        ("tf_efficientnet_b0", "timm_efficientnet"),
    ],
)
def test_kin_of(teacher: str, space: str) -> None:
    assert kin_of(teacher) == space
    assert space in SPACES
