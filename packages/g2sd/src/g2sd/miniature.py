"""The paper's comparison at small scale: five ways to train a digit classifier with 200 labels."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

from g2sd.recipes import RECIPES
from g2sd.training import distil_generic, finetune, pretrain
from visionkernels import sweeps
from visionkernels.checks import InputError

__all__ = ["ARMS", "compare_arms"]

_WEIGHTS = "weights.safetensors"

ARMS = ("scratch", "scratch, teacher", "MAE", "generic", "generic, specific")
"""How a student is trained: labels alone; labels and a teacher's; its own pre-training and then labels; generic
distillation and then labels; both distillations."""


def compare_arms(seeds: Sequence[int], out: str | Path, *, jobs: int = 2) -> dict[str, tuple[float, ...]]:
    """Return top-1 in percent on 1,000 digits by arm, in the order of `seeds`.

    One teacher, pre-trained on 4,000 digits, serves all; it is fine-tuned with the 200 labels that its students get,
    which differ by seed, as weights and order do. Runs lie in `out`; call again to resume them. `jobs`
    processes of one thread share the runs. Raises ValueError for no seeds.
    """
    if not seeds:
        raise InputError("seeds are none; give one or more")
    # each round waits for the one before; the longest come first, so that the processes end together
    rounds: dict[str, list[_Step]] = {
        "on their own": [("teacher", None), *product(("MAE", "scratch"), seeds)],
        "by the teacher": list(product(("generic", "teacher, fine-tuned"), seeds)),
        "by its logits": list(product(("generic, specific", "scratch, teacher"), seeds)),
    }
    results_by_step: dict[_Step, float] = {}
    for name, steps in rounds.items():
        results = sweeps.map(
            partial(_run, out=Path(out)), steps, jobs=jobs, description=name, install="g2sd-vision[sweeps]"
        )
        results_by_step |= dict(zip(steps, results, strict=True))
    return {arm: tuple(results_by_step[arm, seed] for seed in seeds) for arm in ARMS}


_Step: TypeAlias = tuple[str, int | None]
"""An arm, or a step that arms depend on, and its seed; None for a step that all seeds share."""


def _run(step: _Step, *, out: Path) -> float:
    """Take a step, and return the top-1 of an arm."""
    kind, seed = step
    folder = out / f"seed-{seed}"
    masked, adapted, generic = (run / _WEIGHTS for run in (out / "teacher", folder / "teacher", folder / "generic"))

    def recipe(name: str) -> Any:
        chosen = RECIPES[name]
        return chosen if seed is None else replace(chosen, fit=replace(chosen.fit, seed=seed))

    if kind == "teacher":
        pretrain(recipe("pretrain_teacher_mnist5k"), None, masked.parent)
        return math.nan
    plain, taught = recipe("finetune_few_mnist5k"), recipe("specific_few_mnist5k")
    if kind == "scratch":
        result = finetune(plain, None, folder / "scratch")
    elif kind == "MAE":
        own = pretrain(recipe("pretrain_student_mnist5k"), None, folder / "mae").weights
        result = finetune(plain, None, folder / "mae-finetuned", init=own)
    elif kind == "generic":
        distil_generic(recipe("generic_mnist5k"), None, generic.parent, teacher=masked)
        result = finetune(plain, None, folder / "generic-finetuned", init=generic)
    elif kind == "teacher, fine-tuned":
        result = finetune(recipe("finetune_teacher_few_mnist5k"), None, adapted.parent, init=masked)
    elif kind == "scratch, teacher":
        result = finetune(taught, None, folder / "scratch-teacher", teacher=adapted)
    else:
        result = finetune(taught, None, folder / "specific", init=generic, teacher=adapted)
    return result.metrics["top1"]
