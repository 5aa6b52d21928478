"""The cost of a computation: parameters, multiply-adds, memory, and time as a ratio to a baseline beside it."""

import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any, Literal

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from visionkernels.checks import InputError
from visionkernels.modules import copy_module

__all__ = [
    "BenchRow",
    "FlopCount",
    "Timing",
    "bench_table",
    "compare",
    "count_flops",
    "count_parameters",
    "peak_memory_bytes",
    "saved_activation_bytes",
    "torch_threads",
    "warn_of_emulated_bf16",
]

Function = Callable[[], object]
_log = logging.getLogger(__name__)


def count_parameters(module: nn.Module) -> int:
    """Return the number of numbers in the parameters of `module`, trained or frozen; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class FlopCount:
    """Operations of one forward pass, by kind, in the convention of `count_flops`."""

    conv: int
    linear: int
    matmul: int
    batch_norm: int
    layer_norm: int

    @property
    def total(self) -> int:
        """Sum of all kinds."""
        return sum(astuple(self))

    @property
    def gflops(self) -> float:
        """Total in units of 1e9."""
        return self.total / 1e9


def count_flops(module: nn.Module, *inputs: Any, arithmetic: Literal["skip", "run"] = "skip") -> FlopCount:
    """Count the operations of `module(*inputs)` in evaluation mode, as papers print them.

    A multiply-add of a convolution, linear layer or matrix product is 1, its bias 0; BatchNorm is 2 and LayerNorm 5
    per element, as fvcore counts them with their affine part; other norms (fvcore: 5 per element), softmax,
    activations, sums, pooling and gathers are 0. The count is of the algorithm and not of the path: ops run by their
    reference.

    `arithmetic="skip"` runs a copy of `module` on the meta device, which knows shapes only: no size is too large.
    `"run"` computes on the real tensors, for a module whose shapes depend on values. `module` itself is not changed.
    """
    from visionkernels.ops import use_backend

    if arithmetic not in ("skip", "run"):
        raise InputError(f"arithmetic={arithmetic!r} must be 'skip' or 'run'")
    device = torch.device("meta") if arithmetic == "skip" else _device_of(module)
    if arithmetic == "skip":
        module = copy_module(module).to(device)
        inputs = tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)
    counter, norms = FlopCounterMode(display=False), _NormCounter()
    strided = _StridedLinearCounter(counter)
    with (
        torch.no_grad(),
        _evaluation(module),
        _plain_attention(),
        use_backend("reference"),
        torch.device(device),  # tensors that the module makes itself
        norms.watching(module),
        strided,
        counter,
    ):
        module(*inputs)
    counts = _multiply_adds(counter)
    conv = counts.get("aten.convolution", 0)
    linear = counts.get("aten.mm", 0) + counts.get("aten.addmm", 0) + strided.multiply_adds
    return FlopCount(conv, linear, sum(counts.values()) - conv - linear, norms.batch_norm, norms.layer_norm)


def _multiply_adds(counter: FlopCounterMode) -> dict[str, int]:
    return {str(operator): flops // 2 for operator, flops in counter.get_flop_counts().get("Global", {}).items()}


class _StridedLinearCounter(TorchFunctionMode):
    """Counts the linear layers that run as a batched product, since the strides of their input do not fold."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter, self.multiply_adds = counter, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.linear:
            return func(*args, **(kwargs or {}))
        before = _multiply_adds(self.counter).get("aten.bmm", 0)
        result = func(*args, **(kwargs or {}))
        self.multiply_adds += _multiply_adds(self.counter).get("aten.bmm", 0) - before
        return result


class _NormCounter:
    def __init__(self) -> None:
        self.batch_norm = self.layer_norm = 0

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        kinds = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
        handles = [part.register_forward_hook(self._count) for part in module.modules() if isinstance(part, kinds)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, norm: nn.Module, inputs: Any, output: Tensor) -> None:
        if isinstance(norm, nn.LayerNorm):
            self.layer_norm += 5 * output.numel()
        else:
            self.batch_norm += 2 * output.numel()


