"""The plan's memory of a training rank is that of the real trainer; all cases are in `benchmarks/memory.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_the_estimate_is_within_15_percent_of_a_measured_peak_above_1_gb(tmp_path, zero_stage):
    words = ["--model", "qwen2", "--ranks", "1", "--zero-stage", str(zero_stage), "--folder", str(tmp_path)]
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), *words]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak_mib"] > 1000
    assert abs(found["estimate_mib"] / found["peak_mib"] - 1) <= 0.15, found
