"""Lets Triton's interpreter run the kernels where there is no GPU; set here, before any test imports triton."""

import os

import torch

# so that `--jaxtyping-packages=NAME,visionkernels.testing.typechecking.check` finds it
import visionkernels.testing.typechecking  # noqa: F401

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
