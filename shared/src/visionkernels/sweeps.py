"""Independent work in parallel, on joblib: the cores of this machine, or a Ray or Dask cluster."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from tqdm import tqdm

from visionkernels.extras import require

__all__ = ["SweepError", "map"]

Item = TypeVar("Item")
Result = TypeVar("Result")
Backend = Literal["loky", "ray", "dask"]


class SweepError(RuntimeError):
    """One item of a sweep failed; `item` is that item, and the cause is what its function raised."""

    def __init__(self, item: Any, message: str) -> None:
        super().__init__(item, message)
        self.item, self.message = item, message

    def __str__(self) -> str:
        return self.message


def map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    jobs: int = -1,
    backend: Backend = "loky",
    threads: int = 1,
    description: str = "sweep",
) -> list[Result]:
    """Return `[function(item) for item in items]`, computed by `jobs` processes; the order is kept.

    `jobs=-1` is one a core. `"ray"` and `"dask"` use the cluster that this process is connected to (`ray.init`,
    `dask.distributed.Client`), else start one on this machine; there the cluster says how many threads a worker has,
    with `"loky"` it is `threads`. Functions, items and results travel between processes, so they must pickle. The
    first failure ends the sweep with SweepError.
    """
    joblib = require("joblib", "visionkernels[sweeps]")
    if jobs != -1 and jobs < 1:
        raise ValueError(f"jobs={jobs} must be at least 1, or -1 for one a core")
    limits = {}
    if backend == "loky":
        limits = {"inner_max_num_threads": threads}
    elif backend == "ray":
        require("ray.util.joblib", "ray").register_ray()
    elif backend == "dask":
        _connect_dask()
    else:
        raise ValueError(f"backend={backend!r} must be 'loky', 'ray' or 'dask'")
    # joblib's Ray backend cannot hand out results one by one, so its progress bar jumps to the end
    return_as = "list" if backend == "ray" else "generator"
    with joblib.parallel_config(backend=backend, n_jobs=jobs, **limits):
        results = joblib.Parallel(return_as=return_as)(joblib.delayed(_call)(function, item) for item in items)
        return list(tqdm(results, total=len(items), desc=description, disable=None))


def _connect_dask() -> None:
    distributed = require("distributed", "distributed")
    try:
        distributed.get_client()
    except ValueError:  # not connected yet; the new client becomes the one that joblib finds
        distributed.Client()


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    try:
        return function(item)
    except Exception as error:
        raise SweepError(item, f"item {item!r} failed: {type(error).__name__}: {error}") from error
