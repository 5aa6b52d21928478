"""The commands, as a user runs them: files in and out, exit codes, one line for an error, Ctrl-C."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import tinc
from tinc import rivals
from tinc.cli import main
from tinc.encoding import tree_layer

Wavy = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def small(wavy: Wavy) -> tuple[np.ndarray, bytes]:
    array = wavy((8, 12, 20), "uint16")
    return array, tinc.compress(array, ratio=8, preset="fast").tobytes()


@pytest.fixture
def volume(small: tuple[np.ndarray, bytes], tmp_path: Path) -> Path:
    np.save(tmp_path / "in.npy", small[0])
    return tmp_path / "in.npy"


@pytest.fixture
def compressed(small: tuple[np.ndarray, bytes], volume: Path) -> Path:
    volume.with_name("in.tinc").write_bytes(small[1])
    return volume.with_name("in.tinc")


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run a command that must end with 2 and one line on stderr; return the line."""
    capsys.readouterr()
    assert main([str(each) for each in argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("tinc: error: ") and "Traceback" not in captured.err
    return lines[0]


class TestCompress:
    @pytest.mark.parametrize(
        ("target", "bound"),
        [
            (["--ratio", "10"], lambda nbytes: nbytes <= 384),
            (["--bytes", "300"], lambda nbytes: nbytes <= 300),
            (["--bpv", "1.5"], lambda nbytes: nbytes <= 360),
            (["--psnr", "80"], lambda nbytes: nbytes < 3840),
            (["--max-error", "3"], lambda nbytes: nbytes < 3840),
            (["--lossless"], lambda nbytes: nbytes < 3840),
        ],
    )
    def test_targets(
        self, volume: Path, target: list[str], bound: Callable[[int], bool], capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = volume.with_name("out.tinc")
        assert main(["compress", str(volume), str(out), "--preset", "fast", *target]) == 0
        assert bound(out.stat().st_size)
        printed = capsys.readouterr().out
        assert f"{out}: {out.stat().st_size} bytes, ratio " in printed and "psnr" in printed
        error = np.abs(tinc.decompress(out).astype(int) - np.load(volume)).max()
        assert error <= {"--lossless": 0, "--max-error": 3}.get(target[0], 100)

    def test_overwrite(self, volume: Path, compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = compressed.read_bytes()
        line = fails(capsys, "compress", volume, compressed, "--lossless")
        assert "exists" in line and "--overwrite" in line and compressed.read_bytes() == before
        assert main(["compress", str(volume), str(compressed), "--lossless", "--overwrite"]) == 0
        assert np.array_equal(tinc.decompress(compressed), np.load(volume))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "exactly one target"),
            (["--ratio", "8", "--psnr", "30"], "exactly one target"),
            (["--ratio", "0.5"], "ratio=0.5 must be above 1"),
            (["--ratio", "0"], "ratio=0.0 must be above 1"),
            (["--bytes", "0"], "bytes=0 must be above 0"),
            (["--bpv", "0"], "bpv=0.0 must be above 0"),
            (["--ratio", "8", "--bytes", "0"], "exactly one target"),
            (["--bytes", "30"], "out of reach"),
            (["--lossless", "--channel-axis", "7"], "channel_axis=7"),
        ],
    )
    def test_errors(self, volume: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        out = volume.with_name("out.tinc")
        assert message in fails(capsys, "compress", volume, out, "--preset", "fast", *options)
        assert not out.exists()

    def test_missing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "none.npy" in fails(capsys, "compress", tmp_path / "none.npy", tmp_path / "a.tinc", "--lossless")

    def test_usage(self, volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["compress", str(volume)]) == 2
        assert main(["compress", str(volume), "a.tinc", "--preset", "slow", "--lossless"]) == 2
        assert main(["compres"]) == 2
        assert "Traceback" not in capsys.readouterr().err

    def test_channels(self, wavy: Wavy, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.stack([wavy((8, 9)), wavy((8, 9))]))
        argv = ["compress", str(tmp_path / "a.npy"), str(tmp_path / "a.tinc"), "--lossless", "--channel-axis", "0"]
        assert main(argv) == 0
        assert tinc.open(tmp_path / "a.tinc").info()["channel_axis"] == 0

    @pytest.mark.parametrize("options", [["--bytes", "120", "--nan", "fill"], ["--lossless"]])
    def test_nan_is_measured(self, tmp_path: Path, options: list[str]) -> None:
        array = np.linspace(0, 1, 36, dtype=np.float32).reshape(6, 6)
        array[1, 1] = np.nan
        np.save(tmp_path / "a.npy", array)
        assert main(["compress", str(tmp_path / "a.npy"), str(tmp_path / "a.tinc"), "--preset", "fast", *options]) == 0

    def test_nan(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        array = np.ones((6, 6), dtype=np.float32)
        array[:3] = 2
        array[1, 1] = np.nan
        np.save(tmp_path / "a.npy", array)
        argv = ["compress", tmp_path / "a.npy", tmp_path / "a.tinc", "--bytes", "120", "--preset", "fast"]
        assert "not finite" in fails(capsys, *argv)


class TestDecompress:
    def test_all(self, compressed: Path) -> None:
        out = compressed.with_name("out.npy")
        assert main(["decompress", str(compressed), str(out)]) == 0
        assert np.array_equal(np.load(out), tinc.decompress(compressed))

    @pytest.mark.parametrize(
        ("region", "box"),
        [("0:4,2:7,5:20", np.s_[0:4, 2:7, 5:20]), (":,3:4,:9", np.s_[:, 3:4, :9]), ("7:,:,:", np.s_[7:])],
    )
    def test_region(self, compressed: Path, region: str, box: tuple[slice, ...]) -> None:
        out = compressed.with_name("out.npy")
        assert main(["decompress", str(compressed), str(out), "--region", region]) == 0
        assert np.array_equal(np.load(out), tinc.decompress(compressed)[box])

    @pytest.mark.parametrize(
        "region",
        [
            "0:4",
            "0:4,1,2:3",
            "a:b,:,:",
            "0:1:2,:,:",
            "-1:,:,:",
            *(region for region in ("0:99,:,:", "5:2,:,:")),
        ],
    )
    def test_region_errors(self, compressed: Path, region: str, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        code = main(["decompress", str(compressed), str(compressed.with_name("out.npy")), f"--region={region}"])
        captured = capsys.readouterr()
        assert code == 2 and "Traceback" not in captured.err
        assert not compressed.with_name("out.npy").exists()

    def test_level(self, compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = compressed.with_name("out.npy")
        assert main(["decompress", str(compressed), str(out), "--level", "1"]) == 0
        assert np.load(out).shape == (4, 6, 10) and "uint16 4 x 6 x 10" in capsys.readouterr().out
        assert "level=9 must be in" in fails(capsys, "decompress", compressed, out, "--level", 9, "--overwrite")

    def test_overwrite(self, volume: Path, compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = volume.read_bytes()
        assert "exists" in fails(capsys, "decompress", compressed, volume)
        assert volume.read_bytes() == before
        assert main(["decompress", str(compressed), str(volume), "--overwrite"]) == 0
        assert volume.read_bytes() != before

    def test_damaged(self, compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
        content, out = compressed.read_bytes(), compressed.with_name("out.npy")
        for damaged, message in ((content[:-5], "cut off"), (b"GIF89a" * 20, "no .tinc file"), (b"", "is empty")):
            compressed.write_bytes(damaged)
            line = fails(capsys, "decompress", compressed, out)
            assert message in line and "in.tinc" in line and not out.exists()

    def test_partial(self, compressed: Path) -> None:
        content, out = compressed.read_bytes(), compressed.with_name("out.npy")
        compressed.write_bytes(content[:-5])
        assert main(["decompress", str(compressed), str(out), "--partial"]) == 0
        assert np.load(out).shape == (8, 12, 20)


class TestInfo:
    def test_file(self, compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
        report = compressed.with_name("info.json")
        assert main(["info", str(compressed), "--json", str(report)]) == 0
        assert "shape: [8, 12, 20]" in capsys.readouterr().out
        assert json.loads(report.read_text()) == json.loads(json.dumps(tinc.open(compressed).info()))
        assert "exists" in fails(capsys, "info", compressed, "--json", report)

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["info"]) == 0
        assert "tinc-vision" in capsys.readouterr().out

    def test_errors(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "a.tinc").write_bytes(b"TINC" + bytes(40))
        assert "a.tinc" in fails(capsys, "info", tmp_path / "a.tinc")
        assert "b.tinc" in fails(capsys, "info", tmp_path / "b.tinc")


class TestEval:
    def test_file(self, volume: Path, compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
        report = compressed.with_name("eval.json")
        assert main(["eval", str(volume), str(compressed), "--threshold", "100", "--json", str(report)]) == 0
        found, array, decoded = json.loads(report.read_text()), np.load(volume), tinc.decompress(compressed)
        mse = np.square(array.astype(float) - decoded).mean()
        assert found["psnr"] == pytest.approx(10 * np.log10(65535**2 / mse))
        assert found["largest_error"] == np.abs(array.astype(int) - decoded).max()
        assert found["ratio"] == pytest.approx(array.nbytes / compressed.stat().st_size)
        assert 0 < found["iou_100"] <= found["accuracy_100"] <= 1
        assert "psnr" in capsys.readouterr().out

    def test_exact(self, volume: Path) -> None:
        """An infinite PSNR is null in JSON, which has no infinity."""
        out, report = volume.with_name("a.tinc"), volume.with_name("eval.json")
        tinc.compress(np.load(volume), lossless=True).save(out)
        assert main(["eval", str(volume), str(out), "--json", str(report)]) == 0
        assert json.loads(report.read_text())["psnr"] is None

    def test_errors(self, volume: Path, compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--checkpoint" in fails(capsys, "eval", volume)
        np.save(volume.with_name("other.npy"), np.zeros((3, 4, 5), dtype=np.uint16))
        assert "has shape (8, 12, 20)" in fails(capsys, "eval", volume.with_name("other.npy"), compressed)


class TestBench:
    def test_unreachable_ratio_is_null_in_json(
        self, volume: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # zfp alone: training trees would take seconds
        monkeypatch.setattr(rivals, "compare", partial(rivals.compare, layers=()))
        assert main(["bench", str(volume), "--ratios", "2000", "--against", "zfp", "--json", "-"]) == 0
        assert '"psnr": null' in capsys.readouterr().out


class TestEmptyValues:
    """An empty string is a value, which is refused, and not an option that was left out."""

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["compress", "", "a.tinc", "--lossless"], "volume . has the suffix ''"),
            (["decompress", "IN", "OUT", "--region", ""], "--region  must give a range for each axis"),
            (["train", "", "--data", "a.npy", "--out", "run"], "unknown recipe ''"),
            (["train", "multi0", "--data", "", "--out", "run"], "volume . is not a file"),
            (["train", "--config", "", "--data", "a.npy", "--out", "run"], "configuration . is not a file"),
            (["bench", "IN", "--ratios", ""], "--ratios  must be numbers"),
            (["bench", "IN", "--against", "sz3,"], "is not known"),
        ],
    )
    def test_refused(
        self, compressed: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.chdir(compressed.parent)
        before = sorted(compressed.parent.iterdir())
        named = {"IN": compressed if argv[0] == "decompress" else compressed.with_name("in.npy"), "OUT": "out.npy"}
        assert message in fails(capsys, *(named.get(part, part) for part in argv))
        assert sorted(compressed.parent.iterdir()) == before


class TestProcess:
    def test_module(self, volume: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """`python -m tinc` exits with the code of the command."""
        out = volume.with_name("a.tinc")
        monkeypatch.setattr(sys, "argv", ["tinc", "compress", str(volume), str(out), "--bytes", "30"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("tinc", run_name="__main__")
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.out == "" and not out.exists()
        assert len(printed.err.splitlines()) == 1 and printed.err.startswith("tinc: error: ")

    @pytest.mark.parametrize("layers", ["tree", "both"])
    def test_signal(self, volume: Path, layers: str, monkeypatch: pytest.MonkeyPatch, few_steps: None) -> None:
        """SIGINT in the middle of a step of the training ends it, and the file is written."""
        from tinc.tree.fitting import _Fit

        step, count = _Fit.step, 0

        def interrupted(self: _Fit, *rest: float) -> object:
            nonlocal count
            count += 1
            if count == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return step(self, *rest)

        monkeypatch.setattr(_Fit, "step", interrupted)
        monkeypatch.setitem(tree_layer.TRAINING_STEPS, "balanced", 400)
        before, out = signal.getsignal(signal.SIGINT), volume.with_name("a.tinc")
        assert main(["compress", str(volume), str(out), "--bytes", "500", "--layers", layers]) == 0
        assert signal.getsignal(signal.SIGINT) is before
        assert count < 200 and out.stat().st_size <= 500
        assert "tree" in tinc.open(out).info()

    @pytest.mark.slow
    def test_interrupt(self, wavy: Wavy, tmp_path: Path) -> None:
        """Ctrl-C during the training of a tree: the best so far is written, and the command succeeds."""
        np.save(tmp_path / "a.npy", wavy((8, 16, 16), "uint16"))
        out = tmp_path / "a.tinc"
        program = (
            "import sys, tinc.tree.fitting, tinc.cli\n"
            "step = tinc.tree.fitting._Fit.step\n"
            "def slow(self, *rest):\n"
            "    print('training', flush=True)\n"
            "    return step(self, *rest)\n"
            "tinc.tree.fitting._Fit.step = slow\n"
            "sys.exit(tinc.cli.main(sys.argv[1:]))\n"
        )
        argv = ["compress", str(tmp_path / "a.npy"), str(out), "--bytes", "1500", "--layers", "both"]
        with subprocess.Popen(
            [sys.executable, "-c", program, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ) as process:  # fmt: skip
            assert process.stdout is not None
            while process.stdout.readline() != "training\n":
                assert process.poll() is None
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert output.count("training") < 2000
        assert out.stat().st_size <= 1500 and tinc.open(out).decode().shape == (8, 16, 16)

    @pytest.mark.slow
    def test_second_interrupt(self, wavy: Wavy, tmp_path: Path) -> None:
        """A second Ctrl-C ends the command at once, with 130 and no file."""
        np.save(tmp_path / "a.npy", wavy((16, 32, 32), "uint16"))
        program = (
            "import sys, signal, os, tinc.tree.fitting, tinc.cli\n"
            "def stuck(*_):\n"
            "    os.kill(os.getpid(), signal.SIGINT)\n"
            "    os.kill(os.getpid(), signal.SIGINT)\n"
            "    raise AssertionError('not interrupted')\n"
            "tinc.tree.fitting._Fit.step = stuck\n"
            "sys.exit(tinc.cli.main(sys.argv[1:]))\n"
        )
        argv = ["compress", str(tmp_path / "a.npy"), str(tmp_path / "a.tinc"), "--bytes", "1500", "--layers", "tree"]
        done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, check=False)
        assert done.returncode == 130 and "Traceback" not in done.stderr
        assert sorted(each.name for each in tmp_path.iterdir()) == ["a.npy"]
