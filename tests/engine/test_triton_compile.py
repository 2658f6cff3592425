"""Triton's kernels compiled for GPUs, in a process of its own: in this one they run in the interpreter."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from helpers.shared import ROOT


@pytest.mark.process
@pytest.mark.skipif(find_spec("triton") is None, reason="torch came without Triton")
def test_every_kernel_compiles_for_a100_and_h100_without_spills(tmp_path, record_property):
    """16 kernels in two dtypes for two architectures; 7 of them in two sizes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    command = [sys.executable, "-m", "benchmarks.triton_compile", str(tmp_path / "kernels.json")]
    end = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr[-2000:]
    rows = json.loads((tmp_path / "kernels.json").read_text())["kernels"]
    for row in rows:
        record_property("-".join(map(str, list(row.values())[:4])), list(row.values())[4:])
    assert len(rows) == 92
    assert {(row["dtype"], row["architecture"]) for row in rows} == {
        (dtype, architecture) for dtype in ("float32", "bfloat16") for architecture in (80, 90)
    }
    assert [row for row in rows if row["spills"]] == []
