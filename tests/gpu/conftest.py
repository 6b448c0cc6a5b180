"""What the GPU tests share; `--device cpu` runs them on small shapes without a GPU, which shows their logic only."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; without it its sums may vary

RESULTS = "GPU_CHECK_RESULTS"
"""Variable that names the file to which tests/gpu/check.py wants a line for every test, as soon as it has ended."""


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where to compute."""
    if request.config.getoption("--device") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.exit(f"--device is cuda, but PyTorch {torch.__version__} finds no GPU", returncode=4)
    return torch.device("cuda", 0)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What runs remember of backbones goes with the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METATT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(autouse=True)
def in_full_precision(device: torch.device) -> Iterator[None]:
    """No TF32, and what a test has left to the device is done, or has failed, before the next one begins."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    if device.type == "cuda":
        torch.cuda.synchronize()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = os.environ.get(RESULTS)
    if file is None or (report.when != "call" and report.outcome == "passed"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    said = {"test": report.nodeid.rpartition("/")[2], "outcome": report.outcome, "seconds": round(report.duration, 2)}
    with Path(file).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({**said, "said": report.capstdout[-2000:], "reason": reason[-6000:]}) + "\n")
