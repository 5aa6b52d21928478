"""Every op's kernels, compiled ahead of time for every target, without a GPU."""

import json
import os
import subprocess
import sys


def test_kernels_compile_without_spills():
    """Every kernel, for every target, in a process whose Triton is not in interpreter mode."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "visionkernels.testing.kernels"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = json.loads(result.stdout)
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "gfx942"}
    bad = [row for row in rows if row["spills"] or row["shared_bytes"] > row["limit_shared_bytes"]]
    assert not bad, bad
