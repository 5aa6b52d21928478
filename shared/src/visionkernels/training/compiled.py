"""State dicts of compiled modules: torch.compile wraps a module, and all keys would name the wrapper."""

from typing import Any

from torch import nn

__all__ = ["name_as_uncompiled"]

_WRAPPED = "_orig_mod"  # torch's name of the module within


def name_as_uncompiled(module: nn.Module) -> None:
    """Give the state dict of `module` the keys that it has without torch.compile, in writing and in reading.

    So a run goes on with or without compilation, and its weights load into a model that is not compiled.
    """
    for part in module.modules():
        if _WRAPPED in part._modules and _leave_out not in part._state_dict_hooks.values():
            part.register_state_dict_post_hook(_leave_out)
            part.register_load_state_dict_pre_hook(_put_in)


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for key in list(state):
        if key.startswith(f"{prefix}{_WRAPPED}."):
            state[prefix + key.removeprefix(f"{prefix}{_WRAPPED}.")] = state.pop(key)


def _put_in(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in list(state):
        if key.startswith(prefix) and not key.startswith(f"{prefix}{_WRAPPED}."):
            state[f"{prefix}{_WRAPPED}.{key.removeprefix(prefix)}"] = state.pop(key)
