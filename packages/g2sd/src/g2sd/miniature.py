"""The paper's comparison in small: five ways to a student that classifies digits with 200 labels."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from g2sd.recipes import FinetuneRecipe, GenericRecipe, PretrainRecipe, find_recipe
from g2sd.training import distil_generic, finetune, pretrain
from visionkernels import sweeps

__all__ = ["ARMS", "compare_arms"]

ARMS = ("scratch", "scratch, teacher", "MAE", "generic", "generic, specific")
"""What a student goes through: labels alone; labels and a teacher's; its own pre-training and then labels; generic
distillation and then labels; both distillations."""


def compare_arms(seeds: Sequence[int], out: str | Path, *, jobs: int = 2) -> dict[str, tuple[float, ...]]:
    """Return top-1 in percent on 1,000 digits by arm, in the order of `seeds`.

    One teacher, pre-trained on 4,000 digits, serves all; it is fine-tuned with the 200 labels that its students get,
    which differ by seed, as weights and order do. Runs lie in `out`, and the same call goes on where it stopped. `jobs`
    processes of one thread share the seeds. Raises ValueError for no seeds.
    """
    if not seeds:
        raise ValueError("seeds are none; give one or more")
    out = Path(out)
    masked = pretrain(cast(PretrainRecipe, find_recipe("pretrain_teacher_mnist5k")), None, out / "teacher")
    run = partial(_run, out=out, masked=masked.weights)
    found = sweeps.map(run, list(seeds), jobs=jobs, description="seeds")
    return {arm: tuple(each[arm] for each in found) for arm in ARMS}


def _run(seed: int, *, out: Path, masked: Path) -> dict[str, float]:
    folder = out / f"seed-{seed}"

    def recipe(name: str) -> Any:
        found = find_recipe(name)
        return replace(found, fit=replace(found.fit, seed=seed))

    plain = cast(FinetuneRecipe, recipe("finetune_few_mnist5k"))
    taught = cast(FinetuneRecipe, recipe("specific_few_mnist5k"))
    adapted = cast(FinetuneRecipe, recipe("finetune_teacher_few_mnist5k"))
    teacher = finetune(adapted, None, folder / "teacher", start=masked).weights
    own = pretrain(cast(PretrainRecipe, recipe("pretrain_student_mnist5k")), None, folder / "mae").weights
    generic = cast(GenericRecipe, recipe("generic_mnist5k"))
    distilled = distil_generic(generic, None, folder / "generic", teacher=masked).weights
    results = {
        "scratch": finetune(plain, None, folder / "scratch"),
        "scratch, teacher": finetune(taught, None, folder / "scratch-teacher", teacher=teacher),
        "MAE": finetune(plain, None, folder / "mae-finetuned", start=own),
        "generic": finetune(plain, None, folder / "generic-finetuned", start=distilled),
        "generic, specific": finetune(taught, None, folder / "specific", start=distilled, teacher=teacher),
    }
    return {arm: result.metrics["top1"] for arm, result in results.items()}
