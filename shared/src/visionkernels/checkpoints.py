"""Weights on disk: read without running code, rename foreign keys, load strictly, save, download.

Sharing on the Hugging Face Hub needs nothing from here: a model class inherits `huggingface_hub.PyTorchModelHubMixin`
for `from_pretrained` and `push_to_hub`, and timm reads `hf-hub:` names itself.
"""

import hashlib
import json
import logging
import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from visionkernels._unpickling import CheckpointError, read_torch
from visionkernels.files import replace_file

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "KeyRules",
    "download",
    "load_strict",
    "read_state",
    "read_torch",
    "save_weights",
    "stored_options",
]

_log = logging.getLogger(__name__)

Weights = Literal["auto", "model", "ema"]
Shapes = Mapping[str, Sequence[int]]
Transform = Callable[[Tensor], Tensor]

# Where training scripts keep their weights, in order of preference.
MODEL_ENTRIES = ("model", "state_dict", "module", "student", "teacher")
EMA_ENTRIES = ("model_ema", "state_dict_ema", "ema")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file, the entry that they were taken from, and its plain entries (epoch, accuracy) as text."""

    state: dict[str, Tensor]
    taken_from: str
    metadata: dict[str, str]


def read_state(path: str | Path, *, weights: Weights = "auto", entry: str | None = None) -> Checkpoint:
    """Read the weights of a .safetensors or PyTorch file, on the CPU, without running code that the file holds.

    `weights="model"` takes the raw weights and `"ema"` the averaged ones; `"auto"` takes the raw ones, and averaged
    ones only where there are no others, with a warning. A file with several raw ones gives a warning too; `entry` names
    one, e.g. "teacher" or "generator.state_dict", and `weights` is then unused. `taken_from` tells which entry it was
    ("" for a bare state dict). The prefixes `module.` and `_orig_mod.` are cut where all keys carry them. Raises
    FileNotFoundError, and CheckpointError for a damaged file, for one that needs code to load, and for one without the
    asked weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} is not a file")
    with path.open("rb") as file:
        # a safetensors file is the length of its JSON header in 8 bytes, then the header
        is_safetensors = file.read(9)[8:] == b"{"
    content, metadata = _read_safetensors(path) if is_safetensors else read_torch(path)
    taken = _choose_entry(content, weights, path) if entry is None else entry
    state = _state_in(content, taken, path)
    return Checkpoint(_strip_wrappers(state), taken, metadata)


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            # safe_open is no dict: it has keys() and no iterator
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def _choose_entry(content: Mapping[str, Any], weights: Weights, path: Path) -> str:
    present = [name for name in (*MODEL_ENTRIES, *EMA_ENTRIES) if isinstance(content.get(name), Mapping)]
    raw, averaged = ([name for name in present if name in entries] for entries in (MODEL_ENTRIES, EMA_ENTRIES))
    allowed = {"auto": raw or averaged, "model": raw, "ema": averaged}
    if weights not in allowed:
        raise ValueError(f"weights={weights!r} must be 'auto', 'model' or 'ema'")
    if not present and weights != "ema":
        return ""
    if not allowed[weights]:
        raise CheckpointError(f"{path} has no {weights} weights; it holds {', '.join(present) or 'a bare state dict'}")
    taken = allowed[weights][0]
    others = [name for name in _entries(content) if name not in (taken, *EMA_ENTRIES)]
    if taken in EMA_ENTRIES and weights == "auto":
        _log.warning("%s holds only averaged weights; took %s", path, taken)
    elif taken in MODEL_ENTRIES and others:
        _log.warning("%s holds several sets of weights; took %s, left %s", path, taken, _first(others))
    return taken


