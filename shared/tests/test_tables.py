"""A table's life: which cells are measured, what the others say, how it is printed and written."""

import json
from pathlib import Path
from typing import Literal

import pytest
import torch

from visionkernels import tables
from visionkernels.tables import (
    CHECKPOINT,
    DATASET,
    GPU,
    SAMPLES,
    TIME,
    Cell,
    Figure,
    Measured,
    Need,
    Table,
    as_dict,
    evaluate,
    installed,
    render,
    reproduce,
)


def cell(
    measured: float | Measured | Exception | None,
    *needs: Need,
    paper: float | None = 2.2,
    row: str = "tiny",
    better: Literal["higher", "lower"] | None = None,
) -> Cell:
    def measure() -> float | Measured:
        if isinstance(measured, Exception):
            raise measured
        assert measured is not None
        return measured

    return Cell(
        row=row,
        column="GFLOPs",
        paper=paper,
        digits=1,
        tolerance=0.05,
        command="demo bench <tiny>",
        measure=None if measured is None else measure,
        needs=needs,
        better=better,
    )


def table(*cells: Cell) -> Table:
    return Table("models", "Table 1: models", "multiply-adds at 224 x 224", cells)


class TestEvaluate:
    @pytest.mark.parametrize(
        ("given", "status", "detail"),
        [
            (cell(2.228), "agrees", ""),
            (cell(2.25), "agrees", ""),
            (cell(2.3), "misses", ""),
            (cell(2.3, better="higher"), "agrees", ""),
            (cell(2.1, better="higher"), "misses", ""),
            (cell(2.1, better="lower"), "agrees", ""),
            (cell(2.3, better="lower"), "misses", ""),
            (cell(Measured(2.2, 0.1, "3 seeds")), "agrees", "3 seeds"),
            (cell(2.228, paper=None), "measured", ""),
            (cell(None, DATASET, CHECKPOINT), "not run", "needs the data set and trained weights"),
            (cell(2.2, DATASET), "not run", "needs the data set"),
            (cell(2.2, TIME), "not run", "needs more than minutes (--full)"),
            (cell(RuntimeError("out of memory")), "failed", "RuntimeError: out of memory"),
            (cell(float("nan")), "failed", "measured nan (spread None)"),
            (cell(Measured(2.2, float("inf"))), "failed", "measured 2.2 (spread inf)"),
        ],
    )
    def test_status(self, given: Cell, status: str, detail: str) -> None:
        (result,) = evaluate([table(given)], progress=False)
        assert (result.status, result.detail) == (status, detail)

    def test_full(self) -> None:
        (result,) = evaluate([table(cell(2.2, TIME))], full=True, progress=False)
        assert result.status == "agrees"

    def test_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given = table(cell(2.2, GPU))
        for present, status in ((True, "agrees"), (False, "not run")):
            monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
            assert evaluate([given], progress=False)[0].status == status

    def test_samples(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None)
        (result,) = evaluate([table(cell(2.2, SAMPLES))], progress=False)
        assert result.detail == "needs mlxtend and skimage (pip install 'visionkernels[samples]')"

    def test_installed(self) -> None:
        (result,) = evaluate([table(cell(2.2, installed("json", pip="json")))], progress=False)
        assert result.status == "agrees"
        (result,) = evaluate([table(cell(2.2, installed("no_such_module", pip="demo[extra]")))], progress=False)
        assert result.detail == "needs no_such_module (pip install 'demo[extra]')"

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="no measure and needs nothing"):
            cell(None)


