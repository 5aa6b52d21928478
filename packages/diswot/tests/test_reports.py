"""Tables, CSV, JSON and plots of rankings and searches, whatever numbers are in them."""

import csv
import json
import math

import numpy as np
import pytest
from PIL import Image

from diswot.ranking import Ranking
from diswot.reports import (
    agreement_table,
    order_table,
    ranking_json,
    shortlist_table,
    write_csv,
    write_scatter,
)
from diswot.searching import Candidate, SearchResult

TRUTH = {"a": 70.0, "b": 71.0, "c": 72.5}


@pytest.fixture
def ranking():
    scores = {"snip": (1.0, math.nan, -math.inf), "same": (1.0, 1.0, 1.0), "params": (3.0, 2000000.0, 1.0)}
    return Ranking(("a", "b", "c"), scores, scores, dict.fromkeys(scores, 0.25))


class TestAgreementTable:
    def test_rows(self, ranking):
        lines = agreement_table(ranking.agreements(TRUTH)).splitlines()
        assert [part.strip() for part in lines[0].strip("|").split("|")][:3] == ["order", "Kendall", "95 % interval"]
        assert [part.strip() for part in lines[3].strip("|").split("|")] == [
            "same",
            "-",
            "- to -",
            "-",
            "-",
            "-",
            "0.2",
        ]
        assert "-0.333" in lines[4]
        assert "nan" not in "".join(lines)


class TestOrderTable:
    def test_best_first(self, ranking):
        lines = order_table(ranking, 2).splitlines()
        assert len(lines) == 4
        assert [line.split("|")[1].strip() for line in lines] == ["network", lines[1].split("|")[1], "a", "c"]
        assert "2e+06" in order_table(ranking)


class TestShortlistTable:
    def test_rows(self):
        best = Candidate("x", -0.5, {"semantic": -0.5}, 0.1, 3, 1_234_567, 8_900_000)
        worst = Candidate("y", math.nan, {"semantic": math.nan}, math.nan, 3, 1, 2)
        lines = shortlist_table(SearchResult((best, worst), ("x", "y", "x")), 5).splitlines()
        assert [part.strip() for part in lines[2].strip("|").split("|")] == [
            "x", "-0.5", "0.1", "-0.5", "3", "1,234,567", "8.90 M",
        ]  # fmt: skip
        assert len(lines) == 4
        assert len(shortlist_table(SearchResult((best, worst), ()), 1).splitlines()) == 3


class TestRankingJson:
    def test_is_json_with_null_for_what_has_no_word(self, ranking):
        found = json.loads(json.dumps(ranking_json(ranking, ranking.agreements(TRUTH)), allow_nan=False))
        assert found["scores"][0] == {"key": "a", "snip": 1.0, "same": 1.0, "params": 3.0}
        assert found["scores"][1]["snip"] is None
        assert found["scores"][2]["snip"] is None
        assert set(found["rows"][0]) == {
            "proxy", "kendall", "spearman", "pearson", "kendall_low", "kendall_high", "kendall_given_params", "seconds"
        }  # fmt: skip
        assert found["rows"][1]["kendall"] is None

    def test_without_truth(self, ranking):
        assert ranking_json(ranking, [])["rows"] == []


class TestWriteCsv:
    def test_comes_back(self, ranking, tmp_path):
        path = tmp_path / "new" / "scores.csv"
        write_csv(path, ranking, {"a": 70.0})
        with path.open(newline="") as file:
            rows = list(csv.reader(file))
        assert rows[0] == ["key", "accuracy", "snip", "same", "params"]
        assert rows[1] == ["a", "70.0", "1.0", "1.0", "3.0"]
        assert rows[2][1:3] == ["", "nan"]
        assert float(rows[3][2]) == -math.inf

    def test_keys_with_commas(self, tmp_path):
        write_csv(tmp_path / "x.csv", Ranking(('Super(3,4),"x"',), {"params": (1.0,)}, {}, {}), {})
        with (tmp_path / "x.csv").open(newline="") as file:
            assert list(csv.reader(file))[1][0] == 'Super(3,4),"x"'

    def test_existing(self, ranking, tmp_path):
        path = tmp_path / "scores.csv"
        path.write_text("mine")
        with pytest.raises(FileExistsError, match="--overwrite"):
            write_csv(path, ranking, {})
        assert path.read_text() == "mine"
        write_csv(path, ranking, {}, overwrite=True)
        assert path.read_text().startswith("key")


class TestWriteScatter:
    def test_draws_what_is_finite(self, ranking, tmp_path):
        pytest.importorskip("matplotlib")
        write_scatter(tmp_path / "plot.png", ranking, TRUTH)
        with Image.open(tmp_path / "plot.png") as picture:
            pixels = np.asarray(picture.convert("RGB"), dtype=int)
        # points are blue
        assert ((pixels - (42, 111, 151)).__abs__().sum(-1) < 10).sum() > 100

    def test_missing_truth_leaves_no_file(self, ranking, tmp_path):
        pytest.importorskip("matplotlib")
        with pytest.raises(KeyError, match="c"):
            write_scatter(tmp_path / "plot.png", ranking, {"a": 1.0, "b": 2.0})
        assert list(tmp_path.iterdir()) == []
