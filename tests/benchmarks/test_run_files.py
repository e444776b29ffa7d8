"""Mutations of run files and recorded results, a few of those that the script tries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZER = Path(__file__).parents[2] / "benchmarks" / "run_files.py"


@pytest.mark.skipif(not FUZZER.is_file(), reason="the benchmarks are not here")
def test_seeded_mutations_of_run_files() -> None:
    command = [sys.executable, str(FUZZER), "--count", "40", "--seed", "3"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "seed 3, 40 mutations" in found.stdout
    assert [int(count) for count in found.stdout.splitlines()[-1].split()[1:]][3:] == [0, 0, 0]
