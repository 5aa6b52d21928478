"""Shared by the tests of every package: golden cases, tolerances, the checks of an op and of its compiled kernels."""
