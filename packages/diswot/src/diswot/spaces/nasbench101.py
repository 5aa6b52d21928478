"""The cells of NAS-Bench-101: graphs of at most seven vertices and nine edges (section 3.3)."""

from collections.abc import Iterator, Sequence

import numpy as np
import timm
from torch import nn

from diswot.networks.nb101_cell import NB101_OPS, NB101Cell
from visionkernels.checks import InputError, check

__all__ = ["MAX_EDGES", "MAX_VERTICES", "NasBench101", "nb101_cell", "nb101_key"]

MAX_VERTICES, MAX_EDGES = 7, 9

_LETTERS = dict(zip("31m", NB101_OPS, strict=True))


def nb101_key(cell: NB101Cell) -> str:
    """Return the text of a cell: a letter for each inner vertex, "/", and the matrix right of its diagonal by rows.

    The letters are 3 and 1 for convolutions and m for pooling: "3m/110.01.1" has two inner vertices, of which the input
    leads to both.
    """
    letters = {op: letter for letter, op in _LETTERS.items()}
    rows = ("".join(map(str, row[i + 1 :])) for i, row in enumerate(cell.matrix[:-1]))
    return f"{''.join(letters[op] for op in cell.ops[1:-1])}/{'.'.join(rows)}"


def nb101_cell(key: str) -> NB101Cell:
    """Return the cell of a key, without vertices that are on no path; ValueError says where a key is wrong."""
    _check_marks(key)
    letters, _, rows = key.partition("/")
    size = len(letters) + 2
    parts = rows.split(".")
    position = len(letters) + 1
    for index, part in enumerate(parts[: size - 1]):
        if len(part) != size - 1 - index:
            raise InputError(
                f"NAS-Bench-101 key {key!r} has {len(part)} digits at position {position}; "
                f"expected {size - 1 - index}, one for each later vertex of {size}"
            )
        position += len(part) + 1
    if len(parts) != size - 1:
        raise InputError(
            f"NAS-Bench-101 key {key!r} has {len(parts)} rows; expected {size - 1}, as for {size} vertices"
        )
    matrix = [[0] * (index + 1) + [int(digit) for digit in part] for index, part in enumerate(parts)] + [[0] * size]
    ops = ["input", *(_LETTERS[letter] for letter in letters), "output"]
    try:
        cell = NB101Cell.pruned(matrix, ops)
    except ValueError as error:
        raise InputError(f"NAS-Bench-101 key {key!r}: {error}") from error
    if cell.num_edges > MAX_EDGES:
        raise InputError(f"NAS-Bench-101 key {key!r} has {cell.num_edges} edges; expected at most {MAX_EDGES}")
    return cell


def _check_marks(key: str) -> None:
    slash = key.find("/")
    end = len(key) if slash < 0 else slash
    for position, mark in enumerate(key):
        known = _LETTERS if position < end else "/" if position == end else "01."
        if mark not in known:
            expected = "0, 1 or '.'" if position > end else "3 or 1 (convolutions), m (pooling), or '/'"
            raise InputError(f"NAS-Bench-101 key {key!r} has {mark!r} at position {position}; expected {expected}")
    if slash < 0:
        raise InputError(f"NAS-Bench-101 key {key!r} has no '/'; expected one, as in '3m/110.01.1'")
    if slash > MAX_VERTICES - 2:
        raise InputError(f"NAS-Bench-101 key {key!r} has {slash} inner vertices; expected at most {MAX_VERTICES - 2}")


