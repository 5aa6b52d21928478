"""Spaces of any timm model: a name, and lists of values for arguments of `timm.create_model`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import timm
from torch import nn

from visionkernels.checks import InputError, check, check_known

__all__ = ["TIMM_PRESETS", "Choice", "TimmPreset", "TimmSpace"]

Value = int | float | str | tuple[int, ...]


def _text(value: Value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class Choice:
    """Choices for an argument: one of `values`, or with `length` a tuple of that many of them."""

    values: tuple[Value, ...]
    length: int | None = None

    def __post_init__(self) -> None:
        texts = [_text(value) for value in self.values]
        check(
            len(self.values) >= 1 and len(set(texts)) == len(texts), "values", self.values, "one or more, all different"
        )
        check(self.length is None or self.length >= 1, "length", self.length, "None, or at least 1")
        reserved = [text for text in texts if not text or set(text) & set("?&= ")]
        check(not reserved, "values", self.values, "without '?', '&', '=' and spaces")
        listed = self.length is not None and any("," in text for text in texts)
        check(not listed, "values", self.values, "single values where length is given")


@dataclass(frozen=True, kw_only=True)
class TimmPreset:
    """Models, the values of their arguments, and arguments that are always passed."""

    models: tuple[str, ...]
    choices: Mapping[str, Choice] = field(default_factory=dict)
    sized_by: str | None = None
    """Argument that takes the side of the image, for models that must know it."""


TIMM_PRESETS = {
    "resnet": TimmPreset(
        models=("resnet18",),
        choices={
            "layers": Choice((1, 2, 3), 4),
            "channels": Choice(((32, 64, 128, 256), (48, 96, 192, 384), (64, 128, 256, 512))),
        },
    ),
    "convnext": TimmPreset(
        models=("convnext_atto",),
        choices={
            "depths": Choice((1, 2, 3, 4), 4),
            "dims": Choice(((24, 48, 96, 192), (32, 64, 128, 256), (40, 80, 160, 320), (48, 96, 192, 384))),
        },
    ),
    "vit": TimmPreset(
        models=("vit_tiny_patch16_224",),
        choices={
            "depth": Choice((4, 6, 8, 10, 12)),
            "embed_dim": Choice((96, 144, 192, 240)),
            "num_heads": Choice((3, 4, 6)),
            "mlp_ratio": Choice((2, 3, 4)),
        },
        sized_by="img_size",
    ),
    # timm fixes the multipliers of these by name
    "efficientnet": TimmPreset(models=tuple(f"efficientnet_b{n}" for n in range(5))),
    "mobilenet": TimmPreset(
        models=(
            *(f"mobilenetv2_{width}" for width in ("035", "050", "075", "100", "110d", "120d", "140")),
            *(f"mobilenetv3_small_{width}" for width in ("050", "075", "100")),
            *(f"mobilenetv3_large_{width}" for width in ("075", "100", "150d")),
        )
    ),
}


class TimmSpace:
    """Keys are `resnet18?layers=2,2,2,2&channels=64,128,256,512`: a model of timm and its arguments.

    `models` and `choices` list what there is to choose from; every model must take all arguments, which `build` finds
    out. `arguments` go to `timm.create_model` with every key. `image_size` defaults to that of the first model.
    """

    def __init__(
        self,
        models: str | Sequence[str],
        choices: Mapping[str, Choice | Sequence[Value]] | None = None,
        *,
        arguments: Mapping[str, Any] | None = None,
        image_size: int | None = None,
        name: str = "timm",
    ) -> None:
        self.name, self.models = name, (models,) if isinstance(models, str) else tuple(models)
        check(len(self.models) >= 1, "models", self.models, "one or more names")
        for model in self.models:
            # a list of all models takes a tenth of a second
            if not timm.is_model(model):
                check_known("timm model", model, timm.list_models(), listing="see timm.list_models()")
        self.choices = {
            option: values if isinstance(values, Choice) else Choice(tuple(values))
            for option, values in (choices or {}).items()
        }
        self.arguments = dict(arguments or {})
        counts = (len(choice.values) ** (choice.length or 1) for choice in self.choices.values())
        self.size = len(self.models) * math.prod(counts)
        check(self.size >= 2, "choices", dict(choices or {}), "of two or more architectures")
        cfg = timm.get_pretrained_cfg(self.models[0])
        assert cfg is not None
        check(image_size is None or image_size >= 8, "image_size", image_size, "at least 8")
        side = cfg.input_size[1:] if image_size is None else (image_size, image_size)
        self.input_size = (3, int(side[0]), int(side[1]))

    @classmethod
    def preset(cls, name: str, *, image_size: int | None = None) -> "TimmSpace":
        """Return the space of `TIMM_PRESETS` under this name."""
        check_known("preset", name, TIMM_PRESETS)
        preset = TIMM_PRESETS[name]
        sized = {} if preset.sized_by is None or image_size is None else {preset.sized_by: image_size}
        return cls(preset.models, preset.choices, arguments=sized, image_size=image_size, name=f"timm_{name}")

    def sample(self, rng: np.random.Generator) -> str:
        return self._key([choice[int(rng.integers(len(choice)))] for choice in self._slots()])

    def mutate(self, key: str, rng: np.random.Generator) -> str:
        """Change one value: the model, an argument, or one entry of a tuple."""
        slots, texts = self._slots(), self._texts(key)
        open_slots = [index for index, choice in enumerate(slots) if len(choice) > 1]
        slot = open_slots[int(rng.integers(len(open_slots)))]
        others = [text for text in slots[slot] if text != texts[slot]]
        texts[slot] = others[int(rng.integers(len(others)))]
        return self._key(texts)

    def enumerate(self) -> Iterator[str]:
        return map(self._key, product(*self._slots()))

    def parse(self, key: str) -> str:
        return self._key(self._texts(key))

    def build(self, key: str, *, num_classes: int = 100, in_chans: int = 3) -> nn.Module:
        model, arguments = self._arguments(key)
        try:
            return timm.create_model(model, num_classes=num_classes, in_chans=in_chans, **(self.arguments | arguments))
        except TypeError as error:
            raise InputError(f"timm key {key!r}: {model} does not take {', '.join(arguments)}: {error}") from error

    def _slots(self) -> list[list[str]]:
        """The texts that each place of a key may have: the model, then every entry of every argument."""
        slots = [list(self.models)]
        for choice in self.choices.values():
            slots += [[_text(value) for value in choice.values]] * (choice.length or 1)
        return slots

    def _key(self, texts: Sequence[str]) -> str:
        model, *rest = texts
        entries = iter(rest)
        options = [
            f"{option}={','.join(next(entries) for _ in range(choice.length or 1))}"
            for option, choice in self.choices.items()
        ]
        return f"{model}?{'&'.join(options)}" if options else model

    def _texts(self, key: str) -> list[str]:
        """Take a key apart into the texts of its places."""
        model, mark, query = key.strip().partition("?")
        check_known("model", model, self.models)
        given: dict[str, str] = {}
        position = len(model) + 1
        for part in query.split("&") if mark else []:
            option, equals, text = part.partition("=")
            where = f"timm key {key!r} at position {position}"
            if not equals or option in given:
                raise InputError(f"{where} has {part!r}; expected argument=value, each argument once")
            try:
                check_known("argument", option, tuple(self.choices))
                given[option] = _allowed(self.choices[option], text)
            except ValueError as error:
                raise InputError(f"{where}: {error}") from error
            position += len(part) + 1
        missing = [option for option in self.choices if option not in given]
        if missing:
            raise InputError(f"timm key {key!r} lacks {', '.join(missing)}; expected e.g. {self._example()!r}")
        texts = [model]
        for option, choice in self.choices.items():
            texts += given[option].split(",") if choice.length else [given[option]]
        return texts

    def _example(self) -> str:
        return self._key([slot[0] for slot in self._slots()])

    def _arguments(self, key: str) -> tuple[str, dict[str, Any]]:
        model, *rest = self._texts(key)
        entries = iter(rest)
        arguments: dict[str, Any] = {}
        for option, choice in self.choices.items():
            values = {_text(value): value for value in choice.values}
            chosen = tuple(values[next(entries)] for _ in range(choice.length or 1))
            arguments[option] = chosen if choice.length else chosen[0]
        return model, arguments


def _allowed(choice: Choice, text: str) -> str:
    known = [_text(value) for value in choice.values]
    parts = text.split(",") if choice.length else [text]
    if len(parts) != (choice.length or 1):
        raise InputError(f"{text!r} has {len(parts)} values; expected {choice.length}, each among {' '.join(known)}")
    for part in parts:
        if part not in known:
            raise InputError(f"value {part!r} is not allowed; expected one of {' '.join(known)}")
    return text
