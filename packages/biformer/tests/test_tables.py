import pytest

from biformer import tables
from visionkernels.tables import evaluate


@pytest.mark.parametrize("table", [t for t in tables.tables() if t.name != "mnist5k"], ids=lambda table: table.name)
def test_measured_cells_agree(table):
    """Every cell that this machine measures agrees with the paper, or has no printed figure."""
    results = evaluate([table], progress=False)
    assert {result.status for result in results} <= {"agrees", "measured", "not run"}
    assert all(result.cell.command for result in results)


def test_operations_are_exact():
    table = next(t for t in tables.tables() if t.name == "operations")
    for result in evaluate([table], progress=False):
        assert round(result.measured.value * 1e6) == round(result.cell.paper * 1e6)


def test_cheapest_partition():
    """The search finds the closed form of the minimum."""
    for side, topk in ((56, 1), (28, 4), (14, 16)):
        assert tables._cheapest_partition(side, topk) == pytest.approx((topk * side**4 / 2) ** (1 / 6), rel=1e-6)


@pytest.mark.slow
def test_learns_digits():
    table = next(t for t in tables.tables() if t.name == "mnist5k")
    *_, result = evaluate([table], full=True, progress=False)
    assert result.measured.value > 95


def test_figures(tmp_path):
    for figure in tables.figures():
        path = tmp_path / f"{figure.name}.{figure.format}"
        figure.draw(path)
        assert path.stat().st_size > 10_000
