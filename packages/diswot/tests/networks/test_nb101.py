import numpy as np
import pytest
import timm
import torch

from diswot.networks.nb101 import GraphCell
from diswot.networks.nb101_cell import NB101_OPS, NB101Cell

CHAIN = [[0, 1, 0], [0, 0, 1], [0, 0, 0]]
OPS = ["input", "conv3x3-bn-relu", "output"]


def random_cell(seed, size=7):
    rng = np.random.default_rng(seed)
    while True:
        matrix = np.triu(rng.integers(0, 2, (size, size)), 1)
        try:
            return NB101Cell.pruned(matrix.tolist(), ["input", *rng.choice(NB101_OPS, size - 2).tolist(), "output"])
        except ValueError:
            continue


class TestCell:
    def test_pruned(self):
        """Vertex 1 leads nowhere, and nothing leads to vertex 3."""
        matrix = [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
        cell = NB101Cell.pruned(matrix, ["input", NB101_OPS[0], NB101_OPS[1], NB101_OPS[2], "output"])
        assert cell == NB101Cell(((0, 1, 0), (0, 0, 1), (0, 0, 0)), ("input", NB101_OPS[1], "output"))

    def test_channels(self):
        """17 channels shared by three vertices; the remainder goes to the first ones."""
        matrix = np.triu(np.ones((5, 5), dtype=int), 1)
        cell = NB101Cell.pruned(matrix.tolist(), ["input", *NB101_OPS, "output"])
        assert cell.vertex_channels(8, 17) == [8, 6, 6, 5, 17]

    def test_channels_backwards(self):
        cell = NB101Cell.pruned(
            [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]],
            ["input", *NB101_OPS, "output"],
        )
        assert cell.vertex_channels(8, 9) == [8, 5, 5, 4, 9]

    @pytest.mark.parametrize("seed", range(5))
    def test_hash(self, seed):
        """Isomorphic cells share a hash; another operation changes it."""
        cell = random_cell(seed)
        rng = np.random.default_rng(seed)
        matrix, size = np.array(cell.matrix), len(cell.ops)
        for _ in range(50):
            order = [0, *(1 + rng.permutation(size - 2)).tolist(), size - 1]
            permuted = matrix[np.ix_(order, order)]
            if not np.tril(permuted).any():
                again = NB101Cell.pruned(permuted.tolist(), [cell.ops[i] for i in order])
                assert again.hash() == cell.hash()
        if size > 2:
            other = next(op for op in NB101_OPS if op != cell.ops[1])
            changed = NB101Cell(cell.matrix, (cell.ops[0], other, *cell.ops[2:]))
            assert changed.hash() != cell.hash()

    @pytest.mark.parametrize(
        ("matrix", "ops", "message"),
        [
            (CHAIN, ["input", "conv5x5-bn-relu", "output"], "unknown operation 'conv5x5-bn-relu'; did you mean"),
            (CHAIN, ["input", NB101_OPS[0], NB101_OPS[0]], "from 'input' to 'output'"),
            (CHAIN[:2], OPS, "3 rows of 3 values"),
            ([[0, 1, 0], [1, 0, 1], [0, 0, 0]], OPS, "upper triangular"),
            ([[0, 2, 0], [0, 0, 1], [0, 0, 0]], OPS, "of 0 and 1"),
            ([[0, 1, 0], [0, 0, 0], [0, 0, 0]], OPS, "a path from the first vertex to the last"),
            ([], [], "2 to 32 names"),
        ],
    )
    def test_errors(self, matrix, ops, message):
        with pytest.raises(ValueError, match=message):
            NB101Cell.pruned(matrix, ops)


class TestNetwork:
    @pytest.mark.parametrize("seed", range(8))
    def test_random_cells(self, seed):
        cell = random_cell(seed)
        model = timm.create_model(
            "nb101", matrix=cell.matrix, ops=cell.ops, stem_channels=9, stacks=2, cells=2, num_classes=3
        )
        maps, logits = model.forward_maps(torch.randn(2, 3, 8, 8))
        assert [value.shape[1] for value in maps[:-1]] == [9, 9, 9, 9, 18, 18]
        logits.sum().backward()
        cells, _ = model.forward_cell_maps(torch.randn(2, 3, 8, 8))
        assert len(cells) == 5

    def test_direct(self):
        """Input to output without a vertex is the projection alone."""
        model = timm.create_model("nb101", matrix=[[0, 1], [0, 0]], ops=["input", "output"], stem_channels=4, stacks=1)
        cell, x = model.layers[1].eval(), torch.randn(2, 4, 6, 6)
        torch.testing.assert_close(cell(x), cell.last_inop(x))

    def test_formula(self):
        """Truncated sums, concatenation, and the projected input where it leads to the output."""
        matrix = [[0, 1, 1, 0, 1], [0, 0, 0, 1, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
        ops = ["input", NB101_OPS[2], NB101_OPS[1], NB101_OPS[2], "output"]
        cell = GraphCell(NB101Cell.pruned(matrix, ops), 4, 7).eval()
        assert cell.vertex_channels == [4, 4, 3, 3, 7]
        x = torch.randn(2, 4, 6, 6)
        one = torch.nn.functional.max_pool2d(cell.input_op[1](x), 3, 1, 1)
        two = cell.vertex_op[2](cell.input_op[2](x))
        three = torch.nn.functional.max_pool2d(one[:, :3] + two, 3, 1, 1)
        torch.testing.assert_close(cell(x), torch.cat([one, three], 1) + cell.last_inop(x))

    def test_momentum(self):
        """The running statistics of stem and projections nearly are those of the last batch."""
        model = timm.create_model("nb101", matrix=CHAIN, ops=OPS, stem_channels=4)
        cell = model.layers[1]
        momenta = [
            block.conv_bn_relu[1].momentum for block in (model.layers[0], cell.input_op[1], cell.vertex_op[1].conv3x3)
        ]
        assert momenta == [0.997, 0.997, 0.1]

    def test_errors(self):
        with pytest.raises(ValueError, match="stem_channels=0"):
            timm.create_model("nb101", stem_channels=0)
        with pytest.raises(ValueError, match="stacks=9"):
            timm.create_model("nb101", stacks=9)
        with pytest.raises(ValueError, match="channels_out=2 must be at least the 4 vertices"):
            timm.create_model("nb101", stem_channels=2)