class TestRender:
    given = table(cell(2.228), cell(None, DATASET, row="small"), cell(None, DATASET, row="base"))

    def test_terminal(self) -> None:
        lines = render(as_dict(self.given, evaluate([self.given], progress=False))).splitlines()
        assert lines[0] == "Table 1: models"
        assert lines[5].split() == ["tiny", "GFLOPs", "2.2", "2.2", "+0.0", "agrees"]
        assert lines[6].split() == ["small", "GFLOPs", "2.2", "-", "-", "not", "run"]
        assert lines[-2:] == ["  small GFLOPs, base GFLOPs: needs the data set", "    demo bench <tiny>"]

    def test_markdown(self) -> None:
        text = render(as_dict(self.given, evaluate([self.given], progress=False)), "markdown")
        assert "| tiny  | GFLOPs   |     2.2 |        2.2 |         +0.0 | agrees   |" in text
        assert "- small GFLOPs, base GFLOPs: needs the data set: `demo bench <tiny>`" in text

    def test_html(self) -> None:
        text = render(as_dict(self.given, evaluate([self.given], progress=False)), "html")
        assert '<span class="not-run">not run</span>' in text
        assert "demo bench &lt;tiny&gt;" in text and "<tiny>" not in text

    def test_recalled_and_spread(self) -> None:
        recalled = Cell(
            row="S", column="top-1", paper=84.3, digits=1, tolerance=0.1, command="c", source="recalled",
            measure=lambda: Measured(84.16, 0.12),
        )  # fmt: skip
        (shown,) = as_dict(table(recalled), evaluate([table(recalled)], progress=False))["cells"]
        texts = (shown["paper_text"], shown["measured_text"], shown["difference_text"])
        assert texts == ("84.3 (recalled)", "84.2 ± 0.1", "-0.1")


class TestReproduce:
    figure = Figure("dot", "A dot", "One pixel.", lambda path: path.write_text("<svg/>") and None, format="svg")

    def test_files(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        report = tmp_path / "report.json"
        given = table(cell(2.3), cell(None, DATASET))
        assert reproduce("visionkernels", [given], [self.figure], json=report, figures_dir=tmp_path / "figures") == 0
        out = capsys.readouterr().out
        assert "Table 1: models" in out and "visionkernels: 0 agrees, 1 misses, 0 measured, 1 not run, 0 failed" in out
        data = json.loads(report.read_text(), parse_constant=pytest.fail)
        assert [shown["status"] for shown in data["tables"][0]["cells"]] == ["misses", "not run"]
        assert data["versions"]["torch"] == torch.__version__.partition("+")[0]
        assert Path(data["figures"][0]["file"]).read_text() == "<svg/>"

    def test_module_of_another_distribution(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As Triton comes from pytorch-triton-rocm: no version to name, and no failure after all the measuring."""
        version = tables.importlib.metadata.version

        def without_triton(name: str) -> str:
            if name == "triton":
                raise tables.importlib.metadata.PackageNotFoundError(name)
            return version(name)

        monkeypatch.setattr(tables.importlib.metadata, "version", without_triton)
        assert reproduce("visionkernels", [table(cell(2.2))], json=tmp_path / "report.json") == 0
        assert "triton" not in json.loads((tmp_path / "report.json").read_text())["versions"]

    def test_failure(self, tmp_path: Path) -> None:
        assert reproduce("visionkernels", [table(cell(ValueError("no")))]) == 1
        broken = Figure("dot", "A dot", "", lambda path: (_ for _ in ()).throw(RuntimeError("no ink")))
        report = tmp_path / "report.json"
        assert reproduce("visionkernels", [], [broken], json=report, figures_dir=tmp_path) == 1
        assert json.loads(report.read_text())["figures"][0]["error"] == "RuntimeError: no ink"
        assert list(tmp_path.iterdir()) == [report]

    @pytest.mark.parametrize("existing", ["report.json", "dot.svg"])
    def test_overwrite(self, tmp_path: Path, existing: str) -> None:
        (tmp_path / existing).write_text("kept")
        given = table(cell(AssertionError("measured before the check")))
        with pytest.raises(FileExistsError, match=f"{existing} exists; pass --overwrite"):
            reproduce("visionkernels", [given], [self.figure], json=tmp_path / "report.json", figures_dir=tmp_path)
        assert (tmp_path / existing).read_text() == "kept"
        good = [table(cell(2.2))]
        files = {"json": tmp_path / "report.json", "figures_dir": tmp_path}
        assert reproduce("visionkernels", good, [self.figure], overwrite=True, **files) == 0
