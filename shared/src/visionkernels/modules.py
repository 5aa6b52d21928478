"""What code may take for granted of modules that users can wrap, adapt, quantise or move."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["copy_module", "is_exporting", "is_plain", "is_untouched"]

Module = TypeVar("Module", bound=nn.Module)

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_untouched(module: nn.Module) -> bool:
    """Tell whether calling `module` runs the forward of its class alone: it has no hooks, and nobody replaced it."""
    return "forward" not in vars(module) and not any(getattr(module, hooks) for hooks in _HOOKS)


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Tell whether `module` is exactly of one of `kinds`, so that its parameters tell what its call computes.

    Only then may a faster way use the parameters without calling the module. An adapter or a parametrised layer is of
    another class, a quantised or sharded weight is another kind of tensor, pruning and weight norm compute the weight
    before each call, and offloading replaces `forward`.
    """
    parameters = [module._parameters.get("weight"), module._parameters.get("bias")]
    return (
        type(module) in kinds
        and is_untouched(module)
        and parameters[0] is not None
        # while a model is exported, its parameters are stand-ins
        and (is_exporting() or all(_is_stock(value) for value in parameters if value is not None))
    )


def is_exporting() -> bool:
    """Tell whether `torch.export` runs this code; torch before 2.7 does not say."""
    asks = getattr(torch.compiler, "is_exporting", None)
    return asks is not None and bool(asks())


def _is_stock(value: Tensor) -> bool:
    return type(value) in (nn.Parameter, Tensor)


def copy_module(module: Module) -> Module:
    """Return a deep copy, also of a module that keeps a tensor with a history, which torch refuses to copy.

    Pruning and the older weight norm keep the computed weight; the copy has its value, until its next call computes it.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in tree_leaves(vars(part)):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)
