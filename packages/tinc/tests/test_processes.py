"""One process of its own: a codec that cannot import timm and torchvision, and a training that is killed."""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import tinc
from tinc.official import RECIPES, normalise, plan_tree, save_official, train
from tinc.official.model import OctreeMLP
from tinc.recipes import Scheduler
from tinc.zarr_codec import TincCodec

pytest.importorskip("accelerate", reason="training needs the extra train")

VALUES = (np.arange(8 * 8 * 16).reshape(8, 8, 16) * 31 % 977).astype(np.uint16)
RECIPE = replace(
    RECIPES["multi1"], ratio=1.0, batch_size=8 * 520, epochs=30, eval_epochs=7, lr=1e-2,
    scheduler=Scheduler(arguments=(("milestones", (12, 20)), ("gamma", 0.5))),
)  # fmt: skip

PROGRAM = f"""
import contextlib, io, json, os, signal, sys, types
from importlib.abc import MetaPathFinder
from pathlib import Path

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("timm", "torchvision"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
folder, found = Path(sys.argv[1]), {{}}

# a program that imports Zarr alone finds the codec through its entry point
import zarr
assert "tinc" not in sys.modules
array = zarr.open_array(str(folder / "a.zarr"), mode="r")
found["zarr"] = array[3, 4:6, 5].tolist()

import numcodecs, numpy, tinc
values = array[:]
found["compress"] = tinc.compress(values, lossless=True, preset="fast").tobytes().hex()
found["decompress"] = tinc.decompress(folder / "a.tinc").tolist()
chunks = numcodecs.get_codec({{"id": "tinc"}})
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
found["train"] = run("train", "multi0", "--data", folder / "a.npy", "--out", folder / "refused")
found["blocked"] = sorted({{"timm", "torchvision"}} & set(sys.modules))
print(json.dumps(found), flush=True)

# training asks for timm, but does not use it: its import would take longer than all the rest
sys.modules["timm"] = types.ModuleType("timm")
from tinc.recipes import *
from tinc.official import train
from visionkernels.training.folder import RunFolder

published, publish = [], RunFolder.publish

def publish_and_die(self, partial, *, keep):
    publish(self, partial, keep=keep)
    published.append(partial)
    if len(published) == 4:
        os.kill(os.getpid(), signal.SIGKILL)

RunFolder.publish = publish_and_die
train({RECIPE!r}, folder / "a.npy", folder / "run", save_every_steps=4)
"""


@dataclass(frozen=True)
class Child:
    folder: Path
    found: dict[str, Any]
    returncode: int
    errors: str


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Child:
    folder = tmp_path_factory.mktemp("child")
    np.save(folder / "a.npy", VALUES)
    zarr.create_array(str(folder / "a.zarr"), data=VALUES, chunks=(4, 8, 8), serializer=TincCodec(), compressors=None)
    tinc.compress(VALUES, lossless=True, preset="fast").save(folder / "a.tinc")
    normalised, side_info = normalise(VALUES)
    model = OctreeMLP(plan_tree(RECIPES["multi0"], normalised, 100_000))
    save_official(folder / "models", model, RECIPES["multi0"], side_info=side_info)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True)
    assert done.stdout, done.stderr
    return Child(folder, json.loads(done.stdout), done.returncode, done.stderr)


def test_without_timm_and_torchvision(child: Child) -> None:
    found = child.found
    assert found["zarr"] == VALUES[3, 4:6, 5].tolist()
    assert found["compress"] == (child.folder / "a.tinc").read_bytes().hex()
    assert found["decompress"] == found["numcodecs"] == VALUES.tolist()
    assert [code for code, _ in found["commands"]] == [0, 0, 0, 0], found["commands"]
    assert np.array_equal(np.load(child.folder / "b.npy"), VALUES)
    assert found["train"] == [2, "tinc: error: timm is not installed; run: pip install 'tinc-vision[train]'\n"]
    assert found["blocked"] == [] and not (child.folder / "refused").exists()


def weights(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*-[WB]")}


def test_kill(child: Child, tmp_path: Path) -> None:
    """A run that was killed after its fourth checkpoint and is run again ends bit for bit like an undisturbed one."""
    assert child.returncode == -signal.SIGKILL, child.errors
    run = child.folder / "run"
    assert not (run / "last").exists()
    resumed = train(RECIPE, child.folder / "a.npy", run, save_every_steps=4)
    undisturbed = train(RECIPE, child.folder / "a.npy", tmp_path / "whole", save_every_steps=4)
    assert weights(resumed.last) == weights(undisturbed.last)
    assert weights(resumed.best) == weights(undisturbed.best)
    assert resumed.history == undisturbed.history
    assert "resumed" in json.loads((run / "run.json").read_text())
