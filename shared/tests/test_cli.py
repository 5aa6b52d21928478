"""Exit codes, one-line errors and help of the shared entry point, through a command of its own and as a process."""

import functools
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
import tyro
from torch.utils.data import DataLoader

from visionkernels import cli
from visionkernels.checks import InputError
from visionkernels.cli import FitOptions
from visionkernels.profiling import BenchRow, bench_table
from visionkernels.tables import TIME, Cell, Table
from visionkernels.tables import reproduce as measure
from visionkernels.training import FitResult


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to shrink."""

    ratio: float = 64.0
    """Bytes before / bytes after."""

    def __post_init__(self) -> None:
        if self.ratio <= 1:
            raise InputError(f"ratio={self.ratio} must be above 1")


def shrink(
    image: tyro.conf.Positional[Path],
    *,
    recipe: Recipe = Recipe(),
    size: int = 224,
    mode: Literal["mean", "max"] = "mean",
) -> None:
    """Shrink a picture.

    Args:
        image: the picture
        size: pixels a side
        mode: what a patch becomes
    """
    print(f"{image.name} {recipe.ratio:g} {size} {mode}")


def fail(kind: str = "value") -> int:
    """Fail on purpose."""
    errors: dict[str, BaseException] = {
        "value": InputError("topk=64 exceeds\nthe 49 regions"),
        "extra": ImportError("needs timm; run: pip install 'demo[train]'"),
        "work": RuntimeError("loss is not finite"),
        "interrupt": KeyboardInterrupt(),
        "saved": KeyboardInterrupt("stopped and saved after update 25; rerun to resume"),
    }
    if kind in errors:
        raise errors[kind]
    if kind == "file":
        Path("/nowhere/picture.png").read_bytes()
    if kind == "bug":
        return None + 1  # type: ignore[operator]
    if kind == "library":
        torch.zeros(2, 3).reshape(Path())  # type: ignore[call-overload]
    if kind == "convert":
        float("many")
    if kind.startswith("worker"):
        list(DataLoader(Broken(kind), num_workers=1))  # type: ignore[arg-type]
    return 1


class Broken(list):
    """A data set that fails in its worker."""

    def __init__(self, kind: str) -> None:
        super().__init__("x")
        self.kind = kind

    def __getitem__(self, index: object) -> object:
        if self.kind == "worker-check":
            raise InputError("picture x.png cannot be read")
        return len(None)  # type: ignore[arg-type]


def train(*, size: int = 3, fit: FitOptions = FitOptions()) -> None:
    """Train.

    Args:
        size: of the model
    """
    print(size, {name: value for name, value in vars(fit).items() if value})


def count(number: int = 100_000) -> None:
    """Print many lines."""
    for i in range(number):
        print(i)


def run(*argv: str) -> int:
    commands = {"shrink": shrink, "fail": fail, "count": count, "train": train}
    return cli.run("demo", commands, description="A demonstration.", version="1.2.3", argv=argv)


class TestSuccess:
    def test_flags(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("shrink", "a.png", "--ratio", "8", "--mode", "max") == 0
        assert capsys.readouterr() == ("a.png 8 224 max\n", "")

    def test_dash(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("shrink", "--size", "32", "./--debug") == 0
        assert capsys.readouterr().out == "--debug 64 32 mean\n"

    def test_debug_after_dashes_is_an_argument(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("shrink", "--", "--debug") == 0
        assert capsys.readouterr().out == "--debug 64 224 mean\n"

    def test_fit_options(self, capsys: pytest.CaptureFixture[str]) -> None:
        flags = ["--epochs", "2", "--lr", "0.1", "--precision", "bf16", "--trackers", "tensorboard", "wandb"]
        assert run("train", "--size", "4", *flags) == 0
        given = {"epochs": 2, "lr": 0.1, "precision": "bf16", "trackers": ("tensorboard", "wandb")}
        assert capsys.readouterr().out == f"4 {given}\n"

    def test_returned_code(self) -> None:
        assert run("fail", "--kind", "none") == 1

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("--version") == 0
        assert capsys.readouterr().out == "demo 1.2.3\n"


class TestHelp:
    def test_overview(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("--help") == 0
        out = capsys.readouterr().out
        assert "A demonstration." in out
        assert "  shrink  Shrink a picture.\n" in out

    def test_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("shrink", "--help") == 0
        out = capsys.readouterr().out
        assert "--size INT" in out and "pixels a side (default: 224)" in out and "Bytes before / bytes after." in out
        assert len(out.splitlines()) <= 40
        assert not set("╭│╰─\x1b") & set(out)

    def test_fit_options(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        assert run("train", "--help") == 0
        out = capsys.readouterr().out
        assert "--lr {None}|FLOAT" in out and "(default: None)" not in out
        assert len(out.splitlines()) <= 30


class TestErrors:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ((), "no command given; choose from: shrink, fail, count, train"),
            (("shrnk",), "unknown command 'shrnk'; did you mean 'shrink'? known: shrink, fail, count, train"),
            (("shrink",), "PATH"),
            (("shrink", "a.png", "--size", "big"), "--size: invalid literal for int() with base 10: 'big'"),
            (("shrink", "a.png", "--sise", "3"), "--sise, 3 Perhaps you meant: --size"),
            (("shrink", "a.png", "--mode", "sum"), "invalid choice 'sum' for argument '--mode'"),
            (("shrink", "a.png", "--ratio", "0.5"), "ratio=0.5 must be above 1"),
            (("shrink", "a.png", "x" * 200), "x" * 200),
            (("fail",), "topk=64 exceeds; the 49 regions"),
            (("fail", "--kind", "extra"), "needs timm; run: pip install 'demo[train]'"),
            (("fail", "--kind", "file"), "/nowhere/picture.png: No such file or directory"),
            (("fail", "--kind", "worker-check"), "demo: error: picture x.png cannot be read\n"),
        ],
    )
    def test_input(self, argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(*argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("demo: error: ") and message in err
        assert err.count("\n") == 1

    def test_work(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("fail", "--kind", "work") == 1
        message = "demo: error: RuntimeError: loss is not finite (--debug shows the traceback)\n"
        assert capsys.readouterr().err == message

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("bug", "TypeError: unsupported operand type(s) for +: 'NoneType' and 'int'"),
            ("library", "TypeError: reshape()"),
            ("convert", "ValueError: could not convert string to float: 'many'"),
            ("worker-bug", "TypeError: object of type 'NoneType' has no len()"),
        ],
    )
    def test_mistakes_of_the_code(self, kind: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("fail", "--kind", kind) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"demo: error: {message}")
        assert err.endswith(" (--debug shows the traceback)\n") and err.count("\n") == 1

    @pytest.mark.parametrize("argv", [("--debug", "fail"), ("fail", "--debug"), ("fail", "--kind", "work", "--debug")])
    def test_debug(self, argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
        assert run(*argv) in (1, 2)
        assert "Traceback (most recent call last)" in capsys.readouterr().err

    def test_interrupt(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("fail", "--kind", "interrupt") == 130
        assert capsys.readouterr().err == "demo: interrupted\n"
        assert run("fail", "--kind", "saved") == 130
        assert capsys.readouterr().err == "demo: stopped and saved after update 25; rerun to resume\n"

    def test_closed_pipe(self) -> None:
        folder = str(Path(__file__).parent)
        code = f"import sys; sys.path.insert(0, {folder!r}); import test_cli; sys.exit(test_cli.run('count'))"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout and process.stderr
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        process.stderr.close()
        assert process.wait() == 141

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
    def test_full_disk(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        with Path("/dev/full").open("w") as full:
            process = subprocess.run(
                light("--version"), stdout=full, stderr=subprocess.PIPE, env=environment, check=False
            )
            assert (process.returncode, process.stderr.count(b"\n")) == (1, 1)
            assert b"OSError: stdout: No space left" in process.stderr
            assert subprocess.run(light("nonsense"), stderr=full, check=False).returncode == 2

    @pytest.mark.skipif(os.name == "nt", reason="a shell closes the streams")
    @pytest.mark.parametrize(("argv", "code"), [("--version", 0), ("nonsense", 2)])
    def test_closed_streams(self, argv: str, code: int) -> None:
        """What a command would print is dropped; an error does not go to the other stream."""
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *light(argv)]
        assert subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout == (b"" if code else b"demo 1.2.3\n")
        command[2] = 'exec "$@" >&-'
        process = subprocess.run(command, stderr=subprocess.PIPE, check=False)
        assert (process.returncode, process.stderr.count(b"\n")) == (code, int(code > 0))

    @pytest.mark.skipif(os.name == "nt", reason="there, a name is no bytes")
    def test_names_that_are_no_text(self) -> None:
        environment = os.environ | {"PYTHONIOENCODING": "ascii"}
        command = light("show", "--name", b"\xff\xc3\xa9.png")
        process = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
        assert process.stdout == rb"\udcff\xe9.png" + b"\n"


LIGHT = """
import sys
from visionkernels import cli

