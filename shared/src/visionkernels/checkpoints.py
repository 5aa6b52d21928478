"""Weights on disk: read without running code, rename foreign keys, load strictly, save, download.

Sharing on the Hugging Face Hub needs nothing from here: a model class inherits `huggingface_hub.PyTorchModelHubMixin`
for `from_pretrained` and `push_to_hub`, and timm reads `hf-hub:` names itself.
"""

import argparse
import codecs
import hashlib
import logging
import pathlib
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from visionkernels.files import replace_file

__all__ = ["Checkpoint", "CheckpointError", "KeyRules", "download", "load_strict", "read_state", "save_weights"]

_log = logging.getLogger(__name__)

Weights = Literal["auto", "model", "ema"]
Shapes = Mapping[str, Sequence[int]]
Transform = Callable[[Tensor], Tensor]

# Where training scripts keep their weights, in order of preference.
MODEL_ENTRIES = ("model", "state_dict", "module", "student", "teacher")
EMA_ENTRIES = ("model_ema", "state_dict_ema", "ema")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")

# Plain data that old training checkpoints hold beside the weights. None of it runs code when it is built. numpy 1 and 2
# write different module names for the functions that rebuild their values.
_NUMPY_BUILDERS = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(1).__reduce__()[0]}
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    codecs.encode,
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefdSU"},
    *(
        (build, f"{core}.multiarray.{name}")
        for core in ("numpy.core", "numpy._core")
        for name, build in _NUMPY_BUILDERS.items()
    ),
]


class CheckpointError(ValueError):
    """A weights file that cannot be read, or that does not fit."""


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file, the entry that they were taken from, and its plain entries (epoch, accuracy) as text."""

    state: dict[str, Tensor]
    taken_from: str
    metadata: dict[str, str]


def read_state(path: str | Path, *, weights: Weights = "auto") -> Checkpoint:
    """Read the weights of a .safetensors or PyTorch file, on the CPU, without running code that the file holds.

    `weights="model"` takes the raw weights and `"ema"` the averaged ones; `"auto"` takes the raw ones, and averaged
    ones only where there are no others, with a warning. `taken_from` tells which entry it was ("" for a bare state
    dict). The prefixes `module.` and `_orig_mod.` are cut where all keys carry them. Raises FileNotFoundError, and
    CheckpointError for a damaged file, for one that needs code to load, and for one without the asked weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} is not a file")
    with path.open("rb") as file:
        # a safetensors file is the length of its JSON header in 8 bytes, then the header
        is_safetensors = file.read(9)[8:] == b"{"
    content, metadata = _read_safetensors(path) if is_safetensors else _read_torch(path)
    state, taken_from = _choose_weights(content, weights, path)
    return Checkpoint(_strip_wrappers(state), taken_from, metadata)


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            # safe_open is no dict: it has keys() and no iterator
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def _read_torch(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises almost any type
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        if blocked:
            raise CheckpointError(
                f"{path} needs the Python object {blocked[1]} to load, which could run code; "
                "save its state dict alone, or as safetensors"
            ) from error
        # torch's own text advises to load the file unsafely
        reason = "" if "weights_only" in str(error) else f": {str(error).partition(chr(10))[0]}"
        raise CheckpointError(f"{path} is damaged or no checkpoint of torch.save{reason}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a checkpoint is a dict of tensors")
    plain = {str(key): str(value) for key, value in content.items() if isinstance(value, str | int | float)}
    return dict(content), plain


def _choose_weights(content: Mapping[str, Any], weights: Weights, path: Path) -> tuple[dict[str, Tensor], str]:
    present = [name for name in (*MODEL_ENTRIES, *EMA_ENTRIES) if isinstance(content.get(name), Mapping)]
    raw, averaged = ([name for name in present if name in entries] for entries in (MODEL_ENTRIES, EMA_ENTRIES))
    allowed = {"auto": raw or averaged, "model": raw, "ema": averaged}
    if weights not in allowed:
        raise ValueError(f"weights={weights!r} must be 'auto', 'model' or 'ema'")
    if not present and weights != "ema":
        allowed[weights], content = [""], {"": content}
    if not allowed[weights]:
        raise CheckpointError(f"{path} has no {weights} weights; it holds {', '.join(present) or 'a bare state dict'}")
    taken = allowed[weights][0]
    state = content[taken]
    strangers = [str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strangers or not state:
        what = f"non-tensor entries (first: {_first(strangers)})" if strangers else "nothing"
        raise CheckpointError(f"{path} holds {what} where weights were expected, in {taken or 'the file itself'}")
    if weights == "auto" and taken in EMA_ENTRIES:
        _log.warning("%s holds only averaged weights; took %s", path, taken)
    return dict(state), taken


def _strip_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in WRAPPER_PREFIXES * 2:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5])


