"""Independent work in parallel: on the cores of this machine by joblib, or on a Ray or Dask cluster."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from tqdm import tqdm

from visionkernels._clusters import KilledWorkerError, on_dask, on_ray
from visionkernels.checks import InputError, check_choice
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
    show_progress: bool = True,
    errors: Literal["raise", "return"] = "raise",
    done: str | Path | None = None,
    key: Callable[[Item], str] = repr,
    install: str = "visionkernels[sweeps]",
) -> list[Any]:
    """Return `[function(item) for item in items]`, computed by `jobs` processes; the order is kept.

    `jobs=-1` is one a core. `"ray"` and `"dask"` use the cluster that this process is connected to (`ray.init`,
    `dask.distributed.Client`), else start one on this machine; there the cluster says how many threads a worker has,
    with `"loky"` it is `threads`. Functions, items and results travel between processes, so they must pickle. The
    first failure ends the sweep with SweepError; with `errors="return"` it stands in its item's place instead. An item
    whose worker the system kills (out of memory) is tried again, and fails like others if it is killed again.

    `done` is a file that keeps every result as soon as it is there, a line of JSON each; a sweep that is run again
    takes them from there and computes the others. Results must be JSON then (a tuple comes back as a list), and `key`
    must tell items apart by a text that stays the same; failures are not kept. Raises ValueError for two items of one
    key and for a file that is no such list, ImportError with the pip line for `install` without joblib.
    """
    if jobs != -1 and jobs < 1:
        raise InputError(f"jobs={jobs} must be at least 1, or -1 for one a core")
    check_choice("errors", errors, ("raise", "return"))
    check_choice("backend", backend, Backend)
    keys = [] if done is None else [key(item) for item in items]
    results = {} if done is None else _read(Path(done), keys)
    call = functools.partial(_call, function, returns_errors=errors == "return", as_json=done is not None)
    # not above: a worker whose function needs no torch starts much faster
    from visionkernels.profiling import torch_threads

    missing = [(i, item) for i, item in enumerate(items) if i not in results]
    on_cores = functools.partial(_on_cores, threads=threads, install=install)
    runners: dict[str, Callable[..., Iterator[Any]]] = {"loky": on_cores, "dask": on_dask, "ray": on_ray}
    outcomes = runners[backend](call, missing, None if jobs == -1 else jobs)
    progress = tqdm(total=len(items), initial=len(results), desc=description, disable=None if show_progress else True)
    with torch_threads(threads), progress, contextlib.closing(outcomes):  # type: ignore[type-var]
        for outcome in outcomes:
            i, result = _killed(items, outcome) if isinstance(outcome, KilledWorkerError) else outcome
            if isinstance(result, SweepError):
                if errors == "raise":
                    raise result
            elif done is not None:
                _append(Path(done), keys[i], result)
            results[i] = result
            progress.update()
    return [results[i] for i in range(len(items))]


def _killed(items: Sequence[Any], error: KilledWorkerError) -> tuple[int, SweepError]:
    item = items[error.index]
    return error.index, SweepError(
        item,
        f"item {_short(repr(item))} failed: the system killed its worker each time (out of memory, or a crash); "
        f"{error.reason}",
    )


def _on_cores(
    call: Callable[..., Any], items: Sequence[tuple[int, Any]], limit: int | None, *, threads: int, install: str
) -> Iterator[Any]:
    """Do as `on_dask` by joblib in processes of this machine.

    joblib does not tell which item killed its worker. What is left is tried again; if a worker is killed once more, one
    item after another runs alone until it is found.
    """
    joblib = require("joblib", install)
    from joblib.externals.loky.process_executor import TerminatedWorkerError  # type: ignore[import-untyped]

    kills, missing = 0, dict(items)
    with joblib.parallel_config(backend="loky", n_jobs=limit or -1, inner_max_num_threads=threads):
        while missing:
            alone = kills >= 2
            batch = [min(missing)] if alone else sorted(missing)
            parallel = joblib.Parallel(return_as="generator_unordered")
            try:
                for i, result in parallel(joblib.delayed(call)(i, missing[i]) for i in batch):
                    del missing[i]
                    yield i, result
            except TerminatedWorkerError as error:
                kills += 1
                if alone:
                    del missing[batch[0]]
                    # the next two kills are of another item
                    kills = 0
                    yield KilledWorkerError(batch[0], str(error).splitlines()[0])


_LINE_START = b'{"key": '


def _read(path: Path, keys: list[str]) -> dict[int, Any]:
    """Return the results that `path` holds by the position of their key, and cut off a line that a crash left torn."""
    places = {key: i for i, key in enumerate(keys)}
    if len(places) < len(keys):
        twice = next(key for i, key in enumerate(keys) if places[key] != i)
        raise InputError(f"two items have the key {_short(twice)}; give key= a function that tells them apart")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    *lines, torn = content.split(b"\n")
    try:
        entries = [json.loads(line) for line in lines]
        results = {places[entry["key"]]: entry["result"] for entry in entries if entry["key"] in places}
        if torn[: len(_LINE_START)] != _LINE_START[: len(torn)]:
            raise InputError(torn)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"done={str(path)!r} holds something else than results of a sweep") from error
    if torn:
        os.truncate(path, len(content) - len(torn))
    return results


def _append(path: Path, key: str, result: Any) -> None:
    line = json.dumps({"key": key, "result": result})
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def _call(
    function: Callable[[Item], Result], index: int, item: Item, *, returns_errors: bool, as_json: bool
) -> tuple[int, Any]:
    try:
        result = function(item)
        # as it would be read from a file, so that fresh and kept results are alike
        return index, json.loads(json.dumps(result)) if as_json else result
    except Exception as error:
        failure = SweepError(item, f"item {_short(repr(item))} failed: {type(error).__name__}: {error}")
        if returns_errors:
            return index, failure
        raise failure from error


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:200]}..."
