"""The two tiers of tests: the default one never sees a GPU, `--device` runs tests/gpu instead.

GPUs are hidden as soon as this file is imported, before any test or conftest imports torch. With `--device cuda` they
are shown again before tests are collected.
"""

import os
from pathlib import Path

import pytest

from tests.no_gpu import NO_GPU

GPU_TESTS = Path(__file__).parent / "gpu"
_CHOSEN_BY_USER = {name: os.environ.get(name) for name in NO_GPU}
os.environ.update(NO_GPU)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cuda", "cpu"),
        help="run tests/gpu alone: on a GPU, or on the CPU with small shapes, which shows their logic only",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda":
        for name, value in _CHOSEN_BY_USER.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def pytest_report_header(config: pytest.Config) -> str:
    device = config.getoption("--device")
    return f"tests/gpu alone, device: {device}" if device else "device: cpu; --device cuda runs tests/gpu instead"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted, dropped = [], []
    for item in items:
        is_gpu_test = GPU_TESTS in item.path.parents
        if is_gpu_test:
            item.add_marker("gpu")
        (wanted if is_gpu_test == bool(config.getoption("--device")) else dropped).append(item)
    items[:] = wanted
    config.hook.pytest_deselected(items=dropped)
