"""The computation of one training step: timm's task with the hooks of this loop."""

from collections.abc import Mapping
from typing import Any

from timm.task import TrainingTask
from torch import Tensor, nn

__all__ = ["Task"]


class Task(TrainingTask):
    """A loss and the module that it trains.

    `forward` takes a batch and returns a dict with the scalar "loss", the mean over its samples; other scalars in it
    are logged. `module` owns all trained parameters and is reached by calling it. A `teacher` stays frozen and in
    evaluation mode; it is no part of what is saved.
    """

    def __init__(self, module: nn.Module, *, teacher: nn.Module | None = None) -> None:
        super().__init__(verbose=False)
        self.trainable_module: Any = module
        self.teacher: Any = None if teacher is None else teacher.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Task":
        """Set the mode of all but the teacher."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def begin_update(self, update: int, total_updates: int) -> None:
        """Prepare for the update with this index; called before its first micro-batch."""

    def final_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what weights files hold, of the state dict of `module`: the student alone, say."""
        return state
