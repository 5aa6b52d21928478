"""Accelerator setup, and how Ctrl-C and SIGTERM stop a run."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]

from visionkernels.checks import InputError
from visionkernels.extras import require
from visionkernels.profiling import warn_of_emulated_bf16
from visionkernels.recipes import FitRecipe

__all__ = ["catch_interrupt", "create_accelerator"]

_log = logging.getLogger(__name__)


def create_accelerator(recipe: FitRecipe, project: Path) -> Accelerator:
    """Return the accelerator of a recipe; trackers write into the folder `project`."""
    for tracker in recipe.trackers:
        require(tracker, tracker)
    environment = os.environ
    on_cpu = environment.get("ACCELERATE_USE_CPU") == "True"
    if on_cpu and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        _log.warning("`accelerate launch --cpu` starts one process on one machine; for more use torchrun")
    # a second fit in one process may ask for another precision or device
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    accelerator = Accelerator(
        cpu=recipe.device == "cpu",
        mixed_precision=recipe.precision,
        gradient_accumulation_steps=recipe.accumulation_steps,
        log_with=list(recipe.trackers) or None,
        project_dir=project,
    )
    if recipe.precision == "fp16" and not accelerator.native_amp:
        raise InputError(
            f"precision='fp16' is not computed on {accelerator.device.type}, where training would run in float32; use "
            "'bf16' or 'no'"
        )
    if recipe.precision == "bf16":
        warn_of_emulated_bf16(accelerator.device)
    return accelerator


@contextmanager
def catch_interrupt(note: Callable[[], None]) -> Iterator[None]:
    """Call `note` on the first Ctrl-C or SIGTERM within the block, and let the second one stop at once.

    Schedulers as Slurm and Kubernetes send SIGTERM some time before they kill.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(*signal_and_frame: object) -> None:
        restore()
        note()

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
