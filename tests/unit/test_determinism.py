"""Deterministic kernels are on inside the block and on CUDA alone, and everything is as before behind it."""

import os

import pytest
import torch

from metatt_scale.determinism import any_kernels, deterministic_kernels, kernels_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WORKSPACE, FLASH = "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"


def state():
    """All that the block may change."""
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        os.environ.get(WORKSPACE),
        os.environ.get(FLASH),
    )


@pytest.fixture
def untouched(monkeypatch):
    """Neither variable is set, and what a test leaves behind is undone."""
    for name in (WORKSPACE, FLASH):
        monkeypatch.setenv(name, "0")  # so that it is removed afterwards, whatever was set meanwhile
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False


def test_a_cpu_changes_nothing(untouched):
    before = state()
    with deterministic_kernels(CPU):
        assert state() == before


def test_cuda_and_back(untouched):
    before = state()
    with deterministic_kernels(CUDA):
        assert state() == (True, False, True, False, ":4096:8", "1")
    assert state() == before


def test_what_a_library_user_has_set_is_set_again(untouched, monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":16:8")
    monkeypatch.setenv(FLASH, "0")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True
    before = state()
    with pytest.raises(KeyError), deterministic_kernels(CUDA):
        assert state() == (True, False, True, False, ":16:8", "1")
        raise KeyError
    assert state() == before == (True, True, False, True, ":16:8", "0")


def test_another_workspace_is_refused(untouched, monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(ValueError, match=WORKSPACE), deterministic_kernels(CUDA):
        pass


def test_an_operation_without_such_a_kernel_is_named(untouched):
    before = state()
    with pytest.raises(ValueError, match="kthvalue CUDA") as caught, deterministic_kernels(CUDA):
        raise RuntimeError("kthvalue CUDA does not have a deterministic implementation, but you set ...")
    assert "training.resume" in str(caught.value) and state() == before
    with pytest.raises(RuntimeError, match="something else"), deterministic_kernels(CUDA):
        raise RuntimeError("something else")


def test_kernels_that_do_not_matter(untouched):
    with deterministic_kernels(CUDA):
        with any_kernels():
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()


def test_kernels_have_a_name(untouched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    fast = kernels_of(CUDA)
    with deterministic_kernels(CUDA):
        assert kernels_of(CUDA) != fast and kernels_of(CUDA).startswith("NVIDIA H100")
    assert kernels_of(CPU) == "the CPU"
