"""Cells of NAS-Bench-101 as graphs: pruning, hash, channels of the vertices (Ying et al. 2019; section 3.3)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from visionkernels.checks import check, check_known

__all__ = ["NB101_OPS", "NB101Cell"]

NB101_OPS = ("conv3x3-bn-relu", "conv1x1-bn-relu", "maxpool3x3")
_KERNEL_WEIGHTS = {"conv3x3-bn-relu": 9, "conv1x1-bn-relu": 1}
_MAX_VERTICES = 32

Matrix = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class NB101Cell:
    """An upper triangular adjacency matrix of 0 and 1, and the operations of the vertices from "input" to "output".

    Every vertex is on a path from input to output: `NB101Cell.pruned` drops those that are not.
    """

    matrix: Matrix
    ops: tuple[str, ...]

    @classmethod
    def pruned(cls, matrix: Sequence[Sequence[int]], ops: Sequence[str]) -> "NB101Cell":
        """Return the cell without the vertices that are on no path; ValueError where none leads to the output."""
        rows, ops = _checked(matrix, ops)
        size = len(ops)
        reached, reaching = {0}, {size - 1}
        for vertex in range(size):
            if vertex in reached:
                reached |= {target for target in range(size) if rows[vertex][target]}
        for vertex in reversed(range(size)):
            if vertex in reaching:
                reaching |= {source for source in range(size) if rows[source][vertex]}
        kept = sorted(reached & reaching)
        check(0 in kept and size - 1 in kept, "matrix", rows, "a graph with a path from the first vertex to the last")
        return cls(tuple(tuple(rows[i][j] for j in kept) for i in kept), tuple(ops[i] for i in kept))

    @property
    def num_edges(self) -> int:
        return sum(map(sum, self.matrix))

    def hash(self) -> str:
        """Return the benchmark's hash, which isomorphic cells share."""
        size = len(self.ops)
        labels = [-1, *(NB101_OPS.index(op) for op in self.ops[1:-1]), -2]
        out_degrees = [sum(row) for row in self.matrix]
        in_degrees = [sum(column) for column in zip(*self.matrix, strict=True)]
        hashes = [_md5(str(vertex)) for vertex in zip(out_degrees, in_degrees, labels, strict=True)]
        for _ in range(size):
            hashes = [
                _md5(
                    "".join(sorted(hashes[source] for source in range(size) if self.matrix[source][vertex]))
                    + "|"
                    + "".join(sorted(hashes[target] for target in range(size) if self.matrix[vertex][target]))
                    + "|"
                    + hashes[vertex]
                )
                for vertex in range(size)
            ]
        return _md5(str(sorted(hashes)))

    def vertex_channels(self, channels_in: int, channels_out: int) -> list[int]:
        """Return the channels of every vertex of a cell from `channels_in` to `channels_out`.

        The vertices that the output concatenates share its channels, the first ones taking the remainder; any other
        has as many as the widest vertex that it feeds.
        """
        size = len(self.ops)
        channels = [channels_in, *[0] * (size - 2), channels_out]
        feeding = [vertex for vertex in range(1, size - 1) if self.matrix[vertex][-1]]
        if feeding:
            share, remainder = divmod(channels_out, len(feeding))
            what = f"at least the {len(feeding)} vertices that the output concatenates"
            check(share >= 1, "channels_out", channels_out, what)
            for index, vertex in enumerate(feeding):
                channels[vertex] = share + (index < remainder)
        for vertex in reversed(range(1, size - 1)):
            if vertex not in feeding:
                fed = (channels[target] for target in range(vertex + 1, size - 1) if self.matrix[vertex][target])
                channels[vertex] = max(fed)
        return channels

    def count_weights(self, channels_in: int, channels_out: int) -> int:
        """Count the weights of the convolutions of a cell from `channels_in` to `channels_out`."""
        channels = self.vertex_channels(channels_in, channels_out)
        kernels = (_KERNEL_WEIGHTS.get(op, 0) for op in self.ops)
        inner = sum(kernel * width**2 for kernel, width in zip(kernels, channels, strict=True))
        return inner + sum(channels_in * width for width, edge in zip(channels, self.matrix[0], strict=True) if edge)


def _checked(matrix: Sequence[Sequence[int]], ops: Sequence[str]) -> tuple[Matrix, tuple[str, ...]]:
    ops = tuple(ops)
    check(2 <= len(ops) <= _MAX_VERTICES, "ops", ops, f"2 to {_MAX_VERTICES} names")
    check(ops[0] == "input" and ops[-1] == "output", "ops", ops, "from 'input' to 'output'")
    for op in ops[1:-1]:
        check_known("operation", op, NB101_OPS)
    rows = tuple(tuple(int(value) for value in row) for row in matrix)
    size = len(ops)
    square = len(rows) == size and all(len(row) == size for row in rows)
    check(square, "matrix", rows, f"{size} rows of {size} values, one for each of ops")
    allowed = all(value in (0, int(j > i)) for i, row in enumerate(rows) for j, value in enumerate(row))
    check(allowed, "matrix", rows, "upper triangular, of 0 and 1, with 0 on the diagonal")
    return rows, ops


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
