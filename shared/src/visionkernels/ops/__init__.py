"""Operators that have a definition, a portable fast path and GPU kernels, behind one dispatch rule.

One folder an op: `from visionkernels.ops.region_attention import region_attention`.
"""

from visionkernels.ops._dispatch import Backend, choose_backend, use_backend, without_autocast

__all__ = ["Backend", "choose_backend", "use_backend", "without_autocast"]