def _entries(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The names of the state dicts in a file, at the top or one level down."""
    names = []
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping):
            if value and not _strangers(value):
                names.append(prefix + key)
            elif not prefix:
                names += _entries(value, f"{key}.")
    return names


def _strangers(state: Mapping[str, Any]) -> list[str]:
    return [
        # Python writes out no number of thousands of digits
        str(key) if not isinstance(key, int) or abs(key) < 2**64 else "a large number"
        for key, value in state.items()
        if key != "_metadata" and not (isinstance(key, str) and isinstance(value, Tensor))
    ]


def _state_in(content: Mapping[str, Any], entry: str, path: Path) -> dict[str, Tensor]:
    state: Any = content
    for name in filter(None, entry.split(".")):
        state = state.get(name) if isinstance(state, Mapping) else None
    found = _entries(content)
    hint = f"; entries with weights: {', '.join(found)}" if found else ""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} has no entry {entry!r}{hint}")
    # torch's own versions of the modules, which some scripts save as one more key
    state = {key: value for key, value in state.items() if key != "_metadata"}
    if not state or _strangers(state):
        what = f"non-tensor entries (first: {_first(_strangers(state))})" if state else "nothing"
        raise CheckpointError(f"{path} holds {what} where weights were expected, in {entry or 'the file itself'}{hint}")
    return state


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
                for earlier in side[:index]:
                    special_first = earlier != later and _covers(later, earlier)
                    if _overlap(_tokens(earlier), _tokens(later)) and not special_first:
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


def _tokens(pattern: str) -> list[str]:
    """Split a pattern into characters and placeholders."""
    return [found[0] for found in re.finditer(r"\{\w+\*?\}|.", pattern)]


def _overlap(left: list[str], right: list[str]) -> bool:
    """Whether some key matches both patterns: walks through both at once, a character of the key at a time."""
    states, seen = [(0, 0)], {(0, 0)}
    while states:
        i, j = states.pop()
        if i == len(left) and j == len(right):
            return True
        if i < len(left) and j < len(right) and _share_character(left[i], right[j]):
            # a placeholder may take one more character or be done
            places = [(k + 1,) if len(token) == 1 else (k, k + 1) for k, token in ((i, left[i]), (j, right[j]))]
            new = {(a, b) for a in places[0] for b in places[1]} - seen
            seen |= new
            states += new
    return False


def _share_character(left: str, right: str) -> bool:
    if len(left) > 1 or len(right) > 1:
        # only {name*} takes a dot
        return all(token != "." or other.endswith("*}") for token, other in ((left, right), (right, left)))
    return left == right


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
        raise ValueError(f"keep={sorted(unknown)} names no submodule or parameter of {type(module).__name__}")

    def is_kept(key: str) -> bool:
        return any(f"{key}.".startswith(f"{name}.") for name in keep)

    ours = {key: value for key, value in ours.items() if not is_kept(key)}
    state = {key: value for key, value in state.items() if not is_kept(key)}
    if any(value.is_meta for value in ours.values()):
        raise ValueError(f"{type(module).__name__} is on the meta device; build it on a real one to load weights")
    wanted = {key: tuple(value.shape) for key, value in ours.items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    misfit = "" if found == wanted else _misfit(module, found, wanted) + _fit(found, candidates)
    strange = [key for key in ours if not misfit and not _are_of_a_kind(state[key], ours[key])]
    if strange:
        kinds = [f"{key} {state[key].dtype} instead of {ours[key].dtype}" for key in strange]
        misfit = f"{len(strange)} keys of another kind (first: {_first(kinds)})"
    if misfit:
        raise CheckpointError(f"{source} does not fit {type(module).__name__}: {misfit}")
    module.load_state_dict(state, strict=False)  # the shapes agree; only what is kept is absent


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
        f"{len(names)} keys {kind}" + (f" (first: {_first(names)})" if names else "") for kind, names in kinds.items()
    )


def _fit(found: Shapes, candidates: Mapping[str, Callable[[], Shapes]] | None) -> str:
    for name, shapes in (candidates or {}).items():
        if {key: tuple(shape) for key, shape in shapes().items()} == found:
            return f"; it fits {name}"
    return ""


def stored_options(checkpoint: Checkpoint, path: str | Path, key: str, *, package: str) -> Any:
    """Return what a weights file of `package` train holds as JSON under `key`, lists as tuples.

    Raises CheckpointError for a file without it.
    """
    if key not in checkpoint.metadata:
        what = key.replace("_", " ")
        raise CheckpointError(f"{path} holds no {what} of `{package} train`; give weights.safetensors of such a run")
    return _tuples(json.loads(checkpoint.metadata[key]))


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(each) for name, each in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


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
    for which `sha256` is required (`cache` defaults to torch.hub's `checkpoints`; the file's name starts with the
    hash). A download that broke off goes on where it stopped. Raises CheckpointError if the file has another hash, and
    what huggingface_hub raises without network.
    """
    hub = re.fullmatch(r"hf://([^/]+/[^/]+)/(.+)", source)
    if hub:
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(hub[1], hub[2], cache_dir=cache))
    elif source.startswith(("https://", "http://")) and sha256 is not None:
        path = _fetch(source, sha256, Path(cache or Path(torch.hub.get_dir(), "checkpoints")))
    else:
        raise ValueError(f"source={source!r} must be hf://owner/name/file, or an https URL with its sha256")
    if sha256 is not None and not _has_hash(path, sha256):
        raise CheckpointError(f"{path} has not the sha256 {sha256}; remove it and run again to fetch it anew")
    return path


def _fetch(url: str, sha256: str, folder: Path) -> Path:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    name = Path(urllib.parse.urlsplit(url).path).name
    path = folder / f"{sha256[:16].lower()}-{name}"
    partial = folder / f"{path.name}.part"
    folder.mkdir(parents=True, exist_ok=True)
    # of several processes one fetches, and the others find the file
    with WeakFileLock(folder / f"{path.name}.lock"):
        if path.exists():
            return path
        if not _has_hash(partial, sha256):
            with partial.open("ab") as file:
                http_get(url, file, resume_size=file.tell(), displayed_filename=name)
        if not _has_hash(partial, sha256):
            partial.unlink()
            raise CheckpointError(f"{url} has not the sha256 {sha256}; what came was removed")
        partial.replace(path)
    return path


def _has_hash(path: Path, sha256: str) -> bool:
    if not path.exists():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256.lower()
