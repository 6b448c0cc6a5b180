"""The real code on fake CUDA tensors: every check_*.py beside this file, each in a pytest of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_cuda import backend

HERE = Path(__file__).parent
CHECKS = sorted(path.name for path in HERE.glob("check_*.py"))


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The idle CUDA backend."""
    if reason := backend.why_not():
        pytest.skip(reason)
    return backend.build(tmp_path_factory.mktemp("backend"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_on_fake_cuda(library: Path, name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", HERE / name, "-q", "-p", "no:cacheprovider", "--basetemp", tmp_path]
    environment = {**os.environ, backend.VARIABLE: str(library), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    assert re.match(r"[0-9]+ passed in", summary), f"a check was left out: {summary}"
