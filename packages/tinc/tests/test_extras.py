"""The codec works without the extra `train`: in a process that cannot import timm and torchvision."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

import tinc
from tinc.official import normalise, plan_tree, save_official
from tinc.official.model import OctreeMLP
from tinc.recipes import RECIPES
from tinc.zarr_codec import TincCodec

VALUES = (np.arange(4 * 8 * 16).reshape(4, 8, 16) * 31 % 977).astype(np.uint16)

PROGRAM = """
import contextlib, io, json, sys
from importlib.abc import MetaPathFinder
from pathlib import Path

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("timm", "torchvision"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
folder, found = Path(sys.argv[1]), {}

# a program that knows Zarr alone finds the codec through its entry point
import zarr
assert "tinc" not in sys.modules
array = zarr.open_array(str(folder / "a.zarr"), mode="r")
found["zarr"] = array[3, 4:6, 5].tolist()

import numcodecs, numpy, tinc
values = array[:]
found["compress"] = tinc.compress(values, lossless=True, preset="fast").tobytes().hex()
found["decompress"] = tinc.decompress(folder / "a.tinc").tolist()
chunks = numcodecs.get_codec({"id": "tinc"})
found["numcodecs"] = chunks.decode(chunks.encode(values)).tolist()

from tinc.cli import main
def run(*arguments):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        return [main([*map(str, arguments)]), err.getvalue()]

found["commands"] = [
    run("compress", folder / "a.npy", folder / "b.tinc", "--lossless", "--preset", "fast"),
    run("decompress", folder / "b.tinc", folder / "b.npy"),
    run("info"),
    run("eval", folder / "a.npy", "--checkpoint", folder / "models"),
]
found["train"] = run("train", "multi0", "--data", folder / "a.npy", "--out", folder / "run")
found["blocked"] = sorted({"timm", "torchvision"} & set(sys.modules))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extras")
    np.save(folder / "a.npy", VALUES)
    zarr.create_array(str(folder / "a.zarr"), data=VALUES, chunks=(4, 8, 8), serializer=TincCodec(), compressors=None)
    tinc.compress(VALUES, lossless=True, preset="fast").save(folder / "a.tinc")
    normalised, side_info = normalise(VALUES)
    save_official(
        folder / "models", OctreeMLP(plan_tree(RECIPES["multi0"], normalised, 100_000)), RECIPES["multi0"],
        side_info=side_info,
    )  # fmt: skip
    return folder


def test_without_timm_and_torchvision(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["zarr"] == VALUES[3, 4:6, 5].tolist()
    assert found["compress"] == (folder / "a.tinc").read_bytes().hex()
    assert found["decompress"] == found["numcodecs"] == VALUES.tolist()
    assert [code for code, _ in found["commands"]] == [0, 0, 0, 0], found["commands"]
    assert np.array_equal(np.load(folder / "b.npy"), VALUES)
    assert found["train"] == [2, "tinc: error: timm is not installed; run: pip install 'tinc-vision[train]'\n"]
    assert found["blocked"] == [] and not (folder / "run").exists()
