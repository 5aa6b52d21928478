"""Compiles every Triton kernel ahead of time, without a GPU, and reads its resources off the binary.

An op's `triton.py` lists the cases to compile: `aot_cases(is_hip=...)` returns a list of AotCase. `rooflines()` returns
the least time of typical calls on one stated GPU, a list of Roofline. Triton must not be in interpreter mode, so that
tests run this module as a program: `python -m visionkernels.testing.kernels [--once]`.
"""

import importlib
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from visionkernels.ops._cases import AotCase, Roofline

__all__ = ["TARGETS", "KernelReport", "compile_report", "roofline_report"]

TARGETS = {
    # name: (backend, architecture, lanes of a warp, bytes of shared memory that a program may use)
    "sm_80": ("cuda", 80, 32, 163 << 10),
    "sm_90": ("cuda", 90, 32, 227 << 10),
    "gfx942": ("hip", "gfx942", 64, 64 << 10),
}


@dataclass(frozen=True, kw_only=True)
class KernelReport:
    """The resources of one kernel on one target; `spills` counts bytes of stack on CUDA, spilt registers on AMD."""

    op: str
    kernel: str
    config: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    limit_shared_bytes: int

    @property
    def is_within_limits(self) -> bool:
        """Whether no register is spilt and shared memory suffices."""
        return self.spills == 0 and self.shared_bytes <= self.limit_shared_bytes


def compile_report(*, once: bool = False) -> list[KernelReport]:
    """Compile every case of every op for every target.

    With `once`, each case is compiled for one target only, in turn, so that still every kernel meets every target.
    Raises RuntimeError in interpreter mode.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler; unset it to compile kernels")
    reports = []
    for turn, (target, (backend, *_)) in enumerate(TARGETS.items()):
        cases = list(_cases(is_hip=backend == "hip"))
        totals, seen = Counter(case.kernel for _, case in cases), Counter[Any]()
        for op, case in cases:
            place = seen[case.kernel]
            seen[case.kernel] += 1
            # shifted by one after each round, since cases often come in threes
            if not once or (place + place // 3 - turn) % min(len(TARGETS), totals[case.kernel]) == 0:
                reports.append(_compile(op, case, target))
    return reports


def roofline_report() -> list[Roofline]:
    """Return the rooflines that each op's `triton.py` computes from the shapes of its models (`rooflines()`)."""
    return [line for _, module in _op_modules() for line in module.rooflines()]


def _cases(*, is_hip: bool) -> Iterator[tuple[str, AotCase]]:
    for op, module in _op_modules():
        for case in module.aot_cases(is_hip=is_hip):
            yield op, case


def _op_modules() -> Iterator[tuple[str, Any]]:
    import visionkernels.ops

    for module in pkgutil.iter_modules(visionkernels.ops.__path__):
        name = f"visionkernels.ops.{module.name}.triton"
        if module.ispkg and importlib.util.find_spec(name) is not None:
            yield module.name, importlib.import_module(name)


def _compile(op: str, case: AotCase, target: str) -> KernelReport:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, architecture, lanes, limit = TARGETS[target]
    # a launch specialises a kernel so: tensors are aligned, and so are the strides of maps with 16 n channels
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, (name, kind) in enumerate(case.signature.items())
        if kind.startswith("*") or name.startswith("stride_")
    }
    source = ASTSource(case.kernel, dict(case.signature), constexprs=dict(case.constants), attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget(backend, architecture, lanes), options=dict(case.options))
    registers, spills = (_cuda_usage if backend == "cuda" else _amd_usage)(compiled.asm)
    return KernelReport(
        op=op,
        kernel=case.kernel.__name__,
        config=case.config,
        target=target,
        registers=registers,
        spills=spills,
        shared_bytes=compiled.metadata.shared,
        limit_shared_bytes=limit,
    )


def _cuda_usage(assembly: Mapping[str, Any]) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        output = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK):(\d+)", output))
    # the stack of a kernel without calls holds only what did not fit into registers
    return int(usage["REG"]), int(usage["STACK"])


def _amd_usage(assembly: Mapping[str, Any]) -> tuple[int, int]:
    usage = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", assembly["amdgcn"]))
    return int(usage["vgpr_count"]), int(usage["vgpr_spill_count"]) + int(usage["sgpr_spill_count"])


if __name__ == "__main__":
    json.dump([asdict(row) for row in compile_report(once=sys.argv[1:] == ["--once"])], sys.stdout)