@dataclass(frozen=True)
class KeyRules:
    """A table of key patterns that runs both ways, e.g. `{"layers.{i}.fc.{p}": "blocks.{i}.mlp.{p}"}`.

    `{name}` stands for one dotted component or a part of one, `{name*}` for one or more components; both sides of a
    rule have the same ones. The first rule that matches counts, so a special rule stands before a general one, on both
    sides. `transforms` maps the left side of a rule to a pair of functions on its tensors, (forward, backward).
    `ignored` maps patterns of keys to leave out to the reason. Raises ValueError for a table that is ambiguous in
    either direction.
    """

    names: Mapping[str, str]
    transforms: Mapping[str, tuple[Transform, Transform]] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [pattern for pattern in self.transforms if pattern not in self.names]
        if unknown:
            raise ValueError(f"transforms has {unknown[0]!r}, which is the left side of no rule")
        for left, right in self.names.items():
            if sorted(_placeholders(left)) != sorted(_placeholders(right)):
                raise ValueError(f"rule {left!r} -> {right!r} must have the same placeholders on both sides")
        for side in (list(self.names), list(self.names.values())):
            for index, later in enumerate(side):
                for earlier in side[:index]:
                    special_first = earlier != later and _covers(later, earlier)
                    if _overlap(earlier.split("."), later.split(".")) and not special_first:
                        raise ValueError(f"patterns {earlier!r} and {later!r} both match some key; narrow one of them")

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
            matches = ((pattern.fullmatch(key), left, right) for pattern, left, right in rules)
            match, left, right = next((found for found in matches if found[0]), (None, "", ""))
            if match is None:
                unmapped.append(key)
                continue
            name = right.replace("*}", "}").format(**match.groupdict())
            if name in renamed:
                raise CheckpointError(f"key {key} and another one both become {name}")
            renamed[name] = self.transforms[left][0](tensor) if left in self.transforms else tensor
        if unmapped:
            raise CheckpointError(f"{len(unmapped)} keys are in no rule (first: {_first(unmapped)})")
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


def _overlap(left: list[str], right: list[str]) -> bool:
    """Whether some key could match both patterns, given as lists of components."""
    if not left or not right:
        return left == right
    if "*}" in left[0] or "*}" in right[0]:
        many, other = (left, right) if "*}" in left[0] else (right, left)
        return any(_overlap(many[1:], other[count:]) for count in range(1, len(other) + 1))
    return _may_be_equal(left[0], right[0]) and _overlap(left[1:], right[1:])


def _may_be_equal(left: str, right: str) -> bool:
    ends = []
    for component in (left, right):
        literals = _PLACEHOLDER.split(component)
        if len(literals) == 1:
            return _compile(left).fullmatch(right) is not None or _compile(right).fullmatch(left) is not None
        ends.append((literals[0], literals[-1]))
    (head, tail), (other_head, other_tail) = ends
    heads_agree = head.startswith(other_head) or other_head.startswith(head)
    return heads_agree and (tail.endswith(other_tail) or other_tail.endswith(tail))


def load_strict(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str | Path,
    candidates: Mapping[str, Callable[[], Shapes]] | None = None,
    keep: Sequence[str] = (),
) -> None:
    """Copy `state` into `module`: every key, every shape.

    `keep` names submodules that keep the weights they have, e.g. `keep=["head"]` for a classifier of other classes;
    their keys in `state` are dropped. Raises CheckpointError that counts and names what is missing, unexpected or
    misshapen in `source`, and names the one of `candidates` (configuration -> function that returns its shapes by
    key) that `state` fits.
    """

    def is_kept(key: str) -> bool:
        return any(key.startswith(f"{name}.") for name in keep)

    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items() if not is_kept(key)}
    state = {key: value for key, value in state.items() if not is_kept(key)}
    found = {key: tuple(value.shape) for key, value in state.items()}
    if found == wanted:
        module.load_state_dict(state, strict=False)  # the shapes agree; only what is kept is absent
        return
    raise CheckpointError(
        f"{source} does not fit {type(module).__name__}: {_misfit(found, wanted)}{_fit(found, candidates)}"
    )


