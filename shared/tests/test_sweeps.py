import functools
import operator
import os
import pickle
import sys
import time

import pytest

from visionkernels import sweeps
from visionkernels.sweeps import SweepError

pytest.importorskip("joblib", reason="joblib is not installed")

# functions of the standard library, since workers cannot import test modules
square = functools.partial(pow, exp=2)
invert = functools.partial(operator.truediv, 1)


class TestMap:
    @pytest.mark.parametrize("jobs", [1, 2])
    def test_keeps_the_order(self, jobs):
        assert sweeps.map(square, range(20), jobs=jobs) == [number**2 for number in range(20)]

    def test_slow_items_keep_their_place(self):
        assert sweeps.map(time.sleep, [0.2, 0.0], jobs=2) == [None, None]

    def test_empty(self):
        assert sweeps.map(square, [], jobs=2) == []

    def test_one_thread_a_worker(self):
        assert sweeps.map(os.getenv, ["MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"], jobs=2) == ["1", "1"]
        assert sweeps.map(os.getenv, ["MKL_NUM_THREADS"], jobs=2, threads=3) == ["3"]

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

    @pytest.mark.parametrize(("backend", "module"), [("ray", "ray.util.joblib"), ("dask", "distributed")])
    def test_missing_backend_names_the_pip_line(self, monkeypatch, backend, module):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match="run: pip install"):
            sweeps.map(square, [1], backend=backend)

    @pytest.mark.slow
    def test_ray_cluster(self):
        ray = pytest.importorskip("ray", reason="ray is not installed; pip install ray")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            assert sweeps.map(square, range(8), backend="ray", jobs=2) == [number**2 for number in range(8)]
        finally:
            ray.shutdown()

    @pytest.mark.slow
    def test_dask_cluster(self):
        distributed = pytest.importorskip("distributed", reason="distributed is not installed; pip install distributed")
        with distributed.Client(n_workers=2, threads_per_worker=1, dashboard_address=None):
            assert sweeps.map(square, range(8), backend="dask", jobs=2) == [number**2 for number in range(8)]


class TestSweepError:
    def test_pickles(self):
        error = pickle.loads(pickle.dumps(SweepError(3, "item 3 failed")))
        assert (error.item, str(error)) == (3, "item 3 failed")
