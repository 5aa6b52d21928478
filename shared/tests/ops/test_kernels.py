"""Every op's kernels, compiled ahead of time without a GPU."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("options", [pytest.param(["--once"], id="once"), pytest.param([], marks=pytest.mark.slow)])
def test_kernels_compile_without_spills(options):
    """Every kernel for every target, each configuration once or for all, with Triton not in interpreter mode."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "visionkernels.testing.kernels", *options]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = json.loads(result.stdout)
    met = {(row["kernel"], row["target"]) for row in rows}
    assert met == {(row["kernel"], target) for row in rows for target in ("sm_80", "sm_90", "gfx942")}
    bad = [row for row in rows if row["spills"] or row["shared_bytes"] > row["limit_shared_bytes"]]
    assert not bad, bad
