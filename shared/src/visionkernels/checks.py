"""Checks of what a user gave: one sentence that names the argument, the value and what is allowed.

`InputError` is what all of this project raises for a wrong value. It is a ValueError; commands answer it with exit code
2, and every other ValueError, which is then a mistake of the code, with 1.
"""

import difflib
import typing
from collections.abc import Collection
from pathlib import PurePath

__all__ = ["InputError", "check", "check_choice", "check_known", "check_loading", "check_size", "check_suffix"]


class InputError(ValueError):
    """The input or the usage is wrong."""


def check(holds: bool, argument: str, value: object, allowed: str) -> None:
    """Raise InputError, "argument=value must be allowed", unless `holds`."""
    if not holds:
        raise InputError(f"{argument}={value!r} must be {allowed}")


def check_choice(argument: str, value: object, choices: object) -> None:
    """Raise InputError unless `value` is one of `choices`, a `typing.Literal` or a sequence of values."""
    allowed = typing.get_args(choices) or tuple(typing.cast(Collection[object], choices))
    check(value in allowed, argument, value, f"one of {', '.join(map(repr, allowed))}")


def check_suffix(argument: str, path: str | PurePath, *suffixes: str) -> None:
    """Raise InputError unless an output's name ends as its format does; capitals are alike."""
    allowed = f"a name that ends in {' or '.join(suffixes)}"
    check(PurePath(path).suffix.lower() in suffixes, argument, str(path), allowed)


def check_known(kind: str, name: str, known: Collection[str], *, listing: str = "") -> None:
    """Raise InputError for a `name` that is not `known`, with the nearest names, and with all where they are few.

    `listing` says where many are listed.
    """
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1 if len(known) <= 50 else 3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    listed = f"known: {', '.join(known)}" if len(known) <= 50 else f"there are {len(known)}{listing and '; '}{listing}"
    raise InputError(f"unknown {kind} {name!r}; {hint}{listed}")


def check_loading(workers: int, batch_size: int = 1) -> None:
    """Raise InputError for a negative number of data loading processes and for an empty batch."""
    check(workers >= 0, "workers", workers, "at least 0")
    check(batch_size >= 1, "batch_size", batch_size, "at least 1")


def check_size(size: tuple[int, int] | None) -> None:
    """Raise InputError for a height or width, in pixels, below 1."""
    check(size is None or min(size) >= 1, "size", size, "at least 1 x 1")
