"""What the tests of every package share: golden cases, tolerances, the checks of an op and of its compiled kernels."""
