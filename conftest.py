"""Lets Triton's interpreter run the kernels where there is no GPU; set here, before any test imports triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
