import json
import os
import subprocess
import sys

import pytest

from visionkernels.extras import require
from visionkernels.files import replace_file, write_json


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

    @pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
    def test_is_as_readable_as_any_new_file(self, tmp_path):
        (tmp_path / "plain").touch()
        with replace_file(tmp_path / "ours"):
            pass
        assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


class TestWriteJson:
    def test_round_trip(self, tmp_path):
        write_json(tmp_path / "a.json", {"x": [1, 2.5, "ü"]})
        assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, 2.5, "ü"]}

    def test_not_a_number_writes_nothing(self, tmp_path):
        with pytest.raises(ValueError, match="JSON"):
            write_json(tmp_path / "a.json", float("nan"))
        assert not list(tmp_path.iterdir())


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
        modules = ["checkpoints", "files", "profiling", "samples", "sweeps", "training"]
        code = f"""
import sys
{"; ".join(f"import visionkernels.{module}" for module in modules)}
heavy = {{"accelerate", "timm", "matplotlib", "sklearn", "joblib", "skimage", "mlxtend"}} & set(sys.modules)
sys.exit(", ".join(heavy) or None)"""
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