def show(*, name: str) -> None:
    \'\'\'Show.\'\'\'
    print(name)

sys.exit(cli.run("demo", {"show": show}, description="", version="1.2.3"))
"""


def light(*argv: str | bytes) -> list[str | bytes]:
    """The line of a command that imports little."""
    return [sys.executable, "-c", LIGHT, *argv]


def test_metrics_in_words(capsys):
    cli.print_metrics({"epoch": 3, "top1": 91.25, "majority_top1": 10.0, "num_pictures": 8, "box_ap": 12.34567})
    expected = ["top-1 91.25 %", "always the most frequent class: top-1 10.00 %", "8 images", "box ap 12.35"]
    assert capsys.readouterr().out.splitlines() == expected


def test_one_process_reports(capsys, monkeypatch):
    result = FitResult({"epoch": 1, "top1": 91.25}, [], Path("run/weights.safetensors"), None)
    cli.report_fit(result.metrics, result.weights, "well")
    assert capsys.readouterr().out == "top-1 91.25 %\nwell\nweights: run/weights.safetensors\n"
    monkeypatch.setenv("RANK", "1")
    cli.report_fit(result.metrics, result.weights)
    assert capsys.readouterr().out == ""


def test_tables(capsys, tmp_path):
    def reproduce(*, report: cli.ReportOptions = cli.ReportOptions()) -> int:
        """Measure the paper's tables."""
        return measure("visionkernels", [Table("one", "Table 1: models", "", (cell,))], **vars(report))

    cell = Cell(
        row="tiny", column="top-1", paper=2.2, digits=1, tolerance=0.05, command="", needs=(TIME,), measure=lambda: 2.2
    )
    call = functools.partial(cli.run, "demo", {"reproduce": reproduce}, description="", version="1")
    assert call(argv=["reproduce"]) == 0
    assert "0 agrees, 0 misses, 0 measured, 1 not run" in capsys.readouterr().out
    flags = ["--full", "--json", str(tmp_path / "tables.json"), "--figures-dir", str(tmp_path)]
    assert call(argv=["reproduce", *flags]) == 0
    assert "1 agrees" in capsys.readouterr().out and (tmp_path / "tables.json").exists()
    assert call(argv=["reproduce", *flags]) == 2
    assert call(argv=["reproduce", *flags, "--overwrite"]) == 0


