"""Trees in integers: parts, cells, uneven splits, constant leaves, batches, weights written and read."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinc.entropy import BitReader, BitWriter
from tinc.errors import TincFormatError
from tinc.tree.quantized import LARGEST_WEIGHT, Layer, QuantizedTree
from tinc.tree.shape import TreeShape
from tinc.tree.weights import read_constants, read_weights, write_constants, write_weights

SHAPES = {
    "one-leaf": TreeShape((7, 5), ((1, 1),), ((6, 1),)),
    "one-layer": TreeShape((7, 5), ((1, 1),), ((2,),)),
    "uneven": TreeShape((7, 11, 5), ((1, 1, 1), (2, 3, 1), (1, 1, 2)), ((6, 5), (4,), (3, 2))),
    "beyond": TreeShape((9, 5), ((1, 1), (4, 2)), ((5,), (1,))),  # leaves of 3: the last one has no voxel
    "axes-of-1": TreeShape((1, 6, 1), ((1, 1, 1), (1, 2, 1)), ((4,), (3, 1))),
    "inactive": TreeShape((8, 9), ((1, 1), (2, 2), (1, 2)), ((5,), (4,), (1,)), (1, 0, 0, 0, 0, 0, 1, 1)),
    "four-axes": TreeShape((3, 4, 5, 6), ((1, 1, 1, 1), (1, 2, 2, 1)), ((4, 4), (2,))),
}  # fmt: skip


def make(shape: TreeShape, seed: int = 0, largest: int = 300) -> QuantizedTree:
    rng = np.random.default_rng(seed)
    layers = []
    for number, (_, size) in enumerate(shape.layers):
        multiplier, shift = int(rng.integers(1, 128)), 15 if number == 0 else 12
        layers.append(Layer(rng.integers(-largest, largest + 1, size), multiplier, shift))
    constants = rng.integers(-500, 500, (shape.num_leaves - len(shape.nodes[-1]), shape.channels))
    return QuantizedTree(shape, tuple(layers), constants)


def whole(shape: TreeShape, step: int = 1) -> tuple[slice, ...]:
    return tuple(slice(0, -(-size // step)) for size in shape.extent)


@pytest.fixture(params=SHAPES)
def tree(request: pytest.FixtureRequest) -> QuantizedTree:
    return make(SHAPES[request.param])


class TestTreeShape:
    def test_leaves_cover_the_volume_once(self, tree: QuantizedTree) -> None:
        seen = np.zeros(tree.shape.extent, dtype=int)
        for leaf in range(tree.shape.num_leaves):
            box = tree.shape.box(leaf)
            if all(part.stop > part.start for part in box):
                seen[box] += 1
        assert (seen == 1).all()

    def test_nodes_and_parents(self) -> None:
        shape = SHAPES["inactive"]
        assert [nodes.tolist() for nodes in shape.nodes] == [[0], [0, 3], [0, 6, 7]]
        assert [parents.tolist() for parents in shape.parents] == [[0, 0], [0, 1, 1]]

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="same levels"):
            TreeShape((4, 4), ((1, 1), (2, 2)), ((1,),))
        with pytest.raises(ValueError, match="active has 2 entries for 4 leaves"):
            TreeShape((4, 4), ((1, 1), (2, 2)), ((1,), (1,)), (True, False))


class TestDecode:
    def test_reference(self, tree: QuantizedTree) -> None:
        """The formulas of the format, voxel by voxel in Python's integers."""
        from tinc.arithmetic import sine_table

        shape, sines = tree.shape, sine_table().numpy().astype(int).tolist()
        decoded = tree.decode(whole(shape))
        inactive = [leaf for leaf in range(shape.num_leaves) if leaf not in shape.nodes[-1]]
        for leaf, box in ((leaf, shape.box(leaf)) for leaf in range(shape.num_leaves)):
            for voxel in product(*(range(part.start, part.stop) for part in box)):
                if leaf in inactive:
                    expected = tree.constants[inactive.index(leaf)].tolist()
                else:
                    x, unit = [], 1 << 14
                    for at, part, n in zip(voxel, box, shape.leaf_size, strict=True):
                        i = at - part.start
                        x.append(-(1 << 14) if n == 1 else (2 * i * (1 << 14) + (n - 1) // 2) // (n - 1) - (1 << 14))
                    for number, ((level, _), layer) in enumerate(zip(shape.layers, tree.layers, strict=True)):
                        if number:
                            x, unit = [sines[z % 4096] for z in x], 1 << 10
                        node = leaf
                        for split in shape.splits[level + 1 :]:
                            node //= int(np.prod(split))
                        w = layer.weights[shape.nodes[level].tolist().index(node)].tolist()
                        sums = [sum(a * row[j] for a, row in zip([*x, unit], w, strict=True)) for j in range(len(w[0]))]
                        x = [(s * layer.multiplier + ((1 << layer.shift) >> 1)) >> layer.shift for s in sums]
                    expected = x
                assert decoded[(slice(None), *voxel)].tolist() == expected

    @given(st.sampled_from(sorted(SHAPES)), st.sampled_from([1, 1, 2, 4]), st.data())
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_region_is_slice_of_all(self, name: str, step: int, data: st.DataObject) -> None:
        tree = make(SHAPES[name])
        region = []
        for part in whole(tree.shape, step):
            start = data.draw(st.integers(0, part.stop - 1))
            region.append(slice(start, data.draw(st.integers(start + 1, part.stop))))
        everything = tree.decode(whole(tree.shape, step), (step,) * len(region))
        assert np.array_equal(tree.decode(tuple(region), (step,) * len(region)), everything[(slice(None), *region)])

    def test_single_voxels(self, tree: QuantizedTree) -> None:
        """However many points are computed at once, each is the same."""
        everything = tree.decode(whole(tree.shape))
        for voxel in list(product(*map(range, tree.shape.extent)))[::7]:
            box = tuple(slice(at, at + 1) for at in voxel)
            assert np.array_equal(tree.decode(box), everything[(slice(None), *box)])

    def test_threads(self, tree: QuantizedTree) -> None:
        one = tree.decode(whole(tree.shape))
        torch.set_num_threads(2)
        try:
            assert np.array_equal(tree.decode(whole(tree.shape)), one)
        finally:
            torch.set_num_threads(1)

    def test_largest_weights(self) -> None:
        """Sums beyond 2**24 are exact too."""
        shape = TreeShape((4, 5), ((1, 1),), ((64, 64, 1),))
        tree = make(shape, largest=LARGEST_WEIGHT)
        layers = tuple(replace(layer, multiplier=127, shift=20) for layer in tree.layers)
        tree = replace(tree, layers=layers)
        w = [layer.weights.astype(object) for layer in layers]
        from tinc.arithmetic import sine_table

        sines = sine_table().numpy().astype(int)
        for i, j in product(range(4), range(5)):
            x = np.array([(2 * i * (1 << 14) + 1) // 3 - (1 << 14), (2 * j * (1 << 14) + 2) // 4 - (1 << 14)])
            for number in range(3):
                if number:
                    x = sines[(x % 4096).astype(int)].astype(object)
                unit = (1 << 14) if number == 0 else (1 << 10)
                x = ((x.astype(object) @ w[number][0, :-1] + w[number][0, -1] * unit) * 127 + (1 << 19)) >> 20
            assert tree.decode((slice(i, i + 1), slice(j, j + 1))).item() == x[0]

    def test_coarse_cells_are_near_means(self) -> None:
        shape = TreeShape((16, 16), ((1, 1), (2, 2)), ((4, 4), (1,)))
        rng = np.random.default_rng(0)
        sizes = [size for _, size in shape.layers]
        layers = [Layer(rng.integers(-9, 10, sizes[0]), 40, 14)]
        layers += [Layer(rng.integers(-60, 61, size), 64, 12) for size in sizes[1:]]
        tree = QuantizedTree(shape, tuple(layers))
        fine = tree.decode(whole(shape))[0]
        coarse = tree.decode(whole(shape, 2), (2, 2))[0]
        means = fine.reshape(8, 2, 8, 2).mean((1, 3))
        assert np.abs(coarse - means).mean() < 0.05 * fine.std() + 1


class TestWeights:
    @given(st.sampled_from(sorted(SHAPES)), st.integers(0, LARGEST_WEIGHT), st.integers(0, 2**32 - 1))
    @settings(max_examples=40, deadline=None, derandomize=True)
    def test_round_trip(self, name: str, largest: int, seed: int) -> None:
        tree = make(SHAPES[name], seed, largest)
        writer = BitWriter()
        spreads = write_weights(writer, tree)
        write_constants(writer, tree)
        assert len(spreads) == 2 * len(tree.layers) and max(spreads) < 160
        reader = BitReader(writer.finish())
        for layer, weights in zip(tree.layers, read_weights(reader, tree.shape, spreads), strict=True):
            assert np.array_equal(weights, layer.weights)
        assert np.array_equal(read_constants(reader, tree.shape), tree.constants)

    def test_size(self) -> None:
        """Laplace-distributed weights take about what their entropy asks for."""
        shape = TreeShape((8, 8), ((1, 1),), ((60, 60, 1),))
        rng = np.random.default_rng(0)
        layers = tuple(Layer(np.rint(rng.laplace(size=size) * 8).astype(np.int64), 1, 1) for _, size in shape.layers)
        writer = BitWriter()
        write_weights(writer, QuantizedTree(shape, layers))
        assert len(writer.finish()) == pytest.approx(shape.num_weights * np.log2(2 * np.e * 8) / 8, rel=0.02)

    def test_damaged(self) -> None:
        shape = SHAPES["inactive"]
        spreads = bytes([30] * 2 * len(shape.layers))
        for seed in range(30):
            content = np.random.default_rng(seed).bytes(4 * seed)
            try:
                reader = BitReader(content)
                read = read_weights(reader, shape, spreads)
                assert [each.shape for each in read] == [size for _, size in shape.layers]
                assert read_constants(reader, shape).shape == (5, 1)
            except TincFormatError as error:
                assert "damaged" in str(error)
