import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diswot.networks.nb201 import NB201_WINNERS, parse_nb201
from diswot.spaces import NasBench101, NasBench201
from diswot.spaces.nasbench101 import MAX_EDGES, MAX_VERTICES, nb101_cell, nb101_key

SEEDS = st.integers(0, 2**32 - 1)


class TestNasBench201:
    @settings(deadline=None)
    @given(SEEDS)
    def test_mutate(self, seed):
        """One edge has another operation."""
        generator = np.random.default_rng(seed)
        parent = NasBench201().sample(generator)
        child = NasBench201().mutate(parent, generator)
        pairs = zip(parse_nb201(parent), parse_nb201(child), strict=True)
        assert sum(one != other for one, other in pairs) == 1

    def test_build(self):
        model = NasBench201(width=4, cells=1).build(NB201_WINNERS["ea"], num_classes=7)
        assert model.arch == NB201_WINNERS["ea"]
        assert model(torch.randn(2, 3, 16, 16)).shape == (2, 7)
        assert NasBench201().size == 15625

    def test_errors(self):
        with pytest.raises(ValueError, match="position 1: unknown operation 'nor_conv_5x5'; did you mean"):
            NasBench201().parse("|nor_conv_5x5~0|+|none~0|none~1|+|none~0|none~1|none~2|")


class TestNasBench101:
    @settings(max_examples=30, deadline=None)
    @given(SEEDS)
    def test_cells(self, seed):
        generator = np.random.default_rng(seed)
        space = NasBench101()
        key = space.sample(generator)
        for _ in range(3):
            cell = nb101_cell(key)
            assert len(cell.ops) <= MAX_VERTICES
            assert cell.num_edges <= MAX_EDGES
            assert nb101_key(cell) == key
            child = space.mutate(key, generator)
            assert space.hash(child) != space.hash(key)
            key = child

    def test_grows(self):
        """A walk from the smallest cell gets to seven vertices."""
        key, generator, space = "/1", np.random.default_rng(0), NasBench101()
        largest = 0
        for _ in range(100):
            key = space.mutate(key, generator)
            largest = max(largest, len(nb101_cell(key).ops))
        assert largest == MAX_VERTICES

    def test_key(self):
        """Vertices that are on no path leave the key."""
        cell = nb101_cell("3m/110.01.1")
        assert cell.ops == ("input", "conv3x3-bn-relu", "maxpool3x3", "output")
        assert cell.matrix == ((0, 1, 1, 0), (0, 0, 0, 1), (0, 0, 0, 1), (0, 0, 0, 0))
        assert NasBench101().parse("3m/101.00.0") == "/1"

    def test_build(self):
        model = NasBench101(stem_channels=8, stacks=2, cells=1).build("3m/110.01.1", num_classes=5)
        assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            ("", "has no '/'; expected one, as in"),
            ("3m", "has no '/'"),
            ("3x/110.01.1", r"has 'x' at position 1; expected 3 or 1 \(convolutions\), m \(pooling\), or '/'"),
            ("3m/110.02.1", "has '2' at position 8; expected 0, 1 or '.'"),
            ("3m/110.1.1", "has 1 digits at position 7; expected 2, one for each later vertex of 4"),
            ("3m/110.01", "has 2 rows; expected 3, as for 4 vertices"),
            ("3m/110.01.1.", "has 4 rows"),
            ("3m/110.00.0", "a path from the first vertex to the last"),
            ("333333/1111111.000001.00001.0001.001.01.1", "has 6 inner vertices; expected at most 5"),
            ("33333/111111.11111.1111.111.11.1", "has 21 edges; expected at most 9"),
        ],
    )
    def test_errors(self, key, message):
        with pytest.raises(ValueError, match=message):
            NasBench101().parse(key)