class NasBench101:
    """Keys are texts of pruned cells, see `nb101_key`; isomorphic cells have one `hash` but may have several keys.

    The benchmark has 423,624 cells up to isomorphism. Networks have `stacks` stacks of `cells` cells on a stem of
    `stem_channels`.
    """

    name = "nasbench101"
    size: int | None = None

    def __init__(self, stem_channels: int = 128, stacks: int = 3, cells: int = 3, *, image_size: int = 32) -> None:
        check(image_size >= 8, "image_size", image_size, "at least 8")
        self.stem_channels, self.stacks, self.cells = stem_channels, stacks, cells
        self.input_size = (3, image_size, image_size)

    def sample(self, rng: np.random.Generator) -> str:
        """Draw a matrix and operations of seven vertices until the pruned cell has at most nine edges."""
        while True:
            matrix = np.triu(rng.integers(0, 2, (MAX_VERTICES, MAX_VERTICES)), 1).tolist()
            ops = rng.choice(NB101_OPS, MAX_VERTICES - 2).tolist()
            cell = _valid(matrix, ops)
            if cell is not None:
                return nb101_key(cell)

    def mutate(self, key: str, rng: np.random.Generator) -> str:
        """Change one edge or one operation until a valid cell results that is not isomorphic to the parent's.

        A parent of fewer than seven vertices gets unconnected ones first, so that cells can grow, by two edges at once.
        """
        parent = nb101_cell(key)
        parent_hash = parent.hash()
        matrix, ops = _padded(parent, rng)
        pairs = [(i, j) for i in range(MAX_VERTICES) for j in range(i + 1, MAX_VERTICES)]
        idle = [v for v in range(1, MAX_VERTICES - 1) if not any(matrix[v]) and not any(row[v] for row in matrix)]
        while True:
            changed, names = [list(row) for row in matrix], list(ops)
            vertex = int(rng.integers(1, MAX_VERTICES - 1))
            if rng.random() < 0.5 and vertex not in idle:
                names[vertex - 1] = str(rng.choice([op for op in NB101_OPS if op != ops[vertex - 1]]))
            elif vertex in idle:
                source, target = int(rng.integers(0, vertex)), int(rng.integers(vertex + 1, MAX_VERTICES))
                changed[source][vertex] = changed[vertex][target] = 1
            else:
                source, target = pairs[int(rng.integers(len(pairs)))]
                changed[source][target] = 1 - changed[source][target]
            cell = _valid(changed, names)
            if cell is not None and cell.hash() != parent_hash:
                return nb101_key(cell)

    def enumerate(self) -> Iterator[str]:
        raise InputError("space nasbench101 has no list of its 423,624 cells; sample it, or read the benchmark's file")

    def parse(self, key: str) -> str:
        return nb101_key(nb101_cell(key.strip()))

    def hash(self, key: str) -> str:
        """Return the benchmark's hash of the cell."""
        return nb101_cell(key.strip()).hash()

    def build(self, key: str, *, num_classes: int = 100, in_chans: int = 3) -> nn.Module:
        cell = nb101_cell(key.strip())
        return timm.create_model(
            "nb101",
            matrix=cell.matrix,
            ops=cell.ops,
            stem_channels=self.stem_channels,
            stacks=self.stacks,
            cells=self.cells,
            num_classes=num_classes,
            in_chans=in_chans,
        )


def _valid(matrix: Sequence[Sequence[int]], ops: Sequence[str]) -> NB101Cell | None:
    """Return the pruned cell, if there is a path and there are not too many edges."""
    try:
        cell = NB101Cell.pruned(matrix, ["input", *ops, "output"])
    except ValueError:
        return None
    return cell if cell.num_edges <= MAX_EDGES else None


def _padded(cell: NB101Cell, rng: np.random.Generator) -> tuple[list[list[int]], list[str]]:
    """Return matrix and inner operations of seven vertices, with unconnected ones at drawn places among the others."""
    inner = len(cell.ops) - 2
    places = sorted(rng.choice(np.arange(1, MAX_VERTICES - 1), inner, replace=False).tolist())
    places = [0, *places, MAX_VERTICES - 1]
    matrix = [[0] * MAX_VERTICES for _ in range(MAX_VERTICES)]
    for i, row in enumerate(cell.matrix):
        for j, value in enumerate(row):
            matrix[places[i]][places[j]] = value
    ops = rng.choice(NB101_OPS, MAX_VERTICES - 2).tolist()
    for place, op in zip(places[1:-1], cell.ops[1:-1], strict=True):
        ops[place - 1] = op
    return matrix, ops
