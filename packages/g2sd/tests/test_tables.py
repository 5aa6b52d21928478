"""Cells that this machine measures agree with the paper; the others say what runs them."""

from dataclasses import replace

import pytest

from g2sd import tables
from visionkernels.tables import evaluate


def table(name, keep=lambda cell: True):
    found = next(each for each in tables.tables() if each.name == name)
    return replace(found, cells=tuple(cell for cell in found.cells if keep(cell)))


def statuses(chosen):
    return {(result.cell.row, result.cell.column): result.status for result in evaluate([chosen], progress=False)}


class TestTables:
    def test_every_cell_has_a_command(self):
        for each in tables.tables():
            assert each.title and each.convention
            for cell in each.cells:
                assert cell.command.startswith("g2sd "), cell.row

    def test_parameters_of_classifiers(self):
        found = statuses(table("classifiers", lambda cell: cell.column == "params M"))
        assert len(found) == 6 and set(found.values()) == {"agrees"}

    def test_work_of_tiny_classifiers(self):
        found = statuses(table("classifiers", lambda cell: cell.column == "GMACs" and "tiny" in cell.row))
        assert len(found) == 2 and set(found.values()) == {"agrees"}

    def test_autoencoders(self):
        found = statuses(table("autoencoders"))
        assert len(found) == 18 and set(found.values()) == {"agrees"}

    def test_step_of_tiny(self):
        found = statuses(table("steps", lambda cell: "Ti" in cell.row))
        assert list(found.values()) == ["agrees"]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["classifiers", "steps"])
    def test_work(self, name):
        assert set(statuses(table(name)).values()) == {"agrees"}

    def test_imagenet(self):
        """Nothing here can train on ImageNet: each row says what it needs."""
        results = evaluate([table("imagenet")], progress=False)
        assert {result.status for result in results} == {"not run"}
        assert all("the data set" in result.detail for result in results)
        figures = {result.cell.row: (result.cell.paper, result.cell.source) for result in results}
        assert figures["DeiT-S"] == (79.8, "read")
        assert figures["G2SD ViT-S"] == (82.5, "recalled")

    def test_commands_name_recipes(self):
        from g2sd.recipes import RECIPES

        for cell in table("imagenet").cells:
            words = cell.command.split()
            named = [word for word in words if word.endswith("_in1k")]
            assert all(word in RECIPES for word in named)
