"""Tables are well made, and their quick cells agree."""

import pytest

from diswot import tables
from diswot.data import s0_ground_truth
from visionkernels.tables import TIME, Table, evaluate


def table(name: str) -> Table:
    (found,) = (each for each in tables.tables() if each.name == name)
    return found


def test_counts_agree() -> None:
    results = evaluate([table("counts")], progress=False)
    assert [(each.cell.row, each.cell.column) for each in results if each.status != "agrees"] == []
    assert len(results) > 20


def test_cells_are_different() -> None:
    for each in tables.tables():
        places = [(cell.row, cell.column) for cell in each.cells]
        assert len(set(places)) == len(places), each.name


def test_open_cells_say_what_they_need() -> None:
    for name in ("teachers", "nasbench201"):
        results = evaluate([table(name)], progress=False)
        assert {each.status for each in results} == {"not run"}
        assert all("needs" in each.detail and each.cell.command.startswith("diswot") for each in results)


def test_long_cells_wait_for_full() -> None:
    for name in ("sources", "students"):
        assert all(TIME in cell.needs for cell in table(name).cells)
    # the quick report makes one ranking of S0
    quick = [cell for cell in table("s0").cells if TIME not in cell.needs]
    assert quick and {cell.measure.args[2:] for cell in quick} == {()}


def test_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure of a cell is the figure of the ranking, with its interval."""
    monkeypatch.setattr(tables, "SEEDS", 1)
    monkeypatch.setattr(tables, "BATCH", 4)
    monkeypatch.setattr(
        tables, "s0_ground_truth", lambda kind="distilled": dict(list(s0_ground_truth(kind).items())[:3])
    )
    tables.ranking.cache_clear()
    tables._agreements.cache_clear()
    measured = tables._kendall("params", teacher="cifar_resnet8")
    # 111, 113, 117: the more parameters, the better
    assert measured.value == pytest.approx(1.0) and "95 %: " in measured.note
    tables.ranking.cache_clear()
    tables._agreements.cache_clear()
