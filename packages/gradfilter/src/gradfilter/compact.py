"""Check that an optimiser trains a compact layer as it would train the weight itself."""

import warnings
import weakref

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from visionkernels.checks import InputError

__all__ = ["check_optimizer", "guard_optimizers", "mark_compact"]

# Classes of torch.optim and timm.optim whose steps were compared with those of ordinary training. The first set decays
# the weight linearly or apart from the gradient; the second squares a gradient that coupled decay adds the weight to.
_WITH_ANY_DECAY = {
    "ASGD", "AdamW", "AdamWLegacy", "Adan", "LaProp", "Lion", "NAdamW", "Rprop", "SGD", "SGDW",
}  # fmt: skip
_WITHOUT_COUPLED_DECAY = {
    "AdaBelief", "Adadelta", "Adagrad", "Adam", "Adamax", "Adopt", "MADGRAD", "NAdam", "NAdamLegacy", "RAdam",
    "RMSprop", "RMSpropTF",
}  # fmt: skip
# of any package, in lower case: their steps depend on a norm or a product over all elements of a tensor
_REFUSED = {
    "adafactor", "adafactorbigvision", "adamp", "adamuon", "distributedshampoo", "fusedlamb", "fusednovograd", "kron",
    "lamb", "larc", "lars", "lbfgs", "mars", "muon", "novograd", "nvnovograd", "sgdp", "shampoo", "soap",
}  # fmt: skip
_DECOUPLED = ("decoupled_weight_decay", "decoupled_decay", "decoupled")

_warned: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()
_is_guarding = False


def mark_compact(parameter: torch.Tensor) -> None:
    """Mark a parameter as part of a weight that is trained as scale * base + offset."""
    parameter.__dict__["is_compact"] = True


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise ValueError if `optimizer` holds a compact layer and would not train it as it would the weight itself.

    A step must change every element by its own gradient alone (Lamb and Muon use the whole tensor), and weight decay
    must be linear, as SGD's, or decoupled, as AdamW's. Adam, RMSprop and Adagrad with `weight_decay` square a gradient
    that contains the weight. An unknown optimiser gives one warning and is used.
    """
    kind = type(optimizer)
    is_known = kind.__module__.startswith(("torch.optim", "timm.optim"))
    if is_known and kind.__name__ in _WITH_ANY_DECAY:
        return
    if is_known and kind.__name__ in _WITHOUT_COUPLED_DECAY:
        for group in optimizer.param_groups:
            if _is_coupled(group) and _holds_compact(group):
                raise InputError(
                    f"{kind.__name__} with weight_decay={group['weight_decay']} does not keep a compact layer in its "
                    "form; use AdamW, SGD, or weight_decay=0"
                )
        return
    if optimizer not in _warned and any(map(_holds_compact, optimizer.param_groups)):
        if kind.__name__.lower() in _REFUSED:
            raise InputError(
                f"{kind.__name__} does not move each element of a tensor by its own gradient alone, so it would train "
                "a compact layer otherwise than its weight; use AdamW or SGD, or convert with compact=False"
            )
        _warned.add(optimizer)
        warnings.warn(
            f"{kind.__module__}.{kind.__name__} is not known to train a compact layer as it would its weight, "
            "which takes element-wise steps and decoupled or linear weight decay; AdamW and SGD do",
            stacklevel=2,
        )


def _is_coupled(group: dict[str, object]) -> bool:
    return group.get("weight_decay", 0) != 0 and not any(group.get(name, False) for name in _DECOUPLED)


def _holds_compact(group: dict[str, list[torch.Tensor]]) -> bool:
    return any(getattr(parameter, "is_compact", False) for parameter in group["params"])


def guard_optimizers() -> None:
    """Check every optimiser before each of its steps from now on, since its groups and their decay may change."""
    global _is_guarding
    if not _is_guarding:
        register_optimizer_step_pre_hook(lambda optimizer, *_: check_optimizer(optimizer))
        _is_guarding = True
