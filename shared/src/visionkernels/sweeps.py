"""Independent work in parallel, on joblib: the cores of this machine, or a Ray or Dask cluster."""

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from tqdm import tqdm

from visionkernels.checks import InputError
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
    whose worker the system kills (out of memory) is tried again, and fails like others if it is killed alone as well.

    `done` is a file that keeps every result as soon as it is there (with Ray, all at the end), a line of JSON each; a
    sweep that is run again takes them from there and computes the others. Results must be JSON then (a tuple comes
    back as a list), and `key` must tell items apart by a text that stays the same; failures are not kept. Raises
    ValueError for two items of one key and for a file that is no such list, ImportError with the pip line for
    `install` without joblib.
    """
    joblib = require("joblib", install)
    if jobs != -1 and jobs < 1:
        raise InputError(f"jobs={jobs} must be at least 1, or -1 for one a core")
    if errors not in ("raise", "return"):
        raise InputError(f"errors={errors!r} must be 'raise' or 'return'")
    limits = {}
    if backend == "loky":
        limits = {"inner_max_num_threads": threads}
    elif backend == "ray":
        require("ray.util.joblib", "ray").register_ray()
    elif backend == "dask":
        _connect_dask()
    else:
        raise InputError(f"backend={backend!r} must be 'loky', 'ray' or 'dask'")
    keys = [] if done is None else [key(item) for item in items]
    results = {} if done is None else _read(Path(done), keys)
    call = functools.partial(_call, function, returns_errors=errors == "return", as_json=done is not None)
    # not above: a worker whose function needs no torch starts much faster
    from visionkernels.profiling import torch_threads

    # joblib's Ray backend cannot hand out results one by one, so its progress bar jumps to the end
    return_as = "list" if backend == "ray" else "generator_unordered"

    def run(calls: Iterator[Any]) -> Any:
        return joblib.Parallel(return_as=return_as)(calls)

    progress = tqdm(total=len(items), initial=len(results), desc=description, disable=None if show_progress else True)
    with joblib.parallel_config(backend=backend, n_jobs=jobs, **limits), torch_threads(threads), progress:
        for i, result in _outlasting(run, joblib.delayed(call), items, set(range(len(items))) - results.keys()):
            if isinstance(result, SweepError):
                if errors == "raise":
                    raise result
            elif done is not None:
                _append(Path(done), keys[i], result)
            results[i] = result
            progress.update()
    return [results[i] for i in range(len(items))]


def _outlasting(
    run: Callable[..., Any], call: Callable[..., Any], items: Sequence[Any], missing: set[int]
) -> Iterator[tuple[int, Any]]:
    """Yield the results of the `missing` items, also if the system kills a worker: then the others of its pool go on.

    joblib does not tell which item killed its worker. What is left is tried again; if a worker is killed once more, one
    item after another runs alone until it is found. For Ray and Dask, their own schedulers try again.
    """
    from joblib.externals.loky.process_executor import TerminatedWorkerError  # type: ignore[import-untyped]

    kills = 0
    while missing:
        alone = kills >= 2
        batch = [min(missing)] if alone else sorted(missing)
        try:
            for i, result in run(call(i, items[i]) for i in batch):
                missing.remove(i)
                yield i, result
        except TerminatedWorkerError as error:
            kills += 1
            if alone:
                missing.remove(batch[0])
                # the next two kills are of another item
                kills = 0
                reason = str(error).splitlines()[0]
                yield (
                    batch[0],
                    SweepError(
                        items[batch[0]],
                        f"item {_short(repr(items[batch[0]]))} failed: the system killed its worker, beside others and "
                        f"alone (out of memory, or a crash); {reason}",
                    ),
                )


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


def _connect_dask() -> None:
    distributed = require("distributed", "distributed")
    try:
        distributed.get_client()
    except ValueError:  # not connected yet; the new client becomes the one that joblib finds
        distributed.Client()


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
