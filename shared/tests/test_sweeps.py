import functools
import json
import operator
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from visionkernels import sweeps
from visionkernels.sweeps import SweepError

pytest.importorskip("joblib", reason="joblib is not installed")

# functions of the standard library, since workers cannot import test modules
square = functools.partial(pow, exp=2)
KILL = "__import__('os').kill(__import__('os').getpid(), 9)"
invert = functools.partial(operator.truediv, 1)


class TestMap:
    @pytest.mark.parametrize("jobs", [1, 2])
    def test_keeps_the_order(self, jobs):
        assert sweeps.map(square, range(20), jobs=jobs) == [number**2 for number in range(20)]

    def test_slow_items_keep_their_place(self):
        assert sweeps.map(time.sleep, [0.2, 0.0], jobs=2) == [None, None]

    def test_no_progress(self, monkeypatch, capsys):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        assert sweeps.map(square, range(3), jobs=1, show_progress=False) == [0, 1, 4]
        assert capsys.readouterr().err == ""
        sweeps.map(square, range(3), jobs=1)
        assert "sweep" in capsys.readouterr().err

    def test_empty(self):
        assert sweeps.map(square, [], jobs=2) == []

    def test_one_thread_a_worker(self):
        assert sweeps.map(os.getenv, ["MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"], jobs=2) == ["1", "1"]
        assert sweeps.map(os.getenv, ["MKL_NUM_THREADS"], jobs=2, threads=3) == ["3"]

    def test_threads_of_one_job(self):
        before = torch.get_num_threads()
        assert sweeps.map(lambda _: torch.get_num_threads(), [0], jobs=1, threads=before + 1) == [before + 1]
        assert torch.get_num_threads() == before

    @pytest.mark.parametrize("jobs", [1, 2])
    def test_failures_in_their_places(self, jobs):
        first, failure, last = sweeps.map(invert, [2, 0, 4], jobs=jobs, errors="return")
        assert (first, last) == (0.5, 0.25)
        assert (failure.item, str(failure)) == (0, "item 0 failed: ZeroDivisionError: division by zero")

    def test_killed_worker(self, tmp_path):
        """The item is named, the others are kept, and those that were lost with it are computed again."""
        items = ["1 + 1", "2 + 2", KILL, "3 + 3", "4 + 4"]
        done = tmp_path / "done.jsonl"
        results = sweeps.map(eval, items, jobs=2, errors="return", done=done)
        assert [results[i] for i in (0, 1, 3, 4)] == [2, 4, 6, 8]
        assert isinstance(results[2], SweepError) and results[2].item == KILL
        assert "the system killed its worker each time" in str(results[2])
        assert len(done.read_text().splitlines()) == 4
        with pytest.raises(SweepError, match="the system killed its worker"):
            sweeps.map(eval, items, jobs=2)

    def test_killed_once(self, tmp_path):
        """As by a memory that was short for a moment."""
        mark = str(tmp_path / "mark")
        item = f"7 if __import__('os').path.exists({mark!r}) else (open({mark!r}, 'w').close(), {KILL})"
        assert sweeps.map(eval, ["1", item, "2"], jobs=2) == [1, 7, 2]

    def test_message_is_short(self):
        with pytest.raises(SweepError) as caught:
            sweeps.map(invert, [list(range(1000))], jobs=1)
        assert len(str(caught.value)) < 400
        assert caught.value.item == list(range(1000))

    @pytest.mark.parametrize("jobs", [1, 2])
    def test_failure_carries_the_item(self, jobs):
        with pytest.raises(SweepError, match="item 0 failed: ZeroDivisionError") as caught:
            sweeps.map(invert, [2, 1, 0], jobs=jobs)
        assert caught.value.item == 0

    def test_errors(self):
        with pytest.raises(ValueError, match="jobs=0 must be"):
            sweeps.map(square, [1], jobs=0)
        with pytest.raises(ValueError, match="backend='mpi' must be"):
            sweeps.map(square, [1], backend="mpi")
        with pytest.raises(ValueError, match="errors='ignore' must be"):
            sweeps.map(square, [1], errors="ignore")

    @pytest.mark.parametrize(("backend", "module"), [("ray", "ray"), ("dask", "distributed")])
    def test_missing_backend_names_the_pip_line(self, monkeypatch, backend, module):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match="run: pip install"):
            sweeps.map(square, [1], backend=backend)

    def test_install_names_the_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "joblib", None)
        with pytest.raises(ImportError, match=r"pip install 'tinc-vision\[sweeps\]'"):
            sweeps.map(square, [1], install="tinc-vision[sweeps]")

    @pytest.mark.slow
    @pytest.mark.parametrize("kills", [0, 1, 99])
    @pytest.mark.parametrize("backend", ["ray", "dask"])
    def test_cluster(self, backend, kills, tmp_path):
        """A killed worker costs at most its item, in the workers of the cluster and never in this process."""
        with cluster(backend):
            results = sweeps.map(
                killing(tmp_path, kills), range(8), backend=backend, jobs=2, errors="return", done=tmp_path / "done"
            )
            assert os.getpid() not in [result["process"] for result in results if isinstance(result, dict)]
            survivors = [number for number in range(8) if kills < 99 or number != 3]
            assert [results[number]["square"] for number in survivors] == [number**2 for number in survivors]
            if kills == 99:
                assert isinstance(results[3], SweepError)
                assert "item 3 failed: the system killed its worker" in str(results[3])
            assert len((tmp_path / "done").read_text().splitlines()) == len(survivors)

    @pytest.mark.slow
    @pytest.mark.parametrize("backend", ["ray", "dask"])
    def test_failure_on_a_cluster(self, backend):
        with cluster(backend), pytest.raises(SweepError, match="item 0 failed: ZeroDivisionError"):
            sweeps.map(invert, [1, 2, 0, 4], backend=backend, jobs=1)


