"""The folder of a run beside files of the user's, damage, removal, and what a kill leaves behind."""

import json
import multiprocessing
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from visionkernels.training import FitRecipe, OptimizerRecipe, TrainingData, fit
from visionkernels.training.means import share
from visionkernels.training.task import Task
from visionkernels.weights import read_checkpoint

RECIPE = FitRecipe(
    epochs=3, batch_size=4, optimizer=OptimizerRecipe(lr=0.02), device="cpu", save_every_updates=1, keep_checkpoints=2
)  # 2 updates an epoch


class Regression(Task):
    """Adds an offset that grows, in a buffer of its own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(3, 1))
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        self.offset = self.offset + 0.1
        return {"loss": (self.trainable_module(x)[:, 0] - y + self.offset).square().mean()}


def data(**options) -> TrainingData:
    generator = torch.Generator().manual_seed(0)
    pairs = TensorDataset(torch.randn(8, 3, generator=generator), torch.randn(8, generator=generator))
    return TrainingData(train=pairs, **options)


class StopAt:
    def __init__(self, micro_step: int, action=None) -> None:
        self.left, self.action = micro_step, action

    def __call__(self, batch):
        self.left -= 1
        if self.left == -1:
            if self.action is None:
                raise RuntimeError("stopped")
            self.action()
        return batch


def run(folder: Path, recipe: FitRecipe = RECIPE, **options):
    return fit(Regression(), recipe, data(**options), folder)


def stop(folder: Path, micro_step: int = 3, recipe: FitRecipe = RECIPE) -> list[str]:
    """Stop a run; return the names of its checkpoints."""
    with pytest.raises(RuntimeError, match="stopped"):
        run(folder, recipe, batch_transform=StopAt(micro_step))
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture
def cut(tmp_path) -> Path:
    stop(tmp_path / "cut")
    return tmp_path / "cut"


def same(left: Path, right: Path) -> bool:
    expected = read_checkpoint(right).state
    return all(torch.equal(value, expected[name]) for name, value in read_checkpoint(left).state.items())


class TestFolder:
    @pytest.mark.parametrize("name", ["backup", "epoch-00001", ".hidden", "zz", "epoch-1-update-2"])
    def test_folders_of_the_user(self, cut, tmp_path, name):
        """They stay as they are, and no run takes them for its own."""
        (cut / "checkpoints" / name).mkdir()
        (cut / "checkpoints" / name / "file").write_text("mine")
        assert same(run(cut).weights, run(tmp_path / "whole").weights)
        assert (cut / "checkpoints" / name / "file").read_text() == "mine"

    @pytest.mark.parametrize("name", ["README", "notes.txt", ".DS_Store", "epoch-00009-update-000000099"])
    def test_files_of_the_user(self, cut, name):
        (cut / "checkpoints" / name).write_text("mine")
        run(cut)
        assert (cut / "checkpoints" / name).read_text() == "mine"

    def test_keeps_different_states(self, tmp_path):
        """The checkpoint at the end of an epoch replaces that of its last update, which holds the same weights."""
        names = stop(tmp_path / "cut", 3)
        assert names == ["epoch-00001-update-000000002", "epoch-00001-update-000000003"]
        names = stop(tmp_path / "other", 4)
        assert names == ["epoch-00001-update-000000003", "epoch-00002-update-000000004"]

    def test_leftovers(self, cut, tmp_path):
        """What a kill in the middle of writing left is removed; what only looks like it is not."""
        left = [cut / name for name in (".best-ab12_x9z.safetensors", ".run-00000000.json", ".log-abcdefgh.jsonl")]
        mine = [cut / name for name in (".best-of-mine.safetensors", ".notes-abcdefgh.txt")]
        for file in left + mine:
            file.write_text("part")
        partial = cut / "checkpoints/.epoch-00001-update-000000009"
        partial.mkdir()
        run(cut)
        assert not any(file.exists() for file in [*left, partial]) and all(file.exists() for file in mine)

    def test_removed_under_the_run(self, tmp_path):
        """It is not made anew with a part of its files."""
        folder = tmp_path / "run"
        with pytest.raises(FileNotFoundError, match="was removed while this run wrote to it"):
            run(folder, batch_transform=StopAt(3, lambda: shutil.rmtree(folder)))
        assert not folder.exists()


class TestDamage:
    @pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "progress.pt", "checksums.json"])
    @pytest.mark.parametrize("kind", ["bit", "cut", "empty", "gone"])
    def test_checkpoint(self, cut, tmp_path, name, kind):
        """Any damage is noticed before anything is loaded; without the folder the run goes on from the one before."""
        first, last = sorted((cut / "checkpoints").iterdir())
        file = last / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        if kind == "gone" and name == "checksums.json":
            pytest.skip("a checkpoint without checksums is an older one")
        if kind == "gone":
            file.unlink()
        else:
            file.write_bytes({"bit": content, "cut": content[: len(content) // 2], "empty": b""}[kind])
        with pytest.raises(ValueError, match=f"{last.name} is damaged: .*remove this .* resumes from {first.name}"):
            run(cut)
        shutil.rmtree(last)
        assert same(run(cut).weights, run(tmp_path / "whole").weights)

    def test_only_checkpoint(self, tmp_path):
        stop(tmp_path, 1)
        (checkpoint,) = (tmp_path / "checkpoints").iterdir()
        (checkpoint / "model.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match="the same command resumes from the beginning"):
            run(tmp_path)

    def test_older_checkpoint(self, cut, tmp_path):
        """Checkpoints of before have no checksums."""
        for file in cut.glob("checkpoints/*/checksums.json"):
            file.unlink()
        assert same(run(cut).weights, run(tmp_path / "whole").weights)

    @pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"recipe": 3}', "\xff"])
    def test_run_json(self, cut, content):
        (cut / "run.json").write_bytes(content.encode("latin1"))
        with pytest.raises(ValueError, match=r"run\.json is damaged or no description of a run"):
            run(cut)

    @pytest.mark.parametrize("line", ["{", "[1]", "3", '{"loss": "low"}', "[" * 100_000, "\xff"], ids=len)
    def test_log(self, tmp_path, line):
        stop(tmp_path / "run", 5)
        log = tmp_path / "run" / "log.jsonl"
        log.write_bytes(line.encode("latin-1") + b"\n")
        with pytest.raises(ValueError, match=r"log\.jsonl is damaged in line 1 .*restore it, or use another folder"):
            run(tmp_path / "run")
        assert log.read_bytes() == line.encode("latin-1") + b"\n"

    def test_lost_log(self, tmp_path):
        run(tmp_path / "run")
        (tmp_path / "run" / "log.jsonl").unlink()
        with pytest.raises(ValueError, match=r"log\.jsonl has 0 of [23] epochs of this run"):
            run(tmp_path / "run")


class Compiled(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.trainable_module = torch.compile(self.trainable_module, backend="eager")


class TestCompiled:
    """torch.compile, of the user's or of accelerate's, changes neither the losses nor the names of what is saved."""

    RECIPE = replace(RECIPE, ema_decay=0.9)

    @pytest.mark.parametrize("by", ["user", "accelerate"])
    @pytest.mark.parametrize("first", ["compiled", "plain"])
    def test_resumes_the_other_way(self, tmp_path, monkeypatch, by, first):
        def task(kind: str) -> Task:
            is_compiled = kind == "compiled"
            monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager" if is_compiled and by == "accelerate" else "no")
            return Compiled() if is_compiled and by == "user" else Regression()

        second = "plain" if first == "compiled" else "compiled"
        whole = fit(task("plain"), self.RECIPE, data(), tmp_path / "whole")
        with pytest.raises(RuntimeError, match="stopped"):
            fit(task(first), self.RECIPE, data(batch_transform=StopAt(3)), tmp_path / "cut")
        resumed = fit(task(second), self.RECIPE, data(), tmp_path / "cut")
        assert [entry["loss"] for entry in resumed.history] == [entry["loss"] for entry in whole.history]
        assert same(resumed.weights, whole.weights) and same(resumed.ema_weights, whole.ema_weights)
        assert set(read_checkpoint(resumed.weights).state) == {"weight", "bias"}


def _process(rank: int, port: int, folder: Path, until: int | None) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "True",
    }  # fmt: skip
    run(folder, batch_transform=None if until is None else StopAt(until))


def in_two_processes(folder: Path, until: int | None = None) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_process, args=(rank, port, folder, until)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    return [process.exitcode for process in processes]


@pytest.mark.slow
def test_two_processes_resume_a_task_with_tensors(tmp_path):
    """Its buffers carry a process's own name of the CPU."""
    assert in_two_processes(tmp_path / "whole") == [0, 0]
    assert in_two_processes(tmp_path / "cut", until=3) == [1, 1]
    assert in_two_processes(tmp_path / "cut") == [0, 0]
    assert same(tmp_path / "cut/weights.safetensors", tmp_path / "whole/weights.safetensors")
    assert json.loads((tmp_path / "cut/run.json").read_text())["processes"] == 2


def test_progress_is_saved_without_devices(tmp_path):
    recipe = replace(RECIPE, save_every_updates=None)
    stop(tmp_path, 3, recipe)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    places = set()
    torch.load(checkpoint / "progress.pt", map_location=lambda storage, place: places.add(place) or storage)
    assert places == {"cpu"}


@pytest.mark.parametrize(
    ("saved", "processes", "expected"),
    [
        ([{"loss": (1.5, 2)}, {"loss": (2.0, 2)}], 2, [{"loss": (1.5, 2)}, {"loss": (2.0, 2)}]),
        ([{"loss": (1.5, 2)}, {"loss": (2.0, 2)}], 1, [{"loss": (3.5, 4)}]),
        ({"loss": (3.5, 4)}, 2, [{"loss": (3.5, 4)}, {}]),  # of checkpoints of before
        ({"loss": (3.5, 4)}, 1, [{"loss": (3.5, 4)}]),
    ],
    ids=["as many", "fewer", "older", "older alone"],
)
def test_processes_go_on_from_their_own_sums(saved, processes, expected):
    assert [share(saved, process, processes) for process in range(processes)] == expected
