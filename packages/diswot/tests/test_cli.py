"""The command as a user runs it."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from diswot import spaces
from diswot.cli import PACKAGE, main

SMALL = ("--batch-size", "4", "--seeds", "1")


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    code = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    code = main([str(argument) for argument in argv])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1), error
    return error


class TestScore:
    def test_terms(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        report = tmp_path / "score.json"
        terms = "semantic,relation,channel,correlation"
        out = run(capsys, "score", "s0_131", "s0_111", "--terms", terms, *SMALL, "--json", report)
        found = json.loads(report.read_text())
        assert list(found["terms"]) == terms.split(",") and found["stderr"] is None
        assert found["total"] == pytest.approx(sum(found["terms"].values()))
        assert f"semantic: {found['terms']['semantic']:.6g}" in out
        assert "exists; pass --overwrite" in fails(capsys, "score", "s0_131", "s0_111", "--json", report)

    def test_spread(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "over 2 seeds" in run(capsys, "score", "s0_131", "s0_111", "--batch-size", 4, "--seeds", 2)

    def test_pictures(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / "a.png")
        assert "total" in run(capsys, "score", "s0_131", "s0:113", "--data", tmp_path, *SMALL)

    def test_errors(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "project=" in fails(capsys, "score", "cifar_resnet8x4", "s0_111", *SMALL)
        assert "unknown model 's0_11'; did you mean" in fails(capsys, "score", "s0_131", "s0_11", *SMALL)
        assert "unknown term 'semantics'; did you mean 'semantic'" in fails(
            capsys, "score", "s0_131", "s0_111", "--terms", "semantics", *SMALL
        )
        assert "none of 'patches', 'mnist5k' and 'noise', and no folder" in fails(
            capsys, "score", "s0_131", "s0_111", "--data", "nowhere", *SMALL
        )
        assert "batch_size=1" in fails(capsys, "score", "s0_131", "s0_111", "--batch-size", 1)
        assert "seeds=0" in fails(capsys, "score", "s0_131", "s0_111", "--seeds", 0)


class TestProxies:
    def test_names(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        report = tmp_path / "proxies.json"
        out = run(capsys, "proxies", "s0_111", "--names", "params,snip", "--batch-size", 4, "--json", report)
        assert [line.partition(":")[0] for line in out.splitlines()] == ["params", "snip"]
        assert json.loads(report.read_text())["params"] == 83892

    def test_errors(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "did you mean 'snip'" in fails(capsys, "proxies", "s0_111", "--names", "snipe", "--batch-size", 4)
        assert "no ReLU modules" in fails(
            capsys,
            "proxies",
            "test_convnext",
            "--names",
            "nwot",
            "--batch-size",
            4,
        )

    def test_what_does_not_apply_is_left_out(self, capsys: pytest.CaptureFixture[str]) -> None:
        code = main(["proxies", "test_convnext", "--batch-size", "4"])
        captured = capsys.readouterr()
        assert code == 0 and "snip: " in captured.out and "nwot: " not in captured.out
        assert "nwot: " in captured.err and "no ReLU modules" in captured.err


class TestRank:
    def test_known_accuracies(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        report, sheet, plot = (tmp_path / name for name in ("rank.json", "rank.csv", "rank.png"))
        out = run(
            capsys, "rank", "--keys", "111,131,113", "--teacher", "s0_131", "--proxies", "semantic,correlation+params",
            *SMALL, "--json", report, "--csv", sheet, "--plot", plot,
        )  # fmt: skip
        assert out.startswith("| order")
        found = json.loads(report.read_text())
        assert [row["proxy"] for row in found["rows"]] == ["semantic", "correlation+params", "params"]
        wanted = {"proxy", "kendall", "spearman", "pearson", "kendall_low", "kendall_high", "kendall_given_params"}
        assert wanted <= set(found["rows"][0])
        assert [row["key"] for row in found["scores"]] == ["111", "131", "113"]
        assert found["scores"][0]["params"] == 83892
        rows = list(csv.DictReader(sheet.read_text().splitlines()))
        assert [row["accuracy"] for row in rows] == ["61.87", "65.95", "69.01"]
        with Image.open(plot) as picture:
            assert picture.width > 500

    def test_own_accuracies(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        truth = tmp_path / "truth.txt"
        truth.write_text("111 10.5\n311 12\n113 14.25\n")
        report = tmp_path / "rank.json"
        run(capsys, "rank", "--truth", truth, "--proxies", "params", *SMALL, "--teacher", "s0_111", "--json", report)
        found = json.loads(report.read_text())
        assert [row["key"] for row in found["scores"]] == ["111", "311", "113"]
        assert found["rows"][0]["kendall"] == 1.0

    def test_budget(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        options = ("--teacher", "s0_111", "--proxies", "params", *SMALL, "--keys", "111,131,113")
        report = tmp_path / "rank.json"
        run(capsys, "rank", *options, "--budget", "params=200K", "--json", report)
        assert [row["key"] for row in json.loads(report.read_text())["scores"]] == ["111", "131"]
        assert "none of 3 networks" in fails(capsys, "rank", *options, "--budget", "params=1K")

    def test_keys_with_commas(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        keys = [f"resnet18?layers={layers}&channels=32,64,128,256" for layers in ("1,1,1,1", "1,2,1,1")]
        report = tmp_path / "rank.json"
        options = ["--space", "timm_resnet", "--proxies", "params", *SMALL, "--teacher", "s0_111"]
        run(capsys, "rank", *options, "--keys", ", ".join(keys), "--json", report)
        assert [each["key"] for each in json.loads(report.read_text())["scores"]] == keys
        assert "timm key 'resnet18?layers=1,1,1,1' lacks" in fails(
            capsys, "rank", *options, "--keys", f"{keys[0]}, resnet18?layers=1,1,1,1"
        )

    def test_a_plot_without_accuracies_scores_nothing(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        options = ["--truth", "none", "--keys", "111,113", "--teacher", "no_such_teacher"]
        assert "--plot needs accuracies" in fails(capsys, "rank", *options, "--plot", tmp_path / "x.png")
        assert "must be a name that ends in .png" in fails(capsys, "rank", *options, "--plot", tmp_path / "x.jpg2")

    def test_no_accuracies(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        report = tmp_path / "rank.json"
        out = run(
            capsys, "rank", "--truth", "none", "--keys", "111,113", "--proxies", "params", "--teacher", "s0_111",
            *SMALL, "--json", report,
        )  # fmt: skip
        assert "113" in out.splitlines()[2] and json.loads(report.read_text())["rows"] == []

    def test_errors(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert "unknown space 's1'" in fails(capsys, "rank", "--space", "s1")
        assert "expected a depth" in fails(capsys, "rank", "--keys", "119")
        assert "--truth" in fails(
            capsys, "rank", "--truth", "none", "--keys", "111,113", "--proxies", "params", "--teacher", "s0_111",
            *SMALL, "--plot", tmp_path / "a.png",
        )  # fmt: skip
        (tmp_path / "bad.txt").write_text("111 ten\n")
        assert "bad.txt, line 1" in fails(capsys, "rank", "--truth", tmp_path / "bad.txt")


class TestSearch:
    def test_goes_on(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        options = ("--teacher", "s0_131", "--budget", "params=200K", "--evaluations", 6, "--final-seeds", 2, *SMALL)
        first = run(capsys, "search", *options, "--out", tmp_path / "run")
        kept = (tmp_path / "run" / "scores.jsonl").read_bytes()
        assert run(capsys, "search", *options, "--out", tmp_path / "run") == first
        assert (tmp_path / "run" / "scores.jsonl").read_bytes() == kept
        result = json.loads((tmp_path / "run" / "result.json").read_text())
        assert max(each["params"] for each in result["candidates"]) <= 200_000
        assert f"best: {result['candidates'][0]['key']}" in first

    def test_errors(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert "such as params=5M" in fails(capsys, "search", "--budget", "5M")
        assert "shortlist=0 must be at least 1" in fails(capsys, "search", "--shortlist", 0)
        assert "batch_size=0 must be at least 2" in fails(capsys, "search", "--batch-size", 0)
        for seeds in (2, -1):
            said = fails(capsys, "search", "--seeds", 3, "--final-seeds", seeds)
            assert f"final_seeds={seeds} must be 0, or at least the 3 of seeds" in said
        (tmp_path / "notes.txt").write_text("mine")
        options = ("--teacher", "s0_111", "--evaluations", 1, "--final-seeds", 0, *SMALL)
        assert "folder of other files" in fails(capsys, "search", *options, "--out", tmp_path)

    def test_any_teacher(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A teacher of timm finds students of its kind, whatever their width."""
        code = main(
            [
                "search",
                "--teacher",
                "resnet10t",
                "--budget",
                "params=5M",
                "--evaluations",
                "2",
                "--final-seeds",
                "0",
                *SMALL,
            ]
        )
        captured = capsys.readouterr()
        assert code == 0 and "space timm_resnet" in captured.err
        assert "best: resnet18?" in captured.out


def test_sources_are_the_spaces() -> None:
    """Names in front of a colon that `create_network` takes; `timm` is known to all packages."""
    assert set(PACKAGE.sources) == set(spaces.SPACES) - {"timm"}
    assert len(PACKAGE.sources) == len(set(PACKAGE.sources))


class TestInfo:
    def test_lists(self, capsys: pytest.CaptureFixture[str]) -> None:
        out = run(capsys, "info")
        assert "nasbench201" in out and "correlation" in out and "crd" in out and "mnist5k_kd" in out


@pytest.mark.parametrize("command", ["score", "search", "rank", "proxies", "train", "eval", "export", "bench"])
def test_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    out = run(capsys, command, "--help")
    assert f"usage: diswot {command}" in out


def test_process() -> None:
    done = subprocess.run([sys.executable, "-m", "diswot", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "diswot 0.1.0\n")