@contextmanager
def cluster(backend: str) -> Iterator[None]:
    """A cluster of two workers on this machine."""
    if backend == "dask":
        distributed = pytest.importorskip("distributed", reason="distributed is not installed; pip install distributed")
        with distributed.Client(n_workers=2, threads_per_worker=1, dashboard_address=None):
            yield
        return
    ray = pytest.importorskip("ray", reason="ray is not installed; pip install ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def killing(folder: Path, kills: int) -> Callable[[int], dict[str, int]]:
    """Squares a number, but for 3, which kills its process some times first; made here, it travels as a whole."""

    def run(number: int) -> dict[str, int]:
        before = len(list(folder.glob("kill-*")))
        if number == 3 and before < kills:
            (folder / f"kill-{before}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"square": number**2, "process": os.getpid()}

    return run


class TestDone:
    @pytest.mark.parametrize("jobs", [1, 2])
    def test_goes_on_after_a_failure(self, tmp_path, jobs):
        done = tmp_path / "new" / "done.jsonl"
        with pytest.raises(SweepError, match="item 0 failed"):
            sweeps.map(invert, [4, 2, 0], jobs=jobs, done=done)
        assert sweeps.map(invert, [4, 2, 1], jobs=jobs, done=done) == [0.25, 0.5, 1.0]
        lines = [json.loads(line) for line in done.read_text().splitlines()]
        assert sorted(lines, key=str) == [{"key": str(n), "result": 1 / n} for n in (1, 2, 4)]

    def test_computes_only_what_is_missing(self, tmp_path):
        asked = []
        for items in ([1, 2], [3, 2, 1], [2, 3]):
            result = sweeps.map(lambda item: asked.append(item) or -item, items, jobs=1, done=tmp_path / "done")
            assert result == [-item for item in items]
        assert asked == [1, 2, 3]

    def test_keeps_no_failures(self, tmp_path):
        for numerator in (1, 2):
            function = functools.partial(operator.truediv, numerator)
            first, failure = sweeps.map(function, [2, 0], jobs=1, errors="return", done=tmp_path / "done")
            assert (first, type(failure)) == (0.5, SweepError)

    def test_slow_items_hold_up_no_result(self, tmp_path):
        done = tmp_path / "done"
        # the second ends while the first sleeps
        sweeps.map(time.sleep, [0.5, 0.0], jobs=2, done=done)
        assert [json.loads(line)["key"] for line in done.read_text().splitlines()] == ["0.0", "0.5"]

    @pytest.mark.parametrize("length", range(1, 27))
    def test_torn_line(self, tmp_path, length):
        done = tmp_path / "done"
        done.write_text('{"key": "2", "result": 4}\n{"key": "3", "result": 7}'[: 26 + length])
        assert sweeps.map(square, [2, 3], jobs=1, done=done) == [4, 9]
        assert [json.loads(line)["result"] for line in done.read_text().splitlines()] == [4, 9]

    def test_fresh_and_kept_results_are_alike(self, tmp_path):
        for _ in range(2):
            assert sweeps.map(lambda item: (item, None), ["ü"], jobs=1, done=tmp_path / "done") == [["ü", None]]

    def test_result_that_is_not_json(self, tmp_path):
        with pytest.raises(SweepError, match="item 1 failed: TypeError: Object of type complex is not JSON"):
            sweeps.map(complex, [1], jobs=2, done=tmp_path / "done")

    def test_key(self, tmp_path):
        items = [np.zeros(2000), np.zeros(2000)]
        items[1][1000] = 1
        with pytest.raises(ValueError, match=r"two items have the key array\(\[0., 0., .*; give key="):
            sweeps.map(np.sum, items, jobs=1, done=tmp_path / "done")
        result = sweeps.map(
            lambda item: item.sum(), items, jobs=1, done=tmp_path / "done", key=lambda item: str(item.sum())
        )
        assert result == [0.0, 1.0]

    @pytest.mark.parametrize("content", ["my notes", "my notes\n", "[1]\n", '{"a": 1}\n'])
    def test_foreign_file_stays(self, tmp_path, content):
        (tmp_path / "notes").write_text(content)
        with pytest.raises(ValueError, match="notes' holds something else than results of a sweep"):
            sweeps.map(square, [1], jobs=1, done=tmp_path / "notes")
        assert (tmp_path / "notes").read_text() == content


class TestSweepError:
    def test_pickles(self):
        error = pickle.loads(pickle.dumps(SweepError(3, "item 3 failed")))
        assert (error.item, str(error)) == (3, "item 3 failed")
