"""Weights into a module: every key, every shape, and an error that says what differs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from visionkernels.checks import InputError
from visionkernels.weights.reading import CheckpointError, first_names

__all__ = ["load_strict", "misfit", "without_prefixes"]

# what trainers put before the names of a model's parameters
_PREFIXES = ("module.", "model.", "encoder.", "backbone.")

Shapes = Mapping[str, Sequence[int]]


def load_strict(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str | Path,
    candidates: Mapping[str, Callable[[], Shapes]] | None = None,
    keep: Sequence[str] = (),
) -> None:
    """Copy `state` into `module`: every key, every shape, and the same kind of number (floating, integer, complex).

    `keep` names submodules or parameters that keep the values they have, e.g. `keep=["head"]` for a classifier of
    other classes; their keys in `state` are dropped. Raises CheckpointError that counts and names what is missing,
    unexpected or misshapen in `source`, and names the one of `candidates` (configuration -> function that returns its
    shapes by key) that `state` fits; ValueError for a name in `keep` that `module` lacks, and for a module without
    storage.
    """
    ours = module.state_dict()
    unknown = set(keep) - set(ours) - {name for name, _ in module.named_modules() if name}
    if unknown:
        raise InputError(f"keep={sorted(unknown)} names no submodule or parameter of {type(module).__name__}")

    def is_kept(key: str) -> bool:
        return any(f"{key}.".startswith(f"{name}.") for name in keep)

    ours = {key: value for key, value in ours.items() if not is_kept(key)}
    state = {key: value for key, value in state.items() if not is_kept(key)}
    if any(value.is_meta for value in ours.values()):
        raise InputError(f"{type(module).__name__} is on the meta device; build it on a real one to load weights")
    wanted, given = _shapes(ours), _shapes(state)
    fault = "" if given == wanted else _misfit(module, given, wanted) + _fit(given, candidates)
    strange = [key for key in ours if not fault and not _are_of_a_kind(state[key], ours[key])]
    if strange:
        kinds = [f"{key} {state[key].dtype} instead of {ours[key].dtype}" for key in strange]
        fault = f"{len(strange)} keys of another kind (first: {first_names(kinds)})"
    if fault:
        raise CheckpointError(f"{source} does not fit {type(module).__name__}: {fault}")
    module.load_state_dict(state, strict=False)  # the shapes agree; only what is kept is absent


def misfit(module: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Return what is missing, unexpected or misshapen in `state`, in words; "" if it fits. `module` may be on meta."""
    wanted, given = _shapes(module.state_dict()), _shapes(state)
    return "" if given == wanted else _misfit(module, given, wanted)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _are_of_a_kind(theirs: Tensor, ours: Tensor) -> bool:
    if theirs.is_complex() or ours.is_complex():
        return theirs.is_complex() == ours.is_complex()
    # a counter (num_batches_tracked) may have been saved as a float
    return theirs.is_floating_point() or not ours.is_floating_point()


def _misfit(module: nn.Module, found: Shapes, wanted: Shapes) -> str:
    missing = [key for key in wanted if key not in found]
    unexpected = [key for key in found if key not in wanted]
    misshapen = [key for key in wanted if key in found and found[key] != wanted[key]]
    if misshapen and not missing and not unexpected:
        owner = misshapen[0].rpartition(".")[0]
        layer = module.get_submodule(owner)
        # a linear layer with other outputs that nothing else takes up
        if (
            owner
            and isinstance(layer, nn.Linear)
            and set(misshapen) == {f"{owner}.{key}" for key in layer.state_dict()}
            and found[misshapen[0]]
        ):
            theirs, ours = found[misshapen[0]][0], wanted[misshapen[0]][0]
            return (
                f"its classifier {owner!r} has {theirs} classes, the model {ours}; "
                f"build the model with {theirs} classes, or drop the head of the file with keep=[{owner!r}]"
            )
    shapes = [f"{key} {list(found[key])} instead of {list(wanted[key])}" for key in misshapen]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": shapes}
    return ", ".join(
        f"{len(names)} keys {kind}" + (f" (first: {first_names(names)})" if names else "")
        for kind, names in kinds.items()
    )


def _fit(found: Shapes, candidates: Mapping[str, Callable[[], Shapes]] | None) -> str:
    for name, shapes in (candidates or {}).items():
        if {key: tuple(shape) for key, shape in shapes().items()} == found:
            return f"; it fits {name}"
    return ""


def without_prefixes(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Return `state` without the prefixes of trainers ("model.", "encoder.", ...), as far as `module` has its keys."""
    wanted = set(module.state_dict())
    while not set(state) & wanted:
        prefix = next((prefix for prefix in _PREFIXES if any(key.startswith(prefix) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)