def test_device():
    assert cli.find_device("cpu") == torch.device("cpu")
    assert cli.find_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="device='gpu7' cannot be used: "):
        cli.find_device("gpu7")


class TestReportBench:
    ROW = BenchRow(
        id="forward", ours_s=0.0123, baseline_s=0.02, ratio=1.62, target=1.4, threads=1, dtype="float32", shape="1x3"
    )

    def test_rows(self, tmp_path, capsys):
        cli.report_bench([self.ROW], json=tmp_path / "b.json")
        assert json.loads((tmp_path / "b.json").read_text()) == [asdict(self.ROW)]
        printed = capsys.readouterr()
        assert (printed.out, printed.err) == (bench_table([self.ROW]) + "\n", "forward: 1.62\n")

    def test_refuses_before_it_measures(self, tmp_path):
        (tmp_path / "b.json").write_text("[]")
        with pytest.raises(FileExistsError):
            cli.report_bench((1 / 0 for _ in "x"), json=tmp_path / "b.json")
        with pytest.raises(NotADirectoryError):
            cli.report_bench((1 / 0 for _ in "x"), json=tmp_path / "b.json" / "b.json")

    def test_rows_are_kept_without_stdout(self, tmp_path, monkeypatch):
        stdout = io.StringIO()
        stdout.close()
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(ValueError, match="closed file"):
            cli.report_bench([self.ROW], json=tmp_path / "b.json")
        assert json.loads((tmp_path / "b.json").read_text()) == [asdict(self.ROW)]
