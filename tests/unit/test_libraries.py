"""What libraries are told about their output before they load."""

import logging
import os
import warnings

import pytest

from metatt_scale.libraries import expects_gpu, quiet_libraries


@pytest.fixture
def devices(tmp_path):
    """A folder of device files; `devices("nvidia0")` adds some."""

    def add(*names):
        for name in names:
            (tmp_path / name).touch()
        return tmp_path

    add("null", "nvidiactl", "nvidia-uvm")
    return add


@pytest.mark.parametrize("files", [["nvidia0"], ["nvidia3"], ["kfd"], ["dxg"]], ids=str)
def test_a_gpu_is_expected_where_its_driver_has_a_file(devices, files):
    assert not expects_gpu({}, devices())
    assert expects_gpu({}, devices(*files))


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"ACCELERATE_USE_CPU": "true"}, False),
        ({"ACCELERATE_USE_CPU": "false"}, True),
        ({"CUDA_VISIBLE_DEVICES": ""}, False),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, False),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, False),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, True),
        ({"CUDA_VISIBLE_DEVICES": "GPU-4f2a"}, True),
    ],
    ids=str,
)
def test_a_user_may_rule_gpus_out(devices, variables, expected):
    assert expects_gpu(variables, devices("nvidia0")) == expected


@pytest.mark.parametrize(
    "files, own, level", [([], None, "FATAL"), (["nvidia0"], None, "ERROR"), ([], "INFO", "INFO")], ids=str
)
def test_the_lines_of_nccls_watchdog_are_shown(devices, monkeypatch, files, own, level):
    """PyTorch writes them as errors, and then aborts the process: nothing else is said."""
    monkeypatch.setattr(os, "environ", {"TORCH_CPP_LOG_LEVEL": own} if own else {})
    monkeypatch.setattr(logging.getLogger("DeepSpeed"), "filters", [])
    with warnings.catch_warnings():
        quiet_libraries(devices(*files))
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == level
