"""Which optimisers train a compact layer as they would have trained the weight itself."""

import weakref

import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = ["check_optimizer", "guard_optimizers", "mark_compact"]

_checked: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()
_is_guarding = False


def mark_compact(parameter: torch.Tensor) -> None:
    """Note that this parameter stands for a weight that is trained as scale * base + offset."""
    parameter.__dict__["is_compact"] = True


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise ValueError if `optimizer` couples weight decay into a second moment and holds a compact layer.

    The decay of SGD acts on the weight linearly, that of AdamW directly: both move scale * base + offset within its
    form. Adam, RMSprop or Adagrad with `weight_decay` square a gradient that the weight is part of.
    """
    # timm and apex name theirs differently, so anything else is judged by what it is told
    if isinstance(optimizer, SGD | AdamW):
        return
    for group in optimizer.param_groups:
        is_coupled = group.get("weight_decay", 0) != 0 and not group.get("decoupled_weight_decay", False)
        if is_coupled and any(getattr(parameter, "is_compact", False) for parameter in group["params"]):
            raise ValueError(
                f"{type(optimizer).__name__} with weight_decay={group['weight_decay']} does not keep a compact layer "
                "in its form; use AdamW, SGD, or weight_decay=0"
            )


def guard_optimizers() -> None:
    """From now on check every optimiser at its first step."""
    global _is_guarding
    if not _is_guarding:
        register_optimizer_step_pre_hook(_check_once)
        _is_guarding = True


def _check_once(optimizer: Optimizer, *_: object) -> None:
    if optimizer not in _checked:
        check_optimizer(optimizer)
        _checked.add(optimizer)
