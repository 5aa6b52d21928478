"""Runs of all combinations of an official YAML grid."""

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
    """Run the combinations in `out`/000, 001, ... and yield their names with PSNR, SSIM, parameters and ratio.

    Finished combinations are kept in `out`/results.jsonl: repeat an interrupted call to resume it. Raises ValueError
    for a YAML file without combinations, and SweepError with the first combination that fails.

    Args:
        config: the YAML file
        volume: the volume, .tif or .npy
        out: folder of the runs
        jobs: number of processes, as in `visionkernels.sweeps.map`
        backend: processes of this machine, or a cluster, as in `visionkernels.sweeps.map`
    """
    recipes = expand_grid(config)
    Path(out).mkdir(parents=True, exist_ok=True)
    items = [(f"{number:03d}", recipe) for number, recipe in enumerate(recipes)]
    function = partial(_run, volume=str(volume), out=str(out))
    done = Path(out) / "results.jsonl"
    results = sweeps.map(
        function,
        items,
        jobs=jobs,
        backend=backend,
        description="runs",
        done=done,
        key=_key,
        install="tinc-vision[sweeps]",
    )
    yield from zip((name for name, _ in items), results, strict=True)


def _key(item: tuple[str, OfficialRecipe]) -> str:
    name, recipe = item
    return f"{name} {asdict(recipe)}"


def _run(item: tuple[str, OfficialRecipe], *, volume: str, out: str) -> dict[str, Any]:
    name, recipe = item
    result = train(recipe, volume, Path(out) / name)
    return {"psnr": result.psnr, "ssim": result.ssim, "parameters": result.parameters, "ratio": result.ratio}
