"""The training loop that all packages share.

accelerate owns processes, wrapping, precision and trackers; timm the optimiser, the schedule, the averaged weights and
the shape of a task. What is left is here: the loop, the order of data, and folders that survive a kill.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from visionkernels.extras import require
from visionkernels.recipes import FitRecipe
from visionkernels.training.batches import TrainingData
from visionkernels.training.result import FitResult

if TYPE_CHECKING:
    from visionkernels.training.task import Task
    from visionkernels.weights import Trained

__all__ = ["fit"]


def fit(
    task: "Task",
    recipe: FitRecipe,
    data: TrainingData,
    run_dir: str | Path,
    *,
    trained: "Trained | None" = None,
) -> FitResult:
    """Train `task.trainable_module`, the module that owns all trained parameters, by the losses of `task`.

    `task(*batch)` (or `task(**batch)` for a dict) runs under autocast and returns a dict with a scalar "loss", the
    mean over its samples; its other scalars are logged too. It must reach the module by calling it, not by methods of
    it, since the module is wrapped for several processes; what the module returns is float32 in any precision.

    A checkpoint holds the task's own buffers (a centre, a queue) and what timm's `task.get_task_state()` returns
    besides (the weights of a teacher that follows), tensors and plain values that `task.load_task_state()` takes back;
    both are the main process's.

    `run_dir` gets run.json (recipe, versions, git state, command, `trained`), log.jsonl (a line for each epoch),
    checkpoints/, best.safetensors, and at the end weights.safetensors and ema.safetensors, which say what they are by
    the record `trained`. If it holds a run of the same recipe and record, this one resumes it, and ends with the same
    weights, bit for bit on a CPU: all randomness is drawn from generators seeded by (seed, place in training), so the
    number of data workers does not matter. Global generators of random, numpy and torch are re-seeded on the way.

    Raises InputError if `run_dir` holds another run or is in use, sizes do not divide, or the device does not compute
    in the recipe's precision; TypeError if parameters outside the module are trainable; FloatingPointError on a loss
    that is not finite, with the update and its samples; KeyboardInterrupt on Ctrl-C and SIGTERM, after saving.
    """
    for module in ("accelerate", "filelock", "timm"):
        require(module, "visionkernels[train]")
    from visionkernels.training.run import Run
    from visionkernels.weights import Trained

    trained = Trained(kind="module", package="") if trained is None else trained
    with Run.open(task, recipe, data, Path(run_dir), trained) as run:
        run.report()  # an epoch that a kill left saved but not measured
        for epoch in range(run.epoch, run.num_epochs):
            for batch in run.batches(epoch):
                run.step(batch)
            run.finish_epoch()
            run.report()
        return run.result()