def _misfit(found: Shapes, wanted: Shapes) -> str:
    missing = [key for key in wanted if key not in found]
    unexpected = [key for key in found if key not in wanted]
    misshapen = [key for key in wanted if key in found and found[key] != wanted[key]]
    owners = {key.rpartition(".")[0] for key in misshapen}
    classes = {(found[key][:1], wanted[key][:1]) for key in misshapen}
    if not missing and not unexpected and len(owners) == len(classes) == 1:
        (owner,), ((theirs, ours),) = owners, classes
        if theirs != ours and all(found[key][1:] == wanted[key][1:] for key in misshapen):
            return (
                f"its classifier {owner!r} has {theirs[0]} classes, the model {ours[0]}; "
                f"build the model with {theirs[0]} classes, or drop the head of the file with keep=[{owner!r}]"
            )
    shapes = [f"{key} {list(found[key])} instead of {list(wanted[key])}" for key in misshapen]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": shapes}
    return ", ".join(
        f"{len(names)} keys {kind}" + (f" (first: {_first(names)})" if names else "") for kind, names in kinds.items()
    )


def _fit(found: Shapes, candidates: Mapping[str, Callable[[], Shapes]] | None) -> str:
    for name, shapes in (candidates or {}).items():
        if {key: tuple(shape) for key, shape in shapes().items()} == found:
            return f"; it fits {name}"
    return ""


def save_weights(
    path: str | Path, state: Mapping[str, Tensor], *, metadata: Mapping[str, str], overwrite: bool = False
) -> None:
    """Write `state` and `metadata` (model, recipe, version) as safetensors, whole or not at all.

    Tensors that share memory are stored one by one. Raises FileExistsError unless `overwrite`.
    """
    tensors = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    with replace_file(path, overwrite=overwrite) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt", **metadata})


def download(source: str, *, sha256: str | None = None, cache: str | Path | None = None) -> Path:
    """Return the local copy of a weights file, fetched once into `cache`.

    `source` is `hf://owner/name/file` on the Hugging Face Hub (`cache` defaults to the Hub's own), or an https URL,
    for which `sha256` is required (`cache` defaults to torch.hub's `checkpoints`). A download that broke off goes on
    where it stopped. Raises CheckpointError if the file has another hash, and removes it; OSError without network.
    """
    if source.startswith("hf://"):
        from huggingface_hub import hf_hub_download

        owner, name, file = source.removeprefix("hf://").split("/", 2)
        path = Path(hf_hub_download(f"{owner}/{name}", file, cache_dir=cache))
        if sha256 is not None:
            _verify(path, sha256)
        return path
    if not source.startswith(("https://", "http://")) or sha256 is None:
        raise ValueError(f"source={source!r} must be hf://owner/name/file, or an https URL with its sha256")
    folder = Path(cache) if cache is not None else Path(torch.hub.get_dir(), "checkpoints")
    path = folder / Path(urllib.parse.urlsplit(source).path).name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{sha256[:8]}.part")
        _fetch(source, partial)
        _verify(partial, sha256)
        partial.replace(path)
    else:
        _verify(path, sha256)
    return path


def _fetch(url: str, partial: Path) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send
            return
        raise OSError(f"{url} answered {error.code} {error.reason}") from error
    with response:
        if response.status != 206:  # the server sends the whole file
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        progress = tqdm.wrapattr(response, "read", total=total, initial=have, desc=partial.stem, disable=None)
        with progress as body, partial.open("ab" if have else "wb") as file:
            shutil.copyfileobj(body, file)
    if total is not None and partial.stat().st_size < total:
        raise OSError(f"{url} broke off at {partial.stat().st_size} of {total} bytes; run again to go on from there")


def _verify(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256.lower():
        path.unlink()
        raise CheckpointError(f"{path} has sha256 {digest}, expected {sha256}; it was removed, run again to fetch it")