def _device_of(module: nn.Module) -> torch.device:
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _plain_attention() -> Iterator[None]:
    # fused attention is one opaque operator, which on some devices counts as nothing
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def saved_activation_bytes(fn: Function) -> int:
    """Return the bytes that the forward pass `fn` keeps for its backward pass, parameters left out.

    A storage that several operations save counts once and whole, also where only a view of it is saved.
    """
    saved: dict[int, Tensor] = {}  # the tensors are held, so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        owner = tensor._base if tensor._base is not None else tensor
        if not isinstance(owner, nn.Parameter):
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = fn()
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del result
    return total


def peak_memory_bytes(fn: Function, *, device: str | torch.device = "cpu") -> int:
    """Return the most bytes that torch's allocator of `device` held during `fn`, above what it held before.

    On the CPU every allocation and release is traced (exact, slow); on CUDA the allocator's own peak is read. Memory
    that torch does not allocate (numpy, workspaces of libraries) is not seen.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise InputError(f"device={str(device)!r} must be a cpu or cuda device")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = fn()
    del result
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, the distance between the quartiles, and every sample."""

    median: float
    iqr: float
    samples: tuple[float, ...]


def compare(
    candidates: Mapping[str, Function],
    *,
    threads: int = 1,
    repeats: int = 9,
    warmup: int = 2,
    min_seconds: float = 0.05,
) -> dict[str, Timing]:
    """Time the candidates in turns, so that whatever else the machine does meets all of them alike.

    Each is called `warmup` times; then come `repeats` rounds, in which each gives one sample: the mean of as many
    calls as took `min_seconds` in its warm-up (wall clock; CUDA is synchronised at both ends). Every other round runs
    backwards. torch computes with `threads` threads.
    """
    for name, value in {"threads": threads, "repeats": repeats, "warmup": warmup}.items():
        if value < 1:
            raise InputError(f"{name}={value} must be at least 1")
    with torch_threads(threads):
        calls = {}
        for name, fn in candidates.items():
            seconds = min(_seconds_per_call(fn, 1) for _ in range(warmup))
            calls[name] = max(1, round(min_seconds / max(seconds, 1e-9)))
        samples: dict[str, list[float]] = {name: [] for name in candidates}
        for index in range(repeats):
            for name in list(candidates)[:: 1 if index % 2 == 0 else -1]:
                samples[name].append(_seconds_per_call(candidates[name], calls[name]))
    return {name: _timing(values) for name, values in samples.items()}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def warn_of_emulated_bf16(device: torch.device) -> None:
    """Log a warning where bf16 is computed on a CPU that has no instructions for it, several times slower than float32.

    Older versions of torch do not tell what the CPU has; there is no warning then.
    """
    if device.type != "cpu":
        return
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities and not any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
        _log.warning("this CPU has no bf16 instructions: precision='bf16' is several times slower here than 'no'")


def _seconds_per_call(fn: Function, calls: int) -> float:
    collecting = gc.isenabled()
    gc.disable()
    try:
        _synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        _synchronize()
        return (time.perf_counter() - start) / calls
    finally:
        if collecting:
            gc.enable()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _timing(samples: list[float]) -> Timing:
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return Timing(statistics.median(samples), high - low, tuple(samples))


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One measured ratio; above 1, ours is faster or smaller. A row that is no timing has no seconds."""

    id: str
    ours_s: float | None = None
    baseline_s: float | None = None
    ratio: float
    target: float | None = None
    threads: int
    dtype: str
    shape: str
    note: str = ""


def bench_table(rows: Iterable[BenchRow]) -> str:
    """Return the rows as a GitHub table; seconds and ratios have three significant digits."""
    cells = [list(asdict(row).values()) for row in rows]
    headers = [field.name for field in fields(BenchRow)]
    return tabulate(cells, headers, tablefmt="github", floatfmt=".3g", missingval="")
