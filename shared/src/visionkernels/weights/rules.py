"""Foreign names of parameters and ours: one table that runs both ways."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from visionkernels.weights.reading import CheckpointError, first_names

__all__ = ["KeyRules"]

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class KeyRules:
    """A table of key patterns that runs both ways, e.g. `{"layers.{i}.fc.{p}": "blocks.{i}.mlp.{p}"}`.

    `{name}` stands for one dotted component or a part of one, `{name*}` for one or more components; both sides of a
    rule have the same ones. A special rule stands before a general one, on both sides: the first that matches counts.
    `transforms` maps the left side of a rule to a pair of functions on its tensors, (forward, backward). `ignored` maps
    patterns of keys to leave out to the reason. Raises ValueError for a rule that another one hides, in either
    direction, and on use for a key that two rules match of which neither is the more special one.
    """

    names: Mapping[str, str]
    transforms: Mapping[str, tuple[Transform, Transform]] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pattern in (*self.names, *self.names.values(), *self.ignored):
            placeholders = [name for name, _ in _placeholders(pattern)]
            if not all(map(str.isidentifier, placeholders)) or len(set(placeholders)) < len(placeholders):
                raise ValueError(f"the placeholders of {pattern!r} must be different names, e.g. {{i}} and {{rest*}}")
        unknown = [pattern for pattern in self.transforms if pattern not in self.names]
        if unknown:
            raise ValueError(f"transforms has {unknown[0]!r}, which is the left side of no rule")
        for left, right in self.names.items():
            if sorted(_placeholders(left)) != sorted(_placeholders(right)):
                raise ValueError(f"rule {left!r} -> {right!r} must have the same placeholders on both sides")
        for side in (list(self.names), list(self.names.values())):
            for index, later in enumerate(side):
                hidden_by = next((earlier for earlier in side[:index] if _covers(earlier, later)), None)
                if hidden_by is not None:
                    raise ValueError(f"pattern {later!r} is never reached behind {hidden_by!r}; swap or narrow them")

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `state` under the names of the right side.

        Raises CheckpointError for keys that no rule maps and for two keys that get one name.
        """
        rules = [(_compile(left), left, right) for left, right in self.names.items()]
        skipped = [_compile(pattern) for pattern in self.ignored]
        renamed: dict[str, Tensor] = {}
        unmapped: list[str] = []
        for key, tensor in state.items():
            if any(pattern.fullmatch(key) for pattern in skipped):
                continue
            matches = [(match, left, right) for pattern, left, right in rules if (match := pattern.fullmatch(key))]
            if not matches:
                unmapped.append(key)
                continue
            match, left, right = matches[0]
            for _, other, _ in matches[1:]:
                if not _covers(other, left):
                    raise ValueError(f"patterns {left!r} and {other!r} both match {key}; narrow one of them")
            name = right.replace("*}", "}").format(**match.groupdict())
            if name in renamed:
                raise CheckpointError(f"key {key} and another one both become {name}")
            renamed[name] = self.transforms[left][0](tensor) if left in self.transforms else tensor
        if unmapped:
            raise CheckpointError(f"{len(unmapped)} keys are in no rule (first: {first_names(unmapped)})")
        return renamed

    def inverse(self) -> "KeyRules":
        """Return the rules from right to left; what is ignored does not come back."""
        return KeyRules(
            {right: left for left, right in self.names.items()},
            {self.names[left]: (backward, forward) for left, (forward, backward) in self.transforms.items()},
        )


_PLACEHOLDER = re.compile(r"\{(\w+)(\*?)\}")


def _placeholders(pattern: str) -> list[tuple[str, str]]:
    return _PLACEHOLDER.findall(pattern)


def _compile(pattern: str) -> re.Pattern[str]:
    literals = [re.escape(text) for text in re.split(r"\{\w+\*?\}", pattern)]
    groups = [f"(?P<{name}>{'.+' if many else '[^.]+'})" for name, many in _placeholders(pattern)]
    return re.compile("".join(text + group for text, group in zip(literals, [*groups, ""], strict=True)))


def _covers(general: str, special: str) -> bool:
    """Whether `general` matches every key that `special` matches."""
    sample = _PLACEHOLDER.sub(lambda found: "\0.\0" if found[2] else "\0", special)
    return _compile(general).fullmatch(sample) is not None
