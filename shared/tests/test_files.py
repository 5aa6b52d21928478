import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from visionkernels.extras import require
from visionkernels.files import finite_or_none, refuse_existing, replace_file, write_json


class TestReplaceFile:
    def test_appears_whole_at_the_end(self, tmp_path):
        target = tmp_path / "new" / "out.bin"
        with replace_file(target) as temporary:
            temporary.write_bytes(b"data")
            assert temporary.parent == target.parent
            assert temporary.suffix == ".bin"
            assert not target.exists()
        assert target.read_bytes() == b"data"
        assert [path.name for path in target.parent.iterdir()] == ["out.bin"]

    def test_failure_leaves_the_old_file(self, tmp_path):
        target = tmp_path / "out.txt"
        target.write_text("old")
        with pytest.raises(ZeroDivisionError), replace_file(target, overwrite=True) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError
        assert target.read_text() == "old"
        assert len(list(tmp_path.iterdir())) == 1

    def test_errors(self, tmp_path):
        target = tmp_path / "out.txt"
        target.write_text("old")
        with pytest.raises(FileExistsError, match=r"out\.txt exists; pass --overwrite"), replace_file(target):
            pytest.fail("the block must not run")

    def test_the_second_of_two_writers_fails(self, tmp_path):
        target = tmp_path / "out.txt"
        with (
            pytest.raises(FileExistsError, match=r"out\.txt exists; pass --overwrite"),
            replace_file(target) as slow,
        ):
            slow.write_text("second")
            with replace_file(target) as fast:
                fast.write_text("first")
        assert target.read_text() == "first"
        assert len(list(tmp_path.iterdir())) == 1

    def test_file_system_without_hard_links(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise PermissionError

        monkeypatch.setattr(os, "link", refuse)
        with replace_file(tmp_path / "out.txt") as temporary:
            temporary.write_text("data")
        assert (tmp_path / "out.txt").read_text() == "data"

    @pytest.mark.parametrize("exists", [True, False], ids=["target", "dangling"])
    def test_links_stay(self, tmp_path, exists):
        target, link = tmp_path / "folder" / "target.txt", tmp_path / "link.txt"
        target.parent.mkdir()
        if exists:
            target.write_text("old")
        link.symlink_to(target)
        with replace_file(link, overwrite=exists) as temporary:
            temporary.write_text("new")
        assert (link.readlink(), target.read_text()) == (target, "new")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    @pytest.mark.parametrize("overwrite", [True, False])
    def test_pipes_stay(self, tmp_path, overwrite):
        pipe, read = tmp_path / "pipe", []
        os.mkfifo(pipe)
        reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
        reader.start()
        write_json(pipe, {"a": 1}, overwrite=overwrite)
        reader.join()
        assert json.loads(read[0]) == {"a": 1}
        assert pipe.is_fifo()


class TestRefuseExisting:
    """An output that cannot be is refused before the work, and by the same sentence when it is written."""

    def test_places(self, tmp_path):
        (tmp_path / "file").write_text("")
        for path, kind, message in (
            (tmp_path / "file" / "x.json", NotADirectoryError, "no file can be made there"),
            (tmp_path / "file" / "new" / "x.json", NotADirectoryError, "no file can be made there"),
            (tmp_path, IsADirectoryError, "Is a directory"),
        ):
            with pytest.raises(kind, match=message):
                refuse_existing(path, overwrite=True)
            with pytest.raises(kind, match=message):
                write_json(path, {}, overwrite=True)
        refuse_existing(tmp_path / "new" / "deep" / "x.json", overwrite=False)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
    def test_folder_without_permission(self):
        with pytest.raises(OSError, match="no file can be made there") as caught:
            refuse_existing("/proc/x.json", overwrite=False)
        assert caught.value.filename == "/proc"

    @pytest.mark.parametrize("path", [None, "-", "/dev/null"])
    def test_no_files(self, path):
        refuse_existing(path, overwrite=False)


class TestWriteJson:
    def test_round_trip(self, tmp_path):
        write_json(tmp_path / "a.json", {"x": [1, 2.5, "ü"]})
        assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, 2.5, "ü"]}

    @pytest.mark.parametrize("path", ["-", Path("-")], ids=["text", "path"])
    def test_stdout(self, tmp_path, monkeypatch, capsys, path):
        monkeypatch.chdir(tmp_path)
        write_json(path, {"a": 1})
        assert json.loads(capsys.readouterr().out) == {"a": 1}
        assert not list(tmp_path.iterdir())

    def test_not_a_number_writes_nothing(self, tmp_path):
        with pytest.raises(ValueError, match="JSON"):
            write_json(tmp_path / "a.json", float("nan"))
        assert not list(tmp_path.iterdir())


class TestFiniteOrNone:
    def test_nested(self):
        value = {"a": [1.5, float("nan"), (float("-inf"), np.float64("inf"))], "b": {"c": float("inf"), "d": "inf"}}
        assert finite_or_none(value) == {"a": [1.5, None, [None, None]], "b": {"c": None, "d": "inf"}}

    @pytest.mark.parametrize("value", [0, 2.5, True, None, "nan", 10**400])
    def test_others_are_returned(self, value):
        assert finite_or_none(value) is value

    def test_mappings_become_dicts_that_json_takes(self, tmp_path):
        write_json(tmp_path / "a.json", finite_or_none(MappingProxyType({"psnr": float("inf")})))
        assert json.loads((tmp_path / "a.json").read_text()) == {"psnr": None}


class TestRequire:
    def test_missing_names_the_pip_line(self):
        with pytest.raises(ImportError, match=r"run: pip install 'visionkernels\[train\]'"):
            require("no_such_module_here", "visionkernels[train]")

    def test_broken_dependency_is_not_hidden(self, tmp_path, monkeypatch):
        (tmp_path / "needs_another.py").write_text("import no_such_dependency")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
            require("needs_another", "visionkernels[train]")

    def test_imports_stay_light(self):
        modules = ["weights", "files", "profiling", "samples", "sweeps", "training"]
        code = f"""
import sys
{"; ".join(f"import visionkernels.{module}" for module in modules)}
heavy = {{"accelerate", "timm", "matplotlib", "sklearn", "joblib", "skimage", "mlxtend"}} & set(sys.modules)
sys.exit(", ".join(heavy) or None)"""
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
