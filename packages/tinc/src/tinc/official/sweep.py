"""Every combination of an official YAML grid, each run in a folder of its own."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tinc.official.training import train
from tinc.recipes import OfficialRecipe, expand_grid
from visionkernels import sweeps

__all__ = ["run_sweep"]


def run_sweep(
    config: str | Path,
    volume: str | Path,
    out: str | Path,
    *,
    jobs: int = 1,
    backend: Literal["loky", "ray", "dask"] = "loky",
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run each combination in `out`/000, 001, ... and yield its name with PSNR, SSIM, parameters and ratio.

    `out`/results.jsonl keeps what is done; a sweep that is started again goes on with the rest. Raises ValueError for a
    YAML file without combinations, and SweepError with the first combination that fails.
    """
    recipes = expand_grid(config)
    Path(out).mkdir(parents=True, exist_ok=True)
    items = [(f"{number:03d}", recipe) for number, recipe in enumerate(recipes)]
    function = partial(_run, volume=str(volume), out=str(out))
    done = Path(out) / "results.jsonl"
    results = sweeps.map(function, items, jobs=jobs, backend=backend, description="runs", done=done, key=_key)
    yield from zip((name for name, _ in items), results, strict=True)


def _key(item: tuple[str, OfficialRecipe]) -> str:
    name, recipe = item
    return f"{name} {asdict(recipe)}"


def _run(item: tuple[str, OfficialRecipe], *, volume: str, out: str) -> dict[str, Any]:
    name, recipe = item
    result = train(recipe, volume, Path(out) / name)
    return {"psnr": result.psnr, "ssim": result.ssim, "parameters": result.parameters, "ratio": result.ratio}
