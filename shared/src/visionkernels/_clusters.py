"""Calls on the workers of a Ray or Dask cluster, one result after the other, and which of them cost a worker its life.

joblib's backends of the two would do, but Dask's runs everything in this process while the cluster has one worker, and
Ray's neither gives results one by one nor outlives a worker.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from visionkernels.extras import require

__all__ = ["KilledWorkerError", "on_dask", "on_ray"]

Call = Callable[[int, Any], tuple[int, Any]]


class KilledWorkerError(RuntimeError):
    """The system killed every worker that ran the call of `index`."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(index, reason)
        self.index, self.reason = index, reason


def on_dask(call: Call, items: Sequence[tuple[int, Any]], limit: int | None) -> Iterator[Any]:
    """Yield what `call(index, item)` returns, or a KilledWorkerError; `limit` calls run at a time, None: all."""
    distributed = require("distributed", "distributed")
    try:
        client = distributed.get_client()
    except ValueError:  # not connected yet
        client = distributed.Client()
    waiting, running, indices = iter(items), distributed.as_completed(), {}

    def submit(count: int | None) -> None:
        for index, item in islice(waiting, count):
            future = client.submit(call, index, item, pure=False)
            indices[future] = index
            running.add(future)

    submit(limit)
    try:
        for future in running:
            index = indices.pop(future)
            try:
                yield future.result()
            except distributed.KilledWorker as error:
                yield KilledWorkerError(index, _first_line(error))
            submit(1)
    finally:
        client.cancel(list(indices))


def on_ray(call: Call, items: Sequence[tuple[int, Any]], limit: int | None) -> Iterator[Any]:
    """Do as `on_dask` on a Ray cluster. An item whose worker dies is tried once more."""
    ray = require("ray", "ray")
    if not ray.is_initialized():
        ray.init()
    remote = ray.remote(max_retries=1)(lambda index, item: call(index, item))
    waiting, indices = iter(items), {}

    def submit(count: int | None) -> None:
        for index, item in islice(waiting, count):
            indices[remote.remote(index, item)] = index

    submit(limit)
    try:
        while indices:
            (reference,), _ = ray.wait(list(indices), num_returns=1)
            index = indices.pop(reference)
            try:
                yield ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
                yield KilledWorkerError(index, _first_line(error))
            submit(1)
    finally:
        for reference in indices:
            ray.cancel(reference, force=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
